"""The measuring process: items by priority, the candidates of an item in turns.

    python -m benchmarks.gpu.measure --journal FILE --identity ID --deadline SECONDS [--rehearse]

A process of its own, because one bad kernel can end it: __main__.py starts another, which goes on
behind the item that failed. Exit status 3 means that the device answers no more.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import REAL, REHEARSED, Candidate, Item, items, settle
from benchmarks.gpu.device import Call, Cuda, Device, Rehearsal
from benchmarks.gpu.journal import FINISHED, Journal

BLOCKS = 5
UNROLLED = 10  # calls in the graph that is timed warm, so that its launch does not count
BUDGET = 0.06  # seconds for one candidate in one block
DROPPED = 2  # calls at the head of each block
#: Relative L2 error against float32 from which on a result is wrong and its time worth nothing.
WRONG = {"op": 0.03, "network": 0.25}
LOST = 3


class DeviceLostError(Exception):
    """The device answers no more: nothing measured by this process can be trusted."""


class Ready:
    """A candidate that is warmed up, captured and checked."""

    def __init__(self, candidate: Candidate, call: Call, many: Call | None, error: float) -> None:
        self.candidate = candidate
        self.call = call
        self.many = many  # UNROLLED calls in one graph
        self.error = error
        self.times: dict[str, list[list[float]]] = {}  # way of timing -> block -> seconds


def leaf(result: Any) -> Tensor:
    """The last tensor of a result: of a network the heatmaps that count."""
    last: Tensor = torch.utils._pytree.tree_leaves(result)[-1]
    return last


def relative_error(result: Any, expected: Tensor) -> float:
    found = leaf(result).double()
    return float((found - expected.double()).norm() / expected.double().norm())


def quantiles(blocks: list[list[float]]) -> dict[str, Any]:
    times = sorted(time for block in blocks for time in block)
    return {
        "median": statistics.median(times),
        "least": times[0],
        "p10": times[len(times) // 10],
        "p90": times[len(times) * 9 // 10],
        "most": times[-1],
        "calls": len(times),
        "blocks": [statistics.median(block) for block in blocks],
    }


class Measurer:
    def __init__(self, device: Device, journal: Journal) -> None:
        self.device = device
        self.journal = journal

    # ---- the machine's peaks ----

    @torch.no_grad()
    def peaks(self) -> None:
        """What the matrix units and the memory give at their best: the ceilings of this run."""
        at = self.device.torch
        size = 256 if self.device.rehearsed else 8192
        a, b = (torch.randn(size, size, device=at).bfloat16() for _ in range(2))
        times = self._timed_peak(lambda: torch.mm(a, b))
        self.journal.add(
            "peak", "matmul", "ok", what=f"{size}^3 bf16 matrix product, random data",
            seconds=times, rate=2 * size**3 / times["median"], unit="FLOP/s",
        )  # fmt: skip
        count = 1 << (20 if self.device.rehearsed else 31)
        source = torch.empty(count, dtype=torch.int8, device=at).random_(-100, 100)
        target = torch.empty_like(source)
        times = self._timed_peak(lambda: target.copy_(source))
        self.journal.add(
            "peak", "copy", "ok", what=f"copy of {count} bytes, read and written",
            seconds=times, rate=2 * count / times["median"], unit="byte/s",
        )  # fmt: skip

    def _timed_peak(self, call: Call) -> dict[str, Any]:
        self.device.warm(call, 3, 1)
        count = 3 if self.device.rehearsed else 20
        return quantiles([self.device.warm(call, 1, count) for _ in range(3)])

    # ---- items ----

    @torch.no_grad()
    def item(self, item: Item) -> None:
        case = item.case
        module = case.module().to(self.device.torch)
        inputs = case.inputs(self.device.torch)
        settle(module, inputs)
        with Candidate("eager", "float32").settings():
            expected = leaf(module(*inputs)).clone()

        prepared: dict[tuple[Any, ...], Call] = {}
        ready = []
        for candidate in item.candidates:
            key = (candidate.kind, candidate.dtype, candidate.channels_last, candidate.mode)
            try:
                with candidate.settings():
                    begun = time.perf_counter()
                    if key not in prepared:
                        prepared[key] = candidate.prepare(
                            case, module, inputs, self.device.rehearsed
                        )
                    made = self._make(candidate, prepared[key], expected, case.is_network)
                    self.device.synchronise()
            except Exception as error:
                self._failed(item, candidate, error)
                continue
            limit = WRONG["network" if case.is_network else "op"]
            if not made.error <= limit:
                self._record(item, made, "wrong result", reason=f"relative error {made.error:.1e}")
                continue
            made.times["prepared"] = [[time.perf_counter() - begun]]
            ready.append(made)

        ways = ("stream", "latency") if case.is_network else ("cold", "warm")
        for _ in range(1 if self.device.rehearsed else BLOCKS):
            for made in ready:
                with made.candidate.settings():
                    for way in ways:
                        made.times.setdefault(way, []).append(self._block(made, way))
        for made in ready:
            with made.candidate.settings():
                after = relative_error(made.call(), expected)
            if not after <= 2 * made.error + 1e-6:  # what was right before may be overwritten since
                reason = f"relative error {made.error:.1e} before and {after:.1e} after timing"
                self._record(item, made, "wrong result", reason=reason)
            else:
                self._record(item, made, "ok")

    def _make(self, candidate: Candidate, call: Call, expected: Tensor, is_network: bool) -> Ready:
        for _ in range(3):
            call()
        many = None
        if candidate.graph:
            single = call
            call = self.device.capture(single)
            if not is_network:
                many = self.device.capture(single, UNROLLED)
        self.device.synchronise()
        return Ready(candidate, call, many, relative_error(call(), expected))

    def _block(self, made: Ready, way: str) -> list[float]:
        once = statistics.median(self.device.warm(made.call, 1, DROPPED))
        most = 3 if self.device.rehearsed else 40
        count = max(3, min(most, int(BUDGET / max(once, 1e-6))))
        if way == "cold":
            return self.device.cold(made.call, count)
        if way == "latency":
            return self.device.latency(made.call, count)
        if way == "stream":
            return self.device.warm(made.call, 1, count)
        if made.many is not None:
            return [t / UNROLLED for t in self.device.warm(made.many, 1, max(3, count // 4))]
        return self.device.warm(made.call, UNROLLED, max(3, count // 4))

    def _record(self, item: Item, made: Ready, status: str, **more: Any) -> None:
        case, prepared = item.case, made.times.get("prepared", [[0.0]])
        self.journal.add(
            "measurement", f"{item.name}: {made.candidate.name}", status,
            op=case.op, size=case.size, width=case.width, batch=case.batch, tier=item.tier,
            candidate=made.candidate.name, graph=made.candidate.graph,
            flops=case.flops(), least_bytes=case.least_bytes(made.candidate.torch_dtype),
            relative_error=made.error, seconds_to_prepare=prepared[0][0],
            seconds={
                way: quantiles(blocks) for way, blocks in made.times.items() if way != "prepared"
            },
            **more,
        )  # fmt: skip

    def _failed(self, item: Item, candidate: Candidate, error: Exception) -> None:
        """Write down what a candidate died of; DeviceLostError if the device died with it."""
        reason = f"{type(error).__name__}: {error}"[:2000]
        self.journal.add(
            "measurement", f"{item.name}: {candidate.name}", "failed",
            op=item.case.op, size=item.case.size, batch=item.case.batch, tier=item.tier,
            candidate=candidate.name, reason=reason, traceback=traceback.format_exc()[-3000:],
        )  # fmt: skip
        try:
            self.device.synchronise()
            torch.zeros(1, device=self.device.torch).item()
        except Exception as after:
            raise DeviceLostError(reason) from after


@dataclass(frozen=True)
class Task:
    """An item, or the peaks, which are measured like one."""

    name: str
    limit: float
    run: Callable[[], None]


def left_to_do(journal: Journal, tasks: list[Task], skipped: list[str]) -> Iterator[Task]:
    """Tasks that no record says anything final about. The journal is asked once."""
    latest = journal.latest("item")
    for task in tasks:
        record = latest.get(("item", task.name))
        if task.name not in skipped and (record is None or record["status"] not in FINISHED):
            yield task


def attempt(task: Task, device: Device, journal: Journal) -> bool:
    """Run it and write down how it ended; False if the device is lost with it."""
    journal.add("item", task.name, "begun", limit=task.limit)
    begun = time.perf_counter()
    try:
        task.run()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:2000]
        lost = isinstance(error, DeviceLostError)
        try:
            device.synchronise()
        except Exception:
            lost = True
        journal.add("item", task.name, "crashed" if lost else "failed", reason=reason)
        return not lost
    journal.add("item", task.name, "ok", took=time.perf_counter() - begun)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.measure")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--identity", required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--only", default="", help="a pattern that an item's name must contain")
    parser.add_argument("--skip", nargs="*", default=[], help="names of items not to try")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()

    parent = os.getppid()
    journal = Journal(args.journal, args.identity)
    if args.rehearse:
        torch.set_num_threads(1)  # of a machine that others use, most likely
    device: Device = Rehearsal() if args.rehearse else Cuda()
    measurer = Measurer(device, journal)
    chosen = [
        item
        for item in items(REHEARSED if args.rehearse else REAL)
        if re.search(args.only, item.name)
    ]
    journal.add("plan", args.only or "everything", "ok", names=[item.name for item in chosen])
    tasks = [Task("peaks", 60, measurer.peaks)]
    tasks += [Task(item.name, item.limit, partial(measurer.item, item)) for item in chosen]
    for task in left_to_do(journal, tasks, args.skip):
        if time.time() >= args.deadline or os.getppid() != parent:
            break  # no time left, or nobody to measure for; the report knows what was planned
        torch.compiler.reset()  # or its cache of one item counts against the next
        if not args.rehearse:
            torch.cuda.empty_cache()
        if not attempt(task, device, journal):
            return LOST
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
