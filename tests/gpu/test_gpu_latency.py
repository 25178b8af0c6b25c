"""The residual block over clusters of blocks on a Hopper GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_checks import (
    DEVICE,
    KERNEL_DTYPES,
    REHEARSAL,
    assert_half,
    block_reference,
    captured,
    kernels,
    map_of,
    moved,
    multiprocessors,
    needs_kernels,
    poison,
    require_device,
    same_bits,
    some,
    synchronise,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import LAYOUTS, Weights, bottleneck_weights, cast, is_channels_last, laid_out
from torch import Tensor


def why_not() -> str | None:
    if not hasattr(kernels, "CudaLatencyBottleneck"):
        return "needs a build for compute capability 9.0a"
    reason: str = kernels.CudaLatencyBottleneck.obstacle(DEVICE, 256, 128, 256, False)
    return reason or None


require_device()
pytestmark = [
    needs_kernels,
    pytest.mark.skipif(kernels is not None and why_not() is not None, reason=str(why_not())),
]

EXAMPLES = settings(
    max_examples=some(300, 6), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=["bfloat16", "float16"])
ORDER = ("scale", "shift", "w1", "b1", "w2", "b2", "w3", "b3", "wp", "bp")


def packed(w: Weights, dtype: torch.dtype, relu: bool = False) -> Any:
    return kernels.CudaLatencyBottleneck(dtype, *(w.get(name) for name in ORDER), relu=relu)


def check(
    x: Tensor, w: Weights, low: Tensor | None = None, pool: bool = False, relu: bool = False
) -> None:
    """Three launches one behind the other; all but the first may begin early."""
    block = packed(w, x.dtype, relu)
    half = 2 if pool else 1
    poison(x.shape[0], len(w["b3"]), x.shape[2] // half, x.shape[3] // half, dtype=x.dtype)
    results = [block.run(x, low, pool) for _ in range(3)]
    for y in results[1:]:
        assert same_bits(y, results[0])
    assert is_channels_last(results[0])
    eager = block_reference(x, cast(w, x.dtype), low, pool=pool, relu=relu)
    exact = None if low is None else low.double()
    judge = block_reference(x.double(), cast(w, torch.float64), exact, pool=pool, relu=relu)
    assert_half(results[0], eager, judge)


@EXAMPLES
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    channels=st.sampled_from([16, 32, 80, 256]),
    middle=st.sampled_from([32, 64, 96, 128]),
    out=st.sampled_from([0, 32, 64, 192]),
    norm=st.booleans(),
    pool=st.booleans(),
    low=st.booleans(),
    relu=st.booleans(),
    dtype=st.sampled_from(KERNEL_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    out: int,
    norm: bool,
    pool: bool,
    low: bool,
    relu: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    if low:
        height, width = 2 * height, 2 * width
    out = out or -(-channels // 32) * 32
    w = moved(bottleneck_weights(channels, middle, out, norm=norm))
    size = (2 * height, 2 * width) if pool else (height, width)
    x = laid_out(map_of(batch, channels, *size, dtype=dtype), layout)
    half = map_of(batch, out, height // 2, width // 2, dtype=dtype, seed=2) if low else None
    check(x, w, half, pool, relu)


@each_dtype
@pytest.mark.parametrize("size", [some(64, 5), some(32, 9), some(16, 3), 8, 4, 2])
@pytest.mark.parametrize("batch", [1, some(8, 2)])
def test_at_the_hourglass_sizes(batch: int, size: int, dtype: torch.dtype) -> None:
    """From clusters of eight blocks for one tile to clusters of two for as many as there are."""
    w = moved(bottleneck_weights(256, 128, 256))
    check(map_of(batch, 256, size, size, dtype=dtype), w)
    if size % 2 == 0:
        half = map_of(batch, 256, size // 2, size // 2, dtype=dtype, seed=2)
        check(map_of(batch, 256, size, size, dtype=dtype), w, half)


@pytest.mark.parametrize("size", [8, 4])
def test_a_chain_of_blocks_in_a_graph(size: int) -> None:
    """Each begins before the one in front has ended, and reads what that one writes."""
    blocks = [
        packed(moved(bottleneck_weights(256, 128, 256, seed=i)), torch.float16) for i in (1, 2)
    ]
    x = map_of(1, 256, size, size, dtype=torch.float16)

    def run(between: Callable[[], None]) -> Tensor:
        y = x
        for _ in range(some(20, 2)):
            for block in blocks:
                y = block.run(y)
                between()
            y = y * 0.25
        return y

    def call() -> Tensor:
        return run(lambda: None)

    expected = run(synchronise)
    replay, output = captured(call)
    for _ in range(some(100, 1)):
        output.fill_(torch.nan)
        replay()
        synchronise()
        assert same_bits(output, expected)


@each_dtype
@pytest.mark.parametrize(("batch", "size"), [(1, 16), (some(8, 2), some(16, 8))])
def test_a_chain_in_one_launch(batch: int, size: int, dtype: torch.dtype) -> None:
    """What lies below 16x16 in an hourglass, against the same blocks one by one."""
    steps = [(-1, True, -1), (0, True, -1), (1, False, -1), (2, False, -1), (0, False, 3)]
    steps.append((4, False, -1))
    blocks = [
        packed(moved(bottleneck_weights(256, 128, 256, seed=i)), dtype) for i in range(len(steps))
    ]
    chain = kernels.CudaLatencySubtree(blocks, steps)
    x = map_of(batch, 256, size, size, dtype=dtype)
    results: list[Tensor] = []
    for block, (source, pool, low) in zip(blocks, steps, strict=True):
        other = None if low < 0 else results[low]
        results.append(block.run(x if source < 0 else results[source], other, pool))
    first = chain.run(x)
    if multiprocessors() >= 8 * batch:
        assert same_bits(first, results[-1])
    else:  # fewer blocks share a tile, and split conv2's sum otherwise
        apart = (first.float() - results[-1].float()).abs()
        assert apart.max() <= 2**-5 * results[-1].float().abs().max()
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(some(10_000, 1)):
        wrong += ~same_bits(chain.run(x), first)
    assert int(wrong) == 0


@each_dtype
@pytest.mark.parametrize("size", [some(64, 5), some(32, 6), 8])
def test_repeats_give_the_same_bits(size: int, dtype: torch.dtype) -> None:
    block = packed(moved(bottleneck_weights(256, 128, 256)), dtype)
    x = map_of(1, 256, size, size, dtype=dtype)
    first = block.run(x)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(some(10_000, 2)):
        wrong += ~same_bits(block.run(x), first)
    assert int(wrong) == 0


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no streams")
def test_a_launch_behind_one_that_still_writes_its_input() -> None:
    """The input comes late, from a kernel that lets nobody begin early, and from one that does."""
    block = packed(moved(bottleneck_weights(256, 128, 256)), torch.bfloat16)
    x = map_of(1, 256, 64, 64, dtype=torch.bfloat16)
    expected = block.run(block.run(x))
    y = torch.zeros_like(x)
    busy = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(50):
        y.zero_()
        synchronise()
        for _ in range(3):
            busy = busy @ busy * 1e-4
        y.copy_(x)
        assert same_bits(block.run(block.run(y)), expected)
