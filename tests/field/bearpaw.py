"""The layout that most public PyTorch hourglasses share, with BatchNorm or GroupNorm.

What it asks of a tracer: the recursion is a method over nested ModuleLists; one in-place ReLU
serves every place of a block; the joins are functional. Names are those of public checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]


def group_norm(groups: int) -> Norm:
    return lambda channels: nn.GroupNorm(groups, channels)


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inputs: int, planes: int, norm: Norm) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.bn1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, planes, kernel_size=1)
        self.bn2 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1)
        self.bn3 = norm(planes)
        self.conv3 = nn.Conv2d(planes, outputs, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = x
        for norm, conv in (
            (self.bn1, self.conv1),
            (self.bn2, self.conv2),
            (self.bn3, self.conv3),
        ):
            out = norm(out)
            out = self.relu(out)
            out = conv(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return out


class Hourglass(nn.Module):
    def __init__(self, blocks: int, planes: int, depth: int, norm: Norm) -> None:
        super().__init__()
        self.depth = depth

        def place() -> nn.Sequential:
            return nn.Sequential(*[Bottleneck(planes * 2, planes, norm) for _ in range(blocks)])

        # Level 0 is the coarsest, and has the bottom as a fourth place.
        self.hg = nn.ModuleList(
            nn.ModuleList(place() for _ in range(4 if level == 0 else 3)) for level in range(depth)
        )

    def _forward(self, n: int, x: Tensor) -> Tensor:
        places = self.hg[n - 1]
        up1 = places[0](x)
        low1 = places[1](F.max_pool2d(x, 2, stride=2))
        low2 = self._forward(n - 1, low1) if n > 1 else places[3](low1)
        low3 = places[2](low2)
        up2 = F.interpolate(low3, scale_factor=2)
        return up1 + up2

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.depth, x)


class HourglassNet(nn.Module):
    """(B, 3, H, W) -> list of (B, joints, H/4, W/4)"""

    def __init__(
        self,
        stacks: int = 2,
        features: int = 256,
        blocks: int = 1,
        depth: int = 4,
        joints: int = 16,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.num_stacks = stacks
        first, half = features // 4, features // 2
        self.conv1 = nn.Conv2d(3, first, kernel_size=7, stride=2, padding=3)
        self.bn1 = norm(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Bottleneck(first, first, norm))
        self.layer2 = nn.Sequential(Bottleneck(half, half, norm))
        self.layer3 = nn.Sequential(Bottleneck(features, half, norm))
        self.maxpool = nn.MaxPool2d(2, stride=2)

        hg, res, fc, score, fc_, score_ = ([] for _ in range(6))  # type: ignore[var-annotated]
        for i in range(stacks):
            hg.append(Hourglass(blocks, half, depth, norm))
            res.append(nn.Sequential(*[Bottleneck(features, half, norm) for _ in range(blocks)]))
            conv = nn.Conv2d(features, features, kernel_size=1)
            fc.append(nn.Sequential(conv, norm(features), self.relu))
            score.append(nn.Conv2d(features, joints, kernel_size=1))
            if i < stacks - 1:
                fc_.append(nn.Conv2d(features, features, kernel_size=1))
                score_.append(nn.Conv2d(joints, features, kernel_size=1))
        self.hg, self.res, self.fc = nn.ModuleList(hg), nn.ModuleList(res), nn.ModuleList(fc)
        self.score, self.fc_ = nn.ModuleList(score), nn.ModuleList(fc_)
        self.score_ = nn.ModuleList(score_)

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(self.layer1(x))
        x = self.layer3(self.layer2(x))
        for i in range(self.num_stacks):
            y = self.fc[i](self.res[i](self.hg[i](x)))
            score = self.score[i](y)
            out.append(score)
            if i < self.num_stacks - 1:
                x = x + self.fc_[i](y) + self.score_[i](score)
        return out
