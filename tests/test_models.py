"""The reference network: shapes, size, cost, and what others have to be able to do with it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from hgfast.models import StackedHourglass, hourglass
from hgfast.models.hourglass import Hourglass, Residual


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("stem", ["paper", "bearpaw"])
@pytest.mark.parametrize(
    ("stacks", "features", "blocks", "depth", "joints"),
    [(1, 4, 1, 1, 1), (2, 16, 1, 4, 16), (3, 8, 3, 2, 5)],
)
def test_output_is_a_list_of_heatmaps_one_per_stack(
    stacks: int, features: int, blocks: int, depth: int, joints: int, stem: str
) -> None:
    model = hourglass(stacks, features, blocks, depth, joints, stem).eval()
    with torch.inference_mode():
        heatmaps = model(torch.rand(2, 3, 64, 128))
    assert type(heatmaps) is list
    assert [tuple(heatmap.shape) for heatmap in heatmaps] == [(2, joints, 16, 32)] * stacks


# Both were worked out by hand from the layers' sizes too, and "bearpaw" has exactly what the
# public implementation has.
@pytest.mark.parametrize(
    ("stacks", "stem", "weights", "multiplications"),
    [
        (2, "paper", 6_570_400, 8_334_606_336),
        (1, "bearpaw", 3_586_960, 5_804_654_592),
        (2, "bearpaw", 6_730_912, 8_988_917_760),
    ],
)
def test_size_and_cost(stacks: int, stem: str, weights: int, multiplications: int) -> None:
    with torch.device("meta"):
        model = hourglass(stacks, stem=stem).eval()
        image = torch.empty(1, 3, 256, 256)
    assert parameters(model) == weights
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    assert counter.get_total_flops() == 2 * multiplications


@pytest.mark.parametrize(
    ("stacks", "blocks", "depth"), [(1, 1, 1), (2, 1, 4), (8, 1, 4), (2, 3, 3)]
)
def test_number_of_residuals(stacks: int, blocks: int, depth: int) -> None:
    model = hourglass(stacks, 8, blocks, depth)
    stem, per_hourglass, per_head = 3, blocks * (3 * depth + 1), blocks
    found = sum(isinstance(module, Residual) for module in model.modules())
    assert found == stem + stacks * (per_hourglass + per_head)
    assert sum(isinstance(module, Hourglass) for module in model.modules()) == stacks * depth


def test_defaults_are_the_papers_two_stack_network() -> None:
    model = hourglass()
    assert isinstance(model, StackedHourglass)
    assert len(model.hourglasses) == 2
    assert model.heads[0].heatmap.weight.shape == (16, 256, 1, 1)
    assert parameters(model) == parameters(hourglass(2, 256, 1, 4, 16, "paper"))


def test_residual_is_the_sum_of_its_branches() -> None:
    for width_in, width_out in ((8, 8), (8, 16)):
        block = Residual(width_in, width_out).eval()
        nn.init.zeros_(block.conv3.weight)
        nn.init.constant_(block.conv3.bias, 2)
        x = torch.randn(1, width_in, 5, 7)
        with torch.inference_mode():
            assert torch.equal(block(x), block.project(x) + 2)
            assert isinstance(block.project, nn.Identity) == (width_in == width_out)


def test_hourglass_is_symmetric_in_resolution_and_sees_everything() -> None:
    """One pixel of the input reaches every pixel of the output, through the coarsest level."""
    torch.manual_seed(0)
    block = Hourglass(depth=3, features=8, blocks=1).double().eval()
    x = torch.randn(1, 8, 32, 32, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] += 1
    with torch.inference_mode():
        difference = (block(changed) - block(x)).abs().amax(1)
    assert difference.shape == (1, 32, 32)
    # 3 x 3 at the coarsest level, three times: all of the 4 x 4 cells there.
    assert (difference > 0).float().mean() > 0.9


def test_each_stack_builds_on_the_one_before() -> None:
    torch.manual_seed(0)
    model = hourglass(3, 8, 1, 1, 2).eval()
    image = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        before = model(image)
        model.heads[1].heatmap.bias += 1
        after = model(image)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1] + 1, after[1])
    assert not torch.allclose(before[2], after[2])


@pytest.mark.parametrize("stem", ["paper", "bearpaw"])
def test_gradients_reach_every_parameter(stem: str) -> None:
    model = hourglass(2, 8, 2, 2, 3, stem)
    assert model.training
    sum(heatmap.square().mean() for heatmap in model(torch.rand(2, 3, 32, 32))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_is_traceable() -> None:
    model = hourglass(2, 8, 1, 2, 3).eval()
    image = torch.rand(1, 3, 32, 32)
    traced = fx.symbolic_trace(model)
    exported = torch.export.export(model, (image,)).module()
    with torch.inference_mode():
        expected = model(image)
        for other in (traced, exported):
            for heatmap, reference in zip(other(image), expected, strict=True):
                assert torch.equal(heatmap, reference)


def test_copies_and_pickles() -> None:
    model = hourglass(1, 8, 1, 2, 3).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(image)[0], model(image)[0])


def test_empty_batch() -> None:
    with torch.inference_mode():
        heatmaps = hourglass(2, 8, 1, 2, 3).eval()(torch.rand(0, 3, 32, 32))
    assert [tuple(heatmap.shape) for heatmap in heatmaps] == [(0, 3, 8, 8)] * 2


@pytest.mark.parametrize("name", ["stacks", "features", "blocks", "depth", "joints"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        hourglass(**{name: value})


def test_features_are_a_multiple_of_4() -> None:
    with pytest.raises(ValueError, match="features must be a multiple of 4, got 30"):
        hourglass(features=30)


def test_stem_is_a_known_one() -> None:
    with pytest.raises(ValueError, match='"paper" or "bearpaw", got \'princeton\''):
        hourglass(stem="princeton")
