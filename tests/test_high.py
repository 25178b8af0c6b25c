"""Precision "high" where it has products of its own: bf16x3, on AMX or on its model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from op_checks import native, needs_native

pytestmark = needs_native

# Each in a process of its own, in which that instruction set is chosen.
SETS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not runnable, reason=f"this CPU cannot run {name}"),
    )
    for name, runnable in (native.isa_list() if native else [])
    if name.startswith("amx")
]


@pytest.mark.parametrize("what", ["ops", "network", "field"])
@pytest.mark.parametrize("isa", SETS)
def test_bf16x3(isa: str, what: str) -> None:
    script = Path(__file__).parent / "high_check.py"
    result = subprocess.run(
        [sys.executable, script, isa, what],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{isa}: ok" in result.stdout
