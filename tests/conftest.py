"""Settings for all tests."""

import os

import pytest
from hypothesis import settings

from hgfast import _native

# A shared machine makes any single example slow now and then: no deadline. In CI the examples
# are the same in every run, so that a failure there is about the change.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(params=["compiled", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with hgfast's compiled kernels, where there are some, and in plain PyTorch."""
    if request.param == "reference":
        monkeypatch.setenv("HGFAST_DISABLE", "1")
    elif os.environ.get("HGFAST_DISABLE", "0") not in ("", "0"):
        pytest.skip("HGFAST_DISABLE is set")
    elif _native.load() is None:
        pytest.skip(f"hgfast's compiled module is not here: {_native.reason}")
    return str(request.param)
