"""hgfast::stem on a CPU against plain PyTorch, and what compilers are told of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    assert_close_bfloat16,
    assert_close_float32,
    is_channels_last,
    needs_native,
)
from stem_checks import PIXELS, image_of, stem_reference, stem_weights

from hgfast import ops

pytestmark = needs_native


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    out=st.sampled_from([1, 16, 24]),
    pixel=st.sampled_from(PIXELS),
    normalised=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(
    batch: int,
    height: int,
    width: int,
    out: int,
    pixel: torch.dtype,
    normalised: bool,
    layout: str,
) -> None:
    w = stem_weights(out, dtype=pixel if normalised else None)
    x = image_of(batch, height, width, dtype=pixel, layout=layout)
    y = ops.stem(x, **w, dtype=torch.float32)
    assert is_channels_last(y)
    exact = stem_reference(x, w, torch.float64)
    assert_close_float32(y, exact)
    half = ops.stem(x, **w, dtype=torch.bfloat16)
    assert is_channels_last(half)
    assert_close_bfloat16(half, stem_reference(x, w, torch.bfloat16), exact)


def test_the_padding_is_not_normalised() -> None:
    """Zeros behind the normalisation: a black border would be `shift` there."""
    w = stem_weights(4, dtype=torch.float32)
    w["bias"] = torch.full((4,), 100.0)  # so that no ReLU hides anything
    x = torch.zeros(1, 3, 9, 9)
    inside = w["weight"][:, :, 3:, 3:].mul(w["shift"][:, None, None]).sum((1, 2, 3))
    torch.testing.assert_close(ops.stem(x, **w)[0, :, 0, 0], inside + 100)


def test_the_dtype_of_the_result() -> None:
    w = stem_weights(16)
    expected = {torch.uint8: torch.bfloat16}
    for pixel in PIXELS:
        x = image_of(1, 5, 5, dtype=pixel)
        assert ops.stem(x, **w).dtype == expected.get(pixel, pixel)
        assert ops.stem(x, **w, dtype=torch.float16).dtype == torch.float16


def test_float16_is_rounded_once() -> None:
    """The sums are those of float32; beside rounding there is no error to be seen."""
    w = stem_weights(16)
    w["weight"] = w["weight"].half()
    x = image_of(2, 19, 23, dtype=torch.float16)
    exact = stem_reference(x, w, torch.float64)
    assert ((ops.stem(x, **w).double() - exact).abs() <= 2**-11 * exact + 1e-5).all()


X, W = torch.zeros(1, 3, 5, 5), stem_weights(16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"expected x of shape \(batch, channels, height, width\)"),
        ({"x": X[:, :1]}, r"expected x of shape \(batch, 3, height, width\), given \[1, 1, 5, 5\]"),
        ({"x": X.double()}, "expected x in uint8, float32, bfloat16 or float16, given Double"),
        ({"x": X[:, :, :0]}, "at least one channel, row and column"),
        ({"weight": torch.zeros(16, 3, 3, 3)}, r"expected weight of shape \[16, 3, 7, 7\]"),
        ({"weight": torch.zeros(16)}, r"expected weight of shape \(out, 3, 7, 7\), given \[16\]"),
        ({"bias": torch.zeros(3)}, r"expected bias of shape \[16\], given \[3\]"),
        ({"scale": torch.ones(3)}, "expected both scale and shift or neither"),
        ({"scale": torch.ones(1), "shift": torch.ones(1)}, r"expected scale of shape \[3\]"),
        ({"dtype": torch.int32}, "expected a result in float32, bfloat16 or float16, asked for"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"hgfast::stem: .*{message}"):
        ops.stem(**{"x": X, **W, **change})


@pytest.mark.parametrize("pixel", [torch.uint8, torch.float32])
def test_compilers_see_it(pixel: torch.dtype) -> None:
    w = stem_weights(16, dtype=pixel)
    x = image_of(2, 9, 6, dtype=pixel)
    arguments = (x, *(w[name] for name in ("weight", "bias", "scale", "shift")))
    torch.library.opcheck(torch.ops.hgfast.stem.default, arguments, {"dtype": torch.bfloat16})
    compiled = torch.compile(ops.stem, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, **w), ops.stem(x, **w))
