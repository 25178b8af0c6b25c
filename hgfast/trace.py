"""From a module to a graph: what the module computes at inference, in one normal form.

Two tracers feed the same graph. ``torch.fx`` needs no example input and follows Python
symbolically; ``torch.export`` needs one and sees real shapes. Whatever they record (modules,
functions, methods, aten overloads) is normalised to the few operations in :data:`OPERATIONS`,
weights are referred to by their qualified names, and in-place operations are made functional.
What has no normal form becomes an ``unsupported`` node, which matters only if an output
depends on it.

Tracing always describes evaluation mode, whatever mode the module is in.
"""

from __future__ import annotations

import copy
import dis
import inspect
import operator
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from hgfast.plan import Guard

#: The operations that patterns look at, with the attributes of each. A graph also holds
#: operations of PyTorch that nothing is to be known about but what they compute: those go by
#: their names in ``hgfast.runtime.reference.PLAIN``, with its keywords as attributes.
OPERATIONS = {
    "input": (),
    "conv2d": ("weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose2d": (
        *("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
    "batch_norm": ("weight", "bias", "mean", "var", "eps"),
    "relu": (),
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool2d": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "upsample": ("mode", "scale_factor", "size", "align_corners"),
    "add": (),
    "concat": ("dim",),
    "unsupported": ("what",),
}


class TraceError(Exception):
    """A module has no graph; the message says why, for the report."""


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, by its qualified name in the traced module."""

    name: str


@dataclass(eq=False, repr=False)  # equal only to itself; a repr would unroll the whole graph
class Node:
    """One operation. The node is also the value it computes.

    ``module`` is the qualified name of the module whose forward asked for it.
    """

    op: str
    inputs: tuple[Node, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    module: str = ""

    def __getitem__(self, attribute: str) -> Any:
        return self.attributes[attribute]


@dataclass
class Graph:
    """What a module computes, in normal form.

    ``nodes`` holds what the outputs depend on, in an order of execution, and every input.
    ``outputs`` is the module's own container (nested lists, tuples, dicts) with nodes as leaves.
    ``input_shapes`` are the only shapes it is valid for, or None if it holds for any that the
    ``guards`` allow.
    """

    inputs: list[Node]
    nodes: list[Node]
    outputs: Any
    input_shapes: tuple[tuple[int, ...], ...] | None = None
    guards: tuple[Guard, ...] = ()

    def users(self) -> dict[Node, int]:
        """How often each node's value is used; being an output is a use too."""
        count = dict.fromkeys(self.nodes, 0)
        for node in self.nodes:
            for source in node.inputs:
                count[source] += 1
        for node in output_nodes(self.outputs):
            count[node] += 1
        return count


def output_nodes(outputs: Any) -> Iterator[Node]:
    """The nodes in an output container, from left to right."""
    if isinstance(outputs, Node):
        yield outputs
    elif isinstance(outputs, dict):
        for item in outputs.values():
            yield from output_nodes(item)
    elif isinstance(outputs, (list, tuple)):
        for item in outputs:
            yield from output_nodes(item)


# --- the normal form of each operation that is understood ----------------------------------


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        return value, value
    first, *rest = value
    return first, rest[0] if rest else first


def _unsupported(what: str) -> Node:
    return Node("unsupported", (), {"what": what})


def _conv2d(
    x: Node,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Node:
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        return _unsupported("a convolution whose weight is computed")
    if isinstance(padding, str):
        if padding != "valid":
            return _unsupported(f'a convolution with padding="{padding}"')
        padding = 0
    return Node(
        "conv2d",
        (x,),
        {
            "weight": weight.name,
            "bias": bias.name if bias else None,
            "stride": _pair(stride),
            "padding": _pair(padding),
            "dilation": _pair(dilation),
            "groups": groups,
        },
    )


def _conv_module(module: nn.Conv2d, name: str, x: Node) -> Node:
    if type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return _unsupported(f"{name}, a convolution of its own kind")
    padding: Any = module.padding
    border = module._reversed_padding_repeated_twice  # as F.pad takes it
    if padding == "same" and border[::2] == border[1::2] and module.padding_mode == "zeros":
        padding = border[2], border[0]
    elif any(border) and (padding == "same" or module.padding_mode != "zeros"):
        mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
        x, padding = Node("pad", (x,), {"pad": tuple(border), "mode": mode, "value": None}), 0
    weight, bias = _weights_of(module, name, "weight", "bias")
    return _conv2d(x, weight, bias, module.stride, padding, module.dilation, module.groups)


def _conv_transpose2d(
    x: Node,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Node:
    node = _conv2d(x, weight, bias, stride, padding, dilation, groups)
    if node.op == "conv2d":
        node.op = "conv_transpose2d"
        node.attributes["output_padding"] = _pair(output_padding)
    return node


def _batch_norm(x: Node, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> Node:
    if not isinstance(mean, Weight) or not isinstance(var, Weight):
        return _unsupported("a BatchNorm without running statistics")
    return Node(
        "batch_norm",
        (x,),
        {
            "weight": weight.name if weight else None,
            "bias": bias.name if bias else None,
            "mean": mean.name,
            "var": var.name,
            "eps": eps,
        },
    )


def _aten_batch_norm(
    x: Node,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Node:
    if training:
        return _unsupported("a BatchNorm that uses the statistics of the batch")
    return _batch_norm(x, weight, bias, mean, var, eps)


def _functional_batch_norm(
    x: Node,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Node:
    return _aten_batch_norm(x, weight, bias, mean, var, training, momentum, eps, True)


def _relu(x: Node, inplace: bool = False) -> Node:
    return Node("relu", (x,))


def _max_pool2d(
    x: Node,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Node:
    if return_indices:
        return _unsupported("max pooling that returns indices")
    kernel_size = _pair(kernel_size)
    return Node(
        "max_pool2d",
        (x,),
        {
            "kernel_size": kernel_size,
            "stride": _pair(stride) if stride else kernel_size,
            "padding": _pair(padding),
            "dilation": _pair(dilation),
            "ceil_mode": ceil_mode,
        },
    )


def _avg_pool2d(
    x: Node,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Node:
    if divisor_override is not None:
        return _unsupported("average pooling with a divisor of its own")
    kernel_size = _pair(kernel_size)
    return Node(
        "avg_pool2d",
        (x,),
        {
            "kernel_size": kernel_size,
            "stride": _pair(stride) if stride else kernel_size,
            "padding": _pair(padding),
            "ceil_mode": ceil_mode,
            "count_include_pad": count_include_pad,
        },
    )


def _interpolate(
    x: Node,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Node:
    if antialias:
        return _unsupported("antialiased interpolation")
    inputs: tuple[Node, ...] = (x,)
    like = _size_like(size)
    if like is not None:
        inputs, size = (x, like), None
    elif size is not None:
        size = _pair(size)
        if not all(isinstance(n, int) for n in size):
            return _unsupported("upsampling to a computed size")
    if isinstance(scale_factor, (int, float)):
        scale_factor = (scale_factor, scale_factor)
    if size is not None or like is not None:
        scale_factor = None
    if mode not in ("nearest", "bilinear", "bicubic", "nearest-exact"):
        return _unsupported(f'interpolation with mode="{mode}"')
    attributes = {
        "mode": mode,
        "scale_factor": tuple(scale_factor) if scale_factor else None,
        "size": size,
        "align_corners": align_corners,
    }
    if recompute_scale_factor:
        attributes["recompute_scale_factor"] = True
    return Node("upsample", inputs, attributes)


def _upsample_module(module: nn.Upsample, name: str, x: Node) -> Node:
    return _interpolate(
        x,
        module.size,
        module.scale_factor,
        module.mode,
        module.align_corners,
        module.recompute_scale_factor,
    )


def _aten_upsample(mode: str) -> Callable[..., Node]:
    if mode == "nearest":
        return lambda x, size, scale_factor: _interpolate(x, size, scale_factor)
    return lambda x, size, align_corners, scale_factor: _interpolate(
        x, size, scale_factor, mode, align_corners
    )


def _add(a: Any, b: Any, alpha: float = 1) -> Node:
    if alpha != 1:
        return _unsupported("an addition with a factor")
    total: Node = _binary("add")(a, b)
    return total


def _binary(op: str) -> Callable[..., Node]:
    """Two activations, or an activation and a number or weight, in either order."""

    def convert(a: Any, b: Any, **others: Any) -> Any:
        if others:
            return _unsupported(f"{op} with {', '.join(others)}")
        if isinstance(a, Node) and isinstance(b, Node):
            return Node(op, (a, b))
        if not isinstance(a, Node):
            if op == "sub":  # a - b
                return convert_sum(Node("mul_number", (b,), {"other": -1.0}), a)
            if op == "div":
                return _unsupported("a division by an activation")
            a, b = b, a
        if op == "sub":
            return convert_sum(a, -b)
        if op == "add" and type(b) in (int, float) and b == 0:
            return a  # where a sum begins
        if isinstance(b, Weight) and op != "div":
            return Node(f"{op}_weight", (a,), {"other": b})
        if isinstance(b, (int, float)) and not isinstance(b, bool):
            return Node(f"{op}_number", (a,), {"other": b})
        return _unsupported(f"{op} of an activation and a {type(b).__name__}")

    convert_sum = _binary("add") if op != "add" else convert
    return convert


def _plain(op: str, *keywords: str, **defaults: Any) -> Callable[..., Node]:
    """One activation, and keywords of which those in ``defaults`` may be left out."""
    names = (*keywords, *defaults)

    def convert(x: Node, *values: Any, inplace: bool = False, **named: Any) -> Node:
        given = {**defaults, **dict(zip(names, values, strict=False)), **named}
        if set(given) != set(names) or len(values) > len(names):
            return _unsupported(f"{op} with arguments of other kinds")
        if any(isinstance(value, (Node, _Sizes)) for value in given.values()):
            return _unsupported(f"{op} with computed arguments")
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return Node(op, (x,), given)

    return convert


def _many(op: str) -> Callable[..., Node]:
    """A list of activations, and a dimension."""

    def convert(items: Any, dim: int = 0) -> Node:
        if not isinstance(items, (list, tuple)) or not items:
            return _unsupported(f"{op} of something other than a list of activations")
        if not all(isinstance(item, Node) for item in items):
            return _unsupported(f"{op} of something other than activations")
        return Node(op, tuple(items), {"dim": dim})

    return convert


def _permute(x: Node, *dims: Any) -> Node:
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    return Node("permute", (x,), {"dims": dims})


def _mean(x: Node, dim: Any = None, keepdim: bool = False) -> Node:
    if dim is None:
        return _unsupported("the mean of everything")
    return Node(
        "mean", (x,), {"dim": (dim,) if isinstance(dim, int) else tuple(dim), "keepdim": keepdim}
    )


def _adaptive(op: str) -> Callable[..., Node]:
    return lambda x, output_size: Node(op, (x,), {"output_size": _pair(output_size)})


def _pad(x: Node, pad: Any, mode: str = "constant", value: Any = None) -> Node:
    if not all(isinstance(n, int) for n in pad):
        return _unsupported("padding by a computed size")
    return Node("pad", (x,), {"pad": tuple(pad), "mode": mode, "value": value})


def _dropout(x: Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> Node:
    return _unsupported("dropout that is always on") if training else x


def _chunk(x: Node, chunks: int, dim: int = 0) -> list[Node]:
    return [Node("chunk", (x,), {"chunks": chunks, "dim": dim, "index": i}) for i in range(chunks)]


def _linear(x: Node, weight: Any, bias: Any = None) -> Node:
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        return _unsupported("a linear map whose weight is computed")
    return Node("linear", (x,), {"weight": weight, "bias": bias})


def _group_norm(
    x: Node, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Node:
    given = {"num_groups": num_groups, "weight": weight, "bias": bias, "eps": eps}
    return Node("group_norm", (x,), given)


def _instance_norm(module: nn.InstanceNorm2d, name: str, x: Node) -> Node:
    if module.track_running_stats:
        return _unsupported(f"{name}, an InstanceNorm with running statistics")
    weight, bias = _weights_of(module, name, "weight", "bias")
    return Node("instance_norm", (x,), {"weight": weight, "bias": bias, "eps": module.eps})


@dataclass(frozen=True)
class _Sizes:
    """Sizes of an activation along these dimensions, as a forward may ask for them."""

    node: Node
    dims: tuple[int, ...]

    def __getitem__(self, index: Any) -> Any:
        chosen = self.dims[index]
        return _Sizes(self.node, chosen if isinstance(chosen, tuple) else (chosen,))


_EVERY = (0, 1, 2, 3)


def _size(x: Node, dim: Any = None) -> Any:
    return _Sizes(x, _EVERY) if dim is None else _Sizes(x, _EVERY)[dim]


def _size_like(size: Any) -> Node | None:
    """The activation whose height and width this is."""
    parts = size if isinstance(size, (list, tuple)) else (size,)
    if not parts or not all(isinstance(part, _Sizes) for part in parts):
        return None
    if len({part.node for part in parts}) > 1:
        return None
    dims = tuple(dim for part in parts for dim in part.dims)
    return parts[0].node if dims == (2, 3) else None


_aten = torch.ops.aten

_elementwise: dict[str, Callable[..., Node]] = {
    "clamp": _plain("clamp", min=None, max=None),
    "elu": _plain("elu", alpha=1.0),
    "gelu": _plain("gelu", approximate="none"),
    "hardsigmoid": _plain("hardsigmoid"),
    "hardswish": _plain("hardswish"),
    "leaky_relu": _plain("leaky_relu", negative_slope=0.01),
    "relu": lambda x, inplace=False: _relu(x, inplace),
    "relu6": _plain("relu6"),
    "sigmoid": _plain("sigmoid"),
    "silu": _plain("silu"),
    "tanh": _plain("tanh"),
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    _aten.conv2d.default: _conv2d,
    _aten.conv2d.padding: _conv2d,
    F.conv_transpose2d: _conv_transpose2d,
    torch.conv_transpose2d: _conv_transpose2d,
    _aten.conv_transpose2d.input: _conv_transpose2d,
    F.batch_norm: _functional_batch_norm,
    torch.batch_norm: _aten_batch_norm,
    _aten.batch_norm.default: _aten_batch_norm,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    _aten.max_pool2d.default: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    _aten.avg_pool2d.default: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive("adaptive_avg_pool2d"),
    _aten.adaptive_avg_pool2d.default: _adaptive("adaptive_avg_pool2d"),
    F.adaptive_max_pool2d: _adaptive("adaptive_max_pool2d"),
    F.interpolate: _interpolate,
    F.upsample: _interpolate,
    _aten.upsample_nearest2d.vec: _aten_upsample("nearest"),
    _aten.upsample_bilinear2d.vec: _aten_upsample("bilinear"),
    operator.add: _add,
    torch.add: _add,
    _aten.add.Tensor: _add,
    operator.sub: _binary("sub"),
    torch.sub: _binary("sub"),
    _aten.sub.Tensor: _binary("sub"),
    operator.mul: _binary("mul"),
    torch.mul: _binary("mul"),
    _aten.mul.Tensor: _binary("mul"),
    operator.truediv: _binary("div"),
    torch.div: _binary("div"),
    _aten.div.Tensor: _binary("div"),
    operator.neg: lambda x: _binary("mul")(x, -1.0),
    torch.cat: _many("concat"),
    torch.concat: _many("concat"),
    _aten.cat.default: _many("concat"),
    torch.stack: _many("stack"),
    _aten.stack.default: _many("stack"),
    torch.permute: _permute,
    _aten.permute.default: _permute,
    torch.flatten: _plain("flatten", start_dim=0, end_dim=-1),
    _aten.flatten.using_ints: _plain("flatten", start_dim=0, end_dim=-1),
    torch.mean: _mean,
    _aten.mean.dim: _mean,
    torch.chunk: _chunk,
    _aten.chunk.default: _chunk,
    F.pad: _pad,
    _aten.pad.default: _pad,
    F.pixel_shuffle: _plain("pixel_shuffle", "upscale_factor"),
    _aten.pixel_shuffle.default: _plain("pixel_shuffle", "upscale_factor"),
    F.softmax: _plain("softmax", "dim"),
    torch.softmax: _plain("softmax", "dim"),
    F.prelu: _plain("prelu", "weight"),
    torch.prelu: _plain("prelu", "weight"),
    F.linear: _linear,
    _aten.linear.default: _linear,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    _aten.group_norm.default: _group_norm,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    _aten.dropout.default: _dropout,
    torch.clone: lambda x: x,
    _aten.clone.default: lambda x: x,
    getattr: lambda x, name: _size(x) if name == "shape" else _unsupported(f"the attribute {name}"),
    operator.getitem: lambda items, index: items[index],
    **{
        function: _elementwise[op]
        for op in _elementwise
        for function in (
            getattr(F, op, None),
            getattr(torch, op, None),
            getattr(getattr(_aten, op, None), "default", None),
        )
        if function is not None
    },
}
#: Of an operator that writes its first argument, the one that returns the result instead.
_INPLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: _add,
    operator.isub: _binary("sub"),
    operator.imul: _binary("mul"),
    operator.itruediv: _binary("div"),
    F.relu_: _relu,
    torch.relu_: _relu,
    _aten.relu_.default: _relu,
    _aten.add_.Tensor: _add,
    _aten.sub_.Tensor: _binary("sub"),
    _aten.mul_.Tensor: _binary("mul"),
    _aten.div_.Tensor: _binary("div"),
    _aten.leaky_relu_.default: _elementwise["leaky_relu"],
    _aten.silu_.default: _elementwise["silu"],
    _aten.hardswish_.default: _elementwise["hardswish"],
    _aten.hardsigmoid_.default: _elementwise["hardsigmoid"],
    _aten.sigmoid_.default: _elementwise["sigmoid"],
    _aten.elu_.default: _elementwise["elu"],
    _aten.clamp_.default: _elementwise["clamp"],
}
_METHODS: dict[Any, Callable[..., Any]] = {
    **{op: _elementwise[op] for op in ("relu", "sigmoid", "tanh", "clamp")},
    "add": _add,
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "div": _binary("div"),
    "permute": _permute,
    "flatten": _plain("flatten", start_dim=0, end_dim=-1),
    "mean": _mean,
    "chunk": _chunk,
    "softmax": _plain("softmax", "dim"),
    "size": _size,
    "clone": lambda x: x,
    "contiguous": lambda x: x,
    "detach": lambda x: x,
}
_INPLACE_METHODS: dict[Any, Callable[..., Any]] = {
    f"{op}_": _METHODS[op]
    for op in ("relu", "sigmoid", "tanh", "clamp", "add", "sub", "mul", "div")
}
#: Calls that return their argument's memory, whole.
_SAME_MEMORY = frozenset({"detach", F.dropout, F.dropout2d, _aten.dropout.default})
#: Calls whose result may share memory with their argument.
_VIEWS = frozenset(
    {
        *("permute", "flatten", "chunk", "contiguous"),
        *(torch.permute, torch.flatten, torch.chunk),
        *(_aten.permute.default, _aten.flatten.using_ints, _aten.chunk.default),
    }
)


def _weights_of(module: nn.Module, name: str, *attributes: str) -> list[Any]:
    """The weights under these attributes, None for what is None."""
    held = ((attribute, getattr(module, attribute)) for attribute in attributes)
    return [
        Weight(f"{name}.{attribute}") if value is not None else None for attribute, value in held
    ]


def _conv_transpose_module(module: nn.ConvTranspose2d, name: str, x: Node) -> Node:
    weight, bias = _weights_of(module, name, "weight", "bias")
    m = module
    return _conv_transpose2d(
        x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation
    )


def _batch_norm_module(module: _BatchNorm, name: str, x: Node) -> Node:
    scale, shift, mean, var = _weights_of(
        module, name, "weight", "bias", "running_mean", "running_var"
    )
    return _batch_norm(x, scale, shift, mean, var, module.eps)


#: PyTorch's own modules by class: the normal form of a call of (module, name, x).
_MODULES: dict[type[nn.Module], Callable[[Any, str, Node], Any]] = {
    nn.Conv2d: _conv_module,
    nn.ConvTranspose2d: _conv_transpose_module,
    nn.BatchNorm2d: _batch_norm_module,
    nn.SyncBatchNorm: _batch_norm_module,
    nn.GroupNorm: lambda m, name, x: _group_norm(
        x, m.num_groups, *_weights_of(m, name, "weight", "bias"), m.eps
    ),
    nn.InstanceNorm2d: _instance_norm,
    nn.MaxPool2d: lambda m, _, x: _max_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda m, _, x: _avg_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda m, _, x: _adaptive("adaptive_avg_pool2d")(x, m.output_size),
    nn.AdaptiveMaxPool2d: lambda m, _, x: (
        _unsupported("pooling that returns indices")
        if m.return_indices
        else _adaptive("adaptive_max_pool2d")(x, m.output_size)
    ),
    nn.Upsample: _upsample_module,
    nn.Identity: lambda m, _, x: x,
    nn.Dropout: lambda m, _, x: x,
    nn.Dropout2d: lambda m, _, x: x,
    nn.ReLU: lambda m, _, x: _relu(x),
    nn.ReLU6: lambda m, _, x: Node("relu6", (x,)),
    nn.LeakyReLU: lambda m, _, x: Node("leaky_relu", (x,), {"negative_slope": m.negative_slope}),
    nn.PReLU: lambda m, name, x: Node("prelu", (x,), {"weight": Weight(f"{name}.weight")}),
    nn.ELU: lambda m, _, x: Node("elu", (x,), {"alpha": m.alpha}),
    nn.SiLU: lambda m, _, x: Node("silu", (x,)),
    nn.GELU: lambda m, _, x: Node("gelu", (x,), {"approximate": m.approximate}),
    nn.Hardswish: lambda m, _, x: Node("hardswish", (x,)),
    nn.Hardsigmoid: lambda m, _, x: Node("hardsigmoid", (x,)),
    nn.Sigmoid: lambda m, _, x: Node("sigmoid", (x,)),
    nn.Tanh: lambda m, _, x: Node("tanh", (x,)),
    nn.PixelShuffle: lambda m, _, x: Node(
        "pixel_shuffle", (x,), {"upscale_factor": m.upscale_factor}
    ),
    nn.Flatten: lambda m, _, x: Node(
        "flatten", (x,), {"start_dim": m.start_dim, "end_dim": m.end_dim}
    ),
    nn.Linear: lambda m, name, x: _linear(x, *_weights_of(m, name, "weight", "bias")),
    nn.ZeroPad2d: lambda m, _, x: _pad(x, m.padding),
    nn.ReflectionPad2d: lambda m, _, x: _pad(x, m.padding, "reflect"),
    nn.ReplicationPad2d: lambda m, _, x: _pad(x, m.padding, "replicate"),
}


def _module_node(module: nn.Module, name: str, x: Node) -> Any:
    """The normal form of a call of one of PyTorch's own modules.

    A subclass counts as its base only if it left the forward alone, so that a
    weight-standardised convolution is not mistaken for a plain one.
    """
    for kind in type(module).__mro__:
        convert = _MODULES.get(kind)
        if convert is not None and type(module).forward is getattr(kind, "forward", None):
            return convert(module, name, x)
    return _unsupported(f"{name}, a {type(module).__name__}")


# --- from a recorded graph to the normal form ------------------------------------------------


@dataclass
class _Cell:
    """A tensor's memory: names that alias it share the cell, and its value may be replaced."""

    value: Node
    is_input: bool = False
    may_alias: bool = False  # perhaps a view of another cell's memory

    def replace(self, value: Node) -> None:
        if self.is_input:
            raise TraceError("it changes its input in place")
        if self.may_alias:
            raise TraceError("it changes in place what may be a view of another activation")
        self.value = value


class _Normaliser:
    """Replays a recorded graph, node by node, in normal form."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.values: dict[fx.Node, Any] = {}
        self.nodes: list[Node] = []
        self._known: set[Node] = set()
        self.inputs: list[Node] = []

    def add_input(self, source: fx.Node) -> None:
        node = self._append(Node("input"), source)
        self.inputs.append(node)
        self.values[source] = _Cell(node, is_input=True)

    def add_weight(self, source: fx.Node, name: str) -> None:
        self.values[source] = Weight(name)

    def add_call(self, source: fx.Node) -> None:
        target: Any = source.target
        if source.op == "call_module":
            self._call_module(source, self.modules[target])
            return
        is_method = source.op == "call_method"
        pure = _METHODS if is_method else _FUNCTIONS
        inplace = _INPLACE_METHODS if is_method else _INPLACE
        if target in inplace:
            self._replace(source, self._convert(source, inplace[target]))
        elif target in pure and source.kwargs.get("inplace"):
            self._replace(source, self._convert(source, pure[target]))
        elif target is operator.getitem and isinstance(self._held(source), (list, _Sizes)):
            self.values[source] = self._held(source)[source.args[1]]
        elif target in pure and "out" not in source.kwargs:
            self._define(source, self._convert(source, pure[target]))
        elif _may_write(source):
            # Even if nobody looks at its result: what it wrote may be looked at.
            raise TraceError(f"it uses {_describe(source)}, which writes in place")
        else:
            node = _unsupported(_describe(source))
            self.values[source] = _Cell(self._append(node, source), may_alias=True)

    def finish(self, outputs: Any) -> Graph:
        outputs = self._read(outputs)
        live: set[Node] = set()
        pending = [*self.inputs, *output_nodes(outputs)]
        while pending:
            node = pending.pop()
            if node not in live:
                live.add(node)
                pending.extend(node.inputs)
        return Graph(self.inputs, [node for node in self.nodes if node in live], outputs)

    def _call_module(self, source: fx.Node, module: nn.Module) -> None:
        arguments = [self._read(argument) for argument in (*source.args, *source.kwargs.values())]
        if len(arguments) != 1 or not isinstance(arguments[0], Node):
            node: Any = _unsupported(f"{source.target}, called with more than one activation")
        else:
            node = _module_node(module, str(source.target), arguments[0])
        if node is not None and len(arguments) == 1 and node is arguments[0]:
            self.values[source] = self.values[source.all_input_nodes[0]]
        elif getattr(module, "inplace", False):
            self._replace(source, node)
        else:
            self._define(source, node)

    def _define(self, source: fx.Node, result: Any) -> None:
        """Note what a call returned: one activation, a list of them, or their sizes."""
        if isinstance(result, _Sizes):
            self.values[source] = result
            return
        arguments = [self.values[node] for node in source.all_input_nodes]
        if source.target in _SAME_MEMORY and result.op != "unsupported":
            self.values[source] = arguments[0]
            return
        is_view = source.target in _VIEWS or isinstance(result, list) or result.op == "unsupported"
        cells = [
            _Cell(self._append(node, source), may_alias=is_view)
            for node in (result if isinstance(result, list) else [result])
        ]
        if is_view:
            for cell in arguments:
                if isinstance(cell, _Cell):
                    cell.may_alias = True
        self.values[source] = cells if isinstance(result, list) else cells[0]

    def _held(self, source: fx.Node) -> Any:
        """What its first argument stands for: a cell of memory, several, sizes."""
        first = source.args[0]
        return self.values[first] if isinstance(first, fx.Node) else first

    def _replace(self, source: fx.Node, node: Node) -> None:
        cell = self.values[source.all_input_nodes[0]]
        if not isinstance(cell, _Cell):
            raise TraceError(
                f"{_describe(source)} changes something other than an activation in place"
            )
        cell.replace(self._append(node, source))
        self.values[source] = cell

    def _convert(self, source: fx.Node, convert: Callable[..., Any]) -> Any:
        try:
            result = convert(*self._read(list(source.args)), **self._read(dict(source.kwargs)))
        # Arguments that the normal form has no place for.
        except (TypeError, AttributeError, IndexError, KeyError):
            return _unsupported(_describe(source))
        for node in result if isinstance(result, list) else [result]:
            if isinstance(node, Node) and not all(isinstance(item, Node) for item in node.inputs):
                return _unsupported(f"{_describe(source)} of a weight")
        return result

    def _append(self, node: Node, source: fx.Node) -> Node:
        if node in self._known:
            return node
        for item in node.inputs:  # some calls stand for two operations
            self._append(item, source)
        stack = source.meta.get("nn_module_stack") or {"": ("", None)}
        node.module = _module_name(list(stack.values())[-1][0])
        self._known.add(node)
        self.nodes.append(node)
        return node

    def _read(self, argument: Any) -> Any:
        """An argument with every recorded value replaced by what it stands for now."""
        if isinstance(argument, fx.Node):
            value = self.values[argument]
            if isinstance(value, list):
                return [cell.value for cell in value]
            return value.value if isinstance(value, _Cell) else value
        if isinstance(argument, (list, tuple)):
            items = [self._read(item) for item in argument]
            return tuple(items) if isinstance(argument, tuple) else items
        if isinstance(argument, dict):
            return {key: self._read(item) for key, item in argument.items()}
        return argument


def _module_name(path: str) -> str:
    """A module's qualified name; dynamo writes ``L['self'].layer1[0]`` for ``layer1.0``."""
    if not path.startswith("L["):
        return path
    words = re.findall(r"[A-Za-z0-9_]+", path.replace("_modules", " "))
    return ".".join(words[2:])


def _may_write(source: fx.Node) -> bool:
    """Whether a call without normal form may change memory that others look at."""
    target: Any = source.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    overload_writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return (
        overload_writes
        or bool(source.kwargs.get("inplace"))
        or "out" in source.kwargs
        or (name.endswith("_") and not name.endswith("__"))
        or name in ("setitem", "__setitem__")
        or name in _AUGMENTED
    )


def _describe(source: fx.Node) -> str:
    target = source.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return f"{name}()"


# --- the two tracers -----------------------------------------------------------------------


#: Augmented assignments. fx would record `x *= y` as a new product and hide that x has changed.
_AUGMENTED = [
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
]


class _Proxy(fx.Proxy):
    pass


def _is_asserted(frame: FrameType) -> bool:
    """Whether the truth that this frame asks for is that of an ``assert``."""
    code = list(dis.get_instructions(frame.f_code))
    here = next(i for i, step in enumerate(code) if step.offset == frame.f_lasti)
    jump = code[here]
    if not jump.opname.startswith("POP_JUMP"):  # Python 3.12 and later convert first
        here += 1
        jump = code[here]
    if "IF_TRUE" in jump.opname:  # over the error
        return code[here + 1].opname == "LOAD_ASSERTION_ERROR"
    target = next((step for step in code if step.offset == jump.argval), None)
    return (
        "IF_FALSE" in jump.opname
        and target is not None
        and (target.opname == "LOAD_ASSERTION_ERROR")
    )


_COMPARISONS = {
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_ARITHMETIC = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.mod: "%",
    operator.floordiv: "//",
}


class _KnownSizes:
    """What weights and permutations tell about the sizes of activations while fx still records.

    Sizes are numbers, or Guards over the sizes of the inputs; None where nothing tells.
    """

    def __init__(self, modules: dict[str, nn.Module], inputs: list[fx.Node]) -> None:
        self._modules = modules
        self._inputs = inputs

    def evaluate(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value if isinstance(value, (int, tuple)) else None
        if value.op == "call_method" and value.target == "size":
            x, *dim = value.args
            return self._size(x, dim[0]) if dim else tuple(self._size(x, i) for i in range(4))
        if value.op != "call_function":
            return None
        if value.target is getattr and value.args[1] == "shape":
            return tuple(self._size(value.args[0], i) for i in range(4))
        arguments = [self.evaluate(argument) for argument in value.args]
        if value.target is operator.getitem and isinstance(arguments[0], tuple):
            index = value.args[1]
            return arguments[0][index] if isinstance(index, (int, slice)) else None
        function: Any = value.target
        sign = _COMPARISONS.get(function) or _ARITHMETIC.get(function)
        if sign is None or len(arguments) != 2:
            return None
        if all(isinstance(item, int) for item in arguments):
            return function(*arguments)
        if all(isinstance(item, (int, Guard)) for item in arguments):
            return Guard(sign, (arguments[0], arguments[1]))
        return None

    def _size(self, x: Any, dim: Any) -> Any:
        if not isinstance(x, fx.Node) or not isinstance(dim, int):
            return None
        dim %= 4
        if x.op == "placeholder":
            return Guard("size", (self._inputs.index(x), dim))
        if x.op == "call_method" and x.target == "permute" and len(x.args) == 5:
            return self._size(x.args[0], x.args[1 + dim])
        if dim == 0:  # kept by whatever a pose network does
            return None
        return self._channels(x) if dim == 1 else None

    def _channels(self, x: Any) -> Any:
        if not isinstance(x, fx.Node):
            return None
        if x.op in ("placeholder", "get_attr") or x.target in ("permute", "view", "reshape"):
            return self._size(x, 1) if x.op == "placeholder" or x.target == "permute" else None
        if x.op == "call_module":
            module = self._modules[str(x.target)]
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                return module.out_channels
            if isinstance(module, _BatchNorm):
                return module.num_features
            return self._channels(x.args[0]) if _keeps_channels(module) else None
        if x.target in (torch.cat, torch.concat):
            items: Any = x.args[0]
            dim = x.kwargs.get("dim", x.args[1] if len(x.args) > 1 else 0)
            parts = [self._channels(item) for item in items] if dim == 1 else [None]
            return sum(parts) if all(isinstance(part, int) for part in parts) else None
        if x.target in _CHANNELWISE:
            known = {self._channels(item) for item in x.args if isinstance(item, fx.Node)}
            return known.pop() if len(known) == 1 else None
        return None


def _keeps_channels(module: nn.Module) -> bool:
    kinds = (
        nn.ReLU,
        nn.MaxPool2d,
        nn.AvgPool2d,
        nn.Upsample,
        nn.Identity,
        nn.Dropout,
        nn.GroupNorm,
    )
    return isinstance(module, kinds)


_CHANNELWISE = frozenset(
    {
        *("relu", "relu_", "add", "add_", "contiguous"),
        *(operator.add, operator.iadd, torch.add, torch.relu, F.relu, F.relu_),
        *(F.max_pool2d, F.avg_pool2d, F.interpolate),
    }
)


def _augmented(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy(
        "call_function", function, (self, other), {}
    )


for _name in _AUGMENTED:
    setattr(_Proxy, f"__{_name}__", _augmented(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a write to a buffer must be seen, and refused

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[Guard] = []
        self._thread = threading.get_ident()

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth of a comparison of sizes, where weights tell it; an assertion's is assumed."""
        truth = self._sizes().evaluate(obj.node)
        if isinstance(truth, (bool, int)):
            return bool(truth)
        frame = inspect.currentframe()  # __bool__ lies between here and the forward
        caller = frame.f_back.f_back if frame and frame.f_back else None
        if isinstance(truth, Guard) and caller is not None and _is_asserted(caller):
            self.guards.append(truth)
            return True
        raise TraceError(
            "its forward depends on the sizes or values of activations; an example input may "
            "settle it"
        )

    def _sizes(self) -> _KnownSizes:
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        return _KnownSizes(dict(self.root.named_modules(remove_duplicate=False)), inputs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:  # fx would make a plain one of it
            raise TraceError(f"it makes a {type(a).__name__} of activations")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu"):
            raise TraceError("its forward enables autocast")
        return super().create_node(*args, **kwargs)

    # fx patches nn.Module for everybody while it traces: calls of other threads pass through.
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_tracing = threading.Lock()  # two traces at once would undo each other's patches


def trace(module: nn.Module) -> Graph:
    """Trace ``module`` with torch.fx, without an example.

    The graph holds for every input shape. The module is left as it was, its mode included.

    Raises:
        TraceError: a module in it has hooks, parametrisations or a patched forward, it has side
            effects, or it cannot be followed symbolically; the message says which.
    """
    _check_untouched(module)
    optional = _optional_arguments(module)
    no_autocast = torch.autocast("cpu", enabled=False)
    with _tracing, no_autocast, _evaluation_mode(module), _attributes_kept(module):
        tracer = _Tracer()
        try:
            recorded = tracer.trace(module, optional)
        except TraceError:
            raise
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            raise TraceError(
                f"fx cannot follow its forward ({type(error).__name__}: {message[0]})"
            ) from error
    normaliser = _Normaliser(dict(module.named_modules(remove_duplicate=False)))
    required = len(inspect.signature(type(module).forward).parameters) - 1 - len(optional)
    for source in recorded.nodes:
        if source.op == "placeholder":
            if str(source.target).startswith("*"):
                raise TraceError("its forward takes a variable number of arguments")
            if len(normaliser.inputs) < required:
                normaliser.add_input(source)
            else:  # what fx leaves of an optional argument, which has its default
                normaliser.values[source] = None
        elif source.op == "get_attr":
            normaliser.add_weight(source, str(source.target))
        elif source.op == "output":
            graph = _checked(normaliser.finish(source.args[0]))
            graph.guards = tuple(tracer.guards)
            return graph
        else:
            normaliser.add_call(source)
    raise TraceError("its graph has no output")


def _optional_arguments(module: nn.Module) -> dict[str, Any]:
    """The forward's arguments that a call may leave out, with their defaults.

    A graph holds for calls without them.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind is variable[0] for p in parameters):
        raise TraceError("its forward takes a variable number of arguments")
    return {
        p.name: p.default
        for p in parameters
        if p.kind not in variable and p.default is not inspect.Parameter.empty
    }


def trace_with_example(module: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """Trace ``module`` with torch.export on ``example``.

    The graph holds for the example's shapes only.

    Raises:
        TraceError: as :func:`trace`, or torch.export cannot follow the forward.
    """
    _check_untouched(module)
    module = _with_its_class_forward(module)
    with _evaluation_mode(module):  # export itself puts back attributes that a forward sets
        try:
            program = torch.export.export(module, example, strict=False)
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            raise TraceError(
                f"torch.export cannot follow its forward ({type(error).__name__}: {message[0]})"
            ) from error
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def container(flat: Any) -> Any:
        kept = list(flat)[len(signature.buffers_to_mutate) :]
        return torch.utils._pytree.tree_unflatten(kept, program.call_spec.out_spec)

    graph = _normal_form(program.graph, {}, names, container)
    graph.input_shapes = tuple(tuple(tensor.shape) for tensor in example)
    return graph


def graph_of(recorded: fx.GraphModule, weights: Mapping[str, str]) -> Graph:
    """The normal form of a graph that somebody else recorded, as dynamo hands it to a backend.

    Args:
        recorded: it is left as it was.
        weights: qualified names of the parameters and buffers that come as inputs, by the names
            of their placeholders.

    Raises:
        TraceError: as :func:`trace`.
    """
    modules = dict(recorded.named_modules(remove_duplicate=False))
    return _normal_form(recorded.graph, modules, weights, lambda outputs: outputs)


def _normal_form(
    recorded: fx.Graph,
    modules: dict[str, nn.Module],
    weights: Mapping[str, str],
    container: Callable[[Any], Any],
) -> Graph:
    normaliser = _Normaliser(modules)
    for source in recorded.nodes:
        if source.op == "placeholder":
            if source.name in weights:
                normaliser.add_weight(source, weights[source.name])
            else:
                normaliser.add_input(source)
        elif source.op == "get_attr":
            normaliser.add_weight(source, str(source.target))
        elif source.op == "output":
            return _checked(normaliser.finish(container(source.args[0])))
        else:
            normaliser.add_call(source)
    raise TraceError("its graph has no output")


def _checked(graph: Graph) -> Graph:
    for node in graph.nodes:
        if node.op == "unsupported":
            raise TraceError(f"it uses {node['what']}")
    leaves = torch.utils._pytree.tree_leaves(graph.outputs)
    if not leaves or not all(isinstance(leaf, Node) for leaf in leaves):
        raise TraceError("its outputs are not all activations")
    if not _is_plain_container(graph.outputs):
        raise TraceError("its outputs come in a container other than lists, tuples and dicts")
    return graph


def _is_plain_container(outputs: Any) -> bool:
    if isinstance(outputs, Node):
        return True
    if type(outputs) is dict:
        return all(_is_plain_container(item) for item in outputs.values())
    return type(outputs) in (list, tuple) and all(_is_plain_container(item) for item in outputs)


def _check_untouched(module: nn.Module) -> None:
    """Refuse modules whose calls do more, or other, than their class's forward says.

    The module's own instance may have another forward: it is the class's that is traced.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError("it is a TorchScript module")
    for name, child in module.named_modules():
        where = name or "the module itself"
        if any(map(is_lazy, child.parameters(recurse=False))):
            raise TraceError(f"{where} is lazy and has no weights yet")
        if child._forward_hooks or child._forward_pre_hooks:
            raise TraceError(f"{where} has a forward hook")
        if parametrize.is_parametrized(child):
            raise TraceError(f"{where} has a parametrisation")
        if "forward" in child.__dict__ and child is not module:
            raise TraceError(f"{where} has a forward of its own, set on the instance")


def _with_its_class_forward(module: nn.Module) -> nn.Module:
    """The module, or a shallow copy without the forward that its instance has of its own.

    A copy, because other threads may be calling the module.
    """
    if "forward" not in module.__dict__:
        return module
    bare: nn.Module = module.__new__(type(module))
    bare.__dict__.update({k: v for k, v in module.__dict__.items() if k != "forward"})
    return bare


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    # Not module.eval(): some models override it (and return None, or freeze things).
    modes = [(child, child.training) for child in module.modules()]
    for child, _ in modes:
        child.training = False
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a traced forward wrote to its modules, and refuse to trust such a forward."""
    before = [(child, dict(child.__dict__)) for child in module.modules()]
    held = [(item, copy.copy(item)) for _, old in before for item in old.values() if _holds(item)]
    changed: object = None
    try:
        yield
    finally:
        for item, was in held:
            if not _same_items(item, was):
                item.clear()
                (item.extend if isinstance(item, list) else item.update)(was)
                changed = item
        for child, old in before:
            new = child.__dict__
            if new.keys() != old.keys() or any(new[key] is not old[key] for key in old):
                changed = child
                new.clear()
                new.update(old)
    if changed is not None:
        raise TraceError("its forward, or that of a module in it, sets attributes")


def _holds(item: object) -> bool:
    return isinstance(item, (list, dict, set))


def _same_items(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        now, before = [*now, *now.values()], [*before, *before.values()]
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
