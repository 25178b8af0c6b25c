"""hgfast.verify: right models pass, planted errors are found, nothing is left changed."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hgfast
from hgfast._bf16x3 import Bf16x3
from hgfast.models import hourglass
from hgfast.region import regions_of
from hgfast.runtime import folding
from tests.networks import PreactBlock, randomise

PRECISIONS = ("highest", "high", "medium")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small hourglass with statistics that are not a fresh model's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = hourglass(stacks=2, features=32, blocks=1, depth=2, joints=5)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Edited(nn.Module):
    """A model whose output is tampered with."""

    def __init__(self, inner: nn.Module, edit: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.edit = edit
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        return self.edit(self.inner(*inputs))


class Outputs(nn.Module):
    """A model that returns what a function makes of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


# --- right models ---


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_agrees_with_itself(model: nn.Module, image: Tensor, precision: str) -> None:
    result = hgfast.verify(model, model, image, precision=precision)
    assert result.ok, result
    assert bool(result)
    assert result.precision == precision
    assert [output.name for output in result.outputs] == ["[0]", "[1]"]
    assert 0 < result.max_abs < 1e-4
    assert 0 < result.rel < 1e-5
    assert all(output.pck == 1 for output in result.outputs)


def test_channels_last_is_as_good_as_eager(model: nn.Module, image: Tensor) -> None:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert hgfast.verify(model, last, image)


def test_bfloat16_is_as_good_as_medium_and_no_better(model: nn.Module, image: Tensor) -> None:
    half = copy.deepcopy(model).bfloat16()
    medium = hgfast.verify(model, half, image)
    assert medium.ok, medium
    assert medium.precision == "medium"
    assert medium.arithmetic is torch.bfloat16
    for precision in ("highest", "high"):
        result = hgfast.verify(model, half, image, precision=precision)
        assert not result.ok
        assert "error" in result.outputs[0].fault


def test_bfloat16_model_is_held_against_bfloat16(model: nn.Module, image: Tensor) -> None:
    half = copy.deepcopy(model).bfloat16()
    for precision in (None, *PRECISIONS):
        result = hgfast.verify(half, half, image.bfloat16(), precision=precision)
        assert result.ok, result
        assert result.arithmetic is torch.bfloat16
    worse = Edited(half, lambda maps: [m + 4 * m.float().std().item() / 100 for m in maps])
    # The whole map raised by 4 % of its spread: within a bfloat16 network's largest error
    # perhaps, but not within its mean error.
    assert not hgfast.verify(half, worse, image.bfloat16())


def test_precision_comes_from_the_optimised_model(model: nn.Module, image: Tensor) -> None:
    for precision in PRECISIONS:
        fast = hgfast.optimize(model, precision=precision)
        assert hgfast.verify(model, fast, image).precision == precision


def test_optimised_model_as_the_judge_is_judged_by_its_eager_forward(
    model: nn.Module, image: Tensor
) -> None:
    fast = hgfast.optimize(model, precision="medium")
    outer, inner = (hgfast.verify(judge, fast, image) for judge in (model, fast))
    assert outer.max_abs == inner.max_abs
    assert [o.allowed_max for o in outer.outputs] == [o.allowed_max for o in inner.outputs]


# --- planted errors ---


@pytest.mark.parametrize(("precision", "size"), [("highest", 1e-3), ("high", 3e-3), ("medium", 4)])
def test_one_wrong_weight(model: nn.Module, image: Tensor, precision: str, size: float) -> None:
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.hourglasses[1].upper[0].conv2.weight[3, 5, 1, 1] += size
    result = hgfast.verify(model, wrong, image, precision=precision)
    assert not result.ok
    # Only what comes after the second hourglass's weight is wrong.
    assert result.outputs[0].ok
    assert "error" in result.outputs[1].fault


@pytest.mark.parametrize(
    ("precision", "factor", "ok"),
    [("high", 1e-5, True), ("high", 3e-5, False), ("highest", 1e-5, False)],
)
def test_relative_bound(
    model: nn.Module, image: Tensor, precision: str, factor: float, ok: bool
) -> None:
    scaled = Edited(model, lambda maps: [m * (1 + factor) for m in maps])
    result = hgfast.verify(model, scaled, image, precision=precision)
    assert result.ok is ok, result
    assert result.rel == pytest.approx(factor, rel=0.2)


def test_bounds_do_not_depend_on_the_scale_of_the_output(model: nn.Module, image: Tensor) -> None:
    for scale in (2.0**-40, 2.0**40):
        scaled = Edited(model, lambda maps, scale=scale: [m * scale for m in maps])
        assert hgfast.verify(scaled, scaled, image, precision="highest")
        wrong = Edited(scaled, lambda maps: [m * (1 + 1e-5) for m in maps])
        assert not hgfast.verify(scaled, wrong, image, precision="highest")


def with_high_parts_of_weights(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return model


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_high_is_what_bf16x3_loses(model: nn.Module, image: Tensor, precision: str) -> None:
    """Eager, so multiplied, is as good as "high" and no better; without low parts it is worse."""

    class Split(Edited):
        def forward(self, x: Tensor) -> Any:
            with Bf16x3():
                return super().forward(x)

    result = hgfast.verify(model, Split(model, lambda maps: maps), image, precision=precision)
    assert result.ok is (precision == "high"), result
    assert 2e-6 < result.rel < 2e-5
    if precision == "high":
        worst = max(share for output in result.outputs for share in output.shares)
        assert 0.25 < worst <= 0.5
    assert not hgfast.verify(model, with_high_parts_of_weights(model), image, precision=precision)


def test_bf16x3_splits_what_kernels_take() -> None:
    """Every spelling of a convolution, in inference mode and out of it; nothing else."""
    x = torch.randn(1, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    for call, split in [
        (lambda x: F.conv2d(x, torch.full((4, 8, 3, 3), 0.1)), True),
        (lambda x: F.conv2d(x, torch.full((4, 8, 3, 3), 0.1), padding="same"), True),
        (lambda x: F.conv_transpose2d(x, torch.full((8, 4, 2, 2), 0.1), stride=2), True),
        (lambda x: F.conv2d(x, torch.full((8, 1, 3, 3), 0.1), groups=8), False),
        (lambda x: F.conv2d(x.double(), torch.full((4, 8, 3, 3), 0.1).double()), False),
        (lambda x: F.avg_pool2d(x, 3) @ torch.full((3, 3), 0.1), False),
    ]:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                plain = call(x)
                with Bf16x3():
                    given = call(x)
            off = (given - plain).norm() / plain.norm()
            assert (1e-6 < off < 1e-5) if split else torch.equal(given, plain)


@pytest.mark.parametrize(("times", "ok"), [(1.9, True), (2.2, False)])
def test_one_cell_may_be_off_by_twice_what_eager_is(
    model: nn.Module, image: Tensor, times: float, ok: bool
) -> None:
    half = copy.deepcopy(model).bfloat16()
    judge = copy.deepcopy(model).double()
    with torch.inference_mode():
        errors = half(image.bfloat16())[1].double() - judge(image.double())[1]
    size = times * errors.abs().max().item()

    def plant(maps: list[Tensor]) -> list[Tensor]:
        flat = maps[1].view(-1)
        flat[flat.argmin()] -= size
        return maps

    result = hgfast.verify(model, Edited(model, plant), image, precision="medium")
    assert result.ok is ok, result
    assert result.outputs[1].fault == ("" if ok else "max error")


def test_mean_error_is_judged_too(model: nn.Module, image: Tensor) -> None:
    allowed = hgfast.verify(model, model, image, precision="medium").outputs[1]
    assert allowed.allowed_mean < allowed.allowed_max / 2
    shifted = Edited(model, lambda maps: [maps[0], maps[1] + allowed.allowed_max / 2])
    result = hgfast.verify(model, shifted, image, precision="medium").outputs[1]
    assert result.max_abs < result.allowed_max
    assert result.fault == "mean error"


def third(x: Tensor) -> Tensor:
    """Something that low precision gets wrong by a little."""
    return x * torch.full((), 1 / 3, dtype=x.dtype)


@pytest.mark.parametrize(("gap", "ok"), [(0.5, True), (1.2, False)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_keypoint_rule(precision: str, gap: float, ok: bool) -> None:
    """A maximum moved by errors that are small enough, each for itself."""
    maps = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0)).mul(1.5)
    maps[0, 0, 5, 3] = 3.0
    maps[0, 1, 9, 9] = 6.0156  # halfway between two bfloat16: sets the allowed error for all
    network = Outputs(third)
    first = hgfast.verify(network, network, maps, precision=precision).outputs[0]
    assert first.ok
    allowed = first.allowed_max
    maps[0, 0, 11, 11] = 3.0 - 3 * gap * allowed

    def swap(output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 0, 5, 3] -= 0.75 * allowed
        output[0, 0, 11, 11] += 0.75 * allowed
        return output

    result = hgfast.verify(network, Edited(network, swap), maps, precision=precision)
    (output,) = result.outputs
    assert output.moved == 1
    assert output.undecided == int(ok)
    assert result.keypoint_shift == 10.0  # from (3, 5) to (11, 11)
    assert output.pck == 0.5  # one of two
    assert result.ok is ok, result
    assert output.fault == ("" if ok else "1 keypoints moved")


def test_planted_peak(model: nn.Module, image: Tensor) -> None:
    def plant(maps: list[Tensor]) -> list[Tensor]:
        maps[1][0, 2].view(-1)[maps[1][0, 2].argmin()] = maps[1].max() + 1
        return maps

    result = hgfast.verify(model, Edited(model, plant), image, precision="medium")
    assert not result.ok
    assert result.outputs[0].moved == 0
    assert (result.outputs[1].moved, result.outputs[1].undecided) == (1, 0)
    assert "1 keypoints moved" in result.outputs[1].fault
    assert result.keypoint_shift >= 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_planted_nan_and_infinity(
    model: nn.Module, image: Tensor, value: float, precision: str
) -> None:
    def plant(maps: list[Tensor]) -> list[Tensor]:
        maps[0][0, 1, 2, 3] = value
        return maps

    result = hgfast.verify(model, Edited(model, plant), image, precision=precision)
    assert not result.ok
    assert not result.outputs[0].ok
    assert result.outputs[1].ok
    assert not math.isfinite(result.max_abs)


def test_nan_and_infinity_where_float64_has_them_too() -> None:
    maps = torch.rand(1, 2, 8, 8)
    maps[0, 0, 2, 2], maps[0, 1, 3, 3], maps[0, 1, 4, 4] = math.nan, math.inf, -math.inf
    network = Outputs(third)
    assert hgfast.verify(network, network, maps)
    hidden = Edited(network, lambda out: out.nan_to_num(0.1))
    assert not hgfast.verify(network, hidden, maps)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (tuple, "the output is tuple with 2 leaves; eager's is list with 2 leaves"),
        (lambda maps: maps[-1], "the output is a tensor; eager's is list"),
        (lambda maps: maps[:1], "list with 1 leaves; eager's is list with 2"),
        (lambda maps: [*maps[:1], 3], r"output's \[1\] is 3"),
        (lambda maps: [maps[0][:, :4], maps[1]], r"shape \(1, 4, 8, 8\), eager's is \(1, 5"),
        (lambda maps: [maps[0].double(), maps[1]], "float64, eager's is float32"),
    ],
)
def test_changed_container(
    model: nn.Module, image: Tensor, edit: Callable[[Any], Any], message: str
) -> None:
    result = hgfast.verify(model, Edited(model, edit), image)
    assert not result.ok
    with pytest.raises(hgfast.VerificationError, match=message):
        hgfast.verify(model, Edited(model, edit), image, raise_on_fail=True)


# --- containers and shapes ---


def test_nested_containers_are_named() -> None:
    network = Outputs(lambda x: ([{"hm": third(x), "size": third(x[0])}], third(x), "a string", 3))
    x = torch.rand(2, 3, 8, 8)
    result = hgfast.verify(network, network, x)
    assert result.ok, result
    assert [o.name for o in result.outputs] == ["[0][0]['hm']", "[0][0]['size']", "[1]"]
    other = Outputs(lambda x: ([{"hm": third(x), "size": third(x[0])}], third(x), "another", 3))
    assert not hgfast.verify(network, other, x)


class Pair(NamedTuple):
    heatmaps: Tensor
    offsets: Tensor


@dataclass
class Poses:
    heatmaps: Tensor
    pairs: list[Pair]
    names: tuple[str, ...] = ("nose",)
    cache: dict[str, Tensor] = field(init=False)  # no argument of __init__, and not always set


@pytest.mark.parametrize(
    ("pack", "names"),
    [
        (lambda a, b: Pair(a, b), [".heatmaps", ".offsets"]),
        (lambda a, b: {"pose": Pair(a, b)}, ["['pose'].heatmaps", "['pose'].offsets"]),
        (lambda a, b: Poses(a, [Pair(b, a)]), [".heatmaps", ".pairs[0].heatmaps",
                                               ".pairs[0].offsets"]),
        (lambda a, b: OrderedDict(a=a, b=(b, None)), ["['a']", "['b'][0]"]),
    ],
)  # fmt: skip
def test_every_container_is_looked_into(
    pack: Callable[[Tensor, Tensor], Any], names: list[str]
) -> None:
    network = Outputs(lambda x: pack(third(x), third(x) + 1))
    x = torch.rand(2, 3, 8, 8)
    result = hgfast.verify(network, network, x)
    assert result.ok, result
    assert [output.name for output in result.outputs] == names
    wrong = Outputs(lambda x: pack(third(x), third(x) * 1.01 + 1))
    result = hgfast.verify(network, wrong, x)
    assert [output.ok for output in result.outputs].count(False) == 1


def test_containers_as_inputs() -> None:
    class Shifted(nn.Module):
        def forward(self, poses: Poses) -> Tensor:
            assert poses.names == ("nose",)
            return third(poses.heatmaps) + poses.pairs[0].offsets

    x = torch.rand(1, 2, 8, 8)
    poses = Poses(x, [Pair(x, x)])
    assert hgfast.verify(Shifted().eval(), Shifted().eval(), poses, seeds=1)
    assert poses.heatmaps is x


def test_other_types_and_keys_are_no_match() -> None:
    x = torch.rand(1, 2, 8, 8)
    pair, plain = Outputs(lambda x: Pair(x, x)), Outputs(lambda x: (x, x))
    assert "Pair with 2 leaves" in hgfast.verify(pair, plain, x).fault
    named, other = Outputs(lambda x: {"hm": x}), Outputs(lambda x: {"heatmap": x})
    assert "['hm'] where the output has ['heatmap']" in hgfast.verify(named, other, x).fault
    turned = Outputs(lambda x: {"b": x, "a": x + 1})
    assert hgfast.verify(Outputs(lambda x: {"a": x + 1, "b": x}), turned, x)


# --- several inputs ---


class Above(nn.Module):
    """Right, but where an input exceeds a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return third(x) + (x > self.limit)


def test_random_inputs_find_what_the_given_one_hides() -> None:
    network = Outputs(third)
    x = torch.rand(1, 3, 16, 16)
    wrong = Above(1.2)
    assert hgfast.verify(network, wrong, x)
    result = hgfast.verify(network, wrong, x, seeds=3)
    assert not result.ok
    assert result.tried == 4
    assert result.seed in (0, 1, 2)
    assert f"The worst of 4 inputs: random ones, seed {result.seed}." in str(result)
    assert hgfast.verify(network, wrong, x, seeds=3) == result


def test_the_worst_of_right_ones_is_reported(model: nn.Module, image: Tensor) -> None:
    results = [hgfast.verify(model, model, image, seeds=n, precision="medium") for n in (0, 2)]
    assert all(results)
    alone, worst = (max(s for o in r.outputs for s in o.shares) for r in results)
    assert worst >= alone
    assert results[1].tried == 3


def test_random_inputs_have_the_given_ones_statistics() -> None:
    seen: list[Tensor] = []

    class Keep(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            seen.append(x.clone())
            return third(x)[index]

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 64, 64, generator=generator)
    x = x * torch.tensor([2.0, 0.5])[:, None, None] + torch.tensor([3.0, -1.0])[:, None, None]
    x = torch.cat([x, torch.ones(4, 1, 64, 64)], 1)
    hgfast.verify(Keep().eval(), Keep().eval(), x, torch.tensor([1, 3]), seeds=2)
    random = [t for t in seen if t.dtype == torch.float32 and not torch.equal(t, x)]
    assert len({float(t.sum()) for t in random}) == 2
    mean, spread = (f(x, (0, 2, 3)) for f in (torch.mean, torch.std))
    spread[2] = 1  # a channel that does not vary
    count = x.numel() / 3
    for t in random:
        # Within six standard errors of the mean, and of the standard deviation.
        assert ((t.mean((0, 2, 3)) - mean).abs() < 6 * spread / count**0.5).all()
        assert ((t.std((0, 2, 3)) / spread - 1).abs() < 6 / (2 * count) ** 0.5).all()


@pytest.mark.parametrize("seeds", [-1, 1.5, True])
def test_wrong_number_of_seeds(model: nn.Module, image: Tensor, seeds: Any) -> None:
    with pytest.raises(ValueError, match="number of seeds, 0 or more, got"):
        hgfast.verify(model, model, image, seeds=seeds)


# --- who is to blame ---


class Blocks(nn.Module):
    """Not a Plan as a whole, since what it does depends on its numbers: its blocks are regions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second, self.third = PreactBlock(), PreactBlock(), PreactBlock()
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if bool(y.isinf().any()):
            return y
        return self.head(self.third(self.second(self.first(y))))


def blocks() -> nn.Module:
    torch.manual_seed(2)
    return randomise(Blocks()).eval()


def spoil_weights(monkeypatch: pytest.MonkeyPatch, spoiled: Callable[..., Tensor]) -> None:
    """Pack what ``spoiled(weight, conv, weights)`` makes of a convolution's weight."""

    unfolded = folding.unfolded

    def call(conv: Any, *args: Any) -> Any:
        weight, *others = unfolded(conv, *args)
        return spoiled(weight, conv, args[-1]), *others

    monkeypatch.setattr(folding, "unfolded", call)


def spoil(name: str, monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Pack one convolution's weights wrongly."""
    spoil_weights(
        monkeypatch,
        lambda weight, conv, _: weight * (1 + by) if conv.name == name else weight,
    )


@pytest.mark.parametrize(
    ("name", "precision", "by"),
    [
        ("stem.residual1.conv1", "highest", 0.05),
        ("stem.residual1.conv1", "medium", math.nan),
        ("hourglasses.0.upper.0.conv3", "medium", 1.0),
        ("hourglasses.0.upper.0.conv3", "highest", math.nan),
        ("heads.1.conv", "high", 0.05),
    ],
)
def test_a_wrongly_packed_step_is_named(
    model: nn.Module,
    image: Tensor,
    name: str,
    precision: str,
    by: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(name, monkeypatch, by)
    result = hgfast.verify(model, hgfast.optimize(model, precision=precision), image)
    assert not result.ok
    culprit = result.culprit
    assert culprit is not None, result
    assert name.startswith(culprit.name)
    assert culprit.name.count(".") >= name.count(".") - 1
    assert culprit.step.startswith(("bottleneck", "conv"))
    assert math.isnan(culprit.error) if math.isnan(by) else culprit.error > 8 * culprit.eager
    assert culprit.eager < 1e-1
    assert f"First to depart: {culprit.name} ({culprit.step})" in str(result)
    assert not culprit.why


def test_a_wrongly_packed_block_region_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = blocks(), torch.randn(1, 3, 9, 7)
    # Of a region the names are its own: the second conv2 that is packed is that of `second`.
    seen = []

    def spoiled(weight: Tensor, conv: Any, weights: Any) -> Tensor:
        if not torch.equal(weights[conv.weight], model.second.conv2.weight):
            return weight
        seen.append(conv.name)
        return weight * 1.01

    spoil_weights(monkeypatch, spoiled)
    fast = hgfast.optimize(model)
    assert [region.name for region in regions_of(fast)] == ["first", "second", "third"]
    result = hgfast.verify(model, fast, x)
    assert seen
    assert result.culprit is not None
    assert result.culprit.name == "second"
    assert result.culprit.step.startswith("bottleneck")


@pytest.mark.parametrize("value", [0.1, math.nan])
def test_a_wrong_weight_in_one_region_is_named(value: float) -> None:
    model, x = blocks(), torch.randn(1, 3, 9, 7)
    fast = hgfast.optimize(model)
    with torch.no_grad():
        fast.second.conv1.weight[1, 2] = value
    result = hgfast.verify(model, fast, x)
    assert not result.ok
    assert result.culprit is not None
    assert (result.culprit.name, result.culprit.step) == ("second", "bottleneck")
    assert result.culprit.why == "its weight (conv1.weight) is not the model's"


def test_a_wrong_weight_in_a_whole_network_is_named(model: nn.Module, image: Tensor) -> None:
    fast = hgfast.optimize(model)
    with torch.no_grad():
        fast.hourglasses[1].inner.enter[0].conv2.weight.mul_(1.1)
    result = hgfast.verify(model, fast, image)
    assert result.outputs[0].ok
    assert result.culprit is not None
    assert result.culprit.name == "hourglasses.1.inner.enter.0"
    assert "conv2.weight) is not the model's" in result.culprit.why
    # Random inputs too: the worst one is searched.
    assert hgfast.verify(model, fast, image, seeds=2).culprit is not None


def test_a_wrong_weight_outside_the_regions_is_named() -> None:
    model, x = blocks(), torch.randn(1, 3, 9, 7)
    fast = hgfast.optimize(model)
    with torch.no_grad():
        fast.head.bias[3] += 0.1
    result = hgfast.verify(model, fast, x)
    assert result.culprit is not None
    assert (result.culprit.name, result.culprit.step) == ("head", "")
    assert result.culprit.why == "its bias (bias) is not the model's"
    assert hgfast.verify(fast, fast, x)


def test_weights_changed_unnoticed_are_told_from_wrong_kernels(
    model: nn.Module, image: Tensor
) -> None:
    fast = hgfast.optimize(model)
    with torch.inference_mode():
        fast(image)
    right = copy.deepcopy(model)
    for network in (fast, right):
        network.heads[1].conv.weight.data.mul_(1.5)  # through .data: nothing can notice
    result = hgfast.verify(right, fast, image)
    assert result.culprit is not None
    assert (result.culprit.name, result.culprit.step) == ("", "")
    assert "hgfast.refresh" in result.culprit.why
    assert hgfast.verify(right, hgfast.refresh(fast), image)


def test_the_culprit_of_a_model_that_decodes(
    model: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil("hourglasses.1.leave.0.conv2", monkeypatch, 0.5)
    result = hgfast.verify(model, hgfast.optimize(model, decode="quarter"), image)
    assert not result.ok
    assert result.culprit is not None
    assert result.culprit.name == "hourglasses.1.leave.0"


def test_without_regions_the_module_is_named(model: nn.Module, image: Tensor) -> None:
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.hourglasses[1].upper[0].norm2.running_mean += 0.1
    result = hgfast.verify(model, wrong, image)
    assert result.culprit is not None
    assert result.culprit.name == "hourglasses.1.upper.0.norm2"
    assert "running_mean" in result.culprit.why


def test_a_right_model_has_no_culprit(model: nn.Module, image: Tensor) -> None:
    assert hgfast.verify(model, hgfast.optimize(model), image, seeds=2).culprit is None


def test_a_failing_search_does_not_hide_the_verdict(
    model: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("hgfast._culprit.find", fails)
    wrong = Edited(model, lambda maps: [m * 1.1 for m in maps])
    result = hgfast.verify(model, wrong, image)
    assert not result.ok
    assert "out of memory" in result.note
    assert "out of memory" in str(result)


def test_to_dict(model: nn.Module, image: Tensor) -> None:
    right = hgfast.verify(model, model, image, precision="high").to_dict()
    assert json.loads(json.dumps(right, allow_nan=False)) == right
    assert right["ok"] is True
    assert right["culprit"] is None
    assert right["outputs"][0]["allowed_rel"] is None
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.stem.conv.weight[0] = math.nan
    found = hgfast.verify(model, wrong, image).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["culprit"]["name"] == "stem.conv"
    assert found["culprit"]["error"] is None
    assert found["arithmetic"] == "float32"


def test_integer_outputs_are_compared() -> None:
    network = Outputs(lambda x: x.flatten(1).argmax(1))
    x = torch.rand(4, 3, 8, 8)
    assert hgfast.verify(network, network, x)
    assert not hgfast.verify(network, Edited(network, lambda cell: cell + 1), x)


def test_all_zero_output() -> None:
    network = Outputs(lambda x: x * 0)
    x = torch.rand(1, 2, 8, 8)
    assert hgfast.verify(network, network, x)
    result = hgfast.verify(network, Outputs(lambda x: x * 1e-30), x)
    assert not result.ok
    assert result.rel == math.inf


def test_empty_batch(model: nn.Module, image: Tensor) -> None:
    result = hgfast.verify(model, model, image[:0])
    assert result.ok
    assert (result.max_abs, result.rel, result.keypoint_shift) == (0, 0, 0)
    assert all(output.pck is None for output in result.outputs)


def test_heatmaps_of_all_stacks_in_one_tensor() -> None:
    maps = torch.rand(1, 2, 3, 8, 8)
    network = Outputs(third)

    def move(output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 1, 2, 7, 7] = 1
        return output

    assert hgfast.verify(network, network, maps)
    assert hgfast.verify(network, Edited(network, move), maps).outputs[0].moved == 1


def test_several_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], index: Tensor) -> Tensor:
            return third(x + pair[0] * pair[1])[index]

    x = torch.rand(3, 4)
    assert hgfast.verify(Sum().eval(), Sum().eval(), x, (x, x), torch.tensor([2, 0]))


# --- nothing is left changed ---


class Stochastic(nn.Module):
    """Drops out even in eval mode, works in place, and has odd training flags."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(self.conv(F.relu_(x))), 0.0, training=True)


def test_models_inputs_and_random_state_stay_as_they_were() -> None:
    network = Stochastic()
    network.norm.eval()
    network.conv.weight.requires_grad_(False)
    fast = copy.deepcopy(network)
    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    states = [copy.deepcopy(m.state_dict()) for m in (network, fast)]
    random = torch.get_rng_state()
    assert hgfast.verify(network, fast, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, before)
    for module, state in zip((network, fast), states, strict=True):
        assert (module.training, module.conv.training, module.norm.training) == (True, True, False)
        assert not module.conv.weight.requires_grad
        assert module.conv.weight.dtype is torch.float32
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name])


def test_training_models_are_run_in_eval_mode(model: nn.Module, image: Tensor) -> None:
    training = copy.deepcopy(model).train()
    assert hgfast.verify(training, model, image)
    assert hgfast.verify(model, training, image)
    assert training.training


def test_randomness_is_the_same_for_both() -> None:
    network = Outputs(lambda x: F.dropout(x, 0.5, training=True))
    assert hgfast.verify(network, network, torch.rand(1, 3, 16, 16))


def test_under_any_grad_mode(image: Tensor) -> None:
    with torch.inference_mode():
        inside = hourglass(1, 16, 1, 1, 3).eval()
        assert hgfast.verify(inside, inside, image)
    assert hgfast.verify(inside, inside, image)
    wants = image.clone().requires_grad_()
    assert hgfast.verify(inside, inside, wants)
    assert wants.grad is None


def test_autocast_around_does_not_loosen_the_bounds(model: nn.Module, image: Tensor) -> None:
    expected = hgfast.verify(model, model, image)
    with torch.autocast("cpu", torch.bfloat16):
        assert hgfast.verify(model, model, image) == expected


# --- errors ---


def test_model_that_cannot_run_in_float64(model: nn.Module, image: Tensor) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, torch.ones(1, 3, 1, 1))

    with pytest.raises(ValueError, match=r"verify has to run Constant in float64 .* it fails"):
        hgfast.verify(Constant().eval(), Constant().eval(), image)


def test_model_that_leaves_float64(image: Tensor) -> None:
    network = Outputs(lambda x: x.float() / 3)
    with pytest.raises(ValueError, match=r"Outputs in float64 .* its output is then float32"):
        hgfast.verify(network, network, image)


def test_wrong_input_gets_the_models_own_error(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        hgfast.verify(model, model, torch.rand(1, 4, 64, 64))


def test_unknown_precision(model: nn.Module, image: Tensor) -> None:
    with pytest.raises(ValueError, match='"highest", "high", "medium", got \'low\''):
        hgfast.verify(model, model, image, precision="low")


def test_error_carries_the_verification(model: nn.Module, image: Tensor) -> None:
    wrong = Edited(model, lambda maps: [m * 1.1 for m in maps])
    assert hgfast.verify(model, model, image, raise_on_fail=True)
    with pytest.raises(hgfast.VerificationError) as caught:
        hgfast.verify(model, wrong, image, raise_on_fail=True)
    assert not caught.value.verification.ok
    assert str(caught.value) == str(caught.value.verification)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.verification == caught.value.verification


def test_table(model: nn.Module, image: Tensor) -> None:
    text = str(hgfast.verify(model, model, image))
    assert text.startswith('verify StackedHourglass, precision "highest": ok')
    assert "[0]" in text
    assert "[1]" in text
    assert "pck" in text
    assert "twice that of eager float32" in text
    wrong = Edited(model, lambda maps: [maps[0], maps[1] * 1.1])
    text = str(hgfast.verify(model, wrong, image))
    assert text.startswith('verify StackedHourglass, precision "highest": FAILED')
    assert "max error, mean error" in text
    text = str(hgfast.verify(model, model, image, precision="high"))
    assert "twice that of eager float32 in bf16x3" in text
