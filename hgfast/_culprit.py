"""Which step, or which module, is the first whose output is wrong?

Asked once :func:`hgfast.verify` has found an output wrong, so it may take its time. Regions are
tried first, in order of execution and each on right inputs: those that reach it in the eager
model. In a region that departs, its Plan is cut behind a step, so that what is alive there
becomes its output; the executor is built anew for what is left, and held against the same cut in
plain PyTorch. A value that is wrong stays alive until something wrong is made of it, so halving
finds the step. If every region is right, the modules around them are compared, in the order in
which they are done.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from hgfast._containers import convert, leaves
from hgfast.optimization import decode_of, without_kernels
from hgfast.plan import Plan, output_values
from hgfast.recognition import tensors_of
from hgfast.region import Region, regions_of
from hgfast.reporting import plan_of, qualified
from hgfast.runtime import reference
from hgfast.runtime.choice import choose

#: How many times eager's own error a value may be off before it counts as wrong. verify's bound
#: is 2; on the few numbers of an inner value chance alone comes near it, so a step that is off by
#: more is looked for first.
_LIMITS: Final = (8.0, 4.0, 2.0)


@dataclass(frozen=True)
class Culprit:
    """The first step or module whose output is not what it should be.

    Attributes:
        name: the qualified name of the module, or of the one that the step stands for; "" for
            the model itself.
        step: the title of the step in its region's Plan; empty where it is no step.
        error: relative L2 error of its output against float64; NaN where it has a NaN in another
            place, infinite where its shape is another.
        eager: eager PyTorch's relative error there, in the arithmetic that it is held against.
        why: what else is known, as the end of a sentence; empty where nothing is.
    """

    name: str
    step: str
    error: float
    eager: float
    why: str = ""

    def __str__(self) -> str:
        what = f"{self.name or '(the model)'}" + (f" ({self.step})" if self.step else "")
        error = "a NaN in another place" if math.isnan(self.error) else f"{self.error:.2g}"
        text = f"First to depart: {what}, relative error {error}, eager's is {self.eager:.2g}"
        return f"{text}; {self.why}." if self.why else f"{text}."


def find(
    model: nn.Module,
    fast: nn.Module,
    inputs: Sequence[Any],
    arithmetic: torch.dtype,
    products: Callable[[], AbstractContextManager[Any]],
    floor: float,
) -> Culprit | None:
    """The first to depart, or None where nothing inside departs as much as an output does.

    Args:
        model: the eager model in eval mode, without kernels.
        fast: the optimised one in eval mode; left as it is.
        inputs: of ``model``, in its dtype.
        arithmetic: the dtype of the eager run that sets what is allowed.
        products: makes the context of that run.
        floor: a relative error that is allowed in any case.
    """
    judge = _Judge(model, arithmetic, products, floor)
    regions = regions_of(fast)
    if not all(_is_alike(model, region) for region in regions):
        # The models are built differently: what the regions compute is still known.
        model = without_kernels(copy.deepcopy(fast))
        judge = _Judge(model, arithmetic, products, floor)
        return _in_regions(judge, regions, inputs)
    return _in_regions(judge, regions, inputs) or _around(judge, fast, regions, inputs)


@dataclass(frozen=True)
class _Off:
    """How far values are off, the worst of them; and eager's own error there."""

    error: float = 0.0
    eager: float = 0.0
    times: float = 0.0  # eager's error


class _Judge:
    def __init__(
        self,
        model: nn.Module,
        arithmetic: torch.dtype,
        products: Callable[[], AbstractContextManager[Any]],
        floor: float,
    ) -> None:
        self.model = model
        self.arithmetic = arithmetic
        self.products = products  # around eager runs; leaves those in float64 as they are
        self.floor = floor

    def off(self, given: Any, right: Any, baseline: Any) -> _Off:
        """Of the tensors in three containers."""
        tensors = [
            {name: leaf for name, leaf in leaves(value) if isinstance(leaf, Tensor)}
            for value in (given, right, baseline)
        ]
        if not tensors[0].keys() == tensors[1].keys() == tensors[2].keys():
            return _Off(math.inf, 0.0, math.inf)
        each = [self._off(*(part[name] for part in tensors)) for name in tensors[0]]
        return max(each, key=lambda off: off.times, default=_Off())

    def _off(self, given: Tensor, right: Tensor, baseline: Tensor) -> _Off:
        if given.shape != right.shape:
            return _Off(math.inf, 0.0, math.inf)
        dtype = given.dtype
        given, baseline = (x.to(right.device, torch.float64) for x in (given, baseline))
        eager = _relative(baseline, right)
        if not torch.equal(given.isnan(), right.isnan()):
            return _Off(math.nan, eager, math.inf)
        error = _relative(given, right)
        rounding = torch.finfo(dtype).eps / 4 if dtype.is_floating_point else 0.0
        allowed = max(eager, rounding, self.floor)
        return _Off(error, eager, error / allowed if error else 0.0)


def _relative(value: Tensor, right: Tensor) -> float:
    # Equal infinities differ by nothing.
    difference = torch.where(value == right, 0.0, value - right).nan_to_num(0.0)
    length = float(right.nan_to_num(0.0, 0.0, 0.0).norm())
    distance = float(difference.norm())
    return distance / length if length else (math.inf if distance else 0.0)


def _is_alike(model: nn.Module, region: Region) -> bool:
    """Whether the model has a module of that name with weights of these names."""
    try:
        there = model.get_submodule(region.name)
    except AttributeError:
        return False
    mine, others = tensors_of(region.module), tensors_of(there)
    return {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in others.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A copy, floating point in ``dtype``: what gets it may work in place."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return convert(cast, value)


# --- Regions ---


def _in_regions(judge: _Judge, regions: Sequence[Region], inputs: Sequence[Any]) -> Culprit | None:
    arrived = reached(judge.model, regions, inputs)
    found = [(region, bound, _off_of_region(judge, region, bound)) for region, bound in arrived]
    for limit in _LIMITS:
        for region, bound, off in found:
            if off.times > limit:
                return _in_region(judge, region, bound, off, limit)
    return None


def reached(
    model: nn.Module, regions: Sequence[Region], inputs: Sequence[Any]
) -> list[tuple[Region, tuple[Any, ...]]]:
    """The regions in order of execution, each with what reaches it first in the eager model."""
    found: dict[str, tuple[Region, tuple[Any, ...]]] = {}

    def remember(region: Region) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if region.name not in found:
                bound = region.bind(args, kwargs)
                found[region.name] = region, tuple(_cast(x, _dtype_of(x)) for x in bound)

        return hook

    handles = [
        model.get_submodule(region.name).register_forward_pre_hook(
            remember(region), with_kwargs=True
        )
        for region in regions
    ]
    try:
        model(*convert(lambda x: x.clone() if isinstance(x, Tensor) else x, tuple(inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _dtype_of(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else torch.float32


def _weights_dtype(region: Region) -> torch.dtype:
    tensors = tensors_of(region.module).values()
    return next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)


def _off_of_region(judge: _Judge, region: Region, bound: tuple[Any, ...]) -> _Off:
    module = judge.model.get_submodule(region.name)
    with judge.products():
        right, baseline = (
            copy.deepcopy(module).to(dtype)(*_cast(bound, dtype))
            for dtype in (torch.float64, judge.arithmetic)
        )
    given = region.heatmaps(*_cast(bound, _weights_dtype(region)))
    if region.decoding is not None:  # the last of a list, or what stands alone
        given, right, baseline = (
            value[-1] if isinstance(value, (list, tuple)) else value
            for value in (given, right, baseline)
        )
    return judge.off(given, right, baseline)


def _in_region(
    judge: _Judge, region: Region, bound: tuple[Any, ...], off: _Off, limit: float
) -> Culprit:
    """The step in a region that departs, or the region itself where no step can be told."""
    plan = plan_of(region)
    mine = tensors_of(region.module)
    module = judge.model.get_submodule(region.name)
    right = tensors_of(module)
    as_a_whole = Culprit(region.name, "", off.error, off.eager)

    read = _values(plan, right, bound, torch.float64)
    whole = copy.deepcopy(module).double()(*_cast(bound, torch.float64))
    if region.decoding is not None and isinstance(whole, (list, tuple)):
        whole = whole[-1]
    computed = [leaf for _, leaf in leaves(whole) if isinstance(leaf, Tensor)]
    expected = [read[number] for number in output_values(plan.outputs)]
    # Two orders of the same sums in float64 differ by far less.
    if judge.off(computed, expected, expected).error > 1e-9:
        return replace(as_a_whole, why="the Plan that was read from it computes something else")

    def off_at(index: int) -> _Off | None:
        """Of all that is alive behind a step; None where nothing can run that much."""
        alive = _alive(plan, index)
        cut = _cut(plan, alive)
        used = {name: mine[name] for name in cut.weights}
        executor = choose(cut, used, region.precision)
        if isinstance(executor, str):
            return None
        given = executor.run(list(_cast(bound, _weights_dtype(region))))
        dtypes = (torch.float64, judge.arithmetic)
        with judge.products():
            sides = [_values(cut, right, bound, dtype) for dtype in dtypes]
        return judge.off(*({str(n): values[n] for n in alive} for values in (given, *sides)))

    low, high = -1, len(plan.steps) - 1  # departs nowhere up to low; somewhere up to high
    found = off_at(high)
    if found is None:
        return as_a_whole
    if found.times <= limit:
        return replace(
            as_a_whole,
            why="its kernels are right once packed anew: its weights were changed by something "
            "that nothing can notice (hgfast.refresh)",
        )
    while high - low > 1:
        middle = (low + high) // 2
        here = off_at(middle)
        # What cannot run alone (no weights, no kernel) is left to the steps behind it.
        if here is not None and here.times > limit:
            high, found = middle, here
        else:
            low = middle
    step = plan.steps[high]
    return Culprit(
        qualified(region.name, step.name),
        step.title,
        found.error,
        found.eager,
        _changed(step.weights, mine, right),
    )


def _alive(plan: Plan, index: int) -> list[int]:
    """Values that the steps up to one make, and that outputs or later steps read."""
    read = set(output_values(plan.outputs))
    read.update(number for step in plan.steps[index + 1 :] for number in step.inputs)
    return [step.output for step in plan.steps[: index + 1] if step.output in read]


def _cut(plan: Plan, values: Sequence[int]) -> Plan:
    """The Plan of these values alone."""
    needed, steps = set(values), []
    for step in reversed(plan.steps):
        if step.output in needed:
            needed.update(step.inputs)
            steps.append(step)
    return replace(plan, steps=tuple(reversed(steps)), outputs=list(values), blocks=())


def _values(
    plan: Plan, weights: Mapping[str, Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> dict[int, Tensor]:
    """The Plan's outputs in plain PyTorch; nothing is kept for longer than it is read."""
    kept = set(output_values(plan.outputs))
    last = {number: i for i, step in enumerate(plan.steps) for number in step.inputs}
    values = dict(zip(plan.inputs, _cast(tuple(inputs), dtype), strict=True))
    for i, step in enumerate(plan.steps):
        cast = {name: _cast(weights[name], dtype) for name in step.weights}
        values[step.output] = reference.run_step(
            step, cast, *(values[number] for number in step.inputs)
        )
        for number in step.inputs:
            if last[number] == i and number not in kept:
                values.pop(number, None)
    return {number: values[number] for number in kept}


def _changed(names: Sequence[str], mine: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> str:
    """Whether weights differ beyond their dtypes, in words."""
    for name in names:
        a, b = mine[name], right[name]
        if not torch.equal(a.cpu(), b.to("cpu", a.dtype)):
            return f"its {name.rpartition('.')[2]} ({name}) is not the model's"
    return ""


# --- Modules around them ---


def _around(
    judge: _Judge, fast: nn.Module, regions: Sequence[Region], inputs: Sequence[Any]
) -> Culprit | None:
    """The first module outside the regions that is done with a wrong output."""
    inside = {id(module) for region in regions for module in region.module.modules()}
    theirs = dict(judge.model.named_modules())
    mine = {
        name: module
        for name, module in fast.named_modules()
        if id(module) not in inside and name in theirs and decode_of(module) is None
    }
    if not mine:
        return None
    weights = next((x.dtype for x in fast.parameters() if x.is_floating_point()), None)
    right: dict[str, Any] = {}
    baseline: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for model, dtype, outputs in (
        (copy.deepcopy(judge.model).double(), torch.float64, right),
        (copy.deepcopy(judge.model).to(judge.arithmetic), judge.arithmetic, baseline),
    ):
        with judge.products():
            _record(dict(model.named_modules()), mine, model, _cast(tuple(inputs), dtype), outputs)
    cast = _cast(tuple(inputs), weights) if weights else tuple(inputs)
    _record(mine, mine, fast, cast, given)
    offs = [
        (name, judge.off(given[name], right[name], baseline[name]))
        for name in given
        if name in right and name in baseline
    ]
    for limit in _LIMITS:
        for name, off in offs:
            if off.times > limit:
                ours = tensors_of(mine[name])
                own = [weight for weight in ours if "." not in weight]
                others = tensors_of(theirs[name])
                alike = all(weight in others for weight in own)
                why = _changed(own, ours, others) if alike else ""
                return Culprit(name, "", off.error, off.eager, why)
    return None


def _record(
    modules: Mapping[str, nn.Module],
    names: Mapping[str, Any],
    model: nn.Module,
    inputs: tuple[Any, ...],
    outputs: dict[str, Any],
) -> None:
    """Run ``model`` and keep what some of its modules return at their first call, in order."""

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            # A copy: what follows may work in place.
            outputs.setdefault(
                name, convert(lambda x: x.clone() if isinstance(x, Tensor) else x, output)
            )

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
