"""Whole networks on the CPU: eager, torch.compile and hgfast on the same input in one run.

    make bench PYTEST_ARGS="-k HG-2 --benchmark-json=hourglass.json"
    python benchmarks/table.py hourglass.json

Each test is one block of calls of one candidate: the first calls are dropped (idle threads of
the runtime before still spin), the rest are timed. The blocks of all candidates alternate, so
that a drift of the machine meets them all; ``table.py`` compares medians over the blocks.
Weights are random: they do not change what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import hgfast
from hgfast.models import hourglass

BLOCKS, DROPPED, TIMED = 4, 3, 8
NETWORKS = {"HG-2": (2, 1), "HG-8": (8, 1)}  # stacks, batch
Candidate = tuple[nn.Module, Tensor]


@functools.cache
def network(name: str, dtype: torch.dtype) -> Candidate:
    stacks, batch = NETWORKS[name]
    torch.manual_seed(0)
    return hourglass(stacks=stacks).eval().to(dtype), torch.randn(batch, 3, 256, 256, dtype=dtype)


def eager(name: str, dtype: torch.dtype) -> Candidate:
    return network(name, dtype)


def channels_last(name: str, dtype: torch.dtype) -> Candidate:
    model, x = network(name, dtype)
    model = hourglass(stacks=NETWORKS[name][0]).eval().to(dtype)
    model.load_state_dict(network(name, dtype)[0].state_dict())
    return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def compiled(name: str, dtype: torch.dtype) -> Candidate:
    torch._inductor.config.freezing = True  # weights become constants: its fastest setting
    model, x = channels_last(name, dtype)
    return torch.compile(model), x  # type: ignore[return-value]


def optimized(name: str, dtype: torch.dtype, precision: str = "highest") -> Candidate:
    model, x = network(name, dtype)
    return hgfast.optimize(model, precision), x


f32, bf16 = torch.float32, torch.bfloat16
CANDIDATES: dict[str, Callable[[str], Candidate]] = {
    "eager float32": lambda name: eager(name, f32),
    "eager float32 channels_last": lambda name: channels_last(name, f32),
    "torch.compile float32": lambda name: compiled(name, f32),
    "hgfast float32 highest": lambda name: optimized(name, f32),
    "hgfast float32 medium": lambda name: optimized(name, f32, "medium"),
    "eager bfloat16 channels_last": lambda name: channels_last(name, bf16),
    "torch.compile bfloat16": lambda name: compiled(name, bf16),
    "hgfast bfloat16": lambda name: optimized(name, bf16),
}


@functools.cache
def candidate(name: str, network_name: str) -> Callable[[], None]:
    model, x = CANDIDATES[name](network_name)
    model(x)  # compile, pack
    return functools.partial(model, x)


@pytest.mark.parametrize(
    ("network_name", "block", "name"),
    [
        pytest.param(network_name, block, name, id=f"{network_name} {name} {block}")
        for network_name in NETWORKS
        for block in range(BLOCKS)
        for name in CANDIDATES
        # HG-8 is HG-2 four times over, and torch.compile takes minutes for it.
        if network_name == "HG-2" or not name.startswith("torch.compile")
    ],
)
def test_hourglass(benchmark: object, network_name: str, block: int, name: str) -> None:
    benchmark.group = network_name  # type: ignore[attr-defined]
    with torch.no_grad():
        run = candidate(name, network_name)
        benchmark.extra_info.update(  # type: ignore[attr-defined]
            network=network_name,
            candidate=name,
            block=block,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            hgfast=hgfast.__version__,
        )
        benchmark.pedantic(run, rounds=TIMED, warmup_rounds=DROPPED)  # type: ignore[attr-defined]
