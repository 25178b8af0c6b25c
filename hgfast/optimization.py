"""The public verbs: optimize, restore, refresh, warmup."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hgfast import _native
from hgfast._warnings import HgfastWarning
from hgfast.decoding import decode as decode_heatmaps
from hgfast.plan import output_values
from hgfast.recognition import recognise, tensors_of
from hgfast.region import Forward, Notices, Region, regions_of
from hgfast.runtime import evidence
from hgfast.runtime.graphs import Graphs
from hgfast.trace import TraceError

PRECISIONS = ("highest", "high", "medium")

#: A region whose relative L2 difference from eager on the example exceeds this is not swapped
#: in. Wide on purpose: it catches a wrong structure; ``hgfast.verify`` judges accuracy.
_PLAUSIBLE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-1}

Model = TypeVar("Model", bound=nn.Module)


class OptimizationError(RuntimeError):
    """Nothing could be replaced, and ``strict=True`` asked for an error in that case."""


@dataclass(frozen=True)
class Skipped:
    """A module that was left as it is, and why."""

    name: str
    reason: str


@dataclass
class Optimization:
    """What an optimised model remembers, as a plain attribute of its root."""

    precision: str
    skipped: list[Skipped]
    notices: Notices
    graphs: Graphs


_ATTRIBUTE = "_hgfast"


def optimization_of(model: nn.Module) -> Optimization | None:
    """What :func:`optimize` left on ``model``, or None for a model that is not optimised."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Optimization) else None


def decode_of(model: nn.Module) -> dict[str, Any] | None:
    """How ``model`` decodes its heatmaps, or None if it returns heatmaps."""
    forward = model.__dict__.get("forward")
    return forward.decoding if isinstance(forward, Forward) else None


def precision_of(model: nn.Module) -> str | None:
    """The precision ``model`` was optimised for, or None for a model that is not optimised."""
    optimization = optimization_of(model)
    return optimization.precision if optimization else None


def cuda_graph_of(model: nn.Module) -> bool | str | None:
    """The ``cuda_graph`` that ``model`` was optimised with, or None if it is not optimised."""
    optimization = optimization_of(model)
    return optimization.graphs.wanted if optimization else None


def optimize(
    model: Model,
    precision: str | None = None,
    inplace: bool = False,
    strict: bool = False,
    example: Tensor | Sequence[Tensor] | None = None,
    decode: str | Mapping[str, Any] | None = None,
    cuda_graph: bool | str = "auto",
) -> Model:
    """Swap hgfast's kernels into a model, wherever its structure is recognised.

    The result is called like the model, returns what the model returns, in the same container
    and dtype, and has the same class, parameters and state_dict. Weights may change afterwards:
    packed weights are caches that follow ``load_state_dict``, replaced parameters, ``.to()`` and
    in-place edits. In training mode, or where gradients are wanted, the eager forward runs.

    Args:
        model: any module. Recognition is by structure, never by class or name.
        precision: "highest": float32 arithmetic; "high": float32-grade results, on AMX by
            three bfloat16 products for each (bf16x3: see :func:`verify`), elsewhere in float32;
            "medium": bfloat16 operands, float32 sums. Inputs and outputs keep the model's dtype.
            None follows ``torch.get_float32_matmul_precision()``. A bfloat16 model runs in
            bfloat16.
            On a GPU the kernels multiply in 16 bits: a float32 model needs "medium" there, and
            bfloat16 and float16 models run as they are.
        inplace: change ``model`` itself. Otherwise an independent copy is returned and
            ``model`` is never touched.
        strict: raise if nothing could be replaced, instead of warning.
        example: an input (or a sequence of inputs) of the model. Modules that cannot be traced
            symbolically are then traced with real shapes, and every region is compared with
            eager on this example before it is swapped in.
        decode: return keypoints instead of heatmaps: a method of :func:`hgfast.decode`, or its
            ``method``, ``blur``, ``beta`` and ``topk`` by name. The model must return heatmaps
            (B, K, H, W) or a list of them, and then returns what ``hgfast.decode`` makes of the
            last. Where the whole model is replaced, these are decoded as the kernels leave them,
            neither converted to the model's dtype nor copied; other outputs are not computed.
            A module inside that decodes already goes on to do so.
        cuda_graph: on a GPU, capture the launches of each replaced part as CUDA graphs, and replay
            these: one for each shape of inputs, from its second call on, at most eight; weights
            that change take their graphs along. Results are the caller's own, threads and streams
            may share the model, and inside a capture of yours everything is recorded as without.
            While one is captured (:func:`warmup` does it when you say so), another thread must
            not call ``torch.cuda.synchronize``. True: wherever the kernels are a GPU's; False:
            never; "auto": once a measurement has shown that it is right and faster; until then it
            is as False (``hgfast info`` says how it stands). On a CPU it changes nothing, and the
            report says so.

    Returns:
        The optimised model. ``hgfast.report`` says what was replaced.

    Raises:
        TypeError: ``model`` is not a module, ``example`` not made of tensors, or ``decode``
            neither a name nor keywords.
        ValueError: ``precision``, ``decode`` or ``cuda_graph`` is unknown, so is a name in
            ``HGFAST_UNPROVEN``, ``model`` cannot be deep-copied, or returns something else than
            heatmaps where they are to be decoded.
        OptimizationError: nothing was replaced and ``strict`` is set.

    Where it raises, ``model`` is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if precision is None:
        precision = torch.get_float32_matmul_precision()
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
        raise ValueError(f'cuda_graph must be "auto", True or False, got {cuda_graph!r}')
    if not _native.is_disabled():
        evidence.asked_for()  # raises where the environment names what there is not
    decoding = None if decode is None else _decoding(decode)
    own = model.__dict__.get("forward")
    if decoding is not None and own is not None and not isinstance(own, Forward):
        raise ValueError(
            f"optimize cannot decode what {type(model).__name__} returns: it has a forward of its "
            "own, set on the instance"
        )
    inputs = _example_inputs(example)
    asked = (precision, decoding, cuda_graph)
    if regions_of(model) and asked == (
        precision_of(model),
        decode_of(model),
        cuda_graph_of(model),
    ):
        return model if inplace else _copy(model)

    target = model if inplace else _copy(model)
    before = [(module, _marks_of(module)) for module in target.modules()]
    try:
        optimization = Optimization(precision, [], Notices(), Graphs(cuda_graph))
        _replace(target, decoding, optimization, inputs, strict)
    except Exception:
        restore(target)
        for module, marks in before:
            module.__dict__.update(marks)
        raise
    return target


def _replace(
    target: nn.Module,
    decoding: dict[str, Any] | None,
    optimization: Optimization,
    inputs: tuple[Tensor, ...] | None,
    strict: bool,
) -> None:
    without_kernels(target)
    if decoding is not None:
        Forward(target, decoding).install()
    if _native.is_disabled():
        optimization.skipped.append(Skipped("", f"{_native.DISABLE} is set"))
        target.__dict__[_ATTRIBUTE] = optimization
        return

    regions = _find_regions(target, optimization, inputs)
    if inputs is not None:
        regions = _plausible(target, regions, inputs, optimization)
    for region in regions:
        decoding = decode_of(region.module)
        if decoding is None:
            continue
        try:
            region.decode_with(decoding)
        except ValueError as error:
            raise ValueError(
                f"optimize cannot decode what {type(region.module).__name__} returns: {error}"
            ) from error
    if not regions:
        reason = optimization.skipped[0].reason if optimization.skipped else "it is empty"
        message = f"hgfast.optimize replaced nothing in {type(target).__name__}, because {reason}"
        if strict:
            raise OptimizationError(message)
        warnings.warn(message, HgfastWarning, stacklevel=3)
    target.__dict__[_ATTRIBUTE] = optimization
    for region in regions:
        region.install()


def restore(fast: Model) -> Model:
    """Make an optimised model the eager model again, in place.

    Also to be called before a whole model is saved for machines without hgfast. Modules inside
    that were optimised on their own are restored too, and return heatmaps again where they decoded
    them. Returns ``fast``; a model that is not optimised is returned as it is.
    """
    for module in fast.modules():
        for name in _marks_of(module):
            del module.__dict__[name]
    return fast


def without_kernels(fast: Model) -> Model:
    """Restore ``fast`` in place, but for modules inside that decode: they do so behind eager.

    What encloses them was written for keypoints.
    """
    inner = [(module, decode_of(module)) for module in fast.modules() if module is not fast]
    restore(fast)
    for module, decoding in inner:
        if decoding is not None:
            Forward(module, decoding).install()
    return fast


def _marks_of(module: nn.Module) -> dict[str, Any]:
    """What :func:`optimize` set on this module itself, by attribute."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if (name == "forward" and isinstance(value, Forward)) or name == _ATTRIBUTE
    }


def refresh(fast: Model) -> Model:
    """Pack the weights anew after a change that nothing can notice.

    Writes through ``tensor.data`` or a NumPy view, in-place edits of inference tensors, and
    changed module settings (``eps``) are of that kind. Returns ``fast``.
    """
    for region in regions_of(fast):
        region.recognise()
    return fast


def warmup(fast: Model, shapes: Sequence[int] | Iterable[Sequence[int]]) -> Model:
    """Run ``fast`` on zeros of each shape, so that later calls find everything prepared.

    Once, or twice where that captures a CUDA graph.

    Args:
        fast: an optimised model with one input.
        shapes: one input shape (B, C, H, W), or several.

    Returns:
        ``fast``.
    """
    listed: list[Any] = list(shapes)
    every = [listed] if listed and isinstance(listed[0], int) else listed
    first = next(iter(tensors_of(fast).values()), torch.empty(0))
    with torch.inference_mode():
        for shape in every:
            x = torch.zeros(tuple(shape), dtype=first.dtype, device=first.device)
            fast(x)
            if any(region.graph_use().used for region in regions_of(fast)):
                fast(x)
    return fast


def _decoding(decode: str | Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of hgfast.decode that are asked for, tried out."""
    if not isinstance(decode, (str, Mapping)):
        raise TypeError(
            "optimize expects decode as a method's name or keywords of hgfast.decode, "
            f"got {type(decode).__name__}"
        )
    named = {"method": decode} if isinstance(decode, str) else dict(decode)
    decoding = {"method": "quarter", **named}
    known = ("method", "blur", "beta", "topk")
    unknown = [name for name in decoding if name not in known]
    if unknown:
        raise ValueError(
            f"decode expects {', '.join(known)}, got {unknown[0]!r}; flip and transform change "
            "with every call: hgfast.decode takes them"
        )
    decode_heatmaps(torch.zeros(1, 1, 2, 2), **decoding)
    return decoding


def _copy(model: Model) -> Model:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be deep-copied ({error}); pass inplace=True"
        ) from error


def _example_inputs(example: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
    if example is None:
        return None
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    for item in inputs:
        if not isinstance(item, Tensor):
            raise TypeError(
                f"example must be a tensor or a sequence of them, got {type(item).__name__}"
            )
    return inputs


# --- which modules become regions -----------------------------------------------------------


def _find_regions(
    model: nn.Module, optimization: Optimization, inputs: tuple[Tensor, ...] | None
) -> list[Region]:
    """The largest modules that can be expressed as a Plan. Changes nothing."""
    examples = _inputs_of_modules(model, inputs) if inputs else {}
    regions: list[Region] = []
    visited: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        try:
            if not isinstance(module.__dict__.get("forward"), (Forward, NoneType)):
                raise TraceError("it has a forward of its own, set on the instance")
            plan = recognise(module, examples.get(module))
        except TraceError as error:
            if module is model or not _is_layer(module):
                optimization.skipped.append(Skipped(name, str(error)))
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}" if name else child_name)
            return
        region = Region(
            module,
            name,
            plan,
            optimization.precision,
            optimization.notices,
            optimization.graphs,
        )
        try:
            reason = region.pack().reason
        except (ValueError, RuntimeError) as error:
            optimization.skipped.append(Skipped(name, f"it could not be packed ({error})"))
        else:
            if reason:
                optimization.skipped.append(Skipped(name, reason))
            else:
                regions.append(region)

    visit(model, "")
    return regions


def _is_layer(module: nn.Module) -> bool:
    """One of PyTorch's own layers: not worth a line in the report."""
    return type(module).__module__.startswith("torch.nn")


def _inputs_of_modules(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> dict[nn.Module, tuple[Tensor, ...]]:
    """What each module was called with first while the model ran on ``inputs``."""
    seen: dict[nn.Module, tuple[Tensor, ...]] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not kwargs and args and all(isinstance(arg, Tensor) for arg in args):
            seen.setdefault(module, args)

    handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in model.modules()]
    try:
        _run_in_evaluation_mode(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _plausible(
    model: nn.Module,
    regions: list[Region],
    inputs: tuple[Tensor, ...],
    optimization: Optimization,
) -> list[Region]:
    """The regions that agree with eager on what reaches them when ``model`` runs on ``inputs``."""
    wrong = dict.fromkeys(regions, "the example never reaches it")

    def compare(region: Region, args: Any, kwargs: Any, output: Any) -> None:
        if decode_of(region.module) is not None:
            output = region.eager(*args, **kwargs)
        executor = region.pack().executor
        assert executor is not None  # or it would not be a region
        try:
            values = executor.run(region.bind(args, kwargs))
        except ValueError as error:
            wrong[region] = str(error)
            return
        if wrong.get(region) == "the example never reaches it":
            del wrong[region]
        results = [values[number] for number in output_values(region.plan.outputs)]
        expected = torch.utils._pytree.tree_leaves(output)
        limit = _PLAUSIBLE[executor.dtype]
        for result, eager in zip(results, expected, strict=True):
            off = _relative_error(result, eager)
            if not off <= limit:  # a NaN is no agreement either
                wrong[region] = f"its outputs differ from eager's by {off:.1e} on the example"

    handles = [
        region.module.register_forward_hook(
            lambda _, args, kwargs, out, region=region: compare(region, args, kwargs, out),
            with_kwargs=True,
        )
        for region in regions
    ]
    try:
        _run_in_evaluation_mode(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    optimization.skipped += [Skipped(region.name, reason) for region, reason in wrong.items()]
    return [region for region in regions if region not in wrong]


def _relative_error(result: Tensor, expected: Tensor) -> float:
    if result.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    scale = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((result.double() - expected).norm() / scale)


def _run_in_evaluation_mode(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.inference_mode():
            model(*inputs)
    finally:
        for module, mode in modes:
            module.training = mode
