"""From a module to a graph: what the module computes at inference, in one normal form.

Two tracers feed the same graph. ``torch.fx`` needs no example input and follows Python
symbolically; ``torch.export`` needs one and sees real shapes. Whatever they record (modules,
functions, methods, aten overloads) is normalised to the few operations in :data:`OPERATIONS`,
weights are referred to by their qualified names, and in-place operations are made functional.
What has no normal form becomes an ``unsupported`` node, which matters only if an output
depends on it.

Tracing always describes evaluation mode, whatever mode the module is in.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from hgfast.plan import Guard
from hgfast.trace.graph import OPERATIONS, Graph, Node, TraceError, Weight, output_nodes
from hgfast.trace.normaliser import Normaliser
from hgfast.trace.operations import is_map
from hgfast.trace.tracer import Tracer
from hgfast.trace.untouched import (
    attributes_kept,
    check_untouched,
    evaluation_mode,
    with_its_class_forward,
)

__all__ = [
    "OPERATIONS",
    "Graph",
    "Node",
    "TraceError",
    "Weight",
    "graph_of",
    "is_map",
    "output_nodes",
    "trace",
    "trace_with_example",
]

_tracing = threading.Lock()  # two traces at once would undo each other's patches


def trace(module: nn.Module) -> Graph:
    """Trace ``module`` with torch.fx, without an example.

    The graph holds for every input shape. The module is left as it was, its mode included.

    Raises:
        TraceError: a module in it has hooks, parametrisations or a patched forward, it has side
            effects, or it cannot be followed symbolically; the message says which.
    """
    check_untouched(module)
    optional = _optional_arguments(module)
    no_autocast = torch.autocast("cpu", enabled=False)
    with _tracing, no_autocast, evaluation_mode(module), attributes_kept(module):
        tracer = Tracer()
        try:
            recorded = tracer.trace(module, optional)
        except TraceError:
            raise
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            raise TraceError(
                f"fx cannot follow its forward ({type(error).__name__}: {message[0]})"
            ) from error
    with _foreign_code():
        return _read(module, recorded, optional, tracer.guards)


def _read(
    module: nn.Module, recorded: fx.Graph, optional: Mapping[str, Any], guards: Sequence[Guard]
) -> Graph:
    normaliser = Normaliser(dict(module.named_modules(remove_duplicate=False)))
    required = len(inspect.signature(type(module).forward).parameters) - 1 - len(optional)
    for source in recorded.nodes:
        if source.op == "placeholder":
            if str(source.target).startswith("*"):
                raise TraceError("its forward takes a variable number of arguments")
            if len(normaliser.inputs) < required:
                normaliser.add_input(source)
            else:  # what fx leaves of an optional argument, which has its default
                normaliser.values[source] = None
        elif source.op == "get_attr":
            normaliser.add_weight(source, str(source.target))
        elif source.op == "output":
            graph = _checked(normaliser.finish(source.args[0]))
            graph.guards = tuple(guards)
            return graph
        else:
            normaliser.add_call(source)
    raise TraceError("its graph has no output")


def _optional_arguments(module: nn.Module) -> dict[str, Any]:
    """The forward's arguments that a call may leave out, with their defaults.

    A graph holds for calls without them.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind is variable[0] for p in parameters):
        raise TraceError("its forward takes a variable number of arguments")
    return {
        p.name: p.default
        for p in parameters
        if p.kind not in variable and p.default is not inspect.Parameter.empty
    }


def trace_with_example(module: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """Trace ``module`` with torch.export on ``example``.

    The graph holds for the example's shapes only.

    Raises:
        TraceError: as :func:`trace`, or torch.export cannot follow the forward.
    """
    check_untouched(module)
    module = with_its_class_forward(module)
    with evaluation_mode(module):  # export itself puts back attributes that a forward sets
        try:
            program = torch.export.export(module, example, strict=False)
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            raise TraceError(
                f"torch.export cannot follow its forward ({type(error).__name__}: {message[0]})"
            ) from error
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def container(flat: Any) -> Any:
        kept = list(flat)[len(signature.buffers_to_mutate) :]
        return torch.utils._pytree.tree_unflatten(kept, program.call_spec.out_spec)

    with _foreign_code():
        graph = _normal_form(program.graph, {}, names, container)
    graph.input_shapes = tuple(tuple(tensor.shape) for tensor in example)
    return graph


def graph_of(recorded: fx.GraphModule, weights: Mapping[str, str]) -> Graph:
    """The normal form of a graph that somebody else recorded, as dynamo hands it to a backend.

    Args:
        recorded: it is left as it was.
        weights: qualified names of the parameters and buffers that come as inputs, by the names
            of their placeholders.

    Raises:
        TraceError: as :func:`trace`.
    """
    modules = dict(recorded.named_modules(remove_duplicate=False))
    with _foreign_code():
        return _normal_form(recorded.graph, modules, weights, lambda outputs: outputs)


@contextmanager
def _foreign_code() -> Iterator[None]:
    """Nobody knows what forwards there are: one that is not understood is refused, by whatever
    error, and runs as it did."""
    try:
        yield
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"its graph is not understood ({type(error).__name__}: {error})"
        ) from error


def _normal_form(
    recorded: fx.Graph,
    modules: dict[str, nn.Module],
    weights: Mapping[str, str],
    container: Callable[[Any], Any],
) -> Graph:
    normaliser = Normaliser(modules)
    for source in recorded.nodes:
        if source.op == "placeholder":
            if source.name in weights:
                normaliser.add_weight(source, weights[source.name])
            else:
                normaliser.add_input(source)
        elif source.op == "get_attr":
            normaliser.add_weight(source, str(source.target))
        elif source.op == "output":
            return _checked(normaliser.finish(container(source.args[0])))
        else:
            normaliser.add_call(source)
    raise TraceError("its graph has no output")


def _checked(graph: Graph) -> Graph:
    for node in graph.nodes:
        if node.op == "unsupported":
            raise TraceError(f"it uses {node['what']}")
    leaves = torch.utils._pytree.tree_leaves(graph.outputs)
    if not leaves or not all(isinstance(leaf, Node) for leaf in leaves):
        raise TraceError("its outputs are not all activations")
    if not _is_plain_container(graph.outputs):
        raise TraceError("its outputs come in a container other than lists, tuples and dicts")
    return graph


def _is_plain_container(outputs: Any) -> bool:
    if isinstance(outputs, Node):
        return True
    if type(outputs) is dict:
        return all(_is_plain_container(item) for item in outputs.values())
    return type(outputs) in (list, tuple) and all(_is_plain_container(item) for item in outputs)
