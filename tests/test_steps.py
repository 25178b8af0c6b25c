"""What a CpuPlan tells of the time of its steps, and the table that is made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import image, small_hourglass
from op_checks import bottleneck_weights, native, needs_native, random_map
from torch import nn

from benchmarks import steps
from benchmarks.peers.measure import images, network
from hgfast.recognition import recognise, tensors_of
from hgfast.runtime.cpu import CpuExecutor

pytestmark = needs_native


def executor_of(model: nn.Module) -> CpuExecutor:
    plan = recognise(model)
    return CpuExecutor(plan, {name: tensors_of(model)[name] for name in plan.weights}, "medium")


@pytest.mark.parametrize("threads", [1, 2])
def test_each_kernel_has_its_op_its_value_and_a_time(threads: int) -> None:
    plan: Any = native.CpuPlan("float32")
    plan.pool(7, 8, "max", (2, 2), (2, 2))
    plan.bottleneck(8, 5, **{"scale": None, "shift": None, **bottleneck_weights(8, 4, 8)})
    plan.finish([7], [5])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        rows = plan.profile([random_map(1, 8, 40, 40, dtype=torch.float32)])
    finally:
        torch.set_num_threads(before)
    # In NCHW, the image is copied in and the result out.
    assert [(op, value) for op, value, _ in rows] == [
        ("copy", -1),
        ("pool", 8),
        ("bottleneck", 5),
        ("copy", -1),
    ]
    assert all(0 < seconds < 10 for _, _, seconds in rows)


def test_the_pieces_of_a_batch_are_one_kernel_each() -> None:
    model = small_hourglass()
    executor = executor_of(model)
    one, eight = (executor.profile([image(batch, 256, 256)]) for batch in (1, 8))
    assert [row[:2] for row in eight] == [row[:2] for row in one]
    assert sum(row[2] for row in eight) > 2 * sum(row[2] for row in one)


def test_a_network_with_steps_of_pytorch_has_no_profile() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1)
    ).eval()
    with pytest.raises(ValueError, match="PyTorch runs a part of it"):
        executor_of(model).profile([image()])


def test_the_profile_is_of_a_run() -> None:
    model, x = small_hourglass(), image()
    executor = executor_of(model)
    with torch.inference_mode():
        rows = executor.profile([x])
        values = executor.run([x])
    assert rows[0][0] == "conv"
    assert {value for _, value, _ in rows} >= set(values)


def test_no_flops_are_lost_between_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = steps.measured(stacks=2, precision="medium", batch=1, size=64, calls=2)
    plan = recognise(network(2, 256))
    assert sum(row.flops for row in rows.values()) == plan.flops(images(1, 64).shape)
    assert rows["conv 7x7 3/64 at 32x32"].count == 1
    assert rows["head at 16x16"].count == 2
    assert rows["bottleneck 256/128/256 at 1x1"].count == 6
    threads = str(torch.get_num_threads())
    steps.main(["--stacks", "1", "--size", "64", "--calls", "1", "--threads", threads])
    out = capsys.readouterr().out
    assert out.startswith("HG-1, 64x64, batch 1, cpu ")
    assert "| bottleneck 64/64/128 at 32x32 | 1 |" in out
    assert out.splitlines()[-1].startswith("| all | |")
