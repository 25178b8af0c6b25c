"""The residual block's kernel for Hopper on the emulator, against plain PyTorch in float64.

The emulator holds it to what wgmma, the copy engine, barriers and clusters ask for
(docs/emulator.md); whether its models of them are true, a GPU must tell.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulator import mutants
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import image, randomise
from op_checks import (
    Weights,
    bottleneck_reference,
    bottleneck_weights,
    cast,
    is_channels_last,
    needs_native,
    random_map,
    without_onednn,
)
from test_emulated_kernels import assert_close
from torch import Tensor, nn

from hgfast.models import hourglass
from hgfast.plan import Bottleneck
from hgfast.recognition import recognise, tensors_of
from hgfast.runtime import blocks, cuda, evidence

emulator: Any = pytest.importorskip(
    "hgfast_emulator", reason="the emulator is not built (HGFAST_EMULATOR=1 builds it)"
)
pytestmark = needs_native

DTYPES = [torch.bfloat16, torch.float16]
ORDER = ("w1", "b1", "w2", "b2", "w3", "b3")


@pytest.fixture(autouse=True)
def an_ordinary_device() -> Iterator[None]:
    emulator.set_seed(0)
    emulator.set_threads(0)
    emulator.set_device()
    yield
    emulator.set_device()


def block(w: Weights, dtype: torch.dtype, relu: bool = False) -> Any:
    norm = (w.get("scale"), w.get("shift"))
    return emulator.CudaHopperBottleneck(
        dtype, *norm, *(w[name] for name in ORDER), w.get("wp"), w.get("bp"), relu
    )


def check(x: Tensor, w: Weights, low: Tensor | None = None, pooled: bool = False) -> Tensor:
    y, most = block(w, x.dtype).run(x, low, pooled)
    half = None if low is None else low.double()
    reference = bottleneck_reference(x.double(), cast(w, torch.float64), half)
    assert_close(y, bottleneck_reference(x, cast(w, x.dtype), low), reference)
    assert is_channels_last(y)
    if pooled:
        assert torch.equal(most, F.max_pool2d(y.float(), 2).to(y.dtype))
        assert is_channels_last(most)
    else:
        assert most is None
    return y


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(0, 2),
    height=st.integers(1, 18),
    width=st.integers(1, 18),
    channels=st.sampled_from([64, 128]),
    out=st.sampled_from([0, 64, 192]),
    low=st.booleans(),
    pooled=st.booleans(),
    multiprocessors=st.sampled_from([2, 132]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 4),
)
def test_any_shape(
    batch: int,
    height: int,
    width: int,
    channels: int,
    out: int,
    low: bool,
    pooled: bool,
    multiprocessors: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    out = out or channels
    if low:
        height, width = 2 * (height // 2 + 1), 2 * (width // 2 + 1)
    pooled = pooled and height > 1 and width > 1
    emulator.set_device(multiprocessors)
    emulator.set_seed(seed)
    x = random_map(batch, channels, height, width, dtype=dtype)
    half = random_map(batch, out, height // 2, width // 2, dtype=dtype, seed=2)
    check(x, bottleneck_weights(channels, 128, out), half if low else None, pooled)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_an_hourglass(dtype: torch.dtype) -> None:
    """Tiles with neighbours on all sides, several for each block, with all there is behind."""
    emulator.set_device(2)
    emulator.set_seed(3)
    x = random_map(1, 256, 48, 34, dtype=dtype)
    low = random_map(1, 256, 24, 17, dtype=dtype, seed=2)
    check(x, bottleneck_weights(256, 128, 256), low, pooled=True)


def test_after_the_activation() -> None:
    """The post-activation block: no BN-ReLU in front, ReLU behind the sum."""
    w = bottleneck_weights(128, 128, 128)
    del w["scale"], w["shift"]
    x = random_map(1, 128, 9, 17, dtype=torch.bfloat16)
    y, _ = block(w, x.dtype, relu=True).run(x)

    @without_onednn
    def reference(x: Tensor, w: Weights) -> Tensor:
        t = F.relu(F.conv2d(x, w["w1"], w["b1"]))
        t = F.relu(F.conv2d(t, w["w2"], w["b2"], padding=1))
        return F.relu(F.conv2d(t, w["w3"], w["b3"]) + x)

    expected = reference(x.double(), cast(w, torch.float64))
    assert_close(y, reference(x, cast(w, x.dtype)), expected)
    assert (y == 0).any()


def test_nan_and_infinity_stay_where_the_window_brings_them() -> None:
    w = bottleneck_weights(64, 128, 64)
    x = random_map(1, 64, 20, 20, dtype=torch.bfloat16)
    x[0, 3, 2, 5] = float("nan")
    y, most = block(w, x.dtype).run(x, None, True)
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[1:4, 4:7] = True
    assert torch.equal(y.isnan().any(1)[0], expected)
    assert torch.equal(most.isnan().any(1)[0], F.max_pool2d(expected.float()[None], 2)[0] > 0)


def test_the_same_bits_in_any_order() -> None:
    w = bottleneck_weights(64, 128, 64)
    x = random_map(3, 64, 17, 20, dtype=torch.float16)
    results, counters = [], []
    for seed in range(4):
        emulator.set_seed(seed)
        emulator.set_threads(1 + seed % 2)
        results.append(block(w, x.dtype).run(x, None, True))
        counters.append(emulator.counters())
    for (y, most), counted in zip(results, counters, strict=True):
        assert torch.equal(y, results[0][0])
        assert torch.equal(most, results[0][1])
        assert counted == counters[0]


def test_what_a_tile_multiplies_and_moves() -> None:
    """The account at the head of hopper_bottleneck.cuh."""
    x = random_map(2, 256, 16, 16, dtype=torch.bfloat16)  # a pair of tiles
    emulator.model_memory(True)
    try:
        block(bottleneck_weights(256, 128, 256), x.dtype).run(x)
    finally:
        emulator.model_memory(False)
    counted = emulator.counters()
    wanted = 2 * 16 * 16 * (256 * 128 + 9 * 128 * 128 + 128 * 256)
    halo = 2 * 128 * 128 * 256
    assert counted["flops"] == 2 * (wanted + halo)
    assert counted["multiply_adds"] == 0
    # Four warpgroups: conv1 on the tile, on two halves of what is around it, conv2, conv3.
    assert counted["warpgroup_products"] == 2 * 4 * (16 + 16 + 72 + 4 * 8)
    weights = 2 * (2 * 256 * 128 + 9 * 128 * 128 + 128 * 256)
    assert counted["bulk_bytes"] == 2 * weights  # in each block
    pixel = 2 * 256
    around = 18 * 18 - 16 * 16
    assert counted["tile_bytes"] == 2 * (2 * 256 + around) * pixel  # x, the shortcut, the halo
    assert counted["stored_tile_bytes"] == 2 * 256 * pixel
    # Each block asks for half of the weights. Each thread reads BatchNorm's two numbers for its
    # channels of the tile and of what is around it, and the biases: from its cache, mostly.
    of_a_thread = 2 * 16 * 32 + 128 + 128 + 128 + 256
    assert counted["global_bytes_loaded"] == weights + 2 * 2 * 256 * pixel + 1024 * of_a_thread
    # Each word of shared memory that a product reads: at 128 bytes a clock, and 64 clocks for
    # a product of 64x128x16, three quarters of what there is.
    clocks = counted["flops"] / (2 * 64 * 128 * 16) * 64
    assert counted["operand_bytes"] / clocks < 96.5
    assert counted["matrix_conflicts"] <= counted["load_matrices"] / 4
    assert counted["dram_bytes_read"] + counted["dram_bytes_written"] <= (
        1.05 * counted["minimum_bytes"]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"middle": 64}, "expected 128 middle channels between multiples of 64, given 64 -> 64"),
        ({"channels": 96}, "expected 128 middle channels between multiples of 64, given 96"),
    ],
)
def test_other_blocks_are_refused(given: dict[str, int], message: str) -> None:
    sizes = {"channels": 64, "middle": 128} | given
    with pytest.raises(ValueError, match=message):
        block(bottleneck_weights(sizes["channels"], sizes["middle"], 64), torch.bfloat16)


def test_obstacles() -> None:
    obstacle = emulator.CudaHopperBottleneck.obstacle
    cpu = torch.device("cpu")
    assert obstacle(cpu, 256, 128, 256, False) == ""
    assert "not 128 in the middle" in obstacle(cpu, 256, 64, 256)
    emulator.set_device(108, 163 * 1024)
    assert obstacle(cpu, 256, 128, 256) == "this GPU is no Hopper (sm_90)"
    x = random_map(1, 64, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="operation not supported"):
        block(bottleneck_weights(64, 128, 64), x.dtype).run(x)


def test_wrong_maps_are_refused() -> None:
    w = bottleneck_weights(64, 128, 64)
    x = random_map(1, 64, 1, 4, dtype=torch.bfloat16)
    ready = block(w, x.dtype)
    with pytest.raises(ValueError, match=r"expected x of at least 2x2 pixels to pool y"):
        ready.run(x, None, True)
    with pytest.raises(ValueError, match=r"expected x in .*BFloat16"):
        ready.run(x.half())
    with pytest.raises(ValueError, match=r"expected x of 64 channels"):
        ready.run(random_map(1, 128, 4, 4, dtype=torch.bfloat16))


# ---- In the executor -----------------------------------------------------------------------------


class Ops:
    upsample_add = torch.ops.hgfast_emulated.upsample_add
    conv = torch.ops.hgfast_emulated.conv


def wide_hourglass() -> nn.Module:
    """With 128 channels in the middle of its residuals, and a join behind each depth."""
    torch.manual_seed(1)
    model = hourglass(stacks=1, features=256, blocks=1, depth=2, joints=3)
    return randomise(model).eval().requires_grad_(False)


def run_on(kernels: cuda.Kernels, model: nn.Module, x: Tensor) -> tuple[cuda.CudaExecutor, Tensor]:
    plan = recognise(model)
    weights = {name: tensors_of(model)[name].bfloat16() for name in plan.weights}
    executor = cuda.CudaExecutor(plan, weights, "medium", kernels)
    (y,) = executor.run([x]).values()
    return executor, y


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Of each block that runs from now on: its kernel, and whether it pools what it reads."""
    ran: list[tuple[str, bool]] = []
    run = blocks.Block.run

    def spy(block: Any, x: Tensor, low: Any, pool: bool, pooled: bool) -> Any:
        result = run(block, x, low, pool, pooled)
        ran.append((emulator.last_path(), pool))
        return result

    monkeypatch.setattr(blocks.Block, "run", spy)
    return ran


def test_an_hourglass_runs_in_the_kernels_that_are_switched_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(evidence.UNPROVEN, raising=False)
    kernels = cuda.Kernels(emulator, Ops, torch.device("cpu"))
    model, x = wide_hourglass(), image(1, 48).bfloat16()
    plain, expected = run_on(kernels, model, x)
    assert plain.features == frozenset()

    monkeypatch.setenv(evidence.UNPROVEN, "throughput")
    monkeypatch.setattr(blocks, "RULES", [replace(rule, least=0) for rule in blocks.RULES])
    ran = watched(monkeypatch)
    fast, y = run_on(kernels, model, x)
    assert fast.features == {"throughput"}
    wide = [pool for path, pool in ran if path == "cuda/hopper_bottleneck<bfloat16>"]
    assert len(wide) > 5
    # Both lie behind a block that gives the maximum beside its result; the stem's does not.
    assert not any(wide)
    assert [path for path, pool in ran if pool] == ["cuda/bottleneck<bfloat16, 64, 4x8>"]
    steps = [step for step in recognise(model).steps if isinstance(step, Bottleneck)]
    assert {fast.path(step) for step in steps} == {
        "cuda bfloat16",
        "cuda bfloat16, throughput or portable",
    }
    difference = (y.double() - expected.double()).norm() / expected.double().norm()
    assert difference < 2e-2


def test_few_pixels_run_over_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = cuda.Kernels(emulator, Ops, torch.device("cpu"))
    model, x = wide_hourglass(), image(1, 32, 32).bfloat16()
    monkeypatch.delenv(evidence.UNPROVEN, raising=False)
    _, expected = run_on(kernels, model, x)
    monkeypatch.setenv(evidence.UNPROVEN, "latency,throughput")
    ran = watched(monkeypatch)
    fast, y = run_on(kernels, model, x)
    assert fast.features == {"latency", "throughput"}
    paths = [path for path, _ in ran]
    assert sum(path.startswith("cuda/latency<") for path in paths) >= len(paths) - 1
    step = next(step for step in recognise(model).steps if isinstance(step, Bottleneck))
    assert fast.path(step) == "cuda bfloat16, portable or latency"  # 64 channels in the middle
    difference = (y.double() - expected.double()).norm() / expected.double().norm()
    assert difference < 2e-2


@pytest.mark.parametrize(
    ("size", "blocks_apart"),
    [(32, 0), (64, 0), (128, 3)],  # the first map of the hourglass, pooled: 4x4, 8x8, 16x16
)
def test_what_is_small_enough_is_one_launch(
    monkeypatch: pytest.MonkeyPatch, size: int, blocks_apart: int
) -> None:
    """A chain of six blocks, or, where their maps are too large, of the inner three."""
    torch.manual_seed(1)
    model = hourglass(stacks=1, features=64, blocks=1, depth=2, joints=3)
    model = randomise(model).eval().requires_grad_(False)
    kernels, x = cuda.Kernels(emulator, Ops, torch.device("cpu")), image(1, size, size).bfloat16()
    monkeypatch.delenv(evidence.UNPROVEN, raising=False)
    _, expected = run_on(kernels, model, x)
    monkeypatch.setenv(evidence.UNPROVEN, "latency")
    ran = watched(monkeypatch)
    alone: list[str] = []
    run = emulator.CudaLatencySubtree.run

    class Subtree(emulator.CudaLatencySubtree):  # type: ignore[misc]
        def run(self, x: Tensor) -> Tensor:
            result: Tensor = run(self, x)
            alone.append(emulator.last_path())
            return result

    kernels.subtree = Subtree
    _, y = run_on(kernels, model, x)
    assert len(alone) == 1
    assert alone[0].startswith("cuda/subtree<")
    every = sum(isinstance(step, Bottleneck) for step in recognise(model).steps)
    assert len(ran) == every - 6 + blocks_apart
    difference = (y.double() - expected.double()).norm() / expected.double().norm()
    assert difference < 2e-2


def test_rules_choose_by_the_work_there_is() -> None:
    class Packed:
        def tensors(self) -> list[Tensor]:
            return []

    everything = blocks.Block(Packed, {"throughput": Packed, "latency": Packed})
    assert everything.choose(64, 64, 64) == "throughput"
    assert everything.choose(9, 64, 64) == "throughput"
    assert everything.choose(1, 64, 64) == "latency"
    assert blocks.Block(Packed, {"throughput": Packed}).choose(1, 64, 64) == "portable"
    assert blocks.Block(Packed, {}).choose(64, 64, 64) == "portable"
    clusters = blocks.Block(Packed, {"latency": Packed})
    assert clusters.choose(64, 64, 64) == "portable"
    assert clusters.choose(1, 64, 64) == "latency"
    assert clusters.names == ("portable", "latency")
    assert blocks.tiles(2, 17, 16) == 4
    for rule in blocks.RULES:
        assert rule.kernel == "portable" or rule.kernel in evidence.FEATURES


# ---- Mistakes planted into the kernel ------------------------------------------------------------

HEADER = (mutants.CUDA / "hopper_bottleneck.cuh").read_text()
DRIVER = """
#include "cuda/hopper_bottleneck.h"
#include "cuda/launch.cuh"
#include "emulator/launch.h"

extern "C" const char* run(void** arrays) {
  using namespace hgfast::cuda;
  emulator::set_seed(static_cast<const int*>(arrays[0])[0]);
  emulated_device = {2, 227 * 1024, 9, 0};
  HopperBottleneckParams p{};
  p.block.batch = 3;
  p.block.height = p.block.x_height = 20;
  p.block.width = p.block.x_width = 18;
  p.block.in = p.block.out = 64;
  p.block.middle = 128;
  p.block.x = arrays[1];
  p.block.low = arrays[2];
  p.block.y = arrays[3];
  p.pooled = arrays[4];
  p.block.scale = p.block.shift = p.block.b1 = p.block.b2 = p.block.b3 =
      static_cast<const float*>(arrays[5]);
  p.block.tape = arrays[6];
  return cudaGetErrorString(hopper_bottleneck(p, nullptr));
}
"""
# What is planted -> text, its replacement, and the kinds of report that are an answer;
# "another result" where nothing but the numbers is wrong.
RACE = ("race", "copy in flight", "uninitialised")
MUTANTS = {
    "a stage is read before it is full": (
        "    wait_barrier(full(stage), at.parity);\n",
        "",
        RACE,
    ),
    "a stage is filled before it is empty": (
        "if (!first_round) wait_barrier(empty(stage), at.parity ^ 1);",
        "",
        (*RACE, "too many arrivals", "deadlock"),
    ),
    "weights are released while products read them": (
        "half * 2 + k, rows, row));\n    commit_products();\n    wait_products<0>();",
        "half * 2 + k, rows, row));\n    commit_products();\n    release(of); wait_products<0>();",
        (*RACE, "too many arrivals", "deadlock"),
    ),
    "one product too many is under way": (
        "wait_products<1>();\n        release(before);",
        "release(before);",
        RACE,
    ),
    "a stage is released by one lane without the others": (
        "    sync_warp();\n    if (lane() < kCluster)",
        "    if (lane() < kCluster)",
        RACE,
    ),
    "T1 is written while others read it": (
        "sync_some(1, kConsumers);  // nobody reads",
        "(void)0;  // nobody reads",
        RACE,
    ),
    "T1 is read before the others wrote it": (
        "    fence_async();\n    sync_some(1, kConsumers);\n",
        "    fence_async();\n",
        RACE,
    ),
    "T1 is not fenced": (
        "    fence_async();\n    sync_some(1, kConsumers);\n",
        "    sync_some(1, kConsumers);\n",
        ("not fenced",),
    ),
    "y is not fenced": (
        "    fence_async();\n    sync_warp();\n    if (lane == 0) {",
        "    sync_warp();\n    if (lane == 0) {",
        ("not fenced",),
    ),
    "y is stored before all lanes wrote it": (
        "    fence_async();\n    sync_warp();\n    if (lane == 0) {",
        "    fence_async();\n    if (lane == 0) {",
        (*RACE, "not fenced"),
    ),
    "y's stage is released while it is stored": (
        "if (lane() == 0) wait_stores<0>();",
        "",
        (*RACE, "copy never waited for"),
    ),
    "sums are begun without a fence": (
        "      begin_products();\n#pragma unroll\n      for (int k = 0; k < 8; ++k)",
        "#pragma unroll\n      for (int k = 0; k < 8; ++k)",
        ("products not begun",),
    ),
    "a block ends while the other arrives": (
        "  sync_cluster();  // the other block",
        "  // the other block",
        ("ended too early",),
    ),
    "barriers are used before they are made": (
        "    fence_barriers();\n  }\n  sync_cluster();",
        "    fence_barriers();\n  }\n",
        ("race", "no barrier"),
    ),
    "the consumers ask for too many registers": (
        "raise_registers<112>",
        "raise_registers<120>",
        ("deadlock",),
    ),
    "both blocks ask for the same half of the weights": (
        "rank * half, half,",
        "0, half,",
        (*RACE, "another result"),
    ),
    "the ring holds y of the tile before": (
        "      store(sums, tile, out);\n    }\n    release_held();",
        "      store(sums, tile, out);\n    }",
        ("deadlock",),
    ),
    "outside of the image T1 is conv1(0)": (
        "a[2 * i] = upper ? pack_relu<T>(d[0], d[1]) : 0;",
        "a[2 * i] = pack_relu<T>(d[0], d[1]);",
        ("another result",),
    ),
    "the window is a pixel off": (
        "quarter_x() + tap % 3",
        "quarter_x() + tap / 3",
        ("another result",),
    ),
    "the corners are those of the row below": (
        "if (pixel < kHalo) return {0, pixel, kAbove, pixel};",
        "if (pixel < kHalo) return {0, pixel, kBelow, pixel};",
        ("another result",),
    ),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("objects")
    return folder


def run_changed(header: str, folder: Path, cache: Path, seed: int) -> tuple[str, list[np.ndarray]]:
    library = folder / "mutant.so"
    if not library.exists():
        library = mutants.build(
            {"hopper_bottleneck.cuh": header},
            DRIVER,
            folder,
            only=["hopper_bottleneck.cu"],
            cache=cache,
        )
    rng = np.random.default_rng(0)

    def elements(count: int) -> np.ndarray:
        values = torch.from_numpy(rng.standard_normal(count).astype(np.float32) / 8)
        return values.bfloat16().view(torch.int16).numpy()

    pixels, tape = 3 * 20 * 18, 128 * 64 + 9 * 128 * 128 + 64 * 128
    arrays = [
        np.array([seed], np.int32),
        elements(pixels * 64),
        elements(pixels // 4 * 64),
        np.zeros(pixels * 64, np.int16),
        np.zeros(pixels // 4 * 64, np.int16),
        np.linspace(-0.2, 1, 128, dtype=np.float32),
        elements(tape),
    ]
    report, after = mutants.run(library, arrays)
    return report, after[3:5]


needs_compiler = pytest.mark.skipif(
    shutil.which(mutants.compiler()) is None, reason="no C++ compiler to build mutants with"
)


@pytest.fixture(scope="module")
def unchanged(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    report, results = run_changed(HEADER, tmp_path_factory.mktemp("same") / "a", objects, 0)
    assert report == ""
    assert all((result != 0).any() for result in results)
    return results


@needs_compiler
@pytest.mark.parametrize("planted", MUTANTS)
def test_a_planted_mistake_is_noticed(
    planted: str, unchanged: list[np.ndarray], objects: Path, tmp_path: Path
) -> None:
    text, replacement, kinds = MUTANTS[planted]
    assert HEADER.count(text) == 1, planted
    report, results = run_changed(
        HEADER.replace(text, replacement), tmp_path / "changed", objects, 0
    )
    if report:
        assert re.match(rf"({'|'.join(kinds)}): kernel hopper_bottleneck<bfloat16>", report), report
    else:
        assert "another result" in kinds
        assert any(not np.array_equal(a, b) for a, b in zip(results, unchanged, strict=True))
