"""Turn a pytest-benchmark JSON of bench_hourglass.py or bench_decode.py into a Markdown table.

python benchmarks/table.py benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Medians = dict[str, dict[str, float]]  # seconds, by group and candidate


def medians(tests: list[Any], group: str) -> Medians:
    """The median over the blocks of each block's median."""
    blocks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for test in tests:
        info = test["extra_info"]
        blocks[info[group]][info["candidate"]].append(test["stats"]["median"])
    return {
        name: {candidate: statistics.median(times) for candidate, times in candidates.items()}
        for name, candidates in blocks.items()
    }


def hourglasses(tests: list[Any]) -> list[str]:
    """Per network and candidate the median latency, and its ratio to hgfast's."""
    lines = [
        "| network | candidate | ms | relative to hgfast in the same dtype |",
        "|---|---|---:|---:|",
    ]
    for network, candidates in medians(tests, "network").items():
        for name, seconds in candidates.items():
            ours = candidates["hgfast bfloat16" if "bfloat16" in name else "hgfast float32 highest"]
            lines.append(f"| {network} | {name} | {seconds * 1e3:.0f} | {seconds / ours:.2f} |")
    return lines


def decoding(tests: list[Any]) -> list[str]:
    """Per kind of heatmaps and candidate the median time, and its ratio to the maximum alone."""
    lines = ["| heatmaps | candidate | us | relative to torch.amax |", "|---|---|---:|---:|"]
    for maps, candidates in medians(tests, "maps").items():
        for name, seconds in candidates.items():
            ratio = seconds / candidates["torch.amax"]
            lines.append(f"| {maps} | {name} | {seconds * 1e6:.0f} | {ratio:.2f} |")
    return lines


def table(path: Path) -> str:
    """A Markdown table, and the machine."""
    results = json.loads(path.read_text())
    tests = results["benchmarks"]
    lines = hourglasses(tests) if "network" in tests[0]["extra_info"] else decoding(tests)
    machine = results["machine_info"]["cpu"]
    lines.append("")
    lines.append(f"{machine.get('brand_raw', 'unknown CPU')}, {machine.get('count')} cores")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
