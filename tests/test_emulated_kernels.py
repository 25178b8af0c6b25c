"""The CUDA kernels and their binding, run on the emulator, against plain PyTorch in float64.

Every launch here is also checked access by access (docs/emulator.md): a race, a read of memory that
nobody wrote, or an output byte written twice is an error, wherever it stands in the shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    Weights,
    bottleneck_reference,
    bottleneck_weights,
    cast,
    conv_reference,
    conv_weights,
    is_channels_last,
    needs_native,
    random_map,
    without_onednn,
)
from torch import Tensor

from hgfast import ops as hgfast_ops

emulator: Any = pytest.importorskip(
    "hgfast_emulator", reason="the emulator is not built (HGFAST_EMULATOR=1 builds it)"
)
pytestmark = needs_native
ops = torch.ops.hgfast_emulated

DTYPES = [torch.bfloat16, torch.float16]
LARGE, SMALL = 1, 10**6  # multiprocessors that make a launch take the larger or the smaller tile
ORDER = ("scale", "shift", "w1", "b1", "w2", "b2", "w3", "b3")


@pytest.fixture(autouse=True)
def an_ordinary_device() -> Iterator[None]:
    emulator.set_seed(0)
    emulator.set_threads(0)
    emulator.set_device()
    yield
    emulator.set_device()


def bottleneck(x: Tensor, w: Weights, low: Tensor | None = None) -> Tensor:
    y: Tensor = ops.bottleneck(x, *(w[k] for k in ORDER), w.get("wp"), w.get("bp"), low)
    return y


def assert_close(out: Tensor, eager: Tensor, reference: Tensor) -> None:
    """The error is at most twice that of eager in the same dtype, at worst and in the mean."""
    assert out.dtype == eager.dtype
    assert out.shape == reference.shape
    if out.numel() == 0:
        return
    ours, theirs = (out.double() - reference).abs(), (eager.double() - reference).abs()
    atol = 1e-3 if out.dtype == torch.bfloat16 else 2e-4
    assert ours.max() <= 2 * theirs.max() + atol, f"{ours.max():.3e} against {theirs.max():.3e}"
    assert ours.mean() <= 2 * theirs.mean() + atol, f"{ours.mean():.3e} against {theirs.mean():.3e}"


def check(x: Tensor, w: Weights, low: Tensor | None = None) -> Tensor:
    y = bottleneck(x, w, low)
    reference = bottleneck_reference(
        x.double(), cast(w, torch.float64), None if low is None else low.double()
    )
    assert_close(y, bottleneck_reference(x, cast(w, x.dtype), low), reference)
    assert is_channels_last(y)
    return y


# ---- bottleneck ----


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 20),
    channels=st.sampled_from([16, 32, 48, 80]),
    middle=st.sampled_from([16, 32, 48, 64, 144]),
    out=st.sampled_from([0, 16, 32, 96]),
    low=st.booleans(),
    multiprocessors=st.sampled_from([LARGE, SMALL]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 4),
)
def test_any_shape(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    out: int,
    low: bool,
    multiprocessors: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    out = out or channels
    if low:
        height, width = 2 * height, 2 * width
    emulator.set_device(multiprocessors)
    emulator.set_seed(seed)
    w = bottleneck_weights(channels, middle, out)
    x = random_map(batch, channels, height, width, dtype=dtype, layout=layout)
    half = random_map(batch, out, height // 2, width // 2, dtype=dtype, layout=layout, seed=2)
    check(x, w, half if low else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiprocessors", [LARGE, SMALL])
@pytest.mark.parametrize(
    ("channels", "middle", "out", "label"),
    [
        (256, 128, 256, "128"),
        (128, 64, 128, "64"),
        (64, 32, 64, "32"),
        (128, 128, 256, "128"),  # projected, as in a stem
        (64, 64, 128, "64"),
        (32, 32, 64, "32"),
        (320, 160, 320, "any"),
        (160, 160, 320, "any"),
    ],
)
def test_every_instance_at_its_tile_edges(
    channels: int, middle: int, out: int, label: str, multiprocessors: int, dtype: torch.dtype
) -> None:
    """One tile and a pixel, one tile less a pixel, and a whole one, in a batch of two."""
    tile = (8, 16) if multiprocessors == LARGE else (4, 8)
    emulator.set_device(multiprocessors)
    w = bottleneck_weights(channels, middle, out)
    for height, width in ((tile[0] + 1, tile[1] - 1), (tile[0] - 1, tile[1] + 1), tile):
        check(random_map(2, channels, height, width, dtype=dtype), w)
        name = f"bottleneck<{str(dtype)[6:]}, {label}, {tile[0]}x{tile[1]}>"
        assert emulator.counters()["name"] == name
        assert emulator.last_path() == f"cuda/{name}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("middle", [32, 144])
def test_every_combination_of_what_is_fused(
    dtype: torch.dtype,
    project: bool,
    low: bool,
    pool: bool,
    preactivation: bool,
    relu: bool,
    middle: int,
) -> None:
    channels, height, width = 48, 6, 10
    w = bottleneck_weights(channels, middle, channels, project=project)
    block = emulator.CudaBottleneck(
        dtype,
        w["scale"] if preactivation else None,
        w["shift"] if preactivation else None,
        *(w[k] for k in ORDER[2:]),
        w.get("wp"),
        w.get("bp"),
        relu=relu,
    )
    # An odd last row and column, which pooling drops.
    size = (2 * height + 1, 2 * width + 1) if pool else (height, width)
    x = random_map(2, channels, *size, dtype=dtype)
    half = random_map(2, channels, height // 2, width // 2, dtype=dtype, seed=2) if low else None

    @without_onednn
    def expected(to: torch.dtype) -> Tensor:
        v, t = cast(w, to), x.to(to)
        t = F.max_pool2d(t, 2) if pool else t
        u = F.relu(t * v["scale"][:, None, None] + v["shift"][:, None, None])
        u = F.relu(F.conv2d(u if preactivation else t, v["w1"], v["b1"]))
        u = F.relu(F.conv2d(u, v["w2"], v["b2"], padding=1))
        y = F.conv2d(u, v["w3"], v["b3"])
        y = y + (F.conv2d(t, v["wp"], v["bp"]) if project else t)
        y = F.relu(y) if relu else y
        return y if half is None else y + F.interpolate(half.to(to), scale_factor=2.0)

    y = block.run(x, half, pool)
    assert_close(y, expected(dtype), expected(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiprocessors", [LARGE, SMALL])
def test_the_same_bits_in_any_order_of_threads(multiprocessors: int, dtype: torch.dtype) -> None:
    emulator.set_device(multiprocessors)
    w = bottleneck_weights(128, 128, 256)
    x = random_map(1, 128, 9, 17, dtype=dtype)
    y = bottleneck(x, w)
    for seed in range(1, 6):
        emulator.set_seed(seed)
        emulator.set_threads(1 + seed % 2)
        assert torch.equal(bottleneck(x, w), y)


def test_images_do_not_mix() -> None:
    w = bottleneck_weights(32, 32, 32)
    x = random_map(3, 32, 5, 7, dtype=torch.bfloat16)
    y = bottleneck(x, w)
    for i in range(3):
        assert torch.equal(y[i : i + 1], bottleneck(x[i : i + 1], w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_travel_as_in_pytorch(dtype: torch.dtype) -> None:
    w = bottleneck_weights(32, 32, 32)
    x = random_map(1, 32, 9, 9, dtype=dtype)
    x[0, 3, 4, 4], x[0, 7, 0, 8] = torch.nan, torch.inf
    y, eager = bottleneck(x, w), bottleneck_reference(x, cast(w, dtype))
    assert torch.equal(y.isnan(), eager.isnan())
    assert y.isnan().any()
    assert not y.isnan().all()


@pytest.mark.parametrize("middle", [16, 32, 48, 64, 96, 144])
def test_infinity_where_channels_are_padded(middle: int) -> None:
    """The weights behind the last channel are 0, and 0 times infinity is NaN."""
    w = {name: t.abs() for name, t in bottleneck_weights(32, middle, 48).items()}
    x = random_map(1, 32, 5, 5, dtype=torch.bfloat16)
    x[0, 3, 2, 2] = torch.inf
    y, eager = bottleneck(x, w), bottleneck_reference(x, cast(w, torch.bfloat16))
    assert torch.equal(y.isnan(), eager.isnan())
    assert torch.equal(y.isinf(), eager.isinf())
    assert y.isinf().any()


def test_the_neighbour_of_a_slice_is_not_read() -> None:
    """A batch cut out of a larger tensor, and one that is not 16-byte aligned."""
    w = bottleneck_weights(16, 16, 16)
    roomy = random_map(4, 16, 4, 4, dtype=torch.bfloat16, layout="channels_last")
    assert torch.equal(bottleneck(roomy[1:3], w), bottleneck(roomy, w)[1:3])
    storage = torch.zeros(4 * 4 * 16 + 1, dtype=torch.bfloat16)
    odd = storage[1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    odd.copy_(roomy[:1])
    assert torch.equal(bottleneck(odd, w), bottleneck(roomy[:1], w))


def test_weights_may_be_in_any_of_the_dtypes() -> None:
    w = bottleneck_weights(32, 16, 32)
    x = random_map(1, 32, 4, 4, dtype=torch.bfloat16)
    half = cast(w, torch.bfloat16)
    assert torch.equal(bottleneck(x, half), bottleneck(x, cast(half, torch.float32)))


# ---- what does not fit ----

W = bottleneck_weights(32, 16, 32)
X = torch.zeros(1, 32, 4, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.float()}, "expected bfloat16 or float16, given Float"),
        (
            {"x": X[0]},
            r"expected x of shape \(batch, channels, height, width\), given \[32, 4, 4\]",
        ),
        ({"x": X[:, :16]}, r"expected x of 32 channels, as w1 has, given \[1, 16, 4, 4\]"),
        ({"w2": torch.zeros(16, 16, 1, 1)}, r"expected w2 of shape \[16, 16, 3, 3\]"),
        ({"b1": torch.zeros(16).double()}, "expected b1 in float32, bfloat16 or float16"),
        ({"low": torch.zeros(1, 32, 2, 2)}, "expected low in bfloat16 or float16, given Float"),
        ({"low": X}, r"expected low of shape \[1, 32, 2, 2\], given \[1, 32, 4, 4\]"),
        ({"low": X[..., :2, :2].half()}, "expected low in BFloat16 as the first map is"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, **W, **change}
    x, low = arguments.pop("x"), arguments.pop("low", None)
    with pytest.raises(ValueError, match=f"hgfast::bottleneck: .*{message}"):
        bottleneck(x, arguments, low)


def test_channels_that_have_no_kernel() -> None:
    w = bottleneck_weights(24, 16, 24)
    with pytest.raises(ValueError, match=r"channels in multiples of 16 on a GPU, given 24 -> 16"):
        bottleneck(torch.zeros(1, 24, 4, 4, dtype=torch.bfloat16), w)


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_shared_memory_limits(shared: int) -> None:
    """99 KB are enough for the instances of an hourglass; wide blocks say what they lack."""
    emulator.set_device(LARGE, shared * 1024)
    cpu = torch.device("cpu")
    for middle in (16, 32, 64, 128, 256):
        assert emulator.CudaBottleneck.obstacle(cpu, 256, middle, 256, True) == ""
    obstacle = emulator.CudaBottleneck.obstacle(cpu, 64, 2048, 64, False)
    assert re.fullmatch(
        rf"its 2048 middle channels need \d+ bytes of shared memory, "
        rf"and this GPU has {shared * 1024}",
        obstacle,
    )
    obstacle = emulator.CudaBottleneck.obstacle(cpu, 24, 16, 24, False)
    assert obstacle == "its channels (24, 16, 24) are not multiples of 16"


@pytest.mark.parametrize(
    ("size", "batch", "tile"),
    [
        (64, 1, "4x8"),  # 32 of the larger would leave 100 multiprocessors idle
        (64, 8, "8x16"),
        (16, 132, "8x16"),
        (8, 300, "4x8"),  # half of each of the larger would hang over the edge
        (4, 300, "4x8"),
    ],
)
def test_the_tile_follows_the_image(size: int, batch: int, tile: str) -> None:
    w = bottleneck_weights(16, 16, 16)
    bottleneck(random_map(batch, 16, size, size, dtype=torch.bfloat16), w)
    assert emulator.counters()["name"] == f"bottleneck<bfloat16, 32, {tile}>"


def test_the_tile_follows_the_device() -> None:
    """Of 256 middle channels only the smaller tile fits into 99 KB."""
    w, x = bottleneck_weights(32, 256, 32), random_map(1, 32, 8, 16, dtype=torch.bfloat16)
    emulator.set_device(LARGE, 227 * 1024)
    wide = check(x, w)
    assert emulator.counters()["name"] == "bottleneck<bfloat16, any, 8x16>"
    emulator.set_device(LARGE, 99 * 1024)
    assert torch.equal(check(x, w), wide)
    assert emulator.counters()["name"] == "bottleneck<bfloat16, any, 4x8>"


# ---- upsample_add ----


def upsample_sum(lows: list[Tensor], skip: Tensor, relu: bool) -> Tensor:
    """In float32, in order, rounded once."""
    total = skip.float()
    for low in lows:
        n = skip.shape[2] // low.shape[2]
        total = total + low.float().repeat_interleave(n, 2).repeat_interleave(n, 3)
    return (F.relu(total) if relu else total).to(skip.dtype)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 2),
    channels=st.sampled_from([8, 16, 24, 264]),
    height=st.integers(1, 3),
    width=st.integers(1, 5),
    factors=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4),
    relu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_upsample_add(
    batch: int,
    channels: int,
    height: int,
    width: int,
    factors: list[int],
    relu: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    most = max(factors)
    skip = random_map(batch, channels, height * most, width * most, dtype=dtype, layout=layout)
    lows = [
        random_map(
            batch,
            channels,
            height * most // n,
            width * most // n,
            dtype=dtype,
            layout=layout,
            seed=n,
        )
        for n in factors
    ]
    y = ops.upsample_add(lows, skip, relu)
    assert is_channels_last(y)
    assert torch.equal(y, upsample_sum(lows, skip, relu))
    if factors == [2] and not relu:
        assert torch.equal(ops.upsample_add(lows[0], skip), y)
    if dtype == torch.bfloat16:  # the CPU's kernel gives the same bits
        assert torch.equal(hgfast_ops.upsample_add(lows, skip, relu), y)


@pytest.mark.parametrize(
    ("lows", "skip", "message"),
    [
        ([X], X[:, :, :3], "expected a height and width that are multiples of 1|expected low of"),
        ([], X, "expected 1 to 4 maps to add, given 0"),
        ([X] * 5, X, "expected 1 to 4 maps to add, given 5"),
        ([X[..., :1]], X, r"expected low of shape"),
        ([X[:, :12]], X[:, :12], "expected channels in multiples of 8 on a GPU"),
        ([X.half()], X, "expected low in BFloat16"),
    ],
)
def test_wrong_maps(lows: list[Tensor], skip: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"hgfast::upsample_add: .*({message})"):
        ops.upsample_add(lows, skip)


# ---- what a launch moves ----


@pytest.mark.parametrize(
    ("size", "channels", "low", "pool"),
    [(32, (256, 128, 256), True, False), (16, (64, 32, 64), False, True)],
)
def test_a_bottleneck_moves_little_more_than_it_must(
    size: int, channels: tuple[int, int, int], low: bool, pool: bool
) -> None:
    """Through a model of the L2: at most 1.3 times its arrays; no bank conflicts; the FLOPs of
    the formula and those of the halo."""
    inner, middle, out = channels
    w = bottleneck_weights(inner, middle, out)
    block = emulator.CudaBottleneck(torch.bfloat16, *(w[k] for k in ORDER))
    x = random_map(1, inner, *[size * (1 + pool)] * 2, dtype=torch.bfloat16, layout="channels_last")
    half = random_map(1, out, size // 2, size // 2, dtype=torch.bfloat16) if low else None
    emulator.set_device(LARGE)
    emulator.model_memory(True)
    try:
        block.run(x, half, pool)
    finally:
        emulator.model_memory(False)
    c = emulator.counters()
    assert c["dram_bytes_read"] + c["dram_bytes_written"] <= 1.3 * c["minimum_bytes"]
    assert c["matrix_conflicts"] == 0
    pixels = size * size
    conv1, rest = 2 * inner * middle, 2 * middle * (9 * middle + out)
    assert c["flops"] == pixels * (conv1 * 192 // 128 + rest)


def test_an_upsampled_sum_moves_what_it_must() -> None:
    low = random_map(1, 256, 16, 16, dtype=torch.bfloat16, layout="channels_last")
    skip = random_map(1, 256, 32, 32, dtype=torch.bfloat16, layout="channels_last")
    emulator.model_memory(True)
    try:
        ops.upsample_add(low, skip)
    finally:
        emulator.model_memory(False)
    c = emulator.counters()
    assert c["dram_bytes_read"] + c["dram_bytes_written"] == c["minimum_bytes"]
    assert c["minimum_bytes"] == (2 * skip.numel() + low.numel()) * 2


# ---- conv ----


def test_conv_keeps_the_contract_of_the_op() -> None:
    """cuDNN's place is taken by the CPU's convolution; checks, dtypes and gradients are ours."""
    w = conv_weights(16, 8, (3, 3), norm=True)
    x = random_map(2, 16, 7, 9, dtype=torch.bfloat16)
    weight = w["weight"].requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = ops.conv(x, weight, w["bias"], w["scale"], w["shift"], [2, 1], [1, 0], True)
    assert y.dtype == x.dtype
    # What torch gives every op without a derivative; not that of a convolution.
    on_cpu = torch.ops.hgfast.conv(x, weight, w["bias"])
    assert type(y.grad_fn) is type(on_cpu.grad_fn)
    assert is_channels_last(y)
    exact = conv_reference(x.double(), cast(w, torch.float64), (2, 1), (1, 0), relu=True)
    eager = conv_reference(x, cast(w, x.dtype), (2, 1), (1, 0), relu=True)
    assert_close(y, eager.detach(), exact.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(1)}, r"expected scale of shape \[16\], given \[1\]"),
        ({"x": torch.zeros(1, 16, 5, 5).double()}, "expected x in float32, bfloat16 or float16"),
        ({"weight": torch.ones(8, 16, 3, 3).int()}, "expected weight in float32"),
        ({"bias": torch.ones(7)}, r"expected bias of shape \[8\], given \[7\]"),
        ({"x": torch.zeros(1, 12, 5, 5)}, "expected x of 16 channels"),
        ({"x": torch.zeros(1, 16, 2, 2)}, "to be at least as large as the kernel of 3x3"),
        ({"stride": [0, 1]}, "expected two strides of at least 1"),
        ({"padding": [-1, 0]}, "expected two paddings of at least 0"),
    ],
)
def test_conv_with_wrong_arguments(change: dict[str, Any], message: str) -> None:
    w = conv_weights(16, 8, (3, 3), norm=True)
    arguments = {"x": torch.zeros(1, 16, 5, 5), **w, "stride": [1, 1], "padding": [0, 0], **change}
    with pytest.raises(ValueError, match=f"hgfast::conv: .*{message}"):
        ops.conv(**arguments)
