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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from hgfast import _native, compiling
from hgfast._warnings import HgfastWarning
from hgfast.compiling import is_capturing
from hgfast.decoding import decode
from hgfast.plan import Plan, Step, fill_outputs, output_values
from hgfast.recognition import recognise, tensors_of
from hgfast.runtime.choice import Executor, choose
from hgfast.runtime.graphs import GraphedExecutor, Graphs, plain
from hgfast.trace import TraceError

#: What a Watch finds, by number (csrc/watch.cpp), and which findings mean eager for this call.
_FINDINGS = ("none", "structure", "hook", "training", "gradient", "weights")
_EAGER_FINDINGS = {
    "structure": "a module inside it was replaced while it was recorded",
    "hook": "a module inside it has a forward hook",
    "training": "it is in training mode",
    "gradient": "gradients are enabled and a parameter requires them (use torch.inference_mode())",
}


_OTHER_AUTOCAST = "autocast is enabled, and for another dtype than torch.bfloat16"


@dataclass
class Notices:
    """Why eager ran, each reason once for one optimised model, as a warning and in the report."""

    seen: dict[str, str] = field(default_factory=dict)  # reason -> name of the first region
    graphs: set[str] = field(default_factory=set)  # likewise, why something was not captured

    def add(self, region: str, reason: str) -> None:
        if reason not in self.seen:
            self.seen[reason] = region
            where = f"module {region!r}" if region else "the model"
            warnings.warn(
                f"hgfast runs {where} eagerly, because {reason}", HgfastWarning, stacklevel=2
            )

    def add_graph(self, region: str, reason: str) -> None:
        if reason not in self.graphs:
            self.graphs.add(reason)
            where = f"module {region!r}" if region else "the model"
            warnings.warn(
                f"hgfast runs {where} without a CUDA graph, because {reason}",
                HgfastWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class GraphUse:
    """What a region makes of CUDA graphs.

    Attributes:
        region: its qualified name, "" for the model.
        used: whether its runs are captured.
        cached: how many graphs it has: one for each shape of inputs that came often enough, and
            others under autocast.
        reason: why they are not used, or why one is missing; empty where nothing is.
    """

    region: str
    used: bool
    cached: int = 0
    reason: str = ""


#: Without the packet of overloads, which costs a search at every call.
run_plan: Any = torch.ops.hgfast.run_plan.default

Method = TypeVar("Method", bound=Callable[..., str])


def _constant(method: Method) -> Method:
    """A method that torch.compile calls while it records, taking the result as a constant.

    What torch.compiler.assume_constant_result does, without importing a compiler for it.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


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
    autocast: dict[str, Executor] = field(default_factory=dict)  # by precision, once one is wanted


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
        graphs: whether its runs become CUDA graphs; the model's other regions have the same.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        plan: Plan,
        precision: str,
        notices: Notices,
        graphs: Graphs,
    ) -> None:
        super().__init__(module)
        self.name = name
        self.plan = plan
        self.precision = precision
        self.graphs = graphs
        self._notices = notices
        self._lock = threading.RLock()
        self._state: _State | None = None
        self._is_current = True  # whether the plan is known to be that of the module
        self._shapes: dict[str, torch.Size] = {}  # of the weights that it was read with
        self._generation = "0"  # counts plans; a string, so that torch.compile guards it as it is
        self._dtypes: dict[tuple[Any, ...], list[torch.dtype]] = {}  # of outputs under autocast

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
            weights = tensors_of(self.module)
            shapes = {name: weight.shape for name, weight in weights.items()}
            if not self._is_current or (self._shapes or shapes) != shapes:
                return self.recognise()
            self._shapes = shapes
            native = _native.load()
            decodes = self.decoding is not None
            plan = self.plan.last_output() if decodes else self.plan
            used = {name: weights[name] for name in plan.weights}
            # The snapshot comes first: what changes while packing is noticed at the next call.
            watch = native.Watch(_watched(self.module)) if native else None
            chosen = choose(plan, used, self.precision, as_computed=decodes)
            executor, reason = (None, chosen) if isinstance(chosen, str) else (chosen, None)
            first = next(iter(used.values()), torch.empty(0))
            if executor is not None:
                executor = self._graphed(executor, first.device)
            self._state = _State(
                plan, watch, executor, reason, first.dtype, first.device, first.device.type
            )
            return self._state

    def _graphed(self, executor: Executor, device: torch.device) -> Executor:
        notices, name = self._notices, self.name  # not the region: it holds the executor
        return self.graphs.around(executor, device, lambda why: notices.add_graph(name, why))

    def recognise(self) -> _State:
        """Read the module anew, after something in it was replaced, or changed without a trace."""
        with self._lock:
            compiling.packs.forget(tensors_of(self.module).values())
            shapes, weights = self.plan.input_shapes, next(self.module.parameters(), None)
            example = None
            if shapes is not None and weights is not None:
                example = tuple(
                    torch.zeros(shape, dtype=weights.dtype, device=weights.device)
                    for shape in shapes
                )
            try:
                self._replace_plan(recognise(self.module, example))
                return self.pack()
            except (TraceError, ValueError) as error:
                self._is_current = False
                native = _native.load()
                watch = native.Watch(_watched(self.module)) if native else None
                reason = f"since it was changed or copied, {error}"
                self._state = _State(self.plan, watch, None, reason, None, None, "")
                return self._state

    def _replace_plan(self, plan: Plan) -> None:
        if plan != self.plan:
            self._generation = str(int(self._generation) + 1)
            self._dtypes = {}
        self.plan, self._is_current, self._shapes = plan, True, {}

    @property
    def backend(self) -> str:
        """What runs the Plan, in a few words."""
        state = self._up_to_date()[0]
        return state.executor.backend if state and state.executor else "eager"

    @property
    def features(self) -> frozenset[str]:
        """Of the features of hgfast.runtime.evidence, those that it uses."""
        state = self._up_to_date()[0]
        return state.executor.features if state and state.executor else frozenset()

    def graph_use(self) -> GraphUse:
        """What it makes of CUDA graphs, as things are now."""
        state = self._up_to_date()[0]
        if state is None or state.executor is None:
            return GraphUse(self.name, False, 0, self.graphs.obstacle(None))
        executors = [state.executor, *state.autocast.values()]
        graphed = {id(e): e for e in executors if isinstance(e, GraphedExecutor)}.values()
        if not graphed:
            return GraphUse(self.name, False, 0, self.graphs.obstacle(state.executor))
        failure = next((executor.failure for executor in graphed if executor.failure), "")
        is_used = not all(executor.has_given_up for executor in graphed)
        return GraphUse(self.name, is_used, sum(executor.cached for executor in graphed), failure)

    def paths(self) -> list[tuple[Step, str]]:
        """Every step, and what runs it, in a few words."""
        state = self._up_to_date()[0]
        executor, plan = (state.executor, state.plan) if state else (None, self.plan)
        return [(s, executor.path(s) if executor else "eager") for s in plan.steps]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._decoded(self.heatmaps(*args, **kwargs))

    def heatmaps(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._as_one_op(args, kwargs)
        state, reason = self._up_to_date()
        inputs = self.bind(args, kwargs)
        if state is not None:
            reason = reason or self._obstacle(state, inputs)
            if reason is None and state.executor is not None:
                try:
                    if state.device_type and torch.is_autocast_enabled(state.device_type):
                        return self._run_with_autocast(state, inputs)
                    if state.executor.asynchronous and is_capturing():
                        _keep_for_graphs(self.module, state.executor)
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

    # --- autocast -----------------------------------------------------------------------------

    def _run_with_autocast(self, state: _State, inputs: Sequence[Tensor]) -> Any:
        """On kernels that multiply in bfloat16, in the dtypes that eager returns.

        Raises:
            ValueError: a step cannot take what reaches it, or there is no such executor.
        """
        executor = self._executor_for_autocast(state)
        if executor.asynchronous and is_capturing():
            _keep_for_graphs(self.module, executor)
        values = executor.run(inputs)
        if self.decoding is None:
            shapes, kinds = [tuple(x.shape) for x in inputs], [x.dtype for x in inputs]
            dtypes = self._dtypes_with_autocast(state, shapes, kinds)
            for number, dtype in zip(output_values(state.plan.outputs), dtypes, strict=True):
                values[number] = compiling.laid_out(values[number], dtype, inputs[0])
        return fill_outputs(state.plan.outputs, values)

    def _executor_for_autocast(self, state: _State) -> Executor:
        assert state.executor is not None
        if state.executor.dtype == torch.bfloat16:
            return state.executor
        with self._lock:
            if "medium" not in state.autocast:
                if is_capturing():
                    raise ValueError("a CUDA graph is captured and autocast had no run before it")
                weights = tensors_of(self.module)
                used = {name: weights[name] for name in state.plan.weights}
                chosen = choose(state.plan, used, "medium", as_computed=True)
                if isinstance(chosen, str):
                    raise ValueError(chosen)
                assert state.device is not None
                state.autocast["medium"] = self._graphed(chosen, state.device)
            return state.autocast["medium"]

    def _dtypes_with_autocast(
        self, state: _State, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]
    ) -> list[torch.dtype]:
        """What eager's outputs are under autocast to bfloat16, found without computing anything."""
        key = (state.dtype, state.device_type, *dtypes)
        found = self._dtypes.get(key)
        if found is None:
            # Autocast keeps casts of weights, and those made here are no tensors.
            autocast = torch.autocast(state.device_type, torch.bfloat16, cache_enabled=False)
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            with _disable_current_modes(), torch.no_grad(), autocast, fake:
                inputs = [
                    torch.empty(tuple(shape), dtype=dtype, device=state.device)
                    for shape, dtype in zip(shapes, dtypes, strict=True)
                ]
                try:
                    outputs = self.eager(*inputs)
                except Exception as error:
                    raise ValueError(f"eager cannot take what it was given: {error}") from error
            found = [leaf.dtype for leaf in tree_leaves(outputs)]
            self._dtypes[key] = found
        return found

    # --- inside the graphs of torch.compile and torch.export -----------------------------------
    #
    # torch.compile follows the Python of the undecorated methods, and every attribute that is read
    # on the way becomes a guard of its graph: when one changes, this is followed again. The
    # decorated ones are called while it follows, and give strings, which are constants to it.

    def _as_one_op(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text = self._plan_text(self._generation)
        if not text:
            return self.eager(*args, **kwargs)
        reason, modules = self._read_modules()
        inputs = list(args)
        for name in self._parameter_names().split()[len(args) : len(args) + len(kwargs)]:
            if name not in kwargs:  # another argument, or none: eager knows what to say
                return self.eager(*args, **kwargs)
            inputs.append(kwargs[name])
        if len(inputs) != len(args) + len(kwargs):
            return self.eager(*args, **kwargs)
        weights: list[Tensor] = []
        if not reason:
            for line in self._places_of_weights().split("\n"):
                index, name = line.split("\t")
                weights.append(getattr(modules[int(index)], name))
            reason = self._misfit(inputs, weights)
        if reason:
            self._note(reason)
            return self.eager(*args, **kwargs)
        device = weights[0].device.type
        if not torch.is_autocast_enabled(device):
            decodes = self.decoding is not None
            results = run_plan(inputs, weights, text, self.precision, decodes)
        else:
            results = run_plan(inputs, weights, text, "medium", True)
            if self.decoding is None:
                shapes = "/".join([",".join([str(int(n)) for n in x.shape]) for x in inputs])
                kinds = "/".join([str(x.dtype) for x in inputs])
                names = self._names_of_dtypes(shapes, kinds)
                if not names:
                    return self.eager(*args, **kwargs)
                results = [
                    compiling.laid_out(result, getattr(torch, name), inputs[0])
                    for result, name in zip(results, names.split(), strict=True)
                ]
        if self.decoding is not None:
            return results[0]
        values = {int(n): x for n, x in zip(self._numbers("inputs").split(), inputs, strict=True)}
        for n, result in zip(self._numbers("outputs").split(), results, strict=True):
            values[int(n)] = result
        return fill_outputs(self.plan.outputs, values)

    def _read_modules(self) -> tuple[str, list[nn.Module]]:
        """Why eager must run, or "", and every module of the region."""
        reason = ""
        if len(_module._global_forward_hooks) or len(_module._global_forward_pre_hooks):
            reason = _EAGER_FINDINGS["hook"]
        modules: list[nn.Module] = []
        # torch.export follows Python only if it is strict. Else it runs it, and the attributes of
        # a module that is shared are proxies of modules.
        every: list[nn.Module] = []
        if not torch.compiler.is_dynamo_compiling():
            every = [m for _, m in self.module.named_modules(remove_duplicate=False)]
        for line in self._places_of_modules().split("\n"):
            parent, name, identity, children, modal = line.split("\t")
            module: Any = every[len(modules)] if every else self.module
            if modules and not every:
                module = getattr(modules[int(parent)], name)
            modules.append(module)
            if id(module) != int(identity):
                return _EAGER_FINDINGS["structure"], modules
            held = [*module._modules.values(), *module._parameters.values()]
            if ",".join([str(int(item is not None)) for item in held]) != children:
                return _EAGER_FINDINGS["structure"], modules
            if modules[1:] and module.forward is None:  # read for its guard alone
                return _EAGER_FINDINGS["structure"], modules
            own = module.__dict__
            if len(own["_forward_hooks"]) or len(own["_forward_pre_hooks"]):
                reason = _EAGER_FINDINGS["hook"]
            if modal == "modal" and module.training:
                reason = _EAGER_FINDINGS["training"]
        return reason, modules

    def _misfit(self, inputs: list[Any], weights: list[Tensor]) -> str:
        """Why this call cannot be one operation, as far as inputs and weights tell, or ""."""
        if len(inputs) != len(self.plan.inputs):
            return "it was called with another number of inputs"
        grad = torch.is_grad_enabled()
        for weight in weights:
            if grad and weight.requires_grad:
                return _EAGER_FINDINGS["gradient"]
        dtype, device = weights[0].dtype, weights[0].device
        autocast = torch.is_autocast_enabled(device.type)
        if autocast and torch.get_autocast_dtype(device.type) != torch.bfloat16:
            return _OTHER_AUTOCAST
        for x in inputs:
            if not isinstance(x, Tensor):
                return "an input is no tensor"
            if x.dim() != 4 or x.layout != torch.strided:
                return "an input is not a dense tensor (B, C, H, W)"
            if x.dtype != dtype and not (autocast and x.dtype == torch.bfloat16):
                return "an input and its weights differ in dtype"
            if x.device != device:
                return "an input and its weights are on different devices"
            if grad and x.requires_grad:
                return "gradients are enabled and an input requires them"
        shapes = self.plan.input_shapes
        if shapes is not None:
            for x, shape in zip(inputs, shapes, strict=True):
                for size, expected in zip(x.shape, shape, strict=True):
                    if size != expected:
                        return "it was recognised for inputs of another shape"
        return ""

    @_constant
    def _plan_text(self, generation: str) -> str:
        """The operator's text for the module as it is now; "" where eager must run."""
        plan = self.plan
        with self._lock, _disable_current_modes():
            if _native.is_disabled():
                return self._note(f"{_native.DISABLE} is set")
            weights = tensors_of(self.module)
            is_real = all(type(weight) in (Tensor, nn.Parameter) for weight in weights.values())
            state = self._up_to_date()[0] if is_real else self._state
            if state is None or not self._is_current:
                if is_real or not self._is_current:
                    return self._note("its weights could not be packed")
            elif state.executor is None:
                return self._note(state.reason or "it has no executor")
            plan = self._recorded_plan()
            names = compiling.watched_weights(plan, weights)
            try:
                text = compiling.graph_text(plan)
            except TypeError as error:
                return self._note(str(error))
            if not compiling.computed_outputs(plan):
                return self._note("its outputs are its inputs")
            if is_real and state is not None and state.executor is not None:
                used = [weights[name] for name in names]
                decodes = self.decoding is not None
                executor = plain(state.executor)
                compiling.packs.adopt(text, used, self.precision, decodes, executor)
        return text

    def _recorded_plan(self) -> Plan:
        return self.plan if self.decoding is None else self.plan.last_output()

    @_constant
    def _places_of_modules(self) -> str:
        """A line for each module under each of its names, parents first: whose child, by which
        name, its id, which of its children and weights are there, and whether training changes
        what it does."""
        indices: dict[str, int] = {}
        lines: list[str] = []
        modal = {id(module) for module, is_modal, _ in _watched(self.module) if is_modal}
        for path, module in self.module.named_modules(remove_duplicate=False):
            parent, _, name = path.rpartition(".")
            indices[path] = len(lines)
            kind = "modal" if id(module) in modal else "plain"
            owner = indices[parent] if path else 0
            held = [*module._modules.values(), *module._parameters.values()]
            children = ",".join(str(int(item is not None)) for item in held)
            lines.append(f"{owner}\t{name}\t{id(module)}\t{children}\t{kind}")
        return "\n".join(lines)

    @_constant
    def _places_of_weights(self) -> str:
        """A line for each of the operator's weights: the number of its module, its name there."""
        modules = self.module.named_modules(remove_duplicate=False)
        numbers = {id(module): number for number, (_, module) in enumerate(modules)}
        owners = dict(self.module.named_modules(remove_duplicate=False))
        lines = []
        for weight in compiling.watched_weights(self._recorded_plan(), tensors_of(self.module)):
            owner, _, name = weight.rpartition(".")
            lines.append(f"{numbers[id(owners[owner])]}\t{name}")
        return "\n".join(lines)

    @_constant
    def _parameter_names(self) -> str:
        return " ".join(self.__signature__.parameters)

    @_constant
    def _numbers(self, what: str) -> str:
        plan = self._recorded_plan()
        numbers = plan.inputs if what == "inputs" else compiling.computed_outputs(plan)
        return " ".join(map(str, numbers))

    @_constant
    def _names_of_dtypes(self, shapes: str, dtypes: str) -> str:
        """Of the operator's outputs under autocast; "" where eager must run."""
        state = self._up_to_date()[0]
        assert state is not None
        sizes = [tuple(map(int, shape.split(","))) for shape in shapes.split("/")]
        kinds = [getattr(torch, name.removeprefix("torch.")) for name in dtypes.split("/")]
        try:
            found = self._dtypes_with_autocast(state, sizes, kinds)
        except ValueError as error:
            return self._note(str(error))
        by_number = dict(zip(output_values(state.plan.outputs), found, strict=True))
        names = [by_number[number] for number in compiling.computed_outputs(state.plan)]
        return " ".join(str(dtype).removeprefix("torch.") for dtype in names)

    @_constant
    def _note(self, reason: str) -> str:
        self._notices.add(self.name, reason)
        return ""

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
    autocast = torch.is_autocast_enabled(device.type)
    if autocast and torch.get_autocast_dtype(device.type) is not torch.bfloat16:
        return _OTHER_AUTOCAST
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
        if x.dtype is not dtype and not (autocast and x.dtype is torch.bfloat16):
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
    kept, executor = _captured.setdefault(module, []), plain(executor)
    if executor not in kept:
        kept.append(executor)


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
