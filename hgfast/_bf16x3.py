"""Precision "high" in plain PyTorch: what the products of a float32 model may be made of.

A float32 is split into two bfloat16, ``x = high + low`` to within 2^-17, and a product is
``high high + high low + low high``, summed in float32. So the kernels for AMX do it
(csrc/cpu/gemm_amx.h); there is no eager arithmetic of that kind to compare them with, but here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Half a unit in the last place of the two parts together, relative to the value.
ROUNDING = 2.0**-17


_aten = torch.ops.aten
_SPELLINGS = {
    _aten.conv2d.default,
    _aten.conv2d.padding,
    _aten._convolution_mode.default,
    _aten.conv_transpose2d.input,
}


class Bf16x3(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, convolutions of float32 tensors are sums of three of bfloat16 parts.

    Those with groups are not: no kernel takes them, at any precision.
    """

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _SPELLINGS:  # as they arrive in inference mode
            with self:
                return function.decompose(*args, **(kwargs or {}))
        if function is not _aten.convolution.default:
            return function(*args, **(kwargs or {}))
        x, weight, bias, *place, groups = args
        if x.dtype != torch.float32 or groups != 1:
            return function(*args)
        (x_high, x_low), (w_high, w_low) = _parts(x), _parts(weight)
        small = function(x_high, w_low, None, *place, 1) + function(x_low, w_high, None, *place, 1)
        return function(x_high, w_high, bias, *place, 1) + small


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16().float()
    return high, (x - high).bfloat16().float()
