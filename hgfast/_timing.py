"""Fair timing on a machine that is busy, or warms up, or throttles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def sample_alternately(
    candidates: Mapping[str, Callable[[], object]], blocks: int, calls: int
) -> dict[str, list[list[float]]]:
    """Milliseconds of every call: candidate -> block -> call.

    Candidates take turns in blocks, so that a slow moment hits all of them.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for _ in range(blocks):
        for name, call in candidates.items():
            block = []
            for _ in range(calls):
                start = time.perf_counter()
                call()
                block.append((time.perf_counter() - start) * 1e3)
            times[name].append(block)
    return times


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
    times = sample_alternately(candidates, blocks, calls)
    return {
        name: statistics.median(time for block in found for time in block[drop:])
        for name, found in times.items()
    }
