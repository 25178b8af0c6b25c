"""What the CUDA kernels do, counted by the emulator: products, bytes, barriers. No GPU needed.

    HGFAST_EMULATOR=1 make build
    .venv/bin/python benchmarks/emulated_counts.py    # about a minute

Writes benchmarks/results/emulated-counts.json and prints the tables of docs/performance.md. Counts
are exact; the traffic of DRAM goes through a model of the last-level cache (docs/emulator.md).
There are no times here: those are a GPU's to tell (docs/gpu.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "emulated-counts.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the emulator's module is built into tests

import hgfast_emulator as emulator  # noqa: E402
from op_checks import bottleneck_weights, random_map  # noqa: E402
from stem_checks import head_weights, image_of, stem_weights  # noqa: E402

ORDER = ("scale", "shift", "w1", "b1", "w2", "b2", "w3", "b3", "wp", "bp")
MULTIPROCESSORS = 132  # of an H200; the larger tile is taken where it gives each at least one block


@dataclass(frozen=True)
class Case:
    """A block in -> middle -> out at size x size pixels."""

    size: int
    channels: tuple[int, int, int]
    batch: int = 1
    tile: str = ""  # "8x16" or "4x8"; empty: as an H200 would choose
    low: bool = False
    pool: bool = False

    @property
    def title(self) -> str:
        into, middle, out = self.channels
        fused = ("pool, " if self.pool else "") + f"{into}/{middle}/{out}"
        return f"{fused}{', + low' if self.low else ''}, {self.size}x{self.size} x {self.batch}"


HOURGLASS = (256, 128, 256)
CASES = [
    Case(64, HOURGLASS, tile="8x16"),
    Case(64, HOURGLASS, tile="8x16", low=True),
    Case(64, HOURGLASS),
    Case(32, HOURGLASS, pool=True),
    Case(32, HOURGLASS),
    Case(16, HOURGLASS),
    Case(8, HOURGLASS),
    Case(4, HOURGLASS),
    Case(64, (128, 128, 256), tile="8x16"),
    Case(64, (128, 64, 128), tile="8x16"),
    Case(64, (64, 32, 64), tile="8x16"),
]


def count(case: Case) -> dict[str, Any]:
    """One launch of the bottleneck kernel."""
    into, middle, out = case.channels
    w = bottleneck_weights(into, middle, out)
    block = emulator.CudaBottleneck(torch.bfloat16, *(w.get(name) for name in ORDER))
    size, half = case.size * (1 + case.pool), case.size // 2
    kinds: dict[str, Any] = {"dtype": torch.bfloat16, "layout": "channels_last"}
    x = random_map(case.batch, into, size, size, **kinds)
    low = random_map(case.batch, out, half, half, **kinds) if case.low else None
    emulator.set_device({"8x16": 1, "4x8": 10**6, "": MULTIPROCESSORS}[case.tile])
    counted = modelled(lambda: block.run(x, low, case.pool))
    weights = into * middle + 9 * middle * middle + middle * out + ("wp" in w) * into * out
    pixels = case.batch * case.size**2
    return {"case": case.title, **accounted(counted, 2 * pixels * weights)}


def count_upsample_add(size: int, maps: int) -> dict[str, Any]:
    """One launch of upsample_add on 256 channels, with maps of 1/2, 1/4, 1/8 of the size."""
    kinds: dict[str, Any] = {"dtype": torch.bfloat16, "layout": "channels_last"}
    lows = [random_map(1, 256, size >> i, size >> i, **kinds) for i in range(1, maps + 1)]
    skip = random_map(1, 256, size, size, **kinds)
    counted = modelled(lambda: torch.ops.hgfast_emulated.upsample_add(lows, skip, True))
    return {
        "case": f"{maps} map{'s' * (maps > 1)}, {size}x{size}",
        "kernel": counted["name"],
        "blocks": counted["blocks"],
        "minimum_bytes": counted["minimum_bytes"],
        "dram_bytes": counted["dram_bytes_read"] + counted["dram_bytes_written"],
    }


def count_stem(dtype: torch.dtype, batch: int = 1, size: int = 256) -> dict[str, Any]:
    """One launch of the stem's kernel: 64 channels of images of size x size, normalised."""
    stem = emulator.CudaStem(torch.bfloat16, **stem_weights(64, dtype=dtype))
    image = image_of(batch, size, size, dtype=dtype, layout="channels_last")
    counted = modelled(lambda: stem.run(image))
    pixels = batch * (size // 2) ** 2
    return {
        "case": f"{str(dtype)[6:]}, {size}x{size} x {batch}",
        **accounted(counted, 2 * pixels * 64 * 147),
    }


def count_head(size: int, joints: int, out: int, pixels: int) -> dict[str, Any]:
    """One launch of the head's kernel on 256 channels, in tiles of so many pixels."""
    names = ("w1", "b1", "wh", "bh", "wn", "bn")
    w = head_weights(256, 256, joints, out)
    head = emulator.CudaHead(torch.bfloat16, *(w.get(name) for name in names))
    kinds: dict[str, Any] = {"dtype": torch.bfloat16, "layout": "channels_last"}
    y, x = (random_map(1, 256, size, size, seed=seed, **kinds) for seed in (1, 2))
    emulator.set_device({128: 1, 32: 10**6}[pixels])
    counted = modelled(lambda: head.run(y, x if out else None))
    wanted = " + ".join(["heatmaps"] * bool(joints) + ["next"] * bool(out))
    return {
        "case": f"{wanted}, {size}x{size}",
        **accounted(counted, 2 * size * size * 256 * (256 + joints + out)),
    }


def modelled(call: Callable[[], Any]) -> dict[str, Any]:
    """What a launch did, with a model of the memory."""
    emulator.model_memory(True)
    call()
    emulator.model_memory(False)
    counted: dict[str, Any] = emulator.counters()
    return counted


def accounted(counted: dict[str, Any], flops_of_formula: int) -> dict[str, Any]:
    """A row of the tables."""
    return {
        "kernel": counted["name"],
        "blocks": counted["blocks"],
        "flops": counted["flops"],
        "flops_of_formula": flops_of_formula,
        "minimum_bytes": counted["minimum_bytes"],
        "dram_bytes": counted["dram_bytes_read"] + counted["dram_bytes_written"],
        "copied_bytes": counted["async_bytes"],  # into shared memory
        "products": counted["multiply_adds"],
        "shared_bytes": counted["shared_bytes_loaded"]
        + counted["shared_bytes_stored"]
        + counted["async_bytes"]
        + 512 * counted["load_matrices"],
        "bank_conflicts": counted["matrix_conflicts"],
        "barriers_per_block": counted["block_barriers"] // counted["blocks"],
    }


def count_latency(size: int, batch: int = 1) -> dict[str, Any]:
    """One launch of the kernel over clusters, 256/128/256."""
    w = bottleneck_weights(*HOURGLASS)
    block = emulator.CudaLatencyBottleneck(torch.bfloat16, *(w.get(name) for name in ORDER))
    x = random_map(batch, 256, size, size, dtype=torch.bfloat16, layout="channels_last")
    emulator.model_memory(True)
    block.run(x)
    emulator.model_memory(False)
    counted = emulator.counters()
    blocks = counted["blocks"]
    weights = sum(w[name].numel() for name in ("w1", "w2", "w3"))
    tiles = batch * (-(-size // 8)) ** 2
    return {
        "case": f"{size}x{size} x {batch}",
        "kernel": counted["name"],
        "blocks": blocks,
        "cluster": blocks // tiles,
        "flops": counted["flops"],
        "flops_of_formula": 2 * batch * size**2 * weights,
        "minimum_bytes": counted["minimum_bytes"],
        "dram_bytes": counted["dram_bytes_read"] + counted["dram_bytes_written"],
        "l2_bytes": counted["global_bytes_loaded"],
        "block_weights": counted["bulk_bytes"] // blocks,  # bytes, with biases, scale and shift
        "block_l2_bytes": counted["global_bytes_loaded"] // blocks,
        "block_remote_bytes": counted["remote_bytes"] // blocks,
        "block_products": counted["multiply_adds"] // blocks,
        "block_shared_bytes": shared_bytes(counted) // blocks,
        "bank_conflicts": counted["matrix_conflicts"],
    }


def count_hopper(size: int, batch: int = 1, behind: bool = False) -> dict[str, Any]:
    """One launch of the kernel on Hopper's warpgroups, 256/128/256; ``behind``: with an upsampled
    sum, and the result's maximum beside it."""
    w = bottleneck_weights(*HOURGLASS)
    block = emulator.CudaHopperBottleneck(torch.bfloat16, *(w.get(name) for name in ORDER))
    kinds: dict[str, Any] = {"dtype": torch.bfloat16, "layout": "channels_last"}
    x = random_map(batch, 256, size, size, **kinds)
    low = random_map(batch, 256, size // 2, size // 2, **kinds) if behind else None
    counted = modelled(lambda: block.run(x, low, behind))
    weights = sum(w[name].numel() for name in ("w1", "w2", "w3"))
    tiles = batch * (-(-size // 16)) ** 2
    products = counted["flops"] / (2 * 64 * 128 * 16)  # of 64 x 128 x 16, 64 clocks each
    return {
        "case": f"{size}x{size} x {batch}" + (", + low, pooled" if behind else ""),
        "kernel": counted["name"],
        "blocks": counted["blocks"],
        "flops": counted["flops"],
        "flops_of_formula": 2 * batch * size**2 * weights,
        "minimum_bytes": counted["minimum_bytes"],
        "dram_bytes": counted["dram_bytes_read"] + counted["dram_bytes_written"],
        # Of a tile: what the copy engine brings, weights for both blocks of a cluster at once.
        "tile_l2_bytes": (counted["bulk_bytes"] // 2 + counted["tile_bytes"]) // tiles,
        "tile_stored_bytes": counted["stored_tile_bytes"] // tiles,
        "operand_bytes_per_clock": counted["operand_bytes"] / (64 * products),
        "tile_clocks": 64 * products / tiles,
        "bank_conflicts": counted["matrix_conflicts"],
    }


def hopper_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| map | FLOPs / formula | DRAM bytes / minimum | FLOP / DRAM byte | KB into a tile "
        "| KB out of it | clocks of products a tile | bytes of operands a clock |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['flops'] / row['flops_of_formula']:.3f} "
            f"| {row['dram_bytes'] / row['minimum_bytes']:.3f} "
            f"| {row['flops_of_formula'] / row['dram_bytes']:.0f} "
            f"| {row['tile_l2_bytes'] / 1e3:.0f} | {row['tile_stored_bytes'] / 1e3:.0f} "
            f"| {row['tile_clocks']:.0f} | {row['operand_bytes_per_clock']:.0f} |"
        )
    return "\n".join(lines)


def count_subtree() -> dict[str, Any]:
    """Six 256/128/256 blocks in one launch: what lies below 16x16 in an hourglass of depth 4."""
    steps = [(-1, True, -1), (0, True, -1), (1, False, -1), (2, False, -1), (0, False, 3)]
    steps.append((4, False, -1))
    weights = [bottleneck_weights(*HOURGLASS, seed=i) for i in range(len(steps))]
    blocks = [
        emulator.CudaLatencyBottleneck(torch.bfloat16, *(w.get(name) for name in ORDER))
        for w in weights
    ]
    x = random_map(1, 256, 16, 16, dtype=torch.bfloat16, layout="channels_last")
    emulator.model_memory(True)
    emulator.CudaLatencySubtree(blocks, steps).run(x)
    emulator.model_memory(False)
    counted = emulator.counters()
    return {
        "case": "six blocks below 16x16",
        "kernel": counted["name"],
        "blocks": counted["blocks"],
        "minimum_bytes": counted["minimum_bytes"],
        "dram_bytes": counted["dram_bytes_read"] + counted["dram_bytes_written"],
        "l2_bytes": counted["global_bytes_loaded"],
        "block_weights": counted["bulk_bytes"] // counted["blocks"],
        "block_remote_bytes": counted["remote_bytes"] // counted["blocks"],
        "block_products": counted["multiply_adds"] // counted["blocks"],
        "block_shared_bytes": shared_bytes(counted) // counted["blocks"],
        "shared_memory": counted["shared_bytes"],
    }


def shared_bytes(counted: dict[str, Any]) -> int:
    """What all blocks over clusters read and write of shared memory."""
    return int(
        counted["shared_bytes_loaded"]
        + counted["shared_bytes_stored"]
        + counted["bulk_bytes"]
        + counted["remote_bytes"]
        + 512 * counted["load_matrices"]
    )


def latency_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| map | blocks a tile | blocks | FLOPs / formula | DRAM bytes / minimum | MB out of L2 "
        "| KB of weights a block | KB out of L2 a block | KB to other blocks | products a block "
        "| KB of shared memory a block |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['cluster']} | {row['blocks']} "
            f"| {row['flops'] / row['flops_of_formula']:.2f} "
            f"| {row['dram_bytes'] / row['minimum_bytes']:.3f} | {row['l2_bytes'] / 1e6:.1f} "
            f"| {row['block_weights'] / 1e3:.0f} | {row['block_l2_bytes'] / 1e3:.0f} "
            f"| {row['block_remote_bytes'] / 1e3:.0f} | {row['block_products']} "
            f"| {row['block_shared_bytes'] / 1e3:.0f} |"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], first: str = "block") -> str:
    """The rows as docs/performance.md shows them."""
    lines = [
        f"| {first} | variant | blocks | FLOPs / formula | DRAM bytes / minimum | FLOP / DRAM byte "
        "| bytes copied / kFLOP | shared bytes / product |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['kernel'].split(', ', 1)[1].rstrip('>')} | {row['blocks']} "
            f"| {row['flops'] / row['flops_of_formula']:.3f} "
            f"| {row['dram_bytes'] / row['minimum_bytes']:.3f} "
            f"| {row['flops_of_formula'] / row['dram_bytes']:.0f} "
            f"| {1000 * row['copied_bytes'] / row['flops']:.1f} "
            f"| {row['shared_bytes'] / row['products']:.0f} |"
        )
    return "\n".join(lines)


def joins_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| sum | blocks | DRAM bytes / minimum |", "|---|---:|---:|"]
    for row in rows:
        ratio = row["dram_bytes"] / row["minimum_bytes"]
        lines.append(f"| {row['case']} | {row['blocks']} | {ratio:.3f} |")
    return "\n".join(lines)


def main() -> None:
    blocks = [count(case) for case in CASES]
    joins = [count_upsample_add(size, maps) for size, maps in ((64, 1), (32, 1), (64, 3))]
    emulator.set_device(MULTIPROCESSORS)
    stems = [count_stem(dtype) for dtype in (torch.uint8, torch.bfloat16, torch.float32)]
    stems.append(count_stem(torch.float32, batch=8))
    heads = [
        count_head(64, joints, out, pixels)
        for joints, out, pixels in ((17, 256, 128), (0, 256, 128), (17, 0, 128), (17, 256, 32))
    ]
    emulator.set_device(MULTIPROCESSORS)
    clusters = [count_latency(size) for size in (64, 32, 16, 8, 4)]
    warpgroups = [count_hopper(64), count_hopper(64, behind=True), count_hopper(32)]
    result = {
        "bottleneck": blocks,
        "upsample_add": joins,
        "stem": stems,
        "head": heads,
        "latency": clusters,
        "hopper": warpgroups,
        "subtree": [count_subtree()],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(
        table(blocks),
        joins_table(joins),
        table(stems, "image"),
        table(heads, "wanted"),
        latency_table(clusters),
        hopper_table(warpgroups),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
