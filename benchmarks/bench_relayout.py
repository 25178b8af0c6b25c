"""From NCHW into the kernels' layout and dtype, which a plan does at its edges. Bound by memory.

make bench PYTEST_ARGS="-k relayout --benchmark-json=relayout.json"

A plan has to have a step: one addition of the map to itself, which the others do as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_bench import DTYPES, each_dtype, measure, native, needs_native

pytestmark = needs_native


@pytest.mark.parametrize("candidate", ["eager", "hgfast"])
@pytest.mark.parametrize(
    ("channels", "size"), [(3, 256), (256, 64), (16, 64)], ids=["image", "map", "heatmaps"]
)
@each_dtype
def test_relayout(benchmark: Any, dtype: str, channels: int, size: int, candidate: str) -> None:
    x = torch.randn(1, channels, size, size)
    if candidate == "hgfast":
        plan = native.CpuPlan(dtype)
        plan.add(0, 0, 1)
        plan.finish([0], [1], as_computed=True)

        def run() -> Any:
            return plan.run([x])

        (result,) = plan.run([x])
        assert result.dtype == DTYPES[dtype]
    else:

        def run() -> Any:
            y = x.to(DTYPES[dtype], memory_format=torch.channels_last)
            return y.add_(y)

    measure(
        benchmark,
        f"relayout {channels}x{size}x{size} to {dtype}",
        candidate,
        run,
        nbytes=x.numel() * (4.0 + DTYPES[dtype].itemsize),
    )
