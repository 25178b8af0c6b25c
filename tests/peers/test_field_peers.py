"""The public networks themselves, at their true size: whole, and as right as verify asks.

tests/test_field.py has replicas of them, small, at all precisions and sizes. Here it is shown that
the replicas are like what people have, on one common and one odd size.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import randomise
from peer_packages import REASON, fan, mmpose_backbone, timm_hrnet
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hgfast
from hgfast import _native
from hgfast.region import regions_of

pytestmark = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))


@dataclass(frozen=True)
class Peer:
    """A builder, images (H, W), and how many blocks of each kind must be found.

    Where a network rounds odd sizes up on its way down, the last image has them.
    """

    build: Callable[[], nn.Module]
    sizes: tuple[tuple[int, int], ...]
    blocks: dict[str, int]


def hg(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        peer = pytest.importorskip("stacked_hourglass", reason=REASON)
        model: nn.Module = getattr(peer, name)(pretrained=False)
        return model

    return build


def mmpose(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: mmpose_backbone(module, name)(**options)


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(timm_hrnet(), name)(**options)


def branches(widths: tuple[int, ...], block: str) -> dict[str, Any]:
    """One stage of HRNet in mmpose's words."""
    return {
        "num_branches": len(widths),
        "block": block,
        "num_blocks": (4,) * len(widths),
        "num_channels": widths,
    }


HRNET_W32 = {
    "stage1": {"num_modules": 1, **branches((64,), "BOTTLENECK")},
    "stage2": {"num_modules": 1, **branches((32, 64), "BASIC")},
    "stage3": {"num_modules": 4, **branches((32, 64, 128), "BASIC")},
    "stage4": {"num_modules": 3, **branches((32, 64, 128, 256), "BASIC")},
}
# Two layers of stride 2 round up: 255 becomes 64, 127 becomes 32, 93 becomes 24.
HOURGLASS = (128, 64), (255, 127)
HRNET = (128, 96), (127, 93)
# Blocks by modules by branches, of the last three stages.
HRNET_BASIC = 4 * (1 * 2 + 4 * 3 + 3 * 4)

PEERS = {
    "hg1": Peer(hg("hg1"), HOURGLASS, {"hourglass": 1, "bottleneck": 3 + 14}),
    "hg2": Peer(hg("hg2"), HOURGLASS, {"hourglass": 2, "bottleneck": 3 + 2 * 14}),
    "hg8": Peer(hg("hg8"), ((64, 64),), {"hourglass": 8, "bottleneck": 3 + 8 * 14}),
    "FAN-1": Peer(lambda: fan()(1), HOURGLASS, {"hourglass": 1, "multi-scale block": 3 + 14}),
    "FAN-4": Peer(lambda: fan()(4), ((64, 64),), {"hourglass": 4, "multi-scale block": 3 + 56}),
    "mmpose HG-52": Peer(
        mmpose("hourglass", "HourglassNet", num_stacks=1),
        ((128, 128), (127, 255)),
        {"hourglass": 1, "basic block": 1 + 34},
    ),
    "mmpose HRNet-W32": Peer(
        mmpose("hrnet", "HRNet", extra=HRNET_W32),
        HRNET,
        {"bottleneck x4": 4, "basic block": HRNET_BASIC},
    ),
    "mmpose ResNet-50": Peer(
        mmpose("resnet", "ResNet", depth=50), ((128, 96), (93, 61)), {"bottleneck x4": 16}
    ),
    "timm HRNet-W18, features": Peer(
        timm("hrnet_w18", features_only=True),
        HRNET,
        {"basic block": HRNET_BASIC},
    ),
    "timm HRNet-W18": Peer(timm("hrnet_w18"), ((96, 96),), {"basic block": HRNET_BASIC}),
    "timm HRNet-W32": Peer(timm("hrnet_w32"), ((96, 96),), {"basic block": HRNET_BASIC}),
}


@pytest.fixture(autouse=True)
def _no_silent_fallback() -> Iterator[None]:
    """A warning is an error, so that no test passes because eager ran unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", hgfast.HgfastWarning)
        yield


def image(size: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("name", PEERS)
def test_public_network(name: str, precision: str) -> None:
    peer = PEERS[name]
    torch.manual_seed(0)
    model = peer.build()
    randomise(model)
    model.eval()  # on a line of its own: mmpose's eval() returns nothing
    before = {key: value.clone() for key, value in model.state_dict().items()}

    fast = hgfast.optimize(model, precision)
    assert [region.name for region in regions_of(fast)] == [""], str(hgfast.report(fast))
    kinds = Counter(block.kind for block in regions_of(fast)[0].plan.blocks)
    assert {kind: kinds[kind] for kind in peer.blocks} == peer.blocks, str(kinds)
    state = fast.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[key], value) for key, value in before.items())

    for seed, size in enumerate(peer.sizes):
        x = image(size, seed)
        verification = hgfast.verify(model, fast, x)
        assert verification.ok, f"\n{size}\n{verification}"
        with torch.inference_mode():
            ours = pytree.tree_structure(fast(x))
            assert ours == pytree.tree_structure(model(x))
    assert not hgfast.report(fast).fallbacks
