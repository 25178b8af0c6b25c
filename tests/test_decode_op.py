"""hgfast::decode against a reference that reads one heatmap at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import LAYOUTS, decode_reference, generator, laid_out, native, needs_native

from hgfast import _native, ops

pytestmark = needs_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(0, 3),
    joints=st.integers(0, 5),
    height=st.integers(1, 20),
    width=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 5, 1000]),  # few levels: many equal values
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_any_heatmap(
    batch: int,
    joints: int,
    height: int,
    width: int,
    levels: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    values = torch.randint(-levels, levels + 1, (batch, joints, height, width),
                           generator=generator(seed))  # fmt: skip
    heatmaps = laid_out((values / levels).to(dtype), layout)
    coords, scores = ops.decode(heatmaps)
    expected_coords, expected_scores = decode_reference(heatmaps)
    assert coords.dtype == scores.dtype == torch.float32
    assert torch.equal(coords, expected_coords)
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peak_moves_towards_its_higher_neighbours(dtype: torch.dtype) -> None:
    heatmaps = torch.zeros(1, 1, 64, 48, dtype=dtype)
    heatmaps[0, 0, 20, 30] = 1
    heatmaps[0, 0, 20, 29] = 0.5
    heatmaps[0, 0, 21, 30] = 0.5
    coords, scores = ops.decode(heatmaps)
    assert coords.tolist() == [[[29.75, 20.25]]]
    assert scores.tolist() == [[1.0]]
    assert native.last_path().endswith("/decode")


@pytest.mark.parametrize(
    ("x", "y", "moves"),
    [(0, 5, False), (1, 5, False), (2, 5, True), (7, 5, True), (8, 5, True), (9, 5, False),
     (5, 0, False), (5, 1, False), (5, 2, True), (5, 8, True), (5, 9, False)],
)  # fmt: skip
def test_nothing_moves_at_the_border(x: int, y: int, moves: bool) -> None:
    heatmaps = torch.rand(1, 1, 10, 10, generator=generator(0)) * 0.5
    heatmaps[0, 0, y, x] = 1
    coords, _ = ops.decode(heatmaps)
    moved = coords[0, 0] - torch.tensor([float(x), float(y)])
    assert moved.abs().tolist() == ([0.25, 0.25] if moves else [0, 0])


def test_the_first_of_equals_wins() -> None:
    heatmaps = torch.zeros(1, 1, 40, 40)
    heatmaps[0, 0, 10, 33] = heatmaps[0, 0, 10, 20] = heatmaps[0, 0, 30, 3] = 1
    coords, _ = ops.decode(heatmaps)
    assert coords.tolist() == [[[20.0, 10.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_is_no_joint(dtype: torch.dtype, layout: str) -> None:
    heatmaps = torch.rand(1, 3, 33, 35, generator=generator(0)).to(dtype)
    heatmaps[0, :, 8, 7] = 2
    heatmaps[0, 1, 32, 34] = torch.nan
    coords, scores = ops.decode(laid_out(heatmaps, layout))
    assert coords[0, 1].tolist() == [0, 0]
    assert scores[0, 1].isnan()
    assert scores[0, [0, 2]].tolist() == [2, 2]
    assert (coords[0, [0, 2]] > 6).all()


@pytest.mark.parametrize("value", [0.0, -0.5, -torch.inf])
def test_without_a_positive_value_a_joint_is_invisible(value: float) -> None:
    coords, scores = ops.decode(torch.full((1, 2, 8, 8), value))
    assert coords.tolist() == [[[0, 0], [0, 0]]]
    assert scores.tolist() == [[value, value]]


def test_infinity_is_a_peak() -> None:
    heatmaps = torch.zeros(1, 1, 8, 8)
    heatmaps[0, 0, 4, 5] = torch.inf
    coords, scores = ops.decode(heatmaps)
    assert coords.tolist() == [[[5, 4]]]
    assert scores.tolist() == [[torch.inf]]


@pytest.mark.parametrize(
    ("shape", "dtype", "method", "message"),
    [
        ((3, 8, 8), torch.float32, "quarter", r"heatmaps of shape \(batch, joints.*\[3, 8, 8\]"),
        ((1, 3, 0, 8), torch.float32, "quarter", r"one row and column, given \[1, 3, 0, 8\]"),
        ((1, 3, 8, 8), torch.float64, "quarter", r"float32, bfloat16 or float16, given Double"),
        ((1, 3, 8, 8), torch.uint8, "quarter", r"float32, bfloat16 or float16, given Byte"),
        ((1, 3, 8, 8), torch.float32, "half", r'expected the method "quarter", given "half"'),
    ],
)
def test_wrong_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, method: str, message: str
) -> None:
    with pytest.raises(ValueError, match="hgfast::decode: .*" + message):
        ops.decode(torch.zeros(shape, dtype=dtype), method)


def test_without_the_compiled_part_an_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_available", False)
    monkeypatch.setattr(_native, "reason", "no compiled kernels: a test removed them")
    with pytest.raises(RuntimeError, match="not available: no compiled kernels: a test removed"):
        ops.decode(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    heatmaps = torch.rand(2, 3, 6, 7, generator=generator(0)).to(dtype)
    torch.library.opcheck(torch.ops.hgfast.decode.default, (heatmaps, "quarter"))


def test_compiles_whole() -> None:
    heatmaps = torch.rand(1, 3, 8, 8, generator=generator(0))
    compiled = torch.compile(lambda h: ops.decode(h)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(heatmaps), ops.decode(heatmaps)[0] + 1)
