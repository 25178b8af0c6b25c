"""From a picture to joints and back to a score: what training and demo measure alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgfast import metrics
from hgfast.decoding import decode
from hgfast.demo.canvas import Array
from hgfast.demo.figures import HELD_OUT, OUTSIDE, render_many

# bearpaw/pytorch-pose subtracts MPII's mean colour and leaves the scale; so does the demo.
MEAN = (0.4404, 0.4440, 0.4327)

_LEFT_SHOULDER, _RIGHT_HIP = 13, 2


def held_out(count: int, start: int = 0) -> range:
    """``count`` seeds that no training run draws."""
    return HELD_OUT[start : start + count]


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """Images (B, H, W, 3) uint8 -> network input (B, 3, H, W) float32."""
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]).contiguous()


def to_pixels(coords: Tensor, heatmap_width: int, image_width: int) -> Tensor:
    """Heatmap cells to image pixels; in both, (0, 0) is the centre of the first."""
    scale = image_width / heatmap_width
    return (coords + 0.5) * scale - 0.5


@torch.inference_mode()
def predict(
    model: Callable[[Tensor], Sequence[Tensor]], images: NDArray[np.uint8], batch: int = 32
) -> tuple[Array, Array]:
    """Joints (N, 16, 2) in image pixels and scores (N, 16) of images (N, H, W, 3) uint8."""
    coords, scores = [], []
    for first in range(0, len(images), batch):
        heatmaps = model(to_input(images[first : first + batch]))[-1]
        found, score = decode(heatmaps)
        coords.append(to_pixels(found, heatmaps.shape[-1], images.shape[2]).numpy())
        scores.append(score.numpy())
    return np.concatenate(coords), np.concatenate(scores)


def correct(predicted: Array, joints: Array, threshold: float = 0.2) -> NDArray[np.bool_]:
    """Which joints are found: (N, K) bool.

    A joint counts as found within ``threshold`` times the torso's size, which is the
    distance between left shoulder and right hip (Sapp and Taskar, "MODEC", CVPR 2013; the
    measure that Newell et al. report on FLIC).
    """
    return metrics.correct(predicted, joints, _torso(joints), threshold)


def pck(
    predicted: Array, joints: Array, visible: NDArray[np.uint8], threshold: float = 0.2
) -> float:
    """Percentage (as 0..1) of correct keypoints, over all joints inside the image.

    Occluded joints count, as they do on MPII; joints outside the image do not.
    """
    return metrics.pck(predicted, joints, _torso(joints), threshold, visible != OUTSIDE)


def _torso(joints: Array) -> Array:
    return np.asarray(np.linalg.norm(joints[:, _LEFT_SHOULDER] - joints[:, _RIGHT_HIP], axis=-1))


def measure(model: Callable[[Tensor], Sequence[Tensor]], seeds: Sequence[int]) -> float:
    """PCK@0.2 of a network on the figures of some seeds."""
    images, joints, visible = render_many(seeds)
    return pck(predict(model, images)[0], joints, visible)
