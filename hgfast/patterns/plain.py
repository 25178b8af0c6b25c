"""What PyTorch does itself: activations, norms, attention, containers of maps.

Nothing is gained on these operations, but the network around them stays one Plan.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hgfast.patterns.match import Draft, Reader
from hgfast.plan import Plain
from hgfast.trace import Node, Weight

_SWALLOWED = (
    "conv2d",
    "conv_transpose2d",
    "max_pool2d",
    "avg_pool2d",
    "add",
    "input",
    "unsupported",
)


def match(reader: Reader, node: Node) -> Draft | None:
    if node.op in _SWALLOWED:
        return None
    arguments: dict[str, Any] = dict(node.attributes)
    if node.op == "batch_norm":  # there, weights go by name
        names = ("weight", "bias", "mean", "var")
        arguments.update({k: Weight(arguments[k]) for k in names if arguments[k] is not None})
    weights = {k: v.name for k, v in arguments.items() if isinstance(v, Weight)}
    step = partial(
        Plain,
        name=node.module,
        op=node.op,
        arguments=tuple((k, v) for k, v in arguments.items() if k not in weights),
        parameters=tuple(weights.items()),
        sizes=tuple((k, reader.shape_of(name)) for k, name in weights.items()),
    )
    return Draft(node.inputs, step)
