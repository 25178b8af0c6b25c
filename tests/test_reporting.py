"""hgfast.report: what is told of each step, in which words, and how much work it is."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
from networks import Foreign, PreactBlock, image, randomise, small_hourglass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hgfast
from hgfast.plan import Step
from hgfast.region import regions_of
from hgfast.reporting import Replaced, Report, kind_of, label_of, together, units_of
from hgfast.runtime.cpu import CpuExecutor

KEYS = {
    "hgfast", "precision", "decode", "replaced", "skipped", "fallbacks", "flops", "cuda_graph",
    "graphs", "unproven",
}  # fmt: skip


def eager_flops(model: nn.Module, *inputs: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


class Mixed(nn.Module):
    """Blocks in and around something that is no Plan; a linear layer on top."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3)
        self.body = Foreign()
        self.classify = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.body(self.enter(x).cumsum(2)).mean((2, 3)))


# --- which row a step is in ---


def test_each_step_is_in_the_innermost_block_that_is_no_hourglass() -> None:
    (region,) = regions_of(hgfast.optimize(small_hourglass(stacks=2)))
    plan = region.plan
    hourglasses = [block for block in plan.blocks if block.kind == "hourglass"]
    assert [block.name for block in hourglasses] == ["hourglasses.0", "hourglasses.1"]
    units = units_of(plan)
    told = [step.output for unit in units for step in unit.steps]
    assert sorted(told) == sorted(step.output for step in plan.steps)
    assert "hourglass" not in {unit.kind for unit in units}
    for unit in units:
        inside = [b.name for b in hourglasses if {s.output for s in unit.steps} <= {*b.steps}]
        assert unit.part_of == "".join(inside)
        assert not inside or unit.name.startswith(inside[0])


def test_rows_of_a_region_inside_have_the_models_names() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_hourglass()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.cumsum(1))[0].cumsum(1)

    model = Around().eval()
    rows = hgfast.report(hgfast.optimize(model)).replaced
    assert {row.region for row in rows} == {"inner"}
    assert {row.part_of for row in rows} == {"", "inner.hourglasses.0"}
    modules = dict(model.named_modules())
    assert all(row.name in modules for row in rows)


# --- how much work it is ---


def test_share_of_a_network_that_is_replaced_as_a_whole() -> None:
    model = small_hourglass(stacks=2)
    report = hgfast.report(hgfast.optimize(model), image())
    assert report.flops == eager_flops(model, image())
    assert report.share == 1
    assert sum(row.flops or 0 for row in report.replaced) == report.flops
    assert "100 % of the model's" in str(report)


def test_what_is_left_to_pytorch_is_no_part_of_the_share() -> None:
    model = randomise(Mixed()).eval()
    x = torch.randn(2, 3, 10, 9)
    fast = hgfast.optimize(model)
    report = hgfast.report(fast, x)
    names = [region.name for region in regions_of(fast)]
    assert "body.first" in names
    assert "body.second" in names
    whole = eager_flops(model, x)
    hidden = torch.randn(2, 16, 8, 7)
    blocks = eager_flops(model.body, hidden)
    enter = eager_flops(model.enter, x) if "enter" in names else 0
    assert (report.flops, report.kernel_flops) == (whole, blocks + enter)
    assert report.share == pytest.approx((blocks + enter) / whole)
    assert 0 < report.share < 1
    assert report.left[""] == whole - blocks - enter
    assert report.left["body"] == 0


def test_algebra_that_saves_work_does_not_lessen_the_share() -> None:
    """A 1x1 convolution behind upsampling runs before it: on a quarter of the pixels."""

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lateral = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.lateral(F.interpolate(F.relu(self.first(x)), scale_factor=2)))

    model = Up().eval()
    x = torch.randn(1, 3, 8, 8)
    fast = hgfast.optimize(model)
    report = hgfast.report(fast, x)
    paths = dict(regions_of(fast)[0].paths()).values()
    assert any(path.startswith("cpu ") for path in paths)
    assert report.flops == eager_flops(model, x)
    assert sum(row.flops or 0 for row in report.replaced) < report.flops
    assert report.share == 1


def test_steps_that_pytorch_runs_inside_a_region_are_no_part_of_the_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_hourglass()
    fast = hgfast.optimize(model)
    path = CpuExecutor.path

    def left(self: CpuExecutor, step: Step) -> str:
        return "PyTorch float32" if step.name == "stem.conv" else path(self, step)

    monkeypatch.setattr(CpuExecutor, "path", left)
    report = hgfast.report(fast, image())
    assert report.flops == eager_flops(model, image())
    assert report.kernel_flops == report.flops - eager_flops(model.stem.conv, image())
    (stem,) = (row for row in report.replaced if row.name == "stem.conv")
    assert stem.backend == "PyTorch float32"


def test_a_region_that_falls_back_to_eager_counts_nothing() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.cumsum(1))

    fast = hgfast.optimize(Sliced().eval())
    (region,) = regions_of(fast)
    object.__setattr__(region.plan, "input_shapes", ((1, 16, 8, 8),))
    assert hgfast.report(fast, torch.randn(1, 16, 8, 8)).share == 1
    assert hgfast.report(fast, torch.randn(1, 16, 4, 8)).share == 0


def test_calls_of_a_shared_region_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x.cumsum(1))
            return self.block(F.avg_pool2d(x, 2).cumsum(1))

    model, x = Twice().eval(), torch.randn(1, 16, 8, 8)
    report = hgfast.report(hgfast.optimize(model), x)
    assert report.flops == report.kernel_flops == eager_flops(model, x)


def test_decoding_counts_what_the_last_heatmaps_need() -> None:
    model = small_hourglass(stacks=2)
    every = hgfast.report(hgfast.optimize(model), image())
    last = hgfast.report(hgfast.optimize(model, decode="quarter"), image())
    assert last.decode == "quarter"
    assert last.share == 1
    # The first stack's heatmaps go into the second stack, so all that is saved is nothing, or
    # what a remerge no longer asks for.
    assert every.flops is not None
    assert last.flops is not None
    assert 0.9 * every.flops < last.flops <= every.flops


def test_without_an_input_the_report_says_how_to_get_the_share() -> None:
    model = small_hourglass()
    fast = hgfast.optimize(model)
    report = hgfast.report(fast)
    assert report.share is None
    assert "hgfast.report(fast, *inputs)" in str(report)
    assert all(row.flops is None for row in report.replaced)
    hgfast.verify(model, fast, image())
    assert hgfast.report(fast).share == 1  # verify saw a shape
    assert hgfast.report(fast, image(2)).flops == 2 * eager_flops(model, image())
    assert hgfast.report(fast).flops == 2 * eager_flops(model, image())


def test_a_model_that_needs_real_numbers_is_run() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if float(x.sum()) > 0 else x

    fast, x = hgfast.optimize(Asks().eval()), torch.ones(1, 16, 8, 8)
    assert hgfast.report(fast, x).share == 1
    note = hgfast.report(fast).note
    assert "Shapes alone do not do here" in note


def test_wrong_inputs_get_the_models_own_error() -> None:
    fast = hgfast.optimize(small_hourglass())
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        hgfast.report(fast, torch.zeros(1, 4, 64, 64))


def test_the_model_is_left_as_it_is() -> None:
    fast = hgfast.optimize(small_hourglass()).train()
    states = copy.deepcopy(fast.state_dict())
    hgfast.report(fast, image())
    assert fast.training
    assert all(torch.equal(value, states[name]) for name, value in fast.state_dict().items())
    assert regions_of(fast)


def test_nothing_is_computed_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = hgfast.optimize(small_hourglass())
    seen = set()
    forward = nn.Conv2d.forward

    def watched(self: nn.Conv2d, x: Tensor) -> Tensor:
        seen.add(type(x).__name__)
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", watched)
    assert hgfast.report(fast, image()).flops
    assert seen == {"FakeTensor"}


def test_the_shapes_of_the_example_are_known() -> None:
    class Loop(nn.Module):
        """As many blocks as its input has rows, by sixes: a Plan holds for one shape."""

        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(x.size(2) // 6):
                x = self.block(x)
            return x

    model, x = Loop().eval(), torch.randn(1, 16, 12, 6)
    fast = hgfast.optimize(model, example=x)
    assert regions_of(fast)[0].plan.input_shapes == ((1, 16, 12, 6),)
    assert hgfast.report(fast).flops == eager_flops(model, x)


def test_a_region_that_eager_runs_now_is_left_for_a_reason() -> None:
    fast = hgfast.optimize(small_hourglass()).half()
    report = hgfast.report(fast, image().half())
    assert {row.backend for row in report.replaced} == {"eager"}
    assert report.kernel_flops == 0
    assert report.flops
    assert [(row.name, "torch.float16" in row.reason) for row in report.skipped] == [("", True)]
    text = str(report)
    assert text.startswith("hgfast: 0 blocks replaced")
    assert "\n0 % of the model's" in text
    assert "torch.float16" in text


def test_a_model_without_any_work() -> None:
    with pytest.warns(hgfast.HgfastWarning, match="replaced nothing"):
        fast = hgfast.optimize(nn.Sequential(nn.ReLU()))
    report = hgfast.report(fast, torch.rand(2, 3))
    assert (report.flops, report.share) == (0, None)
    assert "no convolutions" in str(report)


# --- how it is told ---


def test_a_model_that_is_not_optimised() -> None:
    report = hgfast.report(small_hourglass(), image())
    assert str(report) == report.table(full=True) == "hgfast: this model is not optimised"


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["conv2", "top_m_0"], "conv2, top_m_0"),
        (["a", "b", "c"], "a, b, c"),
        (["a", "b", "c", "d"], "a, ..., d"),
    ],
)
def test_names_that_begin_with_nothing_in_common(names: list[str], label: str) -> None:
    (group,) = together([row(name) for name in names])
    assert label_of(group) == label


def test_to_dict_is_json() -> None:
    for fast in (
        hgfast.optimize(small_hourglass(), precision="high", decode="quarter"),
        hgfast.optimize(Foreign().eval()),
        small_hourglass(),
    ):
        known = hgfast.report(fast).to_dict()
        assert json.loads(json.dumps(known, allow_nan=False)) == known
        assert known.keys() == KEYS
        assert known["flops"].keys() == {"total", "kernels", "share", "note"}
        for row in known["replaced"]:
            assert row.keys() == {"name", "kind", "backend", "region", "part_of", "flops"}
        for row in known["skipped"]:
            assert row.keys() == {"name", "reason", "flops"}
        for row in known["graphs"]:
            assert row.keys() == {"region", "used", "cached", "reason"}
    x = torch.randn(1, 16, 8, 8)
    known = hgfast.report(hgfast.optimize(Foreign().eval()), x).to_dict()
    assert known["precision"] == "highest"
    assert known["flops"]["share"] == 1
    assert known["skipped"][0]["flops"] == 0
    assert [row["name"] for row in known["replaced"]] == ["first", "second"]


def row(name: str, kind: str = "bottleneck", part_of: str = "") -> Replaced:
    return Replaced(name, kind, "cpu avx2 float32", "", part_of)


def test_blocks_of_one_kind_in_one_place_share_a_line() -> None:
    rows = [
        row("layer1.0"),
        row("layer1.1"),
        row("layer1.2", "bottleneck + upsample_add"),
        row("layer2.0"),
        row("hg.0.hg.0.0.0", part_of="hg.0.hg"),
        row("hg.0.hg.1.2.0", part_of="hg.0.hg"),
        row("hg.1.hg.0.0.0", part_of="hg.1.hg"),
        row("stage2.0.branches.0.1", "basic block"),
        row("stage2.0.branches.1.0", "basic block"),
        row("stage2.1.branches.1.0", "basic block"),
    ]
    groups = together(rows)
    assert sorted(id(r) for group in groups for r in group) == sorted(map(id, rows))
    assert [(label_of(group), kind_of(group)) for group in groups] == [
        ("layer1.*", "2 x bottleneck"),
        ("layer1.2", "bottleneck + upsample_add"),
        ("layer2.0", "bottleneck"),
        ("hg.0.hg.*", "2 x bottleneck"),
        ("hg.1.hg.0.0.0", "bottleneck"),
        ("stage2.0.branches.*", "2 x basic block"),
        ("stage2.1.branches.1.0", "basic block"),
    ]


def test_long_reports_are_folded_and_full_ones_are_not() -> None:
    fast = hgfast.optimize(small_hourglass(stacks=2, blocks=2))
    report = hgfast.report(fast, image())
    assert len(report.replaced) > 32
    full = report.table(full=True)
    assert all(row.name in full.split() for row in report.replaced)
    assert str(report) == report.table(full=False)
    assert "x bottleneck" in str(report)
    assert len(str(report).splitlines()) < len(full.splitlines()) / 2


def test_shares_are_not_rounded_to_all_or_nothing() -> None:
    text = str(Report(precision="high", flops=10**9, kernel_flops=10**9 - 1))
    assert "99.9 %" in text
    assert "100 %" not in text
    few = Report(precision="high", flops=10**6, kernel_flops=1)
    assert "less than 0.1 % of" in str(few)
    assert "0 % of" in str(Report(precision="high", flops=10**9, kernel_flops=0))


def test_rich_prints_the_same() -> None:
    rich_console = pytest.importorskip("rich.console", reason="rich is optional")
    report = hgfast.report(hgfast.optimize(small_hourglass()), image())
    file = io.StringIO()
    rich_console.Console(file=file, width=200).print(report)
    text = file.getvalue()
    assert all(row.name in text for row in report.replaced)
    assert "100 % of the model's" in text
