"""The kernels of the stem and of the head on the device, alone and in a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_checks import (
    DEVICE,
    KERNEL_DTYPES,
    REHEARSAL,
    assert_half,
    captured,
    kernel_ops,
    kernels,
    map_of,
    moved,
    multiprocessors,
    needs_kernels,
    poison,
    require_device,
    same_bits,
    shared_limit,
    small_network,
    some,
    synchronise,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_checks import LAYOUTS, Weights, cast, is_channels_last
from stem_checks import (
    PIXELS,
    head_reference,
    head_weights,
    image_of,
    stem_reference,
    stem_weights,
)
from torch import Tensor

from hgfast.plan import output_values
from hgfast.recognition import recognise, tensors_of
from hgfast.runtime import cuda, evidence, reference

require_device()
pytestmark = needs_kernels

EXAMPLES = settings(
    max_examples=some(150, 8), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=["bfloat16", "float16"])


def check_stem(x: Tensor, w: Weights, dtype: torch.dtype) -> Tensor:
    height, width = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    poison(x.shape[0], len(w["bias"]), height, width, dtype=dtype)
    y: Tensor = kernel_ops.stem(x, **w, dtype=dtype)
    assert is_channels_last(y)
    assert_half(y, stem_reference(x, w, dtype), stem_reference(x, w, torch.float64))
    return y


def run_head(y: Tensor, x: Tensor | None, w: Weights) -> tuple[Tensor | None, Tensor | None]:
    names = ("w1", "b1", "wh", "bh", "wn", "bn")
    head = kernels.CudaHead(y.dtype, *(w.get(name) for name in names))
    result: tuple[Tensor | None, Tensor | None] = head.run(y, x)
    return result


def check_head(y: Tensor, x: Tensor | None, w: Weights) -> None:
    batch, _, height, width = y.shape
    for name in ("bh", "bn"):
        if name in w:
            poison(batch, len(w[name]), height, width, dtype=y.dtype)
    results = run_head(y, x, w)
    eager, exact = head_reference(y, x, w, y.dtype), head_reference(y, x, w, torch.float64)
    for ours, theirs, judge in zip(results, eager, exact, strict=True):
        if ours is None or theirs is None or judge is None:
            assert ours is theirs is judge
            continue
        assert is_channels_last(ours)
        assert_half(ours, theirs, judge)


# ---- alone ----


@EXAMPLES
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 70),
    width=st.integers(1, 90),
    out=st.sampled_from([16, 32, 48, 64]),
    pixel=st.sampled_from(PIXELS),
    normalised=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(KERNEL_DTYPES),
)
def test_stem_of_any_shape(
    batch: int,
    height: int,
    width: int,
    out: int,
    pixel: torch.dtype,
    normalised: bool,
    layout: str,
    dtype: torch.dtype,
) -> None:
    w = moved(stem_weights(out, dtype=pixel if normalised or pixel == torch.uint8 else None))
    x = image_of(batch, height, width, dtype=pixel, layout=layout)
    on_device = torch.empty_strided(x.shape, x.stride(), dtype=pixel, device=DEVICE).copy_(x)
    check_stem(on_device, w, dtype)


@each_dtype
@pytest.mark.parametrize("pixel", PIXELS)
@pytest.mark.parametrize("batch", [1, some(16, 2)])
def test_stem_at_the_hourglass_size(batch: int, pixel: torch.dtype, dtype: torch.dtype) -> None:
    """The larger batch gives each block several tiles."""
    w = moved(stem_weights(64, dtype=pixel))
    x = image_of(batch, some(256, 64), some(256, 96), dtype=pixel).to(DEVICE)
    check_stem(x, w, dtype)


@EXAMPLES
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 21),
    width=st.integers(1, 37),
    channels=st.sampled_from([16, 48, 80]),
    middle=st.sampled_from([16, 64, 80, 144, 256]),
    joints=st.sampled_from([0, 1, 5, 17, 32, 33, 68, 128]),
    out=st.sampled_from([0, 16, 64, 80, 144]),
    residual=st.booleans(),
    dtype=st.sampled_from(KERNEL_DTYPES),
    channels_last=st.booleans(),
)
def test_head_of_any_shape(
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    joints: int,
    out: int,
    residual: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    joints = joints or (0 if out else 3)
    y = map_of(batch, channels, height, width, dtype=dtype, channels_last=channels_last)
    x = map_of(batch, out, height, width, dtype=dtype, seed=2) if out and residual else None
    check_head(y, x, moved(head_weights(channels, middle, joints, out)))


@each_dtype
@pytest.mark.parametrize("wanted", ["both", "heatmaps", "next"])
@pytest.mark.parametrize("batch", [1, some(16, 2)])
def test_head_at_the_hourglass_size(batch: int, wanted: str, dtype: torch.dtype) -> None:
    size = some(64, 8)
    joints, out = 17 * (wanted != "next"), 256 * (wanted != "heatmaps")
    y, x = (map_of(batch, 256, size, size, dtype=dtype, seed=seed) for seed in (1, 2))
    check_head(y, x if out else None, moved(head_weights(256, 256, joints, out)))


def test_every_variant_runs() -> None:
    """The larger tile of a head is taken where it gives every multiprocessor a block."""
    needed = {row["name"]: row["shared_bytes"] for row in kernels.head_variants()}
    stems = {row["name"] for row in kernels.stem_variants()}
    ran = set()
    for dtype in KERNEL_DTYPES:
        for out in (16, 64):
            x = image_of(1, 33, 40, dtype=torch.float32).to(DEVICE)
            check_stem(x, moved(stem_weights(out)), dtype)
            ran.add(kernels.last_path().removeprefix("cuda/"))
        for channels in (64, 256):
            w = moved(head_weights(channels, channels, 17, channels))
            for width in (100, 128 * multiprocessors()):
                y = map_of(1, channels, 1, width, dtype=dtype)
                check_head(y, None, w)
                ran.add(kernels.last_path().removeprefix("cuda/"))
    assert ran == stems | {name for name, most in needed.items() if most <= shared_limit()}


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_travels(value: float, dtype: torch.dtype) -> None:
    w = stem_weights(48)
    x = image_of(2, 40, 70, dtype=torch.float32)
    x[1, 0, 17, 29] = x[0, 2, 0, 69] = value
    out = kernel_ops.stem(x.to(DEVICE), **moved(w), dtype=dtype).cpu()
    exact = stem_reference(x, w, torch.float64)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    v = head_weights(32, 48, 17, 48)
    y = map_of(1, 32, 5, 7, dtype=dtype)
    y[0, 3, 1, 2] = value
    expected = head_reference(y.cpu(), None, v, torch.float64)
    for ours, judge in zip(run_head(y, None, moved(v)), expected, strict=True):
        assert ours is not None
        assert judge is not None
        assert torch.equal(ours.cpu().isnan(), judge.isnan())
        assert torch.equal(ours.cpu().isfinite(), judge.isfinite())


@each_dtype
def test_the_same_bits_again_and_again(dtype: torch.dtype) -> None:
    stem, head = moved(stem_weights(64)), moved(head_weights(64, 64, 17, 64))
    x = image_of(some(8, 1), some(128, 40), some(128, 40), dtype=torch.float32).to(DEVICE)
    y = map_of(some(8, 1), 64, 17, 19, dtype=dtype)
    first = kernel_ops.stem(x, **stem, dtype=dtype), *run_head(y, y, head)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(some(300, 2)):
        again = kernel_ops.stem(x, **stem, dtype=dtype), *run_head(y, y, head)
        for a, b in zip(again, first, strict=True):
            wrong += ~same_bits(a, b)
    assert int(wrong) == 0


# ---- in a network ----


@pytest.fixture
def executor_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(evidence.UNPROVEN, "stem,head")

    def build(model: torch.nn.Module, dtype: torch.dtype) -> Any:
        plan = recognise(model)
        weights = {name: tensors_of(model)[name].to(dtype) for name in plan.weights}
        found = cuda.Kernels(kernels, kernel_ops, DEVICE) if REHEARSAL else cuda.kernels_of(DEVICE)
        assert not isinstance(found, str), found
        return plan, weights, cuda.CudaExecutor(plan, weights, "medium", found)

    return build


@each_dtype
def test_a_network(executor_of: Any, dtype: torch.dtype) -> None:
    """Against the same Plan in plain PyTorch; then under a CUDA graph, with new images."""
    plan, weights, executor = executor_of(small_network(), dtype)
    paths = {executor.path(step) for step in plan.steps if step.kind in ("conv", "remerge")}
    assert paths == {f"cuda {str(dtype)[6:]} stem", f"cuda {str(dtype)[6:]} head"}
    x = torch.empty(2, 3, 64, 64, dtype=dtype, device=DEVICE)
    numbers = output_values(plan.outputs)
    replay, last = captured(lambda: executor.run([x])[numbers[-1]])
    for seed in range(2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        ours = executor.run([x])
        eager = reference.run(plan, weights, [x])
        exact = reference.run(plan, cast(weights, torch.float64), [x.double()])
        for number in numbers:
            assert_half(ours[number], eager[number], exact[number])
        replay()
        synchronise()
        assert torch.equal(last, ours[numbers[-1]])
