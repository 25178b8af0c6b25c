"""Every kernel on small shapes, for a checker of memory accesses and races to watch:

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitize.py

Prints "done" at the end. Results are compared too, so that a kernel that did not run is noticed.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

# Each tensor in an allocation of its own: past its end is then outside, not in a neighbour.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

import torch  # noqa: E402
from decode_checks import (  # noqa: E402
    CELL_METHODS,
    LAYOUTS,
    assert_agree,
    laid_out,
    maps_of,
    run,
)
from op_checks import (  # noqa: E402
    bottleneck_reference,
    bottleneck_weights,
    cast,
    native,
    random_map,
    upsample_add_reference,
)
from stem_checks import (  # noqa: E402
    PIXELS,
    head_reference,
    head_weights,
    image_of,
    stem_reference,
    stem_weights,
)
from torch import Tensor  # noqa: E402

from hgfast import ops  # noqa: E402
from hgfast.decoding import METHODS, cuda  # noqa: E402

REHEARSAL = os.environ.get("HGFAST_GPU_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
DTYPES = [torch.bfloat16] if REHEARSAL else [torch.bfloat16, torch.float16]


def the_kernels() -> tuple[Any, Any]:
    """The module with them, and the ops that end in them; a rehearsal has the emulated ones."""
    if not REHEARSAL:
        return native, ops
    try:
        emulator = importlib.import_module("hgfast_emulator")
    except ImportError:  # not built: the CPU's ops are left
        return native, ops
    emulator.set_device(2)
    return emulator, torch.ops.hgfast_emulated


kernels, kernel_ops = the_kernels()
has_kernels = hasattr(kernels, "CudaBottleneck")
ran: set[str] = set()


def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def compare(what: str, out: Tensor, reference: Tensor) -> None:
    """The references are computed on the CPU, where they are no work for the checker."""
    error = (out.cpu().double() - reference).norm() / reference.norm()
    assert error < 0.02, f"{what}: relative error {float(error):.1e}"


def enough_images() -> int:
    """Of 10x26 pixels: four blocks of the larger tile each, 1.3 times the smaller ones' pixels."""
    blocks = 2 if REHEARSAL else torch.cuda.get_device_properties(0).multi_processor_count
    return -(-blocks // 4)


def bottlenecks(dtype: torch.dtype) -> None:
    # middle: every chunk of the kernel; sizes: no multiple of a tile, one pixel, many blocks
    shapes = [(middle, 1, 6, 10) for middle in (16, 64, 128, 160)]
    shapes += [(middle, enough_images(), 10, 26) for middle in (32, 64, 128, 160)]
    shapes += [(32, 1, 1, 1), (48, 2, 9, 5)]
    for middle, batch, height, width in shapes:
        for project in (False, True):
            channels = 32
            w = bottleneck_weights(channels, middle, channels, project=project)
            x = random_map(batch, channels, height, width, dtype=dtype, layout="channels_last")
            low = None
            if height % 2 == 0 and width % 2 == 0:
                low = random_map(batch, channels, height // 2, width // 2, dtype=dtype, seed=2)
            halves = [None, low] if low is not None else [None]
            for half in halves:
                y = kernel_ops.bottleneck(
                    x.to(DEVICE), **moved(w), low=None if half is None else half.to(DEVICE)
                )
                ran.add(kernels.last_path())
                exact = None if half is None else half.double()
                reference = bottleneck_reference(x.double(), cast(w, torch.float64), exact)
                compare(f"bottleneck {middle} {tuple(x.shape)}", y, reference)


def pooled(dtype: torch.dtype) -> None:
    """The prologue and the epilogue that no op has."""
    for middle in (32, 64, 128, 160):
        w = bottleneck_weights(32, middle, 32)
        names = ("scale", "shift", "w1", "b1", "w2", "b2", "w3", "b3")
        block = kernels.CudaBottleneck(dtype, *(moved(w)[name] for name in names), relu=True)
        for shape in ((1, 32, 13, 18), (enough_images(), 32, 21, 52)):
            x = random_map(*shape, dtype=dtype, layout="channels_last")
            y = block.run(x.to(DEVICE), None, True)
            ran.add(kernels.last_path())
            small = torch.max_pool2d(x.double(), 2)
            reference = torch.relu(bottleneck_reference(small, cast(w, torch.float64)))
            compare(f"pooled bottleneck {middle} {shape}", y, reference)


def hopper(dtype: torch.dtype) -> None:
    """The kernels of one architecture, where this is it: pairs of tiles that hang over the edge,
    several for each cluster; the warpgroups' with all there is behind, the clusters' with a pool.
    """
    cases = (
        ("CudaHopperBottleneck", 128, (64, 64), (2, 18, 20)),
        ("CudaHopperBottleneck", 128, (64, 128), (1, 5, 7)),
        ("CudaLatencyBottleneck", 128, (256, 256), (1, 10, 12)),
        ("CudaLatencyBottleneck", 64, (64, 128), (1, 9, 8)),
    )
    order = ("scale", "shift", "w1", "b1", "w2", "b2", "w3", "b3", "wp", "bp")
    for name, middle, (channels, out), (batch, height, width) in cases:
        kernel = getattr(kernels, name, None)
        project = channels != out
        if kernel is None or kernel.obstacle(DEVICE, channels, middle, out, project):
            continue
        w = bottleneck_weights(channels, middle, out, project=project)
        x = random_map(batch, channels, height, width, dtype=dtype, layout="channels_last")
        low = None
        if height % 2 == 0:
            low = random_map(batch, out, height // 2, width // 2, dtype=dtype, seed=2)
        block = kernel(dtype, *(moved(w).get(key) for key in order))
        there = None if low is None else low.to(DEVICE)
        if name == "CudaHopperBottleneck":
            y, most = block.run(x.to(DEVICE), there, True)
            compare(f"{name} pooled", most, torch.max_pool2d(y.cpu().double(), 2))
        else:
            y = block.run(x.to(DEVICE), there, False)
        ran.add(kernels.last_path())
        exact = None if low is None else low.double()
        reference = bottleneck_reference(x.double(), cast(w, torch.float64), exact)
        compare(f"{name} {channels} {out}", y, reference)


def ends(dtype: torch.dtype) -> None:
    """Stems of several tiles a block, and heads; odd sizes and odd numbers of joints."""
    for out, batch in ((16, 1), (48, 3)):
        for pixel in PIXELS:
            v = stem_weights(out, dtype=pixel)
            image = image_of(batch, 33, 71, dtype=pixel)
            y = kernel_ops.stem(image.to(DEVICE), **moved(v), dtype=dtype)
            ran.add(kernels.last_path())
            compare(f"stem {out} {pixel}", y, stem_reference(image, v, torch.float64))
    names = ("w1", "b1", "wh", "bh", "wn", "bn")
    for channels, joints, out in ((64, 17, 64), (64, 5, 0), (144, 68, 144), (144, 0, 80)):
        w = head_weights(channels, channels, joints, out)
        head = kernels.CudaHead(dtype, *(moved(w).get(name) for name in names))
        for height in (7, 512 * enough_images()):  # by one column
            y = random_map(1, channels, height, 1, dtype=dtype, layout="channels_last")
            results = head.run(y.to(DEVICE), None)
            ran.add(kernels.last_path())
            for result, judge in zip(
                results, head_reference(y, None, w, torch.float64), strict=True
            ):
                if judge is not None:
                    compare(f"head {channels} {joints} {out}", result, judge)


def others(dtype: torch.dtype) -> None:
    low = random_map(2, 24, 3, 5, dtype=dtype, layout="channels_last")
    skip = random_map(2, 24, 6, 10, dtype=dtype, layout="channels_last", seed=2)
    y = ops.upsample_add(low.to(DEVICE), skip.to(DEVICE))
    compare("upsample_add", y, upsample_add_reference(low.double(), skip.double()))
    maps = [low, random_map(2, 24, 6, 10, dtype=dtype, layout="channels_last", seed=3)]
    y = ops.upsample_add([m.to(DEVICE) for m in maps], skip.to(DEVICE), relu=True)
    total = upsample_add_reference(low.double(), skip.double()) + maps[1].double()
    compare("upsample_add of maps", y, torch.relu(total))


def decodes(dtype: torch.dtype) -> None:
    """Odd sizes, of maps that are contiguous and of joints that are neighbours; 5x7 is less than a
    tile, 67x65 more than one."""
    for shape in ((2, 3, 5, 7), (1, 17, 19, 21), (1, 1, 67, 65)):
        for layout in LAYOUTS[:2]:
            maps = laid_out(maps_of("peaked", *shape).to(dtype), layout)
            other = laid_out(maps_of("peaked", *shape, seed=1).to(dtype), layout)
            flip: dict[str, Any] = {"flipped": other, "joints": list(range(shape[1]))}
            for method in METHODS:
                request = {"maps": maps, "method": method, "blur": 11, **flip}
                requests = [request]
                if method in CELL_METHODS:
                    requests.append({**request, "k": 3, "window": 5})
                for asked in requests:
                    op = torch.ops.hgfast.decode.topk if "k" in asked else torch.ops.hgfast.decode
                    there = {
                        name: value.to(DEVICE) if isinstance(value, Tensor) else value
                        for name, value in asked.items()
                    }
                    coords, scores = run(op, there)
                    assert_agree((coords.cpu(), scores.cpu()), asked)


def main() -> None:
    assert has_kernels or REHEARSAL, "hgfast was built without CUDA kernels"
    for dtype in DTYPES:
        bottlenecks(dtype)
        if has_kernels:
            pooled(dtype)
            hopper(dtype)
            ends(dtype)
        others(dtype)
    if REHEARSAL or cuda.HAS_TRITON:
        decodes(torch.float32)
    if not REHEARSAL:
        torch.cuda.synchronize()
    if has_kernels:  # the chunk for any channels has its larger tile on large GPUs only
        missed = {
            f"cuda/bottleneck<{str(dtype)[6:]}, {chunk}, {tile}>"
            for dtype in DTYPES
            for chunk in (32, 64, 128)
            for tile in ("4x8", "8x16")
        }
        elements = tuple(f"<{str(dtype)[6:]}" for dtype in DTYPES)
        for row in (*kernels.stem_variants(), *kernels.head_variants()):
            if any(element in row["name"] for element in elements):
                missed.add(f"cuda/{row['name']}")
        missed -= ran
        assert not missed, f"not checked: {', '.join(sorted(missed))}"
    print("done")


if __name__ == "__main__":
    main()
