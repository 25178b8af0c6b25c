"""Pooling, by maximum or mean: the descent of an hourglass, the stem of a ResNet."""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import Pool
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op not in ("max_pool2d", "avg_pool2d"):
        return None
    arguments = dict(node.attributes)
    if arguments.pop("dilation", (1, 1)) != (1, 1):
        return None
    mode = node.op.removesuffix("_pool2d")
    return Draft(node.inputs, partial(Pool, name=node.module, mode=mode, **arguments))
