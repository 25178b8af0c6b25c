"""hgfast.decode: places worked out by hand, what is asked besides a method, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from decode_checks import CELL_METHODS, maps_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hgfast import Flip, GlobalTopK, TopK, Transform, _native, decode
from hgfast.decoding import METHODS
from hgfast.decoding import dispatch as dispatch_module

pytestmark = pytest.mark.usefixtures("backend")

# The environment is the same for all examples.
any_maps = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

#: The coordinates of an invisible joint.
MARKS = {
    "argmax": 0, "quarter": 0, "newell": -0.5, "princeton": 0, "msra": -1, "dark": -1, "udp": -1,
    "megvii": -1, "softargmax": 0,
}  # fmt: skip


def heatmap(values: dict[tuple[int, int], float], height: int = 8, width: int = 10) -> Tensor:
    """One heatmap (1, 1, height, width) of zeros with the given values at (x, y)."""
    maps = torch.zeros(1, 1, height, width)
    for (x, y), value in values.items():
        maps[0, 0, y, x] = value
    return maps


def decoded(maps: Tensor, method: str = "quarter", **options: Any) -> tuple[float, float, float]:
    coords, scores = decode(maps, method, **options)
    assert coords.shape == (*maps.shape[:2], 2)
    assert scores.shape == maps.shape[:2]
    assert coords.dtype == scores.dtype == torch.float32
    return coords[0, 0, 0].item(), coords[0, 0, 1].item(), scores[0, 0].item()


# ---- methods by hand -----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("values", "places"),
    [
        # a slope in x, none in y
        (
            {(5, 3): 1, (6, 3): 0.5},
            {"argmax": (5, 3), "quarter": (5.25, 3), "newell": (5.75, 3.5),
             "princeton": (5.75, 3.25), "msra": (5.25, 3)},
        ),
        (
            {(5, 3): 1, (4, 3): 0.5, (5, 4): 0.5},
            {"argmax": (5, 3), "quarter": (4.75, 3.25), "newell": (5.25, 3.75),
             "princeton": (5.25, 3.75), "msra": (4.75, 3.25)},
        ),
        # column 1: newell moves, msra only in y, quarter not at all
        (
            {(1, 3): 1, (2, 3): 0.5, (1, 4): 0.5},
            {"argmax": (1, 3), "quarter": (1, 3), "newell": (1.75, 3.75),
             "princeton": (1.75, 3.75), "msra": (1, 3.25)},
        ),
        # row 1, and a slope downwards
        (
            {(5, 1): 1, (6, 1): 0.5, (5, 0): 0.5},
            {"argmax": (5, 1), "quarter": (5, 1), "newell": (5.75, 1.25),
             "princeton": (5.75, 1.25), "msra": (5.25, 1)},
        ),
        # the first column: only princeton moves, where the cell itself is its own neighbour
        (
            {(0, 3): 1, (1, 3): 0.5, (0, 4): 0.5},
            {"argmax": (0, 3), "quarter": (0, 3), "newell": (0.5, 3.5),
             "princeton": (0.25, 3.75), "msra": (0, 3)},
        ),
        # the last column: msra moves in y there
        (
            {(9, 3): 1, (8, 3): 0.5, (9, 4): 0.5},
            {"argmax": (9, 3), "quarter": (9, 3), "newell": (9.5, 3.5),
             "princeton": (9.75, 3.75), "msra": (9, 3.25)},
        ),
        # the last corner
        (
            {(9, 7): 1, (8, 7): 0.5, (9, 6): 0.5},
            {"argmax": (9, 7), "quarter": (9, 7), "newell": (9.5, 7.5),
             "princeton": (9.75, 7.75), "msra": (9, 7)},
        ),
    ],
)  # fmt: skip
def test_how_the_methods_differ(
    values: dict[tuple[int, int], float], places: dict[str, tuple[float, float]]
) -> None:
    found = {method: decoded(heatmap(values), method) for method in places}
    assert found == {method: (*place, 1) for method, place in places.items()}


def separable() -> Tensor:
    """A peak at (5, 3): a row of 1/4 1/2 1 3/4 1/4 times a column of 1/4 1/2 1 1/2 1/4."""
    maps = torch.zeros(1, 1, 8, 10)
    column = torch.tensor([0.25, 0.5, 1, 0.5, 0.25])
    maps[0, 0, 1:6, 3:8] = column[:, None] * torch.tensor([0.25, 0.5, 1, 0.75, 0.25])
    return maps


# Blurred with (1/4, 1/2, 1/4) that row is 1/4, 9/16, 13/16, 11/16, 5/16, and the column symmetric.
# So the mixed second derivative of the logarithm is 0, and so is the slope in y.


def test_dark_by_hand() -> None:
    gradient = math.log(11 / 9) / 2
    curvature = math.log((5 / 16) * (1 / 4) / (13 / 16) ** 2) / 4
    x, y, score = decoded(separable(), "dark", blur=3)
    assert x == pytest.approx(5 - gradient / curvature, rel=1e-7)
    assert (y, score) == (3, 1)


def test_udp_by_hand() -> None:
    gradient = math.log(11 / 9) / 2
    curvature = math.log((11 / 16) * (9 / 16) / (13 / 16) ** 2)
    x, y, score = decoded(separable(), "udp", blur=3)
    assert x == pytest.approx(5 - gradient / curvature, rel=1e-7)
    assert (y, score) == (3, 1)


def test_udp_moves_on_a_map_of_one_row() -> None:
    """The Hessian is singular there but for its eps."""
    row = torch.tensor([0.25, 0.5, 1, 0.75, 0.25]).view(1, 1, 1, 5)
    gradient = math.log(11 / 9) / 2
    curvature = math.log((11 / 16) * (9 / 16) / (13 / 16) ** 2)
    x, y, _ = decoded(row, "udp", blur=3)
    assert x == pytest.approx(2 - gradient / curvature, rel=1e-6)
    assert y == 0


def test_megvii_by_hand() -> None:
    x, y, score = decoded(separable(), "megvii", blur=3)
    assert (x, y) == (5.75, 3.5)
    assert score == pytest.approx(0.5 + 1 / 255)
    # At the border the cell stays, without the half.
    assert decoded(heatmap({(1, 3): 1}), "megvii", blur=3)[:2] == (1, 3)
    # Blurred, two beside each other are higher than one that stands alone.
    values = {(2, 6): 1, (6, 2): 0.9, (7, 2): 0.9}
    assert decoded(heatmap(values), "megvii", blur=5)[:2] == (6.75, 2.5)


def test_softargmax_by_hand() -> None:
    row = torch.tensor([0, math.log(3)]).view(1, 1, 1, 2)
    for maps, place in ((row, (0.75, 0)), (row.transpose(2, 3), (0, 0.75))):
        x, y, score = decoded(maps, "softargmax")
        assert (x, y) == pytest.approx(place, rel=1e-6)
        assert score == pytest.approx(math.log(3))
    assert decoded(row, "softargmax", beta=2)[0] == pytest.approx(0.9, rel=1e-6)
    two = heatmap({(2, 3): math.inf, (6, 3): math.inf, (9, 0): 5})
    assert decoded(two, "softargmax") == (4, 3, math.inf)
    # Where nothing stands out there is nothing to see; negative maps are as good as any.
    assert decoded(row - 5, "softargmax")[0] == pytest.approx(0.75, rel=1e-6)
    assert decoded(torch.full((1, 1, 4, 4), 2.0), "softargmax") == (0, 0, 2)


@pytest.mark.parametrize(("blur", "sigma"), [(11, 2), (17, 3)])
@pytest.mark.parametrize("method", ["dark", "udp"])
def test_newton_steps_find_a_gaussian_between_cells(method: str, blur: int, sigma: int) -> None:
    rows, columns = torch.arange(48)[:, None], torch.arange(40)
    for x, y in ((20.0, 24.0), (20.3, 23.6), (19.51, 24.49)):
        peak = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
        found = decoded(peak[None, None], method, blur=blur)
        assert found[:2] == pytest.approx((x, y), abs=0.01)


# ---- invisible, NaN, small, empty ----------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "softargmax"])
def test_negative_map_is_invisible_and_scored_with_its_maximum(method: str) -> None:
    maps = torch.full((1, 1, 8, 8), -2.0)
    maps[0, 0, 4, 4] = -0.5
    assert decoded(maps, method) == (MARKS[method], MARKS[method], -0.5)


@pytest.mark.parametrize("method", METHODS)
def test_zero_map_is_invisible(method: str) -> None:
    assert decoded(torch.zeros(1, 1, 8, 8), method) == (MARKS[method], MARKS[method], 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [(0, 0), (5, 3), (9, 7)])
def test_nan_anywhere(method: str, place: tuple[int, int]) -> None:
    x, y, score = decoded(heatmap({(5, 4): 1, (2, 2): math.inf, place: math.nan}), method)
    assert (x, y) == (MARKS[method], MARKS[method])
    assert math.isnan(score)


@pytest.mark.parametrize("method", METHODS)
def test_nan_map_leaves_its_neighbours_alone(method: str) -> None:
    maps = heatmap({(5, 3): 1}).repeat(2, 3, 1, 1)
    alone, _ = decode(maps[:1, :1], method)
    maps[1, 1] = math.nan
    coords, scores = decode(maps, method)
    assert scores.isnan().tolist() == [[False] * 3, [False, True, False]]
    assert coords[~scores.isnan()].tolist() == alone[0].tolist() * 5


def test_marks_are_mapped_into_the_image_like_places() -> None:
    coords, _ = decode(torch.zeros(1, 1, 8, 8), "newell", transform=torch.eye(2, 3) * 4)
    assert coords.tolist() == [[[-2, -2]]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (2, 2), (3, 3)])
def test_tiny_maps(method: str, height: int, width: int) -> None:
    x, y = width // 2, height // 2
    found = decoded(heatmap({(x, y): 1}, height, width), method, beta=1000)
    off_x = off_y = {"newell": 0.5, "princeton": 0.25}.get(method, 0)
    if method == "softargmax" and height == width == 1:  # one value all over
        x = y = 0
    if method == "udp":  # which takes a step at the border too
        assert found[:2] == pytest.approx((x, y), abs=1)
        return
    # A lone cell is no slope, where princeton moves left and up; it looks at the cell itself where
    # there is no neighbour, and so moves outwards.
    if method == "princeton":
        off_x, off_y = (
            0.75 if at == size - 1 > 0 else 0.25 for at, size in ((x, width), (y, height))
        )
    assert found[:2] == (x + off_x, y + off_y)
    assert found[2] == pytest.approx(0.5 + 1 / 255 if method == "megvii" else 1)


OPTIONS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "plain": lambda maps: {},
    "flip": lambda maps: {"flip": Flip(maps.clone(), [])},
    "transform": lambda maps: {"transform": Transform.mpii(torch.zeros(len(maps), 2), 1.0)},
    "topk": lambda maps: {"topk": TopK(3)},
    "global": lambda maps: {"topk": GlobalTopK(3)},
    "all": lambda maps: {
        "flip": Flip(maps.clone(), []), "transform": Transform.udp((1, 2), 3), "topk": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (method, options)
        for method in METHODS
        for options in OPTIONS
        if method in CELL_METHODS or options in ("plain", "flip", "transform")
    ],
)
@pytest.mark.parametrize("shape", [(0, 16, 64, 64), (2, 0, 8, 8), (0, 0, 3, 3)])
def test_nothing_to_decode(method: str, options: str, shape: tuple[int, ...]) -> None:
    maps = torch.zeros(shape)
    asked = OPTIONS[options](maps)
    coords, scores, *of = decode(maps, method, **asked)
    size: tuple[int, ...] = shape[:2]
    if "topk" in asked:
        size = (shape[0], 3) if options == "global" else (*shape[:2], 3)
    assert coords.shape == (*size, 2)
    assert scores.shape == size
    assert coords.dtype == scores.dtype == torch.float32
    assert (scores == 0).all()
    assert [tuple(maps.shape) for maps in of] == ([size] if options == "global" else [])


# ---- dtypes, layouts, containers -----------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    """Halves are exact in all of them, so is what is decoded of them."""
    maps = heatmap({(5, 3): 0.75, (6, 3): 0.5, (5, 4): 0.25})
    expected = decoded(maps, method)
    assert decoded(maps.to(dtype), method) == pytest.approx(expected, abs=1e-6)


def test_float64_is_compared_as_float64() -> None:
    maps = heatmap({(4, 3): 1}).double()
    maps[0, 0, 3, 6] = 1 + 1e-12
    assert decoded(maps) == (6, 3, 1)
    assert decoded(maps.float()) == (4, 3, 1)


def test_which_one_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference ran")

    for name in ("decode", "decode_topk"):
        monkeypatch.setattr(dispatch_module.reference, name, unexpected)
    maps = heatmap({(5, 3): 0.75, (6, 3): 0.5})
    with pytest.raises(AssertionError, match="the reference ran"):
        decode(maps.double())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for method in METHODS:
            if backend == "compiled":
                decode(maps.to(dtype), method)
                if method in CELL_METHODS:
                    decode(maps.to(dtype), method, topk=2)
            else:
                with pytest.raises(AssertionError, match="the reference ran"):
                    decode(maps.to(dtype), method)


def test_works_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: None)
    assert decoded(heatmap({(5, 3): 1, (6, 3): 0.5})) == (5.25, 3, 1)


@pytest.mark.parametrize("method", METHODS)
def test_strides_do_not_matter(method: str) -> None:
    maps = torch.rand(2, 5, 16, 12, generator=torch.Generator().manual_seed(0))
    expected = decode(maps, method)
    padded = torch.full((2, 7, 18, 30), 2.0)[:, 1:6, 1:17, 3:27:2]
    padded.copy_(maps)
    turned = maps.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (maps.contiguous(memory_format=torch.channels_last), padded, turned):
        assert not view.is_contiguous()
        for given_one, wanted in zip(decode(view, method), expected, strict=True):
            assert torch.equal(given_one, wanted)


@pytest.mark.parametrize("container", [list, tuple])
def test_last_stack_is_decoded(container: type) -> None:
    stacks = container([heatmap({(2, 2): 1}), heatmap({(5, 3): 0.5})])
    coords, scores = decode(stacks)
    assert coords.tolist() == [[[5, 3]]]
    assert scores.tolist() == [[0.5]]
    mirrored = container([heatmap({(9, 9): 1}, 10), heatmap({(4, 3): 0.25})])
    coords, scores = decode(stacks, flip=Flip(mirrored, []))
    assert coords.tolist() == [[[5, 3]]]
    assert scores.tolist() == [[0.375]]


def test_nothing_given_is_changed_and_no_gradient_flows() -> None:
    maps, other = maps_of("peaked", 2, 3, 9, 9), maps_of("peaked", 2, 3, 9, 9, seed=1)
    center, scale = torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([1.0, 2.0])
    given_ones = [t.requires_grad_() for t in (maps, other, center, scale)]
    before = [t.detach().clone() for t in given_ones]
    for method in METHODS:
        for topk in (None, 2):
            if topk and method not in CELL_METHODS:
                continue
            flip, transform = Flip(other, [(0, 1)], shift=True), Transform.mpii(center, scale)
            for result in decode(maps, method, flip, transform, topk):
                assert not result.requires_grad
    for tensor, kept in zip(given_ones, before, strict=True):
        assert torch.equal(tensor, kept)


def test_default_method_is_quarter() -> None:
    maps = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode(maps)[0], decode(maps, "quarter")[0])
    assert not torch.equal(decode(maps)[0], decode(maps, "argmax")[0])


def test_default_blur_and_beta() -> None:
    maps = maps_of("peaked", 2, 5, 24, 24)
    for method in ("dark", "udp", "megvii"):
        assert torch.equal(decode(maps, method)[0], decode(maps, method, blur=11)[0])
        assert not torch.equal(decode(maps, method)[0], decode(maps, method, blur=17)[0])
    found = decode(maps, "softargmax")[0]
    assert torch.equal(found, decode(maps, "softargmax", beta=1)[0])
    assert not torch.equal(found, decode(maps, "softargmax", beta=2)[0])


# ---- rules for any heatmap -----------------------------------------------------------------------

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


@any_maps
@given(maps_of_few_values)
def test_quarter_equals_its_formula_in_plain_python(
    drawn: tuple[tuple[int, ...], int, torch.dtype],
) -> None:
    maps = few_values(*drawn)
    coords, scores = decode(maps)
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


# ---- flip ----------------------------------------------------------------------------------------


def test_flip_by_hand() -> None:
    # Joints 0 and 1 are a pair, 2 is in the middle.
    maps = torch.cat([heatmap({(x, 3): 1}) for x in (5, 2, 7)], 1)
    # In the mirror (5, 3) is (4, 3). Joint 0 is found in map 1 there.
    mirrored = torch.cat([heatmap({(x, 3): 0.5}) for x in (7, 4, 2)], 1)
    coords, scores = decode(maps, "argmax", Flip(mirrored, [(0, 1)]))
    assert coords.tolist() == [[[5, 3], [2, 3], [7, 3]]]
    assert scores.tolist() == [[0.75] * 3]
    _, scores = decode(maps, "argmax", Flip(mirrored, [(0, 1)], reduce="sum"))
    assert scores.tolist() == [[1.5] * 3]
    # Shifted it is a column to the right: 0.5 and 0.25 there.
    coords, scores = decode(maps, "quarter", Flip(mirrored, [(0, 1)], shift=True))
    assert coords.tolist() == [[[5.25, 3], [2.25, 3], [7.25, 3]]]
    assert scores.tolist() == [[0.5] * 3]


def test_a_shift_keeps_the_first_column() -> None:
    mirrored = heatmap({(9, 3): 1})  # mirrored back: (0, 3)
    coords, scores = decode(torch.zeros(1, 1, 8, 10), "argmax", Flip(mirrored, [], shift=True))
    assert (coords.tolist(), scores.tolist()) == ([[[0, 3]]], [[0.5]])
    maps = heatmap({(1, 3): 0.25})
    coords, scores = decode(maps, "argmax", Flip(mirrored, [], shift=True))
    assert (coords.tolist(), scores.tolist()) == ([[[1, 3]]], [[0.625]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pairs", [[(0, 1), (2, 4)], [(1, 0), (4, 2)], np.array([[0, 1], [2, 4]])])
def test_a_network_that_sees_mirrored_pictures_mirrored(method: str, pairs: Any) -> None:
    maps = maps_of("peaked", 2, 5, 16, 12)
    mirrored = maps.flip(3)[:, [1, 0, 4, 3, 2]]
    for topk in (None, 3):
        if topk and method not in CELL_METHODS:
            continue
        merged = decode(maps, method, Flip(mirrored, pairs), topk=topk)
        for given_one, wanted in zip(merged, decode(maps, method, topk=topk), strict=True):
            assert torch.equal(given_one, wanted)


def test_halves_are_merged_in_float32() -> None:
    maps = heatmap({(5, 3): 1.0, (6, 3): 1.0}).half()
    mirrored = heatmap({(4, 3): 2**-11, (3, 3): 2**-10}).half()  # back: (5, 3), (6, 3)
    coords, scores = decode(maps, "argmax", Flip(mirrored, []))
    assert coords.tolist() == [[[6, 3]]]
    assert scores.tolist() == [[(1 + 2**-10) / 2]]


# ---- transform -----------------------------------------------------------------------------------

CENTER = [(100.25, 200.5), (-3.0, 7.75), (640.0, 12.125)]
SCALE = [1.5, 0.3, 2.25]
BOXES = [(150.0, 200.0), (31.5, 42.0), (225.0, 300.0)]
MATRICES = [[[0.5, -0.25, 10], [0.125, 2, -20]], [[1, 0, 0], [0, 1, 0]], [[-1, 3, 5], [7, 0, 1]]]


def placed(transform: Any, method: str = "quarter") -> tuple[Tensor, Tensor]:
    """Places in cells, and where the transform brings them."""
    maps = maps_of("peaked", 3, 7, 12, 20, seed=2)
    cells, _ = decode(maps, method)
    image, _ = decode(maps, method, transform=transform)
    return cells.double(), image


@pytest.mark.parametrize(
    ("transform", "formula"),
    [
        (
            Transform.mpii(CENTER, SCALE),
            lambda b, x, y: (CENTER[b][0] + (x - 20 / 2) * SCALE[b] * 200 / 20,
                             CENTER[b][1] + (y - 12 / 2) * SCALE[b] * 200 / 12),
        ),
        (
            Transform.mpii((5, 6), 2, unit=100),
            lambda b, x, y: (5 + (x - 10) * 2 * 100 / 20, 6 + (y - 6) * 2 * 100 / 12),
        ),
        (
            Transform.coco(CENTER, BOXES, unit=1),
            lambda b, x, y: (CENTER[b][0] + (x - 20 / 2) * BOXES[b][0] / 20,
                             CENTER[b][1] + (y - 12 / 2) * BOXES[b][0] / 20),
        ),
        (
            Transform.coco(CENTER, SCALE),
            lambda b, x, y: (CENTER[b][0] + (x - 20 / 2) * SCALE[b] * 200 / 20,
                             CENTER[b][1] + (y - 12 / 2) * SCALE[b] * 200 / 20),
        ),
        (
            Transform.udp(CENTER, BOXES, unit=1),
            lambda b, x, y: (CENTER[b][0] + (x / (20 - 1) - 0.5) * BOXES[b][0],
                             CENTER[b][1] + (y / (12 - 1) - 0.5) * BOXES[b][1]),
        ),
        (
            Transform.udp(CENTER, SCALE),
            lambda b, x, y: (CENTER[b][0] + (x / (20 - 1) - 0.5) * SCALE[b] * 200,
                             CENTER[b][1] + (y / (12 - 1) - 0.5) * SCALE[b] * 200),
        ),
        (
            Transform.affine(MATRICES, stride=4),
            lambda b, x, y: (MATRICES[b][0][0] * 4 * x + MATRICES[b][0][1] * 4 * y
                             + MATRICES[b][0][2],
                             MATRICES[b][1][0] * 4 * x + MATRICES[b][1][1] * 4 * y
                             + MATRICES[b][1][2]),
        ),
        (torch.tensor(MATRICES[0]), lambda b, x, y: (0.5 * x - 0.25 * y + 10, x / 8 + 2 * y - 20)),
    ],
    ids=["mpii", "mpii one", "coco boxes", "coco widths", "udp boxes", "udp one", "affine",
         "matrix"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["quarter", "newell", "dark", "softargmax"])
def test_transforms_are_their_formulas(
    transform: Any, formula: Callable[[int, float, float], tuple[float, float]], method: str
) -> None:
    cells, image = placed(transform, method)
    assert image.dtype == torch.float32
    for b, k in np.ndindex(3, 7):
        # Refined cells are rounded to float32 before they are seen here.
        expected = formula(b, *cells[b, k].tolist())
        assert image[b, k].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_transforms_are_computed_in_float64() -> None:
    """Rounded once, at the end; so a coordinate is the float32 that is nearest."""
    center, scale = (2**24 + 1.0, 0.1), 0.7
    x, y, _ = decoded(heatmap({(6, 3): 1}), transform=Transform.mpii(center, scale))
    assert (x, y) == (
        np.float32(center[0] + (6 - 10 / 2) * (200 * scale / 10)),
        np.float32(center[1] + (3 - 8 / 2) * (200 * scale / 8)),
    )


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_parts_may_be_lists_arrays_and_tensors(kind: Any) -> None:
    expected = placed(Transform.coco(CENTER, BOXES))[1]
    assert torch.equal(placed(Transform.coco(kind(CENTER), kind(BOXES)))[1], expected)


def test_truncation_is_towards_zero() -> None:
    maps = heatmap({(5, 3): 1})
    for matrix, place in (
        ([[1, 0, 0.75], [0, 1, 0.999]], (5, 3)),
        ([[1, 0, -5.75], [0, 1, -4.25]], (0, -1)),
        ([[1, 0, -7], [0, 1, 1e6 + 0.5]], (-2, 1_000_003)),
    ):
        assert decoded(maps, transform=Transform.affine(matrix, truncate=True))[:2] == place
    cut = Transform.mpii((10.5, 10.5), 0.3, truncate=True)
    assert decoded(maps, transform=cut)[:2] == (10, 3)  # of 10.5 + 0 * 6 and 10.5 - 1 * 7.5


@pytest.mark.parametrize("method", CELL_METHODS)
def test_peaks_are_mapped_too(method: str) -> None:
    maps = maps_of("random", 3, 4, 12, 20)
    for topk in (TopK(5), GlobalTopK(5)):
        cells = decode(maps, method, topk=topk)[0].double()
        image = decode(maps, method, transform=Transform.affine(MATRICES, stride=4), topk=topk)[0]
        matrices = torch.tensor(MATRICES, dtype=torch.float64)
        expected = torch.einsum("bij,b...j->b...i", matrices[..., :2] * 4, cells)
        expected += matrices[..., 2].view(3, *[1] * (cells.ndim - 2), 2)
        torch.testing.assert_close(image.double(), expected, rtol=1e-5, atol=1e-3)


# ---- topk ----------------------------------------------------------------------------------------


def test_topk_by_hand() -> None:
    maps = heatmap({(5, 3): 1, (6, 3): 0.9, (1, 6): 0.5, (8, 1): 0.75, (8, 2): 0.75, (2, 1): -1})
    for topk in (4, TopK(4), TopK(4, window=3)):
        coords, scores = decode(maps, "quarter", topk=topk)
        # Of a plateau every cell is a peak; what is no peak is score 0.
        assert scores.tolist() == [[[1, 0.75, 0.75, 0.5]]]
        assert coords.tolist() == [[[[5.25, 3], [8, 1], [8, 1.75], [1, 6]]]]
    coords, scores = decode(maps, "msra", topk=6)
    assert scores.tolist() == [[[1, 0.75, 0.75, 0.5, 0, 0]]]
    assert coords[0, 0, 4:].tolist() == [[-1, -1], [-1, -1]]
    # In 5 x 5 the peak at (5, 3) hides nothing else, one at (7, 2) would.
    maps[0, 0, 3, 7] = 0.9375
    assert decode(maps, topk=TopK(5))[1].tolist() == [[[1, 0.9375, 0.75, 0.5, 0]]]
    assert decode(maps, topk=TopK(5, window=5))[1].tolist() == [[[1, 0.5, 0, 0, 0]]]


def test_topk_of_one_is_the_maximum() -> None:
    for method in CELL_METHODS:
        maps = maps_of("peaked", 2, 5, 16, 12)
        coords, scores = decode(maps, method, topk=1)
        expected, expected_scores = decode(maps, method)
        torch.testing.assert_close(coords[:, :, 0], expected, rtol=0, atol=1e-5)
        assert torch.equal(scores[..., 0], expected_scores)


def test_more_peaks_than_cells() -> None:
    coords, scores = decode(heatmap({(0, 0): 1}, 2, 2), "newell", topk=7)
    assert scores.tolist() == [[[1, 0, 0, 0, 0, 0, 0]]]
    assert coords[0, 0].tolist() == [[0.5, 0.5]] + [[-0.5, -0.5]] * 6


def test_topk_of_a_map_with_a_nan() -> None:
    maps = heatmap({(5, 3): 1}).repeat(1, 2, 1, 1)
    maps[0, 1, 0, 0] = math.nan
    coords, scores = decode(maps, "dark", topk=2)
    assert scores[0, 0].tolist() == [1, 0]
    assert scores[0, 1].isnan().all()
    assert (coords[0, 1] == -1).all()
    _, scores, of = decode(maps, "dark", topk=GlobalTopK(3))
    assert scores.isnan().all()
    assert of.tolist() == [[1, 1, 1]]


@any_maps
@given(maps_of_few_values, st.integers(1, 9), st.sampled_from([3, 5]))
def test_global_topk_by_brute_force(
    drawn: tuple[tuple[int, ...], int, torch.dtype], k: int, window: int
) -> None:
    maps = few_values(*drawn).nan_to_num(0)
    coords, scores, of = decode(maps, "newell", topk=GlobalTopK(k, window))
    batch, joints, height, width = maps.shape
    assert scores.shape == of.shape == (batch, k)
    reach = window // 2
    for b in range(batch):
        peaks = []
        for c in range(joints):
            rows = maps[b, c].float().tolist()
            for y in range(height):
                for x in range(width):
                    around = [
                        rows[v][u]
                        for v in range(max(y - reach, 0), min(y + reach + 1, height))
                        for u in range(max(x - reach, 0), min(x + reach + 1, width))
                    ]
                    if 0 < rows[y][x] == max(around):
                        peaks.append((-rows[y][x], c, y, x))
        peaks.sort()
        assert scores[b].tolist() == ([-p[0] for p in peaks] + [0.0] * k)[:k]
        assert of[b].tolist()[: len(peaks)] == [c for _, c, _, _ in peaks[:k]]
        for i, (_, c, y, x) in enumerate(peaks[:k]):
            place, row = [x + 0.5, y + 0.5], maps[b, c].float()
            if 0 < x < width - 1 and 0 < y < height - 1:
                place[0] += 0.25 * int(row[y, x + 1] > row[y, x - 1])
                place[0] -= 0.25 * int(row[y, x + 1] < row[y, x - 1])
                place[1] += 0.25 * int(row[y + 1, x] > row[y - 1, x])
                place[1] -= 0.25 * int(row[y + 1, x] < row[y - 1, x])
            assert coords[b, i].tolist() == place
        assert (coords[b, len(peaks) :] == -0.5).all()


# ---- what is refused -----------------------------------------------------------------------------

MAPS = torch.zeros(2, 5, 8, 6)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(16, 64, 64), r"\(batch, joints, height, width\), got shape \(16, 64, 64\)"),
        (torch.zeros(16, 64, 64), r"one image's heatmaps are heatmaps\[None\]"),
        (torch.zeros(64, 64), r"got shape \(64, 64\); one heatmap is heatmap\[None, None\]"),
        (torch.zeros(1, 2, 3, 4, 5), r"decode heatmaps\[:, -1\]"),
        (torch.zeros(()), r"got shape \(\)"),
        (torch.zeros(1, 2, 0, 4), r"at least one cell, got shape \(1, 2, 0, 4\)"),
        (torch.zeros(1, 2, 4, 0), r"at least one cell, got shape \(1, 2, 4, 0\)"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.int64), "floating-point heatmaps .* got int64"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.uint8), "floating-point heatmaps .* got uint8"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.bool), "floating-point heatmaps .* got bool"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.complex64), "got complex64"),
        ([], "heatmaps of at least one stack"),
        ([torch.zeros(1, 2, 4, 4), torch.zeros(2, 4, 4)], r"got shape \(2, 4, 4\)"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_wrong_heatmaps(maps: Tensor | list[Tensor], message: str, method: str) -> None:
    with pytest.raises(ValueError, match=f"decode expects .*{message}"):
        decode(maps, method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hrnet"}, r'a method out of "argmax", "quarter", .* got \'hrnet\''),
        ({"method": ""}, r"a method out of .* got ''"),
        ({"blur": 4}, "an odd blur of at least 3 cells, got 4"),
        ({"blur": 1}, "an odd blur of at least 3 cells, got 1"),
        ({"blur": -3}, "an odd blur of at least 3 cells, got -3"),
        ({"blur": 11.0}, r"an odd blur of at least 3 cells, got 11\.0"),
        ({"beta": 0}, "a positive, finite beta, got 0"),
        ({"beta": -1.0}, r"a positive, finite beta, got -1\.0"),
        ({"beta": math.inf}, "a positive, finite beta, got inf"),
        ({"beta": math.nan}, "a positive, finite beta, got nan"),
        # flip
        ({"flip": Flip(MAPS[:1], [])}, r"flipped heatmaps like .*\(2, 5, 8, 6\).* \(1, 5, 8, 6\)"),
        ({"flip": Flip(MAPS.transpose(2, 3), [])}, r"got \(2, 5, 6, 8\) float32 on cpu"),
        ({"flip": Flip(MAPS[0], [])}, r"got \(5, 8, 6\) float32"),
        ({"flip": Flip(MAPS.half(), [])}, r"\(2, 5, 8, 6\) float32 on cpu, got .* float16 on cpu"),
        ({"flip": Flip(MAPS.to("meta"), [])}, "got .* on meta"),
        ({"flip": Flip([], [])}, "flipped heatmaps of at least one stack"),
        ({"flip": Flip(MAPS, [(0, 5)])}, r"joints 0 to 4, each once, got \(0, 5\)"),
        ({"flip": Flip(MAPS, [(-1, 2)])}, r"joints 0 to 4, each once, got \(-1, 2\)"),
        ({"flip": Flip(MAPS, [(1, 1)])}, r"each once, got \(1, 1\)"),
        ({"flip": Flip(MAPS, [1, 2])}, r"pairs \(left, right\) of .* each once, got 1"),  # type: ignore[list-item]
        ({"flip": Flip(MAPS, [(0, 1), (2, 1)])}, r"got \(2, 1\) and another with joint 1"),
        ({"flip": Flip(MAPS, [(0, 1), (0, 1)])}, r"got \(0, 1\) and another with joint 0"),
        ({"flip": Flip(MAPS, [(0, 1, 2)])}, r"got \(0, 1, 2\)"),
        ({"flip": Flip(MAPS, [("left", "right")])}, r"0 to 4, each once, got \('left', 'right'\)"),  # type: ignore[list-item]
        ({"flip": Flip(MAPS, [], reduce="max")}, r"reduce \"mean\" or \"sum\", got 'max'"),
        # transform
        ({"transform": Transform.mpii(CENTER, 1)}, r"center of shape \(2, 2\) or \(2,\), got \(3"),
        (
            {"transform": Transform.mpii((1, 2), SCALE)},
            r"scale of shape \(\) or \(2,\), got \(3,\)",
        ),
        ({"transform": Transform.mpii((1, 2), BOXES[:2])}, r"scale of shape .* got \(2, 2\)"),
        ({"transform": Transform.coco((1, 2), BOXES)}, r"scale of shape .* got \(3, 2\)"),
        ({"transform": Transform.udp((1, 2, 3), 1)}, r"center of shape .* got \(3,\)"),
        ({"transform": Transform.affine(MATRICES)}, r"\(2, 2, 3\) or \(2, 3\), got \(3, 2, 3\)"),
        ({"transform": torch.eye(3)}, r"matrix of shape .* got \(3, 3\)"),
        # topk
        ({"topk": 0}, "topk of at least 1 peak, got 0"),
        ({"topk": TopK(-1)}, "topk of at least 1 peak, got -1"),
        ({"topk": GlobalTopK(0)}, "topk of at least 1 peak, got 0"),
        ({"topk": TopK(2, window=4)}, "topk window of 3 or 5 cells, got 4"),
        ({"topk": GlobalTopK(2, window=7)}, "topk window of 3 or 5 cells, got 7"),
        ({"method": "megvii", "topk": 2}, r'one of "argmax", .* with topk, got \'megvii\''),
        ({"method": "softargmax", "topk": GlobalTopK(2)}, "with topk, got 'softargmax'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^decode expects .*{message}"):
        decode(MAPS, **options)


def test_udp_needs_two_cells_each_way() -> None:
    with pytest.raises(ValueError, match=r"at least 2x2 cells for Transform\.udp, got 1x6"):
        decode(MAPS[:, :, :1], transform=Transform.udp((1, 2), 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((1, 1, 4, 4)),), "tensor of heatmaps .* got ndarray"),
        ((None,), "tensor of heatmaps .* got NoneType"),
        ((MAPS, "quarter", MAPS), r"flip as hgfast\.Flip, got Tensor"),
        ((MAPS, "quarter", Flip(None, [])), "tensor of flipped heatmaps .* got NoneType"),  # type: ignore[arg-type]
        ((MAPS, "quarter", Flip(MAPS, None)), r"pairs \(left, right\) .* got None"),  # type: ignore[arg-type]
        (
            (MAPS, "quarter", None, Transform.mpii((1, 2), None)),
            "numbers as a transform's scale: .*NoneType",
        ),
        (
            (MAPS, "quarter", None, Transform.coco("ab", 1)),
            "numbers as a transform's center: .*str",
        ),
        ((MAPS, "quarter", None, (1, 2)), r"transform as hgfast\.Transform .* got tuple"),
        ((MAPS, "quarter", None, None, "3"), "topk as TopK, GlobalTopK or int, got str"),
    ],
)
def test_wrong_types(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=f"decode expects .*{message}"):
        decode(*arguments)
