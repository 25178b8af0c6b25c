"""Tables from PyTorch's modules, functions, methods and aten overloads to the normal form.

Each entry takes the arguments of the call that was recorded, activations as nodes, and gives the
node that computes the same: one that ``hgfast.trace.graph.OPERATIONS`` names, or one that goes by
its name in ``hgfast.runtime.reference.PLAIN``. What has no entry is ``unsupported``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hgfast.plan import Guard
from hgfast.trace.graph import Node, Weight, unsupported


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        return value, value
    first, *rest = value
    return first, rest[0] if rest else first


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
        return unsupported("a convolution whose weight is computed")
    if isinstance(padding, str):
        if padding != "valid":
            return unsupported(f'a convolution with padding="{padding}"')
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
        return unsupported(f"{name}, a convolution of its own kind")
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
        return unsupported("a BatchNorm without running statistics")
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
        return unsupported("a BatchNorm that uses the statistics of the batch")
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


def _is_whole(x: Node, kernel_size: Any, padding: Any) -> bool:
    """Whether a window is as large as the map: there is one, whatever the stride."""
    return _pair(padding) == (0, 0) and _size_like(kernel_size) is x


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
        return unsupported("max pooling that returns indices")
    if _is_whole(x, kernel_size, padding) and _pair(dilation) == (1, 1):
        return Node("adaptive_max_pool2d", (x,), {"output_size": (1, 1)})
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
        return unsupported("average pooling with a divisor of its own")
    if _is_whole(x, kernel_size, padding):
        return Node("adaptive_avg_pool2d", (x,), {"output_size": (1, 1)})
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
        return unsupported("antialiased interpolation")
    inputs: tuple[Node, ...] = (x,)
    like = _size_like(size)
    if like is not None:
        inputs, size = (x, like), None
    elif size is not None:
        size = _pair(size)
        if not all(isinstance(n, int) for n in size):
            return unsupported("upsampling to a computed size")
    if isinstance(scale_factor, (int, float)):
        scale_factor = (scale_factor, scale_factor)
    if size is not None or like is not None:
        scale_factor = None
    if mode not in ("nearest", "bilinear", "bicubic", "nearest-exact"):
        return unsupported(f'interpolation with mode="{mode}"')
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
        return unsupported("an addition with a factor")
    total: Node = _binary("add")(a, b)
    return total


def _binary(op: str) -> Callable[..., Node]:
    """Two activations, or an activation and a number or weight, in either order."""

    def convert(a: Any, b: Any, **others: Any) -> Any:
        if others:
            return unsupported(f"{op} with {', '.join(others)}")
        if isinstance(a, Node) and isinstance(b, Node):
            return Node(op, (a, b))
        if not isinstance(a, Node):
            if op == "sub":  # a - b
                return convert_sum(Node("mul_number", (b,), {"other": -1.0}), a)
            if op == "div":
                return unsupported("a division by an activation")
            a, b = b, a
        if op == "sub":
            return convert_sum(a, -b)
        if op == "add" and type(b) in (int, float) and b == 0:
            return a  # where a sum begins
        if isinstance(b, Weight) and op != "div":
            return Node(f"{op}_weight", (a,), {"other": b})
        if isinstance(b, (int, float)) and not isinstance(b, bool):
            return Node(f"{op}_number", (a,), {"other": b})
        return unsupported(f"{op} of an activation and a {type(b).__name__}")

    convert_sum = _binary("add") if op != "add" else convert
    return convert


def _plain(op: str, *keywords: str, **defaults: Any) -> Callable[..., Node]:
    """One activation, and keywords of which those in ``defaults`` may be left out."""
    names = (*keywords, *defaults)

    def convert(x: Node, *values: Any, inplace: bool = False, **named: Any) -> Node:
        given = {**defaults, **dict(zip(names, values, strict=False)), **named}
        if set(given) != set(names) or len(values) > len(names):
            return unsupported(f"{op} with arguments of other kinds")
        if any(isinstance(value, (Node, Sizes)) for value in given.values()):
            return unsupported(f"{op} with computed arguments")
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return Node(op, (x,), given)

    return convert


def _many(op: str) -> Callable[..., Node]:
    """A list of activations, and a dimension."""

    def convert(items: Any, dim: int = 0) -> Node:
        if not isinstance(items, (list, tuple)) or not items:
            return unsupported(f"{op} of something other than a list of activations")
        if not all(isinstance(item, Node) for item in items):
            return unsupported(f"{op} of something other than activations")
        return Node(op, tuple(items), {"dim": dim})

    return convert


def _permute(x: Node, *dims: Any) -> Node:
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    return Node("permute", (x,), {"dims": dims})


def _reduction(op: str) -> Callable[..., Node]:
    def convert(x: Node, dim: Any = None, keepdim: bool = False) -> Node:
        if dim is None:
            return unsupported(f"the {op} of everything")
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        return Node(op, (x,), {"dim": dims, "keepdim": keepdim})

    return convert


def _max(x: Node, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(dim, int):
        return unsupported("the maximum of two values, or of everything")
    values = Node("amax", (x,), {"dim": (dim,), "keepdim": keepdim})
    return [values, unsupported("where the maximum is")]


def _adaptive(op: str) -> Callable[..., Node]:
    def convert(x: Node, output_size: Any) -> Node:
        like = _size_like(output_size)
        if like is not None:
            return Node(op, (x, like), {"output_size": None})
        size = _pair(output_size)
        if not all(n is None or isinstance(n, int) for n in size):
            return unsupported(f"{op} to a computed size")
        return Node(op, (x,), {"output_size": size})

    return convert


def _hardtanh(x: Node, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Node:
    return Node("clamp", (x,), {"min": min_val, "max": max_val})


def _pad(x: Node, pad: Any, mode: str = "constant", value: Any = None) -> Node:
    if not all(isinstance(n, int) for n in pad):
        return unsupported("padding by a computed size")
    return Node("pad", (x,), {"pad": tuple(pad), "mode": mode, "value": value})


def _dropout(x: Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> Node:
    return unsupported("dropout that is always on") if training else x


def _chunk(x: Node, chunks: int, dim: int = 0) -> list[Node]:
    return [Node("chunk", (x,), {"chunks": chunks, "dim": dim, "index": i}) for i in range(chunks)]


def split(x: Node, size: Any, dim: int = 0, parts: int = 0) -> list[Node]:
    """``parts`` is how many of one size are made use of."""
    sizes = [size] * parts if isinstance(size, int) else list(size)
    if not sizes:
        return [unsupported("split() into parts that are not taken one by one")]
    given = size if isinstance(size, int) else tuple(size)
    return [
        Node("split", (x,), {"sizes": given, "dim": dim, "index": i}) for i in range(len(sizes))
    ]


def _linear(x: Node, weight: Any, bias: Any = None) -> Node:
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        return unsupported("a linear map whose weight is computed")
    return Node("linear", (x,), {"weight": weight, "bias": bias})


def _group_norm(
    x: Node, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Node:
    given = {"num_groups": num_groups, "weight": weight, "bias": bias, "eps": eps}
    return Node("group_norm", (x,), given)


def _layer_norm(
    x: Node, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Node:
    shape = tuple(normalized_shape)
    given = {"normalized_shape": shape, "weight": weight, "bias": bias, "eps": eps}
    return Node("layer_norm", (x,), given)


def _matmul(a: Any, b: Any) -> Node:
    if not isinstance(a, Node) or not isinstance(b, Node) or min(rank_of(a), rank_of(b)) < 2:
        return unsupported("a product of something other than activations")
    return Node("matmul", (a, b))


def _instance_norm(module: nn.InstanceNorm2d, name: str, x: Node) -> Node:
    if module.track_running_stats:
        return unsupported(f"{name}, an InstanceNorm with running statistics")
    weight, bias = _weights_of(module, name, "weight", "bias")
    return Node("instance_norm", (x,), {"weight": weight, "bias": bias, "eps": module.eps})


@dataclass(frozen=True)
class Sizes:
    """Sizes of an activation as a forward may ask for them, and numbers computed from them.

    ``items`` are :class:`Guard` expressions, in which ("size", (1, d)) is size d of ``node``: where
    they are used, ``node`` is the second input. ``is_tuple`` tells a tuple of one from a number.
    """

    node: Node
    items: tuple[Guard, ...]
    is_tuple: bool = True

    def __getitem__(self, index: Any) -> Sizes:
        chosen = self.items[index]
        return Sizes(self.node, chosen) if isinstance(index, slice) else self._number(chosen)

    def _number(self, item: Guard) -> Sizes:
        return Sizes(self.node, (item,), is_tuple=False)

    @staticmethod
    def computed(sign: str, a: Any, b: Any) -> Sizes | None:
        """``a sign b`` of numbers, of which one is a size; None where that is no one number."""
        sizes = [item for item in (a, b) if isinstance(item, Sizes)]
        if any(item.is_tuple or item.node is not sizes[0].node for item in sizes):
            return None
        a, b = (item.items[0] if isinstance(item, Sizes) else item for item in (a, b))
        if not all(isinstance(item, (int, Guard)) for item in (a, b)):
            return None
        return sizes[0]._number(Guard(sign, (a, b)))


#: Operations that do not only change activations of four dimensions, by what they do to others.
_RANKS: dict[str, Callable[[int, Node], int]] = {
    "stack": lambda rank, node: rank + 1,
    "view": lambda rank, node: len(node["shape"]),
    "expand": lambda rank, node: len(node["shape"]),
    "flatten": lambda rank, node: rank - node["end_dim"] % rank + node["start_dim"] % rank,
    **dict.fromkeys(
        ("amax", "mean", "sum"),
        lambda rank, node: rank if node["keepdim"] else rank - len(node["dim"]),
    ),
    "unsqueeze": lambda rank, node: rank + 1,
    "squeeze": lambda rank, node: rank - len(node["dim"]),
    "getitem": lambda rank, node: (
        rank
        - sum(isinstance(item, int) for item in node["index"])
        + sum(item is None for item in node["index"])
    ),
}
_known_ranks: WeakKeyDictionary[Node, int] = WeakKeyDictionary()
_MAPS = ("input", "conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "upsample")


def rank_of(x: Node) -> int:
    """How many dimensions an activation has. Inputs have four: a Plan takes no others.

    Raises:
        TypeError: that is not known.
    """
    if x.op in _MAPS:
        return 4
    if x.op == "unsupported":
        raise TypeError("nobody knows its shape")
    if x not in _known_ranks:
        rank = max(rank_of(item) for item in x.inputs)
        if rank < 4 and isinstance(x.attributes.get("other"), Weight):
            raise TypeError("a weight of more dimensions would make more of it")
        _known_ranks[x] = _RANKS[x.op](rank, x) if x.op in _RANKS else rank
    return _known_ranks[x]


def is_map(x: Node) -> bool:
    """Whether an activation is known to have four dimensions."""
    try:
        return rank_of(x) == 4
    except TypeError:
        return False


def _size(x: Node, dim: Any = None) -> Sizes:
    every = Sizes(x, tuple(Guard("size", (1, d)) for d in range(rank_of(x))))
    return every if dim is None else every[dim]


def _size_like(size: Any) -> Node | None:
    """The activation whose height and width this is."""
    parts = size if isinstance(size, (list, tuple)) else (size,)
    if not parts or not all(isinstance(part, Sizes) for part in parts):
        return None
    if len({part.node for part in parts}) > 1:
        return None
    items = tuple(item for part in parts for item in part.items)
    return parts[0].node if items == _size(parts[0].node).items[2:4] else None


def _view(x: Node, *shape: Any) -> Node:
    """view and reshape: whether memory is shared is the normaliser's business."""
    if len(shape) == 1 and isinstance(shape[0], (list, tuple, Sizes)):
        whole = shape[0]
        shape = tuple(map(whole._number, whole.items)) if isinstance(whole, Sizes) else tuple(whole)
    if not all(isinstance(item, int) or _is_number(item) for item in shape):
        return unsupported("a view of a computed shape")
    nodes = list(dict.fromkeys(item.node for item in shape if isinstance(item, Sizes)))
    sizes = tuple(
        _of_input(item.items[0], 1 + nodes.index(item.node)) if isinstance(item, Sizes) else item
        for item in shape
    )
    return Node("view", (x, *nodes), {"shape": sizes})


def _is_number(item: Any) -> bool:
    return isinstance(item, Sizes) and not item.is_tuple


def _of_input(item: Any, position: int) -> Any:
    """The same number, where the activation that it is a size of is this input."""
    if not isinstance(item, Guard):
        return item
    a, b = item.operands
    if item.sign == "size":
        return Guard("size", (position, b))
    return Guard(item.sign, (_of_input(a, position), _of_input(b, position)))


def _getitem(items: Any, index: Any) -> Any:
    """An element of a list, or a part of an activation."""
    return _part(items, index) if isinstance(items, Node) else items[index]


def _part(x: Node, index: Any) -> Node:
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        ends = (part.start, part.stop, part.step) if isinstance(part, slice) else (part,)
        if not all(end is None or end is Ellipsis or type(end) is int for end in ends):
            return unsupported("an activation indexed by computed values")
    rank = rank_of(x)
    if Ellipsis in parts:
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        at = parts.index(Ellipsis)
        parts = (*parts[:at], *(slice(None),) * (rank - taken), *parts[at + 1 :])
    return Node("getitem", (x,), {"index": parts})


def _expand(x: Node, *shape: Any) -> Node:
    view = _view(x, *shape)
    return view if view.op == "unsupported" else Node("expand", view.inputs, view.attributes)


def _expand_as(x: Node, other: Node) -> Node:
    return Node("expand_as", (x, other))


def _slice(x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Node:
    return _part(x, (*(slice(None),) * (dim % rank_of(x)), slice(start, end, step)))


def _select(x: Node, dim: int, index: int) -> Node:
    return _part(x, (*(slice(None),) * (dim % rank_of(x)), index))


def _softmax(x: Node, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Node:
    if dim is None or dtype is not None:
        return unsupported("softmax with arguments of other kinds")
    return Node("softmax", (x,), {"dim": dim})


def _squeeze(x: Node, dim: Any = None) -> Node:
    if dim is None:
        return unsupported("squeeze() of whatever is 1")
    return Node("squeeze", (x,), {"dim": (dim,) if isinstance(dim, int) else tuple(dim)})


def _transpose(x: Node, dim0: int, dim1: int) -> Node:
    dims = list(range(rank_of(x)))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return Node("permute", (x,), {"dims": tuple(dims)})


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
FUNCTIONS: dict[Any, Callable[..., Any]] = {
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
    torch.mean: _reduction("mean"),
    _aten.mean.dim: _reduction("mean"),
    torch.sum: _reduction("sum"),
    torch.amax: _reduction("amax"),
    _aten.amax.default: _reduction("amax"),
    torch.max: _max,
    _aten.max.dim: _max,
    _aten.sum.dim_IntList: _reduction("sum"),
    torch.transpose: _transpose,
    _aten.transpose.int: _transpose,
    torch.reshape: _view,
    _aten.view.default: _view,
    _aten.expand.default: lambda x, size, *_, **__: _expand(x, *size),
    _aten.expand_as.default: _expand_as,
    F.hardtanh: _hardtanh,
    _aten.hardtanh.default: _hardtanh,
    _aten.reshape.default: _view,
    F.channel_shuffle: _plain("channel_shuffle", "groups"),
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    torch.unsqueeze: _plain("unsqueeze", "dim"),
    _aten.unsqueeze.default: _plain("unsqueeze", "dim"),
    torch.squeeze: _squeeze,
    _aten.squeeze.dims: _squeeze,
    torch.split: split,
    _aten.split.Tensor: split,
    _aten.split_with_sizes.default: split,
    torch.chunk: _chunk,
    _aten.chunk.default: _chunk,
    F.pad: _pad,
    _aten.pad.default: _pad,
    F.pixel_shuffle: _plain("pixel_shuffle", "upscale_factor"),
    _aten.pixel_shuffle.default: _plain("pixel_shuffle", "upscale_factor"),
    F.softmax: _softmax,
    torch.softmax: lambda x, dim, dtype=None: _softmax(x, dim, dtype=dtype),
    _aten.softmax.int: lambda x, dim, dtype=None: _softmax(x, dim, dtype=dtype),
    _aten.contiguous.default: lambda x, memory_format=None: x,
    _aten.channel_shuffle.default: _plain("channel_shuffle", "groups"),
    F.prelu: _plain("prelu", "weight"),
    torch.prelu: _plain("prelu", "weight"),
    F.linear: _linear,
    _aten.linear.default: _linear,
    torch.matmul: _matmul,
    operator.matmul: _matmul,
    _aten.matmul.default: _matmul,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    _aten.layer_norm.default: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    _aten.group_norm.default: _group_norm,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    _aten.dropout.default: _dropout,
    torch.clone: lambda x: x,
    _aten.clone.default: lambda x: x,
    getattr: lambda x, name: _size(x) if name == "shape" else unsupported(f"the attribute {name}"),
    operator.getitem: _getitem,
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
INPLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: _add,
    operator.isub: _binary("sub"),
    operator.imul: _binary("mul"),
    operator.itruediv: _binary("div"),
    F.relu_: _relu,
    F.hardtanh_: _hardtanh,
    torch._C._nn.hardtanh_: _hardtanh,
    _aten.hardtanh_.default: _hardtanh,
    _aten.relu6_.default: _elementwise["relu6"],
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
METHODS: dict[Any, Callable[..., Any]] = {
    **{op: _elementwise[op] for op in ("relu", "sigmoid", "tanh", "clamp")},
    "add": _add,
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "div": _binary("div"),
    "permute": _permute,
    "transpose": _transpose,
    "view": _view,
    "reshape": _view,
    "expand": _expand,
    "expand_as": _expand_as,
    "unsqueeze": _plain("unsqueeze", "dim"),
    "squeeze": _squeeze,
    "split": split,
    "flatten": _plain("flatten", start_dim=0, end_dim=-1),
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "amax": _reduction("amax"),
    "max": _max,
    "chunk": _chunk,
    "softmax": lambda x, dim, dtype=None: _softmax(x, dim, dtype=dtype),
    "matmul": _matmul,
    "size": _size,
    "clone": lambda x: x,
    "contiguous": lambda x, memory_format=None: x,
    "detach": lambda x: x,
}
INPLACE_METHODS: dict[Any, Callable[..., Any]] = {
    f"{op}_": METHODS[op] for op in ("relu", "sigmoid", "tanh", "clamp", "add", "sub", "mul", "div")
}
#: Calls that return their argument's memory, whole.
SAME_MEMORY = frozenset({"detach", F.dropout, F.dropout2d, _aten.dropout.default})
#: Operations whose result may share memory with their argument.
VIEWS = frozenset(
    {
        *("permute", "view", "expand", "expand_as", "flatten", "chunk", "split", "getitem"),
        *("unsqueeze", "squeeze"),
        "unsupported",  # nobody knows
    }
)
#: Calls that return their argument, or a copy.
MAYBE_VIEWS = frozenset({"contiguous", _aten.contiguous.default})


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
    nn.LayerNorm: lambda m, name, x: _layer_norm(
        x, m.normalized_shape, *_weights_of(m, name, "weight", "bias"), m.eps
    ),
    nn.MaxPool2d: lambda m, _, x: _max_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda m, _, x: _avg_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda m, _, x: _adaptive("adaptive_avg_pool2d")(x, m.output_size),
    nn.AdaptiveMaxPool2d: lambda m, _, x: (
        unsupported("pooling that returns indices")
        if m.return_indices
        else _adaptive("adaptive_max_pool2d")(x, m.output_size)
    ),
    nn.Upsample: _upsample_module,
    nn.Identity: lambda m, _, x: x,
    nn.Dropout: lambda m, _, x: x,
    nn.Dropout2d: lambda m, _, x: x,
    nn.ReLU: lambda m, _, x: _relu(x),
    nn.ReLU6: lambda m, _, x: Node("relu6", (x,)),
    nn.Hardtanh: lambda m, _, x: _hardtanh(x, m.min_val, m.max_val),
    nn.LeakyReLU: lambda m, _, x: Node("leaky_relu", (x,), {"negative_slope": m.negative_slope}),
    nn.PReLU: lambda m, name, x: Node("prelu", (x,), {"weight": Weight(f"{name}.weight")}),
    nn.ELU: lambda m, _, x: Node("elu", (x,), {"alpha": m.alpha}),
    nn.SiLU: lambda m, _, x: Node("silu", (x,)),
    nn.GELU: lambda m, _, x: Node("gelu", (x,), {"approximate": m.approximate}),
    nn.Hardswish: lambda m, _, x: Node("hardswish", (x,)),
    nn.Hardsigmoid: lambda m, _, x: Node("hardsigmoid", (x,)),
    nn.Softmax: lambda m, _, x: _softmax(x, m.dim),
    nn.Sigmoid: lambda m, _, x: Node("sigmoid", (x,)),
    nn.Tanh: lambda m, _, x: Node("tanh", (x,)),
    nn.ChannelShuffle: lambda m, _, x: Node("channel_shuffle", (x,), {"groups": m.groups}),
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


def module_node(module: nn.Module, name: str, x: Node) -> Any:
    """The normal form of a call of one of PyTorch's own modules.

    A subclass counts as its base only if it left the forward alone, so that a
    weight-standardised convolution is not mistaken for a plain one.
    """
    for kind in type(module).__mro__:
        convert = _MODULES.get(kind)
        if convert is not None and type(module).forward is getattr(kind, "forward", None):
            return convert(module, name, x)
    return unsupported(f"{name}, a {type(module).__name__}")
