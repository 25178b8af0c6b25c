"""The head behind an hourglass: features, heatmaps, and the way into the next stack.

make bench PYTEST_ARGS="-k head --benchmark-json=head.json"
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
FEATURES, JOINTS = 256, 16


@each_candidate
@pytest.mark.parametrize(("size", "batch"), [(64, 1), (64, 4)], ids=lambda n: str(n))
@each_dtype
def test_head(benchmark: Any, dtype: str, size: int, batch: int, candidate: str) -> None:
    x, add = (random_map(candidate, dtype, batch, FEATURES, size, size) for _ in range(2))
    weights = [
        convolution_weight(candidate, dtype, out, FEATURES, 1)
        for out in (FEATURES, JOINTS, FEATURES)
    ]
    biases = [torch.zeros(len(w), dtype=w.dtype) for w in weights]
    if candidate == "hgfast":
        packed = [t for pair in zip(weights, biases, strict=True) for t in pair]
        run = plan_of(dtype, [x, add], lambda plan, y: plan.head(0, y + 1, y, *packed, 1))
    else:

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            z = F.relu_(F.conv2d(x, weights[0], biases[0]))
            return F.conv2d(z, weights[1], biases[1]), F.conv2d(z, weights[2], biases[2]).add_(add)

    macs = FEATURES * (2 * FEATURES + JOINTS)
    measure(
        benchmark,
        f"head {dtype} {size}x{size} batch {batch}",
        candidate,
        run,
        flops=2.0 * batch * size * size * macs,
    )
