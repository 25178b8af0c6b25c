"""The residual block over clusters of blocks (csrc/cuda/hopper_latency.*), on the emulator.

Every launch is checked access by access (docs/emulator.md), across the blocks of a cluster too. The
mutants at the end are changed copies of the kernel: each has a mistake that must be noticed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulator import mutants
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    Weights,
    bottleneck_weights,
    cast,
    is_channels_last,
    needs_native,
    random_map,
    upsample_add_reference,
    without_onednn,
)
from torch import Tensor

emulator: Any = pytest.importorskip(
    "hgfast_emulator", reason="the emulator is not built (HGFAST_EMULATOR=1 builds it)"
)
pytestmark = needs_native

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]
ORDER = ("scale", "shift", "w1", "b1", "w2", "b2", "w3", "b3", "wp", "bp")


@pytest.fixture(autouse=True)
def an_ordinary_device() -> Iterator[None]:
    emulator.set_seed(0)
    emulator.set_threads(0)
    emulator.set_device()
    yield
    emulator.set_seed(0)
    emulator.set_device()


def packed(w: Weights, dtype: torch.dtype, relu: bool = False) -> Any:
    return emulator.CudaLatencyBottleneck(dtype, *(w.get(name) for name in ORDER), relu=relu)


@without_onednn
def expected(x: Tensor, w: Weights, low: Tensor | None, pool: bool, relu: bool) -> Tensor:
    """The formula of csrc/cuda/kernels.h in the dtype of x."""
    w = cast(w, x.dtype)
    t = F.max_pool2d(x, 2) if pool else x
    u = t
    if "scale" in w:
        u = F.relu(t * w["scale"][:, None, None] + w["shift"][:, None, None])
    u = F.relu(F.conv2d(u, w["w1"], w["b1"]))
    u = F.relu(F.conv2d(u, w["w2"], w["b2"], padding=1))
    y = F.conv2d(u, w["w3"], w["b3"]) + (F.conv2d(t, w["wp"], w["bp"]) if "wp" in w else t)
    y = F.relu(y) if relu else y
    return y if low is None else upsample_add_reference(low.to(x.dtype), y)


def check(
    x: Tensor, w: Weights, low: Tensor | None = None, pool: bool = False, relu: bool = False
) -> Tensor:
    """Twice: the second launch may begin before the one in front of it has ended."""
    block = packed(w, x.dtype, relu)
    y = block.run(x, low, pool)
    assert torch.equal(block.run(x, low, pool), y)
    exact = expected(x.double(), w, low, pool, relu)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert is_channels_last(y)
    if y.numel():
        ours = (y.double() - exact).abs()
        theirs = (expected(x, w, low, pool, relu).double() - exact).abs()
        atol = 1e-3 if x.dtype == torch.bfloat16 else 2e-4
        assert ours.max() <= 2 * theirs.max() + atol, f"{ours.max():.3e}: {theirs.max():.3e}"
        assert ours.mean() <= 2 * theirs.mean() + atol, f"{ours.mean():.3e}: {theirs.mean():.3e}"
    return y


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 2),
    height=st.integers(1, 6),
    width=st.integers(1, 9),
    channels=st.sampled_from([16, 32, 80]),
    middle=st.sampled_from([32, 64, 96, 128]),
    out=st.sampled_from([0, 32, 64, 192]),
    norm=st.booleans(),
    pool=st.booleans(),
    low=st.booleans(),
    relu=st.booleans(),
    multiprocessors=st.sampled_from([1, 4, 132]),
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
    norm: bool,
    pool: bool,
    low: bool,
    relu: bool,
    multiprocessors: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    if low:
        height, width = 2 * height, 2 * width
    out = out or -(-channels // 32) * 32
    if middle == 128 and multiprocessors == 1:
        channels = out = 128  # not projected, at 64 channels a block
    emulator.set_device(multiprocessors)
    emulator.set_seed(seed)
    w = bottleneck_weights(channels, middle, out, norm=norm)
    # An odd last row and column, which pooling drops.
    size = (2 * height + height % 2, 2 * width + width % 2) if pool else (height, width)
    x = random_map(batch, channels, *size, dtype=dtype, layout=layout)
    half = random_map(batch, out, height // 2, width // 2, dtype=dtype, layout=layout, seed=2)
    check(x, w, half if low else None, pool, relu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("multiprocessors", "cluster", "name"), [(8, 8, 16), (4, 4, 32), (2, 2, 64)]
)
def test_every_instance_with_an_hourglass_s_channels(
    multiprocessors: int, cluster: int, name: int, dtype: torch.dtype
) -> None:
    """As many blocks as there are multiprocessors; each reads its part of the weights, once."""
    emulator.set_device(multiprocessors)
    check(random_map(1, 256, 7, 8, dtype=dtype), bottleneck_weights(256, 128, 256))
    c = emulator.counters()
    assert c["name"] == f"latency<{str(dtype)[6:]}, {name}>"
    assert c["blocks"] == cluster
    assert c["shared_bytes"] <= 113 * 1024  # two fit on a multiprocessor
    weights = 2 * (256 * 128 + 9 * 128 * 128 + 128 * 256) + 4 * (128 + 128 + 256)
    assert c["bulk_bytes"] == weights + cluster * 4 * 2 * 256  # scale and shift: each has them all
    assert c["matrix_conflicts"] == 0
    # T1 with its halo and T2, from each block to each.
    assert c["remote_bytes"] == cluster * (100 + 64) * 128 * 2
    # What conv1 and conv3 multiply of rows without a pixel: 112 for 100 of the halo.
    assert c["flops"] == 2 * (112 * 256 * 128 + 64 * 128 * (9 * 128 + 256))


def test_the_cluster_follows_the_number_of_tiles() -> None:
    """The largest that leaves each block a multiprocessor of its own; else the smallest."""
    w = bottleneck_weights(16, 128, 128)
    block = packed(w, torch.bfloat16)
    for multiprocessors, batch, blocks in ((132, 1, 8), (16, 2, 16), (15, 2, 8), (2, 3, 6)):
        emulator.set_device(multiprocessors)
        block.run(random_map(batch, 16, 4, 4, dtype=torch.bfloat16), None, False)
        assert emulator.counters()["blocks"] == blocks


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_the_same_bits_in_any_order(multiprocessors: int) -> None:
    emulator.set_device(multiprocessors)
    block = packed(bottleneck_weights(64, 128, 128), torch.bfloat16)
    x = random_map(1, 64, 5, 9, dtype=torch.bfloat16)
    y = block.run(x)
    for seed in range(1, 5):
        emulator.set_seed(seed)
        emulator.set_threads(1 + seed % 2)
        assert torch.equal(block.run(x), y)


def test_the_cluster_s_size_leaves_the_result_nearly_as_it_is() -> None:
    """conv2's sum is split among more or fewer warps: float32 is rounded elsewhere."""
    w = bottleneck_weights(32, 128, 32, project=True)
    block = packed(w, torch.bfloat16)
    x = random_map(1, 32, 8, 8, dtype=torch.bfloat16)
    results = []
    for multiprocessors in (8, 4, 1):
        emulator.set_device(multiprocessors)
        results.append(block.run(x).float())
    for y in results[1:]:
        assert (y - results[0]).abs().max() <= 2**-6 * results[0].abs().max()


def test_images_do_not_mix() -> None:
    block = packed(bottleneck_weights(32, 32, 32), torch.bfloat16)
    x = random_map(3, 32, 5, 7, dtype=torch.bfloat16)
    y = block.run(x)
    for i in range(3):
        assert torch.equal(y[i : i + 1], block.run(x[i : i + 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_travel_as_in_pytorch(dtype: torch.dtype) -> None:
    w = bottleneck_weights(48, 32, 32)
    x = random_map(1, 48, 9, 9, dtype=dtype)
    x[0, 3, 4, 4], x[0, 7, 0, 8] = torch.nan, torch.inf
    y, eager = packed(w, dtype).run(x), expected(x, w, None, False, False)
    assert torch.equal(y.isnan(), eager.isnan())
    assert y.isnan().any()
    assert not y.isnan().all()


def test_it_moves_what_it_must() -> None:
    block = packed(bottleneck_weights(256, 128, 256), torch.bfloat16)
    x = random_map(1, 256, 32, 32, dtype=torch.bfloat16, layout="channels_last")
    emulator.set_device(8)
    emulator.model_memory(True)
    try:
        block.run(x, None, True)
    finally:
        emulator.model_memory(False)
    c = emulator.counters()
    assert c["dram_bytes_read"] + c["dram_bytes_written"] <= 1.01 * c["minimum_bytes"]


def test_channels_that_have_no_kernel() -> None:
    obstacle = emulator.CudaLatencyBottleneck.obstacle
    for channels in ((256, 128, 256), (16, 32, 32), (512, 256, 512), (2048, 512, 2048)):
        assert obstacle(CPU, *channels, False) == ""
    assert obstacle(CPU, 24, 32, 32, True) == (
        "its channels (24, 32, 32) are not multiples of 16, 32 and 32"
    )
    assert "cannot be split over the 2, 4 or 8 blocks" in obstacle(CPU, 256, 1024, 256, False)
    emulator.set_device(132, 99 * 1024)
    assert obstacle(CPU, 256, 128, 256, False) == "this GPU is no Hopper (sm_90)"
    with pytest.raises(ValueError, match=r"bottleneck: this GPU is no Hopper \(sm_90\)"):
        packed(bottleneck_weights(32, 32, 32), torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "low", "pool", "message"),
    [
        (torch.zeros(1, 32, 4, 4), None, False, "expected bfloat16|in bfloat16 or float16"),
        (torch.zeros(1, 16, 4, 4).bfloat16(), None, False, "expected x of 32 channels"),
        (torch.zeros(1, 32, 4, 4).half(), None, False, "expected x in BFloat16, given Half"),
        (torch.zeros(1, 32, 1, 4).bfloat16(), None, True, "at least 2x2 pixels to pool"),
        (
            torch.zeros(1, 32, 4, 4).bfloat16(),
            torch.zeros(1, 32, 4, 4).bfloat16(),
            False,
            r"expected low of shape \[1, 32, 2, 2\]",
        ),
    ],
)
def test_wrong_arguments(x: Tensor, low: Tensor | None, pool: bool, message: str) -> None:
    block = packed(bottleneck_weights(32, 32, 32), torch.bfloat16)
    with pytest.raises(ValueError, match=f"bottleneck: .*({message})"):
        block.run(x, low, pool)


# ---- Chains of blocks ----

#: What lies below 16x16 in an hourglass of depth 4 at 64x64: a step reads the result of an earlier
#: one (-1: x), pools it or not, and adds the upsampled result of another one (-1: none).
BELOW = [
    (-1, True, -1),  # 8x8
    (0, True, -1),  # 4x4
    (1, False, -1),
    (2, False, -1),
    (0, False, 3),  # the branch at 8x8, and the sum
    (4, False, -1),
]
#: Likewise with maps of 2x2.
DEEPER = [
    (-1, True, -1), (0, True, -1), (1, True, -1), (2, False, -1), (1, False, 3), (4, False, -1),
    (0, False, 5), (6, False, -1),
]  # fmt: skip


def one_by_one(blocks: list[Any], steps: list[tuple[int, bool, int]], x: Tensor) -> Tensor:
    results: list[Tensor] = []
    for block, (source, pool, low) in zip(blocks, steps, strict=True):
        other = None if low < 0 else results[low]
        results.append(block.run(x if source < 0 else results[source], other, pool))
    return results[-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "middle", "shape", "steps"),
    [
        (256, 128, (1, 16, 16), BELOW),
        (64, 64, (2, 8, 9), BELOW),
        (96, 32, (1, 16, 8), DEEPER),
        (32, 32, (3, 5, 7), [(-1, False, -1)]),
        (32, 32, (1, 8, 3), [(-1, False, -1), (0, False, -1), (1, False, -1)]),
    ],
)
def test_a_chain_gives_the_bits_of_its_blocks(
    channels: int,
    middle: int,
    shape: tuple[int, int, int],
    steps: list[tuple[int, bool, int]],
    dtype: torch.dtype,
) -> None:
    """In one launch, in any order of threads; and the weights are read once."""
    weights = [bottleneck_weights(channels, middle, channels, seed=i) for i in range(len(steps))]
    blocks = [packed(w, dtype, relu=i % 2 == 1) for i, w in enumerate(weights)]
    batch, height, width = shape
    x = random_map(batch, channels, height, width, dtype=dtype)
    expected = one_by_one(blocks, steps, x)
    chain = emulator.CudaLatencySubtree(blocks, steps)
    for seed in (0, 1):
        emulator.set_seed(seed)
        y = chain.run(x)
        assert is_channels_last(y)
        assert torch.equal(y, expected)
    c = emulator.counters()
    cluster = middle // 16
    assert c["blocks"] == batch * cluster
    padded = -(-channels // 32) * 32
    block = 2 * (padded * middle + 9 * middle**2 + middle * channels) + 4 * (2 * middle + channels)
    assert c["bulk_bytes"] == batch * len(steps) * (block + cluster * 4 * 2 * padded)
    assert c["shared_bytes"] <= 227 * 1024
    assert emulator.last_path() == f"cuda/subtree<{str(dtype)[6:]}>"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "expected 1 to 8 blocks and a step for each, given 2 and 0"),
        ([(-1, False, -1), (1, False, -1)], "expected step 1 to read earlier ones, given 1 and -1"),
        ([(-1, False, -1), (-1, False, -1)], "expected step 1 to read earlier ones"),
        ([(-1, False, 0), (0, False, -1)], "expected step 0 to read earlier ones"),
    ],
)
def test_chains_that_are_none(steps: list[tuple[int, bool, int]], message: str) -> None:
    blocks = [packed(bottleneck_weights(32, 32, 32), torch.bfloat16) for _ in range(2)]
    with pytest.raises(ValueError, match=f"subtree: {message}"):
        emulator.CudaLatencySubtree(blocks, steps)


def test_a_chain_whose_maps_find_no_room() -> None:
    blocks = [packed(bottleneck_weights(512, 128, 512), torch.bfloat16) for _ in BELOW]
    with pytest.raises(ValueError, match=r"expected maps of 8x8 pixels that find room .* of 512"):
        emulator.CudaLatencySubtree(blocks, BELOW)


def test_maps_that_fit_no_chain() -> None:
    blocks = [packed(bottleneck_weights(32, 32, 32), torch.bfloat16) for _ in range(2)]
    chain = emulator.CudaLatencySubtree(blocks, [(-1, False, -1), (0, False, 0)])
    with pytest.raises(ValueError, match="maps of 1x1 to 8x8 pixels, step 0 gives 9x8"):
        chain.run(random_map(1, 32, 9, 8, dtype=torch.bfloat16))
    with pytest.raises(
        ValueError, match="expected step 0 to give half of the 8x8 pixels of step 1"
    ):
        chain.run(random_map(1, 32, 8, 8, dtype=torch.bfloat16))
    projected = packed(bottleneck_weights(32, 32, 32, project=True), torch.bfloat16)
    with pytest.raises(ValueError, match="none projected, given 32 -> 32 -> 32 in step 0"):
        emulator.CudaLatencySubtree([projected], [(-1, False, -1)])


# ---- Mutants ----

HEADER = (mutants.CUDA / "hopper_latency.cuh").read_text()
SOURCE = (mutants.CUDA / "hopper_latency.cu").read_text()

# A projected block of 64 -> 64 -> 64 channels at 10x9 pixels, with clusters of 2 blocks: 2 strips
# of middle channels, and as few slots as there may be, so that each is filled again and again.
SIZE, CHANNELS = (10, 9), 64

DRIVER = """
#include "cuda/hopper_latency.h"
#include "cuda/launch.cuh"
#include "emulator/launch.h"

extern "C" const char* run(void** arrays) {
  using namespace hgfast::cuda;
  emulated_device = {1, 227 * 1024, 9, 0};
  emulator::set_seed(*static_cast<const int*>(arrays[0]));
  emulator::set_threads(1);
  BottleneckParams p{};
  p.batch = 1;
  p.height = p.x_height = 10;
  p.width = p.x_width = 9;
  p.in = p.middle = p.out = 64;
  p.project = true;
  p.x = arrays[1];
  p.y = arrays[2];
  p.scale = p.shift = p.b1 = p.b2 = p.b3 = static_cast<const float*>(arrays[3]);
  p.tape = arrays[4];
  if (!static_cast<const int*>(arrays[0])[1])
    return cudaGetErrorString(latency(p, true, nullptr));

  SubtreeParams chain{};  // of three steps, without a projection
  chain.programmatic = true;
  chain.steps = 3;
  p.project = false;
  p.height = p.width = p.x_height = p.x_width = 4;
  p.middle = 32;
  for (int i = 0; i < 3; ++i) {
    chain.blocks[i] = p;
    chain.source[i] = i - 1;
    chain.low[i] = -1;
  }
  return cudaGetErrorString(subtree(chain, nullptr));
}
"""

# What is planted -> texts of the kernel, each with its replacement, and the kinds of report that
# are an answer.
RACE = ("race", "uninitialised")
MUTANTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "T1 is read before the other blocks have written theirs": (
        {
            "    wait_cluster();  // T1 is whole\n": "",
            "    add_parts(sums, ": "    wait_cluster();\n    add_parts(sums, ",
        },
        RACE,
    ),
    "T2 is read before the other blocks have written theirs": (
        {"if (pass == 0) wait_cluster();  // T2 is whole": ""},
        (*RACE, "ended too early", "divergent barrier"),
    ),
    "a step reads a map before the other blocks have written theirs": (
        {
            "    if (kChain) wait_cluster();": "",
            "    if (!kChain) wait_cluster();": "    wait_cluster();",
        },
        RACE,
    ),
    "nobody says that its T1 is written": (
        {"    sync_warp();\n    arrive_cluster();  // this block's part of T1 is everywhere\n": ""},
        ("divergent barrier",),
    ),
    "a block ends while others store into it": (
        {"  tile.conv2();\n": "  if (cluster_rank() == 1) return;\n  tile.conv2();\n"},
        ("ended too early", "deadlock"),
    ),
    "weights are not waited for": (
        {"    wait_barrier(filled(ring.slot), ring.parity);\n": ""},
        ("copy in flight", *RACE, "ended too early"),
    ),
    "a slot is filled again before all warps are done with it": (
        {"        wait_barrier(emptied(into), wrapped ? ring.parity ^ 1 : ring.parity);\n": ""},
        (*RACE, "copy in flight"),
    ),
    "one lane says that its warp is done before the others are": (
        {"      sync_warp();\n      if (ring.stage >= 0 &&": "      if (ring.stage >= 0 &&"},
        RACE,
    ),
    "x is read while the kernel in front may be writing it": (
        {"    wait_for_previous_kernel();\n": ""},
        ("too early",),
    ),
    "parts of the sum lie on T1 while it is read": (
        {"    sync_block();  // T1 was read: the parts lie there\n": ""},
        RACE,
    ),
    "parts of the sum are added before they are there": (
        {"    sync_block();  // all parts are there\n": ""},
        RACE,
    ),
    "the tile hangs over the image's edge": (
        {"      if (!inside(y, x)) continue;\n": ""},
        ("written twice", "out of bounds", "copy in flight", *RACE),
    ),
}


@pytest.fixture(scope="module")
def few_instances() -> str:
    """hopper_latency.cu with the one instance that the driver takes: compiled in seconds."""
    begin = SOURCE.index("constexpr Entry kEntries[]")
    end = SOURCE.index("#undef HGFAST_ENTRY")
    entry = "constexpr Entry kEntries[] = {HGFAST_ENTRY(bfloat16, BFloat16, 2, 32)};\n\n"
    few = SOURCE[:begin] + entry + SOURCE[end:]
    for text, replacement in (
        ("constexpr int kShared = 113 * 1024;", "constexpr int kShared = 0;"),
        ("if (taken < fewest) taken = slots(shared_limit);", "taken = fewest;"),
    ):
        assert few.count(text) == 1
        few = few.replace(text, replacement)
    return few


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)

    def bf16(count: int, scale: float) -> np.ndarray:
        values = rng.normal(0, scale, count).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    pixels = math.prod(SIZE)
    return [
        bf16(pixels * CHANNELS, 1),
        np.zeros(pixels * CHANNELS, np.uint16),
        rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32),
        bf16(CHANNELS * CHANNELS * (1 + 9 + 2), 0.1),
    ]


def run(library: Path, arrays: list[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
    """Reports and results for a block and a chain, in two orders of threads."""
    reports, results = [], []
    for chain, seed in ((0, 0), (0, 1), (1, 0), (1, 1)):
        report, after = mutants.run(library, [np.array([seed, chain], np.int32), *arrays])
        reports.append(report)
        results.append(after[2])
    return reports, results


def build(header: str, source: str, folder: Path, cache: Path) -> Path:
    changed = {"hopper_latency.cu": source, "hopper_latency.cuh": header}
    return mutants.build(changed, DRIVER, folder, only=["hopper_latency.cu"], cache=cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory,
    few_instances: str,
    arrays: list[np.ndarray],
    cache: Path,
) -> list[np.ndarray]:
    folder = tmp_path_factory.mktemp("mutants") / "original"
    reports, results = run(build(HEADER, few_instances, folder, cache), arrays)
    assert reports == [""] * 4
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[2], results[3])
    return results


@pytest.mark.skipif(
    shutil.which(mutants.compiler()) is None, reason="no C++ compiler to build mutants with"
)
@pytest.mark.parametrize("planted", MUTANTS)
def test_a_planted_mistake_is_noticed(
    planted: str,
    few_instances: str,
    arrays: list[np.ndarray],
    original: list[np.ndarray],
    cache: Path,
    tmp_path: Path,
) -> None:
    edits, kinds = MUTANTS[planted]
    header = HEADER
    for text, replacement in edits.items():
        assert header.count(text) == 1, f"{text!r} is not in the kernel, or more than once"
        header = header.replace(text, replacement)
    library = build(header, few_instances, tmp_path / "it", cache)
    reports, results = run(library, arrays)
    found = {report.partition(":")[0] for report in reports if report}
    if not found and any(not np.array_equal(a, b) for a, b in zip(results, original, strict=True)):
        found = {"another result"}
    assert found, "nobody noticed"
    assert found <= set(kinds), reports
