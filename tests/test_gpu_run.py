"""`make gpu`, rehearsed on the CPU: all of it runs here but the GPU's own clock and graphs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.gpu import cases, machine, measure, report, steps  # noqa: E402
from benchmarks.gpu.__main__ import Run, is_failure  # noqa: E402
from benchmarks.gpu.cases import (  # noqa: E402
    ANCHOR,
    EAGER,
    HGFAST,
    MEDIUM,
    OWN_GRAPH,
    REHEARSED,
    Candidate,
    Case,
    Item,
    both,
    items,
)
from benchmarks.gpu.device import Rehearsal  # noqa: E402
from benchmarks.gpu.journal import Journal  # noqa: E402
from benchmarks.gpu.measure import Measurer  # noqa: E402
from hgfast import _native  # noqa: E402
from hgfast.recognition import recognise  # noqa: E402

needs_native = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))
SHORT = (
    "8x8 batch 2, (main|compile)|decode (quarter|dark) .* batch 2|HG-1 .* batch 1, (main|compile)"
)


def command(folder: Path, *arguments: str) -> list[str]:
    base = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--work", str(folder / "work")]
    return [*base, "--out", str(folder / "out"), *arguments]


def results(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "out").glob("*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


# ---- The whole run ----


@needs_native
def test_a_rehearsal_writes_json_table_and_plot(tmp_path: Path) -> None:
    run = subprocess.run(
        command(tmp_path, "--only", SHORT), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = results(tmp_path)
    assert found["rehearsal"]
    assert found["facts"]["torch"] == torch.__version__
    assert [step["status"] for step in found["build"]] == ["ok"]
    assert {test["status"] for test in found["tests"]} == {"ok"}
    assert found["tests"][0]["passed"] > 0
    assert found["peaks"].keys() == {"matmul", "copy"}
    assert found["not measured"] == []
    measured = {(m["op"], m["candidate"]) for m in found["measurements"]}
    for op in ("bottleneck", "bottleneck + low", "upsample_add", "HG-1"):
        assert {(op, "hgfast bf16 graph"), (op, "eager bf16 channels_last")} <= measured
    assert ("HG-1", "compile default bf16") in measured
    for layout in ("", "contiguous "):
        assert ("decode dark", f"hgfast {layout}float32 graph") in measured
    assert ("decode quarter", "amax float32 graph") in measured
    for m in found["measurements"]:
        for way, times in m["seconds"].items():
            assert 0 < times["least"] <= times["p10"] <= times["median"] <= times["most"]
            floor = max(m["rates"][way]["of the matrix peak"], m["rates"][way]["of the copy peak"])
            assert m["rates"][way]["of the floor"] == pytest.approx(floor)

    (table,) = (tmp_path / "out").glob("*.md")
    assert "says nothing of speed" in table.read_text()
    assert table.read_text().count("| bottleneck 8x8 batch 2 |") == 7
    (picture,) = (tmp_path / "out").glob("*.png")
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install Pillow")
    pixels = image.open(picture).convert("L")
    assert pixels.size[0] > 1000
    assert len(pixels.getcolors()) > 20  # not an empty sheet

    # Once more: nothing that is finished is done again.
    journal = tmp_path / "work" / "journal.jsonl"
    before = journal.read_text().count('"kind": "measurement"')
    again = subprocess.run(
        command(tmp_path, "test", "bench", "--only", SHORT), cwd=ROOT, timeout=300
    )
    assert again.returncode == 0
    assert journal.read_text().count('"kind": "measurement"') == before
    assert results(tmp_path)["measurements"] == found["measurements"]


@needs_native
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["asked", "killed"])
def test_what_was_finished_survives_the_end(tmp_path: Path, number: signal.Signals) -> None:
    journal = tmp_path / "work" / "journal.jsonl"
    run = subprocess.Popen(command(tmp_path, "bench"), cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (journal.is_file() and journal.read_text().count('"took"') >= 3):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(number)
        status = run.wait(60)
    finally:
        run.kill()
    assert status == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    with journal.open("a") as file:  # as if it had been killed while it wrote
        file.write('{"identity": "')
    if number == signal.SIGKILL:  # nobody was left to write; the journal knows
        subprocess.run(command(tmp_path, "report"), cwd=ROOT, check=True, timeout=120)
    found = results(tmp_path)
    assert len(found["measurements"]) >= 10
    assert all(m["seconds"]["cold"]["median"] > 0 for m in found["measurements"])
    assert "skipped" in {item["status"] for item in found["not measured"]}
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".png"}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    plain = [word for word in command(tmp_path) if word != "--rehearse"]
    run = subprocess.run(plain, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert "needs a CUDA GPU" in run.stderr
    assert len(run.stderr.splitlines()) == 1


@needs_native
def test_the_gpu_tests_hold_on_the_cpu(tmp_path: Path) -> None:
    """So that their own code is right when it first meets a GPU."""
    environment = {**os.environ, "HGFAST_GPU_REHEARSAL": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    script = [sys.executable, "tests/gpu/sanitize.py"]
    assert subprocess.run(script, cwd=ROOT, env=environment, timeout=300).returncode == 0


# ---- When something goes wrong ----


class Broken(Candidate):
    def prepare(self, *_: Any) -> Any:
        raise RuntimeError("no kernel image is available")


class Wrong(Candidate):
    def prepare(self, *arguments: Any) -> Any:
        right = super().prepare(*arguments)
        return lambda: right() * 1.5


class Chosen(Item):
    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return Broken("hgfast", "bf16"), Wrong("eager", "TF32"), EAGER


def test_one_bad_candidate_does_not_stop_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", "x")
    case = Case("bottleneck", 1, 4, REHEARSED)
    Measurer(Rehearsal(), journal).item(Chosen(case, "main", 10))
    found = {r["candidate"]: r for r in journal.latest("measurement").values()}
    assert {name: r["status"] for name, r in found.items()} == {
        "hgfast bf16": "failed",
        "eager TF32": "wrong result",
        "eager bf16 channels_last": "ok",
    }
    assert "no kernel image" in found["hgfast bf16"]["reason"]
    assert [is_failure(r) for r in found.values()] == [True, False, False]
    gone = report.collect(journal)
    assert gone is not None
    assert len(gone["not measured"]) == 2
    assert "no kernel image" in report.markdown(gone)


# What measures a, b and c; b does what the test wants to see.
MEASURING = """
import subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.journal import Journal
path = Path(sys.argv[1])
journal = Journal(path, "x")
skipped = sys.argv[2:]
for item in ("a", "b", "c"):
    if item not in skipped:
        journal.add("item", item, "begun", limit=LIMIT if item == "b" else 60)
        if item == "b":
            TROUBLE
        journal.add("item", item, "ok")
"""


def measured_with(trouble: str, limit: float, folder: Path) -> dict[str, Any]:
    """What becomes of the items where b is such a trouble."""
    path = folder / "journal.jsonl"
    journal = Journal(path, "x")
    children = steps.Children()
    start = children.start
    script = MEASURING.replace("TROUBLE", trouble).replace("LIMIT", str(limit))

    def start_measuring(command: list[str], log: Path) -> subprocess.Popen[bytes]:
        skipped = command[command.index("--skip") + 1 :] if "--skip" in command else []
        return start([sys.executable, "-c", script, str(path), *skipped], log)

    children.start = start_measuring  # type: ignore[method-assign, assignment]
    run = SimpleNamespace(
        args=SimpleNamespace(only=""), journal=journal, deadline=time.time() + 60,
        begun=time.time(), rehearse=True, work=folder, children=children,
        left=lambda: 60.0, _write=lambda: None,
    )  # fmt: skip
    run._watch = lambda child: Run._watch(run, child)  # type: ignore[arg-type]
    run._in_progress = lambda since: Run._in_progress(run, since)  # type: ignore[arg-type]
    Run._bench(run)  # type: ignore[arg-type]
    return {item: record for (_, item), record in journal.latest("item").items()}


def test_a_crash_costs_one_item(tmp_path: Path) -> None:
    found = measured_with('sys.exit("illegal memory access")', 60, tmp_path)
    verdicts = {item: record["status"] for item, record in found.items()}
    assert verdicts == {"a": "ok", "b": "crashed", "c": "ok"}
    assert "illegal memory access" in found["b"]["log"]


def is_running(pid: str) -> bool:
    try:
        state = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # dead, and nobody asked for its exit status yet


def ends(pid: str) -> bool:
    """A signal that was sent takes a moment to arrive."""
    until = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_running(pid)


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


@on_linux
def test_an_item_that_hangs_is_ended_with_its_workers(tmp_path: Path) -> None:
    begun = time.time()
    worker = tmp_path / "worker"
    trouble = (
        'worker = subprocess.Popen(["sleep", "600"]); '
        f"Path({str(worker)!r}).write_text(str(worker.pid)); worker.wait()"
    )
    found = measured_with(trouble, 1, tmp_path)
    verdicts = {item: record["status"] for item, record in found.items()}
    assert verdicts == {"a": "ok", "b": "timed out", "c": "ok"}
    assert ends(worker.read_text())
    assert time.time() - begun < 60


@on_linux
@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("sleep 600 & echo $! >{}; wait", None),
        ("trap '' TERM; sleep 600 & echo $! >{}; wait", None),
        ("sleep 600 & echo $! >{}", 0),
    ],
    ids=["too long", "deaf", "left behind"],
)
def test_nothing_outlives_its_program(
    script: str, status: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers, the program under a sanitizer, pytest's workers."""
    monkeypatch.setattr(steps, "GRACE", 0.5)
    pid = tmp_path / "pid"
    command = ["sh", "-c", script.format(pid)]
    assert steps.Children().run(command, tmp_path / "log", 2, {}) == status
    assert ends(pid.read_text())


def test_peaks_are_an_item_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They can be skipped, and are not tried again where they failed."""
    tried, done = [], []

    def peaks(_: Measurer) -> None:
        tried.append("peaks")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Measurer, "peaks", peaks)
    monkeypatch.setattr(Measurer, "item", lambda _, item: done.append(item.name))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    path = tmp_path / "journal.jsonl"
    command = ["measure", "--journal", str(path), "--identity", "x", "--rehearse"]
    command += ["--deadline", str(time.time() + 60), "--only", "^bottleneck 8x8 batch 2, main"]
    monkeypatch.setattr(sys, "argv", [*command, "--skip", "peaks"])
    assert measure.main() == 0
    assert (tried, done) == ([], ["bottleneck 8x8 batch 2, main"])
    monkeypatch.setattr(sys, "argv", command)
    assert measure.main() == 0
    assert measure.main() == 0
    assert tried == ["peaks"]
    assert len(done) == 1
    record = Journal(path, "x").latest("item")["item", "peaks"]
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: out of memory")


def test_a_lost_device_ends_the_process(tmp_path: Path) -> None:
    class Lost(Rehearsal):
        def synchronise(self) -> None:
            raise RuntimeError("unspecified launch failure")

    def run() -> None:
        raise RuntimeError("out of memory")

    journal = Journal(tmp_path / "journal.jsonl", "x")
    assert measure.attempt(measure.Task("a", 1, run), Rehearsal(), journal)
    assert not measure.attempt(measure.Task("b", 1, run), Lost(), journal)
    verdicts = {name: r["status"] for (_, name), r in journal.latest("item").items()}
    assert verdicts == {"a": "failed", "b": "crashed"}  # the latter is tried in another process


def test_every_test_for_a_gpu_is_run(tmp_path: Path) -> None:
    there = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert {
        one.name for one in steps.tests(tmp_path, rehearse=False) if "/gpu/" in one.name
    } == there


@pytest.mark.parametrize(
    "says", ['print("{\\"grid\\": 1100.0, \\"clusters 2\\": 66.0}")', "exit(1)", ""]
)
def test_what_waiting_costs_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    # In the compiler's place: what it writes is what the program then says.
    compiler = tmp_path / "nvcc"
    program = f"#!{sys.executable}\n{says}\n"
    compiler.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\npath = pathlib.Path(sys.argv[-1])\n"
        f"path.write_text({program!r})\npath.chmod(0o755)\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(compiler))
    journal = Journal(tmp_path / "journal.jsonl", "x")
    steps.costs(journal, steps.Children(), tmp_path, 30, "9.0a")
    record = journal.latest("costs")["costs", "costs"]
    assert record["status"] == ("ok" if "grid" in says else "failed")
    found = report.collect(journal)
    assert found is not None
    assert ("- grid: 1100" in report.markdown(found)) == ("grid" in says)
    assert ("clusters of 2 blocks at once: 66" in report.markdown(found)) == ("grid" in says)


def test_the_rest_of_the_tests_is_short_and_needs_no_verdict(tmp_path: Path) -> None:
    rest = steps.tests(tmp_path, rehearse=False)[-1]
    assert rest.extra
    listed = subprocess.run(
        [*rest.command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, timeout=300
    ).stdout
    assert "tests/test_models.py" in listed
    assert "tests/test_optimize.py" in listed
    for slow in ("emulat", "test_cuda_gates", "tests/gpu/", "test_gpu_run"):
        assert slow not in re.sub(r"::.*", "", listed)

    journal = Journal(tmp_path / "journal.jsonl", "x")
    for extra in (True, False):
        slow_one = steps.Test(f"extra {extra}", ["sleep", "60"], 0.2, extra=extra)
        steps._run(slow_one, journal, steps.Children(), tmp_path, time.time() + 60)
    found = {name: record for (_, name), record in journal.latest("test").items()}
    assert {record["status"] for record in found.values()} == {"timed out"}
    assert "no test is known to have failed" in found["extra True"]["reason"]
    assert not is_failure(found["extra True"])
    assert is_failure(found["extra False"])


def test_an_extra_test_that_took_too_long_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_kinds = [steps.Test(f"extra {extra}", ["true"], 9, extra=extra) for extra in (True, False)]
    monkeypatch.setattr(steps, "tests", lambda *_: both_kinds)
    journal = Journal(tmp_path / "journal.jsonl", "x")
    for one in both_kinds:
        journal.add("test", one.name, "timed out", extra=one.extra)
    steps.test(journal, steps.Children(), tmp_path, time.time() + 60, rehearse=True)
    verdicts = {name: record["status"] for (_, name), record in journal.latest("test").items()}
    assert verdicts == {"extra True": "timed out", "extra False": "ok"}


def test_other_code_and_cut_off_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "old").add("item", "a", "ok")
    journal = Journal(path, "new")
    journal.add("item", "b", "ok")
    journal.add("item", "c", "out of time")
    with path.open("a") as file:
        file.write('{"identity": "new", "kind": "item", "item": "d", "sta')
    assert journal.finished("item") == {"b"}
    assert journal.last_identity() == "new"


# ---- What is counted ----


@pytest.mark.parametrize("op", ["bottleneck", "stem", "head", "HG-1", "conv 1x1"])
def test_flops_are_those_that_torch_counts(op: str) -> None:
    case = Case(op, 2, 64 if op == "HG-1" else 8, REHEARSED)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.module()(*case.inputs(torch.device("cpu")))
    assert case.flops() == counter.get_total_flops()


@pytest.mark.parametrize(
    "op", ["bottleneck", "bottleneck + low", "upsample_add", "stem", "head", "HG-1"]
)
def test_least_bytes_are_inputs_weights_and_results(op: str) -> None:
    case = Case(op, 2, 64 if op == "HG-1" else 8, REHEARSED)
    module, inputs = case.module(), case.inputs(torch.device("cpu"))
    with torch.no_grad():
        tensors = [*module.parameters(), *inputs, *torch.utils._pytree.tree_leaves(module(*inputs))]
    assert case.least_bytes() == 2 * sum(t.numel() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_moves_heatmaps_in_their_dtype(dtype: torch.dtype) -> None:
    case = Case("decode dark", 2, 8, REHEARSED)
    assert case.name == "decode dark 8x6 batch 2"
    inputs = [x.to(dtype) for x in case.inputs(torch.device("cpu"))]
    tensors = [*inputs, *case.module()(*inputs)]
    assert case.least_bytes(dtype) == sum(t.numel() * t.element_size() for t in tensors)


def test_a_network_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate's record tells FLOPs and bytes; to count them takes a network and a trace."""
    traced = []

    def counting(module: torch.nn.Module) -> Any:
        traced.append(module)
        return recognise(module)

    monkeypatch.setattr(cases, "recognise", counting)
    cases._flops_of_network.cache_clear()
    case = Case("HG-1", 3, 64, REHEARSED)
    counted = [(case.flops(), case.least_bytes()) for _ in range(3)]
    assert len(set(counted)) == 1
    assert len(traced) == 1
    assert cases._weights.cache_info().hits >= 2


def test_every_item_has_the_same_yardstick() -> None:
    """Ratios are between candidates that took turns, so ours is in every item."""
    names = [item.name for item in items()]
    assert len(set(names)) == len(names)
    for item in items():
        assert ANCHOR in item.candidates


def test_networks_are_measured_as_they_are_used_and_the_long_ones_last() -> None:
    """With and without a graph; also a float32 model at "medium"."""
    all_items = {item.name: item for item in items()}
    for network in ("HG-2", "HG-8"):
        for batch in (1, 64):
            name = f"{network} 256x256 batch {batch}"
            assert {*both(HGFAST), OWN_GRAPH} <= {*all_items[f"{name}, main"].candidates}
            assert {*both(MEDIUM)} <= {*all_items[f"{name}, dtypes"].candidates}
    order = list(all_items)
    assert order[0] == "bottleneck 64x64 batch 64, main"
    long = order.index("HG-8 256x256 batch 64, main")
    for earlier in (
        "HG-8 256x256 batch 1, main",
        "HG-2 256x256 batch 1, autotune",
        "HG-2 256x256 batch 64, dtypes",
    ):
        assert order.index(earlier) < long
    assert {name for name in order[:long] if name.startswith("HG-8")} == {
        "HG-8 256x256 batch 1, main",
        "HG-8 256x256 batch 1, unproven",
    }
    # Half a minute that every reader wants, before minutes of a compiler.
    assert order.index("HG-2 256x256 batch 1, dtypes") < order.index(
        "HG-2 256x256 batch 1, autotune"
    )


@pytest.mark.parametrize(
    ("capability", "expected"), [([9, 0], "9.0a"), ([8, 6], "8.6"), ([12, 0], "12.0a")]
)
def test_the_build_is_for_this_gpu(capability: list[int], expected: str) -> None:
    assert machine.architecture({"capability": capability}) == expected


# ---- The machine ---------------------------------------------------------------------------------


def test_clocks_are_those_of_the_gpu_that_torch_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may be the first of nvidia-smi."""
    tool, arguments = tmp_path / "nvidia-smi", tmp_path / "arguments"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def ask(says: str, uuid: str | None) -> dict[str, str] | None:
        tool.write_text(f"#!/bin/sh\necho \"$*\" >{arguments}\nprintf '{says}'\n")
        tool.chmod(0o755)
        return machine.smi(("name", "clocks.sm"), uuid)

    one, two = "NVIDIA H200, 1980 MHz\\n", "NVIDIA H200, 1980 MHz\\nNVIDIA T4, 345 MHz\\n"
    expected = {"name": "NVIDIA H200", "clocks.sm": "1980 MHz"}
    query = "--query-gpu=name,clocks.sm --format=csv,noheader"
    for uuid in ("01ab-23", "GPU-01ab-23"):
        assert ask(one, uuid) == expected
        assert arguments.read_text() == f"{query} -i GPU-01ab-23\n"
    assert ask(one, None) == expected  # a torch that tells no uuid: plain where there is one GPU
    assert arguments.read_text() == f"{query}\n"
    assert ask(two, None) is None


@pytest.mark.parametrize("uuid", ["01ab-23", None])
def test_torch_is_asked_for_the_gpu_that_it_uses(
    uuid: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37
    )
    if uuid:
        properties.uuid = uuid
    stub = SimpleNamespace(
        __version__="2.11.0", version=SimpleNamespace(cuda="12.8"),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91000)),
        cuda=SimpleNamespace(is_available=lambda: True, get_device_properties=lambda _: properties),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", stub)
    exec(machine._ASK_TORCH, {})
    facts = json.loads(capsys.readouterr().out)
    assert facts["uuid"] == uuid
    assert facts["L2, bytes"] is None
    monkeypatch.setattr(machine, "said", lambda *_: None)
    assert "uuid" not in machine.facts(facts)  # it says which card it is, not which kind


# ---- Pictures ------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("trouble", ["missing", "broken", "unwritable"])
def test_a_picture_that_cannot_be_drawn_is_missing_and_no_more(
    trouble: str, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "work" / "journal.jsonl", "rehearsal")
    Measurer(Rehearsal(), journal).item(Chosen(Case("bottleneck", 1, 4, REHEARSED), "main", 10))
    Measurer(Rehearsal(), journal).peaks()
    environment = dict(os.environ)
    if trouble == "unwritable":  # below a file; permissions say nothing to root
        (tmp_path / "file").touch()
        environment |= {name: str(tmp_path / "file") for name in ("MPLCONFIGDIR", "HOME")}
    else:
        error = {"missing": "ModuleNotFoundError", "broken": "OSError"}[trouble]
        (tmp_path / "matplotlib.py").write_text(f"raise {error}('no matplotlib here')\n")
        environment["PYTHONPATH"] = str(tmp_path)
    run = subprocess.run(
        command(tmp_path, "report"), cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    written = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert written == {".json", ".md"} | ({".png"} if trouble == "unwritable" else set())
    assert ("no matplotlib here" in run.stderr) == (trouble != "unwritable")
