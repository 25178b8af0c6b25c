"""The original network, as the paper's Lua code builds it: functions that return containers.

Several residuals at each place, branches held together by a module that adds, `lin` layers with
BatchNorm behind the convolution, and a three-way remerge.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """What every branch makes of the input, added up."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        for index, branch in enumerate(branches):
            self.add_module(f"branch{index}", branch)

    def forward(self, x: Tensor) -> Tensor:
        return reduce(torch.add, [branch(x) for branch in self.children()])


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    return nn.Conv2d(
        inputs, outputs, (kernel, kernel), (stride, stride), (padding, padding), bias=True
    )


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    half = outputs // 2
    return nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.ReLU(True),
        conv(inputs, half, 1),
        nn.BatchNorm2d(half),
        nn.ReLU(True),
        conv(half, half, 3, 1, 1),
        nn.BatchNorm2d(half),
        nn.ReLU(True),
        conv(half, outputs, 1),
    )


def residual(inputs: int, outputs: int) -> nn.Module:
    skip = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)
    return Sum(conv_block(inputs, outputs), skip)


def residuals(count: int, features: int) -> list[nn.Module]:
    return [residual(features, features) for _ in range(count)]


def hourglass(n: int, features: int, modules: int) -> nn.Module:
    bottom = [hourglass(n - 1, features, modules)] if n > 1 else residuals(modules, features)
    return Sum(
        nn.Sequential(*residuals(modules, features)),
        nn.Sequential(
            nn.MaxPool2d(2, 2),
            *residuals(modules, features),
            *bottom,
            *residuals(modules, features),
            nn.UpsamplingNearest2d(scale_factor=2),
        ),
    )


def lin(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(True))


class Original(nn.Module):
    """(B, 3, H, W) -> list of (B, joints, H/4, W/4)"""

    def __init__(
        self,
        stacks: int = 8,
        features: int = 256,
        modules: int = 3,
        depth: int = 4,
        joints: int = 16,
    ) -> None:
        super().__init__()
        first, narrow = features // 4, features // 2
        self.cnv1 = conv(3, first, 7, 2, 3)
        self.norm = nn.BatchNorm2d(first)
        self.r1, self.r4 = residual(first, narrow), residual(narrow, narrow)
        self.r5 = residual(narrow, features)
        self.pool = nn.MaxPool2d((2, 2), (2, 2))
        for i in range(stacks):
            setattr(self, f"hg{i}", hourglass(depth, features, modules))
            setattr(self, f"ll{i}", nn.Sequential(*residuals(modules, features)))
            setattr(self, f"lin{i}", lin(features, features))
            setattr(self, f"tmpOut{i}", conv(features, joints, 1))
            if i < stacks - 1:
                setattr(self, f"ll_{i}", conv(features, features, 1))
                setattr(self, f"tmpOut_{i}", conv(joints, features, 1))
        self.stacks = stacks

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.relu_(self.norm(self.cnv1(x)))
        inter = self.r5(self.r4(self.pool(self.r1(x))))
        out = []
        for i in range(self.stacks):
            ll = getattr(self, f"lin{i}")(getattr(self, f"ll{i}")(getattr(self, f"hg{i}")(inter)))
            out.append(getattr(self, f"tmpOut{i}")(ll))
            if i < self.stacks - 1:
                ll_ = getattr(self, f"ll_{i}")(ll)
                inter = inter + ll_ + getattr(self, f"tmpOut_{i}")(out[-1])
        return out
