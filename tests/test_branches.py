"""Skip branches beside the rest: the schedule, and the executor that runs it on a double."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_double import Double, recorded
from graph_double import Lanes as DoubleLanes
from networks import PreactBlock, image, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import hgfast
from hgfast.models import hourglass
from hgfast.plan import Bottleneck, Plan, Pool, Step, output_values
from hgfast.recognition import recognise, tensors_of
from hgfast.region import regions_of
from hgfast.runtime import blocks, branches, cuda, evidence, graphs
from hgfast.runtime.branches import BEGIN, Launch, Turn, schedule
from hgfast.runtime.lanes import Lanes

# ---- the schedule ----


def always(launch: Launch) -> bool:
    return True


def random_launches(seed: int) -> tuple[list[Launch], set[int]]:
    """Launches over values 0 and 1, which are there, and some of what they give as outputs."""
    rng = random.Random(seed)
    known, launches = [0, 1], []
    for _ in range(rng.randrange(1, 25)):
        # What came late is read more often: so chains arise, and branches beside them.
        reads = [known[-1 - min(int(rng.expovariate(0.5)), len(known) - 1)] for _ in range(2)]
        reads = reads[: rng.choice((1, 1, 2))]
        low = reads[-1] if len(reads) == 2 and rng.random() < 0.7 else None
        gives = [len(known) + n for n in range(rng.choice((1, 1, 1, 2)))]
        known += gives
        launches.append(Launch(tuple(gives), tuple(reads), low, rng.random() < 0.8))
    outputs = {number for number in known[2:] if rng.random() < 0.1} | {known[-1]}
    return launches, outputs


def ancestors(turns: tuple[Turn, ...]) -> list[set[int]]:
    """For each turn what is over before it begins, by its lane and its waits alone."""
    before: list[set[int]] = []
    for place, turn in enumerate(turns):
        direct = {other for other in turn.waits if other != BEGIN}
        same = [other for other in range(place) if turns[other].lane == turn.lane]
        direct |= set(same[-1:])
        before.append(direct.union(*(before[other] for other in direct)))
    return before


def assert_orders_everything(turns: tuple[Turn, ...], outputs: set[int]) -> None:
    before = ancestors(turns)
    maker = {number: place for place, turn in enumerate(turns) for number in turn.gives}
    forked = {0}
    dead: set[int] = set()
    for place, turn in enumerate(turns):
        assert all(other < place for other in turn.waits)
        if turn.waits:
            forked.add(turn.lane)
        assert turn.lane in forked  # in a capture, any other stream is none of it
        assert not dead & set(turn.reads)
        for number in turn.reads:
            if number in maker:
                assert maker[number] in before[place]
        dead |= set(turn.dead)
        for number in turn.dead:  # memory goes to whoever comes next on the lane that made it
            home = turns[maker[number]].lane if number in maker else 0
            last = max(n for n in range(place + 1) if turns[n].lane == home)
            users = [n for n, t in enumerate(turns) if number in (*t.gives, *t.reads)]
            assert set(users) <= before[last] | {last}
    assert not dead & outputs
    last = max((n for n, turn in enumerate(turns) if turn.lane == 0), default=0)
    assert before[last] | {last} == set(range(len(turns)))


def test_random_plans() -> None:
    kinds: Counter[str] = Counter()
    most = 0
    for seed in range(1500):
        launches, outputs = random_launches(seed)
        turns = schedule(launches, outputs, always)
        assert_orders_everything(turns, outputs)
        kinds.update(turn.part for turn in turns)
        most = max(most, branches.lanes(turns))
        # Each launch once, or its two parts, from the same values.
        parts = sorted((turn.index, turn.part) for turn in turns)
        for index, launch in enumerate(launches):
            mine = [turn for turn in turns if turn.index == index]
            if len(mine) == 1:
                assert (mine[0].part, mine[0].reads) == ("whole", launch.reads)
                assert mine[0].gives == launch.gives
                continue
            assert [turn.part for turn in mine] == ["upper", "join"]
            assert mine[0].reads == launch.upper_reads
            assert mine[1].reads == (launch.low, *mine[0].gives)
            assert mine[1].gives == launch.gives
            assert (launch.movable, mine[1].lane) == (True, 0)
        assert len(parts) == len(set(parts))
        assert all(launches[turn.index].movable for turn in turns if turn.lane)
        joins = sum(turn.part == "join" for turn in turns)
        none = schedule(launches, outputs, lambda _: False)
        assert [(turn.index, turn.lane) for turn in none] == [
            (index, 0) for index in range(len(launches))
        ]
        assert branches.critical_path(turns, lambda t: t.part != "join") <= len(launches)
        assert len(turns) == len(launches) + joins
    assert min(kinds.values()) > 300
    assert most > 3


def test_no_wait_is_for_nothing() -> None:
    found = 0
    for seed in range(300):
        launches, outputs = random_launches(seed)
        turns = schedule(launches, outputs, always)
        for place, turn in enumerate(turns):
            for other in turn.waits:
                fewer = replace(turn, waits=tuple(n for n in turn.waits if n != other))
                with pytest.raises(AssertionError):
                    assert_orders_everything((*turns[:place], fewer, *turns[place + 1 :]), outputs)
                found += 1
    assert found > 300


def test_a_level_of_an_hourglass() -> None:
    """lower = c(b(x)); y = a(x) + upsample(lower), where a was to come last."""
    x, b, c, y, z = range(5)
    launches = [
        Launch((b,), (x,), movable=True),
        Launch((c,), (b,), movable=True),
        Launch((y,), (x, c), low=c, movable=True),
        Launch((z,), (y,), movable=True),
    ]
    upper = branches.upper_value(y)
    assert schedule(launches, {z}, always) == (
        Turn(2, "upper", 1, (upper,), (x,), waits=(BEGIN,)),
        Turn(0, "whole", 0, (b,), (x,)),
        Turn(1, "whole", 0, (c,), (b,), dead=(b,)),
        Turn(2, "join", 0, (y,), (c, upper), waits=(0,), dead=(x, c)),
        Turn(3, "whole", 0, (z,), (y,), dead=(y,)),
    )


def test_what_only_the_upper_branch_needs_goes_along() -> None:
    x, u, b, y = range(4)
    launches = [
        Launch((u,), (x,), movable=True),
        Launch((b,), (x,), movable=True),
        Launch((y,), (u, b), low=b, movable=True),
    ]
    lanes = {(turn.index, turn.part): turn.lane for turn in schedule(launches, {y}, always)}
    assert lanes == {(0, "whole"): 1, (2, "upper"): 1, (1, "whole"): 0, (2, "join"): 0}
    # Not where somebody else reads it: then the others wait for it, and it is on their lane.
    assert schedule(launches, {y, u}, always)[0].lane == 0
    # Nor where there is nothing to run beside: the lower branch came first.
    late = [launches[1], launches[0], launches[2]]
    others = [late[0], replace(late[1], movable=False), late[2]]
    assert branches.lanes(schedule(others, {y}, always)) == 1


def launches_of(plan: Plan) -> tuple[list[Launch], list[Step]]:
    """As the executor has them where every block has a kernel and every pooling is a prologue."""
    pools = {step.output: step.inputs[0] for step in plan.steps if isinstance(step, Pool)}
    steps = [step for step in plan.steps if not isinstance(step, Pool)]
    launches = []
    for step in steps:
        reads = tuple(pools.get(number, number) for number in step.inputs)
        is_block = isinstance(step, Bottleneck)
        low = reads[1] if is_block and len(reads) == 2 else None
        movable = is_block and step.inputs[0] not in pools
        launches.append(Launch((step.output,), reads, low, movable))
    return launches, steps


@pytest.mark.parametrize(
    ("stacks", "launches", "waiting", "convolutions"),
    [(1, (20, 24), (20, 20), (54, 42)), (2, (37, 45), (36, 36), (98, 74)),
     (8, (139, 171), (132, 132), (362, 266))],
)  # fmt: skip
def test_the_critical_path_of_a_stacked_hourglass(
    stacks: int,
    launches: tuple[int, int],
    waiting: tuple[int, int],
    convolutions: tuple[int, int],
) -> None:
    """The numbers of docs/performance.md: in a row, and with branches beside the rest.

    A join is a launch too, so that as many wait for each other; but four of each stack only add.
    """
    plan = recognise(hourglass(stacks=stacks, joints=16).eval())
    works, steps = launches_of(plan)

    def depth(turn: Turn) -> int:
        if turn.part == "join":
            return 0
        return 3 if isinstance(steps[turn.index], Bottleneck) else 1

    outputs = output_values(plan.outputs)
    before = schedule(works, outputs, lambda _: False)
    after = schedule(works, outputs, always)
    assert (len(before), len(after)) == launches
    assert tuple(branches.critical_path(t, lambda _: 1) for t in (before, after)) == waiting
    assert tuple(branches.critical_path(t, depth) for t in (before, after)) == convolutions
    assert (branches.lanes(before), branches.lanes(after)) == (1, 5)


# ---- the executor, on emulated kernels and the double's streams ----


@pytest.fixture
def double() -> Double:
    return Double()


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(evidence.UNPROVEN, "branches")


@pytest.fixture
def kernels(double: Double) -> cuda.Kernels:
    emulator: Any = pytest.importorskip(
        "hgfast_emulator", reason="the emulator is not built (HGFAST_EMULATOR=1 builds it)"
    )
    emulator.set_device()
    made = cuda.Kernels(emulator, torch.ops.hgfast_emulated, torch.device("cpu"))
    for name in ("bottleneck", "stem", "head"):
        setattr(made, name, recorded(getattr(made, name), double))
    made.streams = DoubleLanes(double)
    return made


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, double: Double, kernels: cuda.Kernels) -> Double:
    """Models on the CPU run as models on a GPU do."""

    def choose(plan: Any, weights: Any, precision: str, as_computed: bool = False) -> Any:
        dtype = next(iter(weights.values())).dtype
        return cuda.unsupported(plan, dtype, precision, kernels) or cuda.CudaExecutor(
            plan, weights, precision, kernels, as_computed
        )

    monkeypatch.setattr("hgfast.region.choose", choose)
    monkeypatch.setattr(graphs, "device_of", lambda _: double)
    return double


def network(blocks: int = 1, stacks: int = 2, features: int = 32) -> nn.Module:
    torch.manual_seed(1)
    model = hourglass(stacks=stacks, features=features, blocks=blocks, depth=2, joints=5)
    return randomise(model).eval().requires_grad_(False).bfloat16()


def picture(seed: int = 0, batch: int = 1) -> Tensor:
    return image(batch, 32, 32, seed).bfloat16()


class Level(nn.Module):
    """y = upper(x) + upsample(lower(pool(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = PreactBlock(32, 32), PreactBlock(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        low = self.lower(F.max_pool2d(x, 2))
        result: Tensor = self.upper(x) + F.interpolate(low, scale_factor=2, mode="nearest")
        return result


def executor_of(model: nn.Module, kernels: cuda.Kernels) -> tuple[Plan, cuda.CudaExecutor]:
    plan = recognise(model)
    weights = {name: tensors_of(model)[name] for name in plan.weights}
    return plan, cuda.CudaExecutor(plan, weights, "medium", kernels)


def captured(executor: cuda.CudaExecutor, double: Double, *inputs: Tensor) -> dict[int, Tensor]:
    """A run in somebody's capture, as the kernels gave it."""
    with torch.no_grad(), double.recording():
        return executor.run(inputs)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Turn, ...]]:
    seen: list[tuple[Turn, ...]] = []
    run = Lanes.run

    def spy(self: Lanes, turns: Any, launch: Any) -> None:
        seen.append(tuple(turns))
        run(self, turns, launch)

    monkeypatch.setattr(Lanes, "run", spy)
    return seen


@pytest.mark.parametrize("depth", [1, 3])
def test_replays_with_branches(depth: int, device: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the upper branch in front of the last go along; the lower ones stay."""
    seen = spied(monkeypatch)
    model = network(blocks=depth)
    fast = hgfast.optimize(model, cuda_graph=True)
    for seed in range(3):
        y = fast(picture(seed))
        for given, expected in zip(tree_leaves(y), tree_leaves(model(picture(seed))), strict=True):
            torch.testing.assert_close(given, expected, rtol=0.1, atol=0.1)
    assert (device.captures, device.replays) == (1, 2)
    assert hgfast.verify(model, fast, picture()).ok
    assert hgfast.report(fast).unproven == ["graph", "branches"]
    (turns,) = seen
    assert branches.lanes(turns) == 3
    assert sum(turn.part == "join" for turn in turns) == 4
    assert sum(turn.lane > 0 for turn in turns) == 4 * depth
    assert device.races == []


def test_the_executors_launches_are_those_of_the_documents(kernels: cuda.Kernels) -> None:
    plan, executor = executor_of(network(features=64), kernels)
    assert [launch.work for launch in executor._launches] == launches_of(plan)[0]


def test_outside_of_a_capture_nothing_changes(
    device: Double, kernels: cuda.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spied(monkeypatch)
    model = network()
    _, executor = executor_of(model, kernels)
    assert executor.features == {"branches"}
    monkeypatch.delenv(evidence.UNPROVEN)
    _, without = executor_of(model, kernels)
    assert without.features == frozenset()
    y, expected = executor.run([picture()]), without.run([picture()])
    assert all(torch.equal(y[number], expected[number]) for number in expected)
    captured(without, device, picture())
    assert seen == []


def test_one_rounding_more(device: Double, kernels: cuda.Kernels) -> None:
    """Upper and lower branch are the same bits; their sum is of a rounded upper branch."""
    torch.manual_seed(1)
    model = randomise(Level()).eval().requires_grad_(False).bfloat16()
    _, executor = executor_of(model, kernels)
    x = torch.randn(2, 32, 16, 32).bfloat16()
    (whole,), (apart,) = executor.run([x]).values(), captured(executor, device, x).values()
    with torch.no_grad():
        upper = model.upper(x.float().bfloat16()).double().abs()
    whole, apart = whole.double(), apart.double()
    assert not torch.equal(whole, apart)
    half = torch.finfo(torch.bfloat16).eps / 2
    # Each rounds the sum; one rounds the upper branch before, which eager knows to a percent.
    bound = half * (whole.abs() + apart.abs() + 1.02 * upper + 0.02)
    assert bool(((whole - apart).abs() <= bound).all())
    assert device.races == []


def test_large_maps_stay_in_a_row(
    device: Double, kernels: cuda.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape decides for each branch; 8x8 pixels and below are less than a tile each."""
    seen = spied(monkeypatch)
    _, executor = executor_of(network(), kernels)
    plain = executor.run([picture()])
    monkeypatch.setattr(blocks, "BESIDE_BELOW", 1)
    y = captured(executor, device, picture())
    assert seen == []
    assert all(torch.equal(y[number], plain[number]) for number in plain)
    monkeypatch.setattr(blocks, "BESIDE_BELOW", 2)
    captured(executor, device, picture())
    captured(executor, device, picture(batch=2))
    assert [sum(turn.part == "join" for turn in turns) for turns in seen] == [4]
    big = image(1, 128, 128).bfloat16()  # 32x32 and 16x16 pixels at the end of branches
    captured(executor, device, big)
    assert [sum(turn.part == "join" for turn in turns) for turns in seen] == [4, 2]
    assert device.races == []


def test_the_rule() -> None:
    assert blocks.runs_beside(1, 64, 64)
    assert blocks.runs_beside(4, 64, 64)
    assert not blocks.runs_beside(8, 64, 64)
    assert blocks.runs_beside(8, 32, 32)


def test_a_second_run_in_a_capture_is_in_a_row(
    device: Double, kernels: cuda.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side streams belong to a capture until it ends."""
    seen = spied(monkeypatch)
    _, executor = executor_of(network(), kernels)
    plain = executor.run([picture()])
    with torch.no_grad(), device.recording():
        executor.run([picture()])
        y = executor.run([picture()])
    assert len(seen) == 1
    assert all(torch.equal(y[number], plain[number]) for number in plain)
    captured(executor, device, picture())
    assert len(seen) == 2
    assert device.races == []


def test_with_the_other_kernels(device: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(evidence.UNPROVEN, "graph, stem, head, branches")
    model = network(features=64)
    fast = hgfast.optimize(model)
    assert hgfast.verify(model, fast, picture()).ok
    assert device.replays > 0
    assert hgfast.report(fast).unproven == ["graph", "stem", "head", "branches"]
    assert device.races == []


def test_several_regions_and_shapes(device: Double) -> None:
    """Each executor has streams of its own; a stream is free again behind a capture."""
    model = nn.ModuleList([network(), network()])
    fast = hgfast.optimize(model, cuda_graph=True)
    assert len(regions_of(fast)) == 2
    for part in fast:
        for batch in (1, 2):
            x = picture(batch=batch)
            part(x)
            first = part(picture(1, batch)), part(x)
            for _ in range(2):
                again = part(picture(1, batch)), part(x)
                assert all(map(torch.equal, tree_leaves(again), tree_leaves(first)))
    assert device.captures == 4
    assert device.races == []


def test_somebody_elses_capture_meanwhile(
    device: Double, kernels: cuda.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads capture the same executor: one gets the side streams, the other a row."""
    seen = spied(monkeypatch)
    _, executor = executor_of(network(), kernels)
    plain = executor.run([picture()])
    others: list[dict[int, Tensor]] = []
    with torch.no_grad(), device.recording():
        executor.run([picture()])

        def other() -> None:
            with device.on("another"):
                others.append(captured(executor, device, picture()))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(seen) == 1
    (y,) = others
    assert all(torch.equal(y[number], plain[number]) for number in plain)
    assert device.races == []


# ---- mistakes that the double must notice ----


def run_changed(
    monkeypatch: pytest.MonkeyPatch, kernels: cuda.Kernels, double: Double, change: Any
) -> set[str]:
    """The races of a run whose schedule was changed."""

    def changed(*args: Any) -> Any:
        return tuple(map(change, schedule(*args)))

    _, executor = executor_of(network(), kernels)
    captured(executor, double, picture())
    assert double.races == []
    monkeypatch.setattr(branches, "schedule", changed)
    captured(executor, double, picture())
    return {race.rstrip("0123456789 ") for race in double.races}


def test_a_join_that_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch, kernels: cuda.Kernels, double: Double
) -> None:
    def change(turn: Turn) -> Turn:
        return replace(turn, waits=()) if turn.part == "join" else turn

    races = run_changed(monkeypatch, kernels, double, change)
    assert any("default reads what stream of its own" in race for race in races)
    assert any("is not joined" in race for race in races)


def test_a_branch_that_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch, kernels: cuda.Kernels, double: Double
) -> None:
    def change(turn: Turn) -> Turn:
        return replace(turn, waits=()) if turn.lane else turn

    races = run_changed(monkeypatch, kernels, double, change)
    assert any("is no part of the capture" in race for race in races)
    assert any("reads what default may not have written" in race for race in races)


def test_a_branch_that_waits_for_the_beginning_alone(
    monkeypatch: pytest.MonkeyPatch, kernels: cuda.Kernels, double: Double
) -> None:
    def change(turn: Turn) -> Turn:
        return replace(turn, waits=(BEGIN,)) if turn.lane else turn

    races = run_changed(monkeypatch, kernels, double, change)
    assert any("reads what default may not have written" in race for race in races)
    assert not any("is no part of the capture" in race for race in races)


def test_values_dropped_with_their_last_reader(
    monkeypatch: pytest.MonkeyPatch, kernels: cuda.Kernels, double: Double
) -> None:
    """As a run in a row does it: what a branch reads would be written to under its feet."""
    _, executor = executor_of(network(), kernels)
    works, outputs = [launch.work for launch in executor._launches], executor._outputs
    last = {n: place for place, turn in enumerate(schedule(works, outputs, always))
            for n in turn.reads if n not in outputs}  # fmt: skip

    def early(launches: Any, outputs: Any, wanted: Any) -> Any:
        return tuple(
            replace(turn, dead=tuple(n for n in dict.fromkeys(turn.reads) if last.get(n) == place))
            for place, turn in enumerate(schedule(launches, outputs, wanted))
        )

    monkeypatch.setattr(branches, "schedule", early)
    captured(executor, double, picture())
    assert double.races
    assert all("may write to what" in race for race in double.races)
