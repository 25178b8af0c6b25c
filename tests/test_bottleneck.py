"""hgfast::bottleneck against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    MAP_DTYPES,
    Weights,
    assert_close_bfloat16,
    assert_close_float32,
    bottleneck_arguments,
    bottleneck_reference,
    bottleneck_weights,
    cast,
    is_channels_last,
    laid_out,
    native,
    needs_native,
    random_map,
)
from torch import Tensor, nn

from hgfast import ops

pytestmark = needs_native


def check(x: Tensor, w: Weights, low: Tensor | None = None, relu: bool = False) -> Tensor:
    y = ops.bottleneck(x, **bottleneck_arguments(w), low=low, relu=relu)
    reference = bottleneck_reference(
        x.double(), cast(w, torch.float64), None if low is None else low.double(), relu
    )
    if x.dtype == torch.float32:
        assert_close_float32(y, reference)
    else:
        assert_close_bfloat16(y, bottleneck_reference(x, cast(w, x.dtype), low, relu), reference)
    assert is_channels_last(y)
    return y


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    channels=st.sampled_from([1, 3, 16, 20, 33, 64]),
    middle=st.sampled_from([1, 8, 17, 32]),
    out=st.sampled_from([0, 5, 16, 40]),
    low=st.booleans(),
    norm=st.booleans(),
    relu=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    out: int,
    low: bool,
    norm: bool,
    relu: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    out = out or channels  # as often as not an identity shortcut
    if low:
        height, width = 2 * height, 2 * width
    w = bottleneck_weights(channels, middle, out, norm=norm)
    x = random_map(batch, channels, height, width, dtype=dtype, layout=layout)
    half = random_map(batch, out, height // 2, width // 2, dtype=dtype, layout=layout, seed=2)
    check(x, w, half if low else None, relu)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize(("size", "low"), [(64, False), (32, True), (4, False)])
def test_the_hourglass_shapes(dtype: torch.dtype, size: int, low: bool) -> None:
    w = bottleneck_weights(256, 128, 256)
    half = random_map(1, 256, size // 2, size // 2, dtype=dtype, seed=2) if low else None
    check(random_map(1, 256, size, size, dtype=dtype, layout="channels_last"), w, half)
    assert native.last_path().endswith("/bottleneck")


@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_projection_that_keeps_the_channels(dtype: torch.dtype) -> None:
    check(random_map(2, 24, 5, 7, dtype=dtype), bottleneck_weights(24, 12, 24, project=True))


def test_low_comes_after_the_relu() -> None:
    w = bottleneck_weights(16, 8, 16, norm=False)
    low = torch.full((1, 16, 2, 2), -100.0)
    y = ops.bottleneck(random_map(1, 16, 4, 4), **bottleneck_arguments(w), low=low, relu=True)
    assert y.min() == -100
    assert y.max() > -100


def test_every_layout_gives_the_same_bits() -> None:
    w = bottleneck_weights(20, 12, 20)
    x = random_map(2, 20, 9, 7)
    results = [ops.bottleneck(laid_out(x, layout), **w) for layout in LAYOUTS]
    assert all(torch.equal(results[0], y) for y in results)


def test_repeats_give_the_same_bits() -> None:
    w = bottleneck_weights(64, 32, 64)
    x = random_map(3, 64, 17, 19)
    y = ops.bottleneck(x, **w)
    assert all(torch.equal(y, ops.bottleneck(x, **w)) for _ in range(10))


def test_images_do_not_mix() -> None:
    """Bands of rows of different images are neighbours in memory, never in a convolution."""
    w = bottleneck_weights(32, 16, 32)
    x = random_map(4, 32, 6, 6)
    y = ops.bottleneck(x, **w)
    for i in range(4):
        assert torch.equal(y[i : i + 1], ops.bottleneck(x[i : i + 1], **w))


def test_the_input_is_left_alone() -> None:
    w = bottleneck_weights(16, 8, 16)
    x = random_map(1, 16, 8, 8, layout="channels_last")
    low = random_map(1, 16, 4, 4, layout="channels_last", seed=2)
    before = x.clone(), low.clone(), {name: t.clone() for name, t in w.items()}
    ops.bottleneck(x, **w, low=low)
    assert torch.equal(x, before[0])
    assert torch.equal(low, before[1])
    assert all(torch.equal(w[name], t) for name, t in before[2].items())


@pytest.mark.parametrize("dtype", MAP_DTYPES)
def test_tiny_variances(dtype: torch.dtype) -> None:
    """BatchNorms of nearly no variance and their own eps, folded, against the modules."""
    torch.manual_seed(0)
    channels, middle = 24, 16
    norms = [nn.BatchNorm2d(c, eps=eps) for c, eps in ((channels, 1e-3), (middle, 1e-7))]
    norms.append(nn.BatchNorm2d(middle))
    convolutions = [nn.Conv2d(channels, middle, 1), nn.Conv2d(middle, middle, 3, padding=1)]
    convolutions.append(nn.Conv2d(middle, channels, 1))
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0, 0.01)
        norm.running_var.copy_(10 ** torch.empty_like(norm.running_var).uniform_(-12, -4))
    layers: list[nn.Module] = []
    for norm, convolution in zip(norms, convolutions, strict=True):
        layers += [norm, nn.ReLU(), convolution]
    branch = nn.Sequential(*layers).eval().requires_grad_(False)

    scales, shifts = [], []
    for norm in norms:
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        scales.append(scale)
        shifts.append(norm.bias.double() - norm.running_mean.double() * scale)
    w = {"scale": scales[0], "shift": shifts[0]}
    for i, convolution in enumerate(convolutions):
        weight, bias = convolution.weight.double(), convolution.bias.double()
        if i < 2:
            weight = weight * scales[i + 1][:, None, None, None]
            bias = bias * scales[i + 1] + shifts[i + 1]
        w[f"w{i + 1}"], w[f"b{i + 1}"] = weight, bias
    w = cast({name: t.detach() for name, t in w.items()}, torch.float32)

    x = random_map(1, channels, 6, 6, dtype=dtype)
    y = ops.bottleneck(x, **w)
    eager = x + branch.to(dtype)(x)
    reference = x.double() + branch.double()(x.double())
    assert reference.abs().max() > 1e3  # the variances do matter
    if dtype == torch.float32:
        assert_close_float32(y, reference)
    else:
        assert_close_bfloat16(y, eager, reference)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_where_they_belong(dtype: torch.dtype, value: float) -> None:
    w = bottleneck_weights(16, 8, 16)
    x = random_map(1, 16, 9, 9, dtype=dtype)
    x[0, 3, 4, 4] = value
    y, eager = ops.bottleneck(x, **w), bottleneck_reference(x, cast(w, dtype))
    assert torch.equal(y.isfinite(), eager.isfinite())
    assert not y[0, :, 3:6, 3:6].isfinite().all()
    assert y[0, :, :3].isfinite().all()


def test_nan_in_low_and_in_weights() -> None:
    w = bottleneck_weights(16, 8, 16)
    x, low = random_map(1, 16, 4, 4), random_map(1, 16, 2, 2, seed=2)
    low[0, 5, 1, 0] = torch.nan
    y = ops.bottleneck(x, **w, low=low)
    assert y.isnan().sum() == 4
    assert y[0, 5, 2:, :2].isnan().all()
    w["b2"][3] = torch.nan
    assert ops.bottleneck(x, **w).isnan().all()


def test_bfloat16_weights_are_converted() -> None:
    w = cast(bottleneck_weights(16, 8, 16), torch.bfloat16)
    x = random_map(1, 16, 5, 5)
    expected = ops.bottleneck(x, **cast(w, torch.float32))
    assert torch.equal(ops.bottleneck(x, **w), expected)


W = bottleneck_weights(16, 8, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16, 4, 4)}, r"expected x of shape \(batch, .*, given \[16, 4, 4\]"),
        ({"x": torch.zeros(1, 17, 4, 4)}, r"expected x of 16 channels.*given \[1, 17, 4, 4\]"),
        ({"x": torch.zeros(1, 16, 0, 4)}, r"at least one channel, row.*given \[1, 16, 0, 4\]"),
        ({"x": torch.zeros(1, 16, 4, 4).double()}, r"expected x in float32 or bfloat16.*Double"),
        ({"x": torch.zeros(1, 16, 4, 4).int()}, r"expected x in float32 or bfloat16.*Int"),
        ({"scale": None}, r"both scale and shift or neither, given only shift"),
        ({"scale": torch.ones(8)}, r"expected scale of shape \[16\], given \[8\]"),
        ({"w1": torch.ones(8, 16)}, r"expected w1 of shape \(middle, in, 1, 1\).*given \[8, 16\]"),
        ({"w2": torch.ones(8, 8, 1, 1)}, r"expected w2 of shape \[8, 8, 3, 3\], given \[8, 8, 1"),
        ({"w3": torch.ones(24, 9, 1, 1)}, r"expected w3 of shape \[24, 8, 1, 1\], given \[24, 9"),
        ({"w3": torch.ones(24, 8, 1, 1).double()}, r"expected w3 in float32, bfloat16.*Double"),
        ({"b3": torch.ones(23)}, r"expected b3 of shape \[24\], given \[23\]"),
        ({"wp": None, "bp": None}, r"expected a projection .* given none for 16 -> 24"),
        ({"bp": None}, r"expected both wp and bp or neither, given only wp"),
        ({"wp": torch.ones(16, 24, 1, 1)}, r"expected wp of shape \[24, 16, 1, 1\], given \[16"),
        ({"low": torch.zeros(1, 24, 4, 4)}, r"low of shape \[1, 24, 2, 2\], given \[1, 24, 4, 4\]"),
        ({"low": torch.zeros(1, 24, 2, 2).bfloat16()}, r"expected low in Float.*given BFloat16"),
        (
            {"x": torch.zeros(1, 16, 5, 4), "low": torch.zeros(1, 24, 2, 2)},
            r"height and width.*multiples of 2",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor | None], message: str) -> None:
    arguments = {"x": torch.zeros(1, 16, 4, 4), **W, **change}
    with pytest.raises(ValueError, match="hgfast::bottleneck: .*" + message):
        ops.bottleneck(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(dtype: torch.dtype, full: bool) -> None:
    w = bottleneck_weights(16, 8, 24 if full else 16)
    x = random_map(2, 16, 4, 6, dtype=dtype)
    low = random_map(2, 24, 2, 3, dtype=dtype) if full else None
    torch.library.opcheck(
        torch.ops.hgfast.bottleneck.default, (x, *w.values()), {"low": low, "relu": full}
    )


def test_compiles_whole() -> None:
    w = bottleneck_weights(16, 8, 16)
    x = random_map(1, 16, 6, 6)
    compiled = torch.compile(
        lambda x: ops.bottleneck(x, **w) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), ops.bottleneck(x, **w) * 2)
