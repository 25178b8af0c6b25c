"""Networks that nobody told us of, as people might write them: they must stay right, whole or not.

`STRANGERS` gives a builder and shapes for each. Some cannot be traced, some compute what no plan
knows, some only look like what is known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = ((1, 3, 32, 32), (2, 3, 64, 48))
FREE = ((1, 3, 32, 32), (2, 3, 45, 37))  # for those that take any size


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(*conv_bn(inputs, outputs, kernel, stride), nn.ReLU(inplace=True))


class Basic(nn.Module):
    """A residual block with whatever activation, strides and extras are asked for."""

    def __init__(
        self,
        width: int,
        act: Callable[[], nn.Module] = nn.ReLU,
        dilation: int = 1,
        groups: int = 1,
        scale: float = 1.0,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()

        def conv() -> nn.Conv2d:
            return nn.Conv2d(
                width, width, 3, 1, dilation, dilation=dilation, groups=groups, bias=False
            )

        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(width)
        self.act1, self.act2 = act(), act()
        self.scale, self.attention = scale, attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.attention is not None:
            y = self.attention(y)
        if self.scale != 1.0:
            y = self.scale * y
        return self.act2(x + y)


class Preact(nn.Module):
    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, half, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, **options),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Hourglass(nn.Module):
    """Of any blocks; what happens to the skip and to the sum can be changed."""

    def __init__(self, depth: int, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.up, self.down, self.out = block(), block(), block()
        self.inner = Hourglass(depth - 1, block) if depth > 1 else block()

    def forward(self, x: Tensor) -> Tensor:
        low = self.out(self.inner(self.down(F.max_pool2d(x, 2))))
        return self.up(x) + F.interpolate(low, scale_factor=2)


class Net(nn.Module):
    """A stem of stride 2, a body and a head."""

    def __init__(self, body: nn.Module, width: int = 16, head: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width, 3, 2)
        self.body = body
        self.head = nn.Conv2d(width, 5, 1) if head is None else head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)))


def hourglass_of(block: Callable[[], nn.Module], depth: int = 2) -> nn.Module:
    return Net(Hourglass(depth, block))


# --- shapes of networks ---


class UNet(nn.Module):
    """Skips are concatenated; the way up takes whatever size the skip has."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24), mode: str = "nearest") -> None:
        super().__init__()
        self.mode = mode
        self.encoder = nn.ModuleList(
            nn.Sequential(conv_bn_relu(a, b), conv_bn_relu(b, b))
            for a, b in zip((3, *widths[:-1]), widths, strict=True)
        )
        pairs = list(pairwise(widths))[::-1]
        self.decoder = nn.ModuleList(conv_bn_relu(a + b, a) for a, b in pairs)
        self.head = nn.Conv2d(widths[0], 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, stage in enumerate(self.encoder):
            if i:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x = stage(x)
            skips.append(x)
        x = skips.pop()
        for stage in self.decoder:
            skip = skips.pop()
            x = stage(torch.cat([F.interpolate(x, size=skip.shape[2:], mode=self.mode), skip], 1))
        return self.head(x)


class Shuffle(nn.Module):
    """Half the channels pass, half are worked on, then all are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn_relu(half, half, 1),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_bn_relu(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        y = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = y.size()
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class LiteHR(nn.Module):
    """Two resolutions that exchange; weights across resolutions by pooled attention."""

    def __init__(self) -> None:
        super().__init__()
        self.high = nn.Sequential(Shuffle(16), Shuffle(16))
        self.low = nn.Sequential(conv_bn_relu(16, 32, 3, 2), Shuffle(32), Shuffle(32))
        self.to_high = nn.Sequential(*conv_bn(32, 16, 1), nn.Upsample(scale_factor=2))
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(x)
        low = self.low(x)
        y = F.relu(high + self.to_high(low))
        return y * torch.sigmoid(self.weigh(y))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = inputs * 3
        self.use_shortcut = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *conv_bn(inputs, middle, 1),
            nn.ReLU6(inplace=True),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU6(inplace=True),
            *conv_bn(middle, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.use_shortcut else self.layers(x)


def mobile() -> nn.Module:
    return nn.Sequential(
        conv_bn_relu(3, 8, 3, 2),
        Inverted(8, 8, 1),
        Inverted(8, 16, 2),
        Inverted(16, 16, 1),
        nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=4, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(True),
        nn.Conv2d(16, 5, 1),
    )


class MultiStage(nn.Module):
    """Down and up twice; the second stage adds what the first had at each resolution."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width, 3, 2)

        def stage() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    "down": nn.ModuleList([Basic(width), conv_bn_relu(width, width, 3, 2)]),
                    "up": nn.ModuleList([nn.Sequential(*conv_bn(width, width, 1)), Basic(width)]),
                    "skip": conv_bn_relu(width, width, 1),
                    "head": nn.Conv2d(width, 5, 3, padding=1),
                }
            )

        self.stages = nn.ModuleList([stage(), stage()])

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        x = self.stem(x)
        before: tuple[Tensor, Tensor] | None = None
        results = []
        for stage in self.stages:
            fine = stage["down"][0](x)
            if before is not None:
                fine = fine + before[0]
            coarse = stage["down"][1](fine)
            if before is not None:
                coarse = coarse + before[1]
            up = F.interpolate(
                stage["up"][0](coarse), size=fine.shape[-2:], mode="bilinear", align_corners=True
            )
            x = stage["up"][1](torch.relu(fine + up))
            before = stage["skip"](x), F.relu(coarse)
            results.append([stage["head"](coarse), stage["head"](x)])
        return results


class Tree(nn.Module):
    """Deep aggregation: every node concatenates its children's results."""

    def __init__(self, levels: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.project = nn.Sequential(*conv_bn(inputs, outputs, 1)) if inputs != outputs else None
        if levels == 1:
            self.left: nn.Module = conv_bn_relu(inputs, outputs)
            self.right: nn.Module = conv_bn_relu(outputs, outputs)
        else:
            self.left = Tree(levels - 1, inputs, outputs)
            self.right = Tree(levels - 1, outputs, outputs)
        self.root = nn.Sequential(*conv_bn(2 * outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.project is None else self.project(x)
        left = self.left(x)
        return F.relu(self.root(torch.cat([self.right(left), left], 1)) + residual)


class Offsets(nn.Module):
    """Heatmaps, short- and mid-range offsets, and a score, in one dict with a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net(Hourglass(2, partial(Basic, 16)), head=nn.Identity())
        self.heat = nn.Conv2d(16, 5, 1)
        self.short, self.mid = nn.Conv2d(16, 10, 1), nn.Conv2d(16, 8, 1)
        self.score = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        return {
            "heatmap": self.heat(y).sigmoid(),
            "offsets": (self.short(y), self.mid(y)),
            "score": self.score(y.mean((2, 3))),
            "stride": 2,
            "nothing": None,
        }


class Twice(nn.Module):
    """One hourglass, run twice on its own output, and one head for both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, 3, 2)
        self.hourglass = Hourglass(2, partial(Preact, 16))
        self.head = nn.Conv2d(16, 5, 1)
        self.back = nn.Conv2d(5, 16, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        results = []
        for _ in range(2):
            y = self.hourglass(x)
            results.append(self.head(y))
            x = x + y + self.back(results[-1])
        return results


class Tied(nn.Module):
    """The two stages are two modules with the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, 3, 2)
        self.first, self.second = Basic(16), Basic(16)
        self.second.conv1.weight = self.first.conv1.weight
        self.second.bn1 = self.first.bn1
        self.head = nn.Conv2d(16, 16, 1)
        self.project = nn.Conv2d(16, 16, 1)
        self.project.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.head(self.second(self.first(self.stem(x)))))


class Pyramid(nn.Module):
    """Lateral connections and top-down sums, five outputs in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 24, 32)
        self.down = nn.ModuleList(
            conv_bn_relu(a, b, 3, 2) for a, b in zip((3, *widths[:-1]), widths, strict=True)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, 16, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        results = []
        top = None
        for lateral, smooth, y in zip(
            reversed(self.lateral), reversed(self.smooth), reversed(maps), strict=True
        ):
            y = lateral(y)
            if top is not None:
                y = y + F.interpolate(top, size=y.shape[-2:], mode="nearest")
            top = y
            results.append(smooth(y))
        return (*results, F.max_pool2d(results[0], 1, stride=2))


# --- parts that look like what is known, and are not ---


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, linear: bool) -> None:
        super().__init__()
        if linear:
            self.fc: nn.Module = nn.Sequential(
                nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width), nn.Sigmoid()
            )
        else:
            self.fc = nn.Sequential(
                nn.Conv2d(width, 4, 1), nn.SiLU(), nn.Conv2d(4, width, 1), nn.Hardsigmoid()
            )
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            b, c, _, _ = x.size()
            weights = self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        else:
            weights = self.fc(x.mean(dim=(2, 3), keepdim=True))
        return x * weights.expand_as(x)


class SpatialAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        best = torch.max(x, dim=1, keepdim=True)[0]
        mean = x.mean(1, keepdim=True)
        return x * torch.sigmoid(self.conv(torch.cat([best, mean], 1)))


class Coordinates(nn.Module):
    """Two more channels that say where a pixel is, made for the size at hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width + 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h, dtype=x.dtype, device=x.device).view(1, 1, h, 1)
        columns = torch.linspace(-1, 1, w, dtype=x.dtype, device=x.device).view(1, 1, 1, w)
        where = torch.cat([rows.expand(b, 1, h, w), columns.expand(b, 1, h, w)], 1)
        return self.conv(torch.cat([x, where], 1))


class Blend(nn.Module):
    """Learned scalars on both sides of the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(width, width))
        self.alpha = nn.Parameter(torch.tensor(0.7))
        self.beta = nn.Parameter(torch.full((1, width, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.alpha * x + self.beta * self.body(x))


class TwoReadings(nn.Module):
    """The shortcut is read after an in-place ReLU, so it is not the block's input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        z = self.relu(y)
        return self.conv(z) + y


class Difference(nn.Module):
    """x - f(x), and alpha in the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = Preact(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x), alpha=0.5) - self.body(x)


class PartialSum(nn.Module):
    """Only some channels are added, into a slice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, ::2] += self.conv(x)
        return x


class Broadcast(nn.Module):
    """The sum broadcasts: a column, a row and a single pixel are added to a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bias = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + x.mean(2, keepdim=True) + x.amax(3, keepdim=True) + self.bias


class ByShape(nn.Module):
    """What is computed depends on the input's size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.small, self.large = Preact(width), Basic(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) if x.shape[-1] > 16 else self.small(x)


class ByValue(nn.Module):
    """What is computed depends on the input's values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = Preact(width), Basic(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.mean() > 0 else self.b(x)


class Odd(nn.Module):
    """Pads what does not fit, and cuts it off again."""

    def __init__(self, body: nn.Module, multiple: int) -> None:
        super().__init__()
        self.body, self.multiple = body, multiple

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        right, below = -w % self.multiple, -h % self.multiple
        y = self.body(F.pad(x, (0, right, 0, below), mode="replicate"))
        return y[..., :h, :w]


class FloatNorm(nn.Module):
    """A norm in float64, as some keep it for its statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width).double()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x).double()).to(x.dtype)) + x


class Counting(nn.Module):
    """Counts its calls in a buffer, and remembers the last features."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.body(x)
        return self.last + 0 * self.calls


class Functional(nn.Module):
    """No layers: parameters of its own and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(0.1 * torch.randn(16, 16, 3, 3)) for _ in "ab")
        self.gamma = nn.Parameter(torch.rand(16) + 0.5)
        self.register_buffer("mean", 0.1 * torch.randn(16))
        self.register_buffer("var", torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weights[0], stride=1, padding=1)
        y = F.relu(F.batch_norm(y, self.mean, self.var, self.gamma, None, False, 0.1, 1e-3))
        return F.relu(x + F.conv2d(y, self.weights[1] * self.gamma[:, None, None, None], padding=1))


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.body, x, use_reentrant=False)


class Batchwise(nn.Module):
    """Runs image by image, and by parts of the batch."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(image) for image in x.split(1)])


class Flipped(nn.Module):
    """Test-time augmentation inside the network."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.body(x.flip(-1)).flip(-1)) / 2


class SoftArgmax(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.body(x)
        b, k, h, w = maps.shape
        weights = F.softmax(maps.flatten(2), dim=-1).view(b, k, h, w)
        columns = torch.arange(w, dtype=maps.dtype, device=maps.device)
        rows = torch.arange(h, dtype=maps.dtype, device=maps.device)
        xs, ys = (weights.sum(2) * columns).sum(-1), (weights.sum(3) * rows).sum(-1)
        return maps, torch.stack((xs, ys), dim=-1)


class Keyword(nn.Module):
    """Takes a second image by keyword, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = hourglass_of(partial(Preact, 16))

    def forward(self, x: Tensor, other: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = self.body(x)
        if other is not None:
            y = y + self.body(other)
        return y * scale


def weight_normed(new: bool) -> nn.Module:
    body = Preact(16)
    normed = torch.nn.utils.parametrizations.weight_norm if new else _weight_norm
    normed(body.body[5])
    return Net(nn.Sequential(body, Preact(16)))


def _weight_norm(conv: nn.Module) -> nn.Module:
    """The old way: a hook that computes the weight.

    Without gradients, or PyTorch refuses to copy the module.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(conv)


def spectral_normed() -> nn.Module:
    body = Basic(16)
    torch.nn.utils.parametrizations.spectral_norm(body.conv1)
    return Net(nn.Sequential(body, Basic(16)))


def frozen_norm() -> nn.Module:
    """A norm that goes on using the batch's statistics in evaluation."""
    body = Basic(16)
    body.bn1 = nn.BatchNorm2d(16, track_running_stats=False)
    return Net(nn.Sequential(body, Basic(16)))


def with_conv(**options: Any) -> nn.Module:
    return hourglass_of(partial(Preact, 16, **options))


def narrow_float() -> nn.Module:
    """BatchNorms whose variances and scales lie far apart."""
    model = hourglass_of(partial(Preact, 16))
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(10.0 ** (index % 5 - 3))
            module.weight.data.mul_(10.0 ** ((index % 5 - 3) / 2))
    return model


@dataclass(frozen=True)
class Stranger:
    """A builder, inputs, and why eager itself cannot be trained or run in bfloat16, if so."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = SIZES
    untrainable: str = ""
    no_half: str = ""


STRANGERS: dict[str, Stranger] = {
    "U-Net": Stranger(UNet, FREE),
    "U-Net, bilinear": Stranger(partial(UNet, mode="bilinear"), FREE),
    "channel shuffle": Stranger(lambda: Net(LiteHR())),
    "MobileNetV2 and deconvolution": Stranger(mobile, FREE),
    "multi-stage with cross-stage sums": Stranger(MultiStage, FREE),
    "trees": Stranger(lambda: Net(nn.Sequential(Tree(2, 16, 24), Tree(1, 24, 16))), FREE),
    "offset maps": Stranger(Offsets),
    "feature pyramid": Stranger(Pyramid, FREE),
    "one hourglass twice": Stranger(Twice),
    "tied weights": Stranger(Tied, FREE),
    "squeeze and excite": Stranger(
        lambda: hourglass_of(lambda: Basic(16, attention=SqueezeExcite(16, True)))
    ),
    "squeeze and excite, convolutions": Stranger(
        lambda: hourglass_of(lambda: Basic(16, attention=SqueezeExcite(16, False)))
    ),
    "spatial attention": Stranger(
        lambda: hourglass_of(lambda: Basic(16, attention=SpatialAttention()))
    ),
    "coordinates": Stranger(
        lambda: Net(nn.Sequential(Coordinates(16), Hourglass(2, partial(Preact, 16))))
    ),
    "dropout": Stranger(
        lambda: hourglass_of(lambda: nn.Sequential(Preact(16), nn.Dropout2d(0.2), nn.Dropout(0.1)))
    ),
    "LeakyReLU": Stranger(lambda: hourglass_of(partial(Basic, 16, partial(nn.LeakyReLU, 0.1)))),
    "LeakyReLU in place": Stranger(
        lambda: hourglass_of(partial(Basic, 16, partial(nn.LeakyReLU, 0.1, inplace=True)))
    ),
    "SiLU": Stranger(lambda: hourglass_of(partial(Basic, 16, nn.SiLU))),
    "PReLU": Stranger(lambda: hourglass_of(partial(Basic, 16, nn.PReLU))),
    "ReLU6": Stranger(lambda: hourglass_of(partial(Basic, 16, nn.ReLU6))),
    "Hardswish": Stranger(lambda: hourglass_of(partial(Basic, 16, nn.Hardswish))),
    "GELU, ELU, Mish": Stranger(
        lambda: Net(nn.Sequential(*(Basic(16, act) for act in (nn.GELU, nn.ELU, nn.Mish)))), FREE
    ),
    "weight norm": Stranger(partial(weight_normed, True), FREE),
    "weight norm, the old way": Stranger(
        partial(weight_normed, False),
        FREE,
        untrainable="PyTorch cannot copy a module whose weight is computed with gradients",
    ),
    "spectral norm": Stranger(spectral_normed, FREE),
    "batch statistics in evaluation": Stranger(frozen_norm, FREE),
    "LayerNorm over channels": Stranger(
        lambda: Net(nn.Sequential(nn.GroupNorm(1, 16), Preact(16))), FREE
    ),
    "residual scaling": Stranger(lambda: hourglass_of(partial(Basic, 16, scale=0.1))),
    "learned scalars": Stranger(lambda: hourglass_of(partial(Blend, 16))),
    "dilated residuals": Stranger(lambda: hourglass_of(partial(Basic, 16, dilation=2))),
    "grouped residuals": Stranger(lambda: hourglass_of(partial(Basic, 16, groups=2))),
    "reflected borders": Stranger(lambda: with_conv(padding_mode="reflect")),
    "circular borders": Stranger(lambda: with_conv(padding_mode="circular")),
    "a mean of odd size": Stranger(
        lambda: Net(nn.Sequential(Preact(16), nn.AvgPool2d(3, 2, ceil_mode=True), Preact(16))), FREE
    ),
    "a pooling that dilates": Stranger(
        lambda: Net(nn.Sequential(Preact(16), nn.MaxPool2d(3, 1, 1, dilation=1), Basic(16))), FREE
    ),
    "padding by name": Stranger(
        lambda: Net(nn.Sequential(nn.Conv2d(16, 16, 5, padding="same"), Preact(16))), FREE
    ),
    "an even kernel, padded to the same size": Stranger(
        lambda: Net(nn.Sequential(nn.Conv2d(16, 16, 4, padding="same"), Preact(16))), FREE
    ),
    "pixel shuffle head": Stranger(
        lambda: Net(
            Hourglass(2, partial(Basic, 16)),
            head=nn.Sequential(nn.Conv2d(16, 20, 3, padding=1), nn.PixelShuffle(2)),
        )
    ),
    "an asymmetric kernel": Stranger(
        lambda: Net(
            nn.Sequential(
                nn.Conv2d(16, 16, (1, 7), padding=(0, 3)),
                nn.Conv2d(16, 16, (7, 1), padding=(3, 0)),
                Preact(16),
            )
        ),
        FREE,
    ),
    "shortcut after an in-place ReLU": Stranger(lambda: hourglass_of(partial(TwoReadings, 16))),
    "differences": Stranger(lambda: hourglass_of(partial(Difference, 16))),
    "a sum into a slice": Stranger(
        lambda: hourglass_of(partial(PartialSum, 16)),
        untrainable="it overwrites what its gradient needs",
    ),
    "sums that broadcast": Stranger(lambda: hourglass_of(partial(Broadcast, 16))),
    "control flow on shape": Stranger(
        lambda: Net(ByShape(16)), ((1, 3, 32, 32), (1, 3, 32, 64), (2, 3, 45, 37))
    ),
    "control flow on values": Stranger(lambda: Net(ByValue(16)), FREE),
    "pads to a multiple": Stranger(
        lambda: Odd(hourglass_of(partial(Preact, 16)), 8), ((1, 3, 32, 32),)
    ),
    "a norm in float64": Stranger(
        lambda: Net(FloatNorm(16)), FREE, no_half="it converts to float64 in its forward"
    ),
    "counts its calls": Stranger(
        lambda: Counting(hourglass_of(partial(Preact, 16))),
        untrainable="it keeps features with gradients, which PyTorch cannot copy",
    ),
    "functions without layers": Stranger(lambda: Net(Functional()), FREE),
    "gradient checkpointing": Stranger(lambda: Net(Checkpointed(Preact(16))), FREE),
    "image by image": Stranger(lambda: Batchwise(hourglass_of(partial(Preact, 16)))),
    "augmented inside": Stranger(lambda: Flipped(hourglass_of(partial(Basic, 16)))),
    "soft argmax": Stranger(lambda: SoftArgmax(hourglass_of(partial(Preact, 16)))),
    "keywords": Stranger(Keyword),
    "extreme norms": Stranger(narrow_float),
}
