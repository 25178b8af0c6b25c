"""What the tests on a CUDA device share.

HGFAST_GPU_REQUIRED=1   no device, or no CUDA kernels, is a failure (`make gpu` sets it)
HGFAST_GPU_REHEARSAL=1  the same tests on the CPU's ops, smaller: the tests' own code is tried out.
                        What only the GPU's kernels can do runs in the emulated ones (`kernels`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from op_checks import Weights, native, upsample_add_reference
from torch import Tensor, nn

from hgfast import _native, ops
from hgfast.models import hourglass

REQUIRED = os.environ.get("HGFAST_GPU_REQUIRED") == "1"
REHEARSAL = os.environ.get("HGFAST_GPU_REHEARSAL") == "1"

DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
#: What the kernels compute in. The CPU's ops know no float16.
DTYPES = [torch.bfloat16] if REHEARSAL else [torch.bfloat16, torch.float16]
#: Absolute slack, where eager happens to be exact: about a rounding of a value near one.
SLACK = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _emulator() -> Any:
    """The kernels on a model of the GPU, which take CPU tensors; None where they are not built."""
    try:
        return importlib.import_module("hgfast_emulator")
    except ImportError:
        return None


#: The module of csrc/cuda_python.cpp, and the ops that end in its kernels. A rehearsal has the
#: emulated ones, so that what is asked of them here is what they can be asked.
kernels: Any = _emulator() if REHEARSAL else native
kernel_ops: Any = torch.ops.hgfast_emulated if REHEARSAL else ops
needs_kernels = pytest.mark.skipif(
    kernels is None, reason="a rehearsal needs the emulator's module for this: make build"
)
#: What the kernels compute in, also in a rehearsal.
KERNEL_DTYPES = [torch.bfloat16, torch.float16]


def some(full: int, rehearsed: int) -> int:
    """How often, or how much: on a device, and in a rehearsal."""
    return rehearsed if REHEARSAL else full


def why_not() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if native is None:
        return str(_native.reason)
    if REHEARSAL:
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA device; on a machine with one: make gpu"
    state = native.build_info()["cuda"]
    if state != "linked":
        return f"hgfast's CUDA kernels are not in this build: {state or 'no device code'}"
    return None


def require_device() -> None:
    """Skip the test module that calls this where the kernels cannot run."""
    reason = why_not()
    if reason is not None and REQUIRED:
        raise RuntimeError(reason)
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)


def synchronise() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def multiprocessors() -> int:
    return 2 if REHEARSAL else torch.cuda.get_device_properties(DEVICE).multi_processor_count


def shared_limit() -> int:
    """Bytes of shared memory that a block may have."""
    if REHEARSAL:
        return 227 * 1024
    limit: int = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    return limit


def obstacle(channels: int, middle: int, out: int, project: bool) -> str:
    """Why this device takes no such block, in words; "" if it does. On cards with less shared
    memory that is so for the widest."""
    if kernels is None:
        return ""
    reason: str = kernels.CudaBottleneck.obstacle(DEVICE, channels, middle, out, project)
    return reason


def moved(weights: Weights) -> Weights:
    return {name: t.to(DEVICE) for name, t in weights.items()}


def map_of(*shape: int, dtype: torch.dtype, seed: int = 1, channels_last: bool = True) -> Tensor:
    """A random map on the device; the same values for the same shape and seed."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Leave NaNs in the memory that the next tensor of this size will probably get, so that an
    element that a kernel forgets to write is seen."""
    torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def small_network() -> nn.Module:
    """A hourglass in miniature, every block of which the kernels take; inputs (B, 3, 16n, 16m)."""
    torch.manual_seed(1)
    model = hourglass(stacks=2, features=64, depth=2, joints=5)
    return randomise(model).eval().to(DEVICE)


def block_reference(
    x: Tensor, w: Weights, low: Tensor | None = None, *, pool: bool = False, relu: bool = False
) -> Tensor:
    """A residual block with everything that the kernel can do on the way (kernels.h)."""
    x = torch.max_pool2d(x, 2) if pool else x
    t = x
    if "scale" in w:
        t = torch.relu(x * w["scale"][:, None, None] + w["shift"][:, None, None])
    t = torch.relu(F.conv2d(t, w["w1"], w["b1"]))
    t = torch.relu(F.conv2d(t, w["w2"], w["b2"], padding=1))
    y = F.conv2d(t, w["w3"], w["b3"]) + (F.conv2d(x, w["wp"], w["bp"]) if "wp" in w else x)
    y = torch.relu(y) if relu else y
    return y if low is None else upsample_add_reference(low, y)


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Whether two 16-bit tensors agree in every bit, as a tensor: nothing waits for the device."""
    return (a.view(torch.int16) == b.view(torch.int16)).all()


def assert_half(out: Tensor, eager: Tensor, reference: Tensor) -> None:
    """The error is at most twice that of eager in the same dtype, at the worst place and in the
    mean; ``reference`` is float64."""
    assert out.dtype == eager.dtype
    assert reference.dtype == torch.float64
    assert out.shape == reference.shape
    if out.numel() == 0:
        return
    assert torch.isfinite(out).all(), f"{int((~torch.isfinite(out)).sum())} values are not finite"
    slack = SLACK[out.dtype]
    ours = (out.double().to(reference.device) - reference).abs()
    theirs = (eager.double().to(reference.device) - reference).abs()
    worst, allowed = float(ours.max()), 2 * float(theirs.max()) + slack
    assert worst <= allowed, f"largest error {worst:.3e}, allowed {allowed:.3e}"
    mean, allowed = float(ours.mean()), 2 * float(theirs.mean()) + slack / 10
    assert mean <= allowed, f"mean error {mean:.3e}, allowed {allowed:.3e}"


def captured(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of ``call``: what replays it, and its output.

    PyTorch refuses whatever would wait for the device or allocate behind its back meanwhile. In a
    rehearsal there is no graph: a replay calls again, into the same output.
    """
    if REHEARSAL:
        output = call().clone()

        def again() -> None:
            output.copy_(call())

        return again, output
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output
