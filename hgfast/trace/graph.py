"""The normal form: a graph of a few operations, whatever recorded it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

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


def unsupported(what: str) -> Node:
    """What has no normal form, in words that follow "it uses"."""
    return Node("unsupported", (), {"what": what})
