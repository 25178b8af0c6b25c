"""``torch.compile(model, backend="hgfast")``: the graphs that dynamo records, as Plans.

dynamo hands over a graph whose parameters and buffers are inputs like the images. What the
graph computes is read as a Plan when it is first called; a call packs the weights that it gets,
or finds them packed. Where a graph is no Plan, or a call does not fit, the recorded graph itself
runs, operation by operation: the answer is always the one eager would give.

``import hgfast.dynamo`` makes the name known where hgfast is not installed but on the path.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from hgfast._warnings import HgfastWarning
from hgfast.compiling import is_capturing, laid_out
from hgfast.optimization import PRECISIONS
from hgfast.patterns import read_plan
from hgfast.plan import Plan, fill_outputs, output_values
from hgfast.recognition import is_fused
from hgfast.region import obstacle
from hgfast.runtime.choice import Executor, choose
from hgfast.trace import Node, TraceError, graph_of, output_nodes

#: How many states of the weights stay packed for one graph: instances of one class share it.
_KEPT = 4

#: What an argument of a recorded graph is.
WEIGHT, IMAGE, NUMBER, SIZE = "weight", "image", "number", "size"


def backend(
    recorded: fx.GraphModule,
    examples: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A backend of ``torch.compile``, by the name "hgfast".

    Args:
        recorded: the graph, with every parameter and buffer as an input.
        examples: what it was recorded with: tensors, and sizes where those are dynamic.
        options: ``precision``, as :func:`hgfast.optimize` takes it.

    Returns:
        What dynamo calls in place of the graph, with arguments as ``examples``.

    Raises:
        ValueError: an option is unknown, or its value.
    """
    options = dict(options or {})
    precision = options.pop("precision", None) or torch.get_float32_matmul_precision()
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if options:
        raise ValueError(f"unknown options {sorted(options)}; the backend knows 'precision'")
    return _Compiled(recorded, examples, precision)


class _Compiled:
    """One recorded graph. Safe to call from several threads."""

    def __init__(self, recorded: fx.GraphModule, examples: Sequence[Any], precision: str) -> None:
        self._recorded = recorded
        self._precision = precision
        self._trouble = _trouble(recorded)
        self._lock = threading.Lock()
        self._plans: dict[tuple[Any, ...], Plan | str] = {}
        self._packed: list[_Packed] = []  # the last used comes first
        self._warned: set[str] = set()
        nodes = recorded.graph.find_nodes(op="placeholder")
        self._kinds = list(map(_kind, nodes, examples))
        self._names = [n.name for n, kind in zip(nodes, self._kinds, strict=True) if kind == WEIGHT]
        (output,) = recorded.graph.find_nodes(op="output")
        self._outputs = [node.meta.get("example_value") for node in output.all_input_nodes]

    def __call__(self, *arguments: Any) -> Any:
        images = tuple(self._of_kind(IMAGE, arguments))
        weights = self._of_kind(WEIGHT, arguments)
        reason = self._obstacle(images, weights)
        if reason is None:
            autocast = torch.is_autocast_enabled(weights[0].device.type)
            packed = self._up_to_date(arguments, weights, autocast)
            if isinstance(packed.executor, str):
                reason = packed.executor
            else:
                try:
                    values = packed.executor.run(images)
                except ValueError as error:  # shapes that do not fit: eager has the last word
                    reason = str(error)
                else:
                    if autocast:  # the dtypes that dynamo saw, whose guards autocast is one of
                        for number, seen in zip(
                            output_values(packed.outputs), self._outputs, strict=True
                        ):
                            values[number] = laid_out(values[number], seen.dtype, images[0])
                    return fill_outputs(packed.outputs, values)
        outputs = self._recorded(*arguments)  # where the input is wrong, this raises
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"hgfast runs a compiled graph eagerly, because {reason}",
                HgfastWarning,
                stacklevel=2,
            )
        return outputs

    def _of_kind(self, kind: str, arguments: Sequence[Any]) -> list[Any]:
        return [x for x, known in zip(arguments, self._kinds, strict=True) if known == kind]

    def _obstacle(self, images: tuple[Any, ...], weights: list[Tensor]) -> str | None:
        """Why this call cannot take the fast path, as far as the arguments tell."""
        if self._trouble or not weights:
            return self._trouble or "it has no weights"
        for weight in weights:
            if type(weight) not in (Tensor, nn.Parameter):
                return f"a weight is a {type(weight).__name__}"
            if weight.is_inference():
                return "its weights were made in inference mode, where changes leave no trace"
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return (
                "gradients are enabled and a parameter requires them (use torch.inference_mode())"
            )
        if is_capturing():
            return "a CUDA graph is captured"
        return obstacle(images, len(images), weights[0].dtype, weights[0].device)

    def _up_to_date(
        self, arguments: tuple[Any, ...], weights: list[Tensor], autocast: bool
    ) -> _Packed:
        numbers = tuple(number.item() for number in self._of_kind(NUMBER, arguments))
        precision = "medium" if autocast else self._precision
        with self._lock:
            for packed in self._packed:
                if packed.fits((autocast, *numbers), weights):
                    break
            else:
                # The snapshot comes first: what changes while packing is noticed at the next call.
                packed = _Packed((autocast, *numbers), weights)
                packed.executor, packed.outputs = self._pack(numbers, weights, precision, autocast)
            others = [item for item in self._packed if item is not packed and item.is_alive()]
            self._packed = [packed, *others][:_KEPT]
            return packed

    def _pack(
        self, numbers: tuple[Any, ...], weights: list[Tensor], precision: str, as_computed: bool
    ) -> tuple[Executor | str, Any]:
        """The executor and the container of its outputs; or why there is none, and None."""
        named = dict(zip(self._names, weights, strict=True))
        if numbers not in self._plans:
            if len(self._plans) >= _KEPT:
                self._plans.clear()
            self._plans[numbers] = self._read(numbers, named)
        plan = self._plans[numbers]
        if isinstance(plan, str):
            return plan, None
        try:
            used = {name: named[name] for name in plan.weights}
            return choose(plan, used, precision, as_computed), plan.outputs
        except ValueError as error:
            return str(error), None

    def _read(self, numbers: tuple[Any, ...], weights: Mapping[str, Tensor]) -> Plan | str:
        """What the graph computes where its numbers have these values; or why that is no Plan."""
        try:
            recorded = _with_numbers(self._recorded, self._kinds, numbers)
            graph = graph_of(recorded, {name: name for name in weights})
            # Sizes are inputs of dynamo's, and none of a Plan's.
            kinds = [kind for kind in self._kinds if kind in (IMAGE, SIZE)]
            sizes = {n for n, kind in zip(graph.inputs, kinds, strict=True) if kind == SIZE}
            for node in graph.nodes:
                if sizes.intersection(node.inputs) or any(
                    isinstance(leaf, Node) for leaf in tree_leaves(list(node.attributes.values()))
                ):
                    raise TraceError("it computes with sizes that are dynamic")
            outputs = list(output_nodes(graph.outputs))
            if any(node.op == "input" for node in outputs) or len(set(outputs)) < len(outputs):
                raise TraceError("it returns copies of an input or of another output")
            graph.inputs = [node for node in graph.inputs if node not in sizes]
            graph.nodes = [node for node in graph.nodes if node not in sizes]
            plan = read_plan(graph, {name: tuple(w.shape) for name, w in weights.items()})
        except (TraceError, ValueError) as error:
            return str(error)
        return plan if any(map(is_fused, plan.steps)) else "it has no block that could be fused"


class _Packed:
    """An executor, or why there is none, and the state of the weights that it was made for."""

    def __init__(self, numbers: tuple[Any, ...], weights: list[Tensor]) -> None:
        self.executor: Executor | str = ""
        self.outputs: Any = None
        self._numbers = numbers
        self._states = [_state(weight) for weight in weights]
        self._statistics = _statistics(weights)
        # Weak: a model may go. But no address that is compared is given to anybody else.
        self._weights = [weakref.ref(weight) for weight in weights]
        self._storages = [
            StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
            for weight in weights
        ]

    def fits(self, numbers: tuple[Any, ...], weights: list[Tensor]) -> bool:
        if numbers != self._numbers or not all(
            known() is weight and state == _state(weight)
            for known, state, weight in zip(self._weights, self._states, weights, strict=True)
        ):
            return False
        return torch.equal(self._statistics, _statistics(weights))

    def is_alive(self) -> bool:
        return all(known() is not None for known in self._weights)


def _state(weight: Tensor) -> tuple[int, int, int]:
    return weight._version, weight.data_ptr(), weight.untyped_storage()._cdata


def _statistics(weights: list[Tensor]) -> Tensor:
    """The values of all buffers: training changes running statistics without counting a version."""
    with torch.no_grad():
        buffers = [weight.flatten() for weight in weights if not isinstance(weight, nn.Parameter)]
        return torch.cat(buffers) if buffers else torch.empty(0)


def _kind(node: fx.Node, example: Any) -> str:
    """What a placeholder stands for. Whatever is taken for an image need not be one: as the weight
    of an operation it has no normal form."""
    if not isinstance(example, Tensor):
        return SIZE
    marks = node.meta.get("tensor_dict", {})
    if isinstance(example, nn.Parameter) or "_dynamo_static_input_type" in marks:
        return WEIGHT
    # With dynamic=True the numbers of modules (eps, momentum) come as tensors.
    if example.dim() == 0 and node.users and all(user.target == "item" for user in node.users):
        return NUMBER
    return IMAGE


def _trouble(recorded: fx.GraphModule) -> str | None:
    """What the normal form could overlook: calls for their effect, tensors held inside."""
    for node in recorded.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            return f"its graph holds {node.target}"
        if node.op.startswith("call_") and node.meta.get("example_value") is None:
            return f"it uses {getattr(node.target, '__name__', node.target)}(), for its effect"
    return None


def _with_numbers(
    recorded: fx.GraphModule, kinds: Sequence[str], numbers: Sequence[Any]
) -> fx.GraphModule:
    """The graph with these values in place of its inputs that are numbers."""
    if not numbers:
        return recorded
    left = iter(numbers)
    values: dict[fx.Node, Any] = {}
    graph, placeholders = fx.Graph(), iter(kinds)
    for node in recorded.graph.nodes:
        if node.op == "placeholder" and next(placeholders) == NUMBER:
            values.update(dict.fromkeys(node.users, next(left)))
        elif node not in values:
            values[node] = graph.node_copy(node, lambda source: values[source])
    return fx.GraphModule(nn.Module(), graph)


# Where hgfast is installed, its entry point has made the name known; it must not be known twice.
if "hgfast" not in torch._dynamo.list_backends():
    torch._dynamo.register_backend(backend, name="hgfast")
