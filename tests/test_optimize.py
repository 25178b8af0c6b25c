"""hgfast.optimize and its companions: the drop-in contract, behaviour by behaviour."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import (
    Foreign,
    MethodHourglass,
    Plain,
    PreactBlock,
    image,
    randomise,
    small_hourglass,
)
from torch import Tensor, nn

import hgfast
from hgfast import _native
from hgfast.optimization import precision_of
from hgfast.region import Region, regions_of

pytestmark = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))


@pytest.fixture(autouse=True)
def _no_silent_fallback() -> Iterator[None]:
    """A warning is an error, so that no test passes because eager ran unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", hgfast.HgfastWarning)
        yield


def run(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return torch.utils._pytree.tree_leaves(model(*inputs))


def assert_same(fast: nn.Module, eager: nn.Module, x: Tensor, rtol: float = 1e-5) -> None:
    """The fast path agrees with eager: relative L2 error of every output."""
    plain = hgfast.restore(copy.deepcopy(eager))
    for ours, theirs in zip(run(fast, x), run(plain, x), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error <= rtol, f"relative error {error:.1e}"


# --- the same call, outputs, state_dict -----------------------------------------------------


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_whole_network(precision: str) -> None:
    model = small_hourglass(stacks=2)
    fast = hgfast.optimize(model, precision)
    assert type(fast) is type(model)
    assert precision_of(fast) == precision
    with torch.inference_mode():
        assert isinstance(fast(image()), list)
    rtol = {"highest": 1e-5, "high": 2e-5, "medium": 2e-2}[precision]
    assert_same(fast, model, image(2, 64, 96), rtol=rtol)
    verification = hgfast.verify(model, fast, image())
    assert verification.ok, str(verification)


def test_precision_follows_torch_by_default() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert precision_of(hgfast.optimize(small_hourglass())) == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_bfloat16_model() -> None:
    model = small_hourglass(stacks=2).bfloat16()
    fast = hgfast.optimize(model)
    x = image().bfloat16()
    assert all(y.dtype == torch.bfloat16 for y in run(fast, x))
    assert hgfast.verify(model, fast, x).ok
    assert "bfloat16" in hgfast.report(fast).replaced[0].backend


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_layouts_and_batches(batch: int, memory_format: torch.memory_format) -> None:
    model = small_hourglass()
    x = image(batch).to(memory_format=memory_format)
    ours, theirs = run(hgfast.optimize(model), x), run(model, x)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert batch == 0 or one.is_contiguous(memory_format=memory_format)


def test_non_contiguous_input() -> None:
    model = small_hourglass()
    x = torch.randn(1, 64, 64, 6).permute(0, 3, 1, 2)[:, ::2]
    assert_same(hgfast.optimize(model), model, x)


def test_the_given_model_is_never_touched() -> None:
    model = small_hourglass().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [dict(module.__dict__) for module in model.modules()]
    fast = hgfast.optimize(model, example=image())
    assert fast is not model
    assert not regions_of(model)
    assert [dict(module.__dict__) for module in model.modules()] == attributes
    fast.eval()
    run(fast, image())
    with torch.no_grad():
        next(fast.parameters()).zero_()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_inplace_and_state_dict_identity() -> None:
    model = small_hourglass()
    before = dict(model.state_dict(keep_vars=True))
    fast = hgfast.optimize(model, inplace=True)
    assert fast is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert [name for name, _ in fast.named_modules()] == [
        name for name, _ in hgfast.restore(copy.deepcopy(fast)).named_modules()
    ]


def test_restore() -> None:
    model = small_hourglass()
    attributes = [set(module.__dict__) for module in model.modules()]
    fast = hgfast.optimize(model, inplace=True)
    assert hgfast.restore(fast) is model
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert hgfast.report(model).replaced == []
    assert "not optimised" in str(hgfast.report(model))


def test_optimising_twice_is_the_same_as_once() -> None:
    model = small_hourglass()
    once = hgfast.optimize(model, "highest")
    twice = hgfast.optimize(once, "highest")
    assert twice is not once
    assert hgfast.report(twice).replaced == hgfast.report(once).replaced
    assert_same(twice, model, image())
    assert hgfast.optimize(once, "highest", inplace=True) is once
    medium = hgfast.optimize(once, "medium", inplace=True)
    assert precision_of(medium) == "medium"
    assert "bfloat16" in hgfast.report(medium).replaced[0].backend


def test_containers_are_the_modules_own() -> None:
    class Containers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.block(x)
            return {"list": [y], "tuple": (y, [x])}

    model = randomise(Containers()).eval()
    x = torch.randn(1, 16, 5, 5)
    fast = hgfast.optimize(model)
    with torch.inference_mode():
        out = fast(x)
    assert set(out) == {"list", "tuple"}
    assert isinstance(out["list"], list)
    assert isinstance(out["tuple"], tuple)
    torch.testing.assert_close(out["tuple"][1][0], x)
    assert_same(fast, model, x)


def test_keyword_arguments() -> None:
    model = small_hourglass()
    fast = hgfast.optimize(model)
    with torch.inference_mode():
        ours = fast(image=image())
    torch.testing.assert_close(ours[0], run(model, image())[0], rtol=1e-4, atol=1e-5)


# --- regions: the largest that can be expressed ---------------------------------------------


def test_a_foreign_hourglass_is_one_region() -> None:
    model = randomise(MethodHourglass()).eval()
    fast = hgfast.optimize(model)
    assert [region.name for region in regions_of(fast)] == [""]
    kinds = [row.kind for row in hgfast.report(fast).replaced]
    assert kinds.count("bottleneck + upsample_add") == 2
    assert_same(fast, model, torch.randn(1, 16, 16, 8))


def test_blocks_are_replaced_where_the_whole_is_not_understood() -> None:
    model = randomise(Foreign()).eval()
    fast = hgfast.optimize(model)
    report = hgfast.report(fast)
    assert [row.name for row in report.replaced] == ["first", "second"]
    assert [row.region for row in report.replaced] == ["first", "second"]
    assert any("cumsum" in row.reason for row in report.skipped)
    assert_same(fast, model, torch.randn(2, 16, 7, 5))


def test_an_example_makes_shape_dependent_modules_traceable() -> None:
    class Halves(nn.Module):
        """Asserts on a shape, which symbolic tracing cannot follow."""

        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor) -> Tensor:
            if x.size(2) % 2:
                raise ValueError("odd height")
            return self.block(self.block(x))

    model = randomise(Halves()).eval()
    alone = hgfast.optimize(model)
    assert [row.region for row in hgfast.report(alone).replaced] == ["block"]
    x = torch.randn(1, 16, 6, 6)
    fast = hgfast.optimize(model, example=x)
    assert [row.region for row in hgfast.report(fast).replaced] == ["", ""]
    assert_same(fast, model, x)
    other = torch.randn(1, 16, 8, 8)  # not the shape it was traced for: eager, and said once
    with pytest.warns(hgfast.HgfastWarning, match=r"recognised for inputs of shape"):
        assert_same(fast, model, other)
    with pytest.raises(ValueError, match="odd height"):
        run(fast, torch.randn(1, 16, 7, 7))


def test_a_region_that_disagrees_with_eager_is_not_swapped_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hgfast.runtime import folding

    honest = folding.affine

    def planted(*args: Any) -> tuple[Tensor, Tensor]:
        scale, shift = honest(*args)
        return scale * 1.5, shift

    monkeypatch.setattr(folding, "affine", planted)
    with pytest.warns(hgfast.HgfastWarning, match="replaced nothing"):
        fast = hgfast.optimize(small_hourglass(), example=image())
    assert hgfast.report(fast).replaced == []
    assert any("differ from eager" in row.reason for row in hgfast.report(fast).skipped)


def test_shared_modules_are_replaced_once() -> None:
    class Twice(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.second = self.first

    model = randomise(Twice()).eval()
    fast = hgfast.optimize(model)
    assert len(regions_of(fast)) == 1
    assert_same(fast, model, torch.randn(1, 16, 4, 4))


def test_an_optimised_model_is_freed() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    model, executor = weakref.ref(fast), weakref.ref(fast.forward._state.executor)
    del fast
    gc.collect()
    assert model() is None
    assert executor() is None


# --- nothing replaced -----------------------------------------------------------------------


def test_nothing_replaced_warns_and_strict_raises() -> None:
    with pytest.warns(hgfast.HgfastWarning, match=r"nothing in Plain, because it has no block"):
        fast = hgfast.optimize(Plain())
    assert hgfast.report(fast).replaced == []
    model = Plain()
    with pytest.raises(hgfast.OptimizationError, match="no block"):
        hgfast.optimize(model, strict=True, inplace=True)
    assert set(model.__dict__) == set(Plain().__dict__), "nothing is half changed afterwards"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_without_kernels_stay_eager_and_say_so(dtype: torch.dtype) -> None:
    model = small_hourglass().to(dtype)
    with pytest.warns(hgfast.HgfastWarning, match=str(dtype)):
        fast = hgfast.optimize(model)
    assert str(dtype) in hgfast.report(fast).skipped[0].reason
    assert torch.equal(run(fast, image().to(dtype))[0], run(model, image().to(dtype))[0])


def test_a_hooked_module_is_left_alone() -> None:
    model = small_hourglass()
    calls = []
    model.heads[0].conv.register_forward_hook(lambda *_: calls.append(1))
    fast = hgfast.optimize(model)
    report = hgfast.report(fast)
    assert any("heads.0.conv has a forward hook" in row.reason for row in report.skipped)
    assert report.replaced, "what has no hook is still replaced"
    assert_same(fast, model, image())
    assert calls


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        hgfast.optimize("model")  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"precision must be one of highest, high, medium"):
        hgfast.optimize(small_hourglass(), precision="fastest")
    with pytest.raises(TypeError, match="example must be a tensor"):
        hgfast.optimize(small_hourglass(), example=[3])  # type: ignore[list-item]


def test_disabled_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = hgfast.optimize(small_hourglass())
    monkeypatch.setenv("HGFAST_DISABLE", "1")
    after = hgfast.optimize(small_hourglass())
    assert not regions_of(after)
    assert "HGFAST_DISABLE" in str(hgfast.report(after))
    with pytest.warns(hgfast.HgfastWarning, match="HGFAST_DISABLE"):
        ours = run(before, image())
    assert torch.equal(ours[0], run(small_hourglass(), image())[0])


# --- weights that change --------------------------------------------------------------------


def change_load_state_dict(model: nn.Module) -> None:
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})


def change_assign(model: nn.Module) -> None:
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)


def change_parameter(model: nn.Module) -> None:
    block = model.get_submodule("stem.residual2")
    block.conv2.weight = nn.Parameter(torch.randn_like(block.conv2.weight))


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("heads.0.heatmap.weight").mul_(-1)


def change_statistics(model: nn.Module) -> None:
    model.get_buffer("stem.residual1.norm2.running_var").mul_(4)


def change_module(model: nn.Module) -> None:
    model.get_submodule("heads.0").conv = nn.Conv2d(32, 32, 1)


def change_moments_by_training(model: nn.Module) -> None:
    model.train()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", hgfast.HgfastWarning)
        model(image(4))
    model.eval()


CHANGES = [
    change_load_state_dict,
    change_assign,
    change_parameter,
    change_in_place,
    change_statistics,
    change_module,
    change_moments_by_training,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_packed_weights_follow(change: object) -> None:
    fast = hgfast.optimize(small_hourglass())
    before = run(fast, image())[0].clone()
    change(fast)  # type: ignore[operator]
    after = run(fast, image())[0]
    assert not torch.allclose(before, after, rtol=1e-3)
    assert_same(fast, fast, image())


def test_nothing_is_packed_anew_without_a_change() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    (region,) = regions_of(fast)
    packed = region._state
    run(fast, image())
    fast.stem.conv.weight = fast.stem.conv.weight  # the dictionary changed, its contents did not
    fast.heads[0].conv = fast.heads[0].conv
    run(fast, image())
    assert region._state is packed


def test_writes_that_nothing_can_notice_need_refresh() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    fast.heads[0].heatmap.weight.data.numpy()[:] = 0.25
    assert hgfast.refresh(fast) is fast
    assert_same(fast, fast, image())
    fast.heads[0].norm.eps = 0.5
    assert_same(hgfast.refresh(fast), fast, image())


def test_casting_an_optimised_model() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    fast.bfloat16()
    assert all(y.dtype == torch.bfloat16 for y in run(fast, image().bfloat16()))
    assert "bfloat16" in hgfast.report(fast).replaced[0].backend
    fast.double()
    with pytest.warns(hgfast.HgfastWarning, match=r"torch\.float64"):
        assert run(fast, image().double())[0].dtype == torch.float64
    assert hgfast.report(fast).replaced[0].backend == "eager"
    fast.float()
    assert run(fast, image())[0].dtype == torch.float32
    assert "float32" in hgfast.report(fast).replaced[0].backend


def test_a_module_replaced_by_something_foreign_runs_eagerly_and_right() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    fast.heads[0].conv = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Softplus())
    with pytest.warns(hgfast.HgfastWarning, match="Softplus"):
        assert_same(fast, fast, image())
    fast.heads[0].conv = nn.Conv2d(32, 32, 1)
    assert_same(fast, fast, image())
    assert hgfast.report(fast).replaced[0].backend != "eager"


def test_a_plan_of_before_a_change_is_never_packed_again() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    fast.heads[0].conv = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Softplus())
    with pytest.warns(hgfast.HgfastWarning, match="Softplus"):
        assert_same(copy.deepcopy(fast), fast, image())  # copied before it was noticed
    with pytest.warns(hgfast.HgfastWarning, match="Softplus"):
        run(fast, image())
    with torch.no_grad():
        fast.stem.conv.weight.mul_(1.5)
    assert_same(fast, fast, image())


def test_swapped_parameters() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    weight = fast.heads[0].heatmap.weight
    other = nn.Parameter(torch.randn_like(weight))
    torch.utils.swap_tensors(weight, other)
    assert_same(fast, fast, image())
    torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight)))
    assert_same(fast, fast, image())


def test_a_module_of_its_own_in_training_mode() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * 2 if self.training else self.block(x)

    fast = hgfast.optimize(randomise(nn.Sequential(Doubles())).eval())
    fast[0].train(True)
    fast[0].block.eval()
    with pytest.warns(hgfast.HgfastWarning, match="training mode"):
        assert_same(fast, fast, torch.randn(1, 16, 4, 4))


def test_lazy_negation_of_an_input() -> None:
    model = randomise(PreactBlock()).eval()
    fast = hgfast.optimize(model)
    x = torch.randn(1, 16, 4, 4, dtype=torch.cfloat).conj().imag
    with pytest.warns(hgfast.HgfastWarning, match="lazy"):
        assert_same(fast, model, x)


def test_a_forward_patched_later_is_honoured() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    fast.heads[0].conv.forward = torch.zeros_like
    with pytest.warns(hgfast.HgfastWarning, match="forward of its own"):
        assert_same(fast, fast, image())


def test_a_hook_added_later_runs() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    calls = []
    handle = fast.stem.residual1.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(hgfast.HgfastWarning, match="forward hook"):
        run(fast, image())
    assert calls == [1]
    handle.remove()
    run(fast, image())
    assert calls == [1]
    root = fast.register_forward_hook(lambda *_: calls.append(2))
    run(fast, image())
    assert calls == [1, 2]
    root.remove()


def test_a_hook_on_all_modules_runs() -> None:
    fast = hgfast.optimize(small_hourglass())
    run(fast, image())
    calls = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.warns(hgfast.HgfastWarning, match="forward hook"):
            run(fast, image())
        lists = [module for module in fast.modules() if isinstance(module, nn.ModuleList)]
        assert len(calls) == len(list(fast.modules())) - len(lists)  # which are never called
    finally:
        handle.remove()


# --- copies, files, inference mode ----------------------------------------------------------


def copies(fast: nn.Module) -> list[nn.Module]:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ]


def test_copies_are_optimised_and_independent() -> None:
    fast = hgfast.optimize(small_hourglass(), "medium")
    expected = run(fast, image())[0]
    for twin in copies(fast):
        assert [region.module for region in regions_of(twin)] == [twin]
        assert precision_of(twin) == "medium"
        assert torch.equal(run(twin, image())[0], expected)
        with torch.no_grad():
            twin.heads[0].heatmap.weight.zero_()
        assert not torch.equal(run(twin, image())[0], expected)
        assert torch.equal(run(fast, image())[0], expected)


@pytest.mark.parametrize("inplace", [True, False])
def test_models_built_under_inference_mode(inplace: bool) -> None:
    with torch.inference_mode():
        model = small_hourglass()
        fast = hgfast.optimize(copy.deepcopy(model), inplace=inplace)
        assert_same(fast, small_hourglass(), image())
    assert_same(fast, small_hourglass(), image())


def test_copying_under_inference_mode() -> None:
    model = small_hourglass()
    with torch.inference_mode():
        fast = hgfast.optimize(model)
    assert_same(fast, model, image())


# --- gradients, training, transforms --------------------------------------------------------


def test_gradients_flow_with_one_warning() -> None:
    model = small_hourglass()
    fast = hgfast.optimize(model)
    with pytest.warns(hgfast.HgfastWarning, match="gradients"):
        fast(image())[0].sum().backward()
    fast(image())  # a second warning would be an error
    model(image())[0].sum().backward()
    for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_gradients_of_the_input_alone() -> None:
    fast = hgfast.optimize(small_hourglass()).requires_grad_(False)
    x = image().requires_grad_()
    with pytest.warns(hgfast.HgfastWarning, match="an input requires"):
        fast(x)[0].sum().backward()
    assert x.grad is not None
    fast(image())  # nothing wants gradients: the fast path, although grad mode is on
    with torch.no_grad():
        fast(x)


def test_training_mode_runs_eagerly_with_one_warning() -> None:
    fast = hgfast.optimize(small_hourglass().train())
    before = fast.stem.norm.num_batches_tracked.item()
    with torch.no_grad():
        with pytest.warns(hgfast.HgfastWarning, match="training mode"):
            fast(image(2))
        fast(image(2))  # a second warning would be an error
    assert fast.stem.norm.num_batches_tracked.item() == before + 2
    fast.eval()
    fast.heads[0].norm.train()  # a single BatchNorm that is trained counts too
    with torch.no_grad():
        fast(image(2))
    assert fast.heads[0].norm.num_batches_tracked.item() == before + 3


def test_tracing_transforms_and_modes_see_ordinary_operations() -> None:
    model = small_hourglass().requires_grad_(False)
    fast = hgfast.optimize(model)
    with pytest.warns(hgfast.HgfastWarning, match="following PyTorch's operations"):
        traced = torch.jit.trace(fast, image(), strict=False)
    assert_same(traced, model, image(seed=3))
    ours = torch.vmap(fast)(image(2)[:, None])[0]
    torch.testing.assert_close(ours[:, 0], model(image(2))[0], rtol=1e-4, atol=1e-5)
    derivative = torch.func.jvp(lambda x: fast(x)[0], (image(),), (image(seed=1),))[1]
    assert derivative.abs().max() > 0


# --- bad input: the error eager gives -------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 4, 64, 64),
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 3, 64, 64, dtype=torch.float64),
        torch.zeros(1, 3, 68, 68),
        torch.zeros(3, 64, 64),
        torch.zeros(1, 3, 2, 2),
    ],
    ids=["channels", "integers", "float64", "stride", "3-D", "tiny"],
)
def test_bad_input_gets_eagers_error(x: Tensor) -> None:
    model = small_hourglass()
    fast = hgfast.optimize(model)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        run(model, x)
    with pytest.raises(type(theirs.value)) as ours:
        run(fast, x)
    assert str(ours.value) == str(theirs.value)
    run(fast, image())  # and the model still works


def test_nan_stays_where_eager_has_it() -> None:
    model = small_hourglass()
    x = image()
    x[0, 0, 20, 20] = float("nan")
    ours, theirs = run(hgfast.optimize(model), x)[0], run(model, x)[0]
    assert torch.equal(ours.isnan(), theirs.isnan())


# --- warmup, report -------------------------------------------------------------------------


def test_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = hgfast.optimize(small_hourglass())
    region, shapes = fast.forward, []
    run_region = type(region).__call__

    def spy(self: Region, x: Tensor) -> object:
        shapes.append(tuple(x.shape))
        return run_region(self, x)

    monkeypatch.setattr(type(region), "__call__", spy)
    assert hgfast.warmup(fast, (1, 3, 64, 64)) is fast
    hgfast.warmup(fast, [(1, 3, 32, 64), (2, 3, 32, 64)])
    assert shapes == [(1, 3, 64, 64), (1, 3, 32, 64), (2, 3, 32, 64)]


def test_report_names_every_block() -> None:
    model = small_hourglass(stacks=2)
    report = hgfast.report(hgfast.optimize(model))
    residuals = {name for name, m in model.named_modules() if type(m).__name__ == "Residual"}
    rows = [row for row in report.replaced if row.kind.startswith("bottleneck")]
    assert {row.name for row in rows} == residuals
    assert all(row.region == "" and row.backend.startswith("cpu ") for row in rows)
    text = str(report)
    assert all(name in text for name in residuals)


def test_report_remembers_why_eager_ran() -> None:
    fast = hgfast.optimize(small_hourglass())
    with pytest.warns(hgfast.HgfastWarning):
        fast(image())
    assert "gradients" in hgfast.report(fast).fallbacks[0][1]
    assert "gradients" in str(hgfast.report(fast))


def test_two_threads_share_one_model() -> None:
    from concurrent.futures import ThreadPoolExecutor

    fast = hgfast.optimize(small_hourglass())
    xs = [image(seed=seed) for seed in range(8)]
    expected = [run(fast, x)[0] for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for ours, theirs in zip(pool.map(lambda x: run(fast, x)[0], xs), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_a_region_is_no_submodule() -> None:
    fast = hgfast.optimize(small_hourglass())
    assert isinstance(fast.__dict__["forward"], Region)
    assert not any(isinstance(module, Region) for module in fast.modules())
