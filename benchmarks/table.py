"""Turn a pytest-benchmark JSON of bench_hourglass.py into the table of the README.

python benchmarks/table.py benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def table(path: Path) -> str:
    """A Markdown table: per network and candidate the median latency and its ratios."""
    results = json.loads(path.read_text())
    blocks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for test in results["benchmarks"]:
        info = test["extra_info"]
        blocks[info["network"]][info["candidate"]].append(test["stats"]["median"])
    lines = [
        "| network | candidate | ms | relative to hgfast in the same dtype |",
        "|---|---|---:|---:|",
    ]
    for network, candidates in blocks.items():
        medians = {name: statistics.median(times) for name, times in candidates.items()}
        for name, seconds in medians.items():
            ours = medians["hgfast bfloat16" if "bfloat16" in name else "hgfast float32 highest"]
            lines.append(f"| {network} | {name} | {seconds * 1e3:.0f} | {seconds / ours:.2f} |")
    machine = results["machine_info"]["cpu"]
    lines.append("")
    lines.append(f"{machine.get('brand_raw', 'unknown CPU')}, {machine.get('count')} cores")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
