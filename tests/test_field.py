"""The field's networks, optimised: whole, counted, and as right as verify asks.

Then the same parts written in other ways, and networks that nobody planned for: those need not be
recognised, but must stay right.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from field import FIELD, Case, prepared
from field.strangers import STRANGERS, Keyword
from field.variants import Varied, shape_of, variants
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hgfast
from hgfast import _native
from hgfast.plan import Plan
from hgfast.recognition import recognise
from hgfast.region import regions_of

pytestmark = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))

VARIANTS = variants()
CASES = pytest.mark.parametrize("case", FIELD.values(), ids=lambda case: case.name)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On maps this small a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _no_silent_fallback() -> Iterator[None]:
    """A warning is an error, so that no test passes because eager ran unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", hgfast.HgfastWarning)
        yield


@pytest.fixture
def _may_replace_nothing() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hgfast.HgfastWarning)
        yield


def small(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return prepared(case.build_small())


def images(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_state(fast: nn.Module, model: nn.Module) -> None:
    ours, theirs = fast.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert type(fast) is type(model)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


def assert_right(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    verification = hgfast.verify(model, fast, x)
    assert verification.ok, f"\n{tuple(x.shape)}\n{verification}"


def blocks(plan: Plan) -> Counter[str]:
    return Counter(block.kind for block in plan.blocks)


# --- the networks of the field ---------------------------------------------------------------


@CASES
@pytest.mark.usefixtures("_no_silent_fallback")
def test_is_recognised(case: Case) -> None:
    fast = hgfast.optimize(small(case))
    regions = regions_of(fast)
    if case.whole:
        assert [region.name for region in regions] == [""], str(hgfast.report(fast))
    found: Counter[str] = sum((blocks(region.plan) for region in regions), Counter())
    assert {kind: found[kind] for kind in case.blocks} == case.blocks, str(found)


@CASES
def test_is_recognised_at_true_size(case: Case) -> None:
    """On "meta": the Plan depends on shapes alone."""
    if not case.whole:
        pytest.skip("not one region")
    with torch.device("meta"):
        model = case.build_full()
    model.eval()
    plan = recognise(model)
    shapes = plan.shapes(case.full_shape)
    given = torch.empty(case.full_shape, device="meta")
    expected = [tuple(leaf.shape) for leaf in pytree.tree_leaves(model(given))]
    assert [shapes[value] for value in pytree.tree_leaves(plan.outputs)] == expected


@CASES
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.usefixtures("_no_silent_fallback")
def test_is_right(case: Case, precision: str) -> None:
    model = small(case)
    fast = hgfast.optimize(model, precision)
    assert_same_state(fast, model)
    for seed, shape in enumerate(case.shapes):
        assert_right(model, fast, images(shape, seed))
    assert not hgfast.report(fast).fallbacks


@CASES
@pytest.mark.usefixtures("_no_silent_fallback")
def test_is_right_in_bfloat16(case: Case) -> None:
    model = small(case).bfloat16()
    fast = hgfast.optimize(model)
    assert_same_state(fast, model)
    assert_right(model, fast, images(case.shapes[0]).bfloat16())
    assert not hgfast.report(fast).fallbacks


@CASES
def test_container_and_layout(case: Case) -> None:
    model = small(case)
    fast = hgfast.optimize(model)
    with torch.inference_mode():
        for shape in case.shapes:
            x = images(shape)
            ours, theirs = fast(x.clone()), model(x.clone())
            assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
            for one, other in zip(
                pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True
            ):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)
                if shape[1] == 3:  # from (B, H, W, 3) eager's strides are an accident
                    assert one.stride() == other.stride()


@pytest.mark.parametrize("name", [name for name, case in FIELD.items() if case.wrong])
def test_a_size_that_eager_refuses(name: str) -> None:
    case = FIELD[name]
    assert case.wrong is not None
    model = small(case)
    x = images(case.wrong)
    fast = hgfast.optimize(model)
    with torch.inference_mode():
        with pytest.raises(RuntimeError) as theirs:
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hgfast.HgfastWarning)
            with pytest.raises(RuntimeError) as ours:
                fast(x)
    assert str(ours.value) == str(theirs.value)


@CASES
def test_restored(case: Case) -> None:
    model = small(case)
    fast = hgfast.restore(hgfast.optimize(model))
    x = images(case.shapes[-1])
    with torch.inference_mode():
        for one, other in zip(
            pytree.tree_leaves(fast(x)), pytree.tree_leaves(model(x)), strict=True
        ):
            assert torch.equal(one, other)


# --- the same parts, written in other ways ---------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.usefixtures("_may_replace_nothing")
def test_variant_is_right(name: str) -> None:
    words = VARIANTS[name]
    torch.manual_seed(0)
    model = prepared(Varied(**words))
    fast = hgfast.optimize(model, "highest")
    assert_same_state(fast, model)
    assert_right(model, fast, images(shape_of(words)))
    assert not hgfast.report(fast).fallbacks
    if words.get("up") != "fixed size":
        assert_right(model, fast, images(shape_of(words, 48, 2)))


# --- networks that nobody planned for --------------------------------------------------------


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.usefixtures("_may_replace_nothing")
def test_stranger_stays_right(name: str, precision: str) -> None:
    stranger = STRANGERS[name]
    if precision == "medium" and stranger.no_half:
        pytest.skip(stranger.no_half)
    torch.manual_seed(0)
    model = prepared(stranger.build())
    fast = hgfast.optimize(model, precision)
    assert_same_state(fast, model)
    before = copy.deepcopy(model.state_dict())
    for seed, shape in enumerate(stranger.shapes):
        assert_right(model, fast, images(shape, seed))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.usefixtures("_may_replace_nothing")
def test_stranger_with_an_example(name: str) -> None:
    """Traced with real shapes, and then called with others."""
    stranger = STRANGERS[name]
    torch.manual_seed(0)
    model = prepared(stranger.build())
    fast = hgfast.optimize(model, "highest", example=images(stranger.shapes[0]))
    for seed, shape in enumerate(stranger.shapes):
        assert_right(model, fast, images(shape, seed))


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.usefixtures("_may_replace_nothing")
def test_stranger_trains_as_before(name: str) -> None:
    """Gradients and statistics are eager's own, and what comes after is right again."""
    stranger = STRANGERS[name]
    if stranger.untrainable:
        pytest.skip(stranger.untrainable)
    torch.manual_seed(0)
    model = prepared(stranger.build())
    fast = hgfast.optimize(model, "highest")
    results = []
    for each in (model, fast):
        each.train()
        torch.manual_seed(2)  # for dropout
        loss = sum(
            leaf.float().square().mean()
            for leaf in pytree.tree_leaves(each(images(stranger.shapes[-1])))
            if isinstance(leaf, Tensor)
        )
        loss.backward()
        results.append([p.grad for p in each.parameters() if p.grad is not None])
        each.eval()
    assert results[0]
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)
    assert_same_state(fast, model)
    assert_right(model, fast, images(stranger.shapes[0]))


@pytest.mark.usefixtures("_may_replace_nothing")
def test_keywords() -> None:
    torch.manual_seed(0)
    model = prepared(Keyword())
    fast = hgfast.optimize(model, "highest")
    a, b = images((1, 3, 32, 32), 1), images((1, 3, 32, 32), 2)
    with torch.inference_mode():
        for call in (
            lambda m: m(a, other=b),
            lambda m: m(x=a, other=b, scale=0.5),
            lambda m: m(a, None, scale=2.0),
            lambda m: m(a, b),
        ):
            torch.testing.assert_close(call(fast), call(model), rtol=1e-4, atol=1e-5)
