"""A check of bf16x3, the products of "high" on AMX, in a process of its own.

python tests/high_check.py amx_model ops
python tests/high_check.py amx_model network
python tests/high_check.py amx_model field

An instruction set is chosen once per process, so test_high.py runs this file.

An operand is x = high + low, both bfloat16, and a product high high + high low + low high. That is
computed here in float64. What a kernel may miss it by is what float32 sums lose; what it may miss
the true product by is derived from the parts: |low| <= 2^-8 |x| and |x - high - low| <= 2^-17 |x|,
so 2^-17 for either operand's rest and 2^-16 for low low, 2^-15 in all, of the sum of |x w|.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HGFAST_CPU_ISA"] = sys.argv[1]
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    Weights,
    bottleneck_arguments,
    bottleneck_reference,
    bottleneck_weights,
    cast,
    check_small_hourglass,
    conv_reference,
    conv_transpose_reference,
    conv_transpose_weights,
    conv_weights,
    laid_out,
    native,
    random_map,
    small_hourglass,
    upsample_add_reference,
)
from torch import Tensor

import hgfast
from tests.field import FIELD, prepared

Pair = tuple[int, int]
Step = Callable[[Any, int], None]

PRODUCT = 2.0**-15  # what the three products may miss of |x w|
TYPICAL = 1e-5  # of a map, relative L2; measured 4e-6 to 6e-6


def run(inputs: list[Tensor], step: Step, high: bool = True) -> Tensor:
    plan = native.CpuPlan("float32", high=high)
    step(plan, len(inputs))
    plan.finish(list(range(len(inputs))), [len(inputs)])
    result: Tensor = plan.run(inputs)[0]
    return result


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low part of a float32 tensor, in float64."""
    high = x.bfloat16().float()
    return high.double(), (x - high).bfloat16().double()


def summation(products: int) -> float:
    """What float32 sums may lose of the sum of the magnitudes.

    A tile sums 16 even and 16 odd products, then both, then C; per 32 products there are three such
    sums in a row. The epilogue adds a bias and a map.
    """
    return (3 * -(-products // 32) + 24) * 2.0**-24


# ---- one convolution ----

Convolve = Callable[[Tensor, Tensor], Tensor]  # x, weight; in their dtype, without a bias


def three_products(convolve: Convolve, x: Tensor, weight: Tensor) -> Tensor:
    (x_high, x_low), (w_high, w_low) = parts(x), parts(weight)
    return convolve(x_high, w_high) + convolve(x_high, w_low) + convolve(x_low, w_high)


def check_products(convolve: Convolve, x: Tensor, weight: Tensor, y: Tensor, k: int) -> None:
    """That y, without bias and the like, is the three products, and near the true one."""
    size = convolve(x.double().abs(), weight.double().abs())
    three = three_products(convolve, x, weight)
    assert ((y.double() - three).abs() <= summation(k) * size).all()
    true = convolve(x.double(), weight.double())
    assert ((y.double() - true).abs() <= (PRODUCT + summation(k)) * size).all()


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(0, 3),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    channels=st.sampled_from([1, 2, 3, 4, 15, 16, 20, 33, 64]),
    out=st.sampled_from([1, 5, 16, 40, 64]),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layout=st.sampled_from(LAYOUTS),
)
def check_conv(
    batch: int,
    extra: Pair,
    channels: int,
    out: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    layout: str,
) -> None:
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + e
        for k, p, d, e in zip(kernel, padding, dilation, extra, strict=True)
    )
    weight = conv_weights(channels, out, kernel)["weight"]
    x = random_map(batch, channels, height, width, layout=layout)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding, dilation)

    y = run(
        [x],
        lambda plan, y: plan.conv(
            0, y, weight, torch.zeros(out), None, None, stride, padding, dilation
        ),
    )
    check_products(convolve, x, weight, y, channels * kernel[0] * kernel[1])


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    channels=st.sampled_from([1, 20, 33]),
    out=st.sampled_from([1, 17, 40]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def check_conv_transpose(size: Pair, channels: int, out: int, kernel: Pair, stride: Pair) -> None:
    weight = conv_transpose_weights(channels, out, kernel)["weight"]
    x = random_map(2, channels, *size)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return conv_transpose_reference(
            x, {"weight": weight, "bias": weight.new_zeros(out)}, stride
        )

    y = run([x], lambda plan, y: plan.conv_transpose(0, y, weight, torch.zeros(out), stride))
    check_products(convolve, x, weight, y, channels * kernel[0] * kernel[1])


def check_around_a_conv() -> None:
    """BatchNorm, bias, ReLUs, a map added; a stem, whose window is one run."""
    for channels, out, kernel, stride, padding in [
        (3, 64, 7, 2, 3),
        (14, 20, 5, 1, 2),
        (64, 80, 3, 1, 1),
        (33, 16, 1, 1, 0),
        (40, 40, 1, 2, 0),
    ]:
        for norm in (False, True):
            w = conv_weights(channels, out, (kernel, kernel), norm=norm)
            x = random_map(2, channels, 19, 22)
            reference = conv_reference(
                x.double(), cast(w, torch.float64), stride, padding, relu=True
            )
            add = random_map(*reference.shape, seed=2)
            reference = F.relu(reference + add.double())
            y = run(
                [x, add],
                lambda plan, y, w=w, place=((stride,) * 2, (padding,) * 2): plan.conv(
                    0,
                    y,
                    w["weight"],
                    w["bias"],
                    w.get("scale"),
                    w.get("shift"),
                    *place,
                    relu=True,
                    add=1,
                    relu_sum=True,
                ),
            )
            assert relative_error(y, reference) <= TYPICAL


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


# ---- the bottleneck ----


def bottleneck_bound(x: Tensor, w: Weights, low: Tensor | None, relu: bool) -> Tensor:
    """How far three convolutions one after the other may be off: each adds its own error to what it
    makes of that of its input."""

    def missed(x: Tensor, off: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
        size = F.conv2d(x.abs() + off, weight.abs(), bias.abs(), padding=padding)
        k = weight[0].numel()
        return (PRODUCT + summation(k)) * size + F.conv2d(off, weight.abs(), padding=padding)

    x, w = x.double(), cast(w, torch.float64)
    n, off_n = x, torch.zeros_like(x)
    if "scale" in w:
        n = F.relu(x * w["scale"][:, None, None] + w["shift"][:, None, None])
        off_n = 2.0**-23 * n
    t = F.relu(F.conv2d(n, w["w1"], w["b1"]))
    off_t = missed(n, off_n, w["w1"], w["b1"])
    u = F.relu(F.conv2d(t, w["w2"], w["b2"], padding=1))
    off_u = missed(t, off_t, w["w2"], w["b2"], padding=1)
    off_y = missed(u, off_u, w["w3"], w["b3"])
    shortcut = x
    if "wp" in w:
        off_y = off_y + missed(x, torch.zeros_like(x), w["wp"], w["bp"])
        shortcut = F.conv2d(x, w["wp"], w["bp"])
    sums = F.conv2d(u, w["w3"], w["b3"]).abs() + shortcut.abs()
    if low is not None:
        sums = upsample_add_reference(low.double().abs(), sums)
    return off_y + 2.0**-22 * sums


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 20),
    channels=st.sampled_from([1, 3, 16, 20, 33, 64]),
    middle=st.sampled_from([1, 8, 17, 32, 40]),
    out=st.sampled_from([0, 5, 16, 40]),
    low=st.booleans(),
    norm=st.booleans(),
    relu=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def check_bottleneck(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    out: int,
    low: bool,
    norm: bool,
    relu: bool,
    layout: str,
) -> None:
    out = out or channels
    if low:
        height, width = 2 * height, 2 * width
    w = bottleneck_weights(channels, middle, out, norm=norm)
    x = random_map(batch, channels, height, width, layout=layout)
    half = random_map(batch, out, height // 2, width // 2, seed=2) if low else None
    y = bottleneck(x, w, half, relu)
    reference = bottleneck_reference(
        x.double(), cast(w, torch.float64), None if half is None else half.double(), relu
    )
    assert ((y.double() - reference).abs() <= bottleneck_bound(x, w, half, relu)).all()


def bottleneck(
    x: Tensor, w: Weights, low: Tensor | None = None, relu: bool = False, high: bool = True
) -> Tensor:
    inputs = [x] if low is None else [x, low]
    arguments = bottleneck_arguments(w) | {"low": None if low is None else 1, "relu": relu}
    return run(inputs, lambda plan, y: plan.bottleneck(0, y, **arguments), high)


def check_the_hourglass_shapes() -> None:
    for channels, middle, out, size in [(256, 128, 256, 16), (64, 64, 128, 24), (256, 128, 256, 4)]:
        w = bottleneck_weights(channels, middle, out)
        x = random_map(1, channels, size, size, layout="channels_last")
        reference = bottleneck_reference(x.double(), cast(w, torch.float64))
        assert relative_error(bottleneck(x, w), reference) <= TYPICAL


# ---- that these checks notice something ----


def check_that_every_product_matters() -> None:
    """Without any of the low parts' products a result would fail both checks."""
    x, weight = random_map(1, 64, 12, 12), conv_weights(64, 48, (3, 3))["weight"]
    (x_high, x_low), (w_high, w_low) = parts(x), parts(weight)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    true = convolve(x.double(), weight.double())
    size = convolve(x.double().abs(), weight.double().abs())
    allowed = (PRODUCT + summation(64 * 9)) * size
    terms = [convolve(x_high, w_high), convolve(x_high, w_low), convolve(x_low, w_high)]
    assert ((sum(terms) - true).abs() <= allowed).all()
    assert relative_error(sum(terms), true) <= TYPICAL / 2
    for lacking in ([terms[0]], terms[:2], terms[::2]):
        given = sum(lacking)
        assert ((given - true).abs() > allowed).any()
        assert relative_error(given, true) > 100 * TYPICAL


# ---- numbers at the ends of the range ----


def check_infinity_and_nan() -> None:
    """They travel as in float32: also past weights without a low part, and weights of either sign,
    and through the ReLU that makes 0 of -infinity."""
    for channels in (3, 40):
        check_infinity_and_nan_of(channels)

    w = conv_weights(40, 16, (1, 1))
    w["weight"][2, 3], w["weight"][4, 5] = torch.inf, torch.nan
    x = random_map(1, 40, 4, 4)
    y = run([x], lambda plan, y: plan.conv(0, y, **w))
    expected = conv_reference(x, w)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[:, 2], expected[:, 2])

    b = bottleneck_weights(16, 8, 16)
    for value in (torch.inf, torch.nan):
        x = random_map(1, 16, 9, 9)
        x[0, 3, 4, 4] = value
        y, eager = bottleneck(x, b), bottleneck_reference(x, b)
        assert torch.equal(y.isfinite(), eager.isfinite())
        assert y[0, :, :3].isfinite().all()


def check_infinity_and_nan_of(channels: int) -> None:
    w = conv_weights(channels, 48, (3, 3))
    w["weight"][::3] = w["weight"][::3].bfloat16().float()
    for value in (torch.inf, -torch.inf, torch.nan, 3.4e38):
        for relu in (False, True):
            for norm in (False, True):
                norms = {}
                if norm:
                    norms = {"scale": torch.ones(channels), "shift": torch.zeros(channels)}
                x = random_map(1, channels, 9, 9)
                x[0, 2, 4, 4] = value
                expected = conv_reference(x, w | norms, 1, 1, relu)
                if value == 3.4e38:  # bfloat16 ends at 3.39e38, and takes this for infinity
                    x[0, 2, 4, 4] = torch.inf
                    expected = conv_reference(x, w | norms, 1, 1, relu)
                    x[0, 2, 4, 4] = value
                y = run(
                    [x],
                    lambda plan, y, n=norms, relu=relu: plan.conv(
                        0, y, w["weight"], w["bias"], **n, padding=(1, 1), relu=relu
                    ),
                )
                assert torch.equal(y.isnan(), expected.isnan())
                infinite = expected.isinf()
                assert torch.equal(y[infinite], expected[infinite])
                finite = expected.isfinite()
                assert torch.allclose(y[finite], expected[finite], rtol=0, atol=1e-3)


def check_small_numbers() -> None:
    """A tile takes subnormal parts and products for 0; what that loses is below 1e-35."""
    for scale in (1e-30, 1e-36, 1e-38, 1e-40):
        w = conv_weights(64, 32, (1, 1))["weight"]
        x = scale * random_map(1, 64, 4, 5)
        y = run([x], lambda plan, y, w=w: plan.conv(0, y, w, torch.zeros(32)))
        true, size = F.conv2d(x.double(), w.double()), F.conv2d(x.double().abs(), w.double().abs())
        allowed = (PRODUCT + summation(64)) * size + 64 * 6 * 2.0**-126
        assert ((y.double() - true).abs() <= allowed).all()


# ---- the same bits, always ----


def check_the_same_bits() -> None:
    """Whatever the layout, the other images, and how many threads share a map how."""
    w = bottleneck_weights(40, 24, 40)
    c = conv_weights(40, 72, (3, 3), norm=True)
    steps: list[Step] = [
        lambda plan, y: plan.bottleneck(0, y, **w),
        lambda plan, y: plan.bottleneck(0, y, **w, pool_y=True),
        lambda plan, y: plan.conv(0, y, **c, stride=(1, 2), padding=(1, 1)),
    ]
    x = random_map(3, 40, 14, 18)
    before = torch.get_num_threads()
    for step in steps:
        expected = torch.cat([run([image], step) for image in x.split(1)])
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for layout in LAYOUTS:
                assert torch.equal(run([laid_out(x, layout)], step), expected)
    torch.set_num_threads(before)


def ops() -> None:
    plan = small_hourglass("float32", high=True)
    assert (plan.path, plan.products) == (sys.argv[1], "bf16x3")
    assert native.CpuPlan("float32").products == "float32"
    assert native.CpuPlan("bfloat16").products == "bfloat16"
    for layout in LAYOUTS:
        x = random_map(2, 3, 36, 28, layout=layout)
        check_small_hourglass(plan, torch.float32, x, limit=3e-5)
        assert native.last_path() == f"{sys.argv[1]}/conv"
    check_conv()
    check_conv_transpose()
    check_around_a_conv()
    check_bottleneck()
    check_the_hourglass_shapes()
    check_that_every_product_matters()
    check_infinity_and_nan()
    check_small_numbers()
    check_the_same_bits()


# ---- a network ----


def network() -> None:
    """HG-2 at 256x256 against float64: relative L2 error and whether heatmap maxima stay."""
    torch.manual_seed(0)
    model = hgfast.models.hourglass(stacks=2).eval()
    image = torch.rand(1, 3, 256, 256)
    with torch.inference_mode():
        references = model.double()(image.double())
        model.float()
        for precision, limit in (("high", 2e-5), ("medium", 2e-2)):
            fast = hgfast.optimize(model, precision)
            products = {"high": "bf16x3", "medium": "bfloat16"}[precision]
            for y, reference in zip(fast(image), references, strict=True):
                kept = y.flatten(2).argmax(-1) == reference.flatten(2).argmax(-1)
                off = relative_error(y, reference)
                print(f"{precision}: relative L2 error {off:.1e}, maxima kept {kept.sum()} of 16")
                assert off <= limit
                assert kept.all() or precision == "medium"
            backends = {row.backend.removesuffix(" head") for row in hgfast.report(fast).replaced}
            assert backends == {f"cpu {sys.argv[1]} {products}"}


def field() -> None:
    """verify accepts the field's networks, deconvolutions and large dilations among them; also one
    with GroupNorms, whose small groups make 4e-5 of what others keep below 1e-5."""
    for name in (
        "bearpaw with GroupNorm",
        "large hourglass",
        "HRNet, all branches",
        "SimpleBaseline, deconvolutions 3x3",
        "dilated ResNet",
    ):
        model = prepared(FIELD[name].build_small())
        fast = hgfast.optimize(model, "high")
        found = hgfast.verify(model, fast, torch.rand(FIELD[name].shapes[0]))
        assert found, f"{name}: {found}"
        assert found.rel > 1e-6  # float32 sums make some 3e-7: these are not those
        backends = {row.backend for row in hgfast.report(fast).replaced}
        assert f"cpu {sys.argv[1]} bf16x3" in backends


if __name__ == "__main__":
    {"ops": ops, "network": network, "field": field}[sys.argv[2]]()
    print(f"{sys.argv[1]}: ok")
