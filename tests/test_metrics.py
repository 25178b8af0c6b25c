"""hgfast.metrics: by hand, against loops over persons and joints, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hgfast import metrics

NAN = math.nan

# Two persons with three joints; off by 0, 3, 5 and 1, 10, 10 pixels.
TRUTH = np.array([[[10, 10], [20, 20], [30, 30]], [[0, 0], [0, 0], [50, 50]]], np.float64)
PREDICTED = TRUTH + np.array([[[0, 0], [0, 3], [3, 4]], [[1, 0], [6, 8], [-10, 0]]])


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "threshold", "expected", "per_joint"),
    [
        (10, 0.2, 2 / 6, [1, 0, 0]),
        (10, 0.3, 3 / 6, [1, 0.5, 0]),  # the bound itself counts
        (10, 0.29, 2 / 6, [1, 0, 0]),
        ([10, 20], 0.5, 6 / 6, [1, 1, 1]),
        ([20, 10], 0.25, 4 / 6, [1, 0.5, 0.5]),
    ],
)
def test_pck_by_hand(length: Any, threshold: float, expected: float, per_joint: Any) -> None:
    assert metrics.pck(PREDICTED, TRUTH, length, threshold) == pytest.approx(expected)
    each = metrics.pck(PREDICTED, TRUTH, length, threshold, per_joint=True)
    assert each.tolist() == per_joint


def test_thresholds_of_the_benchmarks() -> None:
    # 0.2 of 15 pixels finds what is off by 3, 0.5 of them what is off by 5 too.
    assert metrics.pck(PREDICTED, TRUTH, 15) == 3 / 6
    assert metrics.pckh(PREDICTED, TRUTH, 15) == 4 / 6
    assert metrics.pckh(PREDICTED, TRUTH, 15, 0.2) == 3 / 6
    assert metrics.pckh(PREDICTED, TRUTH, 15, per_joint=True).tolist() == [1, 0.5, 0.5]


def test_joints_that_are_not_valid_do_not_count() -> None:
    valid = np.array([[1, 1, 0], [2, 0, 0]])  # as COCO's visibility
    truth = TRUTH.copy()
    truth[valid == 0] = NAN
    for given_valid in (valid, valid > 0, torch.from_numpy(valid)):
        assert metrics.pck(PREDICTED, truth, 10, 0.2, given_valid) == pytest.approx(2 / 3)
        each = metrics.pck(PREDICTED, truth, 10, 0.2, given_valid, per_joint=True)
        np.testing.assert_array_equal(each, [1, 0, NAN])
    # A person without valid joints needs no length.
    lengths, nobody = np.array([10, NAN]), np.array([[1, 1, 1], [0, 0, 0]])
    assert metrics.pck(PREDICTED, TRUTH, lengths, 0.3, nobody) == pytest.approx(2 / 3)


def test_nothing_valid_is_nan() -> None:
    nothing = np.zeros((2, 3), bool)
    assert math.isnan(metrics.pck(PREDICTED, TRUTH, 10, valid=nothing))
    assert math.isnan(metrics.pckh(PREDICTED[:0], TRUTH[:0], np.zeros(0)))
    assert (
        np.isnan(metrics.oks(PREDICTED, TRUTH, [100, 100], nothing, np.ones(3))).tolist()
        == [True] * 2
    )
    assert metrics.oks(PREDICTED[:0], TRUTH[:0], [], nothing[:0], np.ones(3)).shape == (0,)


def test_a_missing_prediction_is_wrong() -> None:
    predicted = PREDICTED.copy()
    predicted[0, 0, 1] = NAN
    assert metrics.pck(predicted, TRUTH, 1000) == 5 / 6
    assert metrics.correct(predicted, TRUTH, 1000).sum() == 5
    similarity = metrics.oks(predicted, TRUTH, 1e30, TRUTH[..., 0] >= 0, np.ones(3))
    np.testing.assert_allclose(similarity, [2 / 3, 1])


def test_correct_by_hand() -> None:
    found = metrics.correct(PREDICTED, TRUTH, [10, 20], 0.3)
    assert found.dtype == np.bool_
    assert found.tolist() == [[True, True, False], [True, False, False]]
    truth = np.where(np.arange(2)[:, None, None] == 0, TRUTH, NAN)
    assert metrics.correct(PREDICTED, truth, 10, 0.3).tolist() == [[True, True, False], [False] * 3]


def test_oks_by_hand() -> None:
    # With sigma 1/2 and area 50 the exponent is -d^2 / 100.
    sigmas = [0.5, 0.5, 0.5]
    every = np.ones((2, 3))
    each = np.exp(-np.array([[0, 9, 25], [1, 100, 100]]) / 100)
    np.testing.assert_allclose(metrics.oks(PREDICTED, TRUTH, 50, every, sigmas), each.mean(1))
    given_each = metrics.oks(PREDICTED, TRUTH, [50, 50], every, sigmas, per_joint=True)
    np.testing.assert_allclose(given_each, each)
    some = np.array([[2, 1, 0], [0, 0, 0]])
    found = metrics.oks(PREDICTED, TRUTH, [50, NAN], some, sigmas)
    np.testing.assert_allclose(found, [each[0, :2].mean(), NAN])
    found = metrics.oks(PREDICTED, TRUTH, 50, some, sigmas, per_joint=True)
    np.testing.assert_array_equal(np.isnan(found), some == 0)
    # Four times the area is twice the distance.
    near = metrics.oks(TRUTH + 1, TRUTH, 50, every, sigmas)
    np.testing.assert_allclose(metrics.oks(TRUTH + 2, TRUTH, 200, every, sigmas), near)


def test_a_person_without_area() -> None:
    """eps keeps it from dividing by zero: right is 1, everything else 0."""
    found = metrics.oks(PREDICTED, TRUTH, 0, np.ones((2, 3)), np.ones(3), per_joint=True)
    assert found.tolist() == [[1, 0, 0], [0, 0, 0]]


def test_sigmas_of_coco() -> None:
    assert metrics.COCO_SIGMAS.shape == (17,)
    assert metrics.COCO_SIGMAS[[0, 1, 2, 9, 10, 15, 16]].tolist() == [
        0.026, 0.025, 0.025, 0.062, 0.062, 0.089, 0.089,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="read-only"):
        metrics.COCO_SIGMAS[0] = 1


@pytest.mark.parametrize("kind", ["float32", "float16", "int", "lists", "tensors", "gradients"])
def test_whatever_numbers_come_in(kind: str) -> None:
    convert: dict[str, Any] = {
        "float32": lambda a: a.astype(np.float32),
        "float16": lambda a: a.astype(np.float16),
        "int": lambda a: a.astype(int),
        "lists": lambda a: a.tolist(),
        "tensors": lambda a: torch.from_numpy(a).to(torch.bfloat16),
        "gradients": lambda a: torch.from_numpy(a).requires_grad_(),
    }
    predicted, truth = convert[kind](PREDICTED), convert[kind](TRUTH)
    assert metrics.pck(predicted, truth, torch.tensor([10.0, 10.0]), 0.3) == 0.5
    similarity = metrics.oks(predicted, truth, torch.tensor(50), np.ones((2, 3)), np.full(3, 0.5))
    assert similarity.dtype == np.float64
    expected = metrics.oks(PREDICTED, TRUTH, 50, np.ones((2, 3)), np.full(3, 0.5))
    np.testing.assert_array_equal(similarity, expected)


# ---- against loops -------------------------------------------------------------------------------

people = st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 2**20))


def drawn(persons: int, joints: int, seed: int) -> tuple[np.ndarray, ...]:
    g = np.random.default_rng(seed)
    truth = g.uniform(0, 100, (persons, joints, 2))
    predicted = truth + g.normal(0, 10, truth.shape) * g.choice([0, 1], truth.shape)
    valid = g.integers(0, 3, (persons, joints))
    return predicted, truth, g.uniform(1, 60, persons), valid


@given(people, st.sampled_from([0.1, 0.2, 0.5]))
def test_pck_is_its_loop(size: tuple[int, int, int], threshold: float) -> None:
    predicted, truth, length, valid = drawn(*size)
    right = [[0, 0] for _ in range(size[1])]
    for n in range(size[0]):
        for k in range(size[1]):
            if valid[n, k]:
                off = math.dist(predicted[n, k], truth[n, k])
                right[k][0] += off <= threshold * length[n]
                right[k][1] += 1
    each = [hit / of if of else NAN for hit, of in right]
    hits, total = (sum(pair[i] for pair in right) for i in (0, 1))
    given_each = metrics.pck(predicted, truth, length, threshold, valid, per_joint=True)
    np.testing.assert_array_equal(given_each, each)
    overall = metrics.pckh(predicted, truth, length, threshold, valid)
    np.testing.assert_array_equal(overall, hits / total if total else NAN)


@given(people)
def test_oks_is_its_loop(size: tuple[int, int, int]) -> None:
    predicted, truth, length, valid = drawn(*size)
    area, sigmas = length**2, np.linspace(0.02, 0.1, size[1])
    expected = []
    for n in range(size[0]):
        similarities = [
            math.exp(-(math.dist(predicted[n, k], truth[n, k]) ** 2) / (8 * sigma**2 * area[n]))
            for k, sigma in enumerate(sigmas)
            if valid[n, k]
        ]
        expected.append(sum(similarities) / len(similarities) if similarities else NAN)
    np.testing.assert_allclose(metrics.oks(predicted, truth, area, valid, sigmas), expected, 1e-12)


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [metrics.pck, metrics.pckh, metrics.correct])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRUTH[0], TRUTH[0], 10), r"truth \(persons, joints, 2\), got shape \(3, 2\)"),
        ((np.zeros((2, 3, 3)), np.zeros((2, 3, 3)), 10), r"got shape \(2, 3, 3\)"),
        ((TRUTH[:, :2], TRUTH, 10), r"shape of truth, \(2, 3, 2\), got \(2, 2, 2\)"),
        ((TRUTH, TRUTH, [1, 2, 3]), r"length of shape \(2,\), one for each person, got \(3,\)"),
        ((TRUTH, TRUTH, [[1], [2]]), r"length of shape \(2,\), .* got \(2, 1\)"),
        ((TRUTH, TRUTH, [1, 0]), "positive [a-z]*_length for each person"),
        ((TRUTH, TRUTH, NAN), "positive [a-z]*_length for each person"),
        ((TRUTH, TRUTH, 1, 0), "positive threshold, got 0"),
        ((TRUTH, TRUTH, 1, NAN), "positive threshold, got nan"),
    ],
)
def test_pck_refuses(measure: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{measure.__name__} expects .*{message}"):
        measure(*arguments)


def test_the_length_has_the_name_of_the_argument() -> None:
    with pytest.raises(ValueError, match="pckh expects a positive head_length"):
        metrics.pckh(TRUTH, TRUTH, -1)
    with pytest.raises(ValueError, match="pck expects a positive reference_length"):
        metrics.pck(TRUTH, TRUTH, -1)


@pytest.mark.parametrize(
    ("valid", "truth", "message"),
    [
        (np.ones((2, 2)), TRUTH, r"valid of shape \(2, 3\), got \(2, 2\)"),
        (np.ones(3), TRUTH, r"valid of shape \(2, 3\), got \(3,\)"),
        (np.ones((2, 3)), TRUTH * [NAN, 1], "finite truth where joints are valid"),
        (None, np.where(TRUTH == 50, math.inf, TRUTH), "finite truth where joints are valid"),
    ],
)
def test_valid_and_truth_belong_together(valid: Any, truth: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"pck expects {message}"):
        metrics.pck(TRUTH, truth, 1, valid=valid)
    with pytest.raises(ValueError, match=f"oks expects {message}"):
        metrics.oks(TRUTH, truth, 1, np.ones((2, 3)) if valid is None else valid, np.ones(3))


@pytest.mark.parametrize(
    ("area", "sigmas", "message"),
    [
        ([1, 2, 3], np.ones(3), r"area of shape \(2,\), one for each person, got \(3,\)"),
        ([1, -1], np.ones(3), "finite area of at least 0 for each person"),
        (NAN, np.ones(3), "finite area of at least 0 for each person"),
        (1, metrics.COCO_SIGMAS, r"sigmas of shape \(3,\), one for each joint, got shape \(17,\)"),
        (1, [1, 1, 0], "positive sigmas .* least 0"),
    ],
)
def test_oks_refuses(area: Any, sigmas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"oks expects .*{message}"):
        metrics.oks(TRUTH, TRUTH, area, np.ones((2, 3)), sigmas)
