"""Whole networks as CUDA graphs, optimize(cuda_graph=True), on the device.

A rehearsal has the emulated kernels, and of graphs, streams and events the double of
tests/graph_double.py.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu_checks import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    captured,
    kernel_ops,
    kernels,
    needs_kernels,
    require_device,
    small_network,
    some,
    synchronise,
)
from graph_double import Double, recorded
from graph_double import Lanes as DoubleLanes
from torch import Tensor, nn

import hgfast
from hgfast.runtime import branches, cuda, evidence, graphs
from hgfast.runtime.lanes import Lanes

require_device()

pytestmark = needs_kernels
DTYPE = DTYPES[0]
only_a_device = pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no device memory or streams")


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double | None]:
    """What stands in for the device in a rehearsal."""
    if not REHEARSAL:
        yield None
        return
    made = Double()
    emulated = cuda.Kernels(kernels, kernel_ops, DEVICE)
    for name in ("bottleneck", "stem", "head"):
        setattr(emulated, name, recorded(getattr(emulated, name), made))
    for name, kernel in emulated.special.items():
        emulated.special[name] = kernel and recorded(kernel, made)
    emulated.subtree = emulated.subtree and recorded(emulated.subtree, made)
    emulated.streams = DoubleLanes(made)

    def choose(plan: Any, weights: Any, precision: str, as_computed: bool = False) -> Any:
        dtype = next(iter(weights.values())).dtype
        reason = cuda.unsupported(plan, dtype, precision, emulated)
        return reason or cuda.CudaExecutor(plan, weights, precision, emulated, as_computed)

    monkeypatch.setattr("hgfast.region.choose", choose)
    monkeypatch.setattr(graphs, "device_of", lambda _: made)
    yield made
    assert made.races == []


@contextlib.contextmanager
def a_stream(double: Double | None, name: str) -> Iterator[None]:
    """A stream of its own, for this thread."""
    if double is not None:
        with double.on(name):
            yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def image(seed: int = 0, batch: int = 1, size: int = some(64, 16)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).to(DEVICE, DTYPE)


def graphed(model: nn.Module, **options: Any) -> nn.Module:
    return hgfast.optimize(model, "medium", strict=True, cuda_graph=True, **options)


def plain(model: nn.Module, **options: Any) -> nn.Module:
    return hgfast.optimize(model, "medium", strict=True, cuda_graph=False, **options)


def network() -> nn.Module:
    return small_network().to(DTYPE).requires_grad_(False)


def leaves(values: Any) -> list[Tensor]:
    found: list[Tensor] = torch.utils._pytree.tree_leaves(values)
    return found


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def graphs_of(fast: nn.Module) -> int:
    return sum(use.cached for use in hgfast.report(fast).graphs)


def in_threads(*works: Callable[[], None]) -> None:
    """All at once; the first error of any."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@torch.inference_mode()
def test_replays_give_the_bits_of_plain_runs() -> None:
    model = network()
    fast, expected = graphed(model), plain(model)
    kept = []
    for seed in range(some(5, 3)):
        for batch, size in ((1, 16), (some(8, 2), 16), (1, some(64, 32))):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = image(seed, batch, size).contiguous(memory_format=layout)
                y, wanted = fast(x), expected(x)
                assert same(y, wanted)
                assert [a.stride() for a in leaves(y)] == [a.stride() for a in leaves(wanted)]
                kept.append((y, wanted))
    assert all(same(y, wanted) for y, wanted in kept)  # nobody wrote to earlier results
    assert graphs_of(fast) == 6
    assert hgfast.report(fast).graphs[0].reason == ""
    assert hgfast.verify(model, fast, image()).ok


@pytest.mark.parametrize("options", [{"decode": "quarter"}, {}], ids=["decode", "float32"])
@torch.inference_mode()
def test_decoded_and_float32(options: dict[str, Any]) -> None:
    model = small_network().requires_grad_(False)
    fast, expected = graphed(model, **options), plain(model, **options)
    for seed in range(4):
        assert same(fast(image(seed).float()), expected(image(seed).float()))
    assert graphs_of(fast) == 1


@pytest.mark.parametrize("batch", [1, some(64, 2)])
@torch.inference_mode()
def test_ten_thousand_replays_give_the_same_bits(batch: int) -> None:
    model = network()
    fast = graphed(model)
    x, other = image(1, batch), image(2, batch)
    first = plain(model)(x)[-1]
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for turn in range(some(10000, 12)):
        if turn % 4 == 3:  # what it leaves must not be seen
            fast(other)
            continue
        wrong += (fast(x)[-1] != first).any()
    assert int(wrong) == 0
    assert graphs_of(fast) == 1


def test_threads_and_streams(double: Double | None) -> None:
    """Each thread on a stream of its own, all on the same graphs; two models."""
    model = network()
    pairs = [(graphed(model), plain(model))]
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.parameters()).mul_(2)
    pairs.append((graphed(changed), plain(changed)))
    turns = some(300, 12)
    inputs = {
        (number, kind): image(10 * number + kind, 1 + kind % 2)
        for number in range(4)
        for kind in range(3)
    }
    with torch.inference_mode():
        expected = {
            (key, index): pair[1](x)[-1]
            for key, x in inputs.items()
            for index, pair in enumerate(pairs)
        }
    synchronise()

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            with a_stream(double, f"stream {number}"):
                wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
                for turn in range(turns):
                    key, index = (number, turn % 3), turn // 3 % 2
                    wrong += (pairs[index][0](inputs[key])[-1] != expected[key, index]).any()
                assert int(wrong) == 0

        return run

    in_threads(*(work(number) for number in range(4)))
    assert [graphs_of(fast) for fast, _ in pairs] == [2, 2]


def test_others_are_at_work_while_a_thread_captures() -> None:
    """They allocate, compute, wait for their own stream, and replay graphs."""
    model = network()
    fast, expected = graphed(model), plain(model)
    over = threading.Event()
    sizes = [16 * n for n in range(1, some(7, 3))]

    def capture() -> None:
        try:
            for size in sizes:
                for seed in range(3):
                    x = image(seed, 1, size)
                    assert same(fast(x), expected(x))
        finally:
            over.set()

    def compute() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            x = torch.full((1000 + turn, 100), 2.0, device=DEVICE)
            assert float((x @ x.T)[0, 0]) == 400

    def replay() -> None:
        x = image(7, 2)
        wanted = expected(x)
        while not over.is_set():
            assert same(fast(x), wanted)

    in_threads(capture, compute, replay)
    assert hgfast.report(fast).graphs[0].reason == ""
    assert graphs_of(fast) == len(sizes) + 1


@torch.no_grad()
def test_changed_weights_are_followed() -> None:
    model = network()
    fast = graphed(model)
    for _ in range(some(20, 2)):
        next(fast.parameters()).mul_(1.25)
        wanted = plain(hgfast.restore(copy.deepcopy(fast)))(image())
        for _ in range(3):
            assert same(fast(image()), wanted)
        assert graphs_of(fast) == 1


@torch.inference_mode()
def test_more_shapes_than_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPACITY", some(graphs.CAPACITY, 2))
    model = network()
    fast, expected = graphed(model), plain(model)
    for _ in range(some(3 * graphs.PATIENCE, 3)):
        for batch in range(1, graphs.CAPACITY + 2):
            assert same(fast(image(batch, batch, 16)), expected(image(batch, batch, 16)))
    assert graphs_of(fast) == graphs.CAPACITY


@only_a_device
@torch.inference_mode()
def test_a_capture_around_it_records_the_launches() -> None:
    model = network()
    fast, expected = graphed(model), plain(model)
    x = image()
    for _ in range(3):
        fast(x)
    replay, output = captured(lambda: fast(x)[-1])
    for seed in range(1, 4):
        x.copy_(image(seed))
        replay()
        synchronise()
        assert torch.equal(output, expected(x)[-1])


@torch.inference_mode()
def test_a_capture_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, double: Double | None
) -> None:
    run = cuda.CudaExecutor.run

    def synchronising(self: Any, inputs: Any) -> Any:
        values = run(self, inputs)
        if double is not None:
            double.synchronise()
        else:
            torch.cuda.current_stream().synchronize()
        return values

    model = network()
    fast, expected, x = graphed(model), plain(model), image()
    wanted = expected(x)
    with monkeypatch.context() as patch:
        patch.setattr(cuda.CudaExecutor, "run", synchronising)
        assert same(fast(x), wanted)
        with pytest.warns(hgfast.HgfastWarning, match="without a CUDA graph, because a capture"):
            assert same(fast(x), wanted)
        assert same(fast(x), wanted)
    synchronise()
    for _ in range(graphs.PATIENCE + 2):  # now it is possible
        assert same(fast(x), wanted)
    assert graphs_of(fast) == 1
    other = graphed(model)
    for _ in range(3):
        assert same(other(x), wanted)
    assert graphs_of(other) == 1


@only_a_device
@torch.inference_mode()
def test_inputs_that_come_late_in_a_side_stream() -> None:
    model = network()
    fast, wanted = graphed(model), plain(model)(image(9))
    x = image()
    for _ in range(3):
        fast(x)
    x.zero_()
    late, busy = image(9), torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy * 1e-4
        x.copy_(late)
        y = fast(x)
    stream.synchronize()
    assert same(y, wanted)


@only_a_device
@torch.inference_mode()
def test_dropped_while_replays_are_under_way() -> None:
    """Graphs, their memory and the packed weights outlive their last replay on any stream."""
    model = network()
    wanted = plain(model)(image(1, 8))
    x = image(1, 8)
    for _ in range(20):
        fast = graphed(model)
        stream = torch.cuda.Stream()
        for _ in range(2):
            fast(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            busy = torch.randn(4096, 4096, device=DEVICE)
            for _ in range(10):
                busy = busy @ busy * 1e-4
            y = fast(x)
        del fast
        gc.collect()
        for _ in range(20):
            torch.full((1 << 18,), torch.nan, dtype=DTYPE, device=DEVICE)
        stream.synchronize()
        assert same(y, wanted)


# ---- skip branches beside the rest ----


@pytest.fixture
def schedules(monkeypatch: pytest.MonkeyPatch) -> list[tuple[branches.Turn, ...]]:
    """Branches are switched on; what ran in lanes."""
    monkeypatch.setenv(evidence.UNPROVEN, "branches")
    seen: list[tuple[branches.Turn, ...]] = []
    run = Lanes.run

    def spy(self: Lanes, turns: Any, launch: Any) -> None:
        seen.append(turns)
        run(self, turns, launch)

    monkeypatch.setattr(Lanes, "run", spy)
    return seen


@pytest.mark.parametrize("features", ["branches", "latency,branches"])
@torch.inference_mode()
def test_branches_beside_the_rest(
    features: str, schedules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As right as in a row, to a rounding of each join; on Hopper also where launches begin before
    the one in front has ended."""
    monkeypatch.setenv(evidence.UNPROVEN, features)
    model = network()
    fast = graphed(model)
    for batch, size in ((1, 32), (some(4, 2), 32), (1, some(64, 16))):
        x = image(batch, batch, size)
        assert hgfast.verify(model, fast, x).ok
        for seed in range(3):
            x = image(seed, batch, size)
            for given, wanted in zip(leaves(fast(x)), leaves(model(x)), strict=True):
                torch.testing.assert_close(given, wanted, rtol=0.1, atol=0.1)
    assert len(schedules) == 3
    # Both levels of both stacks; the lower one may be a part of a chain that is one launch.
    found = {sum(turn.part == "join" for turn in turns) for turns in schedules}
    assert found == {4} if features == "branches" else found <= {2, 4}
    assert "branches" in hgfast.report(fast).unproven


@torch.inference_mode()
def test_branches_in_ten_thousand_replays_give_the_same_bits(schedules: Any) -> None:
    """Two shapes share the pool's memory; inputs change in between."""
    fast = graphed(network())
    cases = [image(1, 1, 32), image(2, some(4, 2), some(64, 16))]
    for x in cases:
        for _ in range(2):
            fast(x)
    first = [fast(x)[-1] for x in cases]
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for turn in range(some(10000, 8)):
        x, wanted = cases[turn % 2], first[turn % 2]
        if turn % 8 == 7:
            fast(-x)  # what it leaves must not be seen
            continue
        wrong += (fast(x)[-1] != wanted).any()
    assert int(wrong) == 0
    assert len(schedules) == 2


@torch.inference_mode()
def test_branches_need_a_capture_and_little_work(schedules: Any) -> None:
    """Outside of one, and for large batches, the bits are those without."""
    model = network()
    x, large = image(1, 1, 32), image(1, some(66, 17), some(64, 32))
    fast, in_a_row = graphed(model), plain(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(evidence.UNPROVEN)
        without = plain(model)
        wanted = [without(x), without(large)]
    assert same(in_a_row(x), wanted[0])
    if not REHEARSAL:
        for _ in range(3):
            assert same(fast(large), wanted[1])
    assert schedules == []
    for _ in range(2):
        fast(x)
    assert len(schedules) == 1


@only_a_device
@torch.inference_mode()
def test_branches_in_a_capture_of_ones_own(schedules: Any) -> None:
    """Also through torch.cuda.graph, twice at once from two graphs, and twice in one."""
    model = network()
    fast = plain(model)
    x = image(0, 1, 32)
    pairs = [captured(lambda: fast(x)[-1]) for _ in range(2)]
    twice, both = captured(lambda: fast(x)[-1] + fast(x)[-1])
    assert len(schedules) == 3  # the second run in a capture is in a row
    for seed in range(1, 4):
        x.copy_(image(seed, 1, 32))
        for replay, _ in pairs:
            replay()
        twice()
        synchronise()
        assert torch.equal(pairs[0][1], pairs[1][1])
        torch.testing.assert_close(pairs[0][1], model(x)[-1], rtol=0.1, atol=0.1)
        torch.testing.assert_close(both, 2 * pairs[0][1], rtol=0.1, atol=0.1)


# ---- memory ----


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that a call allocates at its worst moment over those before it."""
    call()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@only_a_device
@pytest.mark.parametrize("batch", [1, 16])
@torch.inference_mode()
def test_memory_is_at_most_eagers(batch: int) -> None:
    """Of a plain run, of the call that captures, and of replays with what the graph keeps."""
    model = network().to(memory_format=torch.channels_last)
    x = image(1, batch, 256).contiguous(memory_format=torch.channels_last)
    eager = peak_of(lambda: model(x))
    extra = x.nbytes + sum(y.nbytes for y in leaves(model(x)))
    without = plain(model)
    assert peak_of(lambda: without(x)) <= eager
    fast = graphed(model)
    fast(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fast(x)  # captures
    torch.cuda.synchronize()
    slack = 512 * 2 * (1 + len(leaves(model(x))))  # the allocator counts in 512 bytes
    assert torch.cuda.max_memory_allocated() - before <= eager + extra + slack
    kept = torch.cuda.memory_allocated() - before
    assert kept <= extra + slack
    assert kept + peak_of(lambda: fast(x)) <= eager + extra + slack


@only_a_device
@torch.inference_mode()
def test_memory_with_branches(schedules: Any) -> None:
    """While it is made the maps of the upper branches come on top; a graph keeps no more."""
    size = 256
    model = network().to(memory_format=torch.channels_last)
    x = image(1, 1, size).contiguous(memory_format=torch.channels_last)
    eager = peak_of(lambda: model(x))
    extra = x.nbytes + sum(y.nbytes for y in leaves(model(x)))
    slack = 512 * 2 * (1 + len(leaves(model(x))))
    maps = 2 * sum(64 * (size // n) ** 2 * x.element_size() for n in (4, 8))  # stacks, levels
    fast = graphed(model)
    fast(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fast(x)  # captures
    torch.cuda.synchronize()
    assert len(schedules) == 1
    assert torch.cuda.max_memory_allocated() - before <= eager + extra + maps + slack
    assert torch.cuda.memory_allocated() - before <= extra + slack


@only_a_device
@torch.no_grad()
def test_replays_and_new_weights_leave_no_memory_behind() -> None:
    fast = graphed(network())
    x = image()

    def allocated_after(fast: nn.Module) -> int:
        for _ in range(100):
            fast(x)
        next(fast.parameters()).mul_(1.01)
        for _ in range(3):
            fast(x)
        torch.cuda.synchronize()
        gc.collect()
        return torch.cuda.memory_allocated()

    first = [allocated_after(fast) for _ in range(3)][-1]
    later = [allocated_after(fast) for _ in range(10)][-1]
    assert later <= first
    del fast
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < first


def test_auto_is_off_until_it_is_measured() -> None:
    fast = hgfast.optimize(network(), "medium", strict=True)
    with torch.inference_mode():
        for _ in range(3):
            fast(image())
    (use,) = hgfast.report(fast).graphs
    assert use.used == evidence.is_enabled("graph")
    assert (use.cached == 1) == use.used
