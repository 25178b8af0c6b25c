"""`python -m hgfast info`: what there is on this machine and what hgfast makes of it."""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy
import torch

from hgfast import _native
from hgfast._version import __version__
from hgfast.runtime import evidence

# What Linux calls the features that a kernel may use, most telling last.
_CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip


_USED = "kernel set used"


def collect() -> dict[str, dict[str, str]]:
    """Everything that `python -m hgfast info` prints: section -> name -> value, in print order."""
    return {
        "versions": _versions(),
        "CPU": _cpu(),
        "GPU": _gpu(),
        "GPU features": _features(),
        "compiled module": _compiled(),
    }


def print_info() -> None:
    """Print `collect()`: a table on a terminal, `name: value` lines into a pipe or a file."""
    sections = collect()
    if not sys.stdout.isatty():
        for section, rows in sections.items():
            print(f"[{section}]")
            for name, value in rows.items():
                print(f"{name}: {value}")
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"hgfast {__version__}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for section, rows in sections.items():
        table.add_section()
        for name, value in rows.items():
            alarming = section == "compiled module" and name == "state" and _native.reason
            table.add_row(name, Text(value, style="yellow" if alarming else ""))
    Console().print(table)


def _versions() -> dict[str, str]:
    return {
        "hgfast": __version__,
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none (a CPU build)",
        "triton": _triton(),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not found: on a GPU heatmaps are decoded by plain PyTorch"


def _cpu() -> dict[str, str]:
    fields = _cpuinfo()
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    found = " ".join(feature for feature in _CPU_FEATURES if feature in present)
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "instruction sets found": found or torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} used by torch, {os.cpu_count()} cores",
        **_kernels(),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor of Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _kernels() -> dict[str, str]:
    module = _native.load()
    if module is None:
        return {_USED: "none: plain PyTorch"}
    forced = os.environ.get("HGFAST_CPU_ISA")
    try:
        plan = module.CpuPlan("float32", high=True)
    except Exception as error:  # HGFAST_CPU_ISA names a set that cannot run here
        return {_USED: f"none: {str(error).splitlines()[0]}"}
    used = f"{plan.path} (HGFAST_CPU_ISA={forced})" if forced else plan.path
    return {_USED: used, 'products at "high"': plan.products}


def _gpu() -> dict[str, str]:
    rows = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows[f"GPU {index}"] = f"{device.name}, compute {device.major}.{device.minor}, {memory}"
    return {**(rows or {"GPU": "none that torch can use"}), "nvcc": _nvcc()}


def _features() -> dict[str, str]:
    """What is taken on a GPU without being asked for, and by what evidence."""
    try:
        asked = evidence.asked_for()
    except ValueError as error:
        return {evidence.UNPROVEN: str(error)}
    rows = {}
    for name, feature in evidence.FEATURES.items():
        state = "on" if feature.evidence or name in asked else "off"
        if feature.evidence:
            why = f"measured, benchmarks/results/{feature.evidence}"
        elif name in asked:
            why = f"not yet run on a GPU; {evidence.UNPROVEN} names it"
        else:
            why = f"not yet run on a GPU ({evidence.UNPROVEN}={name} switches it on)"
        rows[name] = f"{state}; {feature.what}; {why}"
    return rows


def _nvcc() -> str:
    folders = [
        f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    path = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if path is None:
        return "not found"
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run ({error})"
    version = re.search(r"release ([\d.]+)", text)
    return f"{version.group(1) if version else 'unknown version'} ({path})"


def _compiled() -> dict[str, str]:
    module = _native.load()
    if module is None:
        return {"state": str(_native.reason)}
    build: dict[str, str] = module.build_info()
    kernels = [
        name if runnable else f"{name} (not for this CPU)" for name, runnable in module.isa_list()
    ]
    device = build["cuda"] or "none in this version"
    if build["cuda_archs"]:
        device += f"; nvcc {build['nvcc']}, architectures {build['cuda_archs']}"
    optimised = "" if build["build_type"] == "Release" else f", {build['build_type']} build"
    return {
        "state": f"loaded ({module.__file__})",
        "built with": f"{build['compiler']}, for torch {build['torch']}{optimised}",
        "CPU kernels": ", ".join(kernels),
        "GPU kernels": device,
    }
