"""A ResNet that stops descending: the last two stages are dilated, then one light deconvolution.

The field's part detectors before the hourglass. Heatmaps go through a sigmoid. The residual block
is one class for both kinds, which builds its branch from a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Unit(nn.Module):
    """Convolution, norm, ReLU; the ReLU is left to whoever adds."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride=stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Block(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.reduce = Unit(inputs, middle)
        self.spatial = Unit(middle, middle, 3, stride, dilation)
        self.expand = Unit(middle, outputs)
        self.act1, self.act2, self.act3 = (nn.ReLU(inplace=True) for _ in range(3))
        if inputs == outputs and stride == 1:
            self.register_module("shortcut", None)
        else:
            self.shortcut = Unit(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.act1(self.reduce(x))
        x = self.act2(self.spatial(x))
        x = self.expand(x)
        return self.act3(x.add_(shortcut))


class PartDetector(nn.Module):
    """(B, 3, H, W) -> {"part_prob": (B, joints, H/4, W/4), "locref": (B, 2 joints, H/4, W/4)}"""

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 23, 3),
        width: int = 64,
        joints: int = 14,
        dilations: Sequence[int] = (1, 1, 2, 4),
    ) -> None:
        super().__init__()
        self.root = Unit(3, width, 7, 2)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages = []
        inputs = width
        for number, (count, dilation) in enumerate(zip(layers, dilations, strict=True)):
            middle = width * 2**number
            stride = 2 if number == 1 else 1
            for k in range(count):
                block = Block(inputs, middle, 4 * middle, stride if k == 0 else 1, dilation)
                stages.append(block)
                inputs = 4 * middle
        self.blocks = nn.Sequential(*stages)
        self.part_pred, self.locref_pred = (
            nn.ConvTranspose2d(inputs, channels, 3, stride=2, padding=1, output_padding=1)
            for channels in (joints, 2 * joints)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.pool(self.act(self.root(x)))
        x = self.blocks(x)
        return {"part_prob": torch.sigmoid(self.part_pred(x)), "locref": self.locref_pred(x)}
