"""hgfast among PyTorch's own tools: compile, export, AOTInductor, autocast, copies, threads."""

from __future__ import annotations

import copy
import gc
import io
import operator
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Foreign, MethodHourglass, PreactBlock, image, randomise, small_hourglass
from torch import Tensor, nn
from torch.nn import functional as F

import hgfast
from hgfast import _native, compiling
from hgfast.recognition import tensors_of
from hgfast.region import regions_of

pytestmark = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))

Leaves = list[Tensor]


@pytest.fixture(autouse=True)
def _no_silent_fallback() -> Iterator[None]:
    """A warning is an error, so that no test passes because eager ran unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", hgfast.HgfastWarning)
        yield
    torch._dynamo.reset()


def network(stacks: int = 1) -> nn.Module:
    """With few blocks: dynamo takes its time for each module."""
    model = small_hourglass(stacks, depth=1)
    for hourglass, head in zip(model.hourglasses, model.heads, strict=True):
        hourglass.enter, hourglass.inner = nn.Sequential(), nn.Sequential()
        head.residuals = nn.Sequential()
    return model


def run(model: Callable[..., Any], *inputs: Tensor) -> Leaves:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(model(*inputs))


def eager(model: nn.Module, *inputs: Tensor) -> Leaves:
    """What the restored model answers."""
    return run(hgfast.restore(copy.deepcopy(model)), *inputs)


def assert_close(ours: Leaves, theirs: Leaves, rtol: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        error = (one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)
        assert error <= rtol, f"relative error {error:.1e}"


class Recorded:
    """A backend of torch.compile that keeps its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def compile(self, model: nn.Module, **options: Any) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(model, backend=self, fullgraph=True, **options)
        return compiled

    @property
    def plans(self) -> list[int]:
        """How many Plans are in each graph."""
        return [plans_in(graph) for graph in self.graphs]


def plans_in(graph: torch.fx.GraphModule) -> int:
    target = torch.ops.hgfast.run_plan.default
    return sum(node.target is target for node in graph.graph.nodes)


# --- the operator -----------------------------------------------------------------------------


def operands(fast: nn.Module) -> tuple[list[Tensor], str]:
    (region,) = regions_of(fast)
    weights = tensors_of(fast)
    names = compiling.watched_weights(region.plan, weights)
    return [weights[name] for name in names], compiling.graph_text(region.plan)


def features(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "x",
    [
        features(2, 8, 6, 4),
        features(1, 8, 4, 8).contiguous(memory_format=torch.channels_last),
        features(0, 8, 4, 4),
        features(2, 8, 4, 6).transpose(2, 3),
        features(4, 8, 4, 4)[::2],
    ],
    ids=["contiguous", "channels_last", "empty", "transposed", "strided"],
)
@pytest.mark.parametrize(
    ("precision", "as_computed"), [("highest", False), ("medium", False), ("medium", True)]
)
def test_the_operator_keeps_its_promises(x: Tensor, precision: str, as_computed: bool) -> None:
    model = randomise(MethodHourglass(depth=1, features=8)).eval().requires_grad_(False)
    weights, text = operands(hgfast.optimize(model))
    arguments = ([x], weights, text, precision, as_computed)
    torch.library.opcheck(torch.ops.hgfast.run_plan.default, arguments)


@pytest.mark.parametrize("size", [(1, 16, 1, 1), (2, 16, 1, 5), (1, 16, 5, 1), (1, 1, 4, 4)])
def test_the_operator_keeps_its_promises_for_ambiguous_layouts(size: tuple[int, ...]) -> None:
    model = randomise(PreactBlock(size[1], size[1])).eval().requires_grad_(False)
    weights, text = operands(hgfast.optimize(model))
    for x in (torch.randn(size), torch.randn(size).to(memory_format=torch.channels_last)):
        arguments = ([x], weights, text, "highest", False)
        torch.library.opcheck(torch.ops.hgfast.run_plan.default, arguments)


def test_a_plan_comes_back_from_its_text() -> None:
    for model in (network(2), randomise(Foreign()).eval()):
        for region in regions_of(hgfast.optimize(model)):
            assert compiling.from_text(compiling.to_text(region.plan)) == region.plan


@pytest.mark.parametrize(
    "outputs", [[0, (1, {"a": [2]})], {"b": 1, "c": (2,)}, (), ((1, 2), [1])], ids=str
)
def test_containers_come_back_from_text(outputs: object) -> None:
    import dataclasses

    (region,) = regions_of(hgfast.optimize(network()))
    plan = dataclasses.replace(region.plan, outputs=outputs, input_shapes=((1, 3, 8, 8),))
    again = compiling.from_text(compiling.to_text(plan))
    assert again == plan
    assert repr(again) == repr(plan)


@pytest.mark.parametrize("text", ["", "[]", '{"format":0,"plan":{}}', '{"format":1,"plan":3}'])
def test_a_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"hgfast::run_plan"):
        torch.ops.hgfast.run_plan([image()], [image()], text, "highest")


def test_what_does_not_fit_the_operator_gets_eagers_error() -> None:
    model = network()
    weights, text = operands(hgfast.optimize(model))
    for x in (torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 68, 68)):
        with pytest.raises(RuntimeError) as theirs:
            run(model, x)
        with pytest.raises(RuntimeError) as ours, torch.no_grad():
            torch.ops.hgfast.run_plan([x], weights, text, "highest")
        assert str(ours.value) == str(theirs.value)


def test_without_kernels_the_operator_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(2)
    weights, text = operands(hgfast.optimize(model))
    monkeypatch.setenv("HGFAST_DISABLE", "1")
    ours = run(lambda x: torch.ops.hgfast.run_plan([x], weights, text, "medium"), image())
    assert_close(ours, run(model, image()), rtol=1e-6)
    decoded = run(lambda x: torch.ops.hgfast.run_plan([x], weights, text, "medium", True), image())
    assert decoded[0].dtype == torch.bfloat16
    assert decoded[0].is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every packing that the operator asks for."""
    calls: list[int] = []
    honest = compiling.choose

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return honest(*args, **kwargs)

    monkeypatch.setattr(compiling, "choose", counting)
    return calls


def test_weights_are_packed_once_and_forgotten_with_them(packings: list[int]) -> None:
    gc.collect()
    before = len(compiling.packs)
    fast = hgfast.optimize(network().requires_grad_(False))
    weights, text = operands(fast)
    held = [weights]

    def call() -> Tensor:
        result: Tensor = torch.ops.hgfast.run_plan([image()], held[0], text, "highest")[0]
        return result

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: call(), range(16)))
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert len(packings) == 1
    with torch.no_grad():
        fast.heads[0].heatmap.weight.mul_(2)
    assert_close([call()], eager(fast, image()))
    fast.heads[0].heatmap.weight.data = torch.randn_like(fast.heads[0].heatmap.weight)
    assert_close([call()], eager(fast, image()))
    assert len(packings) == 3
    del fast, weights, held[:]
    gc.collect()
    assert len(compiling.packs) == before


def test_there_is_a_bound_to_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "CAPACITY", 3)
    models = [randomise(PreactBlock(), seed).eval().requires_grad_(False) for seed in range(5)]
    x = torch.randn(1, 16, 4, 4)
    for _ in range(2):
        for model in models:
            weights, text = operands(hgfast.optimize(model))
            ours = torch.ops.hgfast.run_plan([x], weights, text, "highest")
            assert_close(ours, run(model, x))
            assert len(compiling.packs) <= 3


def test_inference_tensors_have_no_versions() -> None:
    with torch.inference_mode():
        model = network()
        weights, text = operands(hgfast.optimize(model))
        ours = torch.ops.hgfast.run_plan([image()], weights, text, "highest")
        assert_close(ours, run(model, image()))


# --- torch.compile ----------------------------------------------------------------------------


class Dict(nn.Module):
    """A container of its own, an output twice, an input handed through, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PreactBlock(), PreactBlock()

    def forward(self, x: Tensor, other: Tensor) -> dict[str, Any]:
        y = self.first(x)
        return {"y": y, "again": [y, (self.second(other), x)]}


def test_a_network_is_one_operation() -> None:
    model = network(2)
    fast, graphs = hgfast.optimize(model), Recorded()
    compiled = graphs.compile(fast)
    assert_close(run(compiled, image()), run(model, image()))
    assert graphs.plans == [1]
    called = {n.target for n in graphs.graphs[0].graph.nodes if n.op.startswith("call_")}
    assert called == {torch.ops.hgfast.run_plan.default, operator.getitem}
    assert torch.equal(run(compiled, image())[0], run(fast, image())[0]), "the same kernels"
    assert_close(run(compiled, image(3, 96, 64)), run(model, image(3, 96, 64)))


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_graph_for_all_sizes(dynamic: bool | None) -> None:
    model = network()
    graphs = Recorded()
    compiled = graphs.compile(hgfast.optimize(model), dynamic=dynamic)
    for batch, height, width in ((2, 64, 96), (3, 96, 160), (4, 32, 64), (5, 128, 32)):
        x = image(batch, height, width)
        assert_close(run(compiled, x), run(model, x))
    assert graphs.plans == [1] * (1 if dynamic else 2)


class Scaled(nn.Module):
    """Operations of PyTorch's own around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = PreactBlock()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.block(x * 0.5 + 0.25))
        return F.leaky_relu(y * x).permute(0, 1, 3, 2)


def test_one_graph_for_all_sizes_of_plain_operations() -> None:
    model, graphs = randomise(Scaled()).eval(), Recorded()
    compiled = graphs.compile(hgfast.optimize(model), dynamic=True)
    for size in ((2, 16, 4, 6), (3, 16, 8, 2)):
        assert_close(run(compiled, features(*size)), run(model, features(*size)))
    assert graphs.plans == [1]


class Shares(nn.Module):
    """One activation under two names, and a place for another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1, bias=False)
        self.act1 = self.act2 = nn.ReLU()
        self.extra: nn.Module | None = None
        self.block = PreactBlock()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv(self.act1(self.block(x))))
        return x if self.extra is None else self.extra(x)


def _second_name(fast: Any) -> None:
    fast.act2 = nn.Sigmoid()


def _child_for_none(fast: Any) -> None:
    fast.extra = nn.Sigmoid()


def _bias_for_none(fast: Any) -> None:
    fast.conv.bias = nn.Parameter(torch.ones(16), requires_grad=False)


@pytest.mark.parametrize("change", [_second_name, _child_for_none, _bias_for_none])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_takes_the_place_of_nothing_is_noticed(
    change: Callable[[Any], None], compiled: bool
) -> None:
    model = randomise(Shares()).eval().requires_grad_(False)
    fast = hgfast.optimize(model)
    called = torch.compile(fast, backend="eager") if compiled else fast
    x = torch.randn(1, 16, 6, 6)
    assert_close(run(called, x), run(model, x))
    change(model)
    change(fast)
    assert_close(run(called, x), run(model, x))


def test_a_bias_that_goes_is_noticed() -> None:
    model = randomise(Shares()).eval()
    model.conv.bias = nn.Parameter(torch.ones(16))
    fast, x = hgfast.optimize(model), torch.randn(1, 16, 6, 6)
    assert_close(run(fast, x), run(model, x))
    model.conv.bias = fast.conv.bias = None
    assert_close(run(fast, x), run(model, x))


def test_global_hooks_are_seen() -> None:
    model = randomise(PreactBlock()).eval().requires_grad_(False)
    compiled, x = torch.compile(hgfast.optimize(model), backend="eager"), torch.randn(1, 16, 6, 6)
    expected = torch.compile(model, backend="eager")  # which is a module, and hooked, too
    before = run(compiled, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hgfast.HgfastWarning)  # eager runs, and says so
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: y + 1)
        try:
            assert_close(run(compiled, x), run(expected, x))
        finally:
            handle.remove()
    assert_close(run(compiled, x), before)


def test_wrong_keywords_are_errors_in_a_graph_too() -> None:
    fast = hgfast.optimize(randomise(PreactBlock()).eval().requires_grad_(False))
    for call in (fast, torch.compile(fast, backend="eager")):
        with pytest.raises(Exception, match="typo"):
            call(x=torch.randn(1, 16, 6, 6), typo=1)


class Classifies(nn.Module):
    """A linear layer, and a weight that broadcasts: shapes that only weights tell."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.map = PreactBlock(), nn.Linear(16, 5)
        self.scale = nn.Parameter(torch.randn(7, 1, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(x)
        return self.map(y.mean((2, 3))), y[:1] * self.scale


def test_shapes_in_a_graph_are_those_of_the_results() -> None:
    model = randomise(Classifies()).eval().requires_grad_(False)
    fast = hgfast.optimize(model)
    program = torch.export.export(fast, (torch.randn(2, 16, 6, 6),))
    (call,) = (n for n in program.graph.nodes if "run_plan" in str(n.target))
    assert [tuple(t.shape) for t in call.meta["val"]] == [(2, 5), (7, 16, 6, 6)]
    x = torch.randn(2, 16, 6, 6)
    assert_close(run(program.module(), x), run(model, x))


def test_packs_do_not_pile_up() -> None:
    fast = hgfast.optimize(network().requires_grad_(False))
    weights, text = operands(fast)
    gc.collect()
    before = len(compiling.packs)
    for _ in range(5):
        with torch.no_grad():
            for weight in weights:
                if weight.is_floating_point():
                    weight.mul_(1.1)
        torch.ops.hgfast.run_plan([image()], weights, text, "highest")
    assert len(compiling.packs) <= before + 2


def test_regions_inside_a_network() -> None:
    model = randomise(Foreign()).eval()
    graphs = Recorded()
    compiled = graphs.compile(hgfast.optimize(model))
    x = torch.randn(2, 16, 7, 5)
    assert_close(run(compiled, x), run(model, x))
    assert graphs.plans == [2]


def test_containers_and_keywords() -> None:
    model = randomise(Dict()).eval()
    fast, graphs = hgfast.optimize(model), Recorded()
    compiled = graphs.compile(fast)
    x, other = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 6, 6)
    with torch.no_grad():
        ours = compiled(other=other, x=x)
    assert graphs.plans == [1]
    assert list(ours) == ["y", "again"]
    assert isinstance(ours["again"][1], tuple)
    assert ours["again"][0] is ours["y"]
    assert ours["again"][1][1] is x
    assert_close([ours["y"], ours["again"][1][0]], [run(model, x, other)[i] for i in (0, 2)])


@pytest.mark.parametrize("decode", ["dark", {"topk": hgfast.GlobalTopK(3)}])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_models_that_decode(decode: Any, precision: str) -> None:
    fast = hgfast.optimize(network(2), precision, decode=decode)
    graphs = Recorded()
    ours = run(graphs.compile(fast), image(2))
    assert graphs.plans == [1]
    for one, other in zip(ours, run(fast, image(2)), strict=True):
        assert torch.equal(one, other)


def test_inductor() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.block(x / 2 + 0.25), 1).transpose(2, 3)

    model = randomise(Around()).eval()
    fast = hgfast.optimize(model)
    compiled = torch.compile(fast, fullgraph=True)
    for x in (
        features(2, 16, 8, 8),
        features(2, 16, 8, 8).contiguous(memory_format=torch.channels_last),
        features(1, 16, 12, 8),
    ):
        assert_close(run(compiled, x), run(model, x))
        with torch.inference_mode():
            assert_close([compiled(x)], run(model, x))
    fast.block.conv3.weight.data.mul_(0.5)
    with torch.no_grad():
        fast.block.conv3.bias.add_(0.25)
    assert_close(run(compiled, features(2, 16, 8, 8)), eager(fast, features(2, 16, 8, 8)))


def test_packed_weights_are_shared_with_the_eager_path(packings: list[int]) -> None:
    fast = hgfast.optimize(network())
    compiled = Recorded().compile(fast)
    for _ in range(3):
        run(compiled, image())
    assert not packings


# --- what changes after it was compiled -------------------------------------------------------


def replace_module(fast: nn.Module) -> None:
    fast.get_submodule("heads.0").conv = nn.Conv2d(32, 32, 1)


def replace_by_another_structure(fast: nn.Module) -> None:
    fast.get_submodule("heads.0").conv = nn.Conv2d(32, 32, 3, padding=1)


def append_module(fast: nn.Module) -> None:
    fast.get_submodule("heads.0").residuals.append(nn.Conv2d(32, 32, 1))


def replace_parameter(fast: nn.Module) -> None:
    block = fast.get_submodule("stem.residual2")
    block.conv2.weight = nn.Parameter(torch.randn_like(block.conv2.weight))


def edit_in_place(fast: nn.Module) -> None:
    with torch.no_grad():
        fast.get_parameter("heads.0.heatmap.weight").mul_(-1)


def edit_data(fast: nn.Module) -> None:
    weight = fast.get_parameter("heads.0.heatmap.weight")
    weight.data = torch.randn_like(weight)


def edit_without_a_trace(fast: nn.Module) -> None:
    fast.get_parameter("heads.0.heatmap.weight").data.mul_(-1)
    hgfast.refresh(fast)


def edit_statistics(fast: nn.Module) -> None:
    fast.get_buffer("stem.residual1.norm2.running_var").mul_(4)


def train_for_a_step(fast: nn.Module) -> None:
    fast.train()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", hgfast.HgfastWarning)
        fast(image(4))
    fast.eval()


def load(fast: nn.Module) -> None:
    fast.load_state_dict({key: value * 0.5 for key, value in fast.state_dict().items()})


def load_by_assignment(fast: nn.Module) -> None:
    halves = {key: value * 0.5 for key, value in fast.state_dict().items()}
    fast.load_state_dict(halves, assign=True)


def change_eps(fast: nn.Module) -> None:
    fast.heads[0].norm.eps = 0.5
    hgfast.refresh(fast)


CHANGES = [
    *(replace_module, replace_by_another_structure, append_module, replace_parameter),
    *(edit_in_place, edit_data, edit_without_a_trace, edit_statistics, train_for_a_step),
    *(load, load_by_assignment, change_eps),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_compiled_model_follows(change: Callable[[nn.Module], None]) -> None:
    fast, graphs = hgfast.optimize(network()), Recorded()
    compiled = graphs.compile(fast)
    before = run(compiled, image())[0].clone()
    change(fast)
    after = run(compiled, image())
    assert not torch.allclose(before, after[0], rtol=1e-3)
    assert_close(after, eager(fast, image()))
    assert graphs.plans in ([1], [1, 1]), "and kernels still run"


def test_a_compiled_model_follows_a_cast() -> None:
    fast, graphs = hgfast.optimize(network()), Recorded()
    compiled = graphs.compile(fast)
    run(compiled, image())
    fast.to(torch.bfloat16)
    ours = run(compiled, image().bfloat16())
    assert graphs.plans == [1, 1]
    assert torch.equal(ours[0], run(fast, image().bfloat16())[0])
    fast.double()
    with pytest.warns(hgfast.HgfastWarning, match=r"torch\.float64"):
        assert_close(run(compiled, image().double()), eager(fast, image().double()))


def hook(fast: nn.Module) -> Callable[[], None]:
    handle = fast.get_submodule("heads.0.conv").register_forward_hook(lambda m, args, out: out * 2)
    return handle.remove


def train(fast: nn.Module) -> Callable[[], None]:
    fast.get_submodule("heads.0.norm").train()
    return lambda: fast.get_submodule("heads.0.norm").eval() and None


def patch(fast: nn.Module) -> Callable[[], None]:
    conv = fast.get_submodule("heads.0.conv")
    conv.forward = torch.zeros_like
    return lambda: delattr(conv, "forward")


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def something_foreign(fast: nn.Module) -> Callable[[], None]:
    head = fast.get_submodule("heads.0")
    conv = head.conv
    head.conv = nn.Sequential(conv, Sums())
    return lambda: setattr(head, "conv", conv)


@pytest.mark.parametrize(
    "change", [hook, train, patch, something_foreign], ids=lambda c: c.__name__
)
def test_a_compiled_model_runs_eagerly_where_it_must(
    change: Callable[[nn.Module], Callable[[], None]],
) -> None:
    fast, graphs = hgfast.optimize(network()), Recorded()
    compiled = graphs.compile(fast)
    before = run(compiled, image(2))
    undo = change(fast)
    expected = eager(fast, image(2))
    with pytest.warns(hgfast.HgfastWarning, match="eagerly"):
        ours = run(compiled, image(2))
    assert graphs.plans == [1, 0]
    assert_close(ours, expected)
    assert not torch.allclose(ours[0], before[0], rtol=1e-3)
    undo()
    if change is not train:  # which has moved the statistics
        assert_close(run(compiled, image(2)), before)


def test_training_mode_of_the_whole_model() -> None:
    fast, graphs = hgfast.optimize(network()), Recorded()
    compiled = graphs.compile(fast)
    run(compiled, image(2))
    fast.train()
    with pytest.warns(hgfast.HgfastWarning, match="training mode"):
        run(compiled, image(2))
    assert graphs.plans == [1, 0]
    assert fast.stem.norm.num_batches_tracked.item() == 1
    fast.eval()
    assert_close(run(compiled, image(2)), eager(fast, image(2)))


def test_gradients_flow_through_a_compiled_model() -> None:
    model = network()
    fast, graphs = hgfast.optimize(model), Recorded()
    compiled = graphs.compile(fast)
    run(compiled, image())
    with pytest.warns(hgfast.HgfastWarning, match="gradients"):
        compiled(image())[0].sum().backward()
    model(image())[0].sum().backward()
    for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert graphs.plans == [1, 0]


def test_restored_after_it_was_compiled() -> None:
    fast, graphs = hgfast.optimize(network()), Recorded()
    compiled = graphs.compile(fast)
    run(compiled, image())
    hgfast.restore(fast)
    assert torch.equal(run(compiled, image())[0], run(fast, image())[0])
    hgfast.optimize(fast, "medium", inplace=True)
    assert torch.equal(run(compiled, image())[0], run(fast, image())[0])
    assert graphs.plans == [1, 0, 1]


def test_optimised_after_it_was_compiled() -> None:
    model, graphs = network(), Recorded()
    compiled = graphs.compile(model)
    run(compiled, image())
    hgfast.optimize(model, inplace=True)
    run(compiled, image())
    assert graphs.plans == [0, 1]


def test_a_copy_is_compiled_on_its_own() -> None:
    fast, graphs = hgfast.optimize(network()), Recorded()
    twin = copy.deepcopy(fast)
    edit_in_place(twin)
    replace_by_another_structure(twin)
    assert_close(run(graphs.compile(twin), image()), eager(twin, image()))
    assert_close(run(graphs.compile(fast), image()), eager(fast, image()))
    assert graphs.plans == [1, 1]


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, graphs = hgfast.optimize(network()), Recorded()
    monkeypatch.setenv("HGFAST_DISABLE", "1")
    with pytest.warns(hgfast.HgfastWarning, match="HGFAST_DISABLE"):
        run(graphs.compile(fast), image())
    assert graphs.plans == [0]


@pytest.mark.parametrize(
    "x",
    [torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 68, 68), torch.zeros(1, 3, 64, 64).double()],
    ids=["channels", "stride", "dtype"],
)
def test_a_compiled_model_refuses_what_eager_refuses(x: Tensor) -> None:
    fast = hgfast.optimize(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hgfast.HgfastWarning)
        with pytest.raises((RuntimeError, ValueError)):
            run(torch.compile(fast, backend="eager"), x)


# --- torch.export and AOTInductor -------------------------------------------------------------


@pytest.mark.parametrize(("strict", "decode"), [(False, None), (True, None), (False, "quarter")])
def test_export(strict: bool, decode: str | None) -> None:
    fast = hgfast.optimize(network(), decode=decode)
    with torch.no_grad():
        program = torch.export.export(fast, (image(),), strict=strict)
    assert plans_in(program.graph_module) == 1
    assert set(program.state_dict) == set(fast.state_dict())
    expected = run(fast, image(seed=1))
    for each in (program, program.run_decompositions()):
        assert plans_in(each.graph_module) == 1
        assert_close(run(each.module(), image(seed=1)), expected, rtol=1e-6)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_close(run(torch.export.load(file).module(), image(seed=1)), expected, rtol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_sizes_left_open(strict: bool) -> None:
    model = network()
    batch, rows, columns = (torch.export.Dim(name, max=64) for name in ("batch", "rows", "columns"))
    with torch.no_grad():
        program = torch.export.export(
            hgfast.optimize(model),
            (image(2, 64, 96),),
            dynamic_shapes=({0: batch, 2: 16 * rows, 3: 16 * columns},),
            strict=strict,
        )
    assert plans_in(program.graph_module) == 1
    for x in (image(3, 32, 64), image(1, 128, 48)):
        assert_close(run(program.module(), x), run(model, x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_regions_inside_a_network(strict: bool) -> None:
    model = randomise(Foreign()).eval()
    x = torch.randn(2, 16, 7, 5)
    with torch.no_grad():
        program = torch.export.export(hgfast.optimize(model), (x,), strict=strict)
    assert plans_in(program.graph_module) == 2
    assert_close(run(program.module(), x), run(model, x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_modules_that_are_shared(strict: bool) -> None:
    block = randomise(PreactBlock())
    model = nn.Sequential(block, nn.Conv2d(16, 16, 1), nn.Sequential(block, block)).eval()
    x = features(1, 16, 4, 4)
    with torch.no_grad():
        program = torch.export.export(hgfast.optimize(model), (x,), strict=strict)
    assert plans_in(program.graph_module) == 1
    assert_close(run(program.module(), x), run(model, x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_where_eager_must_run(strict: bool) -> None:
    fast = hgfast.optimize(network().requires_grad_(False))
    fast.get_submodule("heads.0.norm").train()
    with pytest.warns(hgfast.HgfastWarning, match="training mode"):
        program = torch.export.export(fast, (image(2),), strict=strict)
    assert plans_in(program.graph_module) == 0


def test_exported_weights_may_change() -> None:
    fast = hgfast.optimize(network())
    with torch.no_grad():
        module = torch.export.export(fast, (image(),)).module()
    assert_close(run(module, image()), run(fast, image()))
    before = run(module, image())[0]
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()})
    twin = copy.deepcopy(fast)
    twin.load_state_dict(module.state_dict())
    assert_close(run(module, image()), eager(twin, image()))
    assert not torch.allclose(run(module, image())[0], before, rtol=1e-3)


def test_aot_inductor(tmp_path: Path, packings: list[int]) -> None:
    model = network()
    fast = hgfast.optimize(model)
    rows = torch.export.Dim("rows", max=64)
    with torch.no_grad():
        program = torch.export.export(fast, (image(),), dynamic_shapes=({2: 16 * rows},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    loaded = torch._inductor.aoti_load_package(path)
    packings.clear()
    for height in (64, 96, 32):
        x = image(1, height, 64, seed=height)
        assert_close(run(loaded, x), run(model, x))
    assert len(packings) == 1


# --- autocast ---------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Outputs that autocast leaves in different dtypes: a convolution's, and a sum with a map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PreactBlock(), PreactBlock(16, 24)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        z = self.second(y)
        return {"sum": y, "block": z, "heatmaps": self.head(z)}


def autocast(dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=enabled)


def assert_autocast(fast: Callable[..., Any], model: nn.Module, *inputs: Tensor) -> None:
    """The dtypes of eager under autocast, and no more error than twice eager's."""
    exact = run(copy.deepcopy(model).double(), *(x.double() for x in inputs))
    with autocast():
        ours, theirs = run(fast, *inputs), run(model, *inputs)
    assert [y.dtype for y in ours] == [y.dtype for y in theirs]
    assert [y.stride() for y in ours] == [y.stride() for y in theirs] or inputs[0].numel() == 0
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        errors = [float((y.double() - truth).norm() / truth.norm()) for y in (one, other)]
        assert errors[0] <= max(2 * errors[1], 1e-6), errors


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_autocast_runs_on_bfloat16_kernels(precision: str) -> None:
    for model, x in ((network(2), image(2)), (randomise(Mixed()).eval(), features(2, 16, 6, 4))):
        fast = hgfast.optimize(model, precision)
        with autocast():
            outside = run(hgfast.optimize(model, "medium"), x)
            inside = run(fast, x)
        assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))
        assert_autocast(fast, model, x)


def test_autocast_for_activations_that_are_bfloat16_already() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 16, 3), Foreign())).eval()
    fast = hgfast.optimize(model)
    assert len(regions_of(fast)) == 2
    assert_autocast(fast, model, image(2, 9, 7))
    block = randomise(PreactBlock()).eval()
    x = features(1, 16, 4, 4).bfloat16()
    with autocast():
        assert run(hgfast.optimize(block), x)[0].dtype == run(block, x)[0].dtype


def test_what_eager_returns_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = hgfast.optimize(network())
    (region,) = regions_of(fast)
    calls = []
    honest = type(region).eager
    monkeypatch.setattr(type(region), "eager", lambda *a, **k: calls.append(1) or honest(*a, **k))
    with autocast():
        for batch in (1, 2, 3):
            run(fast, image(batch))
    assert len(calls) == 1
    with torch.no_grad():
        fast.heads[0].heatmap.weight.mul_(2)
    with autocast():
        run(fast, image())
    assert len(calls) == 1


def test_nothing_false_stays_in_autocasts_cache() -> None:
    model = network()
    fast = hgfast.optimize(model)
    with autocast(), torch.no_grad():
        fast(image())
        ours = hgfast.restore(fast)(image())  # the same parameters, in eager, in the same context
    with autocast():
        assert torch.equal(ours[0], run(model, image())[0])


def test_autocast_that_is_off_or_of_another_dtype() -> None:
    model = network()
    fast = hgfast.optimize(model)
    with autocast(enabled=False):
        assert run(fast, image())[0].dtype == torch.float32
    with autocast(), autocast(enabled=False):
        assert_close(run(fast, image()), run(model, image()))
    with (
        autocast(torch.float16),
        pytest.warns(hgfast.HgfastWarning, match=r"another dtype than torch\.bfloat16"),
    ):
        assert torch.equal(run(fast, image())[0], run(model, image())[0])


def test_autocast_follows_weights_and_decodes() -> None:
    model = network()
    fast = hgfast.optimize(model)
    with autocast():
        run(fast, image())
    for edit in (edit_in_place, edit_without_a_trace, replace_by_another_structure, change_eps):
        edit(fast)
        assert_autocast(fast, hgfast.restore(copy.deepcopy(fast)), image())
    decoding = hgfast.optimize(model, decode="quarter")
    with autocast():
        coords, scores = run(decoding, image())
    expected = run(hgfast.optimize(model, "medium", decode="quarter"), image())
    assert torch.equal(coords, expected[0])
    assert torch.equal(scores, expected[1])


def test_autocast_for_a_bfloat16_model() -> None:
    model = network().bfloat16()
    fast = hgfast.optimize(model)
    x = image().bfloat16()
    with autocast():
        ours, theirs = run(fast, x), run(model, x)
    assert ours[0].dtype == theirs[0].dtype
    assert torch.equal(ours[0], run(fast, x)[0])


@pytest.mark.parametrize("size", [(2, 16, 6, 4), (1, 16, 5, 3)])
def test_autocast_inside_torch_compile(size: tuple[int, ...]) -> None:
    model = randomise(Mixed()).eval()
    fast, graphs = hgfast.optimize(model), Recorded()
    x = features(*size)
    assert_autocast(graphs.compile(fast), model, x)
    assert graphs.plans == [1]
    with autocast():
        expected = run(fast, x)
        assert all(map(torch.equal, run(graphs.compile(fast), x), expected))
    assert_close(run(graphs.compile(fast), x), run(model, x))
    with (
        autocast(torch.float16),
        pytest.warns(hgfast.HgfastWarning, match=r"another dtype than torch\.bfloat16"),
    ):
        run(graphs.compile(fast), x)


# --- other tools ------------------------------------------------------------------------------


def reasons(fast: nn.Module) -> str:
    return "; ".join(f"{row.name}: {row.reason}" for row in hgfast.report(fast).skipped)


def assert_optimises(model: nn.Module, *inputs: Tensor, regions: int = 1) -> nn.Module:
    """That so many regions run, and give what ``model`` gives."""
    fast = hgfast.optimize(model)
    assert len(regions_of(fast)) == regions, reasons(fast)
    assert_close(run(fast, *inputs), run(model, *inputs))
    return fast


def test_batch_norms_folded_by_hand() -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = randomise(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), PreactBlock())).eval()
    folded = nn.Sequential(fuse_conv_bn_eval(model[0], model[1]), nn.ReLU(), model[2])
    assert_optimises(folded.eval(), image(2, 9, 7))


def test_graph_modules_of_fx() -> None:
    model = network()
    fast = assert_optimises(torch.fx.symbolic_trace(model), image())
    assert_close(run(fast, image()), run(model, image()))


def test_weights_through_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    fast, other = hgfast.optimize(network()), network()
    edit_in_place(other)
    safetensors.save_model(other, tmp_path / "model.safetensors")
    run(fast, image())
    safetensors.load_model(fast, tmp_path / "model.safetensors")
    assert_close(run(fast, image()), run(other, image()))
    safetensors.save_model(fast, tmp_path / "again.safetensors")
    again = safetensors.load_file(tmp_path / "again.safetensors")
    assert again.keys() == other.state_dict().keys()


def _in_a_child(fast: nn.Module, x: Tensor) -> tuple[str, list[Tensor]]:
    (region,) = regions_of(fast)
    heatmaps = run(fast, x)
    return region.backend, [each.clone() for each in heatmaps]


def test_a_model_sent_to_a_process_that_was_spawned() -> None:
    fast = hgfast.optimize(randomise(PreactBlock()).eval())
    x = features(1, 16, 4, 4)
    expected = run(fast, x)  # packed here, not in the child
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        backend, ours = pool.submit(_in_a_child, fast, x).result(timeout=120)
    assert backend == regions_of(fast)[0].backend
    assert_close(ours, expected)


def test_threads_that_compile_and_run_at_once() -> None:
    fast = hgfast.optimize(randomise(PreactBlock()).eval())
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    x = features(1, 16, 4, 4)
    expected = run(fast, x)
    with ThreadPoolExecutor(3) as pool:
        for ours in pool.map(lambda _: run(compiled, x), range(12)):
            assert_close(ours, expected)


def test_behind_data_parallel() -> None:
    model = network()
    wrapped = nn.DataParallel(hgfast.optimize(model))
    assert_close(run(wrapped, image(2)), run(model, image(2)))
    fast = assert_optimises(nn.DataParallel(model), image(2))
    assert regions_of(fast)[0].name == "module"


class LowRank(nn.Module):
    """What LoRA adds to a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(0.1 * torch.randn(weight.shape[0], 2))
        self.b = nn.Parameter(0.1 * torch.randn(2, weight[0].numel()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.a @ self.b).view_as(weight)


def low_rank(conv: nn.Conv2d) -> nn.Module:
    return torch.nn.utils.parametrize.register_parametrization(conv, "weight", LowRank(conv.weight))


@pytest.mark.parametrize(
    "parametrise",
    [
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.parametrizations.weight_norm,
        low_rank,
    ],
    ids=lambda function: function.__name__,
)
def test_computed_weights_are_left_alone(parametrise: Callable[[nn.Conv2d], nn.Module]) -> None:
    model = randomise(nn.Sequential(PreactBlock(), PreactBlock(), PreactBlock())).eval()
    parametrise(model[1].conv2)
    model.eval()
    x = features(1, 16, 4, 4)
    fast = assert_optimises(model, x, regions=2)
    assert "conv2 has a parametrisation" in reasons(fast)
    expected = run(model, x)  # a copy shares its class: what is removed here is removed there
    torch.nn.utils.parametrize.remove_parametrizations(fast[1].conv2, "weight")
    assert_close(run(fast, x), expected)
    assert_optimises(hgfast.restore(fast), x)


def test_quantised_layers_are_left_alone() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.score = PreactBlock(), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.block(x)
            return y, self.score(y.mean((2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.ao.quantization.quantize_dynamic(randomise(Scored()).eval(), {nn.Linear})
    fast = assert_optimises(model, features(2, 16, 4, 4))
    assert regions_of(fast)[0].name == "block"
    assert "score" in reasons(fast)


def test_a_network_quantised_ahead_is_left_alone() -> None:
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    model = randomise(PreactBlock()).eval()
    x = features(1, 16, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantize_fx.prepare_fx(
            model, quantization.get_default_qconfig_mapping("x86"), (x,)
        )
        prepared(x)
        quantised = quantize_fx.convert_fx(prepared)
    with pytest.warns(hgfast.HgfastWarning, match="replaced nothing"):
        fast = hgfast.optimize(quantised)
    assert torch.equal(run(fast, x)[0], run(quantised, x)[0])


class Careless(nn.Module):
    """Its eval() returns nothing, its forward takes a list and empties it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = PreactBlock()

    def eval(self) -> None:  # type: ignore[override]
        super().eval()

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.block(inputs.pop())


def test_careless_networks() -> None:
    model = randomise(Careless())
    model.eval()
    fast = hgfast.optimize(model)
    assert [region.name for region in regions_of(fast)] == ["block"]
    ours, theirs = [features(1, 16, 4, 4)], [features(1, 16, 4, 4)]
    with torch.inference_mode():
        assert_close([fast(ours)], [model(theirs)])
    assert ours == theirs == []
    assert fast.eval() is None
