"""What the tests of the ops share: each op in plain PyTorch, inputs, and when two maps agree.

The functions named ``*_reference`` are the specification. They compute in the dtype they are
given: in float64 they are the judge, in bfloat16 they are what eager PyTorch would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hgfast import _native

native: Any = _native.load()
needs_native = pytest.mark.skipif(
    native is None, reason=f"without the compiled part there are no ops: {_native.reason}"
)

Weights = dict[str, Tensor]
MAP_DTYPES = [torch.float32, torch.bfloat16]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # as CpuPlan knows them


# ---- the ops in plain PyTorch ----

#: Decorates what computes with PyTorch's convolutions in any dtype. On AMX oneDNN, as torch 2.13
#: has it, gives NaN and wrong numbers for some small maps in 16 bits: (1, 3, 9, 2) with the stem's
#: 7x7 of stride 2, or (3, 16, 16, 7) with a kernel of (1, 16, 4, 7) and strides (1, 3).
without_onednn = torch.backends.mkldnn.flags(enabled=False)


def _per_channel(t: Tensor) -> Tensor:
    return t[:, None, None]


def _normed(x: Tensor, w: Weights) -> Tensor:
    if "scale" not in w:
        return x
    return F.relu(x * _per_channel(w["scale"]) + _per_channel(w["shift"]))


@without_onednn
def bottleneck_reference(
    x: Tensor, w: Weights, low: Tensor | None = None, relu: bool = False
) -> Tensor:
    t = F.relu(F.conv2d(_normed(x, w), w["w1"], w["b1"]))
    t = F.relu(F.conv2d(t, w["w2"], w["b2"], padding=1))
    y = F.conv2d(t, w["w3"], w["b3"])
    y = y + (F.conv2d(x, w["wp"], w["bp"]) if "wp" in w else x)
    if relu:
        y = F.relu(y)
    return y if low is None else upsample_add_reference(low, y)


@without_onednn
def conv_reference(
    x: Tensor,
    w: Weights,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    relu: bool = False,
    add: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    relu_sum: bool = False,
) -> Tensor:
    y = F.conv2d(_normed(x, w), w["weight"], w["bias"], stride, padding, dilation)
    if relu:
        y = F.relu(y)
    if add is not None:
        y = y + add
    return F.relu(y) if relu_sum else y


@without_onednn
def conv_transpose_reference(
    x: Tensor,
    w: Weights,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    output_padding: tuple[int, int] = (0, 0),
    relu: bool = False,
    add: Tensor | None = None,
    relu_sum: bool = False,
) -> Tensor:
    y = F.conv_transpose2d(x, w["weight"], w["bias"], stride, padding, output_padding)
    if relu:
        y = F.relu(y)
    if add is not None:
        y = y + add
    return F.relu(y) if relu_sum else y


def upsample_add_reference(low: Tensor, skip: Tensor) -> Tensor:
    return skip + low.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


# ---- inputs ----


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bottleneck_weights(
    channels_in: int,
    middle: int,
    out: int,
    *,
    project: bool | None = None,
    norm: bool = True,
    seed: int = 0,
) -> Weights:
    """Weights that keep the size of what passes through; projected where the channels change."""
    g = generator(seed)

    def convolution(o: int, i: int, k: int) -> Tensor:
        return torch.randn(o, i, k, k, generator=g) * (2 / (i * k * k)) ** 0.5

    w = {
        "scale": 0.5 + torch.rand(channels_in, generator=g),
        "shift": 0.5 * torch.randn(channels_in, generator=g),
        "w1": convolution(middle, channels_in, 1),
        "b1": 0.1 * torch.randn(middle, generator=g),
        "w2": convolution(middle, middle, 3),
        "b2": 0.1 * torch.randn(middle, generator=g),
        "w3": convolution(out, middle, 1),
        "b3": 0.1 * torch.randn(out, generator=g),
    }
    if channels_in != out if project is None else project:
        w["wp"] = convolution(out, channels_in, 1)
        w["bp"] = 0.1 * torch.randn(out, generator=g)
    return w if norm else {name: t for name, t in w.items() if name not in ("scale", "shift")}


def bottleneck_arguments(w: Weights) -> dict[str, Any]:
    """As keywords, where scale and shift are always named."""
    return {"scale": None, "shift": None, **w}


def conv_weights(
    channels_in: int, out: int, kernel: tuple[int, int], *, norm: bool = False, seed: int = 0
) -> Weights:
    g = generator(seed)
    fan = channels_in * kernel[0] * kernel[1]
    w = {
        "weight": torch.randn(out, channels_in, *kernel, generator=g) * (2 / fan) ** 0.5,
        "bias": 0.1 * torch.randn(out, generator=g),
    }
    if norm:
        w["scale"] = 0.5 + torch.rand(channels_in, generator=g)
        w["shift"] = 0.5 * torch.randn(channels_in, generator=g)
    return w


def conv_transpose_weights(
    channels_in: int, out: int, kernel: tuple[int, int], *, seed: int = 0
) -> Weights:
    g = generator(seed)
    fan = channels_in * kernel[0] * kernel[1]
    return {
        "weight": torch.randn(channels_in, out, *kernel, generator=g) * (2 / fan) ** 0.5,
        "bias": 0.1 * torch.randn(out, generator=g),
    }


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: t.to(dtype) for name, t in weights.items()}


LAYOUTS = ["nchw", "channels_last", "sliced"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; "sliced" is neither dense nor aligned."""
    if layout == "nchw":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    b, c, h, w = x.shape
    roomy = torch.full((b, c + 1, h + 2, 2 * w + 1), torch.nan, dtype=x.dtype)
    roomy[:, 1:, 1:-1, 1::2] = x
    return roomy[:, 1:, 1:-1, 1::2]


def random_map(
    *shape: int, dtype: torch.dtype = torch.float32, layout: str = "nchw", seed: int = 1
) -> Tensor:
    return laid_out(torch.randn(shape, generator=generator(seed)).to(dtype), layout)


# ---- a plan of one step ----


def run_step(
    dtype: torch.dtype,
    inputs: list[Tensor],
    step: Callable[[Any, int], None],
    high: bool = False,
) -> Tensor:
    """The result of the step that ``step(plan, output)`` records over the inputs 0, 1, ..."""
    plan = native.CpuPlan(NAMES[dtype], high=high)
    output = len(inputs)
    step(plan, output)
    plan.finish(list(range(output)), [output])
    result: Tensor = plan.run(inputs)[0]
    return result


# ---- what runs as one step: the bits of its parts one after the other ----


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Also of zeros the sign; and NaN in the same places, whatever bits these have."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    one, other = (x.masked_fill(x.isnan(), 0).contiguous().view(bits) for x in (a, b))
    assert torch.equal(one, other)


def check_pooled_bottleneck(
    dtype: torch.dtype, x: Tensor, w: Weights, low: Tensor | None = None, relu: bool = False
) -> Tensor:
    """A block that pools what it reads, against the pool and the block."""
    inputs = [x] if low is None else [x, low]
    settings = {**bottleneck_arguments(w), "low": None if low is None else 1, "relu": relu}

    def two_steps(plan: Any, y: int) -> None:
        plan.pool(0, y + 1, "max", (2, 2), (2, 2))
        plan.bottleneck(y + 1, y, **settings)

    fused = run_step(dtype, inputs, lambda plan, y: plan.bottleneck(0, y, **settings, pool=True))
    assert_same_bits(fused, run_step(dtype, inputs, two_steps))
    return fused


def check_pooling_bottleneck(
    dtype: torch.dtype, x: Tensor, w: Weights, relu: bool = False, pool: bool = False
) -> Tensor:
    """A block that gives the 2x2 maximum of its result alone, against the block and the pool."""
    settings = {**bottleneck_arguments(w), "relu": relu, "pool": pool}

    def two_steps(plan: Any, y: int) -> None:
        plan.bottleneck(0, y + 1, **settings)
        plan.pool(y + 1, y, "max", (2, 2), (2, 2))

    def one_step(plan: Any, y: int) -> None:
        plan.bottleneck(0, y, **settings, pool_y=True)

    for high in (False, True) if dtype == torch.float32 else (False,):
        parts = run_step(dtype, [x], two_steps, high)
        fused = run_step(dtype, [x], one_step, high)
        assert_same_bits(fused, parts)
    return fused


def check_given_image(dtype: torch.dtype, x: Tensor, w: Weights, **settings: Any) -> Tensor:
    """A first convolution of an image of any dtype and layout, against that of one laid out."""
    laid = x.to(dtype).contiguous(memory_format=torch.channels_last)
    plan = native.CpuPlan(NAMES[dtype])
    plan.conv(0, 1, **w, **settings)
    plan.finish([0], [1], as_computed=True)
    given, dense = (plan.run([image])[0] for image in (x, laid))
    assert_same_bits(given, dense)
    return given


def head_weights(channels_in: int, middle: int, joints: int, out: int) -> dict[str, Weights]:
    """Of the convolutions of a head; without joints, or out, there is none of these."""
    w = {"features": conv_weights(channels_in, middle, (1, 1), seed=1)}
    if joints:
        w["heatmaps"] = conv_weights(middle, joints, (1, 1), seed=2)
    if out:
        w["next"] = conv_weights(middle, out, (1, 1), seed=3)
    return w


def check_head(
    dtype: torch.dtype,
    x: Tensor,
    w: dict[str, Weights],
    add: Tensor | None = None,
    as_computed: bool = False,
) -> list[Tensor]:
    """A head as one step, against its convolutions."""
    inputs = [x] if add is None else [x, add]
    wanted = {name: 2 + i for i, name in enumerate(("heatmaps", "next")) if name in w}
    numbers = wanted.get("heatmaps"), wanted.get("next")
    other = None if add is None else 1
    fused, steps = (native.CpuPlan(NAMES[dtype]) for _ in range(2))
    weights = (
        tensor
        for name in ("features", "heatmaps", "next")
        for tensor in (w[name].values() if name in w else (None, None))
    )
    fused.head(0, *numbers, *weights, other)
    steps.conv(0, 4, **w["features"], relu=True)
    for name, number in wanted.items():
        steps.conv(4, number, **w[name], add=other if name == "next" else None)
    results = []
    for plan in (fused, steps):
        plan.finish(list(range(len(inputs))), list(wanted.values()), as_computed)
        results.append(plan.run(inputs))
    for one, several in zip(*results, strict=True):
        assert_same_bits(one, several)
        assert one.stride() == several.stride()
    return results[0]


# ---- agreement ----


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def assert_close_float32(out: Tensor, reference: Tensor, limit: float = 1e-5) -> None:
    """The largest error, relative to the largest value, is what float32 allows."""
    assert out.dtype == torch.float32
    assert reference.dtype == torch.float64
    assert out.shape == reference.shape
    if out.numel() == 0:
        return
    error = (out.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-30)
    assert error <= limit, f"relative error {error:.2e}"


def assert_close_bfloat16(out: Tensor, eager: Tensor, reference: Tensor) -> None:
    """The error is at most twice that of eager bfloat16, at the worst place and in the mean.

    And an ulp of the largest value, of the mean the less the more there are: of a few values
    eager's rounding of weights and of results may hit all by luck.
    """
    assert out.dtype == eager.dtype == torch.bfloat16
    assert reference.dtype == torch.float64
    assert out.shape == reference.shape
    if out.numel() == 0:
        return
    ours, theirs = (out.double() - reference).abs(), (eager.double() - reference).abs()
    size, ulp = reference.abs(), torch.finfo(torch.bfloat16).eps
    allowed_mean = 2 * theirs.mean() + ulp * size.mean() / out.numel() ** 0.5
    allowed = 2 * theirs.max() + ulp * size.max(), allowed_mean
    assert ours.max() <= allowed[0], f"{ours.max():.3e}, allowed {allowed[0]:.3e}"
    assert ours.mean() <= allowed[1], f"{ours.mean():.3e}, allowed {allowed[1]:.3e}"


# ---- a small hourglass: a stem, one level, heatmaps, and their way back into the features ----

CHANNELS, JOINTS = 24, 5
STEM = conv_weights(3, CHANNELS, (7, 7), seed=1)
SKIP = bottleneck_weights(CHANNELS, 12, CHANNELS, seed=2)
DOWN = bottleneck_weights(CHANNELS, 12, CHANNELS, seed=3)
UP = bottleneck_weights(CHANNELS, 12, CHANNELS, seed=4)
WIDEN = bottleneck_weights(CHANNELS, 20, 40, seed=5)
HEAD = conv_weights(40, JOINTS, (1, 1), norm=True, seed=6)
BACK = conv_weights(JOINTS, CHANNELS, (1, 1), seed=7)


def small_hourglass(element: str, high: bool = False) -> Any:
    """Values are numbered as the caller likes. Outputs: an end, a middle that is used later, and
    the same end again."""
    plan = native.CpuPlan(element, high=high)
    plan.conv(100, 1, **STEM, stride=(2, 2), padding=(3, 3), relu=True)
    plan.pool(1, 2, "max", (2, 2), (2, 2))
    plan.bottleneck(2, 3, **DOWN)
    plan.bottleneck(1, 4, **SKIP)
    plan.upsample_add([3], [2], 4, 5)
    plan.bottleneck(1, 6, **UP, low=3)
    plan.add(5, 6, 7)
    plan.bottleneck(7, 8, **WIDEN)
    plan.conv(8, 9, **HEAD)
    plan.conv(9, 10, **BACK, add=7)
    plan.finish(inputs=[100], outputs=[10, 9, 10])
    return plan


def small_hourglass_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    stem, skip, down, up, widen, head, back = (
        cast(w, x.dtype) for w in (STEM, SKIP, DOWN, UP, WIDEN, HEAD, BACK)
    )
    full = conv_reference(x, stem, 2, 3, relu=True)
    low = bottleneck_reference(torch.max_pool2d(full, 2), down)
    both = upsample_add_reference(low, bottleneck_reference(full, skip)) + bottleneck_reference(
        full, up, low
    )
    heatmaps = conv_reference(bottleneck_reference(both, widen), head)
    return conv_reference(heatmaps, back, add=both), heatmaps


def check_small_hourglass(plan: Any, dtype: torch.dtype, x: Tensor, limit: float = 1e-5) -> None:
    back, heatmaps, again = plan.run([x])
    assert again is back
    for out, low, reference in zip(
        (back, heatmaps),
        small_hourglass_reference(x.to(dtype)),
        small_hourglass_reference(x.to(dtype).double()),
        strict=True,
    ):
        assert out.dtype == x.dtype
        if dtype == torch.float32 and x.dtype == torch.float32:
            assert_close_float32(out, reference, limit)
        else:  # bfloat16 inside, or at the edges
            assert_close_bfloat16(out.bfloat16(), low.bfloat16(), reference)
