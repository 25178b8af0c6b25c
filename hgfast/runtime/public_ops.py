"""A Plan through hgfast's public ops, weights as arguments: what torch.compile and export see.

A packed plan is a handle that no compiled graph could carry away, so while a graph is being
recorded the steps are called one by one instead. The ops pack on every call; outside of
compilation the CPU executor does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hgfast import ops
from hgfast.plan import Bottleneck, Conv, Plan, Step, output_values
from hgfast.runtime.cpu import bottleneck_weights, conv_weights, element_of


def run(
    plan: Plan, weights: Mapping[str, Tensor], inputs: Sequence[Tensor], precision: str
) -> dict[int, Tensor]:
    """Run ``plan`` and return its outputs by value number, in the inputs' dtype."""
    element = getattr(torch, element_of(inputs[0].dtype, precision))
    values = {number: x.to(element) for number, x in zip(plan.inputs, inputs, strict=True)}
    for step in plan.steps:
        values[step.output] = _run(step, weights, [values[number] for number in step.inputs])
    return {number: values[number].to(inputs[0].dtype) for number in output_values(plan.outputs)}


def _run(step: Step, weights: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    x, *extra = inputs
    if isinstance(step, Bottleneck):
        return ops.bottleneck(x, *bottleneck_weights(step, weights), *extra)
    if isinstance(step, Conv):
        weight, bias, scale, shift = conv_weights(step, weights)
        stride, padding = step.conv.stride, step.conv.padding
        return ops.conv(x, weight, bias, scale, shift, stride, padding, step.relu, *extra)
    if step.kind == "max_pool":
        return F.max_pool2d(x, 2)
    if step.kind == "upsample_add":
        return ops.upsample_add(x, *extra)
    return x + extra[0]
