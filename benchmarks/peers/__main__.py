"""hgfast beside the other engines for a CPU, on the same inputs in one run.

    make bench-peers                                # everything, on a quiet machine
    make bench-peers PEERS_ARGS="--missing"         # the rest of a run that was cut
    make bench-peers PEERS_ARGS="--only 'HG-2 256x256 batch 1 '"
    .venv/bin/python -m benchmarks.peers --help

A part is one network, size, batch and number of threads, in a process of its own. There each
candidate's output is first held against float64; one that is wrong is not timed and fails the run.
Then the candidates take turns in blocks of 8 calls, of which the first 3 do not count: idle threads
of the engine before may still spin. Compared are medians over the blocks of each block's median.
Before and after, the part measures what the machine can multiply at best (peak.cpp).

The JSON has every sample and is written after each part. From it come the tables between the
markers of docs/performance.md and README.md, and the plots (--docs does only that).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks import record
from benchmarks.peers import engines, limits, pages
from benchmarks.peers.measure import Part, has_bfloat16, measure

#: What takes part in the curves: hgfast, and who comes near it.
CURVES: Final = (
    "ONNX Runtime", "OpenVINO", "hgfast highest", "hgfast high",
    "OpenVINO bfloat16", "hgfast medium", "hgfast bfloat16",
)  # fmt: skip
COMPILED_STACKS: Final = 2  # torch.compile needs minutes for more


def parts(threads: Sequence[int]) -> Iterator[Part]:
    """The most telling first, since a run may be cut. ``threads``: the most of them last."""
    most = threads[-1]
    yield Part(2, 256, 1, most)
    yield Part(8, 256, 1, most)
    for count in reversed(threads):
        for batch in (1, 8, 32):
            if (batch, count) != (1, most):
                yield Part(2, 256, batch, count)
    for size in (128, 384, 512, 768, 1024):
        yield Part(2, size, 1, most, curve=True)
    for stacks in (1, 4, 6):
        yield Part(stacks, 256, 1, most, curve=True)


def small_parts(threads: Sequence[int]) -> Iterator[Part]:
    """One of each kind, for tests: seconds."""
    most = threads[-1]
    yield Part(2, 64, 1, most, features=32)
    yield Part(2, 64, 2, most, features=32)
    yield Part(2, 128, 1, most, features=32, curve=True)
    yield Part(1, 64, 1, most, features=32, curve=True)


def invited(part: Part, wanted: Sequence[str], bfloat16: bool) -> Part:
    """The part with its candidates, and why others are left out."""
    left_out = {}
    for name in wanted:
        if part.curve and name not in CURVES:
            left_out[name] = "not in the curves"
        elif name.startswith("torch.compile") and part.stacks > COMPILED_STACKS:
            left_out[name] = "compiling takes minutes"
        elif (part.batch > 1 or part.curve) and not bfloat16 and engines.ENGINES[name].bfloat16:
            left_out[name] = "no bfloat16 instructions here: batch 1 only"
    candidates = tuple(name for name in wanted if name not in left_out)
    return replace(part, candidates=candidates, left_out=tuple(left_out.items()))


def work(part: Part) -> float:
    """Relative to an image of HG-2 at 256x256 with two threads: about 0.15 s of two old cores."""
    return part.batch * (part.size / 256) ** 2 * part.stacks / part.threads


def weight(part: Part) -> float:
    """Of the time, relative to the other parts."""
    share = float(work(part) ** 0.7) * len(part.candidates)
    return share * (1.6 if part.curve else 2.5 if part.batch == 1 else 1)


def overhead(part: Part) -> float:
    """Seconds beside the calls that are timed, about: compiling, float64, and checking."""
    compiling = sum(40 if name.startswith("torch.compile") else 3 for name in part.candidates)
    return compiling + work(part) * (0.8 + 0.3 * len(part.candidates))


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a part, or a candidate of one, could not be measured or was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="for the parts of this run, about (30)")
    add("--only", default="", metavar="REGEX", help="parts whose names contain it; see --list")
    add("--missing", action="store_true", help="only parts that the JSON does not have yet")
    add("--list", action="store_true", help="print the names of the parts, measure nothing")
    add("--candidates", nargs="+", choices=engines.ENGINES, help="only these (needs --out)")
    add("--threads", nargs="+", type=int, help="numbers of threads (1, and 2 or all if fewer)")
    add("--small", action="store_true", help="the tests' small networks, in this process")
    add("--out", type=Path, help="the JSON (default: in benchmarks/results, with pages and plots)")
    add("--docs", action="store_true", help="measure nothing, only write pages and plots anew")
    args = parser.parse_args(arguments)
    if args.small and args.out is None:
        parser.error("--small needs --out: its rows are not those of the tables")
    if args.candidates and args.out is None:
        parser.error("--candidates needs --out: the rows of the tables have all of them")
    args.candidates = args.candidates or [*engines.ENGINES]
    path = args.out or record.default_path("peers")
    given = sys.argv[1:] if arguments is None else list(arguments)
    failed = 0
    if not args.docs:
        threads = sorted(set(args.threads or [1, min(2, record.cores())]))
        if not 1 <= threads[0] <= threads[-1] <= record.cores():
            parser.error(f"--threads: this machine has {record.cores()} cores")
        chosen = _chosen(args, threads, path)
        if args.list:
            print("\n".join(part.name for part in chosen))
            return 0
        if not chosen and not args.missing:
            parser.error(f"--only {args.only}: no such part; --list names them")
        if absent := engines.missing(args.candidates):
            parser.error(f"not installed: {', '.join(absent)}; `make bench-peers` installs them")
        failed = _run(chosen, args, path, " ".join(["python -m benchmarks.peers", *given]))
    if args.out is None or args.docs:
        pages.write(path)
    return failed


def _chosen(args: argparse.Namespace, threads: Sequence[int], path: Path) -> list[Part]:
    found = small_parts(threads) if args.small else parts(threads)
    bfloat16 = has_bfloat16()
    chosen = [invited(part, args.candidates, bfloat16) for part in found]
    held = {pages.key(row) for row in record.held_here(path)["rows"]} if args.missing else set()
    return [
        part
        for part in chosen
        if re.search(args.only, part.name)
        and (part.stacks, part.size, part.batch, part.threads) not in held
        and part.candidates
    ]


def _run(chosen: Sequence[Part], args: argparse.Namespace, path: Path, command: str) -> int:
    record.held_here(path)  # a file of another machine is refused before hours are spent
    failed = 0
    end = time.monotonic() + 60 * args.minutes
    expected = took = 1.0  # seconds of overhead: what was estimated of the parts done, and was
    with tempfile.TemporaryDirectory() as folder:
        program = limits.build(Path(folder))
        for number, part in enumerate(chosen):
            begun, rest = time.monotonic(), chosen[number:]
            left = max(end - begun, 0)
            timing = max(left - took / expected * sum(map(overhead, rest)), left / 3)
            seconds = timing * weight(part) / sum(map(weight, rest))
            part = replace(part, seconds=seconds, program=program)
            try:
                row = measure(part) if args.small else record.in_a_process(measure, part)
            except Exception as error:  # a part that fails, or is killed, does not end the run
                failed = 1
                said = f"{type(error).__name__}: {error}"
                print(f"{part.name}: {said}", file=sys.stderr, flush=True)
                continue
            expected += overhead(part)
            took += time.monotonic() - begun - row["timing"]["seconds"]
            row["versions"], row["command"] = record.versions(), command
            record.merge(path, [row], pages.key, pages.order)
            print(f"# {part.name}: {time.monotonic() - begun:.0f} s", flush=True)
            print("\n".join(pages.summary(row)), flush=True)
            for name, said in row["faults"].items():
                failed = 1
                print(f"{part.name}: {name}: {said}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
