"""Each decoding method as a formula in plain PyTorch: the judge of the faster ones.

A method maps heatmaps (B, K, H, W) of any floating dtype, with H, W >= 1, to coordinates
(B, K, 2) as (x, y) and scores (B, K), both float32. x and y count heatmap cells from 0; the
centre of the first cell is (0, 0).

All agree on these: the score is the map's maximum and its place the first cell, in row order,
that has it. A map whose maximum is not positive shows an invisible joint (training targets of
such joints are all zero), and no place is invented for it: (0, 0). A map with a NaN in it has
score NaN and (0, 0).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Decoded = tuple[Tensor, Tensor]


def argmax(heatmaps: Tensor) -> Decoded:
    """The cell of the maximum."""
    scores, cell = heatmaps.flatten(2).max(-1)
    width = heatmaps.shape[3]
    coords = torch.stack((cell % width, cell // width), -1)
    visible = scores > 0
    return (coords * visible[..., None]).float(), scores.float()


def quarter(heatmaps: Tensor) -> Decoded:
    """The cell of the maximum, moved a quarter of a cell towards the higher neighbour.

    Where 1 < x < W - 1 and 1 < y < H - 1 (no closer to the border):

        x += 0.25 sign(h[y, x + 1] - h[y, x - 1])
        y += 0.25 sign(h[y + 1, x] - h[y - 1, x])

    The rule of Simple Baselines (Xiao et al., arXiv:1804.06208) and HRNet (Sun et al.,
    arXiv:1902.09212), with the bounds of their published code: column 1 and row 1 stay.
    """
    height, width = heatmaps.shape[2:]
    coords, scores = argmax(heatmaps)
    x, y = coords.long().unbind(-1)
    inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    flat = heatmaps.flatten(2)
    # Any neighbour will do where there is none to look at: it is not used.
    cell = torch.where(inside, y * width + x, 0)
    last = height * width - 1

    def sign(step: int) -> Tensor:
        # Compared, not subtracted: two infinite neighbours are a tie.
        above = flat.gather(2, (cell + step).clamp(max=last)[..., None])[..., 0]
        below = flat.gather(2, (cell - step).clamp(min=0)[..., None])[..., 0]
        return (above > below).float() - (above < below).float()

    offset = torch.stack((sign(1), sign(width)), -1)
    return coords + 0.25 * offset * inside[..., None], scores


METHODS: dict[str, Callable[[Tensor], Decoded]] = {"quarter": quarter, "argmax": argmax}
