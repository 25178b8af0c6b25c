"""mmpose's codecs, and how far their float32 may lead from float64.

Importing this module skips the tests that do where mmpose is not installed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peer_packages import REASON, hollow
from torch import Tensor

cv2 = pytest.importorskip("cv2", reason=REASON)
_mmpose = pytest.importorskip("mmpose", reason=REASON)
_FOLDER = Path(_mmpose.__file__).parent
hollow("mmpose.models", "mmpose.models.backbones")  # the codecs import two modules of theirs

from mmpose.codecs import MegviiHeatmap, MSRAHeatmap, UDPHeatmap  # noqa: E402
from mmpose.codecs.utils.post_processing import batch_heatmap_nms  # noqa: E402

__all__ = [
    "METHODS",
    "batch_heatmap_nms",
    "blurred",
    "cells",
    "decoded",
    "disagreement",
    "flip_heatmaps",
]

METHODS = ("msra", "dark", "udp", "megvii")

#: Input pixels per heatmap cell. A power of two: dividing by it gives mmpose's own cells back.
STRIDE = 4

_ULP = 2.0**-23
_LEAST = 2.0**-149


def _flip_heatmaps() -> Callable[..., Tensor]:
    spec = importlib.util.spec_from_file_location("tta", _FOLDER / "models" / "utils" / "tta.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Tensor] = module.flip_heatmaps
    return function


flip_heatmaps = _flip_heatmaps()


def codec(method: str, height: int, width: int, blur: int) -> Any:
    """The codec that ``method`` of hgfast stands for."""
    sizes = {"input_size": (STRIDE * width, STRIDE * height), "heatmap_size": (width, height)}
    if method == "udp":
        return UDPHeatmap(**sizes, blur_kernel_size=blur)
    if method == "megvii":
        return MegviiHeatmap(**sizes, kernel_size=blur)
    return MSRAHeatmap(**sizes, sigma=2, unbiased=method == "dark", blur_kernel_size=blur)


def decoded(maps: Tensor, method: str, blur: int) -> tuple[np.ndarray, np.ndarray]:
    """What mmpose decodes from (B, K, H, W): input pixels (B, K, 2), scores (B, K)."""
    height, width = maps.shape[2:]
    with warnings.catch_warnings():  # an argument that NumPy wants by name
        warnings.simplefilter("ignore", DeprecationWarning)
        each = [codec(method, height, width, blur).decode(m.numpy().copy()) for m in maps]
    return np.stack([places[0] for places, _ in each]), np.stack([scores[0] for _, scores in each])


def cells(maps: Tensor, method: str, blur: int) -> tuple[np.ndarray, np.ndarray]:
    """The same in heatmap cells."""
    places, scores = decoded(maps, method, blur)
    if method == "udp":
        height, width = maps.shape[2:]
        return places / (STRIDE * width, STRIDE * height) * (width - 1, height - 1), scores
    return places / STRIDE, scores


def blurred(heatmap: np.ndarray, blur: int) -> tuple[np.ndarray, np.ndarray]:
    """A map (H, W) under OpenCV's Gaussian in float64, and by how much float32 may be off there.

    In float32 a sum of n products of which all are rounded is off by up to (n + 1) / 2 ulps of the
    sum of their sizes; here that is so in two passes. Twice that, since two of them are compared.
    """
    reach = blur // 2
    padded = np.pad(heatmap.astype(np.float64), reach)
    values, sizes = (
        cv2.GaussianBlur(m, (blur, blur), 0)[reach:-reach, reach:-reach]
        for m in (padded, np.abs(padded))
    )
    return values, 2 * (blur + 2) * (_ULP * sizes + _LEAST)


def disagreement(heatmap: np.ndarray, method: str, blur: int) -> float:
    """How far dark or udp may be apart, in cells, for one of them in float32: infinite if H is
    singular to that precision.

    Both solve H s = g. With logarithms that are off by e, g is off by sqrt(2) e and H by 2 e (dark)
    or 8 e (udp); so s by (sqrt(2) e + |dH| |s|) / (least singular value of H - |dH|), and solving
    in float32 adds a few ulps times the condition of H.
    """
    height, width = heatmap.shape
    y, x = np.unravel_index(np.argmax(heatmap), heatmap.shape)
    rounding = _ULP * max(height, width)
    values, errors = blurred(heatmap, blur)
    if not abs(values.max()) > errors.max():  # then the scale is anything
        return float("inf")
    scale = abs(heatmap.max() / values.max())
    common = errors.max() / abs(values.max())  # of the scale; cancels where nothing is clipped
    values, errors = np.sign(values.max()) * scale * values, scale * errors
    low, high = (1e-10, np.inf) if method == "dark" else (1e-3, 50)
    reach = 2 if method == "dark" else 1
    if method == "dark" and not (1 < x < width - 2 and 1 < y < height - 2):
        return rounding
    values, errors = (
        np.pad(m, reach, mode="edge")[y : y + 2 * reach + 1, x : x + 2 * reach + 1]
        for m in (values, errors)
    )
    errors = errors + common * np.abs(values)
    below, above = values + errors < low, values - errors > high
    if below.all() or above.all():  # one number everywhere: no step
        return rounding
    if ((values - errors > low) & (values + errors < high)).all():
        errors = errors - common * np.abs(values)
    logs = np.log(np.clip(values, low, high))
    errors = np.where(below | above, 0, errors / np.maximum(values - errors, low))
    errors += 4 * _ULP * np.abs(logs)
    error = errors.max()
    c = reach
    gradient = (logs[c, c + 1] - logs[c, c - 1]) / 2, (logs[c + 1, c] - logs[c - 1, c]) / 2
    if method == "dark":
        xx = (logs[c, c + 2] - 2 * logs[c, c] + logs[c, c - 2]) / 4
        yy = (logs[c + 2, c] - 2 * logs[c, c] + logs[c - 2, c]) / 4
        xy = logs[c + 1, c + 1] - logs[c - 1, c + 1] - logs[c + 1, c - 1] + logs[c - 1, c - 1]
        hessian, factor = np.array([[xx, xy / 4], [xy / 4, yy]]), 2
    else:
        xx = logs[c, c + 1] - 2 * logs[c, c] + logs[c, c - 1]
        yy = logs[c + 1, c] - 2 * logs[c, c] + logs[c - 1, c]
        xy = logs[c + 1, c + 1] + logs[c - 1, c - 1] + 2 * logs[c, c]
        xy -= logs[c, c + 1] + logs[c + 1, c] + logs[c, c - 1] + logs[c - 1, c]
        hessian, factor = np.array([[xx, xy / 2], [xy / 2, yy]]) + _ULP * np.eye(2), 8
    largest, least = np.linalg.svd(hessian, compute_uv=False)
    margin = least - factor * error
    if margin <= 0:
        return float("inf")
    step = np.linalg.norm(np.linalg.solve(hessian, gradient))
    solved = (2**0.5 * error + factor * error * step) / margin
    return float(solved + 8 * _ULP * step * largest / margin + rounding)
