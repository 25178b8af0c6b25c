"""Pictures of poses: skeletons, heatmaps, and pages that put them side by side.

Colours follow sides, so that a swapped left and right is seen at once: warm is the person's
right, cool the left, yellow the middle. Everything returns a PIL image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from hgfast.demo.skeleton import BONES

Rgb = tuple[int, int, int]
Bones = Sequence[tuple[int, int, str]]

SIDES: Final[dict[str, Rgb]] = {
    "right": (255, 112, 92),
    "left": (64, 186, 255),
    "middle": (255, 214, 92),
}
_INK, _FAINT, _PAPER, _RULE = (38, 42, 54), (124, 130, 146), (252, 251, 248), (226, 226, 230)
_SMOOTH = 4  # lines are drawn this much larger, then reduced


def draw_skeleton(
    image: Image.Image | NDArray[np.uint8],
    joints: ArrayLike,
    shown: ArrayLike | None = None,
    sure: ArrayLike | None = None,
    bones: Bones = BONES,
    width: float | None = None,
    outline: bool = False,
) -> Image.Image:
    """Draw a skeleton over an image.

    Args:
        image: RGB, as a PIL image or (H, W, 3) uint8.
        joints: (K, 2), (x, y) in the image's pixels, (0, 0) the centre of the first.
        shown: (K,) bool; joints that are False, and their bones, are left out.
        sure: (K,) bool; joints that are False are drawn hollow.
        bones: (joint, joint, side) with side "right", "left" or "middle"; the default is
            MPII's sixteen joints.
        width: a bone's width in pixels; by default a share of the image's size.
        outline: draw thin white lines instead, for a reference pose to compare with.

    Raises:
        ValueError: ``joints`` is not (K, 2), or there are fewer joints than the bones name.
    """
    picture = _as_image(image)
    points = np.asarray(joints, np.float64)
    needed = 1 + max(max(a, b) for a, b, _ in bones)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < needed:
        raise ValueError(
            f"draw_skeleton expects joints of shape (K, 2) with K >= {needed}, got {points.shape}"
        )
    keep = _flags(shown, len(points)) & np.isfinite(points).all(1)
    certain = _flags(sure, len(points))
    thick = (width or max(picture.size) / 64) * _SMOOTH
    layer = Image.new("RGBA", (picture.width * _SMOOTH, picture.height * _SMOOTH))
    draw = ImageDraw.Draw(layer)
    at = [tuple(p) for p in (points + 0.5) * _SMOOTH]
    sides = _sides(bones, len(points))

    def line(a: int, b: int, colour: tuple[int, ...], size: float) -> None:
        draw.line((*at[a], *at[b]), fill=colour, width=max(1, round(size)))
        for j in (a, b):
            disc(j, colour, size / 2)

    def disc(j: int, colour: tuple[int, ...], radius: float) -> None:
        x, y = at[j]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    visible_bones = [(a, b, side) for a, b, side in bones if keep[a] and keep[b]]
    if outline:
        for a, b, _ in visible_bones:
            line(a, b, (20, 22, 30, 130), 0.55 * thick)
        for a, b, _ in visible_bones:
            line(a, b, (255, 255, 255, 255), 0.28 * thick)
    else:
        for a, b, _ in visible_bones:
            line(a, b, (24, 26, 36, 150), 1.35 * thick)
        for a, b, side in visible_bones:
            line(a, b, (*SIDES[side], 255), 0.85 * thick)
        for j in np.flatnonzero(keep):
            colour = SIDES[sides[j]]
            disc(int(j), (24, 26, 36, 255), 0.95 * thick)
            disc(int(j), (255, 255, 255, 255), 0.78 * thick)
            disc(int(j), (*colour, 255) if certain[j] else (60, 62, 72, 255), 0.5 * thick)
    layer = layer.resize(picture.size, Image.Resampling.LANCZOS)
    picture.paste(layer, mask=layer)
    return picture


def heatmap_overlay(
    image: Image.Image | NDArray[np.uint8],
    heatmaps: ArrayLike,
    bones: Bones = BONES,
    strength: float = 0.9,
) -> Image.Image:
    """Lay a network's heatmaps over its input as coloured light on a dimmed picture.

    Args:
        image: the network's input picture, RGB, as a PIL image or (H, W, 3) uint8.
        heatmaps: (K, h, w), any float dtype that NumPy knows; values are clipped to 0..1.
        bones: where each joint's side, and so its colour, is looked up.
        strength: opacity of a heatmap's peak.

    Raises:
        ValueError: ``heatmaps`` does not have three dimensions.
    """
    picture = _as_image(image)
    maps = np.asarray(heatmaps, np.float32)
    if maps.ndim != 3:
        raise ValueError(f"heatmap_overlay expects heatmaps (K, h, w), got shape {maps.shape}")
    maps = np.clip(np.nan_to_num(maps), 0, 1)
    rgb = np.asarray(picture, np.float32) / 255
    grey = rgb.mean(2, keepdims=True)
    base = 0.42 * (0.45 * rgb + 0.55 * grey)
    for heat, side in zip(maps, _sides(bones, len(maps)), strict=True):
        large = Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC)
        alpha = np.clip(np.asarray(large), 0, 1)[..., None]
        glow = np.asarray(SIDES[side], np.float32) / 255
        core = glow + (1 - glow) * np.clip(2 * alpha - 1.1, 0, 1)
        # Squared: the wide feet of many Gaussians would add up to fog.
        base += (core - base) * (strength * alpha * alpha)
    return Image.fromarray((np.clip(base, 0, 1) * 255).astype(np.uint8))


@dataclass(frozen=True)
class Row:
    """A row of a page: a label and pictures, each with an optional caption."""

    label: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Bars:
    """A small bar chart: a title and (name, value) pairs, with the value's unit.

    The bars whose names start with ``accent`` are coloured.
    """

    title: str
    values: Sequence[tuple[str, float]]
    unit: str = "ms"
    accent: str = "hgfast"


def pose_page(
    title: str,
    rows: Sequence[Row],
    subtitle: str = "",
    charts: Sequence[Bars] = (),
    footer: str = "",
    cell: int = 224,
    text: int = 17,
) -> Image.Image:
    """Compose a page: a title, rows of pictures, bar charts below them.

    Args:
        title: the headline.
        rows: pictures of any size; each is fitted into a square cell.
        subtitle: a smaller line under the title; line breaks are kept.
        charts: put side by side under the pictures.
        footer: the small print; line breaks are kept.
        cell: width of a picture in pixels.
        text: height of the text in pixels; headline and small print follow.

    Raises:
        ValueError: no row has a picture.
    """
    count = max((len(row.images) for row in rows), default=0)
    if count == 0:
        raise ValueError("pose_page expects at least one picture")
    margin, gap, line = 5 * text // 2, 3 * text // 4, 3 * text // 2
    fonts = _Fonts(*(ImageFont.load_default(max(8, f * text)) for f in (2.1, 1.0, 0.86)))
    labels = [fonts.text.getlength(part) for row in rows for part in row.label.split("\n")]
    indent = round(max(labels) + 1.5 * text) if max(labels) else 0
    width = 2 * margin + indent + count * (cell + gap) - gap
    widest = max(fonts.title.getlength(title), fonts.small.getlength(footer.split("\n")[0]))
    width = max(width, round(widest) + 2 * margin)
    heights = [cell + (line if row.captions else 0) + gap for row in rows]
    top = margin + 3 * text + line * len(subtitle.splitlines())
    charts_at = top + sum(heights) + text
    footer_at = charts_at + max(((len(c.values) + 2) * line + text for c in charts), default=0)
    page = Image.new("RGB", (width, footer_at + line * len(footer.splitlines()) + margin), _PAPER)
    draw = ImageDraw.Draw(page)
    spacing = text * 0.45
    draw.text((margin, margin - text // 2), title, _INK, fonts.title)
    below = (margin, margin + 2.4 * text)
    draw.multiline_text(below, subtitle, _FAINT, fonts.text, spacing=spacing)
    y = top
    for row, height in zip(rows, heights, strict=True):
        draw.multiline_text((margin, y + text // 2), row.label, _INK, fonts.text, spacing=spacing)
        for i, picture in enumerate(row.images):
            x = margin + indent + i * (cell + gap)
            page.paste(*_rounded(picture, cell, (x, y), radius=text))
            if i < len(row.captions):
                middle = (x + cell / 2, y + cell + 0.4 * text)
                draw.text(middle, row.captions[i], _FAINT, fonts.small, anchor="ma")
        y += height
    for i, chart in enumerate(charts):
        share = (width - 2 * margin + 3 * gap) / len(charts)
        _bars(draw, chart, (margin + i * share, charts_at), share - 3 * gap, text, fonts)
    draw.multiline_text((margin, footer_at), footer, _FAINT, fonts.small, spacing=spacing)
    return page


class _Fonts(NamedTuple):
    title: Any
    text: Any
    small: Any


def _bars(
    draw: ImageDraw.ImageDraw,
    chart: Bars,
    corner: tuple[float, float],
    width: float,
    text: int,
    fonts: _Fonts,
) -> None:
    x, y = corner
    draw.text((x, y), chart.title, _INK, fonts.text)
    longest = max(value for _, value in chart.values)
    names = max(fonts.small.getlength(name) for name, _ in chart.values) + text
    room = width - names - 5 * text
    for i, (name, value) in enumerate(chart.values):
        top, tall = y + 1.5 * text * (i + 1.3), 0.95 * text
        ours = name.startswith(chart.accent)
        draw.text((x, top + tall / 2), name, _INK if ours else _FAINT, fonts.small, anchor="lm")
        bar = (x + names, top, x + names + max(room * value / longest, 4), top + tall)
        draw.rounded_rectangle(bar, tall * 0.25, fill=SIDES["right"] if ours else _RULE)
        label = f"{value:.{0 if value >= 100 else 1}f} {chart.unit}"
        draw.text((bar[2] + text / 2, top + tall / 2), label, _INK, fonts.small, anchor="lm")


def _rounded(
    picture: Image.Image, cell: int, corner: tuple[int, int], radius: int
) -> tuple[Image.Image, tuple[int, int], Image.Image]:
    """A picture fitted into a cell, where it goes, and a mask with round corners."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    mask = Image.new("L", (size[0] * 4, size[1] * 4))
    box = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius=4 * radius, fill=255)
    place = (corner[0] + (cell - size[0]) // 2, corner[1] + (cell - size[1]) // 2)
    return fitted, place, mask.resize(size, Image.Resampling.LANCZOS)


def _sides(bones: Bones, count: int) -> list[str]:
    """Each joint's side: that of its bones where they agree, otherwise the middle."""
    met: list[set[str]] = [set() for _ in range(count)]
    for a, b, side in bones:
        for joint in (a, b):
            if joint < count:
                met[joint].add(side)
    return [next(iter(sides)) if len(sides) == 1 else "middle" for sides in met]


def _flags(values: ArrayLike | None, count: int) -> NDArray[np.bool_]:
    return np.ones(count, bool) if values is None else np.asarray(values, bool)


def _as_image(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    """An RGB copy."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    return picture.convert("RGB").copy()
