"""hgfast::upsample_add against plain PyTorch: one rounding, so the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    MAP_DTYPES,
    is_channels_last,
    native,
    needs_native,
    random_map,
    upsample_add_reference,
)
from torch import Tensor

from hgfast import ops

pytestmark = needs_native


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    channels=st.sampled_from([1, 3, 16, 17, 40, 64]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from(MAP_DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_any_shape(
    batch: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    layouts: tuple[str, str],
) -> None:
    low = random_map(batch, channels, height, width, dtype=dtype, layout=layouts[0])
    skip = random_map(
        batch, channels, 2 * height, 2 * width, dtype=dtype, layout=layouts[1], seed=2
    )
    y = ops.upsample_add(low, skip)
    assert y.dtype == dtype
    assert is_channels_last(y)
    assert torch.equal(y, upsample_add_reference(low, skip))


@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_agrees_with_interpolate(dtype: torch.dtype) -> None:
    low, skip = random_map(1, 64, 8, 8, dtype=dtype), random_map(1, 64, 16, 16, dtype=dtype)
    expected = skip + torch.nn.functional.interpolate(low, scale_factor=2, mode="nearest")
    assert torch.equal(ops.upsample_add(low, skip), expected)
    assert native.last_path().endswith("/upsample_add")


def test_nan_stays_where_it_belongs() -> None:
    low, skip = random_map(1, 3, 2, 2), random_map(1, 3, 4, 4)
    low[0, 1, 0, 1] = torch.nan
    skip[0, 2, 3, 3] = torch.nan
    nan = ops.upsample_add(low, skip).isnan()
    assert nan.sum() == 5
    assert nan[0, 1, :2, 2:].all()
    assert nan[0, 2, 3, 3]


@pytest.mark.parametrize(
    ("low", "skip", "message"),
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(3, 4, 4), r"skip of shape \(batch,.*\[3, 4, 4\]"),
        (
            torch.zeros(1, 3, 2, 2),
            torch.zeros(1, 3, 5, 4),
            r"multiples of 2 to add.*\[1, 3, 5, 4\]",
        ),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), r"low of shape \[1, 3, 2, 2\], given"),
        (torch.zeros(2, 3, 2, 2), torch.zeros(1, 3, 4, 4), r"low of shape \[1, 3, 2, 2\], given"),
        (torch.zeros(1, 3, 2, 2).bfloat16(), torch.zeros(1, 3, 4, 4), r"expected low in Float"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 4, 4).long(), r"skip in float32 or bfloat16"),
    ],
)
def test_wrong_arguments(low: Tensor, skip: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="hgfast::upsample_add: .*" + message):
        ops.upsample_add(low, skip)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    low, skip = random_map(2, 3, 2, 3, dtype=dtype), random_map(2, 3, 4, 6, dtype=dtype)
    torch.library.opcheck(torch.ops.hgfast.upsample_add.default, (low, skip))


def test_compiles_whole() -> None:
    low, skip = random_map(1, 3, 2, 2), random_map(1, 3, 4, 4)
    compiled = torch.compile(
        lambda a, b: ops.upsample_add(a, b) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(low, skip), ops.upsample_add(low, skip) * 2)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_several_maps_and_a_relu(dtype: torch.dtype) -> None:
    skip = random_map(2, 17, 8, 16, dtype=dtype)
    lows = [random_map(2, 17, 8 // n, 16 // n, dtype=dtype, seed=n) for n in (1, 2, 4, 8)]
    total = skip.float()
    for low, n in zip(lows, (1, 2, 4, 8), strict=True):
        total = total + low.float().repeat_interleave(n, 2).repeat_interleave(n, 3)
    assert torch.equal(ops.upsample_add(lows, skip), total.to(dtype))
    assert torch.equal(ops.upsample_add(lows, skip, relu=True), total.relu().to(dtype))
    one = ops.upsample_add(lows[1], skip, relu=True)
    assert torch.equal(one, ops.upsample_add([lows[1]], skip, relu=True))
    torch.library.opcheck(torch.ops.hgfast.upsample_add.maps, (lows, skip, True))


def test_a_single_map_is_half_as_large() -> None:
    skip = torch.zeros(1, 8, 8, 8)
    for relu in (False, True):
        with pytest.raises(ValueError, match=r"low of shape \[1, 8, 4, 4\], given"):
            ops.upsample_add(torch.zeros(1, 8, 2, 2), skip, relu=relu)
