"""The networks of the field as structural replicas, small and at their true size.

Each module is one family, in the style in which its public code is written: that is what a tracer
meets. `FIELD` names them all; `variants` and `strangers` go beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import bearpaw, cornernet, cpn, dilated, fan, hrnet, mmpose_hourglass, newell, princeton
from .simple_baseline import BasicBlock, Bottleneck, PoseResNet

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        build_small: runs in milliseconds.
        build_full: the size that people train.
        shapes: inputs of the small one. The last has an odd height and width.
        blocks: how many blocks of each kind the small one has, by the names of the report.
        whole: the entire network must become one region.
        full_shape: an input of the full one.
        wrong: an input of the small one that eager refuses; None where it takes any.
    """

    name: str
    build_small: Callable[[], nn.Module]
    build_full: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    blocks: dict[str, int] = field(default_factory=dict)
    whole: bool = True
    full_shape: Shape = (1, 3, 256, 256)
    wrong: Shape | None = None


# 31 and 47 become 8 and 12 behind a stem that rounds up twice.
_HOURGLASS = ((1, 3, 32, 32), (2, 3, 48, 64), (1, 3, 31, 47))
_NHWC = ((1, 32, 32, 3), (2, 48, 64, 3), (1, 31, 47, 3))
_ANY = ((1, 3, 64, 64), (2, 3, 64, 48), (1, 3, 45, 37))
_WRONG = (1, 3, 40, 40)

_SMALL = {"stacks": 2, "features": 32, "depth": 2, "joints": 5}
_AE = {"stacks": 2, "features": 16, "depth": 2, "channels": 6, "increase": 8, "stem": (8, 16)}
_DIMS = (16, 16, 24)
_HEADS = {"hm": 4, "wh": 2, "reg": 2}


def _mmpose(feature: int, joints: int, **options: object) -> nn.Module:
    backbone = mmpose_hourglass.HourglassNet(feature=feature, **options)  # type: ignore[arg-type]
    return mmpose_hourglass.Estimator(backbone, feature, joints)


def _resnet(
    block: type[nn.Module], layers: tuple[int, ...], kernel: int = 4, small: bool = True
) -> Callable[[], nn.Module]:
    options = {"width": 8, "deconvolutions": (16, 16, 16), "joints": 5} if small else {}
    return partial(PoseResNet, block, layers, kernel=kernel, **options)  # type: ignore[arg-type]


_CASES = (
    Case(
        "princeton",
        partial(princeton.PoseNet, **_SMALL, stem=(8, 16)),
        princeton.PoseNet,
        _NHWC,
        {"hourglass": 2, "bottleneck": 19},
        full_shape=(1, 256, 256, 3),
        wrong=(1, 40, 40, 3),
    ),
    Case(
        "princeton widening",
        partial(princeton.PoseNet, **_SMALL, stem=(8, 16), increase=8),
        partial(princeton.PoseNet, stacks=2, increase=128),
        _NHWC,
        {"hourglass": 2, "bottleneck": 19},
        full_shape=(1, 256, 256, 3),
    ),
    Case(
        "pose-ae",
        partial(princeton.Grouping, **_AE),
        princeton.Grouping,
        _NHWC,
        {"hourglass": 2},
        full_shape=(1, 512, 512, 3),
        wrong=(1, 40, 40, 3),
    ),
    Case(
        "pose-ae with norms",
        partial(princeton.Grouping, **_AE, bn=True),
        partial(princeton.Grouping, bn=True),
        _NHWC,
        {"hourglass": 2},
        full_shape=(1, 512, 512, 3),
    ),
    Case(
        "bearpaw",
        partial(bearpaw.HourglassNet, **_SMALL, blocks=2),
        partial(bearpaw.HourglassNet, stacks=8),
        _HOURGLASS,
        {"hourglass": 2, "bottleneck": 35},
        wrong=_WRONG,
    ),
    Case(
        "bearpaw with GroupNorm",
        partial(bearpaw.HourglassNet, **_SMALL, norm=bearpaw.group_norm(8)),
        partial(bearpaw.HourglassNet, stacks=2, norm=bearpaw.group_norm(32)),
        _HOURGLASS,
        {"hourglass": 2},
        wrong=_WRONG,
    ),
    Case(
        "newell",
        partial(newell.Original, **_SMALL, modules=2),
        newell.Original,
        _HOURGLASS,
        {"hourglass": 2, "bottleneck": 35},
        wrong=_WRONG,
    ),
    Case(
        "mmpose HG-52",
        partial(_mmpose, 12, 5, channels=_DIMS, blocks=(1, 1, 2), stem=8),
        partial(_mmpose, 256, 17),
        _HOURGLASS,
        {"hourglass": 1, "basic block": 9},
        wrong=_WRONG,
    ),
    Case(
        "mmpose HG-52, two stacks",
        partial(_mmpose, 12, 5, stacks=2, channels=_DIMS, blocks=(1, 1, 2), stem=8),
        partial(_mmpose, 256, 17, stacks=2),
        _HOURGLASS,
        {"hourglass": 2, "basic block": 18},
    ),
    Case(
        "large hourglass",
        partial(cornernet.LargeHourglass, 2, _DIMS, (1, 2, 2), 8, _HEADS),
        cornernet.LargeHourglass,
        _HOURGLASS,
        {"hourglass": 2, "basic block": 24},
        full_shape=(1, 3, 512, 512),
        wrong=_WRONG,
    ),
    Case(
        "light hourglass",
        partial(cornernet.LargeHourglass, 2, _DIMS, (1, 2, 2), 8, _HEADS, squeeze=True),
        partial(
            cornernet.LargeHourglass,
            dims=(256, 256, 384, 384, 512),
            counts=(2, 2, 2, 2, 4),
            squeeze=True,
        ),
        ((1, 3, 32, 32), (2, 3, 64, 96), (1, 3, 31, 63)),
        {"basic block": 3},
        full_shape=(1, 3, 512, 512),
        wrong=_WRONG,
    ),
    Case(
        "FAN",
        partial(fan.FAN, modules=2, features=32, depth=2, landmarks=6),
        fan.FAN,
        _HOURGLASS,
        {"hourglass": 2, "multi-scale block": 19},
        wrong=_WRONG,
    ),
    Case(
        "HRNet",
        partial(
            hrnet.PoseHighResolutionNet, (8, 16, 32, 64), (1, 2, 1), blocks=2, stem=8, joints=5
        ),
        hrnet.PoseHighResolutionNet,
        ((1, 3, 32, 32), (2, 3, 64, 96), (1, 3, 31, 61)),
        {"bottleneck x4": 2, "basic block": 24, "fuse layer": 9},
        full_shape=(1, 3, 256, 192),
        wrong=_WRONG,
    ),
    Case(
        "HRNet, all branches",
        partial(
            hrnet.PoseHighResolutionNet, (10, 12, 21, 33), (1, 1, 1), blocks=1, stem=6, joints=None
        ),
        partial(hrnet.PoseHighResolutionNet, (18, 36, 72, 144), joints=None),
        ((1, 3, 32, 32), (2, 3, 64, 96), (1, 3, 31, 61)),
        {"bottleneck x4": 1, "basic block": 9, "fuse layer": 9},
        full_shape=(1, 3, 224, 224),
    ),
    Case(
        "SimpleBaseline-18",
        _resnet(BasicBlock, (2, 2, 2, 2)),
        _resnet(BasicBlock, (2, 2, 2, 2), small=False),
        _ANY,
        {"basic block": 8, "deconvolution head": 1},
        full_shape=(1, 3, 256, 192),
    ),
    Case(
        "SimpleBaseline-50",
        _resnet(Bottleneck, (2, 1, 2, 1)),
        _resnet(Bottleneck, (3, 4, 6, 3), small=False),
        _ANY,
        {"bottleneck x4": 6, "deconvolution head": 1},
        full_shape=(1, 3, 256, 192),
    ),
    Case(
        "SimpleBaseline, deconvolutions 3x3",
        _resnet(BasicBlock, (1, 1, 1, 1), kernel=3),
        _resnet(Bottleneck, (3, 4, 6, 3), kernel=3, small=False),
        _ANY,
        {"basic block": 4, "deconvolution head": 1},
        full_shape=(1, 3, 256, 192),
    ),
    Case(
        "SimpleBaseline, deconvolutions 2x2",
        _resnet(BasicBlock, (1, 1, 1, 1), kernel=2),
        _resnet(Bottleneck, (3, 4, 6, 3), kernel=2, small=False),
        _ANY,
        {"basic block": 4, "deconvolution head": 1},
        full_shape=(1, 3, 256, 192),
    ),
    Case(
        "CPN",
        partial(cpn.CPN, (16, 24), (2, 1, 1, 1), 8, 16, 4),
        cpn.CPN,
        ((1, 3, 64, 96), (2, 3, 32, 64), (1, 3, 63, 95)),
        {"bottleneck x4": 5, "bottleneck x2": 7},
        full_shape=(1, 3, 256, 192),
        wrong=_WRONG,
    ),
    Case(
        "dilated ResNet",
        partial(dilated.PartDetector, (1, 2, 2, 1), 8, 5),
        dilated.PartDetector,
        _ANY,
        {"bottleneck x4": 6},
    ),
)

FIELD: dict[str, Case] = {case.name: case for case in _CASES}


def prepared(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with norms of all kinds that a wrong folding would get wrong."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.InstanceNorm2d, nn.GroupNorm)):
            shifts = getattr(module, "running_mean", None), module.bias
            scales = getattr(module, "running_var", None), module.weight
            with torch.no_grad():
                for shift, scale in zip(shifts, scales, strict=True):
                    if shift is not None:
                        shift.normal_(0, 0.2, generator=generator)
                        scale.uniform_(0.5, 1.5, generator=generator)
    model.eval()  # on a line of its own: some networks' eval() returns nothing
    return model
