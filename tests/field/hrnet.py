"""The high-resolution network: parallel branches that exchange what they know, again and again.

A branch's list of inputs is changed in place by `forward`; transitions and fuse layers hold None
where nothing is to be done; sums of up to four maps end in one ReLU; norms have momentum 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

BN_MOMENTUM = 0.1


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=BN_MOMENTUM)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, planes), norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv3x3(planes, planes), norm(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, downsample: nn.Module | None = None) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, kernel_size=1, bias=False)
        self.bn1 = norm(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes), norm(planes)
        self.conv3 = nn.Conv2d(planes, outputs, kernel_size=1, bias=False)
        self.bn3 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


def layer(block: type[BasicBlock | Bottleneck], inputs: int, planes: int, count: int) -> nn.Module:
    outputs = planes * block.expansion
    downsample = None
    if inputs != outputs:
        downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), norm(outputs))
    blocks = [block(inputs, planes, downsample)]
    blocks += [block(outputs, planes) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


class HighResolutionModule(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, multi_scale_output: bool) -> None:
        super().__init__()
        self.num_branches = len(widths)
        self.branches = nn.ModuleList([layer(BasicBlock, w, w, blocks) for w in widths])
        outputs = len(widths) if multi_scale_output else 1
        rows: list[nn.Module] = []
        for i in range(outputs):
            row = [self._exchange(widths, i, j) for j in range(len(widths))]
            rows.append(nn.ModuleList(row))  # type: ignore[arg-type]
        self.fuse_layers = nn.ModuleList(rows)
        self.relu = nn.ReLU(True)

    @staticmethod
    def _exchange(widths: Sequence[int], i: int, j: int) -> nn.Module | None:
        if i == j:
            return None
        if j > i:
            return nn.Sequential(
                nn.Conv2d(widths[j], widths[i], 1, 1, 0, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.Upsample(scale_factor=2 ** (j - i), mode="nearest"),
            )
        chain: list[nn.Module] = []
        for k in range(i - j):
            last = k == i - j - 1
            outputs = widths[i] if last else widths[j]
            step: list[nn.Module] = [conv3x3(widths[j], outputs, 2), nn.BatchNorm2d(outputs)]
            if not last:
                step.append(nn.ReLU(True))
            chain.append(nn.Sequential(*step))
        return nn.Sequential(*chain)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        if self.num_branches == 1:
            return [self.branches[0](x[0])]
        for i in range(self.num_branches):
            x[i] = self.branches[i](x[i])
        fused = []
        for i in range(len(self.fuse_layers)):
            row = self.fuse_layers[i]
            y = x[0] if i == 0 else row[0](x[0])
            for j in range(1, self.num_branches):
                y = y + x[j] if i == j else y + row[j](x[j])
            fused.append(self.relu(y))
        return fused


class PoseHighResolutionNet(nn.Module):
    """(B, 3, H, W) -> (B, joints, H/4, W/4), or a tuple of all branches without a head"""

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 256),
        modules: Sequence[int] = (1, 4, 3),
        blocks: int = 4,
        stem: int = 64,
        joints: int | None = 17,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, stem, 2), norm(stem)
        self.conv2, self.bn2 = conv3x3(stem, stem, 2), norm(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = layer(Bottleneck, stem, stem, blocks)
        before = [stem * Bottleneck.expansion]
        for number, count in enumerate(modules, start=2):
            now = list(widths[:number])
            setattr(self, f"transition{number - 1}", self._transition(before, now))
            last = number == len(widths) and joints is not None
            stage = [
                HighResolutionModule(now, blocks, not (last and k == count - 1))
                for k in range(count)
            ]
            setattr(self, f"stage{number}", nn.Sequential(*stage))
            before = now
        self.stages = len(modules) + 1
        self.final_layer = None if joints is None else nn.Conv2d(widths[0], joints, 1)

    @staticmethod
    def _transition(before: list[int], now: list[int]) -> nn.ModuleList:
        layers: list[nn.Module | None] = []
        for i, width in enumerate(now):
            if i < len(before):
                same = width == before[i]
                layers.append(
                    None
                    if same
                    else nn.Sequential(
                        conv3x3(before[i], width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
                    )
                )
            else:
                down = nn.Sequential(
                    conv3x3(before[-1], width, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
                )
                layers.append(nn.Sequential(down))
        return nn.ModuleList(layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        y_list = [self.layer1(x)]
        for number in range(2, self.stages + 1):
            x_list = []
            for i, transition in enumerate(getattr(self, f"transition{number - 1}")):
                if transition is not None:
                    # A new branch grows from the coarsest one; the first stage has only one.
                    x_list.append(transition(y_list[-1]))
                else:
                    x_list.append(y_list[i])
            y_list = getattr(self, f"stage{number}")(x_list)
        if self.final_layer is None:
            return tuple(y_list)
        return self.final_layer(y_list[0])
