"""The rows as Markdown: all of them in docs/performance.md, one network's ratios in README.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.peers import limits
from benchmarks.peers.engines import ENGINES, is_ours
from benchmarks.peers.measure import rates
from benchmarks.record import ROOT, Row, facts, replace_between

PAGE: Final = ROOT / "docs" / "performance.md"
README: Final = ROOT / "README.md"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
NOT_YET: Final = "Not yet measured on this version: `make bench-peers` does."
BATCHES, CURVES = "peers.png", "peers-curves.png"  # the plots, beside docs/performance.md
GROUPS: Final = ("float32", "bfloat16")


def key(row: Row) -> tuple[int, int, int, int]:
    return int(row["network"][3:]), row["size"], row["batch"], row["threads"]


def order(row: Row) -> tuple[Any, ...]:
    """By network and threads; the sizes of the curves behind 256."""
    stacks, size, batch, threads = key(row)
    return size != 256, stacks != 2, stacks, -threads, size, batch


def title(row: Row) -> str:
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return f"{row['network']}, {row['size']}x{row['size']}, batch {row['batch']}, {threads}"


def members(row: Row, group: str, ours: bool | None = None) -> dict[str, float]:
    """Milliseconds of the candidates of a group; only hgfast's, or only the others'."""
    return {
        name: row["candidates"][name]["ms"]
        for name in ENGINES
        if name in row["candidates"]
        and ENGINES[name].group == group
        and ours in (None, is_ours(name))
    }


def fastest(row: Row, group: str) -> str | None:
    """The fastest of the others; None where none was measured."""
    others = members(row, group, ours=False)
    return min(others, key=lambda name: others[name]) if others else None


def has(row: Row, name: str) -> bool:
    return name in row["candidates"]


def ceiling(row: Row, name: str) -> tuple[str, float]:
    """What limits a candidate's arithmetic, and its GFLOP/s as measured beside it.

    "high" has a third of the bfloat16 tiles, where it uses them: three products for each.
    """
    found = limits.highest(row["limits"]["before"], row["limits"]["after"])
    if (
        "amx_bf16" in found
        and name == "hgfast high"
        and "amx" in row["candidates"][name]["setting"]
    ):
        return "a third of amx_bf16", found["amx_bf16"] / 3
    kinds = ("amx_bf16", "avx512_bf16", "float32") if ENGINES[name].bfloat16 else ("float32",)
    kind = next(kind for kind in kinds if kind in found)
    return kind, found[kind]


def milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def summary(row: Row) -> Iterator[str]:
    """What the terminal shows when a part is done."""
    for group in GROUPS:
        best = fastest(row, group)
        for name, ms in members(row, group).items():
            ratio = f"{ms / row['candidates'][best]['ms']:6.2f}" if best else ""
            share = 100 * rates(row, name) / ceiling(row, name)[1]
            yield f"  {name:24s} {milliseconds(ms):>8s} ms {ratio:6s}  {share:4.0f} % of the limit"


# --- docs/performance.md ---


def table(rows: Sequence[Row], group: str) -> list[str]:
    """Times over that of the fastest other engine, whose milliseconds are given."""
    names = [name for name in ENGINES if any(name in members(row, group) for row in rows)]
    first = ["network, input, batch, threads", "blocks x calls", "fastest other", "ms"]
    lines = [f"| {' | '.join([*first, *map(_bold, names)])} |"]
    lines += [f"|---|---|---|---:|{'---:|' * len(names)}"]
    for row in rows:
        best, held = fastest(row, group), members(row, group)
        if not held:
            continue
        base = held[best] if best else None
        way = row["timing"]
        cells = [
            title(row),
            f"{way['blocks']} x {way['calls'] - way['dropped']} of {way['calls']}",
            best or "",
            milliseconds(base) if base else "",
            *(_bold(f"{held[n] / base:.2f}", n) if base and n in held else "" for n in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _bold(text: str, name: str = "") -> str:
    return f"**{text}**" if is_ours(name or text) else text


def rates_table(rows: Sequence[Row]) -> list[str]:
    """How near hgfast and the fastest other come to what the machine multiplies."""
    lines = [
        "| network, input, batch, threads | candidate | GFLOP/s | limit | share |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        for group in GROUPS:
            for name in (fastest(row, group), *members(row, group, ours=True)):
                if name is None:
                    continue
                rate, (kind, limit) = rates(row, name), ceiling(row, name)
                share = _bold(f"{100 * rate / limit:.0f} %", name)
                cells = title(row), _bold(name), f"{rate:.0f}", f"{limit:.0f} ({kind})", share
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def errors_table(row: Row) -> list[str]:
    lines = [
        "| candidate | relative L2 error | largest error / value | same maximum | setting |",
        "|---|---:|---:|---:|---|",
    ]
    for name in ENGINES:
        if held := row["candidates"].get(name):
            cells = (
                name,
                f"{held['rel']:.1e}",
                f"{held['max']:.1e}",
                _percent(held["argmax"]),
                held["setting"],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(share: float) -> str:
    """Never "100 %" of what is not all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What a reader has to know of how it was measured, one line each."""
    if not all(row["bfloat16 instructions"] for row in rows):
        yield (
            "This machine has no instructions that multiply in bfloat16: who computes in it "
            "converts, and is measured at batch 1 only"
        )
    why: dict[str, list[str]] = {}
    for row in rows:
        for name, said in row["left_out"].items():
            if said.startswith("too slow"):
                once = said.rpartition(": ")[2]
                why.setdefault(title(row), []).append(f"{name} ({once})")
    for where, names in why.items():
        yield f"Too slow for the time of its part: {', '.join(names)} in {where}"
    for row in rows:
        for name, said in row["faults"].items():
            yield f"Failed: {name} ({title(row)}): {said}"
    ways: dict[str, list[str]] = {}
    for row in rows:
        for name, held in row["candidates"].items():
            if "tried_ms" in held:
                ways.setdefault(f"{name}: {held['setting']}", []).append(title(row))
    for said, titles in ways.items():
        yield f"The fastest setting for a batch. {said}, for {'; '.join(titles)}"
    busy = [row for row in rows if row["load"] > 0.5]
    if busy:
        most = max(row["load"] for row in busy)
        yield (
            f"Something else ran on the machine when {len(busy)} of {len(rows)} parts began (load "
            f"average up to {most:.1f}; a part before leaves some too)"
        )
    off = [
        max(medians) / min(medians)
        for row in rows
        for held in row["candidates"].values()
        if len(medians := block_medians(row, held)) > 1
    ]
    if off:
        yield (
            f"The blocks of a candidate differed by {100 * statistics.median(off) - 100:.0f} % "
            f"(median), at most by {100 * max(off) - 100:.0f} %"
        )
    drifts = [
        max(values) / min(values)
        for row in rows
        if min(values := [max(row["limits"][when]["float32"]) for when in ("before", "after")]) > 0
    ]
    yield (
        "The float32 limit before and after a part differed by up to "
        f"{100 * max(drifts) - 100:.0f} %"
    )


def block_medians(row: Row, held: Row) -> list[float]:
    drop = row["timing"]["dropped"]
    return [statistics.median(block[drop:]) for block in held["samples"]]


def shown(results: Row, name: str) -> str:
    """What stands between the markers of docs/performance.md."""
    rows = results["rows"]
    networks = [row for row in rows if row["size"] == 256 and row["network"] in ("HG-2", "HG-8")]
    curves = [row for row in rows if row not in networks]
    lines = [f"![Time by batch, and rates beside the measured limits]({BATCHES})", ""] * bool(
        networks
    )
    lines += [f"![Time by input size and by number of stacks]({CURVES})", ""] * bool(curves)
    lines += ["Times, relative to the fastest other engine of the group (its milliseconds beside)."]
    lines += ["", "Results as exact as float32's:", "", *table(networks, "float32")]
    lines += ["", "Computed in bfloat16:", "", *table(networks, "bfloat16")]
    lines += ["", "Rates, as shares of what the machine was seen to multiply in the same part:", ""]
    lines += rates_table(networks)
    if networks:
        lines += ["", f"Errors against float64 ({title(networks[0])}):", ""]
        lines += errors_table(networks[0])
    if curves:
        lines += ["", "Other sizes and depths:", "", *table(curves, "float32")]
    lines += ["", *(f"- {line}." for line in remarks(rows)), ""]
    packages = {k: v for row in rows for k, v in {**row["versions"], **row["engines"]}.items()}
    used = ", ".join(f"{package} {packages[package]}" for package in packages)
    lines.append(
        f"Measured on {facts(results)}; {used}. All samples: "
        f"[{name}](../benchmarks/results/{name})."
    )
    return "\n".join(lines)


# --- README.md ---


def quoted(results: Row, name: str) -> str:
    """What stands between the markers of README.md: HG-2 with most threads, by batch."""
    rows = [row for row in results["rows"] if row["network"] == "HG-2" and row["size"] == 256]
    most = max((row["threads"] for row in rows), default=1)
    rows = [row for row in rows if row["threads"] == most]
    heads = ["time relative to hgfast in the same group", *(f"batch {r['batch']}" for r in rows)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * len(rows)}"]
    for group, base in (("float32", "hgfast highest"), ("bfloat16", "hgfast bfloat16")):
        for engine in (engine for engine in ENGINES if ENGINES[engine].group == group):
            times = [
                [row["candidates"].get(name, {}).get("ms") for name in (engine, base)]
                for row in rows
            ]
            cells = [_bold(f"{a / b:.2f}", engine) if a and b else "" for a, b in times]
            if any(cells):
                lines.append(f"| {' | '.join([_bold(engine), *cells])} |")
    machine = results["machine"]
    lines += [
        "",
        f"Measured on {machine['processor']} ({machine['instruction sets found']}), "
        f"{most} {'thread' if most == 1 else 'threads'}, kernels: {machine['kernel set used']}. "
        f"Every sample: [benchmarks/results/{name}](benchmarks/results/{name}).",
    ]
    return "\n".join(lines)


# --- Writing ---


def write(path: Path, page: Path = PAGE, readme: Path = README) -> None:
    """Both pages, and the plots beside docs/performance.md."""
    from benchmarks.peers import plot

    results = json.loads(path.read_text())
    replace_between(page, BEGIN, END, shown(results, path.name))
    replace_between(readme, BEGIN, END, quoted(results, path.name))
    plot.draw(results, page.parent)
