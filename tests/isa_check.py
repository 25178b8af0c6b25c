"""A compact check of one instruction set's kernels, in a process of its own.

python tests/isa_check.py avx2

An instruction set is chosen once per process, so test_cpu_plan.py runs this file once for each.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HGFAST_CPU_ISA"] = sys.argv[1]
sys.path.insert(0, str(Path(__file__).parents[1]))

import decode_checks
import torch
import torch.nn.functional as F
from op_checks import (
    LAYOUTS,
    MAP_DTYPES,
    NAMES,
    assert_close_bfloat16,
    assert_close_float32,
    bottleneck_arguments,
    bottleneck_reference,
    bottleneck_weights,
    cast,
    check_given_image,
    check_head,
    check_pooled_bottleneck,
    check_pooling_bottleneck,
    check_small_hourglass,
    conv_reference,
    conv_transpose_reference,
    conv_transpose_weights,
    conv_weights,
    head_weights,
    native,
    random_map,
    run_step,
    small_hourglass,
    upsample_add_reference,
)
from torch import Tensor

from hgfast import ops
from hgfast.decoding import METHODS


def close(out: Tensor, eager: Tensor, reference: Tensor) -> None:
    if out.dtype == torch.float32:
        assert_close_float32(out, reference)
    else:
        assert_close_bfloat16(out, eager, reference)


def ran(op: str) -> None:
    expected = f"{sys.argv[1]}/{op}"
    assert native.last_path() == expected, f"{native.last_path()} ran instead of {expected}"


def check_bottleneck(dtype: torch.dtype) -> None:
    for channels, middle, out, batch, height, width in [
        (64, 32, 64, 2, 9, 12),
        (20, 17, 33, 1, 6, 7),
        (1, 1, 1, 3, 1, 1),
        (48, 64, 80, 1, 34, 3),
    ]:
        w = bottleneck_weights(channels, middle, out)
        x = random_map(batch, channels, height, width, dtype=dtype, layout=LAYOUTS[batch - 1])
        low = None
        if height % 2 == 0 and width % 2 == 0:
            low = random_map(batch, out, height // 2, width // 2, dtype=dtype, seed=2)
        double = None if low is None else low.double()
        reference = bottleneck_reference(x.double(), cast(w, torch.float64), double)
        close(
            ops.bottleneck(x, **w, low=low), bottleneck_reference(x, cast(w, dtype), low), reference
        )
        ran("bottleneck")
        w = bottleneck_weights(channels, middle, out, norm=False)
        reference = bottleneck_reference(x.double(), cast(w, torch.float64), double, relu=True)
        y = ops.bottleneck(x, **bottleneck_arguments(w), low=low, relu=True)
        close(y, bottleneck_reference(x, cast(w, dtype), low, relu=True), reference)


def check_conv(dtype: torch.dtype) -> None:
    for channels, out, kernel, stride, padding, dilation, norm in [
        (3, 16, (7, 7), (2, 2), (3, 3), (1, 1), False),
        (64, 48, (3, 3), (1, 1), (1, 1), (1, 1), True),
        (64, 80, (3, 3), (1, 1), (2, 2), (2, 2), False),
        (33, 5, (1, 1), (1, 1), (0, 0), (1, 1), True),
        (33, 40, (1, 1), (2, 2), (0, 0), (1, 1), False),
        (16, 17, (2, 5), (3, 1), (1, 4), (1, 2), False),
    ]:
        w = conv_weights(channels, out, kernel, norm=norm)
        x = random_map(2, channels, 11, 14, dtype=dtype)
        settings = {"stride": stride, "padding": padding, "relu": True, "dilation": dilation}
        reference = conv_reference(x.double(), cast(w, torch.float64), **settings)
        add = torch.ones_like(reference, dtype=dtype)
        y = ops.conv(x, **w, **settings, add=add)
        close(y, conv_reference(x, cast(w, dtype), **settings, add=add), reference + 1)
        ran("conv")


def check_the_rest(dtype: torch.dtype) -> None:
    for stride, padding, beyond in [((2, 2), (1, 1), (0, 1)), ((1, 3), (0, 0), (0, 0))]:
        w = conv_transpose_weights(33, 41, (4, 2))
        x = random_map(2, 33, 5, 6, dtype=dtype)
        y = run_step(
            dtype,
            [x],
            lambda plan, y, w=w, settings=(stride, padding, beyond): plan.conv_transpose(
                0, y, w["weight"], w["bias"], *settings
            ),
        )
        ran("conv_transpose")
        settings = stride, padding, beyond
        reference = conv_transpose_reference(x.double(), cast(w, torch.float64), *settings)
        close(y, conv_transpose_reference(x, cast(w, dtype), *settings), reference)
    x = random_map(2, 37, 7, 9, dtype=dtype)
    for kernel in ((2, 2), (3, 3), (2, 4)):
        y = run_step(
            dtype,
            [x],
            lambda plan, y, kernel=kernel: plan.pool(0, y, "max", kernel, (2, 1), (1, 1)),
        )
        ran("pool")
        assert torch.equal(y, torch.max_pool2d(x, kernel, (2, 1), (1, 1)))
    y = run_step(dtype, [x], lambda plan, y: plan.pool(0, y, "avg", (3, 2), (1, 2)))
    close(y, F.avg_pool2d(x, (3, 2), (1, 2)), F.avg_pool2d(x.double(), (3, 2), (1, 2)))
    y = run_step(dtype, [x], lambda plan, y: plan.concat([0, 0], y))
    ran("concat")
    assert torch.equal(y, torch.cat([x, x], 1))
    low, skip = random_map(2, 19, 3, 5, dtype=dtype), random_map(2, 19, 6, 10, dtype=dtype, seed=2)
    assert torch.equal(ops.upsample_add(low, skip), upsample_add_reference(low, skip))
    ran("upsample_add")


def check_fusions(dtype: torch.dtype) -> None:
    for channels, middle, out, batch, height, width in [
        (64, 32, 64, 2, 19, 24),
        (20, 17, 33, 1, 12, 15),
        (48, 64, 48, 3, 68, 7),
    ]:
        x = random_map(batch, channels, height, width, dtype=dtype, layout=LAYOUTS[batch - 1])
        for norm in (True, False):
            w = bottleneck_weights(channels, middle, out, norm=norm)
            check_pooled_bottleneck(dtype, x, w, relu=not norm)
            check_pooling_bottleneck(dtype, x, w, relu=not norm)
            ran("bottleneck")
    for channels, middle, joints, out, height, width in [
        (64, 64, 16, 64, 12, 11),
        (20, 33, 17, 0, 3, 5),
        (48, 31, 0, 40, 19, 16),
    ]:
        x = random_map(3, channels, height, width, dtype=dtype)
        add = random_map(3, out, height, width, dtype=dtype, seed=2) if out else None
        check_head(dtype, x, head_weights(channels, middle, joints, out), add)
    for channels, kernel, stride, padding in [
        (3, 7, 2, 3),
        (3, 3, 2, 1),
        (15, 5, 1, 4),
        (1, 1, 1, 0),
    ]:
        w = conv_weights(channels, 33, (kernel, kernel))
        for layout in LAYOUTS:
            for given in MAP_DTYPES:
                x = random_map(3, channels, 21, 38, dtype=given, layout=layout)
                inputs = [x, *(walled(x) if layout != "sliced" and sys.platform == "linux" else [])]
                for image in inputs:
                    check_given_image(
                        dtype, image, w, stride=(stride, stride), padding=(padding, padding)
                    )
                    ran("conv")


def check_relayout(dtype: torch.dtype) -> None:
    """Into a plan and out of it again: the sum of a map with itself, bit for bit."""
    shapes = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 16, 4, 8), (2, 37, 3, 33), (1, 64, 1, 70)]
    for shape in shapes:
        for inside in (torch.float32, torch.bfloat16):
            for layout in LAYOUTS:
                x = random_map(*shape, dtype=dtype, layout=layout)
                expected = (x.to(inside) + x.to(inside)).to(dtype)
                inputs = [x, *(walled(x) if layout != "sliced" and sys.platform == "linux" else [])]
                for each in inputs:
                    y = run_step(inside, [each], lambda plan, y: plan.add(0, 0, y))
                    assert torch.equal(y, expected), f"{shape}, {layout}, {dtype} in {inside}"


def check_decode(dtype: torch.dtype) -> None:
    flips = {"joints": list(range(19))[::-1], "shift": True}
    for layout in decode_checks.LAYOUTS:
        for kind, height, width in [("peaked", 21, 35), ("tied", 3, 5)]:
            maps, other = (
                decode_checks.laid_out(
                    decode_checks.maps_of(kind, 2, 19, height, width, seed).to(dtype), layout
                )
                for seed in (0, 1)
            )
            for method in METHODS:
                for rest in ({}, {"flipped": other, **flips}):
                    request = {"maps": maps, "method": method, "blur": 11, **rest}
                    decode_checks.assert_agree(decode_checks.run(ops.decode, request), request)
                    if method not in decode_checks.CELL_METHODS:
                        continue
                    request.update(k=7, window=5)
                    decode_checks.assert_agree(decode_checks.run(ops.decode_topk, request), request)
        nan = decode_checks.laid_out(decode_checks.maps_of("nan", 1, 19, 8, 16).to(dtype), layout)
        request = {"maps": nan, "method": "quarter"}
        decode_checks.assert_agree(decode_checks.run(ops.decode, request), request)
    ran("decode")


def walled(maps: Tensor) -> Iterator[Tensor]:
    """Copies in the same layout that end where memory ends, and that begin where it begins: to read
    beside them kills the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = maps.numel() * maps.element_size()
    inside = -size % mmap.PAGESIZE + size
    for offset in (inside - size, 0):
        memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for wall in (start, start + mmap.PAGESIZE + inside):
            assert libc.mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0) == 0
        whole = torch.frombuffer(
            memory, dtype=maps.dtype, count=maps.numel(), offset=mmap.PAGESIZE + offset
        )
        yield whole.as_strided(maps.shape, maps.stride()).copy_(maps)


def check_bounds(dtype: torch.dtype) -> None:
    for joints, height, width in [(3, 5, 7), (17, 9, 16), (1, 1, 1), (2, 12, 33), (33, 3, 11)]:
        for layout in ("contiguous", "channels_last"):
            maps = decode_checks.laid_out(
                decode_checks.maps_of("random", 1, joints, height, width).to(dtype), layout
            )
            order = list(range(joints))
            for method in METHODS:
                for inside in walled(maps):
                    for options in ({}, {"flipped": inside, "joints": order, "shift": True}):
                        ops.decode(inside, method, **options)
                        if method in decode_checks.CELL_METHODS:
                            ops.decode_topk(inside, method, 3, 5, **options)


def main() -> None:
    for dtype in MAP_DTYPES:
        plan = small_hourglass(NAMES[dtype])
        assert plan.path == sys.argv[1]
        for layout in LAYOUTS:
            check_small_hourglass(plan, dtype, random_map(2, 3, 36, 28, layout=layout))
        check_bottleneck(dtype)
        check_conv(dtype)
        check_the_rest(dtype)
        check_fusions(dtype)
        check_relayout(dtype)
    for dtype in decode_checks.DTYPES:
        check_decode(dtype)
        if sys.platform == "linux":
            check_bounds(dtype)
    print(f"{sys.argv[1]}: ok")


if __name__ == "__main__":
    main()
