"""The way into the next stack: ``[x +] features(y) + heatmaps'(heatmaps(y))``, all of them 1x1.

A linear map of a linear map is one linear map, so one convolution does for two (and the third,
which makes the heatmaps themselves, stays a step of its own).
"""

from __future__ import annotations

from functools import partial

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import Remerge
from hgfast.trace import Node


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op != "add":
        return None
    terms = _terms(reader, node)
    if not 2 <= len(terms) <= 3:
        return None
    for behind in terms:
        inner = reader.pointwise(behind)
        if inner is None or not reader.only_use(behind):
            continue
        heatmaps = behind.inputs[0]
        before = reader.pointwise(heatmaps)
        if before is None or before.channels[1] >= before.channels[0]:
            continue
        for features in terms:
            direct = reader.pointwise(features)
            if direct is None or features is behind or not reader.only_use(features):
                continue
            if features.inputs[0] is not heatmaps.inputs[0]:
                continue
            step = partial(Remerge, name=direct.name, direct=direct, before=before, behind=inner)
            others = tuple(term for term in terms if term not in (features, behind))
            return Draft((features.inputs[0], *others), step)
    return None


def _terms(reader: Reader, node: Node) -> list[Node]:
    """What a chain of sums adds up, where nobody else looks at the sums between."""
    terms: list[Node] = []
    for item in node.inputs:
        if item.op == "add" and reader.only_use(item) and len(terms) < 4:
            terms += _terms(reader, item)
        else:
            terms.append(item)
    return terms
