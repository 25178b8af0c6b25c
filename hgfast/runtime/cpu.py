"""The CPU executor: a Plan, packed once, run by the compiled kernels in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hgfast import _native
from hgfast.plan import Bottleneck, Conv, Plan, Step, output_values
from hgfast.runtime.folding import bottleneck_weights, conv_weights

#: dtype of the arithmetic's operands for a float32 model, by precision. Sums are float32.
#: "high" has no kernel of its own yet and runs as "highest".
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


class CpuExecutor:
    """A Plan bound to one state of its weights. Immutable, safe to call from several threads."""

    asynchronous = False

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
        dtype = next(iter(weights.values())).dtype
        element = element_of(dtype, precision)
        self._outputs = list(dict.fromkeys(output_values(plan.outputs)))
        self._packed = native.CpuPlan(element)
        # Packing is no part of anybody's autograd graph, and inference tensors may be read.
        with torch.inference_mode():
            for step in plan.steps:
                self._pack(step, weights)
        self._packed.finish(list(plan.inputs), self._outputs, as_computed)
        self.backend = f"cpu {self._packed.path} {element}"

    def run(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Run on inputs (B, C, H, W); returns the Plan's outputs by value number.

        Raises:
            ValueError: a step cannot take what reaches it; the message names the step.
        """
        return dict(zip(self._outputs, self._packed.run(inputs), strict=True))

    def path(self, step: Step) -> str:
        """What runs one step: the same for all."""
        return self.backend

    def _pack(self, step: Step, weights: Mapping[str, Tensor]) -> None:
        x, extra = step.inputs[0], step.inputs[1] if len(step.inputs) > 1 else None
        if isinstance(step, Bottleneck):
            self._packed.bottleneck(x, step.output, *bottleneck_weights(step, weights), extra)
        elif isinstance(step, Conv):
            weight, bias, scale, shift = conv_weights(step, weights)
            stride, padding = step.conv.stride, step.conv.padding
            self._packed.conv(
                x, step.output, weight, bias, scale, shift, stride, padding, step.relu, extra
            )
        elif step.kind == "max_pool":
            self._packed.max_pool(x, step.output)
        else:  # upsample_add(low, skip), add(a, b)
            getattr(self._packed, step.kind)(x, extra, step.output)
