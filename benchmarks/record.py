"""What the runs that end in a committed JSON have in common: whose times they are, how rows are put
into the file, and how a page shows them.

A file is of one machine. Rows replace those of the same key; the others stay, so that a run that
was cut goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

from hgfast.info import collect

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def machine() -> Row:
    """What the times are of."""
    found = collect()
    names = ("processor", "instruction sets found", "threads", "kernel set used")
    return {name: found["CPU"][name] for name in names}


def versions() -> dict[str, str]:
    found = collect()["versions"]
    return {name: found[name] for name in ("hgfast", "torch", "python", "platform")}


def cores() -> int:
    return os.cpu_count() or 1


def default_path(kind: str) -> Path:
    """benchmarks/results/<kind>-<cpu>-<n>cores.json, with the compiler's name of the CPU."""
    name = os.uname().machine
    try:
        march, has_amx = _target("native")
        # A virtual machine may have the number of a model that is not its own.
        name = f"{name}-amx" if has_amx and not _target(march)[1] else march
    except (OSError, subprocess.SubprocessError):
        pass
    return RESULTS / f"{kind}-{name}-{cores()}cores.json"


def _target(march: str) -> tuple[str, bool]:
    """What the compiler calls it, and whether it has AMX."""
    text = subprocess.run(
        ["c++", f"-march={march}", "-Q", "--help=target"],
        capture_output=True, text=True, timeout=30, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"-march=\s+(\S+)", text)
    name = found.group(1) if found else march
    return name, re.search(r"-mamx-tile\s+\[enabled\]", text) is not None


def merge(
    path: Path,
    rows: Sequence[Row],
    key: Callable[[Row], Hashable],
    order: Callable[[Row], Any],
) -> None:
    """Put rows into the file in place of those of the same key.

    Raises:
        ValueError: the file is of another machine.
    """
    held = held_here(path)
    by_key = {key(row): row for row in [*held["rows"], *rows]}
    held["rows"] = sorted(by_key.values(), key=order)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(_text(held))
    part.replace(path)


def held_here(path: Path) -> Row:
    """What the file holds of this machine; no rows where there is no file yet.

    Raises:
        ValueError: the file is of another machine.
    """
    here = machine()
    if not path.exists():
        return {"machine": here, "rows": []}
    held: Row = json.loads(path.read_text())
    if held["machine"] != here:
        raise ValueError(f"{path} is of another machine, {held['machine']}; give another --out")
    return held


def _text(held: Row) -> str:
    """Indented, with lists of numbers on one line."""
    text = json.dumps(held, indent=1, allow_nan=False)
    return re.sub(r"\[[-+\d.eE,\s]+\]", lambda found: " ".join(found[0].split()), text) + "\n"


def in_a_process(function: Callable[[Any], Any], argument: Any) -> Any:
    """``function(argument)`` in a process of its own: with its own memory, and nothing that an
    earlier one left in torch.compile's caches or in another engine's threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


def facts(results: Row) -> str:
    """The machine in a line."""
    return "; ".join(f"{name}: {value}" for name, value in results["machine"].items())


def replace_between(page: Path, begin: str, end: str, made: str) -> None:
    """Write ``made`` in place of what stands between the two markers of a page."""
    before, rest = page.read_text().split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{made}\n{end}{after}")
