"""The join of an hourglass: the lower branch upsampled x2 (nearest) and added to the upper one.

Where the upper branch ends in a bottleneck, the join becomes that bottleneck's epilogue: the
sum is formed while the block's result is still in registers.
"""

from __future__ import annotations

from functools import partial

from hgfast.patterns import bottleneck
from hgfast.patterns.match import Draft, Reader
from hgfast.plan import UpsampleAdd
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op != "add":
        return None
    left, right = node.inputs
    return _match_branches(reader, left, right) or _match_branches(reader, right, left)


def _match_branches(reader: Reader, upsample: Node, skip: Node) -> Draft | None:
    if not _is_nearest_x2(upsample) or not reader.only_use(upsample):
        return None
    low = upsample.inputs[0]
    block = bottleneck.match(reader, skip) if reader.only_use(skip) else None
    if block is not None:
        return block.with_input(low)
    return Draft((low, skip), partial(UpsampleAdd, name=upsample.module))


def _is_nearest_x2(node: Node) -> bool:
    return (
        node.op == "upsample"
        and node["mode"] == "nearest"
        and node["size"] is None
        and node["scale_factor"] == (2, 2)
    )
