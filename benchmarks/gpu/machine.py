"""What the machine is: asked of its own tools, in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu.journal import ROOT

# In another process, so that this one holds no part of the GPU.
_ASK_TORCH = """
import json, importlib.metadata, torch
from importlib.util import find_spec
facts = {"torch": torch.__version__, "torch's CUDA": torch.version.cuda}
facts["triton"] = importlib.metadata.version("triton") if find_spec("triton") else None
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    facts["cuDNN"] = torch.backends.cudnn.version()
    facts["GPU"] = p.name
    facts["uuid"] = str(getattr(p, "uuid", "")) or None
    facts["capability"] = [p.major, p.minor]
    facts["multiprocessors"] = p.multi_processor_count
    facts["memory, bytes"] = p.total_memory
    facts["L2, bytes"] = getattr(p, "L2_cache_size", None)
print(json.dumps(facts))
"""

SMI_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "temperature.gpu", "power.draw", "power.limit", "memory.total", "utilization.gpu",
)  # fmt: skip
SAMPLE_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def said(*command: str, limit: float = 60) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    path = shutil.which(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *command[1:]], capture_output=True, text=True, timeout=limit, cwd=ROOT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def smi(fields: tuple[str, ...], uuid: str | None) -> dict[str, str] | None:
    """What nvidia-smi says of the GPU with torch's ``uuid``: it counts GPUs in another order than
    CUDA does, and knows nothing of CUDA_VISIBLE_DEVICES. None where it is not plain which one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if uuid:
        command += ["-i", f"GPU-{uuid.removeprefix('GPU-')}"]
    lines = (said(*command) or "").splitlines()
    if len(lines) != 1:
        return None
    return dict(zip(fields, (word.strip() for word in lines[0].split(",")), strict=False))


def ask_torch() -> dict[str, Any]:
    """Versions and the GPU, as torch sees them.

    Raises:
        RuntimeError: there is no torch that works.
    """
    done = subprocess.run(
        [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=180
    )
    if done.returncode != 0:
        raise RuntimeError(f"{sys.executable} has no torch that works: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def facts(torch_facts: dict[str, Any]) -> dict[str, Any]:
    """Everything a reader of a number may want to know."""
    nvcc = said("nvcc", "--version") or said("/usr/local/cuda/bin/nvcc", "--version")
    cpu = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line for line in lines if line.startswith("model name")).split(":")[1]
    except (OSError, StopIteration):
        pass
    return {
        **{name: fact for name, fact in torch_facts.items() if name != "uuid"},
        "nvidia-smi": smi(SMI_FIELDS, torch_facts.get("uuid")),
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "CPU": cpu.strip(),
        "cores": os.cpu_count(),
        "commit": said("git", "describe", "--always", "--dirty"),
        "command": " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "tools": {
            tool: (said(tool, "--version") or "missing").splitlines()[0]
            for tool in ("cmake", "ninja", "compute-sanitizer", "ncu", "cuobjdump")
        },
    }


def architecture(torch_facts: dict[str, Any]) -> str:
    """What TORCH_CUDA_ARCH_LIST should be for this GPU alone: "9.0a", "8.6"."""
    major, minor = torch_facts["capability"]
    return f"{major}.{minor}" + ("a" if major >= 9 else "")
