"""Mistakes planted into the kernels of the stem and of the head: each must be noticed.

As tests/test_emulated_mutants.py does it with the bottleneck's.
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

# An image of 40x70, 18 tiles for four blocks. The weights are random where they would be padded
# with zeros, so that a column too many is seen.
STEM = """
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "emulator/launch.h"

extern "C" const char* run(void** arrays) {
  using namespace hgfast::cuda;
  emulated_device = {1, 227 * 1024};
  emulator::set_seed(static_cast<const int*>(arrays[0])[0]);
  StemParams p{};
  p.batch = 2;
  p.height = 40;
  p.width = 70;
  p.x_batch = 3 * 40 * 70;
  p.x_channel = 1;
  p.x_row = 3 * 70;
  p.x_column = 3;
  p.pixel = Pixel::float32;
  p.out = 16;
  p.x = arrays[1];
  p.y = arrays[2];
  p.b = static_cast<const float*>(arrays[3]);
  p.scale = p.shift = p.b;
  p.tape = arrays[4];
  return cudaGetErrorString(stem(p, nullptr));
}
"""

# 77 pixels, three tiles; 48 channels everywhere, and 17 joints.
HEAD = """
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "emulator/launch.h"

extern "C" const char* run(void** arrays) {
  using namespace hgfast::cuda;
  emulator::set_seed(static_cast<const int*>(arrays[0])[0]);
  HeadParams p{};
  p.pixels = 77;
  p.in = p.middle = p.out = 48;
  p.joints = 17;
  p.y = p.x = arrays[1];
  p.next = arrays[2];
  p.heatmaps = arrays[5];
  p.b1 = p.bn = p.bh = static_cast<const float*>(arrays[3]);
  p.tape = arrays[4];
  return cudaGetErrorString(head(p, nullptr));
}
"""

RACE = ("race", "uninitialised")
MUTANTS = {
    "stem: no barrier before the products": ("      sync_block();\n", "", RACE),
    "stem: one buffer for two images": (
        "buffer * Config::patch_bytes",
        "0 * buffer * Config::patch_bytes",
        RACE,
    ),
    "stem: the weights are not waited for": (
        "if (i == 0) wait_copies<0>();",
        "",
        ("copy in flight",),
    ),
    "stem: the 22nd column counts": ("0x0000ffffu", "0xffffffffu", ("another result",)),
    "stem: columns behind the last kernel row count": (
        "pairs < 19 || quad == 0",
        "true",
        (*RACE, "another result", "out of bounds"),
    ),
    "stem: the image is not cut at its edge": (
        "column >= width) continue;",
        "false) continue;",
        ("out of bounds", "read of an output"),
    ),
    "stem: a tile hangs over the edge": (
        "if (y >= height() || x >= width()",
        "if (y >= height() || x > width()",
        ("written twice", "out of bounds"),
    ),
    "head: no barrier before a slice is used": (
        "    sync_block();\n    ask();",
        "    ask();",
        RACE,
    ),
    "head: a copy is waited for too late": (
        "wait_copies<Config::stages - 2>();",
        "wait_copies<Config::stages - 1>();",
        ("copy in flight",),
    ),
    "head: the heatmaps leave before they are there": (
        "    sync_block();\n    // Their elements",
        "    // Their elements",
        RACE,
    ),
    "head: the last heatmaps stay": (
        "begin < elements; begin +=",
        "begin + 8 <= elements; begin +=",
        ("never written",),
    ),
    "head: channels behind the last count": (
        "column < p.middle ? pack_relu<T>(a, b) : 0u",
        "pack_relu<T>(a, b)",
        ("another result",),
    ),
    "head: pixels behind the last are read": (
        "row < valid && channel < p.in",
        "channel < p.in",
        ("out of bounds", "read of an output"),
    ),
    "head: the joints' weights are as wide as the others": (
        "static_cast<int64_t>(next - wide) * Config::joints_stage",
        "static_cast<int64_t>(next - wide) * Config::weights_stage",
        ("out of bounds",),
    ),
}


def sources(kernel: str) -> tuple[str, str]:
    """A kernel's header, and its .cu with a single instance: compiled in seconds."""
    text = (mutants.CUDA / f"{kernel}.cu").read_text()
    wanted = {"stem": "bfloat16, BFloat16, 32", "head": "bfloat16, BFloat16, 64, 32, 3, 4"}[kernel]
    entries = re.search(r"constexpr Entry kEntries\[\] = \{.*?\};", text, re.DOTALL)
    assert entries is not None
    few = text.replace(entries.group(), f"constexpr Entry kEntries[] = {{HGFAST_ENTRY({wanted})}};")
    return (mutants.CUDA / f"{kernel}.cuh").read_text(), few


def arrays_of(kernel: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)

    def bf16(count: int, scale: float = 1.0) -> np.ndarray:
        values = rng.normal(0, scale, count).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    bias = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    if kernel == "stem":
        x = rng.normal(0, 1, 2 * 40 * 70 * 3).astype(np.float32)
        return [x, np.zeros(2 * 20 * 35 * 16, np.uint16), bias[:32].copy(), bf16(32 * 160, 0.1)]
    tape = bf16(64 * 64 + 64 * 64 + 32 * 64, 0.1)
    return [bf16(77 * 48), np.zeros(77 * 48, np.uint16), bias, tape, np.zeros(1312, np.uint16)]


class Built:
    """A kernel, unchanged, and what its results are."""

    def __init__(self, kernel: str, folder: Path, cache: Path) -> None:
        self.kernel, self.cache = kernel, cache
        self.header, self.source = sources(kernel)
        self.arrays = arrays_of(kernel)
        reports, self.results = self.run(self.header, folder)
        assert reports == ["", ""]

    def run(self, header: str, folder: Path) -> tuple[list[str], list[np.ndarray]]:
        """Reports and results of a changed header, for two orders of threads."""
        changed = {f"{self.kernel}.cu": self.source, f"{self.kernel}.cuh": header}
        driver = {"stem": STEM, "head": HEAD}[self.kernel]
        library = mutants.build(
            changed, driver, folder, only=[f"{self.kernel}.cu"], cache=self.cache, optimise="-O0"
        )
        reports, results = [], []
        for seed in (0, 1):
            report, after = mutants.run(library, [np.array([seed], np.int32), *self.arrays])
            reports.append(report)
            results += [after[2], after[-1]]
        return reports, results


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    folder = tmp_path_factory.mktemp("originals")
    return {kernel: Built(kernel, folder / kernel, folder) for kernel in ("stem", "head")}


@pytest.mark.parametrize("planted", MUTANTS)
def test_a_planted_mistake_is_noticed(
    planted: str, built: dict[str, Built], tmp_path: Path
) -> None:
    kernel = planted.partition(":")[0]
    original = built[kernel]
    text, replacement, kinds = MUTANTS[planted]
    assert original.header.count(text) == 1, f"{text!r} is not in the kernel, or more than once"
    reports, results = original.run(original.header.replace(text, replacement), tmp_path / "it")
    found = {report.partition(":")[0] for report in reports if report}
    pairs = zip(results, original.results, strict=True)
    if not found and any(not np.array_equal(a, b) for a, b in pairs):
        found = {"another result"}
    assert found, "nobody noticed"
    assert found <= set(kinds), reports
    for report in reports:
        assert not report or f"csrc/cuda/{kernel}.cuh:" in report or "written" in report, report
