"""Decoding held against ground truth: heatmaps that a trained network gave on photographs."""

from __future__ import annotations

import numpy as np
import torch

from hgfast.decoding import decode

# COCO's keypoint falloffs (cocodataset.org, keypoint evaluation): the spread of human annotations.
# Nose, eyes, ears; shoulders, elbows, wrists; hips, knees, ankles.
COCO_SIGMAS = np.repeat(
    [0.026, 0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089], [1, *[2] * 8]
)
CROP_PIXELS_PER_CELL = 4


def mean_oks(coords: np.ndarray, real: dict[str, np.ndarray]) -> float:
    """COCO's object keypoint similarity, over each person's annotated joints, then persons."""
    crop = np.concatenate([coords * CROP_PIXELS_PER_CELL, np.ones_like(coords[..., :1])], -1)
    image = np.einsum("bij,bkj->bki", real["coco_affine"].reshape(-1, 2, 3), crop)
    annotated = real["coco_gt"][..., 2] > 0
    squared = ((image - real["coco_gt"][..., :2]) ** 2).sum(-1)
    spread = 2 * (2 * COCO_SIGMAS) ** 2 * real["coco_area"][:, None]
    similarity = np.exp(-squared / spread)
    return float(np.mean([s[a].mean() for s, a in zip(similarity, annotated, strict=True)]))


def test_quarter_offset_reaches_the_known_accuracy(real_heatmaps: dict[str, np.ndarray]) -> None:
    heatmaps = torch.from_numpy(real_heatmaps["coco_heatmaps"])
    coords, scores = decode(heatmaps)
    assert round(mean_oks(coords.numpy(), real_heatmaps), 3) == 0.792
    assert torch.equal(scores, heatmaps.amax((2, 3)))


def test_the_quarter_is_worth_having(real_heatmaps: dict[str, np.ndarray]) -> None:
    heatmaps = torch.from_numpy(real_heatmaps["coco_heatmaps"])
    quarter, argmax = (
        mean_oks(decode(heatmaps, method)[0].numpy(), real_heatmaps)
        for method in ("quarter", "argmax")
    )
    assert quarter > argmax + 0.01
