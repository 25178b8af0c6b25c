"""A whole network as one launch: CUDA graphs around an executor, one for each shape of inputs.

A network of small maps is bound by the host, which launches some hundred kernels for each image.
A graph holds these launches, and the places of all values between them, planned once: the executor
is captured on inputs of its own, and a call copies its inputs there, replays, and copies the
outputs. So results are the caller's, and no two calls share them.

When. The first call of a shape runs plainly. The second captures: a shape that came twice will come
again, and whoever feeds images of ever new sizes pays nothing. The capture itself begins with one
more plain run, in the thread and on the stream of the capture, so that whatever is made at first
use (cuDNN's choice of an algorithm, workspaces) is there and is not captured. With CAPACITY graphs
there, the one unused for longest goes, but only for a shape that has come PATIENCE times: a capture
costs a few runs, and must not be paid at each call where many shapes take turns.

Memory. The graphs of one model share one pool, and the pool's memory is used by one of them at a
time. That is safe only because their replays are ordered: what one graph keeps between two of its
kernels is where another keeps its own. So the copies into a graph, its replay and the copies out
of it are one turn: it holds the pool's lock until all of it is enqueued, and begins by waiting for
the event that ended the turn before, on whatever stream that was. The price: two streams that run
one model take turns on the device. Copies of a model have pools of their own, and do not. Between
its turns a graph keeps its inputs and outputs; what it needs on the way, it shares with the others.

Weights. An executor is bound to one state of the weights, and a new one takes its place when they
change. Its graphs belong to it and go with it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
from torch import Tensor

from hgfast.plan import Step
from hgfast.runtime import evidence
from hgfast.runtime.choice import Executor

#: How many graphs an executor keeps.
CAPACITY = 8
#: How often a shape must have come before another's graph makes room for it, or before a capture
#: is tried again that failed.
PATIENCE = 8
#: How many captures of one executor may fail: some do because of what another thread did.
ATTEMPTS = 3
#: Of how many shapes without a graph it is known how often they came.
REMEMBERED = 64

#: What ``optimize(cuda_graph=...)`` takes.
Wanted = bool | str


# --- what is needed of a device ----------------------------------------------------------------


class Graph(Protocol):
    def replay(self) -> None:
        """Enqueue what was captured on the current stream."""


class Event(Protocol):
    def record(self) -> None:
        """Mark what the current stream was given so far."""

    def wait(self) -> None:
        """Let the current stream wait for the mark; for nothing if there is none."""


class Device(Protocol):
    """The four things of torch.cuda that graphs need. Tests have another, on the CPU."""

    type: str  # "cuda", as torch.is_autocast_enabled calls it

    def is_capturing(self) -> bool:
        """Whether somebody captures what this thread gives the current stream."""

    def event(self) -> Event: ...

    def keep(self, x: Tensor) -> None:
        """The memory of ``x`` stays until the current stream has done what it is given now."""

    def pool(self) -> Any:
        """A handle of memory for graphs, none of which is there yet."""

    def capture(
        self, warm_up: Callable[[], object], record: Callable[[], object], pool: Any
    ) -> Graph:
        """What ``record`` enqueues, as a graph with memory of ``pool``; ``warm_up`` runs before.

        Both run on a stream that is not the current one; it waits for the current stream first,
        and is waited for last.
        """


#: One capture at a time in a process: all are made on the same stream of their device.
_capturing = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}
#: A capture that failed leaves a graph to which torch's allocator may point.
_failed: list[torch.cuda.CUDAGraph] = []


class CudaDevice:
    """A GPU."""

    type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def event(self) -> Event:
        return _CudaEvent(self._device)

    def keep(self, x: Tensor) -> None:
        x.record_stream(torch.cuda.current_stream(self._device))

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(
        self, warm_up: Callable[[], object], record: Callable[[], object], pool: Any
    ) -> Graph:
        current = torch.cuda.current_stream(self._device)
        with _capturing:
            side = _streams.get(self._device)
            if side is None:
                # torch hands its streams out in turn, 32 of a priority: one of the default's might
                # be somebody's, whose launches a capture would take for its own.
                side = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
                _streams[self._device] = side
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    warm_up()
                    return self._captured(record, pool)
            finally:
                current.wait_stream(side)

    def _captured(self, record: Callable[[], object], pool: Any) -> Graph:
        # torch.cuda.graph would wait for the whole device and empty the allocator's cache first:
        # nothing for a process in which others are at work.
        graph = torch.cuda.CUDAGraph()
        _forget_workspaces()
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            record()
            graph.capture_end()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()  # or the stream goes on
            self._clean_up(graph, pool)
            raise
        finally:
            _forget_workspaces()
        return graph

    def _clean_up(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Tell torch's allocator of a capture that CUDA has ended with an error: nobody else does.

        It would keep memory for it, and hold back what streams are done with.
        """
        try:
            graph.pool()
        except RuntimeError:  # not ended as far as torch knows
            _failed.append(graph)
            for tell in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with contextlib.suppress(RuntimeError, AttributeError):
                    getattr(torch._C, tell)(self._device.index, pool)


def _forget_workspaces() -> None:
    """Of cuBLAS, which torch keeps for each stream. What a graph uses must be its pool's: two
    models' graphs would share it otherwise, and it might be given back before them."""
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if forget is not None:
        forget()


class _CudaEvent:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._event.wait(torch.cuda.current_stream(self._device))


def device_of(device: torch.device) -> Device:
    """What there is of a device whose executors are asynchronous."""
    return CudaDevice(device)


# --- memory and order --------------------------------------------------------------------------


class Pool:
    """The memory that a model's graphs share on one device, and the order in which they use it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._last_turn = device.event()
        self._handle: Any = None
        self._users: WeakSet[_Captured] = WeakSet()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Alone with the memory: this thread, and the current stream behind the turn before."""
        with self._lock:
            self._last_turn.wait()
            try:
                yield
            finally:
                self._last_turn.record()

    def capture(
        self, executor: Executor, inputs: Sequence[Tensor], formats: Sequence[torch.memory_format]
    ) -> _Captured:
        """One run of ``executor`` on inputs like these. To be called in a turn."""
        users = list(self._users)  # who is here now stays until the new one is
        if not users:  # torch forgets a handle with its last graph
            self._handle = self.device.pool()
        # Never inference tensors: calls outside of inference mode will write to them too.
        with torch.inference_mode(False), torch.no_grad():
            # Not made in the capture: where torch fills new memory (deterministic algorithms), the
            # graph would do so behind each copy into them. And the run before it meets the same
            # alignment, by which cuDNN's choices are kept.
            places = [
                torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
                for x, layout in zip(inputs, formats, strict=True)
            ]
            for place, x in zip(places, inputs, strict=True):
                place.copy_(x)
            outputs: dict[int, Tensor] = {}
            graph = self.device.capture(
                lambda: executor.run(places),
                lambda: outputs.update(executor.run(places)),
                self._handle,
            )
        captured = _Captured(self.device, graph, places, outputs)
        self._users.add(captured)
        del users
        return captured


@dataclass(eq=False)
class _Captured:
    """A graph, and the tensors that calls copy into and out of."""

    device: Device
    graph: Graph
    inputs: list[Tensor]
    outputs: dict[int, Tensor]

    def run(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """To be called in a turn of its pool."""
        with torch.no_grad():
            for place, x in zip(self.inputs, inputs, strict=True):
                self.device.keep(place)
                place.copy_(x)
            self.graph.replay()
            return {number: y.clone() for number, y in self.outputs.items()}


# --- the executor ------------------------------------------------------------------------------

_Key = tuple[Any, ...]


class AsynchronousExecutor(Executor, Protocol):
    """An executor that enqueues its work on the current stream."""

    def use_stream(self) -> None:
        """Its weights stay until the current stream has done what it is given from here on."""


class GraphedExecutor:
    """An asynchronous executor whose runs are replayed as graphs. Safe for several threads.

    Attributes:
        plain: the executor without graphs.
        failure: why a capture failed, in words; "" where none did.
    """

    asynchronous = True

    def __init__(
        self, plain: AsynchronousExecutor, pool: Pool, note: Callable[[str], None]
    ) -> None:
        self.plain = plain
        self.backend = plain.backend
        self.dtype = plain.dtype
        self.features = plain.features | {"graph"}
        self.failure = ""
        self._pool = pool
        self._note = note
        self._lock = threading.Lock()  # of what follows; never held while waiting for a turn
        self._graphs: OrderedDict[_Key, _Captured] = OrderedDict()
        self._seen: OrderedDict[_Key, int] = OrderedDict()  # runs of shapes without a graph
        self._failures = 0

    @property
    def cached(self) -> int:
        """The number of graphs."""
        return len(self._graphs)

    @property
    def has_given_up(self) -> bool:
        """Whether so many captures failed that no more are tried."""
        return self._failures >= ATTEMPTS

    def path(self, step: Step) -> str:
        """What runs one step, in a few words."""
        return self.plain.path(step)

    def run(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Run on inputs (B, C, H, W); returns the Plan's outputs by value number.

        Inside somebody's capture the launches become a part of that.

        Raises:
            ValueError: a step cannot take what reaches it; the message names the step.
        """
        formats = [_format_of(x) for x in inputs]
        if None in formats or self._pool.device.is_capturing():
            return self.plain.run(inputs)
        key = self._key(inputs, formats)
        with self._lock:
            captured = self._graphs.get(key)
            if captured is not None:
                self._graphs.move_to_end(key)
            else:
                is_due = self._is_due(key)
        if captured is None and is_due:
            captured = self._capture(key, inputs, formats)
        if captured is None:
            values = self.plain.run(inputs)
            with self._lock:  # only now: what does not fit is never captured
                self._count(key)
            return values
        with self._pool.turn():
            self.plain.use_stream()
            return captured.run(inputs)

    def _key(self, inputs: Sequence[Tensor], formats: Sequence[Any]) -> _Key:
        """What decides which kernels a run launches, other than the executor itself.

        Not torch.backends.cuda.matmul's switches and TF32's: who turns one after a capture keeps
        what was captured.
        """
        kind = self._pool.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        cudnn, is_strict = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
        switches = (autocast, cudnn.enabled, cudnn.benchmark, cudnn.deterministic, is_strict)
        return (*((x.shape, x.dtype) for x in inputs), *formats, switches)

    def _is_due(self, key: _Key) -> bool:
        patient = len(self._graphs) >= CAPACITY or self._failures > 0
        often = PATIENCE if patient else 1
        return self._seen.get(key, 0) >= often and not self.has_given_up

    def _count(self, key: _Key) -> None:
        self._seen[key] = self._seen.pop(key, 0) + 1
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def _capture(
        self, key: _Key, inputs: Sequence[Tensor], formats: Sequence[Any]
    ) -> _Captured | None:
        """A graph for inputs like these; None where there can be none."""
        with self._pool.turn():
            with self._lock:
                found = self._graphs.get(key)  # by another thread, while this one waited
                if found is not None:
                    return found
                while len(self._graphs) >= CAPACITY:  # its memory is the next one's
                    self._graphs.popitem(last=False)
            try:
                captured = self._pool.capture(self.plain, inputs, formats)
            except Exception as error:
                self.failure = f"a capture failed ({_first_line(error)})"
                with self._lock:
                    self._failures += 1
                    self._seen.clear()
            else:
                with self._lock:
                    self._graphs[key] = captured
                    self._seen.pop(key, None)
                return captured
        self._note(self.failure)
        return None


def plain(executor: Executor) -> Executor:
    """The executor without graphs: what somebody else's graph may record and has to keep."""
    return executor.plain if isinstance(executor, GraphedExecutor) else executor


def _format_of(x: Tensor) -> torch.memory_format | None:
    """The layout of the place that stands in for ``x``; None where none would be taken alike."""
    if not x.numel():
        return None
    if x.is_contiguous():
        return torch.contiguous_format
    _, channels, height, width = x.shape
    # Of these sizes channels_last is contiguous too, which an executor would take it for.
    return None if channels == 1 or height == width == 1 else torch.channels_last


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# --- whether --------------------------------------------------------------------------------------


class Graphs:
    """Whether an optimised model uses graphs, and the memory that its regions' graphs share.

    Attributes:
        wanted: "auto", True or False, as :func:`hgfast.optimize` was asked.
    """

    def __init__(self, wanted: Wanted = "auto") -> None:
        self.wanted = wanted
        self._lock = threading.Lock()
        self._pools: dict[torch.device, Pool] = {}

    # A copy of a model has memory of its own.
    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": self.wanted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def obstacle(self, executor: Executor | None) -> str:
        """Why runs of this executor are not captured, in words; "" if they are."""
        if executor is None:
            return "eager runs it"
        if not executor.asynchronous:
            return "CUDA graphs are for a GPU"
        if self.wanted is False:
            return "cuda_graph=False"
        if self.wanted == "auto" and not evidence.is_enabled("graph"):
            return (
                'cuda_graph="auto", and graphs are not yet run on a GPU: cuda_graph=True or '
                f"{evidence.UNPROVEN}=graph switches them on"
            )
        return ""

    def around(
        self, executor: Executor, device: torch.device, note: Callable[[str], None]
    ) -> Executor:
        """``executor``, replayed as graphs where they are wanted; ``note`` is told of failures."""
        if self.obstacle(executor):
            return executor
        with self._lock:
            pools = self._pools
            if device not in pools:
                pools[device] = Pool(device_of(device))
            return GraphedExecutor(cast(AsynchronousExecutor, executor), pools[device], note)
