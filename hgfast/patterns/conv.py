"""A convolution with its surroundings: [BN-ReLU-] conv [-BN] [-ReLU] [+ another value].

Stems, heads and remerges are made of these. A BatchNorm between two convolutions belongs to
the first, where it can be folded into the weights; it becomes a prologue only where the value
before it is needed elsewhere, or comes from something other than a convolution.
"""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import Conv
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op != "add":
        return _match_chain(reader, node)
    # Of two branches, the later one takes the other as the value to add.
    for branch, other in (node.inputs[::-1], node.inputs):
        draft = (
            _match_chain(reader, branch)
            if reader.only_use(branch) and branch is not other
            else None
        )
        if draft is not None:
            return draft.with_input(other)
    return None


def _match_chain(reader: Reader, node: Node) -> Draft | None:
    relu = node.op == "relu"
    if relu:
        node = node.inputs[0]
        if not reader.only_use(node):
            return None
    after = reader.norm(node)
    if after is not None:
        node = node.inputs[0]
        if not reader.only_use(node):
            return None
    conv = reader.convolution(node)
    if conv is None:
        return None
    x = node.inputs[0]
    prologue = reader.norm_relu(x)
    before = None
    if prologue is not None and not _ends_a_convolution(reader, prologue[1]):
        before, x = prologue
    step = partial(Conv, name=conv.name, norm_before=before, conv=conv, norm_after=after, relu=relu)
    return Draft((x,), step)


def _ends_a_convolution(reader: Reader, node: Node) -> bool:
    return reader.convolution(node) is not None and reader.only_use(node)
