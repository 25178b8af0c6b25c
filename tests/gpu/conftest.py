"""Tests that need a CUDA device. `make gpu` runs them; `make test` skips them without one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parents[1]
for folder in (_TESTS, _TESTS / "real"):  # op_checks, networks; elg
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@pytest.fixture(autouse=True)
def _the_rehearsed_device() -> Iterator[None]:
    """The emulated kernels are told of the device that gpu_checks speaks of."""
    import gpu_checks

    if not gpu_checks.REHEARSAL or gpu_checks.kernels is None:
        yield
        return
    gpu_checks.kernels.set_device(gpu_checks.multiprocessors(), gpu_checks.shared_limit())
    yield
    gpu_checks.kernels.set_device()
