"""From a module to a Plan: trace it, then read the graph."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from hgfast.patterns import read_plan
from hgfast.plan import Bottleneck, Conv, Plain, Plan, Remerge, Step, UpsampleAdd
from hgfast.trace import TraceError, trace, trace_with_example


def recognise(module: nn.Module, example: tuple[Tensor, ...] | None = None) -> Plan:
    """Read what ``module`` computes at inference as a Plan.

    Args:
        module: any module; it is left as it was.
        example: inputs to trace with where symbolic tracing fails. Such a Plan holds for the
            example's shapes only.

    Raises:
        TraceError: the module cannot be expressed as a Plan, or has nothing to fuse; the
            message completes the sentence "left as it is, because ...".
    """
    try:
        graph = trace(module)
        plan = read_plan(graph, _shapes(module))
    except TraceError:
        if example is None:
            raise
        plan = read_plan(trace_with_example(module, example), _shapes(module))
    if not is_worth_it(plan):
        raise TraceError("it has no block that could be fused")
    return plan


#: PyTorch's operations that move no data, or little.
_LIGHT = ("chunk", "flatten", "getitem", "permute", "split", "squeeze", "unsqueeze", "view")
#: Those behind which a map is small, whatever the image.
_REDUCTIONS = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "amax", "mean", "sum")


def is_worth_it(plan: Plan) -> bool:
    """Whether a Plan is worth running: the rules about that stand here alone.

    One step has to do more than one of PyTorch's operations: a lone one gains nothing. Between
    operations that stay PyTorch's (a GroupNorm after each convolution), a convolution that only
    takes a sum along is not enough: on its own such a bottleneck was slower than eager, since what
    one sum wins is lost in going to and fro. A whole hourglass of them, with its joins, gains
    (docs/models.md).

    A few steps that are PyTorch's but for a small convolution (attention over pixels, over
    channels) were much slower than eager on their own; as a part of a network that is replaced as a
    whole they spare it the cut.
    """
    left = [step for step in plan.steps if isinstance(step, Plain) and step.op not in _LIGHT]
    fused = [step for step in plan.steps if is_fused(step, sums=not left)]
    if not left or len(plan.steps) > 16:
        return bool(fused)
    small: set[int] = set()
    for step in plan.steps:
        is_reduction = isinstance(step, Plain) and step.op in _REDUCTIONS
        if is_reduction or small.issuperset(step.inputs):
            small.add(step.output)
    return any(_is_large(step) for step in fused if step.output not in small)


def _is_large(step: Step) -> bool:
    """Whether there is more to it than the two maps, mean and maximum, of attention over pixels."""
    return not isinstance(step, Conv) or prod(step.conv.channels) >= 16


def is_fused(step: Step, sums: bool = True) -> bool:
    """Whether a step does more than one of PyTorch's operations; with ``sums``, a convolution and a
    sum count. A grouped convolution is PyTorch's, whatever is folded into it."""
    if isinstance(step, Conv):
        around = step.norm_before, step.norm_after, step.relu, step.relu_sum
        return step.conv.groups == 1 and (any(around) or (sums and len(step.inputs) > 1))
    return isinstance(step, (Bottleneck, UpsampleAdd, Remerge))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(module).items()}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every qualified name it goes by."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
