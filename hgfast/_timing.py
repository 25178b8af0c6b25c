"""Fair timing on a machine that is busy, or warms up, or throttles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def time_alternately(
    candidates: Mapping[str, Callable[[], object]],
    blocks: int = 2,
    calls: int = 8,
    drop: int = 3,
) -> dict[str, float]:
    """Median milliseconds of a call, per candidate.

    Candidates take turns in blocks, so that a slow moment hits all of them; within a block
    the first ``drop`` calls only bring back the candidate's caches.

    Raises:
        ValueError: no block, or nothing left of a block.
    """
    if blocks < 1 or calls <= drop:
        raise ValueError(f"expected blocks >= 1 and calls > drop, got {blocks}, {calls}, {drop}")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(blocks):
        for name, call in candidates.items():
            for index in range(calls):
                start = time.perf_counter()
                call()
                if index >= drop:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}
