"""`make gpu`, rehearsed on the CPU: all of it runs here but the GPU's own clock and graphs."""

from __future__ import annotations

import json
import os
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

from benchmarks.gpu import machine, report, steps  # noqa: E402
from benchmarks.gpu.__main__ import Run, is_failure  # noqa: E402
from benchmarks.gpu.cases import ANCHOR, EAGER, REHEARSED, Candidate, Case, Item, items  # noqa: E402
from benchmarks.gpu.device import Rehearsal  # noqa: E402
from benchmarks.gpu.journal import Journal  # noqa: E402
from benchmarks.gpu.measure import Measurer  # noqa: E402
from hgfast import _native  # noqa: E402

needs_native = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))
SHORT = "8x8 batch 2, (main|compile)|HG-1 .* batch 1, (main|compile)"


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
        while not (journal.is_file() and journal.read_text().count('"took"') >= 2):
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


CRASHING = """
import sys
from pathlib import Path
from benchmarks.gpu.journal import Journal
journal = Journal(Path(sys.argv[1]), "x")
skipped = sys.argv[2:]
for item in ("a", "b", "c"):
    if item not in skipped:
        journal.add("item", item, "begun", limit=60)
        if item == "b":
            sys.exit("illegal memory access")
        journal.add("item", item, "ok")
"""


def test_a_crash_costs_one_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "x")
    children = steps.Children()
    start = children.start

    def crashing(command: list[str], log: Path) -> subprocess.Popen[bytes]:
        skipped = command[command.index("--skip") + 1 :] if "--skip" in command else []
        return start([sys.executable, "-c", CRASHING, str(path), *skipped], log)

    monkeypatch.setattr(children, "start", crashing)
    run = SimpleNamespace(
        args=SimpleNamespace(only=""), journal=journal, deadline=time.time() + 60,
        begun=time.time(), rehearse=True, work=tmp_path, children=children,
        left=lambda: 60.0, _write=lambda: None,
    )  # fmt: skip
    run._watch = lambda child: Run._watch(run, child)  # type: ignore[arg-type]
    run._in_progress = lambda since: Run._in_progress(run, since)  # type: ignore[arg-type]
    Run._bench(run)  # type: ignore[arg-type]
    found = {item: record for (_, item), record in journal.latest("item").items()}
    assert {item: r["status"] for item, r in found.items()} == {
        "a": "ok",
        "b": "crashed",
        "c": "ok",
    }
    assert "illegal memory access" in found["b"]["log"]


def test_an_item_that_hangs_is_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", "x")
    begun = time.time()
    run = SimpleNamespace(
        journal=journal, begun=begun, rehearse=True, left=lambda: 60.0, _write=lambda: None
    )
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    journal.add("item", "slow", "begun", limit=0.1)
    assert Run._watch(run, child) == "overdue"  # type: ignore[arg-type]
    assert child.poll() is not None
    assert time.time() - begun < 30


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


@pytest.mark.parametrize("op", ["bottleneck", "HG-1", "conv 1x1"])
def test_flops_are_those_that_torch_counts(op: str) -> None:
    case = Case(op, 2, 64 if op == "HG-1" else 8, REHEARSED)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.module()(*case.inputs(torch.device("cpu")))
    assert case.flops() == counter.get_total_flops()


@pytest.mark.parametrize("op", ["bottleneck", "bottleneck + low", "upsample_add", "HG-1"])
def test_least_bytes_are_inputs_weights_and_results(op: str) -> None:
    case = Case(op, 2, 64 if op == "HG-1" else 8, REHEARSED)
    module, inputs = case.module(), case.inputs(torch.device("cpu"))
    with torch.no_grad():
        tensors = [*module.parameters(), *inputs, *torch.utils._pytree.tree_leaves(module(*inputs))]
    assert case.least_bytes() == 2 * sum(t.numel() for t in tensors)


def test_every_item_has_the_same_yardstick() -> None:
    """Ratios are between candidates that took turns, so ours is in every item."""
    names = [item.name for item in items()]
    assert len(set(names)) == len(names)
    for item in items():
        assert ANCHOR in item.candidates
    first = [item.name for item in items()[:5]]
    assert first[0] == "bottleneck 64x64 batch 64, main"


@pytest.mark.parametrize(
    ("capability", "expected"), [([9, 0], "9.0a"), ([8, 6], "8.6"), ([12, 0], "12.0a")]
)
def test_the_build_is_for_this_gpu(capability: list[int], expected: str) -> None:
    assert machine.architecture({"capability": capability}) == expected
