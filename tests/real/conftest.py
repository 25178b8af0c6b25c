"""Material made by others that may lie beside the repository; tests skip where it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of ``../shared/data/<name>``; skips the test where there is no such file."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/{name} beside the repository, which is not there")
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def real_heatmaps() -> dict[str, np.ndarray]:
    """What trained public networks saw on photographs, with the ground truth."""
    return shared_arrays("real_heatmaps.npz")


@pytest.fixture(scope="session")
def mpii_predictions() -> dict[str, np.ndarray]:
    """What the authors of the hourglass published for MPII's validation set, and its truth."""
    return shared_arrays("mpii_valid_hg8.npz")


@pytest.fixture(scope="session")
def elg_weights() -> dict[str, np.ndarray]:
    """The weights of ELG, a trained hourglass for the landmarks of an eye."""
    return shared_arrays("elg_hourglass.npz")
