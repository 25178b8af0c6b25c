"""The picture: how near each op comes to its floor, and how networks compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import OURS, Record, ratio

#: What is drawn, with colour and marker. What else was measured is in the table.
OPS = {
    OURS: ("hgfast", "#d1495b", "o"),
    "folded bf16 channels_last graph": ("three convolutions, BatchNorm folded", "#66839c", "s"),
    "eager bf16 channels_last graph": ("eager", "#30638e", "D"),
    "compile default bf16 graph": ("torch.compile", "#edae49", "^"),
    "compile max-autotune-no-cudagraphs bf16 graph": ("max-autotune", "#7a9e3f", "v"),
}
NETWORKS = {
    "eager float32": ("eager float32", "#b9c4cf"),
    "eager TF32": ("eager TF32", "#93a8bb"),
    "eager bf16 channels_last": ("eager bf16", "#5f86a8"),
    "eager bf16 channels_last graph": ("eager bf16, graph", "#30638e"),
    "compile default bf16": ("torch.compile", "#edae49"),
    "compile max-autotune-no-cudagraphs bf16 graph": ("max-autotune, our graph", "#b5c26f"),
    "compile max-autotune bf16": ("max-autotune", "#7a9e3f"),
    "hgfast medium": ("hgfast, float32 model", "#f3c5cb"),
    "hgfast medium graph": ("hgfast, float32 model, graph", "#eca8b1"),
    "hgfast bf16": ("hgfast", "#e58c97"),
    OURS: ("hgfast, graph", "#d1495b"),
}


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the PNG. Ops: percent of the floor, cold; networks: milliseconds of a call."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = _groups([m for m in found["measurements"] if "rates" in m and not _network(m)])
    networks = _groups([m for m in found["measurements"] if _network(m)])
    shown = [
        (m, name) for name, group in networks.items() for m in _drawn(group.values(), NETWORKS)
    ]
    rows = max(len(ops), len(shown) + 1.5 * len(networks), 8)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(14, 2.0 + 0.27 * rows), layout="constrained"
    )
    title = found["facts"].get("gpu", "unknown GPU")
    if found["rehearsal"]:
        title += ": no statement about speed"
    figure.suptitle(f"{title}, {found['name'][-10:]}", fontsize=13)
    _draw_ops(left, ops)
    _draw_networks(right, networks, list(filter(_network, found["measurements"])))
    figure.legend(loc="outside lower left", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _network(m: Record) -> bool:
    return bool(m["op"].startswith("HG-"))


def _groups(rows: list[Record]) -> dict[str, dict[str, Record]]:
    """Case -> candidate -> its measurement; the first tier's, where it stands in several."""
    groups: dict[str, dict[str, Record]] = {}
    for m in sorted(rows, key=lambda m: (m["op"], m["batch"], -m["size"])):
        width = m.get("width", m["size"])
        size = f" {m['size']}²" if width == m["size"] else f" {m['size']}x{width}"
        size = "" if _network(m) else size
        groups.setdefault(f"{m['op']}{size}, batch {m['batch']}", {}).setdefault(m["candidate"], m)
    return groups


def _drawn(measurements: Any, wanted: dict[str, Any]) -> list[Record]:
    known = {m["candidate"]: m for m in measurements}
    return [known[name] for name in wanted if name in known]


def _draw_ops(axes: Any, groups: dict[str, dict[str, Record]]) -> None:
    axes.set_title("Ops: share of what the measured peaks allow (L2 cold, in a graph)", fontsize=11)
    names = list(groups)
    for i, name in enumerate(names):
        axes.axhline(i, color="0.92", zorder=0)
        for m in _drawn(groups[name].values(), OPS):
            _, colour, marker = OPS[m["candidate"]]
            share = 100 * m["rates"]["cold"]["of the floor"]
            axes.plot(share, i, marker, color=colour, markersize=7, alpha=0.9)
    for label, colour, marker in OPS.values():
        axes.plot([], [], marker, color=colour, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("least possible time / time, percent (right is better)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_networks(axes: Any, groups: dict[str, dict[str, Record]], rows: list[Record]) -> None:
    axes.set_title("Networks: time of a call, back to back", fontsize=11)
    ticks, labels, y = [], [], 0.0
    for name, group in groups.items():
        ticks.append(y)
        labels.append(name)
        y += 1
        for m in _drawn(group.values(), NETWORKS):
            label, colour = NETWORKS[m["candidate"]]
            milliseconds = 1e3 * m["seconds"]["stream"]["median"]
            axes.barh(y, milliseconds, height=0.8, color=colour)
            text = f" {milliseconds:.3g} ms"
            if m["candidate"] != OURS and (factor := ratio(m, rows, "stream")):
                text += f" ({factor}x)"
            axes.text(milliseconds, y, text, va="center", fontsize=8)
            ticks.append(y)
            labels.append(label)
            y += 1
        y += 0.5
    axes.set_yticks(ticks, labels, fontsize=8)
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        if label in groups:
            tick.set_fontweight("bold")
            tick.set_fontsize(9)
    axes.set_ylim(max(y - 0.5, 1), -0.7)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * 3)
    axes.set_xlabel("milliseconds, logarithmic (left is better)")
    axes.spines[["top", "right"]].set_visible(False)
