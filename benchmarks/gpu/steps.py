"""Building and testing: other programs, watched, their output kept in files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import ROOT, Journal

TAIL = 3000  # characters of a log that go into the results
GRACE = 5  # seconds that a program has to end when it is asked to


class Children:
    """The programs that run now, so that a signal can end them and wait for none.

    Each is the head of a session, and is ended with all that it started: compilers, the program
    under a sanitizer, pytest's and Inductor's workers.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # a signal's handler may ask for it again
        self.stopped = False

    def run(self, command: list[str], log: Path, limit: float, env: dict[str, str]) -> int | None:
        """The exit status; None where it ran past ``limit`` seconds or was stopped."""
        with self._lock:
            if self.stopped:
                return None
            log.unlink(missing_ok=True)
            child = self.start(command, log, env)
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end(child)

    def start(
        self, command: list[str], log: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start it; what it says goes to the end of the log. ``end`` is to be called for it."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out, self._lock:
            child = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._running.add(child)
            return child

    def end(self, child: subprocess.Popen[bytes]) -> None:
        """Ask it to end, then insist; also whatever it left behind where it ended by itself."""
        with self._lock:
            if child not in self._running:  # its number may be another's by now
                return
        if child.poll() is None:
            _signal(child, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
        _signal(child, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # not even that helps in a driver
            child.wait(10)
        with self._lock:
            self._running.discard(child)

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            running = list(self._running)
        for child in running:
            self.end(child)


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To all of its session that did not leave it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-TAIL:] if log.is_file() else ""


# ---- Building ------------------------------------------------------------------------------------


def build(
    journal: Journal, children: Children, work: Path, limit: float, architecture: str | None
) -> bool:
    """Build hgfast/_C for this GPU, in a folder of its own; without one, only rehearse the call."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    command += ["--build-temp", str(work / "cmake")]
    environment = {
        "FORCE_CUDA": "1",  # no device code is an error
        "TORCH_CUDA_ARCH_LIST": architecture or "",
        "HGFAST_EMULATOR": "0",
        "HGFAST_AMX_MODEL": "0",
    }
    if architecture is None:
        command, environment = [sys.executable, "setup.py", "--version"], {}
    log = work / "logs" / "build.log"
    begun = time.monotonic()
    status = children.run(command, log, limit, environment)
    journal.add(
        "build", "build", {0: "ok", None: "timed out"}.get(status, "failed"),
        command=" ".join(["python", *command[1:]]), environment=environment,
        took=time.monotonic() - begun,
        rehearsed=architecture is None, log=tail(log) if status != 0 else "",
    )  # fmt: skip
    return status == 0


# ---- What waiting costs --------------------------------------------------------------------------


def costs(
    journal: Journal, children: Children, work: Path, limit: float, architecture: str | None
) -> None:
    """Compile and run costs.cu, whose nanoseconds go into the results."""
    if journal.latest("costs").get(("costs", "costs"), {}).get("status") == "ok":
        return
    compiler = os.environ.get("CUDACXX") or shutil.which(
        "nvcc", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin"
    )
    if architecture is None or compiler is None:
        reason = "a rehearsal has no GPU" if architecture is None else "no nvcc"
        journal.add("costs", "costs", "not possible here", reason=reason)
        return
    number = architecture.replace(".", "")
    program, log = work / "costs", work / "logs" / "costs.log"
    source = str(Path(__file__).with_name("costs.cu"))
    generate = f"-gencode=arch=compute_{number},code=sm_{number}"
    command = [compiler, "-std=c++17", "-O3", generate, source, "-o", str(program)]
    status = children.run(command, log, limit, {})
    if status == 0:
        status = children.run([str(program)], log, limit, {})
    said = log.read_text(errors="replace") if log.is_file() else ""
    try:
        found = json.loads(said.splitlines()[-1]) if status == 0 else None
    except (IndexError, ValueError):
        found = None
    if found is None:
        journal.add("costs", "costs", "failed", log=tail(log))
    else:
        journal.add("costs", "costs", "ok", nanoseconds=found)


# ---- Testing -------------------------------------------------------------------------------------


@dataclass
class Test:
    """A program that tests. ``says`` is what a sanitizer's last lines must contain. An ``extra``
    one is there if there is time: that it took too long says nothing of hgfast."""

    name: str
    command: list[str]
    limit: float
    junit: Path | None = None
    says: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    extra: bool = False


#: Of tests/: what runs as a test of its own, and what needs no GPU and takes long: the kernels on
#: the emulator or interpreted, mutants that a compiler has to make, what compilers say of the
#: device code.
LEFT_OUT = (
    "gpu", "test_gpu_run.py", "test_cuda_gates.py", "test_emulator*.py", "test_emulated_*.py",
    "test_decode_triton.py",
)  # fmt: skip


def tests(work: Path, rehearse: bool) -> list[Test]:
    """The programs to run, the most wanted first."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {"HGFAST_GPU_REHEARSAL" if rehearse else "HGFAST_GPU_REQUIRED": "1"}

    def suite(name: str, *arguments: str, limit: float, extra: bool = False) -> Test:
        junit = work / "logs" / f"{name.replace('/', '-').replace(' ', '-')}.xml"
        command = [*pytest, *arguments, f"--junitxml={junit}"]
        return Test(name, command, limit, junit, (), environment, extra)

    found = [
        suite(f"tests/gpu/test_gpu_{name}.py", f"tests/gpu/test_gpu_{name}.py", limit=180)
        for name in (
            "kernels", "hopper", "latency", "networks", "runtime", "graphs", "stem_head", "decode",
            "torch",
        )
    ]  # fmt: skip
    script = [sys.executable, "tests/gpu/sanitize.py"]
    if rehearse:
        only = ["tests/gpu/test_gpu_torch.py", "-k", "opcheck_upsample"]
        return [
            suite("tests/gpu/test_gpu_torch.py", *only, limit=60),
            Test("sanitize.py", script, 60, None, ("done",), environment),
        ]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool, verdict in (
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards"),
        ("synccheck", "ERROR SUMMARY: 0 errors"),
    ):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":  # torch asks the driver for things that it may not have
            command += ["--report-api-errors", "no"]
        command += script
        found.append(Test(tool, command, 180, None, (verdict, "done"), environment))
    others = [f"--ignore-glob=tests/{name}" for name in LEFT_OUT]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    found.append(suite("the rest of tests", "tests", *others, *workers, limit=180, extra=True))
    return found


def test(journal: Journal, children: Children, work: Path, deadline: float, rehearse: bool) -> None:
    """Run what has not passed yet, several at a time: they are no measurements."""
    latest = journal.latest("test")

    def is_done(one: Test) -> bool:
        status = latest.get(("test", one.name), {}).get("status")
        return status in ("ok", "not possible here") or (one.extra and status == "timed out")

    waiting = [one for one in tests(work, rehearse) if not is_done(one)]
    with ThreadPoolExecutor(1 if rehearse else 4) as pool:
        try:
            for _ in pool.map(lambda one: _run(one, journal, children, work, deadline), waiting):
                pass
        except BaseException:  # a signal: the pool waits for what runs, so that has to end
            children.stop()
            raise


def _run(one: Test, journal: Journal, children: Children, work: Path, deadline: float) -> None:
    limit = min(one.limit, deadline - time.time())
    if limit <= 0 or children.stopped:
        reason = "skipped: out of time"
        journal.add("test", one.name, "out of time", reason=reason, extra=one.extra)
        return
    if shutil.which(one.command[0]) is None:
        journal.add("test", one.name, "not possible here", reason=f"no {one.command[0]}")
        return
    log = work / "logs" / f"{one.name.replace('/', '-').replace(' ', '-')}.log"
    if one.junit is not None:
        one.junit.unlink(missing_ok=True)  # of an earlier run
    begun = time.monotonic()
    status = children.run(one.command, log, limit, one.environment)
    text = log.read_text(errors="replace") if log.is_file() else ""
    details: dict[str, Any] = {"took": time.monotonic() - begun, "exit": status, "extra": one.extra}
    if one.junit is not None:
        details.update(counts(one.junit))
    if status is None:
        verdict = "out of time" if limit < one.limit or children.stopped else "timed out"
        details["reason"] = f"ended after {limit:.0f} s"
        if one.extra:
            details["reason"] += "; no test is known to have failed"
    elif "Device not supported" in text:
        verdict = "not possible here"
        details["reason"] = "the sanitizer does not know this device, or may not see it"
    else:
        verdict = "ok" if status == 0 and all(word in text for word in one.says) else "failed"
    if verdict != "ok":
        details["log"] = tail(log)
    journal.add("test", one.name, verdict, **details)


def counts(junit: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and what failed; nothing if it is cut off."""
    try:
        cases = ElementTree.parse(junit).getroot().iter("testcase")
    except (OSError, ElementTree.ParseError):
        return {}
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in cases:
        trouble = case.find("failure")
        if trouble is None:
            trouble = case.find("error")
        if trouble is not None:
            found["failed"] += 1
            message = re.sub(r"\s+", " ", trouble.get("message") or "")[:300]
            found["failures"].append({"name": case.get("name"), "message": message})
        elif case.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found
