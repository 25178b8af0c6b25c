"""The deconvolutions of SimpleBaseline's head: 4x4, stride 2, 256 channels.

make bench PYTEST_ARGS="-k conv_transpose --benchmark-json=conv_transpose.json"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_bench import (
    convolution_weight,
    each_candidate,
    each_dtype,
    measure,
    needs_native,
    plan_of,
    random_map,
)

pytestmark = needs_native
OUT, KERNEL = 256, 4


@each_candidate
@pytest.mark.parametrize(
    ("channels", "size"), [(2048, 8), (256, 16), (256, 32)], ids=lambda n: str(n)
)
@each_dtype
def test_conv_transpose(
    benchmark: Any, dtype: str, channels: int, size: int, candidate: str
) -> None:
    x = random_map(candidate, dtype, 1, channels, size, size)
    # PyTorch has the input's channels first.
    weight = convolution_weight(candidate, dtype, channels, OUT, KERNEL)
    bias = torch.zeros(OUT, dtype=weight.dtype)
    if candidate == "hgfast":
        run = plan_of(
            dtype,
            [x],
            lambda plan, y: plan.conv_transpose(
                0, y, weight, bias, stride=(2, 2), padding=(1, 1), relu=True
            ),
        )
    else:

        def run() -> torch.Tensor:
            return F.relu_(F.conv_transpose2d(x, weight, bias, stride=2, padding=1))

    # Of the sixteen taps each output pixel meets four.
    measure(
        benchmark,
        f"conv_transpose {dtype} {channels} -> {OUT}, {size}x{size}",
        candidate,
        run,
        flops=2.0 * (2 * size) ** 2 * OUT * channels * KERNEL**2 / 4,
    )
