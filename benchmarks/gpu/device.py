"""Clocks, caches and graphs: of a GPU, or of the CPU where the code is only rehearsed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


class Device(Protocol):
    """What measuring needs. All times are in seconds."""

    torch: torch.device
    rehearsed: bool

    def synchronise(self) -> None: ...

    def cold(self, call: Call, count: int) -> list[float]:
        """Each of ``count`` calls alone, with nothing of use in the L2 cache."""

    def warm(self, call: Call, calls: int, count: int) -> list[float]:
        """``count`` times: ``calls`` calls back to back; the mean time of one."""

    def latency(self, call: Call, count: int) -> list[float]:
        """From before each call until its result is there, by the host's clock."""

    def capture(self, call: Call, calls: int = 1) -> Call:
        """``calls`` calls as one graph; calling the result replays it."""


class Cuda:
    rehearsed = False

    def __init__(self) -> None:
        self.torch = torch.device("cuda", 0)
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(5 * cache // 2, dtype=torch.int8, device=self.torch)

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def cold(self, call: Call, count: int) -> list[float]:
        pairs = [self._events() for _ in range(count)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def warm(self, call: Call, calls: int, count: int) -> list[float]:
        pairs = [self._events() for _ in range(count)]
        for start, end in pairs:
            start.record()
            for _ in range(calls):
                call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 / calls for start, end in pairs]

    def latency(self, call: Call, count: int) -> list[float]:
        times = []
        for _ in range(count):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return times

    def capture(self, call: Call, calls: int = 1) -> Call:
        # PyTorch's recipe: warm up in a side stream first, so that handles, workspaces and
        # algorithms are there before the capture, which may not make them.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                output = call()

        def replay() -> Any:
            graph.replay()
            return output

        return replay

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


class Rehearsal:
    """The CPU in the GPU's place: the same calls, the host's clock, no graphs, nothing to flush."""

    rehearsed = True

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def synchronise(self) -> None:
        pass

    def cold(self, call: Call, count: int) -> list[float]:
        return self.latency(call, count)

    def warm(self, call: Call, calls: int, count: int) -> list[float]:
        times = []
        for _ in range(count):
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - begun) / calls)
        return times

    def latency(self, call: Call, count: int) -> list[float]:
        return self.warm(call, 1, count)

    def capture(self, call: Call, calls: int = 1) -> Call:
        def again() -> Any:
            for _ in range(calls):
                output = call()
            return output

        return again
