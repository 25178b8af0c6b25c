"""The face alignment network: a block that concatenates three convolutions, and average pooling.

Levels are looked up in `_modules` by a name made of strings; norms stand before ReLUs that are
functions; every convolution of a block is concatenated before its ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=1, padding=1, bias=False)


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half, quarter = outputs // 2, outputs // 4
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, half)
        self.bn2, self.conv2 = nn.BatchNorm2d(half), conv3x3(half, quarter)
        self.bn3, self.conv3 = nn.BatchNorm2d(quarter), conv3x3(quarter, quarter)
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.BatchNorm2d(inputs),
                nn.ReLU(True),
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=1, bias=False),
            )
        else:
            self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out1 = self.conv1(F.relu(self.bn1(x), True))
        out2 = self.conv2(F.relu(self.bn2(out1), True))
        out3 = self.conv3(F.relu(self.bn3(out2), True))
        out = torch.cat((out1, out2, out3), 1)
        if self.downsample is not None:
            residual = self.downsample(residual)
        out += residual
        return out


class HourGlass(nn.Module):
    def __init__(self, depth: int, features: int) -> None:
        super().__init__()
        self.depth = depth
        for level in range(depth, 0, -1):
            for place in ("b1", "b2", "b3"):
                self.add_module(f"{place}_{level}", ConvBlock(features, features))
        self.add_module("b2_plus_1", ConvBlock(features, features))

    def _level(self, level: int, x: Tensor) -> Tensor:
        up1 = self._modules["b1_" + str(level)](x)  # type: ignore[misc]
        low = F.avg_pool2d(x, 2, stride=2)
        low = self._modules["b2_" + str(level)](low)  # type: ignore[misc]
        if level > 1:
            low = self._level(level - 1, low)
        else:
            low = self._modules["b2_plus_" + str(level)](low)  # type: ignore[misc]
        low = self._modules["b3_" + str(level)](low)  # type: ignore[misc]
        return up1 + F.interpolate(low, scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        return self._level(self.depth, x)


class FAN(nn.Module):
    """(B, 3, H, W) -> list of (B, landmarks, H/4, W/4)"""

    def __init__(
        self, modules: int = 4, features: int = 256, depth: int = 4, landmarks: int = 68
    ) -> None:
        super().__init__()
        self.num_modules = modules
        first, half = features // 4, features // 2
        self.conv1 = nn.Conv2d(3, first, kernel_size=7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = ConvBlock(first, half)
        self.conv3 = ConvBlock(half, half)
        self.conv4 = ConvBlock(half, features)
        for i in range(modules):
            self.add_module(f"m{i}", HourGlass(depth, features))
            self.add_module(f"top_m_{i}", ConvBlock(features, features))
            self.add_module(f"conv_last{i}", nn.Conv2d(features, features, 1))
            self.add_module(f"bn_end{i}", nn.BatchNorm2d(features))
            self.add_module(f"l{i}", nn.Conv2d(features, landmarks, 1))
            if i < modules - 1:
                self.add_module(f"bl{i}", nn.Conv2d(features, features, 1))
                self.add_module(f"al{i}", nn.Conv2d(landmarks, features, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        part = self._modules
        x = F.relu(self.bn1(self.conv1(x)), True)
        x = F.avg_pool2d(self.conv2(x), 2, stride=2)
        previous = self.conv4(self.conv3(x))
        outputs = []
        for i in range(self.num_modules):
            ll = part[f"top_m_{i}"](part[f"m{i}"](previous))  # type: ignore[misc]
            ll = F.relu(part[f"bn_end{i}"](part[f"conv_last{i}"](ll)), True)  # type: ignore[misc]
            tmp_out = part[f"l{i}"](ll)  # type: ignore[misc]
            outputs.append(tmp_out)
            if i < self.num_modules - 1:
                ll = part[f"bl{i}"](ll)  # type: ignore[misc]
                previous = previous + ll + part[f"al{i}"](tmp_out)  # type: ignore[misc]
        return outputs
