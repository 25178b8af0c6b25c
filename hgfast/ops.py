"""The operators that hgfast registers with PyTorch, as Python functions.

Each is also ``torch.ops.hgfast.<name>``, seen by torch.compile and torch.export, and has a fake
kernel that knows the result's shape and strides. They are the plain way in: weights are checked
and packed at every call. ``hgfast.optimize`` packs them once.

All of them are for inference: they have no gradient.

Feature maps are ``(batch, channels, height, width)``, of any strides: float32 or bfloat16 on a CPU;
bfloat16 or float16 on a GPU, where ``bottleneck`` needs channels in multiples of 16 and
``upsample_add`` in multiples of 8; ``stem`` and ``decode`` say what they take. Results are
channels_last, in the dtype of the input; a batch of 0 works. Weights are float32, bfloat16 or
float16, on the same device. Sums are accumulated in float32. NaN and infinity travel as they do in
PyTorch.

A BatchNorm becomes ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale`` where it
stands before a ReLU that starts a block; a BatchNorm right behind a convolution is folded into it
(weight and bias times scale, plus shift).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hgfast import _native
from hgfast.decoding import cuda

__all__ = ["bottleneck", "conv", "decode", "decode_topk", "stem", "upsample_add"]

_available = _native.load() is not None


def is_available() -> bool:
    """Whether hgfast's compiled part, which defines the operators, is there."""
    return _available


def _require() -> None:
    if not _available:
        raise RuntimeError(f"hgfast's operators are not available: {_native.reason}")


def bottleneck(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    wp: Tensor | None = None,
    bp: Tensor | None = None,
    low: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The bottleneck residual block, in one pass over memory.

    With ``relu`` and convolutions as in ``torch.nn.functional``::

        t = relu(scale * x + shift)               # if scale and shift are given, else x
        t = relu(conv1x1(t, w1) + b1)
        t = relu(conv3x3(t, w2, padding=1) + b2)
        y = conv1x1(t, w3) + b3 + shortcut
        y = relu(y)                               # if relu
        y = y + upsample_nearest(low, 2)          # if low is given

    The shortcut is ``x``, or ``conv1x1(x, wp) + bp``. Every other BatchNorm is folded into the
    convolution before it. With scale and shift the block is that of He et al., "Identity Mappings
    in Deep Residual Networks" (arXiv 1603.05027), as Newell et al. use it in "Stacked Hourglass
    Networks" (arXiv 1603.06937). Without them and with ``relu`` it is that of "Deep Residual
    Learning for Image Recognition" (arXiv 1512.03385).

    Args:
        x: the input, ``(batch, in, height, width)``.
        scale, shift: a BatchNorm before the block, ``(in,)`` each; both or neither.
        w1, b1: ``(middle, in, 1, 1)`` and ``(middle,)``.
        w2, b2: ``(middle, middle, 3, 3)`` and ``(middle,)``.
        w3, b3: ``(out, middle, 1, 1)`` and ``(out,)``.
        wp, bp: the projection, ``(out, in, 1, 1)`` and ``(out,)``; needed where in != out.
        low: a map of half the size to enlarge and add, ``(batch, out, height / 2, width / 2)``,
            in the dtype of ``x``; height and width must then be even.
        relu: whether the block ends in a ReLU.

    Returns:
        ``(batch, out, height, width)``, channels_last, in the dtype of ``x``.

    Raises:
        ValueError: a shape or dtype is not as above; the message tells the expected and the given.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    result: Tensor = torch.ops.hgfast.bottleneck(
        x, scale, shift, w1, b1, w2, b2, w3, b3, wp, bp, low, relu
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
    dilation: int | Sequence[int] = 1,
    relu_sum: bool = False,
) -> Tensor:
    """A convolution, with what surrounds it in a pose network done on the way.

    With ``conv2d`` and ``relu`` as in ``torch.nn.functional``::

        t = relu(scale * x + shift)               # if scale and shift are given, else x
        y = conv2d(t, weight, bias, stride, padding, dilation)
        y = relu(y)                               # if relu
        y = y + add                               # if add is given
        y = relu(y)                               # if relu_sum

    Zero padding applies after the first line.

    Args:
        x: the input, ``(batch, in, height, width)``.
        weight, bias: ``(out, in, kernel height, kernel width)`` and ``(out,)``. A BatchNorm behind
            the convolution is folded into them.
        scale, shift: a BatchNorm before it, ``(in,)`` each; both or neither.
        stride, padding: one number, or one for the height and one for the width.
        relu: whether a ReLU follows.
        add: a map of the result's shape and dtype, added last.
        dilation: one number, or one for the height and one for the width.
        relu_sum: whether a ReLU follows the sum.

    Returns:
        ``(batch, out, out_height, out_width)``, channels_last, in the dtype of ``x``, where
        ``out_height = (height + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1``, the
        width likewise.

    Raises:
        ValueError: a shape or dtype is not as above; the message tells the expected and the given.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    result: Tensor = torch.ops.hgfast.conv(
        x, weight, bias, scale, shift, stride, padding, relu, add, dilation, relu_sum
    )
    return result


def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The convolution that networks begin with, from the image as it was read.

    With ``relu`` and ``conv2d`` as in ``torch.nn.functional``::

        t = scale * x + shift                     # if scale and shift are given, else x
        y = relu(conv2d(t, weight, bias, stride=2, padding=3))

    The padding is zeros behind the first line, as in a network that is given normalised images. On
    a GPU all of it is one pass over memory. ``t`` and the weight are rounded to the dtype of the
    result, sums are of float32.

    For bytes from a file and the mean and deviation of ``torchvision.transforms.Normalize``,
    ``scale = 1 / (255 * deviation)`` and ``shift = -mean / deviation``; the image's bytes as they
    lie in memory are ``torch.from_numpy(image)[None].permute(0, 3, 1, 2)``.

    Args:
        x: images, ``(batch, 3, height, width)``; uint8, float32, bfloat16 or float16; any strides.
        weight, bias: ``(out, 3, 7, 7)`` and ``(out,)``. A BatchNorm behind the convolution is
            folded into them. On a GPU ``out`` is a multiple of 16 up to 64.
        scale, shift: of the normalisation, ``(3,)`` each; both or neither.
        dtype: of the result: float32 (on a CPU), bfloat16 or float16. By default that of ``x``, and
            bfloat16 where it is uint8.

    Returns:
        ``(batch, out, (height + 1) // 2, (width + 1) // 2)``, channels_last, in ``dtype``.

    Raises:
        ValueError: a shape or dtype is not as above; the message tells the expected and the given.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    result: Tensor = torch.ops.hgfast.stem(x, weight, bias, scale, shift, dtype)
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


def decode(
    heatmaps: Tensor,
    method: str = "quarter",
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
) -> tuple[Tensor, Tensor]:
    """Joint coordinates and scores from heatmaps, in one pass over them.

    What is behind ``hgfast.decode``, which is the comfortable way in. The formulas of the methods,
    of merging and of the way into the image stand in :mod:`hgfast.decoding.reference`, which has a
    function of the same signature in plain PyTorch. On a CPU the kernels are compiled, on a GPU
    they are Triton's.

    Args:
        heatmaps: ``(batch, joints, height, width)``; float32, bfloat16 or float16; any strides.
        method: ``"argmax"``, ``"quarter"``, ``"newell"``, ``"princeton"``, ``"msra"``, ``"dark"``,
            ``"udp"``, ``"megvii"`` or ``"softargmax"``.
        flipped: heatmaps of the mirrored image, of the same shape and dtype, any strides.
        joints: for each joint the map of ``flipped`` that shows it; needed with ``flipped``.
        shift: move what is mirrored back one column to the right, column 0 kept.
        mean: whether the mean of both is decoded, or else their sum.
        matrix: ``(batch, 2, 3)``, float64, from heatmap cells to the image.
        origin_x, origin_y: what is subtracted from a cell first.
        truncate: whether the fraction of image coordinates is cut off.
        blur: the Gaussian's size in cells for dark, udp and megvii; odd, at least 3.
        beta: the factor of softargmax; positive.

    Returns:
        ``coords``, ``(batch, joints, 2)``, float32, (x, y); ``scores``, ``(batch, joints)``,
        float32.

    Raises:
        ValueError: a shape, dtype or number is not as above; the message tells the expected and the
            given.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    coords, scores = torch.ops.hgfast.decode(
        heatmaps, method, flipped, joints, shift, mean, matrix, origin_x, origin_y, truncate, blur,
        beta,
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
) -> tuple[Tensor, Tensor]:
    """The k highest peaks of each heatmap: ``torch.ops.hgfast.decode.topk``.

    A peak is a positive cell that no cell of the ``window`` x ``window`` around it exceeds. They
    are ordered by value, equal ones by row and column; where there are fewer, the rest score 0.

    Args:
        heatmaps: as for :func:`decode`.
        method: one of its methods, but not ``"megvii"`` or ``"softargmax"``.
        k: how many; at least 1.
        window: 3 or 5.
        flipped, joints, shift, mean, matrix, origin_x, origin_y, truncate, blur: as for
            :func:`decode`.

    Returns:
        ``coords``, ``(batch, joints, k, 2)``, and ``scores``, ``(batch, joints, k)``, float32.

    Raises:
        ValueError: a shape, dtype or number is not as above; the message tells the expected and the
            given.
        RuntimeError: hgfast was installed without its compiled part.
    """
    _require()
    coords, scores = torch.ops.hgfast.decode.topk(
        heatmaps, method, k, window, flipped, joints, shift, mean, matrix, origin_x, origin_y,
        truncate, blur,
    )  # fmt: skip
    return coords, scores


# Fake kernels: what torch.compile and torch.export know of the results.


def _map(
    like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _fake_bottleneck(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    wp: Tensor | None = None,
    bp: Tensor | None = None,
    low: Tensor | None = None,
    relu: bool = False,
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
    dilation: Sequence[int] = (1, 1),
    relu_sum: bool = False,
) -> Tensor:
    height, width = (
        (size + 2 * around - apart * (kernel - 1) - 1) // step + 1
        for size, around, kernel, step, apart in zip(
            x.shape[2:], padding, weight.shape[2:], stride, dilation, strict=True
        )
    )
    return _map(x, weight.shape[0], height, width)


def _fake_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if dtype is None:
        dtype = torch.bfloat16 if x.dtype == torch.uint8 else x.dtype
    height, width = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    return _map(x, weight.shape[0], height, width, dtype)


def _fake_upsample_add(low: Tensor, skip: Tensor) -> Tensor:
    return _map(skip, skip.shape[1], skip.shape[2], skip.shape[3])


def _fake_upsample_add_maps(low: list[Tensor], skip: Tensor, relu: bool = False) -> Tensor:
    return _map(skip, skip.shape[1], skip.shape[2], skip.shape[3])


def _fake_decode(heatmaps: Tensor, method: str, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch, joints = heatmaps.shape[:2]
    return (
        heatmaps.new_empty((batch, joints, 2), dtype=torch.float32),
        heatmaps.new_empty((batch, joints), dtype=torch.float32),
    )


def _fake_decode_topk(
    heatmaps: Tensor, method: str, k: int, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    batch, joints = heatmaps.shape[:2]
    return (
        heatmaps.new_empty((batch, joints, k, 2), dtype=torch.float32),
        heatmaps.new_empty((batch, joints, k), dtype=torch.float32),
    )


if _available:
    torch.library.register_fake("hgfast::bottleneck", _fake_bottleneck)
    torch.library.register_fake("hgfast::conv", _fake_conv)
    torch.library.register_fake("hgfast::stem", _fake_stem)
    torch.library.register_fake("hgfast::upsample_add", _fake_upsample_add)
    torch.library.register_fake("hgfast::upsample_add.maps", _fake_upsample_add_maps)
    torch.library.register_fake("hgfast::decode", _fake_decode)
    torch.library.register_fake("hgfast::decode.topk", _fake_decode_topk)
    cuda.register()
