"""The CUDA executor with emulated kernels, on CPU tensors: whole Plans, and whole models."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from networks import PreactBlock, image, randomise
from op_checks import needs_native, without_onednn
from torch import Tensor, nn
from torch.nn import functional as F

import hgfast
from hgfast.models import hourglass
from hgfast.plan import output_values
from hgfast.recognition import recognise, tensors_of
from hgfast.region import regions_of
from hgfast.runtime import choice, cuda, reference

emulator: Any = pytest.importorskip(
    "hgfast_emulator", reason="the emulator is not built (HGFAST_EMULATOR=1 builds it)"
)
pytestmark = needs_native

CPU = torch.device("cpu")


def small_hourglass(stacks: int = 1) -> nn.Module:
    """Every residual has channels in multiples of 16, the stem's too."""
    torch.manual_seed(1)
    model = hourglass(stacks=stacks, features=64, blocks=1, depth=2, joints=5)
    return randomise(model).eval().requires_grad_(False)


DTYPES = [torch.bfloat16, torch.float16]


class EmulatedOps:
    """The public ops; joins in the emulated kernel."""

    upsample_add = torch.ops.hgfast_emulated.upsample_add
    conv = torch.ops.hgfast_emulated.conv


@pytest.fixture
def kernels() -> cuda.Kernels:
    emulator.set_device()
    return cuda.Kernels(emulator, EmulatedOps, CPU)


@pytest.fixture
def on_emulated_gpu(monkeypatch: pytest.MonkeyPatch, kernels: cuda.Kernels) -> None:
    """Models on the CPU run as models on a GPU do."""

    def choose(plan: Any, weights: Any, precision: str, as_computed: bool = False) -> Any:
        dtype = next(iter(weights.values())).dtype
        return cuda.unsupported(plan, dtype, precision, kernels) or cuda.CudaExecutor(
            plan, weights, precision, kernels, as_computed
        )

    monkeypatch.setattr("hgfast.region.choose", choose)


def executor_of(
    model: nn.Module, dtype: torch.dtype, precision: str, kernels: cuda.Kernels
) -> tuple[Any, cuda.CudaExecutor]:
    plan = recognise(model)
    weights = {name: tensors_of(model)[name].to(dtype) for name in plan.weights}
    return plan, cuda.CudaExecutor(plan, weights, precision, kernels)


def assert_as_good_as_eager(
    model: nn.Module, dtype: torch.dtype, x: Tensor, kernels: cuda.Kernels
) -> None:
    """Every output's error is at most twice that of the same Plan in plain PyTorch."""
    plan, executor = executor_of(model, dtype, "medium", kernels)
    element = torch.bfloat16 if dtype == torch.float32 else dtype
    weights = {name: tensors_of(model)[name] for name in plan.weights}

    @without_onednn
    def expected(to: torch.dtype) -> dict[int, Tensor]:
        # Weights are rounded to the model's dtype once, whatever the arithmetic.
        cast = {name: tensor.to(dtype).to(to) for name, tensor in weights.items()}
        return reference.run(plan, cast, [x.to(dtype).to(to)])

    ours, exact, eager = executor.run([x.to(dtype)]), expected(torch.float64), expected(element)
    for number in output_values(plan.outputs):
        assert ours[number].dtype == dtype
        assert not ours[number].is_inference()
        miss = (ours[number].double() - exact[number]).abs()
        allowed = (eager[number].double() - exact[number]).abs()
        assert miss.max() <= 2 * allowed.max() + 1e-3
        assert miss.mean() <= 2 * allowed.mean() + 1e-4


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_a_stacked_hourglass(dtype: torch.dtype, kernels: cuda.Kernels) -> None:
    assert_as_good_as_eager(small_hourglass(stacks=2), dtype, image(2), kernels)


def test_pooling_becomes_a_prologue_where_one_block_reads_it(kernels: cuda.Kernels) -> None:
    plan, executor = executor_of(small_hourglass(), torch.bfloat16, "medium", kernels)
    pools = [step for step in plan.steps if step.kind == "pool"]
    read_once = [
        pool for pool in pools if sum(pool.output in step.inputs for step in plan.steps) == 1
    ]
    assert read_once
    assert len(executor._launches) == len(plan.steps) - len(read_once)


class Pooled(nn.Module):
    """A pooling, a block that reads its result, and perhaps a join that reads it too."""

    def __init__(self, channels: int, again: bool, given: bool) -> None:
        super().__init__()
        self.block = PreactBlock(channels, channels)
        self.pool = nn.MaxPool2d(2)
        self.again, self.given = again, given

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        low = self.pool(x)
        y = self.block(low)
        if self.again:
            y = y + low
        return (y, low) if self.given else (y,)


@pytest.mark.parametrize(
    ("channels", "again", "given", "fused"),
    [
        (32, False, False, True),
        (32, True, False, False),  # something else reads it
        (32, False, True, False),  # the caller wants it
        (24, False, False, False),  # the block has no kernel to fuse it into
    ],
)
def test_when_a_pooling_is_fused(
    channels: int, again: bool, given: bool, fused: bool, kernels: cuda.Kernels
) -> None:
    torch.manual_seed(0)
    model = randomise(Pooled(channels, again, given)).eval()
    plan, executor = executor_of(model, torch.bfloat16, "medium", kernels)
    assert (len(executor._launches) == len(plan.steps) - 1) == fused
    x = torch.randn(1, channels, 9, 8)
    assert_as_good_as_eager(model, torch.bfloat16, x, kernels)


@pytest.mark.parametrize("channels", [16, 12])
def test_a_join_without_a_kernel(channels: int, kernels: cuda.Kernels) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PreactBlock(32, 32)
            self.narrow = nn.Conv2d(32, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.narrow(self.block(x))
            return F.interpolate(F.max_pool2d(y, 2), scale_factor=2, mode="nearest") + y

    torch.manual_seed(0)
    model = randomise(Joined()).eval()
    plan, executor = executor_of(model, torch.bfloat16, "medium", kernels)
    path = "cuda bfloat16" if channels == 16 else "eager: its 12 channels are no multiple of 8"
    assert executor.path(plan.steps[-1]) == path
    assert_as_good_as_eager(model, torch.bfloat16, torch.randn(1, 32, 8, 8), kernels)


def test_packed_weights_are_the_executors_own(kernels: cuda.Kernels) -> None:
    """Of blocks with a kernel, convolutions, and blocks that run eagerly."""
    blocks = nn.Sequential(PreactBlock(16, 32), PreactBlock(32, 24), nn.Conv2d(24, 8, 1))
    model = randomise(blocks).eval().bfloat16()
    _, executor = executor_of(model, torch.bfloat16, "medium", kernels)
    x = torch.randn(1, 16, 6, 6).bfloat16()
    (before,) = executor.run([x]).values()
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            if tensor.is_floating_point():
                tensor.mul_(2)
    (after,) = executor.run([x]).values()
    assert torch.equal(before, after)


def test_a_block_without_a_kernel_runs_eagerly_among_the_others(kernels: cuda.Kernels) -> None:
    """8 middle channels are no multiple of 16; 16 are one."""
    model = randomise(nn.Sequential(PreactBlock(16, 32), PreactBlock(32, 24))).eval()
    plan, executor = executor_of(model, torch.bfloat16, "medium", kernels)
    assert [executor.path(step) for step in plan.steps] == [
        "cuda bfloat16",
        "eager: its channels (32, 12, 24) are not multiples of 16",
    ]
    assert_as_good_as_eager(model, torch.bfloat16, torch.randn(1, 16, 6, 6), kernels)


class Tokens(nn.Module):
    """An output that is no map, and one of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.map = PreactBlock(32, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(x)
        return y.flatten(2), self.map(y.mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_that_are_no_maps(layout: torch.memory_format, kernels: cuda.Kernels) -> None:
    model = randomise(Tokens()).eval().requires_grad_(False)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=layout)
    plan, executor = executor_of(model, torch.float32, "medium", kernels)
    values = executor.run([x])
    for number, expected in zip(output_values(plan.outputs), model(x), strict=True):
        torch.testing.assert_close(values[number], expected, rtol=0.05, atol=0.05)


def test_memory_is_given_back_on_the_way(kernels: cuda.Kernels) -> None:
    _, executor = executor_of(small_hourglass(), torch.bfloat16, "medium", kernels)
    alive, most = {0}, 0
    for launch in executor._launches:
        alive |= set(launch.work.gives)
        most = max(most, len(alive))
        alive -= set(launch.dead)
    assert alive == set(executor._outputs)
    assert most < len(executor._launches) / 2


def test_shapes_that_do_not_fit(kernels: cuda.Kernels) -> None:
    _, executor = executor_of(small_hourglass(), torch.bfloat16, "medium", kernels)
    with pytest.raises(ValueError, match="the shapes differ"):
        executor.run([image(1, 40, 40).bfloat16()])


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        (torch.float32, "highest", 'not the "highest" precision of a float32 model'),
        (torch.float32, "high", 'not the "high" precision of a float32 model'),
        (torch.float64, "highest", "its weights are torch.float64"),
    ],
)
def test_what_the_kernels_do_not_take(
    dtype: torch.dtype, precision: str, message: str, kernels: cuda.Kernels
) -> None:
    plan = recognise(small_hourglass())
    assert message in str(cuda.unsupported(plan, dtype, precision, kernels))


def test_a_network_without_a_single_kernel_is_left_alone(kernels: cuda.Kernels) -> None:
    plan = recognise(PreactBlock(16, 16).eval())
    reason = cuda.unsupported(plan, torch.bfloat16, "highest", kernels)
    assert reason == "its channels (16, 8, 16) are not multiples of 16"


def test_a_gpu_without_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """This build has none; on a machine with a CUDA torch the older GPU is what is missing."""

    class Properties:
        name, major = "Old", 7

    class Foreign(Properties):
        name, major = "New", 13

    class Built:
        CudaBottleneck = None

        @staticmethod
        def build_info() -> dict[str, str]:
            return {"cuda": "not built: torch is a CPU build", "cuda_archs": "9.0a"}

        @staticmethod
        def cuda_obstacle(device: torch.device) -> str:
            return "no kernel image"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr("hgfast._native.load", lambda: Built)
    assert cuda.kernels_of(CPU) == "Old is older than compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Foreign)
    assert cuda.kernels_of(CPU) == (
        "hgfast was built for 9.0a, which New does not run (no kernel image)"
    )
    del Built.CudaBottleneck
    assert cuda.kernels_of(CPU) == (
        "hgfast was installed without CUDA kernels (not built: torch is a CPU build)"
    )


def test_a_plan_without_weights_is_left_alone() -> None:
    class Join(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0) + x

    with pytest.warns(hgfast.HgfastWarning, match="replaced nothing"):
        fast = hgfast.optimize(Join())
    assert hgfast.report(fast).replaced == []


def test_a_gpu_is_asked_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weight:
        device, dtype = torch.device("cuda", 1), torch.bfloat16

    plan = recognise(small_hourglass())
    monkeypatch.setattr(cuda, "kernels_of", lambda device: f"nothing for {device}")
    weights: Any = dict.fromkeys(plan.weights, Weight)
    assert choice.choose(plan, weights, "highest") == "nothing for cuda:1"


def test_weights_on_several_devices_are_left_alone() -> None:
    plan = recognise(small_hourglass())
    weights = {name: tensors_of(small_hourglass())[name] for name in plan.weights}
    first = next(iter(weights))
    mixed = {**weights, first: weights[first].to("meta")}
    assert choice.choose(plan, mixed, "highest") == "its weights are on cpu and meta"
    moved = {name: tensor.to("meta") for name, tensor in weights.items()}
    assert choice.choose(plan, moved, "highest") == (
        "its weights are on meta; there are kernels for cpu and cuda"
    )


# ---- whole models ----


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.usefixtures("on_emulated_gpu")
def test_optimize_and_verify(dtype: torch.dtype) -> None:
    model = small_hourglass(stacks=2).to(dtype)
    fast = hgfast.optimize(model, precision="medium")
    rows = hgfast.report(fast).replaced
    element = "bfloat16" if dtype == torch.float32 else str(dtype)[6:]
    assert {row.backend for row in rows} == {f"cuda {element}", f"cuDNN {element}"}
    for row in rows:
        in_cudnn = row.kind.startswith(("conv", "norm-", "remerge"))
        assert row.backend.startswith("cuDNN") == in_cudnn
    result = hgfast.verify(model, fast, image().to(dtype))
    assert result.ok, str(result)
    assert [tuple(y.shape) for y in fast(image().to(dtype))] == [
        tuple(y.shape) for y in model(image().to(dtype))
    ]


@pytest.mark.usefixtures("on_emulated_gpu")
def test_optimize_and_decode() -> None:
    model = small_hourglass(stacks=2)
    fast = hgfast.optimize(model, precision="medium", decode="quarter")
    (region,) = regions_of(fast)
    with torch.inference_mode():
        heatmaps, (coords, scores) = region.both(image())
    assert heatmaps.dtype == torch.bfloat16  # as the kernels leave them, whatever the model's dtype
    assert heatmaps.is_contiguous(memory_format=torch.channels_last)
    expected_coords, expected_scores = hgfast.decode(heatmaps)
    assert torch.equal(coords, expected_coords)
    assert torch.equal(scores, expected_scores)
    assert hgfast.verify(model, fast, image()).ok


@pytest.mark.usefixtures("on_emulated_gpu")
def test_a_float32_model_at_full_precision_stays_eager() -> None:
    model = small_hourglass()
    with pytest.warns(hgfast.HgfastWarning, match="replaced nothing.*compute in bfloat16"):
        fast = hgfast.optimize(model, precision="highest")
    assert torch.equal(fast(image())[0], model(image())[0])


@pytest.mark.usefixtures("on_emulated_gpu")
def test_changed_weights_are_packed_anew() -> None:
    model = small_hourglass().bfloat16()
    fast = hgfast.optimize(model)
    x = image().bfloat16()
    before = fast(x)[0]
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.25)
    changed = copy.deepcopy(fast)
    with torch.inference_mode():
        after = fast(x)[0]
        assert not torch.equal(after, before)
        assert hgfast.verify(hgfast.restore(changed), fast, x).ok


@pytest.mark.usefixtures("on_emulated_gpu")
def test_weights_changed_before_a_capture_mean_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing inside a capture would become a part of the graph."""
    model = small_hourglass().bfloat16()
    fast = hgfast.optimize(model)
    monkeypatch.setattr("hgfast.region.is_capturing", lambda: True)
    with torch.inference_mode():
        fast(image().bfloat16())  # nothing changed: the fast path
        next(fast.parameters()).mul_(2)
        with pytest.warns(
            hgfast.HgfastWarning, match="a CUDA graph is captured and its weights were not packed"
        ):
            y = fast(image().bfloat16())[0]
        assert torch.equal(y, hgfast.restore(fast)(image().bfloat16())[0])


@pytest.mark.usefixtures("on_emulated_gpu")
def test_a_copy_is_not_packed_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = copy.deepcopy(hgfast.optimize(small_hourglass().bfloat16()))
    monkeypatch.setattr("hgfast.region.is_capturing", lambda: True)
    with torch.inference_mode(), pytest.warns(hgfast.HgfastWarning, match="were not packed"):
        fast(image().bfloat16())
    assert all(region._state is None for region in regions_of(fast))


@pytest.mark.parametrize("then", ["changed", "restored", "optimised anew"])
@pytest.mark.usefixtures("on_emulated_gpu")
def test_captured_weights_live_as_long_as_the_model(
    monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """A graph replays with the weights of its capture, whatever was packed since."""
    fast = hgfast.optimize(small_hourglass().bfloat16())
    (region,) = regions_of(fast)
    x = image().bfloat16()
    with torch.inference_mode():
        with monkeypatch.context() as patch:
            patch.setattr("hgfast.region.is_capturing", lambda: True)
            fast(x)
            fast(x)
        captured = weakref.ref(region._state.executor)
        if then == "changed":
            next(fast.parameters()).mul_(2)
            fast(x)
            changed = region._state.executor is not captured()  # in an assert, pytest keeps it
            assert changed
    if then == "restored":
        hgfast.restore(fast)
    elif then == "optimised anew":
        hgfast.optimize(fast, precision="medium", inplace=True)
    del region
    gc.collect()
    assert captured() is not None
    del fast
    gc.collect()
    assert captured() is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("on_emulated_gpu")
def test_outputs_have_the_layout_of_the_input(layout: torch.memory_format) -> None:
    fast = hgfast.optimize(small_hourglass().bfloat16())
    with torch.inference_mode():
        y = fast(image(2).bfloat16().to(memory_format=layout))[0]
    assert y.is_contiguous(memory_format=layout)
