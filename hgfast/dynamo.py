"""``torch.compile(model, backend="hgfast")``: the graphs that dynamo records, as Plans.

dynamo hands over a graph whose parameters and buffers are inputs like the images. What the
graph computes is read as a Plan when it is first called; a call packs the weights that it gets,
or finds them packed. A graph that is no Plan is cut into parts that are, and the operations between
them. Where no part is one, or a call does not fit, the recorded graph itself runs, operation by
operation: the answer is always the one eager would give.

``import hgfast.dynamo`` makes the name known where hgfast is not installed but on the path.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from hgfast._warnings import HgfastWarning
from hgfast.compiling import is_capturing
from hgfast.optimization import PRECISIONS
from hgfast.patterns import read_plan
from hgfast.plan import Plan, UpsampleAdd, fill_outputs, output_values
from hgfast.recognition import is_fused, is_worth_it
from hgfast.region import obstacle
from hgfast.runtime.choice import Executor, choose
from hgfast.trace import Node, TraceError, graph_of, output_nodes
from hgfast.trace.normaliser import Normaliser, may_write

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
    kinds = list(map(_kind, recorded.graph.find_nodes(op="placeholder"), examples))
    return _Compiled(recorded, kinds, precision, set())


class _Compiled:
    """One recorded graph, or a part of one. Safe to call from several threads."""

    def __init__(
        self, recorded: fx.GraphModule, kinds: list[str], precision: str, warned: set[str]
    ) -> None:
        self._recorded = recorded
        self._precision = precision
        self._trouble = _trouble(recorded)
        self._lock = threading.Lock()
        self._plans: dict[tuple[Any, ...], Plan | _Parts | str] = {}
        self._packed: list[_Packed] = []  # the last used comes first
        self._warned = warned  # one for all parts of a graph
        nodes = recorded.graph.find_nodes(op="placeholder")
        self._kinds = kinds
        self._names = [n.name for n, kind in zip(nodes, self._kinds, strict=True) if kind == WEIGHT]
        # What the rest of the graph and of the program was recorded for.
        (output,) = recorded.graph.find_nodes(op="output")
        seen = [tensor for node in output.all_input_nodes for tensor in _tensors(node)]
        self._forms = [(tensor.dtype, _layout(tensor)) for tensor in seen]

    def __call__(self, *arguments: Any) -> Any:
        images = tuple(self._of_kind(IMAGE, arguments))
        weights = self._of_kind(WEIGHT, arguments)
        plan = self._plan(arguments, weights)
        if isinstance(plan, _Parts):
            known = zip(arguments, self._kinds, strict=True)
            outputs = plan.graph(*(argument for argument, kind in known if kind != NUMBER))
            self._warn(f"hgfast runs parts of a compiled graph eagerly, because {plan.reason}")
            return outputs
        if isinstance(plan, str):
            reason: str | None = plan
        else:
            reason = self._obstacle(images, weights)
            if reason is None:
                outputs, reason = self._run(plan, arguments, images, weights)
            if reason is None:
                return outputs
        outputs = self._recorded(*arguments)  # where the input is wrong, this raises
        self._warn(f"hgfast runs a compiled graph eagerly, because {reason}")
        return outputs

    def _run(
        self, plan: Plan, arguments: Sequence[Any], images: tuple[Any, ...], weights: list[Tensor]
    ) -> tuple[Any, str | None]:
        """The outputs; or None, and why there are none."""
        autocast = torch.is_autocast_enabled(weights[0].device.type)
        executor = self._up_to_date(plan, arguments, weights, autocast)
        if isinstance(executor, str):
            return None, executor
        try:
            values = executor.run(images)
        except ValueError as error:  # shapes that do not fit: eager has the last word
            return None, str(error)
        for number, form in zip(output_values(plan.outputs), self._forms, strict=True):
            dtype, layout = form  # under autocast those of autocast, which dynamo guards
            values[number] = values[number].to(dtype, memory_format=layout)
        return fill_outputs(plan.outputs, values), None

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, HgfastWarning, stacklevel=3)

    def _of_kind(self, kind: str, arguments: Sequence[Any]) -> list[Any]:
        return [x for x, known in zip(arguments, self._kinds, strict=True) if known == kind]

    def _numbers(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(number.item() for number in self._of_kind(NUMBER, arguments))

    def _obstacle(self, images: tuple[Any, ...], weights: list[Tensor]) -> str | None:
        """Why this call cannot take the fast path, as far as the arguments tell."""
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
        self, plan: Plan, arguments: Sequence[Any], weights: list[Tensor], autocast: bool
    ) -> Executor | str:
        key = (autocast, *self._numbers(arguments))
        with self._lock:
            for packed in self._packed:
                if packed.fits(key, weights):
                    break
            else:
                # The snapshot comes first: what changes while packing is noticed at the next call.
                packed = _Packed(key, weights)
                precision = "medium" if autocast else self._precision
                packed.executor = self._pack(plan, weights, precision, as_computed=autocast)
            others = [item for item in self._packed if item is not packed and item.is_alive()]
            self._packed = [packed, *others][:_KEPT]
            return packed.executor

    def _pack(
        self, plan: Plan, weights: list[Tensor], precision: str, as_computed: bool
    ) -> Executor | str:
        """The executor, or why there is none."""
        named = dict(zip(self._names, weights, strict=True))
        try:
            used = {name: named[name] for name in plan.weights}
            return choose(plan, used, precision, as_computed)
        except ValueError as error:
            return str(error)

    def _plan(self, arguments: Sequence[Any], weights: list[Tensor]) -> Plan | _Parts | str:
        """What the graph computes; or the parts of it that are Plans; or why there is none."""
        if self._trouble or not weights:
            return self._trouble or "it has no weights"
        numbers = self._numbers(arguments)
        with self._lock:
            if numbers not in self._plans:
                if len(self._plans) >= _KEPT:
                    self._plans.clear()
                named = dict(zip(self._names, weights, strict=True))
                plan: Plan | _Parts | str = self._read(numbers, named)
                if isinstance(plan, str):
                    plan = self._cut(numbers, named, plan)
                self._plans[numbers] = plan
            return self._plans[numbers]

    def _cut(
        self, numbers: tuple[Any, ...], weights: Mapping[str, Tensor], reason: str
    ) -> _Parts | str:
        """The graph with those of its parts compiled that are worth it, or ``reason``."""
        recorded = _with_numbers(self._recorded, self._kinds, numbers)
        part_of = _parts(recorded, weights)
        if _writes_across(recorded, part_of):
            return reason
        names = [node.name for node in recorded.graph.find_nodes(op="placeholder")]
        kinds = dict(zip(names, [kind for kind in self._kinds if kind != NUMBER], strict=True))
        split = split_module(recorded, nn.Module(), part_of.__getitem__, keep_original_order=True)
        some = False
        for name, part in list(split.named_children()):
            assert isinstance(part, fx.GraphModule)
            inputs = part.graph.find_nodes(op="placeholder")
            seen = [node.meta.get("example_value") for node in inputs]
            own = {
                node.name: kinds.get(node.name) or _kind(node, example)
                for node, example in zip(inputs, seen, strict=True)
            }
            compiled = _Compiled(part, list(own.values()), self._precision, self._warned)
            named = {name: weights[name] for name, kind in own.items() if kind == WEIGHT}
            plan = compiled._read((), named)
            images = [x for x, kind in zip(seen, own.values(), strict=True) if kind == IMAGE]
            if isinstance(plan, Plan) and _is_worth_it(plan, images):
                compiled._plans[()] = plan
                delattr(split, name)
                setattr(split, name, compiled)
                some = True
        return _Parts(split, reason) if some else reason

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
        return plan if is_worth_it(plan) else "it has no block that could be fused"


@dataclass(frozen=True)
class _Parts:
    """A graph that calls its parts, some compiled, the others as they were recorded."""

    graph: fx.GraphModule
    reason: str  # why the graph is no Plan as a whole


class _Packed:
    """An executor, or why there is none, and the state of the weights that it was made for."""

    def __init__(self, numbers: tuple[Any, ...], weights: list[Tensor]) -> None:
        self.executor: Executor | str = ""
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


# --- graphs that are no Plan as a whole ----------------------------------------------------------


def _is_worth_it(plan: Plan, images: Sequence[Tensor]) -> bool:
    """Whether a convolution is fused in it, and it takes what its part was recorded with."""
    if not any(is_fused(step) and not isinstance(step, UpsampleAdd) for step in plan.steps):
        return False
    if any(type(size) is not int for image in images for size in image.shape):
        return True  # dynamic: each call tells
    try:
        plan.shapes(*(tuple(image.shape) for image in images))
    except ValueError:
        return False
    return all(image.dim() == 4 for image in images)


def _parts(recorded: fx.GraphModule, weights: Collection[str]) -> dict[fx.Node, int]:
    """The number of its part for each call: as long as they have a normal form, or have none.

    The parts follow each other as the calls do, so that every write happens when it did.
    """
    normaliser = Normaliser({})
    parts: dict[fx.Node, int] = {}
    number, before = 0, True
    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            if node.name in weights:
                normaliser.add_weight(node, node.name)
            else:
                normaliser.add_input(node)
        elif node.op != "output":
            known = _is_known(node, normaliser)
            if not known:  # for those behind it it is an input
                normaliser.add_input(node)
            number, before = number + (known != before), known
            parts[node] = number
    return parts


def _is_known(node: fx.Node, normaliser: Normaliser) -> bool:
    if not all(_tensors(value) for value in (node, *node.all_input_nodes)):
        return False  # sizes that are dynamic
    try:
        normaliser.add_call(node)
    except TraceError:
        return False
    values = tree_leaves(normaliser.read(node))
    return all(isinstance(value, Node) and value.op != "unsupported" for value in values)


def _tensors(node: fx.Node) -> list[Tensor]:
    leaves = tree_leaves(node.meta.get("example_value"))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _writes_across(recorded: fx.GraphModule, parts: Mapping[fx.Node, int]) -> bool:
    """Whether a part may write memory that is not its own: a Plan's inputs and outputs need not
    share memory where the recorded calls' do."""
    owners: dict[int, int] = {}
    for node in recorded.graph.nodes:
        part = parts.get(node, -1)
        for source in _may_be_written(node):
            if any(owners[memory] != part for memory in _memory(source)):
                return True
        for memory in _memory(node):
            owners.setdefault(memory, part)
    return False


def _memory(node: fx.Node) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(node)}


def _may_be_written(node: fx.Node) -> list[fx.Node]:
    """The arguments of a call whose memory it may change."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return node.all_input_nodes if target._schema.is_mutable else []
    if isinstance(target, torch._ops.OpOverloadPacket):
        names: list[str] = target.overloads()  # type: ignore[no-untyped-call]
        mutable = any(getattr(target, name)._schema.is_mutable for name in names)
        return node.all_input_nodes if mutable else []
    if may_write(node):
        return node.all_input_nodes if "out" in node.kwargs else node.all_input_nodes[:1]
    if not any(argument is True for argument in (*node.args, *node.kwargs.values())):
        return []
    if target in (F.batch_norm, F.instance_norm):
        return [source for source in node.args[1:3] if isinstance(source, fx.Node)]
    return [source for source in node.all_input_nodes if _memory(source) & _memory(node)]


def _layout(seen: Tensor) -> torch.memory_format:
    """The memory format of what dynamo saw, without asking for sizes that are dynamic."""
    strides = seen.stride() if seen.layout is torch.strided else (0,)
    ones = [type(stride) is int and stride == 1 for stride in strides]
    if not ones or ones[-1]:
        return torch.contiguous_format
    return torch.channels_last if len(ones) == 4 and ones[1] else torch.preserve_format


# Where hgfast is installed, its entry point has made the name known; it must not be known twice.
if "hgfast" not in torch._dynamo.list_backends():
    torch._dynamo.register_backend(backend, name="hgfast")
