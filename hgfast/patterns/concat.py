"""Channels one behind the other, and perhaps a shortcut on top of them: the block of FAN.

Its three convolutions are steps of their own (each reads what the last one wrote, and all three are
needed again here); see Bulat and Tzimiropoulos, arXiv:1703.07332.
"""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import Concat
from hgfast.trace import Node, is_map


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op == "add":
        for joined, other in (node.inputs, node.inputs[::-1]):
            if _is_concat(joined) and reader.only_use(joined):
                step = partial(Concat, name=node.module, add=True)
                return Draft((*joined.inputs, other), step)
        return None
    if not _is_concat(node):
        return None
    return Draft(node.inputs, partial(Concat, name=node.module))


def _is_concat(node: Node) -> bool:
    return node.op == "concat" and node["dim"] in (1, -3) and is_map(node)
