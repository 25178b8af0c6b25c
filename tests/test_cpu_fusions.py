"""What the CPU runs as one step gives the bits of its parts one after the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    MAP_DTYPES,
    assert_close_float32,
    assert_same_bits,
    bottleneck_arguments,
    bottleneck_weights,
    check_given_image,
    check_head,
    check_pooled_bottleneck,
    check_pooling_bottleneck,
    conv_weights,
    head_weights,
    native,
    needs_native,
    random_map,
)
from torch import Tensor, nn

from hgfast import _native
from hgfast.models import hourglass
from hgfast.models.hourglass import Residual
from hgfast.plan import Bottleneck, Plan, Pool, Remerge, output_values
from hgfast.recognition import recognise
from hgfast.runtime import fusions, reference
from hgfast.runtime.cpu import CpuExecutor

pytestmark = needs_native

sizes = st.integers(1, 13)


def with_oddities(x: Tensor) -> Tensor:
    """Some of its values are NaN, infinite or negative zeros."""
    flat = x.flatten()
    for i, oddity in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        flat[i :: 41 + 2 * i] = oddity
    return flat.view(x.shape)


# ---- a pool and the block behind it ----


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=sizes,
    width=sizes,
    odd=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    channels=st.sampled_from([1, 3, 16, 20, 33, 64]),
    middle=st.sampled_from([1, 8, 17, 32]),
    out=st.sampled_from([0, 5, 16, 40]),
    low=st.booleans(),
    norm=st.booleans(),
    relu=st.booleans(),
    odd_values=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    given_dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_pooled_blocks(
    batch: int,
    height: int,
    width: int,
    odd: tuple[int, int],
    channels: int,
    middle: int,
    out: int,
    low: bool,
    norm: bool,
    relu: bool,
    odd_values: bool,
    dtype: torch.dtype,
    given_dtype: torch.dtype,
    layout: str,
) -> None:
    out = out or channels
    if low:
        height, width = 2 * height, 2 * width
    w = bottleneck_weights(channels, middle, out, norm=norm)
    x = random_map(batch, channels, 2 * height + odd[0], 2 * width + odd[1], dtype=given_dtype)
    if odd_values:
        x = with_oddities(x)
    half = random_map(batch, out, height // 2, width // 2, dtype=given_dtype, seed=2)
    check_pooled_bottleneck(
        dtype,
        x.contiguous(memory_format=torch.channels_last) if layout != "nchw" else x,
        w,
        half if low else None,
        relu,
    )


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    channels=st.sampled_from([1, 3, 16, 20, 33, 64]),
    middle=st.sampled_from([1, 8, 17, 32]),
    out=st.sampled_from([0, 5, 16, 40]),
    norm=st.booleans(),
    relu=st.booleans(),
    pool=st.booleans(),
    odd_values=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_pooling_blocks(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    out: int,
    norm: bool,
    relu: bool,
    pool: bool,
    odd_values: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    assume(not pool or (height >= 4 and width >= 4))
    x = random_map(batch, channels, height, width, dtype=dtype, layout=layout)
    if odd_values and layout == "nchw":
        x = with_oddities(x)
    w = bottleneck_weights(channels, middle, out or channels, norm=norm)
    check_pooling_bottleneck(dtype, x, w, relu, pool)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_pooling_block_on_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    w = bottleneck_weights(40, 24, 40)
    x = with_oddities(random_map(2, 40, 71, 45, dtype=dtype))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_pooling_bottleneck(dtype, x, w)
    finally:
        torch.set_num_threads(before)


def test_a_pooling_block_that_does_not_fit() -> None:
    w = bottleneck_arguments(bottleneck_weights(8, 4, 8))
    plan = native.CpuPlan("float32")
    with pytest.raises(ValueError, match="expected no low where y is pooled"):
        plan.bottleneck(0, 2, **w, low=1, pool_y=True)
    plan = native.CpuPlan("float32")
    plan.bottleneck(0, 1, **w, pool_y=True)
    plan.finish([0], [1])
    with pytest.raises(ValueError, match="a result at least as large as the window of 2x2"):
        plan.run([torch.zeros(1, 8, 1, 4)])


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_pooled_block_on_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    w = bottleneck_weights(40, 24, 40)
    x = with_oddities(random_map(2, 40, 70, 45, dtype=dtype))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_pooled_bottleneck(dtype, x, w)
    finally:
        torch.set_num_threads(before)


def test_nothing_to_pool() -> None:
    plan = native.CpuPlan("float32")
    plan.bottleneck(0, 1, **bottleneck_weights(8, 4, 8), pool=True)
    plan.finish([0], [1])
    message = r"step 0 \(bottleneck\): expected x to be at least as large as the window of 2x2"
    with pytest.raises(ValueError, match=message):
        plan.run([torch.zeros(1, 8, 1, 4)])


# ---- an image as it is given ----


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 3),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([1, 2, 3, 4, 15]),
    out=st.sampled_from([1, 16, 40]),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    norm=st.booleans(),
    odd_values=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    given_dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from([*LAYOUTS, "expanded"]),
)
def test_images_as_given(
    batch: int,
    size: tuple[int, int],
    channels: int,
    out: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    norm: bool,
    odd_values: bool,
    dtype: torch.dtype,
    given_dtype: torch.dtype,
    layout: str,
) -> None:
    for n, k, p, d in zip(size, kernel, padding, dilation, strict=True):
        assume(n + 2 * p > (k - 1) * d)
    w = conv_weights(channels, out, kernel, norm=norm)
    if layout == "expanded":
        x = random_map(1, 1, *size, dtype=given_dtype).expand(batch, channels, -1, -1)
    else:
        x = random_map(batch, channels, *size, dtype=given_dtype, layout=layout)
        if odd_values and layout == "nchw":
            x = with_oddities(x)
    check_given_image(dtype, x, w, stride=stride, padding=padding, dilation=dilation, relu=True)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stems_of_pose_networks(dtype: torch.dtype, layout: str) -> None:
    for kernel, stride, padding, height, width in [
        (7, 2, 3, 256, 192),
        (3, 2, 1, 128, 96),
        (4, 4, 0, 64, 64),
    ]:
        w = conv_weights(3, 64, (kernel, kernel))
        x = random_map(2, 3, height, width, layout=layout)
        check_given_image(
            dtype, x, w, stride=(stride, stride), padding=(padding, padding), relu=True
        )


def test_who_else_reads_the_image_has_it_laid_out() -> None:
    """Two convolutions read it, one of which adds it; it is an output, too."""
    w = conv_weights(3, 3, (3, 3))
    plan = native.CpuPlan("float32")
    plan.conv(0, 1, **w, padding=(1, 1))
    plan.conv(0, 2, **w, padding=(1, 1), add=0)
    plan.conv(0, 3, **w, padding=(1, 1), add=1)
    plan.finish([0], [0, 1, 2, 3])
    x = random_map(2, 3, 9, 20)
    given_, one, other, third = plan.run([x])
    expected = plan.run([x.contiguous(memory_format=torch.channels_last)])
    for a, b in zip((given_, one, other, third), expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(given_, x)
    assert torch.equal(other, one + x)


# ---- heads ----


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.sampled_from([1, 20, 32, 64]),
    middle=st.sampled_from([1, 17, 32, 48]),
    joints=st.sampled_from([0, 1, 16, 17]),
    out=st.sampled_from([0, 5, 64]),
    add=st.booleans(),
    odd_values=st.booleans(),
    as_computed=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    given_dtype=st.sampled_from(MAP_DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_heads(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    joints: int,
    out: int,
    add: bool,
    odd_values: bool,
    as_computed: bool,
    dtype: torch.dtype,
    given_dtype: torch.dtype,
    layout: str,
) -> None:
    assume(joints or out)
    x = random_map(batch, channels, height, width, dtype=given_dtype, layout=layout)
    if odd_values and layout == "nchw":
        x = with_oddities(x)
    other = random_map(batch, out, height, width, dtype=given_dtype, seed=2)
    w = head_weights(channels, middle, joints, out)
    check_head(dtype, x, w, other if add and out else None, as_computed)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_head_on_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    x = with_oddities(random_map(2, 64, 30, 21, dtype=dtype))
    add = random_map(2, 40, 30, 21, dtype=dtype, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_head(dtype, x, head_weights(64, 48, 17, 40), add)
    finally:
        torch.set_num_threads(before)


def test_heatmaps_that_somebody_reads() -> None:
    """They are an output in the caller's layout, and a value in the kernels'."""
    w = head_weights(16, 24, 5, 0)
    plan = native.CpuPlan("float32")
    plan.head(0, 1, None, *w["features"].values(), *w["heatmaps"].values())
    plan.add(1, 1, 2)
    plan.finish([0], [1, 2])
    maps, twice = plan.run([random_map(2, 16, 7, 9)])
    assert maps.is_contiguous()
    assert torch.equal(maps + maps, twice)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None, None, "features"), r"expected w_maps, w_next or both, given neither"),
        ((0, None, 2, "features", "heatmaps"), r"expected an output where there are weights"),
        ((0, 1, None, "features", "wide"), r"expected w_maps of a 1x1 convolution"),
        ((0, 1, None, "features", "features"), r"expected w_maps to read 24 channels.*given 16"),
    ],
)
def test_heads_that_make_no_sense(arguments: tuple[Any, ...], message: str) -> None:
    w = {**head_weights(16, 24, 5, 0), "wide": conv_weights(24, 5, (3, 3))}
    plan = native.CpuPlan("float32")
    numbers, names = arguments[:3], arguments[3:]
    with pytest.raises(ValueError, match=r"step 0 \(head\): " + message):
        plan.head(*numbers, *(tensor for name in names for tensor in w[name].values()))


# ---- in networks ----


class Recorder:
    """A CpuPlan that remembers the names of its steps."""

    steps: list[str]

    def __init__(self, *args: Any, **options: Any) -> None:
        self._plan = native.CpuPlan(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name not in ("finish", "run", "path", "products"):
            self.steps.append(name)
        return getattr(self._plan, name)


def recorded_steps(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, module: nn.Module
) -> tuple[CpuExecutor, Counter[str]]:
    """An executor, and how many steps of which kind its kernels were given."""
    Recorder.steps = []
    with monkeypatch.context() as patch:
        patch.setattr(
            _native, "load", lambda: SimpleNamespace(CpuPlan=Recorder, Arena=native.Arena)
        )
        executor = CpuExecutor(plan, dict(module.state_dict()), "highest", as_computed=True)
    return executor, Counter(Recorder.steps)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return hourglass(stacks=2, features=32, joints=5, depth=2).eval().to(dtype)


@pytest.mark.parametrize("dtype", MAP_DTYPES)
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, precision: str, layout: str
) -> None:
    module = network(dtype)
    plan, weights = recognise(module), dict(module.state_dict())
    x = random_map(2, 3, 96, 64, dtype=dtype, layout=layout)
    fused = CpuExecutor(plan, weights, precision).run([x])
    with monkeypatch.context() as patch:
        patch.setattr(fusions, "pooled_blocks", lambda *_: {})
        patch.setattr(fusions, "pooling_blocks", lambda *_: {})
        patch.setattr(fusions, "heads", lambda *_: [])
        steps = CpuExecutor(plan, weights, precision).run([x])
    assert fused.keys() == steps.keys()
    for number, expected in steps.items():
        assert_same_bits(fused[number], expected)


def test_the_largest_map_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stem's first block gives the maximum of its result, unless that is wanted, too."""
    module = network(torch.float32)
    plan = recognise(module)
    (largest,) = fusions.pooling_blocks(plan.steps, output_values(plan.outputs))
    assert plan.shapes((1, 3, 96, 64))[largest][2:] == (48, 32)
    wanted = replace(plan, outputs=(largest, *output_values(plan.outputs)))
    assert not fusions.pooling_blocks(plan.steps, output_values(wanted.outputs))
    executor, steps = recorded_steps(monkeypatch, wanted, module)
    assert steps["pool"] == 0  # of the block behind it
    x = random_map(1, 3, 96, 64)
    for number, expected in reference.run(wanted, dict(module.state_dict()), [x]).items():
        if number in output_values(wanted.outputs):
            found = executor.run([x])[number]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_pools_in_a_network_are_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network(torch.float32)
    plan = recognise(module)
    assert sum(isinstance(step, Pool) for step in plan.steps) > 2
    _, steps = recorded_steps(monkeypatch, plan, module)
    assert steps["pool"] == 0
    assert steps["bottleneck"] == sum(isinstance(step, Bottleneck) for step in plan.steps)


def test_heads_in_a_network_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network(torch.float32)
    plan = recognise(module)
    executor, steps = recorded_steps(monkeypatch, plan, module)
    assert (steps["head"], steps["conv"]) == (2, 1)  # the stem
    paths = Counter(executor.path(step) for step in plan.steps)
    assert paths[f"{executor.backend} head"] == 5
    # The features in between, where they are wanted, are no head's.
    features = next(step.inputs[0] for step in plan.steps if isinstance(step, Remerge))
    wanted = replace(plan, outputs=(features, *output_values(plan.outputs)))
    executor, steps = recorded_steps(monkeypatch, wanted, module)
    assert (steps["head"], steps["conv"]) == (1, 4)
    x = random_map(1, 3, 96, 64)
    expected = reference.run(plan, dict(module.state_dict()), [x])
    for number, value in executor.run([x]).items():
        torch.testing.assert_close(value, expected[number], rtol=1e-4, atol=1e-4)


def test_a_maximum_that_is_wanted_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each maximum of a network, as one of its outputs."""
    module = network(torch.float32)
    plan, x = recognise(module), random_map(1, 3, 96, 64)
    alone = []
    for pool in plan.steps:
        if not isinstance(pool, Pool):
            continue
        wanted = replace(plan, outputs=(pool.output, plan.steps[-1].output))
        executor, steps = recorded_steps(monkeypatch, wanted, module)
        alone.append(steps["pool"])
        values = executor.run([x])
        (source,) = pool.inputs
        behind = replace(plan, outputs=(source,))
        before, _ = recorded_steps(monkeypatch, behind, module)
        assert torch.equal(values[pool.output], F.max_pool2d(before.run([x])[source], 2))
    # In the stem the block before it gives it; in an hourglass others read what it is taken of.
    assert alone == [0] + [1] * (len(alone) - 1)
    assert len(alone) > 2


class TwoReaders(nn.Module):
    """A maximum that two blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        half = F.max_pool2d(x, 2)
        both: Tensor = self.blocks[0](half) + self.blocks[1](half)
        return both


def test_a_maximum_with_two_readers_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = TwoReaders().eval()
    executor, steps = recorded_steps(monkeypatch, recognise(module), module)
    assert steps["pool"] == 1
    x = random_map(1, 16, 12, 10)
    (out,) = executor.run([x]).values()
    assert_close_float32(out.detach(), module.double()(x.double()).detach())
