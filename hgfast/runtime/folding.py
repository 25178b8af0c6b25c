"""BatchNorm folding, shared by every executor that packs weights.

At inference a BatchNorm is the affine map ``scale * x + shift`` with
``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean * scale`` (Ioffe and Szegedy,
arXiv:1502.03167, section 3.1). After a convolution it is folded into the convolution's weight
and bias; before one, behind a ReLU, it cannot be, and stays a prologue.

Folding happens in float64 and is rounded once, so that a tiny variance costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def fold(conv: Convolution, norm: Norm | None, weights: Weights) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float32 of a convolution with the BatchNorm behind it folded in.

    The weight is (out, in / groups, height, width), a transposed one's (in, out / groups, ...).
    """
    weight = weights[conv.weight].double()
    bias = weights[conv.bias].double() if conv.bias else weight.new_zeros(conv.channels[1])
    if norm is not None:
        scale, shift = affine(norm, weights)
        if conv.transposed:  # its rows are inputs, group by group
            grouped = weight.reshape(conv.groups, -1, *weight.shape[1:])
            scaled = grouped * scale.view(conv.groups, 1, -1, 1, 1)
            weight = scaled.reshape(weight.shape)
        else:
            weight = weight * scale[:, None, None, None]
        bias = bias * scale + shift
    return weight.float(), bias.float()


def unfolded(
    conv: Convolution, norm: Norm | None, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """The weight as it is, and the float64 factors (out,) with which :func:`fold` multiplies it."""
    return weights[conv.weight], None if norm is None else affine(norm, weights)[0]


def bottleneck_weights(step: Bottleneck, weights: Weights) -> tuple[Any, ...]:
    """scale, shift, w1, b1, w2, b2, w3, b3, wp, bp as the bottleneck op takes them."""
    norm1, norm2, norm3 = step.norms
    conv1, conv2, conv3 = step.convs
    behind = (norm2, norm3, None) if step.preactivated else step.norms
    return (
        *prologue(norm1 if step.preactivated else None, weights),
        *fold(conv1, behind[0], weights),
        *fold(conv2, behind[1], weights),
        *fold(conv3, behind[2], weights),
        *(fold(step.project, step.project_norm, weights) if step.project else (None, None)),
    )


def conv_weights(step: Conv, weights: Weights) -> tuple[Any, ...]:
    """weight, bias, scale, shift as the conv op takes them."""
    return *fold(step.conv, step.norm_after, weights), *prologue(step.norm_before, weights)


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
