"""hgfast::decode's Triton kernels without a GPU: interpreted on CPU tensors, and compiled.

What they compute is held against the formulas in plain PyTorch by Triton's interpreter, which runs
the same kernels, launched by the same functions, on NumPy. What the compiler makes of them, which
the interpreter does not tell, is examined in ``triton_gates``.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_gates
import pytest
import torch
import triton_gates
from decode_checks import (
    DTYPES,
    LAYOUTS,
    assert_agree,
    laid_out,
    maps_of,
    requests,
    run,
)
from hypothesis import HealthCheck, given, settings
from interpreted import Interpreted
from op_checks import needs_native

import hgfast
from hgfast.decoding import METHODS, cuda

Request = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"
)


def examples(most: int) -> Any:
    """Few, since an operation on a tile takes the interpreter as long as one on a number."""
    return settings(max_examples=most, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    with Interpreted() as process:
        yield process


def check(interpreted: Interpreted, request: Request) -> None:
    call = interpreted.decode_topk if "k" in request else interpreted.decode
    assert_agree(run(call, request), request)


# ---- What they compute ---------------------------------------------------------------------------


@needs_triton
@examples(50)
@given(request=requests(largest=9))
def test_any_request(interpreted: Interpreted, request: Request) -> None:
    check(interpreted, request)


@needs_triton
@examples(15)
@given(request=requests(topk=True, largest=6))
def test_any_request_for_several_peaks(interpreted: Interpreted, request: Request) -> None:
    check(interpreted, request)


def flip(maps: torch.Tensor, layout: str) -> Request:
    joints = maps.shape[1]
    order = [*range(1, joints), 0]
    other = maps_of("peaked", *maps.shape, seed=3).to(maps.dtype)  # type: ignore[arg-type]
    return {"flipped": laid_out(other, layout), "joints": order, "shift": True, "mean": True}


@needs_triton
@pytest.mark.parametrize("method", METHODS)
def test_a_map_in_one_tile(interpreted: Interpreted, method: str) -> None:
    """64x48, contiguous: what the fast path is for."""
    for kind in ("peaked", "nan"):
        maps = maps_of(kind, 1, 2, 64, 48)
        check(interpreted, {"maps": maps, "method": method, "blur": 11})
        check(interpreted, {"maps": maps, "method": method, "blur": 11, **flip(maps, "contiguous")})


@needs_triton
@pytest.mark.parametrize("method", METHODS)
def test_a_map_in_several_tiles(interpreted: Interpreted, method: str) -> None:
    """91x91 is more than the four tiles that are under way; the maximum is in each part."""
    maps = maps_of("peaked", 1, 1, 91, 91)
    check(interpreted, {"maps": maps, "method": method, "blur": 17})


@needs_triton
@pytest.mark.parametrize("where", [0, 2047, 2048, 4095, 4096, 8191, 8192, 8280])
def test_a_maximum_in_each_tile(interpreted: Interpreted, where: int) -> None:
    """And of equals the first, whether the second is in the same lane, 2048 further, or not."""
    for further in (64, 2048, 6144):
        maps = torch.zeros(1, 1, 91, 91)
        maps.view(-1)[where] = maps.view(-1)[min(where + further, 8280)] = 2.0
        check(interpreted, {"maps": maps, "method": "argmax"})
    maps.view(-1)[8280 - where] = torch.nan
    check(interpreted, {"maps": maps, "method": "argmax"})


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("method", METHODS)
def test_joints_that_are_neighbours(
    interpreted: Interpreted, method: str, dtype: torch.dtype
) -> None:
    """17 joints are two or three groups; 19x37 cells are several rounds of four tiles."""
    maps = laid_out(maps_of("peaked", 1, 17, 19, 37).to(dtype), "channels_last")
    more = flip(maps, "channels_last") if dtype == torch.bfloat16 else {}
    check(interpreted, {"maps": maps, "method": method, "blur": 11, **more})


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["quarter", "udp"])
def test_peaks_of_larger_maps(interpreted: Interpreted, method: str, layout: str) -> None:
    maps = laid_out(maps_of("peaked", 1, 2, 40, 28), layout)
    check(interpreted, {"maps": maps, "method": method, "k": 4, "window": 5, "blur": 11})


@needs_triton
@pytest.mark.parametrize("kind", ["tiny", "huge", "negative", "infinite"])
@pytest.mark.parametrize("method", ["dark", "udp", "megvii"])
def test_what_is_clipped_and_turned_upside_down(
    interpreted: Interpreted, method: str, kind: str
) -> None:
    for layout in ("contiguous", "channels_last"):
        maps = laid_out(maps_of(kind, 1, 5, 12, 14), layout)
        check(interpreted, {"maps": maps, "method": method, "blur": 5})
    if method != "megvii":
        check(interpreted, {"maps": maps, "method": method, "blur": 5, "k": 6, "window": 3})


@needs_triton
@pytest.mark.parametrize(("method", "low"), [("dark", 1e-10), ("udp", 1e-3)])
def test_limits_are_not_rounded_to_float32(
    interpreted: Interpreted, method: str, low: float
) -> None:
    """A neighbour between the limit and the float32 next to it, seen through a magnifier."""
    rounded = torch.tensor(low).double()
    maps = torch.zeros(400, 1, 9, 9)
    maps[:, 0, 3:6, 3:6] = torch.tensor([[0.3, 0.6, 0.3], [0.5, 1.0, 0.55], [0.2, 0.5, 0.4]])
    peak = scaled(maps)[0, 0, 4, 5]
    g = torch.Generator().manual_seed(1)
    maps = maps * (low / peak * (1 + 2e-7 * torch.randn(400, 1, 9, 9, generator=g)))
    value = scaled(maps)[:, 0, 4, 5]
    between = (low < value) & (value < rounded)
    assert between.any()
    matrix = torch.tensor([[[1e9, 0, 0], [0, 1e9, 0]]], dtype=torch.float64)
    request = {"method": method, "blur": 3, "matrix": matrix, "origin_x": 4.0, "origin_y": 4.0}
    check(interpreted, {"maps": maps[between][:1].contiguous(), **request})


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """What dark and udp clip, if they clip: blurred maps with the maxima they had."""
    blurred = hgfast.decoding.reference.gaussian_blur(maps, 3).double()
    return blurred * (maps.amax((2, 3), True).double() / blurred.amax((2, 3), True))


@needs_triton
def test_places_are_float64_to_the_end(interpreted: Interpreted) -> None:
    """Also an origin that float32 does not hold."""
    maps = maps_of("peaked", 1, 3, 9, 7)
    matrix = 1e6 * torch.eye(3, dtype=torch.float64)[None, :2]
    request = {"maps": maps, "method": "quarter", "matrix": matrix}
    request |= {"origin_x": 0.1, "origin_y": math.pi}
    check(interpreted, request)
    check(interpreted, {**request, "k": 2, "window": 3})


@needs_triton
@pytest.mark.parametrize("beta", [1e-50, 1e-44, 1e40])
def test_betas_that_float32_does_not_hold(interpreted: Interpreted, beta: float) -> None:
    maps = maps_of("peaked", 1, 2, 9, 7)
    maps[0, 0, 2, 3] = -math.inf
    check(interpreted, {"maps": maps, "method": "softargmax", "beta": beta})


@needs_triton
@pytest.mark.parametrize("blur", [3, 9, 51, 151])
@pytest.mark.parametrize("method", ["dark", "udp", "megvii"])
def test_gaussians_of_every_size(interpreted: Interpreted, method: str, blur: int) -> None:
    """Also those that reach over the whole map."""
    check(interpreted, {"maps": maps_of("peaked", 1, 1, 30, 21), "method": method, "blur": blur})
    check(interpreted, {"maps": maps_of("peaked", 1, 2, 1, 1), "method": method, "blur": blur})


@needs_triton
def test_strides_that_nothing_is_made_for(interpreted: Interpreted) -> None:
    """Expanded, overlapping, transposed; joints that are neighbours in one of both only."""
    base = maps_of("peaked", 2, 3, 5, 6)
    for maps in (
        base.mT,
        base[:, :1].expand(-1, 3, -1, -1),
        base[:1].expand(2, -1, -1, -1),
        base.permute(0, 2, 3, 1),  # the cells of a row are neighbours' joints
        base[:, ::2, ::2, 1::3],
        laid_out(base, "channels_last")[:, 1:, 1:, 1:],
    ):
        check(interpreted, {"maps": maps, "method": "dark", "blur": 5, **flip(maps, "sliced")})
        check(interpreted, {"maps": maps, "method": "argmax", "k": 2, "window": 3})


@needs_triton
def test_offsets_beyond_32_bits_are_counted_in_64() -> None:
    """Memory of that size is not to be had here: how the launch decides."""
    wide, quick = cuda._WIDE, cuda._QUICK
    for strides, shape, expected in [
        ((0, 0, 2**27, 1), (1, 1, 17, 9), wide | quick),
        ((0, 0, 2**27, 1), (1, 1, 16, 9), quick),
        ((2**40, 2**35, 2**14, 1), (3, 3, 16, 9), quick),
        ((0, 0, 2**14, 1), (1, 1, 2**13, 2**13), 0),
    ]:
        maps = torch.empty(0, device="meta").as_strided(shape, strides)
        launch = cuda.Launch(maps, "argmax", None, False, True, 11)
        assert launch.options["HOW"] & (wide | quick) == expected


@needs_triton
def test_how_maps_are_read_is_counted_as_in_the_kernels() -> None:
    ask = (
        "from hgfast.decoding import cuda, kernels\n"
        "for name in 'FLIP SHIFT MEAN FLAT WIDE QUICK'.split():\n"
        "    assert getattr(kernels, name).value == getattr(cuda, '_' + name), name\n"
    )
    subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True, timeout=120)


# ---- How they are called -------------------------------------------------------------------------

MAPS = torch.zeros(2, 3, 8, 8)
MATRIX = torch.zeros(2, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (MAPS[0], r"of shape \(batch, joints, height, width\), given \(3, 8, 8\)"),
        (MAPS[..., :0], r"with at least one row and column, given \(2, 3, 8, 0\)"),
        (MAPS.double(), "in float32, bfloat16 or float16, given float64"),
        (MAPS[:1, :1, :1, :1].expand(1, 1, 2**14, 2**13), "of fewer than 134217728 cells, given"),
    ],
)
def test_wrong_heatmaps(maps: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="hgfast::decode: expected heatmaps " + message):
        cuda.decode(maps, "quarter")
    with pytest.raises(ValueError, match=r"hgfast::decode\.topk: expected heatmaps " + message):
        cuda.decode_topk(maps, "quarter", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flipped": MAPS[:1]}, r"flipped like .*\(2, 3, 8, 8\).*, given \(1, 3, 8, 8\)"),
        ({"flipped": MAPS.half()}, "flipped like .* float32 on cpu, given .* float16 on cpu"),
        ({"flipped": MAPS.to("meta")}, "flipped like .* on cpu, given .* on meta"),
        ({"flipped": MAPS, "joints": [0, 1]}, "3 joints, one per map, with flipped, given 2"),
        ({"flipped": MAPS, "joints": [0, 3, 1]}, "joints from 0 to 2, given 3"),
        ({"flipped": MAPS, "joints": [0, -1, 1]}, "joints from 0 to 2, given -1"),
        ({"matrix": MATRIX[:1]}, r"matrix of shape \(2, 2, 3\), given \(1, 2, 3\)"),
        ({"matrix": MATRIX.float()}, "matrix in float64, given float32"),
        ({"matrix": MATRIX.to("meta")}, "matrix on cpu, given meta"),
        ({"blur": 10}, "an odd blur of at least 3 cells, given 10"),
        ({"blur": 1}, "an odd blur of at least 3 cells, given 1"),
    ],
)
def test_wrong_options(arguments: Request, message: str) -> None:
    with pytest.raises(ValueError, match="hgfast::decode: expected " + message):
        cuda.decode(MAPS, "quarter", **arguments)
    with pytest.raises(ValueError, match=r"hgfast::decode\.topk: expected " + message):
        cuda.decode_topk(MAPS, "quarter", 2, **arguments)


def test_wrong_methods_and_numbers() -> None:
    with pytest.raises(ValueError, match=r'method out of argmax, .*softargmax, given "half"'):
        cuda.decode(MAPS, "half")
    with pytest.raises(ValueError, match=r'method out of argmax, .*udp, given "megvii"'):
        cuda.decode_topk(MAPS, "megvii", 1)
    for beta in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match=f"a positive, finite beta, given {beta:g}"):
            cuda.decode(MAPS, "softargmax", beta=beta)
    with pytest.raises(ValueError, match="k of at least 1, given 0"):
        cuda.decode_topk(MAPS, "argmax", 0)
    with pytest.raises(ValueError, match="a window of 3 or 5, given 4"):
        cuda.decode_topk(MAPS, "argmax", 1, 4)


def test_without_triton_an_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"needs Triton, .*: pip install triton"):
        cuda.decode(MAPS, "argmax")


@needs_triton
def test_an_error_of_the_kernels_process_arrives_here(interpreted: Interpreted) -> None:
    with pytest.raises(ValueError, match="k of at least 1, given 0"):
        interpreted.decode_topk(MAPS, "argmax", 0)
    check(interpreted, {"maps": MAPS, "method": "argmax"})  # it is there still


def test_what_is_kept_is_made_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it may lie in the memory of a graph; what a pool of threads leaves behind ends, too."""
    threads, made = [], torch.tensor

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        threads.append(threading.get_ident())
        return made(*args, **kwargs)

    monkeypatch.setattr(cuda, "_kept", {})
    monkeypatch.setattr(torch, "tensor", make)
    running = threading.active_count()
    first, again = (cuda._numbers((2, 0, 1), torch.int32, MAPS.device) for _ in range(2))
    assert first is again
    assert first.tolist() == [2, 0, 1]
    assert threads != [threading.get_ident()]
    assert len(threads) == 1
    assert threading.active_count() == running


def test_importing_hgfast_imports_no_triton() -> None:
    ask = (
        "import sys, torch, hgfast, hgfast.ops\n"
        "hgfast.decode(torch.rand(1, 2, 8, 8), 'dark')\n"
        "assert 'triton' not in sys.modules\n"
        "assert 'hgfast.decoding.kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True, timeout=120)


@needs_native
def test_the_operators_know_them_once() -> None:
    """torch warns where a kernel replaces another; other ops have no kernel of this kind."""
    ask = (
        "import warnings\n"
        "warnings.simplefilter('error')\n"
        "import torch\n"
        "from hgfast import ops\n"
        "from hgfast.decoding import cuda\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert all(has(name, 'CUDA') for name in ('hgfast::decode', 'hgfast::decode.topk'))\n"
        "cuda.register()\n"
    )
    subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True, timeout=120)


@needs_native
def test_decode_runs_them_where_the_maps_are_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float32})()
    asked = hgfast.decoding.dispatch._has_kernel
    monkeypatch.delenv("HGFAST_DISABLE", raising=False)
    monkeypatch.setattr(cuda, "HAS_TRITON", True)
    assert asked(on_gpu)
    monkeypatch.setattr(cuda, "HAS_TRITON", False)
    assert not asked(on_gpu)
    assert asked(MAPS)
    monkeypatch.setattr(cuda, "HAS_TRITON", True)
    monkeypatch.setenv("HGFAST_DISABLE", "1")
    assert not asked(on_gpu)


# ---- What the compiler makes of them -------------------------------------------------------------

NEEDED = "needs Triton, and cuobjdump and nvdisasm (requirements-dev.txt)"


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    if importlib.util.find_spec("triton") is None or cuda_gates.disassembler() is None:
        pytest.skip(NEEDED)
    return triton_gates.examine_all()


def of(compiled: dict[str, dict[str, Any]], *words: str) -> dict[str, dict[str, Any]]:
    found = {
        name: kernel for name, kernel in compiled.items() if all(word in name for word in words)
    }
    assert found
    return found


def test_nothing_spills(compiled: dict[str, dict[str, Any]]) -> None:
    for name, kernel in compiled.items():
        assert kernel["stack"] == kernel["local"] == 0, name
        assert not [code for code in kernel["sass"] if code.startswith(("STL", "LDL"))], name


def test_registers_are_bounded(compiled: dict[str, dict[str, Any]]) -> None:
    """So that of a block of four warps four run at a time, of eight two, where maps are only
    searched."""
    for name, kernel in compiled.items():
        plain = name.startswith(("argmax,", "quarter,", "newell,", "princeton,", "msra,"))
        most = 128 if plain and "everything" not in name else 255
        assert kernel["registers"] <= most, name
        assert kernel["maxnreg"] == 255
        assert kernel["shared"] <= 32 * 1024, name


def test_the_blurs_products_and_sums_are_not_fused(compiled: dict[str, dict[str, Any]]) -> None:
    for name, kernel in compiled.items():
        assert not [code for code in kernel["ptx"] if code.startswith("fma.rn.f32")], name
        assert not kernel["enable_fp_fusion"]
    for method in ("dark", "udp", "megvii"):
        for kernel in of(compiled, method).values():
            assert [code for code in kernel["ptx"] if code.startswith("mul.rn.f32")]


def test_logarithms_and_quotients_are_float64(compiled: dict[str, dict[str, Any]]) -> None:
    """libdevice's logarithm is a polynomial in float64, not lg2.approx."""
    for name, kernel in compiled.items():
        codes = kernel["ptx"]
        assert not [code for code in codes if code.startswith("lg2")], name
        assert not [code for code in codes if code.startswith("div.") and "f32" in code], name
        if "dark" in name or "udp" in name:
            assert codes["fma.rn.f64"] >= 10, name
            assert codes["div.rn.f64"] >= 3, name
    for method, limits in {"dark": [1e-10], "udp": [1e-3, 50.0, 2.0**-23]}.items():
        for name, kernel in of(compiled, method).items():
            for limit in limits:
                bits = torch.tensor(limit, dtype=torch.float64).view(torch.int64).item()
                assert f"0d{bits:016X}" in kernel["constants"], f"{name}: {limit} is rounded"
                rounded = torch.tensor(limit).double().view(torch.int64).item()
                assert rounded == bits or f"0d{rounded:016X}" not in kernel["constants"], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contiguous_maps_are_read_16_bytes_at_a_time(
    compiled: dict[str, dict[str, Any]], dtype: str
) -> None:
    """And no cell's row is asked for: the two divisions left are those of a program."""
    loads = {"float32": 8, "bfloat16": 4}[dtype]  # of 4096 cells by 128 threads
    for name, kernel in of(compiled, f"argmax, contiguous {dtype}, sm_").items():
        if name.startswith("softargmax"):
            continue
        assert kernel["ptx"]["ld.global.v4.b32"] == loads, name
        others = [code for code in kernel["ptx"] if code.startswith("ld.global")]
        assert others == ["ld.global.v4.b32"], name
        assert sum(n for code, n in kernel["ptx"].items() if code.startswith("div.")) <= 2, name
        assert "mul.hi.u32" not in kernel["ptx"], name


def test_only_rows_are_divided_by_a_product(compiled: dict[str, dict[str, Any]]) -> None:
    """Where cells need their row, a division for each would be most of the kernel."""
    for name, kernel in of(compiled, "softargmax").items():
        assert kernel["ptx"]["mul.hi.u32"] >= 4, name
        assert sum(n for code, n in kernel["ptx"].items() if code.startswith("div.")) <= 4, name


def test_the_gates_see_a_fused_blur(tmp_path: Path) -> None:
    """That they close: the same kernel with fusing left on."""
    if importlib.util.find_spec("triton") is None or cuda_gates.disassembler() is None:
        pytest.skip(NEEDED)
    script = (
        "import json, sys, triton_gates\n"
        "from hgfast.decoding import cuda, kernels\n"
        "cuda._COMPILED = {'enable_fp_fusion': True, 'maxnreg': 64}\n"
        "kernels.decode_kernel = triton_gates.Catcher(kernels.decode_kernel)\n"
        "case = triton_gates.cases()['dark, contiguous float32']\n"
        "json.dump(triton_gates.compile_case(case, 90), sys.stdout)\n"
    )
    environment = triton_gates.environment(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    kernel = triton_gates.json.loads(done.stdout)
    assert kernel["ptx"]["fma.rn.f32"] > 0
    assert kernel["stack"] > 0
    assert [code for code in kernel["sass"] if code.startswith("STL")]
