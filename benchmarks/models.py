"""The table of docs/models.md: network x precision, what hgfast replaces, how exact, how fast.

    make models                                     # every network at its true size
    make models MODELS_ARGS="--networks CPN FAN-4 --no-compile"
    .venv/bin/python -m benchmarks.models --help

Each network is measured in a process of its own, float32 and bfloat16 one after the other, and
the JSON is written after each: a run that is cut is continued with --networks. Rows replace those
of the same network, input and precision; the others stay. Then the table in docs/models.md is
written anew from all of them (--docs does only that).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the networks are those of the tests

from field import FIELD, newell, prepared, princeton  # noqa: E402

import hgfast  # noqa: E402
from benchmarks import record  # noqa: E402
from benchmarks.record import Row, facts  # noqa: E402
from hgfast._timing import time_alternately  # noqa: E402
from hgfast.reporting import is_kernel  # noqa: E402

DOCS: Final = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PRECISIONS: Final = ("highest", "high", "medium")
EAGER: Final = ("eager", "eager channels_last")
COMPILE: Final = "torch.compile"


@dataclass(frozen=True)
class Network:
    """One line of the table for each precision.

    Attributes:
        case: the network of tests/field.
        build: the full one, where it is not the case's.
        batch: images in its input.
        compiled: whether torch.compile takes part: it needs minutes for the large ones.
    """

    name: str
    case: str
    build: Callable[[], nn.Module] | None = None
    batch: int = 1
    compiled: bool = True

    def made(self, small: bool) -> nn.Module:
        case = FIELD[self.case]
        torch.manual_seed(0)
        return prepared((case.build_small if small else self.build or case.build_full)())

    def shape(self, small: bool) -> tuple[int, ...]:
        case = FIELD[self.case]
        return (self.batch, *(case.shapes[0] if small else case.full_shape)[1:])


_NETWORKS = (
    Network("newell HG-2", "newell", partial(newell.Original, stacks=2)),
    Network("newell HG-2, batch 8", "newell", partial(newell.Original, stacks=2), 8, False),
    Network("newell HG-8", "newell", compiled=False),
    Network("bearpaw HG-8", "bearpaw", compiled=False),
    Network("bearpaw HG-2, GroupNorm", "bearpaw with GroupNorm", compiled=False),
    Network("princeton HG-2", "princeton", partial(princeton.PoseNet, stacks=2), compiled=False),
    Network("pose-ae", "pose-ae", compiled=False),
    Network("mmpose HG-52", "mmpose HG-52"),
    Network("HG-104", "large hourglass", compiled=False),
    Network("light hourglass", "light hourglass", compiled=False),
    Network("FAN-4", "FAN", compiled=False),
    Network("SimpleBaseline-50", "SimpleBaseline-50"),
    Network("SimpleBaseline-50, batch 8", "SimpleBaseline-50", None, 8, False),
    Network("HRNet-W32", "HRNet"),
    Network("CPN", "CPN"),
    Network("dilated ResNet", "dilated ResNet", compiled=False),
)
NETWORKS: Final = {network.name: network for network in _NETWORKS}


@dataclass(frozen=True)
class Job:
    """What one process measures: precisions of one network that have their rivals in common.

    ``seconds`` are what the timing may take, about; ``threads`` None leaves torch's own number.
    """

    network: str
    precisions: tuple[str, ...]
    compiled: bool
    small: bool
    seconds: float
    threads: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the model that hgfast is compared with."""
        return torch.bfloat16 if self.precisions == ("medium",) else torch.float32


# --- Measuring ---


def measure(job: Job) -> list[Row]:
    """The rows of a job. Without gradients, with random weights and norms that are not trivial."""
    if job.threads:
        torch.set_num_threads(job.threads)
    network = NETWORKS[job.network]
    model, shape = network.made(job.small), network.shape(job.small)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows, calls = [], {}
    with warnings.catch_warnings(), torch.inference_mode():
        # A region that silently ran eagerly would be timed as hgfast.
        warnings.simplefilter("error", hgfast.HgfastWarning)
        for precision in job.precisions:
            fast = hgfast.optimize(model, precision)
            row, calls[f"hgfast {precision}"] = _judged(model, fast, x), partial(fast, x)
            rows.append({"network": job.network, "input": list(shape), **row})
    with warnings.catch_warnings(), torch.no_grad():  # freezing asks for no_grad
        warnings.simplefilter("ignore")  # torch.compile's own
        rivals, notes = _rivals(model.to(job.dtype), x.to(job.dtype), job.compiled)
    with torch.inference_mode():
        times, how = timed({**rivals, **calls}, job.seconds)
    for row, precision in zip(rows, job.precisions, strict=True):
        own = {"hgfast": times[f"hgfast {precision}"]}
        row["ms"] = {**{name: times[name] for name in rivals}, **own}
        row["rivals_dtype"] = str(job.dtype).removeprefix("torch.")
        row["timing"] = {**how, "threads": torch.get_num_threads()}
        row.update(notes)
    return rows


def _judged(model: nn.Module, fast: nn.Module, x: Tensor) -> Row:
    """What was replaced; and verify's verdict on one image of at most 256 x 256, since float64
    takes minutes for more, and every pixel is computed alike."""
    report = hgfast.report(fast, x)
    side = slice(256)
    found = hgfast.verify(
        model, fast, x[:1, :, side, side] if x.shape[1] == 3 else x[:1, side, side]
    )
    errors = [share for output in found.outputs for share in output.shares]
    if found.fault or not errors:
        raise RuntimeError(f"{type(model).__name__} cannot be judged: {found.fault}")
    return {
        "precision": found.precision,
        "runs": _runs(report),
        "gflops": (report.flops or 0) / 1e9,
        "share": report.share,
        "error": max(errors),
        "faults": [f"{o.name}: {o.fault}" for o in found.outputs if o.fault],
    }


def _runs(report: hgfast.Report) -> list[str]:
    """What runs the blocks, kernels first: "avx512 float32", "PyTorch"."""
    paths = {path for row in report.replaced for path in row.backend.split(" and ")}
    kernels = sorted(path.removeprefix("cpu ") for path in paths if is_kernel(path))
    return kernels + ["PyTorch"] * any(not is_kernel(path) for path in paths)


def _rivals(
    model: nn.Module, x: Tensor, compiled: bool
) -> tuple[dict[str, Callable[[], object]], Row]:
    """Eager in both layouts, and torch.compile on channels_last with constant weights."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # An image (B, H, W, 3) is channels_last as it is.
    y = x.to(memory_format=torch.channels_last) if x.shape[1] == 3 else x
    rivals: dict[str, Callable[[], object]] = dict(
        zip(EAGER, (partial(model, x), partial(last, y)), strict=True)
    )
    if not compiled:
        return rivals, {}
    from torch._inductor import config

    start = time.perf_counter()
    run = partial(torch.compile(last), y)
    try:
        with config.patch(freezing=True):  # its fastest setting
            run()
    except Exception as error:
        return rivals, {"compile_fault": f"{type(error).__name__}: {error}".splitlines()[0]}
    rivals[COMPILE] = _without_gradients(run)
    return rivals, {"compile_seconds": round(time.perf_counter() - start, 1)}


def _without_gradients(run: Callable[[], object]) -> Callable[[], object]:
    """What was compiled under no_grad is compiled anew under inference_mode."""

    def call() -> object:
        with torch.inference_mode(False), torch.no_grad():
            return run()

    return call


def timed(
    candidates: Mapping[str, Callable[[], object]], seconds: float
) -> tuple[dict[str, float], Row]:
    """Median milliseconds of each candidate over all rounds, and how they were measured.

    A round is a block of 8 calls of each, the first 3 of them dropped, during which threads of
    other runtimes may still spin. Where one such round would take more than twice ``seconds``,
    calls take about a second: then a block is 4 calls, and one is dropped.
    """
    once = 0.0
    for run in candidates.values():
        run()  # packs weights, fills caches
        start = time.perf_counter()
        run()
        once += time.perf_counter() - start
    calls, drop = (8, 3) if 8 * once <= 2 * seconds else (4, 1)
    rounds = min(max(int(seconds / (calls * once)), 2 if calls == 8 else 1), 8)
    blocks = [time_alternately(candidates, 1, calls, drop) for _ in range(rounds)]
    medians = {name: statistics.median(block[name] for block in blocks) for name in candidates}
    spread = {
        name: round(max(b[name] for b in blocks) / min(b[name] for b in blocks), 3)
        for name in candidates
    }
    how = {"rounds": rounds, "calls": calls, "dropped": drop, "spread": spread}
    return medians, how


# --- The results ---


def merge(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into the file in place of those of the same network, input and precision.

    Raises:
        ValueError: the file is of another machine.
    """
    record.merge(path, rows, _key, _order)


def _key(row: Row) -> tuple[Any, ...]:
    return row["network"], tuple(row["input"]), row["precision"]


def _order(row: Row) -> tuple[int, int]:
    names = list(NETWORKS)
    place = names.index(row["network"]) if row["network"] in names else len(names)
    return place, PRECISIONS.index(row["precision"])


# --- The table ---


def eager_of(row: Row) -> tuple[str, float]:
    """The faster layout of eager and its milliseconds."""
    name = min(EAGER, key=lambda each: float(row["ms"][each]))
    return name, row["ms"][name]


def speedup(row: Row, over: str) -> float | None:
    """How many times faster than "eager" (in its faster layout) or "torch.compile"."""
    other = eager_of(row)[1] if over == "eager" else row["ms"].get(over)
    return None if other is None else other / row["ms"]["hgfast"]


def table(rows: Sequence[Row]) -> list[str]:
    """A line per network and precision."""
    lines = [
        "| network | input | precision | runs | FLOPs replaced | error / allowed | ms "
        "| x eager | x torch.compile |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        layout, _ = eager_of(row)
        compiled = speedup(row, COMPILE)
        cells = (
            row["network"],
            "x".join(map(str, row["input"])),
            row["precision"],
            " + ".join(row["runs"]),
            _percent(row["share"]),
            f"{row['error']:.2f}",
            f"{row['ms']['hgfast']:.{0 if row['ms']['hgfast'] >= 10 else 1}f}",
            f"{speedup(row, 'eager'):.2f}" + ("" if "last" in layout else " (NCHW)"),
            "" if compiled is None else f"{compiled:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(share: float) -> str:
    """Never "100 %" of what is not all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def surprises(rows: Sequence[Row]) -> Iterator[str]:
    """What a reader of the table would ask about, one line each."""

    def named(chosen: Sequence[Row], value: Callable[[Row], str]) -> str:
        return "; ".join(f'{row["network"]} "{row["precision"]}" {value(row)}' for row in chosen)

    slower = [row for row in rows if speedup(row, "eager") < 1]  # type: ignore[operator]
    if slower:
        yield "Slower than eager: " + named(slower, lambda row: f"{speedup(row, 'eager'):.2f}")
    behind = [row for row in rows if (speedup(row, COMPILE) or 1) < 1]
    if behind:
        yield "Slower than torch.compile: " + named(
            behind, lambda row: f"{speedup(row, COMPILE):.2f}"
        )
    wrong = [row for row in rows if row["faults"]]
    if wrong:
        yield "Beyond what verify allows: " + named(
            wrong, lambda row: f"{row['error']:.2f} ({row['faults'][0]})"
        )
    partly = [row for row in rows if row["share"] < 1]
    if partly:
        yield "Not all FLOPs replaced: " + named(partly, lambda row: _percent(row["share"]))
    pairs = _pairs(rows, "highest", "high")
    same = [(a, b) for a, b in pairs if a["runs"] == b["runs"]]
    if same:
        off = max(abs(a["ms"]["hgfast"] / b["ms"]["hgfast"] - 1) for a, b in same)
        yield (
            f'"high" ran the kernels of "highest" in {len(same)} of {len(pairs)} networks; what '
            f"their times differ by, up to {100 * off:.0f} %, is the noise of this table"
        )
    halves = [(f, h) for f, h in _pairs(rows, "highest", "medium")]
    if halves:
        gains = [f["ms"]["hgfast"] / h["ms"]["hgfast"] for f, h in halves]
        eager = [eager_of(f)[1] / eager_of(h)[1] for f, h in halves]
        yield (
            f'"medium" is {min(gains):.2f} to {max(gains):.2f} times as fast as "highest"; eager '
            f"bfloat16, which it is compared with, {min(eager):.2f} to {max(eager):.2f} times as "
            "fast as eager float32"
        )
    best = max(rows, key=lambda row: eager_of(row)[1] / row["ms"]["hgfast"])
    worst = min(rows, key=lambda row: eager_of(row)[1] / row["ms"]["hgfast"])
    yield "Most gained over eager: " + named([best], lambda row: f"{speedup(row, 'eager'):.2f}")
    yield "Least: " + named([worst], lambda row: f"{speedup(row, 'eager'):.2f}")


def _pairs(rows: Sequence[Row], one: str, other: str) -> list[tuple[Row, Row]]:
    """Rows of the same network and input in two precisions."""
    held = {_key(row): row for row in rows}
    firsts = [row for row in rows if row["precision"] == one]
    pairs = [(row, held.get((*_key(row)[:2], other))) for row in firsts]
    return [(a, b) for a, b in pairs if b is not None]


def shown(results: Row, name: str) -> str:
    """What stands between the markers of docs/models.md."""
    rows = results["rows"]
    used = sorted({f"torch {row['versions']['torch']}" for row in rows})
    spreads = [spread for row in rows for spread in row["timing"]["spread"].values()]
    lines = [
        *table(rows),
        "",
        *(f"- {line}." for line in surprises(rows)),
        "",
        f"Measured on {facts(results)}; {', '.join(used)}. A candidate's rounds differed by "
        f"{100 * statistics.median(spreads) - 100:.0f} % (median), at most by "
        f"{100 * max(spreads) - 100:.0f} %. All numbers: [{name}](../benchmarks/results/{name}).",
    ]
    return "\n".join(lines)


def write_docs(results: Path, docs: Path = DOCS) -> None:
    """Replace what stands between the markers."""
    made = shown(json.loads(results.read_text()), results.name)
    record.replace_between(docs, BEGIN, END, made)


# --- The command ---


def jobs(args: argparse.Namespace) -> list[Job]:
    """float32 precisions of a network share their rivals; "medium" has bfloat16 ones."""
    found = []
    for name in args.networks:
        floats = tuple(p for p in args.precisions if p != "medium")
        groups = [floats, ("medium",) if "medium" in args.precisions else ()]
        compiled = (NETWORKS[name].compiled or args.compile_all) and not args.no_compile
        found += [
            Job(name, group, compiled, args.small, args.seconds, args.threads)
            for group in groups
            if group
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a network could not be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    add("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    add("--no-compile", action="store_true", help="without torch.compile")
    add("--compile-all", action="store_true", help="torch.compile for the large ones too: minutes")
    add("--small", action="store_true", help="the tests' small networks, in this process")
    add("--seconds", type=float, default=10, help="to time a network and dtype, about (10)")
    add("--threads", type=int, help="of torch (default: torch's choice)")
    add("--out", type=Path, help="the JSON (default: in benchmarks/results, and docs/models.md)")
    add("--docs", action="store_true", help="measure nothing, only write docs/models.md anew")
    args = parser.parse_args(arguments)
    if args.small and args.out is None:
        parser.error("--small needs --out: its rows are not those of the table")
    path = args.out or record.default_path("models")
    failed = 0
    for job in [] if args.docs else jobs(args):
        start = time.perf_counter()
        try:
            rows = measure(job) if job.small else record.in_a_process(measure, job)
        except Exception as error:  # a network that fails, or is killed, does not end the run
            failed = 1
            print(f"{job.network}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        given = sys.argv[1:] if arguments is None else arguments
        command = " ".join(["python -m benchmarks.models", *given])
        for row in rows:
            row["versions"], row["command"] = record.versions(), command
        merge(path, rows)
        print(f"# {job.network}: {time.perf_counter() - start:.0f} s")
        print("\n".join(table(rows)[2:]), flush=True)
    if args.out is None or args.docs:
        write_docs(path)
    return failed


if __name__ == "__main__":
    sys.exit(main())
