"""A Plan inside the graphs of torch.compile, torch.export and AOTInductor.

``torch.ops.hgfast.run_plan`` runs a whole Plan as one operation of a graph. Weights are its
arguments: a graph carries them, lifts them, saves them, like those of any other operation. The Plan
travels as text. What is derived from both, the packed weights, stays outside the graph, in a cache
that follows the weights: by identity, by memory, by autograd's count of in-place changes.

    run_plan(Tensor[] inputs, Tensor[] weights, str plan, str precision, bool as_computed)
        -> Tensor[]

``weights`` are those of ``Plan.weights`` in that order. More may follow, which are only watched: a
BatchNorm in training moves its running statistics without counting it as a change, and its number
of batches is what tells. ``outputs`` of the Plan is a tuple of value numbers here; the containers
of a module's outputs stay with whoever calls.

Inference only: it has no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from hgfast import _native
from hgfast import plan as plan_module
from hgfast.plan import Plan, output_values
from hgfast.runtime import cpu, cuda, reference
from hgfast.runtime.choice import Executor, choose

#: Counts changes of the text's form. A text of another number is refused.
FORMAT = 1

#: How many packed Plans are kept. A model has as many as it has regions.
CAPACITY = 1024

_CLASSES = {
    name: kind
    for name, kind in vars(plan_module).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


# --- a Plan as text ---------------------------------------------------------------------------


def to_text(plan: Plan) -> str:
    """A Plan as JSON, from which :func:`from_text` makes an equal one.

    A dataclass is ``{"its name": {field: value}}``, a tuple an array; a list, dict, dtype, slice or
    operator of PyTorch is marked by a name in lower case.

    Raises:
        TypeError: a field holds something that has no text.
    """
    return json.dumps({"format": FORMAT, "plan": _encoded(plan)}, separators=(",", ":"))


@functools.lru_cache(maxsize=CAPACITY)
def from_text(text: str) -> Plan:
    """The Plan that :func:`to_text` wrote.

    Raises:
        ValueError: this is no such text, or that of a version of hgfast whose Plans differ.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, here it is {FORMAT}")
        plan = _decoded(content["plan"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"hgfast::run_plan cannot read its plan ({error}); was it exported by another version "
            "of hgfast?"
        ) from error
    if not isinstance(plan, Plan):
        raise ValueError(f"hgfast::run_plan expects the text of a Plan, got {text[:40]!r}")
    return plan


def _encoded(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is tuple:
        return [_encoded(item) for item in value]
    if kind is list:
        return {"list": [_encoded(item) for item in value]}
    if kind is dict:
        return {"dict": [[_encoded(key), _encoded(item)] for key, item in value.items()]}
    if kind is slice:
        return {"slice": [_encoded(item) for item in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": []}
    if kind in (torch.dtype, torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"device": str(value)}
    if isinstance(value, torch._ops.OpOverload):
        return {"operator": str(value)}
    if _CLASSES.get(kind.__name__) is kind:
        fields = {f.name: _encoded(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {kind.__name__: fields}
    raise TypeError(f"a {kind.__name__} in a Plan has no text")


def _decoded(item: Any) -> Any:
    if isinstance(item, list):
        return tuple(_decoded(part) for part in item)
    if not isinstance(item, dict):
        return item
    ((name, content),) = item.items()
    if name in _CLASSES:
        return _CLASSES[name](**{key: _decoded(value) for key, value in content.items()})
    return _MARKED[name](content)


def _operator(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


_MARKED: dict[str, Callable[[Any], Any]] = {
    "list": lambda items: [_decoded(item) for item in items],
    "dict": lambda pairs: {_decoded(key): _decoded(item) for key, item in pairs},
    "slice": lambda ends: slice(*(_decoded(end) for end in ends)),
    "ellipsis": lambda _: Ellipsis,
    "torch": lambda name: getattr(torch, name),
    "device": torch.device,
    "operator": _operator,
}


def graph_text(plan: Plan) -> str:
    """The text of ``plan`` for the operator: each output once, none that is an input, no blocks.

    Raises:
        TypeError: as :func:`to_text`.
    """
    return to_text(dataclasses.replace(plan, outputs=tuple(computed_outputs(plan)), blocks=()))


def computed_outputs(plan: Plan) -> list[int]:
    """The value numbers that the operator returns for ``plan``, in order."""
    numbers = dict.fromkeys(output_values(plan.outputs))
    return [number for number in numbers if number not in plan.inputs]


def watched_weights(plan: Plan, known: Mapping[str, Any]) -> list[str]:
    """The names of the operator's weights: those of ``plan``, then what is only watched."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in plan.weights)
    batches = [f"{owner}.num_batches_tracked".removeprefix(".") for owner in owners]
    return [*plan.weights, *(name for name in batches if name in known)]


def is_capturing() -> bool:
    """Whether a CUDA graph records what this thread does."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


# --- packed Plans, kept as long as their weights -----------------------------------------------

_Key = tuple[Any, ...]
_State = tuple[Any, ...]


class _Packed:
    """An executor, and the state of the weights that it was made from."""

    def __init__(
        self,
        executor: Executor | None,
        state: _State,
        weights: Sequence[Tensor],
        gone: Callable[[object], None],
    ) -> None:
        self.executor = executor  # None where no kernel takes them
        self.state = state
        self._objects = tuple(weakref.ref(tensor, gone) for tensor in weights)
        self._memory = [
            StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            for tensor in weights
        ]

    def is_alive(self) -> bool:
        """Whether all the weights are still there: memory that was freed may be given away."""
        return not any(memory.expired() for memory in self._memory)  # type: ignore[no-untyped-call]


class _Packs:
    """Executors by what they were made from. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._packed: OrderedDict[_Key, _Packed] = OrderedDict()
        # Whose weights Python holds no more. AOTInductor's live on without: it makes objects of
        # them for each call. Anybody may append.
        self._gone: deque[_Key] = deque()
        self._unheld: set[_Key] = set()
        # Executors that a CUDA graph points to live as long as the first of their weights.
        self._captured: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        with self._lock:
            self._forget()
            return len(self._packed)

    def executor(
        self, text: str, weights: Sequence[Tensor], precision: str, as_computed: bool
    ) -> Executor | None:
        """What runs this Plan on these weights, packed now if it has to be."""
        plan = (text, precision, as_computed)
        key, state = (*plan, *_identities(weights)), _state_of(weights)
        capturing = is_capturing()
        with self._lock:
            self._forget()
            found = self._find(key, state)
            if found is None and capturing:  # packing would become a part of the graph
                return None
            if found is None:
                found = self._by_value(plan, key, state, weights)
            if capturing and found.executor is not None:
                kept = self._captured.setdefault(weights[0], [])
                if found.executor not in kept:
                    kept.append(found.executor)
        return found.executor

    def _find(self, key: _Key, state: _State) -> _Packed | None:
        found = self._packed.get(key)
        if found is None or found.state != state:
            return None
        self._packed.move_to_end(key)
        return found

    def _by_value(
        self, plan: tuple[str, str, bool], key: _Key, state: _State, weights: Sequence[Tensor]
    ) -> _Packed:
        """Inductor makes the smallest weights of its constants anew at each call: these are known
        by their values, the others as ever."""
        small = [tensor.tolist() if _is_small(tensor) else None for tensor in weights]
        large = [tensor for tensor, value in zip(weights, small, strict=True) if value is None]
        other_key = (*plan, "by value", *_identities(large))
        other_state = (*_state_of(large), str(small))
        found = self._find(other_key, other_state) if len(large) < len(weights) else None
        if found is None:
            text, precision, as_computed = plan
            used = dict(zip(from_text(text).weights, weights, strict=False))
            chosen = choose(from_text(text), used, precision, as_computed=as_computed)
            executor = None if isinstance(chosen, str) else chosen
            found = self._keep(key, state, weights, executor)
            if len(large) < len(weights):
                self._keep(other_key, other_state, large, executor)
        return found

    def adopt(
        self,
        text: str,
        weights: Sequence[Tensor],
        precision: str,
        as_computed: bool,
        executor: Executor,
    ) -> None:
        """Keep an executor that somebody has made from these weights as they are now."""
        key = (text, precision, as_computed, *_identities(weights))
        state = _state_of(weights)
        with self._lock:
            self._forget()
            if self._find(key, state) is None:
                self._keep(key, state, weights, executor)

    def forget(self, weights: Iterable[Tensor]) -> None:
        """Drop what was made from any of these: they changed, and left no trace of it."""
        changed = {tensor._cdata for tensor in weights}
        with self._lock:
            for key in [key for key in self._packed if changed.intersection(key)]:
                del self._packed[key]

    def _keep(
        self, key: _Key, state: _State, weights: Sequence[Tensor], executor: Executor | None
    ) -> _Packed:
        def gone(_: object) -> None:
            self._gone.append(key)
            if self._lock.acquire(blocking=False):  # or whoever has it will look
                try:
                    self._forget()
                finally:
                    self._lock.release()

        self._packed[key] = packed = _Packed(executor, state, weights, gone)
        while len(self._packed) > CAPACITY:
            self._packed.popitem(last=False)
        return packed

    def _forget(self) -> None:
        while self._gone:
            self._unheld.add(self._gone.popleft())
        for key in list(self._unheld):
            packed = self._packed.get(key)
            if packed is None or not packed.is_alive():
                self._packed.pop(key, None)
                self._unheld.discard(key)


def _identities(weights: Sequence[Tensor]) -> list[int]:
    return [tensor._cdata for tensor in weights]


def _is_small(tensor: Tensor) -> bool:
    """What Inductor takes for a list of numbers, in memory that can be read at once."""
    return tensor.dim() == 1 and len(tensor) <= 8 and tensor.device.type == "cpu"


def _state_of(weights: Sequence[Tensor]) -> _State:
    """What changes when a tensor does: its memory's address, and its count of in-place changes."""
    try:
        versions = [tensor._version for tensor in weights]
    except RuntimeError:  # inference tensors count nothing
        versions = [0 if tensor.is_inference() else tensor._version for tensor in weights]
    return versions, [tensor.data_ptr() for tensor in weights]


packs = _Packs()


# --- the operator -----------------------------------------------------------------------------


def element_of(weights: Sequence[Tensor], precision: str) -> torch.dtype:
    """The dtype in which activations are kept, and outputs left ``as_computed``."""
    first = weights[0]
    if first.device.type == "cuda":
        return cuda.element_of(first.dtype, precision) or first.dtype
    if cpu.unsupported(first.dtype):
        return first.dtype
    element: torch.dtype = getattr(torch, cpu.element_of(first.dtype, precision))
    return element


def _layout(first: Tensor, as_computed: bool) -> torch.memory_format:
    """Outputs keep the layout of the first input, unless they are left as computed."""
    contiguous = first.is_contiguous() and suggest_memory_format(first) == torch.contiguous_format
    return torch.contiguous_format if contiguous and not as_computed else torch.channels_last


def laid_out(value: Tensor, dtype: torch.dtype, first: Tensor) -> Tensor:
    """An output left as computed, in ``dtype`` and the layout of the first input."""
    if value.dim() != 4:
        return value.to(dtype)
    return value.to(dtype, memory_format=_layout(first, False))


def _by_reference(
    plan: Plan, inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> dict[int, Tensor]:
    """In plain PyTorch: what eager answers, or eager's error where the inputs do not fit.

    Raises:
        ValueError: the module asserts something that these inputs do not meet.
    """
    plan.check(*(x.shape for x in inputs))
    named = dict(zip(plan.weights, weights, strict=False))
    with torch.autocast(inputs[0].device.type, enabled=False):
        cast = [x.to(weights[0].dtype) for x in inputs]
        return dict(reference.execute(plan, named, cast))


def _dressed(
    values: Mapping[int, Tensor],
    plan: Plan,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    precision: str,
    as_computed: bool,
) -> list[Tensor]:
    """The outputs in the dtype and layout that are promised, none sharing memory."""
    dtype = element_of(weights, precision) if as_computed else inputs[0].dtype
    layout = _layout(inputs[0], as_computed)
    taken = {x.untyped_storage().data_ptr() for x in inputs}
    results = []
    for number in output_values(plan.outputs):
        value = values[number].to(dtype)
        shape_of_map = value.dim() == 4
        value = value.contiguous(memory_format=layout if shape_of_map else torch.contiguous_format)
        address = value.untyped_storage().data_ptr()
        if address in taken and value.numel():
            value = value.clone()
        taken.add(address)
        results.append(value)
    return results


def _run_plan(
    inputs: list[Tensor],
    weights: list[Tensor],
    plan: str,
    precision: str,
    as_computed: bool = False,
) -> list[Tensor]:
    values = None
    read = from_text(plan)
    if not _native.is_disabled():
        executor = packs.executor(plan, weights, precision, as_computed)
        if executor is not None:
            try:
                values = executor.run(inputs)
            except ValueError:  # shapes that do not fit: plain PyTorch has the last word
                values = None
    if values is None:
        values = _by_reference(read, inputs, weights)
    return _dressed(values, read, inputs, weights, precision, as_computed)


def _fake_run_plan(
    inputs: list[Tensor],
    weights: list[Tensor],
    plan: str,
    precision: str,
    as_computed: bool = False,
) -> list[Tensor]:
    read = from_text(plan)
    dtype = element_of(weights, precision) if as_computed else inputs[0].dtype
    layout = _layout(inputs[0], as_computed)
    try:
        known = read.shapes(*(x.shape for x in inputs))
        shapes = [known[number] for number in output_values(read.outputs)]
    except ValueError:
        values = _by_reference(read, inputs, weights)
        shapes = [values[number].shape for number in output_values(read.outputs)]
    return [
        torch.empty(
            shape,
            dtype=dtype,
            device=inputs[0].device,
            memory_format=layout if len(shape) == 4 else torch.contiguous_format,
        )
        for shape in shapes
    ]


_library: Any = torch.library.Library("hgfast", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "run_plan(Tensor[] inputs, Tensor[] weights, str plan, str precision, bool as_computed=False) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.impl("run_plan", _run_plan, "CompositeExplicitAutograd")
torch.library.register_fake("hgfast::run_plan", _fake_run_plan, lib=_library)
