"""The operators that hgfast registers with PyTorch, as Python functions.

Each is also ``torch.ops.hgfast.<name>``, seen by torch.compile and torch.export, and has a fake
kernel that knows the result's shape and strides. They are the plain way in: weights are checked
and packed at every call. ``hgfast.optimize`` packs them once.

All of them are for inference: they have no gradient.

Feature maps are ``(batch, channels, height, width)``, of any strides: float32 or bfloat16 on a CPU;
bfloat16 or float16 on a GPU, where ``bottleneck`` needs channels in multiples of 16 and
``upsample_add`` in multiples of 8. Results are channels_last, in the dtype of the input; a batch of
0 works. Weights are float32, bfloat16 or float16, on the same device. Sums are accumulated in
float32. NaN and infinity travel as they do in PyTorch.

A BatchNorm becomes ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale`` where it
stands before a ReLU that starts a block; a BatchNorm right behind a convolution is folded into it
(weight and bias times scale, plus shift).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hgfast import _native

__all__ = ["bottleneck", "conv", "decode", "upsample_add"]

_available = _native.load() is not None


def _require() -> None:
    if not _available:
        raise RuntimeError(f"hgfast's operators are not available: {_native.reason}")


def bottleneck(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    wp: Tensor | None = None,
    bp: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """The pre-activation residual block, in one pass over memory.

    With ``relu`` and convolutions as in ``torch.nn.functional``::

        t = relu(scale * x + shift)
        t = relu(conv1x1(t, w1) + b1)
        t = relu(conv3x3(t, w2, padding=1) + b2)
        y = conv1x1(t, w3) + b3 + shortcut
        y = y + upsample_nearest(low, 2)          # if low is given

    The shortcut is ``x``, or ``conv1x1(x, wp) + bp``. The BatchNorms before the second and the
    third convolution are folded into the first and the second. The block is that of He et al.,
    "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027), as Newell et al. use it in
    "Stacked Hourglass Networks" (arXiv 1603.06937).

    Args:
        x: the input, ``(batch, in, height, width)``.
        scale, shift: the first BatchNorm, ``(in,)``.
        w1, b1: ``(middle, in, 1, 1)`` and ``(middle,)``.
        w2, b2: ``(middle, middle, 3, 3)`` and ``(middle,)``.
        w3, b3: ``(out, middle, 1, 1)`` and ``(out,)``.
        wp, bp: the projection, ``(out, in, 1, 1)`` and ``(out,)``; needed where in != out.
        low: a map of half the size to enlarge and add, ``(batch, out, height / 2, width / 2)``,
            in the dtype of ``x``; height and width must then be even.

    Returns:
        ``(batch, out, height, width)``, channels_last, in the dtype of ``x``.

    Raises:
        ValueError: a shape or dtype is not as above; the message tells the expected and the given.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    result: Tensor = torch.ops.hgfast.bottleneck(
        x, scale, shift, w1, b1, w2, b2, w3, b3, wp, bp, low
    )
    return result


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    relu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """A convolution, with what surrounds it in a pose network done on the way.

    With ``conv2d`` and ``relu`` as in ``torch.nn.functional``::

        t = relu(scale * x + shift)               # if scale and shift are given, else x
        y = conv2d(t, weight, bias, stride, padding)
        y = relu(y)                               # if relu
        y = y + add                               # if add is given

    Zero padding applies after the first line.

    Args:
        x: the input, ``(batch, in, height, width)``.
        weight, bias: ``(out, in, kernel height, kernel width)`` and ``(out,)``. A BatchNorm behind
            the convolution is folded into them.
        scale, shift: a BatchNorm before it, ``(in,)`` each; both or neither.
        stride, padding: one number, or one for the height and one for the width.
        relu: whether a ReLU follows.
        add: a map of the result's shape and dtype, added last.

    Returns:
        ``(batch, out, out_height, out_width)``, channels_last, in the dtype of ``x``, where
        ``out_height = (height + 2 * padding - kernel) // stride + 1``, the width likewise.

    Raises:
        ValueError: a shape or dtype is not as above; the message tells the expected and the given.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    result: Tensor = torch.ops.hgfast.conv(
        x, weight, bias, scale, shift, stride, padding, relu, add
    )
    return result


def upsample_add(low: Tensor | Sequence[Tensor], skip: Tensor, relu: bool = False) -> Tensor:
    """``skip + upsample_nearest(low, 2)``: the way up in an hourglass, in one pass.

    With several maps, each is enlarged onto ``skip`` by its own factor and all are added, in
    float32 and in this order; ``relu`` clamps the sum at 0. That is the fusion of resolutions in
    HRNet (Sun et al., arXiv 1902.09212).

    Args:
        low: ``(batch, channels, height / 2, width / 2)``, or one to four maps
            ``(batch, channels, height / n, width / n)`` with ``n`` of 1, 2, 4 or 8 for each.
        skip: ``(batch, channels, height, width)``, in the same dtype; height and width are
            multiples of every ``n``.
        relu: whether a ReLU follows.

    Returns:
        ``(batch, channels, height, width)``, channels_last, in the same dtype.

    Raises:
        ValueError: the shapes or dtypes do not fit; the message tells the expected and the given.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    if not isinstance(low, Tensor):
        result: Tensor = torch.ops.hgfast.upsample_add.maps(list(low), skip, relu)
        return result
    result = torch.ops.hgfast.upsample_add(low, skip)
    return result.relu_() if relu else result


def decode(heatmaps: Tensor, method: str = "quarter") -> tuple[Tensor, Tensor]:
    """Joint coordinates and scores from heatmaps.

    ``"quarter"`` moves a quarter of a pixel towards the higher neighbour, as Newell et al. do
    (arXiv 1603.06937), with the bounds of Simple Baselines' and HRNet's public code: a joint is at
    the heatmap's maximum (the first of equals, row by row), moved in x and in y where
    ``1 < x < width - 1`` and ``1 < y < height - 1``, and nowhere else. A heatmap
    without a positive value is an invisible joint: coordinates (0, 0), score as it is. With a NaN
    in it: coordinates (0, 0), score NaN.

    Args:
        heatmaps: ``(batch, joints, height, width)``; float32, bfloat16 or float16; any strides.
        method: ``"quarter"``.

    Returns:
        ``coords``, ``(batch, joints, 2)``, float32: (x, y) in heatmap pixels, the first pixel's
        centre at (0, 0); ``scores``, ``(batch, joints)``, float32: the maxima.

    Raises:
        ValueError: not four dimensions, an empty map, another dtype, or an unknown method.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    coords, scores = torch.ops.hgfast.decode(heatmaps, method)
    return coords, scores


# Fake kernels: what torch.compile and torch.export know of the results.


def _map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _fake_bottleneck(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    wp: Tensor | None = None,
    bp: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    return _map(x, w3.shape[0], x.shape[2], x.shape[3])


def _fake_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    relu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    height, width = (
        (size + 2 * around - kernel) // step + 1
        for size, around, kernel, step in zip(
            x.shape[2:], padding, weight.shape[2:], stride, strict=True
        )
    )
    return _map(x, weight.shape[0], height, width)


def _fake_upsample_add(low: Tensor, skip: Tensor) -> Tensor:
    return _map(skip, skip.shape[1], skip.shape[2], skip.shape[3])


def _fake_upsample_add_maps(low: list[Tensor], skip: Tensor, relu: bool = False) -> Tensor:
    return _map(skip, skip.shape[1], skip.shape[2], skip.shape[3])


def _fake_decode(heatmaps: Tensor, method: str) -> tuple[Tensor, Tensor]:
    batch, joints = heatmaps.shape[:2]
    return (
        heatmaps.new_empty((batch, joints, 2), dtype=torch.float32),
        heatmaps.new_empty((batch, joints), dtype=torch.float32),
    )


if _available:
    torch.library.register_fake("hgfast::bottleneck", _fake_bottleneck)
    torch.library.register_fake("hgfast::conv", _fake_conv)
    torch.library.register_fake("hgfast::upsample_add", _fake_upsample_add)
    torch.library.register_fake("hgfast::upsample_add.maps", _fake_upsample_add_maps)
    torch.library.register_fake("hgfast::decode", _fake_decode)
