"""What can be known of the CUDA kernels without a GPU: their resources and their instructions.

    python tests/cuda_gates.py    # make resources: writes csrc/cuda/resources.json anew

Every csrc/cuda/*.cu is compiled to machine code for each architecture, with the flags that
CMakeLists.txt and cmake/cuda.cmake give it. What ptxas and the disassembler say is kept in
build/gates under a hash of all that went into it, so that nothing is compiled twice.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "gates"
TABLE = SOURCES / "resources.json"

#: Compute capabilities. 86, 89 and 120 are the cards with 99 KiB of shared memory for a block.
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
#: Bytes of shared memory that a block may have, at the least and at the most.
LEAST_SHARED, MOST_SHARED = 99 * 1024, 227 * 1024
REGISTERS = 65536  # of a multiprocessor: a block that asks for more cannot be launched


@dataclass
class Kernel:
    """One instance of a kernel on one architecture."""

    name: str  #: demangled, without hgfast's namespaces and the arguments
    registers: int
    threads: int  #: the bound it was compiled for; 0: none was given
    stack: int  #: bytes for each thread
    spilled: int  #: bytes stored to and loaded from the stack because registers ran out
    shared: int  #: bytes, static; dynamic shared memory is the launcher's affair
    instructions: dict[str, int] = field(default_factory=dict)  #: SASS opcode -> how often

    @property
    def family(self) -> str:
        """The kernel without its template arguments."""
        return self.name.partition("<")[0]

    def count(self, opcode: str) -> int:
        """Instructions of this opcode with at least these modifiers, as in ``LDG.E.128``."""
        first, *modifiers = opcode.split(".")
        return sum(
            number
            for found, number in self.instructions.items()
            if found.split(".")[0] == first and set(modifiers) <= set(found.split("."))
        )


@dataclass
class Compiled:
    """One source file on one architecture."""

    source: str
    architecture: str
    kernels: list[Kernel]
    complaints: list[str]  #: what nvcc and ptxas said besides the resources


# ---- Tools ---------------------------------------------------------------------------------------


@functools.cache
def nvcc() -> str | None:
    """The compiler, looked for where cmake/cuda.cmake looks; None where there is none."""
    home = [
        f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    named = os.environ.get("CUDACXX")
    places = os.pathsep.join([*home, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which(named or "nvcc", path=places)


@functools.cache
def nvcc_version() -> str:
    """Such as ``13.0.88``. Other versions give a kernel other registers."""
    said = run([nvcc() or "nvcc", "--version"]).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    if found is None:
        raise RuntimeError(f"no version in what nvcc says: {said}")
    return found.group(1)


@functools.cache
def disassembler() -> Path | None:
    """The folder of cuobjdump and nvdisasm: of the PyPI packages, or of a CUDA toolkit."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    beside = Path(nvcc() or "/nowhere").resolve().parent
    on_path = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    for folder in (*packages.glob("cu*/bin"), *on_path, beside, Path("/usr/local/cuda/bin")):
        if all(os.access(folder / tool, os.X_OK) for tool in ("cuobjdump", "nvdisasm")):
            return folder
    return None


def missing() -> str | None:
    """Why the kernels cannot be examined here; None where they can."""
    if nvcc() is None:
        return "needs nvcc (CUDA 13): it is not on PATH"
    if disassembler() is None:
        return (
            "needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return None


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a tool; its output is part of the error where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{shlex.join(command)} failed ({done.returncode}):\n{said}")
    return done


# ---- Compiling -----------------------------------------------------------------------------------


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def architectures(source: str) -> tuple[str, ...]:
    """Those that a file of csrc/cuda is compiled for: ``hopper_*.cu`` for Hopper alone."""
    return ("90a",) if source.startswith("hopper_") else ARCHITECTURES


def pairs() -> list[tuple[str, str]]:
    """Every (file name, architecture)."""
    return [
        (source.name, architecture)
        for source in sources()
        for architecture in architectures(source.name)
    ]


@functools.cache
def flags() -> tuple[str, ...]:
    """What the build compiles device code with, but for architectures and file names.

    Asked of CMake itself: a configuration of its own, whose compile commands ninja lists.
    """
    inputs = [ROOT / "CMakeLists.txt", *sorted((ROOT / "cmake").glob("*.cmake"))]
    key = digest([*(file.read_bytes() for file in inputs), nvcc_version().encode()])
    kept = CACHE / f"flags-{key}.json"
    if not kept.is_file():
        scripts = sysconfig.get_path("scripts")
        path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if cmake is None or ninja is None:
            raise RuntimeError("cmake and ninja are missing: pip install cmake ninja")
        folder = CACHE / "configured"
        settings = {
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": ninja,
            "HGFAST_OUTPUT_DIR": str(folder),
        }
        environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0", "CUDACXX": nvcc() or ""}
        for name in ("USE_CUDA", "FORCE_CUDA", "DEBUG"):
            environment.pop(name, None)
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        run(
            [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *definitions],
            env=environment,
        )
        listed = json.loads(run([ninja, "-C", str(folder), "-t", "compdb"]).stdout)
        commands = [entry["command"] for entry in listed if entry["file"].endswith(".cu")]
        found = {flags_of(command) for command in commands if command}
        if len(found) != 1:
            raise RuntimeError(f"expected one set of flags for csrc/cuda/*.cu, found {found}")
        kept.write_text(json.dumps(found.pop()))
    return tuple(json.loads(kept.read_text()))


def flags_of(command: str) -> tuple[str, ...]:
    """A compile command without the compiler, the architectures, the inputs and the outputs."""
    words = shlex.split(command)[1:]
    kept = []
    while words:
        word = words.pop(0)
        if word in ("-o", "-c", "-x", "-MT", "-MF", "-t"):
            words.pop(0)
        elif word != "-MD" and not word.startswith(("--generate-code", "-gencode", "-arch")):
            kept.append(word)
    return tuple(kept)


def examine(source: Path, architecture: str, options: Iterable[str], cubin: Path) -> Compiled:
    """Compile one file for one architecture and read what came out."""
    said = run(
        [
            nvcc() or "nvcc",
            *options,
            f"--generate-code=arch=compute_{architecture},code=sm_{architecture}",
            "-Xptxas=-v",
            "-cubin",
            str(source),
            "-o",
            str(cubin),
        ]
    )
    kernels, complaints = read_ptxas(said.stdout + said.stderr)
    names = demangled(kernels)
    folder = disassembler()
    assert folder is not None
    tools = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    elf = run([str(folder / "cuobjdump"), "-elf", str(cubin)], env=tools).stdout
    sass = run([str(folder / "cuobjdump"), "-sass", str(cubin)], env=tools).stdout
    threads, instructions = read_bounds(elf), read_sass(sass)
    for mangled, kernel in kernels.items():
        kernel.name = names[mangled]
        kernel.threads = threads.get(mangled, 0)
        kernel.instructions = instructions.get(mangled, {})
    ordered = sorted(kernels.values(), key=lambda kernel: kernel.name)
    return Compiled(source.name, architecture, ordered, complaints)


def examine_all() -> dict[tuple[str, str], Compiled]:
    """Every file on every architecture: (file name, architecture) -> what is known."""
    CACHE.mkdir(parents=True, exist_ok=True)
    options = flags()
    jobs = pairs()
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda job: _examine_once(SOURCES / job[0], job[1], options), jobs)
        return dict(zip(jobs, results, strict=True))


def _examine_once(source: Path, architecture: str, options: tuple[str, ...]) -> Compiled:
    headers = [*sorted(SOURCES.glob("*.cuh")), *sorted(SOURCES.glob("*.h"))]
    said = [nvcc_version(), *options, architecture]
    inputs = [source, *headers, Path(__file__)]
    key = digest([*(word.encode() for word in said), *(file.read_bytes() for file in inputs)])
    stem = f"{source.stem}-{architecture}"
    kept = CACHE / f"{stem}-{key}.json"
    if not kept.is_file():
        for old in CACHE.glob(f"{stem}-*"):
            old.unlink(missing_ok=True)
        result = examine(source, architecture, options, CACHE / f"{stem}-{key}.cubin")
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(result)))
        part.replace(kept)  # whole or not there, also for another process
    stored = json.loads(kept.read_text())
    stored["kernels"] = [Kernel(**kernel) for kernel in stored["kernels"]]
    return Compiled(**stored)


def digest(parts: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:16]


# ---- Reading what the tools say ------------------------------------------------------------------


def read_ptxas(said: str) -> tuple[dict[str, Kernel], list[str]]:
    """The kernels by mangled name, and every line that is no account of resources."""
    kernels: dict[str, Kernel] = {}
    complaints = []
    for line in said.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = kernels[entry.group(1)] = Kernel(entry.group(1), 0, 0, 0, 0, 0)
        elif frame := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, stores, loads = map(int, frame.groups())
            kernel.stack, kernel.spilled = stack, stores + loads
        elif used := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(used.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared.group(1)) if shared else 0
        elif line.strip() and not re.match(
            r"ptxas info\s*: (\d+ bytes gmem|Function properties for|Compile time =)", line
        ):
            complaints.append(line.strip())
    return kernels, complaints


def read_bounds(elf: str) -> dict[str, int]:
    """Mangled name -> threads of its ``__launch_bounds__``."""
    bounds = {}
    name = ""
    lines = iter(elf.splitlines())
    for line in lines:
        if section := re.match(r"\.nv\.info\.(\w+)$", line.strip()):
            name = section.group(1)
        elif "EIATTR_MAX_THREADS" in line:
            next(lines)  # the format
            sizes = [int(size, 16) for size in re.findall(r"0x[0-9a-f]+", next(lines))]
            bounds[name] = sizes[0] * sizes[1] * sizes[2]
    return bounds


def read_sass(sass: str) -> dict[str, dict[str, int]]:
    """Mangled name -> opcode with modifiers -> how often it occurs."""
    counts: dict[str, dict[str, int]] = {}
    for line in sass.splitlines():
        if function := re.match(r"\s*Function : (\w+)", line):
            current = counts[function.group(1)] = {}
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcode = instruction.group(1)
            current[opcode] = current.get(opcode, 0) + 1
    return counts


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled name -> ``kernel<arguments>``."""
    listed = list(names)
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    if filt is None:
        raise RuntimeError("c++filt is missing: it comes with a C++ compiler's binutils")
    plain = run([filt], input="\n".join(listed)).stdout.splitlines()
    return {name: readable(text) for name, text in zip(listed, plain, strict=True)}


def readable(name: str) -> str:
    """``void hgfast::cuda::(anonymous namespace)::k<T, (E)1>(P)`` -> ``k<T, E(1)>``."""
    name = re.sub(r"\b_GLOBAL__N__\w+::", "", name.replace("(anonymous namespace)::", ""))
    name = re.sub(r"\bhgfast::(cuda::)?", "", name).removeprefix("void ")
    name = re.sub(r"> (?=>)", ">", name)  # as C++17 writes it
    name = re.sub(r"\((\w+)\)(\d+)", r"\1(\2)", name)
    depth = 0
    for i, letter in enumerate(name):  # up to the arguments' parenthesis
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


# ---- The table -----------------------------------------------------------------------------------


@functools.cache
def variants() -> dict[str, dict[str, int]] | None:
    """Kernel -> threads and dynamic shared bytes of a block, as the launcher would ask for them.

    Told by the host part of the kernels, in the emulator's module or a build with CUDA; None where
    neither is built.
    """
    for name in ("hgfast_emulator", "hgfast._C"):
        try:
            import torch  # noqa: F401  whose libraries the modules need

            module = importlib.import_module(name)
        except ImportError:
            continue
        tellers = [getattr(module, name) for name in dir(module) if name.endswith("_variants")]
        if tellers:
            return {row["name"]: row for told in tellers for row in told()}
    return None


def variant_of(kernel: str) -> str | None:
    """The launcher's name of a kernel; None for a kernel that has no dynamic shared memory.

    ``bottleneck_kernel<BottleneckConfig<BFloat16, 64, false, 8, 16, 4, 2>>`` is
    ``bottleneck<bfloat16, any, 8x16>``; of a stem's kernel the number is that of channels, of a
    head's they are the chunk and the pixels of a tile, of one over clusters a block's middle
    channels.
    """
    if found := re.fullmatch(r"stem_kernel<StemConfig<(\w+), (\d+)>>", kernel):
        return f"stem<{found.group(1).lower()}, {8 * int(found.group(2))}>"
    if found := re.fullmatch(r"head_kernel<HeadConfig<(\w+), (\d+), (\d+), .*>>", kernel):
        return f"head<{found.group(1).lower()}, {found.group(2)}, {found.group(3)}>"
    if found := re.fullmatch(r"latency_kernel<LatencyConfig<(\w+), (\d+)>>", kernel):
        return f"latency<{found.group(1).lower()}, {16 * int(found.group(2))}>"
    if found := re.fullmatch(r"subtree_kernel<LatencyConfig<(\w+), 1>>", kernel):
        return f"subtree<{found.group(1).lower()}>"
    if found := re.fullmatch(r"hopper_bottleneck_kernel<(\w+)>", kernel):
        return f"hopper_bottleneck<{found.group(1).lower()}>"
    found = re.fullmatch(
        r"bottleneck_kernel<BottleneckConfig<(\w+), (\d+), (true|false), (\d+), (\d+), .*>>", kernel
    )
    if found is None:
        return None
    element, chunk, single, height, width = found.groups()
    label = chunk if single == "true" else "any"
    return f"bottleneck<{element.lower()}, {label}, {height}x{width}>"


def table(compiled: Iterable[Compiled]) -> dict[str, Any]:
    """What is committed: of each kernel the threads and bytes of shared memory of a block, and its
    registers by architecture."""
    kernels: dict[str, dict[str, Any]] = {}
    for result in compiled:
        for kernel in result.kernels:
            row = kernels.setdefault(
                kernel.name,
                {"threads": kernel.threads, "shared": _shared(kernel), "registers": {}},
            )
            row["registers"][f"sm_{result.architecture}"] = kernel.registers
    return {"nvcc": nvcc_version(), "kernels": dict(sorted(kernels.items()))}


def _shared(kernel: Kernel) -> int | None:
    """Bytes of a block, static and dynamic; None where nobody can tell."""
    name = variant_of(kernel.name)
    if name is None:
        return kernel.shared
    known = variants()
    return kernel.shared + known[name]["shared_bytes"] if known else None


def written(content: dict[str, Any]) -> str:
    """JSON with a line for each kernel, so that a change reads as one in a diff."""
    rows = (
        f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in content["kernels"].items()
    )
    lines = ",\n".join(rows)
    return f'{{\n  "nvcc": {json.dumps(content["nvcc"])},\n  "kernels": {{\n{lines}\n  }}\n}}\n'


def main() -> None:
    sys.path.insert(0, str(ROOT))  # hgfast
    if reason := missing() or (not variants() and "needs the emulator's module: make build"):
        sys.exit(reason)
    TABLE.write_text(written(table(examine_all().values())))
    print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
