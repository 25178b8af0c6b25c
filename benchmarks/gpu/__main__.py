"""The command: python -m benchmarks.gpu [STEP ...], which is what `make gpu` runs.

Steps are facts, build, test, bench and report; without any, all of them. Everything finished is a
line in the journal; a later call goes on from there. The results are written anew from the journal
after each step, while measuring, and when a signal ends the run.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import machine, report, steps
from benchmarks.gpu.journal import ROOT, Journal, Record, code_hash

STEPS = ("facts", "build", "test", "bench", "report")
#: Of the whole time: building and testing may use so much where measuring is still to come.
BUILD_SHARE, TEST_SHARE = 0.4, 0.6
RESERVE = 15  # seconds kept for the last table and plot
SAMPLE_EVERY = 5  # seconds between two looks at the clocks
RESTARTS = 12  # of the measuring process


class StoppedError(Exception):
    """A signal asked for the end."""


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rehearse: bool = args.rehearse
        self.work: Path = args.work
        self.begun = time.time()
        self.deadline = self.begun + 60 * args.minutes
        self.children = steps.Children()
        self.torch = machine.ask_torch()
        if not self.rehearse and "GPU" not in self.torch:
            raise SystemExit(
                f"make gpu needs a CUDA GPU, and {sys.executable} (torch {self.torch['torch']}) "
                f"sees none. To try the code on a CPU: python -m benchmarks.gpu --rehearse"
            )
        gpu = "rehearsal on a CPU" if self.rehearse else self.torch["GPU"]
        self.journal = Journal(args.journal, f"{code_hash()} {gpu} torch {self.torch['torch']}")
        self.gpu = gpu

    def left(self) -> float:
        return self.deadline - RESERVE - time.time()

    def run(self) -> bool:
        """Whether nothing failed."""
        wanted = self.args.steps or STEPS
        if "facts" in wanted or not self.journal.latest("facts"):
            self._say("facts")
            self.journal.add("facts", "facts", "ok", gpu=self.gpu, **machine.facts(self.torch))
        try:
            if "build" in wanted:
                self._say("build")
                self._build("bench" in wanted or "test" in wanted)
            if "test" in wanted:
                self._say("test")
                share = TEST_SHARE if "bench" in wanted else 1.0
                until = self.deadline - RESERVE - 60 * self.args.minutes * (1 - share)
                steps.test(self.journal, self.children, self.work, until, self.rehearse)
                self._write()
            if "bench" in wanted:
                self._say("bench")
                architecture = None if self.rehearse else machine.architecture(self.torch)
                limit = min(30, self.left())
                steps.costs(self.journal, self.children, self.work, limit, architecture)
                self._bench()
        finally:
            self.children.stop()
            self._write(plot=True)
        return not any(map(is_failure, self.journal.latest().values()))

    def _build(self, more_to_come: bool) -> None:
        share = BUILD_SHARE if more_to_come else 1.0
        limit = min(self.left(), 60 * self.args.minutes * share)
        architecture = None if self.rehearse else machine.architecture(self.torch)
        if not steps.build(self.journal, self.children, self.work, limit, architecture):
            last = self.journal.latest("build")["build", "build"]
            raise SystemExit(f"the build {last['status']}:\n{last['log']}")

    def _bench(self) -> None:
        """Keep a measuring process going until it has nothing left to do, or no time."""
        skipped: list[str] = []
        for _ in range(RESTARTS):
            command = [sys.executable, "-m", "benchmarks.gpu.measure"]
            command += ["--journal", str(self.journal.path), "--identity", self.journal.identity]
            command += ["--deadline", str(self.deadline - RESERVE), f"--only={self.args.only}"]
            command += ["--rehearse"] if self.rehearse else []
            command += ["--skip", *skipped] if skipped else []
            log = self.work / "logs" / "bench.log"
            begun = time.time()
            child = self.children.start(command, log)
            try:
                ended = self._watch(child)
            finally:
                self.children.end(child)
            if ended == 0 or self.left() <= 0:
                return
            item = self._in_progress(begun)
            if item is not None:
                verdict = "timed out" if ended == "overdue" else "crashed"
                reason = "took too long" if ended == "overdue" else f"exit status {ended}"
                self.journal.add("item", item, verdict, reason=reason, log=steps.tail(log))
                skipped.append(item)
            else:  # it may have written down itself that it lost the device
                latest = self.journal.latest("item")
                lost = [name for (_, name), r in latest.items() if r["status"] == "crashed"]
                if set(lost) <= set(skipped):
                    raise SystemExit(f"measuring ended at once:\n{steps.tail(log)}")
                skipped = sorted({*skipped, *lost})

    def _watch(self, child: subprocess.Popen[bytes]) -> int | str:
        """Its exit status, or why it has to be ended. Writes results while it runs."""
        sampled = written = time.monotonic()
        size = 0
        while True:
            try:
                return child.wait(0.5)
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            if now - sampled > SAMPLE_EVERY and not self.rehearse:
                sampled = now
                clocks = machine.smi(machine.SAMPLE_FIELDS, self.torch.get("uuid")) or {}
                self.journal.add("sample", "clocks", "ok", **clocks)
            if now - written > SAMPLE_EVERY and self.journal.path.stat().st_size != size:
                written, size = now, self.journal.path.stat().st_size
                self._write()
            overdue = any(
                record["status"] == "begun" and time.time() - record["at"] > record["limit"]
                for record in self.journal.latest("item").values()
                if record["at"] > self.begun
            )
            if overdue or self.left() < -RESERVE / 2:
                return "overdue" if overdue else "out of time"

    def _in_progress(self, since: float) -> str | None:
        """The item that was begun by a process that is gone, and never ended."""
        for (_, item), record in self.journal.latest("item").items():
            if record["status"] == "begun" and record["at"] >= since:
                return item
        return None

    def _write(self, plot: bool = False) -> None:
        paths = report.write(self.journal, self.args.out, plot=plot)
        if plot:
            for path in paths:
                print(path)

    def _say(self, step: str) -> None:
        print(f"make gpu: {step}, {max(self.left(), 0):.0f} s left", flush=True)


def is_failure(record: Record) -> bool:
    """Whether hgfast is at fault: a rival that does not run is none."""
    if record["kind"] == "measurement" and not record["candidate"].startswith("hgfast"):
        return False
    if record["kind"] == "costs":  # of the GPU, and nothing of hgfast's runs
        return False
    if record["kind"] == "item" and record["status"] == "timed out":  # a compiler, most likely
        return False
    if record.get("extra") and record["status"] == "timed out":  # there were simply many tests
        return False
    return record["status"] in ("failed", "crashed", "wrong result", "timed out")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}; default: all"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (default: 9.5)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results (default: benchmarks/results; of a rehearsal, the work folder)",
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu", help="folder of the build and logs"
    )
    parser.add_argument("--journal", type=Path, help="default: journal.jsonl in the work folder")
    parser.add_argument("--only", default="", help="measure items whose name this pattern finds")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    args = parser.parse_args()
    if args.out is None:
        args.out = args.work if args.rehearse else ROOT / "benchmarks" / "results"
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}: expected {', '.join(STEPS)}")
    re.compile(args.only)
    args.journal = args.journal or args.work / "journal.jsonl"

    def stop(number: int, _: object) -> None:
        raise StoppedError(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        if args.steps == ["report"]:  # of another machine's journal, perhaps
            journal = Journal(args.journal, "")
            journal.identity = journal.last_identity() or ""
            print(*report.write(journal, args.out), sep="\n")
            return 0
        return 0 if Run(args).run() else 1
    except StoppedError as stopped:
        print(f"make gpu: stopped by {stopped}; what was finished is written", file=sys.stderr)
        return 143


if __name__ == "__main__":
    raise SystemExit(main())
