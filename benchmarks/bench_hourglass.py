"""Whole networks: eager and hgfast at each precision, each alone.

make bench PYTEST_ARGS="-k HG-2 --benchmark-json=hourglass.json"

For a look at a change, with pytest-benchmark's own comparison. What is said about speed comes from
`make bench-peers`, where all candidates, other engines among them, take turns in one run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_bench import needs_native

import hgfast
from benchmarks.peers.engines import ENGINES
from benchmarks.peers.measure import images, network

pytestmark = needs_native

# Without installation, and without minutes of compiling.
CANDIDATES = [
    name
    for name, engine in ENGINES.items()
    if not engine.package and not name.startswith("torch.compile")
]


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize(("stacks", "batch"), [(2, 1), (2, 8), (8, 1)], ids=lambda n: str(n))
def test_hourglass(benchmark: Any, stacks: int, batch: int, name: str) -> None:
    benchmark.group = f"HG-{stacks}, batch {batch}"
    threads = torch.get_num_threads()
    with torch.no_grad():
        made = ENGINES[name].make(network(stacks, 256), images(batch, 256), threads)
        benchmark.pedantic(made.call, rounds=5, warmup_rounds=3)
    benchmark.extra_info.update(
        setting=made.setting,
        threads=threads,
        torch=torch.__version__,
        hgfast=hgfast.__version__,
    )
