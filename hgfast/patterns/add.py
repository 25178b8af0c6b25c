"""A sum of two values that no other pattern could make part of something larger."""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import Add
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    return Draft(node.inputs, partial(Add, name=node.module)) if node.op == "add" else None
