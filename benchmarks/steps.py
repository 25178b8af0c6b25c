"""Where the time of a network goes on this CPU: its steps, by op and size of map.

    make build
    .venv/bin/python -m benchmarks.steps --stacks 2 --precision medium --threads 1

Each kernel's time is the median over calls, until all threads were done with it. Numbers of two
machines, or of two minutes on a shared one, are not to be compared: rows of one run are.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.peers.measure import images, network
from hgfast.plan import Bottleneck, Conv, Plan, output_values
from hgfast.recognition import recognise, tensors_of
from hgfast.runtime import fusions
from hgfast.runtime.cpu import CpuExecutor, takes_head

FEATURES = 256


@dataclass
class Row:
    """Kernels of one kind: how many, what they multiply, and their seconds in a call."""

    count: int = 0
    flops: int = 0
    seconds: float = 0.0


def steps_of(plan: Plan) -> dict[int, list[int]]:
    """By the value that a kernel writes first, the outputs of all steps that it stands for."""
    outputs = output_values(plan.outputs)
    heads = fusions.heads(plan.steps, plan.inputs, outputs, takes_head)
    found = {step.output: [step.output] for step in plan.steps}
    for block, maximum in fusions.pooling_blocks(plan.steps, outputs).items():
        found[maximum] = [block]
    for head in heads:
        outputs = [step.output for step in head.steps]
        first = head.heatmaps or head.merge
        assert first
        found[first.output] = outputs
    return found


def title(plan: Plan, op: str, outputs: list[int], shapes: dict[int, tuple[int, ...]]) -> str:
    """As in "bottleneck 256/128/256 at 64x64"; of the first step of those that a kernel is."""
    step = next((step for step in plan.steps if step.output in outputs), None)
    if step is None:
        return op
    channels = ""
    if isinstance(step, Bottleneck):
        convs = [step.convs[0].channels[0], *(conv.channels[1] for conv in step.convs)]
        channels = f" {convs[0]}/{convs[1]}/{convs[3]}" + (" + low" if step.inputs[1:] else "")
    elif isinstance(step, Conv) and op == "conv":
        size = "x".join(map(str, step.conv.kernel_size))
        channels = f" {size} {step.conv.channels[0]}/{step.conv.channels[1]}"
    return f"{op}{channels} at {'x'.join(map(str, shapes[step.output][2:]))}"


def measured(
    stacks: int, precision: str, batch: int, size: int, calls: int
) -> tuple[dict[str, Row], str]:
    """The rows of one network, in the order in which they are first met, and what ran."""
    model, x = network(stacks, FEATURES), images(batch, size)
    plan = recognise(model)
    weights = {name: tensors_of(model)[name] for name in plan.weights}
    executor = CpuExecutor(plan, weights, precision)
    with torch.inference_mode():
        samples = [executor.profile([x]) for _ in range(calls + 3)][3:]
    shapes = plan.shapes(x.shape)
    flops = {s.output: s.flops(*(shapes[n] for n in s.inputs)) for s in plan.steps}
    stands_for = steps_of(plan)
    rows: dict[str, Row] = defaultdict(Row)
    for kernel in zip(*samples, strict=True):
        op, value, _ = kernel[0]
        outputs = stands_for.get(value, [])
        row = rows[title(plan, op, outputs, shapes)]
        row.count += 1
        row.flops += sum(flops[output] for output in outputs)
        row.seconds += statistics.median(seconds for _, _, seconds in kernel)
    return rows, executor.backend


def table(rows: dict[str, Row]) -> list[str]:
    """In Markdown, the longest first."""
    whole = sum(row.seconds for row in rows.values())
    flops = sum(row.flops for row in rows.values())
    lines = [
        "| kernels | number | us | of the time | of the FLOPs | GFLOP/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1].seconds):
        lines.append(
            f"| {name} | {row.count} | {row.seconds * 1e6:.0f} | {row.seconds / whole:.1%} "
            f"| {row.flops / flops:.1%} | {row.flops / row.seconds / 1e9:.0f} |"
        )
    lines.append(f"| all | | {whole * 1e6:.0f} | | | {flops / whole / 1e9:.0f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of one network."""
    parser = argparse.ArgumentParser(prog="benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--stacks", type=int, default=2, help="hourglasses (2)")
    precisions = ["highest", "high", "medium"]
    parser.add_argument("--precision", default="medium", choices=precisions, help="(medium)")
    parser.add_argument("--batch", type=int, default=1, help="images (1)")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side (256)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--calls", type=int, default=40, help="calls that count (40)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rows, backend = measured(given.stacks, given.precision, given.batch, given.size, given.calls)
    print(f"HG-{given.stacks}, {given.size}x{given.size}, batch {given.batch}, {backend}, "
          f"threads: {given.threads}\n")  # fmt: skip
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
