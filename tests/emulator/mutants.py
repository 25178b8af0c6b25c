"""Changed copies of the CUDA kernels, compiled for the emulator and run in a process of their own.

For tests that take a barrier out of a real kernel and expect a report. No torch takes part, so that
a copy compiles in seconds and runs at once::

    driver = '''
        #include "cuda/kernels.h"
        extern "C" const char* run(void** arrays) {
          ...
          return cudaGetErrorString(hgfast::cuda::upsample_add(params, nullptr));
        }'''
    source = (CUDA / "upsample_add.cu").read_text()
    library = build({"upsample_add.cu": source.replace("sync_block();", "")}, driver, tmp_path)
    report, arrays = run(library, [skip, low, y])
"""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "csrc" / "emulator"
FLAGS = ["-std=c++17", "-fPIC", "-DHGFAST_EMULATE", "-w"]

# Calls run(arrays) of the library argv[1] on the arrays in the file argv[2], and puts them back.
RUNNER = """
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.run.restype = ctypes.c_char_p
with np.load(sys.argv[2]) as file:
    arrays = [np.ascontiguousarray(file[name]) for name in file.files]
pointers = (ctypes.c_void_p * max(len(arrays), 1))(*(a.ctypes.data for a in arrays))
report = library.run(pointers)
np.savez(sys.argv[2], *arrays)
print((report or b"").decode())
"""


def compiler() -> str:
    return os.environ.get("CXX") or "g++"


def build(
    overrides: dict[str, str],
    driver: str,
    directory: Path,
    *,
    only: list[str] | None = None,
    cache: Path | None = None,
    optimise: str = "-O1",
    flags: tuple[str, ...] = (),
) -> Path:
    """Compile the kernels, some of them changed, with a driver.

    Args:
        overrides: New text for files of csrc/cuda, by their names there; also new files.
        driver: C++ that includes "cuda/kernels.h" and defines
            ``extern "C" const char* run(void** arrays)``: the report, "no error", or nothing.
        directory: An empty folder for the copy and the library.
        only: The .cu files that the driver needs; by default all.
        cache: Where objects are kept to be used again, by all that they are made from; by default
            next to `directory`. Build the unchanged kernels first, and every mutant compiles the
            files that its change concerns, and no others.
        optimise: For the kernels; the emulator itself is always compiled with -O2.
        flags: More flags of the compiler, for all files.

    Returns:
        The path of the library.
    """
    cache = cache or directory.parent / "objects"
    cache.mkdir(parents=True, exist_ok=True)
    cuda = directory / "csrc" / "cuda"
    shutil.copytree(CUDA, cuda)
    for name, text in overrides.items():
        (cuda / name).write_text(text)
    (directory / "csrc" / "emulator").symlink_to(EMULATOR)
    (directory / "csrc" / "driver.cpp").write_text(driver)

    kernels = sorted(cuda.glob("*.cu")) if only is None else [cuda / name for name in only]
    core = [path for path in sorted(EMULATOR.glob("*.cpp")) if path.name != "module.cpp"]
    headers = sorted(
        path for folder in (cuda, EMULATOR) for path in folder.rglob("*") if path.suffix != ".cu"
    )
    # The core sees device.cuh alone of the kernels' headers.
    seen_by_core = [path for path in headers if path.parent != cuda or path.name == "device.cuh"]
    include = ["-I", str(directory / "csrc"), "-I", str(EMULATOR / "include")]
    include += [f"-fmacro-prefix-map={directory}/=", f"-fmacro-prefix-map={ROOT}/="]

    def compiled(source: Path, level: str, seen: list[Path]) -> Path:
        digest = hashlib.sha256(" ".join([compiler(), level, *flags, source.name]).encode())
        for path in [source, *seen]:
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        target = cache / f"{source.stem}-{digest.hexdigest()[:24]}.o"
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}-{directory.name}.o")
            command = [compiler(), *FLAGS, level, *flags, *include, "-x", "c++", "-c", str(source)]
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.replace(target)
        return target

    jobs = [(source, "-O2", seen_by_core) for source in core]
    jobs += [(source, optimise, headers) for source in kernels]
    jobs += [(directory / "csrc" / "driver.cpp", optimise, headers)]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    library = directory / "mutant.so"
    link = [compiler(), "-shared", "-pthread", "-Wl,--no-undefined,-Bsymbolic", *map(str, objects)]
    subprocess.run([*link, "-o", str(library)], check=True)
    return library


def run(
    library: Path, arrays: list[np.ndarray], timeout: float = 600
) -> tuple[str, list[np.ndarray]]:
    """Call the library's run() on copies of arrays, in a process of its own.

    Returns:
        What it returned ("" for "no error" or nothing), and the arrays as it left them.
    """
    file = library.with_suffix(".npz")
    np.savez(file, *arrays)
    command = [sys.executable, "-c", RUNNER, str(library), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr}")
    report = done.stdout.rstrip("\n")
    with np.load(file) as stored:
        after = [stored[name] for name in stored.files]
    return ("" if report == "no error" else report), after
