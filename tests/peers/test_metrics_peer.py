"""hgfast.metrics.oks against COCO's own code, run on constructed annotations."""

from __future__ import annotations

import numpy as np
import pytest

from hgfast import metrics

_REASON = "needs the peer: pip install --no-deps -r requirements-peers.txt"
pytest.importorskip("pycocotools", reason=_REASON)

from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval, Params  # noqa: E402

PERSONS, JOINTS = 40, 17


def coco(dataset: dict[str, list[dict[str, object]]]) -> COCO:
    made = COCO()
    made.dataset = dataset
    made.createIndex()
    return made


def similarities(
    predicted: np.ndarray, truth: np.ndarray, visibility: np.ndarray, area: np.ndarray
) -> np.ndarray:
    """``COCOeval.computeOks``, one person per image."""
    images = [{"id": n + 1} for n in range(PERSONS)]
    categories = [{"id": 1, "name": "person"}]

    def annotations(places: np.ndarray) -> list[dict[str, object]]:
        joints = np.concatenate([places, visibility[..., None]], -1).reshape(PERSONS, -1)
        return [
            {
                "id": n + 1, "image_id": n + 1, "category_id": 1, "keypoints": joints[n].tolist(),
                "num_keypoints": int((visibility[n] > 0).sum()), "bbox": [0, 0, 100, 100],
                "area": float(area[n]), "iscrowd": 0, "score": 1.0,
            }
            for n in range(PERSONS)
        ]  # fmt: skip

    truths, results = (
        coco({"images": images, "categories": categories, "annotations": annotations(places)})
        for places in (truth, predicted)
    )
    evaluation = COCOeval(truths, results, "keypoints")
    evaluation._prepare()
    return np.array([evaluation.computeOks(n + 1, 1)[0, 0] for n in range(PERSONS)])


def test_oks_is_coco_s() -> None:
    g = np.random.default_rng(0)
    truth = g.integers(0, 200, (PERSONS, JOINTS, 2)).astype(float)
    predicted = truth + g.normal(0, 1, truth.shape) * g.choice([0, 1, 5, 20], (PERSONS, JOINTS, 1))
    visibility = g.integers(0, 3, (PERSONS, JOINTS))
    visibility[:, 3] = 1  # somebody without annotations is the next test
    area = g.uniform(10, 20000, PERSONS)
    area[:3] = 0, 1e-12, 1e-3  # where the eps matters
    predicted[:3] = truth[:3] + 1e-8
    expected = similarities(predicted, truth, visibility, area)
    assert 0.1 < expected[3:].mean() < 0.9
    assert expected[0] < expected[2]
    found = metrics.oks(predicted, truth, area, visibility)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_persons_without_annotations_are_nan_where_coco_measures_from_the_box() -> None:
    truth = np.full((PERSONS, JOINTS, 2), 50.0)
    nothing, area = np.zeros((PERSONS, JOINTS)), np.full(PERSONS, 1000.0)
    inside, outside = (similarities(truth + off, truth, nothing, area) for off in (0, 1000))
    assert (inside == 1).all()
    assert (outside < 1e-6).all()
    assert np.isnan(metrics.oks(truth, truth, area, nothing)).all()


def test_sigmas_are_coco_s() -> None:
    sigmas = Params("keypoints").kpt_oks_sigmas  # written as .26 / 10
    np.testing.assert_allclose(metrics.COCO_SIGMAS, sigmas, rtol=1e-15)
