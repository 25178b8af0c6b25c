"""HG-52 as mmpose builds it: a backbone of features, with a head behind it.

Post-activation basic blocks without bias, norms reached by name through a property, a block of
stride 2 instead of a pooling, `+=` before an in-place ReLU, and with one stack a block that nothing
calls. Its `train`, and so its `eval`, returns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ConvModule(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm_name = "bn"
        self.add_module(self.norm_name, nn.BatchNorm2d(outputs))
        self.with_activation = act
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self) -> nn.Module:
        found: nn.Module = getattr(self, self.norm_name)
        return found

    def forward(self, x: Tensor) -> Tensor:
        for layer in ("conv", "norm", "act"):
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm":
                x = self.norm(x)
            elif self.with_activation:
                x = self.activate(x)
        return x


class BasicBlock(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.add_module("bn1", nn.BatchNorm2d(outputs))
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.add_module("bn2", nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            identity = x
            out = self.relu(getattr(self, "bn1")(self.conv1(x)))  # noqa: B009
            out = getattr(self, "bn2")(self.conv2(out))  # noqa: B009
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        return self.relu(inner(x))


class Layer(nn.Sequential):
    """Blocks of which the first, or else the last, changes width and size."""

    def __init__(
        self, count: int, inputs: int, outputs: int, stride: int = 1, first: bool = True
    ) -> None:
        downsample = None
        if stride != 1 or inputs != outputs:
            downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        changing = BasicBlock(inputs, outputs, stride, downsample)
        if first:
            super().__init__(changing, *(BasicBlock(outputs, outputs) for _ in range(count - 1)))
        else:
            super().__init__(*(BasicBlock(inputs, inputs) for _ in range(count - 1)), changing)


class HourglassModule(nn.Module):
    def __init__(self, depth: int, channels: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.depth = depth
        here, below = channels[0], channels[1]
        self.up1 = Layer(blocks[0], here, here)
        self.low1 = Layer(blocks[0], here, below, stride=2)
        if self.depth > 1:
            self.low2: nn.Module = HourglassModule(depth - 1, channels[1:], blocks[1:])
        else:
            self.low2 = Layer(blocks[1], below, below)
        self.low3 = Layer(blocks[0], below, here, first=False)
        self.up2 = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        up1 = self.up1(x)
        up2 = self.up2(self.low3(self.low2(self.low1(x))))
        return up1 + up2


class HourglassNet(nn.Module):
    """(B, 3, H, W) -> list of features (B, feature, H/4, W/4)"""

    def __init__(
        self,
        stacks: int = 1,
        channels: Sequence[int] = (256, 256, 384, 384, 384, 512),
        blocks: Sequence[int] = (2, 2, 2, 2, 2, 4),
        stem: int = 128,
        feature: int = 256,
    ) -> None:
        super().__init__()
        self.num_stacks = stacks
        here = channels[0]
        self.stem = nn.Sequential(ConvModule(3, stem, 7, 2), Layer(1, stem, here, stride=2))
        self.hourglass_modules = nn.ModuleList(
            [HourglassModule(len(channels) - 1, channels, blocks) for _ in range(stacks)]
        )
        # With one stack, a block that nothing calls: a layer has at least one.
        self.inters = Layer(stacks - 1, here, here)
        self.conv1x1s = nn.ModuleList(
            ConvModule(here, here, 1, act=False) for _ in range(stacks - 1)
        )
        self.out_convs = nn.ModuleList(ConvModule(here, feature, 3) for _ in range(stacks))
        self.remap_convs = nn.ModuleList(
            ConvModule(feature, here, 1, act=False) for _ in range(stacks - 1)
        )
        self.relu = nn.ReLU(inplace=True)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(self, x: Tensor) -> list[Tensor]:
        inter_feat = self.stem(x)
        out_feats = []
        for ind in range(self.num_stacks):
            out_feat = self.out_convs[ind](self.hourglass_modules[ind](inter_feat))
            out_feats.append(out_feat)
            if ind < self.num_stacks - 1:
                inter_feat = self.conv1x1s[ind](inter_feat) + self.remap_convs[ind](out_feat)
                inter_feat = self.inters[ind](self.relu(inter_feat))
        return out_feats


class Estimator(nn.Module):
    """Backbone and head: the last convolution of every stack belongs to the head.

    (B, 3, H, W) -> list of (B, joints, H/4, W/4)
    """

    def __init__(self, backbone: HourglassNet, feature: int, joints: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleList(nn.Conv2d(feature, joints, 1) for _ in range(backbone.num_stacks))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(y) for layer, y in zip(self.head, self.backbone(x), strict=True)]
