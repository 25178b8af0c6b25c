"""Exact algebra on a graph, before it is read.

Upsampling computes each pixel as a weighted mean of others (the weights add up to 1), so whatever
maps every pixel alike by an affine map can be done before it, on fewer pixels: a BatchNorm, and a
1x1 convolution. CPN's ``upsample - 1x1 - BatchNorm`` then costs a quarter.
"""

from __future__ import annotations

from hgfast.trace import Graph, Node


def rewrite(graph: Graph, shapes: dict[str, tuple[int, ...]]) -> Graph:
    """The same function with upsampling behind the affine maps that followed it.

    Args:
        graph: it is left as it was.
        shapes: the shape of every weight, by qualified name.
    """
    users = graph.users()
    replaced: dict[Node, Node] = {}  # by the node that now computes the value
    nodes: list[Node] = []
    for old in graph.nodes:
        inputs = tuple(replaced.get(node, node) for node in old.inputs)
        node = old if inputs == old.inputs else Node(old.op, inputs, old.attributes, old.module)
        above = inputs[0] if inputs else None
        if (
            above is not None
            and above.op == "upsample"
            and users.get(old.inputs[0], 0) == 1
            and above["mode"] in ("nearest", "bilinear")
            and _is_affine(node, shapes)
        ):
            mapped = Node(node.op, (above.inputs[0],), node.attributes, node.module)
            node = Node("upsample", (mapped, *above.inputs[1:]), above.attributes, above.module)
            nodes.remove(above)
            nodes.append(mapped)
            users[node] = users[old]
        nodes.append(node)
        if node is not old:
            replaced[old] = node
    if not replaced:
        return graph
    return Graph(
        graph.inputs, nodes, _with(graph.outputs, replaced), graph.input_shapes, graph.guards
    )


def _is_affine(node: Node, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether it maps the channels of every pixel alike, by an affine map."""
    if node.op == "batch_norm":
        return True
    return (
        node.op == "conv2d"
        and shapes.get(node["weight"], ())[2:] == (1, 1)
        and node["stride"] == (1, 1)
        and node["padding"] == (0, 0)
    )


def _with(outputs: object, replaced: dict[Node, Node]) -> object:
    if isinstance(outputs, Node):
        return replaced.get(outputs, outputs)
    if isinstance(outputs, dict):
        return {key: _with(item, replaced) for key, item in outputs.items()}
    assert isinstance(outputs, (list, tuple))
    items = [_with(item, replaced) for item in outputs]
    return tuple(items) if isinstance(outputs, tuple) else items
