"""The pooling of the networks: 2x2 between an hourglass's levels, 3x3 behind a ResNet's stem.
Bound by memory.

make bench PYTEST_ARGS="-k pool --benchmark-json=pool.json"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_bench import each_candidate, each_dtype, measure, needs_native, plan_of, random_map

pytestmark = needs_native


@each_candidate
@pytest.mark.parametrize(
    ("mode", "kernel", "padding", "channels", "size"),
    [
        pytest.param("max", 2, 0, 128, 128, id="stem"),
        pytest.param("max", 2, 0, 256, 64, id="64"),
        pytest.param("max", 2, 0, 256, 8, id="8"),
        pytest.param("max", 3, 1, 64, 128, id="ResNet"),
        pytest.param("avg", 2, 0, 256, 64, id="average"),
    ],
)
@each_dtype
def test_pool(
    benchmark: Any,
    dtype: str,
    mode: str,
    kernel: int,
    padding: int,
    channels: int,
    size: int,
    candidate: str,
) -> None:
    x = random_map(candidate, dtype, 1, channels, size, size)
    if candidate == "hgfast":
        around = (padding, padding)
        run = plan_of(
            dtype,
            [x],
            lambda plan, y: plan.pool(0, y, mode, (kernel, kernel), (2, 2), around),
        )
    else:
        pool = F.max_pool2d if mode == "max" else F.avg_pool2d

        def run() -> torch.Tensor:
            return pool(x, kernel, 2, padding)

    measure(
        benchmark,
        f"pool {dtype} {mode} {kernel}x{kernel}, {channels} channels, {size}x{size}",
        candidate,
        run,
        nbytes=1.25 * x.numel() * x.element_size(),
    )
