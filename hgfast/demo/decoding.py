"""What each decoding method makes of one heatmap, as a picture: docs/decoding.png.

``python -m hgfast.demo.decoding [FILE]``: the shipped network on a figure it has never seen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from hgfast.decoding import METHODS, decode
from hgfast.demo.canvas import Array
from hgfast.demo.common import load_network
from hgfast.demo.evaluation import to_input
from hgfast.demo.figures import HELD_OUT, SIZE, render
from hgfast.demo.skeleton import JOINTS

#: The first figure of the demo's picture, and a joint on which the methods differ.
SEED: Final = HELD_OUT[2034]
JOINT: Final = JOINTS.index("left elbow")

#: The network's targets have a sigma of 1.5 cells, and 0.3 ((7 - 1) / 2 - 1) + 0.8 = 1.4.
BLUR: Final = 7
#: Large enough for heatmaps between 0 and 1.
BETA: Final = 30.0

_CROP, _CLOSE = 9, 3
_INK, _FAINT, _PAPER = "#262a36", "#7c8292", "#fcfbf8"
_HEAT: Final = LinearSegmentedColormap.from_list("heat", ["#fcfbf8", "#c9d3e4", "#5d6f94"])
#: Methods that agree on this heatmap share a marker: their names, its shape and colour.
_SHOWN: Final = (
    (("argmax",), "s", "#e4572e"),
    (("quarter", "msra"), "o", "#ffd65c"),
    (("dark",), "D", "#2e9be0"),
    (("udp",), "P", "#a583ff"),
    (("softargmax",), "^", "#3fbf7f"),
    (("newell", "princeton", "megvii"), "X", "#ff8ac8"),
)
# In inches; README and documents show 96 pixels to an inch.
_SIDE, _LEGEND, _GAP, _TOP, _BOTTOM = 2.02, 2.3, 0.12, 0.24, 0.24


def heatmap() -> Tensor:
    """The heatmap, (1, 1, H, W), float32."""
    model = load_network(None, None).eval()
    with torch.inference_mode():
        maps: Tensor = model(to_input(render(SEED).image[None]))[-1]
    return maps[:, JOINT : JOINT + 1]


def places(maps: Tensor) -> dict[str, Array]:
    """What each method decodes from one heatmap, as (x, y) in cells."""
    found = {method: decode(maps, method, blur=BLUR, beta=BETA)[0][0, 0] for method in METHODS}
    return {method: np.asarray(place.numpy(), np.float32) for method, place in found.items()}


def draw(maps: Tensor) -> Figure:
    """The figure, nine by nine cells around the peak, and the middle of them with the places."""
    cells = maps[0, 0].numpy()
    found = places(maps)
    x, y = (int(v) for v in found["argmax"])
    shown = render(SEED)
    truth = (shown.joints[JOINT] + 0.5) * cells.shape[-1] / SIZE - 0.5

    page = Figure(
        figsize=(3 * _SIDE + _LEGEND + 6 * _GAP, _SIDE + _TOP + _BOTTOM), dpi=200, facecolor=_PAPER
    )
    FigureCanvasAgg(page)
    whole, crop, close, legend = (_panel(page, column) for column in range(4))

    whole.imshow(shown.image, extent=_extent(cells))
    whole.imshow(cells, alpha=np.clip(cells, 0, 0.85), cmap="magma", vmin=0, vmax=1)
    _box(whole, x, y, _CROP, "white")
    _title(whole, "A left elbow's heatmap", f"{cells.shape[1]} x {cells.shape[0]} cells")

    for axes in (crop, close):
        axes.imshow(cells, cmap=_HEAT, vmin=0, vmax=1)
        for edge in np.arange(max(cells.shape)) - 0.5:
            axes.axhline(edge, color="white", linewidth=0.6)
            axes.axvline(edge, color="white", linewidth=0.6)
    _look(crop, x, y, _CROP)
    _box(crop, x, y, _CLOSE, _INK)
    _title(crop, f"{_CROP} x {_CROP} cells around the peak", "darker is higher")
    _look(close, x, y, _CLOSE)
    _title(close, "Where the elbow is decoded", "each cell with its value and its place")
    for v in range(y - 1, y + 2):
        for u in range(x - 1, x + 2):
            colour = "white" if cells[v, u] > 0.5 else _INK
            side = -1 if u < x else 1  # where the markers are not
            close.text(
                u + 0.45 * side, v - 0.43, f"{cells[v, u]:.2f}", fontsize=7.5, color=colour,
                va="top", ha="left" if u < x else "right",
            )  # fmt: skip
            close.text(
                u + 0.45, v + 0.44, f"{u}, {v}", fontsize=7.5, color=colour, ha="right", alpha=0.8
            )

    _look(legend, 0, 0, 1)
    legend.set_facecolor("none")
    for row, (names, marker, colour) in enumerate(_SHOWN):
        style = {"marker": marker, "color": colour, "edgecolor": _INK, "zorder": 4}
        px, py = found[names[0]]
        crop.scatter(px, py, s=20, linewidth=0.5, **style)
        close.scatter(px, py, s=60 if marker == "P" else 105, linewidth=1, **style)
        height = -0.43 + 0.112 * row + (0.03 if len(names) > 2 else 0)
        legend.scatter(-0.46, height, s=80, linewidth=1, clip_on=False, **style)
        legend.text(
            -0.39,
            height,
            ", ".join(names).replace("princeton, ", "princeton,\n"),
            fontsize=8.4,
            color=_INK,
            va="center",
        )
        legend.text(
            0.5, height, f"{px:.2f}, {py:.2f}", fontsize=8.4, color=_INK, va="center", ha="right"
        )
    outline = [withStroke(linewidth=2.6, foreground="white")]
    for axes, size in ((crop, 36), (close, 130)):
        axes.scatter(
            *truth, s=size, marker="+", color="black", linewidth=1.4, zorder=5, path_effects=outline
        )
    height = -0.43 + 0.112 * len(_SHOWN) + 0.05
    legend.scatter(-0.46, height, s=90, marker="+", color="black", linewidth=1.4, clip_on=False)
    legend.text(-0.39, height, "the truth", fontsize=8.4, color=_INK, va="center")
    legend.text(0.5, height, "{:.2f}, {:.2f}".format(*truth), fontsize=8.4, va="center", ha="right")
    legend.text(
        -0.5, 0.5,
        "Pink is counted from the first cell's\ncorner, all others from its centre.",
        fontsize=7.8, color=_FAINT, va="bottom", linespacing=1.35,
    )  # fmt: skip
    _title(legend, "By which method, as x, y", f"in cells; with blur {BLUR}, beta {BETA:g}")
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    path = Path(given[0] if given else "docs/decoding.png")
    draw(heatmap()).savefig(path)
    print(path)
    return 0


def _panel(page: Figure, column: int) -> Any:
    width, height = page.get_size_inches()
    left, side = _GAP + column * (_SIDE + _GAP), _SIDE
    if column == 3:
        left, side = left + _GAP, _LEGEND
    return page.add_axes((left / width, _BOTTOM / height, side / width, _SIDE / height))


def _extent(cells: Array) -> tuple[float, float, float, float]:
    """The image over the cells: their edges are the image's."""
    height, width = cells.shape
    return -0.5, width - 0.5, height - 0.5, -0.5


def _look(axes: Any, x: int, y: int, size: int) -> None:
    axes.set_xlim(x - size / 2, x + size / 2)
    axes.set_ylim(y + size / 2, y - size / 2)


def _box(axes: Any, x: int, y: int, size: int, colour: str) -> None:
    corner = (x - size / 2, y - size / 2)
    axes.add_patch(
        Rectangle(corner, size, size, fill=False, edgecolor=colour, linewidth=1.2, zorder=3)
    )


def _title(axes: Any, title: str, note: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=9, color=_INK, loc="left", pad=4)
    axes.text(0, -0.025, note, transform=axes.transAxes, fontsize=7.8, color=_FAINT, va="top")


if __name__ == "__main__":
    sys.exit(main())
