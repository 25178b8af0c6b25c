"""Exact algebra on a graph, before it is read.

Upsampling computes each pixel as a weighted mean of others (the weights add up to 1), so whatever
maps every pixel alike by an affine map can be done before it, on fewer pixels: a BatchNorm, and a
1x1 convolution. CPN's ``upsample - 1x1 - BatchNorm`` then costs a quarter.

A sum that spreads one operand over the other (attention over channels or pixels), or of values that
are no maps, gets another name, ``broadcast_add``, so that no pattern takes it for a shortcut.
"""

from __future__ import annotations

from hgfast.trace import Graph, Node, is_map


def rewrite(graph: Graph, shapes: dict[str, tuple[int, ...]]) -> Graph:
    """The same function with upsampling behind the affine maps that followed it, and sums that
    spread one operand over the other by a name of their own.

    Args:
        graph: it is left as it was.
        shapes: the shape of every weight, by qualified name.
    """
    users = graph.users()
    replaced: dict[Node, Node] = {}  # by the node that now computes the value
    nodes: list[Node] = []
    ones: dict[Node, frozenset[int]] = {}
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
            ones[mapped] = _ones(mapped, ones, shapes)
        if node.op == "add" and not _adds_maps(node, ones):
            node = Node("broadcast_add", inputs, {}, node.module)
        ones[node] = _ones(node, ones, shapes)
        nodes.append(node)
        if node is not old:
            replaced[old] = node
    if not replaced:
        return graph
    return Graph(
        graph.inputs, nodes, _with(graph.outputs, replaced), graph.input_shapes, graph.guards
    )


def _adds_maps(node: Node, ones: dict[Node, frozenset[int]]) -> bool:
    one, other = node.inputs
    differ = ones[one] ^ ones[other]
    if "input" in (one.op, other.op):  # how many channels the image has, nobody has said
        differ -= {1}
    return not differ and is_map(one) and is_map(other)


def _ones(
    node: Node, known: dict[Node, frozenset[int]], shapes: dict[str, tuple[int, ...]]
) -> frozenset[int]:
    """Along which dimensions a value has one element, whatever the size of the image."""
    if not node.inputs:
        return frozenset()
    first, attributes = known[node.inputs[0]], node.attributes
    if node.op in ("conv2d", "conv_transpose2d"):
        shape = shapes.get(attributes["weight"], ())
        out = 0 if node.op == "conv2d" else 1
        is_one = bool(shape) and shape[out] * (attributes["groups"] if out else 1) == 1
        return (first - {1}) | ({1} if is_one else set())
    if node.op in ("adaptive_avg_pool2d", "adaptive_max_pool2d") and len(node.inputs) == 1:
        size = attributes["output_size"]
        return (first - {2, 3}) | {2 + i for i, n in enumerate(size) if n == 1}
    if node.op in ("amax", "mean", "sum"):
        dims = attributes["dim"]
        known_dims = bool(dims) and min(dims) >= 0
        return first | set(dims) if attributes["keepdim"] and known_dims else frozenset()
    if node.op == "expand_as":
        return known[node.inputs[1]]
    if node.op == "expand":  # to which of its sizes, nobody needs to know
        return frozenset(i for i in first if attributes["shape"][i] in (1, -1))
    if node.op == "view":
        return frozenset(i for i, n in enumerate(attributes["shape"]) if n == 1)
    if node.op == "unsqueeze" and attributes["dim"] >= 0:
        return frozenset({attributes["dim"], *(d + (d >= attributes["dim"]) for d in first)})
    if node.op == "getitem":
        return _ones_of_part(first, attributes["index"])
    if node.op == "concat":
        together = frozenset.intersection(*(known[item] for item in node.inputs))
        return together - {attributes["dim"]} if attributes["dim"] >= 0 else frozenset()
    if node.op in ("upsample", "pad"):
        return first - {2, 3}
    if node.op in ("stack", "permute", "flatten", "squeeze", "matmul", "linear"):
        return frozenset()
    return frozenset.intersection(*(known[item] for item in node.inputs))


def _ones_of_part(ones: frozenset[int], index: tuple[object, ...]) -> frozenset[int]:
    result: list[bool] = []
    dim = 0
    for item in index:
        if item is None:
            result.append(True)
            continue
        if isinstance(item, slice):
            result.append(dim in ones)
        dim += 1
    behind = {len(result) + d - dim for d in ones if d >= dim}
    return frozenset(i for i, is_one in enumerate(result) if is_one) | behind


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
