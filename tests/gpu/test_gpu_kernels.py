"""Each op on the device against plain PyTorch in float64, over shapes, dtypes and fusions."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import (
    DTYPES,
    assert_half,
    map_of,
    moved,
    multiprocessors,
    poison,
    require_device,
    some,
)
from hypothesis import HealthCheck, given, settings
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


def check_bottleneck(x: Tensor, w: Weights, low: Tensor | None = None) -> Tensor:
    poison(x.shape[0], len(w["b3"]), *x.shape[2:], dtype=x.dtype)
    y = ops.bottleneck(x, **w, low=low)
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
    check_bottleneck(x, w, half)


@EXAMPLES
@given(
    channels=st.integers(1, 40),
    middle=st.integers(1, 40),
    out=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_bottleneck_of_any_channels(
    channels: int, middle: int, out: int, dtype: torch.dtype
) -> None:
    """Also where the kernels' multiples do not fit: whatever runs then has to be right."""
    w = moved(bottleneck_weights(channels, middle, out))
    check_bottleneck(map_of(2, channels, 5, 9, dtype=dtype), w)


@each_dtype
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("many", [False, True], ids=["few blocks", "many blocks"])
@pytest.mark.parametrize("middle", [16, 32, 48, 64, 96, 128, 160, 256])
def test_every_variant_of_the_bottleneck(
    middle: int, many: bool, low: bool, project: bool, dtype: torch.dtype
) -> None:
    """The kernel's tile depends on whether the device can be filled, its chunk on the middle."""
    batch = multiprocessors() // some(4, 1) + 1 if many else 1
    height, width = (26, 34) if many else (10, 14)  # no multiples of a tile
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
    y = ops.bottleneck(x, **w)
    eager = bottleneck_reference(x, cast(w, dtype))
    assert torch.equal(y.isnan(), eager.isnan())
    finite = torch.isfinite(eager)
    assert torch.equal(torch.isfinite(y), finite)
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
    channels=st.sampled_from([1, 8, 16, 17, 40, 256]),
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


@each_dtype
@pytest.mark.parametrize("size", [64, 32, 16, 8])
def test_upsample_add_at_the_hourglass_sizes(size: int, dtype: torch.dtype) -> None:
    low = map_of(some(64, 1), 256, size // 2, size // 2, dtype=dtype)
    skip = map_of(some(64, 1), 256, size, size, dtype=dtype, seed=2)
    assert torch.equal(ops.upsample_add(low, skip), upsample_add_reference(low, skip))
