"""The plots of docs/performance.md: time by batch and rate against the limit; the cost curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.peers import limits
from benchmarks.peers.engines import ENGINES, is_ours
from benchmarks.peers.measure import rates
from benchmarks.peers.pages import BATCHES, CURVES, ceiling, has, milliseconds
from benchmarks.record import Row

#: Colour of each candidate; bfloat16 is dashed and has open markers.
COLOURS: Final = {
    "eager": "#93a8bb",
    "eager channels_last": "#30638e",
    "torch.compile": "#edae49",
    "ONNX Runtime": "#7a9e3f",
    "OpenVINO": "#5b4b8a",
    "hgfast highest": "#d1495b",
    "hgfast high": "#8c1c2f",
    "eager bfloat16": "#30638e",
    "torch.compile bfloat16": "#edae49",
    "OpenVINO bfloat16": "#5b4b8a",
    "hgfast medium": "#e58c97",
    "hgfast bfloat16": "#d1495b",
}
ROOF: Final = "#555555"
CEILINGS: Final = {
    "float32": "float32 multiply-adds",
    "avx512_bf16": "AVX-512 bfloat16",
    "amx_bf16": "AMX bfloat16",
}

Lines = dict[str, list[tuple[float, float]]]


def draw(results: Row, folder: Path) -> list[Path]:
    """Write the PNGs that there are rows for; returns what was written."""
    rows = results["rows"]
    written = []
    networks = [row for row in rows if row["network"] == "HG-2" and row["size"] == _usual(rows)]
    machine = results["machine"]["processor"]
    if networks:
        written.append(_draw_batches(networks, machine, folder / BATCHES))
    single = [row for row in rows if row["batch"] == 1]
    most = max((row["threads"] for row in single), default=1)
    single = [row for row in single if row["threads"] == most]
    sizes = [row for row in single if row["network"] == "HG-2"]
    stacks = [row for row in single if row["size"] == _usual(rows)]
    if len(sizes) > 1 or len(stacks) > 1:
        written.append(_draw_curves(sizes, stacks, machine, folder / CURVES))
    return written


def _usual(rows: Sequence[Row]) -> int:
    """The size that most rows have: 256, but for the tests."""
    sizes: list[int] = [row["size"] for row in rows]
    return max(sizes, key=sizes.count)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    _pyplot().close(figure)
    part.replace(path)
    return path


# --- By batch ---


def _draw_batches(rows: Sequence[Row], machine: str, path: Path) -> Path:
    """A line of panels for each number of threads: milliseconds an image, and rates."""
    counts = sorted({row["threads"] for row in rows}, reverse=True)
    figure, grid = _pyplot().subplots(
        len(counts), 2, figsize=(13, 4.6 * len(counts)), layout="constrained", squeeze=False
    )
    figure.suptitle(f"HG-2, {rows[0]['size']}x{rows[0]['size']}, on {machine}", fontsize=13)
    for count, (left, right) in zip(counts, grid, strict=True):
        held = sorted((row for row in rows if row["threads"] == count), key=lambda r: r["batch"])
        threads = "1 thread" if count == 1 else f"{count} threads"
        _time_by_batch(left, held, threads)
        _rates(right, held, threads)
    return _save(figure, path)


def _time_by_batch(axes: Any, rows: Sequence[Row], threads: str) -> None:
    batches = [row["batch"] for row in rows]
    lines: Lines = {}
    for place, row in enumerate(rows):
        for name, held in row["candidates"].items():
            lines.setdefault(name, []).append((place, held["ms"] / row["batch"]))
    axes.set_title(f"Milliseconds an image, {threads} (lower is better)", fontsize=11)
    # Who was measured at one batch only is no line; the panel beside has it.
    longest = max(len(points) for points in lines.values())
    lines = {name: line for name, line in lines.items() if len(line) > 1 or longest == 1}
    _plot(axes, lines)
    axes.set_yscale("log")
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_xlim(-0.15, max(len(batches) - 1, 0.4) * 1.5 + 0.15)
    _plain_ticks(axes.yaxis)
    axes.grid(True, axis="y", which="both", alpha=0.2)
    _label_ends(axes, lines)


def _rates(axes: Any, rows: Sequence[Row], threads: str) -> None:
    """A line for each candidate, a dot for each batch, and the measured ceilings."""
    names = [name for name in ENGINES if any(has(row, name) for row in rows)]
    axes.set_title(f"TFLOP/s by batch, {threads}, and the measured limits", fontsize=11)
    most = 0.0
    for place, name in enumerate(names):
        points = [(row["batch"], rates(row, name) / 1e3) for row in rows if has(row, name)]
        colour, fastest = COLOURS[name], max(rate for _, rate in points)
        axes.plot(
            [rate for _, rate in points], [place] * len(points), color=colour, lw=1, alpha=0.5
        )
        for batch, rate in points:
            size = 5 + 2 * [row["batch"] for row in rows].index(batch)
            face = "white" if ENGINES[name].bfloat16 else colour
            axes.plot(
                rate, place, "o", markersize=size, color=colour, markerfacecolor=face, alpha=0.9
            )
        most = max(most, fastest)
        best = max(rates(row, name) / ceiling(row, name)[1] for row in rows if has(row, name))
        axes.annotate(
            f"{100 * best:.0f} %", (fastest, place), xytext=(9, 0),
            textcoords="offset points", fontsize=8.5, va="center", color=colour, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    found = limits.highest(*(row["limits"][when] for row in rows for when in ("before", "after")))
    if "amx_bf16" in found:
        found.pop("avx512_bf16", None)  # nobody's limit there
    for kind, limit in found.items():
        axes.axvline(limit / 1e3, color=ROOF, linewidth=1.5, linestyle=(0, (4, 2)), zorder=1)
        axes.annotate(
            f"{CEILINGS[kind]}: {limit / 1e3:.2g}", (limit / 1e3, len(names) - 0.5),
            xytext=(-3, 0), textcoords="offset points", fontsize=8.5, color=ROOF,
            ha="right", va="bottom", rotation=90,
        )  # fmt: skip
        most = max(most, limit / 1e3)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if is_ours(name) else "normal")
    axes.set_ylim(len(names) - 0.4, -1.0)
    if most > 4 * found.get("float32", most) / 1e3:  # two kinds of units, far apart
        axes.set_xscale("log")
        axes.set_xlim(right=most * 1.1)
        _plain_ticks(axes.xaxis)
    else:
        axes.set_xlim(0, most * 1.04)
    axes.grid(True, axis="x", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    batches = ", ".join(str(row["batch"]) for row in rows)
    axes.set_xlabel(
        f"larger dots: larger batches ({batches}); percent: of the limit of this arithmetic",
        fontsize=9,
    )


# --- Cost curves ---


def _draw_curves(sizes: Sequence[Row], stacks: Sequence[Row], machine: str, path: Path) -> Path:
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(13, 5), layout="constrained")
    row = (*sizes, *stacks)[0]
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    figure.suptitle(f"What an image costs: batch 1, {threads}, {machine}", fontsize=13)
    _curve(left, sizes, lambda row: row["size"])
    left.set(xscale="log", yscale="log", xlabel="input, pixels a side")
    left.set_title("HG-2 by input size, milliseconds (both logarithmic)", fontsize=11)
    places = sorted({row["size"] for row in sizes})
    left.set_xticks(places, places, fontsize=9)
    left.minorticks_off()
    if len(places) > 1:
        left.set_xlim(places[0] / 1.1, places[-1] * (places[-1] / places[0]) ** 0.35)
    _plain_ticks(left.yaxis)
    _label_ends(left, _lines(sizes, lambda row: row["size"]))
    _curve(right, stacks, lambda row: int(row["network"][3:]))
    usual = f"{stacks[0]['size']}x{stacks[0]['size']}" if stacks else ""
    right.set_title(f"By number of stacks, {usual}, milliseconds", fontsize=11)
    counts = sorted({int(row["network"][3:]) for row in stacks})
    right.set(xlabel="stacks", ylim=(0, None))
    right.set_xticks(counts, counts)
    if len(counts) > 1:
        right.set_xlim(counts[0] - 0.3, counts[-1] + 0.5 * (counts[-1] - counts[0]))
    _label_ends(right, _lines(stacks, lambda row: int(row["network"][3:])))
    return _save(figure, path)


def _lines(rows: Sequence[Row], place: Callable[[Row], float]) -> Lines:
    """Of candidates that have a point at every place: who was measured at one only is no curve."""
    found: Lines = {}
    for row in sorted(rows, key=place):
        for name, held in row["candidates"].items():
            found.setdefault(name, []).append((place(row), held["ms"]))
    return {name: line for name, line in found.items() if len(line) == len(rows)}


def _curve(axes: Any, rows: Sequence[Row], place: Callable[[Row], float]) -> None:
    _plot(axes, _lines(rows, place))
    axes.grid(True, alpha=0.2)


# --- Lines that are labelled where they end ---


def _plot(axes: Any, lines: Lines) -> None:
    for name, points in lines.items():
        half = ENGINES[name].bfloat16
        axes.plot(
            *zip(*points, strict=True), marker="o", markersize=5, color=COLOURS[name],
            linestyle=(0, (4, 2)) if half else "-", linewidth=2.4 if is_ours(name) else 1.5,
            markerfacecolor="white" if half else COLOURS[name], zorder=3 if is_ours(name) else 2,
        )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 15 * low else (1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_ends(axes: Any, lines: Lines) -> None:
    """A name at the end of each line, pushed apart where they would overlap."""
    figure = axes.figure
    figure.canvas.draw()  # settles the layout, and with it the pixels
    height = 11.5 * figure.dpi / 72  # of a label
    ends = {name: axes.transData.transform(points[-1]) for name, points in lines.items()}
    right = max((float(x) for x, _ in ends.values()), default=0.0)
    box = axes.get_window_extent()
    wanted = [(float(y), name) for name, (_, y) in ends.items()]
    places = spread(wanted, height, box.y0 + height / 2, box.y1 - height / 2)
    back = axes.transData.inverted()
    for name, y in places.items():
        end = lines[name][-1]
        axes.annotate(
            f"{name}  {milliseconds(end[1])} ms", end, xytext=back.transform((right + 14, y)),
            textcoords="data", fontsize=9, va="center", color=COLOURS[name],
            fontweight="bold" if is_ours(name) else "normal",
            arrowprops={"arrowstyle": "-", "color": COLOURS[name], "alpha": 0.35, "lw": 0.8},
        )  # fmt: skip


def spread(
    wanted: Sequence[tuple[float, str]], height: float, low: float, high: float
) -> dict[str, float]:
    """Heights at least ``height`` apart, in the order wanted, as near as two sweeps bring them."""
    places: list[tuple[float, str]] = []
    floor = low
    for y, name in sorted(wanted):
        places.append((max(y, floor), name))
        floor = places[-1][0] + height
    ceiling = high
    found = {}
    for y, name in reversed(places):
        found[name] = min(y, ceiling)
        ceiling = found[name] - height
    return found
