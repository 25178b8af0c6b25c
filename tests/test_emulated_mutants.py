"""Mistakes planted into the real bottleneck kernel, one at a time: each must be noticed.

A test of the tests: were a barrier of the kernel superfluous, or the emulator blind to its absence,
the mutant without it would survive.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from emulator import mutants

pytestmark = pytest.mark.skipif(
    shutil.which(mutants.compiler()) is None, reason="no C++ compiler to build mutants with"
)

HEADER = (mutants.CUDA / "bottleneck.cuh").read_text()
SOURCE = (mutants.CUDA / "bottleneck.cu").read_text()

# Projected blocks, chosen so that every stage of the rings meets what lies where it does. 15x18
# pixels, and 16x18 with an upsampled sum.
OUT, WIDTH = 48, 18
CASES = ((48, 32), (112, 64), (112, 80))  # channels of x and in the middle

DRIVER = """
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "emulator/launch.h"

extern "C" const char* run(void** arrays) {
  using namespace hgfast::cuda;
  const int* choice = static_cast<const int*>(arrays[0]);
  emulated_device = {choice[0] ? 1 : 1000000, 227 * 1024};
  emulator::set_seed(choice[1]);
  BottleneckParams p{};
  p.batch = 1;
  p.height = p.x_height = choice[3];
  p.width = p.x_width = 18;
  p.in = choice[4];
  p.out = 48;
  p.middle = choice[2];
  p.project = true;
  p.x = arrays[1];
  p.low = choice[3] % 2 ? nullptr : arrays[2];
  p.y = arrays[3];
  p.scale = p.shift = p.b1 = p.b2 = p.b3 = static_cast<const float*>(arrays[4]);
  p.tape = arrays[5];
  return cudaGetErrorString(bottleneck(p, nullptr));
}
"""

# What is planted -> text, its replacement, and the kinds of report that are an answer;
# "another result" where nothing but the numbers is wrong.
RACE = ("race", "uninitialised")
MUTANTS = {
    "no barrier before a slice is used": (
        "    sync_block();\n    ask<input>();",
        "    ask<input>();",
        RACE,
    ),
    "no barrier before T1 overwrites x": (
        "sync_block();  // T1 lies",
        "(void)0;  // T1 lies",
        RACE,
    ),
    "no barrier before T2 overwrites T1": (
        "sync_block();  // T2 lies",
        "(void)0;  // T2 lies",
        RACE,
    ),
    "a copy is waited for too late": (
        "wait_copies<Config::stages - 2>();",
        "wait_copies<Config::stages - 1>();",
        ("copy in flight",),
    ),
    "copies are never committed": ("    commit_copies();", "", ("copy in flight",)),
    "copies run one slice too far ahead": (
        "i < Config::stages - 1; ++i) ask<Input::halo>();",
        "i < Config::stages; ++i) ask<Input::halo>();",
        (*RACE, "copy in flight"),
    ),
    "the last piece of the weights is not copied": (
        "for (int i = 0; i < Config::weights_stage; i +=",
        "for (int i = 0; i < Config::weights_stage - kThreads * 16; i +=",
        ("uninitialised", "never written"),
    ),
    "the weights are copied a piece too far": (
        "copy_async(to + i, from + i);",
        "copy_async(to + i + 16, from + i);",
        ("out of bounds", "uninitialised", *RACE, "copy in flight"),
    ),
    "the last slice of the tape comes from behind it": (
        "static_cast<int64_t>(next) * Config::weights_stage",
        "static_cast<int64_t>(next + 1) * Config::weights_stage",
        ("out of bounds",),
    ),
    "the halo begins at the tile": (
        "return offset_of(y0 - 1 + row / Config::halo_w, x0 - 1 + row % Config::halo_w);",
        "return offset_of(y0 + row / Config::halo_w, x0 + row % Config::halo_w);",
        ("another result",),
    ),
    "the halo is not cut at the image's edge": (
        "return y >= 0 && y < p.height && x >= 0 && x < p.width;",
        "return y >= 0 && y <= p.height && x >= 0 && x < p.width;",
        ("out of bounds", "read of an output", "written twice"),
    ),
    "the halo is cut too early": (
        "return y >= 0 && y < p.height && x >= 0 && x < p.width;",
        "return y > 0 && y < p.height && x >= 0 && x < p.width;",
        ("never written",),
    ),
    "outside of the image T1 is conv1 of zeros": ("kept && column", "column", ("another result",)),
    "the 3x3 window stands a pixel to the right": (
        "tap / 3 * Config::halo_w + tap % 3",
        "tap / 3 * Config::halo_w + tap % 3 + 1",
        ("another result", "out of bounds", "uninitialised", "copy in flight"),
    ),
    "x for the projection lies on T2": (
        "const int tile_ring = ring + (early && t1_bytes > t2_bytes ? t1_bytes : t2_bytes);",
        "const int tile_ring = ring;",
        (*RACE, "copy in flight"),
    ),
    "x for the projection is asked for while T1 is read": (
        "(early && t1_bytes > t2_bytes ? t1_bytes : t2_bytes)",
        "(t2_bytes)",
        (*RACE, "copy in flight"),
    ),
    "too little shared memory": (
        "return {ring, ring, ring, tile_ring, end};",
        "return {ring, ring, ring, tile_ring, end - 16};",
        ("out of bounds",),
    ),
    "the second half of the weights is the first": (
        "half * Config::chunk * 32",
        "0 * half * Config::chunk * 32",
        ("another result",),
    ),
    "a lane leaves before the others shuffle": (
        "transpose_quad(v);  // by all lanes, also where nothing is stored",
        "if (!inside(y[half], x[half])) continue; transpose_quad(v);",
        ("deadlock", "divergent warp"),
    ),
    "the upsampled map is read at full size": (
        "y[half] / 2 * (width / 2)",
        "y[half] * (width / 2)",
        ("out of bounds", "read of an output", "another result"),
    ),
}


@pytest.fixture(scope="module")
def few_instances() -> str:
    """bottleneck.cu without float16 and without 128 channels at a time: compiled in seconds."""
    begin, end = SOURCE.index("#define HGFAST_ENTRIES"), SOURCE.index("constexpr Entry kEntries")
    macro, *lines = SOURCE[begin:end].strip().splitlines()
    entries = [re.sub(r",?\s*\\?$", "", line) for line in lines if '"128"' not in line]
    assert len(entries) == 6
    few = SOURCE[:begin] + macro + "\n" + ", \\\n".join(entries) + "\n\n" + SOURCE[end:]
    for pattern, replacement in (
        (
            r"middle <= 32 \? 32 : middle <= 64 \|\| middle > 128 \? 64 : 128",
            "middle <= 32 ? 32 : 64",
        ),
        (r"p\.middle <= 128", "p.middle <= 64"),
        (r",\s*HGFAST_ENTRIES\(float16, Float16\)", ""),
    ):
        few, count = re.subn(pattern, replacement, few)
        assert count == 1, pattern
    return few


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)

    def bf16(*shape: int, scale: float = 1.0) -> np.ndarray:
        values = rng.normal(0, scale, shape).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    def tape(into: int, middle: int) -> np.ndarray:
        chunk = 32 if middle <= 32 else 64
        into, mid = -(-into // 32) * 32, -(-middle // chunk) * chunk
        out = -(-OUT // chunk) * chunk
        return bf16(mid * into + 9 * mid * mid + out * (mid + into), scale=0.1)

    return [
        bf16(16 * WIDTH * max(into for into, _ in CASES)),
        bf16(1, 8, WIDTH // 2, OUT),
        rng.uniform(0.5, 1.5, 128).astype(np.float32),
        *(tape(into, middle) for into, middle in CASES),
    ]


def run(library: Path, arrays: list[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
    """Reports and results for both tiles, two orders of threads, and both kinds of instances."""
    x, low, vector, *tapes = arrays
    reports, results = [], []
    for (into, middle), tape in zip(CASES, tapes, strict=True):
        for large in (0, 1):
            height = 15 + large
            for seed in (0, 1):
                y = np.zeros((1, height, WIDTH, OUT), np.uint16)
                choice = np.array([large, seed, middle, height, into], np.int32)
                cut = x[: height * WIDTH * into]
                report, after = mutants.run(library, [choice, cut, low, y, vector, tape])
                reports.append(report)
                results.append(after[3])
    return reports, results


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory, few_instances: str, arrays: list[np.ndarray]
) -> list[np.ndarray]:
    folder = tmp_path_factory.mktemp("mutants") / "original"
    library = mutants.build(
        {"bottleneck.cu": few_instances},
        DRIVER,
        folder,
        only=["bottleneck.cu"],
        cache=folder.parent,
    )
    reports, results = run(library, arrays)
    assert reports == [""] * len(reports)
    return results


@pytest.mark.parametrize("planted", MUTANTS)
def test_a_planted_mistake_is_noticed(
    planted: str,
    few_instances: str,
    arrays: list[np.ndarray],
    original: list[np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    text, replacement, kinds = MUTANTS[planted]
    assert HEADER.count(text) == 1, f"{text!r} is not in the kernel, or more than once"
    changed = {"bottleneck.cu": few_instances, "bottleneck.cuh": HEADER.replace(text, replacement)}
    cache = tmp_path_factory.getbasetemp() / "mutants0"
    folder = tmp_path_factory.mktemp("mutant")
    library = mutants.build(
        changed, DRIVER, folder / "it", only=["bottleneck.cu"], cache=cache, optimise="-O1"
    )
    reports, results = run(library, arrays)
    found = {report.partition(":")[0] for report in reports if report}
    if not found and any(not np.array_equal(a, b) for a, b in zip(results, original, strict=True)):
        found = {"another result"}
    assert found, "nobody noticed"
    assert found <= set(kinds), reports
    for report in reports:
        assert not report or " at csrc/cuda/" in report or "written" in report, report
