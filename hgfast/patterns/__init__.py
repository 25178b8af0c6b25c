"""Patterns: what a bottleneck, a join, a convolution look like in a graph, one file each.

A pattern looks at one node and says which step could compute its value, or None. It sees
structure only: never a class, an attribute or a name, and no kernel or device. ``read_plan``
covers a graph with steps, from the outputs back to the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

from hgfast.patterns import (
    add,
    blocks,
    bottleneck,
    concat,
    conv,
    plain,
    pool,
    remerge,
    upsample_add,
)
from hgfast.patterns.match import Draft, Reader
from hgfast.patterns.rewrite import rewrite
from hgfast.plan import Plan
from hgfast.trace import Graph, Node, TraceError

#: In order of preference: whoever covers most of the graph comes first.
PATTERNS: tuple[Callable[[Reader, Node], Draft | None], ...] = (
    upsample_add.match,
    bottleneck.match,
    remerge.match,
    concat.match,
    conv.match,
    pool.match,
    add.match,
    plain.match,
)


def read_plan(graph: Graph, shapes: dict[str, tuple[int, ...]]) -> Plan:
    """Read a graph as a Plan.

    Args:
        graph: what a module computes.
        shapes: the shape of every weight, by qualified name.

    Raises:
        TraceError: a value is computed in a way that no pattern knows; the message says which.
    """
    graph = rewrite(graph, shapes)
    reader = Reader(graph, shapes)
    drafts: list[tuple[Node, Draft]] = []
    needed = set(reader.outputs)
    for node in reversed(graph.nodes):
        if node in needed and node.op != "input":
            draft = next(filter(None, (match(reader, node) for match in PATTERNS)), None)
            if draft is None:
                raise TraceError(f"it uses {reader.describe(node)}, which no step covers")
            needed.update(draft.inputs)
            drafts.append((node, draft))
    drafts.reverse()

    numbers = {node: number for number, node in enumerate(graph.inputs)}
    for node, _ in drafts:
        numbers[node] = len(numbers)
    steps = tuple(
        draft.step(inputs=tuple(numbers[source] for source in draft.inputs), output=numbers[node])
        for node, draft in drafts
    )
    return Plan(
        inputs=tuple(numbers[node] for node in graph.inputs),
        steps=steps,
        outputs=reader.outputs_as(numbers),
        input_shapes=graph.input_shapes,
        blocks=blocks.name_blocks(steps),
        guards=graph.guards,
    )
