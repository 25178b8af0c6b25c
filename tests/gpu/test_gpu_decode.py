"""hgfast::decode and its topk on the device: the compiled Triton kernels against the reference.

The same requests and the same criterion as for the CPU's kernels and the interpreted ones
(decode_checks). The reference runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_checks import (
    CELL_METHODS,
    DTYPES,
    LAYOUTS,
    assert_agree,
    laid_out,
    maps_of,
    requests,
    run,
)
from gpu_checks import DEVICE, REHEARSAL, REQUIRED, captured, require_device, some, synchronise
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import hgfast
from hgfast.decoding import METHODS, cuda

require_device()
if not REHEARSAL and not cuda.HAS_TRITON:
    if REQUIRED:
        raise RuntimeError("needs Triton, which comes with torch's builds for CUDA")
    pytest.skip("needs Triton: pip install triton", allow_module_level=True)

Request = dict[str, Any]

# Each new size of tile is compiled, which takes a second or two.
EXAMPLES = settings(
    max_examples=some(60, 8), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
SETTINGS: list[dict[str, Any]] = (
    [{"backend": "aot_eager"}] if REHEARSAL else [{}, {"mode": "reduce-overhead"}]
)


def moved(t: Any) -> Any:
    """A tensor with the same strides on the device, gaps and all; other things as they are."""
    if not isinstance(t, Tensor):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)


def on_device(request: Request) -> tuple[Tensor, Tensor]:
    op = torch.ops.hgfast.decode.topk if "k" in request else torch.ops.hgfast.decode
    coords, scores = run(op, {name: moved(value) for name, value in request.items()})
    assert coords.device.type == scores.device.type == DEVICE.type
    return coords.cpu(), scores.cpu()


def check(request: Request) -> None:
    assert_agree(on_device(request), request)


def flip(maps: Tensor, layout: str) -> Request:
    batch, joints, height, width = maps.shape
    other = maps_of("peaked", batch, joints, height, width, seed=3).to(maps.dtype)
    order = [*range(1, joints), 0]
    return {"flipped": laid_out(other, layout), "joints": order, "shift": True, "mean": False}


# ---- What they compute ----


@EXAMPLES
@given(requests())
def test_any_request(request: Request) -> None:
    check(request)


@EXAMPLES
@given(requests(topk=True))
def test_any_request_for_several_peaks(request: Request) -> None:
    check(request)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("method", METHODS)
def test_networks_maps(method: str, dtype: torch.dtype, layout: str) -> None:
    """In one tile and in several; joints that fill groups, and more."""
    for joints, height, width in [(17, 64, 48), (16, 64, 64), (3, 96, 72), (2, 128, 128)]:
        for kind in ("peaked", "tied", "nan"):
            maps = maps_of(kind, some(4, 1), joints, height, width)
            maps = laid_out(maps.to(dtype), layout)
            check({"maps": maps, "method": method, "blur": 11, "beta": 10.0})
        check({"maps": maps, "method": method, "blur": 11, "beta": 10.0, **flip(maps, layout)})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("method", CELL_METHODS)
def test_networks_maps_with_several_peaks(method: str, window: int, layout: str) -> None:
    maps = laid_out(maps_of("peaked", 2, 17, 64, 48), layout)
    request = {"maps": maps, "method": method, "k": 10, "window": window, "blur": 11}
    check(request)
    check({**request, **flip(maps, layout)})


@pytest.mark.parametrize("kind", ["tiny", "huge", "negative", "infinite", "border"])
@pytest.mark.parametrize("method", ["dark", "udp", "megvii"])
def test_what_is_clipped_and_turned_upside_down(method: str, kind: str) -> None:
    for blur in (3, 11, 17, 151):
        for layout in LAYOUTS:
            maps = laid_out(maps_of(kind, 2, 17, 24, 20), layout)
            check({"maps": maps, "method": method, "blur": blur})
            if method != "megvii":
                check({"maps": maps, "method": method, "blur": blur, "k": 5, "window": 3})


def test_more_elements_than_32_bits_count() -> None:
    if REHEARSAL or torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of a device's memory")
    batch = 2**31 // (17 * 64 * 48) + 2
    maps = torch.zeros(batch, 17, 64, 48, dtype=torch.bfloat16, device=DEVICE)
    maps[-1, -1, 40, 30] = 1
    maps[-1, -1, 40, 31] = 0.5
    for layout in (torch.contiguous_format, torch.channels_last):
        coords, scores = torch.ops.hgfast.decode(maps.contiguous(memory_format=layout), "quarter")
        assert scores[-1, -1].item() == 1
        assert coords[-1, -1].tolist() == [30.25, 40]
        assert int((scores != 0).sum()) == 1


# ---- As torch sees them ----


def some_request(seed: int = 0, topk: bool = False) -> Request:
    maps = laid_out(maps_of("peaked", 2, 5, 16, 12, seed).bfloat16(), "channels_last")
    request = {
        "maps": maps, "method": "dark", **flip(maps, "channels_last"),
        "matrix": torch.randn(2, 2, 3, dtype=torch.float64), "origin_x": 6.0,
        "origin_y": 8.0, "truncate": False, "blur": 11,
    }  # fmt: skip
    return {**request, "k": 3, "window": 3} if topk else request


@pytest.mark.parametrize("topk", [False, True])
def test_opcheck(topk: bool) -> None:
    request = {name: moved(value) for name, value in some_request(topk=topk).items()}
    op = torch.ops.hgfast.decode.topk if topk else torch.ops.hgfast.decode.default
    maps, method = request.pop("maps"), request.pop("method")
    torch.library.opcheck(op, (maps, method), request)


def everything(maps: Tensor, flipped: Tensor) -> tuple[Tensor, ...]:
    flip = hgfast.Flip(flipped, [(0, 1), (2, 3)], shift=True)
    coords, scores = hgfast.decode(maps, "udp", flip, blur=11)
    peaks, heights = hgfast.decode(maps * 2, "quarter", flip, topk=4)
    return coords, scores, peaks, heights


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_compiles_whole(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    compiled = torch.compile(everything, fullgraph=True, **settings)
    monkeypatch.setattr(cuda, "_kept", {})  # the first call keeps numbers, in no graph's memory
    with torch.inference_mode():
        for seed in range(4):
            maps, other = (
                maps_of("peaked", 2, 5, 16, 12, seed + n).to(DEVICE) for n in (0, 10)
            )  # fmt: skip
            results = [result.clone() for result in compiled(maps, other)]
            for result, plain in zip(results, everything(maps, other), strict=True):
                assert torch.equal(result, plain)


# ---- Graphs, streams, repeats ----

LAID_OUT = [(method, layout) for method in METHODS for layout in ("contiguous", "channels_last")]


def call_of(method: str, maps: Tensor, other: Tensor) -> Callable[[], Tensor]:
    """Coordinates and scores, one joint and where there are, several peaks, as one tensor."""
    flip = hgfast.Flip(other, [(0, 1), (2, 3)])

    def call() -> Tensor:
        parts = [*hgfast.decode(maps, method, flip)]
        if method in CELL_METHODS:
            parts += hgfast.decode(maps, method, flip, topk=3)
        return torch.cat([part.flatten() for part in parts])

    return call


def pair(layout: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    maps, other = (laid_out(maps_of("peaked", 3, 17, 64, 48, seed + n), layout) for n in (0, 7))
    return moved(maps), moved(other)


@pytest.mark.parametrize(("method", "layout"), LAID_OUT)
def test_a_graph_replays_with_new_maps(method: str, layout: str) -> None:
    maps, other = pair(layout)
    call = call_of(method, maps, other)
    replay, output = captured(call)
    for seed in range(1, 4):
        for target, source in zip((maps, other), pair(layout, seed), strict=True):
            target.copy_(source)
        replay()
        synchronise()
        assert torch.equal(output, call())


def test_numbers_that_are_new_in_a_capture_belong_to_its_graph() -> None:
    """They may not be kept: a replay writes them, and the graph's memory goes with the graph."""
    maps, other = pair("contiguous")
    call = call_of("dark", maps, other)
    expected = call().clone()
    if REHEARSAL:
        pytest.skip("a rehearsal has no graph")
    synchronise()
    kept = dict(cuda._kept)
    assert kept
    graph = torch.cuda.CUDAGraph()
    try:
        cuda._kept.clear()
        with torch.cuda.graph(graph):
            output = call()
        assert not cuda._kept
    finally:
        cuda._kept.update(kept)
    graph.replay()
    synchronise()
    assert torch.equal(output, expected)


@pytest.mark.parametrize(("method", "layout"), LAID_OUT)
def test_runs_in_the_current_stream(method: str, layout: str) -> None:
    """The maps are there only when that stream has waited for them."""
    if REHEARSAL:
        pytest.skip("a rehearsal has no streams")
    maps, other = pair(layout)
    call = call_of(method, maps, other)
    expected = call().clone()
    right, wrong = maps.clone(), pair(layout, 1)[0]
    maps.copy_(wrong)
    synchronise()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        maps.copy_(right)
        result = call()
    side.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("method", "layout"), LAID_OUT)
def test_repeats_give_the_same_bits(method: str, layout: str) -> None:
    call = call_of(method, *pair(layout))
    first = call().clone()
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(some(200, 2)):
        wrong += (call() != first).any()
    assert int(wrong) == 0


def test_a_wrong_device_is_an_error() -> None:
    if REHEARSAL:
        pytest.skip("a rehearsal has one device")
    maps = torch.zeros(1, 3, 8, 8, device=DEVICE)
    with pytest.raises(ValueError, match="flipped like the heatmaps"):
        torch.ops.hgfast.decode(maps, "argmax", maps.cpu(), [0, 1, 2])
    with pytest.raises(ValueError, match="matrix on cuda"):
        torch.ops.hgfast.decode(maps, "argmax", matrix=torch.zeros(1, 2, 3, dtype=torch.float64))
