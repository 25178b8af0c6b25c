"""Heatmaps to joints: every method of hgfast, beside the maximum alone, PyTorch and mmpose.

    make bench PYTEST_ARGS="-k decode --benchmark-json=decode.json"
    python benchmarks/table.py decode.json

17 maps of 64x48 per image, Gaussians with noise. ``torch.amax`` finds each map's maximum and no
place: what reading the maps costs. mmpose decodes image by image from NumPy arrays, as its own test
loop does. Each test is one block of calls of one candidate; the blocks of all candidates alternate,
so that a drift of the machine meets them all. Every candidate's results are checked first.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_bench import DTYPES, native, needs_native
from torch import Tensor

import hgfast
from hgfast import ops
from hgfast.decoding import METHODS, reference

pytestmark = needs_native

BLOCKS, DROPPED, TIMED = 4, 3, 20
JOINTS, HEIGHT, WIDTH = 17, 64, 48
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MIRRORED = [0, *(joint + 1 if joint % 2 else joint - 1 for joint in range(1, JOINTS))]

Maps = tuple[str, str, int]  # dtype, layout, batch
Run = Callable[[], Any]
ALL_MAPS = [(d, layout, batch) for batch in (32, 1) for d in DTYPES for layout in LAYOUTS]


@functools.cache
def heatmaps(maps: Maps, seed: int = 0) -> Tensor:
    dtype, layout, batch = maps
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(2, batch, JOINTS, 1, 1, generator=g) * 0.8 + 0.1).unbind()
    distance = (torch.arange(WIDTH) - x * WIDTH) ** 2
    distance = distance + (torch.arange(HEIGHT)[:, None] - y * HEIGHT) ** 2
    values = torch.exp(-distance / 8)
    values += 0.01 * torch.rand(values.shape, generator=g)
    return values.to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])


def eager_quarter(maps: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it in PyTorch: the maximum, and its neighbours gathered."""
    height, width = maps.shape[2:]
    flat = maps.flatten(2)
    scores, index = flat.max(dim=2)
    x, y = index % width, index // width
    inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)

    def value(dx: int, dy: int) -> Tensor:
        near = (index + dx + dy * width).clamp(0, height * width - 1)
        return flat.gather(2, near[..., None])[..., 0]

    dx, dy = value(1, 0) - value(-1, 0), value(0, 1) - value(0, -1)
    moved = torch.stack([x + 0.25 * inside * dx.sign(), y + 0.25 * inside * dy.sign()], dim=2)
    visible = scores > 0
    return moved.float() * visible[..., None], scores.float()


@functools.cache
def mmpose_codec(method: str) -> Any:
    mmpose = pytest.importorskip("mmpose", reason="pip install --no-deps -r requirements-peers.txt")
    pytest.importorskip("cv2", reason="mmpose needs OpenCV")
    # mmpose.models imports what needs the compiled mmcv; the codecs need two of its modules that
    # do not. So the packages above those are empty, with the real folders.
    for name in ("mmpose.models", "mmpose.models.backbones"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(Path(mmpose.__file__).parent.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
    codecs = importlib.import_module("mmpose.codecs")
    sizes = {"input_size": (WIDTH, HEIGHT), "heatmap_size": (WIDTH, HEIGHT)}
    if method == "udp":
        return codecs.UDPHeatmap(input_size=(WIDTH - 1, HEIGHT - 1), heatmap_size=(WIDTH, HEIGHT))
    if method == "megvii":
        return codecs.MegviiHeatmap(**sizes, kernel_size=11)
    return codecs.MSRAHeatmap(**sizes, sigma=2, unbiased=method == "dark")


def mmpose(maps: Tensor, method: str) -> Run:
    codec = mmpose_codec(method)
    images = [image.numpy() for image in maps]

    def run() -> list[Any]:
        return [codec.decode(image) for image in images]

    places = torch.stack([torch.as_tensor(decoded[0][0]) for decoded in run()])
    ours, _ = ops.decode(maps, method)
    assert (places - ours).abs().max() < 0.01  # cells; mmpose computes in float32
    return run


def hgfast_op(maps: Tensor, method: str, *rest: Any) -> Run:
    run = functools.partial(torch.ops.hgfast.decode, maps, method, *rest)
    for result, expected in zip(run(), reference.decode(maps, method, *rest), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    assert native.last_path().endswith("/decode")
    return run


def hgfast_peaks(maps: Tensor, k: int) -> Run:
    run = functools.partial(torch.ops.hgfast.decode.topk, maps, "quarter", k)
    for result, expected in zip(run(), reference.decode_topk(maps, "quarter", k), strict=True):
        assert torch.equal(result, expected)
    return run


def eager(maps: Tensor) -> Run:
    for result, expected in zip(eager_quarter(maps), ops.decode(maps, "quarter"), strict=True):
        assert torch.equal(result, expected)
    return functools.partial(eager_quarter, maps)


CANDIDATES: dict[str, Callable[[Maps], Run]] = {
    "torch.amax": lambda maps: functools.partial(torch.amax, heatmaps(maps), (2, 3)),
    "eager quarter": lambda maps: eager(heatmaps(maps)),
    **{
        f"hgfast {method}": functools.partial(lambda m, maps: hgfast_op(heatmaps(maps), m), method)
        for method in METHODS
    },
    "hgfast quarter, flip": lambda maps: hgfast_op(
        heatmaps(maps), "quarter", heatmaps(maps, 1), MIRRORED, True
    ),
    "hgfast quarter, 10 peaks": lambda maps: hgfast_peaks(heatmaps(maps), 10),
    "hgfast.decode quarter": lambda maps: functools.partial(hgfast.decode, heatmaps(maps)),
    **{
        f"mmpose {method}": functools.partial(lambda m, maps: mmpose(heatmaps(maps), m), method)
        for method in ("msra", "dark", "udp", "megvii")
    },
}


@functools.cache
def candidate(name: str, maps: Maps) -> Run:
    return CANDIDATES[name](maps)


@pytest.mark.parametrize(
    ("maps", "block", "name"),
    [
        pytest.param(maps, block, name, id=f"decode {' '.join(map(str, maps))} {name} {block}")
        for maps in ALL_MAPS
        for block in range(BLOCKS)
        for name in CANDIDATES
        # NumPy has no bfloat16, and mmpose takes one layout.
        if not name.startswith("mmpose") or maps[:2] == ("float32", "contiguous")
    ],
)
def test_decode(benchmark: Any, maps: Maps, block: int, name: str) -> None:
    dtype, layout, batch = maps
    benchmark.group = f"decode {dtype} {layout} batch {batch}"
    with torch.inference_mode():
        run = candidate(name, maps)
        benchmark.extra_info.update(
            maps=f"{batch}x{JOINTS}x{HEIGHT}x{WIDTH} {dtype}, {layout}",
            candidate=name,
            block=block,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            hgfast=hgfast.__version__,
        )
        benchmark.pedantic(run, rounds=TIMED, warmup_rounds=DROPPED)
