"""hgfast::decode and hgfast::decode.topk on a CPU, against the formulas in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_checks import (
    CELL_METHODS,
    DTYPES,
    LAYOUTS,
    assert_agree,
    laid_out,
    maps_of,
    requests,
    run,
)
from hypothesis import given, settings
from op_checks import generator, native, needs_native
from torch import Tensor

from hgfast import _native, ops
from hgfast.decoding import METHODS

pytestmark = needs_native

Request = dict[str, Any]


def check(request: Request) -> None:
    op = torch.ops.hgfast.decode.topk if "k" in request else torch.ops.hgfast.decode
    assert_agree(run(op, request), request)
    assert native.last_path().endswith("/decode") or request["maps"].numel() == 0


# ---- against the reference ----


@settings(max_examples=400, deadline=None)
@given(requests())
def test_any_request(request: Request) -> None:
    check(request)


@settings(max_examples=400, deadline=None)
@given(requests(topk=True))
def test_any_request_for_several_peaks(request: Request) -> None:
    check(request)


# Networks' sizes; a map wider than a part of a softargmax's sum; joints that fill registers, and
# more than are read together.
LARGER = [(17, 64, 48), (16, 64, 64), (5, 96, 72), (3, 128, 128), (34, 7, 200)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_larger_maps(method: str, dtype: torch.dtype, layout: str) -> None:
    for joints, height, width in LARGER:
        for kind in ("peaked", "infinite" if method == "megvii" else "tied"):
            maps = laid_out(maps_of(kind, 1, joints, height, width).to(dtype), layout)
            check({"maps": maps, "method": method, "blur": 11, "beta": 10.0})


@pytest.mark.parametrize("blur", [3, 7, 9, 17, 51, 151])
@pytest.mark.parametrize("method", ["dark", "udp", "megvii"])
def test_gaussians_of_every_size(method: str, blur: int) -> None:
    """Also one that reaches over the whole map."""
    for kind in ("peaked", "border", "random"):
        check({"maps": maps_of(kind, 1, 5, 64, 48), "method": method, "blur": blur})


@pytest.mark.parametrize("other_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flips_of_larger_maps(dtype: torch.dtype, layout: str, other_layout: str) -> None:
    """Joints whose mirrored map is none of those that are read together, too; and one map for
    several joints."""
    for count, height, width in [(17, 64, 48), (40, 9, 50)]:
        maps = maps_of("peaked", 1, count, height, width).to(dtype)
        other = maps_of("peaked", 1, count, height, width, seed=1).to(dtype)
        order = list(range(count))[::-1]
        for method, joints, shift in [
            ("udp", order, False),
            ("quarter", order, True),
            ("quarter", [0] * count, False),
            ("softargmax", order, True),
        ]:
            check(
                {
                    "maps": laid_out(maps, layout),
                    "method": method,
                    "flipped": laid_out(other, other_layout),
                    "joints": joints,
                    "shift": shift,
                    "mean": not shift,
                    "blur": 11,
                }
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", CELL_METHODS)
def test_several_peaks_of_larger_maps(method: str, layout: str) -> None:
    for joints, height, width in LARGER[::4]:
        for kind in ("peaked", "tied"):
            maps = laid_out(maps_of(kind, 1, joints, height, width), layout)
            check({"maps": maps, "method": method, "k": 10, "window": 5, "blur": 11})


def test_more_peaks_than_cells() -> None:
    check({"maps": maps_of("tied", 1, 3, 4, 5), "method": "quarter", "k": 50, "window": 3})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_threads_gives_the_same_bits(method: str, layout: str) -> None:
    maps = laid_out(maps_of("random", 5, 19, 64, 48), layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = ops.decode(maps, method)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for one, other in zip(first, ops.decode(maps, method), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


# ---- in words ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_peak_moves_towards_its_higher_neighbours(dtype: torch.dtype) -> None:
    heatmaps = torch.zeros(1, 1, 64, 48, dtype=dtype)
    heatmaps[0, 0, 20, 30] = 1
    heatmaps[0, 0, 20, 29] = 0.5
    heatmaps[0, 0, 21, 30] = 0.5
    coords, scores = ops.decode(heatmaps)
    assert coords.tolist() == [[[29.75, 20.25]]]
    assert scores.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("x", "y", "moves"),
    [(0, 5, False), (1, 5, False), (2, 5, True), (7, 5, True), (8, 5, True), (9, 5, False),
     (5, 0, False), (5, 1, False), (5, 2, True), (5, 8, True), (5, 9, False)],
)  # fmt: skip
def test_quarter_moves_nothing_at_the_border(x: int, y: int, moves: bool) -> None:
    heatmaps = torch.rand(1, 1, 10, 10, generator=generator(0)) * 0.5
    heatmaps[0, 0, y, x] = 1
    coords, _ = ops.decode(heatmaps)
    moved = coords[0, 0] - torch.tensor([float(x), float(y)])
    assert moved.abs().tolist() == ([0.25, 0.25] if moves else [0, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_of_equals_wins(layout: str) -> None:
    heatmaps = torch.zeros(1, 3, 40, 40)
    heatmaps[..., 10, 33] = heatmaps[..., 10, 20] = heatmaps[..., 30, 3] = 1
    coords, _ = ops.decode(laid_out(heatmaps, layout))
    assert coords.tolist() == [[[20.0, 10.0]] * 3]
    coords, scores = ops.decode_topk(laid_out(heatmaps, layout), "argmax", 4)
    assert coords[0, 1].tolist() == [[20, 10], [33, 10], [3, 30], [0, 0]]
    assert scores[0, 1].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", [(0, 0), (8, 7), (15, 16), (32, 34)])
def test_nan_is_no_joint(dtype: torch.dtype, layout: str, cell: tuple[int, int]) -> None:
    heatmaps = torch.rand(1, 19, 33, 35, generator=generator(0)).to(dtype)
    heatmaps[0, :, 9, 7] = 2
    heatmaps[0, 17, cell[0], cell[1]] = torch.nan
    coords, scores = ops.decode(laid_out(heatmaps, layout))
    assert coords[0, 17].tolist() == [0, 0]
    assert scores[0, 17].isnan()
    assert scores[0, :17].tolist() == [2] * 17
    assert (coords[0, [0, 16, 18]] > 6).all()


@pytest.mark.parametrize("value", [0.0, -0.5, -torch.inf])
def test_without_a_positive_value_a_joint_is_invisible(value: float) -> None:
    heatmaps = torch.full((1, 2, 8, 8), value)
    for method, mark in [("quarter", 0.0), ("newell", -0.5), ("dark", -1.0), ("megvii", -1.0)]:
        coords, scores = ops.decode(heatmaps, method)
        assert coords.tolist() == [[[mark, mark]] * 2]
        assert scores.tolist() == [[value, value]]


def test_infinity_is_a_peak() -> None:
    heatmaps = torch.zeros(1, 1, 8, 8)
    heatmaps[0, 0, 4, 5] = torch.inf
    for method in ("argmax", "quarter", "dark", "udp", "softargmax"):
        coords, scores = ops.decode(heatmaps, method)
        assert coords.tolist() == [[[5, 4]]]
        assert scores.tolist() == [[torch.inf]]


def test_the_mark_of_an_invisible_joint_goes_into_the_image_too() -> None:
    matrix = torch.tensor([[[2.0, 0, 100], [0, 3, 200]]], dtype=torch.float64)
    coords, _ = ops.decode(torch.zeros(1, 1, 8, 8), "msra", matrix=matrix, origin_x=4)
    assert coords.tolist() == [[[90.0, 197.0]]]


@pytest.mark.parametrize("beta", [1e-30, 1e-3, 1.0, 1e3, 1e30, 1e300])
def test_softargmax_takes_any_beta(beta: float) -> None:
    heatmaps = torch.rand(1, 2, 64, 48, generator=generator(0))
    request = {"maps": heatmaps, "method": "softargmax", "beta": beta}
    check(request)


# ---- errors ----

MAPS = torch.zeros(2, 3, 8, 8)
MATRIX = torch.zeros(2, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("heatmaps", "message"),
    [
        (torch.zeros(3, 8, 8), r"of shape \(batch, joints.*, given \[3, 8, 8\]"),
        (torch.zeros(1, 3, 0, 8), r"at least one row and column, given \[1, 3, 0, 8\]"),
        (torch.zeros(1, 3, 8, 0), r"at least one row and column, given \[1, 3, 8, 0\]"),
        (MAPS.double(), r"float32, bfloat16 or float16, given Double"),
        (MAPS.byte(), r"float32, bfloat16 or float16, given Byte"),
    ],
)
def test_wrong_heatmaps(heatmaps: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"hgfast::decode: expected heatmaps.* " + message):
        ops.decode(heatmaps)
    with pytest.raises(ValueError, match=r"hgfast::decode\.topk: expected heatmaps.* " + message):
        ops.decode_topk(heatmaps, "argmax", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flipped": MAPS[:1]}, r"flipped like the heatmaps, \[2, 3, 8, 8\] .*\[1, 3, 8, 8\]"),
        ({"flipped": MAPS.half()}, r"flipped like the heatmaps, .* Float on cpu, given .* Half"),
        ({"flipped": MAPS}, r"3 joints, one per map, with flipped, given 0"),
        ({"flipped": MAPS, "joints": [0, 1]}, r"3 joints, one per map, with flipped, given 2"),
        ({"flipped": MAPS, "joints": [0, 3, 1]}, r"joints from 0 to 2, given 3"),
        ({"flipped": MAPS, "joints": [0, -1, 1]}, r"joints from 0 to 2, given -1"),
        ({"matrix": MATRIX[0]}, r"matrix of shape \[2, 2, 3\], given \[2, 3\]"),
        ({"matrix": MATRIX[:1]}, r"matrix of shape \[2, 2, 3\], given \[1, 2, 3\]"),
        ({"matrix": MATRIX.mT}, r"matrix of shape \[2, 2, 3\], given \[2, 3, 2\]"),
        ({"matrix": MATRIX.float()}, r"matrix in float64, given Float"),
        ({"blur": 10}, r"an odd blur of at least 3 cells, given 10"),
        ({"blur": 1}, r"an odd blur of at least 3 cells, given 1"),
        ({"blur": -3}, r"an odd blur of at least 3 cells, given -3"),
    ],
)
def test_wrong_options(arguments: Request, message: str) -> None:
    with pytest.raises(ValueError, match=r"hgfast::decode: expected " + message):
        ops.decode(MAPS, **arguments)
    with pytest.raises(ValueError, match=r"hgfast::decode\.topk: expected " + message):
        ops.decode_topk(MAPS, "quarter", 2, **arguments)


@pytest.mark.parametrize("beta", [0.0, -1.0, torch.inf, torch.nan])
def test_wrong_beta(beta: float) -> None:
    with pytest.raises(ValueError, match=f"a positive, finite beta, given {beta:g}"):
        ops.decode(MAPS, "softargmax", beta=beta)


def test_wrong_methods() -> None:
    known = ", ".join(METHODS)
    with pytest.raises(ValueError, match=f'expected a method out of {known}, given "half"'):
        ops.decode(MAPS, "half")
    known = ", ".join(CELL_METHODS)
    for method in ("megvii", "softargmax"):
        with pytest.raises(ValueError, match=f'a method out of {known}, given "{method}"'):
            ops.decode_topk(MAPS, method, 1)


@pytest.mark.parametrize(
    ("k", "window", "message"),
    [(0, 3, "k of at least 1, given 0"), (1, 4, "a window of 3 or 5, given 4")],
)
def test_wrong_numbers_of_peaks(k: int, window: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"hgfast::decode\.topk: expected {message}"):
        ops.decode_topk(MAPS, "argmax", k, window)


def test_without_the_compiled_part_an_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_available", False)
    monkeypatch.setattr(_native, "reason", "no compiled kernels: a test removed them")
    for call in (lambda: ops.decode(MAPS), lambda: ops.decode_topk(MAPS, "argmax", 1)):
        with pytest.raises(RuntimeError, match="not available: no compiled kernels: a test remo"):
            call()


# ---- as torch's compilers see it ----

OPTIONS: list[Request] = [
    {},
    {"flipped": MAPS + 1, "joints": [0, 2, 1], "shift": True, "matrix": MATRIX, "origin_x": 4.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, options: Request) -> None:
    heatmaps = torch.rand(2, 3, 8, 8, generator=generator(0)).to(dtype)
    options = dict(options)
    if "flipped" in options:
        options["flipped"] = options["flipped"].to(dtype)
    torch.library.opcheck(torch.ops.hgfast.decode.default, (heatmaps, "dark"), options)
    torch.library.opcheck(torch.ops.hgfast.decode.topk, (heatmaps, "quarter", 2), options)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
def test_compiles_whole(options: Request) -> None:
    heatmaps = torch.rand(2, 3, 8, 8, generator=generator(0))

    def both(maps: Tensor) -> tuple[Tensor, Tensor]:
        several = ops.decode_topk(maps, "udp", 2, **options)
        return ops.decode(maps, "msra", **options)[0] + 1, several[0] + several[1][..., None]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(heatmaps), both(heatmaps), strict=True):
        assert torch.equal(one, other)
