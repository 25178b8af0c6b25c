"""The ops on the device as torch.compile and torch.library see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_checks import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    map_of,
    moved,
    require_device,
)
from networks import small_hourglass
from op_checks import bottleneck_weights, conv_weights
from torch import Tensor, nn

import hgfast
from hgfast import ops

require_device()

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# Inductor for the CPU needs minutes of a C++ compiler, and is not what this file is about.
SETTINGS: list[dict[str, Any]] = (
    [{"backend": "aot_eager"}] if REHEARSAL else [{}, {"mode": "reduce-overhead"}]
)


@each_dtype
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_bottleneck(dtype: torch.dtype, full: bool) -> None:
    w = moved(bottleneck_weights(32, 16, 48 if full else 32))
    x = map_of(2, 32, 4, 6, dtype=dtype)
    low = map_of(2, 48, 2, 3, dtype=dtype) if full else None
    torch.library.opcheck(torch.ops.hgfast.bottleneck.default, (x, *w.values()), {"low": low})


@each_dtype
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_conv(dtype: torch.dtype, full: bool) -> None:
    w = moved(conv_weights(32, 16, (3, 3), norm=full))
    x = map_of(2, 32, 5, 6, dtype=dtype)
    more: dict[str, Any] = {"stride": (2, 2), "padding": (1, 1), "relu": full}
    more["add"] = map_of(2, 16, 3, 3, dtype=dtype, seed=2) if full else None
    torch.library.opcheck(torch.ops.hgfast.conv.default, (x, *w.values()), more)


@each_dtype
def test_opcheck_upsample_add(dtype: torch.dtype) -> None:
    low, skip = map_of(2, 16, 2, 3, dtype=dtype), map_of(2, 16, 4, 6, dtype=dtype, seed=2)
    torch.library.opcheck(torch.ops.hgfast.upsample_add.default, (low, skip))


@each_dtype
@pytest.mark.parametrize("relu", [False, True])
def test_opcheck_upsample_add_of_several_maps(dtype: torch.dtype, relu: bool) -> None:
    skip = map_of(2, 16, 4, 8, dtype=dtype)
    lows = [map_of(2, 16, 4 // n, 8 // n, dtype=dtype, seed=n) for n in (1, 2, 4)]
    torch.library.opcheck(torch.ops.hgfast.upsample_add.maps, (lows, skip, relu))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@each_dtype
def test_compiles_whole(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    block = moved(bottleneck_weights(32, 16, 32))
    head = moved(conv_weights(32, 16, (1, 1)))

    def run(x: Tensor, low: Tensor) -> Tensor:
        y = ops.bottleneck(torch.relu(x), **block)
        y = ops.upsample_add(low, y)
        return ops.conv(y, **head, relu=True) * 2

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, **settings)
    with torch.inference_mode():
        for seed in range(4):
            x = map_of(2, 32, 8, 6, dtype=dtype, seed=seed)
            low = map_of(2, 32, 4, 3, dtype=dtype, seed=seed + 10)
            torch.testing.assert_close(compiled(x, low).clone(), run(x, low))


def optimised() -> tuple[nn.Module, Any, Tensor]:
    model = small_hourglass(depth=1).to(DEVICE, DTYPES[0]).requires_grad_(False)
    x = map_of(1, 3, 64, 64, dtype=DTYPES[0], channels_last=False)
    return model, hgfast.optimize(model, "medium", strict=True), x


def close(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_an_optimised_network_compiles() -> None:
    """A region is one operation of the graph, and its kernels are those of the plain call."""
    model, fast, x = optimised()
    torch.compiler.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(x), model(x))
        for one, other in zip(compiled(x), fast(x), strict=True):
            assert torch.equal(one, other)


def test_an_optimised_network_is_exported() -> None:
    model, fast, x = optimised()
    program = torch.export.export(fast, (x,))
    assert any("run_plan" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        close(program.module()(x), model(x))


@pytest.mark.skipif(
    REHEARSAL, reason="a package for the CPU is the business of tests/test_ecosystem.py"
)
def test_a_package(tmp_path: Path) -> None:
    model, fast, x = optimised()
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(fast, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    with torch.no_grad():
        close(torch._inductor.aoti_load_package(path)(x), model(x))


def test_a_wrong_device_is_an_error() -> None:
    """Weights that stayed on the CPU, and the like, end in a message, not in a crash."""
    if REHEARSAL:
        pytest.skip("a rehearsal has one device")
    w = bottleneck_weights(32, 16, 32)
    x = map_of(1, 32, 4, 4, dtype=DTYPES[0])
    with pytest.raises((ValueError, RuntimeError)):
        ops.bottleneck(x, **w)
    mixed = moved(w)
    mixed["b2"] = mixed["b2"].cpu()
    with pytest.raises((ValueError, RuntimeError)):
        ops.bottleneck(x, **mixed)
    with pytest.raises((ValueError, RuntimeError)):
        ops.upsample_add(
            map_of(1, 8, 2, 2, dtype=DTYPES[0]).cpu(), map_of(1, 8, 4, 4, dtype=DTYPES[0])
        )
