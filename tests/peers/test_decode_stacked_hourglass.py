"""The method newell against pytorch-stacked-hourglass, from images to joints."""

from __future__ import annotations

import pytest
import torch
from decode_checks import maps_of
from torch import Tensor, nn

import hgfast
from hgfast import Flip, Transform

_REASON = "needs the peer: pip install --no-deps -r requirements-peers.txt"
pytest.importorskip("stacked_hourglass", reason=_REASON)

from stacked_hourglass import predictor  # noqa: E402
from stacked_hourglass.datasets.mpii import Mpii  # noqa: E402
from stacked_hourglass.utils.evaluation import final_preds_untransformed  # noqa: E402

pytestmark = pytest.mark.usefixtures("backend")

# MPII's joints that change places in a mirror: ankles, knees, hips, wrists, elbows, shoulders.
PAIRS = [(0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13)]
KINDS = ("random", "tied", "flat", "border", "peaked", "tiny", "huge", "negative", "infinite")


class Given(nn.Module):
    """A network that gives these heatmaps, call by call."""

    def __init__(self, *heatmaps: Tensor) -> None:
        super().__init__()
        self.heatmaps = list(heatmaps)
        self.calls: list[Tensor] = []

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.heatmaps[len(self.calls)]
        self.calls.append(images)
        # The peer adds to what it gets.
        return [torch.zeros_like(maps), maps.clone()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (24, 32), (2, 3), (1, 1)])
def test_final_preds_untransformed(kind: str, size: tuple[int, int]) -> None:
    maps = maps_of(kind, 4, 16, *size)
    coords, _ = hgfast.decode(maps, "newell")
    expected = final_preds_untransformed(maps.clone(), size[::-1])
    assert torch.equal(coords, expected)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["peaked", "border", "tied"])
def test_estimate_joints(kind: str, flip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The peer's way of resizing needs an older NumPy; the heatmaps do not depend on it here.
    monkeypatch.setattr(
        predictor, "resize", lambda image, height, width: image.new_zeros(3, height, width)
    )
    maps, mirrored = (maps_of(kind, 3, 16, 64, 64, seed) for seed in (1, 2))
    images = [torch.zeros(3, 256, 256), torch.ones(3, 128, 192), torch.rand(3, 300, 200)]
    network = Given(maps, mirrored)
    peer = predictor.HumanPosePredictor(network, device="cpu")
    expected = peer.estimate_joints(images, flip=flip)
    assert len(network.calls) == 1 + flip

    stride = torch.tensor([[image.shape[-1] / 64, image.shape[-2] / 64] for image in images])
    coords, _ = hgfast.decode(
        [torch.zeros_like(maps), maps],
        "newell",
        flip=Flip(mirrored, PAIRS, shift=False, reduce="mean") if flip else None,
        transform=Transform.affine(nn.functional.pad(torch.diag_embed(stride), (0, 1))),
    )
    assert torch.equal(coords, expected)


def test_pairs_are_the_peer_s() -> None:
    flip = Flip(torch.zeros(1, 16, 8, 8), PAIRS)
    assert flip.joints(16) == list(Mpii.DATA_INFO.hflip_indices)
