"""The steps of CpuPlan that are no operators: each alone in a plan, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    MAP_DTYPES,
    Weights,
    assert_close_bfloat16,
    assert_close_float32,
    cast,
    conv_transpose_reference,
    conv_transpose_weights,
    native,
    needs_native,
    random_map,
    run_step,
)
from torch import Tensor

pytestmark = needs_native

Pair = tuple[int, int]
pairs = st.tuples


# ---- conv_transpose ----


def check_conv_transpose(
    x: Tensor,
    w: Weights,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    output_padding: Pair = (0, 0),
    relu: bool = False,
    add: Tensor | None = None,
    relu_sum: bool = False,
) -> None:
    inputs = [x] if add is None else [x, add]
    y = run_step(
        x.dtype,
        inputs,
        lambda plan, out: plan.conv_transpose(
            0,
            out,
            w["weight"],
            w["bias"],
            stride,
            padding,
            output_padding,
            relu,
            None if add is None else 1,
            relu_sum,
        ),
    )
    double = None if add is None else add.double()
    reference = conv_transpose_reference(
        x.double(), cast(w, torch.float64), stride, padding, output_padding, relu, double, relu_sum
    )
    if x.dtype == torch.float32:
        assert_close_float32(y, reference)
    else:
        eager = conv_transpose_reference(
            x, cast(w, x.dtype), stride, padding, output_padding, relu, add, relu_sum
        )
        assert_close_bfloat16(y, eager, reference)


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(0, 3),
    size=pairs(st.integers(1, 7), st.integers(1, 7)),
    channels=st.sampled_from([1, 3, 16, 20, 33]),
    out=st.sampled_from([1, 5, 16, 40, 100]),
    kernel=pairs(st.integers(1, 5), st.integers(1, 5)),
    stride=pairs(st.integers(1, 4), st.integers(1, 4)),
    padding=pairs(st.integers(0, 3), st.integers(0, 3)),
    output_padding=pairs(st.integers(0, 3), st.integers(0, 3)),
    relu=st.booleans(),
    add=st.booleans(),
    relu_sum=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_conv_transpose_of_any_shape(
    batch: int,
    size: Pair,
    channels: int,
    out: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    relu: bool,
    add: bool,
    relu_sum: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    assume(all(o < s for o, s in zip(output_padding, stride, strict=True)))
    height, width = (
        (n - 1) * s - 2 * p + k + o
        for n, s, p, k, o in zip(size, stride, padding, kernel, output_padding, strict=True)
    )
    assume(height > 0)
    assume(width > 0)
    w = conv_transpose_weights(channels, out, kernel)
    x = random_map(batch, channels, *size, dtype=dtype, layout=layout)
    other = random_map(batch, out, height, width, dtype=dtype, seed=2) if add else None
    check_conv_transpose(x, w, stride, padding, output_padding, relu, other, relu_sum)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize(
    ("channels", "kernel", "padding", "output_padding", "size"),
    [(256, 4, 1, 0, 8), (64, 3, 1, 1, 12), (34, 4, 1, 0, 16), (64, 2, 0, 0, 16)],
)
def test_the_heads_of_pose_networks(
    dtype: torch.dtype, channels: int, kernel: int, padding: int, output_padding: int, size: int
) -> None:
    w = conv_transpose_weights(channels, 64, (kernel, kernel))
    x = random_map(2, channels, size, size * 3 // 4, dtype=dtype, layout="channels_last")
    around, beyond = (padding, padding), (output_padding, output_padding)
    check_conv_transpose(x, w, (2, 2), around, beyond, relu=True)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_conv_transpose_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    w = conv_transpose_weights(40, 96, (4, 3))
    x = random_map(3, 40, 5, 6, dtype=dtype)

    def run(x: Tensor) -> Tensor:
        return run_step(
            dtype,
            [x],
            lambda plan, y: plan.conv_transpose(0, y, w["weight"], w["bias"], (2, 2), (1, 0)),
        )

    expected = torch.cat([run(image) for image in x.split(1)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(run(x), expected)
    finally:
        torch.set_num_threads(before)


def test_conv_transpose_keeps_nan_where_it_belongs() -> None:
    w = conv_transpose_weights(16, 8, (4, 4))
    x = random_map(1, 16, 6, 6)
    x[0, 3, 2, 2] = torch.nan
    y = run_step(
        torch.float32,
        [x],
        lambda plan, out: plan.conv_transpose(
            0, out, w["weight"], w["bias"], (2, 2), (1, 1), relu=True
        ),
    )
    assert torch.equal(y.isnan(), F.conv_transpose2d(x, w["weight"], w["bias"], 2, 1).isnan())
    assert y.isnan().sum() == 16 * 8


# ---- pool ----


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["max", "avg"]),
    batch=st.integers(0, 3),
    size=pairs(st.integers(1, 12), st.integers(1, 12)),
    channels=st.sampled_from([1, 3, 16, 33]),
    kernel=pairs(st.integers(1, 5), st.integers(1, 5)),
    stride=pairs(st.integers(1, 4), st.integers(1, 4)),
    padding=pairs(st.integers(0, 2), st.integers(0, 2)),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_pool_of_any_shape(
    mode: str,
    batch: int,
    size: Pair,
    channels: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    x = random_map(batch, channels, *size, dtype=dtype, layout=layout)
    y = run_step(
        dtype,
        [x],
        lambda plan, out: plan.pool(
            0, out, mode, kernel, stride, padding, ceil_mode, count_include_pad
        ),
    )
    if mode == "max":
        assert torch.equal(y, F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode))
        return
    reference = F.avg_pool2d(x.double(), kernel, stride, padding, ceil_mode, count_include_pad)
    if dtype == torch.float32:
        assert_close_float32(y, reference, 1e-6)
    else:
        eager = F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad)
        assert_close_bfloat16(y, eager, reference)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_nan_wins_in_a_pool(kernel: int) -> None:
    for dtype in MAP_DTYPES:
        x = random_map(1, 17, 9, 11, dtype=dtype)
        x[0, 3, 4, 4] = torch.nan
        x[0, 5] = -torch.inf
        for mode, eager in (("max", F.max_pool2d), ("avg", F.avg_pool2d)):
            y = run_step(
                dtype,
                [x],
                lambda plan, out, mode=mode: plan.pool(
                    0, out, mode, (kernel, kernel), (1, 1), (kernel // 2, kernel // 2)
                ),
            )
            expected: Any = eager(x, kernel, 1, kernel // 2)
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y[0, 5], expected[0, 5])


# ---- concat, upsample_add, add ----


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    size=pairs(st.integers(1, 9), st.integers(1, 9)),
    channels=st.lists(st.sampled_from([1, 3, 16, 33]), min_size=1, max_size=6),
    add=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_concat_of_any_shape(
    batch: int, size: Pair, channels: list[int], add: bool, dtype: torch.dtype, layout: str
) -> None:
    maps = [
        random_map(batch, c, *size, dtype=dtype, layout=layout, seed=i)
        for i, c in enumerate(channels)
    ]
    expected = torch.cat(maps, 1)
    inputs, other = list(range(len(maps))), None
    if add:
        maps.append(random_map(*expected.shape, dtype=dtype, seed=99))
        expected, other = expected + maps[-1], len(maps) - 1
    y = run_step(dtype, maps, lambda plan, out: plan.concat(inputs, out, other))
    assert torch.equal(y, expected)


def test_a_map_may_be_concatenated_with_itself() -> None:
    x = random_map(1, 5, 3, 3)
    y = run_step(torch.float32, [x], lambda plan, out: plan.concat([0, 0], out))
    assert torch.equal(y, torch.cat([x, x], 1))


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_upsample_add_of_several_maps(dtype: torch.dtype, relu: bool) -> None:
    skip = random_map(2, 17, 8, 16, dtype=dtype)
    factors = [4, 1, 8, 2]
    lows = [random_map(2, 17, 8 // n, 16 // n, dtype=dtype, seed=n) for n in factors]
    y = run_step(
        dtype,
        [*lows, skip],
        lambda plan, out: plan.upsample_add([0, 1, 2, 3], factors, 4, out, relu),
    )
    assert torch.equal(y, torch.ops.hgfast.upsample_add.maps(lows, skip, relu))


@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_add_and_its_relu(dtype: torch.dtype) -> None:
    a, b = random_map(1, 19, 5, 7, dtype=dtype), random_map(1, 19, 5, 7, dtype=dtype, seed=2)
    a[0, 3, 2, 2] = torch.nan
    for relu in (False, True):
        y = run_step(dtype, [a, b], lambda plan, out, relu=relu: plan.add(0, 1, out, relu))
        expected = (a + b).relu() if relu else a + b
        assert torch.equal(y.nan_to_num(99), expected.nan_to_num(99))
        assert torch.equal(y.isnan(), expected.isnan())


# ---- errors ----


W = conv_transpose_weights(3, 4, (3, 3))


def transposed(**change: Any) -> Callable[[Any], None]:
    return lambda plan: plan.conv_transpose(0, 1, **{**W, **change})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            transposed(weight=torch.zeros(3, 4, 3)),
            r"conv_transpose\): .*weight of shape \(in, out,",
        ),
        (transposed(weight=torch.zeros(3, 0, 3, 3)), r"weight that is not empty"),
        (transposed(bias=torch.zeros(3)), r"expected bias of shape \[4\], given \[3\]"),
        (transposed(stride=(0, 1)), r"strides of at least 1, given \[0, 1\]"),
        (transposed(padding=(-1, 0)), r"paddings of at least 0, given \[-1, 0\]"),
        (transposed(output_padding=(0, 1)), r"below the strides of \[1, 1\], given \[0, 1\]"),
        (
            lambda p: p.pool(0, 1, "min", (2, 2), (2, 2)),
            r"pool\): .*\"max\" or \"avg\", given \"min",
        ),
        (
            lambda p: p.pool(0, 1, "max", (0, 2), (2, 2)),
            r"kernel sizes of at least 1, given \[0, 2",
        ),
        (lambda p: p.pool(0, 1, "max", (2, 2), (2, 0)), r"strides of at least 1, given \[2, 0\]"),
        (
            lambda p: p.pool(0, 1, "avg", (2, 3), (2, 2), (0, 2)),
            r"at most half the kernel of \[2, 3",
        ),
        (lambda p: p.concat([], 1), r"concat\): expected 1 to 16 maps to concatenate, given 0"),
        (lambda p: p.concat(list(range(17)), 17), r"1 to 16 maps to concatenate, given 17"),
        (lambda p: p.upsample_add([], [], 0, 1), r"upsample_add\): expected 1 to 4 maps.*given 0"),
        (lambda p: p.upsample_add([0], [2, 2], 1, 2), r"a factor for each map, given 2 for 1"),
        (lambda p: p.upsample_add([0], [3], 1, 2), r"factors out of 1, 2, 4, 8, given 3"),
        (lambda p: p.upsample_add([0], [16], 1, 2), r"factors out of 1, 2, 4, 8, given 16"),
    ],
)
def test_steps_that_make_no_sense(record: Callable[[Any], None], message: str) -> None:
    plan = native.CpuPlan("float32")
    with pytest.raises(ValueError, match=message):
        record(plan)
    plan.add(0, 0, 1)  # nothing was recorded
    plan.finish([0], [1])


@pytest.mark.parametrize(
    ("shapes", "record", "message"),
    [
        (
            [(1, 4, 5, 5)],
            transposed(),
            r"conv_transpose\): expected x of 3 channels.*\[1, 4, 5, 5\]",
        ),
        ([(1, 3, 1, 5)], transposed(padding=(2, 0)), r"at least one row.*given \[1, 3, 1, 5\]"),
        (
            [(1, 3, 2, 2), (1, 4, 2, 2)],
            lambda p: p.conv_transpose(0, 2, **W, add=1),
            r"expected add of shape \[1, 4, 4, 4\], given \[1, 4, 2, 2\]",
        ),
        (
            [(1, 3, 2, 4)],
            lambda p: p.pool(0, 1, "max", (3, 3), (1, 1)),
            r"pool\): .*as large as the window of 3x3, given \[1, 3, 2, 4\]",
        ),
        (
            [(1, 3, 4, 4), (2, 5, 4, 4)],
            lambda p: p.concat([0, 1], 2),
            r"concat\): expected input 1 of shape \[1, 5, 4, 4\], given \[2, 5, 4, 4\]",
        ),
        (
            [(1, 3, 4, 4), (1, 5, 4, 4)],
            lambda p: p.concat([0, 0], 2, 1),
            r"expected add of shape \[1, 6, 4, 4\], given \[1, 5, 4, 4\]",
        ),
        (
            [(1, 3, 1, 1), (1, 3, 4, 4)],
            lambda p: p.upsample_add([0], [2], 1, 2),
            r"upsample_add\): expected low of shape \[1, 3, 2, 2\], given \[1, 3, 1, 1\]",
        ),
    ],
)
def test_inputs_that_do_not_fit(
    shapes: list[tuple[int, ...]], record: Callable[[Any], None], message: str
) -> None:
    plan = native.CpuPlan("float32")
    record(plan)
    plan.finish(list(range(len(shapes))), [len(shapes)])
    with pytest.raises(ValueError, match=message):
        plan.run([torch.zeros(shape) for shape in shapes])


# ---- memory that plans share ----


def test_plans_share_an_arena() -> None:
    arena = native.Arena()
    x = random_map(1, 64, 40, 40, layout="channels_last")
    w = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0)) / 24

    def chain(arena: Any) -> Any:
        plan = native.CpuPlan("float32", arena)
        for i in range(3):
            plan.conv(i, i + 1, w, torch.zeros(64), padding=(1, 1))
        plan.finish([0], [3])
        return plan

    expected = chain(None).run([x])[0]
    plans = [chain(arena) for _ in range(8)]
    for plan in plans + plans:
        assert torch.equal(plan.run([x])[0], expected)
    assert native.CpuPlan("float32", arena=native.Arena()).path == plans[0].path
    del arena
    assert torch.equal(plans[0].run([x])[0], expected)
