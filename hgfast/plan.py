"""The Plan: what is to be run, as a short list of steps over numbered values.

A Plan knows no kernels and no devices. Its steps refer to weights by their qualified names in
the module it was read from, follow any input size, and print as a listing that reads like the
figure in the paper: one line per block, indented by resolution.

    value numbers are assigned once and never reused; shapes are (B, C, H, W)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """A BatchNorm at inference: ``(x - mean) / sqrt(var + eps) * weight + bias``, per channel."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias, self.mean, self.var) if name)


@dataclass(frozen=True)
class Convolution:
    """A 2-D convolution with zero padding, or the transposed one. ``channels`` is (in, out)."""

    weight: str
    bias: str | None
    channels: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)  # of the transposed one

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name)

    @property
    def name(self) -> str:
        return self.weight.rpartition(".")[0]

    def shape(self, x: Shape) -> Shape:
        batch, channels, *size = x
        if channels != self.channels[0]:
            raise ValueError(f"{self.name} expects {self.channels[0]} channels, got {tuple(x)}")
        if self.transposed:
            height, width = (
                (n - 1) * self.stride[i] - 2 * self.padding[i] + self._reach[i] + extra
                for i, (n, extra) in enumerate(zip(size, self.output_padding, strict=True))
            )
        else:
            height, width = (
                _windows(n, self._reach[i], self.stride[i], self.padding[i])
                for i, n in enumerate(size)
            )
        if height < 1 or width < 1:
            raise ValueError(f"{self.name} cannot slide over an input of shape {tuple(x)}")
        return batch, self.channels[1], height, width

    def flops(self, x: Shape) -> int:
        pixels = prod(x[2:]) if self.transposed else prod(self.shape(x)[2:])
        taps = prod(self.kernel_size) * prod(self.channels) // self.groups
        return 2 * x[0] * pixels * taps

    @property
    def is_pointwise(self) -> bool:
        """1x1 with stride 1: the same linear map at every pixel."""
        return self._is((1, 1), (0, 0))

    @property
    def is_same_3x3(self) -> bool:
        """3x3 with stride 1 that keeps the size."""
        return self._is((3, 3), (1, 1))

    def _is(self, kernel_size: tuple[int, int], padding: tuple[int, int]) -> bool:
        return (
            (self.kernel_size, self.padding, self.stride) == (kernel_size, padding, (1, 1))
            and self.dilation == (1, 1)
            and self.groups == 1
            and not self.transposed
        )

    @property
    def _reach(self) -> tuple[int, int]:
        """Pixels from a window's first to its last, both counted."""
        (height, width), (down, across) = self.kernel_size, self.dilation
        return (height - 1) * down + 1, (width - 1) * across + 1


def _windows(n: int, reach: int, stride: int, padding: int, ceil_mode: bool = False) -> int:
    """How many windows fit along one side."""
    beyond = n + 2 * padding - reach
    count = -(-beyond // stride) + 1 if ceil_mode else beyond // stride + 1
    # A last window that begins in the padding behind the map does not count.
    return count - 1 if ceil_mode and (count - 1) * stride >= n + padding else count


@dataclass(frozen=True)
class Step:
    """One line of a Plan. ``name`` is the qualified name of the module the step stands for."""

    name: str
    inputs: tuple[int, ...]
    output: int

    kind: ClassVar[str] = ""

    @property
    def parts(self) -> tuple[Norm | Convolution, ...]:
        """The weighted layers, in the order in which they act."""
        return ()

    @property
    def weights(self) -> tuple[str, ...]:
        """Qualified names of the parameters and buffers it uses."""
        return tuple(name for part in self.parts for name in part.weights)

    @property
    def title(self) -> str:
        """What the report and the listing call this step."""
        return self.kind

    def shape(self, *inputs: Shape) -> Shape:
        """Shape of the output. Raises ValueError where the inputs do not fit."""
        raise NotImplementedError  # abstract: every kind below says its own

    def flops(self, *inputs: Shape) -> int:
        """Floating-point operations in the convolutions, two per multiply-add."""
        return 0


@dataclass(frozen=True)
class Bottleneck(Step):
    """A bottleneck residual, 1x1 - 3x3 - 1x1, in one of two orders.

    Before its convolutions (``preactivated``; He et al., arXiv:1603.05027)::

        conv3(relu(norm3(conv2(relu(norm2(conv1(relu(norm1(x)))))))) + shortcut(x)

    or behind them (He et al., arXiv:1512.03385), where a norm may be missing::

        relu(norm3(conv3(relu(norm2(conv2(relu(norm1(conv1(x)))))))) + shortcut(x))

    The shortcut is the identity or a 1x1 convolution, with a norm of its own or without. With a
    second input, that lower resolution is upsampled (nearest, x2) and added: the upper branch of
    an hourglass, joined.
    """

    norms: tuple[Norm | None, Norm | None, Norm | None]
    convs: tuple[Convolution, Convolution, Convolution]
    project: Convolution | None
    project_norm: Norm | None = None
    preactivated: bool = True

    kind: ClassVar[str] = "bottleneck"

    @property
    def parts(self) -> tuple[Norm | Convolution, ...]:
        chain = [
            part
            for norm, conv in zip(self.norms, self.convs, strict=True)
            for part in ((norm, conv) if self.preactivated else (conv, norm))
        ]
        return tuple(part for part in (*chain, self.project, self.project_norm) if part)

    @property
    def name_of_block(self) -> str:
        """ "bottleneck" before its activations; "bottleneck x4" behind them, by its expansion."""
        expansion = self.convs[2].channels[1] // self.convs[0].channels[1]
        return "bottleneck" if self.preactivated else f"bottleneck x{expansion}"

    @property
    def title(self) -> str:
        name = self.name_of_block
        return f"{name} + upsample_add" if len(self.inputs) == 2 else name

    def shape(self, *inputs: Shape) -> Shape:
        shape = inputs[0]
        for conv in self.convs:
            shape = conv.shape(shape)
        if len(inputs) == 2:
            _check_join(self.name, inputs[1], shape, 2)
        return shape

    def flops(self, *inputs: Shape) -> int:
        total, shape = 0, inputs[0]
        for conv in self.convs:
            total += conv.flops(shape)
            shape = conv.shape(shape)
        return total + (self.project.flops(inputs[0]) if self.project else 0)


@dataclass(frozen=True)
class Conv(Step):
    """A convolution with what surrounds it.

    ``act(norm_after(conv(relu(norm_before(x))))) [+ second input]``; ``act`` is ReLU if ``relu``.
    With ``relu_sum`` another ReLU follows the sum.
    """

    norm_before: Norm | None
    conv: Convolution
    norm_after: Norm | None
    relu: bool
    relu_sum: bool = False

    kind: ClassVar[str] = "conv"

    @property
    def parts(self) -> tuple[Norm | Convolution, ...]:
        return tuple(part for part in (self.norm_before, self.conv, self.norm_after) if part)

    @property
    def title(self) -> str:
        conv = self.conv
        height, width = conv.kernel_size
        notes = [
            "norm-relu-" if self.norm_before else "",
            "deconv" if conv.transposed else "conv",
            f" {height}x{width}",
            f"/{conv.stride[0]}" if conv.stride != (1, 1) else "",
            f" dilated {conv.dilation[0]}" if conv.dilation != (1, 1) else "",
            f" in {conv.groups} groups" if conv.groups > 1 else "",
            "-norm" if self.norm_after else "",
            "-relu" if self.relu else "",
            " + add" if len(self.inputs) == 2 else "",
            "-relu" if self.relu_sum else "",
        ]
        return "".join(notes)

    def shape(self, *inputs: Shape) -> Shape:
        shape = self.conv.shape(inputs[0])
        _check_equal(self.name, shape, *inputs[1:])
        return shape

    def flops(self, *inputs: Shape) -> int:
        return self.conv.flops(inputs[0])


@dataclass(frozen=True)
class Remerge(Step):
    """Features and heatmaps on their way into the next stack, as one linear map per pixel.

    ``direct(x) + behind(before(x)) [+ second input]``, all three of them 1x1 convolutions: the
    same as one with the weight ``direct + behind @ before``.
    """

    direct: Convolution
    before: Convolution
    behind: Convolution

    kind: ClassVar[str] = "remerge"

    @property
    def parts(self) -> tuple[Norm | Convolution, ...]:
        return self.direct, self.before, self.behind

    def shape(self, *inputs: Shape) -> Shape:
        shape = self.direct.shape(inputs[0])
        _check_equal(self.name, shape, self.behind.shape(self.before.shape(inputs[0])), *inputs[1:])
        return shape

    def flops(self, *inputs: Shape) -> int:
        """Without ``before``, which computes the heatmaps in a step of its own."""
        return self.direct.flops(inputs[0]) + self.behind.flops(self.before.shape(inputs[0]))


@dataclass(frozen=True)
class Pool(Step):
    """Maximum ("max") or mean ("avg") over windows, as PyTorch's ``max_pool2d``, ``avg_pool2d``."""

    mode: str
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True

    kind: ClassVar[str] = "pool"

    @property
    def is_half(self) -> bool:
        """2x2 with stride 2: the descent of an hourglass."""
        plain = (self.kernel_size, self.stride, self.padding) == ((2, 2), (2, 2), (0, 0))
        return plain and not self.ceil_mode

    @property
    def title(self) -> str:
        if self.is_half:
            return f"{self.mode}_pool"
        (height, width), stride = self.kernel_size, self.stride[0]
        return f"{self.mode}_pool {height}x{width}/{stride}"

    def shape(self, *inputs: Shape) -> Shape:
        batch, channels, *size = inputs[0]
        height, width = (
            _windows(n, self.kernel_size[i], self.stride[i], self.padding[i], self.ceil_mode)
            for i, n in enumerate(size)
        )
        if height < 1 or width < 1:
            (down, across), found = self.kernel_size, tuple(inputs[0])
            raise ValueError(f"pooling needs at least {down}x{across} pixels, got {found}")
        return batch, channels, height, width


@dataclass(frozen=True)
class UpsampleAdd(Step):
    """The last input (skip) plus each of the others (low), enlarged by its factor.

    Upsampling is by nearest neighbour. One map and factor 2: the join of an hourglass; several,
    and a ReLU behind the sum: the fusion of resolutions in HRNet (Sun et al., arXiv:1902.09212).
    """

    factors: tuple[int, ...] = (2,)
    relu: bool = False

    kind: ClassVar[str] = "upsample_add"

    @property
    def title(self) -> str:
        factors = "" if self.factors == (2,) else " x" + ",".join(map(str, self.factors))
        return f"upsample_add{factors}" + ("-relu" if self.relu else "")

    def shape(self, *inputs: Shape) -> Shape:
        *lows, skip = inputs
        for low, factor in zip(lows, self.factors, strict=True):
            _check_join(self.name, low, skip, factor)
        return skip


@dataclass(frozen=True)
class Add(Step):
    """Elementwise sum of two values of equal shape, then ReLU if ``relu``."""

    relu: bool = False

    kind: ClassVar[str] = "add"

    @property
    def title(self) -> str:
        return "add-relu" if self.relu else "add"

    def shape(self, *inputs: Shape) -> Shape:
        _check_equal(self.name, *inputs)
        return inputs[0]


@dataclass(frozen=True)
class Concat(Step):
    """The inputs' channels one behind the other; with ``add``, plus the last input."""

    add: bool = False

    kind: ClassVar[str] = "concat"

    @property
    def title(self) -> str:
        return "concat + add" if self.add else "concat"

    def shape(self, *inputs: Shape) -> Shape:
        parts = inputs[:-1] if self.add else inputs
        _check_equal(self.name, *((n, 0, h, w) for n, _, h, w in parts))
        batch, _, height, width = parts[0]
        shape = batch, sum(part[1] for part in parts), height, width
        if self.add:
            _check_equal(self.name, shape, inputs[-1])
        return shape


@dataclass(frozen=True)
class Plain(Step):
    """One of PyTorch's own operations, which no kernel here makes faster.

    ``op`` names it as the reference executor knows it. ``arguments`` are its keywords,
    ``parameters`` those of them that are weights, by qualified name, ``sizes`` their shapes.
    """

    op: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[str, Shape], ...] = ()

    kind: ClassVar[str] = "plain"

    @property
    def title(self) -> str:
        return self.op

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.parameters)

    def shape(self, *inputs: Shape) -> Shape:
        shape: Shape = _SHAPES.get(self.op, _same)(self, *inputs)
        return shape


def _same(step: Plain, *inputs: Shape) -> Shape:
    """Of an elementwise operation: what the inputs broadcast to."""
    rank = max(map(len, inputs))
    sizes = zip(*(((1,) * (rank - len(x)) + tuple(x)) for x in inputs), strict=True)
    result = []
    for each in sizes:
        wide = [size for size in each if size != 1]  # sizes may be symbols: compared, not hashed
        if any(size != wide[0] for size in wide):
            raise ValueError(
                f"{step.name or step.op} combines values of different shapes: {inputs}"
            )
        result.append(wide[0] if wide else 1)
    return tuple(result)


def _with_weight(step: Plain, x: Shape) -> Shape:
    return _same(step, x, dict(step.sizes)["other"])


def _mapped(step: Plain, x: Shape) -> Shape:
    out, into = dict(step.sizes)["weight"]
    if x[-1] != into:
        raise ValueError(f"{step.name or step.op} maps {into} features, got {tuple(x)}")
    return (*x[:-1], out)


def _upsampled(step: Plain, x: Shape, *like: Shape) -> Shape:
    arguments = dict(step.arguments)
    if like:
        return (*x[:2], *like[0][2:])
    if arguments["size"] is not None:
        return (*x[:2], *arguments["size"])
    scales = arguments["scale_factor"]
    return (*x[:2], *(int(n * scale) for n, scale in zip(x[2:], scales, strict=True)))


def _adaptive(step: Plain, x: Shape, *like: Shape) -> Shape:
    if like:
        return (*x[:2], *like[0][2:])
    size = dict(step.arguments)["output_size"]
    return (
        *x[:2],
        *(n if wanted is None else wanted for n, wanted in zip(x[2:], size, strict=True)),
    )


def _stacked(step: Plain, *inputs: Shape) -> Shape:
    _check_equal(step.name, *inputs)
    dim = dict(step.arguments)["dim"] % (len(inputs[0]) + 1)
    return (*inputs[0][:dim], len(inputs), *inputs[0][dim:])


def _joined(step: Plain, *inputs: Shape) -> Shape:
    dim = dict(step.arguments)["dim"] % len(inputs[0])
    _check_equal(step.name, *((*x[:dim], 0, *x[dim + 1 :]) for x in inputs))
    return (*inputs[0][:dim], sum(x[dim] for x in inputs), *inputs[0][dim + 1 :])


def _permuted(step: Plain, x: Shape) -> Shape:
    dims = dict(step.arguments)["dims"]
    if len(dims) != len(x):
        raise ValueError(f"{step.name or step.op} permutes {len(dims)} dimensions, got {tuple(x)}")
    return tuple(x[dim] for dim in dims)


def _flattened(step: Plain, x: Shape) -> Shape:
    arguments = dict(step.arguments)
    first, last = arguments["start_dim"] % len(x), arguments["end_dim"] % len(x)
    return (*x[:first], prod(x[first : last + 1]), *x[last + 1 :])


def _reduced(step: Plain, x: Shape) -> Shape:
    arguments = dict(step.arguments)
    dims = {dim % len(x) for dim in arguments["dim"]}
    if arguments["keepdim"]:
        return tuple(1 if i in dims else n for i, n in enumerate(x))
    return tuple(n for i, n in enumerate(x) if i not in dims)


def _chunked(step: Plain, x: Shape) -> Shape:
    arguments = dict(step.arguments)
    dim = arguments["dim"] % len(x)
    each = -(-x[dim] // arguments["chunks"])
    index = arguments["index"]
    index += -(-x[dim] // each) if index < 0 else 0
    size = min(each, x[dim] - each * index) if index >= 0 else 0
    if size < 1:
        raise ValueError(f"{step.name or step.op} cannot cut {tuple(x)} into so many pieces")
    return (*x[:dim], size, *x[dim + 1 :])


def _padded(step: Plain, x: Shape) -> Shape:
    pad = dict(step.arguments)["pad"]
    sizes = list(x)
    for i in range(len(pad) // 2):
        sizes[-1 - i] += pad[2 * i] + pad[2 * i + 1]
    return tuple(sizes)


def _shuffled(step: Plain, x: Shape) -> Shape:
    factor = dict(step.arguments)["upscale_factor"]
    return x[0], x[1] // factor**2, x[2] * factor, x[3] * factor


def _split(step: Plain, x: Shape) -> Shape:
    arguments = dict(step.arguments)
    dim, sizes, index = arguments["dim"] % len(x), arguments["sizes"], arguments["index"]
    if isinstance(sizes, int):
        size = min(sizes, x[dim] - sizes * index)
    else:
        size = sizes[index] if sum(sizes) == x[dim] else 0
    if size < 1:
        raise ValueError(f"{step.name or step.op} cannot split {tuple(x)} along {dim} by {sizes}")
    return (*x[:dim], size, *x[dim + 1 :])


def _viewed(step: Plain, *inputs: Shape) -> Shape:
    wanted = [
        n.value(*inputs) if isinstance(n, Guard) else n for n in dict(step.arguments)["shape"]
    ]
    total = prod(inputs[0])
    known = prod(n for n in wanted if n != -1)
    sizes = tuple(total // known if n == -1 else n for n in wanted) if known else ()
    if prod(sizes) != total or wanted.count(-1) > 1:
        raise ValueError(f"{step.name or step.op} cannot view {inputs[0]} as {tuple(wanted)}")
    return sizes


def _expanded(step: Plain, *inputs: Shape) -> Shape:
    wanted = [
        n.value(*inputs) if isinstance(n, Guard) else n for n in dict(step.arguments)["shape"]
    ]
    x = (1,) * (len(wanted) - len(inputs[0])) + tuple(inputs[0])
    sizes = tuple(n if m == -1 else m for n, m in zip(x, wanted, strict=True))
    return _to_shape(step, x, sizes)


def _to_shape(step: Plain, x: Shape, shape: Shape) -> Shape:
    if _same(step, x, shape) != tuple(shape):
        raise ValueError(f"{step.name or step.op} cannot expand {tuple(x)} to {tuple(shape)}")
    return tuple(shape)


def _indexed(step: Plain, x: Shape) -> Shape:
    index = dict(step.arguments)["index"]
    rest = [*index, *(slice(None),) * (len(x) - sum(item is not None for item in index))]
    sizes, result = iter(x), []
    for item in rest:
        if item is None:
            result.append(1)
            continue
        size = next(sizes)
        if isinstance(item, slice):
            # The common slice is spelt out: sizes may be symbols.
            result.append(size if item == slice(None) else len(range(size)[item]))
        elif not -size <= item < size:
            raise ValueError(f"{step.name or step.op} has no element {item} along {size}")
    return tuple(result)


def _multiplied(step: Plain, a: Shape, b: Shape) -> Shape:
    if a[-1] != b[-2]:
        raise ValueError(f"{step.name or step.op} multiplies {tuple(a)} by {tuple(b)}")
    return (*_same(step, a[:-2], b[:-2]), a[-2], b[-1])


def _squeezed(step: Plain, x: Shape) -> Shape:
    dims = {dim % len(x) for dim in dict(step.arguments)["dim"]}
    if any(x[dim] != 1 for dim in dims):  # PyTorch would leave it: another rank than was traced
        raise ValueError(f"{step.name or step.op} squeezes dimensions of {tuple(x)} that are not 1")
    return tuple(n for i, n in enumerate(x) if i not in dims)


def _unsqueezed(step: Plain, x: Shape) -> Shape:
    dim = dict(step.arguments)["dim"] % (len(x) + 1)
    return (*x[:dim], 1, *x[dim:])


#: Shape rules of the plain operations that are not elementwise.
_SHAPES: dict[str, Any] = {
    "add_weight": _with_weight,
    "mul_weight": _with_weight,
    "linear": _mapped,
    "upsample": _upsampled,
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    "stack": _stacked,
    "concat": _joined,
    "permute": _permuted,
    "flatten": _flattened,
    "matmul": _multiplied,
    "amax": _reduced,
    "mean": _reduced,
    "sum": _reduced,
    "view": _viewed,
    "expand": _expanded,
    "expand_as": _to_shape,
    "getitem": _indexed,
    "split": _split,
    "squeeze": _squeezed,
    "unsqueeze": _unsqueezed,
    "chunk": _chunked,
    "pad": _padded,
    "pixel_shuffle": _shuffled,
}


def _check_join(name: str, low: Shape, skip: Shape, factor: int) -> None:
    if skip != (low[0], low[1], factor * low[2], factor * low[3]):
        raise ValueError(
            f"{name or 'upsample_add'} joins {low} upsampled x{factor} with {skip}: the shapes "
            f"differ (are the image's height and width multiples of the network's stride?)"
        )


def _check_equal(name: str, *shapes: Shape) -> None:
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{name or 'add'} adds values of different shapes: {shapes}")


@dataclass(frozen=True)
class Guard:
    """A condition on the sizes of a Plan's inputs, or a number that one is made of.

    ``sign`` is a comparison or arithmetic sign between two operands, numbers or Guards; or
    "size", of (input, dimension).
    """

    sign: str
    operands: tuple[Any, Any]

    def value(self, *inputs: Sequence[int]) -> Any:
        """What it comes to for inputs of these shapes."""
        a, b = self.operands
        if self.sign == "size":
            return inputs[a][b]
        a, b = (item.value(*inputs) if isinstance(item, Guard) else item for item in self.operands)
        return _SIGNS[self.sign](a, b)

    def __str__(self) -> str:
        a, b = self.operands
        if self.sign == "size":
            return f"size {b} of input {a}" if a else f"size {b} of its input"
        return f"{a} {self.sign} {b}"


_SIGNS: dict[str, Any] = {
    **{"+": operator.add, "-": operator.sub, "*": operator.mul},
    **{"%": operator.mod, "//": operator.floordiv},
    **{"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le},
    **{">": operator.gt, ">=": operator.ge},
}


#: How the listing indents: in by a pooling, out by a join.
_LEVELS = {"pool": 1, "upsample_add": -1}


@dataclass(frozen=True)
class Block:
    """Steps that people know under one name: a residual block, a fuse layer, an hourglass.

    Hourglasses hold other blocks; apart from them a step is in one block at most. ``name`` is the
    qualified name of the module that holds them, ``steps`` are their outputs.
    """

    name: str
    kind: str
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Steps in an order of execution.

    ``outputs`` is the module's own container (nested lists, tuples, dicts) with value numbers
    as leaves. ``input_shapes`` are the only shapes it holds for, or None if it holds for any that
    the ``guards`` (what the module itself asserts) allow. ``blocks`` are names
    for groups of steps, for the report; steps are what is run.
    """

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: Any
    input_shapes: tuple[tuple[int, ...], ...] | None = None
    blocks: tuple[Block, ...] = ()
    guards: tuple[Guard, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        """Qualified names of every parameter and buffer the steps use, each once."""
        names = [name for step in self.steps for name in step.weights]
        return tuple(dict.fromkeys(names))

    def shapes(self, *inputs: Sequence[int]) -> dict[int, Shape]:
        """Every value's shape for inputs of these shapes (B, C, H, W).

        Raises:
            ValueError: a step cannot take what reaches it; the message names the step.
        """
        self.check(*inputs)
        shapes: dict[int, Shape] = {}
        for value, shape in zip(self.inputs, inputs, strict=True):
            if len(shape) != 4:
                raise ValueError(f"expected an input of shape (B, C, H, W), got {tuple(shape)}")
            shapes[value] = tuple(shape)
        for step in self.steps:
            shapes[step.output] = step.shape(*(shapes[value] for value in step.inputs))
        return shapes

    def check(self, *inputs: Sequence[int]) -> None:
        """Raise ValueError where the module asserts something that these shapes do not meet."""
        for guard in self.guards:
            if not guard.value(*inputs):
                raise ValueError(f"its forward asserts that {guard}")

    def flops(self, *inputs: Sequence[int]) -> int:
        """Floating-point operations in all convolutions for inputs of these shapes."""
        shapes = self.shapes(*inputs)
        return sum(step.flops(*(shapes[value] for value in step.inputs)) for step in self.steps)

    def last_output(self) -> Plan:
        """The Plan of the last output alone, without the steps that only others need.

        Raises:
            ValueError: the outputs are neither one value nor a list or tuple of values.
        """
        outputs = self.outputs
        if isinstance(outputs, (list, tuple)) and outputs:
            outputs = outputs[-1]
        if not isinstance(outputs, int):
            raise ValueError(f"its outputs are no list of heatmaps but {_outline(self.outputs)}")
        needed, steps = {outputs}, []
        for step in reversed(self.steps):
            if step.output in needed:
                needed.update(step.inputs)
                steps.append(step)
        made = {step.output for step in steps}
        blocks = tuple(block for block in self.blocks if made.issuperset(block.steps))
        return replace(self, steps=tuple(reversed(steps)), outputs=outputs, blocks=blocks)

    def __str__(self) -> str:
        level = dict.fromkeys(self.inputs, 0)
        lines = []
        for step in self.steps:
            level[step.output] = level[step.inputs[0]] + _LEVELS.get(step.kind, 0)
            sources = " ".join(f"v{value}" for value in step.inputs)
            indent = "  " * max(level[step.output], 0)
            lines.append(f"{indent}v{step.output} = {step.title} ({sources})  {step.name}".rstrip())
        return "\n".join(lines)


def _outline(outputs: Any) -> str:
    """A container in words, its values left out."""
    if isinstance(outputs, dict):
        return f"a dict with {', '.join(map(repr, outputs))}"
    if isinstance(outputs, (list, tuple)) and outputs:
        return f"a {type(outputs).__name__} that ends in {_outline(outputs[-1])}"
    return f"a {type(outputs).__name__}" if not isinstance(outputs, int) else "a value"


def output_values(outputs: Any) -> list[int]:
    """The value numbers in an output container, from left to right."""
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [value for item in outputs for value in output_values(item)]
    return [outputs]


def fill_outputs(outputs: Any, values: dict[int, Any]) -> Any:
    """The module's own container, filled with what the value numbers stand for."""
    if isinstance(outputs, dict):
        return {key: fill_outputs(item, values) for key, item in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        items = [fill_outputs(item, values) for item in outputs]
        return tuple(items) if isinstance(outputs, tuple) else items
    return values[outputs]
