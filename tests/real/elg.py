"""ELG, a real hourglass that nobody on this project trained: the landmarks of an eye.

Park, Zhang, Bulling, Hilliges: "Learning to Find Eye Region Landmarks for Remote Gaze Estimation
in Unconstrained Settings", arXiv:1805.04771. Three stacks, 64 features, 18 landmarks: 8 on the
eyelids, 8 on the iris's edge, the centres of the iris and of the eyeball.

It is a hard customer: BatchNorm with eps 1e-3, a width that grows and shrinks again, odd sizes
(36 x 60 -> 18 x 30 -> 9 x 15 -> 5 x 8 -> 3 x 4), pooling that keeps the last odd row and column,
and bilinear upsampling.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STACKS, DEPTH, FEATURES, LANDMARKS = 3, 4, 64, 18
IRIS = slice(8, 16)
IRIS_CENTRE = 16

# Two in the stem; per stack three at each level, one at the bottom and one in the head.
RESIDUALS = 2 + STACKS * (3 * DEPTH + 1 + 1)

Layers = Iterator[tuple[nn.Module, str]]


def batch_norm(features: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(features, eps=1e-3)


class Residual(nn.Module):
    """Pre-activation bottleneck, projected by a bare 1x1 convolution where the width changes."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        middle = out_features // 2
        widths = (in_features, middle, middle)
        self.norms = nn.ModuleList(map(batch_norm, widths))
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(in_features, middle, 1),
                nn.Conv2d(middle, middle, 3, padding=1),
                nn.Conv2d(middle, out_features, 1),
            ]
        )
        same = in_features == out_features
        self.skip = nn.Identity() if same else nn.Conv2d(in_features, out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y)))
        return y + self.skip(x)

    def layers(self, name: str) -> Layers:
        for number, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True), 1):
            yield norm, f"{name}_conv{number}_BatchNorm"
            yield conv, f"{name}_conv{number}"
        if isinstance(self.skip, nn.Conv2d):
            yield self.skip, f"{name}_skip"


class Hourglass(nn.Module):
    """One level: the upper branch keeps the resolution, the lower one halves it and descends."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.upper = Residual(FEATURES, FEATURES)
        self.enter = Residual(FEATURES, FEATURES)
        self.inner = Hourglass(depth - 1) if depth > 1 else Residual(FEATURES, FEATURES)
        self.leave = Residual(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        low = F.max_pool2d(x, 2, ceil_mode=True)
        low = self.leave(self.inner(self.enter(low)))
        low = F.interpolate(low, x.shape[2:], mode="bilinear", align_corners=True)
        return self.upper(x) + low

    def layers(self, name: str, level: int = 1) -> Layers:
        name = f"{name}_depth{level}"
        yield from self.upper.layers(f"{name}_up1_1")
        yield from self.enter.layers(f"{name}_low1_1")
        yield from self.leave.layers(f"{name}_low3_1")
        if isinstance(self.inner, Hourglass):
            yield from self.inner.layers(name, level + 1)
        else:
            yield from self.inner.layers(f"{name}_low2_1")


class ELG(nn.Module):
    """A grey eye (B, 1, H, W) in [-1, 1] -> list of 3 heatmap tensors (B, 18, H / 3, W / 3).

    H and W are multiples of 3; the network was trained for 108 x 180.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, FEATURES, 7, stride=3, padding=2)
        self.stem_norm = batch_norm(FEATURES)
        self.widen = Residual(FEATURES, 2 * FEATURES)
        self.narrow = Residual(2 * FEATURES, FEATURES)
        self.hourglasses = nn.ModuleList(Hourglass(DEPTH) for _ in range(STACKS))
        self.residuals = nn.ModuleList(Residual(FEATURES, FEATURES) for _ in range(STACKS))
        self.convs = nn.ModuleList(nn.Conv2d(FEATURES, FEATURES, 1) for _ in range(STACKS))
        self.norms = nn.ModuleList(batch_norm(FEATURES) for _ in range(STACKS))
        self.heatmaps = nn.ModuleList(nn.Conv2d(FEATURES, LANDMARKS, 1) for _ in range(STACKS))
        self.remerges = nn.ModuleList(nn.Conv2d(LANDMARKS, FEATURES, 1) for _ in range(STACKS - 1))

    def forward(self, eye: Tensor) -> list[Tensor]:
        x = self.narrow(self.widen(F.relu(self.stem_norm(self.stem(eye)))))
        heatmaps: list[Tensor] = []
        for stack in range(STACKS):
            y = self.residuals[stack](self.hourglasses[stack](x))
            y = F.relu(self.norms[stack](self.convs[stack](y)))
            heatmaps.append(self.heatmaps[stack](y))
            if stack < STACKS - 1:
                x = x + y + self.remerges[stack](heatmaps[-1])
        return heatmaps

    def layers(self) -> Layers:
        """Every layer with weights, and its name in the published weights."""
        yield self.stem, "hourglass_pre"
        yield self.stem_norm, "hourglass_pre_BatchNorm"
        yield from self.widen.layers("hourglass_pre_res1")
        yield from self.narrow.layers("hourglass_pre_res2")
        for stack in range(STACKS):
            name = f"hourglass_hg_{stack + 1}"
            yield from self.hourglasses[stack].layers(name)
            yield from self.residuals[stack].layers(f"{name}_after_after_hg_1")
            yield self.convs[stack], f"{name}_after"
            yield self.norms[stack], f"{name}_after_BatchNorm"
            yield self.heatmaps[stack], f"{name}_after_hmap"
            if stack < STACKS - 1:
                yield self.remerges[stack], f"{name}_merge_h"


def trained_elg(weights: dict[str, np.ndarray]) -> ELG:
    """ELG with the published weights, in eval mode. Every array is used, each once."""
    model = ELG()
    left = dict(weights)
    with torch.no_grad():
        for layer, name in model.layers():
            if isinstance(layer, nn.Conv2d):
                # published as (height, width, in, out)
                kernel = left.pop(f"{name}.kernel").transpose(3, 2, 0, 1).copy()
                values = {"weight": kernel, "bias": left.pop(f"{name}.bias")}
            else:
                values = {
                    "weight": left.pop(f"{name}.gamma"),
                    "bias": left.pop(f"{name}.beta"),
                    "running_mean": left.pop(f"{name}.moving_mean"),
                    "running_var": left.pop(f"{name}.moving_variance"),
                }
            tensors = {key: torch.from_numpy(value) for key, value in values.items()}
            layer.load_state_dict(tensors, strict=isinstance(layer, nn.Conv2d))
    assert not left, f"weights without a layer: {sorted(left)}"
    return model.eval()


def astronaut_eye() -> Tensor:
    """The right eye of scikit-image's astronaut, (1, 1, 108, 180) in [-1, 1]."""
    reason = "needs scikit-image, which ships the photograph: pip install scikit-image"
    data = pytest.importorskip("skimage.data", reason=reason)
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install Pillow")

    photo = image.fromarray(data.astronaut()).convert("L")
    centre_x, centre_y, width = 203, 101, 46
    height = width * 108 / 180
    box = (
        centre_x - width / 2,
        centre_y - height / 2,
        centre_x + width / 2,
        centre_y + height / 2,
    )
    eye = photo.crop(box).resize((180, 108), image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(eye, dtype=np.float32) / 255 * 2 - 1)[None, None]
