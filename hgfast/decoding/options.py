"""What can be asked of :func:`hgfast.decode` besides a method: Flip, Transform, TopK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """Heatmaps of the mirrored image, to be merged with those of the image while decoding.

    Args:
        heatmaps: what the network gives for the mirrored image: shape, dtype and device of the
            heatmaps that they are merged with, or a list of stacks, of which the last counts.
        pairs: the joints that change places when an image is mirrored, as (left, right), each at
            most once. Joints of the body's middle are left out.
        shift: move the mirrored-back heatmaps one column to the right, column 0 kept, as Simple
            Baselines and HRNet do (``SHIFT_HEATMAP``), whose heatmaps are not aligned otherwise.
        reduce: "mean" of both, or "sum", as the original hourglass does.
    """

    heatmaps: Tensor | Sequence[Tensor]
    pairs: Sequence[tuple[int, int]]
    shift: bool = False
    reduce: str = "mean"

    def joints(self, count: int) -> list[int]:
        """For each of ``count`` joints the map of the mirrored image that shows it.

        Raises:
            ValueError: a pair is no pair, out of range, or shares a joint with another.
            TypeError: the pairs are no sequence.
        """
        expected = f"decode expects flip pairs (left, right) of joints 0 to {count - 1}, each once"
        order = list(range(count))
        try:
            pairs = list(self.pairs)
        except TypeError as error:
            raise TypeError(f"{expected}, got {self.pairs!r}") from error
        for pair in pairs:
            try:
                ends = [int(end) for end in pair]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{expected}, got {pair!r}") from error
            if len(ends) != 2 or ends[0] == ends[1]:
                raise ValueError(f"{expected}, got {tuple(ends)}")
            for end in ends:
                if not 0 <= end < count:
                    raise ValueError(f"{expected}, got {tuple(ends)}")
                if order[end] != end:
                    raise ValueError(f"{expected}, got {tuple(ends)} and another with joint {end}")
            order[ends[0]], order[ends[1]] = ends[1], ends[0]
        return order


@dataclass(frozen=True)
class Transform:
    """From heatmap cells to image pixels, per image. Made by its four constructors.

    Computed in float64 in the decoding kernel itself, in the order that
    :func:`hgfast.decoding.reference.to_image` gives; results are float32.

    ``truncate`` cuts the fraction of the image coordinates off, towards 0, as the original
    hourglass does (bearpaw/pytorch-pose's ``transform`` then adds 1 for pixels counted from 1; the
    authors' published predictions do not).
    """

    kind: str
    parts: tuple[Any, ...]
    unit: float = 200.0
    truncate: bool = False

    @classmethod
    def mpii(
        cls, center: Any, scale: Any, unit: float = 200.0, truncate: bool = False
    ) -> Transform:
        """MPII's convention: a square box around ``center`` with side ``scale * unit``::

            X = center_x + (x - W / 2) scale unit / W,  Y = center_y + (y - H / 2) scale unit / H

        Args:
            center: (x, y) in image pixels, (B, 2), or (2,) for all images.
            scale: (B,), or one number for all images. It is the box's side, so not a pair (w, h).
            unit: the pixels that a scale of 1 stands for; in MPII's annotations 200.
            truncate: see :class:`Transform`.
        """
        return cls("mpii", (center, scale), unit, truncate)

    @classmethod
    def coco(
        cls, center: Any, scale: Any, unit: float = 200.0, truncate: bool = False
    ) -> Transform:
        """The convention of Simple Baselines and HRNet for COCO: the box's width gives both scales.

        ::

            X = center_x + (x - W / 2) scale_w unit / W
            Y = center_y + (y - H / 2) scale_w unit / W

        Args:
            center: (x, y) in image pixels, (B, 2), or (2,) for all images.
            scale: width and height of the box, (B, 2), the height not used; or only the width,
                (B,), or one number for all images. One box alone is [(w, h)]: (w, h) would be the
                widths of two.
            unit: the pixels that a scale of 1 stands for: 200 in Simple Baselines, HRNet and
                mmpose 0.x; 1 where boxes are in pixels, as in mmpose 1.x.
            truncate: see :class:`Transform`.
        """
        return cls("coco", (center, scale), unit, truncate)

    @classmethod
    def udp(cls, center: Any, scale: Any, unit: float = 200.0, truncate: bool = False) -> Transform:
        """UDP's convention: cells are points, the first and the last lie on the box's edges.

        ::

            X = center_x + (x / (W - 1) - 1 / 2) scale_w unit,  Y likewise with H and scale_h

        Huang et al. (arXiv:1911.07524); as in mmpose 1.x, where it is split between ``UDPHeatmap``
        and the head. It needs heatmaps of at least 2x2 cells.

        Args:
            center: (x, y) in image pixels, (B, 2), or (2,) for all images.
            scale: width and height of the box, (B, 2); or one for both, (B,), or one number for
                all images. One box alone is [(w, h)], see :meth:`coco`.
            unit: the pixels that a scale of 1 stands for; see :meth:`coco`.
            truncate: see :class:`Transform`.
        """
        return cls("udp", (center, scale), unit, truncate)

    @classmethod
    def affine(cls, matrix: Any, stride: float = 1.0, truncate: bool = False) -> Transform:
        """Any affine map::

            (X, Y) = matrix[:, :2] (stride x, stride y) + matrix[:, 2]

        Args:
            matrix: (B, 2, 3), or (2, 3) for all images. A tensor given to ``decode`` as transform
                means this, with stride 1.
            stride: the units of the matrix's source per heatmap cell; 4 where it maps from the
                pixels of a network's input that has four to a cell.
            truncate: see :class:`Transform`.
        """
        return cls("affine", (matrix, stride), truncate=truncate)

    def resolve(
        self, batch: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, float, float]:
        """The matrix (B, 2, 3), float64, and the origin (x, y) for heatmaps of this shape.

        Raises:
            ValueError: parts of another shape or batch, or heatmaps too small for ``udp``.
        """
        if self.kind == "affine":
            matrix, stride = _tensor(self.parts[0], "matrix", device), float(self.parts[1])
            if matrix.shape not in ((2, 3), (batch, 2, 3)):
                raise ValueError(
                    f"decode expects a transform's matrix of shape ({batch}, 2, 3) or (2, 3), "
                    f"got {tuple(matrix.shape)}"
                )
            if stride != 1:
                matrix = matrix * matrix.new_tensor([stride, stride, 1])
            return matrix.expand(batch, 2, 3).contiguous(), 0.0, 0.0

        center, scale = self.parts
        center, scale = _tensor(center, "center", device), _tensor(scale, "scale", device)
        if center.shape not in ((2,), (batch, 2)):
            raise ValueError(
                f"decode expects a transform's center of shape ({batch}, 2) or (2,), "
                f"got {tuple(center.shape)}"
            )
        shapes = [(), (batch,)] if self.kind == "mpii" else [(), (batch,), (batch, 2)]
        if tuple(scale.shape) not in shapes:
            known = " or ".join(map(str, shapes))
            raise ValueError(
                f"decode expects a transform's scale of shape {known}, got {tuple(scale.shape)}"
            )
        across, along = scale.unbind(-1) if scale.ndim == 2 else (scale, scale)
        if self.kind == "udp":
            if min(height, width) < 2:
                raise ValueError(
                    "decode expects heatmaps of at least 2x2 cells for Transform.udp, "
                    f"got {height}x{width}"
                )
            cells_x, cells_y = width - 1, height - 1
        elif self.kind == "coco":
            along, cells_x, cells_y = across, width, width
        else:
            cells_x, cells_y = width, height
        origin_y = (height if self.kind == "coco" else cells_y) / 2
        matrix = center.new_zeros(batch, 2, 3)
        matrix[:, 0, 0] = self.unit * across / cells_x
        matrix[:, 1, 1] = self.unit * along / cells_y
        matrix[:, :, 2] = center
        return matrix, cells_x / 2, origin_y


@dataclass(frozen=True)
class TopK:
    """The k highest peaks of every map, for several persons in one image.

    A peak is a positive cell that no cell of the ``window`` x ``window`` around it exceeds.
    ``decode`` then returns coordinates (B, K, k, 2) and scores (B, K, k), the highest first; where
    a map has fewer peaks, the rest have score 0.

    Args:
        k: how many; at least 1.
        window: 3 or 5 cells.
    """

    k: int
    window: int = 3


@dataclass(frozen=True)
class GlobalTopK:
    """The k highest peaks of all maps of an image together, as CenterNet finds objects.

    Each map stands for a class there. ``decode`` then returns coordinates (B, k, 2), scores (B, k),
    the highest first, and the maps they were found in, (B, k), int64. Among equals the lower map
    and then the earlier cell comes first. Where there are fewer peaks, the rest have score 0; of an
    image with a NaN all scores are NaN.

    Zhou et al., "Objects as Points" (arXiv:1904.07850).

    Args:
        k: how many; at least 1.
        window: 3 or 5 cells, see :class:`TopK`.
    """

    k: int
    window: int = 3


def _tensor(value: Any, name: str, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float64, device=device).detach()
    except (TypeError, ValueError) as error:
        raise type(error)(f"decode expects numbers as a transform's {name}: {error}") from error
