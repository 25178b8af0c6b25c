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
    weight, bias = weights[conv.weight], weights[conv.bias] if conv.bias else None
    if conv.transposed:
        extra, groups = conv.output_padding, conv.groups
        return F.conv_transpose2d(
            x, weight, bias, conv.stride, conv.padding, extra, groups, conv.dilation
        )
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _bottleneck(step: Any, weights: Weights, x: Tensor, *low: Tensor) -> Tensor:
    y = x
    for norm, conv in zip(step.norms, step.convs, strict=True):
        if step.preactivated:
            y = _convolve(conv, F.relu(_norm(norm, y, weights)), weights)
        else:
            y = _convolve(conv, y if conv is step.convs[0] else F.relu(y), weights)
            y = _norm(norm, y, weights) if norm else y
    shortcut = _convolve(step.project, x, weights) if step.project else x
    y = y + (_norm(step.project_norm, shortcut, weights) if step.project_norm else shortcut)
    if not step.preactivated:
        y = F.relu(y)
    return y + F.interpolate(low[0], scale_factor=2, mode="nearest") if low else y


def _conv(step: Any, weights: Weights, x: Tensor, *add: Tensor) -> Tensor:
    if step.norm_before:
        x = F.relu(_norm(step.norm_before, x, weights))
    y = _convolve(step.conv, x, weights)
    if step.norm_after:
        y = _norm(step.norm_after, y, weights)
    if step.relu:
        y = F.relu(y)
    if add:
        y = y + add[0]
    return F.relu(y) if step.relu_sum else y


def _remerge(step: Any, weights: Weights, x: Tensor, *add: Tensor) -> Tensor:
    behind = _convolve(step.behind, _convolve(step.before, x, weights), weights)
    y = _convolve(step.direct, x, weights) + behind
    return y + add[0] if add else y


def _pool(step: Any, weights: Weights, x: Tensor) -> Tensor:
    windows = step.kernel_size, step.stride, step.padding
    if step.mode == "max":
        return F.max_pool2d(x, *windows, ceil_mode=step.ceil_mode)
    return F.avg_pool2d(x, *windows, step.ceil_mode, step.count_include_pad)


def _upsample_add(step: Any, weights: Weights, *inputs: Tensor) -> Tensor:
    *lows, y = inputs
    for low, factor in zip(lows, step.factors, strict=True):
        y = y + F.interpolate(low, scale_factor=factor, mode="nearest")
    return F.relu(y) if step.relu else y


def _add(step: Any, weights: Weights, a: Tensor, b: Tensor) -> Tensor:
    return F.relu(a + b) if step.relu else a + b


def _concat(step: Any, weights: Weights, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs[:-1], 1) + inputs[-1] if step.add else torch.cat(inputs, 1)


def _plain(step: Any, weights: Weights, *inputs: Tensor) -> Tensor:
    parameters = {keyword: weights[name] for keyword, name in step.parameters}
    return PLAIN[step.op](*inputs, **dict(step.arguments), **parameters)


def _upsample(x: Tensor, *like: Tensor, size: Any = None, **arguments: Any) -> Tensor:
    return F.interpolate(x, size=like[0].shape[2:] if like else size, **arguments)


def _batch_norm(x: Tensor, mean: Tensor, var: Tensor, **arguments: Any) -> Tensor:
    return F.batch_norm(x, mean, var, **arguments)


def _adaptive(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *like, output_size: pool(x, like[0].shape[2:] if like else output_size)


def _squeeze(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    if any(x.shape[d] != 1 for d in dim):
        raise RuntimeError(f"squeezes dimensions {dim} of {tuple(x.shape)}, which are not 1")
    return torch.squeeze(x, dim)


def _numbers(sizes: Sequence[Any], *tensors: Tensor) -> list[Any]:
    """Sizes that may be computed from those of tensors."""
    known = [tuple(item.shape) for item in tensors]
    return [n if isinstance(n, int) else n.value(*known) for n in sizes]


def _view(x: Tensor, *like: Tensor, shape: Sequence[Any]) -> Tensor:
    return x.reshape(_numbers(shape, x, *like))


def _expand(x: Tensor, *like: Tensor, shape: Sequence[Any]) -> Tensor:
    return x.expand(_numbers(shape, x, *like))


#: PyTorch's own operations that a Plan may contain, by the names that traced graphs give them. Each
#: is called with the activations, then keywords.
PLAIN: dict[str, Callable[..., Tensor]] = {
    "adaptive_avg_pool2d": _adaptive(F.adaptive_avg_pool2d),
    "adaptive_max_pool2d": _adaptive(F.adaptive_max_pool2d),
    "add_number": lambda x, other: x + other,
    "add_weight": lambda x, other: x + other,
    "amax": torch.amax,
    "batch_norm": _batch_norm,
    "broadcast_add": torch.add,
    "channel_shuffle": lambda x, groups: F.channel_shuffle(x, groups),
    "chunk": lambda x, chunks, dim, index: x.chunk(chunks, dim)[index],
    "clamp": torch.clamp,
    "concat": lambda *xs, dim: torch.cat(xs, dim),
    "div": torch.div,
    "div_number": lambda x, other: x / other,
    "elu": F.elu,
    "expand": _expand,
    "expand_as": lambda x, other: x.expand_as(other),
    "flatten": torch.flatten,
    "gelu": F.gelu,
    "getitem": lambda x, index: x[index],
    "group_norm": F.group_norm,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "instance_norm": F.instance_norm,
    "layer_norm": F.layer_norm,
    "leaky_relu": F.leaky_relu,
    "linear": F.linear,
    "matmul": torch.matmul,
    "mean": torch.mean,
    "mul": torch.mul,
    "mul_number": lambda x, other: x * other,
    "mul_weight": lambda x, other: x * other,
    "pad": F.pad,
    "permute": torch.permute,
    "pixel_shuffle": F.pixel_shuffle,
    "prelu": F.prelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softmax": F.softmax,
    "split": lambda x, sizes, dim, index: x.split(
        sizes if isinstance(sizes, int) else list(sizes), dim
    )[index],
    "squeeze": _squeeze,
    "stack": lambda *xs, dim: torch.stack(xs, dim),
    "sub": torch.sub,
    "sum": torch.sum,
    "tanh": torch.tanh,
    "unsqueeze": torch.unsqueeze,
    "upsample": _upsample,
    "view": _view,
}

_STEPS: dict[str, Callable[..., Tensor]] = {
    "bottleneck": _bottleneck,
    "conv": _conv,
    "remerge": _remerge,
    "pool": _pool,
    "upsample_add": _upsample_add,
    "add": _add,
    "concat": _concat,
    "plain": _plain,
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
