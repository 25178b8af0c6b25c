"""A convolution with its surroundings: [BN-ReLU-] conv [-BN] [-ReLU] [+ another value [-ReLU]].

Stems, heads, plain residual blocks are made of these. A BatchNorm between two convolutions belongs
to the first, where it can be folded into the weights; it becomes a prologue only where the value
before it is needed elsewhere, or comes from something other than a convolution.
"""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import Conv
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op == "relu" and node.inputs[0].op == "add" and reader.only_use(node.inputs[0]):
        return _match_sum(reader, node.inputs[0], relu_sum=True)
    if node.op == "add":
        return _match_sum(reader, node, relu_sum=False)
    return _match_chain(reader, node)


def _match_sum(reader: Reader, node: Node, relu_sum: bool) -> Draft | None:
    # Of two branches, the later one takes the other as the value to add; but a projected shortcut,
    # whose input others read too, leaves that to the branch that it goes around.
    left, right = node.inputs
    branches = [(right, left), (left, right)]
    branches.sort(key=lambda pair: _begins_where_others_do(reader, pair[0]))
    for branch, other in branches:
        if branch is other or not reader.only_use(branch):
            continue
        draft = _match_chain(reader, branch, relu_sum)
        if draft is not None:
            return draft.with_input(other)
    return None


def _begins_where_others_do(reader: Reader, node: Node) -> bool:
    layer = reader.normed(node)
    return layer is not None and not reader.only_use(reader.source(node))


def _match_chain(reader: Reader, node: Node, relu_sum: bool = False) -> Draft | None:
    relu = node.op == "relu"
    if relu:
        node = node.inputs[0]
        if not reader.only_use(node):
            return None
    layer = reader.normed(node)
    if layer is None:
        return None
    conv, after = layer
    x = reader.source(node)
    prologue = reader.norm_relu(x)
    before = None
    if prologue is not None and not _ends_a_convolution(reader, prologue[1]):
        before, x = prologue
    step = partial(
        Conv,
        name=conv.name,
        norm_before=before,
        conv=conv,
        norm_after=after,
        relu=relu,
        relu_sum=relu_sum,
    )
    return Draft((x,), step)


def _ends_a_convolution(reader: Reader, node: Node) -> bool:
    return reader.convolution(node) is not None and reader.only_use(node)
