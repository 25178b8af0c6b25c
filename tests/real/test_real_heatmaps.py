"""Decoding held against ground truth: heatmaps that trained networks gave on photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import hgfast
from hgfast import Transform, metrics

pytestmark = pytest.mark.usefixtures("backend")

NETWORKS = ("coco", "mpii_hourglass", "mpii_efficientpose")
CROP_PIXELS_PER_CELL = 4

# The joints of the small MPII networks in the order of MPII's annotations.
HOURGLASS_JOINTS = [9, 8, 12, 11, 10, 13, 14, 15, 2, 1, 0, 3, 4, 5]
EFFICIENTPOSE_JOINTS = [9, 8, 12, 11, 10, 7, 13, 14, 15, 6, 2, 1, 0, 3, 4, 5]


def on_coco(real: dict[str, np.ndarray], method: str, **options: float) -> tuple[float, Tensor]:
    """Mean OKS of the persons, and the scores."""
    matrix = real["coco_affine"].reshape(-1, 2, 3)
    coords, scores = hgfast.decode(
        torch.from_numpy(real["coco_heatmaps"]),
        method,
        transform=Transform.affine(matrix, stride=CROP_PIXELS_PER_CELL),
        **options,
    )
    truth = real["coco_gt"]
    similarity = metrics.oks(coords, truth[..., :2], real["coco_area"], truth[..., 2])
    return float(similarity.mean()), scores


def test_quarter_reaches_the_known_accuracy(real_heatmaps: dict[str, np.ndarray]) -> None:
    similarity, scores = on_coco(real_heatmaps, "quarter")
    assert round(similarity, 3) == 0.792
    assert torch.equal(scores, torch.from_numpy(real_heatmaps["coco_heatmaps"]).amax((2, 3)))


def test_the_quarter_is_worth_having(real_heatmaps: dict[str, np.ndarray]) -> None:
    assert on_coco(real_heatmaps, "quarter")[0] > on_coco(real_heatmaps, "argmax")[0] + 0.01


def test_a_newton_step_is_worth_more(real_heatmaps: dict[str, np.ndarray]) -> None:
    quarter, _ = on_coco(real_heatmaps, "quarter")
    for method in ("dark", "udp"):
        assert on_coco(real_heatmaps, method)[0] > quarter + 0.005


def test_half_a_cell_belongs_to_some_networks_only(real_heatmaps: dict[str, np.ndarray]) -> None:
    """As docs/decoding.md says: the wrong convention costs more than a better method gains."""
    right, wrong, plain, best = (
        on_coco(real_heatmaps, method)[0] for method in ("quarter", "newell", "argmax", "dark")
    )
    assert wrong < right - 0.03
    assert 0.02 < best - plain < right - wrong
    right, wrong = (
        on_mpii(real_heatmaps, "mpii_efficientpose", method) for method in ("newell", "quarter")
    )
    assert wrong < right - 0.1


def test_softargmax_wants_the_beta_of_its_network(real_heatmaps: dict[str, np.ndarray]) -> None:
    """As docs/decoding.md says: on heatmaps between 0 and 1 a beta of 1 is far off."""
    found = [on_coco(real_heatmaps, "softargmax", beta=beta)[0] for beta in (1.0, 20.0, 50.0)]
    assert found[0] < 0.15
    assert found[1] > 0.75
    assert found[2] > 0.78


def on_mpii(real: dict[str, np.ndarray], network: str, method: str) -> float:
    """PCKh@0.5 over the joints that are annotated as visible."""
    joints, stride = {
        "mpii_hourglass": (HOURGLASS_JOINTS, 4),
        "mpii_efficientpose": (EFFICIENTPOSE_JOINTS, 8),
    }[network]
    transform = Transform.affine(real[f"{network}_affine"].reshape(-1, 2, 3), stride=stride)
    maps = torch.from_numpy(real[f"{network}_heatmaps"])
    coords, _ = hgfast.decode(maps, method, transform=transform)
    truth, valid = real["mpii_gt"][:, joints], real["mpii_vis"][:, joints]
    return metrics.pckh(coords, truth, real["mpii_normalize"], valid=valid)


@pytest.mark.parametrize("blur", [11, 17])
@pytest.mark.parametrize("method", ["msra", "dark", "udp", "megvii"])
@pytest.mark.parametrize("network", NETWORKS)
def test_mmpose_decodes_the_same(
    network: str, method: str, blur: int, real_heatmaps: dict[str, np.ndarray]
) -> None:
    """Within 1e-4 cells on all maps of all three networks; none needs another bound."""
    peer = pytest.importorskip("mmpose_codecs")
    maps = torch.from_numpy(real_heatmaps[f"{network}_heatmaps"])
    coords, scores = hgfast.decode(maps, method, blur=blur)
    expected, expected_scores = peer.cells(maps, method, blur)
    tolerance = 0 if method in ("msra", "megvii") else 1e-4
    np.testing.assert_allclose(coords, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)
