"""The kernels of the stem and of the head on the emulator, and networks that run in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from field import FIELD
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PreactBlock, image, randomise
from op_checks import LAYOUTS, Weights, is_channels_last, laid_out, needs_native, random_map
from stem_checks import (
    PIXELS,
    head_reference,
    head_weights,
    image_of,
    stem_reference,
    stem_weights,
)
from test_emulated_executor import EmulatedOps, assert_as_good_as_eager, executor_of
from test_emulated_kernels import LARGE, SMALL, assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import hgfast
from hgfast import ops as hgfast_ops
from hgfast.models import hourglass
from hgfast.plan import output_values
from hgfast.recognition import recognise
from hgfast.region import regions_of
from hgfast.runtime import cuda, evidence, fusions

emulator: Any = pytest.importorskip(
    "hgfast_emulator", reason="the emulator is not built (HGFAST_EMULATOR=1 builds it)"
)
pytestmark = needs_native
ops = torch.ops.hgfast_emulated

DTYPES = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def an_ordinary_device() -> Iterator[None]:
    emulator.set_seed(0)
    emulator.set_threads(0)
    emulator.set_device()
    yield
    emulator.set_device()
    emulator.set_seed(0)


# ---- stem ----


def check_stem(x: Tensor, w: Weights, dtype: torch.dtype) -> Tensor:
    y: Tensor = ops.stem(x, **w, dtype=dtype)
    assert is_channels_last(y)
    assert_close(y, stem_reference(x, w, dtype), stem_reference(x, w, torch.float64))
    return y


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    out=st.sampled_from([16, 32, 48, 64]),
    pixel=st.sampled_from(PIXELS),
    normalised=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    multiprocessors=st.sampled_from([1, 132]),  # several tiles a block, and one
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 4),
)
def test_a_stem_of_any_shape(
    batch: int,
    height: int,
    width: int,
    out: int,
    pixel: torch.dtype,
    normalised: bool,
    layout: str,
    multiprocessors: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    emulator.set_device(multiprocessors)
    emulator.set_seed(seed)
    # Bytes as they are would leave the range in which float16 is of use.
    w = stem_weights(out, dtype=pixel if normalised or pixel == torch.uint8 else None)
    check_stem(image_of(batch, height, width, dtype=pixel, layout=layout), w, dtype)


@each_dtype
@pytest.mark.parametrize("out", [16, 64])
def test_every_instance_of_the_stem_at_its_tile_edges(out: int, dtype: torch.dtype) -> None:
    """Tiles are 8x16: one and a pixel, one less a pixel, and a whole one, from odd images too."""
    w = stem_weights(out)
    for height, width in ((18, 29), (13, 33), (16, 32), (15, 31)):
        check_stem(image_of(2, height, width, dtype=dtype), w, dtype)
        name = f"stem<{str(dtype)[6:]}, {32 if out == 16 else 64}>"
        assert emulator.counters()["name"] == name
        assert emulator.last_path() == f"cuda/{name}"
    assert {row["name"] for row in emulator.stem_variants()} >= {name}


def test_bytes_are_numbers() -> None:
    """An image of bytes gives the same bits as the same numbers in any other dtype."""
    w = stem_weights(16, dtype=torch.uint8)
    x = image_of(1, 20, 20, dtype=torch.uint8)
    y = ops.stem(x, **w)
    assert y.dtype == torch.bfloat16
    for pixel in PIXELS[1:]:  # each holds 0 to 255 exactly
        for layout in LAYOUTS:
            assert torch.equal(ops.stem(laid_out(x.to(pixel), layout), **w, dtype=y.dtype), y)


def test_an_image_from_a_file_is_read_where_it_lies() -> None:
    """NHWC bytes, one image for all of a batch, and a part of a larger image."""
    w = stem_weights(16, dtype=torch.uint8)
    photo = image_of(1, 30, 40, dtype=torch.uint8, layout="channels_last")
    cut = photo[:, :, 3:24, 5:36]
    copied = cut.clone()
    assert torch.equal(ops.stem(cut, **w), ops.stem(copied, **w))
    again = ops.stem(cut.expand(3, -1, -1, -1), **w)
    assert torch.equal(again, ops.stem(copied, **w).expand(3, -1, -1, -1))
    # What was asked of memory: the image and its halos, in bytes, and no copy of them before.
    pixels = copied.shape[2] * copied.shape[3]
    assert emulator.counters()["global_bytes_loaded"] >= 3 * pixels


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_travel_through_a_stem(value: float) -> None:
    """Also where a row of the kernel is padded: 0 times infinity would be NaN."""
    w = stem_weights(48)
    w["weight"] = w["weight"].abs()
    x = image_of(1, 40, 70, dtype=torch.float32)
    x[0, 0, 17, 29] = x[0, 2, 0, 69] = x[0, 1, 39, 0] = value
    y, exact = ops.stem(x, **w, dtype=torch.bfloat16), stem_reference(x, w, torch.float64)
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.isinf())
    assert y.isfinite().float().mean() > 0.9
    assert not torch.equal(y, ops.stem(x.nan_to_num(0, 0, 0), **w, dtype=torch.bfloat16))


def test_the_padding_is_not_normalised() -> None:
    w = stem_weights(16, dtype=torch.float32)
    w["bias"] += 100  # so that no ReLU hides anything
    check_stem(torch.zeros(1, 3, 9, 9), w, torch.float16)


@each_dtype
def test_a_stem_gives_the_same_bits_in_any_order_of_threads(dtype: torch.dtype) -> None:
    emulator.set_device(1)
    w, x = stem_weights(64), image_of(2, 47, 70, dtype=torch.float32)
    y = ops.stem(x, **w, dtype=dtype)
    for seed in range(1, 4):
        emulator.set_seed(seed)
        emulator.set_threads(1 + seed % 2)
        assert torch.equal(ops.stem(x, **w, dtype=dtype), y)


def test_a_stem_on_a_gpu_agrees_with_the_op_on_a_cpu() -> None:
    w, x = stem_weights(32, dtype=torch.uint8), image_of(1, 21, 33, dtype=torch.uint8)
    ours, theirs = ops.stem(x, **w), hgfast_ops.stem(x, **w)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("out", "dtype", "message"),
    [
        (24, torch.bfloat16, "expected a multiple of 16 channels up to 64 on a GPU, given 24"),
        (80, torch.bfloat16, "expected a multiple of 16 channels up to 64 on a GPU, given 80"),
        (16, torch.float32, "expected bfloat16 or float16, given Float"),
    ],
)
def test_stems_without_a_kernel(out: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=f"hgfast::stem: {message}"):
        ops.stem(torch.zeros(1, 3, 8, 8), **stem_weights(out), dtype=dtype)


# ---- head ----


def run_head(y: Tensor, x: Tensor | None, w: Weights) -> tuple[Tensor | None, Tensor | None]:
    names = ("w1", "b1", "wh", "bh", "wn", "bn")
    result: tuple[Tensor | None, Tensor | None] = emulator.CudaHead(
        y.dtype, *(w.get(name) for name in names)
    ).run(y, x)
    return result


def check_head(y: Tensor, x: Tensor | None, w: Weights) -> tuple[Tensor | None, Tensor | None]:
    results = run_head(y, x, w)
    eager, exact = head_reference(y, x, w, y.dtype), head_reference(y, x, w, torch.float64)
    for ours, theirs, judge in zip(results, eager, exact, strict=True):
        if ours is None or theirs is None or judge is None:
            assert ours is theirs is judge
            continue
        assert is_channels_last(ours)
        assert_close(ours, theirs, judge)
    return results


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 20),
    channels=st.sampled_from([16, 48, 80]),
    middle=st.sampled_from([16, 48, 64, 80, 144]),
    joints=st.sampled_from([0, 1, 5, 17, 32, 33, 68, 128]),
    out=st.sampled_from([0, 16, 64, 80, 144]),
    residual=st.booleans(),
    multiprocessors=st.sampled_from([LARGE, SMALL]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 4),
)
def test_a_head_of_any_shape(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    joints: int,
    out: int,
    residual: bool,
    multiprocessors: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    joints = joints or (0 if out else 3)
    emulator.set_device(multiprocessors)
    emulator.set_seed(seed)
    y = random_map(batch, channels, height, width, dtype=dtype, layout=layout)
    x = random_map(batch, out, height, width, dtype=dtype, layout=layout, seed=2)
    check_head(y, x if out and residual else None, head_weights(channels, middle, joints, out))


@each_dtype
@pytest.mark.parametrize("multiprocessors", [LARGE, SMALL])
@pytest.mark.parametrize("channels", [64, 256])
def test_every_instance_of_the_head_at_its_tile_edges(
    channels: int, multiprocessors: int, dtype: torch.dtype
) -> None:
    """A whole tile, one pixel more, and one less, of an hourglass's channels."""
    pixels = 128 if multiprocessors == LARGE else 32
    emulator.set_device(multiprocessors)
    w = head_weights(channels, channels, 17, channels)
    for width in (pixels, pixels + 1, pixels - 1):
        y, x = (random_map(1, channels, 1, width, dtype=dtype, seed=seed) for seed in (1, 2))
        check_head(y, x, w)
        name = f"head<{str(dtype)[6:]}, {min(channels, 128)}, {pixels}>"
        assert emulator.counters()["name"] == name
        assert emulator.last_path() == f"cuda/{name}"
    assert {row["name"] for row in emulator.head_variants()} >= {name}


@pytest.mark.parametrize("joints", [5, 17])
def test_nan_and_infinity_travel_through_a_head(joints: int) -> None:
    """Also where channels and joints are padded, and into no other pixel."""
    w = head_weights(32, 48, joints, 48)
    w = {name: t.abs() for name, t in w.items()}
    y = random_map(1, 32, 5, 7, dtype=torch.bfloat16)
    x = random_map(1, 48, 5, 7, dtype=torch.bfloat16, seed=2)
    y[0, 3, 1, 2], y[0, 4, 2, 2], x[0, 7, 4, 6] = torch.inf, torch.nan, -torch.inf
    results, exact = run_head(y, x, w), head_reference(y, x, w, torch.float64)
    for ours, judge in zip(results, exact, strict=True):
        assert ours is not None
        assert judge is not None
        assert torch.equal(ours.isnan(), judge.isnan())
        assert torch.equal(ours.isinf(), judge.isinf())
        assert ours.isnan().any()
        assert ours.isinf().any()


@each_dtype
def test_a_head_gives_the_same_bits_in_any_order_of_threads(dtype: torch.dtype) -> None:
    emulator.set_device(LARGE)
    w = head_weights(64, 144, 17, 64)
    y, x = (random_map(1, 64, 9, 17, dtype=dtype, seed=seed) for seed in (1, 2))
    first = run_head(y, x, w)
    for seed in range(1, 4):
        emulator.set_seed(seed)
        for ours, theirs in zip(run_head(y, x, w), first, strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)


def test_heatmaps_belong_to_the_caller() -> None:
    """Their memory ends with a multiple of 16 bytes, and they are no view of it."""
    y = random_map(1, 32, 3, 3, dtype=torch.bfloat16)
    heatmaps, _ = run_head(y, None, head_weights(32, 32, 5, 0))
    assert heatmaps is not None
    assert not heatmaps._is_view()
    assert heatmaps.untyped_storage().nbytes() == -(-9 * 5 * 2 // 16) * 16
    assert (
        heatmaps.stride() == torch.empty(1, 5, 3, 3).to(memory_format=torch.channels_last).stride()
    )


def test_what_is_not_wanted_is_not_computed() -> None:
    """Products and bytes written, with both results and with one of them."""
    y, x = (random_map(1, 64, 16, 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    written = {}
    for joints, out in ((17, 64), (17, 0), (0, 64)):
        check_head(y, x if out else None, head_weights(64, 64, joints, out))
        c = emulator.counters()
        written[joints, out] = c["global_bytes_stored"]
        assert c["flops"] == 2 * 256 * 64 * (64 + (32 if joints else 0) + out)
        assert c["global_bytes_stored"] == 256 * (joints + out) * 2
    assert written[17, 0] + written[0, 64] == written[17, 64]


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((24, 32, 5, 32), r"its channels \(24, 32, 32\) are not multiples of 16"),
        ((32, 32, 129, 32), "its 129 heatmaps are more than 128"),
        ((32, 8192, 5, 32), r"its 8192 middle channels need \d+ bytes of shared memory, and this"),
    ],
)
def test_heads_without_a_kernel(channels: tuple[int, int, int, int], message: str) -> None:
    y = torch.zeros(1, channels[0], 2, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"head: {message}"):
        run_head(y, None, head_weights(*channels))


W = head_weights(32, 16, 5, 48)
Y = torch.zeros(1, 32, 4, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("y", "x", "change", "message"),
    [
        (Y[:, :16], None, {}, "expected y of 32 channels, as w1 has"),
        (Y, Y, {}, r"expected x of shape \[1, 48, 4, 4\], given \[1, 32, 4, 4\]"),
        (Y, Y, {"wn": None, "bn": None}, "expected no x where next is not wanted"),
        (Y, None, {"bn": None}, "expected both wn and bn or neither"),
        (Y, None, {"wh": torch.zeros(5, 8, 1, 1)}, r"expected wh of shape \[5, 16, 1, 1\]"),
        (Y, None, dict.fromkeys(("wh", "bh", "wn", "bn")), "expected heatmaps or next"),
    ],
)
def test_wrong_heads(y: Tensor, x: Tensor | None, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"head: {message}"):
        run_head(y, x, {**W, **change})


# ---- what a launch moves ----


def counted(call: Any) -> dict[str, Any]:
    emulator.model_memory(True)
    try:
        call()
    finally:
        emulator.model_memory(False)
    counters: dict[str, Any] = emulator.counters()
    return counters


@pytest.mark.parametrize("pixel", PIXELS)
def test_a_stem_moves_what_it_must(pixel: torch.dtype) -> None:
    """Nothing twice through the L2; 160 columns for 147; every tile whole."""
    w = stem_weights(64, dtype=pixel)
    x = image_of(1, 64, 96, dtype=pixel, layout="channels_last")
    stem = emulator.CudaStem(torch.bfloat16, **w)
    c = counted(lambda: stem.run(x))
    assert c["dram_bytes_read"] + c["dram_bytes_written"] <= 1.02 * c["minimum_bytes"]
    weights = 64 * 160 * 2 + 4 * (64 + 6)
    assert c["minimum_bytes"] == x.numel() * x.itemsize + 32 * 48 * 64 * 2 + weights
    assert c["flops"] == 2 * 32 * 48 * 64 * 160


@pytest.mark.parametrize("joints", [17, 0])
def test_a_head_moves_what_it_must(joints: int) -> None:
    """No bank conflicts, nothing twice through the L2, and 32 joints for 17."""
    w = head_weights(128, 128, joints, 128)
    y, x = (
        random_map(1, 128, 16, 16, dtype=torch.bfloat16, layout="channels_last", seed=seed)
        for seed in (1, 2)
    )
    emulator.set_device(LARGE)
    c = counted(lambda: run_head(y, x, w))
    assert c["dram_bytes_read"] + c["dram_bytes_written"] <= 1.02 * c["minimum_bytes"]
    assert c["matrix_conflicts"] == 0
    assert c["flops"] == 2 * 256 * 128 * (128 + 128 + (32 if joints else 0))


# ---- networks ----


@pytest.fixture
def kernels() -> cuda.Kernels:
    return cuda.Kernels(emulator, EmulatedOps, CPU)


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(evidence.UNPROVEN, "stem,head")


@pytest.fixture
def on_emulated_gpu(monkeypatch: pytest.MonkeyPatch, kernels: cuda.Kernels) -> None:
    """Models on the CPU run as models on a GPU do."""

    def choose(plan: Any, weights: Any, precision: str, as_computed: bool = False) -> Any:
        return cuda.CudaExecutor(plan, weights, precision, kernels, as_computed)

    monkeypatch.setattr("hgfast.region.choose", choose)


def small_hourglass(stacks: int = 2, joints: int = 5) -> nn.Module:
    torch.manual_seed(1)
    model = hourglass(stacks=stacks, features=64, blocks=1, depth=2, joints=joints)
    return randomise(model).eval().requires_grad_(False)


def paths(executor: cuda.CudaExecutor, plan: Any) -> dict[str, str]:
    return {step.name: executor.path(step) for step in plan.steps}


def test_unproven_kernels_wait_to_be_asked_for(
    kernels: cuda.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked, stem, head in (
        ("", "cuDNN bfloat16", "cuDNN bfloat16"),
        ("stem", "cuda bfloat16 stem", "cuDNN bfloat16"),
        ("head", "cuDNN bfloat16", "cuda bfloat16 head"),
        ("stem,head", "cuda bfloat16 stem", "cuda bfloat16 head"),
    ):
        monkeypatch.setenv(evidence.UNPROVEN, asked)
        plan, executor = executor_of(small_hourglass(), torch.bfloat16, "medium", kernels)
        path = paths(executor, plan)
        assert ",".join(sorted(executor.features, reverse=True)) == asked
        assert path["stem.conv"] == stem
        for name in ("heads.0.conv", "heads.0.heatmap", "remerges.0.features", "heads.1.heatmap"):
            assert path[name] == head


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_a_stacked_hourglass(dtype: torch.dtype, kernels: cuda.Kernels) -> None:
    x = image(2)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_as_good_as_eager(
            small_hourglass(), dtype, x.contiguous(memory_format=layout), kernels
        )


@pytest.mark.parametrize("name", ["bearpaw", "FAN", "princeton"])
def test_the_fields_networks_have_a_stem_and_heads(name: str, kernels: cuda.Kernels) -> None:
    """Of the sizes that people train; they are read, not run."""
    plan = recognise(FIELD[name].build_full().eval())
    outputs = output_values(plan.outputs)
    found = fusions.heads(plan.steps, plan.inputs, outputs, kernels.takes_head)
    assert sum(map(fusions.is_stem, plan.steps)) == 1
    merges = sum(step.kind == "remerge" for step in plan.steps)
    assert [head.merge is not None for head in found] == [True] * merges + [False]
    assert all(head.heatmaps is not None for head in found)


@pytest.mark.usefixtures("switched_on")
def test_the_image_is_not_converted_before_the_stem(kernels: cuda.Kernels) -> None:
    """One kernel reads the caller's float32, contiguous as it is."""
    plan, executor = executor_of(small_hourglass(), torch.float32, "medium", kernels)
    seen = []
    first = executor._launches[0]
    executor._launches[0] = replace(
        first, run=lambda values: (seen.append(values[plan.inputs[0]]), first.run(values))[1]
    )
    x = image(1)
    executor.run([x])
    assert seen[0] is x


class TwoReaders(nn.Module):
    """A stem whose image somebody else reads too, and a 1x1 whose result is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=2, padding=3)
        self.features = nn.Conv2d(16, 32, 1)
        self.heatmaps = nn.Conv2d(32, 5, 1)
        self.block = PreactBlock(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = F.relu(self.features(F.relu(self.stem(x))))
        return self.heatmaps(z), self.block(z), F.avg_pool2d(x, 2)


@pytest.mark.usefixtures("switched_on")
def test_what_others_read_stays(kernels: cuda.Kernels) -> None:
    torch.manual_seed(0)
    model = randomise(TwoReaders()).eval().requires_grad_(False)
    plan, executor = executor_of(model, torch.bfloat16, "medium", kernels)
    path = paths(executor, plan)
    assert path["stem"] == "cuda bfloat16 stem"
    assert path["features"] == path["heatmaps"] == "cuDNN bfloat16"
    assert_as_good_as_eager(model, torch.bfloat16, image(1, 16, 20), kernels)


class Late(nn.Module):
    """The heatmaps are read before what is added behind them is there."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.block = PreactBlock(32, 32)
        self.features, self.heatmaps = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 5, 1)
        self.direct, self.behind = nn.Conv2d(32, 32, 1), nn.Conv2d(5, 32, 1)
        self.late = late

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.block(x)
        z = F.relu(self.features(y))
        heatmaps = self.heatmaps(z)
        more = torch.sigmoid(heatmaps)
        other = x * more.mean(1, keepdim=True) if self.late else y
        return other + self.direct(z) + self.behind(heatmaps), more


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("late", [False, True])
def test_what_is_added_must_be_there(late: bool, kernels: cuda.Kernels) -> None:
    torch.manual_seed(0)
    model = randomise(Late(late)).eval().requires_grad_(False)
    plan, executor = executor_of(model, torch.bfloat16, "medium", kernels)
    fused = "cuDNN bfloat16" if late else "cuda bfloat16 head"
    assert paths(executor, plan)["features"] == fused
    assert_as_good_as_eager(model, torch.bfloat16, torch.randn(1, 32, 6, 7), kernels)


@pytest.mark.usefixtures("switched_on")
def test_memory_is_given_back_on_the_way(kernels: cuda.Kernels) -> None:
    """Nothing is left over but the outputs."""
    plan, executor = executor_of(small_hourglass(), torch.bfloat16, "medium", kernels)
    values = {plan.inputs[0]: image(1)}
    for launch in executor._launches:
        values[launch.work.gives[0]] = launch.run(values)
        for number in launch.dead:
            del values[number]
    assert set(values) == set(output_values(plan.outputs))


@pytest.mark.usefixtures("switched_on", "on_emulated_gpu")
def test_only_the_heatmaps_that_are_wanted() -> None:
    """With decoding, the last stack's; the heads before them write none."""
    model = small_hourglass(stacks=3)
    fast = hgfast.optimize(model, precision="medium", decode="quarter")
    (region,) = regions_of(fast)
    executor = region.pack().executor
    assert isinstance(executor, cuda.CudaExecutor)
    heads = list(dict.fromkeys(executor._heads.values()))
    assert [head.heatmaps is not None for head in heads] == [False, False, True]
    assert [head.merge is not None for head in heads] == [True, True, False]
    # The others' are no steps any more, as a launch of their own.
    convs = [step for step in executor._plan.steps if step.kind in ("conv", "remerge")]
    assert {executor.path(step) for step in convs} == {"cuda bfloat16 stem", "cuda bfloat16 head"}
    assert sum(step.name.endswith("heatmap") for step in convs) == 1
    with torch.inference_mode():
        heatmaps, (coords, _) = region.both(image())
    assert heatmaps.dtype == torch.bfloat16
    assert heatmaps.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(coords, hgfast.decode(heatmaps)[0])
    assert hgfast.verify(model, fast, image()).ok


@pytest.mark.usefixtures("switched_on", "on_emulated_gpu")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_optimize_and_verify(dtype: torch.dtype) -> None:
    model = small_hourglass(joints=17).to(dtype)
    fast = hgfast.optimize(model, precision="medium")
    element = "bfloat16" if dtype == torch.float32 else str(dtype)[6:]
    backends = {row.backend for row in hgfast.report(fast).replaced}
    assert backends == {f"cuda {element}", f"cuda {element} stem", f"cuda {element} head"}
    result = hgfast.verify(model, fast, image().to(dtype))
    assert result.ok, str(result)
