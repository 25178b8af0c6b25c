"""Turn a pytest-benchmark JSON of bench_decode.py into a Markdown table.

python benchmarks/table.py benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Medians = dict[str, dict[str, float]]  # seconds, by kind of heatmaps and candidate


def medians(tests: list[Any]) -> Medians:
    """The median over the blocks of each block's median."""
    blocks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for test in tests:
        info = test["extra_info"]
        blocks[info["maps"]][info["candidate"]].append(test["stats"]["median"])
    return {
        name: {candidate: statistics.median(times) for candidate, times in candidates.items()}
        for name, candidates in blocks.items()
    }


def decoding(tests: list[Any]) -> list[str]:
    """Per kind of heatmaps and candidate the median time, and its ratio to the maximum alone."""
    lines = ["| heatmaps | candidate | us | relative to torch.amax |", "|---|---|---:|---:|"]
    for maps, candidates in medians(tests).items():
        for name, seconds in candidates.items():
            ratio = seconds / candidates["torch.amax"]
            lines.append(f"| {maps} | {name} | {seconds * 1e6:.0f} | {ratio:.2f} |")
    return lines


def table(path: Path) -> str:
    """A Markdown table, and the machine."""
    results = json.loads(path.read_text())
    lines = decoding(results["benchmarks"])
    machine = results["machine_info"]["cpu"]
    lines.append("")
    lines.append(f"{machine.get('brand_raw', 'unknown CPU')}, {machine.get('count')} cores")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
