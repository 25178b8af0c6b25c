"""hgfast.decoding: places worked out by hand, rules for any heatmap, native = reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hgfast import _native
from hgfast.decoding import METHODS, decode
from hgfast.decoding import dispatch as dispatch_module
from hgfast.decoding.reference import quarter

needs_native = pytest.mark.skipif(
    _native.load() is None, reason=f"hgfast's compiled module is not here: {_native.reason}"
)


@pytest.fixture(params=["as installed", "reference"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with the compiled decoder, where there is one, and without."""
    if request.param == "reference":
        monkeypatch.setattr(dispatch_module, "_NATIVE_METHODS", ())


def heatmap(values: dict[tuple[int, int], float], height: int = 8, width: int = 10) -> Tensor:
    """One heatmap (1, 1, height, width) of zeros with the given values at (x, y)."""
    maps = torch.zeros(1, 1, height, width)
    for (x, y), value in values.items():
        maps[0, 0, y, x] = value
    return maps


def decoded(maps: Tensor, method: str = "quarter") -> tuple[float, float, float]:
    coords, scores = decode(maps, method)
    assert coords.shape == (*maps.shape[:2], 2)
    assert scores.shape == maps.shape[:2]
    assert coords.dtype == scores.dtype == torch.float32
    return coords[0, 0, 0].item(), coords[0, 0, 1].item(), scores[0, 0].item()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # a lone peak stays; neighbours pull by a quarter, each axis for itself
        ({(5, 3): 0.75}, (5, 3, 0.75)),
        ({(5, 3): 1, (6, 3): 0.5}, (5.25, 3, 1)),
        ({(5, 3): 1, (4, 3): 0.5}, (4.75, 3, 1)),
        ({(5, 3): 1, (5, 4): 0.5}, (5, 3.25, 1)),
        ({(5, 3): 1, (5, 2): 0.5}, (5, 2.75, 1)),
        ({(5, 3): 1, (4, 3): 0.2, (6, 3): 0.3, (5, 2): 0.4, (5, 4): 0.1}, (5.25, 2.75, 1)),
        ({(5, 3): 1, (4, 3): 0.5, (6, 3): 0.5}, (5, 3, 1)),
        ({(5, 3): 1, (4, 3): -0.5}, (5.25, 3, 1)),
        # diagonal neighbours do not count
        ({(5, 3): 1, (6, 4): 0.9}, (5, 3, 1)),
        # column 1 and row 1 are too near the border, column W - 2 and row H - 2 are not
        ({(1, 3): 1, (2, 3): 0.5}, (1, 3, 1)),
        ({(5, 1): 1, (5, 2): 0.5, (6, 1): 0.5}, (5, 1, 1)),
        ({(2, 2): 1, (3, 2): 0.5, (2, 3): 0.5}, (2.25, 2.25, 1)),
        ({(8, 6): 1, (7, 6): 0.5, (8, 5): 0.5}, (7.75, 5.75, 1)),
        ({(9, 6): 1, (8, 6): 0.5, (9, 5): 0.5}, (9, 6, 1)),
        ({(5, 7): 1, (6, 7): 0.5}, (5, 7, 1)),
        ({(0, 0): 1}, (0, 0, 1)),
        ({(9, 7): 1}, (9, 7, 1)),
        # the first of equals, in row order
        ({(7, 2): 1, (3, 4): 1}, (7, 2, 1)),
        ({(3, 4): 1, (6, 4): 1}, (3, 4, 1)),
        # invisible joints
        ({}, (0, 0, 0)),
        ({(5, 3): -1}, (0, 0, 0)),
        # infinity is a peak like any other
        ({(5, 3): math.inf, (6, 3): 0.5}, (5.25, 3, math.inf)),
        ({(4, 3): math.inf, (5, 3): math.inf, (3, 3): -math.inf}, (4.25, 3, math.inf)),
    ],
)
def test_quarter_by_hand(
    values: dict[tuple[int, int], float], expected: tuple[float, float, float]
) -> None:
    assert decoded(heatmap(values)) == expected


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("method", METHODS)
def test_negative_map_is_invisible_and_scored_with_its_maximum(method: str) -> None:
    maps = torch.full((1, 1, 8, 8), -2.0)
    maps[0, 0, 4, 4] = -0.5
    assert decoded(maps, method) == (0, 0, -0.5)


def test_argmax_by_hand() -> None:
    assert decoded(heatmap({(5, 3): 1, (6, 3): 0.5}), "argmax") == (5, 3, 1)
    assert decoded(heatmap({(7, 2): 1, (3, 4): 1}), "argmax") == (7, 2, 1)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [(0, 0), (5, 3), (9, 7)])
def test_nan_anywhere(method: str, place: tuple[int, int]) -> None:
    x, y, score = decoded(heatmap({(5, 4): 1, (2, 2): math.inf, place: math.nan}), method)
    assert (x, y) == (0, 0)
    assert math.isnan(score)


@pytest.mark.usefixtures("both_ways")
def test_nan_map_leaves_its_neighbours_alone() -> None:
    maps = heatmap({(5, 3): 1}).repeat(2, 3, 1, 1)
    maps[1, 1] = math.nan
    coords, scores = decode(maps)
    assert scores.isnan().tolist() == [[False] * 3, [False, True, False]]
    assert coords[~scores.isnan()].tolist() == [[5, 3]] * 5


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (2, 2), (3, 3)])
def test_tiny_maps(method: str, height: int, width: int) -> None:
    maps = torch.zeros(1, 1, height, width)
    maps[0, 0, height // 2, width // 2] = 1
    assert decoded(maps, method) == (width // 2, height // 2, 1)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 16, 64, 64), (2, 0, 8, 8)])
def test_nothing_to_decode(method: str, shape: tuple[int, ...]) -> None:
    coords, scores = decode(torch.zeros(shape), method)
    assert coords.shape == (*shape[:2], 2)
    assert scores.shape == shape[:2]
    assert coords.dtype == scores.dtype == torch.float32


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    maps = heatmap({(5, 3): 0.75, (6, 3): 0.5}).to(dtype)
    assert decoded(maps) == (5.25, 3, 0.75)


def test_float64_is_compared_as_float64() -> None:
    maps = heatmap({(4, 3): 1}).double()
    maps[0, 0, 3, 6] = 1 + 1e-12
    assert decoded(maps) == (6, 3, 1)


@pytest.mark.usefixtures("both_ways")
def test_strides_do_not_matter() -> None:
    maps = torch.rand(2, 5, 16, 12, generator=torch.Generator().manual_seed(0))
    coords, scores = decode(maps)
    padded = torch.full((2, 7, 18, 30), 2.0)[:, 1:6, 1:17, 3:27:2]
    padded.copy_(maps)
    turned = maps.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (maps.contiguous(memory_format=torch.channels_last), padded, turned):
        assert not view.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(decode(view), (coords, scores), strict=True))


@pytest.mark.parametrize("container", [list, tuple])
def test_last_stack_is_decoded(container: type) -> None:
    stacks = container([heatmap({(2, 2): 1}), heatmap({(5, 3): 0.5})])
    coords, scores = decode(stacks)
    assert coords.tolist() == [[[5, 3]]]
    assert scores.tolist() == [[0.5]]


@pytest.mark.usefixtures("both_ways")
def test_takes_maps_that_want_gradients_and_changes_nothing() -> None:
    maps = heatmap({(5, 3): 1, (6, 3): 0.5}).requires_grad_()
    before = maps.detach().clone()
    coords, scores = decode(maps)
    assert not coords.requires_grad
    assert not scores.requires_grad
    assert torch.equal(maps, before)


def test_default_method_is_quarter() -> None:
    maps = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode(maps)[0], decode(maps, "quarter")[0])
    assert not torch.equal(decode(maps)[0], decode(maps, "argmax")[0])


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(16, 64, 64), r"\(batch, joints, height, width\), got shape \(16, 64, 64\)"),
        (torch.zeros(64, 64), r"got shape \(64, 64\); one heatmap is heatmap\[None, None\]"),
        (torch.zeros(1, 2, 3, 4, 5), r"decode heatmaps\[:, -1\]"),
        (torch.zeros(()), r"got shape \(\)"),
        (torch.zeros(1, 2, 0, 4), r"at least one cell, got shape \(1, 2, 0, 4\)"),
        (torch.zeros(1, 2, 4, 0), r"at least one cell, got shape \(1, 2, 4, 0\)"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.int64), "floating-point heatmaps .* got int64"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.uint8), "floating-point heatmaps .* got uint8"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.complex64), "got complex64"),
        ([], "at least one stack"),
        ([torch.zeros(1, 2, 4, 4), torch.zeros(2, 4, 4)], r"got shape \(2, 4, 4\)"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_wrong_heatmaps(maps: Tensor | list[Tensor], message: str, method: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(maps, method)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match=r'out of "quarter", "argmax", got \'newell\''):
        decode(torch.zeros(1, 1, 4, 4), "newell")


def test_no_tensor() -> None:
    with pytest.raises(TypeError, match="got ndarray"):
        decode(np.zeros((1, 1, 4, 4)))  # type: ignore[arg-type]


# Few values, so that ties are common.
maps_of_few_values = st.tuples(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


def few_values(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-1, -0.0, 0.0, 0.25, 0.5, 1, 2**-24, math.inf, -math.inf, math.nan])
    # NaN and infinity seldom: else hardly a map would be without.
    odds = torch.tensor([3.0, 3, 3, 3, 3, 3, 3, 0.1, 0.1, 0.05])
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    return values[odds.multinomial(count, True, generator=generator)].view(shape).to(dtype)


@settings(max_examples=200, deadline=None)
@given(maps_of_few_values)
def test_quarter_equals_its_formula_in_plain_python(
    drawn: tuple[tuple[int, ...], int, torch.dtype],
) -> None:
    maps = few_values(*drawn)
    coords, scores = quarter(maps)
    batch, joints, height, width = maps.shape
    for b in range(batch):
        for k in range(joints):
            rows = maps[b, k].float().tolist()
            cells = [value for row in rows for value in row]
            if any(math.isnan(value) for value in cells):
                assert math.isnan(scores[b, k])
                assert coords[b, k].tolist() == [0, 0]
                continue
            best = max(cells)
            y, x = divmod(cells.index(best), width)
            place = [float(x), float(y)]
            if 1 < x < width - 1 and 1 < y < height - 1:
                row, above, below = rows[y], rows[y - 1], rows[y + 1]
                place[0] += 0.25 * ((row[x + 1] > row[x - 1]) - (row[x + 1] < row[x - 1]))
                place[1] += 0.25 * ((below[x] > above[x]) - (below[x] < above[x]))
            assert scores[b, k] == best
            assert coords[b, k].tolist() == (place if best > 0 else [0, 0])


@needs_native
@settings(max_examples=200, deadline=None)
@given(maps_of_few_values, st.booleans())
def test_native_equals_reference(
    drawn: tuple[tuple[int, ...], int, torch.dtype], channels_last: bool
) -> None:
    maps = few_values(*drawn)
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    coords, scores = torch.ops.hgfast.decode(maps, "quarter")
    expected_coords, expected_scores = quarter(maps)
    assert torch.equal(coords, expected_coords)
    assert torch.equal(scores.nan_to_num(-9), expected_scores.nan_to_num(-9))


@needs_native
def test_native_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(_: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("the reference ran")

    monkeypatch.setitem(METHODS, "quarter", unexpected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert decoded(heatmap({(5, 3): 0.75, (6, 3): 0.5}).to(dtype)) == (5.25, 3, 0.75)
    with pytest.raises(AssertionError, match="the reference ran"):
        decode(torch.zeros(1, 1, 4, 4, dtype=torch.float64))


def test_works_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: None)
    assert decoded(heatmap({(5, 3): 1, (6, 3): 0.5})) == (5.25, 3, 1)
