"""What is finished, as JSON lines: a process that is killed loses the line it was writing."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]

#: The candidate that stands in every item, and that ratios are to.
OURS = "hgfast bf16 graph"

ROOT = Path(__file__).resolve().parents[2]

#: An item that ended so is not tried again. What ran out of time, or crashed, is.
FINISHED = ("ok", "failed", "wrong result", "not possible here")


class Journal:
    """Records of one state of the code on one kind of GPU; others in the file are left alone.

    Several processes may append to the same file.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, item: str, status: str, **details: Any) -> None:
        """Append one record; it is on its way to the disk when this returns."""
        record = {
            "identity": self.identity,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "at": time.time(),
            "kind": kind,
            "item": item,
            "status": status,
            **details,
        }
        line = json.dumps(record, default=str) + "\n"
        with self.path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def last_identity(self) -> str | None:
        """Of whatever code and GPU wrote last."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        for line in reversed(lines):
            try:
                return str(json.loads(line)["identity"])
            except (json.JSONDecodeError, KeyError):
                continue
        return None

    def records(self) -> list[Record]:
        """Every whole record of this identity, oldest first."""
        found = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # cut off by a kill
                    continue
                if record.get("identity") == self.identity:
                    found.append(record)
        return found

    def latest(self, kind: str | None = None) -> dict[tuple[str, str], Record]:
        """(kind, item) -> its last record, in the order in which items first appeared."""
        found: dict[tuple[str, str], Record] = {}
        for record in self.records():
            if kind in (None, record["kind"]):
                found[record["kind"], record["item"]] = record
        return found

    def finished(self, kind: str) -> set[str]:
        return {
            item for (_, item), record in self.latest(kind).items() if record["status"] in FINISHED
        }


def ratio(m: Record, rows: list[Record], way: str) -> str:
    """A measurement's time over ours of the same item, which was measured in the same turns."""
    return next(
        (
            f"{m['seconds'][way]['median'] / ours['seconds'][way]['median']:.2f}"
            for ours in rows
            if ours["candidate"] == OURS
            and all(ours[key] == m[key] for key in ("op", "size", "batch", "tier"))
        ),
        "",
    )


def code_hash() -> str:
    """A hash of everything that a result depends on."""
    sha = hashlib.sha256()
    for folder in ("csrc", "cmake", "hgfast", "benchmarks/gpu", "tests/gpu"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and file.suffix in (
                ".py", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".txt",
            ):  # fmt: skip
                sha.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    sha.update((ROOT / "CMakeLists.txt").read_bytes())
    return sha.hexdigest()[:16]
