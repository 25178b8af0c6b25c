"""What can be known of the compiled decoding kernels without a GPU: registers and instructions.

    PYTHONPATH=. python tests/triton_gates.py    # compiles, and prints what is known as JSON

Each is compiled for what a call would launch it with: the calls are real ones, of
``hgfast.decoding.cuda`` on CPU tensors, caught where they launch. Triton's own specialisation is
followed: integers of 1 are constants, multiples of 16 and aligned pointers are known as such. What
is found is kept in build/gates under a hash of all that went into it.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cuda_gates
import torch

from hgfast.decoding import cuda, reference

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "hgfast" / "decoding" / "kernels.py"
ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.float64: "*fp64",
}  # fmt: skip


def cases() -> dict[str, dict[str, Any]]:
    """Requests by name, as decode_checks has them."""
    maps = torch.zeros(2, 17, 64, 48)
    layouts = {
        "contiguous float32": maps,
        "contiguous bfloat16": maps.bfloat16(),
        "channels_last float32": maps.contiguous(memory_format=torch.channels_last),
        "channels_last bfloat16": maps.bfloat16().contiguous(memory_format=torch.channels_last),
        "channels_last float16": maps.half().contiguous(memory_format=torch.channels_last),
        "strided float32": torch.zeros(2, 17, 64, 96)[..., ::2],
        "large float32": torch.zeros(1, 2, 96, 80),
    }
    found: dict[str, dict[str, Any]] = {}

    def add(method: str, layout: str, full: bool = False, **more: Any) -> None:
        x = layouts[layout]
        name = f"{method}{' topk' if more else ''}, {layout}{', everything' if full else ''}"
        found[name] = {"maps": x, "method": method, **more}
        if full:
            found[name] |= {
                "flipped": x, "joints": list(range(x.shape[1])), "shift": True,
                "matrix": torch.zeros(x.shape[0], 2, 3, dtype=torch.float64),
                "origin_x": 24.0, "truncate": True,
            }  # fmt: skip

    for method in reference.METHODS:
        add(method, "contiguous float32")
        add(method, "channels_last bfloat16")
    for method in ("argmax", "dark", "megvii", "softargmax"):
        add(method, "contiguous float32", full=True)
        add(method, "channels_last bfloat16", full=True)
    for layout in ("channels_last float32", "strided float32", "large float32"):
        add("argmax", layout)
        add("dark", layout)
    add("argmax", "contiguous bfloat16")
    add("quarter", "channels_last float16")
    for method in ("quarter", "udp"):
        add(method, "contiguous float32", k=5, window=3)
        add(method, "channels_last bfloat16", full=True, k=5, window=5)
    return found


def selected(architecture: int) -> list[str]:
    """All on sm_90; elsewhere those that ask for most."""
    if architecture == 90:
        return list(cases())
    return [
        "argmax, contiguous float32",
        "argmax, channels_last bfloat16",
        "argmax, channels_last bfloat16, everything",
        "softargmax, contiguous float32, everything",
        "megvii, contiguous float32, everything",
        "dark, channels_last bfloat16, everything",
        "udp topk, channels_last bfloat16, everything",
    ]


class Caught(Exception):  # noqa: N818 - it is no error
    """A launch: the kernel's arguments by name, and the options."""


class Catcher:
    """In the place of a kernel: raises what it would be launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, num_warps: int, **options: Any) -> None:
            constants = {n: v for n, v in options.items() if n in self.kernel.arg_names}
            rest = {n: v for n, v in options.items() if n not in constants}
            raise Caught(self.kernel, args, constants, {"num_warps": num_warps, **rest})

        return launch


def compile_case(request: dict[str, Any], architecture: int) -> dict[str, Any]:
    """Compile what the request launches, and look at it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rest = {name: value for name, value in request.items() if name not in ("maps", "method")}
    call = cuda.decode_topk if "k" in request else cuda.decode
    try:
        call(request["maps"], request["method"], **rest)
    except Caught as caught:
        kernel, args, constants, options = caught.args
    signature = {}
    known: dict[tuple[int, ...], list[list[Any]]] = {}
    floats = {"fp64": ("origin_x", "origin_y"), "fp32": ("beta",)}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            known[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = next(kind for kind, names in floats.items() if name in names)
        elif value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                known[i,] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(
        ASTSource(kernel, signature, places, known),
        target=GPUTarget("cuda", architecture, 32), options=options,
    )  # fmt: skip
    return {**examined(made.asm["cubin"]), **read_ptx(made.asm["ptx"]), **options}


def examined(cubin: bytes) -> dict[str, Any]:
    """Registers, stack and SASS opcodes."""
    folder = cuda_gates.disassembler()
    assert folder is not None
    tools = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = str(folder / "cuobjdump")
        usage = cuda_gates.run([tool, "--dump-resource-usage", str(file)], env=tools).stdout
        sass = cuda_gates.run([tool, "-sass", str(file)], env=tools).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    (instructions,) = cuda_gates.read_sass(sass).values()
    return {
        "registers": int(numbers["REG"]),
        "stack": int(numbers["STACK"]),
        "local": int(numbers["LOCAL"]),
        "shared": int(numbers["SHARED"]),
        "sass": instructions,
    }


def read_ptx(ptx: str) -> dict[str, Any]:
    """How often each opcode occurs, and the float64 constants."""
    opcodes = re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE)
    return {
        "ptx": dict(collections.Counter(opcodes)),
        "constants": sorted(set(re.findall(r"\b0d[0-9A-F]{16}\b", ptx))),
    }


def environment(cache: Path) -> dict[str, str]:
    """Of a process that compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**kept, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache)}


def examine_all() -> dict[str, dict[str, Any]]:
    """``"<case>, sm_<architecture>"`` -> what is known; compiled in a process of its own."""
    import importlib.metadata

    inputs = (KERNELS, Path(cuda.__file__), Path(__file__))
    methods = {**reference.CELL_METHODS, **reference.MAP_METHODS}
    said = [importlib.metadata.version("triton"), *(f"{m} {methods[m][1]}" for m in methods)]
    key = cuda_gates.digest(
        [*(word.encode() for word in said), *(file.read_bytes() for file in inputs)]
    )
    kept = cuda_gates.CACHE / f"triton-{key}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        for old in kept.parent.glob("triton-*.json"):
            old.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, __file__], env=environment(cuda_gates.CACHE / "triton"),
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-4000:])
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(done.stdout)
        part.replace(kept)
    result: dict[str, dict[str, Any]] = json.loads(kept.read_text())
    return result


def main() -> None:
    from hgfast.decoding import kernels

    torch.set_num_threads(1)
    kernels.decode_kernel = Catcher(kernels.decode_kernel)
    kernels.topk_kernel = Catcher(kernels.topk_kernel)
    requests = cases()
    json.dump(
        {
            f"{name}, sm_{architecture}": compile_case(requests[name], architecture)
            for architecture in ARCHITECTURES
            for name in selected(architecture)
        },
        sys.stdout,
        indent=1,
    )


if __name__ == "__main__":
    main()
