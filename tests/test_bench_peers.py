"""`make bench-peers`: what its pages say is what its JSON says, and the command works without the
other engines."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import record  # noqa: E402
from benchmarks.peers import __main__ as peers  # noqa: E402
from benchmarks.peers import engines, limits, measure, pages, plot  # noqa: E402
from hgfast import _native  # noqa: E402

needs_native = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("peers-*.json"))

# What is installed wherever the tests run, torch.compile left out: it takes a minute.
HERE = [
    name
    for name, engine in engines.ENGINES.items()
    if not engine.package and not name.startswith("torch.compile")
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def a_row(
    ms: dict[str, float],
    stacks: int = 2,
    size: int = 256,
    batch: int = 1,
    threads: int = 2,
    **more: Any,
) -> dict[str, Any]:
    def candidate(name: str, time: float) -> dict[str, Any]:
        return {
            "group": engines.ENGINES[name].group, "setting": "cpu amx float32", "rel": 3e-7,
            "max": 5e-7, "argmax": 1.0, "prepare_seconds": 1.0, "once_ms": time, "ms": time,
            "samples": [[9 * time] * 3 + [time] * 5] * 4,
        }  # fmt: skip

    row = {
        "network": f"HG-{stacks}", "size": size, "batch": batch, "threads": threads,
        "features": 256, "gflops": 10.0 * batch,
        "candidates": {name: candidate(name, time) for name, time in ms.items()},
        "bfloat16 instructions": True, "left_out": {}, "faults": {},
        "timing": {"blocks": 4, "calls": 8, "dropped": 3, "seconds": 5.0},
        "limits": {"before": {"float32": [180.0, 200.0]}, "after": {"float32": [190.0, 150.0]}},
        "load": 0.1, "engines": {"openvino": "1.2"}, "versions": {"torch": "3.4"},
    }  # fmt: skip
    return {**row, **more}


TIMES = {"eager": 200.0, "OpenVINO": 100.0, "hgfast highest": 80.0, "hgfast high": 40.0}
HALVES = {"OpenVINO bfloat16": 50.0, "hgfast medium": 26.0, "hgfast bfloat16": 25.0}


def results() -> dict[str, Any]:
    rows = [
        *(a_row({**TIMES, **HALVES}, batch=batch, threads=n) for n in (2, 1) for batch in (1, 8)),
        a_row({**TIMES, **HALVES}, stacks=8),
        a_row(TIMES, size=512),
        a_row(TIMES, stacks=1),
    ]
    return {"machine": record.machine(), "rows": rows}


# --- what is committed ---


@pytest.mark.parametrize(
    ("page", "made"), [(pages.PAGE, pages.shown), (pages.README, pages.quoted)]
)
def test_the_pages_say_what_the_json_says(page: Path, made: Any) -> None:
    """Of one machine; or that nothing is measured yet."""
    shown = page.read_text().split(pages.BEGIN)[1].split(pages.END)[0].strip()
    assert shown in ([made(read(path), path.name) for path in RESULTS] or [pages.NOT_YET])


def test_readme_has_no_other_numbers_of_speed() -> None:
    section = pages.README.read_text().split("## Speed")[1].split("\n## ")[0]
    others = re.sub(f"{pages.BEGIN}.*{pages.END}", "", section, flags=re.DOTALL)
    assert not re.findall(r"\d+(?:\.\d+)? ?(?:ms|%)|\b\d\.\d\d\b", others)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_rows(path: Path) -> None:
    rows = read(path)["rows"]
    assert rows
    for row in rows:
        assert not row["faults"], row["faults"]
        timing = row["timing"]
        for name, held in row["candidates"].items():
            assert not measure.fault(name, held), (pages.title(row), name)
            assert len(held["samples"]) == timing["blocks"]
            assert {len(block) for block in held["samples"]} == {timing["calls"]}
            medians = [statistics.median(block[timing["dropped"] :]) for block in held["samples"]]
            assert statistics.median(medians) == pytest.approx(held["ms"], abs=2e-3)
        slowest = max(held["once_ms"] for held in row["candidates"].values())
        full = timing["calls"] >= 8 and timing["dropped"] >= 3 and timing["blocks"] >= 2
        assert full or slowest > 1000, (pages.title(row), timing)
        for when in ("before", "after"):
            assert min(row["limits"][when]["float32"]) > 0
    assert all((pages.PAGE.parent / name).is_file() for name in (pages.BATCHES, pages.CURVES))


def test_the_library_knows_nothing_of_the_engines() -> None:
    for file in (ROOT / "hgfast").rglob("*.py"):
        assert not re.search(r"import (openvino|onnxruntime|onnx)\b", file.read_text()), file


# --- the command, on small networks ---


@needs_native
@needs_compiler
def test_small_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of part, end to end, to pages and plots."""
    monkeypatch.setattr(measure, "FULL", ((2, 8, 3),))
    out = tmp_path / "peers-small.json"
    given = ["--small", "--minutes", "5", "--threads", "1", "--out", str(out)]
    code = peers.main([*given, "--only", "batch 1 ", "--candidates", *HERE])
    assert code == 0, capsys.readouterr().err
    rows = read(out)["rows"]
    assert [(row["network"], row["size"]) for row in rows] == [
        ("HG-2", 64), ("HG-2", 128), ("HG-1", 64)
    ]  # fmt: skip
    assert set(rows[0]["candidates"]) == set(HERE)
    for row in rows:
        assert row["timing"].items() >= {"blocks": 2, "calls": 8, "dropped": 3}.items()
        assert not row["faults"]
        assert row["gflops"] > 0
        assert row["limits"]["before"]["float32"]
        for name, held in row["candidates"].items():
            samples = held["samples"]
            assert [len(block) for block in samples] == [8, 8]
            medians = [statistics.median(block[3:]) for block in samples]
            assert held["ms"] == pytest.approx(statistics.median(medians), abs=1e-3)
            assert 0 < held["rel"] < (0.05 if "bfloat16" in name or "medium" in name else 1e-5)
            assert held["setting"]
    assert (
        rows[0]["candidates"]["hgfast highest"]["setting"].startswith("cpu ") or not _native.load()
    )

    # What a cut run has left, and nothing else.
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            peers, "measure", lambda part: seen.append(part.name) or {**rows[0], "batch": 2}
        )
        assert peers.main([*given, "--missing", "--candidates", "eager"]) == 0
    assert seen == ["HG-2 64x64 batch 2 threads 1"]
    assert len(read(out)["rows"]) == len(rows) + 1

    page, readme = tmp_path / "page.md", tmp_path / "readme.md"
    for each in (page, readme):
        each.write_text(f"# A title\n{pages.BEGIN}\nold\n{pages.END}\nThe end.\n")
    pages.write(out, page, readme)
    assert (tmp_path / pages.CURVES).stat().st_size > 10_000
    for each in (page, readme):
        assert "old" not in each.read_text()
        assert each.read_text().endswith("The end.\n")


@needs_native
@needs_compiler
def test_a_wrong_output_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not timed and fails the run; so does an engine that raises. The others are measured."""

    def off_by_a_cell(model: torch.nn.Module, x: torch.Tensor, threads: int) -> engines.Made:
        return engines.Made(lambda: [y.roll(1, 3) for y in model(x)], list, "shifted")

    def without_a_stack(model: torch.nn.Module, x: torch.Tensor, threads: int) -> engines.Made:
        return engines.Made(lambda: model(x)[1:], list, "cut")

    def broken(model: torch.nn.Module, x: torch.Tensor, threads: int) -> engines.Made:
        raise OSError("no such library")

    for name, make in (
        ("eager", off_by_a_cell),
        ("eager channels_last", without_a_stack),
        ("eager bfloat16", broken),
    ):
        monkeypatch.setitem(engines.ENGINES, name, replace(engines.ENGINES[name], make=make))
    monkeypatch.setattr(measure, "FULL", ((2, 8, 3),))
    out = tmp_path / "peers.json"
    given = ["--small", "--only", "HG-2 64x64 batch 1", "--threads", "1", "--out", str(out)]
    assert peers.main([*given, "--minutes", "1", "--candidates", *HERE]) == 1
    (row,) = read(out)["rows"]
    assert set(row["candidates"]) == {name for name in HERE if name.startswith("hgfast")}
    assert "wrong output: rel error" in row["faults"]["eager"]
    assert "outputs of shapes" in row["faults"]["eager channels_last"]
    assert row["faults"]["eager bfloat16"] == "OSError: no such library"
    said = capsys.readouterr().err
    assert all(name in said for name in row["faults"])
    assert any(line.startswith("Failed: eager (HG-2") for line in pages.remarks([row]))


@needs_compiler
def test_a_part_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(part: measure.Part) -> dict[str, Any]:
        if part.batch > 1:
            raise RuntimeError("no memory")
        return a_row(TIMES, stacks=part.stacks, size=part.size, threads=part.threads)

    monkeypatch.setattr(peers, "measure", measured)
    out = tmp_path / "peers.json"
    given = ["--small", "--threads", "1", "--out", str(out), "--candidates", *TIMES.keys() & HERE]
    assert peers.main(given) == 1
    assert "batch 2 threads 1: RuntimeError: no memory" in capsys.readouterr().err
    assert len(read(out)["rows"]) == 3


# --- machines, engines ---


def test_another_machines_results_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "peers.json"
    other = {**results(), "machine": {"processor": "another"}}
    path.write_text(json.dumps(other))
    monkeypatch.setattr(peers.limits, "build", lambda folder: pytest.fail("it measures"))
    for more in ([], ["--missing"]):
        with pytest.raises(ValueError, match="is of another machine"):
            peers.main(["--small", "--out", str(path), "--candidates", "eager", *more])
    assert read(path) == other


def test_what_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = replace(engines.ENGINES["OpenVINO"], package="a_package_that_is_nowhere")
    monkeypatch.setitem(engines.ENGINES, "OpenVINO", engine)
    with pytest.raises(SystemExit):
        peers.main(["--candidates", "eager", "OpenVINO", "--out", str(tmp_path / "x.json")])
    said = capsys.readouterr().err
    assert "not installed: a_package_that_is_nowhere; `make bench-peers` installs them" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--small"], "--small needs --out"),
        (["--candidates", "eager"], "--candidates needs --out"),
        (["--only", "HG-3"], "--only HG-3: no such part"),
        (["--threads", "0"], "this machine has"),
        (["--threads", "1", "100000"], "this machine has"),
        (["--candidates", "nobody"], "invalid choice"),
    ],
)
def test_bad_arguments(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(given)
    assert message in capsys.readouterr().err


def test_pinned_engines() -> None:
    """Every package that a candidate needs is pinned for `make bench-peers`."""
    text = (ROOT / "requirements-bench.txt").read_text()
    pinned = set(re.findall(r"^([\w-]+)==[\d.]+$", text, re.MULTILINE))
    assert {engine.package for engine in engines.ENGINES.values()} - {""} <= pinned


# --- who takes part, how often ---


def test_the_parts() -> None:
    found = list(peers.parts([1, 2]))
    keys = {(part.stacks, part.size, part.batch, part.threads) for part in found}
    assert len(keys) == len(found)
    assert {(2, 256, batch, n) for batch in (1, 8, 32) for n in (1, 2)} < keys
    assert (8, 256, 1, 2) in keys
    assert {(2, size, 1, 2) for size in (128, 256, 512, 1024)} < keys
    assert {(stacks, 256, 1, 2) for stacks in (1, 2, 4, 8)} < keys
    assert {part.threads for part in peers.parts([1])} == {1}


def test_who_is_left_out() -> None:
    def names(part: measure.Part, bfloat16: bool) -> set[str]:
        made = peers.invited(part, list(engines.ENGINES), bfloat16)
        assert set(made.candidates) ^ set(dict(made.left_out)) == set(engines.ENGINES)
        return set(made.candidates)

    everyone = set(engines.ENGINES)
    halves = {name for name in everyone if engines.ENGINES[name].bfloat16}
    assert names(measure.Part(2, 256, 1, 2), False) == everyone
    assert names(measure.Part(2, 256, 8, 2), True) == everyone
    assert names(measure.Part(2, 256, 8, 2), False) == everyone - halves
    compiled = {"torch.compile", "torch.compile bfloat16"}
    assert names(measure.Part(8, 256, 1, 2), True) == everyone - compiled
    assert names(measure.Part(2, 512, 1, 2, curve=True), True) == set(peers.CURVES)
    assert names(measure.Part(2, 512, 1, 2, curve=True), False) == set(peers.CURVES) - halves


def test_the_schedule() -> None:
    fast = {"eager": 0.2, "OpenVINO": 0.1, "hgfast highest": 0.1}
    assert measure.schedule(fast, 100) == ((8, 8, 3), {})
    assert measure.schedule(fast, 0.4 * 8 * 3.5) == ((3, 8, 3), {})
    # Never fewer calls where they are short: rather without the slowest.
    way, too_slow = measure.schedule(fast, 0.4 * 8 * 1.9)
    assert (way, list(too_slow)) == ((3, 8, 3), ["eager"])
    # hgfast and the fastest other stay whatever happens.
    way, too_slow = measure.schedule(fast, 0)
    assert (way, list(too_slow)) == ((2, 8, 3), ["eager"])
    assert "200 ms once" in too_slow["eager"]
    slow = {name: 20 * seconds for name, seconds in fast.items()}
    assert measure.schedule(slow, 8 * 8) == ((2, 4, 1), {})
    assert measure.schedule(slow, 8 * 8 * 7.5)[0] == (7, 8, 3)
    groups = {"OpenVINO": 5.0, "eager": 9.0, "OpenVINO bfloat16": 7.0, "eager bfloat16": 8.0}
    _, too_slow = measure.schedule(groups, 0)
    assert set(too_slow) == {"eager", "eager bfloat16"}


def test_judged() -> None:
    expected = [torch.rand(2, 3, 4, 4, dtype=torch.float64) for _ in range(2)]
    exact = {"rel": 0.0, "max": 0.0, "argmax": 1.0}
    assert measure.judged(list(expected), expected) == exact
    off = [expected[0], expected[1].clone()]
    off[1][0, 0, 0, 0] += 2 * off[1].max()  # one cell, now the largest
    errors = measure.judged(off, expected)
    assert errors["max"] > 1
    assert errors["argmax"] == 11 / 12
    assert measure.fault("eager", errors)
    assert measure.fault("eager", {**exact, "rel": float("nan")})
    assert measure.fault("eager", {**exact, "max": 2e-4})
    assert not measure.fault("hgfast high", {**exact, "rel": 1.9e-5})
    assert measure.fault("hgfast high", {**exact, "rel": 2.1e-5})
    with pytest.raises(ValueError, match="outputs of shapes"):
        measure.judged(expected[:1], expected)


def test_images_of_a_batch_are_those_of_a_larger() -> None:
    assert torch.equal(measure.images(2, 8), measure.images(5, 8)[:2])


# --- the limits ---


@needs_compiler
def test_the_limits(tmp_path: Path) -> None:
    program = limits.build(tmp_path)
    found = limits.measure(program, 1, 0.02)
    assert len(found["float32"]) == 10
    assert 0.1 < limits.highest(found)["float32"] < 1000  # GFLOP/s of a core
    for threads in ("0", "x"):
        assert subprocess.run([program, threads], capture_output=True).returncode == 2


def test_the_highest_of_all_windows() -> None:
    before, after = {"float32": [1.0, 3.0]}, {"float32": [2.0], "amx_bf16": [9.0]}
    assert limits.highest(before, after) == {"float32": 3.0, "amx_bf16": 9.0}


@needs_compiler
def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int main() { return nothing; }\n")
    monkeypatch.setattr(limits, "SOURCE", source)
    with pytest.raises(RuntimeError, match="does not compile"):
        limits.build(tmp_path)


def test_the_ceiling_of_each_arithmetic() -> None:
    tiles = {"float32": [200.0], "avx512_bf16": [400.0], "amx_bf16": [3000.0]}
    row = a_row({**TIMES, **HALVES}, limits={"before": tiles, "after": tiles})
    assert pages.ceiling(row, "hgfast highest") == ("float32", 200.0)
    assert pages.ceiling(row, "hgfast bfloat16") == ("amx_bf16", 3000.0)
    assert pages.ceiling(row, "hgfast high") == ("a third of amx_bf16", 1000.0)
    row = a_row({**TIMES, **HALVES})
    assert pages.ceiling(row, "hgfast bfloat16") == ("float32", 200.0)


# --- pages and plots ---


def test_tables() -> None:
    found = results()["rows"]
    assert pages.table(found[:1], "float32") == [
        "| network, input, batch, threads | blocks x calls | fastest other | ms | eager | OpenVINO "
        "| **hgfast highest** | **hgfast high** |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        "| HG-2, 256x256, batch 1, 2 threads | 4 x 5 of 8 | OpenVINO | 100 | 2.00 | 1.00 "
        "| **0.80** | **0.40** |",
    ]
    assert pages.table(found[:1], "bfloat16")[2].endswith("| 1.00 | **0.52** | **0.50** |")
    # 10 GFLOP in 80 ms, of 200 GFLOP/s.
    assert (
        "| HG-2, 256x256, batch 1, 2 threads | **hgfast highest** | 125 | 200 (float32) "
        "| **62 %** |" in pages.rates_table(found[:1])
    )
    quoted = pages.quoted(results(), "x.json").splitlines()
    assert quoted[0] == "| time relative to hgfast in the same group | batch 1 | batch 8 |"
    assert "| OpenVINO | 1.25 | 1.25 |" in quoted
    assert "| **hgfast bfloat16** | **1.00** | **1.00** |" in quoted
    assert "2 threads" in quoted[-1]


def test_remarks() -> None:
    slow = "too slow for the time of this part: 2900 ms once"
    row = a_row(TIMES, load=2.5, left_out={"torch.compile": slow, "eager bfloat16": "no need"})
    row["bfloat16 instructions"] = False
    row["candidates"]["OpenVINO"]["tried_ms"] = {"a": 1.0, "b": 2.0}
    row["candidates"]["eager"]["samples"] = [[1.0] * 8, [1.5] * 8]
    told = "\n".join(pages.remarks([row]))
    assert "no instructions that multiply in bfloat16" in told
    assert "Too slow for the time of its part: torch.compile (2900 ms once) in HG-2" in told
    assert "no need" not in told
    assert "The fastest setting for a batch. OpenVINO: cpu amx float32, for HG-2" in told
    assert (
        "Something else ran on the machine when 1 of 1 parts began (load average up to 2.5" in told
    )
    assert "differed by 0 % (median), at most by 50 %" in told
    assert "before and after a part differed by up to 5 %" in told


def test_rows_are_in_order_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    for row in reversed(results()["rows"]):
        record.merge(path, [row], pages.key, pages.order)
    record.merge(path, [a_row({"eager": 1.0}, batch=8)], pages.key, pages.order)
    rows = read(path)["rows"]
    assert [pages.key(row) for row in rows] == [
        (2, 256, 1, 2), (2, 256, 8, 2), (2, 256, 1, 1), (2, 256, 8, 1), (1, 256, 1, 2),
        (8, 256, 1, 2), (2, 512, 1, 2),
    ]  # fmt: skip
    assert list(rows[1]["candidates"]) == ["eager"]
    assert '"float32": [ 180.0, 200.0 ]' in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_the_plots(tmp_path: Path) -> None:
    assert plot.draw(results(), tmp_path) == [tmp_path / pages.BATCHES, tmp_path / pages.CURVES]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 2
    # One part alone has no curve; tiles are far beyond the multiply-adds.
    tiles = {"float32": [200.0], "amx_bf16": [3000.0]}
    alone = a_row({**TIMES, **HALVES}, limits={"before": tiles, "after": tiles})
    one = {**results(), "rows": [alone]}
    assert plot.draw(one, tmp_path) == [tmp_path / pages.BATCHES]
    assert set(engines.ENGINES) == set(plot.COLOURS)


def test_labels_keep_apart() -> None:
    wanted = [(10.0, "a"), (11.0, "b"), (12.0, "c"), (99.0, "d"), (50.0, "e")]
    places = plot.spread(wanted, 10, 0, 100)
    heights = [places[name] for name in "abced"]
    assert all(b - a >= 10 for a, b in pairwise(heights))
    assert places["e"] == 50
    assert max(heights) <= 100
    assert plot.spread([(98.0, "a"), (99.0, "b")], 10, 0, 100) == {"a": 90.0, "b": 100.0}


# --- the benchmarks of single ops ---


@needs_native
def test_every_op_has_a_benchmark() -> None:
    plan = type(_native.load().CpuPlan("float32"))  # type: ignore[union-attr]
    others = {"finish", "run", "profile", "path", "products"}
    steps = {name for name in dir(plan) if not name.startswith("_")} - others
    found = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert steps | {"decode", "relayout", "hourglass"} <= found


@needs_native
def test_the_benchmarks_of_ops_run() -> None:
    command = [
        sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-x",
        "-p", "no:cacheprovider", "-k", "hgfast and float32 and not bench_decode or 2-1-hgfast",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 25  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("native", "of_its_name", "expected"),
    [
        (("cascadelake", False), ("cascadelake", False), "cascadelake"),
        (("sapphirerapids", True), ("sapphirerapids", True), "sapphirerapids"),
        (("rocketlake", True), ("rocketlake", False), f"{os.uname().machine}-amx"),
    ],
)
def test_results_are_named_by_the_processor(
    monkeypatch: pytest.MonkeyPatch,
    native: tuple[str, bool],
    of_its_name: tuple[str, bool],
    expected: str,
) -> None:
    """But not by a model's name that its instructions belie."""
    monkeypatch.setattr(record, "_target", {"native": native, native[0]: of_its_name}.__getitem__)
    assert record.default_path("peers").name == f"peers-{expected}-{record.cores()}cores.json"
