"""One part of the run: one network, size, batch and number of threads, all candidates in turns."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import limits
from benchmarks.peers.engines import ALTERNATIVES, ENGINES, Made, Outputs, is_ours, versions
from benchmarks.record import Row, cores
from hgfast._timing import sample_alternately
from hgfast.info import collect
from hgfast.models import hourglass

#: (blocks, calls of a block, first calls of each block that do not count), the best first.
FULL: Final = tuple((blocks, 8, 3) for blocks in range(8, 1, -1))
#: For calls that take seconds, beside which what another engine's idle threads take is little.
SHORT: Final = ((3, 4, 1), (2, 4, 1), (2, 3, 1))


@dataclass(frozen=True)
class Part:
    """What one process measures.

    ``candidates`` are names in ENGINES; ``left_out`` says why others are not among them.
    ``curve``: of the cost curves only, where those take part that come near the fastest.
    ``seconds`` are what the calls that are timed may take, about. ``program`` measures the limits.
    """

    stacks: int
    size: int
    batch: int
    threads: int
    candidates: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    features: int = 256
    curve: bool = False
    seconds: float = 30
    program: Path = Path()

    @property
    def name(self) -> str:
        return f"HG-{self.stacks} {self.size}x{self.size} batch {self.batch} threads {self.threads}"


def has_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply in bfloat16."""
    found = collect()["CPU"]["instruction sets found"].split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found)


def network(stacks: int, features: int) -> nn.Module:
    """Random weights, and norms that a wrong folding would get wrong."""
    torch.manual_seed(0)
    model = hourglass(stacks=stacks, features=features).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for shift in (module.running_mean, module.bias):
                shift.data.normal_(0, 0.2)  # type: ignore[union-attr]
            for scale in (module.running_var, module.weight):
                scale.data.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model


def images(batch: int, size: int) -> Tensor:
    """The first images of a larger batch are those of a smaller one."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randn(3, size, size, generator=generator) for _ in range(batch)])


def reference(model: nn.Module, x: Tensor) -> Outputs:
    """The outputs in float64, image by image, with all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    exact = copy.deepcopy(model).double()
    found = [exact(image[None].double()) for image in x]
    torch.set_num_threads(before)
    return [torch.cat(stack) for stack in zip(*found, strict=True)]


def judged(outputs: Outputs, expected: Outputs) -> Row:
    """Errors against float64, the worst of all stacks: relative L2, the largest over the largest
    value, and the share of heatmaps whose maximum is in the same cell.

    Raises:
        ValueError: the shapes are not those expected.
    """
    shapes = [tuple(tensor.shape) for tensor in outputs]
    if shapes != [tuple(tensor.shape) for tensor in expected]:
        raise ValueError(f"outputs of shapes {shapes}")
    pairs = [(a.double(), b) for a, b in zip(outputs, expected, strict=True)]
    agreed = [a.flatten(2).argmax(2) == b.flatten(2).argmax(2) for a, b in pairs]
    return {
        "rel": max(float((a - b).norm() / b.norm()) for a, b in pairs),
        "max": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "argmax": float(torch.cat(agreed).double().mean()),
    }


def fault(name: str, errors: Row) -> str:
    """What is wrong with a result; "" where nothing is. No number is wrong too."""
    wrong = ENGINES[name].wrong
    for which, most in (("rel", wrong), ("max", 10 * wrong)):
        if not errors[which] <= most:
            return f"wrong output: {which} error {errors[which]:.1e}, allowed {most:.0e}"
    return ""


def measure(part: Part) -> Row:
    """The row of a part. Candidates that fail, or whose output is wrong, stand in its "faults"."""
    load = os.getloadavg()[0]
    before = limits.measure(part.program, part.threads)
    with torch.no_grad():
        model, x = network(part.stacks, part.features), images(part.batch, part.size)
        with FlopCounterMode(display=False) as counter:
            model(x[:1])
        expected = reference(model, x)
        torch.set_num_threads(part.threads)
        ready, faults = _prepared(part, model, x, expected)
        once = {name: held["once_ms"] / 1e3 for name, (_, held) in ready.items()}
        (blocks, calls, drop), too_slow = schedule(once, part.seconds)
        kept = {name: made.call for name, (made, _) in ready.items() if name not in too_slow}
        # What torch.compile would do anew in a call that is timed was no fair preparation.
        with torch.compiler.set_stance("fail_on_recompile"):
            times = sample_alternately(kept, blocks, calls)
    spent = round(sum(time for samples in times.values() for b in samples for time in b) / 1e3, 1)
    found = {}
    for name, samples in times.items():
        held = ready[name][1]
        held["ms"] = statistics.median(statistics.median(block[drop:]) for block in samples)
        held["samples"] = [[round(time, 3) for time in block] for block in samples]
        found[name] = held
    return {
        "network": f"HG-{part.stacks}",
        "size": part.size,
        "batch": part.batch,
        "threads": part.threads,
        "features": part.features,
        "gflops": part.batch * counter.get_total_flops() / 1e9,
        "candidates": found,
        "bfloat16 instructions": has_bfloat16(),
        "left_out": {**dict(part.left_out), **too_slow},
        "faults": faults,
        "timing": {"blocks": blocks, "calls": calls, "dropped": drop, "seconds": spent},
        "limits": {"before": before, "after": limits.measure(part.program, part.threads)},
        "load": round(load, 2),
        "engines": versions(list(part.candidates)),
    }


def _prepared(
    part: Part, model: nn.Module, x: Tensor, expected: Outputs
) -> tuple[dict[str, tuple[Made, Row]], dict[str, str]]:
    """Candidates that are right, and what is wrong with the others."""
    ready, faults = {}, {}
    for name in part.candidates:
        try:
            ready[name] = min(
                _tries(name, part, model, x, expected), key=lambda pair: float(pair[1]["once_ms"])
            )
        except Exception as error:  # one engine that fails does not end the part
            faults[name] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            continue
    return ready, faults


def _tries(
    name: str, part: Part, model: nn.Module, x: Tensor, expected: Outputs
) -> Iterator[tuple[Made, Row]]:
    """The ways to run a candidate, each checked and timed roughly."""
    ways = [ENGINES[name].make]
    if name in ALTERNATIVES and part.batch > 1:
        ways.append(ALTERNATIVES[name])
    tried: dict[str, float] = {}
    for make in ways:
        start = time.perf_counter()
        made = make(model, x, part.threads)
        result = made.call()
        prepared = time.perf_counter() - start
        errors = judged(made.read(result), expected)
        if said := fault(name, errors):
            raise ValueError(said)
        once = round(_once(made), 3)
        tried[made.setting] = once
        held: Row = {"group": ENGINES[name].group, "setting": made.setting, **errors}
        held |= {"prepare_seconds": round(prepared, 2), "once_ms": once}
        if len(ways) > 1:
            held["tried_ms"] = tried  # filled as the others are tried
        yield made, held


def _once(made: Made) -> float:
    """Milliseconds of a call: the least of three, or of what fits into a second."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 1000:
        start = time.perf_counter()
        made.call()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def schedule(
    once: Mapping[str, float], seconds: float
) -> tuple[tuple[int, int, int], dict[str, str]]:
    """How often to call what takes ``once`` seconds a call, and who is too slow to take part.

    As many full blocks as fit, at least two; else fewer calls where one takes a second; else
    without the slowest candidate. hgfast and the fastest other of each group stay.
    """
    names = list(once)
    too_slow: dict[str, str] = {}
    while True:
        total = sum(once[name] for name in names)
        # Short blocks do only where calls are long.
        ways = FULL + (SHORT if max((once[name] for name in names), default=0) > 1 else ())
        for way in ways:
            if way[0] * way[1] * total <= seconds:
                return way, too_slow
        spare = [name for name in names if name not in _needed(names, once)]
        if not spare:
            return ways[-1], too_slow
        slowest = max(spare, key=lambda name: once[name])
        names.remove(slowest)
        too_slow[slowest] = f"too slow for the time of this part: {1e3 * once[slowest]:.0f} ms once"


def _needed(names: Sequence[str], once: Mapping[str, float]) -> set[str]:
    others: dict[str, list[str]] = {}
    for name in names:
        if not is_ours(name):
            others.setdefault(ENGINES[name].group, []).append(name)
    fastest = {min(group, key=lambda name: once[name]) for group in others.values()}
    return fastest | set(filter(is_ours, names))


def rates(row: Row, name: str) -> float:
    """GFLOP/s, of the FLOPs that the network's formula has."""
    return float(row["gflops"] / (row["candidates"][name]["ms"] * 1e-3))
