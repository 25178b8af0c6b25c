"""Each decoding method as a formula in plain PyTorch: the judge of the faster ones.

Below, ``h`` is a heatmap, ``(x, y)`` the cell of its maximum, counted from 0, the first of equals
in row order, and ``W`` and ``H`` are its width and height. What holds for every method:

- Maps are merged, compared and blurred in float32 (float64 maps in float64); what follows a blur
  is float64. Results are float32.
- The score is the map's maximum. Where it is not positive the joint is invisible (training targets
  of such joints are zero all over), and the coordinates are those that the method's public code
  gives then: a mark, not a place. Each method below names its own. Only ``softargmax``, which
  regresses from values of any sign, goes by something else.
- A map with a NaN in it has score NaN and the coordinates of an invisible joint.
- Neighbours are compared, not subtracted: two infinite ones are a tie.

:func:`decode` and :func:`decode_topk` have the signatures of the operators ``hgfast::decode`` and
``hgfast::decode.topk``, and take what those take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Decoded = tuple[Tensor, Tensor]


# ---- the methods that start from a cell: (maps, x, y, blur) -> the place of each cell ------------
#
# maps are (B, K, H, W), x and y (B, K, P) int64 cells, places (B, K, P, 2) float64.


def argmax(maps: Tensor, x: Tensor, y: Tensor, blur: int = 0) -> Tensor:
    """The cell of the maximum: ``(x, y)``. Invisible: (0, 0)."""
    return torch.stack((x, y), -1).double()


def quarter(maps: Tensor, x: Tensor, y: Tensor, blur: int = 0) -> Tensor:
    """The cell, moved a quarter of a cell towards the higher neighbour.

    Where ``1 < x < W - 1 and 1 < y < H - 1`` (no closer to the border, column 1 and row 1 stay)::

        x + 0.25 sign(h[y, x + 1] - h[y, x - 1]),  y + 0.25 sign(h[y + 1, x] - h[y - 1, x])

    Invisible: (0, 0). The rule of Simple Baselines (Xiao et al., arXiv:1804.06208) and HRNet (Sun
    et al., arXiv:1902.09212), with the bounds of their published code (``get_final_preds``).
    """
    height, width = maps.shape[2:]
    inside = _between(1, x, width - 1) & _between(1, y, height - 1)
    return argmax(maps, x, y) + 0.25 * _slopes(maps, x, y) * inside[..., None]


def newell(maps: Tensor, x: Tensor, y: Tensor, blur: int = 0) -> Tensor:
    """The original hourglass's rule, half a pixel included.

    ``(x + 0.5, y + 0.5)``; where ``0 < x < W - 1 and 0 < y < H - 1`` plus a quarter towards the
    higher neighbour in each direction, as in :func:`quarter`. So (0, 0) is the corner of the first
    cell here, not its centre: multiplied by the stride it is a place in the input.

    Invisible: (-0.5, -0.5). Newell et al., "Stacked Hourglass Networks" (arXiv:1603.06937), in the
    published code (bearpaw/pytorch-pose, ``final_preds``) counted from 1, here from 0.
    """
    height, width = maps.shape[2:]
    inside = _between(0, x, width - 1) & _between(0, y, height - 1)
    return argmax(maps, x, y) + 0.5 + 0.25 * _slopes(maps, x, y) * inside[..., None]


def princeton(maps: Tensor, x: Tensor, y: Tensor, blur: int = 0) -> Tensor:
    """The rule of princeton-vl/pytorch_stacked_hourglass: always a quarter, one way or the other.

    ``x + 0.5 + 0.25`` if ``h[y, min(x + 1, W - 1)] > h[y, max(x - 1, 0)]``, else
    ``x + 0.5 - 0.25``; likewise ``y``. On a tie it moves to the left, or up.

    Invisible: (0, 0), where that code (``HeatmapParser``) gives the cell that its non-maximum
    suppression happens to leave first.
    """
    height, width = maps.shape[2:]
    right = _at(maps, (x + 1).clamp(max=width - 1), y)
    left = _at(maps, (x - 1).clamp(min=0), y)
    below = _at(maps, x, (y + 1).clamp(max=height - 1))
    above = _at(maps, x, (y - 1).clamp(min=0))
    up = torch.stack((right > left, below > above), -1)
    return argmax(maps, x, y) + 0.5 + torch.where(up, 0.25, -0.25)


def msra(maps: Tensor, x: Tensor, y: Tensor, blur: int = 0) -> Tensor:
    """:func:`quarter` with mmpose's bounds, in which each direction has its own.

    x moves where ``1 < x < W - 1 and 0 < y``, y where ``1 < y < H - 1 and 0 < x``.

    Invisible: (-1, -1). mmpose 1.x, ``MSRAHeatmap`` (codecs/utils/refinement.py,
    ``refine_keypoints``).
    """
    height, width = maps.shape[2:]
    moves_x = _between(1, x, width - 1) & _between(0, y, height)
    moves_y = _between(1, y, height - 1) & _between(0, x, width)
    moves = torch.stack((moves_x, moves_y), -1)
    return argmax(maps, x, y) + 0.25 * _slopes(maps, x, y) * moves


def dark(maps: Tensor, x: Tensor, y: Tensor, blur: int = 11) -> Tensor:
    """A Newton step to the peak of the logarithm of the blurred heatmap.

    With ``l = log max(c b, 1e-10)``, where ``b`` is the heatmap under a Gaussian
    (:func:`gaussian_blur`) and ``c = max h / max b``; where ``1 < x < W - 2 and 1 < y < H - 2``::

        g = 1/2 (l[x + 1] - l[x - 1]),  in y likewise
        H = 1/4 (l[x + 2] - 2 l + l[x - 2]),  in y likewise; mixed
            1/4 (l[x + 1, y + 1] - l[x - 1, y + 1] - l[x + 1, y - 1] + l[x - 1, y - 1])
        (x, y) - H^-1 g

    A step that is not finite (H singular, infinite maps) is not made. It is not limited otherwise:
    where the map has no peak it may lead outside.

    The constant ``c`` cancels in all differences of ``l``. So only where a value of ``b`` that they
    need is below 1e-10 does it matter, and only there is the whole map blurred.

    Invisible: (-1, -1). Zhang et al., "Distribution-Aware Coordinate Representation for Human Pose
    Estimation" (arXiv:1910.06278), as in mmpose 1.x's ``MSRAHeatmap(unbiased=True)``, there in
    float32 throughout.
    """
    height, width = maps.shape[2:]
    inside = _between(1, x, width - 2) & _between(1, y, height - 2)
    return _newton(x, y, *dark_system(maps, x, y, blur), inside)


def dark_system(maps: Tensor, x: Tensor, y: Tensor, blur: int) -> tuple[Tensor, Tensor]:
    """The gradient (..., 2) and the Hessian (..., 2, 2) of :func:`dark`."""
    near = {(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (2, 0), (-2, 0), (0, 2), (0, -2)}
    near |= {(1, 1), (-1, 1), (1, -1), (-1, -1)}
    log = _log_blurred(maps, x, y, sorted(near), blur, 1e-10, None)
    dx = 0.5 * (log[1, 0] - log[-1, 0])
    dy = 0.5 * (log[0, 1] - log[0, -1])
    dxx = 0.25 * (log[2, 0] - 2 * log[0, 0] + log[-2, 0])
    dyy = 0.25 * (log[0, 2] - 2 * log[0, 0] + log[0, -2])
    dxy = 0.25 * (log[1, 1] - log[-1, 1] - log[1, -1] + log[-1, -1])
    return _system(dx, dy, dxx, dxy, dyy)


def udp(maps: Tensor, x: Tensor, y: Tensor, blur: int = 11) -> Tensor:
    """DARK as UDP does it: the next neighbours only, and at the border too.

    With ``l = log clip(c b, 1e-3, 50)``, ``b`` and ``c`` as in :func:`dark`, and neighbours outside
    the map those at its edge::

        g = 1/2 (l[x + 1] - l[x - 1]),  in y likewise
        H = l[x + 1] - 2 l + l[x - 1],  in y likewise; mixed
            1/2 (l[x + 1, y + 1] - l[x + 1] - l[y + 1] + 2 l - l[x - 1] - l[y - 1]
                 + l[x - 1, y - 1])
        (x, y) - (H + eps I)^-1 g,  eps = 2^-23

    A step that is not finite is not made. ``c`` matters only where a value of ``b`` is below 1e-3
    or the heatmap's maximum above 50.

    Invisible: (-1, -1), where mmpose refines that mark with values of other maps. Huang et al.,
    "The Devil is in the Details: Delving into Unbiased Data Processing" (arXiv:1911.07524), as in
    mmpose 1.x's ``UDPHeatmap``, there in float32. Its ``/ [W - 1, H - 1] * input_size`` is
    :meth:`hgfast.Transform.udp`.
    """
    return _newton(x, y, *udp_system(maps, x, y, blur), torch.ones_like(x, dtype=torch.bool))


def udp_system(maps: Tensor, x: Tensor, y: Tensor, blur: int) -> tuple[Tensor, Tensor]:
    """The gradient (..., 2) and the Hessian (..., 2, 2), eps included, of :func:`udp`."""
    near = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1)]
    log = _log_blurred(maps, x, y, near, blur, 1e-3, 50.0)
    eps = torch.finfo(torch.float32).eps
    dx = 0.5 * (log[1, 0] - log[-1, 0])
    dy = 0.5 * (log[0, 1] - log[0, -1])
    dxx = log[1, 0] - 2 * log[0, 0] + log[-1, 0] + eps
    dyy = log[0, 1] - 2 * log[0, 0] + log[0, -1] + eps
    dxy = log[1, 1] - log[1, 0] - log[0, 1] + 2 * log[0, 0] - log[-1, 0] - log[0, -1] + log[-1, -1]
    return _system(dx, dy, dxx, 0.5 * dxy, dyy)


# ---- the methods that need the whole map: (maps, blur, beta) -> places, scores, visible ---------


def megvii(maps: Tensor, blur: int = 11, beta: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of the blurred heatmap, moved by a quarter and by half a cell.

    On ``c b`` instead of ``h``, ``b`` and ``c`` as in :func:`dark`: its maximum is the score,
    ``max(c b) / 255 + 0.5``; and where ``1 < x < W - 1 and 1 < y < H - 1``::

        x + 0.25 sign(b[y, x + 1] - b[y, x - 1]) + 0.5,  y likewise

    Elsewhere the cell stays as it is, without the half. (``max(c b)`` is ``max h``, unless ``b`` is
    negative throughout; then ``c`` turns the map upside down.)

    Invisible: (-1, -1), and the score is the heatmap's maximum as it is, where the public code
    gives about 0.5, and NaN for a map of zeros. mmpose 1.x, ``MegviiHeatmap``; the rule of CPN's
    authors (Chen et al., arXiv:1711.07319; Li et al., "MSPN", arXiv:1901.00148).
    """
    height, width = maps.shape[2:]
    blurred = gaussian_blur(maps, blur)
    highest, _, _ = maximum(maps)
    top, x, y = maximum(blurred)
    # The sign of c; it has no other influence on places.
    lowest, x_low, y_low = maximum(-blurred)
    down = top < 0
    x, y = torch.where(down, x_low, x), torch.where(down, y_low, y)
    inside = _between(1, x, width - 1) & _between(1, y, height - 1)
    slopes = _slopes(blurred, x[..., None], y[..., None])[..., 0, :]
    slopes = torch.where(down[..., None], -slopes, slopes)
    places = torch.stack((x, y), -1) + (0.25 * slopes + 0.5) * inside[..., None]
    top = torch.where(down, highest.double() * (-lowest.double() / top.double()), highest.double())
    visible = highest > 0
    scores = torch.where(visible, top / 255 + 0.5, highest.double())
    return places.double(), scores, visible


def softargmax(maps: Tensor, blur: int = 0, beta: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The mean place under ``softmax(beta h)`` over the map: integral regression.

    ::

        sum over cells of (x, y) exp(beta (h - max h)) / sum over cells of exp(beta (h - max h))

    A cell that has the maximum weighs 1 also where that is infinite. ``beta`` has to be the one
    that the network was trained with: on heatmaps between 0 and 1, which are no logits, it must be
    large (20 and more) or all cells weigh nearly the same.

    The score is the map's maximum. Invisible is a map that has one value all over, whatever its
    sign: (0, 0). Sun et al., "Integral Human Pose Regression" (arXiv:1711.08229).
    """
    height, width = maps.shape[2:]
    highest = maps.flatten(2).amax(-1)
    lowest = maps.flatten(2).amin(-1)
    maps = maps.double()
    top = highest.double()[..., None, None]
    weights = torch.where(maps == top, 1.0, torch.exp(beta * (maps - top)))
    total = weights.sum((2, 3))
    x = (weights.sum(2) * torch.arange(width, device=maps.device)).sum(-1) / total
    y = (weights.sum(3) * torch.arange(height, device=maps.device)).sum(-1) / total
    return torch.stack((x, y), -1), highest.double(), highest > lowest


#: Methods that refine a cell, and what marks an invisible joint in their public code.
CELL_METHODS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, int], Tensor], float]] = {
    "argmax": (argmax, 0.0),
    "quarter": (quarter, 0.0),
    "newell": (newell, -0.5),
    "princeton": (princeton, 0.0),
    "msra": (msra, -1.0),
    "dark": (dark, -1.0),
    "udp": (udp, -1.0),
}
MAP_METHODS: dict[
    str, tuple[Callable[[Tensor, int, float], tuple[Tensor, Tensor, Tensor]], float]
] = {"megvii": (megvii, -1.0), "softargmax": (softargmax, 0.0)}
METHODS = (*CELL_METHODS, *MAP_METHODS)


# ---- the operators -------------------------------------------------------------------------------


def decode(
    heatmaps: Tensor,
    method: str,
    flipped: Tensor | None = None,
    joints: Sequence[int] = (),
    shift: bool = False,
    mean: bool = True,
    matrix: Tensor | None = None,
    origin_x: float = 0.0,
    origin_y: float = 0.0,
    truncate: bool = False,
    blur: int = 11,
    beta: float = 1.0,
) -> Decoded:
    """One joint per map: coordinates (B, K, 2) and scores (B, K), float32.

    Args:
        heatmaps: (B, K, H, W), floating point.
        method: one of ``METHODS``.
        flipped, joints, shift, mean: see :func:`merge`.
        matrix, origin_x, origin_y, truncate: see :func:`to_image`.
        blur: the Gaussian's size in cells, for dark, udp and megvii; odd, at least 3.
        beta: the factor of softargmax; positive.
    """
    maps = merge(heatmaps, flipped, joints, shift, mean)
    if method in MAP_METHODS:
        on_map, mark = MAP_METHODS[method]
        places, scores, visible = on_map(maps, blur, beta)
    else:
        on_cell, mark = CELL_METHODS[method]
        scores, x, y = maximum(maps)
        places = on_cell(maps, x[..., None], y[..., None], blur)[..., 0, :]
        visible = scores > 0
    lost = maps.flatten(2).isnan().any(-1)
    places = torch.where((visible & ~lost)[..., None], places, mark)
    scores = torch.where(lost, torch.nan, scores)
    return to_image(places, matrix, origin_x, origin_y, truncate).float(), scores.float()


def decode_topk(
    heatmaps: Tensor,
    method: str,
    k: int,
    window: int = 3,
    flipped: Tensor | None = None,
    joints: Sequence[int] = (),
    shift: bool = False,
    mean: bool = True,
    matrix: Tensor | None = None,
    origin_x: float = 0.0,
    origin_y: float = 0.0,
    truncate: bool = False,
    blur: int = 11,
) -> Decoded:
    """The k highest peaks of each map: coordinates (B, K, k, 2) and scores (B, K, k), float32.

    A peak is a positive cell that no cell of the ``window`` x ``window`` around it exceeds; of a
    plateau every cell is one, as in the public code (CenterNet's ``_nms``, mmpose's
    ``batch_heatmap_nms``). They are ordered by value, equal ones by row and column. Where a map has
    fewer than k, the rest have score 0 and the method's mark of an invisible joint. All k of a map
    with a NaN have score NaN and that mark.

    ``method`` refines each peak and is one of ``CELL_METHODS``. Other arguments as in
    :func:`decode`.
    """
    maps = merge(heatmaps, flipped, joints, shift, mean)
    on_cell, mark = CELL_METHODS[method]
    batch, count, height, width = maps.shape
    lost = maps.flatten(2).isnan().any(-1)[..., None]
    values = torch.full_like(maps, -torch.inf)
    if maps.numel():
        peaks = (maps == F.max_pool2d(maps, window, 1, window // 2)) & (maps > 0)
        values = torch.where(peaks, maps, -torch.inf)
    values = values.flatten(2)
    if k > height * width:
        values = F.pad(values, (0, k - height * width), value=-torch.inf)
    values, cells = values.sort(dim=-1, descending=True, stable=True)
    values, cells = values[..., :k], cells[..., :k].clamp(max=height * width - 1)
    found = (values > 0) & ~lost
    places = on_cell(maps, cells % width, cells // width, blur)
    places = torch.where(found[..., None], places, mark)
    scores = torch.where(lost, torch.nan, torch.where(found, values, 0.0))
    places = to_image(places.reshape(batch, count * k, 2), matrix, origin_x, origin_y, truncate)
    return places.view(batch, count, k, 2).float(), scores.float()


# ---- their parts ---------------------------------------------------------------------------------


def merge(
    heatmaps: Tensor,
    flipped: Tensor | None,
    joints: Sequence[int],
    shift: bool,
    mean: bool,
) -> Tensor:
    """The maps to decode, in float32 (float64 stays): those given, and those of the mirrored image.

    ``flipped`` are the heatmaps of the mirrored image, of which map ``joints[k]`` shows joint k.
    They are mirrored back; with ``shift`` moved one column to the right, column 0 kept (Simple
    Baselines and HRNet, ``SHIFT_HEATMAP``); then the ``mean`` of both is taken, or else their sum
    (the original hourglass).
    """
    maps = heatmaps if heatmaps.dtype == torch.float64 else heatmaps.float()
    if flipped is None:
        return maps
    other = flipped.to(maps.dtype)[:, list(joints)].flip(3)
    if shift:
        other = torch.cat((other[..., :1], other[..., :-1]), 3)
    return (maps + other) * 0.5 if mean else maps + other


def to_image(
    places: Tensor, matrix: Tensor | None, origin_x: float, origin_y: float, truncate: bool
) -> Tensor:
    """Places (B, N, 2) in heatmap cells as places in the image, float64.

    ``matrix`` is (B, 2, 3), float64; ``truncate`` cuts the fraction off, towards 0. Each product
    and sum is rounded for itself, in this order::

        X = (m[0, 0] (x - origin_x) + m[0, 1] (y - origin_y)) + m[0, 2],  Y likewise
    """
    if matrix is None:
        return places
    x, y = (places[..., 0] - origin_x)[..., None], (places[..., 1] - origin_y)[..., None]
    m = matrix.double()[:, None]
    image = (m[..., 0] * x + m[..., 1] * y) + m[..., 2]
    return image.trunc() if truncate else image


def maximum(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each map's maximum and its cell: the first, in row order, that has it."""
    width = maps.shape[3]
    values, cells = maps.flatten(2).max(-1)
    return values, cells % width, cells // width


def gaussian_taps(blur: int) -> list[float]:
    """The weights of OpenCV's ``getGaussianKernel(blur, 0)``, from the middle outwards.

    sigma = 0.3 ((blur - 1) / 2 - 1) + 0.8; up to 9 taps OpenCV has tables of binary fractions.
    """
    tables = {3: (2, 1), 5: (6, 4, 1), 7: (36, 28, 14, 4), 9: (60, 51, 30, 13, 4)}
    if blur in tables:
        whole = tables[blur][0] + 2 * sum(tables[blur][1:])
        return [tap / whole for tap in tables[blur]]
    sigma = 0.3 * ((blur - 1) / 2 - 1) + 0.8
    steps = torch.arange((blur + 1) // 2, dtype=torch.float64)
    taps = torch.exp(-(steps**2) / (2 * sigma**2))
    return list((taps / (taps[0] + 2 * taps[1:].sum())).tolist())


def gaussian_blur(maps: Tensor, blur: int) -> Tensor:
    """Maps under a separable Gaussian, zeros around them: along rows, then along columns.

    With taps ``w`` from the middle outwards, in the maps' dtype, each product and sum rounded for
    itself, in this order (so that a mirrored map blurs to the mirrored result, bit by bit)::

        w[0] h[x] + w[1] (h[x - 1] + h[x + 1]) + w[2] (h[x - 2] + h[x + 2]) + ...
    """
    taps = gaussian_taps(blur)
    reach = blur // 2
    for dim in (3, 2):
        size = maps.shape[dim]
        padded = F.pad(maps, (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach))
        total = taps[0] * maps
        for step in range(1, reach + 1):
            before = padded.narrow(dim, reach - step, size)
            after = padded.narrow(dim, reach + step, size)
            total = total + taps[step] * (before + after)
        maps = total
    return maps


def _log_blurred(
    maps: Tensor,
    x: Tensor,
    y: Tensor,
    near: Sequence[tuple[int, int]],
    blur: int,
    low: float,
    high: float | None,
) -> dict[tuple[int, int], Tensor]:
    """log clip(c b, low, high) at the cells around (x, y), float64; at the edge for those outside.

    c is left out where nothing is clipped.
    """
    height, width = maps.shape[2:]
    highest = maps.flatten(2).amax(-1, keepdim=True).double()
    blurred = gaussian_blur(maps, blur)
    top = blurred.flatten(2).amax(-1, keepdim=True).double()
    values = {
        (dx, dy): _at(blurred, (x + dx).clamp(0, width - 1), (y + dy).clamp(0, height - 1)).double()
        for dx, dy in near
    }
    # The negation also holds for NaN.
    clipped = ~torch.stack([value >= low for value in values.values()]).all(0)
    if high is not None:
        clipped |= highest > high
    scale = torch.where(clipped, highest / top, 1.0)
    return {at: (scale * value).clamp(low, high).log() for at, value in values.items()}


def _system(dx: Tensor, dy: Tensor, dxx: Tensor, dxy: Tensor, dyy: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.stack((dxx, dxy), -1), torch.stack((dxy, dyy), -1)
    return torch.stack((dx, dy), -1), torch.stack(rows, -2)


def _newton(x: Tensor, y: Tensor, gradient: Tensor, hessian: Tensor, inside: Tensor) -> Tensor:
    dx, dy = gradient.unbind(-1)
    dxx, dxy, dyy = hessian[..., 0, 0], hessian[..., 0, 1], hessian[..., 1, 1]
    determinant = dxx * dyy - dxy * dxy
    step_x = (dxy * dy - dyy * dx) / determinant
    step_y = (dxy * dx - dxx * dy) / determinant
    moves = inside & step_x.isfinite() & step_y.isfinite()
    step = torch.stack((step_x, step_y), -1)
    return torch.stack((x, y), -1) + torch.where(moves[..., None], step, 0.0)


def _between(low: int, cell: Tensor, high: int) -> Tensor:
    """low < cell < high."""
    return (cell > low) & (cell < high)


def _at(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values (B, K, P) of maps at cells (B, K, P) inside them."""
    return maps.flatten(2).gather(2, y * maps.shape[3] + x)


def _slopes(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The sign of the central difference in x and y, (B, K, P, 2); any value at the border."""
    height, width = maps.shape[2:]
    right = _at(maps, (x + 1).clamp(max=width - 1), y)
    left = _at(maps, (x - 1).clamp(min=0), y)
    below = _at(maps, x, (y + 1).clamp(max=height - 1))
    above = _at(maps, x, (y - 1).clamp(min=0))
    return torch.stack(
        ((right > left).double() - (right < left).double(),
         (below > above).double() - (below < above).double()), -1
    )  # fmt: skip
