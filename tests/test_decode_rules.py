"""hgfast.decode against the rules of published code, written here as loops in NumPy.

For what is not on PyPI: HRNet's and Simple Baselines' ``get_final_preds`` with flipping, the
``HeatmapParser`` of princeton-vl/pytorch_stacked_hourglass, the heads of CenterNet; and integral
regression as the one expression that it is in PyTorch.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from decode_checks import maps_of

import hgfast
from hgfast import Flip, GlobalTopK, Transform

pytestmark = pytest.mark.usefixtures("backend")

KINDS = ("random", "tied", "flat", "border", "peaked", "tiny", "huge", "negative")
SIZES = ((16, 12), (5, 9), (3, 3), (1, 1))
PAIRS = [(1, 2), (3, 4)]


def first_maximum(heatmap: np.ndarray) -> tuple[int, int]:
    """(x, y), the first in row order."""
    height, width = heatmap.shape
    best = (0, 0)
    for y in range(height):
        for x in range(width):
            if heatmap[y, x] > heatmap[best[1], best[0]]:
                best = (x, y)
    return best


# ---- HRNet and Simple Baselines ------------------------------------------------------------------


def get_final_preds(
    maps: np.ndarray, center: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cells and their places in the image, by HRNet's rule."""
    batch, joints, height, width = maps.shape
    places, image = np.zeros((batch, joints, 2)), np.zeros((batch, joints, 2))
    for b in range(batch):
        for k in range(joints):
            heatmap = maps[b, k]
            x, y = first_maximum(heatmap)
            if heatmap[y, x] > 0:
                px, py = math.floor(x + 0.5), math.floor(y + 0.5)
                places[b, k] = x, y
                if 1 < px < width - 1 and 1 < py < height - 1:
                    slopes = [
                        heatmap[py][px + 1] - heatmap[py][px - 1],
                        heatmap[py + 1][px] - heatmap[py - 1][px],
                    ]
                    places[b, k] += np.sign(slopes) * 0.25
            # Its affine map is made of three points: the box's centre, the middle of its upper
            # edge, and the corner that makes a right angle of them. The box has the width of scale
            # in both directions, whatever its height.
            side = scale[b, 0] * 200
            destination = np.array([[width / 2, height / 2], [width / 2, height / 2 - width / 2]])
            source = np.array([center[b], center[b] - [0, side / 2]])
            source, destination = (
                np.vstack([p, p[1] + [-(p[0] - p[1])[1], (p[0] - p[1])[0]]])
                for p in (source, destination)
            )
            matrix = np.linalg.solve(np.c_[destination, np.ones(3)], source)
            image[b, k] = np.append(places[b, k], 1) @ matrix
    return places, image


def flipped_back(maps: np.ndarray, pairs: list[tuple[int, int]], shift: bool) -> np.ndarray:
    """HRNet's flip_back and SHIFT_HEATMAP."""
    back = maps[:, :, :, ::-1].copy()
    for left, right in pairs:
        kept = back[:, left].copy()
        back[:, left] = back[:, right]
        back[:, right] = kept
    if shift:
        back[:, :, :, 1:] = back.copy()[:, :, :, 0:-1]
    return back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_quarter_is_hrnet_s_rule(kind: str, size: tuple[int, int]) -> None:
    maps = maps_of(kind, 3, 5, *size)
    center = np.array([[100.5, 200], [300, 4], [-20, 31]])
    scale = np.array([[1.5, 2], [0.3, 0.4], [2.25, 3]])
    expected, in_image = get_final_preds(maps.numpy(), center, scale)
    coords, scores = hgfast.decode(maps)
    np.testing.assert_array_equal(coords, expected)
    np.testing.assert_array_equal(scores, maps.amax((2, 3)))
    for width_and_height in (scale, scale[:, 0]):
        transform = Transform.coco(center, width_and_height)
        coords, _ = hgfast.decode(maps, transform=transform)
        np.testing.assert_allclose(coords, in_image, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flip_is_hrnet_s_rule(kind: str, shift: bool) -> None:
    maps, other = (maps_of(kind, 3, 5, 16, 12, seed) for seed in (1, 2))
    merged = (maps.numpy() + flipped_back(other.numpy(), PAIRS, shift)) * np.float32(0.5)
    expected, _ = get_final_preds(merged, np.zeros((3, 2)), np.ones((3, 2)))
    coords, scores = hgfast.decode(maps, flip=Flip(other, PAIRS, shift=shift))
    np.testing.assert_array_equal(coords, expected)
    np.testing.assert_array_equal(scores, merged.max((2, 3)))


def test_the_original_hourglass_adds_both() -> None:
    maps, other = (maps_of("peaked", 3, 5, 16, 12, seed) for seed in (1, 2))
    merged = torch.from_numpy(maps.numpy() + flipped_back(other.numpy(), PAIRS, False))
    coords, scores = hgfast.decode(maps, "newell", Flip(other, PAIRS, reduce="sum"))
    expected = hgfast.decode(merged, "newell")
    assert torch.equal(coords, expected[0])
    assert torch.equal(scores, expected[1])


# ---- princeton-vl/pytorch_stacked_hourglass ------------------------------------------------------


def suppressed(heatmap: np.ndarray, window: int = 3) -> np.ndarray:
    """A map in which only those cells keep their value that none around them exceeds."""
    height, width = heatmap.shape
    kept, reach = np.zeros_like(heatmap), window // 2
    for y in range(height):
        for x in range(width):
            around = heatmap[
                max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1
            ]  # fmt: skip
            if heatmap[y, x] == around.max():
                kept[y, x] = heatmap[y, x]
    return kept


def heatmap_parser(heatmap: np.ndarray) -> tuple[float, float]:
    """One joint by the rule of ``HeatmapParser``: suppress, take the highest, adjust."""
    height, width = heatmap.shape
    x, y = first_maximum(suppressed(heatmap))
    if heatmap[y, x] <= 0:
        return x, y
    right, left = heatmap[y, min(x + 1, width - 1)], heatmap[y, max(x - 1, 0)]
    below, above = heatmap[min(y + 1, height - 1), x], heatmap[max(y - 1, 0), x]
    return (
        x + (0.25 if right > left else -0.25) + 0.5,
        y + (0.25 if below > above else -0.25) + 0.5,
    )


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("size", SIZES)
def test_princeton_is_heatmap_parser_s_rule(kind: str, size: tuple[int, int]) -> None:
    maps = maps_of(kind, 3, 5, *size)
    coords, scores = hgfast.decode(maps, "princeton")
    visible = 0
    for b, k in np.ndindex(3, 5):
        if scores[b, k] > 0:
            visible += 1
            assert tuple(coords[b, k].tolist()) == heatmap_parser(maps[b, k].numpy())
    assert visible > 0


def test_princeton_moves_to_the_left_and_up_on_a_tie() -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 3, 5] = 1
    assert hgfast.decode(maps, "princeton")[0].tolist() == [[[5.25, 3.25]]]
    assert heatmap_parser(maps[0, 0].numpy()) == (5.25, 3.25)
    assert hgfast.decode(maps, "newell")[0].tolist() == [[[5.5, 3.5]]]


def test_princeton_marks_an_invisible_joint_instead_of_any_cell() -> None:
    heatmap = torch.full((8, 8), -1.0)
    heatmap[0, 0] = heatmap[2, 5] = -0.5
    # What is suppressed is 0 in the published code, and so higher than what is not.
    assert heatmap_parser(heatmap.numpy()) == (1, 0)
    coords, scores = hgfast.decode(heatmap[None, None], "princeton")
    assert coords.tolist() == [[[0, 0]]]
    assert scores.tolist() == [[-0.5]]


# ---- CenterNet -----------------------------------------------------------------------------------


def centernet(maps: np.ndarray, k: int) -> list[list[tuple[float, int, int, int]]]:
    """(score, class, x, y) of the k highest per image: first per class, then over classes."""
    images = []
    for image in maps:
        found = []
        for c, heatmap in enumerate(image):
            kept = suppressed(heatmap)
            cells = [(y, x) for y, x in np.ndindex(kept.shape) if kept[y, x] > 0]
            cells.sort(key=lambda cell: -kept[cell])  # stable
            found += [(float(kept[y, x]), c, x, y) for y, x in cells[:k]]
        found.sort(key=lambda peak: -peak[0])
        images.append((found + [(0.0, -1, 0, 0)] * k)[:k])
    return images


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_global_topk_is_centernet_s_rule(kind: str, k: int) -> None:
    maps = maps_of(kind, 3, 4, 9, 11)
    coords, scores, of = hgfast.decode(maps, "argmax", topk=GlobalTopK(k))
    assert of.dtype == torch.int64
    for b, expected in enumerate(centernet(maps.numpy(), k)):
        for i, (score, c, x, y) in enumerate(expected):
            assert scores[b, i] == score
            assert coords[b, i].tolist() == [x, y]
            if score:
                assert of[b, i] == c


# ---- integral regression -------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_softargmax_is_the_mean_under_softmax(kind: str, beta: float) -> None:
    maps = maps_of(kind, 3, 5, 16, 12)
    coords, scores = hgfast.decode(maps, "softargmax", beta=beta)
    share = torch.softmax(beta * maps.double().flatten(2), -1).view_as(maps)
    x = (share * torch.arange(12)).sum((2, 3))
    y = (share * torch.arange(16)[:, None]).sum((2, 3))
    expected = torch.stack((x, y), -1)
    expected[maps.amax((2, 3)) == maps.amin((2, 3))] = 0  # invisible
    torch.testing.assert_close(coords.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(scores, maps.amax((2, 3)))
