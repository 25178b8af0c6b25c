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
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

#: The operations of the normal form, with the attributes of each.
OPERATIONS = {
    "input": (),
    "conv2d": ("weight", "bias", "stride", "padding", "dilation", "groups"),
    "batch_norm": ("weight", "bias", "mean", "var", "eps"),
    "relu": (),
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "upsample": ("mode", "scale_factor", "size", "align_corners"),
    "add": (),
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
    ``input_shapes`` are the only shapes it is valid for, or None if it holds for any.
    """

    inputs: list[Node]
    nodes: list[Node]
    outputs: Any
    input_shapes: tuple[tuple[int, ...], ...] | None = None

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
    if isinstance(scale_factor, (int, float)):
        scale_factor = (scale_factor, scale_factor)
    if size is not None and not all(isinstance(n, int) for n in _pair(size)):
        size = "computed"  # from another activation's shape, say
    return Node(
        "upsample",
        (x,),
        {
            "mode": mode,
            "scale_factor": tuple(scale_factor) if scale_factor else None,
            "size": size,
            "align_corners": align_corners,
        },
    )


def _aten_upsample_nearest2d(x: Node, size: Any, scale_factor: Any) -> Node:
    return _interpolate(x, size=size, scale_factor=scale_factor)


def _add(a: Any, b: Any, alpha: float = 1) -> Node:
    if not isinstance(a, Node) or not isinstance(b, Node) or alpha != 1:
        return _unsupported("an addition of something other than two activations")
    return Node("add", (a, b))


_aten = torch.ops.aten

_FUNCTIONS: dict[Any, Callable[..., Node]] = {
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    _aten.conv2d.default: _conv2d,
    F.batch_norm: _functional_batch_norm,
    _aten.batch_norm.default: _aten_batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    _aten.relu.default: _relu,
    F.max_pool2d: _max_pool2d,
    _aten.max_pool2d.default: _max_pool2d,
    F.interpolate: _interpolate,
    _aten.upsample_nearest2d.vec: _aten_upsample_nearest2d,
    operator.add: _add,
    torch.add: _add,
    _aten.add.Tensor: _add,
}
_INPLACE: dict[Any, Callable[..., Node]] = {
    operator.iadd: _add,
    F.relu_: _relu,
    torch.relu_: _relu,
    _aten.relu_.default: _relu,
    _aten.add_.Tensor: _add,
}
_METHODS: dict[Any, Callable[..., Node]] = {"relu": _relu, "add": _add}
_INPLACE_METHODS: dict[Any, Callable[..., Node]] = {"relu_": _relu, "add_": _add}


def _module_node(module: nn.Module, name: str, x: Node) -> Node | None:
    """The normal form of a call of one of PyTorch's own modules; None passes x through.

    A subclass counts as its base only if it left the forward alone, so that a
    weight-standardised convolution is not mistaken for a plain one.
    """

    def is_plain(kind: type[nn.Module]) -> bool:
        return isinstance(module, kind) and type(module).forward is kind.forward

    def weight(attribute: str) -> Weight | None:
        return Weight(f"{name}.{attribute}") if getattr(module, attribute) is not None else None

    if isinstance(module, nn.Conv2d) and is_plain(nn.Conv2d):
        if type(module)._conv_forward is not nn.Conv2d._conv_forward:
            return _unsupported(f"{name}, a convolution of its own kind")
        if module.padding_mode != "zeros" and module.padding != (0, 0):
            return _unsupported(f'{name}, a convolution with padding_mode="{module.padding_mode}"')
        return _conv2d(
            x,
            weight("weight"),
            weight("bias"),
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and (
        is_plain(_BatchNorm) or is_plain(nn.SyncBatchNorm)
    ):
        scale, shift, mean, var = map(weight, ("weight", "bias", "running_mean", "running_var"))
        return _batch_norm(x, scale, shift, mean, var, module.eps)
    if is_plain(nn.ReLU):
        return _relu(x)
    if isinstance(module, nn.MaxPool2d) and is_plain(nn.MaxPool2d):
        return _max_pool2d(
            x,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.ceil_mode,
            module.return_indices,
        )
    if isinstance(module, nn.Upsample) and is_plain(nn.Upsample):
        return _interpolate(x, module.size, module.scale_factor, module.mode, module.align_corners)
    if is_plain(nn.Identity) or is_plain(nn.Dropout) or is_plain(nn.Dropout2d):
        return None
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
        elif target in pure and "out" not in source.kwargs:
            self.values[source] = _Cell(self._append(self._convert(source, pure[target]), source))
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
            node: Node | None = _unsupported(
                f"{source.target}, called with more than one activation"
            )
        else:
            node = _module_node(module, str(source.target), arguments[0])
        if node is None:
            self.values[source] = self.values[source.all_input_nodes[0]]
        elif getattr(module, "inplace", False):
            self._replace(source, node)
        else:
            self.values[source] = _Cell(self._append(node, source))

    def _replace(self, source: fx.Node, node: Node) -> None:
        cell = self.values[source.all_input_nodes[0]]
        if not isinstance(cell, _Cell):
            raise TraceError(
                f"{_describe(source)} changes something other than an activation in place"
            )
        cell.replace(self._append(node, source))
        self.values[source] = cell

    def _convert(self, source: fx.Node, convert: Callable[..., Node]) -> Node:
        try:
            node = convert(*self._read(list(source.args)), **self._read(dict(source.kwargs)))
            of_activations = all(isinstance(item, Node) for item in node.inputs)
            return node if of_activations else _unsupported(f"{_describe(source)} of a weight")
        except (TypeError, AttributeError):  # arguments that the normal form has no place for
            return _unsupported(_describe(source))

    def _append(self, node: Node, source: fx.Node) -> Node:
        stack = source.meta.get("nn_module_stack") or {"": ("", None)}
        node.module = list(stack.values())[-1][0]
        self.nodes.append(node)
        return node

    def _read(self, argument: Any) -> Any:
        """An argument with every recorded value replaced by what it stands for now."""
        if isinstance(argument, fx.Node):
            value = self.values[argument]
            return value.value if isinstance(value, _Cell) else value
        if isinstance(argument, (list, tuple)):
            items = [self._read(item) for item in argument]
            return tuple(items) if isinstance(argument, tuple) else items
        if isinstance(argument, dict):
            return {key: self._read(item) for key, item in argument.items()}
        return argument


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
        self._thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

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
    no_autocast = torch.autocast("cpu", enabled=False)
    with _tracing, no_autocast, _evaluation_mode(module), _attributes_kept(module):
        try:
            recorded = _Tracer().trace(module)
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            raise TraceError(
                f"fx cannot follow its forward ({type(error).__name__}: {message[0]})"
            ) from error
    normaliser = _Normaliser(dict(module.named_modules(remove_duplicate=False)))
    for source in recorded.nodes:
        if source.op == "placeholder":
            if str(source.target).startswith("*") or source.args:
                raise TraceError("its forward takes optional or variable arguments")
            normaliser.add_input(source)
        elif source.op == "get_attr":
            normaliser.add_weight(source, str(source.target))
        elif source.op == "output":
            return _checked(normaliser.finish(source.args[0]))
        else:
            normaliser.add_call(source)
    raise TraceError("its graph has no output")


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
    normaliser = _Normaliser({})
    for source in program.graph.nodes:
        if source.op == "placeholder":
            if source.name in names:
                normaliser.add_weight(source, names[source.name])
            else:
                normaliser.add_input(source)
        elif source.op == "output":
            flat = list(source.args[0])[len(signature.buffers_to_mutate) :]
            graph = normaliser.finish(
                torch.utils._pytree.tree_unflatten(flat, program.call_spec.out_spec)
            )
            graph.input_shapes = tuple(tuple(tensor.shape) for tensor in example)
            return _checked(graph)
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
