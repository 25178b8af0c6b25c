"""What noticing changed weights costs before every call of an optimised model.

make bench PYTEST_ARGS="-k watch"
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import hgfast
from hgfast.models import hourglass
from hgfast.region import regions_of


@pytest.mark.parametrize("stacks", [2, 8])
def test_watch(benchmark: BenchmarkFixture, stacks: int) -> None:
    fast = hgfast.optimize(hourglass(stacks=stacks, features=32).eval())
    (region,) = regions_of(fast)
    with torch.inference_mode():
        benchmark(lambda: region.backend)  # holds the module against its snapshot
