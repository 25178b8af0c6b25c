"""Pictures of little people with known joints: the data the demo network is trained on.

``render(seed)`` is a function of its seed alone. A seed chooses a body, a pose, clothes, a
place and a light; :mod:`pose` makes the body, :mod:`scenery` the place, :mod:`canvas` paints.
What tells left from right is what tells it in a photograph: faces, hair, toes, the front of
a shirt, the rucksack on a back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from hgfast.demo import pose, scenery
from hgfast.demo.canvas import Array, Canvas, Colour, Paint, Surface, mix, scaled
from hgfast.demo.scenery import colour, nearby
from hgfast.demo.skeleton import MIRROR

SIZE: Final = 128

# Visibility of a joint, numbered as in COCO's annotations.
OUTSIDE, OCCLUDED, VISIBLE = 0, 1, 2

# Seeds below this are for measuring. Training draws its own from above (training_seed).
HELD_OUT: Final = range(0, 1_000_000)

_SKIN = ("#ffdfc4", "#f0c8a0", "#e0ac7e", "#c68642", "#a1665e", "#8d5524", "#6b4423", "#4a2f1d")
_HAIR = ("#1c1714", "#2e211b", "#4b3021", "#7a4a2a", "#b5793a", "#dcb45c", "#a8422a", "#c9c9c9")
_CLOTH = (
    "#e4572e", "#f3a712", "#f6d55c", "#a8c686", "#3caea3", "#2e86ab", "#20639b", "#173f5f",
    "#6a4c93", "#c05299", "#ff9fb2", "#f8f4e9", "#d9d9d9", "#6c757d", "#343a40", "#8a5a44",
    "#9ad1d4", "#b23a48", "#4f772d", "#fcefb4",
)  # fmt: skip

# How far in front of a joint (in body heights) its own flesh and clothes may lie.
_FLESH = np.array([5, 6, 10, 10, 6, 5, 12, 13, 10, 12, 5, 5, 8, 8, 5, 5], np.float32) / 100


@dataclass(frozen=True)
class Figure:
    """A rendered figure.

    Attributes:
        image: (size, size, 3) uint8, RGB.
        joints: (16, 2) float32, (x, y) in pixels, MPII order; the centre of the top left
            pixel is (0, 0). Joints may lie outside the image.
        visible: (16,) uint8, OUTSIDE, OCCLUDED (by an object or by the body) or VISIBLE.
        mask: (size, size) bool, where the person shows.
    """

    image: NDArray[np.uint8]
    joints: Array
    visible: NDArray[np.uint8]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Outfit:
    """Looks that do not change with the pose."""

    skin: Colour
    hair: Colour
    style: str
    hat: str
    hat_colour: Colour
    top: Colour
    trim: Colour
    pattern: str
    sleeve: float  # share of the arm that is covered, 0..2
    bottom: Colour
    legwear: str
    leg: float  # share of the leg that is covered, 0..2
    shoes: Colour
    rucksack: bool

    @staticmethod
    def sample(rng: np.random.Generator) -> Outfit:
        """Dress somebody."""

        def cloth() -> Colour:
            return nearby(rng, colour(_CLOTH[rng.integers(len(_CLOTH))]), 0.03)

        legwear = str(rng.choice(["trousers", "shorts", "skirt"], p=[0.55, 0.27, 0.18]))
        return Outfit(
            skin=nearby(rng, colour(_SKIN[rng.integers(len(_SKIN))]), 0.015),
            hair=nearby(rng, colour(_HAIR[rng.integers(len(_HAIR))]), 0.02),
            style=str(rng.choice(["short", "bob", "long", "bun", "ponytail", "curls"])),
            hat=str(rng.choice(["", "beanie", "cap"], p=[0.74, 0.13, 0.13])),
            hat_colour=cloth(),
            top=cloth(),
            trim=cloth(),
            pattern=str(
                rng.choice(["plain", "stripes", "jacket", "print", "dungarees", "buttons"])
            ),
            sleeve=float(rng.choice([0.0, 0.55, 1.1, 1.88], p=[0.1, 0.35, 0.1, 0.45])),
            bottom=cloth(),
            legwear=legwear,
            leg={"trousers": 1.86, "shorts": float(rng.uniform(0.5, 0.95)), "skirt": 0.0}[legwear],
            shoes=cloth(),
            rucksack=bool(rng.random() < 0.3),
        )


def render(seed: int, size: int = SIZE, supersample: int = 2) -> Figure:
    """Render the figure that belongs to a seed.

    Args:
        seed: any non-negative integer. Seeds in ``HELD_OUT`` are never trained on.
        size: width and height in pixels. The scene does not depend on it (only the grain
            of the noise does), so a seed may be rendered small for a network and large for
            a reader.
        supersample: the canvas is this many times larger in each direction.

    Raises:
        ValueError: a negative seed, or a size below 16.
    """
    if seed < 0 or size < 16:
        raise ValueError(f"seed must be >= 0 and size >= 16, got seed {seed} and size {size}")
    rng = np.random.default_rng(seed)
    body, outfit = pose.sample(rng), Outfit.sample(rng)
    light, side = scenery.sample_light(rng), size * supersample
    unit, offset = _frame(rng, body)
    canvas = Canvas(scenery.background(rng, side), light)

    points = body.joints.copy()
    points[:, :2] += offset
    points = points * (side * unit) - 0.5  # from the canvas's edge to its first pixel's centre
    place = _Place(side * unit, np.append(offset, 0).astype(np.float32))
    _shadow(canvas, body, place)
    _draw_person(canvas, body, outfit, place)
    person = canvas.depth > -np.inf
    near = 10.0 * side
    for _ in range(int(rng.choice([0, 1, 2], p=[0.72, 0.23, 0.05]))):
        scenery.foreground(rng, canvas, near)
    person &= canvas.depth < 0.5 * near

    # Canvas pixel centres to image pixel centres.
    joints = ((points[:, :2] + 0.5) / supersample - 0.5).astype(np.float32)
    visible = _visibility(canvas.depth, points, place.unit)
    mask = _shrink(person.astype(np.float32), supersample) >= 0.5
    rgb = _shrink(canvas.rgb, supersample)
    return Figure(_photograph(rng, rgb), joints, visible, mask)


def render_many(
    seeds: Sequence[int], size: int = SIZE, supersample: int = 2
) -> tuple[NDArray[np.uint8], Array, NDArray[np.uint8]]:
    """Images (N, size, size, 3), joints (N, 16, 2) and visibilities (N, 16) of several seeds."""
    figures = [render(seed, size, supersample) for seed in seeds]
    return (
        np.stack([f.image for f in figures]),
        np.stack([f.joints for f in figures]),
        np.stack([f.visible for f in figures]),
    )


def mirror(figure: Figure) -> Figure:
    """The mirrored picture. Left and right joints change names with their places."""
    order = list(MIRROR)
    joints = figure.joints[order].copy()
    joints[:, 0] = figure.image.shape[1] - 1 - joints[:, 0]
    return Figure(
        np.ascontiguousarray(figure.image[:, ::-1]),
        joints,
        figure.visible[order],
        np.ascontiguousarray(figure.mask[:, ::-1]),
    )


@dataclass(frozen=True)
class _Place:
    """From body coordinates to canvas pixels."""

    unit: float
    offset: Array

    def __call__(self, point: Array) -> Array:
        return np.asarray((point + self.offset) * self.unit - 0.5, np.float32)


def _frame(rng: np.random.Generator, body: pose.Body) -> tuple[float, Array]:
    """Scale and offset: most people fit into the picture, one in nine is cut by its border."""
    points = np.concatenate([body.joints, *(p[None] for p in body.hands + body.toes)])[:, :2]
    low, high = points.min(0) - 0.02, points.max(0) + 0.02
    extent = float(max((high - low).max(), 0.72))
    cut = rng.random() < 0.11
    unit = (rng.uniform(0.95, 1.25) if cut else rng.uniform(0.74, 0.98)) / extent
    slack = np.abs(1 / unit - (high - low)) / 2 + (0.06 if cut else 0.0)
    centre = (low + high) / 2 + rng.uniform(-1, 1, 2) * slack * (1.0 if cut else 0.8)
    return unit, (0.5 / unit - centre).astype(np.float32)


def _shadow(canvas: Canvas, body: pose.Body, place: _Place) -> None:
    """A soft shadow on the ground below somebody who is upright."""
    if abs(body.roll) > 25:
        return
    feet = np.stack([place(t) for t in body.toes])
    y, x = float(feet[:, 1].max()) + 0.01 * place.unit, float(feet[:, 0].mean())
    half = 0.10 * place.unit + float(np.ptp(feet[:, 0])) / 2
    height, width = canvas.depth.shape
    rows = (np.arange(height, dtype=np.float32) - y) / (0.035 * place.unit)
    columns = (np.arange(width, dtype=np.float32) - x) / half
    dark = np.float32(0.45) * np.exp(-(rows**2))[:, None] * np.exp(-(columns**2))[None, :]
    canvas.rgb *= (1 - dark)[..., None]


def _draw_person(canvas: Canvas, body: pose.Body, outfit: Outfit, place: _Place) -> None:
    build, j = body.build, [place(p) for p in body.joints]
    thick = place.unit * build.girth
    skin, cloth = outfit.skin, outfit.bottom

    for row, (hip, knee, ankle) in enumerate(((2, 1, 0), (3, 4, 5))):

        def legging(part: int) -> Paint:
            share = outfit.leg - part
            return cloth if share >= 1 else lambda s: mix(s.v < share, cloth, skin)

        canvas.capsule(j[hip], j[knee], 0.053 * thick, 0.038 * thick, legging(0))
        canvas.capsule(j[knee], j[ankle], 0.037 * thick, 0.026 * thick, legging(1))
        heel = j[ankle] + 0.35 * (j[ankle] - j[knee]) / 6
        canvas.capsule(heel, place(body.toes[row]), 0.027 * thick, 0.023 * thick, outfit.shoes)

    _draw_torso(canvas, body, outfit, place)
    for row, (shoulder, elbow, wrist) in enumerate(((12, 11, 10), (13, 14, 15))):

        def sleeve(part: int) -> Paint:
            share = outfit.sleeve - part
            return outfit.top if share >= 1 else lambda s: mix(s.v < share, outfit.top, skin)

        canvas.capsule(j[shoulder], j[elbow], 0.037 * thick, 0.029 * thick, sleeve(0))
        canvas.capsule(j[elbow], j[wrist], 0.028 * thick, 0.021 * thick, sleeve(1))
        hand = place(body.hands[row])
        canvas.capsule(j[wrist], hand, 0.021 * thick, 0.024 * thick, skin)
    _draw_head(canvas, body, outfit, place)


def _draw_torso(canvas: Canvas, body: pose.Body, outfit: Outfit, place: _Place) -> None:
    j = [place(p) for p in body.joints]
    thick = place.unit * body.build.girth
    left, up, forward = (body.torso_frame[:, i] for i in range(3))
    yaw = float(np.arctan2(forward[0], forward[2]))

    def longitude(s: Surface) -> Array:
        """Angle around the body from its front, -pi..pi."""
        around = np.arcsin(s.u) - yaw
        return np.asarray((around + np.pi) % (2 * np.pi) - np.pi, np.float32)

    def shirt(s: Surface) -> Array:
        rgb: Array = mix(s.v < 0.06, outfit.bottom, outfit.top)
        front = np.abs(longitude(s))
        if outfit.rucksack:
            straps = (np.abs(front - 0.55) < 0.14) & (s.v > 0.4)
            return mix(straps, outfit.trim, rgb)
        if outfit.pattern == "stripes":
            return mix((np.sin(s.v * 26) > 0.1) & (s.v > 0.06), outfit.trim, rgb)
        if outfit.pattern == "jacket":
            return mix((front < 0.12 + 0.3 * s.v) & (s.v > 0.06), outfit.trim, rgb)
        if outfit.pattern == "print":
            return mix((front * 0.9) ** 2 + (s.v * 2.2 - 1.35) ** 2 < 0.16, outfit.trim, rgb)
        if outfit.pattern == "buttons":
            dots = (front < 0.10) & (np.abs(s.v * 5 % 1 - 0.5) < 0.2) & (s.v > 0.1)
            return mix(dots, outfit.trim, rgb)
        if outfit.pattern == "dungarees":
            bib = (front < 0.62) & (s.v < 0.72)
            straps = (np.abs(front - 0.5) < 0.13) & (s.v >= 0.72) | (front > 2.6) & (s.v > 0.2)
            return mix(bib | straps | (s.v < 0.22), outfit.bottom, rgb)
        return rgb

    # The slab's corners lie inside the body; its padding makes the flesh.
    pad = 0.052 * thick
    lift = 0.02 * place.unit * up
    corners = np.stack([j[2] + lift, j[3] + lift, j[13], j[12]])
    corners[2:] += 0.36 * (j[7] - corners[2:])
    canvas.slab(corners, pad, shirt)
    hips = np.stack([j[2], j[3], j[3] + 2 * lift, j[2] + 2 * lift])
    canvas.slab(hips, pad * 1.03, outfit.bottom)
    if outfit.legwear == "skirt":
        hem = [j[hip] + 0.62 * (j[knee] - j[hip]) for hip, knee in ((2, 1), (3, 4))]
        flare = 0.25 * (hem[1] - hem[0]) + 0.03 * place.unit * left
        skirt = np.stack([hem[0] - flare, hem[1] + flare, j[3] + lift, j[2] + lift])
        canvas.slab(skirt, pad * 1.05, outfit.bottom)
    canvas.capsule(j[7], j[8], 0.036 * thick, 0.032 * thick, outfit.skin)

    if outfit.rucksack:
        behind, middle = -(0.075 * thick) * forward, 0.5 * (j[6] + j[7])
        pack = [middle + 0.06 * place.unit * (a * left) + 0.085 * place.unit * (b * up) + behind
                for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]  # fmt: skip
        canvas.slab(
            np.stack(pack), 0.035 * thick,
            lambda s: mix(np.abs(s.v - 0.35) < 0.06, outfit.hat_colour, outfit.trim),
        )  # fmt: skip


def _draw_head(canvas: Canvas, body: pose.Body, outfit: Outfit, place: _Place) -> None:
    centre, r = place(body.head), body.build.head * place.unit
    frame = body.head_frame

    def at(left: float, up: float, forward: float) -> Array:
        """A point given in head radii from the centre."""
        return np.asarray(
            centre + frame @ np.array([left, up, forward], np.float32) * r, np.float32
        )

    darker = scaled(outfit.skin, 0.86)
    blush: Colour = (min(1.0, outfit.skin[0] + 0.08), outfit.skin[1] * 0.72, outfit.skin[2] * 0.72)

    def face(s: Surface) -> Array:
        x, y, z = (s.nx * frame[0, i] + s.ny * frame[1, i] + s.nz * frame[2, i] for i in range(3))
        cheeks = (np.abs(x) - 0.55) ** 2 + (y + 0.28) ** 2 < 0.03
        rgb = mix((cheeks & (z > 0)) * np.float32(0.7), blush, outfit.skin)
        smile = (np.abs(np.hypot(x, y + 0.10) - 0.40) < 0.055) & (y < -0.36) & (z > 0)
        rgb = mix(smile, (0.55, 0.18, 0.2), rgb)
        eyes = (np.abs(x) - 0.36) ** 2 + (y - 0.0) ** 2
        rgb = mix((eyes < 0.024) & (z > 0), (0.09, 0.07, 0.09), rgb)
        rgb = mix(
            ((np.abs(x - 0.04) - 0.36) ** 2 + (y - 0.06) ** 2 < 0.003) & (z > 0), (1, 1, 1), rgb
        )
        # The hairline: high above the face, down over the ears, low in the neck.
        line = np.interp(z, (-1, -0.1, 0.15, 0.5, 1), (-0.7, -0.62, -0.1, 0.42, 0.52))
        hair = y > line + 0.05 * np.sin(9 * x)
        rgb = mix(hair, outfit.hair, rgb)
        if outfit.hat:
            brim = 0.32 if outfit.hat == "cap" else 0.25
            rgb = mix(y > brim, outfit.hat_colour, rgb)
            rgb = mix((y > brim) & (y < brim + 0.17), scaled(outfit.hat_colour, 0.8), rgb)
        return rgb

    canvas.ball(centre, r, face)
    canvas.ball(at(0, -0.14, 0.98), 0.13 * r, darker)
    for side in (-1, 1):
        canvas.ball(at(side * 1.0, -0.06, -0.05), 0.19 * r, darker)
    hair = outfit.hair
    if outfit.style in ("bob", "long"):
        canvas.ball(at(0, 0.08, -0.24), 1.06 * r, hair)
        drop = -0.55 if outfit.style == "bob" else -1.35
        for side in (-1, 0, 1):
            top, tip = at(0.62 * side, 0.1, -0.4), at(0.68 * side, drop, -0.42)
            canvas.capsule(top, tip, 0.5 * r, 0.36 * r, hair)
    elif outfit.style == "curls":
        canvas.ball(at(0, 0.16, -0.28), 1.12 * r, hair)
        for turn in np.linspace(0, 2 * np.pi, 9)[:-1]:
            curl = at(0.95 * float(np.cos(turn)), 0.3 + 0.8 * float(np.sin(turn)), -0.3)
            canvas.ball(curl, 0.34 * r, hair)
    else:
        canvas.ball(at(0, 0.06, -0.10), 1.02 * r, hair)
        if outfit.style == "bun" and not outfit.hat:
            canvas.ball(at(0, 0.92, -0.52), 0.42 * r, hair)
        elif outfit.style == "ponytail":
            canvas.capsule(at(0, 0.45, -1.0), at(0, -0.85, -1.35), 0.34 * r, 0.16 * r, hair)
    if outfit.hat == "beanie":
        canvas.ball(at(0, 1.08, -0.05), 0.26 * r, outfit.trim)
    elif outfit.hat == "cap":
        brim = np.stack([at(-0.55, 0.34, 1.45), at(0.55, 0.34, 1.45),
                         at(0.6, 0.42, 0.75), at(-0.6, 0.42, 0.75)])  # fmt: skip
        canvas.slab(brim, 0.09 * r, outfit.hat_colour)


def _shrink(canvas: Array, factor: int) -> Array:
    """The mean of each (factor, factor) block."""
    total = np.zeros_like(canvas[::factor, ::factor])
    for row in range(factor):
        for column in range(factor):
            total += canvas[row::factor, column::factor]
    return total * np.float32(1 / factor**2)


def _visibility(depth: Array, points: Array, unit: float) -> NDArray[np.uint8]:
    """A joint is occluded where the surface lies further in front of it than its own flesh."""
    side = depth.shape[0]
    column, row = (np.rint(points[:, i]).astype(int) for i in range(2))
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    front = depth[np.clip(row, 0, side - 1), np.clip(column, 0, side - 1)]
    hidden = front - points[:, 2] > _FLESH * unit
    return np.where(inside, np.where(hidden, OCCLUDED, VISIBLE), OUTSIDE).astype(np.uint8)


def _photograph(rng: np.random.Generator, rgb: Array) -> NDArray[np.uint8]:
    """Exposure, contrast, white balance, vignette, blur and grain."""
    size = rgb.shape[0]
    exposure = np.clip(rng.normal(-0.02, 0.09), -0.3, 0.12)
    gain = np.exp(exposure + rng.normal(0, 0.025, 3)).astype(np.float32)
    contrast = float(np.exp(rng.normal(0, 0.10)))
    rgb = (rgb * gain - 0.5) * contrast + 0.5
    if rng.random() < 0.4:
        ramp = np.linspace(-1, 1, size, dtype=np.float32) ** 2
        rgb = rgb * (1 - rng.uniform(0.05, 0.22) * (ramp[:, None] + ramp[None, :]))[..., None]
    blur, grain = rng.random(), abs(rng.normal(0, 0.022))
    if blur < 0.35:
        soft = Image.fromarray((np.clip(rgb, 0, 1) * 255).astype(np.uint8))
        radius = (0.3 + 2.0 * blur) * size / SIZE
        rgb = np.asarray(soft.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255
    rgb = rgb + grain * rng.standard_normal(rgb.shape, np.float32)
    return np.asarray(np.clip(rgb * 255 + 0.5, 0, 255), np.uint8)


def training_seed(run: int, index: int) -> int:
    """The seed of the ``index``-th figure of training run ``run``; never in ``HELD_OUT``."""
    return HELD_OUT.stop + run * 1_000_000_000 + index
