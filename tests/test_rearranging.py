"""What networks do between their convolutions: shuffled channels, slices, views, attention.

Each becomes steps of one Plan, for every size that eager takes, and computes what eager does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from hgfast.patterns import read_plan
from hgfast.plan import Plan
from hgfast.recognition import tensors_of
from hgfast.runtime import choice, reference
from hgfast.trace import TraceError, trace, trace_with_example

CHANNELS = 8


class Between(nn.Module):
    """Two convolutions with ReLUs, and something in between."""

    def __init__(self, what: Callable[[Between, Tensor], Tensor], channels: int = CHANNELS) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(channels, 4, 1)
        self.one, self.norm = nn.Conv2d(CHANNELS, 1, 1), nn.LayerNorm([CHANNELS, 1, 1])
        self.shuffle, self.soft = nn.ChannelShuffle(4), nn.Softmax(dim=2)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = self.what(self, F.relu(self.first(x)))
        return F.relu(self.last(y))


def shuffled(m: Between, y: Tensor) -> Tensor:
    batch, channels, height, width = y.size()
    assert channels % 2 == 0
    y = y.view(batch, 2, channels // 2, height, width)
    y = torch.transpose(y, 1, 2).contiguous()
    return y.view(batch, channels // 2 * 2, height, width)


def shuffled_twice(m: Between, y: Tensor) -> Tensor:
    return shuffled(m, shuffled(m, y))  # the second assertion is about the first's result


def halves(m: Between, y: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=1)
    return torch.cat([second, first], 1)


def in_a_loop(m: Between, y: Tensor) -> Tensor:
    parts = [part * (i + 1) for i, part in enumerate(torch.split(y, 3, dim=1))]
    return torch.cat(parts, dim=1)


def unequal(m: Between, y: Tensor) -> Tensor:
    return torch.cat([part + 1 for part in y.split([1, 5, 2], 1)][::-1], 1)


def counted(m: Between, y: Tensor) -> Tensor:
    parts = y.chunk(4, 1)
    return torch.cat([parts[i] for i in reversed(range(len(parts)))], 1)


def fewer_than_asked(m: Between, y: Tensor) -> Tensor:
    parts = y[:, :6].chunk(4, dim=1)  # three of two channels
    return torch.cat([*(part + i for i, part in enumerate(parts)), y[:, 6:]], 1)


def the_last(m: Between, y: Tensor) -> Tensor:
    return y + torch.cat([y[:, :6].chunk(4, 1)[-1]] * 4, 1)  # the third of three


def slices(m: Between, y: Tensor) -> Tensor:
    return y[:, 2:6] + y[:, -4:]


def focus(m: Between, y: Tensor) -> Tensor:
    return torch.cat([y[..., ::2, 1:], y[..., 1:, :-1][..., ::2, :]], 1)


def one_channel(m: Between, y: Tensor) -> Tensor:
    return y * y[:, 3].unsqueeze(1) + y[:, None, 0]


def like_another(m: Between, y: Tensor) -> Tensor:
    small = F.max_pool2d(y, 2)
    pooled = F.adaptive_avg_pool2d(y, small.size()[-2:])
    return F.interpolate(small + pooled, size=y.shape[-2:], mode="nearest")


def starred(m: Between, y: Tensor) -> Tensor:
    return y.view(*y.shape[:2], -1).softmax(2).view(y.size(0), CHANNELS, *y.shape[2:])


def split_attention(m: Between, y: Tensor) -> Tensor:
    batch = y.size(0)
    splits = y.view(batch, 2, -1, *y.shape[2:])
    attention = splits.sum(dim=1).mean((2, 3), keepdim=True).view(batch, 1, 1, -1)
    return torch.cat([splits.sum(1), splits[:, 0]], 1) * attention.transpose(1, 3).mean(1, True)


def context(m: Between, y: Tensor) -> Tensor:
    batch, channels, height, width = y.size()
    mask = m.soft(m.one(y).view(batch, 1, height * width)).unsqueeze(-1)
    where = torch.matmul(y.view(batch, channels, height * width).unsqueeze(1), mask)
    return y + m.norm(where.view(batch, channels, 1, 1))


def where_to_look(m: Between, y: Tensor) -> Tensor:
    strongest, _ = torch.max(y, dim=1, keepdim=True)
    return y * torch.sigmoid(strongest + y.max(1, keepdim=True)[0]) + y.amax((2, 3), keepdim=True)


def squeezed_and_excited(m: Between, y: Tensor) -> Tensor:
    scale = torch.sigmoid(m.one(F.adaptive_avg_pool2d(y, 1)))
    spread = scale.view(y.size(0), 1, 1, 1).expand(-1, CHANNELS, y.size(2), y.size(3))
    return y * scale.expand_as(y) + spread


def pooled_whole(m: Between, y: Tensor) -> Tensor:
    mean = F.avg_pool2d(y, (y.size(2), y.size(3)), stride=(y.size(2), y.size(3)))
    return y * mean + F.max_pool2d(y, kernel_size=y.size()[2:])


def clipped(m: Between, y: Tensor) -> Tensor:
    return F.leaky_relu(F.relu6(y, True) + F.hardtanh(y, -0.5, 0.5), 0.2, True)


def shuffle_module(m: Between, y: Tensor) -> Tensor:
    return m.shuffle(y) * F.channel_shuffle(y, 2)


def written_view(m: Between, y: Tensor) -> Tensor:
    y = shuffled(m, y)
    y += 1  # what it is a view of, nobody reads again
    return y


EVERY: dict[str, tuple[Callable[[Between, Tensor], Tensor], int]] = {
    "shuffled": (shuffled, 8),
    "shuffled twice": (shuffled_twice, 8),
    "halves": (halves, 8),
    "in a loop": (in_a_loop, 8),
    "unequal": (unequal, 8),
    "counted": (counted, 8),
    "fewer than asked": (fewer_than_asked, 8),
    "the last": (the_last, 8),
    "slices": (slices, 4),
    "focus": (focus, 16),
    "one channel": (one_channel, 8),
    "like another": (like_another, 8),
    "starred": (starred, 8),
    "split attention": (split_attention, 8),
    "context": (context, 8),
    "where to look": (where_to_look, 8),
    "squeezed and excited": (squeezed_and_excited, 8),
    "clipped": (clipped, 8),
    "pooled whole": (pooled_whole, 8),
    "shuffle module": (shuffle_module, 8),
    "written view": (written_view, 8),
}


def values_of(plan: Plan, model: nn.Module, x: Tensor) -> dict[int, Tensor]:
    weights = {name: tensor.double() for name, tensor in tensors_of(model).items()}
    return reference.run(plan, weights, [x.double()])


# torch.export records a window of 8x6, not that it is the map: the sum stays eager's.
CASES = [(name, "fx") for name in EVERY]
CASES += [(name, "export") for name in EVERY if name != "pooled whole"]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_it_is_steps_of_one_plan(name: str, how: str) -> None:
    what, channels = EVERY[name]
    model = randomise(Between(what, channels)).eval()
    sizes = [(2, 3, 8, 6)] if how == "export" else [(2, 3, 8, 6), (1, 3, 10, 14)]
    graph = trace(model) if how == "fx" else trace_with_example(model, (torch.randn(sizes[0]),))
    plan = read_plan(graph, {n: tuple(t.shape) for n, t in tensors_of(model).items()})
    for size in sizes:
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = model(x)
        values = values_of(plan, model, x)
        torch.testing.assert_close(values[plan.outputs], expected.double(), rtol=1e-4, atol=1e-5)
        assert plan.shapes(size) == {n: tuple(v.shape) for n, v in values.items()}
        executor: Any = choice.choose(plan, tensors_of(model), "highest")
        if not isinstance(executor, str):  # it says why there are no kernels here
            ours = executor.run([x])[plan.outputs]
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def reads_what_was_viewed(m: Between, y: Tensor) -> Tensor:
    part = y[:, :4]
    part += 1
    return y


def writes_under_a_view(m: Between, y: Tensor) -> Tensor:
    part = y[:, :4].contiguous()  # a copy, or not
    y.mul_(2)
    return torch.cat([part, part], 1)


def direct(m: Between, y: Tensor) -> Tensor:
    return torch.cat(torch.split(y, 3, 1)[1:], 1)


def squeezed(m: Between, y: Tensor) -> Tensor:
    return y + y.mean((1, 2, 3)).squeeze()


REFUSED = {
    "reads what was viewed": (reads_what_was_viewed, "may be a view"),
    "writes under a view": (writes_under_a_view, "may be a view"),
    "parts not one by one": (direct, "list of activations"),
    "squeeze of anything": (squeezed, r"squeeze\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_may_mean_is_not_guessed(name: str) -> None:
    what, why = REFUSED[name]
    with pytest.raises(TraceError, match=why):
        trace(Between(what))


class Returns(nn.Module):
    def __init__(self, what: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x, F.relu(self.conv(x)))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (lambda x, y: (y, y[:, :2]), "views of one another"),
        (lambda x, y: (y, y.clone()), "copies of one activation"),
        (lambda x, y: (y, x.clone()), "of its input"),
        (lambda x, y: (y, x.chunk(3, 1)[1]), "of its input"),
    ],
)
def test_outputs_that_share_memory_are_refused(what: Any, why: str) -> None:
    """Whoever writes into one of them, as a parent's forward may, would see the difference."""
    with pytest.raises(TraceError, match=why):
        trace(Returns(what))


def test_outputs_that_share_none_are_not() -> None:
    assert len(trace(Returns(lambda x, y: y.chunk(2, 1))).outputs) == 2
    assert len(trace(Returns(lambda x, y: (x, y, y))).outputs) == 3


class Buffered(nn.Module):
    def __init__(self, write: Callable[[Buffered, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("seen", torch.zeros(4))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        self.write(self, y)
        return y


@pytest.mark.parametrize(
    "write",
    [
        lambda m, y: m.seen.view(-1).add_(1),
        lambda m, y: m.seen[0].add_(1),
        lambda m, y: setattr(y, "data", y.data + 1),
    ],
)
def test_writes_by_detours_are_refused(write: Any) -> None:
    with pytest.raises(TraceError):
        trace(Buffered(write))


@pytest.mark.parametrize(
    "ask",
    [
        lambda y: y + F.avg_pool2d(y, (y.size(2), 1)),
        lambda y: y.sum(y.dim() - 1, keepdim=True) + y.shape[y.ndim - 1],
        lambda y: F.layer_norm(y, y.size()[1:]),
        lambda y: y.view(y.size(0), -1).view(2, 2, 2).size(1) * y,
    ],
)
def test_what_is_not_understood_is_refused_in_words(ask: Any) -> None:
    with pytest.raises(TraceError):
        trace(Returns(lambda x, y: ask(y)))


def tokens(m: Between, y: Tensor) -> Tensor:
    t = y.flatten(2)
    return (torch.cat([t, t], 1) + torch.cat([t, t], -2))[:, :CHANNELS].view(y.size())


def five(m: Between, y: Tensor) -> Tensor:
    z = y.view(y.size(0), 2, 4, *y.shape[2:])
    return torch.cat([z, z], -3).sum(1)


@pytest.mark.parametrize("what", [tokens, five])
def test_sums_and_concatenations_of_what_are_no_maps(what: Any) -> None:
    model, x = randomise(Between(what)).eval(), torch.randn(2, 3, 8, 6)
    plan = read_plan(trace(model), {n: tuple(t.shape) for n, t in tensors_of(model).items()})
    assert not {step.kind for step in plan.steps} & {"add", "concat"}
    with torch.inference_mode():
        torch.testing.assert_close(
            values_of(plan, model, x)[plan.outputs], model(x).double(), rtol=1e-4, atol=1e-5
        )


def test_a_written_view_of_the_input_is_refused() -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[:, :1].mul_(2)
            return x

    with pytest.raises(TraceError, match="changes its input in place"):
        trace(Changes())


def test_a_dimension_that_is_not_one_is_not_squeezed() -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x).squeeze(3))

    model = Squeezes()
    plan = read_plan(trace(model), {n: tuple(t.shape) for n, t in tensors_of(model).items()})
    assert values_of(plan, model, torch.randn(1, 3, 5, 1))[plan.outputs].shape == (1, 4, 5)
    with pytest.raises(ValueError, match="not 1"):
        plan.shapes((1, 3, 5, 2))
    with pytest.raises(RuntimeError, match="not 1"):
        values_of(plan, model, torch.randn(1, 3, 5, 2))
