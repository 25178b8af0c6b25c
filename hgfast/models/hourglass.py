"""The stacked hourglass network for heatmap pose estimation.

Newell, Yang, Deng: "Stacked Hourglass Networks for Human Pose Estimation",
arXiv:1603.06937. Read this file from top to bottom: it is the network.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Pre-activation bottleneck: three convolutions around a shortcut.

    Each convolution is preceded, not followed, by BatchNorm and ReLU, so the sum
    that leaves the block is linear and the shortcut stays an identity for as long
    as the width allows; where the width changes, a bare 1x1 convolution projects it.

        (B, in_channels, H, W) -> (B, out_channels, H, W)
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        middle = out_channels // 2
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, middle, 1)
        self.norm2 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, out_channels, 1)
        self.project: nn.Module = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        y = self.conv3(F.relu(self.norm3(y)))
        return cast(Tensor, self.project(x) + y)


def residuals(count: int, features: int) -> nn.Sequential:
    """``count`` residuals of equal width, one after the other."""
    return nn.Sequential(*(Residual(features, features) for _ in range(count)))


class Hourglass(nn.Module):
    """One hourglass: look at the image at ever coarser scales, then bring it all back.

    At each of ``depth`` levels the path splits. The upper branch keeps the resolution;
    the lower one halves it, descends into the next hourglass, and comes back by nearest
    upsampling. Their sum carries both the detail and the context.

        (B, features, H, W) -> (B, features, H, W), H and W multiples of 2**depth
    """

    def __init__(self, depth: int, features: int, blocks: int) -> None:
        super().__init__()
        self.upper = residuals(blocks, features)
        self.enter = residuals(blocks, features)
        self.inner: nn.Module = (
            Hourglass(depth - 1, features, blocks) if depth > 1 else residuals(blocks, features)
        )
        self.leave = residuals(blocks, features)

    def forward(self, x: Tensor) -> Tensor:
        low = F.max_pool2d(x, 2)
        low = self.leave(self.inner(self.enter(low)))
        return cast(Tensor, self.upper(x) + F.interpolate(low, scale_factor=2, mode="nearest"))


class Head(nn.Module):
    """From an hourglass's features to one heatmap per joint, by two 1x1 convolutions.

    Returns the features that gave the heatmaps as well: the next stack builds on both.

        (B, features, H, W) -> (B, features, H, W), (B, joints, H, W)
    """

    def __init__(self, features: int, blocks: int, joints: int) -> None:
        super().__init__()
        self.residuals = residuals(blocks, features)
        self.conv = nn.Conv2d(features, features, 1)
        self.norm = nn.BatchNorm2d(features)
        self.heatmap = nn.Conv2d(features, joints, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.norm(self.conv(self.residuals(x))))
        return y, self.heatmap(y)


class Remerge(nn.Module):
    """Feed a stack's prediction back, so that the next stack can reconsider it.

    (B, features, H, W) twice and (B, joints, H, W) -> (B, features, H, W)
    """

    def __init__(self, features: int, joints: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(features, features, 1)
        self.heatmap = nn.Conv2d(joints, features, 1)

    def forward(self, x: Tensor, features: Tensor, heatmap: Tensor) -> Tensor:
        return cast(Tensor, x + self.features(features) + self.heatmap(heatmap))


class Stem(nn.Module):
    """From the image to features at a quarter of its resolution.

    "paper" widens in the last residual, "bearpaw" (the layout of public PyTorch
    checkpoints) one residual earlier.

        (B, 3, H, W) -> (B, features, H/4, W/4)
    """

    def __init__(self, features: int, variant: str) -> None:
        super().__init__()
        first, narrow = features // 4, features // 2
        wide = {"paper": narrow, "bearpaw": features}[variant]
        self.conv = nn.Conv2d(3, first, 7, stride=2, padding=3)
        self.norm = nn.BatchNorm2d(first)
        self.residual1 = Residual(first, narrow)
        self.residual2 = Residual(narrow, wide)
        self.residual3 = Residual(wide, features)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.max_pool2d(self.residual1(x), 2)
        return cast(Tensor, self.residual3(self.residual2(x)))


class StackedHourglass(nn.Module):
    """Hourglasses end to end, each with a prediction of its own.

    Every stack's heatmaps are returned, so that training can supervise them all
    (intermediate supervision); at inference the last is the answer.

        (B, 3, H, W) -> list of (B, joints, H/4, W/4), one per stack
    """

    def __init__(
        self, stacks: int, features: int, blocks: int, depth: int, joints: int, stem: str
    ) -> None:
        super().__init__()
        self.stem = Stem(features, stem)
        self.hourglasses = nn.ModuleList(Hourglass(depth, features, blocks) for _ in range(stacks))
        self.heads = nn.ModuleList(Head(features, blocks, joints) for _ in range(stacks))
        self.remerges = nn.ModuleList(Remerge(features, joints) for _ in range(stacks - 1))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        heatmaps: list[Tensor] = []
        for stack, (hourglass, head) in enumerate(zip(self.hourglasses, self.heads, strict=True)):
            features, heatmap = head(hourglass(x))
            heatmaps.append(heatmap)
            if stack < len(self.remerges):
                x = self.remerges[stack](x, features, heatmap)
        return heatmaps


def hourglass(
    stacks: int = 2,
    features: int = 256,
    blocks: int = 1,
    depth: int = 4,
    joints: int = 16,
    stem: str = "paper",
) -> StackedHourglass:
    """Build a stacked hourglass with random weights, in training mode as PyTorch does.

    Args:
        stacks: number of hourglasses (the paper's network has 8).
        features: channels between blocks, a positive multiple of 4.
        blocks: residuals at each place (the paper's text says 1; the original code's
            published networks use 1, earlier ones 3).
        depth: halvings of resolution inside an hourglass. The image's height and width
            must be multiples of ``2 ** (depth + 2)``: 64 for the default.
        joints: heatmaps per stack.
        stem: "paper" or "bearpaw"; see :class:`Stem`.

    Returns:
        A module that maps an image (B, 3, H, W) to a list of ``stacks`` heatmap tensors
        (B, joints, H/4, W/4).

    Raises:
        ValueError: an argument is out of its range.
    """
    sizes = {
        "stacks": stacks,
        "features": features,
        "blocks": blocks,
        "depth": depth,
        "joints": joints,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if features % 4:
        raise ValueError(f"features must be a multiple of 4, got {features}")
    if stem not in ("paper", "bearpaw"):
        raise ValueError(f'stem must be "paper" or "bearpaw", got {stem!r}')
    return StackedHourglass(stacks, features, blocks, depth, joints, stem)
