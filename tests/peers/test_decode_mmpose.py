"""hgfast.decode against mmpose 1.x: its codecs, its flipping, its peaks."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from decode_checks import maps_of
from mmpose_codecs import (
    METHODS,
    STRIDE,
    batch_heatmap_nms,
    blurred,
    cells,
    decoded,
    disagreement,
    flip_heatmaps,
)
from torch import Tensor

import hgfast
from hgfast import Flip, TopK, Transform

pytestmark = pytest.mark.usefixtures("backend")

KINDS = ("random", "tied", "border", "peaked", "tiny", "huge", "negative")
BLURS = (11, 17)  # for networks trained with sigma 2 and 3
SIZE = (6, 17, 24, 32)


@cache
def theirs(kind: str, method: str, blur: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Maps, mmpose's cells and scores; computed once for both backends."""
    if kind == "gaussians":
        maps = gaussians(blur)
    elif kind == "hot":  # around 50, where udp clips
        maps = 60 * maps_of("peaked", *SIZE, seed=3)
    else:
        maps = maps_of(kind, *SIZE, seed=3)
    return maps, *cells(maps, method, blur)


def gaussians(blur: int) -> Tensor:
    """What a trained network gives: a peak of the width that goes with this blur, little noise."""
    batch, joints, height, width = SIZE
    g = torch.Generator().manual_seed(blur)
    places = torch.rand(2, batch, joints, 1, 1, generator=g)
    x, y = 4 + places[0] * (width - 9), 4 + places[1] * (height - 9)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    sigma = {11: 2, 17: 3}[blur]
    peaks = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
    peaks *= 0.3 + 0.7 * torch.rand(batch, joints, 1, 1, generator=g)
    return peaks + 0.005 * torch.randn(SIZE, generator=g)


def ours(maps: Tensor, method: str, blur: int) -> tuple[np.ndarray, np.ndarray]:
    coords, scores = hgfast.decode(maps, method, blur=blur)
    return coords.numpy(), scores.numpy()


@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize("method", METHODS)
def test_peaks_as_networks_give_them(method: str, blur: int) -> None:
    maps, places, _ = theirs("gaussians", method, blur)
    np.testing.assert_allclose(ours(maps, method, blur)[0], places, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_msra_is_equal_on_any_map(kind: str) -> None:
    """Ties, borders and invisible joints too."""
    maps, places, scores = theirs(kind, "msra", 11)
    coords, given_scores = ours(maps, "msra", 11)
    np.testing.assert_array_equal(coords, places)
    np.testing.assert_array_equal(given_scores, scores)


@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize("method", ["dark", "udp"])
@pytest.mark.parametrize("kind", [*KINDS[:-1], "hot"])
def test_newton_steps_on_any_map(kind: str, method: str, blur: int) -> None:
    """As near as mmpose's float32 allows where the map has hardly a peak."""
    maps, places, scores = theirs(kind, method, blur)
    coords, given_scores = ours(maps, method, blur)
    np.testing.assert_array_equal(given_scores, scores)
    bounds = np.array([[disagreement(m, method, blur) for m in image] for image in maps.numpy()])
    visible = scores > 0
    assert visible.sum() > 60
    off = np.abs(coords - places).max(-1)
    assert (off <= bounds)[visible].all()
    # The bound says something about most maps, even of noise; and mostly they are far nearer.
    assert (bounds[visible] < 0.02).mean() > 0.6
    assert np.median(off[visible]) < 1e-5


@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_megvii_on_any_map(kind: str, blur: int) -> None:
    """Equal, save where two blurred values are nearer than the error of their float32 sums."""
    maps, places, scores = theirs(kind, "megvii", blur)
    coords, given_scores = ours(maps, "megvii", blur)
    decided = 0
    for b, k in np.ndindex(scores.shape):
        heatmap = maps[b, k].numpy()
        if heatmap.max() <= 0:
            continue
        values, errors = blurred(heatmap, blur)
        if values.max() < 0:  # then c turns it upside down
            values = -values
        close = 2 * errors.max()
        candidates = np.argwhere(values >= values.max() - close)
        x, y = coords[b, k].astype(int)
        assert [y, x] in candidates.tolist()
        height, width = values.shape
        slopes = [1.0, 1.0]
        if 1 < x < width - 1 and 1 < y < height - 1:
            slopes = [values[y, x + 1] - values[y, x - 1], values[y + 1, x] - values[y - 1, x]]
        if len(candidates) == 1 and min(map(abs, slopes)) > close:
            decided += 1
            np.testing.assert_array_equal(coords[b, k], places[b, k])
        np.testing.assert_allclose(given_scores[b, k], scores[b, k], rtol=1e-6)
    assert decided > 0.8 * scores.size


def test_megvii_turns_a_map_upside_down_that_is_negative_when_blurred() -> None:
    maps = torch.full((1, 1, 16, 16), -1.0)
    maps[0, 0, 5, 6] = 0.25
    maps[0, 0, 10, 9] = -4
    places, scores = cells(maps, "megvii", 11)
    coords, given_scores = ours(maps, "megvii", 11)
    np.testing.assert_array_equal(coords, places)
    np.testing.assert_allclose(given_scores, scores, rtol=1e-6)
    assert np.abs(places[0, 0] - [9, 10]).max() < 2  # the lowest, not the highest


@pytest.mark.parametrize("method", METHODS)
def test_transforms_to_input_pixels(method: str) -> None:
    """mmpose's codecs return input pixels; udp's with cells as points."""
    maps = gaussians(11)
    height, width = maps.shape[2:]
    box = torch.tensor([STRIDE * width, STRIDE * height])
    if method == "udp":
        transform = Transform.udp(center=box / 2, scale=box.expand(len(maps), 2), unit=1)
    else:
        transform = Transform.affine([[1, 0, 0], [0, 1, 0]], stride=STRIDE)
    coords, _ = hgfast.decode(maps, method, transform=transform)
    np.testing.assert_allclose(coords, decoded(maps, method, 11)[0], rtol=0, atol=4e-4)


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("kind", [*KINDS, "flat"])
def test_topk_is_the_best_of_batch_heatmap_nms(kind: str, window: int) -> None:
    maps, k = maps_of(kind, *SIZE, seed=5), 12
    coords, scores = hgfast.decode(maps, "argmax", topk=TopK(k, window))
    suppressed = batch_heatmap_nms(maps, window).flatten(2)
    # torch.topk leaves the order of equals open.
    assert torch.equal(scores, suppressed.topk(k).values.clamp(min=0))
    values, places = suppressed.sort(dim=-1, descending=True, stable=True)
    places = places[..., :k]
    places = torch.stack((places % SIZE[3], places // SIZE[3]), -1).float()
    found = values[..., :k] > 0
    assert torch.equal(coords[found], places[found])
    assert (coords[~found] == 0).all()


@pytest.mark.parametrize("shift", [False, True])
def test_flip(shift: bool) -> None:
    maps, other = (maps_of("peaked", 2, 5, 16, 12, seed) for seed in (0, 1))
    back = flip_heatmaps(other.clone(), [0, 2, 1, 4, 3], shift_heatmap=shift)
    for method in METHODS:
        coords, scores = hgfast.decode(maps, method, Flip(other, [(1, 2), (3, 4)], shift))
        merged = hgfast.decode((maps + back) * 0.5, method)
        assert torch.equal(coords, merged[0])
        assert torch.equal(scores, merged[1])


# ---- where hgfast does otherwise on purpose ------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("method", ["msra", "dark"])
def test_invisible_joints_have_the_same_mark(method: str) -> None:
    for maps in (torch.zeros(1, 2, 8, 8), maps_of("negative", 1, 2, 8, 8)):
        coords, scores = ours(maps, method, 11)
        places, their_scores = cells(maps, method, 11)
        np.testing.assert_array_equal(coords, np.full((1, 2, 2), -1))
        np.testing.assert_array_equal(places, coords)
        np.testing.assert_array_equal(their_scores, scores)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_msra_makes_nan_of_two_neighbours_of_minus_infinity() -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 3, 3:6] = torch.tensor([-torch.inf, 1, -torch.inf])
    maps[0, 0, 4, 4] = 0.5
    x, y = cells(maps, "msra", 11)[0][0, 0]
    assert np.isnan(x)
    assert y == 3.25
    assert ours(maps, "msra", 11)[0].tolist() == [[[4, 3.25]]]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_megvii_scores_a_map_of_zeros_with_nan() -> None:
    places, scores = cells(torch.zeros(1, 1, 8, 8), "megvii", 11)
    assert np.isnan(scores).all()
    assert places.tolist() == [[[0, 0]]]
    coords, given_scores = ours(torch.zeros(1, 1, 8, 8), "megvii", 11)
    assert coords.tolist() == [[[-1, -1]]]
    assert given_scores.tolist() == [[0]]


def test_megvii_scores_invisible_joints_about_a_half() -> None:
    maps = torch.full((1, 1, 8, 8), -2.0)
    maps[0, 0, 4, 4] = -0.5
    places, scores = cells(maps, "megvii", 11)
    coords, given_scores = ours(maps, "megvii", 11)
    np.testing.assert_allclose(scores, 0.5 - 0.5 / 255, rtol=1e-6)
    assert given_scores.tolist() == [[-0.5]]
    assert coords.tolist() == places.tolist() == [[[-1, -1]]]


def test_udp_refines_the_mark_of_an_invisible_joint_with_other_maps() -> None:
    maps = maps_of("peaked", 1, 3, 16, 16, seed=1)
    maps[0, 1] = -1  # invisible
    first, second = maps.clone(), maps.clone()
    second[0, 0] = second[0, 0].flip(0)  # another map, and only that
    changed = [cells(m, "udp", 11)[0][0, 1] for m in (first, second)]
    assert np.abs(changed[0] - changed[1]).max() > 0.01
    for m in (first, second):
        assert ours(m, "udp", 11)[0][0, 1].tolist() == [-1, -1]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_udp_makes_nan_of_a_map_of_zeros() -> None:
    maps = torch.zeros(1, 1, 8, 8)
    assert np.isnan(cells(maps, "udp", 11)[0]).all()
    assert ours(maps, "udp", 11)[0].tolist() == [[[-1, -1]]]
