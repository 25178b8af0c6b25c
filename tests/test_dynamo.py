"""torch.compile(model, backend="hgfast"): eager's answers, by hgfast's kernels where they fit."""

from __future__ import annotations

import copy
import importlib
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_structure

import hgfast.dynamo
from hgfast import HgfastWarning
from hgfast import _native as native
from hgfast.runtime.cpu import CpuExecutor
from tests.field.strangers import STRANGERS
from tests.networks import Foreign, MethodHourglass, PreactBlock, image, randomise, small_hourglass

pytestmark = pytest.mark.skipif(
    native.load() is None or native.is_disabled(), reason="hgfast's compiled module is not here"
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[CpuExecutor]:
    """The executor of every run of hgfast's kernels."""
    done: list[CpuExecutor] = []
    run = CpuExecutor.run

    def counted(self: CpuExecutor, inputs: Any) -> Any:
        values = run(self, inputs)
        done.append(self)
        return values

    monkeypatch.setattr(CpuExecutor, "run", counted)
    return done


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="hgfast", fullgraph=True, **options)


def features(size: int = 16, channels: int = 16) -> Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def check(fast: Callable[..., Any], model: nn.Module, *inputs: Tensor, atol: float = 1e-4) -> None:
    """Same containers, dtypes and values, whatever happens to the inputs included."""
    mine, theirs = [x.clone() for x in inputs], [x.clone() for x in inputs]
    actual, expected = fast(*mine), model(*theirs)
    assert tree_structure(actual) == tree_structure(expected)
    for ours, their in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(their, Tensor):
            assert ours.stride() == their.stride() if their.layout is torch.strided else True
            torch.testing.assert_close(ours, their, rtol=1e-4, atol=atol)
        else:
            assert ours == their
    torch.testing.assert_close(mine, theirs)


def test_the_entry_point_is_declared_and_resolves() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["torch_dynamo_backends"]["hgfast"].split(":")
    assert getattr(importlib.import_module(module), name) is hgfast.dynamo.backend
    assert "hgfast" in torch.compiler.list_backends()


def test_hourglasses_of_all_sizes(runs: list[CpuExecutor]) -> None:
    model = randomise(MethodHourglass(depth=1)).eval()
    fast = compiled(model)
    sizes = [(1, 16, 16, 16), (1, 16, 24, 16), (3, 16, 16, 32), (2, 16, 8, 8), (1, 16, 16, 16)]
    with torch.inference_mode():
        for size in sizes:
            check(fast, model, torch.randn(size))
        check(fast, model, torch.randn(sizes[0]).contiguous(memory_format=torch.channels_last))
    assert len(runs) == len(sizes) + 1


def test_a_stacked_hourglass(runs: list[CpuExecutor]) -> None:
    model = small_hourglass(stacks=2)
    with torch.no_grad():
        check(compiled(model), model, image())
    assert len(runs) == 1


def test_a_recursive_hourglass(runs: list[CpuExecutor]) -> None:
    model = randomise(MethodHourglass()).eval()
    with torch.no_grad():
        check(compiled(model), model, features())
    assert len(runs) == 1


def test_weights_are_packed_once(runs: list[CpuExecutor]) -> None:
    fast = compiled(randomise(PreactBlock()).eval())
    with torch.no_grad():
        for _ in range(3):
            fast(features())
    assert len(runs) == 3
    assert len(set(map(id, runs))) == 1


def _edit(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.mul_(1.1)


def _edit_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(0.1)


def _load(model: nn.Module) -> None:
    other = {name: value * 0.9 for name, value in model.state_dict().items()}
    model.load_state_dict(other)


def _assign(model: nn.Module) -> None:
    other = {name: value * 0.9 for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def _replace(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight * 0.9)


def _swap_data(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 0.9


def _replace_modules(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                fresh = nn.BatchNorm2d(child.num_features, eps=0.1).eval()
                setattr(module, name, fresh)


@pytest.mark.parametrize(
    "change",
    [_edit, _edit_statistics, _load, _assign, _replace, _swap_data, _replace_modules],
)
def test_changed_weights(runs: list[CpuExecutor], change: Callable[[nn.Module], None]) -> None:
    model = randomise(MethodHourglass(depth=1)).eval()
    fast = compiled(model)
    with torch.no_grad():
        before = fast(features())
        change(model)
        after = fast(features())
        check(fast, model, features())
    assert not torch.allclose(before[0], after[0])
    assert len(runs) == 3


def test_models_of_one_class_share_a_graph(runs: list[CpuExecutor]) -> None:
    models = [randomise(PreactBlock(), seed).eval() for seed in range(6)]
    with torch.no_grad():
        for _ in range(2):
            for model in models:
                check(compiled(model), model, features())
    assert len(runs) == 12


def test_the_weights_of_models_that_are_gone_do_not_stay() -> None:
    import gc
    import weakref

    model = randomise(PreactBlock()).eval()
    known = weakref.ref(model.conv1.weight)
    with torch.no_grad():
        compiled(model)(features())
    del model
    torch._dynamo.reset()
    gc.collect()
    assert known() is None


def test_gradients_are_eagers(runs: list[CpuExecutor]) -> None:
    model, x = randomise(PreactBlock()).eval(), features()
    twin = copy.deepcopy(model)
    with pytest.warns(HgfastWarning, match="gradients are enabled"):
        compiled(model)(x).square().sum().backward()
    twin(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    model.requires_grad_(False)
    x.requires_grad_()
    with pytest.warns(HgfastWarning, match="an input requires them"):
        assert compiled(model)(x).requires_grad
    assert not runs
    check(compiled(model), model, x.detach())  # nobody wants gradients
    assert len(runs) == 1


def test_training_mode_is_eagers(runs: list[CpuExecutor]) -> None:
    model = randomise(PreactBlock()).eval()
    fast = compiled(model)
    with torch.no_grad():
        check(fast, model, features())
        model.train()
        twin = copy.deepcopy(model)
        with pytest.warns(HgfastWarning, match="eagerly"):
            check(fast, twin, features())
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
        assert len(runs) == 1
        model.eval()
        check(fast, model, features())
    assert len(runs) == 2


def test_bfloat16(runs: list[CpuExecutor]) -> None:
    model = randomise(PreactBlock()).eval().bfloat16()
    with torch.no_grad():
        check(compiled(model), model, features().bfloat16(), atol=0.1)
    assert len(runs) == 1
    assert runs[0].backend.endswith("bfloat16")


def test_precision(runs: list[CpuExecutor]) -> None:
    model = randomise(PreactBlock()).eval()
    with torch.no_grad():
        check(compiled(model, options={"precision": "medium"}), model, features(), atol=0.1)
    assert runs[0].backend.endswith("bfloat16")
    for options, message in [({"precision": "low"}, "precision"), ({"speed": 1}, "speed")]:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message), torch.no_grad():
            compiled(model, options=options)(features())


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_autocast(runs: list[CpuExecutor], precision: str) -> None:
    model = randomise(Returns(lambda a, b: [a, b])).eval()
    fast = compiled(model, options={"precision": precision})
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                check(fast, model, features(), atol=0.1)
            assert runs[-1].backend.endswith("bfloat16")
            check(fast, model, features(), atol=0.1 if precision == "medium" else 1e-4)
            assert runs[-1].backend.endswith("bfloat16") == (precision == "medium")
    assert len(runs) == 4
    assert len(set(map(id, runs))) == 2


Heatmaps = namedtuple("Heatmaps", "first rest")


class Returns(nn.Module):
    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = PreactBlock(), PreactBlock()
        self.container = container

    def forward(self, x: Tensor) -> Any:
        first = self.first(x)
        return self.container(first, self.second(first))


@pytest.mark.parametrize(
    "container",
    [
        lambda a, b: b,
        lambda a, b: [a, b],
        lambda a, b: (b, a),
        lambda a, b: [a],
        lambda a, b: {"heatmaps": b, "others": [a]},
        lambda a, b: Heatmaps(b, [a]),
        lambda a, b: [a, (b, {"again": a})],
        lambda a, b: (b, None, 3, "text"),
    ],
)
def test_containers(runs: list[CpuExecutor], container: Callable[..., Any]) -> None:
    model = randomise(Returns(container)).eval()
    with torch.no_grad():
        check(compiled(model), model, features())
    assert len(runs) == 1


class Around(nn.Module):
    """A block, and something around it that is no part of a Plan."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.block = PreactBlock()
        self.register_buffer("calls", torch.zeros(1, 16, 1, 1))
        self.inner = forward

    def forward(self, x: Tensor) -> Any:
        return self.inner(self, x)


def _counts(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.block(x) + m.calls


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.block(x)


def _writes_behind(m: Any, x: Tensor) -> Tensor:
    y = m.block(x)
    z = torch.cumsum(y, 1)
    y.relu_()  # what a part returned is changed by another
    return z + m.block(y)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.block(x.relu_()), "relu_|writes|changes"),
        (lambda m, x: m.block(x.mul_(2)), "mul_|writes|changes"),
        (lambda m, x: (m.block(x), x.clone()), "a copy"),
        (lambda m, x: (lambda y: (y, y.clone()))(m.block(x)), "copies"),
        (lambda m, x: F.relu(x), "no weights"),
        (lambda m, x: m.block(x).new_tensor([1.0]) + m.block(x), ""),
        (_counts, ""),
        (_autocast, "_enter_autocast"),
        (lambda m, x: (x.sum() + m.calls, x[0, 0].to_sparse()), ""),
        (_writes_behind, ""),
        (lambda m, x: F.interpolate(torch.cumsum(x, 1), scale_factor=2), "no weights"),
    ],
)
def test_what_is_no_plan_runs_eagerly(
    runs: list[CpuExecutor], forward: Callable[..., Any], reason: str
) -> None:
    model = randomise(Around(forward)).eval()
    twin = copy.deepcopy(model)
    fast = torch.compile(model, backend="hgfast")
    with torch.no_grad():
        with pytest.warns(HgfastWarning, match=reason):
            check(fast, twin, features())
        check(fast, twin, features())
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert not runs


def _flattens(m: Any, x: Tensor) -> Tensor:
    return torch.sort(m.block(x).contiguous().view(x.shape[0], -1), 1)[0]


def _works_on_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.block(x)
    return m.block(torch.cumsum(y, 1).unfold(2, 8, 8)[..., 0].transpose(2, 3))


def _writes_within(m: Any, x: Tensor) -> Tensor:
    return m.block(F.relu6(torch.cumsum(m.block(x), 1), inplace=True).clamp_(max=3)) + x.amax()


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (lambda m, x: torch.cumsum(m.block(x), 1), 1),
        (lambda m, x: m.block(torch.cumsum(m.block(x), 1)), 2),
        (lambda m, x: (m.block(x), x.sum(), {"size": x.shape[2], "x": x.argmax()}), 1),
        (_flattens, 1),
        (_works_on_a_view, 2),
        (_writes_within, 2),
    ],
)
def test_parts_of_what_is_no_plan(
    runs: list[CpuExecutor], forward: Callable[..., Any], count: int
) -> None:
    model = randomise(Around(forward)).eval()
    fast = compiled(model)
    with torch.no_grad():
        with pytest.warns(HgfastWarning, match="parts of a compiled graph eagerly") as told:
            check(fast, model, features())
        assert len([each for each in told if each.category is HgfastWarning]) == 1
        check(fast, model, features().contiguous(memory_format=torch.channels_last))
        assert len(runs) == 2 * count
        model.block.conv1.weight.mul_(2)
        check(fast, model, features())
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore", HgfastWarning)  # another graph
            check(fast, model, features(), atol=0.2)
    assert len(runs) == 4 * count
    with pytest.warns(HgfastWarning, match="gradients are enabled"):
        check(fast, model, features())
    assert len(runs) == 4 * count


@pytest.mark.parametrize(
    ("name", "least"),
    [
        *(("squeeze and excite", 1), ("channel shuffle", 1), ("GELU, ELU, Mish", 2)),
        *(("control flow on values", 1), ("pads to a multiple", 1), ("counts its calls", 0)),
        *(("sums that broadcast", 1), ("a sum into a slice", 0), ("image by image", 1)),
    ],
)
def test_strangers(runs: list[CpuExecutor], name: str, least: int) -> None:
    """Data-dependent control flow, layers that no Plan has, writes into slices and buffers."""
    torch.manual_seed(0)
    model = STRANGERS[name].build().eval()
    twin = copy.deepcopy(model)
    fast = torch.compile(model, backend="hgfast")
    x = torch.randn(STRANGERS[name].shapes[0])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HgfastWarning)
        check(fast, twin, x)
        check(fast, twin, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert len(runs) >= 2 * least
    assert bool(runs) == bool(least)


@pytest.mark.parametrize("dynamic", [False, True])
def test_group_norms(runs: list[CpuExecutor], dynamic: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.block(F.group_norm(m.block(torch.cumsum(x, 1)), 4))

    model = randomise(Around(forward)).eval()
    fast = compiled(model, dynamic=dynamic)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HgfastWarning)
        for size in (16, 12):
            check(fast, model, features(size))
    assert len(runs) == 2  # GroupNorm is a step of the Plan


def test_each_reason_is_told_once() -> None:
    fast = compiled(randomise(Foreign()).eval())
    with torch.no_grad():
        with pytest.warns(HgfastWarning, match="cumsum"):
            fast(features())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast(features())


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_in_the_forward(dynamic: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.block(F.max_pool2d(x, 2))
        return x + F.interpolate(y, size=x.shape[2:]) * x.shape[2]

    model = randomise(Around(forward)).eval()
    fast = compiled(model, dynamic=dynamic)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HgfastWarning)
        for size in (16, 32, 18):
            check(fast, model, features(size))


def test_what_a_call_may_bring(runs: list[CpuExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(PreactBlock()).eval()
    fast = compiled(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HgfastWarning)
        check(fast, model, features())
        assert len(runs) == 1
        with torch.autocast("cpu", torch.float16):
            check(fast, model, features())
        monkeypatch.setenv("HGFAST_DISABLE", "1")
        check(fast, model, features())
        monkeypatch.delenv("HGFAST_DISABLE")
        assert len(runs) == 1
        for wrong in (features(channels=8), features().double()):
            with pytest.raises(Exception, match=r".") as ours:
                fast(wrong)
            with pytest.raises(RuntimeError):
                model(wrong)
            assert "hgfast" not in str(ours.value)
        check(fast, model, features())


def test_weights_of_inference_mode_are_never_stale() -> None:
    with torch.inference_mode():
        model = randomise(PreactBlock()).eval()
        fast = compiled(model)
        with pytest.warns(HgfastWarning, match="inference mode"):
            check(fast, model, features())
        model.conv1.weight.mul_(2)
        check(fast, model, features())


def test_with_graph_breaks(runs: list[CpuExecutor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.block(x)
        torch._dynamo.graph_break()
        return m.block(torch.cumsum(y, 1))

    model = randomise(Around(forward)).eval()
    with torch.no_grad(), pytest.warns(HgfastWarning, match="cumsum"):
        check(torch.compile(model, backend="hgfast"), model, features())
    assert len(runs) == 2


def test_from_several_threads(runs: list[CpuExecutor]) -> None:
    model = small_hourglass()
    fast = compiled(model)
    x = image()
    with torch.no_grad():
        expected = fast(x)[0]
    results: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.extend(fast(x)[0] for _ in range(5))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 16
    assert len(results) == 15
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", [F.relu, F.relu6])
def test_in_place_by_position(function: Any) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            function(y, True)
            return F.relu(self.second(y)) + y

    torch.manual_seed(0)
    model = Writes().eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", HgfastWarning)
        check(torch.compile(model, backend="hgfast"), copy.deepcopy(model), x)
