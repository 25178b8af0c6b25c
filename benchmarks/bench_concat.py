"""Maps side by side, as FAN's blocks have them (128 + 64 + 64, plus the shortcut). Bound by memory.

make bench PYTEST_ARGS="-k concat --benchmark-json=concat.json"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_bench import each_candidate, each_dtype, measure, needs_native, plan_of, random_map

pytestmark = needs_native


@each_candidate
@pytest.mark.parametrize("size", [64, 16])
@each_dtype
def test_concat(benchmark: Any, dtype: str, size: int, candidate: str) -> None:
    parts = [random_map(candidate, dtype, 1, channels, size, size) for channels in (128, 64, 64)]
    shortcut = random_map(candidate, dtype, 1, 256, size, size)
    if candidate == "hgfast":
        run = plan_of(dtype, [*parts, shortcut], lambda plan, y: plan.concat([0, 1, 2], y, add=3))
    else:

        def run() -> torch.Tensor:
            return torch.cat(parts, 1).add_(shortcut)

    measure(
        benchmark,
        f"concat {dtype} {size}x{size}",
        candidate,
        run,
        nbytes=3.0 * shortcut.numel() * shortcut.element_size(),
    )
