"""The reference executor: a Plan in plain PyTorch, step by step, in any dtype.

This is the specification of every step. It is written to be obviously right, imports nothing
but torch, and judges the executors that are written to be fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def _norm(norm: Any, x: Tensor, weights: Weights) -> Tensor:
    weight = weights[norm.weight] if norm.weight else None
    bias = weights[norm.bias] if norm.bias else None
    return F.batch_norm(x, weights[norm.mean], weights[norm.var], weight, bias, eps=norm.eps)


def _convolve(conv: Any, x: Tensor, weights: Weights) -> Tensor:
    bias = weights[conv.bias] if conv.bias else None
    return F.conv2d(x, weights[conv.weight], bias, conv.stride, conv.padding)


def _bottleneck(step: Any, weights: Weights, x: Tensor, *low: Tensor) -> Tensor:
    y = x
    for norm, conv in zip(step.norms, step.convs, strict=True):
        y = _convolve(conv, F.relu(_norm(norm, y, weights)), weights)
    y = y + (_convolve(step.project, x, weights) if step.project else x)
    return _upsample_add(step, weights, low[0], y) if low else y


def _conv(step: Any, weights: Weights, x: Tensor, *add: Tensor) -> Tensor:
    if step.norm_before:
        x = F.relu(_norm(step.norm_before, x, weights))
    y = _convolve(step.conv, x, weights)
    if step.norm_after:
        y = _norm(step.norm_after, y, weights)
    if step.relu:
        y = F.relu(y)
    return y + add[0] if add else y


def _max_pool(step: Any, weights: Weights, x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def _upsample_add(step: Any, weights: Weights, low: Tensor, skip: Tensor) -> Tensor:
    return F.interpolate(low, scale_factor=2, mode="nearest") + skip


def _add(step: Any, weights: Weights, a: Tensor, b: Tensor) -> Tensor:
    return a + b


_STEPS: dict[str, Callable[..., Tensor]] = {
    "bottleneck": _bottleneck,
    "conv": _conv,
    "max_pool": _max_pool,
    "upsample_add": _upsample_add,
    "add": _add,
}


def run_step(step: Any, weights: Weights, *inputs: Tensor) -> Tensor:
    """One step's value; its weights by qualified name, in the dtype to compute in."""
    return _STEPS[step.kind](step, weights, *inputs)


def execute(plan: Any, weights: Weights, inputs: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Run ``plan`` and yield (value number, tensor) as each value comes into being.

    Args:
        plan: a :class:`hgfast.plan.Plan`.
        weights: every tensor in ``plan.weights``, by qualified name; their dtype is the one
            that the arithmetic runs in.
        inputs: one tensor (B, C, H, W) for each of ``plan.inputs``.
    """
    values = dict(zip(plan.inputs, inputs, strict=True))
    yield from values.items()
    for step in plan.steps:
        sources = (values[value] for value in step.inputs)
        values[step.output] = run_step(step, weights, *sources)
        yield step.output, values[step.output]


def run(plan: Any, weights: Weights, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """Run ``plan`` and return every value by number. See :func:`execute`."""
    with torch.inference_mode():
        return dict(execute(plan, weights, inputs))
