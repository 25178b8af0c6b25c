"""hgfast::conv against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    MAP_DTYPES,
    Weights,
    assert_close_bfloat16,
    assert_close_float32,
    cast,
    conv_reference,
    conv_weights,
    is_channels_last,
    laid_out,
    native,
    needs_native,
    random_map,
    run_step,
)
from torch import Tensor

from hgfast import ops

pytestmark = needs_native

Pair = tuple[int, int]


def check(
    x: Tensor,
    w: Weights,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    relu: bool = False,
    add: Tensor | None = None,
    dilation: Pair = (1, 1),
    relu_sum: bool = False,
) -> None:
    y = ops.conv(
        x,
        **w,
        stride=stride,
        padding=padding,
        relu=relu,
        add=add,
        dilation=dilation,
        relu_sum=relu_sum,
    )
    reference = conv_reference(
        x.double(),
        cast(w, torch.float64),
        stride,
        padding,
        relu,
        None if add is None else add.double(),
        dilation,
        relu_sum,
    )
    if x.dtype == torch.float32:
        assert_close_float32(y, reference)
    else:
        eager = conv_reference(x, cast(w, x.dtype), stride, padding, relu, add, dilation, relu_sum)
        assert_close_bfloat16(y, eager, reference)
    assert is_channels_last(y)


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 3),
    extra=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    channels=st.sampled_from([1, 3, 4, 16, 20, 33]),
    out=st.sampled_from([1, 5, 16, 40, 100]),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    norm=st.booleans(),
    relu=st.booleans(),
    add=st.booleans(),
    relu_sum=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(
    batch: int,
    extra: Pair,
    channels: int,
    out: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    norm: bool,
    relu: bool,
    add: bool,
    relu_sum: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + e
        for k, p, d, e in zip(kernel, padding, dilation, extra, strict=True)
    )
    w = conv_weights(channels, out, kernel, norm=norm)
    x = random_map(batch, channels, height, width, dtype=dtype, layout=layout)
    result = conv_reference(x.float(), w, stride, padding, dilation=dilation).shape
    other = random_map(*result, dtype=dtype, layout=layout, seed=2) if add else None
    check(x, w, stride, padding, relu, other, dilation, relu_sum)


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    channels=st.integers(1, 4),
    out=st.sampled_from([5, 16, 72]),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    norm=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from(MAP_DTYPES),
    high=st.booleans(),
)
def test_the_bits_of_few_channels(
    size: Pair,
    channels: int,
    out: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    norm: bool,
    threads: int,
    dtype: torch.dtype,
    high: bool,
) -> None:
    """Whatever the layout, the other images, and how threads share the rows."""
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    w = conv_weights(channels, out, kernel, norm=norm)
    x = random_map(3, channels, *size, dtype=dtype)

    def run(x: Tensor) -> Tensor:
        def step(plan: Any, y: int) -> None:
            plan.conv(0, y, **w, stride=stride, padding=padding)

        return run_step(dtype, [x], step, high and dtype == torch.float32)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = torch.cat([run(image) for image in x.split(1)])
        torch.set_num_threads(threads)
        for layout in LAYOUTS:
            assert torch.equal(run(laid_out(x, layout)), expected)
    finally:
        torch.set_num_threads(before)


def test_few_channels_far_apart() -> None:
    """Windows between which most of x is skipped take no memory for what they skip."""
    w = conv_weights(3, 8, (3, 3))
    x = random_map(1, 3, 9, 9, dtype=torch.bfloat16)
    check(x, w, (1, 10**9), (1, 1))


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize(("channels", "width"), [(3, 523), (4, 1100)])
def test_rows_that_are_longer_than_a_block(dtype: torch.dtype, channels: int, width: int) -> None:
    x = random_map(2, channels, 9, width, dtype=dtype, layout="channels_last")
    check(x, conv_weights(channels, 16, (7, 7)), (2, 2), (3, 3), relu=True)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_nan_and_infinity_reach_no_window_but_their_own(dtype: torch.dtype) -> None:
    """Of few channels, whose windows overlap in memory, and are padded there."""
    x = random_map(1, 3, 20, 40, dtype=dtype)
    x[0, 1, 3, 9], x[0, 2, 14, 30] = torch.nan, torch.inf
    for kernel in ((7, 7), (3, 3), (2, 5)):
        w = conv_weights(3, 16, kernel)
        y = ops.conv(x, **w, stride=(2, 1), padding=(1, 1))
        exact = conv_reference(x.double(), cast(w, torch.float64), (2, 1), (1, 1))
        assert torch.equal(y.isfinite(), exact.isfinite())
        assert torch.equal(y.isnan(), exact.isnan())


# What a stacked hourglass asks for: (channels, out, kernel, stride, padding, norm, relu, size).
NETWORK = [
    pytest.param(3, 64, 7, 2, 3, False, True, 128, id="stem"),
    pytest.param(256, 256, 1, 1, 0, False, True, 32, id="1x1 before the heatmaps"),
    pytest.param(256, 16, 1, 1, 0, False, False, 64, id="heatmaps"),
    pytest.param(16, 256, 1, 1, 0, False, False, 64, id="remerge"),
    pytest.param(128, 128, 3, 1, 1, True, False, 32, id="3x3 of a residual"),
]


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "padding", "norm", "relu", "size"), NETWORK
)
def test_the_hourglass_convolutions(
    dtype: torch.dtype,
    channels: int,
    out: int,
    kernel: int,
    stride: int,
    padding: int,
    norm: bool,
    relu: bool,
    size: int,
) -> None:
    w = conv_weights(channels, out, (kernel, kernel), norm=norm)
    x = random_map(1, channels, size, size, dtype=dtype, layout="channels_last")
    check(x, w, (stride, stride), (padding, padding), relu)
    assert native.last_path().endswith("/conv")


def test_one_number_for_stride_and_padding() -> None:
    w = conv_weights(3, 8, (3, 3))
    x = random_map(1, 3, 9, 9)
    expected = ops.conv(x, **w, stride=(2, 2), padding=(1, 1))
    assert torch.equal(ops.conv(x, **w, stride=2, padding=1), expected)
    assert expected.shape == (1, 8, 5, 5)
    expected = ops.conv(x, **w, dilation=(2, 2))
    assert torch.equal(ops.conv(x, **w, dilation=2), expected)
    assert expected.shape == (1, 8, 5, 5)


def test_padding_comes_after_the_norm() -> None:
    """The border sees zeros, not relu(shift)."""
    w = conv_weights(4, 8, (3, 3), norm=True)
    w["shift"] = torch.full((4,), 10.0)
    check(random_map(1, 4, 3, 3), w, padding=(1, 1))


def test_add_comes_after_the_relu() -> None:
    w = conv_weights(4, 8, (1, 1))
    add = torch.full((1, 8, 3, 3), -100.0)
    assert (ops.conv(random_map(1, 4, 3, 3), **w, relu=True, add=add) < -50).all()


def test_the_second_relu_comes_after_the_sum() -> None:
    w = conv_weights(4, 8, (1, 1))
    add = torch.full((1, 8, 3, 3), -100.0)
    assert (ops.conv(random_map(1, 4, 3, 3), **w, add=add, relu_sum=True) == 0).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_images_do_not_mix(dtype: torch.dtype, norm: bool, threads: int) -> None:
    """Whether threads share pixels or channels, a block of pixels of several images or one."""
    w = conv_weights(48, 96, (3, 3), norm=norm)
    x = random_map(5, 48, 4, 5, dtype=dtype)
    expected = [ops.conv(image, **w, stride=(1, 2), padding=1) for image in x.split(1)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = ops.conv(x, **w, stride=(1, 2), padding=1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, torch.cat(expected))


def test_a_row_of_more_pixels_than_a_product_takes() -> None:
    for norm in (False, True):
        check(random_map(1, 17, 2, 600), conv_weights(17, 9, (3, 3), norm=norm), padding=(1, 1))


def test_a_kernel_that_reaches_far_outside() -> None:
    w = conv_weights(16, 8, (2, 2), norm=True)
    check(random_map(3, 16, 2, 2, dtype=torch.bfloat16), w, (7, 1), (9, 9), dilation=(3, 5))


def test_repeats_give_the_same_bits() -> None:
    w = conv_weights(33, 40, (3, 3), norm=True)
    x = random_map(2, 33, 17, 19)
    y = ops.conv(x, **w, padding=1)
    assert all(torch.equal(y, ops.conv(x, **w, padding=1)) for _ in range(10))


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_nan_stays_where_it_belongs(dtype: torch.dtype, norm: bool, relu: bool) -> None:
    w = conv_weights(5, 20, (3, 3), norm=norm)
    x = random_map(1, 5, 8, 8, dtype=dtype)
    x[0, 2, 3, 3] = torch.nan
    y = ops.conv(x, **w, padding=1, relu=relu)
    assert torch.equal(y.isnan(), conv_reference(x, cast(w, dtype), 1, 1, relu).isnan())
    assert y.isnan().sum() == 9 * 20


X = torch.zeros(1, 3, 8, 8)
W = conv_weights(3, 4, (3, 3), norm=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, r"x of shape \(batch, channels, .*given \[3, 8, 8\]"),
        ({"x": torch.zeros(1, 4, 8, 8)}, r"expected x of 3 channels.*given \[1, 4, 8, 8\]"),
        ({"x": torch.zeros(1, 3, 2, 8)}, r"as large as the kernel of 3x3, given \[1, 3, 2, 8\]"),
        ({"x": X.byte()}, r"expected x in float32 or bfloat16, given Byte"),
        ({"x": X.double()}, r"expected x in float32 or bfloat16, given Double"),
        ({"weight": torch.zeros(4, 3, 3)}, r"weight of shape \(out, in,.*given \[4, 3, 3\]"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, r"weight that is not empty, given \[0, 3, 3, 3\]"),
        (
            {"weight": W["weight"].double()},
            r"expected weight in float32, bfloat16 or float16.*Double",
        ),
        ({"bias": torch.zeros(5)}, r"expected bias of shape \[4\], given \[5\]"),
        ({"scale": None}, r"both scale and shift or neither, given only shift"),
        ({"shift": torch.zeros(4)}, r"expected shift of shape \[3\], given \[4\]"),
        ({"stride": (0, 1)}, r"strides of at least 1, given \[0, 1\]"),
        ({"padding": (0, -1)}, r"paddings of at least 0, given \[0, -1\]"),
        ({"dilation": (1, 0)}, r"dilations of at least 1, given \[1, 0\]"),
        ({"dilation": (1, 4)}, r"as large as the kernel of 3x9, given \[1, 3, 8, 8\]"),
        ({"add": torch.zeros(1, 4, 8, 8)}, r"add of shape \[1, 4, 6, 6\], given \[1, 4, 8, 8\]"),
        ({"add": torch.zeros(1, 4, 6, 6).bfloat16()}, r"expected add in Float.*given BFloat16"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, **W, **change}
    with pytest.raises(ValueError, match="hgfast::conv: .*" + message):
        ops.conv(**arguments)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(dtype: torch.dtype, full: bool) -> None:
    w = conv_weights(3, 8, (3, 5), norm=full)
    x = random_map(2, 3, 9, 8, dtype=dtype)
    options: dict[str, Any] = {}
    if full:
        options = {"stride": [2, 1], "padding": [1, 2], "relu": True, "dilation": [2, 1]}
        options["add"] = random_map(2, 8, 4, 8, dtype=dtype)
        options["relu_sum"] = True
    torch.library.opcheck(torch.ops.hgfast.conv.default, (x, *w.values()), options)


def test_compiles_whole() -> None:
    w = conv_weights(3, 8, (3, 3))
    x = random_map(1, 3, 6, 6)
    compiled = torch.compile(
        lambda x: ops.conv(x, **w, padding=1, relu=True) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ops.conv(x, **w, padding=1, relu=True) * 2)
