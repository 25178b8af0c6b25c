"""verify: is an optimised model as right as eager arithmetic of its precision would be?

The judge is the model in float64. What the optimised model may miss it by is measured, not
guessed: twice what eager PyTorch misses it by in the same precision ("high": eager with products
of split operands, hgfast/_bf16x3.py). So the tolerance scales with the network, and an error that
hides under a fixed one is found. What is wrong is looked for until the first step or module is
found whose output departs (hgfast/_culprit.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from hgfast import _bf16x3, _culprit
from hgfast._containers import convert, leaves, structure
from hgfast._culprit import Culprit
from hgfast._table import render
from hgfast.decoding.dispatch import decode_by_reference
from hgfast.metrics import pck
from hgfast.optimization import decode_of, precision_of, without_kernels
from hgfast.region import regions_of
from hgfast.reporting import remember

PRECISIONS: Final = ("highest", "high", "medium")

_CELLS = 1e-3  # how far a decoded place may be from the reference decoder's, in heatmap cells
_HALF = (torch.bfloat16, torch.float16)


_COLUMNS: Final = (
    "output",
    "max error",
    "allowed",
    "mean error",
    "allowed",
    "relative",
    "allowed",
    "moved",
    "undecided",
    "shift",
    "pck",
    "verdict",
)


@dataclass(frozen=True)
class OutputCheck:
    """One output tensor against float64.

    Attributes:
        name: where in the model's output, such as ``[1]``.
        max_abs, mean_abs: absolute error, the largest and the mean.
        rel: relative L2 error, ``|output - reference| / |reference|``.
        allowed_max, allowed_mean, allowed_rel: the bounds; infinite where the rule has none, as
            it has none for ``rel``.
        moved: keypoints (heatmap maxima) in another cell than float64's.
        undecided: how many of those float64 itself does not decide.
        keypoint_shift: how far the farthest of the moved went, in heatmap pixels.
        fault: what is wrong, empty where nothing is.
        pck: the share of keypoints, decoded by the quarter rule, that are within half a heatmap
            pixel of float64's, out of those that float64 sees (:func:`hgfast.metrics.pck`);
            None where there are none. To be read; ``moved`` is what is judged.
    """

    name: str
    max_abs: float
    mean_abs: float
    rel: float
    allowed_max: float
    allowed_mean: float
    allowed_rel: float
    moved: int
    undecided: int
    keypoint_shift: float
    fault: str
    pck: float | None = None

    @property
    def ok(self) -> bool:
        return not self.fault

    @property
    def shares(self) -> tuple[float, ...]:
        """Each error as a share of what is allowed."""
        pairs = (
            (self.max_abs, self.allowed_max),
            (self.mean_abs, self.allowed_mean),
            (self.rel, self.allowed_rel),
        )
        return tuple(
            error / allowed if allowed else (math.inf if error else 0.0)
            for error, allowed in pairs
            if not math.isinf(allowed)
        )


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; a table when printed, true where all is well.

    Attributes:
        model: the class of the model.
        precision: "highest", "high" or "medium", as which it was judged.
        arithmetic: the dtype of the eager run that set the bounds.
        outputs: one :class:`OutputCheck` per tensor of the output, in order.
        fault: why the outputs could not be compared at all; empty where they were.
        culprit: where outputs are wrong, the first step or module to depart; None where nothing
            inside departs as much as they do.
        seed: which random inputs these outputs are of, the worst of all that were tried; None
            for the given ones.
        tried: how many inputs were tried.
        note: why the search for a culprit failed; empty where it did not.
    """

    model: str
    precision: str
    arithmetic: torch.dtype
    outputs: tuple[OutputCheck, ...]
    fault: str = ""
    culprit: Culprit | None = None
    seed: int | None = None
    tried: int = 1
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether every output keeps within its bounds."""
        return not self.fault and all(output.ok for output in self.outputs)

    @property
    def max_abs(self) -> float:
        """Largest absolute error of any output (NaN where outputs could not be compared)."""
        return self._largest([output.max_abs for output in self.outputs])

    @property
    def rel(self) -> float:
        """Largest relative L2 error of any output."""
        return self._largest([output.rel for output in self.outputs])

    @property
    def keypoint_shift(self) -> float:
        """How far the farthest keypoint moved from float64's, in heatmap pixels.

        Keypoints that float64 itself does not decide are counted, though they are no fault.
        """
        return self._largest([output.keypoint_shift for output in self.outputs])

    def to_dict(self) -> dict[str, Any]:
        """What JSON knows of it. These keys are there always, and stay::

            model, precision, arithmetic ("float32"), ok, fault, tried, seed (or null), note
            culprit     {name, step, error, eager, why}, or null
            outputs     [{the attributes of OutputCheck}, ...]

        Numbers that JSON has not are null: bounds that the rule does not set, and errors that
        are infinite or no number (``fault`` says so).
        """

        def number(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        def fields(value: Any) -> dict[str, Any]:
            return {name: number(item) for name, item in vars(value).items()}

        return {
            "model": self.model,
            "precision": self.precision,
            "arithmetic": _name(self.arithmetic),
            "ok": self.ok,
            "fault": self.fault,
            "tried": self.tried,
            "seed": self.seed,
            "note": self.note,
            "culprit": fields(self.culprit) if self.culprit else None,
            "outputs": [fields(output) for output in self.outputs],
        }

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        title = f'verify {self.model}, precision "{self.precision}": {verdict}'
        if self.fault:
            which = self._which()
            return f"{title}\n\n{self.fault}" + (f"\n{which}" if which else "")
        rows = [
            (
                output.name,
                output.max_abs,
                _bound(output.allowed_max),
                output.mean_abs,
                _bound(output.allowed_mean),
                output.rel,
                _bound(output.allowed_rel),
                output.moved,
                output.undecided,
                output.keypoint_shift,
                output.pck,
                output.fault or "ok",
            )
            for output in self.outputs
        ]
        # The rule of a precision has not every bound; an empty column would say nothing.
        used = [i for i in range(len(_COLUMNS)) if any(row[i] is not None for row in rows)]
        return render(
            title,
            [_COLUMNS[i] for i in used],
            [[row[i] for i in used] for row in rows],
            self._footer(),
        )

    def _largest(self, values: Sequence[float]) -> float:
        # max() would lose a NaN that is not the first.
        lost = self.fault or any(map(math.isnan, values))
        return math.nan if lost else max(values, default=0.0)

    def _footer(self) -> str:
        eager = _name(self.arithmetic)
        if _is_split(self.precision, self.arithmetic):
            eager += " in bf16x3"
        footer = (
            f"Error against float64; allowed: twice that of eager {eager}. Shift: of heatmap\n"
            "maxima, in heatmap pixels; one may move only where float64 does not decide between\n"
            "the two cells."
        )
        if any(output.name == "['coords']" for output in self.outputs):
            footer += "\nCoords and scores against what the reference decodes of these heatmaps."
        further = (self._which(), str(self.culprit or ""), self.note)
        return "\n".join([footer, *filter(None, further)])

    def _which(self) -> str:
        """Which inputs these outputs are of, where there was a choice."""
        if self.tried == 1:
            return ""
        which = "the given ones" if self.seed is None else f"random ones, seed {self.seed}"
        return f"The worst of {self.tried} inputs: {which}."

    @property
    def _severity(self) -> tuple[bool, float]:
        """What is worse is larger."""
        shares = [share for output in self.outputs for share in output.shares]
        lost = self.fault or any(map(math.isnan, shares))
        return not self.ok, math.inf if lost else max(shares, default=0.0)


class VerificationError(RuntimeError):
    """An optimised model is less exact than its precision allows.

    Attributes:
        verification: the :class:`Verification`, whose table is the message.
    """

    def __init__(self, verification: Verification) -> None:
        super().__init__(verification)
        self.verification = verification


def verify(
    model: nn.Module,
    fast: nn.Module,
    *inputs: Any,
    precision: str | None = None,
    raise_on_fail: bool = False,
    seeds: int = 0,
) -> Verification:
    """Compare an optimised model with the eager one, on inputs of yours and on random ones.

    Both are compared with the eager model in float64, so that the error that eager PyTorch
    makes is known too and bounds the allowed one, for each output tensor (the rule of the
    flash-attention tests):

        "highest"   max and mean error <= 2 x those of eager float32, + atol
        "high"      max and mean error <= 2 x those of eager float32 with bf16x3 products, + atol
        "medium"    max and mean error <= 2 x those of ``model.bfloat16()``, + atol

    A model in bfloat16 or float16 is held against eager in its own dtype, whatever the
    precision. ``atol`` is four float32 ulps of the reference (of its maximum for the maximum, of
    its mean magnitude for the mean), or half an ulp of the output's own dtype if that is more:
    rounding costs as much where eager happens to be exact.

    bf16x3: each operand of a convolution is split into two bfloat16, ``x = high + low``, and
    ``high high + high low + low high`` is summed in float32. So "high" lets kernels multiply, and
    so eager PyTorch is made to (three convolutions for one). ``atol`` is then half an ulp of the
    two parts, 2^-17.

    In outputs of four or more dimensions, taken as heatmaps (..., H, W), a maximum may move to
    another cell only if float64 does not decide between the two: its values there differ by no
    more than the maximum error allowed above.

    Every tensor of the output is compared, in lists, tuples, named tuples, dicts and dataclasses
    of any nesting; the containers and what else they hold must be equal.

    Where an output is wrong, the first step (of a region's Plan) or module whose output departs
    is looked for, each on the inputs that reach it in the eager model (``Verification.culprit``).
    That runs the models a dozen times more.

    Of a model that decodes (``optimize(model, decode=...)``) the heatmaps that it decodes are held
    against those of the eager model like any others, the last stack's; and what it returns must
    be what the reference decoder makes of them: places within 1e-3 heatmap cells, scores within
    rounding.

    The models are left as they are (training flags, random state, inputs too): both are run in
    eval mode and without gradients, copies where they are in training mode.

    Args:
        model: the eager model. If it is an optimised one, its eager forward is meant.
        fast: what ``hgfast.optimize`` returned, or any module with the same outputs.
        inputs: the arguments of ``forward``; tensors and containers of tensors. At best real
            ones: images as the network was trained on.
        seeds: how many random inputs to try beside them; the worst of all is returned. Each is
            normal, with the given inputs' shapes, and their mean and standard deviation per
            channel (dimension 1; 1 where a channel does not vary). Integers stay as given.
        precision: "highest", "high" or "medium"; by default the one that ``fast`` was
            optimised for, or else "medium" for bfloat16 and float16 models, "highest" for others.
        raise_on_fail: raise instead of returning a Verification that is not ok.

    Raises:
        VerificationError: not ok, and ``raise_on_fail``.
        ValueError: an unknown precision, a negative number of seeds, or the model cannot run in
            float64 (or bfloat16).
        Exception: whatever either model raises for the inputs.
    """
    if precision is None:
        precision = _precision_of(fast, inputs)
    if precision not in PRECISIONS:
        known = ", ".join(f'"{name}"' for name in PRECISIONS)
        raise ValueError(f"verify expects a precision out of {known}, got {precision!r}")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 0:
        raise ValueError(f"verify expects a number of seeds, 0 or more, got {seeds!r}")
    remember(fast, inputs)
    results = []
    for seed in (None, *range(seeds)):
        tried = inputs if seed is None else _random_like(inputs, seed)
        results.append(replace(_verify(model, fast, tried, precision), seed=seed))
    worst = replace(max(results, key=lambda result: result._severity), tried=len(results))
    if not worst.ok:
        tried = inputs if worst.seed is None else _random_like(inputs, worst.seed)
        worst = _with_culprit(worst, model, fast, tried)
        if raise_on_fail:
            raise VerificationError(worst)
    return worst


def _verify(
    model: nn.Module, fast: nn.Module, inputs: Sequence[Any], precision: str
) -> Verification:
    """On these inputs alone, without a culprit."""
    own, of_fast = _dtype(model, inputs), _dtype(fast, inputs)
    arithmetic = _arithmetic(own, of_fast, precision)

    eager = _run(_eager_copy(model), inputs)  # first: wrong inputs get eager's own error
    decoding = decode_of(fast)
    ready, tried = _in_eval_mode(fast), inputs if of_fast is own else _cast(inputs, of_fast)
    if any(region.graph_use().used for region in regions_of(ready)):
        _run(ready, tried)  # the first of its shape; what is judged is a replay
    given = _run(ready, tried, before_decoding=decoding is not None)
    reference = _run_as(torch.float64, model, inputs)
    is_split = _is_split(precision, arithmetic)
    baseline = eager
    if is_split or arithmetic is not own:
        with _products(is_split):
            baseline = _run_as(arithmetic, model, inputs)

    rule = _Rule(is_split, same_dtype=of_fast is own and decoding is None)
    if decoding is None:
        fault, outputs = _compare(rule, given, eager, reference, baseline)
    else:
        heatmaps, keypoints = given
        fault, outputs = _compare(rule, *map(_last, (heatmaps, eager, reference, baseline)))
        outputs += _check_decoding(_last(heatmaps)["heatmaps"], keypoints, decoding)
    return Verification(type(model).__name__, precision, arithmetic, outputs, fault)


def _with_culprit(
    found: Verification, model: nn.Module, fast: nn.Module, inputs: Sequence[Any]
) -> Verification:
    """The verification and what is to blame for it, if that can be found."""
    is_split = _is_split(found.precision, found.arithmetic)
    try:
        with _alone((model, fast), inputs):
            culprit = _culprit.find(
                _eager_copy(model),
                _in_eval_mode(fast),
                inputs,
                found.arithmetic,
                partial(_products, is_split),
                _bf16x3.ROUNDING if is_split else 0.0,
            )
    except Exception as error:  # the verdict stands, whatever the search for a reason meets
        return replace(found, note=f"The search for the first to depart failed: {error}")
    return replace(found, culprit=culprit)


def _random_like(inputs: Sequence[Any], seed: int) -> Sequence[Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
            return leaf
        values = leaf.detach().double().nan_to_num(0, 0, 0)
        dims = [dim for dim in range(leaf.ndim) if dim != 1]
        mean = values.mean(dims, keepdim=True)
        spread = values.std(dims, correction=0, keepdim=True)
        spread = torch.where(spread > 0, spread, 1.0)
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        return (mean + spread * noise.to(leaf.device)).to(leaf.dtype)

    random: Sequence[Any] = convert(normal, tuple(inputs))
    return random


# --- Which precision ---


def _precision_of(fast: nn.Module, inputs: Sequence[Any]) -> str:
    return precision_of(fast) or ("medium" if _dtype(fast, inputs) in _HALF else "highest")


def _arithmetic(model: torch.dtype, fast: torch.dtype, precision: str) -> torch.dtype:
    """The dtype in which eager PyTorch makes the error that is allowed."""
    if model in _HALF or precision != "medium":
        return model
    return fast if fast in _HALF else torch.bfloat16


def _is_split(precision: str, arithmetic: torch.dtype) -> bool:
    """Whether eager multiplies as bf16x3 does where it makes the error that is allowed."""
    return precision == "high" and arithmetic is torch.float32


def _products(is_split: bool) -> AbstractContextManager[Any]:
    return _bf16x3.Bf16x3() if is_split else nullcontext()  # type: ignore[no-untyped-call]


def _dtype(module: nn.Module, inputs: Sequence[Any]) -> torch.dtype:
    """The dtype that a module computes in: its weights', or else the inputs'."""
    held = (leaf for _, leaf in leaves(tuple(inputs)))
    state = (*module.parameters(), *module.buffers(), *held)
    tensors = (leaf for leaf in state if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return next((tensor.dtype for tensor in tensors), torch.float32)


# --- Running models without a trace ---


def _run(module: nn.Module, inputs: Sequence[Any], before_decoding: bool = False) -> Any:
    """The module's output, in arithmetic of its own, for copies of the inputs.

    With ``before_decoding`` the heatmaps that it decodes, and its output.
    """
    call = module.__dict__["forward"].both if before_decoding else module
    with _alone((module,), inputs):
        # Copies: a network may begin with an in-place operation.
        return call(*_cast(inputs, None))


@contextmanager
def _alone(modules: Sequence[nn.Module], inputs: Sequence[Any]) -> Iterator[None]:
    """Without gradients and autocast; the random state is afterwards what it was before."""
    tensors = [leaf for _, leaf in leaves(tuple(inputs)) if isinstance(leaf, Tensor)]
    weights = [tensor for module in modules for tensor in module.parameters()]
    devices = {tensor.device for tensor in (*weights, *tensors)}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _run_as(dtype: torch.dtype, model: nn.Module, inputs: Sequence[Any]) -> Any:
    """The eager model's output when weights and inputs are converted to a dtype."""
    try:
        output = _run(_eager_copy(model).to(dtype), _cast(inputs, dtype))
    except Exception as error:
        raise ValueError(
            f"verify has to run {type(model).__name__} in {_name(dtype)} as well, "
            f"where it fails: {error}"
        ) from error
    for _, leaf in leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != dtype:
            raise ValueError(
                f"verify has to run {type(model).__name__} in {_name(dtype)} as well, but its "
                f"output is then {_name(leaf.dtype)}: it converts something in its forward"
            )
    return output


def _cast(inputs: Sequence[Any], dtype: torch.dtype | None) -> Sequence[Any]:
    """Copies of the inputs, floating point in ``dtype`` (None: as they are)."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    copies: Sequence[Any] = convert(cast, tuple(inputs))
    return copies


def _eager_copy(model: nn.Module) -> nn.Module:
    model = without_kernels(copy.deepcopy(model))
    model.eval()  # on a line of its own: some networks' eval() returns nothing
    return model


def _in_eval_mode(module: nn.Module) -> nn.Module:
    """The module itself where it is in eval mode, or else a copy."""
    if any(part.training for part in module.modules()):
        module = copy.deepcopy(module)
        module.eval()
    return module


# --- Models that decode ---


def _last(heatmaps: Any) -> dict[str, Any]:
    """The heatmaps that are decoded, by the name under which they are reported."""
    return {"heatmaps": heatmaps[-1] if isinstance(heatmaps, (list, tuple)) else heatmaps}


def _check_decoding(
    heatmaps: Tensor, keypoints: Sequence[Tensor], decoding: dict[str, Any]
) -> tuple[OutputCheck, ...]:
    """Keypoints against what the reference decoder makes of the same heatmaps."""
    checks = []
    right = decode_by_reference(heatmaps, **decoding)
    for name, given, expected in zip(
        ("coords", "scores", "joints"), keypoints, right, strict=False
    ):
        miss = _miss(given.double(), expected.double())
        largest = _largest(expected.abs().nan_to_num(0, posinf=0))
        allowed = _CELLS if name == "coords" else 1e-6 * max(1.0, largest)
        same_nan = torch.equal(given.isnan(), expected.isnan())
        right_enough = same_nan and miss.max_abs <= allowed
        checks.append(
            OutputCheck(
                name=f"[{name!r}]",
                max_abs=miss.max_abs,
                mean_abs=miss.mean_abs,
                rel=miss.rel,
                allowed_max=allowed,
                allowed_mean=math.inf,
                allowed_rel=math.inf,
                moved=0,
                undecided=0,
                keypoint_shift=0.0,
                fault="" if right_enough else "not what the reference decodes",
            )
        )
    return tuple(checks)


# --- Comparing ---


@dataclass(frozen=True)
class _Rule:
    is_split: bool  # whether the baseline's operands were
    same_dtype: bool  # whether the output has to have eager's dtype


@dataclass(frozen=True)
class _Miss:
    """How far a tensor is from the reference, where that is a number."""

    max_abs: float
    mean_abs: float
    rel: float


def _compare(
    rule: _Rule, given: Any, eager: Any, reference: Any, baseline: Any
) -> tuple[str, tuple[OutputCheck, ...]]:
    expected_leaves = dict(leaves(eager))
    held = []
    for output in (given, reference, baseline):
        if structure(output) != structure(eager):
            return f"the output is {_outline(output)}; {_others(output, eager)}", ()
        held.append(dict(leaves(output)))
    checks = []
    for path, expected in expected_leaves.items():
        name, others = path or "output", [leaves_of[path] for leaves_of in held]
        if not all(isinstance(leaf, Tensor) for leaf in (expected, *others)):
            if not _same(expected, others[0]):
                return f"the output's {name} is {others[0]!r}; eager's is {expected!r}", ()
            continue
        checks.append(_check(rule, name, expected, *others))
    return "", tuple(checks)


def _check(
    rule: _Rule, name: str, eager: Tensor, given: Tensor, reference: Tensor, baseline: Tensor
) -> OutputCheck:
    if given.shape != eager.shape:
        fault = f"shape {tuple(given.shape)}, eager's is {tuple(eager.shape)}"
        nan = math.nan
        return OutputCheck(name, nan, nan, nan, nan, nan, nan, 0, 0, nan, fault)
    same_dtype = given.dtype == eager.dtype or not rule.same_dtype
    dtype_fault = "" if same_dtype else f"{_name(given.dtype)}, eager's is {_name(eager.dtype)}"

    ulp = torch.finfo(torch.float32).eps * 4
    if given.is_floating_point():
        ulp = max(ulp, torch.finfo(given.dtype).eps / 2, _bf16x3.ROUNDING * rule.is_split)
    given, baseline = (t.to(reference.device, torch.float64) for t in (given, baseline))
    reference = reference.double()
    nan_fault = ""
    if not torch.equal(given.isnan(), reference.isnan()):
        nan_fault = "NaN in other places than in float64"

    eager_miss, miss = _miss(baseline, reference), _miss(given, reference)
    size = reference.abs().nan_to_num(0, posinf=0)
    largest, mean = (_largest(size), float(size.mean()) if size.numel() else 0.0)
    allowed_max = 2 * eager_miss.max_abs + ulp * largest
    allowed_mean = 2 * eager_miss.mean_abs + ulp * mean
    moved, undecided, shift = _keypoints(given, reference, allowed_max)

    faults = (
        (dtype_fault, dtype_fault),
        (nan_fault, nan_fault),
        (not miss.max_abs <= allowed_max, "max error"),
        (not miss.mean_abs <= allowed_mean, "mean error"),
        (moved > undecided, f"{moved - undecided} keypoints moved"),
    )
    return OutputCheck(
        name,
        math.nan if nan_fault else miss.max_abs,
        math.nan if nan_fault else miss.mean_abs,
        math.nan if nan_fault else miss.rel,
        allowed_max,
        allowed_mean,
        math.inf,
        moved,
        undecided,
        shift,
        ", ".join(text for wrong, text in faults if wrong),
        _pck(given, reference),
    )


def _miss(value: Tensor, reference: Tensor) -> _Miss:
    if value.numel() == 0:
        return _Miss(0.0, 0.0, 0.0)
    # Equal infinities differ by nothing; NaNs are compared by place, elsewhere.
    absolute = torch.where(value == reference, 0.0, (value - reference).abs())
    absolute = absolute.masked_fill(absolute.isnan(), 0.0)
    length = float(reference.nan_to_num(0, posinf=0, neginf=0).norm())
    distance = float(absolute.norm())
    rel = distance / length if length else (math.inf if distance else 0.0)
    return _Miss(_largest(absolute), float(absolute.mean()), rel)


def _keypoints(given: Tensor, reference: Tensor, undecided_gap: float) -> tuple[int, int, float]:
    """Heatmap maxima in another cell, how many float64 does not decide, and how far they went."""
    if reference.ndim < 4 or reference.numel() == 0:
        return 0, 0, 0.0
    width = reference.shape[-1]
    given, reference = given.flatten(-2), reference.flatten(-2)
    cell, best = given.argmax(-1), reference.argmax(-1)
    lost = given.isnan().any(-1) | reference.isnan().any(-1)
    moved = (cell != best) & ~lost
    gap = reference.gather(-1, best[..., None]) - reference.gather(-1, cell[..., None])
    # "not more" and not "less": between two infinities the gap is NaN.
    undecided = moved & ~(gap[..., 0] > undecided_gap)
    distance = torch.hypot(
        (cell % width - best % width).double(), (cell // width - best // width).double()
    )
    return int(moved.sum()), int(undecided.sum()), _largest(distance * moved)


def _pck(given: Tensor, reference: Tensor) -> float | None:
    """The share of keypoints that lie within half a cell of the reference's."""
    if reference.ndim < 4 or reference.numel() == 0:
        return None
    given, reference = (maps.reshape(-1, *maps.shape[-3:]) for maps in (given, reference))
    places, _ = decode_by_reference(given, "quarter")
    right, scores = decode_by_reference(reference, "quarter")
    share = pck(places, right, 1.0, threshold=0.5, valid=scores > 0)
    return None if math.isnan(share) else share


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except (TypeError, ValueError, RuntimeError):  # things that do not compare to one truth
        return True


def _outline(output: Any) -> str:
    """The container of an output, in words short enough for a message."""
    if isinstance(output, Tensor):
        return "a tensor"
    return f"{type(output).__name__} with {len(list(leaves(output)))} leaves"


def _others(output: Any, eager: Any) -> str:
    """Eager's container, and what the other has not, or has alone."""
    found, expected = (dict(leaves(value)) for value in (output, eager))
    text = f"eager's is {_outline(eager)}"
    lacking = next((name for name in expected if name not in found), None)
    further = next((name for name in found if name not in expected), None)
    if not lacking or not further or len(found) != len(expected):
        return text
    return f"{text}, {lacking} where the output has {further}"


def _bound(allowed: float) -> float | None:
    return None if math.isinf(allowed) else allowed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
