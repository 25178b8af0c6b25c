"""Two maps added and clamped, 256 channels: what no kernel in front takes over. Bound by memory.

make bench PYTEST_ARGS="-k bench_add --benchmark-json=add.json"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_bench import each_candidate, each_dtype, measure, needs_native, plan_of, random_map

pytestmark = needs_native


@each_candidate
@pytest.mark.parametrize("size", [64, 16])
@each_dtype
def test_add(benchmark: Any, dtype: str, size: int, candidate: str) -> None:
    a, b = (random_map(candidate, dtype, 1, 256, size, size) for _ in range(2))
    if candidate == "hgfast":
        run = plan_of(dtype, [a, b], lambda plan, y: plan.add(0, 1, y, relu=True))
    else:

        def run() -> torch.Tensor:
            return F.relu_(a + b)

    measure(
        benchmark,
        f"add {dtype} {size}x{size}",
        candidate,
        run,
        nbytes=3.0 * a.numel() * a.element_size(),
    )
