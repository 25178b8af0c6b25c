"""From a recorded graph to the normal form: in-place operations and aliases become values."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from hgfast.trace.graph import Graph, Node, TraceError, Weight, output_nodes, unsupported
from hgfast.trace.operations import (
    FUNCTIONS,
    INPLACE,
    INPLACE_METHODS,
    MAYBE_VIEWS,
    METHODS,
    SAME_MEMORY,
    VIEWS,
    Sizes,
    module_node,
    split,
)

#: Augmented assignments. fx would record `x *= y` as a new product and hide that x has changed.
AUGMENTED = [
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
]


ARITHMETIC = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.mod: "%",
    operator.floordiv: "//",
}


@dataclass(eq=False)
class _Cell:
    """A name's tensor. Names of the same tensor share the cell, and its value may be replaced.

    ``family`` are the cells whose tensors may lie in the same memory, as views of one another.
    When one is changed in place, what the others hold now is unknown.
    """

    value: Node
    is_input: bool = False
    is_stale: bool = False
    part_of: object = None  # what chunk() or split() cut, the same for all its parts
    family: list[_Cell] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.family = [self]

    def join(self, other: _Cell) -> None:
        """The two may be views of the same memory."""
        if self.family is not other.family:
            self.family.extend(other.family)
            for cell in other.family:
                cell.family = self.family

    def read(self) -> Node:
        if self.is_stale:
            raise TraceError("it changes in place what may be a view of another activation")
        return self.value

    def replace(self, value: Node) -> None:
        if self.value.op == "unsupported":  # its memory may be anybody's, a buffer's too
            raise TraceError(f"it uses {self.value['what']}, and changes the result in place")
        if any(cell.is_input for cell in self.family):
            raise TraceError("it changes its input in place")
        for cell in self.family:
            cell.is_stale = cell is not self
        self.value = value


class Normaliser:
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
        pure = METHODS if is_method else FUNCTIONS
        inplace = INPLACE_METHODS if is_method else INPLACE
        if target in inplace:
            self._replace(source, self._convert(source, inplace[target]))
        elif target in pure and _is_inplace(source):
            self._replace(source, self._convert(source, pure[target]))
        elif target is operator.getitem and isinstance(self._held(source), (list, Sizes)):
            self.values[source] = self._item(source, self._held(source), source.args[1])
        elif target in ARITHMETIC and self._is_of_sizes(source):
            a, b = self.read(list(source.args))
            sizes = Sizes.computed(ARITHMETIC[target], a, b)
            self._define(source, sizes or unsupported(f"{_describe(source)} of sizes"))
        elif target in pure and "out" not in source.kwargs:
            self._define(source, self._convert(source, pure[target]))
        elif may_write(source):
            # Even if nobody looks at its result: what it wrote may be looked at.
            raise TraceError(f"it uses {_describe(source)}, which writes in place")
        else:
            self._define(source, unsupported(_describe(source)))

    def finish(self, outputs: Any) -> Graph:
        self._check_memory_of(outputs)
        outputs = self.read(outputs)
        live: set[Node] = set()
        pending = [*self.inputs, *output_nodes(outputs)]
        while pending:
            node = pending.pop()
            if node not in live:
                live.add(node)
                pending.extend(node.inputs)
        return Graph(self.inputs, [node for node in self.nodes if node in live], outputs)

    def _check_memory_of(self, outputs: Any) -> None:
        """Refuse outputs that share memory with one another or with an input: a Plan's do not, and
        whoever writes into one would see the difference. Parts of one split do not overlap."""
        cells: dict[_Cell, Any] = {}
        for leaf in tree_leaves(outputs):
            held = self.values.get(leaf) if isinstance(leaf, fx.Node) else None
            for cell in held if isinstance(held, list) else [held]:
                if isinstance(cell, _Cell) and cell.value.op != "unsupported":
                    cells[cell] = cell.part_of or cell
        for cell in cells:
            of_input = cell.value.op == "input" or any(other.is_input for other in cell.family)
            if of_input and not cell.is_input:
                raise TraceError("it returns a copy, or what may be a view, of its input")
        for one, other in itertools.combinations(cells, 2):
            if one.value is other.value:
                raise TraceError("it returns copies of one activation")
            if one.family is other.family and cells[one] is not cells[other]:
                raise TraceError("it returns what may be views of one another")

    def _call_module(self, source: fx.Node, module: nn.Module) -> None:
        arguments = [self.read(argument) for argument in (*source.args, *source.kwargs.values())]
        if len(arguments) != 1 or not isinstance(arguments[0], Node):
            node: Any = unsupported(f"{source.target}, called with more than one activation")
        else:
            node = module_node(module, str(source.target), arguments[0])
        if node is not None and len(arguments) == 1 and node is arguments[0]:
            self.values[source] = self.values[source.all_input_nodes[0]]
        elif getattr(module, "inplace", False):
            self._replace(source, node)
        else:
            self._define(source, node)

    def _define(self, source: fx.Node, result: Any) -> None:
        """Note what a call returned: one activation, a list of them, or their sizes."""
        if isinstance(result, Sizes):
            self.values[source] = result
            return
        arguments = [self.values[node] for node in source.all_input_nodes]
        if source.target in SAME_MEMORY and result.op != "unsupported":
            self.values[source] = arguments[0]
            return
        whole = source if isinstance(result, list) else None
        cells = [
            _Cell(self._append(node, source), part_of=whole)
            for node in (result if isinstance(result, list) else [result])
        ]
        for cell in cells:
            if cell.value.op in VIEWS or source.target in MAYBE_VIEWS:
                for argument in arguments:
                    for other in argument if isinstance(argument, list) else [argument]:
                        if isinstance(other, _Cell):
                            cell.join(other)
        self.values[source] = cells if isinstance(result, list) else cells[0]

    def _item(self, source: fx.Node, held: Any, index: Any) -> Any:
        last = held[index]
        if not isinstance(last, _Cell) or index >= 0 or last.value.op != "chunk":
            return last
        # chunk() may return fewer parts than it was asked for: which is the last, the size tells.
        first = held[0].read()
        node = Node("chunk", first.inputs, {**first.attributes, "index": index})
        cell = _Cell(self._append(node, source), part_of=held[0].part_of)
        cell.join(held[0])
        return cell

    def _is_of_sizes(self, source: fx.Node) -> bool:
        arguments = (self.values[node] for node in source.all_input_nodes)
        return any(isinstance(argument, Sizes) for argument in arguments)

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
            given = self.read(dict(source.kwargs))
            if convert is split:
                given["parts"] = _parts_taken(source)
            args = self.read(list(source.args))
            place = _place_of_inplace(source.target) if callable(source.target) else None
            if place is not None:  # what it means was seen to before
                args = args[:place] + args[place + 1 :]
            result = convert(*args, **given)
        # Arguments that the normal form has no place for.
        except (TypeError, AttributeError, IndexError, KeyError):
            return unsupported(_describe(source))
        for node in result if isinstance(result, list) else [result]:
            if isinstance(node, Node) and not all(isinstance(item, Node) for item in node.inputs):
                return unsupported(f"{_describe(source)} of a weight")
            if isinstance(node, Node) and _holds_sizes(list(node.attributes.values())):
                return unsupported(f"{_describe(source)} of computed sizes")
            if not isinstance(node, (Node, Sizes)):  # a weight, handed on
                return unsupported(f"{_describe(source)} of a weight")
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

    def read(self, argument: Any) -> Any:
        """An argument with every recorded value replaced by what it stands for now."""
        if isinstance(argument, fx.Node):
            value = self.values[argument]
            if isinstance(value, list):
                return [cell.read() for cell in value]
            return value.read() if isinstance(value, _Cell) else value
        if isinstance(argument, (list, tuple)):
            items = [self.read(item) for item in argument]
            return tuple(items) if isinstance(argument, tuple) else items
        if isinstance(argument, dict):
            return {key: self.read(item) for key, item in argument.items()}
        return argument


def _holds_sizes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_sizes, value))
    return isinstance(value, Sizes)


def _parts_taken(source: fx.Node) -> int:
    """How many parts of a split there must be for what is made of them; 0 where that is unclear."""
    last = -1
    for user in source.users:
        index = user.args[1] if user.target is operator.getitem else None
        if not isinstance(index, int) or index < 0:
            return 0
        last = max(last, index)
    return last + 1


def _module_name(path: str) -> str:
    """A module's qualified name; dynamo writes ``L['self'].layer1[0]`` for ``layer1.0``."""
    if not path.startswith("L["):
        return path
    words = re.findall(r"[A-Za-z0-9_]+", path.replace("_modules", " "))
    return ".".join(words[2:])


def _is_inplace(source: fx.Node) -> bool:
    """Whether a function of PyTorch is asked to write into its argument, by keyword or position."""
    place = _place_of_inplace(source.target) if callable(source.target) else None
    given = source.args[place] if place is not None and len(source.args) > place else False
    return bool(source.kwargs.get("inplace")) or given is True


@functools.cache
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin, whose arguments nobody tells
        return None
    return names.index("inplace") if "inplace" in names else None


def may_write(source: fx.Node) -> bool:
    """Whether a call without normal form may change memory that others look at."""
    target: Any = source.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    overload_writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return (
        overload_writes
        or _is_inplace(source)
        or "out" in source.kwargs
        or (name.endswith("_") and not name.endswith("__"))
        or name in ("setitem", "__setitem__")
        or name in AUGMENTED
    )


def _describe(source: fx.Node) -> str:
    target = source.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return f"{name}()"
