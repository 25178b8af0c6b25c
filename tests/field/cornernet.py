"""The large hourglass of detectors by keypoints, and its light variant with fire modules.

Post-activation residuals; an identity is an empty Sequential; a residual of stride 2 descends,
while `max1` is there and does nothing; the join is a module; heads are looked up by name and
come as a dict per stack. The light one has depthwise convolutions and learns its upsampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Block = Callable[..., nn.Module]


class ConvBnRelu(nn.Module):
    def __init__(
        self, k: int, inputs: int, outputs: int, stride: int = 1, with_bn: bool = True
    ) -> None:
        super().__init__()
        pad = (k - 1) // 2
        self.conv = nn.Conv2d(inputs, outputs, k, stride, pad, bias=not with_bn)
        self.bn = nn.BatchNorm2d(outputs) if with_bn else nn.Sequential()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, (3, 3), (stride, stride), (1, 1), bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, (3, 3), padding=(1, 1), bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, (1, 1), (stride, stride), bias=False),
                nn.BatchNorm2d(outputs),
            )
            if stride != 1 or inputs != outputs
            else nn.Sequential()
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        bn1 = self.bn1(self.conv1(x))
        bn2 = self.bn2(self.conv2(self.relu1(bn1)))
        return self.relu(bn2 + self.skip(x))


class Fire(nn.Module):
    """Squeezed to half, expanded by a 1x1 and a depthwise 3x3, side by side."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        squeezed, half = outputs // 2, outputs // 2
        self.conv1 = nn.Conv2d(inputs, squeezed, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(squeezed)
        self.conv_1x1 = nn.Conv2d(squeezed, half, 1, stride=stride, bias=False)
        self.conv_3x3 = nn.Conv2d(
            squeezed, half, 3, padding=1, stride=stride, groups=squeezed, bias=False
        )
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = stride == 1 and inputs == outputs
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = torch.cat((self.conv_1x1(y), self.conv_3x3(y)), 1)
        y = self.bn2(y)
        if self.skip:
            return self.relu(y + x)
        return self.relu(y)


class Merge(nn.Module):
    def forward(self, up1: Tensor, up2: Tensor) -> Tensor:
        return up1 + up2


def widening(block: Block, inputs: int, outputs: int, count: int, stride: int = 1) -> nn.Sequential:
    first = block(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(block(outputs, outputs) for _ in range(count - 1)))


def narrowing(block: Block, inputs: int, outputs: int, count: int) -> nn.Sequential:
    blocks = [block(inputs, inputs) for _ in range(count - 1)]
    return nn.Sequential(*blocks, block(inputs, outputs))


class Level(nn.Module):
    def __init__(
        self, dims: Sequence[int], counts: Sequence[int], block: Block, learned: bool
    ) -> None:
        super().__init__()
        here, below = dims[:2]
        self.up1 = widening(block, here, here, counts[0])
        self.max1 = nn.Sequential()
        self.low1 = widening(block, here, below, counts[0], stride=2)
        if len(dims) > 2:
            self.low2: nn.Module = Level(dims[1:], counts[1:], block, learned)
        else:
            self.low2 = widening(block, below, below, counts[1])
        self.low3 = narrowing(block, below, here, counts[0])
        if learned:
            self.up2: nn.Module = nn.ConvTranspose2d(here, here, (4, 4), stride=2, padding=1)
        else:
            self.up2 = nn.Upsample(scale_factor=2)
        self.merg = Merge()

    def forward(self, x: Tensor) -> Tensor:
        up1 = self.up1(x)
        low1 = self.low1(self.max1(x))
        return self.merg(up1, self.up2(self.low3(self.low2(low1))))


class LargeHourglass(nn.Module):
    """(B, 3, H, W) -> list of dicts of (B, channels, H/4, W/4)"""

    def __init__(
        self,
        stacks: int = 2,
        dims: Sequence[int] = (256, 256, 384, 384, 384, 512),
        counts: Sequence[int] = (2, 2, 2, 2, 2, 4),
        stem: int = 128,
        heads: dict[str, int] | None = None,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        self.nstack = stacks
        self.heads = heads or {"hm": 80, "wh": 2, "reg": 2}
        width = dims[0]
        block: Block = Fire if squeeze else Residual
        if squeeze:  # one residual more: an eighth of the image's size
            self.pre = nn.Sequential(
                ConvBnRelu(7, 3, stem, stride=2),
                Residual(stem, width, stride=2),
                Residual(width, width, stride=2),
            )
        else:
            self.pre = nn.Sequential(
                ConvBnRelu(7, 3, stem, stride=2), Residual(stem, width, stride=2)
            )
        self.kps = nn.ModuleList([Level(dims, counts, block, squeeze) for _ in range(stacks)])
        self.cnvs = nn.ModuleList([ConvBnRelu(3, width, width) for _ in range(stacks)])
        self.inters = nn.ModuleList([Residual(width, width) for _ in range(stacks - 1)])
        self.inters_, self.cnvs_ = (
            nn.ModuleList(
                nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
                for _ in range(stacks - 1)
            )
            for _ in range(2)
        )
        for name, channels in self.heads.items():
            layers = nn.ModuleList(
                nn.Sequential(
                    ConvBnRelu(1 if squeeze else 3, width, width, with_bn=False),
                    nn.Conv2d(width, channels, (1, 1)),
                )
                for _ in range(stacks)
            )
            self.__setattr__(name, layers)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, image: Tensor) -> list[dict[str, Tensor]]:
        inter = self.pre(image)
        outs = []
        for ind in range(self.nstack):
            cnv = self.cnvs[ind](self.kps[ind](inter))
            out = {}
            for head in self.heads:
                out[head] = self.__getattr__(head)[ind](cnv)
            outs.append(out)
            if ind < self.nstack - 1:
                inter = self.inters_[ind](inter) + self.cnvs_[ind](cnv)
                inter = self.relu(inter)
                inter = self.inters[ind](inter)
        return outs
