"""Which executor runs a Plan, by where its weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hgfast.plan import Plan, Step
from hgfast.runtime import cpu, cuda


class Executor(Protocol):
    """A Plan bound to one state of its weights. Immutable, safe to call from several threads."""

    asynchronous: bool  # whether a run is over before its work is, so that a CUDA graph records it
    backend: str  # what runs it and, last, what it multiplies: "cpu avx2 float32", "cpu amx bf16x3"
    dtype: torch.dtype  # of the activations
    features: frozenset[str]  # of evidence.FEATURES, those that a run uses

    def run(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Run on inputs (B, C, H, W); returns the Plan's outputs by value number.

        Raises:
            ValueError: a step cannot take what reaches it; the message names the step.
        """

    def path(self, step: Step) -> str:
        """What runs one step, in a few words."""


def choose(
    plan: Plan, weights: Mapping[str, Tensor], precision: str, as_computed: bool = False
) -> Executor | str:
    """The executor for ``plan`` with these weights, by name; or why there is none, in words.

    ``as_computed`` outputs keep the dtype of the activations and are channels_last; others get
    those of the inputs.

    Raises:
        ValueError: a step's weights do not fit together.
    """
    if not weights:
        return "it has no weights"
    devices = {tensor.device for tensor in weights.values()}
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(devices) > 1:
        return f"its weights are on {' and '.join(sorted(map(str, devices)))}"
    if len(dtypes) > 1:
        return f"its weights mix dtypes ({', '.join(sorted(map(str, dtypes)))})"
    device, dtype = devices.pop(), dtypes.pop()
    if device.type == "cpu":
        return cpu.unsupported(dtype) or cpu.CpuExecutor(plan, weights, precision, as_computed)
    if device.type == "cuda":
        kernels = cuda.kernels_of(device)
        reason = cuda.unsupported(plan, dtype, precision, kernels)
        if reason or isinstance(kernels, str):
            return reason or str(kernels)
        return cuda.CudaExecutor(plan, weights, precision, kernels, as_computed)
    return f"its weights are on {device}; there are kernels for cpu and cuda"
