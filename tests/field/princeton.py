"""The PyTorch hourglass of Newell's own group, and their network for pose and grouping.

What it asks of a tracer: images are (B, H, W, 3); every convolution asserts its input's channels;
every residual holds a projection, needed or not; the heatmaps of all stacks come as one tensor.
The names are those of public checkpoints, which `hgfast.models.load_checkpoint` reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        bn: bool = False,
        relu: bool = True,
        relu_first: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.relu_first = relu_first
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
        self.bn = nn.BatchNorm2d(outputs) if bn else None
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        assert x.size()[1] == self.inputs, f"{x.size()[1]} channels, expected {self.inputs}"
        x = self.conv(x)
        steps = (self.relu, self.bn) if self.relu_first else (self.bn, self.relu)
        for step in steps:
            if step is not None:
                x = step(x)
        return x


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = int(outputs / 2)
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), Conv(inputs, half, 1, relu=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(half), Conv(half, half, 3, relu=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(half), Conv(half, outputs, 1, relu=False)
        self.skip_layer = Conv(inputs, outputs, 1, relu=False)
        self.relu = nn.ReLU()
        self.need_skip = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.skip_layer(x) if self.need_skip else x
        y = self.conv1(self.relu(self.bn1(x)))
        y = self.conv2(self.relu(self.bn2(y)))
        y = self.conv3(self.relu(self.bn3(y)))
        y += shortcut
        return y


class Hourglass(nn.Module):
    """`block(inputs, outputs)` is a residual, or a plain convolution for pose-ae."""

    def __init__(self, n: int, f: int, increase: int, block: type[nn.Module], every: bool) -> None:
        super().__init__()
        wider = f + increase
        self.up1 = block(f, f)
        self.pool1 = nn.MaxPool2d(2, 2)
        self.low1 = block(f, wider)
        self.low2: nn.Module
        if n > 1:
            self.low2 = Hourglass(n - 1, wider, increase if every else 0, block, every)
        else:
            self.low2 = block(wider, wider)
        self.low3 = block(wider, f)
        self.up2 = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        high = self.up1(x)
        low = self.low3(self.low2(self.low1(self.pool1(x))))
        return high + self.up2(low)


class Merge(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PoseNet(nn.Module):
    """(B, H, W, 3) -> (B, stacks, joints, H/4, W/4)"""

    def __init__(
        self,
        stacks: int = 8,
        features: int = 256,
        joints: int = 16,
        depth: int = 4,
        increase: int = 0,
        stem: tuple[int, int] = (64, 128),
    ) -> None:
        super().__init__()
        first, narrow = stem
        self.nstack = stacks
        self.pre = nn.Sequential(
            Conv(3, first, 7, 2, bn=True),
            Residual(first, narrow),
            nn.MaxPool2d(2, 2),
            Residual(narrow, narrow),
            Residual(narrow, features),
        )
        self.hgs = nn.ModuleList(
            nn.Sequential(Hourglass(depth, features, increase, Residual, False))
            for _ in range(stacks)
        )
        self.features = nn.ModuleList(
            nn.Sequential(Residual(features, features), Conv(features, features, 1, bn=True))
            for _ in range(stacks)
        )
        self.outs = nn.ModuleList(Conv(features, joints, 1, relu=False) for _ in range(stacks))
        self.merge_features = nn.ModuleList(Merge(features, features) for _ in range(stacks - 1))
        self.merge_preds = nn.ModuleList(Merge(joints, features) for _ in range(stacks - 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.pre(images.permute(0, 3, 1, 2))
        predictions = []
        for i in range(self.nstack):
            feature = self.features[i](self.hgs[i](x))
            prediction = self.outs[i](feature)
            predictions.append(prediction)
            if i < self.nstack - 1:
                x = x + self.merge_preds[i](prediction) + self.merge_features[i](feature)
        return torch.stack(predictions, 1)


class Grouping(nn.Module):
    """pose-ae: no residuals, widths that grow on the way down, ReLU before the (rare) BatchNorm.

    (B, H, W, 3) -> (B, stacks, channels, H/4, W/4)
    """

    def __init__(
        self,
        stacks: int = 4,
        features: int = 256,
        channels: int = 68,
        depth: int = 4,
        increase: int = 128,
        stem: tuple[int, int] = (64, 128),
        bn: bool = False,
    ) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> Conv:
            return Conv(inputs, outputs, kernel, stride, bn=bn, relu_first=True)

        first, narrow = stem
        self.pre = nn.Sequential(
            conv(3, first, 7, 2),
            conv(first, narrow),
            nn.MaxPool2d(2, 2),
            conv(narrow, narrow),
            conv(narrow, features),
        )
        self.features = nn.ModuleList(
            nn.Sequential(
                Hourglass(depth, features, increase, conv, True),  # type: ignore[arg-type]
                conv(features, features),
                conv(features, features),
            )
            for _ in range(stacks)
        )
        self.outs = nn.ModuleList(Conv(features, channels, 1, relu=False) for _ in range(stacks))
        self.merge_features = nn.ModuleList(Merge(features, features) for _ in range(stacks - 1))
        self.merge_preds = nn.ModuleList(Merge(channels, features) for _ in range(stacks - 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.pre(images.permute(0, 3, 1, 2))
        predictions = []
        for i, (body, out) in enumerate(zip(self.features, self.outs, strict=True)):
            feature = body(x)
            predictions += [out(feature)]
            if i + 1 < len(self.features):
                x = x + self.merge_preds[i](predictions[-1]) + self.merge_features[i](feature)
        return torch.stack(predictions, 1)
