"""docs/performance.md against benchmarks/results/emulated-counts.json; that against the kernels."""

from __future__ import annotations

import json
from typing import Any

import pytest

emulator: Any = pytest.importorskip(
    "hgfast_emulator", reason="the emulator is not built (HGFAST_EMULATOR=1 builds it)"
)
from benchmarks import emulated_counts as counts  # noqa: E402

COMMITTED = json.loads(counts.RESULT.read_text())
PAGE = (counts.ROOT / "docs" / "performance.md").read_text()


@pytest.fixture(autouse=True)
def _an_h200() -> None:
    emulator.set_seed(0)
    emulator.set_device(counts.MULTIPROCESSORS)


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("bottleneck", counts.table),
        ("latency", counts.latency_table),
        ("hopper", counts.hopper_table),
        ("upsample_add", counts.joins_table),
        ("stem", lambda rows: counts.table(rows, "image")),
        ("head", lambda rows: counts.table(rows, "wanted")),
    ],
)
def test_the_page_shows_what_was_counted(kind: str, table: Any) -> None:
    assert table(COMMITTED[kind]) in PAGE


def test_the_kernels_are_those_that_were_counted() -> None:
    """The smallest of each kind, counted again."""
    assert counts.count_latency(4) == COMMITTED["latency"][-1]
    assert counts.count_hopper(32) == COMMITTED["hopper"][-1]
    assert counts.count_subtree() == COMMITTED["subtree"][0]
    case = counts.CASES[7]
    assert case.size == 4
    assert counts.count(case) == COMMITTED["bottleneck"][7]
