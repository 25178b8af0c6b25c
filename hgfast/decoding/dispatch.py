"""decode: the arguments checked, the fastest implementation that can chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from hgfast import _native, ops
from hgfast.decoding import cuda, reference
from hgfast.decoding.options import Flip, GlobalTopK, TopK, Transform
from hgfast.decoding.reference import CELL_METHODS, METHODS

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Heatmaps = Tensor | Sequence[Tensor]
Decoded = tuple[Tensor, Tensor]
Peaks = TopK | GlobalTopK

#: flipped, joints, shift, mean; matrix, origin_x, origin_y, truncate; blur.
Arguments = tuple[Any, ...]
_NO_FLIP = (None, (), False, True)
_NO_TRANSFORM = (None, 0.0, 0.0, False)


@overload
def decode(
    heatmaps: Heatmaps,
    method: str = ...,
    flip: Flip | None = ...,
    transform: Transform | Tensor | None = ...,
    topk: TopK | int | None = ...,
    *,
    blur: int = ...,
    beta: float = ...,
) -> Decoded: ...


@overload
def decode(
    heatmaps: Heatmaps,
    method: str = ...,
    flip: Flip | None = ...,
    transform: Transform | Tensor | None = ...,
    *,
    topk: GlobalTopK,
    blur: int = ...,
    beta: float = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


def decode(
    heatmaps: Heatmaps,
    method: str = "quarter",
    flip: Flip | None = None,
    transform: Transform | Tensor | None = None,
    topk: TopK | GlobalTopK | int | None = None,
    *,
    blur: int = 11,
    beta: float = 1.0,
) -> tuple[Tensor, ...]:
    """Find each joint in its heatmap.

    Runs where the heatmaps are, in one pass over them: compiled kernels on a CPU, a Triton kernel
    on a GPU, nothing copied to the host and nothing waited for. Else plain PyTorch.

    Args:
        heatmaps: (B, K, H, W), floating point, any strides; or a network's list of them,
            one per stack, of which the last is decoded.
        method: how a place is found. Formulas and sources: :mod:`hgfast.decoding.reference`.

            ==============  ==================================================================
            ``argmax``      the cell of the maximum
            ``quarter``     a quarter of a cell towards the higher neighbour: Simple
                            Baselines, HRNet
            ``newell``      the same with the original hourglass's bounds and half pixel
            ``princeton``   the rule of princeton-vl/pytorch_stacked_hourglass
            ``msra``        mmpose's quarter
            ``dark``        a Newton step on the logarithm of the blurred map
            ``udp``         the same as UDP does it
            ``megvii``      the maximum of the blurred map, and a quarter
            ``softargmax``  the mean place under softmax(beta h)
            ==============  ==================================================================
        flip: heatmaps of the mirrored image, merged on the way.
        transform: coordinates in the image instead of the heatmap: :meth:`Transform.mpii`,
            ``coco``, ``udp`` or ``affine``; or an affine matrix (B, 2, 3) or (2, 3).
        topk: several peaks per map (``TopK``, or a number for TopK(number)), or the highest of all
            maps of an image (``GlobalTopK``). With the methods that start from a cell, which are
            all but megvii and softargmax.
        blur: the Gaussian's size in cells for dark, udp and megvii, odd: 11 for networks trained
            on Gaussians of sigma 2, 17 for sigma 3.
        beta: the factor of softargmax; the one that the network was trained with.

    Returns:
        Coordinates (B, K, 2), float32, as (x, y) in heatmap cells with (0, 0) the centre of the
        first (its corner for ``newell``, ``princeton`` and, away from the border, ``megvii``,
        which add half a cell), or in image pixels. And scores (B, K), float32: each map's maximum
        (see ``megvii`` for its own). No gradient flows. :class:`TopK` and :class:`GlobalTopK` tell
        what they change.

        A joint whose maximum is not positive is invisible: that is its score, and its coordinates
        are the mark that the method's public code leaves, (0, 0), (-1, -1) or (-0.5, -0.5). A
        heatmap with a NaN has score NaN and that mark.

    Raises:
        ValueError: heatmaps of another shape or dtype, no cells, an unknown method; a flip of
            another shape, dtype or device, pairs out of range; a transform of another batch size;
            topk with a method that has none; blur, beta, k or window out of range.
        TypeError: something of another type.
    """
    _check_numbers(blur, beta)
    maps, peaks, arguments = _checked(heatmaps, method, flip, transform, topk, blur)
    if not _has_kernel(maps):
        return _by_reference(maps, method, peaks, arguments, beta)
    if peaks is None:
        # No packet of overloads to search, and every argument costs: a call is to take little
        # beside a map.
        if beta != 1:
            arguments = (*(arguments or (*_NO_FLIP, *_NO_TRANSFORM, blur)), beta)
        coords, scores = torch.ops.hgfast.decode.default(maps, method, *arguments)
        return coords, scores
    coords, scores = torch.ops.hgfast.decode.topk(maps, method, peaks.k, peaks.window, *arguments)
    return _ranked(coords, scores, peaks)


def decode_by_reference(
    heatmaps: Heatmaps,
    method: str = "quarter",
    topk: Peaks | int | None = None,
    *,
    blur: int = 11,
    beta: float = 1.0,
) -> tuple[Tensor, ...]:
    """What :func:`decode` has to return, by the reference."""
    _check_numbers(blur, beta)
    maps, peaks, arguments = _checked(heatmaps, method, None, None, topk, blur)
    return _by_reference(maps, method, peaks, arguments, beta)


def _by_reference(
    maps: Tensor, method: str, peaks: Peaks | None, arguments: Arguments, beta: float
) -> tuple[Tensor, ...]:
    decode: Any = reference.decode  # mypy counts the tuple as arguments without end
    if peaks is None:
        coords, scores = decode(maps, method, *arguments, beta=beta)
        return coords, scores
    coords, scores = reference.decode_topk(maps, method, peaks.k, peaks.window, *arguments)
    return _ranked(coords, scores, peaks)


def _checked(
    heatmaps: Heatmaps,
    method: str,
    flip: Flip | None,
    transform: Transform | Tensor | None,
    topk: Peaks | int | None,
    blur: int,
) -> tuple[Tensor, Peaks | None, Arguments]:
    """The maps, the peaks that are wanted, and the arguments that both operators have.

    Those are left out where they are the operators' defaults.
    """
    if method not in METHODS:
        known = ", ".join(f'"{name}"' for name in METHODS)
        raise ValueError(f"decode expects a method out of {known}, got {method!r}")
    peaks = _peaks(method, topk)
    maps = _last_stack(heatmaps, "heatmaps")
    _check_maps(maps)
    if maps.requires_grad:
        maps = maps.detach()
    if flip is None and transform is None and blur == 11:
        return maps, peaks, ()
    merging = _NO_FLIP if flip is None else _merging(flip, maps)
    placing = _NO_TRANSFORM if transform is None else _placing(transform, maps)
    return maps, peaks, (*merging, *placing, blur)


def _has_kernel(maps: Tensor) -> bool:
    if maps.dtype not in _NATIVE_DTYPES or _native.is_disabled():
        return False
    device = maps.device.type
    return ops.is_available() and (device == "cpu" or (device == "cuda" and cuda.HAS_TRITON))


def _ranked(coords: Tensor, scores: Tensor, peaks: Peaks) -> tuple[Tensor, ...]:
    """Peaks of each map; or the k highest of all maps, in a stable order, and their maps.

    NaN comes first, as torch sorts.
    """
    if isinstance(peaks, TopK):
        return coords, scores
    k, (batch, count) = peaks.k, scores.shape[:2]
    if count == 0:
        coords, scores = coords.new_zeros(batch, 1, k, 2), scores.new_zeros(batch, 1, k)
    scores, order = scores.flatten(1).sort(dim=-1, descending=True, stable=True)
    scores, order = scores[:, :k].contiguous(), order[:, :k]
    return coords.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 2)), scores, order // k


def _last_stack(heatmaps: Any, name: str) -> Tensor:
    if isinstance(heatmaps, (list, tuple)):
        if not heatmaps:
            raise ValueError(f"decode expects {name} of at least one stack, got an empty list")
        heatmaps = heatmaps[-1]
    if not isinstance(heatmaps, Tensor):
        raise TypeError(
            f"decode expects a tensor of {name} (batch, joints, height, width) or a list of "
            f"them, got {type(heatmaps).__name__}"
        )
    return heatmaps


def _check_maps(heatmaps: Tensor) -> None:
    expected = "decode expects floating-point heatmaps (batch, joints, height, width)"
    if heatmaps.ndim != 4:
        hint = {
            2: "; one heatmap is heatmap[None, None]",
            3: "; one image's heatmaps are heatmaps[None]",
            5: "; of (batch, stacks, joints, height, width), decode heatmaps[:, -1]",
        }.get(heatmaps.ndim, "")
        raise ValueError(f"{expected}, got shape {tuple(heatmaps.shape)}{hint}")
    if not heatmaps.is_floating_point():
        raise ValueError(f"{expected}, got {str(heatmaps.dtype).removeprefix('torch.')}")
    _, _, height, width = heatmaps.shape
    if height == 0 or width == 0:
        raise ValueError(f"{expected} with at least one cell, got shape {tuple(heatmaps.shape)}")


def _check_numbers(blur: int, beta: float) -> None:
    if not isinstance(blur, int) or isinstance(blur, bool) or blur < 3 or blur % 2 == 0:
        raise ValueError(f"decode expects an odd blur of at least 3 cells, got {blur!r}")
    if not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
        raise ValueError(f"decode expects a positive, finite beta, got {beta!r}")


def _peaks(method: str, topk: Peaks | int | None) -> Peaks | None:
    if topk is None:
        return None
    if isinstance(topk, int):
        topk = TopK(topk)
    if not isinstance(topk, (TopK, GlobalTopK)):
        raise TypeError(
            f"decode expects topk as TopK, GlobalTopK or int, got {type(topk).__name__}"
        )
    if isinstance(topk.k, bool) or not isinstance(topk.k, int) or topk.k < 1:
        raise ValueError(f"decode expects topk of at least 1 peak, got {topk.k!r}")
    if topk.window not in (3, 5):
        raise ValueError(f"decode expects a topk window of 3 or 5 cells, got {topk.window!r}")
    if method not in CELL_METHODS:
        known = ", ".join(f'"{name}"' for name in CELL_METHODS)
        raise ValueError(f"decode expects one of {known} with topk, got {method!r}")
    return topk


def _merging(flip: Flip, maps: Tensor) -> Arguments:
    if not isinstance(flip, Flip):
        raise TypeError(f"decode expects flip as hgfast.Flip, got {type(flip).__name__}")
    flipped = _last_stack(flip.heatmaps, "flipped heatmaps")
    if flipped.shape != maps.shape or flipped.dtype != maps.dtype or flipped.device != maps.device:
        raise ValueError(
            f"decode expects flipped heatmaps like the others, {_outline(maps)}, "
            f"got {_outline(flipped)}"
        )
    if flip.reduce not in ("mean", "sum"):
        raise ValueError(f'decode expects flip\'s reduce "mean" or "sum", got {flip.reduce!r}')
    joints = flip.joints(maps.shape[1])
    return flipped.detach(), joints, bool(flip.shift), flip.reduce == "mean"


def _placing(transform: Transform | Tensor, maps: Tensor) -> Arguments:
    if isinstance(transform, Tensor):
        transform = Transform.affine(transform)
    if not isinstance(transform, Transform):
        raise TypeError(
            "decode expects transform as hgfast.Transform or a matrix (batch, 2, 3), "
            f"got {type(transform).__name__}"
        )
    batch, _, height, width = maps.shape
    matrix, origin_x, origin_y = transform.resolve(batch, height, width, maps.device)
    return matrix, origin_x, origin_y, bool(transform.truncate)


def _outline(maps: Tensor) -> str:
    dtype = str(maps.dtype).removeprefix("torch.")
    return f"{tuple(maps.shape)} {dtype} on {maps.device}"
