"""The pre-activation bottleneck: BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1, plus a shortcut."""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader, common_name
from hgfast.plan import Bottleneck, Convolution
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op != "add":
        return None
    left, right = node.inputs
    return _match_branches(reader, left, right) or _match_branches(reader, right, left)


def _match_branches(reader: Reader, branch: Node, shortcut: Node) -> Draft | None:
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
    x = branch

    project = None
    if shortcut is not x:
        project = reader.pointwise(shortcut)
        if project is None or not reader.only_use(shortcut) or shortcut.inputs[0] is not x:
            return None
    norm3, norm2, norm1 = norms
    conv3, conv2, conv1 = convs
    into, out = project.channels if project else (conv1.channels[0], conv1.channels[0])
    if (into, out) != (conv1.channels[0], conv3.channels[1]):
        return None  # the sum broadcasts one channel over many
    step = partial(
        Bottleneck,
        name=common_name(*norms, *convs, project),
        norms=(norm1, norm2, norm3),
        convs=(conv1, conv2, conv3),
        project=project,
    )
    return Draft((x,), step)


def _is_pointwise(conv: Convolution) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)


def _is_same_3x3(conv: Convolution) -> bool:
    return conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1)
