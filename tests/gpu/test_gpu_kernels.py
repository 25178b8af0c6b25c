"""Each op on the device against plain PyTorch in float64, over shapes, dtypes and fusions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_checks import (
    DTYPES,
    KERNEL_DTYPES,
    REHEARSAL,
    assert_half,
    block_reference,
    kernel_ops,
    kernels,
    map_of,
    moved,
    multiprocessors,
    needs_kernels,
    obstacle,
    poison,
    require_device,
    shared_limit,
    some,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from op_checks import (
    Weights,
    bottleneck_reference,
    bottleneck_weights,
    cast,
    conv_reference,
    conv_weights,
    is_channels_last,
    upsample_add_reference,
)
from torch import Tensor

from hgfast import ops

require_device()

EXAMPLES = settings(
    max_examples=some(150, 8), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def check_bottleneck(x: Tensor, w: Weights, low: Tensor | None = None, by: Any = ops) -> Tensor:
    poison(x.shape[0], len(w["b3"]), *x.shape[2:], dtype=x.dtype)
    y: Tensor = by.bottleneck(x, **w, low=low)
    assert is_channels_last(y)
    eager = bottleneck_reference(x, cast(w, x.dtype), low)
    judge = bottleneck_reference(
        x.double(), cast(w, torch.float64), None if low is None else low.double()
    )
    assert_half(y, eager, judge)
    return y


# ---- bottleneck ----


@EXAMPLES
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 21),
    width=st.integers(1, 37),
    channels=st.sampled_from([16, 32, 48, 64, 80]),
    middle=st.sampled_from([16, 32, 48, 64, 96, 128, 144]),
    out=st.sampled_from([0, 16, 32, 48, 112]),
    low=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_bottleneck_of_any_shape(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    out: int,
    low: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    out = out or channels  # as often as not an identity shortcut
    if low:
        height, width = height + height % 2, width + width % 2
    w = moved(bottleneck_weights(channels, middle, out))
    x = map_of(batch, channels, height, width, dtype=dtype, channels_last=channels_last)
    half = map_of(batch, out, height // 2, width // 2, dtype=dtype, seed=2) if low else None
    assume(not obstacle(channels, middle, out, "wp" in w))
    check_bottleneck(x, w, half)


@needs_kernels
@pytest.mark.parametrize("channels", [(24, 16, 32), (16, 24, 16), (32, 16, 40), (3, 16, 16)])
def test_channels_without_a_kernel(channels: tuple[int, int, int]) -> None:
    """The op says what it takes; a network runs such a block eagerly."""
    w = moved(bottleneck_weights(*channels))
    x = map_of(2, channels[0], 5, 9, dtype=DTYPES[0])
    assert "not multiples of 16" in obstacle(*channels, "wp" in w)
    with pytest.raises(ValueError, match="multiples of 16"):
        kernel_ops.bottleneck(x, **w)


@needs_kernels
def test_float32_is_refused() -> None:
    w = moved(bottleneck_weights(32, 16, 32))
    with pytest.raises(ValueError, match="expected bfloat16 or float16"):
        kernel_ops.bottleneck(map_of(1, 32, 4, 4, dtype=torch.float32), **w)


@needs_kernels
def test_every_variant_runs() -> None:
    """The chunk depends on the middle channels. The larger tile is taken where it gives every
    multiprocessor a block and covers at most 1.5 times the pixels of the smaller ones."""
    needed = {row["name"]: row["shared_bytes"] for row in kernels.bottleneck_variants()}
    maps = [
        ("4x8", (1, 32, 8, 16)),  # a single block of the larger tile
        ("8x16", (-(-multiprocessors() // 4), 32, 16, 32)),  # four of them an image
        ("4x8", (-(-multiprocessors() // 4), 32, 9, 17)),  # four again: 512 pixels against 288
    ]
    ran = set()
    for dtype in KERNEL_DTYPES:
        for middle in (16, 32, 48, 64, 96, 128, 160, 256):
            chunk = next((str(n) for n in (32, 64, 128) if middle <= n), "any")
            w = moved(bottleneck_weights(32, middle, 32))
            if obstacle(32, middle, 32, False):
                continue
            for tile, shape in maps:
                check_bottleneck(map_of(*shape, dtype=dtype), w, by=kernel_ops)
                path, wanted = kernels.last_path(), f"bottleneck<{str(dtype)[6:]}, {chunk}, {tile}>"
                if needed[wanted] <= shared_limit():
                    assert path == f"cuda/{wanted}", f"{middle} middle channels, {shape}"
                ran.add(path.removeprefix("cuda/"))
    assert ran <= needed.keys()
    assert ran >= {name for name, most in needed.items() if most <= shared_limit()}


@needs_kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("middle", [32, 64, 128, 160])
@pytest.mark.parametrize("norm", [False, True], ids=["bare", "norm"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("pool", [False, True], ids=["all", "pooled"])
@pytest.mark.parametrize("project", [False, True], ids=["identity", "projected"])
@pytest.mark.parametrize("low", [False, True], ids=["alone", "low"])
def test_every_fusion_of_the_bottleneck(
    dtype: torch.dtype,
    middle: int,
    norm: bool,
    relu: bool,
    pool: bool,
    project: bool,
    low: bool,
) -> None:
    """What an executor asks of the kernel beyond the op."""
    if REHEARSAL and middle > 64:
        pytest.skip("a rehearsal tries the smaller blocks")
    if reason := obstacle(32, middle, 48 if project else 32, project):
        pytest.skip(reason)
    w = moved(bottleneck_weights(32, middle, 48 if project else 32, seed=middle))
    if not norm:
        del w["scale"], w["shift"]
    height, width = (6, 10) if low else (7, 9)
    x = map_of(2, 32, *((2 * height + 1, 2 * width) if pool else (height, width)), dtype=dtype)
    out = len(w["b3"])
    half = map_of(2, out, height // 2, width // 2, dtype=dtype, seed=2) if low else None
    block = kernels.CudaBottleneck(dtype, w.get("scale"), w.get("shift"), *packed(w), relu=relu)
    poison(2, out, height, width, dtype=dtype)
    y = block.run(x, half, pool)
    assert is_channels_last(y)
    eager = block_reference(x, cast(w, dtype), half, pool=pool, relu=relu)
    exact = None if half is None else half.double()
    judge = block_reference(x.double(), cast(w, torch.float64), exact, pool=pool, relu=relu)
    assert_half(y, eager, judge)


def packed(w: Weights) -> list[Tensor | None]:
    return [w.get(name) for name in ("w1", "b1", "w2", "b2", "w3", "b3", "wp", "bp")]


@each_dtype
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("many", [False, True], ids=["few blocks", "many blocks"])
@pytest.mark.parametrize("middle", [16, 32, 48, 64, 96, 128, 160, 256])
def test_both_tiles_of_the_bottleneck(
    middle: int, many: bool, low: bool, project: bool, dtype: torch.dtype
) -> None:
    if reason := obstacle(2 * middle, middle, 2 * middle, project):
        pytest.skip(reason)
    batch = multiprocessors() // some(4, 1) + 1 if many else 1
    # No multiples of a tile. Of the larger one twelve an image, 1.4 times the smaller ones' pixels.
    height, width = (26, 34) if many else (10, 14)
    channels = 2 * middle
    w = moved(bottleneck_weights(channels, middle, channels, project=project))
    half = map_of(batch, channels, height // 2, width // 2, dtype=dtype, seed=2) if low else None
    check_bottleneck(map_of(batch, channels, height, width, dtype=dtype), w, half)


@each_dtype
@pytest.mark.parametrize("size", [64, 32, 16, 8, 4])
@pytest.mark.parametrize("batch", [1, some(16, 2)])
def test_bottleneck_at_the_hourglass_sizes(batch: int, size: int, dtype: torch.dtype) -> None:
    w = moved(bottleneck_weights(256, 128, 256))
    half = map_of(batch, 256, size // 2, size // 2, dtype=dtype, seed=2)
    check_bottleneck(map_of(batch, 256, size, size, dtype=dtype), w)
    check_bottleneck(map_of(batch, 256, size, size, dtype=dtype), w, half)


@each_dtype
def test_images_do_not_mix(dtype: torch.dtype) -> None:
    w = moved(bottleneck_weights(64, 32, 64))
    x = map_of(4, 64, 9, 11, dtype=dtype)
    y = ops.bottleneck(x, **w)
    for i in range(4):
        assert torch.equal(y[i : i + 1], ops.bottleneck(x[i : i + 1].clone(), **w))


@each_dtype
def test_the_input_is_left_alone(dtype: torch.dtype) -> None:
    w = moved(bottleneck_weights(64, 32, 64))
    x, low = map_of(2, 64, 8, 8, dtype=dtype), map_of(2, 64, 4, 4, dtype=dtype, seed=2)
    before = x.clone(), low.clone(), {name: t.clone() for name, t in w.items()}
    ops.bottleneck(x, **w, low=low)
    assert torch.equal(x, before[0])
    assert torch.equal(low, before[1])
    assert all(torch.equal(w[name], t) for name, t in before[2].items())


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_travels_as_in_eager(value: float, dtype: torch.dtype) -> None:
    """One such input value reaches the 3x3 pixels around it and its own shortcut, nothing else."""
    w = moved(bottleneck_weights(32, 16, 32))
    x = map_of(2, 32, 9, 10, dtype=dtype)
    x[1, 3, 4, 5] = value
    y = ops.bottleneck(x, **w).cpu()
    # On the CPU: a convolution in tiles, as cuDNN has them, spreads a NaN over a whole tile.
    on_cpu = {name: t.cpu().double() for name, t in w.items()}
    expected = bottleneck_reference(x.cpu().double(), on_cpu)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(torch.isfinite(y), torch.isfinite(expected))
    assert torch.isfinite(y[0]).all()


# ---- conv ----


@EXAMPLES
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 19),
    width=st.integers(1, 23),
    channels=st.sampled_from([3, 16, 24, 64]),
    out=st.sampled_from([1, 16, 17, 64]),
    kernel=st.sampled_from([1, 3, 7]),
    stride=st.sampled_from([1, 2]),
    norm=st.booleans(),
    relu=st.booleans(),
    add=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_conv(
    batch: int,
    height: int,
    width: int,
    channels: int,
    out: int,
    kernel: int,
    stride: int,
    norm: bool,
    relu: bool,
    add: bool,
    dtype: torch.dtype,
) -> None:
    padding = kernel // 2
    w = moved(conv_weights(channels, out, (kernel, kernel), norm=norm))
    x = map_of(batch, channels, height, width, dtype=dtype)
    size = [(n + 2 * padding - kernel) // stride + 1 for n in (height, width)]
    other = map_of(batch, out, *size, dtype=dtype, seed=2) if add else None
    poison(batch, out, *size, dtype=dtype)
    y = ops.conv(x, **w, stride=stride, padding=padding, relu=relu, add=other)
    assert is_channels_last(y)
    eager = conv_reference(x, cast(w, dtype), stride, padding, relu, other)
    exact = cast(w, torch.float64)
    add64 = None if other is None else other.double()
    assert_half(y, eager, conv_reference(x.double(), exact, stride, padding, relu, add64))


# ---- upsample_add ----


@EXAMPLES
@given(
    batch=st.integers(0, 3),
    channels=st.sampled_from([8, 16, 24, 40, 256]),
    height=st.integers(1, 9),
    width=st.integers(1, 19),
    dtype=st.sampled_from(DTYPES),
)
def test_upsample_add(
    batch: int, channels: int, height: int, width: int, dtype: torch.dtype
) -> None:
    """One sum, rounded once: eager's bits."""
    low = map_of(batch, channels, height, width, dtype=dtype)
    skip = map_of(batch, channels, 2 * height, 2 * width, dtype=dtype, seed=2)
    poison(*skip.shape, dtype=dtype)
    y = ops.upsample_add(low, skip)
    assert is_channels_last(y)
    assert torch.equal(y, upsample_add_reference(low, skip))


@EXAMPLES
@given(
    batch=st.integers(0, 2),
    channels=st.sampled_from([8, 16, 24, 40]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 5),
    shifts=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    relu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_upsample_add_of_several_maps(
    batch: int,
    channels: int,
    rows: int,
    columns: int,
    shifts: list[int],
    relu: bool,
    dtype: torch.dtype,
) -> None:
    """Sums in float32 and in the given order, rounded once."""
    height, width = 8 * rows, 8 * columns
    skip = map_of(batch, channels, height, width, dtype=dtype)
    lows = [
        map_of(batch, channels, height >> shift, width >> shift, dtype=dtype, seed=2 + i)
        for i, shift in enumerate(shifts)
    ]
    poison(*skip.shape, dtype=dtype)
    y = ops.upsample_add(lows, skip, relu=relu)
    expected = skip.float()
    for low, shift in zip(lows, shifts, strict=True):
        n = 1 << shift
        expected = expected + low.float().repeat_interleave(n, 2).repeat_interleave(n, 3)
    expected = torch.relu(expected) if relu else expected
    assert is_channels_last(y)
    assert torch.equal(y, expected.to(dtype))


@each_dtype
@pytest.mark.parametrize("size", [64, 32, 16, 8])
def test_upsample_add_at_the_hourglass_sizes(size: int, dtype: torch.dtype) -> None:
    low = map_of(some(64, 1), 256, size // 2, size // 2, dtype=dtype)
    skip = map_of(some(64, 1), 256, size, size, dtype=dtype, seed=2)
    assert torch.equal(ops.upsample_add(low, skip), upsample_add_reference(low, skip))
