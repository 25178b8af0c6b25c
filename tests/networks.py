"""Networks for tests: structures from the field, small, with statistics that are not defaults."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgfast.models import StackedHourglass, hourglass


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics that a wrong folding would get wrong."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.2, generator=generator)
    return model


def small_hourglass(stacks: int = 1, blocks: int = 1, depth: int = 2) -> StackedHourglass:
    """A stacked hourglass that runs in milliseconds; takes (B, 3, 32n, 32m) for depth 2..3."""
    torch.manual_seed(1)
    model = hourglass(stacks=stacks, features=32, blocks=blocks, depth=depth, joints=5)
    randomise(model)
    return model.eval()


def image(batch: int = 1, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


class PreactBlock(nn.Module):
    """A bottleneck as public code writes it: one shared in-place ReLU, an optional projection."""

    def __init__(self, into: int = 16, out: int = 16, inplace: bool = True) -> None:
        super().__init__()
        middle = max(out // 2, 1)
        self.bn1, self.conv1 = nn.BatchNorm2d(into), nn.Conv2d(into, middle, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(middle), nn.Conv2d(middle, middle, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(middle), nn.Conv2d(middle, out, 1)
        self.relu = nn.ReLU(inplace=inplace)
        self.downsample = nn.Sequential(nn.Conv2d(into, out, 1)) if into != out else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return out


class MethodHourglass(nn.Module):
    """The recursion as a method over nested ModuleLists, skip first, functional joins."""

    def __init__(self, depth: int = 2, features: int = 16) -> None:
        super().__init__()
        self.depth = depth
        self.hg = nn.ModuleList(
            nn.ModuleList(nn.Sequential(PreactBlock(features, features)) for _ in range(4))
            for _ in range(depth)
        )

    def _level(self, n: int, x: Tensor) -> Tensor:
        up1 = self.hg[n - 1][0](x)
        low = self.hg[n - 1][1](F.max_pool2d(x, 2, stride=2))
        low = self._level(n - 1, low) if n > 1 else self.hg[n - 1][3](low)
        low = self.hg[n - 1][2](low)
        return up1 + F.interpolate(low, scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        return self._level(self.depth, x)


class Foreign(nn.Module):
    """Not expressible as a whole: its blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PreactBlock(), PreactBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cumsum(self.first(x), 1))


class Plain(nn.Module):
    """Nothing to fuse in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x))


class Asserts(nn.Module):
    """Sizes in assertions and conditions, NHWC input."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.project = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.channels = channels

    def forward(self, images: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        x = images.permute(0, 3, 1, 2)
        assert x.size()[1] == self.channels, f"{x.size()[1]} {self.channels}"
        assert x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0  # noqa: PT018
        x = self.conv(x)
        if x.shape[1] != 4:
            x = self.project(x)
        return x * scale if mask is None else x * mask
