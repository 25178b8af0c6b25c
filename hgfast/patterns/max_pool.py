"""The descent of an hourglass: 2x2 max pooling with stride 2."""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import MaxPool
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op != "max_pool2d":
        return None
    expected = {
        "kernel_size": (2, 2),
        "stride": (2, 2),
        "padding": (0, 0),
        "dilation": (1, 1),
        "ceil_mode": False,
    }
    return (
        Draft(node.inputs, partial(MaxPool, name=node.module))
        if node.attributes == expected
        else None
    )
