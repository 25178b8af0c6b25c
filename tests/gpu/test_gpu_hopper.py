"""The residual block's kernel for Hopper on the device: what the emulator was told of wgmma, the
copy engine, barriers and clusters is true here or it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import (
    DEVICE,
    KERNEL_DTYPES,
    REHEARSAL,
    assert_half,
    captured,
    kernels,
    map_of,
    moved,
    needs_kernels,
    poison,
    require_device,
    same_bits,
    some,
    synchronise,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import Weights, bottleneck_reference, bottleneck_weights, cast, is_channels_last
from torch import Tensor

require_device()


def why_not() -> str | None:
    kernel = getattr(kernels, "CudaHopperBottleneck", None)
    if kernel is None:
        return "this build has no kernels for Hopper: TORCH_CUDA_ARCH_LIST names no 9.0a"
    reason: str = kernel.obstacle(DEVICE, 256, 128, 256, False)
    return reason or None


pytestmark = [
    needs_kernels,
    pytest.mark.skipif(bool(kernels and why_not()), reason=str(kernels and why_not())),
]
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=["bfloat16", "float16"])


def block(w: Weights, dtype: torch.dtype) -> Any:
    names = ("scale", "shift", "w1", "b1", "w2", "b2", "w3", "b3", "wp", "bp")
    return kernels.CudaHopperBottleneck(dtype, *(w.get(name) for name in names))


def check(x: Tensor, w: Weights, low: Tensor | None = None, pooled: bool = False) -> None:
    batch, out, height, width = x.shape[0], len(w["b3"]), *x.shape[2:]
    poison(batch, out, height, width, dtype=x.dtype)
    poison(batch, out, height // 2, width // 2, dtype=x.dtype)
    y, most = block(w, x.dtype).run(x, low, pooled)
    assert is_channels_last(y)
    half = None if low is None else low.double()
    judge = bottleneck_reference(x.double(), cast(w, torch.float64), half)
    assert_half(y, bottleneck_reference(x, cast(w, x.dtype), low), judge)
    if pooled:
        assert torch.equal(most, F.max_pool2d(y.float(), 2).to(y.dtype))


@each_dtype
def test_one_tile(dtype: torch.dtype) -> None:
    """The smallest that says whether a shifted window is read as the manual seems to say."""
    check(map_of(1, 64, 16, 16, dtype=dtype), moved(bottleneck_weights(64, 128, 64)))


@settings(max_examples=some(150, 3), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(0, some(16, 1)),  # so that a cluster of an H200 has several tiles
    height=st.integers(1, some(70, 18)),
    width=st.integers(1, some(70, 18)),
    channels=st.sampled_from([64] if REHEARSAL else [64, 128, 256, 320]),
    out=st.sampled_from([0, 64] if REHEARSAL else [0, 64, 192, 256]),
    low=st.booleans(),
    pooled=st.booleans(),
    dtype=st.sampled_from(KERNEL_DTYPES),
)
def test_any_shape(
    batch: int,
    height: int,
    width: int,
    channels: int,
    out: int,
    low: bool,
    pooled: bool,
    dtype: torch.dtype,
) -> None:
    out = out or channels
    if low:
        height, width = height + height % 2, width + width % 2
    pooled = pooled and height > 1 and width > 1
    x = map_of(batch, channels, height, width, dtype=dtype)
    half = map_of(batch, out, height // 2, width // 2, dtype=dtype, seed=2) if low else None
    check(x, moved(bottleneck_weights(channels, 128, out)), half, pooled)


@each_dtype
def test_the_blocks_of_an_hourglass(dtype: torch.dtype) -> None:
    w = moved(bottleneck_weights(256, 128, 256))
    for size in (16,) if REHEARSAL else (64, 32, 16, 8, 4):
        x = map_of(some(64, 1), 256, size, size, dtype=dtype)
        low = map_of(some(64, 1), 256, size // 2, size // 2, dtype=dtype, seed=2)
        check(x, w, low, pooled=True)


@each_dtype
def test_repeats_give_the_same_bits(dtype: torch.dtype) -> None:
    ready = block(moved(bottleneck_weights(256, 128, 256)), dtype)
    x = map_of(some(9, 1), 256, some(64, 16), some(64, 16), dtype=dtype)
    low = map_of(some(9, 1), 256, some(32, 8), some(32, 8), dtype=dtype, seed=2)
    first, maximum = ready.run(x, low, True)
    for _ in range(some(10_000, 2)):
        again, most = ready.run(x, low, True)
        assert same_bits(first, again)
        assert same_bits(maximum, most)


def test_in_a_cuda_graph() -> None:
    ready = block(moved(bottleneck_weights(64, 128, 64)), torch.bfloat16)
    x = map_of(2, 64, some(40, 12), 20, dtype=torch.bfloat16)
    replay, y = captured(lambda: ready.run(x)[0])
    for seed in (3, 4):
        x.copy_(map_of(*x.shape, dtype=x.dtype, seed=seed))
        replay()
        synchronise()
        assert same_bits(y, ready.run(x)[0])
