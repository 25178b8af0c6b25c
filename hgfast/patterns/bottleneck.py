"""The bottleneck: 1x1, 3x3, 1x1 plus a shortcut; BatchNorm and ReLU before each or behind each."""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader, common_name
from hgfast.plan import Bottleneck, Convolution, Norm
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op == "add":
        left, right = node.inputs
        return _before(reader, left, right) or _before(reader, right, left)
    if node.op == "relu" and node.inputs[0].op == "add" and reader.only_use(node.inputs[0]):
        left, right = node.inputs[0].inputs
        return _behind(reader, left, right) or _behind(reader, right, left)
    return None


def _before(reader: Reader, branch: Node, shortcut: Node) -> Draft | None:
    """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1, plus a shortcut: the identity or a bare 1x1."""
    norms, convs = [], []
    for is_expected in (_is_pointwise, _is_same_3x3, _is_pointwise):  # from the sum upwards
        conv = reader.convolution(branch)
        if conv is None or not is_expected(conv) or not reader.only_use(branch):
            return None
        prologue = reader.norm_relu(branch.inputs[0])
        if prologue is None:
            return None
        norm, branch = prologue
        norms.append(norm)
        convs.append(conv)
    return _draft(reader, norms, convs, branch, shortcut, preactivated=True)


def _behind(reader: Reader, branch: Node, shortcut: Node) -> Draft | None:
    """1x1-BN-ReLU, 3x3-BN-ReLU, 1x1-BN, plus a shortcut (perhaps 1x1-BN), ReLU."""
    norms: list[Norm | None] = []
    convs: list[Convolution] = []
    for is_expected in (_is_pointwise, _is_same_3x3, _is_pointwise):
        if not reader.only_use(branch):
            return None
        if convs:
            if branch.op != "relu":
                return None
            branch = branch.inputs[0]
            if not reader.only_use(branch):
                return None
        layer = reader.normed(branch)
        if layer is None or not is_expected(layer[0]):
            return None
        branch = reader.source(branch)
        convs.append(layer[0])
        norms.append(layer[1])
    return _draft(reader, norms, convs, branch, shortcut, preactivated=False)


def _draft(
    reader: Reader,
    norms: list[Norm | None] | list[Norm],
    convs: list[Convolution],
    x: Node,
    shortcut: Node,
    preactivated: bool,
) -> Draft | None:
    project, project_norm = None, None
    if shortcut is not x:
        layer = reader.normed(shortcut) if reader.only_use(shortcut) else None
        if layer is None or reader.source(shortcut) is not x:
            return None
        project, project_norm = layer
        if not project.is_pointwise or (preactivated and project_norm):
            return None
    norm3, norm2, norm1 = norms
    conv3, conv2, conv1 = convs
    into, out = project.channels if project else (conv1.channels[0], conv1.channels[0])
    if (into, out) != (conv1.channels[0], conv3.channels[1]):
        return None  # the sum broadcasts one channel over many
    step = partial(
        Bottleneck,
        name=common_name(*norms, *convs, project, project_norm),
        norms=(norm1, norm2, norm3),
        convs=(conv1, conv2, conv3),
        project=project,
        project_norm=project_norm,
        preactivated=preactivated,
    )
    return Draft((x,), step)


def _is_pointwise(conv: Convolution) -> bool:
    return conv.is_pointwise


def _is_same_3x3(conv: Convolution) -> bool:
    return conv.is_same_3x3
