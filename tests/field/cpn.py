"""The cascaded pyramid network: a pyramid of heatmaps, refined by all of it at once.

Bilinear upsampling with aligned corners, between convolutions and norms; heatmaps enlarged to a
fixed size; bottlenecks whose projection always runs; a result of two parts, (list, tensor).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .simple_baseline import Bottleneck as ResNetBottleneck


class Backbone(nn.Module):
    """A ResNet that gives every stage, the coarsest first."""

    def __init__(self, layers: Sequence[int], width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inputs = width
        for number, count in enumerate(layers):
            planes, stride = width << number, 2 if number else 1
            blocks = []
            for k in range(count):
                downsample = None
                if k == 0:
                    downsample = nn.Sequential(
                        nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False),
                        nn.BatchNorm2d(4 * planes),
                    )
                blocks.append(ResNetBottleneck(inputs, planes, stride if k == 0 else 1, downsample))
                inputs = 4 * planes
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x1 = self.layer1(x)
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        x4 = self.layer4(x3)
        return [x4, x3, x2, x1]


class GlobalNet(nn.Module):
    def __init__(
        self, channels: Sequence[int], size: tuple[int, int], joints: int, width: int
    ) -> None:
        super().__init__()
        laterals, upsamples, predict = [], [], []
        for i, inputs in enumerate(channels):
            laterals.append(
                nn.Sequential(
                    nn.Conv2d(inputs, width, kernel_size=1, stride=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                )
            )
            predict.append(
                nn.Sequential(
                    nn.Conv2d(width, width, kernel_size=1, stride=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(width, joints, kernel_size=3, stride=1, padding=1, bias=False),
                    nn.Upsample(size=size, mode="bilinear", align_corners=True),
                    nn.BatchNorm2d(joints),
                )
            )
            if i != len(channels) - 1:
                upsamples.append(
                    nn.Sequential(
                        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                        nn.Conv2d(width, width, kernel_size=1, stride=1, bias=False),
                        nn.BatchNorm2d(width),
                    )
                )
        self.laterals = nn.ModuleList(laterals)
        self.upsamples = nn.ModuleList(upsamples)
        self.predict = nn.ModuleList(predict)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        features: list[Tensor] = []
        maps: list[Tensor] = []
        up = None
        for i in range(len(self.laterals)):
            feature = self.laterals[i](x[i]) if up is None else self.laterals[i](x[i]) + up
            features.append(feature)
            if i != len(self.laterals) - 1:
                up = self.upsamples[i](feature)
            maps.append(self.predict[i](feature))
        return features, maps


class RefineBottleneck(nn.Module):
    expansion = 2

    def __init__(self, inputs: int, planes: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=1, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += residual
        return self.relu(out)


class RefineNet(nn.Module):
    def __init__(self, width: int, size: tuple[int, int], joints: int, levels: int) -> None:
        super().__init__()
        cascade = []
        for i in range(levels):
            steps: list[nn.Module] = [
                RefineBottleneck(width, width // 2) for _ in range(levels - i - 1)
            ]
            steps.append(nn.Upsample(size=size, mode="bilinear", align_corners=True))
            cascade.append(nn.Sequential(*steps))
        self.cascade = nn.ModuleList(cascade)
        self.final_predict = nn.Sequential(
            RefineBottleneck(levels * width, width // 2),
            nn.Conv2d(width, joints, kernel_size=3, stride=1, padding=1, bias=False),
            nn.BatchNorm2d(joints),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        maps = []
        for i, branch in enumerate(self.cascade):
            maps.append(branch(features[i]))
        return self.final_predict(torch.cat(maps, dim=1))


class CPN(nn.Module):
    """(B, 3, H, W), four times `size` -> (list of four (B, joints, *size), (B, joints, *size))"""

    def __init__(
        self,
        size: tuple[int, int] = (64, 48),
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        features: int = 256,
        joints: int = 17,
    ) -> None:
        super().__init__()
        self.resnet = Backbone(layers, width)
        channels = [4 * width << number for number in (3, 2, 1, 0)]
        self.global_net = GlobalNet(channels, size, joints, features)
        self.refine_net = RefineNet(features, size, joints, len(channels))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features, coarse = self.global_net(self.resnet(x))
        return coarse, self.refine_net(features)
