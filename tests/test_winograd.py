"""3x3 convolutions by Winograd's tiles: what they lose, whatever the shape.

The judge is float64. What float32 may lose is taken relative to the magnitudes that pass through
the algorithm, since it multiplies sums of neighbours: with |.| of every matrix,

    |A'| [(|G| |g| |G'|) * (|B'| |d| |B|)] |A|

(Lavin and Gray, arXiv:1509.09308, with absolute values). Rounding errors of a product are at most
one half unit in the last place for each addition on its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    LAYOUTS,
    assert_close_float32,
    bottleneck_reference,
    bottleneck_weights,
    cast,
    conv_reference,
    conv_weights,
    native,
    needs_native,
    random_map,
)
from torch import Tensor

pytestmark = needs_native

ULP = 2.0**-24
#: The matrices B' and A' of Winograd.input and .output, and G, for tiles of 2x2 and 4x4.
MATRICES = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
        [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
    ),
    4: (
        [
            [1, 1.5, -2, -1.5, 1, 0],
            [0, -1, -2.5, -0.5, 1, 0],
            [0, 1, 0.5, -2.5, 1, 0],
            [0, -0.5, -1, 0.5, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 1, 1.5, -2, -1.5, 1],
        ],
        [
            [1, 1, 1, 1, 1, 0],
            [0, 1, -1, 2, -0.5, 0],
            [0, 1, 1, 4, 0.25, 0],
            [0, 1, -1, 8, -0.125, 1],
        ],
        [
            [1, 0, 0],
            [-1 / 3, -1 / 3, -1 / 3],
            [1 / 3, -1 / 3, 1 / 3],
            [1 / 15, 2 / 15, 4 / 15],
            [-16 / 15, 8 / 15, -4 / 15],
            [0, 0, 1],
        ],
    ),
}  # fmt: skip


def winograd(
    x: Tensor, weight: Tensor, padding: tuple[int, int], side: int, absolute: bool
) -> Tensor:
    """The algorithm in float64; with absolute values of everything, or as it is."""
    b, a, g = (torch.tensor(m, dtype=torch.float64) for m in MATRICES[side])
    x, weight = x.double(), weight.double()
    if absolute:
        b, a, g, x, weight = b.abs(), a.abs(), g.abs(), x.abs(), weight.abs()
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    n = side + 2
    beyond_h, beyond_w = -height % side, -width % side
    x = F.pad(x, (padding[1], padding[1] + beyond_w, padding[0], padding[0] + beyond_h))
    tiles = x.unfold(2, n, side).unfold(3, n, side)
    v = torch.einsum("ij,bcyxjk,lk->bcyxil", b, tiles, b)
    u = torch.einsum("ij,ocjk,lk->ocil", g, weight, g)
    products = torch.einsum("bcyxil,ocil->boyxil", v, u)
    y = torch.einsum("ij,boyxjk,lk->boyxil", a, products, a)
    whole = y.permute(0, 1, 2, 4, 3, 5).reshape(len(x), len(weight), height + beyond_h, -1)
    return whole[:, :, :height, :width]


def conv(x: Tensor, high: bool, *, add: Tensor | None = None, **arguments: Any) -> Tensor:
    plan = native.CpuPlan("float32", high=high)
    inputs = [x] if add is None else [x, add]
    plan.conv(0, len(inputs), **arguments, add=None if add is None else 1)
    plan.finish(list(range(len(inputs))), [len(inputs)])
    result: Tensor = plan.run(inputs)[0]
    return result


by_precision = pytest.mark.parametrize(
    ("high", "side"),
    [
        pytest.param(False, 2, id="highest"),
        pytest.param(
            True,
            4,
            id="high",
            marks=pytest.mark.skipif(
                native is None or native.CpuPlan("float32", high=True).products != "winograd",
                reason='"high" has faster products here',
            ),
        ),
    ],
)


@pytest.mark.parametrize("side", MATRICES)
@pytest.mark.parametrize("size", [(1, 1), (4, 6), (7, 9)])
def test_the_matrices_make_a_convolution(side: int, size: tuple[int, int]) -> None:
    x = random_map(2, 3, *size).double()
    weight = conv_weights(3, 5, (3, 3))["weight"].double()
    y = winograd(x, weight, (1, 1), side, absolute=False)
    assert torch.allclose(y, F.conv2d(x, weight, padding=1), rtol=0, atol=1e-12)


@by_precision
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 21),
    width=st.integers(1, 40),
    channels=st.sampled_from([15, 16, 20, 33, 64]),
    out=st.sampled_from([5, 16, 17, 40, 64]),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    layout=st.sampled_from(LAYOUTS),
)
def test_what_a_convolution_loses(
    high: bool,
    side: int,
    batch: int,
    height: int,
    width: int,
    channels: int,
    out: int,
    padding: tuple[int, int],
    layout: str,
) -> None:
    height, width = max(height, 3 - 2 * padding[0]), max(width, 3 - 2 * padding[1])
    x = random_map(batch, channels, height, width, layout=layout)
    w = conv_weights(channels, out, (3, 3))
    y = conv(x, high, **w, padding=padding)
    true = F.conv2d(x.double(), w["weight"].double(), w["bias"].double(), padding=padding)
    magnitude = winograd(x, w["weight"], padding, side, absolute=True)
    direct = F.conv2d(x.double().abs(), w["weight"].double().abs(), padding=padding)
    # Additions on a product's way: `channels` of the sum, and at most 40 of the transforms.
    magnitude = torch.maximum(magnitude, direct) + w["bias"].double().abs()[:, None, None]
    assert ((y.double() - true).abs() <= (channels + 40) * ULP * magnitude).all()


@by_precision
def test_what_is_lost_as_a_rule(high: bool, side: int) -> None:
    """Of a map of normal values, and that tiles were used: the direct sum's bits are others."""
    x, w = random_map(1, 128, 32, 32), conv_weights(128, 128, (3, 3))
    true = F.conv2d(x.double(), w["weight"].double(), w["bias"].double(), padding=1)

    def error(y: Tensor) -> float:
        return float((y.double() - true).norm() / true.norm())

    direct = error(F.conv2d(x, w["weight"], w["bias"], padding=1))
    lost = error(conv(x, high, **w, padding=(1, 1)))
    assert direct < lost < {2: 6e-7, 4: 3e-6}[side]


@by_precision
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 20),
    width=st.integers(1, 36),
    channels=st.sampled_from([16, 24, 40]),
    out=st.sampled_from([16, 33]),
    norm=st.booleans(),
    relu=st.booleans(),
    relu_sum=st.booleans(),
    plus=st.booleans(),
)
def test_what_stands_around_a_convolution(
    high: bool,
    side: int,
    batch: int,
    height: int,
    width: int,
    channels: int,
    out: int,
    norm: bool,
    relu: bool,
    relu_sum: bool,
    plus: bool,
) -> None:
    x, w = (
        random_map(batch, channels, height, width),
        conv_weights(channels, out, (3, 3), norm=norm),
    )
    add = random_map(batch, out, height, width, seed=2) if plus else None
    reference = conv_reference(
        x.double(),
        cast(w, torch.float64),
        padding=1,
        relu=relu,
        add=None if add is None else add.double(),
        relu_sum=relu_sum,
    )
    y = conv(x, high, **w, padding=(1, 1), relu=relu, add=add, relu_sum=relu_sum)
    assert_close_float32(y, reference)


@by_precision
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 24),
    width=st.integers(1, 70),
    channels=st.sampled_from([16, 40]),
    middle=st.sampled_from([15, 16, 36]),
    project=st.booleans(),
    upsampled=st.booleans(),
    relu=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_block(
    high: bool,
    side: int,
    batch: int,
    height: int,
    width: int,
    channels: int,
    middle: int,
    project: bool,
    upsampled: bool,
    relu: bool,
    threads: int,
) -> None:
    if upsampled:
        height, width = 2 * -(-height // 2), 2 * -(-width // 2)
    w = bottleneck_weights(channels, middle, channels, project=project)
    inputs = [random_map(batch, channels, height, width)]
    if upsampled:
        inputs.append(random_map(batch, channels, height // 2, width // 2, seed=2))
    plan = native.CpuPlan("float32", high=high)
    plan.bottleneck(0, 2, **w, relu=relu, **({"low": 1} if upsampled else {}))
    plan.finish(list(range(len(inputs))), [2])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        (y,) = plan.run(inputs)
    finally:
        torch.set_num_threads(before)
    low = inputs[1].double() if upsampled else None
    reference = bottleneck_reference(inputs[0].double(), cast(w, torch.float64), low, relu)
    assert_close_float32(y, reference)


@by_precision
@pytest.mark.parametrize("size", [(12, 20), (6, 150), (16, 16)])
def test_bits_depend_on_the_image_alone(high: bool, side: int, size: tuple[int, int]) -> None:
    """Neither on the batch it is in nor on the number of threads."""
    x = random_map(3, 32, *size)
    w, block = conv_weights(32, 80, (3, 3)), bottleneck_weights(32, 24, 32)
    plan = native.CpuPlan("float32", high=high)
    plan.conv(0, 1, **w, padding=(1, 1))
    plan.bottleneck(0, 2, **block)
    plan.finish([0], [1, 2])

    def results() -> Iterator[list[Tensor]]:
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                yield plan.run([x])
                yield [torch.cat(y) for y in zip(*(plan.run([i[None]]) for i in x), strict=True)]
        finally:
            torch.set_num_threads(before)

    first, *others = results()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@by_precision
def test_a_nan_stays_in_its_tiles(high: bool, side: int) -> None:
    """With tiles of 2x2 it goes where it goes in PyTorch."""
    x, w = random_map(1, 16, 16, 16), conv_weights(16, 16, (3, 3))
    x[0, 3, 6, 9] = torch.nan
    found = conv(x, high, **w, padding=(1, 1)).isnan().any(1)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[5:8, 8:11] = True
    assert (found | ~expected).all(), "a NaN got lost"
    if side == 2:
        assert torch.equal(found, expected)
    else:
        reached = torch.zeros_like(expected)
        reached[4:8, 8:12] = True  # the tile of the window's pixels
        assert (reached | ~found).all(), "a NaN left its tile"
