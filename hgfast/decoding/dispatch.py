"""decode: the arguments checked, the fastest implementation that can chosen."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from hgfast import _native
from hgfast.decoding.reference import METHODS

_NATIVE_METHODS = ("quarter",)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def decode(heatmaps: Tensor | Sequence[Tensor], method: str = "quarter") -> tuple[Tensor, Tensor]:
    """Find each joint in its heatmap.

    Args:
        heatmaps: (B, K, H, W), floating point, any strides; or a network's list of them,
            one per stack, of which the last is decoded.
        method: "quarter", the maximum moved a quarter of a pixel towards its higher
            neighbour (the rule of Simple Baselines and HRNet), or "argmax", the maximum's
            cell. Formulas: :mod:`hgfast.decoding.reference`.

    Returns:
        Coordinates (B, K, 2), float32, as (x, y) in heatmap pixels with (0, 0) the centre of
        the first; and scores (B, K), float32, each map's maximum. No gradient flows.

        A joint whose maximum is not positive is invisible: its coordinates are (0, 0). A
        heatmap with a NaN has score NaN and coordinates (0, 0).

    Raises:
        ValueError: heatmaps of another shape or dtype, no cells, or an unknown method.
        TypeError: no tensor.
    """
    if method not in METHODS:
        known = ", ".join(f'"{name}"' for name in METHODS)
        raise ValueError(f"decode expects a method out of {known}, got {method!r}")
    if isinstance(heatmaps, (list, tuple)):
        if not heatmaps:
            raise ValueError("decode expects heatmaps of at least one stack, got an empty list")
        heatmaps = heatmaps[-1]
    if not isinstance(heatmaps, Tensor):
        raise TypeError(
            "decode expects a tensor of heatmaps (batch, joints, height, width) or a list of "
            f"them, got {type(heatmaps).__name__}"
        )
    _check(heatmaps)
    heatmaps = heatmaps.detach()
    if (
        method in _NATIVE_METHODS
        and heatmaps.device.type == "cpu"
        and heatmaps.dtype in _NATIVE_DTYPES
        and os.environ.get("HGFAST_DISABLE", "0") in ("", "0")
        and _native.load() is not None
    ):
        coords, scores = torch.ops.hgfast.decode(heatmaps, method)
        return coords, scores
    return METHODS[method](heatmaps)


def _check(heatmaps: Tensor) -> None:
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
