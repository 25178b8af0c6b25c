"""The journal as one JSON file, a Markdown table and a plot."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import OURS, Journal, Record, ratio

#: The rivals shown beside it in the table of ops; the JSON has all.
WAYS = {"cold": "L2 cold", "warm": "L2 warm", "stream": "back to back", "latency": "latency"}


def write(journal: Journal, out: Path, plot: bool = True) -> list[Path]:
    """Write <gpu>-<date>.json, .md and, if it can be drawn, .png; returns what was written.

    Without records there is nothing to write. Files are replaced whole, so that a run that is
    killed leaves the last good ones.
    """
    found = collect(journal)
    if found is None:
        return []
    out.mkdir(parents=True, exist_ok=True)
    stem = out / found["name"]
    written = [
        _replace(stem.with_suffix(".json"), json.dumps(found, indent=1).encode() + b"\n"),
        _replace(stem.with_suffix(".md"), markdown(found).encode()),
    ]
    if plot and found["measurements"]:
        picture = stem.with_suffix(".png")
        part = picture.with_suffix(".part.png")
        try:
            from benchmarks.gpu.plot import draw

            draw(found, part)
            part.replace(picture)
            written.append(picture)
        except Exception as error:  # no matplotlib, say: not worth a failed run
            part.unlink(missing_ok=True)
            print(f"make gpu: no picture, {type(error).__name__}: {error}", file=sys.stderr)
    return written


def _replace(path: Path, content: bytes) -> Path:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
    return path


# ---- JSON ----------------------------------------------------------------------------------------


def collect(journal: Journal) -> dict[str, Any] | None:
    """Everything known, last records only; None where there is nothing yet."""
    records = journal.records()
    if not records:
        return None
    latest = journal.latest()

    def of(kind: str) -> list[Record]:
        return [
            {key: value for key, value in record.items() if key not in ("identity", "kind")}
            for (found, _), record in latest.items()
            if found == kind
        ]

    facts = next(iter(of("facts")), {})
    peaks = {peak["item"]: peak for peak in of("peak")}
    measurements = [with_fractions(record, peaks) for record in of("measurement")]
    gpu = re.sub(r"[^a-z0-9]+", "-", str(facts.get("gpu", "unknown")).lower()).strip("-")
    return {
        "name": f"{gpu}-{records[0]['time'][:10]}",
        "identity": journal.identity,
        "rehearsal": "rehearsal" in journal.identity,
        "facts": facts,
        "build": of("build"),
        "tests": of("test"),
        "peaks": peaks,
        "costs": next((record.get("nanoseconds") for record in of("costs")), None),
        "measurements": [m for m in measurements if m["status"] == "ok"],
        "not measured": [
            *(m for m in measurements if m["status"] != "ok"),
            *unfinished(records, of("item")),
        ],
        "clocks": [
            {key: value for key, value in record.items() if key not in ("identity", "kind")}
            for record in records
            if record["kind"] == "sample"
        ],
    }


def unfinished(records: list[Record], items: list[Record]) -> list[Record]:
    """Items that were planned and not measured, and what became of them."""
    known = {item["item"]: item for item in items}
    found = [item for item in items if item["status"] not in ("ok", "begun")]
    planned = [name for record in records if record["kind"] == "plan" for name in record["names"]]
    for name in dict.fromkeys([*planned, *known]):
        status = known[name]["status"] if name in known else None
        if status == "begun":
            found.append({"item": name, "status": "interrupted", "reason": ""})
        elif status is None:
            found.append({"item": name, "status": "skipped", "reason": "out of time"})
    return found


def without_products(record: Record) -> bool:
    """Whether there is no work for the matrix units."""
    return bool(record["op"] == "upsample_add" or record["op"].startswith("decode "))


def with_fractions(record: Record, peaks: dict[str, Record]) -> Record:
    """With rates, and the share of the time that this run's peaks would need at the least."""
    if record["status"] != "ok" or not {"matmul", "copy"} <= peaks.keys():
        return record
    arithmetic = record["flops"] / peaks["matmul"]["rate"]
    if without_products(record):
        arithmetic = 0.0
    memory = record["least_bytes"] / peaks["copy"]["rate"]
    rates = {
        way: {
            "FLOP/s": record["flops"] / seconds["median"],
            "byte/s": record["least_bytes"] / seconds["median"],
            "of the matrix peak": arithmetic / seconds["median"],
            "of the copy peak": memory / seconds["median"],
            "of the floor": max(arithmetic, memory) / seconds["median"],
        }
        for way, seconds in record["seconds"].items()
    }
    return {**record, "floor, seconds": max(arithmetic, memory), "rates": rates}


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    facts = found["facts"]
    lines = [f"# {facts.get('gpu', 'unknown GPU')}, {found['name'][-10:]}", ""]
    if found["rehearsal"]:
        lines += [
            "A rehearsal on a CPU: it shows that the code runs, and says nothing of speed.",
            "",
        ]
    lines += [*_machine(found), *_tests(found), *_peaks(found), *_costs(found)]
    lines += [*_ops(found), *_networks(found)]
    lines += _not_measured(found)
    return "\n".join(lines) + "\n"


def _machine(found: dict[str, Any]) -> list[str]:
    facts = found["facts"]
    smi = facts.get("nvidia-smi") or {}
    shown = {
        "driver": smi.get("driver_version"),
        "clocks, most": smi.get("clocks.max.sm"),
        "torch": facts.get("torch"),
        "CUDA": facts.get("torch's CUDA"),
        "cuDNN": facts.get("cuDNN"),
        "nvcc": facts.get("nvcc"),
        "triton": facts.get("triton"),
        "Python": facts.get("python"),
        "commit": facts.get("commit"),
        "command": facts.get("command"),
    }
    return [*(f"- {name}: {value}" for name, value in shown.items() if value), ""]


def _tests(found: dict[str, Any]) -> list[str]:
    if not found["tests"]:
        return ["No test has run.", ""]
    lines = ["| tests | verdict | passed | failed | skipped | s |", "|---|---|---:|---:|---:|---:|"]
    for test in found["tests"]:
        counts = " | ".join(str(test.get(key, "")) for key in ("passed", "failed", "skipped"))
        took = f"{test['took']:.0f}" if "took" in test else ""
        lines.append(f"| {test['item']} | {test['status']} | {counts} | {took} |")
    lines.append("")
    for test in found["tests"]:
        if test["status"] != "ok" and test.get("reason"):
            lines.append(f"- {test['item']}: {test['status']}, {test['reason']}")
        for failure in test.get("failures", [])[:20]:
            lines.append(f"- {test['item']}: `{failure['name']}`: {failure['message']}")
    return [*lines, ""]


def _peaks(found: dict[str, Any]) -> list[str]:
    if not found["peaks"]:
        return []
    lines = ["Peaks of this run, to which all percentages refer:", ""]
    for peak in found["peaks"].values():
        scale, unit = (1e12, "TFLOP/s") if peak["unit"] == "FLOP/s" else (1e12, "TB/s")
        lines.append(f"- {peak['what']}: {peak['rate'] / scale:.3g} {unit}")
    return [*lines, ""]


def _costs(found: dict[str, Any]) -> list[str]:
    if not found["costs"]:
        return []
    known = [(name, value) for name, value in found["costs"].items() if value is not None]
    lines = [
        "What waiting costs (`benchmarks/gpu/costs.cu` says what each is), in nanoseconds:",
        "",
    ]
    lines += [f"- {name}: {value:.0f}" for name, value in known if not name.startswith("clusters ")]
    lines.append("")
    for name, value in known:
        if name.startswith("clusters "):
            lines.append(f"- clusters of {name.split()[1]} blocks at once: {value:.0f}")
    return [*lines, ""]


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def _ops(found: dict[str, Any]) -> list[str]:
    rows = [m for m in found["measurements"] if not m["op"].startswith("HG-")]
    if not rows:
        return []
    lines = [
        "## Ops",
        "",
        "Median microseconds of a call. Cold: alone, nothing of use in L2; warm: back to back. Of "
        "the floor: the time that the least FLOPs and bytes need at the peaks, over the cold time. "
        "Ratio: cold time over that of `" + OURS + "` in the same turns.",
        "",
        "| op | candidate | cold | p10 to p90 | warm | of the floor | TFLOP/s | ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for m in rows:
        cold, warm = m["seconds"]["cold"], m["seconds"]["warm"]
        share = f"{m['rates']['cold']['of the floor']:.0%}" if "rates" in m else ""
        rate = "" if without_products(m) else f"{m['flops'] / cold['median'] / 1e12:.3g}"
        size = f"{m['size']}x{m.get('width', m['size'])}"
        lines.append(
            f"| {m['op']} {size} batch {m['batch']} | {m['candidate']} "
            f"| {microseconds(cold['median'])} "
            f"| {microseconds(cold['p10'])} to {microseconds(cold['p90'])} "
            f"| {microseconds(warm['median'])} | {share} | {rate} | {ratio(m, rows, 'cold')} |"
        )
    return [*lines, ""]


def _networks(found: dict[str, Any]) -> list[str]:
    rows = [m for m in found["measurements"] if m["op"].startswith("HG-")]
    if not rows:
        return []
    lines = [
        "## Networks",
        "",
        "Median milliseconds of a call: back to back, and from call to result (latency). Ratio: "
        "time back to back over that of `" + OURS + "` in the same turns.",
        "",
        "| network | candidate | back to back | p10 to p90 | latency | of matrix peak | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for m in rows:
        stream, latency = m["seconds"]["stream"], m["seconds"]["latency"]
        share = f"{m['rates']['stream']['of the matrix peak']:.0%}" if "rates" in m else ""
        lines.append(
            f"| {m['op']} batch {m['batch']} | {m['candidate']} | {stream['median'] * 1e3:.3f} "
            f"| {stream['p10'] * 1e3:.3f} to {stream['p90'] * 1e3:.3f} "
            f"| {latency['median'] * 1e3:.3f} | {share} | {ratio(m, rows, 'stream')} |"
        )
    return [*lines, ""]


def _not_measured(found: dict[str, Any]) -> list[str]:
    if not found["not measured"]:
        return []
    lines = ["## Not measured", ""]
    for record in found["not measured"]:
        reason = re.sub(r"\s+", " ", str(record.get("reason", "")))[:300]
        lines.append(f"- {record['item']}: {record['status']}{', ' + reason if reason else ''}")
    return [*lines, ""]
