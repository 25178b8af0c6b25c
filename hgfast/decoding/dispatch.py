"""decode: the arguments checked, the fastest implementation that can chosen."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from hgfast import ops
from hgfast.decoding import cuda, reference
from hgfast.decoding.options import Flip, GlobalTopK, TopK, Transform
from hgfast.decoding.reference import CELL_METHODS, METHODS

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Heatmaps = Tensor | Sequence[Tensor]
Decoded = tuple[Tensor, Tensor]


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
        first (its corner for ``newell`` and ``princeton``, which add half a cell), or in image
        pixels. And scores (B, K), float32: each map's maximum (see ``megvii`` for its own). No
        gradient flows. :class:`TopK` and :class:`GlobalTopK` tell what they change.

        A joint whose maximum is not positive is invisible: that is its score, and its coordinates
        are the mark that the method's public code leaves, (0, 0), (-1, -1) or (-0.5, -0.5). A
        heatmap with a NaN has score NaN and that mark.

    Raises:
        ValueError: heatmaps of another shape or dtype, no cells, an unknown method; a flip of
            another shape, dtype or device, pairs out of range; a transform of another batch size;
            topk with a method that has none; blur, beta, k or window out of range.
        TypeError: something of another type.
    """
    asked = _checked(heatmaps, method, flip, transform, topk, blur, beta)
    return _answer(asked, torch.ops.hgfast if _has_kernel(asked.maps) else reference)


def decode_by_reference(
    heatmaps: Heatmaps,
    method: str = "quarter",
    topk: TopK | GlobalTopK | int | None = None,
    *,
    blur: int = 11,
    beta: float = 1.0,
) -> tuple[Tensor, ...]:
    """What :func:`decode` has to return, by the reference."""
    return _answer(_checked(heatmaps, method, None, None, topk, blur, beta), reference)


@dataclass(frozen=True)
class _Asked:
    """A call of decode, checked, in the operators' terms."""

    maps: Tensor
    method: str
    peaks: TopK | GlobalTopK | None
    beta: float
    arguments: dict[str, Any]


def _checked(
    heatmaps: Heatmaps,
    method: str,
    flip: Flip | None,
    transform: Transform | Tensor | None,
    topk: TopK | GlobalTopK | int | None,
    blur: int,
    beta: float,
) -> _Asked:
    if method not in METHODS:
        known = ", ".join(f'"{name}"' for name in METHODS)
        raise ValueError(f"decode expects a method out of {known}, got {method!r}")
    _check_numbers(blur, beta)
    peaks = _peaks(method, topk)
    maps = _last_stack(heatmaps, "heatmaps")
    _check_maps(maps)
    arguments: dict[str, Any] = {"blur": blur}
    if flip is not None:
        _add_flip(arguments, flip, maps)
    if transform is not None:
        _add_transform(arguments, transform, maps)
    return _Asked(maps.detach(), method, peaks, beta, arguments)


def _answer(asked: _Asked, operators: Any) -> tuple[Tensor, ...]:
    """``operators`` has the operators: torch.ops.hgfast, or the reference."""
    maps, method, peaks = asked.maps, asked.method, asked.peaks
    if peaks is None:
        coords, scores = operators.decode(maps, method, beta=asked.beta, **asked.arguments)
        return coords, scores
    decode_topk = reference.decode_topk if operators is reference else operators.decode.topk
    coords, scores = decode_topk(maps, method, peaks.k, peaks.window, **asked.arguments)
    if isinstance(peaks, GlobalTopK):
        return _across_maps(coords, scores, peaks.k)
    return coords, scores


def _has_kernel(maps: Tensor) -> bool:
    if maps.dtype not in _NATIVE_DTYPES or os.environ.get("HGFAST_DISABLE", "0") not in ("", "0"):
        return False
    device = maps.device.type
    return ops.is_available() and (device == "cpu" or (device == "cuda" and cuda.HAS_TRITON))


def _across_maps(coords: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k highest of all maps' k highest, in a stable order; NaN first, as torch sorts."""
    batch, count = scores.shape[:2]
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
    if 0 in heatmaps.shape[2:]:
        raise ValueError(f"{expected} with at least one cell, got shape {tuple(heatmaps.shape)}")


def _check_numbers(blur: int, beta: float) -> None:
    if isinstance(blur, bool) or not isinstance(blur, int) or blur < 3 or blur % 2 == 0:
        raise ValueError(f"decode expects an odd blur of at least 3 cells, got {blur!r}")
    if not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
        raise ValueError(f"decode expects a positive, finite beta, got {beta!r}")


def _peaks(method: str, topk: TopK | GlobalTopK | int | None) -> TopK | GlobalTopK | None:
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


def _add_flip(arguments: dict[str, Any], flip: Flip, maps: Tensor) -> None:
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
    arguments.update(
        flipped=flipped.detach(),
        joints=flip.joints(maps.shape[1]),
        shift=bool(flip.shift),
        mean=flip.reduce == "mean",
    )


def _add_transform(arguments: dict[str, Any], transform: Transform | Tensor, maps: Tensor) -> None:
    if isinstance(transform, Tensor):
        transform = Transform.affine(transform)
    if not isinstance(transform, Transform):
        raise TypeError(
            "decode expects transform as hgfast.Transform or a matrix (batch, 2, 3), "
            f"got {type(transform).__name__}"
        )
    batch, _, height, width = maps.shape
    matrix, origin_x, origin_y = transform.resolve(batch, height, width, maps.device)
    arguments.update(
        matrix=matrix, origin_x=origin_x, origin_y=origin_y, truncate=bool(transform.truncate)
    )


def _outline(maps: Tensor) -> str:
    dtype = str(maps.dtype).removeprefix("torch.")
    return f"{tuple(maps.shape)} {dtype} on {maps.device}"
