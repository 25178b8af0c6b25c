"""Patterns and the Plan: what is recognised, and that the reference executor computes it."""

from __future__ import annotations

import pytest
import torch
from networks import MethodHourglass, PreactBlock, image, randomise, small_hourglass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hgfast.plan import Bottleneck, Plan, output_values
from hgfast.recognition import recognise, tensors_of
from hgfast.runtime import reference
from hgfast.runtime.folding import fold
from hgfast.trace import TraceError


def check_against_eager(model: nn.Module, *inputs: Tensor) -> Plan:
    """The Plan, after its reference run in float64 gave what eager gives."""
    randomise(model).eval().double()
    plan = recognise(model)
    doubles = [x.double() for x in inputs]
    values = reference.run(plan, tensors_of(model), doubles)
    with torch.inference_mode():
        expected = torch.utils._pytree.tree_leaves(model(*doubles))
    for number, eager in zip(output_values(plan.outputs), expected, strict=True):
        torch.testing.assert_close(values[number], eager, rtol=1e-12, atol=1e-12)
    return plan


def kinds(plan: Plan) -> list[str]:
    return [step.title for step in plan.steps]


@pytest.mark.parametrize(("into", "out"), [(16, 16), (8, 16)])
def test_bottleneck(into: int, out: int) -> None:
    plan = check_against_eager(PreactBlock(into, out), torch.randn(2, into, 5, 7))
    assert kinds(plan) == ["bottleneck"]
    assert (plan.steps[0].project is not None) == (into != out)  # type: ignore[attr-defined]


def test_hourglass_joins_become_epilogues() -> None:
    plan = check_against_eager(MethodHourglass(), torch.randn(1, 16, 8, 12))
    assert kinds(plan).count("bottleneck + upsample_add") == 2
    assert "upsample_add" not in kinds(plan)
    order = [step.name for step in plan.steps]
    assert order.index("hg.0.2.0") < order.index("hg.0.0.0"), "low must exist before the join"


@pytest.mark.parametrize("stacks", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 3])
def test_stacked_hourglass_is_understood_whole(stacks: int, blocks: int) -> None:
    model = small_hourglass(stacks, blocks)
    plan = check_against_eager(model, image())
    residuals = 3 + stacks * blocks * (3 * 2 + 1 + 1)
    assert sum(isinstance(step, Bottleneck) for step in plan.steps) == residuals
    assert {step.name for step in plan.steps if isinstance(step, Bottleneck)} == {
        name for name, module in model.named_modules() if type(module).__name__ == "Residual"
    }
    assert len(plan.outputs) == stacks
    assert isinstance(plan.outputs, list)


def test_flops_are_those_pytorch_counts() -> None:
    model = small_hourglass(stacks=2)
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(image(2, 64, 96))
    assert recognise(model).flops((2, 3, 64, 96)) == counter.get_total_flops()


def test_shapes_follow_the_input_and_name_the_step_that_does_not_fit() -> None:
    model = small_hourglass(stacks=1)
    plan = recognise(model)
    shapes = plan.shapes((2, 3, 64, 96))
    assert shapes[plan.outputs[0]] == (2, 5, 16, 24)
    with pytest.raises(ValueError, match=r"stem\.conv expects 3 channels"):
        plan.shapes((1, 4, 64, 64))
    with pytest.raises(ValueError, match=r"multiples"):
        plan.shapes((1, 3, 72, 72))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        plan.shapes((3, 64, 64))


def test_listing_shows_the_hourglass_as_indentation() -> None:
    lines = str(recognise(small_hourglass(stacks=1))).splitlines()
    depths = [len(line) - len(line.lstrip()) for line in lines]
    assert max(depths) == 2 * 3  # pooled in the stem, then twice in the hourglass
    assert lines[0].startswith("v1 = conv 7x7/2-norm-relu (v0)")
    assert depths[-1] == 2


class Chain(nn.Module):
    """conv-BN-ReLU chains, a BN-ReLU whose input is needed elsewhere, a three-way sum."""

    def __init__(self) -> None:
        super().__init__()
        self.block = PreactBlock()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.late_norm, self.late = nn.BatchNorm2d(16, eps=1e-3), nn.Conv2d(16, 16, 1)
        self.merge = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.block(x)
        y = F.relu(self.norm(self.conv(x)))
        z = self.late(F.relu(self.late_norm(x)))
        return {"sum": x + self.merge(y) + z, "y": y}


def test_convolutions_take_their_surroundings_along() -> None:
    plan = check_against_eager(Chain(), torch.randn(1, 16, 6, 6))
    assert sorted(kinds(plan)) == sorted(
        ["bottleneck", "conv 3x3-norm-relu", "conv 1x1 + add", "norm-relu-conv 1x1 + add"]
    )
    assert set(plan.outputs) == {"sum", "y"}


class SharedMiddle(nn.Module):
    """Almost a bottleneck: the value in its middle is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = PreactBlock(), PreactBlock()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b = self.b
        y = b.conv1(F.relu(b.bn1(x)))
        z = b.conv3(F.relu(b.bn3(b.conv2(F.relu(b.bn2(y))))))
        return self.a(x + z), y


def test_a_value_that_others_need_is_never_swallowed() -> None:
    plan = check_against_eager(SharedMiddle(), torch.randn(1, 16, 6, 6))
    assert kinds(plan).count("bottleneck") == 1
    assert len(output_values(plan.outputs)) == 2


def near_misses() -> list[tuple[str, nn.Module]]:
    strided, dilated, grouped, three = (PreactBlock() for _ in range(4))
    dilated.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
    grouped.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    strided.conv2 = nn.Conv2d(8, 8, 3, padding=1, stride=2)
    three.conv1 = nn.Conv2d(16, 8, 3, padding=1)
    return [("dilated", dilated), ("grouped", grouped), ("strided", strided), ("3x3 first", three)]


@pytest.mark.parametrize(("name", "block"), near_misses())
def test_what_only_looks_like_a_bottleneck_is_none(name: str, block: nn.Module) -> None:
    try:
        plan = check_against_eager(block, torch.randn(1, 16, 6, 6))
    except RuntimeError:
        assert name == "strided"  # eager refuses its sum too
        plan = recognise(block)
    assert "bottleneck" not in kinds(plan)


class Broadcasts(PreactBlock):
    """The sum spreads the single channel of x over all of the branch's."""

    def __init__(self) -> None:
        super().__init__(1, 16)
        self.downsample = None


def test_a_broadcasting_sum_is_no_identity_shortcut() -> None:
    plan = recognise(Broadcasts())
    assert "bottleneck" not in kinds(plan)
    with pytest.raises(ValueError, match="different shapes"):  # so that eager does it
        plan.shapes((1, 1, 4, 4))


class GroupNormed(nn.Module):
    """A bottleneck whose norms need the whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, n) for n in (16, 8, 8))
        self.convs = nn.ModuleList(
            [nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(torch.relu(norm(y)))
        return y + x


def test_one_sum_among_operations_of_pytorch_is_not_worth_a_region() -> None:
    with pytest.raises(TraceError, match="no block that could be fused"):
        recognise(GroupNormed())
    joined = nn.Sequential(GroupNormed(), nn.Conv2d(16, 4, 1), nn.ReLU())
    convs = [kind for kind in kinds(recognise(joined)) if kind.startswith("conv")]
    assert len(convs) == 4, "with a ReLU to take along it is"


class LooksAround(nn.Module):
    """Attention over pixels: where to look, from the strongest and the mean channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 1, 7, padding=3), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.norm(self.conv(seen)))


def test_a_piece_of_attention_is_not_worth_a_region() -> None:
    with pytest.raises(TraceError, match="no block that could be fused"):
        recognise(LooksAround())
    block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), LooksAround())
    assert kinds(recognise(block)).count("conv 7x7-norm") == 1, "behind a convolution it is"


def test_norms_and_convolutions_without_weights_of_their_own() -> None:
    block = PreactBlock()
    block.bn1, block.bn2 = nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(8, affine=False)
    block.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    plan = check_against_eager(block, torch.randn(1, 16, 4, 4))
    assert kinds(plan) == ["bottleneck"]


def test_folding_honours_eps_and_tiny_variances() -> None:
    conv, norm = nn.Conv2d(4, 4, 1).eval(), nn.BatchNorm2d(4, eps=1e-3).eval()
    norm.running_var.copy_(torch.tensor([1e-12, 1e-7, 1e-3, 1.0]))
    norm.running_mean.normal_()
    block = nn.Sequential(PreactBlock(4, 4), conv, norm)
    step = recognise(block).steps[-1]
    weight, bias = fold(step.conv, step.norm_after, tensors_of(block))  # type: ignore[attr-defined]
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    expected = norm.double()(conv.double()(x))
    torch.testing.assert_close(
        F.conv2d(x, weight.double(), bias.double()), expected, rtol=1e-6, atol=1e-5
    )
