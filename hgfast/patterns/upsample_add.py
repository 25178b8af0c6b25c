"""Joins of resolutions: maps of lower resolution, enlarged (nearest) and added to another map.

One map and a factor of 2 is the join of an hourglass. Where its upper branch ends in a bottleneck,
the join becomes that bottleneck's epilogue: the sum is formed while the block's result is still in
registers. Several maps and a ReLU behind the sum are a fuse layer of HRNet.
"""

from __future__ import annotations

from functools import partial

from hgfast.patterns import bottleneck
from hgfast.patterns.match import Draft, Reader
from hgfast.plan import UpsampleAdd
from hgfast.trace import Node

_MOST = 4  # maps to enlarge
_FACTORS = (2, 4, 8)


def match(reader: Reader, node: Node) -> Draft | None:
    relu = node.op == "relu" and reader.only_use(node.inputs[0])
    total = node.inputs[0] if relu else node
    if total.op != "add":
        return None
    terms = list(_terms(reader, total))
    lows = [(term, factor) for term in terms if (factor := _factor(reader, term))]
    if not lows:
        return None
    rest = [term for term in terms if term not in [low for low, _ in lows]]
    if not rest or len(lows) + len(rest) - 1 > _MOST:
        return _match_one(reader, total) if not relu else None
    if [factor for _, factor in lows] == [2] and len(rest) == 1 and not relu:
        block = bottleneck.match(reader, rest[0]) if reader.only_use(rest[0]) else None
        if block is not None:
            return block.with_input(lows[0][0].inputs[0])
    inputs = [(low.inputs[0], factor) for low, factor in lows] + [(term, 1) for term in rest[:-1]]
    step = partial(
        UpsampleAdd,
        name=node.module,
        factors=tuple(factor for _, factor in inputs),
        relu=relu,
    )
    return Draft((*(value for value, _ in inputs), rest[-1]), step)


def _match_one(reader: Reader, total: Node) -> Draft | None:
    """One map out of more than a step takes."""
    for low, rest in (total.inputs, total.inputs[::-1]):
        factor = _factor(reader, low)
        if factor:
            step = partial(UpsampleAdd, name=total.module, factors=(factor,), relu=False)
            return Draft((low.inputs[0], rest), step)
    return None


def _terms(reader: Reader, total: Node) -> list[Node]:
    """What a chain of sums adds up, as far as it only adds enlarged maps to others."""
    terms: list[Node] = []
    for item in total.inputs:
        if item.op == "add" and reader.only_use(item) and _joins(reader, item):
            terms += _terms(reader, item)
        else:
            terms.append(item)
    return terms


def _joins(reader: Reader, node: Node) -> bool:
    """Whether a sum has something to enlarge. Another may be a block's, and is left to it."""
    return any(
        _factor(reader, item)
        or (item.op == "add" and reader.only_use(item) and _joins(reader, item))
        for item in node.inputs
    )


def _factor(reader: Reader, node: Node) -> int | None:
    """By how much a node enlarges, if a step can do so."""
    if node.op != "upsample" or not reader.only_use(node) or node["mode"] != "nearest":
        return None
    if len(node.inputs) != 1 or node["scale_factor"] is None:
        return None
    height, width = node["scale_factor"]
    return int(height) if height == width and height in _FACTORS else None
