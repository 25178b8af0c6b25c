"""The Plan: what is to be run, as a short list of steps over numbered values.

A Plan knows no kernels and no devices. Its steps refer to weights by their qualified names in
the module it was read from, follow any input size, and print as a listing that reads like the
figure in the paper: one line per block, indented by resolution.

    value numbers are assigned once and never reused; shapes are (B, C, H, W)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

Shape = tuple[int, int, int, int]


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
    """A dense 2-D convolution with zero padding. ``channels`` is (in, out)."""

    weight: str
    bias: str | None
    channels: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

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
        height, width = (
            (n + 2 * pad - kernel) // stride + 1
            for n, pad, kernel, stride in zip(
                size, self.padding, self.kernel_size, self.stride, strict=True
            )
        )
        if min(height, width) < 1:
            raise ValueError(f"{self.name} cannot slide over an input of shape {tuple(x)}")
        return batch, self.channels[1], height, width

    def flops(self, x: Shape) -> int:
        return 2 * prod(self.kernel_size) * self.channels[0] * prod(self.shape(x))


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
    """Pre-activation bottleneck residual.

    ``conv3(relu(norm3(conv2(relu(norm2(conv1(relu(norm1(x)))))))) + shortcut(x)``, where the
    shortcut is the identity or a 1x1 convolution. With a second input, that lower resolution
    is upsampled (nearest, x2) and added: the upper branch of an hourglass, joined.
    """

    norms: tuple[Norm, Norm, Norm]
    convs: tuple[Convolution, Convolution, Convolution]
    project: Convolution | None

    kind: ClassVar[str] = "bottleneck"

    @property
    def parts(self) -> tuple[Norm | Convolution, ...]:
        chain = [part for pair in zip(self.norms, self.convs, strict=True) for part in pair]
        return (*chain, self.project) if self.project else tuple(chain)

    @property
    def title(self) -> str:
        return "bottleneck + upsample_add" if len(self.inputs) == 2 else "bottleneck"

    def shape(self, *inputs: Shape) -> Shape:
        shape = inputs[0]
        for conv in self.convs:
            shape = conv.shape(shape)
        if len(inputs) == 2:
            _check_join(self.name, inputs[1], shape)
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
    """

    norm_before: Norm | None
    conv: Convolution
    norm_after: Norm | None
    relu: bool

    kind: ClassVar[str] = "conv"

    @property
    def parts(self) -> tuple[Norm | Convolution, ...]:
        return tuple(part for part in (self.norm_before, self.conv, self.norm_after) if part)

    @property
    def title(self) -> str:
        before = "norm-relu-" if self.norm_before else ""
        kernel, stride = self.conv.kernel_size, self.conv.stride[0]
        after = ("-norm" if self.norm_after else "") + ("-relu" if self.relu else "")
        size = f"{kernel[0]}x{kernel[1]}" + (f"/{stride}" if stride > 1 else "")
        return f"{before}conv {size}{after}" + (" + add" if len(self.inputs) == 2 else "")

    def shape(self, *inputs: Shape) -> Shape:
        shape = self.conv.shape(inputs[0])
        _check_equal(self.name, shape, *inputs[1:])
        return shape

    def flops(self, *inputs: Shape) -> int:
        return self.conv.flops(inputs[0])


@dataclass(frozen=True)
class MaxPool(Step):
    """2x2 maximum with stride 2; an odd last row or column is dropped."""

    kind: ClassVar[str] = "max_pool"

    def shape(self, *inputs: Shape) -> Shape:
        batch, channels, height, width = inputs[0]
        if min(height, width) < 2:
            raise ValueError(f"pooling needs at least 2x2 pixels, got {tuple(inputs[0])}")
        return batch, channels, height // 2, width // 2


@dataclass(frozen=True)
class UpsampleAdd(Step):
    """The first input (low) upsampled x2 by nearest neighbour, plus the second (skip)."""

    kind: ClassVar[str] = "upsample_add"

    def shape(self, *inputs: Shape) -> Shape:
        low, skip = inputs
        _check_join(self.name, low, skip)
        return skip


@dataclass(frozen=True)
class Add(Step):
    """Elementwise sum of two values of equal shape."""

    kind: ClassVar[str] = "add"

    def shape(self, *inputs: Shape) -> Shape:
        _check_equal(self.name, *inputs)
        return inputs[0]


def _check_join(name: str, low: Shape, skip: Shape) -> None:
    if skip != (low[0], low[1], 2 * low[2], 2 * low[3]):
        raise ValueError(
            f"{name or 'upsample_add'} joins {low} upsampled x2 with {skip}: the shapes differ "
            f"(are the image's height and width multiples of the network's stride?)"
        )


def _check_equal(name: str, *shapes: Shape) -> None:
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{name or 'add'} adds values of different shapes: {shapes}")


@dataclass(frozen=True)
class Plan:
    """Steps in an order of execution.

    ``outputs`` is the module's own container (nested lists, tuples, dicts) with value numbers
    as leaves. ``input_shapes`` are the only shapes it holds for, or None if it holds for any.
    """

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: Any
    input_shapes: tuple[tuple[int, ...], ...] | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Qualified names of every parameter and buffer the steps use, each once."""
        names = [name for step in self.steps for part in step.parts for name in part.weights]
        return tuple(dict.fromkeys(names))

    def shapes(self, *inputs: Sequence[int]) -> dict[int, Shape]:
        """Every value's shape for inputs of these shapes (B, C, H, W).

        Raises:
            ValueError: a step cannot take what reaches it; the message names the step.
        """
        shapes: dict[int, Shape] = {}
        for value, shape in zip(self.inputs, inputs, strict=True):
            if len(shape) != 4:
                raise ValueError(f"expected an input of shape (B, C, H, W), got {tuple(shape)}")
            batch, channels, height, width = shape
            shapes[value] = (batch, channels, height, width)
        for step in self.steps:
            shapes[step.output] = step.shape(*(shapes[value] for value in step.inputs))
        return shapes

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
        return replace(self, steps=tuple(reversed(steps)), outputs=outputs)

    def __str__(self) -> str:
        level = dict.fromkeys(self.inputs, 0)
        lines = []
        for step in self.steps:
            # An hourglass shows as indentation: in by a pooling, out by a join.
            level[step.output] = level[step.inputs[0]] + {"max_pool": 1, "upsample_add": -1}.get(
                step.kind, 0
            )
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
