"""The roofline of docs/performance.md: where each way to compute a residual block must lie, and
where it was measured.

    .venv/bin/python benchmarks/roofline.py    # writes docs/roofline.png

FLOP a byte of DRAM come from benchmarks/results/emulated-counts.json, scaled to batch 64, and for
what is not fused from the sizes of the maps. The roofs are what an H200 was seen to multiply and
to copy. A result of `make gpu`, if there is one, adds what was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "roofline.png"
MULTIPLIES, COPIES = 790e12, 4.3e12  # FLOP/s in bfloat16, byte/s: ceilings seen on an H200
BATCH, PIXELS = 64, 64 * 64
CHANNELS, MIDDLE = 256, 128
WEIGHTS = 2 * CHANNELS * MIDDLE + 9 * MIDDLE**2
FLOPS = 2 * BATCH * PIXELS * WEIGHTS


def rungs() -> list[tuple[str, float, float]]:
    """Name, bytes of DRAM, and the least seconds, of a 256/128/256 block at 64x64, batch 64."""
    wide, narrow = (2 * BATCH * PIXELS * channels for channels in (CHANNELS, MIDDLE))
    conv1, conv2 = CHANNELS * MIDDLE / WEIGHTS, 9 * MIDDLE**2 / WEIGHTS

    def least(*kernels: tuple[float, float]) -> tuple[float, float]:
        """Of kernels one after another, each (share of the FLOPs, bytes)."""
        seconds = sum(max(FLOPS * f / MULTIPLIES, b / COPIES) for f, b in kernels)
        return sum(b for _, b in kernels), seconds

    pointwise = [(0.0, 2.0 * n) for n in (wide, wide, narrow, narrow, narrow, narrow)]
    convolutions = [(conv1, wide + narrow), (conv2, 2 * narrow), (conv1, narrow + wide)]
    naive = least(*pointwise, *convolutions, (0.0, 3 * wide))
    folded = least((0.0, 2 * wide), *convolutions[:2], (conv1, narrow + 2 * wide))
    counted = json.loads((RESULTS / "emulated-counts.json").read_text())
    portable, hopper = counted["bottleneck"][0], counted["hopper"][0]
    once = 2 * wide + 2 * WEIGHTS  # x and y, and the weights

    def fused(row: dict[str, Any], of_the_peak: float) -> tuple[float, float]:
        bytes_ = once * row["dram_bytes"] / row["minimum_bytes"]
        redundant = row["flops"] / row["flops_of_formula"]
        return bytes_, max(FLOPS * redundant / MULTIPLIES / of_the_peak, bytes_ / COPIES)

    # mma.sync: shared_bytes a product at 128 a clock, where a product takes one clock.
    limit = min(1.0, 128 / (portable["shared_bytes"] / portable["products"]))
    return [
        ("layer by layer", *naive),
        ("convolutions folded", *folded),
        ("one kernel, mma.sync", *fused(portable, limit)),
        ("one kernel, wgmma", *fused(hopper, 1.0)),
    ]


def measured() -> list[tuple[str, float]]:
    """Name and seconds of what the latest `make gpu` measured of hgfast's kernels for this block,
    if any has: the fused ones, which move the least bytes."""
    files = sorted(RESULTS.glob("nvidia-*.json"), key=lambda file: file.stem[-10:])  # by date
    if not files:
        return []
    return [
        (m["candidate"], m["seconds"]["warm"]["median"])
        for m in json.loads(files[-1].read_text())["measurements"]
        if (m["op"], m["batch"], m["size"]) == ("bottleneck", BATCH, 64)
        and m["candidate"].startswith("hgfast ")
        and m["candidate"].endswith(" bf16 graph")
    ]


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    reach = [10.0, MULTIPLIES / COPIES, 4000.0]
    roof = [min(MULTIPLIES, COPIES * x) / 1e12 for x in reach]
    axes.plot(reach, roof, color="#30638e", linewidth=2)
    axes.annotate("790 TFLOP/s", (1100, 830), color="#30638e")
    axes.annotate("4.3 TB/s", (14, 74), color="#30638e", rotation=41)
    for name, bytes_, seconds in rungs():
        x, y = FLOPS / bytes_, FLOPS / seconds / 1e12
        axes.plot(x, y, "o", markersize=9, markerfacecolor="white", color="#d1495b")
        text = f"{name}: at best {seconds * 1e6:.0f} us"
        axes.annotate(text, (x, y), xytext=(10, -4), textcoords="offset points", fontsize=9)
    once = 2 * 2 * BATCH * PIXELS * CHANNELS + 2 * WEIGHTS
    lowest = 30.0
    for name, seconds in measured():
        place = (FLOPS / once, FLOPS / seconds / 1e12)
        axes.plot(*place, "s", color="#7a9e3f")
        text = f"{name}: {seconds * 1e6:.0f} us"
        axes.annotate(
            text, place, xytext=(-10, -4), textcoords="offset points", ha="right", fontsize=9
        )
        lowest = min(lowest, place[1] / 2)
    state = "measured: squares" if measured() else "predicted, not yet run on a GPU"
    axes.set(
        xscale="log", yscale="log", xlim=(10, 4000), ylim=(lowest, 1300),
        xlabel="FLOP a byte of DRAM", ylabel="TFLOP/s",
        title=f"A residual block 256/128/256, 64x64 pixels, batch 64, bfloat16\n{state}",
    )  # fmt: skip
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(PICTURE, dpi=110)
    for name, bytes_, seconds in rungs():
        print(f"{name}: {bytes_ / 1e6:.0f} MB, at best {seconds * 1e6:.0f} us")
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    draw()
