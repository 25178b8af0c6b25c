"""Tests that need a CUDA device. `make gpu` runs them; `make test` skips them without one."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
for folder in (_TESTS, _TESTS / "real"):  # op_checks, networks; elg
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
