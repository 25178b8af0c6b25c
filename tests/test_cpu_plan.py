"""CpuPlan: the same results as its steps one by one, whatever the shapes, layouts and threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    MAP_DTYPES,
    NAMES,
    bottleneck_weights,
    check_small_hourglass,
    conv_weights,
    is_channels_last,
    laid_out,
    native,
    needs_native,
    random_map,
    small_hourglass,
)
from torch import Tensor

pytestmark = needs_native


def halve(plan: Any, x: int, y: int) -> None:
    plan.pool(x, y, "max", (2, 2), (2, 2))


@pytest.fixture(scope="module", params=MAP_DTYPES, ids=NAMES.get)
def plan(request: pytest.FixtureRequest) -> tuple[Any, torch.dtype]:
    return small_hourglass(NAMES[request.param]), request.param


# ---- results ----


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(
    plan: tuple[Any, torch.dtype],
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    layout: str,
) -> None:
    x = random_map(batch, 3, 4 * height, 4 * width, dtype=dtype, layout=layout)
    check_small_hourglass(*plan, x)


def test_a_plan_gives_what_its_ops_give() -> None:
    w = bottleneck_weights(16, 8, 16)
    plan = native.CpuPlan("float32")
    plan.bottleneck(0, 1, **w, low=2)
    plan.conv(1, 3, W["weight"], W["bias"], padding=(1, 1))
    plan.finish([0, 2], [3])
    x, low = random_map(2, 16, 6, 6), random_map(2, 16, 3, 3, seed=2)
    y = torch.ops.hgfast.bottleneck(x, *w.values(), low=low)
    y = torch.ops.hgfast.conv(y, W["weight"], W["bias"], padding=[1, 1])
    (out,) = plan.run([x, low])
    assert torch.equal(out, y)
    assert native.last_path() == plan.path + "/conv"


@pytest.mark.parametrize("size", [3, 6, 40])
def test_factors_are_folded_into_weights(size: int) -> None:
    """In float64, rounded once; for every size, after other sizes, from weights of any layout."""
    factor = torch.rand(32, dtype=torch.float64) + 0.5
    w, block = conv_weights(32, 32, (3, 3)), bottleneck_weights(32, 32, 32)
    half = conv_weights(32, 32, (1, 1), norm=False)

    def folded(weight: Tensor) -> Tensor:
        return (weight.double() * factor[:, None, None, None]).float()

    def begun(factor: Tensor | None, w3: Tensor, w2: Tensor, w1: Tensor) -> Any:
        plan = native.CpuPlan("float32", high=True)
        plan.conv(0, 1, **{**w, "weight": w3}, padding=(1, 1), factor=factor)
        plan.bottleneck(1, 2, **{**block, "w2": w2}, w2_factor=factor)
        plan.conv(2, 3, **{**half, "weight": w1}, factor=factor)
        plan.finish([0], [1, 3])
        return plan

    weights = w["weight"], block["w2"], half["weight"]
    plan = begun(factor, *(v.to(memory_format=torch.channels_last) for v in weights))
    expected = begun(None, *map(folded, weights))
    plan.run([random_map(1, 32, 9, 9)])
    x = random_map(2, 32, size, size)
    for one, other in zip(plan.run([x]), expected.run([x]), strict=True):
        assert torch.equal(one, other)


W = conv_weights(16, 8, (3, 3))


def test_the_layout_of_the_outputs_is_that_of_the_first_input(
    plan: tuple[Any, torch.dtype],
) -> None:
    for dtype in MAP_DTYPES:
        x = random_map(2, 3, 16, 24, dtype=dtype)
        outputs = [plan[0].run([laid_out(x, layout)]) for layout in LAYOUTS]
        assert all(out.is_contiguous() for out in outputs[0])
        assert all(is_channels_last(out) for out in outputs[1] + outputs[2])
        for one, other in zip(outputs[0], outputs[1], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_middles_as_outputs(dtype: torch.dtype, layout: str) -> None:
    """Also: an input that no step reads, and outputs that are nobody else's memory."""
    plan = native.CpuPlan(NAMES[dtype])
    halve(plan, 0, 1)
    halve(plan, 1, 2)
    plan.add(2, 2, 3)
    plan.finish([0, 7], [7, 0, 1, 3, 1])
    x = random_map(1, 6, 9, 8, dtype=dtype, layout=layout)
    unused = random_map(2, 1, 3, 3, dtype=dtype, seed=2)
    before = x.clone(), unused.clone()
    outputs = plan.run([x, unused])
    pooled = torch.max_pool2d(x, 2)
    expected = [unused, x, pooled, 2 * torch.max_pool2d(pooled, 2), pooled]
    for out, want in zip(outputs, expected, strict=True):
        assert torch.equal(out, want)
    assert outputs[2] is outputs[4]
    for out in outputs:
        out.zero_()
    assert torch.equal(x, before[0])
    assert torch.equal(unused, before[1])
    again = plan.run([x, unused])  # nothing of the first call is written to
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_several_inputs_of_different_layouts_and_dtypes() -> None:
    plan = native.CpuPlan("float32")
    plan.add(0, 1, 2)
    plan.finish([0, 1], [2])
    a = random_map(1, 20, 5, 18, layout="channels_last")
    b = random_map(1, 20, 5, 18, dtype=torch.bfloat16, layout="sliced", seed=2)
    assert torch.equal(plan.run([a, b])[0], a + b)
    (out,) = plan.run([b, a])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (a + b).bfloat16())


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 16, 2, 2), (1, 256, 2, 50), (1, 3, 32, 2)])
def test_shapes_on_which_layouts_are_alike(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plan = native.CpuPlan(NAMES[dtype])
    halve(plan, 0, 1)
    plan.finish([0], [1])
    x = random_map(*shape)
    for layout in LAYOUTS:
        (out,) = plan.run([laid_out(x, layout)])
        assert torch.equal(out, torch.max_pool2d(x.to(dtype), 2).float())


def test_pool_and_add_keep_nan() -> None:
    plan = native.CpuPlan("float32")
    halve(plan, 0, 1)
    plan.add(1, 1, 2)
    plan.finish([0], [2])
    x = torch.rand(1, 17, 5, 4)
    x[0, 3, 1, 2] = torch.nan
    x[0, 4, 4, 0] = torch.nan  # in the odd row, which is dropped
    (out,) = plan.run([x])
    assert out.isnan().sum() == 1
    assert out[0, 3, 0, 1].isnan()


def test_works_under_inference_mode_and_with_parameters() -> None:
    with torch.inference_mode():
        plan = native.CpuPlan("float32")
        weight = torch.nn.Parameter(torch.randn(4, 3, 1, 1))
        plan.conv(0, 1, weight, torch.nn.Parameter(torch.zeros(4)))
        plan.finish([0], [1, 0])
        x = torch.randn(1, 3, 4, 4)
        inside = plan.run([x])
        weight.mul_(0)  # the plan has its own copy
    outside = plan.run([x])
    assert inside[0].is_inference()
    assert not outside[0].is_inference()
    assert not outside[0].requires_grad
    assert torch.equal(inside[0], outside[0])
    assert outside[0].abs().sum() > 0


# ---- repeats, threads, memory ----


def test_repeats_give_the_same_bits(plan: tuple[Any, torch.dtype]) -> None:
    x = random_map(2, 3, 32, 48)
    first = plan[0].run([x])
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(plan[0].run([x]), first, strict=True))


def test_any_number_of_threads_gives_the_same_bits(plan: tuple[Any, torch.dtype]) -> None:
    x = random_map(1, 3, 64, 64)
    first = plan[0].run([x])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(plan[0].run([x]), first, strict=True))
    finally:
        torch.set_num_threads(before)


def test_two_threads_at_once(plan: tuple[Any, torch.dtype]) -> None:
    """Each with shapes of its own, so that arenas of different sizes change hands."""
    wrong: list[str] = []
    sizes = [[16, 32, 48], [64, 16]]
    expected = {
        size: [out.clone() for out in plan[0].run([random_map(1, 3, size, size)])]
        for size in {*sizes[0], *sizes[1]}
    }

    def work(mine: list[int]) -> None:
        for i in range(60):
            size = mine[i % len(mine)]
            got = plan[0].run([random_map(1, 3, size, size)])
            if not all(torch.equal(a, b) for a, b in zip(got, expected[size], strict=True)):
                wrong.append(f"call {i}, size {size}")

    threads = [threading.Thread(target=work, args=(mine,)) for mine in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_python_runs_meanwhile() -> None:
    plan = native.CpuPlan("float32")
    w = conv_weights(64, 64, (3, 3))
    for i in range(10):
        plan.conv(i, i + 1, **w, padding=(1, 1))
    plan.finish([0], [10])
    x = random_map(4, 64, 96, 96)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    watcher = threading.Thread(target=tick)
    watcher.start()
    try:
        begin = time.perf_counter()
        plan.run([x])
        end = time.perf_counter()
    finally:
        done.set()
        watcher.join()
    inside = [t for t in ticks if begin + 0.1 * (end - begin) < t < end - 0.1 * (end - begin)]
    assert inside, f"no other Python code ran during the {end - begin:.3f} s of the call"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow(plan: tuple[Any, torch.dtype]) -> None:
    """More shapes than layouts are kept, each many times."""
    inputs = [random_map(1 + i % 3, 3, 32 + 4 * i, 48, layout=LAYOUTS[i % 3]) for i in range(13)]

    def rounds(n: int) -> int:
        for _ in range(n):
            for x in inputs:
                plan[0].run([x])
        return resident_bytes()

    before = rounds(4)
    growth = rounds(8) - before
    assert growth < 2 << 20, f"{growth / 2**20:.1f} MiB more after {8 * len(inputs)} calls"


# ---- errors ----


def begun() -> Any:
    plan = native.CpuPlan("float32")
    halve(plan, 0, 1)
    return plan


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p: native.CpuPlan("float16"), 'element "float32" or "bfloat16", given "float16"'),
        (
            lambda p: native.CpuPlan("bfloat16", high=True),
            'element "float32" where high is asked for, given "bfloat16"',
        ),
        (lambda p: halve(p, 0, 1), r"step 1 \(pool\): value 1 is already .* of step 0"),
        (lambda p: p.add(3, 4, 3), r"step 1 \(add\): value 3 is both input and output"),
        (lambda p: halve(p, 5, 0), r"step 1 \(pool\): its output, value 0, is used before"),
        (
            lambda p: p.conv(1, 2, torch.zeros(4, 3, 1, 1), torch.zeros(5)),
            r"step 1 \(conv\): expected bias of shape \[4\], given \[5\]",
        ),
        (
            lambda p: p.bottleneck(
                1, 2, **{**bottleneck_weights(8, 4, 8), "w2": torch.zeros(4, 4, 1, 1)}
            ),
            r"step 1 \(bottleneck\): expected w2 of shape \[4, 4, 3, 3\], given \[4, 4, 1, 1\]",
        ),
        (
            lambda p: p.conv(1, 2, torch.zeros(4, 3, 3, 3), torch.zeros(4), factor=torch.ones(3)),
            r"step 1 \(conv\): expected factor of 4 numbers on the CPU",
        ),
        (lambda p: p.finish([], [1]), r"at least one input and one output, given 0 and 1"),
        (lambda p: p.finish([5], [1]), r"step 0 \(pool\): value 0 is neither an input nor"),
        (lambda p: p.finish([0, 0], [1]), r"input value 0 is listed twice"),
        (lambda p: p.finish([0, 1], [1]), r"input value 1 is the output of step 0 \(pool\)"),
        (lambda p: p.finish([0], [2]), r"output value 2 is neither an input nor the output"),
    ],
)
def test_plans_that_make_no_sense(act: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act(begun())


def test_a_refused_finish_can_be_repeated() -> None:
    plan = begun()
    with pytest.raises(ValueError, match="output value 2"):
        plan.finish([0], [1, 2])
    plan.finish([0], [1])
    assert len(plan.run([torch.rand(1, 1, 4, 4)])) == 1


def test_the_order_of_calls() -> None:
    plan = begun()
    with pytest.raises(RuntimeError, match="not finished"):
        plan.run([torch.zeros(1, 1, 4, 4)])
    plan.finish([0], [1])
    with pytest.raises(RuntimeError, match=r"step 1 \(pool\): the plan is finished"):
        halve(plan, 1, 2)
    with pytest.raises(RuntimeError, match="finished already"):
        plan.finish([0], [1])


def two_inputs() -> Any:
    plan = native.CpuPlan("float32")
    plan.bottleneck(0, 2, **bottleneck_weights(8, 4, 8))
    plan.upsample_add([1], [2], 2, 3)
    halve(plan, 3, 4)
    plan.add(4, 1, 5)
    plan.conv(5, 6, **conv_weights(8, 4, (3, 3)))
    plan.finish([0, 1], [6])
    return plan


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.zeros(1, 8, 8, 8)], r"expected 2 inputs, given 1"),
        (
            [torch.zeros(1, 9, 8, 8), torch.zeros(1, 8, 4, 4)],
            r"step 0 \(bottleneck\): expected x of 8 channels.*given \[1, 9, 8, 8\]",
        ),
        (
            [torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 4, 5)],
            r"step 1 \(upsample_add\): expected low of shape \[1, 8, 4, 4\], given \[1, 8, 4, 5\]",
        ),
        (
            [torch.zeros(1, 8, 7, 8), torch.zeros(1, 8, 4, 4)],
            r"step 1 \(upsample_add\): expected a height.*multiples of 2 .*given \[1, 8, 7, 8\]",
        ),
        (
            [torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 2)],
            r"step 4 \(conv\): .*as large as the kernel of 3x3, given \[1, 8, 2, 2\]",
        ),
        (
            [torch.zeros(8, 8, 8), torch.zeros(1, 8, 4, 4)],
            r"expected input 0 of shape \(batch, channels, height, width\), given \[8, 8, 8\]",
        ),
        (
            [torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 4, 4).double()],
            r"expected input 1 in float32 or bfloat16, given Double",
        ),
        (
            [torch.zeros(1, 8, 8, 8, device="meta"), torch.zeros(1, 8, 4, 4)],
            r"expected input 0 on the CPU, given meta",
        ),
    ],
)
def test_inputs_that_do_not_fit(inputs: list[Tensor], message: str) -> None:
    plan = two_inputs()
    good = [torch.rand(1, 8, 12, 12), torch.rand(1, 8, 6, 6)]
    before = plan.run(good)
    for _ in range(2):  # an error leaves nothing behind
        with pytest.raises(ValueError, match=message):
            plan.run(inputs)
    assert torch.equal(plan.run(good)[0], before[0])


# ---- every instruction set, in a process of its own ----

ISAS = native.isa_list() if native else []


def run_isa_check(isa: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent / "isa_check.py"
    return subprocess.run(
        [sys.executable, script, isa], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(not runnable, reason=f"this CPU cannot run {name}")
        )
        for name, runnable in ISAS
    ],
)
def test_instruction_set(isa: str) -> None:
    result = run_isa_check(isa)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{isa}: ok" in result.stdout


@pytest.mark.parametrize("isa", ["nonsense", *(name for name, runnable in ISAS if not runnable)])
def test_instruction_set_that_cannot_run(isa: str) -> None:
    result = run_isa_check(isa)
    assert result.returncode != 0
    assert isa in result.stderr.splitlines()[-1]
    assert "RuntimeError" in result.stderr


def test_the_best_instruction_set_is_taken() -> None:
    best = next(name for name, runnable in ISAS if runnable and name != "amx_model")
    assert native.CpuPlan("float32").path in {best, "amx_model"}
