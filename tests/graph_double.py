"""What hgfast.runtime.graphs needs of a GPU, on the CPU: graphs, streams, events and pools.

Work is done at once and in the thread that enqueues it, but what a GPU would be free to do is
looked for: each stream has a clock, events carry clocks from stream to stream, and two uses of a
pool's memory between which no chain of events lies are written down as a race. A graph records
operations and computes nothing that could be taken for a result: before each replay all that it
writes is NaN. A pool's handle is refused where torch would refuse it.

What is recorded may come from several streams. Then each operation must be behind the ones that
made what it reads; memory that was dropped, which goes to the next one on the stream that it was
made on, must not be in use on another; and the streams must be forked from the first one, and
joined to it in the end.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

Clock = dict[str, int]


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _aliases(values: Any) -> Any:
    """The same memory in other tensors, so that it is seen when the given ones are dropped."""
    with torch.no_grad(), _disable_current_modes():
        return tree_map_only(Tensor, lambda x: x.detach(), values)


class Handle:
    """Memory that streams share: of graphs, or of one tensor."""

    def __init__(self) -> None:
        self.streams: set[str] = set()  # on which it stays until they are done
        self.graphs: WeakSet[DoubleGraph] = WeakSet()
        self.was_used = False
        self.addresses: set[int] = set()
        self.last: tuple[str, int] | None = None  # stream and time of the last use


class Double:
    """A hgfast.runtime.graphs.Device.

    Attributes:
        captures: how many graphs were captured.
        kept: memory of the inputs of graphs.
        races: uses of a pool's memory that nothing orders.
        waits_for_nobody: events are ignored: what the clocks must notice.
    """

    type = "cpu"

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.races: list[str] = []
        self.handles: list[Handle] = []
        self.kept: dict[int, Handle] = {}  # by address
        self.waits_for_nobody = False
        self.lock = threading.RLock()
        self._clocks: dict[str, Clock] = {}
        self._sides: dict[str, Recorder | None] = {}  # streams, and the capture they are part of
        self._local = threading.local()

    # --- streams ---

    @property
    def stream(self) -> str:
        """The current one, of this thread."""
        return getattr(self._local, "stream", "default")

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self._local.stream = self.stream, stream
        try:
            yield
        finally:
            self._local.stream = before

    def stream_of_its_own(self) -> str:
        with self.lock:
            name = f"stream of its own {len(self._sides) + 1}"
            self._sides[name] = None
        return name

    def clock(self, stream: str) -> Clock:
        return self._clocks.setdefault(stream, {stream: 0})

    def wait(self, clock: Clock) -> None:
        """The current stream comes behind what this clock has seen."""
        with self.lock:
            mine = self.clock(self.stream)
            for stream, time in clock.items():
                mine[stream] = max(mine.get(stream, 0), time)

    def use(self, handle: Handle) -> None:
        """The current stream reads or writes memory of a pool."""
        with self.lock:
            mine = self.clock(self.stream)
            mine[self.stream] += 1
            if handle.last is not None:
                stream, time = handle.last
                if mine.get(stream, 0) < time:
                    self.races.append(f"{self.stream} uses what {stream} may still use")
            handle.last = self.stream, mine[self.stream]

    def watched(self) -> TorchDispatchMode:
        """While it is entered, operations on the pools' memory are seen."""
        return _Watch(self)

    # --- captures ---

    @property
    def recorder(self) -> Recorder | None:
        """Who records what this thread does."""
        return getattr(self._local, "recorder", None)

    def is_capturing(self) -> bool:
        if self.stream in self._sides:
            return self._sides[self.stream] is not None
        return self.recorder is not None

    def fork(self, recorder: Recorder) -> None:
        """The current stream becomes a part of a capture."""
        with self.lock:
            recorder.streams.add(self.stream)
            if self.stream in self._sides:
                assert self._sides[self.stream] in (None, recorder), "captures must not meet"
                self._sides[self.stream] = recorder

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Somebody captures what this thread does."""
        assert self.recorder is None
        self._local.recorder = recorder = Recorder(self)
        try:
            with recorder:
                yield recorder
        finally:
            recorder.end()
            self._local.recorder = None
            with self.lock:
                for stream in recorder.streams & self._sides.keys():
                    self._sides[stream] = None

    def synchronise(self) -> None:
        """What no capture can take."""
        if self.is_capturing():
            raise RuntimeError("operation not permitted when stream is capturing")

    def event(self) -> _Event:
        return _Event(self)

    def keep(self, x: Tensor) -> None:
        with self.lock:
            self.kept.setdefault(_address(x), Handle()).streams.add(self.stream)

    def pool(self) -> Handle:
        self.handles.append(Handle())
        return self.handles[-1]

    def capture(
        self, warm_up: Callable[[], object], record: Callable[[], object], pool: Handle
    ) -> DoubleGraph:
        assert pool.graphs or not pool.was_used, "torch has forgotten this pool with its graphs"
        pool.was_used = True
        current = dict(self.clock(self.stream))
        with self.on("side"):
            self.wait(current)
            warm_up()
            with self.recording() as recorder:
                record()
            done = dict(self.clock("side"))
        self.wait(done)
        graph = DoubleGraph(self, recorder, pool)
        pool.graphs.add(graph)
        self.captures += 1
        return graph


class _Event:
    def __init__(self, double: Double) -> None:
        self._double = double
        self._clock: Clock = {}
        self._recorder: Recorder | None = None  # of the capture that it is a part of

    def record(self) -> None:
        double = self._double
        with double.lock:
            self._clock = dict(double.clock(double.stream))
        recorder = double.recorder
        self._recorder = recorder if recorder and double.stream in recorder.streams else None

    def wait(self) -> None:
        if self._double.waits_for_nobody:
            return
        self._double.wait(self._clock)
        if self._recorder is not None:
            self._double.fork(self._recorder)


class _Memory:
    """A tensor that a capture made: where, who used it, and how many still hold it."""

    def __init__(self, stream: str, time: int) -> None:
        self.stream, self.time = stream, time
        self.uses: Clock = {}
        self.holders = 0


class Recorder(TorchDispatchMode):
    """What is done, in order: (call, what it gave); no call where nothing was written."""

    def __init__(self, double: Double) -> None:
        super().__init__()
        self.tape: list[tuple[Callable[[], Any] | None, Any]] = []
        self.made: dict[int, Tensor] = {}
        self.streams = {double.stream}
        self._double, self._first, self._is_over = double, double.stream, False
        self._memory: dict[int, _Memory] = {}
        self._free: list[_Memory] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        blank = "empty" in str(func)
        self.add(None if blank else func, args, kwargs, result)
        return result

    def add(self, call: Callable[..., Any] | None, args: Any, kwargs: Any, result: Any) -> None:
        self._check(_tensors((args, kwargs)), _tensors(result))
        known = {_address(x) for x in _tensors((args, kwargs))}
        args, kwargs, result = _aliases((args, kwargs, result))
        for x in _tensors(result):
            if _address(x) not in known:
                self.made.setdefault(_address(x), x)
        self.tape.append((call and (lambda: call(*args, **kwargs)), result))

    def _check(self, given: list[Tensor], results: list[Tensor]) -> None:
        """One operation on the current stream."""
        double = self._double
        with double.lock:
            stream, races = double.stream, double.races
            mine = double.clock(stream)
            mine[stream] += 1
            if stream not in self.streams:
                races.append(f"{stream} is no part of the capture")
            known = {_address(x) for x in given}
            for x in results:
                if _address(x) not in known:
                    self._memory.setdefault(_address(x), _Memory(stream, mine[stream]))
                    self._reuse(stream)
            for x in {_address(x): x for x in (*given, *results)}.values():
                memory = self._memory.get(_address(x))
                if memory is None:  # from before the capture
                    continue
                if mine.get(memory.stream, 0) < memory.time:
                    races.append(f"{stream} reads what {memory.stream} may not have written")
                memory.uses[stream] = mine[stream]
            for x in results:
                memory = self._memory.get(_address(x))
                if memory is not None:
                    memory.holders += 1
                    weakref.finalize(x, self._dropped, memory)

    def _dropped(self, memory: _Memory) -> None:
        with self._double.lock:
            memory.holders -= 1
            if not memory.holders and not self._is_over:
                self._free.append(memory)

    def _reuse(self, home: str) -> None:
        """New memory on a stream may be any that was dropped and is its own."""
        double, mine = self._double, self._double.clock(home)
        for memory in [memory for memory in self._free if memory.stream == home]:
            self._free.remove(memory)
            for stream, time in memory.uses.items():
                if mine.get(stream, 0) < time:
                    double.races.append(f"{home} may write to what {stream} still reads")

    def end(self) -> None:
        """The capture is over; streams must have come back to the first one."""
        double = self._double
        with double.lock:
            self._is_over = True
            first = double.clock(self._first)
            for stream in self.streams - {self._first}:
                if first.get(stream, 0) < double.clock(stream)[stream]:
                    double.races.append(f"{stream} is not joined")


class DoubleGraph:
    """What a recorder has seen, to be done again into the same memory."""

    def __init__(self, double: Double, recorder: Recorder, pool: Handle) -> None:
        self._double, self._recorder, self._pool = double, recorder, pool
        pool.addresses |= set(recorder.made)
        for x in recorder.made.values():
            self._poison(x)

    @staticmethod
    def _poison(x: Tensor) -> None:
        with torch.no_grad(), _disable_current_modes():
            if x.is_floating_point():
                x.fill_(torch.nan)

    def replay(self) -> None:
        self._double.synchronise()
        self._double.use(self._pool)
        self._double.replays += 1
        for x in self._recorder.made.values():
            self._poison(x)
        with torch.no_grad(), _disable_current_modes():
            for call, result in self._recorder.tape:
                if call is None:
                    continue
                for x, again in zip(_tensors(result), _tensors(call()), strict=True):
                    if _address(x) != _address(again):
                        x.copy_(again)


class _Watch(TorchDispatchMode):
    def __init__(self, double: Double) -> None:
        super().__init__()
        self._double = double

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        used = {_address(x) for x in _tensors((args, kwargs, result))}
        double = self._double
        for handle in double.handles:
            if used & handle.addresses and not double.is_capturing():
                double.use(handle)
        for address in used & double.kept.keys():
            double.use(double.kept[address])
            if double.stream not in double.kept[address].streams:
                double.races.append(f"{double.stream} uses memory that may go")
        return result


class Lanes:
    """What hgfast.runtime.lanes needs of a GPU, of a double."""

    def __init__(self, double: Double) -> None:
        self.is_capturing, self.event = double.is_capturing, double.event
        self.stream, self.on = double.stream_of_its_own, double.on


def recorded(kernel: Any, double: Double) -> Any:
    """The class of an emulated kernel, whose launches no operation of PyTorch's tells of."""

    class Recorded:
        obstacle = staticmethod(getattr(kernel, "obstacle", None) or str)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            bare = tree_map(lambda arg: getattr(arg, "_kernel", arg), (args, kwargs))
            self._kernel = kernel(*bare[0], **bare[1])

        def tensors(self) -> list[Tensor]:
            found: list[Tensor] = self._kernel.tensors()
            return found

        def run(self, *args: Any) -> Any:
            def call(*args: Any) -> Any:
                with _disable_current_modes():
                    return self._kernel.run(*args)

            result = call(*args)
            if double.recorder is not None:
                double.recorder.add(call, args, {}, result)
            return result

    return Recorded
