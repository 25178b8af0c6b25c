"""What the benchmarks of single ops share.

Three candidates on the same input: eager as it comes (NCHW), eager channels_last, and a CpuPlan of
one step, weights packed, as ``hgfast.optimize`` runs it. All without gradients, with as many
threads as torch has. Every result names the kernels that ran, and its rate: GFLOP/s, or GB/s where
the op is bound by memory (bytes that must be read and written, over the median).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hgfast import _native

native: Any = _native.load()
needs_native = pytest.mark.skipif(native is None, reason=str(_native.reason))

CANDIDATES = ["eager", "eager channels_last", "hgfast"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

each_candidate = pytest.mark.parametrize("candidate", CANDIDATES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def random_map(candidate: str, dtype: str, *shape: int) -> Tensor:
    """Input in the layout in which this candidate has nothing to convert."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    return x if candidate == "eager" else x.contiguous(memory_format=torch.channels_last)


def convolution_weight(candidate: str, dtype: str, out: int, channels: int, kernel: int) -> Tensor:
    """Eager has its weights in the input's dtype and layout; a plan packs from float32."""
    weight = torch.randn(out, channels, kernel, kernel) / (channels * kernel * kernel) ** 0.5
    if candidate == "hgfast":
        return weight
    weight = weight.to(DTYPES[dtype])
    return weight if candidate == "eager" else weight.contiguous(memory_format=torch.channels_last)


def plan_of(
    dtype: str, inputs: list[Tensor], step: Callable[[Any, int], None]
) -> Callable[[], Any]:
    """A plan of the one step that ``step(plan, output)`` records over values 0, 1, ..."""
    plan = native.CpuPlan(dtype)
    output = len(inputs)
    step(plan, output)
    plan.finish(list(range(output)), [output])
    return lambda: plan.run(inputs)


def measure(
    benchmark: Any,
    group: str,
    candidate: str,
    run: Callable[[], Any],
    *,
    flops: float = 0,
    nbytes: float = 0,
) -> None:
    benchmark.group = group
    with torch.inference_mode():
        benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=3)
    if benchmark.stats is None:  # --benchmark-disable: only whether it runs
        return
    seconds = benchmark.stats.stats.median
    if flops:
        benchmark.extra_info["GFLOP/s"] = round(flops / seconds / 1e9, 1)
    if nbytes:
        benchmark.extra_info["GB/s"] = round(nbytes / seconds / 1e9, 2)
    benchmark.extra_info.update(
        path=native.last_path() if candidate == "hgfast" else f"torch {torch.__version__}",
        threads=torch.get_num_threads(),
    )
