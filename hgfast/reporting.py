"""What was replaced, what was left, and why; and how much of the work that is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hgfast._containers import convert
from hgfast._table import Cell, render, rich_table
from hgfast._version import __version__
from hgfast.optimization import Skipped, decode_of, optimization_of, without_kernels
from hgfast.plan import Block, Plan, Step
from hgfast.region import GraphUse, Region, regions_of
from hgfast.runtime import evidence

#: Reports with more blocks than this are printed with repeated blocks in one line each.
_LONG: Final = 32

#: Steps that no line is worth: they hold no weights, and belong to what surrounds them.
_CONNECTIONS: Final = ("max_pool", "pool", "add")

_NOT_OPTIMISED: Final = "hgfast: this model is not optimised"

_AND: Final = " and "  # between what runs a block's steps

_HOW: Final = "the share of the work: hgfast.report(fast, *inputs)"


@dataclass(frozen=True)
class Replaced:
    """A recognised block.

    Attributes:
        name: the qualified name of its module.
        kind: what it was recognised as: "basic block", "bottleneck", "conv 3x3-norm-relu".
        backend: what runs it now: "cpu avx512 float32", "cuDNN bfloat16", "eager".
        region: the region it is in: the module whose forward was replaced, "" for the model.
        part_of: the larger structure that it was recognised as a part of ("hourglasses.0");
            empty where there is none.
        flops: of its convolutions as they are run now, two per multiply-add; None where no
            input is known.
    """

    name: str
    kind: str
    backend: str
    region: str
    part_of: str = ""
    flops: int | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`hgfast.optimize` did to a model. Prints as a table; rich prints it as its own.

    Attributes:
        replaced: one row per recognised block, and per step that is part of no block.
        skipped: modules that are no region of their own, and why; and regions that eager runs
            as things are now.
        fallbacks: reasons for which eager ran instead since then: (region, reason).
        precision: the precision optimised for, None for a model that was not optimised.
        decode: the method by which the model decodes its heatmaps; None where it returns them.
        flops: of the model's convolutions and matrix products in one eager forward, two per
            multiply-add (torch.utils.flop_counter counts them); None where no input is known.
            What only outputs need that nobody asks for (``optimize(decode=...)`` decodes the
            last stack) is not counted.
        kernel_flops: those of eager's FLOPs that hgfast's own kernels stand for now: of each
            region all but the steps that it leaves to cuDNN or PyTorch. Where algebra saves some,
            what the kernels really compute (the rows' ``flops``) is less.
        left: for skipped modules, the FLOPs inside that are still PyTorch's, by name.
        note: why the FLOPs are not known; empty where they are.
        cuda_graph: "auto", True or False, as optimised for.
        graphs: for each region, whether its launches are captured as CUDA graphs, how many are
            there by now, and why not.
        unproven: what is in use that has not yet run on a GPU, by the names of ``hgfast info``.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    fallbacks: list[tuple[str, str]] = field(default_factory=list)
    precision: str | None = None
    decode: str | None = None
    flops: int | None = None
    kernel_flops: int | None = None
    left: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    cuda_graph: bool | str = "auto"
    graphs: list[GraphUse] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        """The share of the model's FLOPs that run in hgfast's kernels, 0 to 1.

        None where no input is known, and for a model without convolutions and products.
        """
        if not self.flops or self.kernel_flops is None:
            return None
        return self.kernel_flops / self.flops

    def to_dict(self) -> dict[str, Any]:
        """The report as what JSON knows. These keys are there always, and stay::

        hgfast      the version that wrote it
        precision   "highest", "high", "medium"; null for a model that is not optimised
        decode      the decoding method, or null
        replaced    [{name, kind, backend, region, part_of, flops (or null)}, ...]
        skipped     [{name, reason, flops (left in PyTorch; or null)}, ...]
        fallbacks   [{region, reason}, ...]
        flops       {total, kernels, share, note}; the first three null where not known
        cuda_graph  "auto", true, false
        graphs      [{region, used, cached, reason}, ...]
        unproven    names of features in use that have not yet run on a GPU
        """
        return {
            "hgfast": __version__,
            "precision": self.precision,
            "decode": self.decode,
            "replaced": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "backend": row.backend,
                    "region": row.region,
                    "part_of": row.part_of,
                    "flops": row.flops,
                }
                for row in self.replaced
            ],
            "skipped": [
                {"name": row.name, "reason": row.reason, "flops": self.left.get(row.name)}
                for row in self.skipped
            ],
            "fallbacks": [{"region": name, "reason": why} for name, why in self.fallbacks],
            "flops": {
                "total": self.flops,
                "kernels": self.kernel_flops,
                "share": self.share,
                "note": self.note,
            },
            "cuda_graph": self.cuda_graph,
            "graphs": [
                {
                    "region": use.region,
                    "used": use.used,
                    "cached": use.cached,
                    "reason": use.reason,
                }
                for use in self.graphs
            ],
            "unproven": list(self.unproven),
        }

    def table(self, full: bool | None = None) -> str:
        """The report as text.

        Args:
            full: a line for every block. Otherwise blocks of the same kind that run in the same
                way and stand in one place of the model share a line with their number
                ("hg.0.hg.*  12 x bottleneck"). By default only a long report is folded so.
        """
        if self.precision is None:
            return _NOT_OPTIMISED
        return "\n".join(render(*parts) for parts in self._parts(full))

    def __str__(self) -> str:
        return self.table()

    def __rich__(self) -> Any:
        from rich.console import Group

        if self.precision is None:
            return _NOT_OPTIMISED
        return Group(*(rich_table(*parts) for parts in self._parts(None)))

    def _parts(self, full: bool | None) -> Iterator[_Table]:
        regions = list(dict.fromkeys(row.region for row in self.replaced))
        where = f"1 region, {shown(regions[0])}" if len(regions) == 1 else f"{len(regions)} regions"
        ours = sum(is_replaced(row.backend) for row in self.replaced)
        left = len(self.replaced) - ours
        title = (
            f'hgfast: {ours} blocks replaced in {where}, precision "{self.precision}"'
            + (f', heatmaps decoded by "{self.decode}"' if self.decode else "")
            + (f"; {left} left to PyTorch" if left else "")
        )
        full = len(self.replaced) <= _LONG if full is None else full
        groups = [[row] for row in self.replaced] if full else together(self.replaced)
        rows: list[list[Cell]] = [
            [label_of(group), kind_of(group), group[0].backend]
            + ([] if len(regions) == 1 else [shown(group[0].region)])
            + ([] if self.flops is None else [_giga(sum(row.flops or 0 for row in group))])
            for group in groups
        ]
        columns = ["block", "kind", "backend"]
        columns += [] if len(regions) == 1 else ["region"]
        columns += [] if self.flops is None else ["GFLOPs"]
        yield title, columns, rows, self._total()
        if self.skipped:
            lines: list[list[Cell]] = [
                [shown(row.name), row.reason]
                + ([] if self.flops is None else [_giga(self.left.get(row.name))])
                for row in self.skipped
            ]
            counted = [] if self.flops is None else ["GFLOPs left"]
            yield "left as they are", ["module", "because", *counted], lines, None
        if self.fallbacks:
            why: list[list[Cell]] = [[shown(name), reason] for name, reason in self.fallbacks]
            yield "ran eagerly since", ["region", "because"], why, None
        # Who never asked for graphs, nor has any, need not read why.
        if self.graphs and (self.cuda_graph is True or any(use.used for use in self.graphs)):
            uses: list[list[Cell]] = [
                [
                    shown(use.region),
                    ("1 graph" if use.cached == 1 else f"{use.cached} graphs")
                    if use.used
                    else "none",
                    use.reason,
                ]
                for use in self.graphs
            ]
            yield "CUDA graphs", ["region", "captured", "because"], uses, None
        if self.unproven:
            lines = [[name, evidence.FEATURES[name].what] for name in self.unproven]
            yield "in use, not yet run on a GPU", ["feature", "what it is"], lines, None

    def _total(self) -> str:
        if self.flops is None:
            return self.note
        if self.share is None:
            return "The model has no convolutions and no matrix products."
        return (
            f"{_percent(self.share)} of the model's {_giga(self.flops):.4g} GFLOPs "
            "run in hgfast's kernels."
        )


_Table = tuple[str, Sequence[str], Sequence[Sequence[Cell]], str | None]


def shown(name: str) -> str:
    """A qualified name for people's eyes."""
    return name or "(the model)"


def _giga(flops: int | None) -> float:
    return (flops or 0) / 1e9


def _percent(share: float) -> str:
    """Never "100 %" of what is not all, nor "0 %" of what is something."""
    if 0.999 <= share < 1:
        return "99.9 %"
    if 0 < share < 0.001:
        return "less than 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 1 else f"{100 * share:.0f} %"


def report(fast: nn.Module, *inputs: Any) -> Report:
    """What :func:`hgfast.optimize` replaced in ``fast``, what it left, why, and how much that is.

    Backends are those of this moment: a model that was moved or cast since is described as it
    is now. For a model that was never optimised the report is empty and says so.

    How much it is in FLOPs depends on the shapes of the inputs. The eager forward is counted
    once without being computed (fake tensors); where that fails, it is run. Without ``inputs``,
    those shapes count that this function or :func:`hgfast.verify` saw of ``fast`` last.

    Args:
        fast: what :func:`hgfast.optimize` returned; it is left as it is.
        inputs: the arguments of its ``forward``, tensors and containers of tensors.

    Raises:
        Exception: whatever the model raises for the inputs.
    """
    optimization = optimization_of(fast)
    if optimization is None:
        return Report()
    decoding = decode_of(fast)
    work, note = _work(fast, inputs, [row.name for row in optimization.skipped])
    replaced, eager_now = [], []
    kernel_flops = unneeded = 0
    in_kernels: dict[str, int] = {}
    graphs: list[GraphUse] = []
    features: set[str] = set()
    # With gradients wanted, a region does not look at what became of its weights.
    with torch.no_grad():
        for region in regions_of(fast):
            calls = work.calls[region.name] if work else None
            rows, in_kernels[region.name] = _rows(region, calls)
            replaced += rows
            if region.backend == "eager":
                eager_now.append(Skipped(region.name, region.pack().reason or "it has no executor"))
            graphs.append(region.graph_use())
            features |= region.features
            kernel_flops += in_kernels[region.name]
            unneeded += _unneeded(region, calls or [])
    left = {}
    for name, flops in work.modules.items() if work else ():
        inside = f"{name}." if name else ""
        left[name] = flops - sum(n for r, n in in_kernels.items() if r.startswith(inside))
    return Report(
        replaced=replaced,
        skipped=[*optimization.skipped, *eager_now],
        fallbacks=[(name, reason) for reason, name in optimization.notices.seen.items()],
        precision=optimization.precision,
        decode=decoding["method"] if decoding else None,
        flops=work.total - unneeded if work else None,
        kernel_flops=kernel_flops if work else None,
        left=left,
        note=note,
        cuda_graph=optimization.graphs.wanted,
        graphs=graphs,
        unproven=[
            name
            for name in evidence.FEATURES
            if name in features and not evidence.FEATURES[name].evidence
        ],
    )


# --- What a region is made of ---


@dataclass(frozen=True)
class Unit:
    """Steps of a Plan that stand under one name in a report: a block, or a step of its own."""

    name: str
    kind: str
    steps: tuple[Step, ...]
    part_of: str = ""


def plan_of(region: Region) -> Plan:
    """What the region runs: the whole Plan, or the part that is decoded."""
    return region.plan if region.decoding is None else region.plan.last_output()


def units_of(plan: Plan) -> list[Unit]:
    """Every step of the Plan once, in order of execution: with its block, or by itself.

    An hourglass holds other blocks: it names nothing but where they belong.
    """
    by_output = {step.output: step for step in plan.steps}
    innermost: dict[int, Block] = {}
    enclosing: dict[int, Block] = {}
    for found in sorted(plan.blocks, key=lambda block: len(block.steps)):
        names = enclosing if found.kind == "hourglass" else innermost
        for number in found.steps:
            names.setdefault(number, found)
    units = []
    for step in plan.steps:
        block, around = innermost.get(step.output), enclosing.get(step.output)
        part_of = around.name if around else ""
        if block is None:
            units.append(Unit(step.name, step.title, (step,), part_of))
        elif step.output == block.steps[0]:
            steps = tuple(by_output[number] for number in block.steps)
            # A join that became a part of the step is worth saying.
            kind = step.title if len(steps) == 1 and "+" in step.title else block.kind
            units.append(Unit(block.name, kind, steps, part_of))
    return units


def qualified(region: str, name: str) -> str:
    """The name in the model of what is called ``name`` in a region."""
    return f"{region}.{name}".strip(".")


def _rows(region: Region, calls: list[_Call] | None) -> tuple[list[Replaced], int]:
    """A row per unit; and eager's FLOPs in all calls, less those that hgfast's kernels don't do."""
    paths = {step.output: path for step, path in region.paths()}
    plan, flops, kernels = plan_of(region), None, 0
    theirs = {number for number, path in paths.items() if not is_kernel(path)}
    if calls is not None:
        flops = dict.fromkeys(paths, 0)
        for call in calls:
            of_call = _flops_of_steps(plan, call.shapes)
            for number, count in of_call.items():
                flops[number] += count
            if of_call and len(theirs) < len(paths):
                left = sum(of_call[number] for number in theirs)
                kernels += max(call.flops - left - _unneeded(region, [call]), 0)
    rows = []
    for unit in units_of(plan):
        numbers = [step.output for step in unit.steps]
        if all(step.kind in _CONNECTIONS for step in unit.steps):
            continue
        rows.append(
            Replaced(
                qualified(region.name, unit.name),
                unit.kind,
                _AND.join(dict.fromkeys(paths.get(number, "eager") for number in numbers)),
                region.name,
                qualified(region.name, unit.part_of) if unit.part_of else "",
                None if flops is None else sum(flops.get(number, 0) for number in numbers),
            )
        )
    return rows, kernels


def is_kernel(path: str) -> bool:
    """Whether what runs a step is a kernel of hgfast's own, by its description."""
    return path.startswith(("cpu ", "cuda "))


def is_replaced(backend: str) -> bool:
    """Whether anything but PyTorch's own operations, one by one, runs any part of a block."""
    return any(not path.startswith(("PyTorch", "eager")) for path in backend.split(_AND))


def _flops_of_steps(plan: Plan, shapes: Any) -> dict[int, int]:
    """Each step's FLOPs; nothing for shapes that the plan does not take: eager runs these."""
    if shapes is None or plan.input_shapes not in (None, shapes):
        return {}
    try:
        known = plan.shapes(*shapes)
    except ValueError:
        return {}
    return {
        step.output: step.flops(*(known[number] for number in step.inputs)) for step in plan.steps
    }


def _unneeded(region: Region, calls: list[_Call]) -> int:
    """FLOPs of what the eager forward computes and nobody decodes."""
    if region.decoding is None:
        return 0
    return sum(
        sum(_flops_of_steps(region.plan, call.shapes).values())
        - sum(_flops_of_steps(plan_of(region), call.shapes).values())
        for call in calls
    )


# --- What the model would compute ---


class _Like:
    """A tensor without its numbers. (No dataclass: those are containers.)"""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = tuple(shape), dtype, device


@dataclass
class _Call:
    """One call of a region: what reaches it (None for something else than tensors), and the FLOPs
    of its eager forward."""

    shapes: tuple[tuple[int, ...], ...] | None
    flops: int = 0


@dataclass
class _Work:
    """FLOPs of an eager forward: of all, inside some modules, and in each call of each region."""

    total: int
    modules: dict[str, int]
    calls: dict[str, list[_Call]]


#: What a model was last given, so that a report needs no input of its own.
_seen: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def remember(fast: nn.Module, inputs: Sequence[Any]) -> None:
    """Keep the shapes of a model's inputs for its next report."""
    _seen[fast] = tuple(
        convert(lambda x: _Like(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x, item)
        for item in inputs
    )


def _work(
    fast: nn.Module, inputs: tuple[Any, ...], names: Sequence[str]
) -> tuple[_Work | None, str]:
    """What an eager forward computes; or None and why that is not known."""
    alike: tuple[Any, ...] | None
    if inputs:
        remember(fast, inputs)
    alike = _seen.get(fast) or _shapes_of_recognition(fast)
    if alike is None:
        return None, f"For {_HOW}."
    try:
        return _count_fake(fast, alike, names), ""
    except Exception as error:  # what cannot be followed without numbers raises anything
        if not inputs:
            return None, f"For {_HOW}. Shapes alone do not do here: {_first_line(error)}"
    return _count(without_kernels(copy.deepcopy(fast)), inputs, fast, names), ""


def _shapes_of_recognition(fast: nn.Module) -> tuple[Any, ...] | None:
    """The shapes of the example with which the whole model was traced, if there was one."""
    weights = next(fast.parameters(), None)
    for region in regions_of(fast):
        if region.module is fast and region.plan.input_shapes and weights is not None:
            return tuple(
                _Like(shape, weights.dtype, weights.device) for shape in region.plan.input_shapes
            )
    return None


def _count_fake(fast: nn.Module, alike: tuple[Any, ...], names: Sequence[str]) -> _Work:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # Copied with weights that have no memory: deepcopy takes from the memo what it finds.
    memo: dict[int, Any] = {}
    for tensor in (*fast.parameters(), *fast.buffers()):
        memo[id(tensor)] = fake.from_tensor(tensor, static_shapes=True)
    eager = without_kernels(copy.deepcopy(fast, memo))

    def faked(x: Any) -> Any:
        if isinstance(x, _Like):
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return x

    with fake:
        return _count(eager, tuple(convert(faked, item) for item in alike), fast, names)


def _count(
    eager: nn.Module, inputs: tuple[Any, ...], fast: nn.Module, names: Sequence[str]
) -> _Work:
    from torch.utils.flop_counter import FlopCounterMode  # here: it imports Triton

    eager.eval()
    counter = FlopCounterMode(display=False)
    regions = regions_of(fast)
    work = _Work(0, dict.fromkeys(names, 0), {region.name: [] for region in regions})
    handles = []

    def watch_region(region: Region) -> None:
        calls = work.calls[region.name]

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            bound = region.bind(args, kwargs)
            tensors = all(isinstance(x, Tensor) and x.dim() == 4 for x in bound)
            shapes = tuple(tuple(x.shape) for x in bound) if tensors else None
            calls.append(_Call(shapes, -counter.get_total_flops()))

        def after(*_: Any) -> None:
            calls[-1].flops += counter.get_total_flops()

        module = eager.get_submodule(region.name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    def watch_module(name: str) -> None:
        starts: list[int] = []
        module = eager.get_submodule(name)

        def before(*_: Any) -> None:
            starts.append(counter.get_total_flops())

        def after(*_: Any) -> None:
            work.modules[name] += counter.get_total_flops() - starts.pop()

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for region in regions:
        watch_region(region)
    for name in dict.fromkeys(names):
        watch_module(name)
    try:
        with torch.no_grad(), counter:
            eager(
                *(convert(lambda x: x.clone() if isinstance(x, Tensor) else x, i) for i in inputs)
            )
    finally:
        for handle in handles:
            handle.remove()
    work.total = counter.get_total_flops()
    return work


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# --- Blocks that share a line ---


class Placed(Protocol):
    """What is told of a block wherever it is told."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def region(self) -> str: ...
    @property
    def part_of(self) -> str: ...


Row = TypeVar("Row", bound=Placed)


def together(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same kind, run in the same way, in one place of the model; in order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = (row.kind, row.backend, row.region, row.part_of or _place(row.name))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def label_of(group: Sequence[Placed]) -> str:
    """A name for all: what their names begin with."""
    if len(group) == 1:
        return shown(group[0].name)
    names = [row.name.split(".") for row in group]
    common = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if not common:
        first, *others, last = [shown(row.name) for row in group]
        return ", ".join([first, *(others if len(others) < 2 else ["..."]), last])
    return ".".join([*common, "*"])


def kind_of(group: Sequence[Placed]) -> str:
    return f"{len(group)} x {group[0].kind}" if len(group) > 1 else group[0].kind


def _place(name: str) -> str:
    """Where a block stands, where no larger structure says it.

    Names count what is repeated: the part up to the first numbers says which stack or stage it
    is ("hg.0" of "hg.0.hg.3.1.0", "stage2.0" of "stage2.0.branches.0.1"). Where nothing follows
    them, they number the blocks themselves ("layer1" of "layer1.2").
    """
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if start is None:
        return ".".join(parts[:-1])
    end = start
    while end < len(parts) and parts[end].isdigit():
        end += 1
    return ".".join(parts[: end if end < len(parts) else start])
