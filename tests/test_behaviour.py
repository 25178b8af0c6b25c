"""Optimised networks under use: the same bits every time, threads, memory, the first call."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import image, small_hourglass
from op_checks import LAYOUTS, conv_weights, native, needs_native, random_map
from torch import Tensor, nn

import hgfast

pytestmark = needs_native

PRECISIONS = ["highest", "high", "medium"]

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc"
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The outputs of every stack in one tensor."""
    with torch.inference_mode():
        return torch.stack(list(model(x)))


# ---- results ----


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_run_gives_the_same_bits(precision: str, count: int) -> None:
    torch.set_num_threads(count)
    fast = hgfast.optimize(small_hourglass(stacks=2), precision=precision)
    other = copy.deepcopy(fast)  # packs anew
    for x in (image(), image(3, 96, 160)):
        first = run(fast, x)
        assert first.isfinite().all()
        for model in (fast, other, fast, other):
            assert torch.equal(run(model, x), first)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_share_a_model_and_copies_of_it(precision: str) -> None:
    """Each with shapes of its own, some of which no thread has packed weights for yet."""
    torch.set_num_threads(2)
    eager = small_hourglass(stacks=2)
    shapes = [(1, 64, 64), (2, 32, 96), (3, 64, 32), (1, 128, 96), (2, 160, 160), (1, 32, 32)]
    inputs = [image(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    expected = [run(hgfast.optimize(eager, precision=precision), x) for x in inputs]
    shared = hgfast.optimize(eager, precision=precision)
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        own = copy.deepcopy(shared)
        for turn in range(20):
            i = order.randrange(len(inputs))
            for name, model in (("shared", shared), ("its own", own)):
                if not torch.equal(run(model, inputs[i]), expected[i]):
                    wrong.append(f"thread {seed}, turn {turn}, {name} model, {shapes[i]}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_a_large_batch_gives_what_its_images_give(element: str, layout: str) -> None:
    """It runs in pieces, the last one smaller; one output is an input, one is of the middle."""
    plan = native.CpuPlan(element)
    plan.conv(0, 2, **conv_weights(8, 32, (1, 1)))
    plan.conv(2, 3, **conv_weights(32, 32, (3, 3)), padding=(1, 1))
    plan.pool(3, 4, "max", (2, 2), (2, 2))
    plan.add(4, 1, 5)
    plan.finish([0, 1], [5, 0, 4])
    dtype = getattr(torch, element)
    x = random_map(11, 8, 192, 192, dtype=dtype, layout=layout)
    half = random_map(11, 32, 96, 96, dtype=dtype, seed=2)
    whole = plan.run([x, half])
    assert whole[0].is_contiguous() == x.is_contiguous()
    for i in range(11):
        alone = plan.run([x[i : i + 1], half[i : i + 1]])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


# ---- threads ----


def processor_time() -> dict[str, float]:
    """In seconds, by thread of this process."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        times[task.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return times


@needs_proc
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two threads share one core")
def test_as_many_threads_work_as_torch_was_told() -> None:
    fast = hgfast.optimize(small_hourglass(stacks=2))
    x = image(2, 128, 128)
    for count in (2, 1, 2):
        torch.set_num_threads(count)
        run(fast, x)
        time.sleep(0.1)  # threads that have nothing to do look out for work a little longer
        before = processor_time()
        spent: dict[str, float] = {}
        while sum(spent.values()) < 0.5:
            run(fast, x)
            spent = {task: t - before.get(task, 0) for task, t in processor_time().items()}
        busy = sum(t > 0.05 * sum(spent.values()) for t in spent.values())
        assert busy == count, f"{busy} threads worked: {spent}"


# ---- memory, and the first call ----


@needs_proc
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_memory_does_not_grow_in_a_thousand_calls(precision: str) -> None:
    fast = hgfast.optimize(small_hourglass(), precision=precision)
    sizes = range(32, 161, 32)
    shapes = [(b, h, w) for b in (1, 2, 3) for h in sizes for w in sizes]
    inputs = [image(*shape).contiguous() for shape in shapes]
    order = random.Random(0)

    def calls(count: int) -> int:
        for _ in range(count):
            run(fast, order.choice(inputs))
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = calls(300)
    growth = (calls(1000) - before) / 2**20
    assert growth < 4, f"{growth:.1f} MiB more after 1000 calls"


@functools.cache
def cost(mode: str) -> dict[str, float]:
    script = Path(__file__).parent / "behaviour_check.py"
    # What is freed goes back to the system at once: what malloc keeps of it differs between runs.
    done = subprocess.run(
        [sys.executable, script, mode],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def is_fast() -> bool:
    return native is not None and native.CpuPlan("float32").path not in ("amx_model", "portable")


@needs_proc
@pytest.mark.skipif(not is_fast(), reason="HG-8 takes minutes without vector instructions")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_hg8_costs_beside_time(precision: str) -> None:
    """At batch 8 no more memory than eager, and the first call at most a second."""
    ours, eager = cost(precision), cost("eager")
    assert ours["memory"] <= eager["memory"], f"{ours}, eager: {eager}"
    assert ours["first"] <= 1, f"{ours['first']:.2f} s more than later calls"
