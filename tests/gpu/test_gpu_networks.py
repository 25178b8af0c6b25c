"""Whole networks on the device: optimised, verified, and never eagerly by accident."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import elg
import numpy as np
import pytest
import torch
from gpu_checks import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    kernel_ops,
    kernels,
    needs_kernels,
    require_device,
    small_network,
    some,
)
from networks import randomise, small_hourglass
from torch import Tensor, nn

import hgfast
from hgfast.models import hourglass
from hgfast.region import regions_of
from hgfast.runtime import cuda, evidence

require_device()

#: The residual blocks' kernels of one architecture, of which this device may take none.
SPECIAL = (
    {
        name: kernel
        for name, kernel in cuda.Kernels(kernels, kernel_ops, DEVICE).special.items()
        if kernel is not None and not kernel.obstacle(DEVICE, 256, 128, 256, False)
    }
    if kernels is not None
    else {}
)
ELG_WEIGHTS = "HGFAST_ELG_WEIGHTS"
BACKEND = "cpu" if REHEARSAL else "cuda"


@pytest.fixture(autouse=True)
def _no_silent_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", hgfast.HgfastWarning)
        yield


@pytest.fixture
def on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rehearsal too, models run as they do on a GPU; in the emulated kernels."""
    if REHEARSAL:
        emulated = cuda.Kernels(kernels, kernel_ops, DEVICE)

        def choose(plan: Any, weights: Any, precision: str, as_computed: bool = False) -> Any:
            dtype = next(iter(weights.values())).dtype
            reason = cuda.unsupported(plan, dtype, precision, emulated)
            return reason or cuda.CudaExecutor(plan, weights, precision, emulated, as_computed)

        monkeypatch.setattr("hgfast.region.choose", choose)


@pytest.fixture
def unproven(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that are switched on besides."""
    features = str(request.param)
    monkeypatch.setenv(evidence.UNPROVEN, features)
    return features


#: All that there is; with graphs, whose replays verify judges too, but for a rehearsal.
EVERYTHING = "stem,head,throughput,latency" if REHEARSAL else "all"
with_features = pytest.mark.parametrize(
    "unproven", ["", "stem,head", "throughput", "latency", EVERYTHING], indirect=True
)


def network(stacks: int) -> nn.Module:
    torch.manual_seed(0)
    features = some(256, 64)
    return randomise(hourglass(stacks=stacks, features=features)).eval().to(DEVICE)


def image(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, height, width, generator=generator).to(DEVICE, dtype)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        found: list[Tensor] = torch.utils._pytree.tree_leaves(model(x))
    return found


def optimized(model: nn.Module, precision: str = "medium", backend: str = BACKEND) -> nn.Module:
    """Optimised; every residual block is in the kernels."""
    fast = hgfast.optimize(model, precision=precision, strict=True)
    report = hgfast.report(fast)
    blocks = [row.backend for row in report.replaced if "bottleneck" in row.kind]
    assert blocks
    assert all(block.startswith(backend) for block in blocks), str(report)
    return fast


def check(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    result = hgfast.verify(model, fast, x)
    assert result.ok, str(result)
    assert hgfast.report(fast).fallbacks == []


@pytest.mark.parametrize("stacks", [1, 2])
def test_a_float32_hourglass_at_medium(stacks: int) -> None:
    model = network(stacks)
    fast = optimized(model)
    x = image(2, some(256, 64), some(256, 128))
    check(model, fast, x)
    assert all(y.dtype == torch.float32 and y.device.type == DEVICE.type for y in outputs(fast, x))


@needs_kernels
@pytest.mark.usefixtures("on_the_kernels")
@with_features
@pytest.mark.parametrize("batch", [1] if REHEARSAL else [1, 16])
def test_an_hourglass_in_kernels_that_are_switched_on(batch: int, unproven: str) -> None:
    """Batch 1 is for clusters, batch 16 for the throughput kernel; a size that no tile divides."""
    torch.manual_seed(0)
    features = 64 if REHEARSAL and unproven in ("", "stem,head") else 256
    model = hourglass(some(2, 1), features, depth=some(4, 2))
    model = randomise(model).eval().to(DEVICE, DTYPES[0])
    fast = optimized(model, backend="cuda")
    x = image(batch, some(256, 32), some(192, 32), DTYPES[0])
    check(model, fast, x)
    wanted = set(evidence.FEATURES if unproven == "all" else unproven.split(","))
    used = {feature for region in regions_of(fast) for feature in region.features}
    assert used & {"stem", "head"} == wanted & {"stem", "head"}
    assert used & SPECIAL.keys() == wanted & SPECIAL.keys()


@pytest.mark.parametrize("stacks", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_an_hourglass_in_half_precision(stacks: int, dtype: torch.dtype) -> None:
    model = network(stacks).to(dtype)
    fast = optimized(model)
    x = image(2, some(256, 64), some(192, 64), dtype)
    check(model, fast, x)
    assert all(y.dtype == dtype for y in outputs(fast, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_sizes_and_batches(dtype: torch.dtype) -> None:
    model = small_network().to(dtype)
    fast = optimized(model)
    for batch, height, width in [(1, 16, 16), (0, 32, 32), (5, 48, 80), (2, 16, 112)]:
        x = image(batch, height, width, dtype)
        if batch:
            check(model, fast, x)
        for ours, theirs in zip(outputs(fast, x), outputs(model, x), strict=True):
            assert ours.shape == theirs.shape


def test_channels_last_input_gives_the_same_bits() -> None:
    fast = optimized(small_network().to(DTYPES[0]))
    x = image(2, 64, 64, DTYPES[0])
    other = x.contiguous(memory_format=torch.channels_last)
    for a, b in zip(outputs(fast, x), outputs(fast, other), strict=True):
        assert torch.equal(a, b)


def test_changed_weights_are_followed() -> None:
    model = small_network().to(DTYPES[0])
    fast = optimized(model)
    x = image(1, 64, 64, DTYPES[0])
    before = outputs(fast, x)[0]
    with torch.no_grad():
        for target in (model, fast):
            for parameter in target.parameters():
                parameter.mul_(1.25)
    check(model, fast, x)
    assert not torch.equal(before, outputs(fast, x)[0])


@needs_kernels
@pytest.mark.usefixtures("on_the_kernels")
@pytest.mark.parametrize("method", ["quarter", "dark"])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=lambda dtype: str(dtype)[6:])
def test_a_model_that_decodes(method: str, dtype: torch.dtype) -> None:
    model = small_network().to(dtype)
    fast = hgfast.optimize(model, precision="medium", strict=True, decode=method)
    x = image(2, 64, 64, dtype)
    check(model, fast, x)
    with torch.inference_mode():
        heatmaps, (coords, scores) = fast.forward.both(x)
    assert heatmaps.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    assert coords.shape == (*scores.shape, 2)
    assert coords.device.type == scores.device.type == DEVICE.type


@needs_kernels
@pytest.mark.usefixtures("on_the_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=lambda dtype: str(dtype)[6:])
def test_blocks_of_a_small_network_are_all_in_the_kernels(dtype: torch.dtype) -> None:
    model = small_network().to(dtype)
    check(model, optimized(model, backend="cuda"), image(2, 64, 32, dtype))


@needs_kernels
@pytest.mark.usefixtures("on_the_kernels")
def test_blocks_without_a_kernel_run_among_the_others() -> None:
    """8 channels at the stem are no multiple of 16."""
    model = small_hourglass(stacks=2).to(DEVICE, DTYPES[0])
    fast = hgfast.optimize(model, precision="medium", strict=True)
    backends = {row.backend for row in hgfast.report(fast).replaced if "bottleneck" in row.kind}
    assert any(backend.startswith("cuda") for backend in backends)
    assert any(backend.startswith("eager") for backend in backends)
    check(model, fast, image(2, 64, 32, DTYPES[0]))


@needs_kernels
@pytest.mark.usefixtures("on_the_kernels")
def test_no_float32_kernels_is_said() -> None:
    model = small_network()
    with pytest.raises(hgfast.OptimizationError, match="bfloat16"):
        hgfast.optimize(model, precision="highest", strict=True)


def test_moved_to_the_cpu_and_back() -> None:
    model = small_network()
    fast = optimized(model)
    x = image(1, 64, 64)
    before = outputs(fast, x)[0]
    fast.cpu()
    assert outputs(fast, x.cpu())[0].device.type == "cpu"
    fast.to(DEVICE)
    assert torch.equal(outputs(fast, x)[0], before)
    check(model, fast, x)


def test_a_wrong_network_is_found_out() -> None:
    """verify on the device can say no."""
    model = small_network()
    fast = optimized(copy.deepcopy(model))
    with torch.no_grad():
        next(fast.parameters()).mul_(1.5)
    assert not hgfast.verify(model, fast, image(1, 64, 64))


@with_features
@pytest.mark.parametrize("precision", ["medium"])
def test_elg(precision: str, unproven: str) -> None:
    """A trained network on a photograph, given its weights' file by an environment variable."""
    path = Path(os.environ.get(ELG_WEIGHTS) or "nowhere")
    if not path.is_file():
        pytest.skip(f"needs the weights of ELG, an .npz file: {ELG_WEIGHTS}=<path>")
    with np.load(path) as arrays:
        model = elg.trained_elg(dict(arrays)).to(DEVICE)
    eye = elg.astronaut_eye().to(DEVICE)
    fast = optimized(model, precision)
    kinds = ["bottleneck" in row.kind for row in hgfast.report(fast).replaced]
    assert sum(kinds) == elg.RESIDUALS
    check(model, fast, eye)
    with torch.inference_mode():
        expected, _ = hgfast.decode(model(eye)[-1].float().cpu(), method="argmax")
        coords, scores = hgfast.decode(fast(eye)[-1].float().cpu(), method="argmax")
    assert scores.min() > 0.85
    assert (coords - expected).abs().max() <= 1
