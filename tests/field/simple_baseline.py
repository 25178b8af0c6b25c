"""A ResNet and three deconvolutions: the baseline for human pose.

Post-activation blocks of both kinds, a stem with a 3x3 max pooling of stride 2, and deconvolutions
of kernel 4, 3 or 2 whose padding and output padding depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

BN_MOMENTUM = 0.1


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, momentum=BN_MOMENTUM)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, momentum=BN_MOMENTUM)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, momentum=BN_MOMENTUM)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, momentum=BN_MOMENTUM)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, momentum=BN_MOMENTUM)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        out = self.relu(out)
        return out


class PoseResNet(nn.Module):
    """(B, 3, H, W) -> (B, joints, H/4, W/4)"""

    deconv_with_bias = False

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck] = Bottleneck,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        deconvolutions: Sequence[int] = (256, 256, 256),
        kernel: int = 4,
        joints: int = 17,
    ) -> None:
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width, momentum=BN_MOMENTUM)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._layer(block, width, layers[0])
        self.layer2 = self._layer(block, width * 2, layers[1], stride=2)
        self.layer3 = self._layer(block, width * 4, layers[2], stride=2)
        self.layer4 = self._layer(block, width * 8, layers[3], stride=2)
        self.deconv_layers = self._deconvolutions(deconvolutions, kernel)
        self.final_layer = nn.Conv2d(self.inplanes, joints, kernel_size=1)

    def _layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, count: int, stride: int = 1
    ) -> nn.Sequential:
        outputs = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outputs:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, outputs, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(outputs, momentum=BN_MOMENTUM),
            )
        blocks = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = outputs
        blocks.extend(block(self.inplanes, planes) for _ in range(1, count))
        return nn.Sequential(*blocks)

    def _deconvolutions(self, widths: Sequence[int], kernel: int) -> nn.Sequential:
        padding, output_padding = {4: (1, 0), 3: (1, 1), 2: (0, 0)}[kernel]
        layers: list[nn.Module] = []
        for planes in widths:
            layers += [
                nn.ConvTranspose2d(
                    in_channels=self.inplanes,
                    out_channels=planes,
                    kernel_size=kernel,
                    stride=2,
                    padding=padding,
                    output_padding=output_padding,
                    bias=self.deconv_with_bias,
                ),
                nn.BatchNorm2d(planes, momentum=BN_MOMENTUM),
                nn.ReLU(inplace=True),
            ]
            self.inplanes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.final_layer(self.deconv_layers(x))
