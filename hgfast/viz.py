"""Pictures of poses: skeletons, heatmaps, and pages that put them side by side.

Colours follow sides, so that a swapped left and right is seen at once: warm is the person's
right, cool the left, yellow the middle. Everything returns a PIL image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

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
        base += (core - base) * (strength * alpha ** np.float32(0.8))
    return Image.fromarray((np.clip(base, 0, 1) * 255).astype(np.uint8))


@dataclass(frozen=True)
class Row:
    """A row of a page: a label and pictures, each with an optional caption."""

    label: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Bars:
    """A small bar chart: a title and (name, value) pairs, with the value's unit."""

    title: str
    values: Sequence[tuple[str, float]]
    unit: str = "ms"


def pose_page(
    title: str,
    rows: Sequence[Row],
    subtitle: str = "",
    charts: Sequence[Bars] = (),
    footer: str = "",
    cell: int = 224,
) -> Image.Image:
    """Compose a page: a title, rows of pictures, bar charts below them.

    Args:
        title: the headline.
        rows: pictures of any size; each is fitted into a square cell.
        subtitle: a smaller line under the title; line breaks are kept.
        charts: put side by side under the pictures.
        footer: the small print; line breaks are kept.
        cell: width of a picture in pixels.

    Raises:
        ValueError: no row has a picture.
    """
    count = max((len(row.images) for row in rows), default=0)
    if count == 0:
        raise ValueError("pose_page expects at least one picture")
    margin, gap, label_width = cell // 5, cell // 18, round(cell * 0.42)
    title_font, text_font, small_font = (_font(cell * f) for f in (0.16, 0.078, 0.067))
    width = 2 * margin + label_width + count * (cell + gap) - gap
    head = margin + round(cell * 0.24) + (subtitle.count("\n") + 1) * round(cell * 0.11)
    tall = [cell + (round(cell * 0.13) if row.captions else 0) + gap for row in rows]
    chart_height = round(cell * 0.17) * max((len(c.values) for c in charts), default=0)
    chart_height += round(cell * 0.30) if charts else 0
    foot = (footer.count("\n") + 1) * round(cell * 0.095) if footer else 0
    height = head + sum(tall) + chart_height + foot + margin
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin * 0.75), title, _INK, title_font)
    draw.multiline_text(
        (margin, margin * 0.75 + cell * 0.23), subtitle, _FAINT, text_font, spacing=cell * 0.03
    )
    y = head
    for row, step in zip(rows, tall, strict=True):
        draw.multiline_text((margin, y + cell * 0.04), row.label, _INK, text_font)
        for i, picture in enumerate(row.images):
            x = margin + label_width + i * (cell + gap)
            page.paste(*_rounded(picture, cell, (x, y)))
            if i < len(row.captions):
                middle = (x + cell / 2, y + cell + cell * 0.035)
                draw.text(middle, row.captions[i], _FAINT, small_font, anchor="ma")
        y += step
    if charts:
        each = (width - 2 * margin - (len(charts) - 1) * 2 * gap) / len(charts)
        for i, chart in enumerate(charts):
            left = margin + i * (each + 2 * gap)
            _bars(draw, chart, (left, y + cell * 0.06), each, cell, text_font, small_font)
    draw.multiline_text(
        (margin, height - margin * 0.7 - foot), footer, _FAINT, small_font, spacing=cell * 0.025
    )
    return page


def _bars(
    draw: ImageDraw.ImageDraw,
    chart: Bars,
    corner: tuple[float, float],
    width: float,
    cell: int,
    title_font: Any,
    font: Any,
) -> None:
    x, y = corner
    draw.text((x, y), chart.title, _INK, title_font)
    longest = max(value for _, value in chart.values)
    names = max(draw.textlength(name, font) for name, _ in chart.values) + cell * 0.06
    room = width - names - cell * 0.45
    for i, (name, value) in enumerate(chart.values):
        top = y + cell * (0.16 + 0.17 * i)
        tall = cell * 0.105
        best = value == min(v for _, v in chart.values)
        draw.text((x, top + tall / 2), name, _INK if best else _FAINT, font, anchor="lm")
        bar = (x + names, top, x + names + max(room * value / longest, 4), top + tall)
        draw.rounded_rectangle(bar, tall * 0.25, fill=SIDES["right"] if best else _RULE)
        text = f"{value:.3g} {chart.unit}"
        draw.text((bar[2] + cell * 0.03, top + tall / 2), text, _INK, font, anchor="lm")


def _rounded(
    picture: Image.Image, cell: int, corner: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int], Image.Image]:
    """A picture fitted into a cell, where it goes, and a mask with round corners."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    mask = Image.new("L", (size[0] * 4, size[1] * 4))
    box = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius=cell * 0.2, fill=255)
    place = (corner[0] + (cell - size[0]) // 2, corner[1] + (cell - size[1]) // 2)
    return fitted, place, mask.resize(size, Image.Resampling.LANCZOS)


def _font(size: float) -> Any:
    return ImageFont.load_default(max(8, round(size)))


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
