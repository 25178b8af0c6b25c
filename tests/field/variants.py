"""One small hourglass, written in all the ways in which the field writes its parts.

`Varied` takes one word per axis. `variants()` walks along each axis from a common base and adds
pairs of words drawn at random, so that ways of writing meet that no public network combines.
"""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, JOINTS, DEPTH = 16, 3, 2
GROUPS = 4

AXES: dict[str, tuple[str, ...]] = {
    "block": (
        "preactivated",
        "basic",
        "bottleneck x2",
        "bottleneck x4",
        "multi-scale",
        "fire",
        "conv",
        "conv-relu-norm",
    ),
    "skip": (
        "identity",
        "none",
        "absent",
        "empty",
        "unused",
        "1x1",
        "1x1-norm",
        "norm-relu-1x1",
        "pool-1x1-norm",
        "projected",
    ),
    "norm": ("batch", "group", "sync", "missing", "eps", "not affine", "instance"),
    "relu": ("module", "inplace", "shared", "F", "F inplace", "torch", "method", "clamp"),
    "down": ("module", "F", "F stride", "average", "average module", "stride", "subclass", "3x3"),
    "up": (
        "F",
        "module",
        "nearest2d",
        "own",
        "deconvolution",
        "bilinear",
        "bilinear corners",
        "fixed size",
        "skip's size",
        "repeat",
        "norm behind",
    ),
    "add": ("a+b", "b+a", "iadd", "torch", "module", "operator", "sum", "stack", "method"),
    "recursion": ("nested", "method", "modules by name", "loop", "closure"),
    "io": (
        "tensor",
        "list",
        "tuple",
        "stack",
        "dict",
        "ordered",
        "list of dicts",
        "two",
        "namedtuple",
        "nhwc",
    ),
}
BASE = {axis: words[0] for axis, words in AXES.items()}

Stacks = namedtuple("Stacks", ("first", "last"))


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Pool(nn.MaxPool2d):
    """A subclass, as some code bases have for their registries."""


class Upsample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


def make_norm(kind: str, channels: int) -> nn.Module | None:
    if kind == "group":
        return nn.GroupNorm(GROUPS, channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)
    if kind == "sync":
        return nn.SyncBatchNorm(channels)
    if kind == "missing":
        return None
    if kind == "eps":
        return nn.BatchNorm2d(channels, eps=1e-2, momentum=None)
    return nn.BatchNorm2d(channels, affine=kind != "not affine")


class Relu(nn.Module):
    """The axis `relu` as one module; `Shared` is the same object wherever it is used."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("module", "inplace", "shared"):
            self.act = nn.ReLU(inplace=kind != "module")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "F":
            return F.relu(x)
        if self.kind == "F inplace":
            return F.relu(x, True)
        if self.kind == "torch":
            return torch.relu(x)
        if self.kind == "method":
            return x.relu_()
        if self.kind == "clamp":
            return x.clamp(min=0)
        return self.act(x)


def make_add(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    def iadd(a: Tensor, b: Tensor) -> Tensor:
        a += b
        return a

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "a+b": lambda a, b: a + b,
        "b+a": lambda a, b: b + a,
        "iadd": iadd,
        "torch": torch.add,
        "module": Add(),
        "operator": operator.add,
        "sum": lambda a, b: sum([a, b]),  # type: ignore[arg-type,return-value]
        "stack": lambda a, b: torch.stack([a, b]).sum(0),
        "method": lambda a, b: a.add(b, alpha=1),
    }
    return ways[kind]


class Parts:
    """Makers of layers for one choice of words."""

    def __init__(self, words: dict[str, str]) -> None:
        self.words = words
        self.shared = Relu(words["relu"])
        self.add = make_add(words["add"])

    def norm(self, channels: int) -> nn.Module:
        return make_norm(self.words["norm"], channels) or nn.Identity()

    def relu(self) -> nn.Module:
        return self.shared if self.words["relu"] == "shared" else Relu(self.words["relu"])

    def chain(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        """The branch of a block, up to where the shortcut is added."""
        kind = self.words["block"]
        norm, relu = self.norm, self.relu
        three = partial(nn.Conv2d, kernel_size=3, padding=1)
        if kind == "preactivated":
            half = outputs // 2
            layers = [norm(inputs), relu(), nn.Conv2d(inputs, half, 1)]
            layers += [norm(half), relu(), three(half, half, stride=stride)]
            layers += [norm(half), relu(), nn.Conv2d(half, outputs, 1)]
        elif kind == "basic":
            layers = [three(inputs, outputs, stride=stride, bias=False), norm(outputs), relu()]
            layers += [three(outputs, outputs, bias=False), norm(outputs)]
        elif kind in ("bottleneck x2", "bottleneck x4"):
            middle = outputs // int(kind[-1])
            layers = [nn.Conv2d(inputs, middle, 1, bias=False), norm(middle), relu()]
            layers += [three(middle, middle, stride=stride, bias=False), norm(middle), relu()]
            layers += [nn.Conv2d(middle, outputs, 1, bias=False), norm(outputs)]
        elif kind == "conv":
            layers = [three(inputs, outputs, stride=stride), norm(outputs), relu()]
        elif kind == "conv-relu-norm":
            layers = [three(inputs, outputs, stride=stride), relu(), norm(outputs)]
        else:
            return Wide(self, inputs, outputs, stride, fire=kind == "fire")
        return nn.Sequential(*layers)

    @property
    def is_relu_behind(self) -> bool:
        return self.words["block"] in ("basic", "bottleneck x2", "bottleneck x4", "fire")


class Wide(nn.Module):
    """Blocks that concatenate: FAN's three convolutions, a fire module's two."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int, fire: bool) -> None:
        super().__init__()
        half, quarter = outputs // 2, outputs // 4
        self.fire = fire
        if fire:
            self.squeeze, self.norm1 = nn.Conv2d(inputs, half, 1), parts.norm(half)
            self.a = nn.Conv2d(half, half, 1, stride)
            self.b = nn.Conv2d(half, half, 3, stride, 1, groups=half)
            self.norm2 = parts.norm(outputs)
        else:
            widths = ((inputs, half, stride), (half, quarter, 1), (quarter, quarter, 1))
            self.steps = nn.ModuleList(
                nn.Sequential(
                    parts.norm(a), parts.relu(), nn.Conv2d(a, b, 3, s, padding=1, bias=False)
                )
                for a, b, s in widths
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.fire:
            y = self.norm1(self.squeeze(x))
            return self.norm2(torch.cat([self.a(y), self.b(y)], dim=1))
        outs = []
        for step in self.steps:
            # A copy: its norm may be missing, and the ReLU in place.
            x = step(x.clone())
            outs.append(x)
        return torch.cat(outs, 1)


class Block(nn.Module):
    def __init__(self, parts: Parts, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.skip_kind = parts.words["skip"]
        self.add = parts.add
        self.chain = parts.chain(inputs, outputs, stride)
        # An in-place ReLU that comes first would change the shortcut too.
        self.copies = parts.words["norm"] == "missing" and parts.words["block"] == "preactivated"
        self.relu = parts.relu() if parts.is_relu_behind else None
        changes = stride != 1 or inputs != outputs
        if self.skip_kind == "absent":
            return
        conv = nn.Conv2d(inputs, outputs, 1, stride)
        projections: dict[str, Callable[[], list[nn.Module]]] = {
            "1x1-norm": lambda: [conv, parts.norm(outputs)],
            "projected": lambda: [conv, parts.norm(outputs)],
            "norm-relu-1x1": lambda: [nn.BatchNorm2d(inputs), nn.ReLU(), conv],
            "pool-1x1-norm": lambda: [
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            ],
        }
        build = projections.get(self.skip_kind, lambda: [conv])
        if changes or self.skip_kind in ("unused", "projected", "1x1"):
            self.skip: nn.Module | None = nn.Sequential(*build())
        else:
            self.skip = {"none": None, "empty": nn.Sequential()}.get(self.skip_kind, Identity())
        self.needed = self.skip_kind != "unused" or changes

    def forward(self, x: Tensor) -> Tensor:
        y = self.chain(x.clone() if self.copies else x)
        if self.skip_kind != "absent":
            shortcut = self.skip(x) if self.skip is not None and self.needed else x
            y = self.add(y, shortcut)
        return self.relu(y) if self.relu is not None else y


class Down(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        layers = {
            "module": nn.MaxPool2d(2, 2),
            "subclass": Pool(2),
            "average module": nn.AvgPool2d(2),
            "3x3": nn.MaxPool2d(3, 2, 1),
        }
        self.layer = layers.get(kind)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "F":
            return F.max_pool2d(x, 2)
        if self.kind == "F stride":
            return F.max_pool2d(x, kernel_size=[2, 2], stride=2)
        if self.kind == "average":
            return F.avg_pool2d(x, 2, stride=2)
        if self.layer is not None:
            return self.layer(x)
        return x  # "stride": the block behind it descends


class Up(nn.Module):
    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind = kind
        layers: dict[str, Callable[[], nn.Module]] = {
            "module": lambda: nn.Upsample(scale_factor=2),
            "nearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
            "own": Upsample,
            "deconvolution": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1),
            "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
            "bilinear corners": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
            "fixed size": lambda: nn.Upsample(size=(size, size)),
            "norm behind": lambda: nn.Sequential(
                nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
                nn.Upsample(scale_factor=2),
                nn.BatchNorm2d(WIDTH),
            ),
        }
        self.layer = layers[kind]() if kind in layers else None

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        if self.kind == "F":
            return F.interpolate(low, scale_factor=2)
        if self.kind == "skip's size":
            return F.interpolate(low, size=skip.shape[2:])
        if self.kind == "repeat":
            return low.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        assert self.layer is not None
        return self.layer(low)


class Level(nn.Module):
    """The places of one level; `below` is the next one where modules are nested."""

    def __init__(self, parts: Parts, size: int, below: nn.Module | None) -> None:
        super().__init__()
        down = parts.words["down"]
        self.upper = Block(parts, WIDTH, WIDTH)
        self.down = Down(down)
        self.enter = Block(parts, WIDTH, WIDTH, 2 if down == "stride" else 1)
        self.below = below
        self.leave = Block(parts, WIDTH, WIDTH)
        self.up = Up(parts.words["up"], size)
        self.add = parts.add

    def descend(self, x: Tensor) -> Tensor:
        return self.enter(self.down(x))

    def join(self, x: Tensor, low: Tensor) -> Tensor:
        upper = self.upper(x)
        return self.add(upper, self.up(self.leave(low), upper))

    def forward(self, x: Tensor) -> Tensor:
        assert self.below is not None
        return self.join(x, self.below(self.descend(x)))


class Hourglass(nn.Module):
    def __init__(self, parts: Parts, size: int) -> None:
        super().__init__()
        self.kind = parts.words["recursion"]
        bottom = Block(parts, WIDTH, WIDTH)
        sizes = [size >> level for level in range(DEPTH)]
        if self.kind == "nested":
            inner: nn.Module = bottom
            for each in reversed(sizes):
                inner = Level(parts, each, inner)
            self.outermost = inner
            return
        levels = [Level(parts, each, None) for each in sizes]
        self.bottom = bottom
        if self.kind == "modules by name":
            for number, level in enumerate(levels):
                self.add_module(f"level_{number}", level)
        else:
            self.levels = nn.ModuleList(levels)

    def at(self, number: int) -> Level:
        if self.kind == "modules by name":
            return self._modules["level_" + str(number)]  # type: ignore[return-value]
        return self.levels[number]  # type: ignore[return-value]

    def method(self, number: int, x: Tensor) -> Tensor:
        if number == DEPTH:
            return self.bottom(x)
        level = self.at(number)
        return level.join(x, self.method(number + 1, level.descend(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "nested":
            return self.outermost(x)
        if self.kind == "loop":
            kept = []
            for level in self.levels:
                kept.append(x)
                x = level.descend(x)  # type: ignore[operator]
            x = self.bottom(x)
            for level in reversed(self.levels):  # type: ignore[call-overload]
                x = level.join(kept.pop(), x)
            return x
        if self.kind == "closure":

            def inner(rest: list[nn.Module], x: Tensor) -> Tensor:
                if not rest:
                    return self.bottom(x)
                return rest[0].join(x, inner(rest[1:], rest[0].descend(x)))  # type: ignore[operator]

            return inner(list(self.levels), x)
        return self.method(0, x)


class Varied(nn.Module):
    """(B, 3, 32, 32), or (B, 32, 32, 3) -> heatmaps (B, 3, 16, 16) of two stacks, in a container

    Unless a size is fixed in it, it takes other multiples of 8 too.
    """

    def __init__(self, size: int = 16, **words: str) -> None:
        super().__init__()
        self.words = {**BASE, **words}
        parts = Parts(self.words)
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), parts.relu()
        )
        self.hourglasses = nn.ModuleList(Hourglass(parts, size) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(WIDTH, JOINTS, 1) for _ in range(2))
        self.features = nn.Conv2d(WIDTH, WIDTH, 1)
        self.maps = nn.Conv2d(JOINTS, WIDTH, 1)
        self.add = parts.add

    def forward(self, x: Tensor) -> Any:
        io = self.words["io"]
        if io == "nhwc":
            x = x.permute(0, 3, 1, 2)
        x = self.stem(x)
        y = self.hourglasses[0](x)
        first = self.heads[0](y)
        x = self.add(self.add(self.features(y), self.maps(first)), x)
        last = self.heads[1](self.hourglasses[1](x))
        if io == "list":
            return [first, last]
        if io == "tuple":
            return first, last
        if io in ("stack", "nhwc"):
            return torch.stack([first, last], dim=1)
        if io == "dict":
            return {"first": first, "last": last}
        if io == "ordered":
            return OrderedDict(first=first, last=last)
        if io == "list of dicts":
            return [{"hm": first}, {"hm": last}]
        if io == "two":
            return [first], last
        if io == "namedtuple":
            return Stacks(first, last)
        return last


def shape_of(words: dict[str, str], size: int = 32, batch: int = 1) -> tuple[int, ...]:
    if words.get("io") == "nhwc":
        return batch, size, size, 3
    return batch, 3, size, size


def variants(pairs: int = 40, seed: int = 0) -> dict[str, dict[str, str]]:
    """Choices of words, by a name for the test."""
    found: dict[str, dict[str, str]] = {"base": {}}
    for axis, words in AXES.items():
        for word in words[1:]:
            found[f"{axis}: {word}"] = {axis: word}
    draw = random.Random(seed)
    while len(found) < 1 + sum(len(words) - 1 for words in AXES.values()) + pairs:
        chosen = {axis: draw.choice(AXES[axis]) for axis in draw.sample(sorted(AXES), 3)}
        found[", ".join(f"{axis}: {word}" for axis, word in chosen.items())] = chosen
    return found
