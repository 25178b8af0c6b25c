"""The side streams of an executor, and how a schedule of :mod:`hgfast.runtime.branches` runs there.

Lane 0 is the current stream, the others are streams of the executor's own. A lane that needs what
another one does waits for an event. All of it happens inside a capture only: a graph keeps the
order and no streams, and costs the host one launch whatever is in it.

Memory. Torch's allocator gives the memory of a tensor that was dropped to whoever asks on the same
stream, in a capture too. So a value is dropped where the stream that it was made on is behind all
who read it, which the schedule knows. Nothing is told to the allocator with ``record_stream``: in a
capture it would hold such memory back until the end. What is left at the end of a run may go then:
a side stream does nothing again before it has waited for lane 0, which is behind all of the run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from hgfast.runtime.branches import BEGIN, Turn


class Event(Protocol):
    def record(self) -> None:
        """Mark what the current stream was given so far."""

    def wait(self) -> None:
        """Let the current stream wait for the mark."""


class Streams(Protocol):
    """What lanes need of torch.cuda. Tests have another, on the CPU."""

    def is_capturing(self) -> bool:
        """Whether somebody captures what this thread gives the current stream."""

    def event(self) -> Event: ...

    def stream(self) -> Any:
        """A new stream."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which ``stream`` is the current one of this thread."""


class CudaStreams:
    """Those of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def event(self) -> Event:
        return _CudaEvent(self._device)

    def stream(self) -> torch.cuda.Stream:
        # Of the priority that hardly anyone asks for: torch hands out 32 streams of each in turn,
        # and one that a user has too would be recorded with what they launch on it.
        return torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)


class _CudaEvent:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._event.wait(torch.cuda.current_stream(self._device))


class Lanes:
    """Side streams, made once, outside of any capture.

    Args:
        streams: of the device.
        count: how many lanes there are at most, lane 0 among them.
    """

    def __init__(self, streams: Streams, count: int) -> None:
        self._device = streams
        self._sides = [streams.stream() for _ in range(count - 1)]
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def free(self) -> Iterator[bool]:
        """Whether a schedule can run on them now, in this thread: and if so, nobody else's does.

        It can inside a capture, unless another capture, or an earlier run in this one, still has
        hold of the side streams: they belong to a capture until it ends.
        """
        if not self._device.is_capturing() or not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            yield not any(map(self._is_taken, self._sides))
        finally:
            self._lock.release()

    def run(self, turns: Sequence[Turn], launch: Callable[[Turn], None]) -> None:
        """Enqueue the turns of a schedule, each on its lane; to be called while ``free``."""
        awaited = {place for turn in turns for place in turn.waits}
        events: dict[int, Event] = {}

        def mark(place: int) -> None:
            if place in awaited:
                events[place] = self._device.event()
                events[place].record()

        mark(BEGIN)
        for place, turn in enumerate(turns):
            side = self._device.on(self._sides[turn.lane - 1]) if turn.lane else None
            with side or contextlib.nullcontext():
                for other in turn.waits:
                    events[other].wait()
                launch(turn)
                mark(place)

    def _is_taken(self, stream: Any) -> bool:
        with self._device.on(stream):
            return self._device.is_capturing()
