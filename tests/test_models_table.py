"""docs/models.md: its table is what its JSON says, and the command that makes both works."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import models  # noqa: E402
from hgfast import _native  # noqa: E402

needs_native = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("models-*.json"))

# Depthwise convolutions have no kernel.
SHARES = {"light hourglass": 0.95}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def a_row(network: str = "CPN", precision: str = "highest", **other: Any) -> models.Row:
    row = {
        "network": network,
        "input": [1, 3, 256, 192],
        "precision": precision,
        "runs": ["avx512 float32", "PyTorch"],
        "share": 1.0,
        "error": 0.5,
        "faults": [],
        "ms": {"eager": 30.0, "eager channels_last": 20.0, "torch.compile": 9.0, "hgfast": 10.0},
        "timing": {"spread": {"hgfast highest": 1.02}},
        "versions": {"torch": "2.13.0"},
    }
    return {**row, **other}


# --- what is committed ---


def test_the_page_says_what_the_json_says() -> None:
    shown = models.DOCS.read_text().split(models.BEGIN)[1].split(models.END)[0].strip()
    made = [models.shown(read(path), path.name) for path in RESULTS]
    assert shown in (made or [""])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_rows(path: Path) -> None:
    rows = read(path)["rows"]
    found = [(row["network"], row["precision"]) for row in rows]
    assert found == [(name, p) for name in models.NETWORKS for p in models.PRECISIONS]
    for row in rows:
        assert 1 >= row["share"] >= SHARES.get(row["network"], 1.0), row
        assert 0 < row["error"] <= 1, row
        assert not row["faults"], row
        speedup = models.speedup(row, "eager")
        assert speedup is not None
        assert speedup >= 1, row


# --- the command, on small networks ---


@needs_native
def test_small_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every family and precision, end to end; torch.compile has a test of its own."""
    threads, out = torch.get_num_threads(), tmp_path / "small.json"
    names = [name for name in models.NETWORKS if "batch" not in name and name != "newell HG-8"]
    try:
        given = ["--small", "--no-compile", "--seconds", "0", "--threads", "1", "--out", str(out)]
        assert models.main([*given, "--networks", *names]) == 0, capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
    rows = read(out)["rows"]
    assert [(row["network"], row["precision"]) for row in rows] == [
        (name, precision) for name in names for precision in models.PRECISIONS
    ]
    for row in rows:
        case = models.NETWORKS[row["network"]]
        assert tuple(row["input"]) == case.shape(small=True)
        assert 1 >= row["share"] >= SHARES.get(row["network"], 1.0), row
        assert 0 < row["error"] <= 1, row
        assert not row["faults"], row
        assert row["gflops"] > 0
        assert any("bfloat16" in path for path in row["runs"]) == (row["precision"] == "medium")
        assert set(row["ms"]) == {"eager", "eager channels_last", "hgfast"}
        assert all(ms > 0 for ms in row["ms"].values()), row
    printed = capsys.readouterr().out
    assert all(line in printed for line in models.table(rows)[2:])


@needs_native
def test_torch_compile_takes_part(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "small.json"
    given = ["--small", "--seconds", "0", "--threads", "1", "--out", str(out)]
    try:
        assert models.main([*given, "--networks", "mmpose HG-52", "--precisions", "highest"]) == 0
    finally:
        torch.set_num_threads(threads)
    (row,) = read(out)["rows"]
    assert row["ms"]["torch.compile"] > 0, row.get("compile_fault")
    assert row["compile_seconds"] > 0
    assert models.speedup(row, "torch.compile") == pytest.approx(
        row["ms"]["torch.compile"] / row["ms"]["hgfast"]
    )


def test_a_network_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(job: models.Job) -> list[models.Row]:
        if job.network == "CPN":
            raise RuntimeError("no memory")
        return [a_row(job.network, precision) for precision in job.precisions]

    monkeypatch.setattr(models, "measure", measure)
    out = tmp_path / "rows.json"
    given = ["--small", "--out", str(out), "--networks", "CPN", "FAN-4"]
    assert models.main(given) == 1
    assert "CPN: RuntimeError: no memory" in capsys.readouterr().err
    assert {row["network"] for row in read(out)["rows"]} == {"FAN-4"}


# --- the JSON and the table ---


def test_rows_replace_those_of_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "models.json"
    models.merge(path, [a_row("FAN-4"), a_row("CPN", "medium"), a_row("CPN")])
    models.merge(path, [a_row("CPN", error=0.25), a_row("CPN", input=[8, 3, 256, 192])])
    rows = read(path)["rows"]
    assert [(r["network"], r["precision"], r["input"][0], r["error"]) for r in rows] == [
        ("FAN-4", "highest", 1, 0.5),
        ("CPN", "highest", 1, 0.25),
        ("CPN", "highest", 8, 0.5),
        ("CPN", "medium", 1, 0.5),
    ]
    assert list(path.parent.iterdir()) == [path]


def test_results_of_another_machine_stay(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    models.merge(path, [a_row()])
    other = read(path) | {"machine": {"processor": "another"}}
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="is of another machine"):
        models.merge(path, [a_row()])
    assert read(path) == other


def test_a_line() -> None:
    slow = {"eager": 20.0, "eager channels_last": 30.0, "hgfast": 40.0}
    rows = [a_row(), a_row(precision="medium", share=0.9996, ms=slow, faults=["[0]: max error"])]
    assert models.table(rows)[2:] == [
        "| CPN | 1x3x256x192 | highest | avx512 float32 + PyTorch | 100 % | 0.50 | 10 | 2.00 "
        "| 0.90 |",
        "| CPN | 1x3x256x192 | medium | avx512 float32 + PyTorch | 99.9 % | 0.50 | 40 "
        "| 0.50 (NCHW) |  |",
    ]
    told = "\n".join(models.surprises(rows))
    assert 'Slower than eager: CPN "medium" 0.50' in told
    assert 'Slower than torch.compile: CPN "highest" 0.90' in told
    assert 'Beyond what verify allows: CPN "medium" 0.50 ([0]: max error)' in told
    assert 'Not all FLOPs replaced: CPN "medium" 99.9 %' in told
    assert '"high" ran' not in told
    assert "differed by 2 % (median)" in models.shown({"machine": {}, "rows": rows}, "x.json")


def test_the_page_is_replaced_between_its_markers(tmp_path: Path) -> None:
    results, docs = tmp_path / "models-x.json", tmp_path / "models.md"
    models.merge(results, [a_row()])
    docs.write_text(f"# Title\n\n{models.BEGIN}\nold\n{models.END}\n\nThe end.\n")
    for _ in range(2):
        models.write_docs(results, docs)
    text = docs.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nThe end.\n")
    assert models.shown(read(results), results.name) in text
    assert "old" not in text
    assert text.count("| CPN |") == 1
