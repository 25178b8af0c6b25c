"""hgfast::decode and hgfast::decode.topk on a GPU: the launches of the Triton kernels.

Triton is imported at the first call; nothing here asks for it before. A call allocates through
PyTorch and waits for nothing, save the first with a permutation or a blur that is new, which waits
for a few bytes to be copied. So it may stand in a CUDA graph capture, once the kernel for such
maps is compiled: call it once before.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hgfast.decoding.reference import CELL_METHODS, MAP_METHODS, METHODS, gaussian_taps

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLURRING = ("dark", "udp", "megvii")
# Without a bound ptxas puts a register or two on the stack, to fit more threads.
_COMPILED = {"enable_fp_fusion": False, "maxnreg": 255}
_MOST_CELLS = 2**27  # of a map: the kernels count cells, times 16 joints, in 32 bits

# How a map is read: as in kernels.py, which cannot be imported without Triton.
_FLIP, _SHIFT, _MEAN, _FLAT, _WIDE, _QUICK = (1 << bit for bit in range(6))

#: Whether there is a Triton to launch kernels with.
HAS_TRITON = importlib.util.find_spec("triton") is not None

Decoded = tuple[Tensor, Tensor]


@functools.cache
def register() -> None:
    """Make these functions what the operators run on CUDA tensors. Once; later calls do nothing."""
    torch.library.impl("hgfast::decode", "cuda", decode)
    torch.library.impl("hgfast::decode.topk", "cuda", decode_topk)


def decode(
    heatmaps: Tensor,
    method: str,
    flipped: Tensor | None = None,
    joints: Sequence[int] = (),
    shift: bool = False,
    mean: bool = True,
    matrix: Tensor | None = None,
    origin_x: float = 0.0,
    origin_y: float = 0.0,
    truncate: bool = False,
    blur: int = 11,
    beta: float = 1.0,
) -> Decoded:
    """:func:`hgfast.ops.decode` on a GPU; in Triton's interpreter on CPU tensors."""
    _check("hgfast::decode", heatmaps, method, METHODS, flipped, joints, matrix, blur)
    if not 0 < beta < float("inf"):
        raise ValueError(f"hgfast::decode: expected a positive, finite beta, given {beta:g}")
    shape = heatmaps.shape[:2]
    coords = heatmaps.new_empty((*shape, 2), dtype=torch.float32)
    scores = heatmaps.new_empty(shape, dtype=torch.float32)
    if scores.numel():
        launch = Launch(heatmaps, method, flipped, shift, mean, blur)
        options = {**launch.options, "BLOCK": launch.block, "LOOP": launch.loops}
        _run(
            "decode_kernel", launch, (coords, scores), joints, matrix,
            # The kernel has it in float32, where 0 times an infinity were NaN.
            (float(origin_x), float(origin_y), max(float(beta), 2.0**-149)),
            {**options, "TRUNCATE": matrix is not None and truncate},
        )  # fmt: skip
    return coords, scores


def decode_topk(
    heatmaps: Tensor,
    method: str,
    k: int,
    window: int = 3,
    flipped: Tensor | None = None,
    joints: Sequence[int] = (),
    shift: bool = False,
    mean: bool = True,
    matrix: Tensor | None = None,
    origin_x: float = 0.0,
    origin_y: float = 0.0,
    truncate: bool = False,
    blur: int = 11,
) -> Decoded:
    """:func:`hgfast.ops.decode_topk` on a GPU; in Triton's interpreter on CPU tensors."""
    where = "hgfast::decode.topk"
    _check(where, heatmaps, method, tuple(CELL_METHODS), flipped, joints, matrix, blur)
    if k < 1:
        raise ValueError(f"{where}: expected k of at least 1, given {k}")
    if window not in (3, 5):
        raise ValueError(f"{where}: expected a window of 3 or 5, given {window}")
    shape = (*heatmaps.shape[:2], k)
    coords = heatmaps.new_empty((*shape, 2), dtype=torch.float32)
    scores = heatmaps.new_empty(shape, dtype=torch.float32)
    if scores.numel():
        launch = Launch(heatmaps, method, flipped, shift, mean, blur, planes=1)
        _run(
            "topk_kernel", launch, (coords, scores), joints, matrix,
            (float(origin_x), float(origin_y), k),
            {
                **launch.options,
                "TRUNCATE": matrix is not None and truncate,
                "RADIUS": window // 2,
            },
        )  # fmt: skip
    return coords, scores


class Launch:
    """How the kernels are to go through some maps: strides, tiles and what is specialised."""

    def __init__(
        self,
        heatmaps: Tensor,
        method: str,
        flipped: Tensor | None,
        shift: bool,
        mean: bool,
        blur: int,
        planes: int = 0,
    ) -> None:
        batch, count, height, width = heatmaps.shape
        _, by_joint, by_row, by_column = heatmaps.stride()
        self.maps, self.other = heatmaps, heatmaps if flipped is None else flipped
        self.cells, self.blur = height * width, blur
        # Joints that are neighbours in memory: as many as a sector of 32 bytes has.
        grouped = count > 1 and by_joint == 1 and by_column > 1
        self.joints = 32 // heatmaps.element_size() if grouped else 1
        self.programs = batch * -(-count // self.joints)
        self.loops = grouped or self.cells > 4096
        # 32 values a thread under way, and as many registers for them; of two maps half of each.
        if self.loops:  # tiles in fours
            each = 8 if flipped is None else 4
            most = each * 32 * (8 if grouped else 4)
            self.block = min(most // self.joints, _power_of_two(self.cells))
            self.warps = max(1, self.joints * self.block // (32 * each))
        else:
            self.block = _power_of_two(self.cells)
            self.warps = max(1, self.block // 1024)
        chunk = min(256 * self.warps // self.joints, self.block)

        flat = by_row == width * by_column or height == 1
        farthest = max(
            (height - 1) * row + (width - 1) * column
            for row, column in (maps.stride()[2:] for maps in (self.maps, self.other))
        )
        how = _FLIP * (flipped is not None) + _SHIFT * shift + _MEAN * mean
        how = how if flipped is not None else 0
        how += _FLAT * flat + _WIDE * (farthest >= 2**31)
        how += _QUICK * (width > 1 and self.cells * width < 2**32)

        self.blurs = method in _BLURRING
        self.planes = planes + self.blurs
        # Taps that reach from every cell across both borders only add zeros.
        self.reach = min(blur // 2, max(height, width) - 1) if self.blurs else 0
        _, mark = {**CELL_METHODS, **MAP_METHODS}[method]
        self.options: dict[str, Any] = {
            "METHOD": method,
            "MARK": mark,
            "HOW": how,
            "JOINTS": self.joints,
            "CHUNK": chunk,
            "WINDOW": 128,
        }

    @property
    def arguments(self) -> tuple[int, ...]:
        return (*self.maps.shape[1:], *self.maps.stride(), *self.other.stride())

    def scratch(self) -> Tensor:
        """The planes; a few bytes where there are none, since a pointer has to point."""
        size = self.planes * self.programs * self.joints * self.cells
        return self.maps.new_empty(max(size, 1), dtype=torch.float32)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _run(
    name: str,
    launch: Launch,
    results: Decoded,
    joints: Sequence[int],
    matrix: Tensor | None,
    numbers: tuple[float, ...],
    options: dict[str, Any],
) -> None:
    if not HAS_TRITON:
        raise RuntimeError(f"{name} needs Triton, which is not installed: pip install triton")
    from hgfast.decoding import kernels

    maps = launch.maps
    with torch.cuda.device_of(maps):  # type: ignore[no-untyped-call]
        flips = options["HOW"] & _FLIP
        permutation = _numbers(tuple(joints), torch.int32, maps.device) if flips else results[1]
        taps = _taps(launch.blur, maps.device) if launch.blurs else results[1]
        getattr(kernels, name)[(launch.programs,)](
            maps, launch.other, permutation, results[1] if matrix is None else matrix.contiguous(),
            taps, launch.scratch(), *results, *launch.arguments, *numbers,
            launch.reach, MATRIX=matrix is not None, num_warps=launch.warps, **_COMPILED, **options,
        )  # fmt: skip


_kept: dict[tuple[Any, ...], Tensor] = {}


def _taps(blur: int, device: torch.device) -> Tensor:
    return _numbers(tuple(gaussian_taps(blur)), torch.float32, device)


def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers on the device, kept for the next call; for good, since graphs may read them.

    Such a copy waits until it is done, so other streams need not. Inside a capture it is not
    allowed; there the numbers come as arguments of small kernels, and belong to the graph.
    """
    key = (values, dtype, device)
    kept = _kept.get(key)
    if kept is not None:
        return kept
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        made = torch.empty(len(values), dtype=dtype, device=device)
        for place, value in zip(made.unbind(), values, strict=True):
            place.fill_(value)
        return made
    # In a thread of its own: while torch.compile prepares a graph ("reduce-overhead"), what this
    # thread asks for comes out of that graph's memory, which is not for keeping.
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(torch.tensor, values, dtype=dtype, device=device).result()
    return _kept.setdefault(key, made)


def _check(
    where: str,
    heatmaps: Tensor,
    method: str,
    methods: tuple[str, ...],
    flipped: Tensor | None,
    joints: Sequence[int],
    matrix: Tensor | None,
    blur: int,
) -> None:
    """Raise ValueError where an argument is not as hgfast.ops tells."""

    def expect(holds: bool, expected: str, given: object) -> None:
        if not holds:
            raise ValueError(f"{where}: expected {expected}, given {given}")

    shape = tuple(heatmaps.shape)
    expect(method in methods, f"a method out of {', '.join(methods)}", f'"{method}"')
    expect(len(shape) == 4, "heatmaps of shape (batch, joints, height, width)", shape)
    cells = shape[2] * shape[3]
    expect(cells > 0, "heatmaps with at least one row and column", shape)
    expect(cells < _MOST_CELLS, f"heatmaps of fewer than {_MOST_CELLS} cells", shape)
    dtype = _name(heatmaps.dtype)
    expect(heatmaps.dtype in _DTYPES, "heatmaps in float32, bfloat16 or float16", dtype)
    count, device = shape[1], heatmaps.device
    if flipped is not None:
        expect(
            flipped.shape == heatmaps.shape
            and flipped.dtype == heatmaps.dtype
            and flipped.device == device,
            f"flipped like the heatmaps, {shape} {dtype} on {device}",
            f"{tuple(flipped.shape)} {_name(flipped.dtype)} on {flipped.device}",
        )
        expect(len(joints) == count, f"{count} joints, one per map, with flipped", len(joints))
        for joint in joints:
            expect(0 <= joint < count, f"joints from 0 to {count - 1}", joint)
    if matrix is not None:
        size = (shape[0], 2, 3)
        expect(tuple(matrix.shape) == size, f"matrix of shape {size}", tuple(matrix.shape))
        expect(matrix.dtype == torch.float64, "matrix in float64", _name(matrix.dtype))
        expect(matrix.device == device, f"matrix on {device}", matrix.device)
    expect(blur >= 3 and blur % 2 == 1, "an odd blur of at least 3 cells", blur)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
