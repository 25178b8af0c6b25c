"""Whole networks as CUDA graphs: hgfast/runtime/graphs.py, on a double of the GPU."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_double import Double, recorded
from networks import image, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hgfast
from hgfast.compiling import packs
from hgfast.models import hourglass
from hgfast.optimization import cuda_graph_of
from hgfast.recognition import recognise, tensors_of
from hgfast.region import regions_of
from hgfast.runtime import cuda, evidence, graphs
from hgfast.runtime.graphs import ATTEMPTS, CAPACITY, PATIENCE, GraphedExecutor, Pool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(evidence.UNPROVEN, raising=False)


@pytest.fixture
def double() -> Iterator[Double]:
    made = Double()
    yield made
    assert made.races == []


# ---- the executor, around one that is easy to follow ----


class Doubling:
    """y = relu(weight x) + 1, y twice, and x as it was given."""

    asynchronous = True
    backend = "cuda float32"
    dtype = torch.float32
    features: frozenset[str] = frozenset()

    def __init__(self, double: Double, weight: float = 2.0) -> None:
        self.double, self.weight = double, torch.tensor(weight)
        self.runs = 0
        self.streams: set[str] = set()
        self.synchronises = False

    def path(self, step: Any) -> str:
        return "cuda float32"

    def use_stream(self) -> None:
        self.streams.add(self.double.stream)

    def run(self, inputs: Any) -> dict[int, Tensor]:
        self.runs += 1
        self.use_stream()
        (x,) = inputs
        if x.shape[-1] % 2 and x.shape[-1] > 1:
            raise ValueError("the width is odd")
        if self.synchronises:
            self.double.synchronise()
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        with torch.no_grad():
            y = (x * self.weight).relu_() + 1
            y = y.contiguous(memory_format=layout)
            return {1: y, 2: y, 3: x.contiguous(memory_format=layout)}


def graphed(double: Double, **kwargs: Any) -> tuple[GraphedExecutor, Doubling, list[str]]:
    notes: list[str] = []
    plain = Doubling(double, **kwargs)
    return GraphedExecutor(plain, Pool(double), notes.append), plain, notes


def check(executor: GraphedExecutor, plain: Doubling, x: Tensor) -> dict[int, Tensor]:
    """One call, which gives what a plain one gives."""
    expected = Doubling(plain.double, float(plain.weight)).run([x])
    values = executor.run([x])
    assert values.keys() == expected.keys()
    for number, y in values.items():
        assert torch.equal(y, expected[number])
        assert y.stride() == expected[number].stride()
        assert y.dtype == expected[number].dtype
        assert y.is_inference() == expected[number].is_inference()
    return values


def test_the_second_call_captures_and_the_third_launches_nothing(double: Double) -> None:
    executor, plain, notes = graphed(double)
    check(executor, plain, image(seed=1))
    assert (plain.runs, executor.cached) == (1, 0)
    check(executor, plain, image(seed=2))
    assert (plain.runs, executor.cached) == (3, 1)  # one more to warm up, one to be captured
    for seed in range(3, 9):
        check(executor, plain, image(seed=seed))
    assert (plain.runs, double.captures, double.replays) == (3, 1, 7)
    assert notes == []


def test_results_are_the_callers(double: Double) -> None:
    executor, plain, _ = graphed(double)
    kept = []
    for seed in range(5):
        x = image(seed=seed)
        values = check(executor, plain, x)
        kept.append((values, {number: y.clone() for number, y in values.items()}))
        if seed > 0:
            assert all(y.data_ptr() != x.data_ptr() for y in values.values())
    places = {y.data_ptr() for values, _ in kept for y in values.values()}
    assert len(places) >= 3 * 4  # of replays each result; the plain run's y is there twice
    for values, before in kept:
        assert all(torch.equal(values[number], before[number]) for number in values)
        values[1].fill_(7)  # nobody else's
    check(executor, plain, image(seed=9))


def test_what_a_graph_depends_on(double: Double) -> None:
    executor, plain, _ = graphed(double)
    last = torch.channels_last
    kinds = [
        image(2),
        image(2).contiguous(memory_format=last),
        image(2, 64, 32),
        image(2).double(),
        image(2, 64, 128)[..., ::2],  # not dense: taken for channels_last, as in a plain run
    ]
    for _ in range(3):
        for x in kinds:
            check(executor, plain, x)
    assert executor.cached == 4  # the last shares its graph with the second
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            check(executor, plain, kinds[0])
    assert executor.cached == 5
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for _ in range(3):
            check(executor, plain, kinds[0])
    assert executor.cached == 6
    torch.use_deterministic_algorithms(True)  # new memory is filled: none that a call wrote to
    try:
        for seed in range(3):
            check(executor, plain, image(2, seed=seed))
    finally:
        torch.use_deterministic_algorithms(False)
    assert executor.cached == 7


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 3, 4, 4),
        torch.randn(2, 1, 4, 8)[
            ..., ::2
        ],  # dense, it would be contiguous and channels_last at once
        torch.randn(2, 6, 1, 1)[:, ::2],
    ],
)
def test_what_is_never_captured(x: Tensor, double: Double) -> None:
    executor, plain, _ = graphed(double)
    for _ in range(3):
        check(executor, plain, x)
    assert double.captures == 0


def test_outside_of_inference_mode_after_inside(double: Double) -> None:
    executor, plain, _ = graphed(double)
    for seed in range(3):
        with torch.inference_mode():
            check(executor, plain, image(seed=seed))
    assert executor.cached == 1
    check(executor, plain, image(seed=4))
    x = image().requires_grad_()
    with torch.no_grad():
        assert not any(y.requires_grad for y in executor.run([x]).values())


def of_width(width: int) -> Tensor:
    return image(1, 4, 2 * width, seed=width)


def test_a_full_cache_gives_up_the_graph_unused_for_longest(double: Double) -> None:
    executor, plain, _ = graphed(double)
    for _ in range(2):
        for width in range(1, CAPACITY + 1):
            check(executor, plain, of_width(width))
    captured = {key[0][0][-1]: weakref.ref(found) for key, found in executor._graphs.items()}
    assert executor.cached == len(captured) == CAPACITY
    check(executor, plain, of_width(1))  # so that 2 is the oldest
    for _ in range(PATIENCE):
        check(executor, plain, of_width(99))
    assert double.captures == CAPACITY
    check(executor, plain, of_width(99))
    assert (double.captures, executor.cached) == (CAPACITY + 1, CAPACITY)
    gone = [width // 2 for width, found in captured.items() if found() is None]
    assert gone == [2]  # and its memory with it
    assert len(double.handles[0].graphs) == CAPACITY
    for width in (1, 2, 99):
        check(executor, plain, of_width(width))


@pytest.mark.parametrize(("shapes", "most"), [(CAPACITY, 0), (20, 1 / PATIENCE), (100, 0)])
def test_many_shapes_in_turn_are_not_captured_again_and_again(
    shapes: int, most: float, double: Double
) -> None:
    executor, plain, _ = graphed(double)
    rounds = 20
    for _ in range(rounds):
        for width in range(1, shapes + 1):
            executor.run([of_width(width)])
    assert double.captures <= CAPACITY + most * shapes * rounds
    check(executor, plain, of_width(3))


def test_shapes_that_do_not_fit_are_never_captured(double: Double) -> None:
    executor, _, notes = graphed(double)
    for _ in range(2 * PATIENCE):
        with pytest.raises(ValueError, match="the width is odd"):
            executor.run([image(1, 4, 5)])
    assert double.captures == 0
    assert notes == []


def test_somebody_elses_capture_records_the_launches(double: Double) -> None:
    executor, plain, _ = graphed(double)
    for seed in range(3):
        check(executor, plain, image(seed=seed))
    before = plain.runs, double.replays
    with double.recording() as recorder:
        values = executor.run([image(seed=4)])
    assert recorder.tape
    assert (plain.runs, double.replays) == (before[0] + 1, before[1])
    assert torch.equal(values[1], plain.run([image(seed=4)])[1])


def test_a_capture_that_fails(double: Double) -> None:
    executor, plain, notes = graphed(double)
    plain.synchronises = True
    tried = []
    for seed in range(2 + ATTEMPTS * PATIENCE):
        check(executor, plain, image(seed=seed))
        tried.append(len(notes))
    # At the second call, then whenever as many have passed as for a shape that waits for room.
    assert [tried.index(n) for n in range(1, ATTEMPTS + 1)] == [
        1 + n * PATIENCE for n in range(ATTEMPTS)
    ]
    reason = "a capture failed (operation not permitted when stream is capturing)"
    assert set(notes) == {reason}
    assert executor.failure == reason
    assert executor.has_given_up
    runs = plain.runs
    for seed in range(2 * PATIENCE):
        check(executor, plain, image(seed=seed))
    assert (plain.runs, double.captures) == (runs + 2 * PATIENCE, 0)


def test_a_capture_that_failed_once_is_tried_again(double: Double) -> None:
    executor, plain, notes = graphed(double)
    plain.synchronises = True
    for _ in range(2):
        check(executor, plain, image())
    plain.synchronises = False
    while double.captures == 0 and plain.runs < 10 * PATIENCE:
        runs = plain.runs
        check(executor, plain, image())
    assert (len(notes), double.captures) == (1, 1)
    assert runs >= PATIENCE  # not at once


def test_a_pool_is_new_once_all_its_graphs_are_gone(double: Double) -> None:
    pool = Pool(double)

    def with_a_graph() -> GraphedExecutor:
        executor = GraphedExecutor(Doubling(double), pool, str)
        for _ in range(3):
            executor.run([image()])
        return executor

    first = with_a_graph()
    second = with_a_graph()
    assert len(double.handles) == 1  # shared
    del first, second
    gc.collect()
    third = with_a_graph()  # torch would refuse the handle of before
    assert len(double.handles) == 2
    assert third.cached == 1


def use_from_streams(double: Double, pools: int = 1) -> None:
    """Four threads, each on a stream of its own, two executors, three shapes."""
    shared = [Pool(double) for _ in range(pools)]
    pairs = []
    for index in range(2):
        plain = Doubling(double, 2.0 + index)
        pairs.append((GraphedExecutor(plain, shared[index % pools], str), plain))
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            with double.on(f"stream {number}"), torch.no_grad():
                for turn in range(60):
                    executor, plain = pairs[turn % 2]
                    x = image(1, 4, 2 + 2 * (turn % 3), seed=number * 1000 + turn)
                    expected = (x * plain.weight).relu_() + 1
                    with double.watched():
                        y = executor.run([x])[1]
                    if not torch.equal(y, expected):
                        wrong.append((number, turn))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert double.captures == 6
    assert all(plain.streams >= {f"stream {n}" for n in range(4)} for _, plain in pairs)


def test_two_threads_that_want_the_same_graph_make_one(double: Double) -> None:
    executor, plain, _ = graphed(double)
    x = image()
    expected = executor.run([x])[1]
    results: list[Tensor] = []
    other = threading.Thread(target=lambda: results.append(executor.run([x])[1]))
    run = plain.run

    def slow(inputs: Any) -> dict[int, Tensor]:
        if not other.is_alive() and not results:
            other.start()
            other.join(0.1)  # it waits for its turn, long before this is over
        return run(inputs)

    plain.run = slow  # type: ignore[method-assign]
    results.append(executor.run([x])[1])
    other.join()
    assert double.captures == 1
    assert double.replays == 2
    assert all(torch.equal(y, expected) for y in results)


@pytest.mark.parametrize("pools", [1, 2])
def test_threads_and_streams(pools: int, double: Double) -> None:
    use_from_streams(double, pools)


def test_inputs_stay_until_every_stream_is_done() -> None:
    """The double notices where a stream uses memory that another could be given."""
    double = Double()
    double.keep = lambda x: Double.keep(double, x) if double.stream != "stream 2" else None  # type: ignore[method-assign]
    use_from_streams(double)
    assert set(double.races) == {"stream 2 uses memory that may go"}


def test_without_events_the_double_finds_races() -> None:
    double = Double()
    double.waits_for_nobody = True
    use_from_streams(double)
    assert double.races


def test_a_turn_ends_behind_the_copies_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double notices where a turn's event comes before the results are copied."""
    double = Double()
    replay = graphs._Captured.run

    def too_early(self: Any, inputs: Any) -> Any:
        values = replay(self, inputs)
        with double.on(f"{double.stream} later"), torch.no_grad():
            self.outputs[1].clone()
        return values

    monkeypatch.setattr(graphs._Captured, "run", too_early)
    use_from_streams(double)
    assert double.races


# ---- whole models, on emulated kernels ----


def small(features: int = 32) -> nn.Module:
    torch.manual_seed(1)
    model = hourglass(stacks=2, features=features, blocks=1, depth=1, joints=5)
    return randomise(model).eval().requires_grad_(False).bfloat16()


@pytest.fixture
def kernels(double: Double) -> cuda.Kernels:
    emulator: Any = pytest.importorskip(
        "hgfast_emulator", reason="the emulator is not built (HGFAST_EMULATOR=1 builds it)"
    )
    emulator.set_device()
    made = cuda.Kernels(emulator, torch.ops.hgfast_emulated, CPU)
    for name in ("bottleneck", "stem", "head"):
        setattr(made, name, recorded(getattr(made, name), double))
    return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, double: Double, kernels: cuda.Kernels) -> Double:
    """Models on the CPU run as models on a GPU do."""

    def choose(plan: Any, weights: Any, precision: str, as_computed: bool = False) -> Any:
        dtype = next(iter(weights.values())).dtype
        return cuda.unsupported(plan, dtype, precision, kernels) or cuda.CudaExecutor(
            plan, weights, precision, kernels, as_computed
        )

    monkeypatch.setattr("hgfast.region.choose", choose)
    monkeypatch.setattr("hgfast.region.is_capturing", double.is_capturing)
    monkeypatch.setattr(graphs, "device_of", lambda _: double)
    return double


def picture(seed: int = 0, size: int = 16) -> Tensor:
    return image(1, size, size, seed).bfloat16()


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def test_a_model_replays_and_gives_the_same_bits(gpu: Double) -> None:
    model = small()
    fast = hgfast.optimize(model, cuda_graph=True)
    plain = hgfast.optimize(model, cuda_graph=False)
    kept = []
    for seed in range(4):
        kept.append(fast(picture(seed)))
        assert same(kept[-1], plain(picture(seed)))
    assert (gpu.captures, gpu.replays) == (1, 3)
    assert same(kept[1], plain(picture(1)))
    (use,) = hgfast.report(fast).graphs
    assert (use.used, use.cached, use.reason) == (True, 1, "")
    report = hgfast.report(fast)
    assert report.unproven == ["graph"]
    assert "(the model)" in str(report)
    assert "1 graph" in str(report)
    assert "in use, not yet run on a GPU" in str(report)
    assert hgfast.verify(model, fast, picture()).ok


@pytest.mark.parametrize("decode", [None, "quarter"])
def test_verify_judges_a_replay(decode: str | None, gpu: Double) -> None:
    model = small()
    fast = hgfast.optimize(model, decode=decode, cuda_graph=True)
    assert hgfast.verify(model, fast, picture()).ok
    assert (gpu.captures, gpu.replays) == (1, 1)


def test_changed_weights_take_their_graphs_along(gpu: Double) -> None:
    fast = hgfast.optimize(small(), cuda_graph=True)
    (region,) = regions_of(fast)
    for _ in range(3):
        before = fast(picture())
    old = [weakref.ref(found) for found in region._state.executor._graphs.values()]
    assert len(old) == 1
    for change in range(3):
        with torch.no_grad():
            for parameter in fast.parameters():
                parameter.mul_(1.25)
        expected = hgfast.restore(copy.deepcopy(fast))
        for _ in range(3):  # plain, captured, replayed
            after = fast(picture())
            assert not same(after, before)
            assert same(after, hgfast.optimize(expected, cuda_graph=False)(picture()))
        gc.collect()
        assert [found() for found in old] == [None]
        assert gpu.captures == 2 + change
        old = [weakref.ref(found) for found in region._state.executor._graphs.values()]
        before = after
    hgfast.refresh(fast)
    gc.collect()
    assert [found() for found in old] == [None]
    assert same(fast(picture()), before)
    hgfast.restore(fast)
    assert hgfast.report(fast).graphs == []
    fast(picture())
    assert gpu.captures == 4


def test_weights_change_under_threads(gpu: Double) -> None:
    """Each answer is that of the weights before or after, never of both."""
    fast = hgfast.optimize(small(), cuda_graph=True)
    x = picture()
    allowed = [fast(x)]
    other = copy.deepcopy(fast)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    allowed.append(other(x))
    wrong: list[Any] = []

    def work() -> None:
        try:
            for _ in range(6):
                with torch.inference_mode():
                    y = fast(x)
                if not any(same(y, value) for value in allowed):
                    wrong.append(y)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        next(fast.parameters()).mul_(2)
    for thread in threads:
        thread.join()
    assert wrong == []
    assert same(fast(x), allowed[1])


class Two(nn.Module):
    """Not expressible as a whole: two regions, of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = small(), small()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)[-1]
        return self.second(torch.cumsum(x, 1))[-1] + y.sum()


def test_the_regions_of_a_model_share_a_pool(gpu: Double) -> None:
    model = Two().bfloat16()
    fast = hgfast.optimize(model, cuda_graph=True)
    plain = hgfast.optimize(model, cuda_graph=False)
    for seed in range(4):
        assert same(fast(picture(seed)), plain(picture(seed)))
    assert [use.cached for use in hgfast.report(fast).graphs] == [1, 1]
    assert len(gpu.handles) == 1
    twin = copy.deepcopy(fast)
    for _ in range(3):
        twin(picture())
    assert len(gpu.handles) == 2  # a copy has memory of its own


def test_autocast_has_graphs_of_its_own(gpu: Double) -> None:
    model = small().float()
    fast = hgfast.optimize(model, "medium", cuda_graph=True)
    plain = hgfast.optimize(model, "medium", cuda_graph=False)
    x = image(1, 16, 16)
    for _ in range(3):
        assert same(fast(x), plain(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = fast(x)
            assert y[0].dtype == torch.bfloat16
            assert same(y, plain(x))
    assert hgfast.report(fast).graphs[0].cached == 2


def test_a_model_that_decodes(gpu: Double) -> None:
    model = small()
    fast = hgfast.optimize(model, decode="quarter", cuda_graph=True)
    plain = hgfast.optimize(model, decode="quarter", cuda_graph=False)
    for seed in range(3):
        assert same(fast(picture(seed)), plain(picture(seed)))
    assert gpu.captures == 1


def test_a_capture_of_ones_own(gpu: Double) -> None:
    """Records the launches, keeps the packed weights, and no graph of ours."""
    fast = hgfast.optimize(small(), cuda_graph=True)
    (region,) = regions_of(fast)
    with torch.inference_mode():
        for _ in range(3):
            expected = fast(picture())
        with gpu.recording() as recorder:
            recorder.__exit__(None, None, None)  # a mode of PyTorch's would be an obstacle
            assert same(fast(picture()), expected)
            recorder.__enter__()
        graph = weakref.ref(next(iter(region._state.executor._graphs.values())))
        packed = weakref.ref(region._state.executor.plain)
        next(fast.parameters()).mul_(2)
        fast(picture())
    gc.collect()
    assert graph() is None
    assert packed() is not None
    assert gpu.replays == 2


def test_what_the_compiler_records_is_the_plain_executor(
    gpu: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted: list[Any] = []
    monkeypatch.setattr(packs, "adopt", lambda *args: adopted.append(args[-1]))
    fast = hgfast.optimize(small(), cuda_graph=True)
    (region,) = regions_of(fast)
    assert region._plan_text(region._generation)
    assert adopted == [region._state.executor.plain]


def test_a_failure_is_said_once(gpu: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cuda.CudaExecutor.run

    def synchronising(self: Any, inputs: Any) -> Any:
        gpu.synchronise()
        return run(self, inputs)

    model = small()
    fast = hgfast.optimize(model, cuda_graph=True)
    expected = fast(picture())
    monkeypatch.setattr(cuda.CudaExecutor, "run", synchronising)
    with pytest.warns(
        hgfast.HgfastWarning,
        match=r"runs the model without a CUDA graph, because a capture failed \(operation not",
    ):
        assert same(fast(picture()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(ATTEMPTS * (PATIENCE + 1)):
            assert same(fast(picture()), expected)
    (use,) = hgfast.report(fast).graphs
    assert (use.used, use.cached) == (False, 0)
    assert "not permitted" in use.reason
    assert "not permitted" in str(hgfast.report(fast))
    assert hgfast.report(fast).fallbacks == []  # eager never ran


def test_auto_waits_for_evidence(gpu: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    off = hgfast.optimize(model)
    for _ in range(3):
        off(picture())
    assert gpu.captures == 0
    report = hgfast.report(off)
    assert not report.graphs[0].used
    assert "HGFAST_UNPROVEN=graph switches them on" in report.graphs[0].reason
    assert report.unproven == []
    assert "CUDA graphs" not in str(report)
    monkeypatch.setenv(evidence.UNPROVEN, "graph")
    on = hgfast.optimize(model)
    never = hgfast.optimize(model, cuda_graph=False)
    for _ in range(3):
        on(picture())
        never(picture())
    assert gpu.captures == 1
    assert hgfast.report(on).unproven == ["graph"]
    assert hgfast.report(never).graphs[0].reason == "cuda_graph=False"
    monkeypatch.delenv(evidence.UNPROVEN)
    monkeypatch.setitem(evidence.FEATURES, "graph", evidence.Feature("graphs", "a.json"))
    measured = hgfast.optimize(model)
    for _ in range(3):
        measured(picture())
    assert gpu.captures == 2
    assert hgfast.report(measured).unproven == []


def test_with_every_unproven_kernel(gpu: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(evidence.UNPROVEN, "graph, stem, head")
    model = small(64)
    fast, plain = hgfast.optimize(model), hgfast.optimize(model, cuda_graph=False)
    for seed in range(4):
        assert same(fast(picture(seed)), plain(picture(seed)))
    assert gpu.captures == 1
    assert hgfast.report(fast).unproven == ["graph", "stem", "head"]
    assert hgfast.report(plain).unproven == ["stem", "head"]


def test_warmup_captures(gpu: Double) -> None:
    fast = hgfast.optimize(small(), cuda_graph=True)
    hgfast.warmup(fast, [(1, 3, 16, 16), (2, 3, 16, 32)])
    assert gpu.captures == 2
    fast(picture())
    assert (gpu.captures, hgfast.report(fast).graphs[0].cached) == (2, 2)


# ---- the setting ----


@pytest.mark.parametrize("value", ["on", 1, None, "True"])
def test_other_settings_are_an_error(value: Any) -> None:
    model = small()
    with pytest.raises(ValueError, match='cuda_graph must be "auto", True or False, got'):
        hgfast.optimize(model, inplace=True, cuda_graph=value)
    assert cuda_graph_of(model) is None
    assert "forward" not in model.__dict__


def test_an_unknown_feature_is_an_error_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(evidence.UNPROVEN, "grpah")
    model = small()
    with pytest.raises(ValueError, match="got 'grpah'"):
        hgfast.optimize(model, inplace=True)
    assert "forward" not in model.__dict__


@pytest.mark.usefixtures("backend")
def test_on_a_cpu_it_does_not_apply() -> None:
    model = small().float()
    fast = hgfast.optimize(model, cuda_graph=True)
    x = image(1, 16, 16)
    for _ in range(3):
        assert torch.allclose(fast(x)[-1], model(x)[-1], atol=1e-3)
    report = hgfast.report(fast)
    for use in report.graphs:
        assert (use.used, use.cached) == (False, 0)
        assert use.reason == "CUDA graphs are for a GPU"
        assert use.reason in str(report)
    assert report.unproven == []


def test_the_setting_stays(gpu: Double) -> None:
    fast = hgfast.optimize(small(), cuda_graph=True)
    for _ in range(2):
        fast(picture())
    twins = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        hgfast.optimize(fast, cuda_graph=True),
        hgfast.refresh(copy.deepcopy(fast)),
        hgfast.optimize(fast, decode="argmax", cuda_graph=True),
    ]
    for twin in twins:
        captures = gpu.captures
        assert cuda_graph_of(twin) is True
        assert hgfast.report(twin).cuda_graph is True
        assert hgfast.report(twin).to_dict()["cuda_graph"] is True
        for _ in range(2):
            twin(picture())
        assert gpu.captures == captures + 1
    assert cuda_graph_of(hgfast.restore(copy.deepcopy(fast))) is None


def test_optimised_again_with_another_setting(gpu: Double) -> None:
    fast = hgfast.optimize(small(), cuda_graph=True)
    assert hgfast.optimize(fast, inplace=True, cuda_graph=True) is fast
    for _ in range(3):
        fast(picture())
    region = fast.forward
    again = hgfast.optimize(fast, inplace=True, cuda_graph=False)
    assert again is fast
    assert fast.forward is not region
    captures = gpu.captures
    for _ in range(3):
        fast(picture())
    assert gpu.captures == captures == 1
    hgfast.optimize(fast, inplace=True, cuda_graph=True)
    for _ in range(2):
        fast(picture())
    assert gpu.captures == 2


# ---- memory ----


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made under it, while they live.

    Attributes:
        most: the largest sum behind any operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.count(x, given)
        return result

    def count(self, x: Tensor, given: set[int]) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_a_run_holds_at_most_what_eager_holds(kernels: cuda.Kernels, double: Double) -> None:
    torch.manual_seed(1)
    model = hourglass(stacks=2, features=64, blocks=1, depth=2, joints=5)
    model = randomise(model).eval().requires_grad_(False).bfloat16()
    x = image(1, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
    plan = recognise(model)
    weights = {name: tensors_of(model)[name] for name in plan.weights}
    executor = cuda.CudaExecutor(plan, weights, "medium", kernels)
    with torch.no_grad(), Live() as eager:
        expected = model(x)
    with torch.no_grad(), Live() as ours:
        values = executor.run([x])
    assert ours.now == eager.now > 0  # both hold their results
    assert ours.most <= eager.most
    del expected, values
    assert ours.now == eager.now == 0


def test_a_graph_keeps_its_inputs_and_outputs_and_no_more(gpu: Double) -> None:
    """The extra over eager, beyond what one run needs on the way, which all graphs share."""
    fast = hgfast.optimize(small(), cuda_graph=True)
    (region,) = regions_of(fast)
    x = picture()
    for _ in range(2):
        values = fast(x)
    (captured,) = region._state.executor._graphs.values()
    places = [*captured.inputs, *captured.outputs.values()]
    kept = {place.untyped_storage().data_ptr(): place.untyped_storage() for place in places}
    extra = sum(y.numel() * y.element_size() for y in (x, *tree_leaves(values)))
    assert sum(storage.nbytes() for storage in kept.values()) == extra


# ---- what is asked of torch.cuda, in which order ----


class Cuda:
    """Stands in for torch.cuda: writes down what is asked of it, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[Any] = []
        self.current = "main"
        self.fails: set[str] = set()
        monkeypatch.setattr(graphs, "_streams", {})
        monkeypatch.setattr(graphs, "_failed", [])
        names = ("Stream", "Event", "CUDAGraph", "current_stream", "stream", "graph_pool_handle")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        told = ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool")
        for name in told:
            monkeypatch.setattr(
                torch._C, name, lambda *args, name=name: self.did(name, *args), raising=False
            )

    def did(self, *what: Any) -> None:
        self.log.append((*what, "on", self.current))
        if what[0] in self.fails:
            raise RuntimeError(f"{what[0]} failed")

    def graph_pool_handle(self) -> Any:
        return "a pool"

    def Stream(self, device: Any, priority: int = 0) -> Any:  # noqa: N802
        return self.current_stream(device, "side")

    def current_stream(self, device: Any, name: str | None = None) -> Any:
        cuda, called = self, name or self.current
        assert device == torch.device("cuda", 1)

        class Stream:
            name = called

            def wait_stream(self, other: Any) -> None:
                cuda.log.append((self.name, "waits for", other.name))

        return Stream()

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> Any:  # noqa: N802
        cuda = self

        class CUDAGraph:
            has_ended = False

            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                cuda.did("begin", pool, capture_error_mode)

            def capture_end(self) -> None:
                cuda.did("end")
                self.has_ended = True

            def pool(self) -> Any:
                if not self.has_ended:
                    raise RuntimeError("called without a preceding successful capture")

        return CUDAGraph()

    def Event(self) -> Any:  # noqa: N802
        cuda = self

        class Event:
            def record(self, stream: Any) -> None:
                cuda.log.append(("record", stream.name))

            def wait(self, stream: Any) -> None:
                cuda.log.append(("wait", stream.name))

        return Event()


def test_a_capture_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_double = Cuda(monkeypatch)
    device = graphs.CudaDevice(torch.device("cuda", 1))
    event = device.event()
    event.wait()
    event.record()
    graph = device.capture(
        lambda: cuda_double.did("warm up"), lambda: cuda_double.did("run"), device.pool()
    )
    clear = ("_cuda_clearCublasWorkspaces", "on", "side")
    assert cuda_double.log == [
        ("wait", "main"),
        ("record", "main"),
        ("side", "waits for", "main"),
        ("warm up", "on", "side"),
        clear,
        ("begin", "a pool", "thread_local", "on", "side"),
        ("run", "on", "side"),
        ("end", "on", "side"),
        clear,
        ("main", "waits for", "side"),
    ]
    assert graph.has_ended  # type: ignore[attr-defined]
    assert graphs._failed == []
    first = graphs._streams[torch.device("cuda", 1)]
    device.capture(lambda: None, lambda: None, device.pool())
    assert graphs._streams == {torch.device("cuda", 1): first}  # streams are few


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ({"warm up"}, False),
        ({"run"}, False),  # an error of Python's: the capture ends as any other
        ({"run", "end"}, True),  # one of CUDA's: it is invalid
        ({"end"}, True),
        ({"begin", "end"}, True),
    ],
)
def test_a_capture_on_a_gpu_that_fails(
    fails: set[str], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_double = Cuda(monkeypatch)
    cuda_double.fails = {*fails, "_cuda_endAllocateToPool"}  # which must not hide the error
    device = graphs.CudaDevice(torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match=f"{'|'.join(fails - {'end'}) or 'end'} failed"):
        device.capture(
            lambda: cuda_double.did("warm up"), lambda: cuda_double.did("run"), device.pool()
        )
    log = cuda_double.log
    assert log[-1] == ("main", "waits for", "side")
    asked = [
        line[:3] for line in log if line[0] in ("_cuda_endAllocateToPool", "_cuda_releasePool")
    ]
    wanted = [("_cuda_endAllocateToPool", 1, "a pool"), ("_cuda_releasePool", 1, "a pool")]
    assert asked == (wanted if told else [])
    assert len(graphs._failed) == told
    if "warm up" not in fails:
        assert ("end", "on", "side") in log
    cuda_double.fails = set()
    assert device.capture(lambda: None, lambda: None, device.pool())  # the next one can
