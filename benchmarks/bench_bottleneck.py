"""The residual of the hourglass, 256 -> 128 -> 256, at each of its sizes.

make bench PYTEST_ARGS="-k bottleneck --benchmark-json=bottleneck.json"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_bench import (
    DTYPES,
    convolution_weight,
    each_candidate,
    each_dtype,
    measure,
    needs_native,
    plan_of,
    random_map,
)

pytestmark = needs_native
FEATURES, MIDDLE = 256, 128


@each_candidate
@pytest.mark.parametrize(
    ("size", "batch"), [(64, 1), (32, 1), (16, 1), (8, 1), (4, 1), (32, 8)], ids=lambda n: str(n)
)
@each_dtype
def test_bottleneck(benchmark: Any, dtype: str, size: int, batch: int, candidate: str) -> None:
    x = random_map(candidate, dtype, batch, FEATURES, size, size)
    weights = [
        convolution_weight(candidate, dtype, out, channels, kernel)
        for out, channels, kernel in [
            (MIDDLE, FEATURES, 1),
            (MIDDLE, MIDDLE, 3),
            (FEATURES, MIDDLE, 1),
        ]
    ]
    biases = [torch.zeros(len(w), dtype=w.dtype) for w in weights]

    if candidate == "hgfast":
        scale, shift = torch.ones(FEATURES), torch.zeros(FEATURES)
        packed = [t for pair in zip(weights, biases, strict=True) for t in pair]
        run = plan_of(dtype, [x], lambda plan, y: plan.bottleneck(0, y, scale, shift, *packed))
    else:
        norms = [
            (torch.zeros(c), torch.ones(c), torch.ones(c), torch.zeros(c))
            for c in (FEATURES, MIDDLE, MIDDLE)
        ]
        norms = [tuple(t.to(DTYPES[dtype]) for t in norm) for norm in norms]  # type: ignore[misc]

        def run() -> torch.Tensor:
            t = x
            for norm, weight, bias, padding in zip(norms, weights, biases, (0, 1, 0), strict=True):
                t = F.conv2d(F.relu_(F.batch_norm(t, *norm)), weight, bias, padding=padding)
            return t.add_(x)

    macs = 2 * FEATURES * MIDDLE + 9 * MIDDLE * MIDDLE
    measure(
        benchmark,
        f"bottleneck {dtype} {size}x{size} batch {batch}",
        candidate,
        run,
        flops=2.0 * batch * size * size * macs,
    )
