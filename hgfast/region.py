"""A region: one optimised module, its Plan behind its forward.

A region is a plain object set as the instance's ``forward``. It is no submodule, so class,
parameters, buffers and state_dict stay what they were; it deep-copies and pickles with its
module, and taking it away restores the eager model. It owns caches only.

Every call first asks whether the fast path may run. Where it may not, the eager forward of
the module's class runs instead: the answer is always the one eager would give.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hgfast import _native
from hgfast._warnings import HgfastWarning
from hgfast.decoding import decode
from hgfast.plan import Plan, Step, fill_outputs
from hgfast.recognition import recognise, tensors_of
from hgfast.runtime.choice import Executor, choose
from hgfast.trace import TraceError

#: What a Watch finds, by number (csrc/watch.cpp), and which findings mean eager for this call.
_FINDINGS = ("none", "structure", "hook", "training", "gradient", "weights")
_EAGER_FINDINGS = {
    "hook": "a module inside it has a forward hook",
    "training": "it is in training mode",
    "gradient": "gradients are enabled and a parameter requires them (use torch.inference_mode())",
}


@dataclass
class Notices:
    """Why eager ran, each reason once for one optimised model, as a warning and in the report."""

    seen: dict[str, str] = field(default_factory=dict)  # reason -> name of the first region

    def add(self, region: str, reason: str) -> None:
        if reason not in self.seen:
            self.seen[reason] = region
            where = f"module {region!r}" if region else "the model"
            warnings.warn(
                f"hgfast runs {where} eagerly, because {reason}", HgfastWarning, stacklevel=2
            )


@dataclass(frozen=True)
class _State:
    """What a region derived from its module; replaced as a whole when that changes."""

    plan: Plan
    watch: Any
    executor: Executor | None
    reason: str | None  # why there is no executor
    dtype: torch.dtype | None
    device: torch.device | None
    device_type: str  # "" where there is no executor


class Forward:
    """What stands in for a module's forward, set on the instance.

    Attributes:
        module: the module whose forward this is.
        decoding: the keywords with which :func:`hgfast.decode` turns its heatmaps into what it
            returns; None where it returns them as they are.
    """

    def __init__(self, module: nn.Module, decoding: dict[str, Any] | None = None) -> None:
        self.module = module
        self.decoding = decoding

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._decoded(self.eager(*args, **kwargs))

    def install(self) -> None:
        """Put it behind its module's forward."""
        self.module.forward = self

    # What introspection (torch.export, inspect.signature) asks of a forward.
    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> Any:
        return type(self.module).forward.__code__

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def heatmaps(self, *args: Any, **kwargs: Any) -> Any:
        """What a call decodes, or returns where it decodes nothing."""
        return self.eager(*args, **kwargs)

    def both(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What a call decodes, and what it returns."""
        heatmaps = self.heatmaps(*args, **kwargs)
        return heatmaps, self._decoded(heatmaps)

    def _decoded(self, heatmaps: Any) -> Any:
        return heatmaps if self.decoding is None else decode(heatmaps, **self.decoding)


class Region(Forward):
    """The forward of an optimised module.

    Attributes:
        name: its qualified name in the optimised model, "" for the model itself.
        plan: what the module computes.
        precision: "highest", "high" or "medium".
    """

    def __init__(
        self, module: nn.Module, name: str, plan: Plan, precision: str, notices: Notices
    ) -> None:
        super().__init__(module)
        self.name = name
        self.plan = plan
        self.precision = precision
        self._notices = notices
        self._lock = threading.RLock()
        self._state: _State | None = None
        self._is_current = True  # whether the plan is known to be that of the module

    # Caches and locks stay behind when a model is copied or pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_state")}

    # A copy may have been changed since the plan was read, so it reads its own.
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock(), _state=None, _is_current=False)

    def decode_with(self, decoding: dict[str, Any]) -> None:
        """Return keypoints instead of heatmaps. To be asked before it is installed.

        Raises:
            ValueError: the plan has no last heatmaps.
        """
        self.plan.last_output()
        self.decoding, self._state = decoding, None

    def install(self) -> None:
        state = self._state or self.pack()
        self.module.forward = self
        native = _native.load()
        if native is not None:  # a snapshot that knows the new attribute
            self._state = replace(state, watch=native.Watch(_watched(self.module)))

    def pack(self) -> _State:
        """Derive everything from the weights as they are now."""
        with self._lock:
            if not self._is_current:
                return self.recognise()
            native = _native.load()
            decodes = self.decoding is not None
            plan = self.plan.last_output() if decodes else self.plan
            weights = tensors_of(self.module)
            used = {name: weights[name] for name in plan.weights}
            # The snapshot comes first: what changes while packing is noticed at the next call.
            watch = native.Watch(_watched(self.module)) if native else None
            chosen = choose(plan, used, self.precision, as_computed=decodes)
            executor, reason = (None, chosen) if isinstance(chosen, str) else (chosen, None)
            first = next(iter(used.values()), torch.empty(0))
            self._state = _State(
                plan, watch, executor, reason, first.dtype, first.device, first.device.type
            )
            return self._state

    def recognise(self) -> _State:
        """Read the module anew, after something in it was replaced."""
        with self._lock:
            shapes, weights = self.plan.input_shapes, next(self.module.parameters(), None)
            example = None
            if shapes is not None and weights is not None:
                example = tuple(
                    torch.zeros(shape, dtype=weights.dtype, device=weights.device)
                    for shape in shapes
                )
            try:
                self.plan = recognise(self.module, example)
                self._is_current = True
                return self.pack()
            except (TraceError, ValueError) as error:
                self._is_current = False
                native = _native.load()
                watch = native.Watch(_watched(self.module)) if native else None
                reason = f"since it was changed or copied, {error}"
                self._state = _State(self.plan, watch, None, reason, None, None, "")
                return self._state

    @property
    def backend(self) -> str:
        """What runs the Plan, in a few words."""
        state = self._up_to_date()[0]
        return state.executor.backend if state and state.executor else "eager"

    def paths(self) -> list[tuple[Step, str]]:
        """Every step, and what runs it, in a few words."""
        state = self._up_to_date()[0]
        executor, plan = (state.executor, state.plan) if state else (None, self.plan)
        return [(s, executor.path(s) if executor else "eager") for s in plan.steps]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._decoded(self.heatmaps(*args, **kwargs))

    def heatmaps(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # A packed plan is a handle that no graph can carry away, and nothing would guard it.
            return self.eager(*args, **kwargs)
        state, reason = self._up_to_date()
        inputs = self.bind(args, kwargs)
        if state is not None:
            reason = reason or self._obstacle(state, inputs)
            if reason is None and state.executor is not None:
                if state.executor.asynchronous and is_capturing():
                    _keep_for_graphs(self.module, state.executor)
                try:
                    values = state.executor.run(inputs)
                except ValueError as error:  # shapes that do not fit: eager has the last word
                    reason = str(error)
                else:
                    return fill_outputs(state.plan.outputs, values)
        outputs = self.eager(*args, **kwargs)  # where the input is wrong, this raises
        self._notices.add(self.name, reason or "it has no executor")
        return outputs

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call in the order of the forward's parameters."""
        return self.__signature__.bind(*args, **kwargs).args if kwargs else args

    def _up_to_date(self) -> tuple[_State | None, str | None]:
        """The state that fits the module as it is now, and why eager must run, if it must.

        While a CUDA graph is captured nothing is packed: it would become a part of the graph.
        """
        state = self._state
        finding = "weights" if state is None else self._finding(state)
        if finding in ("structure", "weights"):
            if is_capturing():
                return None, "a CUDA graph is captured and its weights were not packed before"
            state = self.recognise() if finding == "structure" else self.pack()
            finding = self._finding(state)
        assert state is not None
        return state, _EAGER_FINDINGS.get(finding, state.reason)

    @staticmethod
    def _finding(state: _State) -> str:
        if state.watch is None:
            return "none"
        return _FINDINGS[state.watch.check(torch.is_grad_enabled())]

    @staticmethod
    def _obstacle(state: _State, inputs: tuple[Any, ...]) -> str | None:
        """Why this call cannot take the fast path, as far as the call itself tells."""
        if state.dtype is None or state.device is None:
            return state.reason
        reason = obstacle(inputs, len(state.plan.inputs), state.dtype, state.device)
        expected = state.plan.input_shapes
        if not reason and expected and tuple(tuple(x.shape) for x in inputs) != expected:
            return f"it was recognised for inputs of shape {expected}"
        return reason


def obstacle(
    inputs: tuple[Any, ...], count: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a Plan of ``count`` inputs, its weights of this dtype and on this device, cannot run on
    ``inputs`` here and now, in words; None if it can."""
    if _native.is_disabled():
        return f"{_native.DISABLE} is set"
    if torch.is_autocast_enabled(device.type):
        return "autocast is enabled"
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return "something is following PyTorch's operations (a trace, transform or dispatch mode)"
    if len(inputs) != count:
        return f"it was traced with {count} inputs and got {len(inputs)}"
    for x in inputs:
        if type(x) not in (Tensor, nn.Parameter):
            return f"an input is a {type(x).__name__}"
        if x.dim() != 4 or x.layout is not torch.strided:
            return "an input is not a dense tensor (B, C, H, W)"
        if x.is_neg() or x._is_zerotensor():
            return "an input is a lazy view"
        if x.dtype is not dtype:
            return f"an input is {x.dtype} and its weights are {dtype}"
        if x.device != device:
            return f"an input is on {x.device} and its weights are on {device}"
        if x.requires_grad and torch.is_grad_enabled():
            return "gradients are enabled and an input requires them"
    return None


#: Executors whose packed weights a CUDA graph points to. They live as long as the module does, as
#: its parameters, to which an eager graph would point: whatever was packed or restored since.
_captured: WeakKeyDictionary[nn.Module, list[Executor]] = WeakKeyDictionary()


def _keep_for_graphs(module: nn.Module, executor: Executor) -> None:
    kept = _captured.setdefault(module, [])
    if executor not in kept:
        kept.append(executor)


def is_capturing() -> bool:
    """Whether a CUDA graph records what this thread does."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def _watched(module: nn.Module) -> list[tuple[nn.Module, bool, bool]]:
    """Every module of the region; whether training mode changes what it does; whether it is one
    of PyTorch's own layers, which ask for no attribute that they were not built with."""

    def is_torchs(child: nn.Module) -> bool:
        return type(child).__module__.startswith("torch.nn.")

    modal, containers = (_BatchNorm, _DropoutNd), (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return [
        (
            child,
            not is_torchs(child) or child is module or isinstance(child, modal),
            is_torchs(child) and not isinstance(child, containers),
        )
        for child in module.modules()
    ]


def regions_of(model: nn.Module) -> list[Region]:
    """The regions in a model, each once, from the root down."""
    forwards = (child.__dict__.get("forward") for child in model.modules())
    return [forward for forward in forwards if isinstance(forward, Region)]
