"""What the patterns share: a view of the graph, and the small structures they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hgfast.plan import Convolution, Norm, Step
from hgfast.trace import Graph, Node, output_nodes


@dataclass(frozen=True)
class Draft:
    """A step whose values have no numbers yet: the nodes it reads, and how to make it."""

    inputs: tuple[Node, ...]
    step: Callable[..., Step]

    def with_input(self, extra: Node) -> Draft:
        return replace(self, inputs=(*self.inputs, extra))


class Reader:
    """A graph as the patterns see it."""

    def __init__(self, graph: Graph, shapes: dict[str, tuple[int, ...]]) -> None:
        self.users = graph.users()
        self.outputs = list(output_nodes(graph.outputs))
        self._container = graph.outputs
        self._shapes = shapes

    def shape_of(self, weight: str) -> tuple[int, ...]:
        """The shape of a weight, by qualified name."""
        return self._shapes.get(weight, ())

    def only_use(self, node: Node) -> bool:
        """Whether a step may swallow this value: nobody else looks at it."""
        return self.users[node] == 1

    def convolution(self, node: Node) -> Convolution | None:
        """A convolution, transposed or not, or None."""
        transposed = node.op == "conv_transpose2d"
        if not transposed and node.op != "conv2d":
            return None
        if node["weight"] not in self._shapes or min(node["padding"]) < 0:
            return None  # a weight that is no parameter or buffer: nothing could follow it
        out, into, *kernel = self._shapes[node["weight"]]
        if transposed:
            out, into = into * node["groups"], out
        else:
            into *= node["groups"]
        height, width = kernel
        return Convolution(
            node["weight"],
            node["bias"],
            (into, out),
            (height, width),
            node["stride"],
            node["padding"],
            node["dilation"],
            node["groups"],
            transposed,
            node["output_padding"] if transposed else (0, 0),
        )

    def pointwise(self, node: Node) -> Convolution | None:
        """A 1x1 convolution with stride 1, or None."""
        conv = self.convolution(node)
        return conv if conv and conv.is_pointwise else None

    def normed(self, node: Node) -> tuple[Convolution, Norm | None] | None:
        """A convolution and the norm behind it, if there is one. Nobody else sees what is between.

        Its input is ``self.source(node)``.
        """
        norm = self.norm(node)
        if norm is not None:
            node = node.inputs[0]
            if not self.only_use(node):
                return None
        conv = self.convolution(node)
        return (conv, norm) if conv else None

    def source(self, node: Node) -> Node:
        """What a convolution reads, or one with a norm behind it."""
        conv = node.inputs[0] if node.op == "batch_norm" else node
        return conv.inputs[0]

    def norm(self, node: Node) -> Norm | None:
        if node.op != "batch_norm":
            return None
        return Norm(node["weight"], node["bias"], node["mean"], node["var"], node["eps"])

    def norm_relu(self, node: Node) -> tuple[Norm, Node] | None:
        """BatchNorm and ReLU, which a step may compute again: they cost no memory traffic."""
        if node.op != "relu":
            return None
        norm = self.norm(node.inputs[0])
        return (norm, node.inputs[0].inputs[0]) if norm else None

    def describe(self, node: Node) -> str:
        """A node in words, for the report."""
        attributes = {k: v for k, v in node.attributes.items() if not isinstance(v, Node)}
        where = attributes.pop("weight", None)
        text = ", ".join(f"{key}={value}" for key, value in attributes.items() if value is not None)
        name = f"{node.op}({text})"
        return f"{where.rpartition('.')[0]}: {name}" if where else name

    def outputs_as(self, numbers: dict[Node, int]) -> Any:
        """The output container with value numbers as leaves."""

        def number(item: Any) -> Any:
            if isinstance(item, Node):
                return numbers[item]
            if isinstance(item, dict):
                return {key: number(value) for key, value in item.items()}
            items = [number(value) for value in item]
            return tuple(items) if isinstance(item, tuple) else items

        return number(self._container)


def common_name(*parts: Norm | Convolution | None) -> str:
    """The qualified name of the innermost module that holds all these layers."""
    owners = [name.split(".")[:-1] for part in parts if part for name in part.weights]
    first, *others = owners
    length = next(
        (i for i, word in enumerate(first) if any(other[i : i + 1] != [word] for other in others)),
        len(first),
    )
    return ".".join(first[:length])
