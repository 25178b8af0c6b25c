"""Tracing: one normal form, in-place operations made functional, refusals that say why."""

from __future__ import annotations

import threading

import pytest
import torch
from networks import Asserts, MethodHourglass, PreactBlock, image, small_hourglass
from torch import Tensor, nn
from torch.nn import functional as F

from hgfast.patterns import read_plan
from hgfast.recognition import recognise
from hgfast.runtime import reference
from hgfast.trace import OPERATIONS, Graph, TraceError, trace, trace_with_example


def operations(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_both_tracers_give_the_same_normal_form() -> None:
    block = PreactBlock(8, 16).eval()
    symbolic, concrete = trace(block), trace_with_example(block, (torch.randn(1, 8, 6, 5),))
    assert operations(symbolic) == operations(concrete)
    for one, other in zip(symbolic.nodes, concrete.nodes, strict=True):
        assert one.attributes == other.attributes
        assert set(one.attributes) == set(OPERATIONS[one.op])
    assert symbolic.input_shapes is None
    assert concrete.input_shapes == ((1, 8, 6, 5),)


def test_hourglass_traces_with_an_example_too() -> None:
    model = small_hourglass(stacks=2)
    concrete = trace_with_example(model, (image(),))
    assert sorted(operations(concrete)) == sorted(operations(trace(model)))
    assert isinstance(concrete.outputs, list)
    assert len(concrete.outputs) == 2


class InplaceThenReuse(nn.Module):
    """conv(relu_(y)) + y: the sum sees the rectified y, which a naive trace would miss."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.write == "relu_":
            z = y.relu_()
        elif self.write == "functional":
            z = F.relu(y, inplace=True)
        elif self.write == "module":
            z = self.relu(y)
        else:
            z = y
            z += x
        return self.conv(z) + y


@pytest.mark.parametrize("write", ["relu_", "functional", "module", "+="])
def test_in_place_operations_become_functional(write: str) -> None:
    graph = trace(InplaceThenReuse(write))
    total = graph.outputs
    assert total.op == "add"
    conv, other = total.inputs
    assert conv.op == "conv2d"
    assert other is conv.inputs[0], "both branches must see the changed tensor"
    assert other.op == ("add" if write == "+=" else "relu")


FOLLOWED = {
    "mul_": lambda y: y.mul_(2),
    "functional": lambda y: F.leaky_relu(y, 0.1, inplace=True),
    "sigmoid_": lambda y: y.sigmoid_(),
    "clamp_": lambda y: y.clamp_(0.0, 6.0),
    "detached": lambda y: y.detach().relu_(),
    "not a copy": lambda y: F.dropout(y, training=False).relu_(),
    "a copy": lambda y: y.clone().relu_(),
}


class Writes(nn.Module):
    def __init__(self, write: object) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.write == "*=":
            z = y
            z *= 2
        else:
            self.write(y)
        return self.second(y)


@pytest.mark.parametrize("write", [*FOLLOWED, "*="])
def test_writes_are_followed_even_if_their_result_is_dropped(write: str) -> None:
    module, x = Writes(FOLLOWED.get(write, write)).double(), torch.randn(1, 2, 3, 3).double()
    plan = read_plan(trace(module), {k: tuple(v.shape) for k, v in module.state_dict().items()})
    values = reference.run(plan, module.state_dict(), [x])
    torch.testing.assert_close(values[plan.outputs], module(x))


WRITES = {
    "view": lambda y: y.flatten(1).relu_(),
    "slice": lambda y: y[:, :1].relu_(),
    "underscore": lambda y: F.leaky_relu_(y, 0.1),
    "out": lambda y: torch.add(y, y, out=y),
    "index": lambda y: y.__setitem__(0, 0),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_without_a_normal_form_are_refused_even_if_their_result_is_dropped(
    write: str,
) -> None:
    with pytest.raises(TraceError, match=r"in place|cannot follow"):
        trace(Writes(WRITES[write]))


class WritesAfterAView(nn.Module):
    """The view changes with what it is a view of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y.permute(0, 1, 3, 2)
        y.relu_()
        return z


def test_a_write_behind_a_view_s_back_is_refused() -> None:
    with pytest.raises(TraceError, match="in place"):
        trace(WritesAfterAView())


class Counts(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.log, self.how = nn.Conv2d(3, 3, 1), [], how
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "list":
            self.log.append(x)
        else:
            self.calls.add_(1)
        return self.conv(x)


@pytest.mark.parametrize("how", ["list", "buffer"])
def test_side_effects_are_refused_and_undone(how: str) -> None:
    module = Counts(how)
    with pytest.raises(TraceError, match=r"attributes|in place"):
        trace(module)
    assert module.log == []
    assert module.calls.item() == 0


def test_autocast_within_a_forward_is_refused() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.conv(x)

    with pytest.raises(TraceError, match="autocast"):
        trace(Casts())


def test_other_threads_are_not_disturbed() -> None:
    other, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), image()
    errors: list[Exception] = []
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            try:
                other(x)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(3):
        trace(small_hourglass())
    done.set()
    thread.join()
    assert not errors


@pytest.mark.parametrize("kind", ["plain tensor", "relu of a weight", "lazy"])
def test_odd_modules_are_refused_not_crashed_on(kind: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock()
            self.plain = torch.randn(16, 16, 1, 1)
            self.weight = nn.Parameter(torch.randn(1, 16, 1, 1))
            if kind == "lazy":
                self.lazy = nn.LazyConv2d(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "plain tensor":
                return F.conv2d(self.block(x), self.plain)
            if kind == "lazy":
                return self.lazy(self.block(x))
            return self.block(x) + F.relu(self.weight)

    with pytest.raises(TraceError):
        recognise(Odd())


def test_a_module_that_changes_its_input_is_refused() -> None:
    with pytest.raises(TraceError, match="changes its input in place"):
        trace(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)))


def test_refusals_say_why() -> None:
    with pytest.raises(TraceError, match=r"trilinear"):
        trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Upsample(scale_factor=2, mode="trilinear")))
    hooked = PreactBlock()
    hooked.conv2.register_forward_hook(lambda *_: None)
    with pytest.raises(TraceError, match=r"conv2 has a forward hook"):
        trace(hooked)
    patched = PreactBlock()
    patched.conv2.forward = lambda x: x
    with pytest.raises(TraceError, match=r"conv2 has a forward of its own"):
        trace(patched)
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)))
    with pytest.raises(TraceError, match="parametrisation"):
        trace(spectral)
    with pytest.raises(TraceError, match="LSTM"):
        trace(nn.Sequential(nn.LSTM(1, 1)))


class Weightstandardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_a_subclass_with_its_own_forward_is_not_its_base() -> None:
    with pytest.raises(TraceError):
        trace(nn.Sequential(Weightstandardised(3, 3, 1)))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.last: object = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.last


def test_a_forward_that_sets_attributes_is_refused_and_cleaned_up() -> None:
    module = Remembers()
    with pytest.raises(TraceError, match="sets attributes"):
        trace(module)
    assert module.last is None


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_data_dependent_control_flow_is_refused() -> None:
    with pytest.raises(TraceError, match="depends on the sizes or values"):
        trace(Branches())


def test_assertions_become_guards_and_known_sizes_decide() -> None:
    graph = trace(Asserts())
    assert [str(guard) for guard in graph.guards] == [
        "size 3 of its input == 3",
        "size 1 of its input % 2 == 0",
        "size 2 of its input % 2 == 0",
    ]
    assert [node.op for node in graph.nodes] == ["input", "permute", "conv2d", "mul_number"]
    plan = read_plan(graph, {k: tuple(v.shape) for k, v in Asserts().state_dict().items()})
    assert plan.shapes((1, 4, 6, 3))[plan.outputs] == (1, 4, 4, 6)
    with pytest.raises(ValueError, match="asserts that size 2 of its input % 2 == 0"):
        plan.shapes((1, 4, 5, 3))


def test_a_comparison_that_is_no_assertion_is_not_taken_for_true() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x if x.shape[2] % 2 == 0 else x

    with pytest.raises(TraceError, match="depends on the sizes"):
        trace(Odd())


def test_the_size_of_another_activation() -> None:
    class Like(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.conv, self.how = nn.Conv2d(3, 3, 3, stride=2, padding=1), how

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            _, _, h, w = x.shape
            sizes = {
                "shape": x.shape[2:],
                "size": x.size()[-2:],
                "each": (x.size(2), x.shape[-1]),
                "unpacked": [h, w],
            }
            return F.interpolate(y, size=sizes[self.how], mode="bilinear", align_corners=True)

    for how in ("shape", "size", "each", "unpacked"):
        graph = trace(Like(how))
        assert graph.outputs.op == "upsample"
        assert graph.outputs.inputs[1] is graph.inputs[0]


@pytest.mark.parametrize("training", [True, False])
def test_the_module_keeps_its_mode(training: bool) -> None:
    model = MethodHourglass()
    model.train(training)
    model.hg[0][0].train(not training)  # a mixed mode is kept as it is
    before = [module.training for module in model.modules()]
    trace(model)
    assert [module.training for module in model.modules()] == before
