"""The convolutions of the hourglass that stand outside its residuals.

make bench PYTEST_ARGS="-k conv --benchmark-json=conv.json"
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


@each_candidate
@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "size"),
    [
        pytest.param(3, 64, 7, 2, 256, id="stem"),
        pytest.param(256, 256, 1, 1, 64, id="linear"),
        pytest.param(256, 16, 1, 1, 64, id="heatmaps"),
        pytest.param(16, 256, 1, 1, 64, id="remerge"),
        pytest.param(128, 128, 3, 1, 64, id="3x3"),
    ],
)
@each_dtype
def test_conv(
    benchmark: Any,
    dtype: str,
    channels: int,
    out: int,
    kernel: int,
    stride: int,
    size: int,
    candidate: str,
) -> None:
    x = random_map(candidate, dtype, 1, channels, size, size)
    weight = convolution_weight(candidate, dtype, out, channels, kernel)
    bias = torch.zeros(out, dtype=weight.dtype)
    padding = kernel // 2
    if candidate == "hgfast":
        pair, around = (stride, stride), (padding, padding)
        run = plan_of(
            dtype,
            [x],
            lambda plan, y: plan.conv(0, y, weight, bias, stride=pair, padding=around, relu=True),
        )
    else:

        def run() -> torch.Tensor:
            return F.relu_(F.conv2d(x, weight, bias, stride, padding))

    pixels = (size // stride) ** 2
    measure(
        benchmark,
        f"conv {dtype} {channels} -> {out}, {kernel}x{kernel}, {size}x{size}",
        candidate,
        run,
        flops=2.0 * pixels * out * channels * kernel * kernel,
    )
