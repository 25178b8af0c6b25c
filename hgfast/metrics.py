"""How good predicted joints are: PCK, PCKh and OKS, as the benchmarks define them.

Joints are tensors or NumPy arrays, on any device and of any number type; all is computed in float64
on the CPU, and arrays come back as NumPy's.
"""

from __future__ import annotations

from typing import Any, Final, Literal, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["COCO_SIGMAS", "correct", "oks", "pck", "pckh"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: How far human annotators spread on each of COCO's 17 joints, relative to the person's size: nose,
#: then left and right eye, ear, shoulder, elbow, wrist, hip, knee, ankle
#: (cocodataset.org, keypoint evaluation).
COCO_SIGMAS: Final[Floats] = (
    np.repeat([26, 25, 35, 79, 72, 62, 107, 87, 89], [1, 2, 2, 2, 2, 2, 2, 2, 2]) / 1000
)
COCO_SIGMAS.flags.writeable = False


@overload
def pck(
    predicted: Any,
    truth: Any,
    reference_length: Any,
    threshold: float = ...,
    valid: Any = ...,
    *,
    per_joint: Literal[False] = ...,
) -> float: ...


@overload
def pck(
    predicted: Any,
    truth: Any,
    reference_length: Any,
    threshold: float = ...,
    valid: Any = ...,
    *,
    per_joint: Literal[True],
) -> Floats: ...


def pck(
    predicted: Any,
    truth: Any,
    reference_length: Any,
    threshold: float = 0.2,
    valid: Any = None,
    *,
    per_joint: bool = False,
) -> float | Floats:
    """Percentage of correct keypoints, as a share 0..1.

    The share of valid joints for which ``|predicted - truth| <= threshold * reference_length``. The
    joints of all persons are pooled, so one with many valid joints counts more; for a group of
    joints, give those: ``pck(predicted[:, knees], truth[:, knees], ...)``.

    Sapp and Taskar, "MODEC" (CVPR 2013), with the torso for length (left shoulder to right hip).

    Args:
        predicted: (N, K, 2), in the units of ``truth``. One with a NaN is not correct.
        truth: (N, K, 2).
        reference_length: of each person, (N,), or one number for all; in the same units.
        threshold: the share of that length that a prediction may be off.
        valid: (N, K), bool, or numbers like COCO's visibility, of which positive ones count. The
            others are left out, whatever ``truth`` says there. By default all joints count.
        per_joint: return each joint's share over the persons instead.

    Returns:
        A float, or with ``per_joint`` (K,), float64. NaN where no joint is valid.

    Raises:
        ValueError: another shape; truth that is not finite or a length that is not positive, where
            a joint is valid; a threshold that is not positive.
    """
    length = ("reference_length", reference_length)
    return _share("pck", predicted, truth, length, threshold, valid, per_joint)


@overload
def pckh(
    predicted: Any,
    truth: Any,
    head_length: Any,
    threshold: float = ...,
    valid: Any = ...,
    *,
    per_joint: Literal[False] = ...,
) -> float: ...


@overload
def pckh(
    predicted: Any,
    truth: Any,
    head_length: Any,
    threshold: float = ...,
    valid: Any = ...,
    *,
    per_joint: Literal[True],
) -> Floats: ...


def pckh(
    predicted: Any,
    truth: Any,
    head_length: Any,
    threshold: float = 0.5,
    valid: Any = None,
    *,
    per_joint: bool = False,
) -> float | Floats:
    """PCK relative to the head's length, MPII's measure: :func:`pck` with a threshold of 0.5.

    MPII takes 0.6 times the diagonal of the annotated head box for ``head_length``, and leaves
    pelvis and thorax, joints 6 and 7, out of the mean. Andriluka et al., "2D Human Pose Estimation:
    New Benchmark and State of the Art Analysis" (CVPR 2014).

    Arguments, results and errors are those of :func:`pck`.
    """
    length = ("head_length", head_length)
    return _share("pckh", predicted, truth, length, threshold, valid, per_joint)


def correct(
    predicted: Any, truth: Any, reference_length: Any, threshold: float = 0.2
) -> NDArray[np.bool_]:
    """Which joints are correct by the rule of :func:`pck`: (N, K) bool.

    Arguments and errors are those of :func:`pck`, with all joints valid, except that where
    ``truth`` has a NaN nothing is correct.
    """
    counted = _valid(None, truth, "correct") & _finite(_numbers(truth))
    length = ("reference_length", reference_length)
    return _correct("correct", predicted, truth, length, threshold, counted)


def oks(
    predicted: Any,
    truth: Any,
    area: Any,
    valid: Any,
    sigmas: Any = COCO_SIGMAS,
    *,
    per_joint: bool = False,
) -> Floats:
    """Object keypoint similarity of each person, 0..1, COCO's measure.

    The mean over the person's valid joints of::

        exp(-|predicted - truth|^2 / (2 (2 sigma)^2 (area + eps))),  eps = 2^-52

    as in COCO's own code (pycocotools, ``COCOeval.computeOks``), which adds eps too.

    Args:
        predicted: (N, K, 2), in pixels. One with a NaN has similarity 0.
        truth: (N, K, 2), in pixels; in COCO's annotations the first two of three.
        area: of each person's segment, (N,), in square pixels.
        valid: (N, K), bool or COCO's visibility, of which positive ones count. ``truth`` may be
            anything elsewhere.
        sigmas: (K,), the spread of each joint.
        per_joint: return each joint's similarity instead of their mean.

    Returns:
        (N,), or with ``per_joint`` (N, K); float64. NaN for a person, or a joint, that has nothing
        valid, so that ``numpy.nanmean`` leaves it out. (pycocotools then measures the distance from
        the person's box, to tell which predictions to ignore; it enters no score.)

    Raises:
        ValueError: another shape; truth that is not finite or an area that is negative, where a
            joint is valid; a sigma that is not positive.
    """
    counted = _valid(valid, truth, "oks")
    squared = _distance(predicted, truth, counted, "oks") ** 2
    areas = _per_person(area, counted, "oks", "area")
    used = areas[counted.any(1)]
    if not ((used >= 0) & np.isfinite(used)).all():
        raise ValueError("oks expects a finite area of at least 0 for each person")
    spreads = _numbers(sigmas)
    if spreads.shape != counted.shape[1:] or not (spreads > 0).all():
        raise ValueError(
            f"oks expects positive sigmas of shape {counted.shape[1:]}, one for each joint, "
            f"got shape {spreads.shape}" + (f", least {spreads.min()}" if spreads.size else "")
        )
    scale = 2 * (2 * spreads) ** 2 * (np.where(counted.any(1), areas, 1) + np.spacing(1))[:, None]
    similarity = np.exp(-squared / scale)
    if per_joint:
        return np.where(counted, similarity, np.nan)
    return _ratio(np.where(counted, similarity, 0).sum(1), counted.sum(1))


def _share(
    name: str,
    predicted: Any,
    truth: Any,
    length: tuple[str, Any],
    threshold: float,
    valid: Any,
    per_joint: bool,
) -> float | Floats:
    counted = _valid(valid, truth, name)
    found = _correct(name, predicted, truth, length, threshold, counted)
    if per_joint:
        return _ratio(found.sum(0), counted.sum(0))
    return float(_ratio(found.sum(), counted.sum()))


def _correct(
    name: str,
    predicted: Any,
    truth: Any,
    length: tuple[str, Any],
    threshold: float,
    counted: Bools,
) -> Bools:
    if not threshold > 0:
        raise ValueError(f"{name} expects a positive threshold, got {threshold!r}")
    distance = _distance(predicted, truth, counted, name)
    lengths = _per_person(length[1], counted, name, length[0])
    used = lengths[counted.any(1)]
    if not ((used > 0) & np.isfinite(used)).all():
        raise ValueError(f"{name} expects a positive {length[0]} for each person")
    return np.asarray((distance <= threshold * lengths[:, None]) & counted)


def _distance(predicted: Any, truth: Any, counted: Bools, name: str) -> Floats:
    """|predicted - truth|, (N, K); infinite where either has a NaN."""
    places, target = _numbers(predicted), _numbers(truth)
    if places.shape != target.shape:
        raise ValueError(
            f"{name} expects predicted of the shape of truth, {target.shape}, got {places.shape}"
        )
    if not _finite(target)[counted].all():
        raise ValueError(f"{name} expects finite truth where joints are valid")
    distance = np.linalg.norm(places - np.where(counted[..., None], target, 0), axis=-1)
    return np.where(np.isnan(distance), np.inf, distance)


def _valid(valid: Any, truth: Any, name: str) -> Bools:
    shape = _numbers(truth).shape
    if len(shape) != 3 or shape[2] != 2:
        raise ValueError(f"{name} expects truth (persons, joints, 2), got shape {shape}")
    if valid is None:
        return np.ones(shape[:2], np.bool_)
    counted = _numbers(valid)
    if counted.shape != shape[:2]:
        raise ValueError(f"{name} expects valid of shape {shape[:2]}, got {counted.shape}")
    return np.asarray(counted > 0)


def _per_person(values: Any, counted: Bools, name: str, what: str) -> Floats:
    numbers = _numbers(values)
    if numbers.shape not in ((), counted.shape[:1]):
        raise ValueError(
            f"{name} expects {what} of shape {counted.shape[:1]}, one for each person, "
            f"got {numbers.shape}"
        )
    return np.broadcast_to(numbers, counted.shape[:1])


def _finite(places: Floats) -> Bools:
    return np.asarray(np.isfinite(places).all(-1))


def _ratio(part: Any, whole: Any) -> Floats:
    return np.asarray(np.where(whole > 0, part / np.maximum(whole, 1), np.nan), np.float64)


def _numbers(values: Any) -> Floats:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, np.float64)
