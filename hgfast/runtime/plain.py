"""Steps in PyTorch's own operations, for executors that have no kernel for them.

Weights are folded as the kernels' are, cast once, and bound. Activations are channels_last where
they have four dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hgfast.plan import Bottleneck, Conv, Convolution, Norm, Remerge, Step
from hgfast.runtime import reference
from hgfast.runtime.folding import fold, prologue, remerge_weights

Run = Callable[..., Tensor]


def converted(x: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """``x`` in ``dtype``; in ``layout`` if it is a map, dense if it is not."""
    if x.dim() != 4:
        return x.to(dtype).contiguous()
    return x.to(dtype).contiguous(memory_format=layout)


def bind(step: Step, weights: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Run, list[Tensor]]:
    """One step as a function of its inputs, and the weights that it holds.

    Args:
        step: any step of a Plan.
        weights: those that the step names.
        dtype: that of activations and products.
    """
    if isinstance(step, Bottleneck):
        return _bottleneck(step, weights, dtype)
    if isinstance(step, Conv):
        return _conv(step, weights, dtype)
    if isinstance(step, Remerge):
        weight, bias = (_cast(tensor, dtype) for tensor in remerge_weights(step, weights))

        def remerge(x: Tensor, *add: Tensor) -> Tensor:
            y = F.conv2d(x, weight, bias)
            return y.add_(add[0]) if add else y

        return remerge, [weight, bias]
    held = {name: weights[name].to(dtype, copy=True) for name in step.weights}
    return lambda *inputs: reference.run_step(step, held, *inputs), list(held.values())


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.to(dtype, memory_format=layout, copy=True)


def _convolution(
    conv: Convolution, norm: Norm | None, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Run, list[Tensor]]:
    weight, bias = (_cast(tensor, dtype) for tensor in fold(conv, norm, weights))
    if conv.transposed:
        settings = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        if conv.groups == 1:
            return lambda x: F.conv_transpose2d(x, weight, bias, *settings), [weight, bias]
        # With a bias PyTorch takes another, slower way on a CPU.
        column = bias[:, None, None]
        return lambda x: F.conv_transpose2d(x, weight, None, *settings).add_(column), [weight, bias]
    return (
        lambda x: F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    ), [weight, bias]


def _prologue(
    norm: Norm | None, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Run, list[Tensor]]:
    """BatchNorm and ReLU, in float32."""
    scale, shift = prologue(norm, weights)
    if scale is None or shift is None:
        return lambda x: x, []
    scale, shift = scale[:, None, None], shift[:, None, None]
    return lambda x: torch.addcmul(shift, x.float(), scale).relu_().to(dtype), [scale, shift]


def _conv(
    step: Conv, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Run, list[Tensor]]:
    before, held = _prologue(step.norm_before, weights, dtype)
    convolve, more = _convolution(step.conv, step.norm_after, weights, dtype)

    def run(x: Tensor, *add: Tensor) -> Tensor:
        y = convolve(before(x))
        if step.relu:
            y = y.relu_()
        if add:
            y = y.add_(add[0])
        return y.relu_() if step.relu_sum else y

    return run, held + more


def _bottleneck(
    step: Bottleneck, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Run, list[Tensor]]:
    conv1, conv2, conv3 = step.convs
    norm1, norm2, norm3 = step.norms
    before, held = _prologue(norm1 if step.preactivated else None, weights, dtype)
    behind = (norm2, norm3, None) if step.preactivated else step.norms
    layers = []
    for conv, norm in zip((conv1, conv2, conv3), behind, strict=True):
        convolve, more = _convolution(conv, norm, weights, dtype)
        layers.append(convolve)
        held += more
    project: Run = lambda x: x  # noqa: E731
    if step.project:
        project, more = _convolution(step.project, step.project_norm, weights, dtype)
        held += more

    def run(x: Tensor, *low: Tensor) -> Tensor:
        y = layers[2](layers[1](layers[0](before(x)).relu_()).relu_()).add_(project(x))
        if not step.preactivated:
            y = y.relu_()
        return y.add_(F.interpolate(low[0], scale_factor=2.0)) if low else y

    return run, held
