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

from hgfast.plan import Bottleneck, Conv, Convolution, Norm

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
    """(weight OIHW, bias) in float32 of a convolution with the BatchNorm behind it folded in."""
    weight = weights[conv.weight].double()
    bias = weights[conv.bias].double() if conv.bias else weight.new_zeros(len(weight))
    if norm is not None:
        scale, shift = affine(norm, weights)
        weight = weight * scale[:, None, None, None]
        bias = bias * scale + shift
    return weight.float(), bias.float()


def bottleneck_weights(step: Bottleneck, weights: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """scale, shift, w1, b1, w2, b2, w3, b3, wp, bp as the bottleneck op takes them."""
    _, norm2, norm3 = step.norms
    conv1, conv2, conv3 = step.convs
    return (
        *prologue(step.norms[0], weights),
        *fold(conv1, norm2, weights),
        *fold(conv2, norm3, weights),
        *fold(conv3, None, weights),
        *(fold(step.project, None, weights) if step.project else (None, None)),
    )


def conv_weights(step: Conv, weights: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """weight, bias, scale, shift as the conv op takes them."""
    return *fold(step.conv, step.norm_after, weights), *prologue(step.norm_before, weights)
