"""A sum of two values that no other pattern could make part of something larger."""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import Add
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    relu = node.op == "relu" and reader.only_use(node.inputs[0])
    total = node.inputs[0] if relu else node
    if total.op != "add":
        return None
    return Draft(total.inputs, partial(Add, name=node.module, relu=relu))
