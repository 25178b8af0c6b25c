"""What the machine can multiply at best, measured: the ceilings that the rates are shares of."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-pthread")

Limits = dict[str, list[float]]  # GFLOP/s of each window, by kind of instruction


def build(folder: Path) -> Path:
    """Compile peak.cpp for this machine.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    program = folder / "peak"
    command = ["c++", *FLAGS, str(SOURCE), "-o", str(program)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise RuntimeError(f"peak.cpp does not compile: {said}") from error
    return program


def measure(program: Path, threads: int, seconds: float = 0.3) -> Limits:
    """GFLOP/s that ``threads`` threads reach together; ``seconds`` for each kind of instruction.

    Always "float32" (fused multiply-adds as wide as the registers); "avx512_bf16" and "amx_bf16"
    where the machine has them.
    """
    command = [str(program), str(threads), str(seconds)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found: Limits = {}
    for line in text.splitlines():
        name, rate = line.split()
        found.setdefault(name, []).append(float(rate))
    return found


def highest(*measured: Limits) -> dict[str, float]:
    """The best window of each kind: what was seen to be possible, on a machine that drifts."""
    names = dict.fromkeys(name for limits in measured for name in limits)
    return {name: max(max(limits.get(name, [0])) for limits in measured) for name in names}
