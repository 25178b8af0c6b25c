"""BatchNorm folding, shared by every executor that packs weights.

At inference a BatchNorm is the affine map ``scale * x + shift`` with
``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean * scale`` (Ioffe and Szegedy,
arXiv:1502.03167, section 3.1). After a convolution it is folded into the convolution's weight
and bias; before one, behind a ReLU, it cannot be, and stays a prologue.

Folding happens in float64 and is rounded once, so that a tiny variance costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hgfast.plan import Bottleneck, Conv, Convolution, Norm, Remerge

Weights = Mapping[str, Tensor]


def affine(norm: Norm, weights: Weights) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNorm, each float64 (C,)."""
    mean, var = weights[norm.mean].double(), weights[norm.var].double()
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight:
        scale = scale * weights[norm.weight].double()
    shift = -mean * scale
    if norm.bias:
        shift = shift + weights[norm.bias].double()
    return scale, shift


def prologue(norm: Norm | None, weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    """(scale, shift) in float32 of a BatchNorm that acts before a convolution, or Nones."""
    if norm is None:
        return None, None
    scale, shift = affine(norm, weights)
    return scale.float(), shift.float()


def unfolded(
    conv: Convolution, norm: Norm | None, weights: Weights
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(weight, factor, bias) of a convolution with a BatchNorm, or none, behind it.

    The weight as it is, the float64 factors (out,) with which :func:`fold` multiplies it, or None,
    and the bias in float32 that :func:`fold` gives.
    """
    weight = weights[conv.weight]
    if conv.bias:
        bias = weights[conv.bias].double()
    else:
        bias = weight.new_zeros(conv.channels[1], dtype=torch.float64)
    if norm is None:
        return weight, None, bias.float()
    factor, shift = affine(norm, weights)
    return weight, factor, (bias * factor + shift).float()


def fold(conv: Convolution, norm: Norm | None, weights: Weights) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float32 of a convolution with the BatchNorm behind it folded in.

    The weight is (out, in / groups, height, width), a transposed one's (in, out / groups, ...).
    """
    weight, factor, bias = unfolded(conv, norm, weights)
    if factor is None:
        return weight.float(), bias
    weight = weight.double()
    if conv.transposed:  # its rows are inputs, group by group
        grouped = weight.reshape(conv.groups, -1, *weight.shape[1:])
        weight = (grouped * factor.view(conv.groups, 1, -1, 1, 1)).reshape(weight.shape)
    else:
        weight = weight * factor[:, None, None, None]
    return weight.float(), bias


def bottleneck_weights(step: Bottleneck, weights: Weights) -> tuple[Any, ...]:
    """scale, shift, w1, b1, w2, b2, w3, b3, wp, bp as the bottleneck op takes them."""
    return _bottleneck(step, weights, fold)


def bottleneck_weights_unfolded(step: Bottleneck, weights: Weights) -> tuple[Any, ...]:
    """Those of :func:`bottleneck_weights` with w2 as it is, and its factors between w2 and b2."""
    return _bottleneck(step, weights, unfolded)


def _bottleneck(
    step: Bottleneck, weights: Weights, second: Callable[..., tuple[Any, ...]]
) -> tuple[Any, ...]:
    conv1, conv2, conv3 = step.convs
    before, *behind = (*step.norms, None) if step.preactivated else (None, *step.norms)
    return (
        *prologue(before, weights),
        *fold(conv1, behind[0], weights),
        *second(conv2, behind[1], weights),
        *fold(conv3, behind[2], weights),
        *(fold(step.project, step.project_norm, weights) if step.project else (None, None)),
    )


def conv_weights(step: Conv, weights: Weights) -> tuple[Any, ...]:
    """weight, bias, scale, shift as the conv op takes them."""
    return *fold(step.conv, step.norm_after, weights), *prologue(step.norm_before, weights)


def conv_weights_unfolded(step: Conv, weights: Weights) -> tuple[Any, ...]:
    """Those of :func:`conv_weights` with the weight as it is, and its factors behind it."""
    return *unfolded(step.conv, step.norm_after, weights), *prologue(step.norm_before, weights)


def remerge_weights(step: Remerge, weights: Weights) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float32 of the one 1x1 convolution that does for three."""

    def matrix(conv: Convolution) -> tuple[Tensor, Tensor]:
        weight = weights[conv.weight].double().flatten(1)
        bias = weights[conv.bias].double() if conv.bias else weight.new_zeros(len(weight))
        return weight, bias

    (direct, bias), (before, bias1), (behind, bias2) = map(
        matrix, (step.direct, step.before, step.behind)
    )
    weight = direct + behind @ before
    return weight.float()[:, :, None, None], (bias + behind @ bias1 + bias2).float()
