"""Heatmaps to joints. Eager: max over the map, and the quarter offset by gathering neighbours.

make bench PYTEST_ARGS="-k decode --benchmark-json=decode.json"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_bench import each_candidate, each_dtype, measure, needs_native, random_map
from torch import Tensor

from hgfast import ops

pytestmark = needs_native


def eager_decode(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    height, width = heatmaps.shape[2:]
    flat = heatmaps.flatten(2)
    scores, index = flat.max(dim=2)
    x, y = index % width, index // width
    inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)

    def value(dx: int, dy: int) -> Tensor:
        near = (index + dx + dy * width).clamp(0, height * width - 1)
        return flat.gather(2, near[..., None])[..., 0]

    dx, dy = value(1, 0) - value(-1, 0), value(0, 1) - value(0, -1)
    moved = torch.stack([x + 0.25 * inside * dx.sign(), y + 0.25 * inside * dy.sign()], dim=2)
    visible = scores > 0
    return moved.float() * visible[..., None], scores.float()


@each_candidate
@pytest.mark.parametrize("batch", [1, 32])
@each_dtype
def test_decode(benchmark: Any, dtype: str, batch: int, candidate: str) -> None:
    heatmaps = random_map(candidate, dtype, batch, 16, 64, 64)

    def run() -> tuple[Tensor, Tensor]:
        return ops.decode(heatmaps) if candidate == "hgfast" else eager_decode(heatmaps)

    expected, ours = eager_decode(heatmaps), ops.decode(heatmaps)
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))
    measure(
        benchmark,
        f"decode {dtype} batch {batch}, 16 joints, 64x64",
        candidate,
        run,
        nbytes=heatmaps.numel() * heatmaps.element_size(),
    )
