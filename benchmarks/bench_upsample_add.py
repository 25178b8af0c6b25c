"""The way up in the hourglass: nearest x2, plus skip, 256 channels. Bound by memory.

make bench PYTEST_ARGS="-k upsample --benchmark-json=upsample_add.json"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_bench import each_candidate, each_dtype, measure, needs_native, plan_of, random_map

pytestmark = needs_native


@each_candidate
@pytest.mark.parametrize("size", [64, 32, 16, 8])
@each_dtype
def test_upsample_add(benchmark: Any, dtype: str, size: int, candidate: str) -> None:
    low = random_map(candidate, dtype, 1, 256, size // 2, size // 2)
    skip = random_map(candidate, dtype, 1, 256, size, size)
    if candidate == "hgfast":
        run = plan_of(dtype, [low, skip], lambda plan, y: plan.upsample_add([0], [2], 1, y))
    else:

        def run() -> torch.Tensor:
            return skip + F.interpolate(low, scale_factor=2, mode="nearest")

    measure(
        benchmark,
        f"upsample_add {dtype} {size}x{size}",
        candidate,
        run,
        nbytes=(low.numel() + 2 * skip.numel()) * skip.element_size(),
    )
