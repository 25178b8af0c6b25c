"""What the tests of decoding share: maps of every kind, and when two results agree.

All implementations blur to the same bits and go on in float64, so results are equal, save where
they take a logarithm or an exponential, which may differ in the last bit: by how much that moves a
place is computed from the map (:func:`allowed`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hgfast.decoding import METHODS, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced")
KINDS = (
    "random", "tied", "flat", "nan", "infinite", "negative", "border", "peaked", "tiny", "huge",
)  # fmt: skip
CELL_METHODS = tuple(reference.CELL_METHODS)


def maps_of(kind: str, batch: int, joints: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Float32 heatmaps (batch, joints, height, width) of a kind."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, joints, height, width)
    if kind == "tied":  # few values; zeros of both signs
        levels = torch.tensor([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0])
        return levels[torch.randint(len(levels), shape, generator=g)]
    if kind == "flat":
        levels = torch.tensor([-1.0, 0.0, 0.5, 60.0])
        return (
            levels[torch.randint(4, shape[:2], generator=g)][..., None, None].expand(shape).clone()
        )
    if kind in ("border", "peaked"):
        return _peaks(shape, g, border=kind == "border")
    maps = torch.randn(shape, generator=g)
    if kind == "negative":
        return -maps.abs() - 0.01
    if kind == "tiny":  # below what dark and udp clip at
        return maps.abs() * torch.rand(shape[:2], generator=g)[..., None, None] ** 20 * 0.01
    if kind == "huge":
        return maps * 1e4
    if kind in ("nan", "infinite"):
        special = [math.nan] if kind == "nan" else [math.inf, -math.inf]
        for value in special:
            maps = torch.where(torch.rand(shape, generator=g) < 1 / 60, value, maps)
    return maps


def _peaks(shape: tuple[int, ...], g: torch.Generator, border: bool) -> Tensor:
    """Gaussians as networks give them: one to three, noise, here and there a little below 0."""
    _, _, height, width = shape
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    maps = 0.02 * torch.randn(shape, generator=g)
    for _ in range(int(torch.randint(1, 4, (), generator=g))):
        place = torch.rand((2, *shape[:2], 1, 1), generator=g)
        if border:
            place[int(torch.randint(2, (), generator=g))].round_()
        x, y = place[0] * (width - 1), place[1] * (height - 1)
        sigma = 1 + 2 * torch.rand((*shape[:2], 1, 1), generator=g)
        height_of = torch.rand((*shape[:2], 1, 1), generator=g)
        distance = (columns - x) ** 2 + (rows - y) ** 2
        maps = torch.maximum(maps, height_of * torch.exp(-distance / (2 * sigma**2)))
    return maps


def laid_out(maps: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; "sliced" has no dimension with stride 1."""
    if layout == "contiguous":
        return maps.contiguous()
    if layout == "channels_last":
        return maps.contiguous(memory_format=torch.channels_last)
    b, k, h, w = maps.shape
    roomy = torch.full((b, k + 1, h + 2, 2 * w + 1), torch.nan, dtype=maps.dtype)
    roomy[:, 1:, 1:-1, 1::2] = maps
    return roomy[:, 1:, 1:-1, 1::2]


@st.composite
def requests(draw: Any, topk: bool = False, largest: int = 24) -> dict[str, Any]:
    """What an implementation can be asked: ``(maps, method, k, window, **arguments)`` by name.

    ``k`` and ``window`` only with ``topk``. Everything but the maps in the operators' own terms.
    """
    method = draw(st.sampled_from(CELL_METHODS if topk else METHODS))
    batch, joints = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    height = draw(st.integers(1, largest))
    width = draw(st.one_of(st.just(1), st.integers(1, largest), st.integers(1, 2 * largest)))
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**20))
    layout = draw(st.sampled_from(LAYOUTS))
    maps = laid_out(maps_of(kind, batch, joints, height, width, seed).to(dtype), layout)
    request: dict[str, Any] = {"maps": maps, "method": method}
    if topk:
        request.update(k=draw(st.integers(1, 12)), window=draw(st.sampled_from([3, 5])))
    request["blur"] = draw(st.sampled_from([3, 5, 11, 11, 17]))
    if not topk:
        request["beta"] = draw(st.sampled_from([0.5, 1.0, 20.0]))
    if draw(st.booleans()):
        order = list(range(joints))
        if joints > 2:
            order[0], order[2] = 2, 0
        other = maps_of(kind, batch, joints, height, width, seed + 1).to(dtype)
        request.update(
            flipped=laid_out(other, draw(st.sampled_from(LAYOUTS))),
            joints=order,
            shift=draw(st.booleans()),
            mean=draw(st.booleans()),
        )
    if draw(st.booleans()):
        g = torch.Generator().manual_seed(seed)
        request.update(
            matrix=torch.randn(batch, 2, 3, dtype=torch.float64, generator=g) * 10,
            origin_x=draw(st.sampled_from([0.0, width / 2])),
            origin_y=draw(st.sampled_from([0.0, height / 2])),
            truncate=draw(st.booleans()),
        )
    return request


def run(implementation: Any, request: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """An implementation (``decode`` or ``decode_topk`` of a signature as the operators')."""
    rest = {name: value for name, value in request.items() if name not in ("maps", "method")}
    coords, scores = implementation(request["maps"], request["method"], **rest)
    return coords, scores


def expected(request: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the reference says."""
    return run(reference.decode_topk if "k" in request else reference.decode, request)


def allowed(request: dict[str, Any]) -> Tensor:
    """How far places may be from the reference's, in heatmap cells; as many as there are scores.

    0 for the methods that only compare. For dark and udp a relative error ``e`` of the logarithms
    moves the Newton step ``s`` by ``(e + 4 e |s|) / (smallest singular value of H - 4 e)``, where
    that is positive, and by anything where H is singular in float64.
    """
    maps, method = request["maps"], request["method"]
    size = (*maps.shape[:2], request["k"]) if "k" in request else tuple(maps.shape[:2])
    if method == "softargmax":
        return torch.full(size, 1e-6 * max(*maps.shape[2:], 100), dtype=torch.float64)
    if method not in ("dark", "udp") or maps.numel() == 0:
        return torch.zeros(size, dtype=torch.float64)
    plain = {n: v for n, v in request.items() if n not in ("matrix", "origin_x", "origin_y")}
    plain.pop("truncate", None)
    cells, _ = expected({**plain, "method": "argmax"})
    merged = reference.merge(
        maps, *(request.get(n, d) for n, d in
                (("flipped", None), ("joints", ()), ("shift", False), ("mean", True)))
    )  # fmt: skip
    x, y = cells.long().unbind(-1)
    if "k" not in request:
        x, y = x[..., None], y[..., None]
    system = reference.dark_system if method == "dark" else reference.udp_system
    gradient, hessian = system(merged, x, y, request.get("blur", 11))
    error = 2.0**-45  # of a logarithm: below 32 in size, with an ulp or two
    finite = hessian.isfinite().flatten(-2).all(-1) & gradient.isfinite().all(-1)
    hessian = torch.where(finite[..., None, None], hessian, torch.eye(2, dtype=torch.float64))
    gradient = torch.where(finite[..., None], gradient, 0.0)
    smallest = torch.linalg.svdvals(hessian)[..., -1] - 4 * error
    step = torch.linalg.lstsq(hessian, gradient[..., None]).solution.norm(dim=(-2, -1))
    bound = torch.where(smallest > 0, (error + 4 * error * step) / smallest, torch.inf)
    return bound.view(size) + 1e-12


def assert_agree(result: tuple[Tensor, Tensor], request: dict[str, Any]) -> None:
    """Result and reference agree: scores to the bit, places as far as :func:`allowed` demands."""
    coords, scores = result
    places, reference_scores = expected(request)
    assert coords.dtype == scores.dtype == torch.float32
    assert coords.shape == places.shape
    assert scores.shape == reference_scores.shape
    assert torch.equal(scores.isnan(), reference_scores.isnan())
    same = (scores == reference_scores) | scores.isnan()
    assert same.all(), f"scores {scores[~same]} instead of {reference_scores[~same]}"
    bound = allowed(request)[..., None].expand(places.shape)
    matrix = request.get("matrix")
    if matrix is not None:
        reach = matrix[:, :, :2].abs().sum((1, 2)).view(-1, *[1] * (bound.ndim - 1))
        bound = torch.where(bound > 0, bound * reach, 0.0)
    if request.get("truncate"):  # a whole number may lie between the two
        bound = torch.where(bound > 0, bound + 1.01, 0.0)
    rounding = torch.where(bound > 0, 2.0**-23 * places.double().abs(), 0.0)
    off = (coords.double() - places.double()).abs()
    close = (coords == places) | (off <= bound + rounding) | bound.isinf()
    close |= coords.isnan() & places.isnan()
    assert close.all(), (
        f"{request['method']}: {coords[~close]} instead of {places[~close]}, "
        f"allowed {bound[~close]}"
    )
