"""``python -m hgfast explain module:factory``: what hgfast makes of a network of one's own.

The network is built, optimised, reported, verified and timed, as a whole and block by block.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from hgfast._containers import leaves
from hgfast._culprit import reached
from hgfast._table import Cell, render, rich_table
from hgfast._timing import time_alternately
from hgfast._warnings import HgfastWarning
from hgfast.models.checkpoint import read_file, tensors_in
from hgfast.optimization import PRECISIONS, optimize
from hgfast.plan import Plan, output_values
from hgfast.recognition import tensors_of
from hgfast.region import Region, regions_of
from hgfast.reporting import (
    Report,
    Unit,
    kind_of,
    label_of,
    plan_of,
    qualified,
    report,
    together,
    units_of,
)
from hgfast.runtime import reference
from hgfast.runtime.choice import choose
from hgfast.verification import Verification, verify

#: What pose networks are given: images 256x256, 256x192, and with channels last.
SHAPES: Final = ((1, 3, 256, 256), (1, 3, 256, 192), (1, 256, 256, 3))

_HOW: Final = (
    "Medians of 10 calls that alternate in blocks of 8, the first 3 of each dropped. A block is\n"
    "timed alone, on random values of the shapes that reach it: eager is its module, or (*) the\n"
    "same operations in PyTorch where no module is just that block; hgfast is a Plan of the block\n"
    "alone, which takes and gives what its kernels exchange. Alone, both find their weights in\n"
    "cache more often than in the network, so blocks need not add up to the whole model."
)


class ExplainError(Exception):
    """Something is wrong with what the user gave; the message is one line."""


@dataclass(frozen=True)
class Timing:
    """A block's median milliseconds in eager PyTorch and in hgfast.

    ``by_module`` says whether eager was the block's own module, or the same operations.
    """

    name: str
    kind: str
    backend: str
    region: str
    part_of: str
    eager: float
    hgfast: float
    by_module: bool


@dataclass(frozen=True)
class Explanation:
    """What the command prints.

    Attributes:
        model: the class of the network.
        shapes: of the inputs.
        report: what was replaced.
        verification: how exact that is; None where it could not be told.
        verification_fault: why it could not.
        whole: median milliseconds of the whole model, "eager" and "hgfast"; None untimed.
        blocks: of each block; empty untimed.
        notes: hgfast's warnings on the way.
        busy: a warning about the times where the machine had other work; empty where it had not.
    """

    model: str
    shapes: tuple[tuple[int, ...], ...]
    report: Report
    verification: Verification | None
    verification_fault: str
    whole: Mapping[str, float] | None
    blocks: tuple[Timing, ...]
    notes: tuple[str, ...]
    busy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints. These keys are there always, and stay::

        model, inputs (shapes), notes
        report          Report.to_dict()
        verification    Verification.to_dict(), or null and verification_fault says why
        timings         {eager, hgfast, how, blocks: [{name, kind, backend, region, part_of,
                        eager, hgfast, by_module}, ...]}, in milliseconds; null untimed
        """
        timings = None
        if self.whole is not None:
            blocks = [asdict(block) for block in self.blocks]
            timings = {
                **self.whole,
                "how": " ".join(_HOW.split()),
                "busy": self.busy,
                "blocks": blocks,
            }
        return {
            "model": self.model,
            "inputs": [list(shape) for shape in self.shapes],
            "notes": list(self.notes),
            "report": self.report.to_dict(),
            "verification": self.verification.to_dict() if self.verification else None,
            "verification_fault": self.verification_fault,
            "timings": timings,
        }

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts(render)))

    def _parts(self, table: Callable[..., Any]) -> Iterator[Any]:
        """In print order; ``table`` lays out the tables that have no class of their own."""
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        yield f"{self.model}, input {shapes}"
        yield self.report
        if self.verification is None:
            yield f"verify could not tell: {self.verification_fault}"
        else:
            yield self.verification
        if self.whole is None:
            return
        threads = torch.get_num_threads()
        rows: list[list[Cell]] = [
            ["the whole model", "", *_milliseconds(self.whole["eager"], self.whole["hgfast"])]
        ]
        for group in together(self.blocks):
            star = "" if all(block.by_module for block in group) else " *"
            rows.append(
                [
                    label_of(group),
                    kind_of(group) + star,
                    *_milliseconds(
                        sum(block.eager for block in group), sum(block.hgfast for block in group)
                    ),
                ]
            )
        yield table(
            f"milliseconds with {threads} thread{'s' * (threads > 1)}",
            ["block", "kind", "eager", "hgfast", "eager / hgfast"],
            rows,
            "\n".join(filter(None, [_HOW, self.busy])),
        )


def _milliseconds(eager: float, hgfast: float) -> list[Cell]:
    return [eager, hgfast, eager / hgfast]


def explain(
    model: nn.Module,
    shapes: Sequence[Sequence[int]] | None = None,
    precision: str | None = None,
    timing: bool = True,
) -> Explanation:
    """Optimise a copy of ``model`` and tell what became of it.

    Args:
        model: in whatever mode; it is left as it is, but for being in eval mode afterwards.
        shapes: one shape for each input of its forward; by default the first of ``SHAPES`` that
            the model takes.
        precision: as for :func:`hgfast.optimize`.
        timing: whether to time it.

    Raises:
        ExplainError: no shape fits.
    """
    busy = _busy() if timing else ""  # before this very command is what keeps the machine busy
    model.eval()  # on a line of its own: some networks' eval() returns nothing
    inputs = _inputs(model, shapes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HgfastWarning)
        fast = optimize(model, precision)
        found, fault = None, ""
        try:
            found = verify(model, fast, *inputs)
        except ValueError as error:  # what cannot be judged may still be of use
            fault = " ".join(str(error).split())
        whole: Mapping[str, float] | None = None
        blocks: tuple[Timing, ...] = ()
        if timing:
            whole = _whole(model, fast, inputs)
            blocks = tuple(_blocks(model, fast, inputs))
        result = report(fast, *inputs)
    notes = [str(w.message) for w in caught if issubclass(w.category, HgfastWarning)]
    return Explanation(
        type(model).__name__,
        tuple(tuple(x.shape) for x in inputs),
        result,
        found,
        fault,
        whole,
        blocks,
        tuple(dict.fromkeys(notes)),
        busy,
    )


# --- What the user gave ---


def load(target: str, weights: Path | None = None) -> nn.Module:
    """The network that ``module:factory`` names, with the weights of a file.

    Raises:
        ExplainError: there is no such thing, or it is no network.
    """
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise ExplainError(f"expected module:factory, such as mynets.pose:build, got {target!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ExplainError(f"there is no module {error.name!r} here or installed") from None
        raise ExplainError(f"{module_name} cannot be imported: {_words(error)}") from error
    except (Exception, SystemExit) as error:  # a module may do anything
        raise ExplainError(f"{module_name} cannot be imported: {_words(error)}") from error
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise ExplainError(f"{module_name} has no {attribute!r}") from None
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ExplainError(f"{target} is a {type(found).__name__}: no module, and not callable")
        torch.manual_seed(0)
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise ExplainError(f"{target}() fails: {_words(error)}") from error
        if not isinstance(found, nn.Module):
            raise ExplainError(
                f"{target}() returns a {type(found).__name__}; a torch.nn.Module was expected"
            )
    if weights is not None:
        _load_weights(found, weights)
    return found


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        content = read_file(str(path))
        names = dict(content)
        known = model.state_dict().keys()
        # Names that fit as they are may begin with what is a wrapper's prefix elsewhere.
        state = names if names.keys() & known else tensors_in(content, str(path))
    except FileNotFoundError:
        raise ExplainError(f"no such weights file: {path}") from None
    except (OSError, ValueError) as error:
        raise ExplainError(_words(error, named=False)) from error
    try:
        lacking, further = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ExplainError(f"{path} does not fit: {' '.join(str(error).split())}") from error
    lacking = [name for name in lacking if not name.endswith("num_batches_tracked")]
    if lacking or further:
        which = f"it lacks {lacking[0]!r}" if lacking else f"the network has no {further[0]!r}"
        count = len(lacking) + len(further) - 1
        more = f", and {count} more names differ" if count else ""
        raise ExplainError(f"{path} is of another network: {which}{more}")


def _inputs(model: nn.Module, shapes: Sequence[Sequence[int]] | None) -> tuple[Tensor, ...]:
    tensors = (*model.parameters(), *model.buffers())
    like = next((x for x in tensors if x.is_floating_point()), torch.empty(0))

    def made(shape: Sequence[int]) -> Tensor:
        # On the CPU, where the generator is: the same numbers whatever the device.
        values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
        return values.to(like.device, like.dtype)

    tries = [tuple(shapes)] if shapes is not None else [(shape,) for shape in SHAPES]
    faults = []
    for each in tries:
        inputs = tuple(map(made, each))
        try:
            with torch.inference_mode():
                model(*(x.clone() for x in inputs))
            return inputs
        except Exception as error:  # a forward may raise anything
            faults.append(f"{_shape_words(each)}: {_words(error)}")
    if shapes is not None:
        raise ExplainError(f"{type(model).__name__} does not take {faults[0]}")
    raise ExplainError(
        f"{type(model).__name__} takes none of the usual inputs, give its shape with --input "
        f"({faults[0]})"
    )


def _shape_words(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join(",".join(map(str, shape)) for shape in shapes)


def _words(error: BaseException, named: bool = True) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = f"{text[:297]}..."
    return f"{type(error).__name__}: {text}".rstrip(": ") if named else text


# --- Timing ---


def _timed(
    candidates: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, float]:
    def until_done(call: Callable[[], object]) -> Callable[[], object]:
        if device.type != "cuda":
            return call

        def both() -> None:
            call()
            torch.cuda.synchronize(device)

        return both

    calls = {name: until_done(call) for name, call in candidates.items()}
    with torch.inference_mode():
        return time_alternately(calls, blocks=2, calls=8, drop=3)


def _busy() -> str:
    """Whether other processes want the cores that PyTorch's threads wait for each other on.

    A thread that has to wait for its core holds up all others at the end of every operation, so
    it is eager, with its many operations, that looks slower than it is.
    """
    if not hasattr(os, "getloadavg"):
        return ""
    load, cores, threads = os.getloadavg()[0], os.cpu_count() or 1, torch.get_num_threads()
    if load + threads < cores + 1:
        return ""
    return (
        f"The machine was busy (load {load:.1f} on {cores} cores): eager may look slower than it "
        "is; try again,\nor with fewer threads (OMP_NUM_THREADS=1)."
    )


def _whole(model: nn.Module, fast: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    return _timed(
        {"eager": lambda: model(*inputs), "hgfast": lambda: fast(*inputs)}, inputs[0].device
    )


def _blocks(model: nn.Module, fast: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[Timing]:
    """The blocks of every region that the inputs reach, in order of execution."""
    with torch.inference_mode():
        found = reached(model, regions_of(fast), inputs)
    for region, bound in found:
        plan = plan_of(region)
        try:
            shapes = plan.shapes(*(x.shape for x in bound))
        except ValueError:  # eager runs it
            continue
        paths = {step.output: path for step, path in region.paths()}
        for unit in units_of(plan):
            timing = _block(model, region, plan, unit, shapes, paths)
            if timing is not None:
                yield timing


def _block(
    model: nn.Module,
    region: Region,
    plan: Plan,
    unit: Unit,
    shapes: Mapping[int, Sequence[int]],
    paths: Mapping[int, str],
) -> Timing | None:
    """A block alone; None where it is nothing that could be run alone with weights."""
    block = _alone(plan, unit)
    weights = tensors_of(region.module)
    used = {name: weights[name] for name in block.weights}
    executor = choose(block, used, region.precision, as_computed=True)
    if isinstance(executor, str):
        return None
    first = next(iter(used.values()))
    values = [
        torch.randn(tuple(shapes[number])).to(first.device, first.dtype) for number in block.inputs
    ]
    element = executor.dtype
    theirs = [
        x.to(element).contiguous(memory_format=torch.channels_last)
        if x.dim() == 4
        else x.to(element)
        for x in values
    ]

    def operations() -> list[Tensor]:
        held = dict(zip(block.inputs, values, strict=True))
        for step in block.steps:
            held[step.output] = reference.run_step(
                step, used, *(held[number] for number in step.inputs)
            )
        return [held[number] for number in block.outputs]

    name = qualified(region.name, unit.name)
    module = _just(model, name, operations, values)
    eager = operations if module is None else (lambda: module(*values))
    try:
        times = _timed({"eager": eager, "hgfast": lambda: executor.run(theirs)}, first.device)
    except ValueError:  # the block takes no such values alone
        return None
    backend = " and ".join(dict.fromkeys(paths[step.output] for step in unit.steps))
    return Timing(
        name,
        unit.kind,
        backend,
        region.name,
        qualified(region.name, unit.part_of) if unit.part_of else "",
        times["eager"],
        times["hgfast"],
        module is not None,
    )


def _alone(plan: Plan, unit: Unit) -> Plan:
    """The Plan of one block: what it reads from outside, its steps, what is read of it."""
    made = {step.output for step in unit.steps}
    read = dict.fromkeys(number for step in unit.steps for number in step.inputs)
    wanted = set(output_values(plan.outputs))
    wanted.update(
        number for step in plan.steps if step.output not in made for number in step.inputs
    )
    return replace(
        plan,
        inputs=tuple(number for number in read if number not in made),
        steps=unit.steps,
        outputs=[step.output for step in unit.steps if step.output in wanted],
        input_shapes=None,
        blocks=(),
        guards=(),
    )


def _just(
    model: nn.Module, name: str, operations: Callable[[], list[Tensor]], values: list[Tensor]
) -> nn.Module | None:
    """The module of that name, if what it computes is the block and nothing else."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    with torch.inference_mode():
        try:
            found = [leaf for _, leaf in leaves(module(*(x.clone() for x in values)))]
        except Exception:  # it takes something else, so it is something else
            return None
        expected = operations()
    if len(found) != len(expected):
        return None
    for ours, theirs in zip(found, expected, strict=True):
        if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
            return None
        scale = theirs.double().norm() * torch.finfo(theirs.dtype).eps * 100
        if not (ours.double() - theirs.double()).norm() <= scale:
            return None
    return module


# --- The command ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "target", metavar="module:factory",
        help="what to import (the current directory is on the path) and what in it builds the "
        "network: a function or class that is called without arguments, or the network itself",
    )  # fmt: skip
    parser.add_argument(
        "--input", action="append", type=_shape, metavar="B,C,H,W",
        help="the input's shape; once for each input (default: the first that fits of "
        + ", ".join(",".join(map(str, shape)) for shape in SHAPES) + ")",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="as for hgfast.optimize (default: PyTorch's)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="a state_dict (.pth, .pt, .safetensors); without one, the factory's own weights",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-timing", action="store_true", help="do not time anything")


def run(args: argparse.Namespace) -> int:
    """Run the command: 0; 1 where verify finds fault; 2 after one line about wrong arguments."""
    try:
        model = load(args.target, args.weights)
        result = explain(model, args.input, args.precision, timing=not args.no_timing)
    except ExplainError as error:
        print(f"hgfast explain: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    else:
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        _print(result)
    return 0 if result.verification is None or result.verification.ok else 1


def _print(result: Explanation) -> None:
    """With rich on a terminal, where it is installed; plain text elsewhere."""
    if not sys.stdout.isatty():
        print(result)
        return
    try:
        from rich.console import Console
    except ImportError:
        print(result)
        return
    console = Console()
    for part in result._parts(rich_table):
        # Verification's table is wide, and plain text that is cut is none.
        if isinstance(part, Verification):
            console.print(str(part), markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part, highlight=False)
        console.print()


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes such as 1,3,256,256, got {text!r}")
    return shape
