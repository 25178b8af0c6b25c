"""What the tests of the stem and of the head share: images, weights, and the judges."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from op_checks import Weights, cast, conv_weights, generator, laid_out, without_onednn
from torch import Tensor

PIXELS = [torch.uint8, torch.float32, torch.bfloat16, torch.float16]


def image_of(
    batch: int, height: int, width: int, *, dtype: torch.dtype, layout: str = "nchw", seed: int = 1
) -> Tensor:
    """A random image; bytes, or about as large as if they were normalised."""
    shape = (batch, 3, height, width)
    if dtype == torch.uint8:  # laid out as float32, whose gaps may be NaN
        bytes_ = torch.randint(0, 256, shape, generator=generator(seed))
        x = laid_out(bytes_.float(), layout)
        result = torch.empty_strided(x.shape, x.stride(), dtype=torch.uint8)
        return result.copy_(x)
    return laid_out(torch.randn(shape, generator=generator(seed)).to(dtype), layout)


def stem_weights(out: int, *, dtype: torch.dtype | None = None, seed: int = 0) -> Weights:
    """With a normalisation that suits images of this dtype, or with none."""
    w = conv_weights(3, out, (7, 7), seed=seed)
    if dtype is not None:
        w["scale"] = 0.5 + torch.rand(3, generator=generator(seed))
        w["shift"] = torch.randn(3, generator=generator(seed))
        if dtype == torch.uint8:
            w["scale"] /= 64
    return w


@without_onednn
def stem_reference(x: Tensor, w: Weights, dtype: torch.dtype) -> Tensor:
    """In float64, or as eager PyTorch would have it in 16 bits: normalised in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    t = x.to(wide)
    if "scale" in w:
        t = t * w["scale"].to(wide)[:, None, None] + w["shift"].to(wide)[:, None, None]
    v = cast(w, dtype)
    return F.relu(F.conv2d(t.to(dtype), v["weight"], v["bias"], 2, 3))


def head_weights(channels: int, middle: int, joints: int, out: int, seed: int = 0) -> Weights:
    """Of what is wanted: 0 joints are no heatmaps, and 0 channels no next."""
    w = {}
    for name, rows, columns in (("1", middle, channels), ("h", joints, middle), ("n", out, middle)):
        if rows:
            made = conv_weights(columns, rows, (1, 1), seed=seed + ord(name))
            w["w" + name], w["b" + name] = made["weight"], made["bias"]
    return w


@without_onednn
def head_reference(
    y: Tensor, x: Tensor | None, w: Weights, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(heatmaps, next) in a dtype."""
    v = cast(w, dtype)
    z = F.relu(F.conv2d(y.to(dtype), v["w1"], v["b1"]))
    heatmaps = F.conv2d(z, v["wh"], v["bh"]) if "wh" in v else None
    following = F.conv2d(z, v["wn"], v["bn"]) if "wn" in v else None
    if following is not None and x is not None:
        following = following + x.to(dtype)
    return heatmaps, following
