"""The CPU executor: a Plan, packed once, run by the compiled kernels in as few calls as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hgfast import _native
from hgfast.plan import (
    Bottleneck,
    Concat,
    Conv,
    Plain,
    Plan,
    Pool,
    Remerge,
    Step,
    UpsampleAdd,
    output_values,
)
from hgfast.runtime import fusions, plain
from hgfast.runtime.folding import (
    bottleneck_weights_unfolded,
    conv_weights,
    conv_weights_unfolded,
    remerge_weights,
)
from hgfast.runtime.fusions import Head

#: What activations of a float32 model are kept in, by precision. Products are of that type too, but
#: for "high", which multiplies what is fastest here and exact enough. Sums are float32.
ELEMENTS = {"highest": "float32", "high": "float32", "medium": "bfloat16"}


def unsupported(dtype: torch.dtype) -> str | None:
    """Why this executor cannot take a model of this dtype, in words; None if it can."""
    if _native.load() is None:
        return _native.reason
    if dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {dtype}; the kernels take torch.float32 and torch.bfloat16"
    return None


def element_of(dtype: torch.dtype, precision: str) -> str:
    """The element type activations are kept in: a bfloat16 model runs in bfloat16."""
    return "bfloat16" if dtype == torch.bfloat16 else ELEMENTS[precision]


#: Channels between the convolutions of a head that is one step: a block of their pixels stays in
#: a core's cache.
MOST_HEAD_CHANNELS = 512


def takes_head(head: Head) -> bool:
    """Whether a kernel takes what follows an hourglass as one."""
    return head.channels[1] <= MOST_HEAD_CHANNELS


def has_kernel(step: Step) -> bool:
    """Whether the compiled kernels take this step; PyTorch runs the others."""
    if isinstance(step, Conv):
        conv = step.conv
        return conv.groups == 1 and not (
            conv.transposed and (conv.dilation != (1, 1) or step.norm_before is not None)
        )
    if isinstance(step, UpsampleAdd):
        return len(step.factors) <= 4
    return not isinstance(step, Plain)


class CpuExecutor:
    """A Plan bound to one state of its weights. Immutable, safe to call from several threads.

    The Plan is cut into runs of steps that have kernels; each is one native call. What lies
    between them is PyTorch's.
    """

    asynchronous = False
    features: frozenset[str] = frozenset()

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        precision: str,
        as_computed: bool = False,
    ) -> None:
        native = _native.load()
        if native is None:
            raise RuntimeError(_native.reason)
        element = element_of(next(iter(weights.values())).dtype, precision)
        high = element == "float32" and precision == "high"
        self._plan = plan
        self._as_computed = as_computed
        self._outputs = list(dict.fromkeys(output_values(plan.outputs)))
        self.dtype = getattr(torch, element)
        self._in_heads: set[int] = set()  # values that heads give, of those in between too
        # Packing is no part of anybody's autograd graph, and inference tensors may be read.
        with torch.inference_mode():
            self._parts = self._cut(plan, weights, native, element, high)
        kernels = native.CpuPlan(element, high=high)
        self.backend = f"cpu {kernels.path} {kernels.products}"

    def run(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Run on inputs (B, C, H, W); returns the Plan's outputs by value number.

        Raises:
            ValueError: a step cannot take what reaches it; the message names the step.
        """
        if self._plan.guards:
            self._plan.check(*(x.shape for x in inputs))
        if len(self._parts) == 1 and isinstance(self._parts[0], _Native):
            return self._parts[0].run(dict(zip(self._plan.inputs, inputs, strict=True)))
        if not all(x.numel() for x in inputs):  # PyTorch's operations differ about empty ones
            raise ValueError("an input is empty")
        dtype, layout = inputs[0].dtype, torch.channels_last
        if inputs[0].is_contiguous():
            layout = torch.contiguous_format
        values = dict(zip(self._plan.inputs, inputs, strict=True))
        with torch.no_grad():
            for part in self._parts:
                values.update(part.run(values))
                for number in part.dead:
                    del values[number]
            if self._as_computed:
                return {number: values[number] for number in self._outputs}
            return {n: plain.converted(values[n], dtype, layout) for n in self._outputs}

    def profile(self, inputs: Sequence[Tensor]) -> list[tuple[str, int, float]]:
        """Run, and tell of each kernel (op, the value it writes first, seconds); in their order.

        Raises:
            ValueError: PyTorch runs some of the Plan's steps, or as in :meth:`run`.
        """
        if self._plan.guards:
            self._plan.check(*(x.shape for x in inputs))
        if len(self._parts) != 1 or not isinstance(self._parts[0], _Native):
            raise ValueError("expected a Plan that is one native call; PyTorch runs a part of it")
        return self._parts[0].profile(dict(zip(self._plan.inputs, inputs, strict=True)))

    def path(self, step: Step) -> str:
        """What runs one step."""
        if step.output in self._in_heads:
            return f"{self.backend} head"
        return self.backend if has_kernel(step) else f"PyTorch {self.dtype}"

    def _cut(
        self, plan: Plan, weights: Mapping[str, Tensor], native: Any, element: str, high: bool
    ) -> list[_Native | _Torch]:
        """The Plan's steps in parts, each with the values that nobody needs behind it."""
        groups: list[list[Step]] = []
        for step in _gathered(plan.steps):
            if groups and has_kernel(step) and has_kernel(groups[-1][-1]):
                groups[-1].append(step)
            else:
                groups.append([step])
        needed = set(self._outputs)
        parts: list[_Native | _Torch] = []
        whole = len(groups) == 1
        arena = native.Arena()  # parts run one after the other
        begin = partial(native.CpuPlan, element, arena, high)
        for group in reversed(groups):
            made = {step.output for step in group}
            read = dict.fromkeys(n for s in group for n in s.inputs if n not in made)
            dead = tuple(number for number in read if number not in needed)
            if not has_kernel(group[0]):
                parts.append(_Torch(group[0], weights, self.dtype, dead))
            else:
                inputs = list(plan.inputs) if whole else list(read)
                outputs = self._outputs if whole else [n for n in sorted(made) if n in needed]
                as_computed = self._as_computed or not whole
                heads = fusions.heads(group, inputs, outputs, takes_head)
                self._in_heads.update(step.output for head in heads for step in head.steps)
                packed = _packed(begin(), group, heads, weights, inputs, outputs, as_computed)
                parts.append(_Native(packed, inputs, outputs, dead))
            needed.update(read)
        return parts[::-1]


class _Native:
    """Steps that are one call of the compiled kernels."""

    def __init__(
        self, packed: Any, inputs: list[int], outputs: list[int], dead: tuple[int, ...]
    ) -> None:
        self._packed, self._inputs, self._outputs, self.dead = packed, inputs, outputs, dead

    def run(self, values: Mapping[int, Tensor]) -> dict[int, Tensor]:
        results = self._packed.run([values[number] for number in self._inputs])
        return dict(zip(self._outputs, results, strict=True))

    def profile(self, values: Mapping[int, Tensor]) -> list[tuple[str, int, float]]:
        rows: list[tuple[str, int, float]] = self._packed.profile(
            [values[number] for number in self._inputs]
        )
        return rows


class _Torch:
    """One step in PyTorch."""

    def __init__(
        self, step: Step, weights: Mapping[str, Tensor], dtype: torch.dtype, dead: tuple[int, ...]
    ) -> None:
        self._step, self._dtype, self.dead = step, dtype, dead
        self._run, _ = plain.bind(step, weights, dtype)

    def run(self, values: Mapping[int, Tensor]) -> dict[int, Tensor]:
        inputs = (
            plain.converted(values[n], self._dtype, torch.channels_last) for n in self._step.inputs
        )
        try:
            return {self._step.output: self._run(*inputs)}
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{self._step.name or self._step.title}: {error}") from error


def _gathered(steps: Sequence[Step]) -> list[Step]:
    """The steps in an order that leaves as few changes between kernels and PyTorch as it can."""
    made = {step.output for step in steps}
    done: set[int] = set()
    waiting, order = list(steps), []
    in_kernels = True

    def is_ready(step: Step) -> bool:
        return all(number in done or number not in made for number in step.inputs)

    while waiting:
        ready = [step for step in waiting if is_ready(step)]
        alike = [step for step in ready if has_kernel(step) == in_kernels]
        if not alike:
            in_kernels = not in_kernels
            continue
        order.append(alike[0])
        done.add(alike[0].output)
        waiting.remove(alike[0])
    return order


def _packed(
    packed: Any,
    steps: Sequence[Step],
    heads: Sequence[Head],
    weights: Mapping[str, Tensor],
    inputs: list[int],
    outputs: list[int],
    as_computed: bool,
) -> Any:
    """The native plan that is begun, with these steps, finished."""
    pooling = fusions.pooling_blocks(steps, outputs)
    pooled = fusions.pooled_blocks(steps, outputs, lambda _: True)
    pools = {y: x for y, x in pooled.items() if x not in pooling}
    head_of = {step.output: head for head in heads for step in head.steps}
    for step in steps:
        x, out = step.inputs[0], step.output
        if out in pools or out in pooling.values():  # of the block behind it, or before it
            continue
        if out in head_of:
            if step is head_of[out].features:
                _pack_head(packed, head_of[out], weights)
            continue
        extra = step.inputs[1] if len(step.inputs) > 1 else None
        if isinstance(step, Bottleneck):
            scale, shift, w1, b1, w2, factor, *rest = bottleneck_weights_unfolded(step, weights)
            relu = not step.preactivated
            source, to = pools.get(x, x), pooling.get(out, out)
            packed.bottleneck(
                *(source, to, scale, shift, w1, b1, w2, *rest, extra, relu),
                pool=x in pools,
                w2_factor=factor,
                pool_y=out in pooling,
            )
        elif isinstance(step, Conv):
            conv, behind = step.conv, (step.relu, extra, step.relu_sum)
            where = conv.stride, conv.padding
            if conv.transposed:
                weight, bias, _, _ = conv_weights(step, weights)
                packed.conv_transpose(x, out, weight, bias, *where, conv.output_padding, *behind)
            else:
                weight, factor, bias, *norm = conv_weights_unfolded(step, weights)
                windows = *where, conv.dilation
                packed.conv(x, out, weight, bias, *norm, *windows, *behind, factor=factor)
        elif isinstance(step, Remerge):
            packed.conv(x, out, *remerge_weights(step, weights), add=extra)
        elif isinstance(step, Pool):
            windows = step.kernel_size, step.stride, step.padding
            packed.pool(x, out, step.mode, *windows, step.ceil_mode, step.count_include_pad)
        elif isinstance(step, UpsampleAdd):
            *lows, skip = step.inputs
            packed.upsample_add(lows, list(step.factors), skip, out, step.relu)
        elif isinstance(step, Concat):
            parts, add = (step.inputs[:-1], step.inputs[-1]) if step.add else (step.inputs, None)
            packed.concat(list(parts), out, add)
        else:
            packed.add(x, extra, out, relu=getattr(step, "relu", False))
    packed.finish(inputs, outputs, as_computed)
    return packed


def _pack_head(packed: Any, head: Head, weights: Mapping[str, Tensor]) -> None:
    heatmaps, merge = head.heatmaps, head.merge
    none = (None, None)
    y, *others = head.reads
    packed.head(
        y,
        heatmaps.output if heatmaps else None,
        merge.output if merge else None,
        *conv_weights(head.features, weights)[:2],
        *(conv_weights(heatmaps, weights)[:2] if heatmaps else none),
        *(remerge_weights(merge, weights) if merge else none),
        *others,
    )
