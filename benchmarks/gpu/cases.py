"""What is measured: the ops at the hourglass's sizes, whole networks, and the candidates for each.

A case is a module in eval mode and an input, both made from fixed seeds. A candidate is a way to
run it: a dtype, a layout, a compiler, with or without a CUDA graph around it. Candidates that are
compared are measured in turns, as one item; ``hgfast bf16 graph`` is in each.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hgfast
from hgfast import _native, ops
from hgfast.decoding import METHODS, reference
from hgfast.models import hourglass
from hgfast.models.hourglass import Residual
from hgfast.recognition import recognise
from hgfast.runtime import blocks
from hgfast.runtime.evidence import UNPROVEN

Run = Callable[[], Any]

# ---- Cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What the real run and a rehearsal differ in."""

    features: int = 256
    depth: int = 4
    image: int = 256
    levels: tuple[int, ...] = (64, 32, 16, 8, 4)
    batches: tuple[int, ...] = (64, 1, 8)
    stacks: tuple[int, ...] = (2, 8, 1)
    float16: bool = True  #: whether hgfast has kernels for it
    heatmaps: int = 64  #: their height, for decode
    images: tuple[int, ...] = (128, 1024)  #: likewise


JOINTS = 17  # COCO's; heatmaps are three quarters as wide as high

REAL = Sizes()
REHEARSED = Sizes(32, 2, 64, (8, 4), (2, 1), (1,), float16=False, heatmaps=8, images=(2, 3))


@dataclass(frozen=True)
class Case:
    """``op`` is "bottleneck", "bottleneck + low", "upsample_add", "stem", "head", "conv 1x1",
    "HG-<stacks>" or "decode <method>"."""

    op: str
    batch: int
    size: int  #: height and width of the result, or of the image; height of heatmaps
    sizes: Sizes = field(default=REAL, repr=False)

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}x{self.width} batch {self.batch}"

    @property
    def width(self) -> int:
        return self.size * 3 // 4 if self.is_decode else self.size

    @property
    def is_decode(self) -> bool:
        return self.op.startswith("decode ")

    @property
    def is_network(self) -> bool:
        return self.op.startswith("HG-")

    def module(self) -> nn.Module:
        """In float32 on the CPU. BatchNorms have yet to see data: ``settle`` shows them some."""
        torch.manual_seed(0)
        features = self.sizes.features
        if self.is_network:
            stacks = int(self.op.removeprefix("HG-"))
            return hourglass(stacks, features, depth=self.sizes.depth).eval()
        if self.is_decode:
            return Decode(self.op.removeprefix("decode "))
        if self.op == "bottleneck":
            return Residual(features, features).eval()
        if self.op == "bottleneck + low":
            return Join(features).eval()
        if self.op == "stem":
            return Stem(features // 4).eval()
        if self.op == "head":
            return Head(features).eval()
        if self.op == "conv 1x1":
            return nn.Sequential(nn.Conv2d(features, features, 1), nn.ReLU()).eval()
        return UpsampleAdd().eval()

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(1)
        if self.is_decode:
            shape = (self.batch, JOINTS, self.size, self.width)
            return (torch.rand(shape, generator=generator, device=device),)
        channels = 3 if self.is_network or self.op == "stem" else self.sizes.features
        size = 2 * self.size if self.op == "stem" else self.size
        shapes = [(self.batch, channels, size, size)]
        if self.op == "head":
            shapes *= 2
        if self.op in ("bottleneck + low", "upsample_add"):
            shapes.append((self.batch, channels, self.size // 2, self.size // 2))
        return tuple(torch.randn(shape, generator=generator, device=device) for shape in shapes)

    def flops(self) -> int:
        """Two for each multiply-add of a convolution; one for each sum of upsample_add
        and for each cell of decode."""
        pixels, features = self.batch * self.size * self.width, self.sizes.features
        if self.is_decode:
            return pixels * JOINTS
        if self.op == "upsample_add":
            return pixels * features
        if self.op == "stem":
            return 2 * pixels * features // 4 * 3 * 49
        if self.op == "head":
            return 2 * pixels * features * (2 * features + JOINTS)
        if self.op == "conv 1x1":
            return 2 * pixels * features**2
        if self.op == "bottleneck + low":
            return replace(self, op="bottleneck").flops() + pixels * features
        if self.op == "bottleneck":
            middle = features // 2
            return 2 * pixels * (2 * features * middle + 9 * middle**2)
        return _flops_of_network(self)

    def least_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Inputs, weights and results once each, in 16-bit elements. Of decode the heatmaps in
        ``dtype``, and two coordinates and a score in float32 for each."""
        if self.is_decode:
            maps = self.batch * JOINTS
            return maps * (self.size * self.width * dtype.itemsize + 3 * 4)
        weights = _weights(self)
        pixels = self.batch * self.size**2
        if self.is_network:
            results = int(self.op.removeprefix("HG-")) * 16 * pixels // 16  # joints, a 4th the size
            return 2 * (3 * pixels + results + weights)
        features = self.sizes.features
        if self.op == "stem":
            return 2 * (pixels * (4 * 3 + features // 4) + weights)
        if self.op == "head":
            return 2 * (pixels * (3 * features + JOINTS) + weights)
        elements = 2 * pixels * features
        if self.op in ("bottleneck + low", "upsample_add"):
            elements += pixels * self.sizes.features // 4
        return 2 * (elements + weights)


# Each candidate of an item asks for them, and a network takes its time to be built and traced.


@cache
def _flops_of_network(case: Case) -> int:
    return recognise(case.module()).flops((case.batch, 3, case.size, case.size))


@cache
def _weights(case: Case) -> int:
    return sum(parameter.numel() for parameter in case.module().parameters())


class Join(nn.Module):
    """The upper branch of an hourglass level, and the sum that ends the level."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.upper = Residual(features, features)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        y: Tensor = self.upper(x) + F.interpolate(low, scale_factor=2, mode="nearest")
        return y


class UpsampleAdd(nn.Module):
    def forward(self, skip: Tensor, low: Tensor) -> Tensor:
        return skip + F.interpolate(low, scale_factor=2, mode="nearest")


class Decode(nn.Module):
    """In plain PyTorch. The scores come last: they are what results are compared by, since the
    places of equal maxima in 16 bits are not those in 32."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def forward(self, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        return reference.decode(heatmaps, self.method)


class Stem(nn.Module):
    """What a network begins with."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 7, 2, 3), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))

    def folded(self) -> nn.Module:
        """With the BatchNorm in the convolution, and a ReLU in place."""
        return nn.Sequential(folded(self.conv, self.norm), nn.ReLU(inplace=True))

    def in_kernels(self, x: Tensor) -> Run:
        conv = folded(self.conv, self.norm)
        weight, bias = weights_of(conv)
        if not x.is_cuda:
            return lambda: ops.stem(x, weight, bias)
        kernel = _native.load().CudaStem(x.dtype, weight, bias)
        return lambda: kernel.run(x)


class Head(nn.Module):
    """What follows the last block behind an hourglass, the way into the next stack as one
    convolution, as hgfast folds it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(features, features, 1), nn.BatchNorm2d(features)
        self.heatmaps, self.merge = nn.Conv2d(features, JOINTS, 1), nn.Conv2d(features, features, 1)

    def forward(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.relu(self.norm(self.conv(y)), inplace=True)
        return x + self.merge(z), self.heatmaps(z)

    def folded(self) -> nn.Module:
        result = copy.deepcopy(self)
        result.conv, result.norm = folded(self.conv, self.norm), nn.Identity()
        return result

    def in_kernels(self, y: Tensor, x: Tensor) -> Run:
        first, maps, merge = map(
            weights_of, (folded(self.conv, self.norm), self.heatmaps, self.merge)
        )
        if not y.is_cuda:

            def apart() -> tuple[Tensor, Tensor]:
                z = ops.conv(y, *first, relu=True)
                return ops.conv(z, *merge, add=x), ops.conv(z, *maps)

            return apart
        kernel = _native.load().CudaHead(y.dtype, *first, *maps, *merge)
        return lambda: kernel.run(y, x)[::-1]


def weights_of(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert conv.bias is not None
    return conv.weight.detach(), conv.bias.detach()


class Folded(nn.Module):
    """A residual as three convolutions of PyTorch and what no convolution can absorb: the second
    and third BatchNorm are folded. The best that a library of convolutions can be asked for."""

    def __init__(self, block: Residual) -> None:
        super().__init__()
        scale, shift = affine(block.norm1)
        self.register_buffer("scale", scale[:, None, None].float())
        self.register_buffer("shift", shift[:, None, None].float())
        self.conv1 = folded(block.conv1, block.norm2)
        self.conv2 = folded(block.conv2, block.norm3)
        self.conv3 = copy.deepcopy(block.conv3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(torch.addcmul(self.shift, x, self.scale))
        y = F.relu_(self.conv1(y))
        y = F.relu_(self.conv2(y))
        result: Tensor = self.conv3(y).add_(x)
        return result


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale.detach(), (norm.bias.double() - norm.running_mean.double() * scale).detach()


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    scale, shift = affine(norm)
    result = copy.deepcopy(convolution)
    assert result.bias is not None
    with torch.no_grad():
        result.weight.copy_(convolution.weight.double() * scale[:, None, None, None])
        result.bias.copy_(result.bias.double() * scale + shift)
    return result


@torch.no_grad()
def settle(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Give BatchNorms the statistics of these inputs, so that values keep their size in depth."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    module.train()
    module(*(x[:2] if len(x) > 1 else torch.cat([x, x.flip(-1)]) for x in inputs))
    module.eval()


# ---- Candidates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    kind: str  #: "hgfast", "eager", "folded", "compile" or, of decode, "amax": the maxima alone
    dtype: str  #: "float32", "TF32", "bf16", "fp16"; "medium": a float32 model, bf16 inside
    channels_last: bool = False
    #: Of torch.compile; "contiguous": where hgfast is not in channels_last; of a network in hgfast:
    #: the unproven features that are switched on, and "cuda_graph" where it replays graphs of its
    #: own, with the copies in and out that this takes.
    mode: str = ""
    graph: bool = False  #: under a CUDA graph that is captured here

    @property
    def name(self) -> str:
        words = [self.kind, self.mode, self.dtype]
        words += (
            ["channels_last"]
            if self.channels_last and self.kind in ("eager", "folded", "amax")
            else []
        )
        words += ["graph"] if self.graph else []
        return " ".join(word for word in words if word)

    @property
    def torch_dtype(self) -> torch.dtype:
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return halves.get(self.dtype, torch.float32)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """The global switches under which it is warmed up, captured and called."""
        conv, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = conv.allow_tf32, matmul.allow_tf32, conv.benchmark
        conv.allow_tf32 = matmul.allow_tf32 = self.dtype != "float32"
        conv.benchmark = True  # cuDNN tries its algorithms at the first call of a shape
        try:
            yield
        finally:
            conv.allow_tf32, matmul.allow_tf32, conv.benchmark = before

    def prepare(
        self, case: Case, module: nn.Module, inputs: tuple[Tensor, ...], rehearsed: bool
    ) -> Run:
        """A function of no arguments that runs it once, without a graph.

        ``module`` and ``inputs`` are float32 on the device, and are left as they are.
        """
        dtype, layout = self.torch_dtype, torch.contiguous_format
        if self.channels_last:
            layout = torch.channels_last
        data = tuple(x.to(dtype, memory_format=layout, copy=True) for x in inputs)
        if case.is_decode and self.kind == "hgfast":
            method = case.op.removeprefix("decode ")
            return lambda: ops.decode(*data, method)
        if self.kind == "amax":
            return lambda: torch.amax(*data, dim=(2, 3))
        if self.kind == "hgfast" and case.op == "upsample_add":
            skip, low = data
            return lambda: ops.upsample_add(low, skip)
        if self.kind == "hgfast" and case.op == "conv 1x1":
            assert isinstance(module, nn.Sequential)
            convolution = module[0]
            weight, bias = weights_of(convolution)
            return lambda: ops.conv(*data, weight, bias, relu=True)

        if self.kind == "hgfast" and isinstance(module, (Stem, Head)):
            return module.in_kernels(*data)

        model = copy.deepcopy(module)
        if self.kind == "folded":
            assert isinstance(model, (Residual, Stem, Head))
            model = Folded(model) if isinstance(model, Residual) else model.folded()
        model = model.eval().requires_grad_(False).to(dtype, memory_format=layout)
        if self.kind == "hgfast":
            precision = "medium" if self.dtype != "float32" else "highest"
            features = [word for word in self.mode.split(",") if word]
            own = "cuda_graph" in features
            unproven = ",".join(word for word in features if word != "cuda_graph")
            with asked_for(unproven, alone=not case.is_network):
                model = hgfast.optimize(model, precision, inplace=True, strict=True, cuda_graph=own)
        if self.kind == "compile":
            how: dict[str, Any] = {"mode": self.mode} if self.mode != "default" else {}
            if rehearsed:  # Inductor for the CPU is another compiler, and takes its time
                how = {"backend": "aot_eager"}
            compiled: Any = torch.compile(model, dynamic=False, **how)
            if self.mode != "max-autotune":
                return lambda: compiled(*data)

            def step() -> Any:  # it captures graphs of its own
                torch.compiler.cudagraph_mark_step_begin()
                return compiled(*data)

            return step
        return lambda: model(*data)


@contextlib.contextmanager
def asked_for(features: str, alone: bool = False) -> Iterator[None]:
    """With the kernels switched on that hgfast does not take unasked; with ``alone``, also where
    its rules would take another one."""
    before, rules = os.environ.get(UNPROVEN), blocks.RULES
    os.environ[UNPROVEN] = features or before or ""
    if alone and features:
        blocks.RULES = tuple(replace(rule, least=0) for rule in rules)
    try:
        yield
    finally:
        blocks.RULES = rules
        os.environ.pop(UNPROVEN)
        if before is not None:
            os.environ[UNPROVEN] = before


HGFAST = Candidate("hgfast", "bf16", channels_last=True)
MEDIUM = replace(HGFAST, dtype="medium")
OWN_GRAPH = replace(HGFAST, mode="cuda_graph")
ANCHOR = replace(HGFAST, graph=True)
EAGER = Candidate("eager", "bf16", channels_last=True)


def both(candidate: Candidate) -> tuple[Candidate, Candidate]:
    return candidate, replace(candidate, graph=True)


def compiled(mode: str) -> Candidate:
    return Candidate("compile", "bf16", channels_last=True, mode=mode)


#: What is measured in turns. Of a network also without a graph, as most people run it.
OP_TIERS: dict[str, tuple[Candidate, ...]] = {
    "main": (*both(HGFAST), *both(EAGER), Candidate("folded", "bf16", True, graph=True)),
    "dtypes": (
        ANCHOR,
        Candidate("hgfast", "fp16", True, graph=True),
        Candidate("eager", "float32", graph=True),
        Candidate("eager", "TF32", graph=True),
        Candidate("eager", "bf16", graph=True),
        Candidate("eager", "fp16", True, graph=True),
    ),
    # Kernels of one architecture; where they cannot run, the portable one does.
    "unproven": (ANCHOR, *(replace(ANCHOR, mode=kernel) for kernel in ("throughput", "latency"))),
    "compile": (ANCHOR, replace(compiled("default"), graph=True)),
    "autotune": (ANCHOR, replace(compiled("max-autotune-no-cudagraphs"), graph=True)),
}
#: One launch each, but for eager's.
DECODED = (
    ANCHOR,
    replace(ANCHOR, channels_last=False, mode="contiguous"),
    Candidate("hgfast", "float32", True, graph=True),
    Candidate("hgfast", "float32", mode="contiguous", graph=True),
)
OP_TIERS["decode"] = DECODED
OP_TIERS["decode and others"] = (
    *DECODED,
    *(
        Candidate(kind, dtype, channels_last, graph=True)
        for kind in ("eager", "amax")
        for dtype in ("bf16", "float32")
        for channels_last in (False, True)
    ),
)
NETWORK_TIERS: dict[str, tuple[Candidate, ...]] = {
    "main": (*both(HGFAST), OWN_GRAPH, *both(EAGER)),
    "dtypes": (
        ANCHOR,
        Candidate("hgfast", "fp16", True, graph=True),
        *both(MEDIUM),
        *both(Candidate("eager", "float32")),
        *both(Candidate("eager", "TF32")),
        *both(Candidate("eager", "bf16")),
        Candidate("eager", "fp16", True, graph=True),
    ),
    # In kernels that hgfast does not take unasked before a run like this has spoken for them.
    "unproven": (
        ANCHOR,
        *(
            replace(ANCHOR, mode=feature)
            for feature in ("stem", "head", "throughput", "latency", "branches")
        ),
        replace(ANCHOR, mode="stem,head,throughput,latency"),
        replace(ANCHOR, mode="stem,head,throughput,latency,branches"),
        replace(OWN_GRAPH, mode="cuda_graph,branches"),
    ),
    "compile": (ANCHOR, *both(compiled("default"))),
    "autotune": (
        ANCHOR,
        *both(compiled("max-autotune-no-cudagraphs")),
        compiled("max-autotune"),
    ),
}

# ---- Items ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """Candidates that are measured in turns on one case."""

    case: Case
    tier: str
    limit: float  #: seconds after which the item is given up

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.tier}"

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        tiers = NETWORK_TIERS if self.case.is_network else OP_TIERS
        return tuple(
            candidate
            for candidate in tiers[self.tier]
            if (candidate.kind != "folded" or self.case.op in ("bottleneck", "stem", "head"))
            and (candidate.name != "hgfast fp16 graph" or self.case.sizes.float16)
        )


#: A tier's limit in seconds, for an op and for a network.
LIMITS = {
    "main": (40, 90), "dtypes": (40, 120), "compile": (90, 180), "autotune": (180, 420),
    "unproven": (40, 120),
    "decode": (60, 0), "decode and others": (60, 0),
}  # fmt: skip


def items(sizes: Sizes = REAL) -> list[Item]:
    """Everything there is to measure, the most wanted first."""
    large, one, *other_batches = sizes.batches
    first = sizes.stacks[0]

    def of_ops(tier: str, names: tuple[str, ...], batches: tuple[int, ...], levels: Any) -> None:
        for batch in batches:
            for op in names:
                found.extend(
                    Item(Case(op, batch, level, sizes), tier, LIMITS[tier][0]) for level in levels
                )

    def of_networks(tier: str, *pairs: tuple[int, int]) -> None:
        found.extend(
            Item(Case(f"HG-{stacks}", batch, sizes.image, sizes), tier, LIMITS[tier][1])
            for stacks, batch in pairs
        )

    found: list[Item] = []
    fused = ("bottleneck", "bottleneck + low", "upsample_add")
    others = sizes.stacks[1:]
    of_ops("main", fused[:1], (large, one), sizes.levels)
    of_networks("main", (first, one), (first, large))
    of_ops("main", fused[1:], (large, one), sizes.levels)
    of_ops("main", ("stem",), sizes.batches, (sizes.image // 2,))
    of_ops("main", ("head",), sizes.batches, sizes.levels[:1])
    of_ops("unproven", fused[:2], (large, one), sizes.levels)
    of_networks("unproven", (first, one), (first, large), *((stacks, one) for stacks in others))
    of_ops("decode and others", ("decode quarter",), sizes.images, (sizes.heatmaps,))
    decodes = tuple(f"decode {method}" for method in METHODS if method != "quarter")
    of_ops("decode", decodes, sizes.images[:1], (sizes.heatmaps,))
    of_networks("compile", (first, one))
    of_networks("main", *((stacks, one) for stacks in others))
    of_networks("dtypes", (first, one))
    of_networks("autotune", (first, one))
    of_networks("compile", (first, large))
    of_ops("dtypes", fused[:1], (large, one), sizes.levels[:1])
    of_networks("dtypes", (first, large))
    of_ops("compile", fused, (large, one), sizes.levels[:1])
    of_networks("main", *((stacks, large) for stacks in others))  # eight stacks take their time
    of_networks("main", *((stacks, batch) for batch in other_batches for stacks in sizes.stacks))
    of_ops("main", fused, tuple(other_batches), sizes.levels)
    of_networks("dtypes", *((stacks, batch) for stacks in others for batch in (one, large)))
    of_ops("dtypes", fused, (large, one), sizes.levels)
    of_ops("autotune", fused[:1], (large, one), sizes.levels[:1])
    of_networks("compile", *((stacks, batch) for stacks in others for batch in (one, large)))
    of_networks("autotune", (first, large))
    of_ops("compile", fused, sizes.batches, sizes.levels[1:])
    of_networks("autotune", *((stacks, batch) for stacks in others for batch in (one, large)))
    of_ops("main", ("conv 1x1",), sizes.batches, sizes.levels)  # cuDNN's, with our kernels around
    return list(dict.fromkeys(found))
