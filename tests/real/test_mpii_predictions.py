"""The predictions that the authors of the hourglass published, decoded again and scored.

2,958 persons of MPII's validation set, eight stacks (princeton-vl/pose-hg-demo). Their heatmaps
were not published, but every coordinate tells the cell that it comes from.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import hgfast
from hgfast import Transform, metrics

CELLS = 64
UNIT = 200
PELVIS_AND_THORAX = (6, 7)


def cells(published: dict[str, np.ndarray]) -> np.ndarray:
    """The cells that give these coordinates, (N, 16, 2) int64; -1 for invisible joints."""
    center, scale = published["center"][:, None], published["scale"][:, None, None]
    near = np.round((published["preds"] - center) * CELLS / (UNIT * scale) + CELLS / 2 - 0.5)
    # Pixels may be larger or smaller than cells: look which of the neighbours it is.
    for step in (-1, 0, 1):
        k = near + step
        image = np.trunc((k + 0.5 - CELLS / 2) * UNIT * scale / CELLS + center)
        near = np.where(image == published["preds"], k, near)
    return near.astype(np.int64)


def maps_of(peaks: np.ndarray) -> Tensor:
    """Maps (B, 16, 64, 64) with a lone peak at each cell; all zero where a cell is -1."""
    maps = torch.zeros(*peaks.shape[:2], CELLS, CELLS)
    visible = (peaks >= 0).all(-1)
    b, k = np.nonzero(visible)
    x, y = peaks[visible].T
    maps[b, k, y, x] = 1
    return maps


@pytest.mark.usefixtures("backend")
def test_every_published_coordinate_comes_out(mpii_predictions: dict[str, np.ndarray]) -> None:
    peaks = cells(mpii_predictions)
    invisible = (peaks < 0).all(-1)
    assert ((peaks < 0).any(-1) == invisible).all()
    assert invisible.sum() == 16
    decoded, scores = [], []
    for some in np.array_split(np.arange(len(peaks)), 24):
        center, scale = (mpii_predictions[name][some] for name in ("center", "scale"))
        found, score = hgfast.decode(
            maps_of(peaks[some]), "newell", transform=Transform.mpii(center, scale, truncate=True)
        )
        decoded.append(found.numpy())
        scores.append(score.numpy())
    coords = np.concatenate(decoded)
    assert coords.size == 94_656
    np.testing.assert_array_equal(coords, mpii_predictions["preds"])
    np.testing.assert_array_equal(np.concatenate(scores) == 0, invisible)


def test_pckh_is_as_published(mpii_predictions: dict[str, np.ndarray]) -> None:
    published = mpii_predictions
    annotated = (published["part"] != 0).any(-1)
    annotated[:, PELVIS_AND_THORAX] = False

    def pckh(*joints: int) -> float:
        some = slice(None) if not joints else list(joints)
        arrays = (published["preds"][:, some], published["part"][:, some])
        share = metrics.pckh(*arrays, published["normalize"], valid=annotated[:, some])
        return round(100 * share, 3 if not joints else 2)

    assert pckh() == 88.035
    groups = {
        "head": (9,), "shoulder": (12, 13), "elbow": (11, 14), "wrist": (10, 15), "hip": (2, 3),
        "knee": (1, 4), "ankle": (0, 5),
    }  # fmt: skip
    assert {name: pckh(*joints) for name, joints in groups.items()} == {
        "head": 95.87, "shoulder": 94.68, "elbow": 88.53, "wrist": 83.38, "hip": 87.48,
        "knee": 83.09, "ankle": 79.07,
    }  # fmt: skip
    each = metrics.pckh(
        published["preds"], published["part"], published["normalize"], valid=annotated,
        per_joint=True,
    )  # fmt: skip
    assert round(100 * float(each[9]), 2) == 95.87
    assert np.isnan(each[list(PELVIS_AND_THORAX)]).all()
