"""What surrounds a figure: backgrounds behind it, objects in front of it.

Everything is placed in fractions of the canvas, so that a scene looks the same at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from hgfast.demo.canvas import Array, Canvas, Colour, Light, Surface, mix, scaled

Rng = np.random.Generator

# Each palette: far, middle, near, accent, light accent.
_PALETTES: tuple[tuple[str, ...], ...] = (
    ("#bfe3f2", "#7fb7a4", "#4f8a6b", "#f2b05e", "#fdf3d8"),
    ("#fde2c8", "#e8a87c", "#a65f57", "#5b3a4e", "#fff6e5"),
    ("#dcd6f7", "#a6b1e1", "#6f7bb5", "#f4a6a6", "#f7f4ff"),
    ("#f7ede2", "#f5cac3", "#84a59d", "#f28482", "#fffaf3"),
    ("#274060", "#335c81", "#1b2845", "#f2c14e", "#65afff"),
    ("#e9f5db", "#b5c99a", "#718355", "#d98c5f", "#fbfff4"),
    ("#2b2d42", "#545775", "#1e1f30", "#ef798a", "#a9afd1"),
    ("#fff1d0", "#dd6e42", "#4f6d7a", "#c0d6df", "#fffaf0"),
    ("#d8e2dc", "#ffcad4", "#9d8189", "#f4acb7", "#ffffff"),
    ("#c9d6df", "#52616b", "#1e2022", "#f08a5d", "#f0f5f9"),
)


def colour(code: str) -> Colour:
    """ "#rrggbb" as three numbers in 0..1."""
    r, g, b = (int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return r, g, b


def nearby(rng: Rng, base: Colour, amount: float = 0.05) -> Colour:
    """A colour close to ``base``."""
    r, g, b = np.clip(np.array(base) + rng.normal(0, amount, 3) + rng.normal(0, amount), 0, 1)
    return float(r), float(g), float(b)


def _code(c: Colour) -> tuple[int, int, int]:
    return round(c[0] * 255), round(c[1] * 255), round(c[2] * 255)


def _gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    column = np.asarray(top) + (np.asarray(bottom) - np.asarray(top)) * ramp
    return Image.fromarray((column * 255).astype(np.uint8)).resize((size, size))


def value_noise(rng: Rng, size: int, octaves: int = 3, base: int = 3) -> Array:
    """Smooth random relief in about 0..1, (size, size)."""
    total: Array = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = rng.random((base * 2**octave + 1,) * 2, np.float32)
        layer = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
        total += np.asarray(layer) * 0.5**octave
    return total / np.float32(2 - 0.5 ** (octaves - 1))


def _ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Colour) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=_code(fill))


def hills(rng: Rng, size: int, palette: list[Colour]) -> Image.Image:
    """A landscape: sky, sun, clouds, ridges one behind another."""
    far, middle, near, accent, pale = palette
    image = _gradient(size, far, pale)
    draw = ImageDraw.Draw(image)
    x, y, r = rng.uniform(0.1, 0.9), rng.uniform(0.05, 0.35), rng.uniform(0.04, 0.09)
    _ellipse(draw, x * size, y * size, r * size, accent)
    for _ in range(rng.integers(0, 4)):
        x, y, r = rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.02, 0.05)
        for step in range(4):
            puff = r * (1.2 - 0.3 * abs(step - 1.5))
            _ellipse(draw, (x + step * r) * size, y * size, puff * size, pale)
    steps = np.linspace(0, 1, 25)
    ridges = int(rng.integers(2, 5))
    for ridge in range(ridges):
        depth = (ridge + 1) / ridges
        level = 0.42 + 0.42 * depth + rng.normal(0, 0.02)
        waves = np.zeros_like(steps)
        for frequency in (0.7, 1.6, 3.1):
            height = rng.uniform(0.01, 0.05)
            waves += height * np.sin(2 * np.pi * (frequency * steps + rng.random()))
        tone = tuple(np.array(middle) * (1 - depth) + np.array(near) * depth)
        points = [
            (float(a) * size, float(level + w) * size) for a, w in zip(steps, waves, strict=True)
        ]
        draw.polygon([*points, (size, size), (0, size)], fill=_code(tone))
        for _ in range(rng.integers(0, 5)):  # trees
            at = int(rng.integers(0, 25))
            tx, ty = points[at]
            height = rng.uniform(0.04, 0.12) * size * (0.5 + depth)
            leaf = nearby(rng, near, 0.06)
            draw.line((tx, ty, tx, ty - height), fill=_code(accent), width=max(1, size // 90))
            if rng.random() < 0.5:
                _ellipse(draw, tx, ty - height, 0.45 * height, leaf)
            else:
                w = 0.4 * height
                peak = (tx, ty - 1.6 * height)
                draw.polygon([(tx - w, ty - 0.3 * height), (tx + w, ty - 0.3 * height), peak],
                             fill=_code(leaf))  # fmt: skip
    return image


def room(rng: Rng, size: int, palette: list[Colour]) -> Image.Image:
    """A wall with paper, pictures and a window; a floor; sometimes a lamp or a plant."""
    far, middle, near, accent, pale = palette
    wall, floor = (far, near) if rng.random() < 0.6 else (pale, middle)
    image = _gradient(size, wall, nearby(rng, wall, 0.03))
    draw = ImageDraw.Draw(image)
    paper, faint = rng.integers(0, 4), nearby(rng, wall, 0.05)
    count = int(rng.integers(5, 14))
    for i in range(count):
        a = i / count * size
        if paper == 1:
            draw.rectangle((a, 0, a + size / count / 2, size), fill=_code(faint))
        elif paper == 2:
            for j in range(count):
                shift = 0.5 * (j % 2) * size / count
                _ellipse(draw, a + shift, j / count * size, 0.012 * size, faint)
    horizon = rng.uniform(0.62, 0.9) * size
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, 0.9) * size, rng.uniform(0.03, 0.45) * size
        w, h = rng.uniform(0.08, 0.26, 2) * size
        draw.rectangle((x, y, x + w, y + h), fill=_code(nearby(rng, accent, 0.1)))
        m = 0.015 * size
        draw.rectangle((x + m, y + m, x + w - m, y + h - m), fill=_code(nearby(rng, pale, 0.1)))
        if rng.random() < 0.5:
            _ellipse(draw, x + w / 2, y + h / 2, min(w, h) * 0.25, nearby(rng, middle, 0.1))
    draw.rectangle((0, horizon, size, size), fill=_code(floor))
    draw.rectangle((0, horizon, size, horizon + 0.02 * size), fill=_code(pale))
    if rng.random() < 0.5:
        boards = int(rng.integers(3, 9))
        for i in range(-boards, 2 * boards):
            a = (i + 0.5) / boards
            line = (a * size, size, (0.5 + (a - 0.5) * 0.6) * size, horizon + 0.02 * size)
            draw.line(line, fill=_code(nearby(rng, floor, 0.03)), width=max(1, size // 120))
    if rng.random() < 0.5:
        x, w = rng.choice([rng.uniform(0.02, 0.2), rng.uniform(0.8, 0.98)]), rng.uniform(0.03, 0.06)
        top = horizon - rng.uniform(0.1, 0.35) * size
        for _ in range(7):
            tip = (x * size + rng.normal(0, 0.09) * size, top + rng.normal(0, 0.07) * size)
            draw.line((x * size, horizon, *tip), fill=_code(nearby(rng, (0.3, 0.5, 0.3), 0.08)),
                      width=max(2, size // 50))  # fmt: skip
        rim, base = w * size, 0.7 * w * size
        x, y = x * size, horizon - 0.02 * size
        pot = [(x - rim, y), (x + rim, y), (x + base, y + 0.12 * size), (x - base, y + 0.12 * size)]
        draw.polygon(pot, fill=_code(accent))
    return image


def city(rng: Rng, size: int, palette: list[Colour]) -> Image.Image:
    """Houses with lit windows along a street."""
    far, middle, near, accent, pale = palette
    image = _gradient(size, far, pale)
    draw = ImageDraw.Draw(image)
    horizon = rng.uniform(0.72, 0.9)
    for tone in (middle, near):
        x = -rng.random() * 0.2
        while x < 1:
            w, h = rng.uniform(0.1, 0.28), rng.uniform(0.2, 0.6)
            wall = nearby(rng, tone, 0.05)
            draw.rectangle((x * size, (horizon - h) * size, (x + w) * size, size), fill=_code(wall))
            n, rows = int(w / 0.05), int(h / 0.075)
            for i in range(n):
                for j in range(rows):
                    if rng.random() < 0.6:
                        wx, wy = x + (i + 0.3) * w / n, horizon - h + (j + 0.35) * 0.075
                        fill = accent if rng.random() < 0.4 else nearby(rng, pale, 0.05)
                        draw.rectangle((wx * size, wy * size, (wx + 0.022) * size,
                                        (wy + 0.034) * size), fill=_code(fill))  # fmt: skip
            x += w + rng.uniform(0, 0.05)
    street = nearby(rng, tuple(np.array(near) * 0.6 + 0.15), 0.03)
    draw.rectangle((0, horizon * size, size, size), fill=_code(street))
    return image


def bokeh(rng: Rng, size: int, palette: list[Colour]) -> Image.Image:
    """Out-of-focus lights."""
    image = _gradient(size, palette[0], palette[2])
    overlay = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(overlay)
    for _ in range(rng.integers(8, 30)):
        (x, y), r = rng.random(2) * size, rng.uniform(0.02, 0.11) * size
        tone = _code(nearby(rng, palette[int(rng.integers(1, 5))], 0.06))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(*tone, int(rng.integers(50, 150))))
    image.paste(overlay, mask=overlay)
    return image


def plaster(rng: Rng, size: int, palette: list[Colour]) -> Image.Image:
    """Noise between two or three colours: a studio wall, marble, a lawn."""
    relief = value_noise(rng, size, octaves=int(rng.integers(2, 6)), base=int(rng.integers(2, 6)))
    a, b, c = (palette[i] for i in rng.permutation(5)[:3])
    blend = mix(np.clip(relief * 1.6 - 0.3, 0, 1).astype(np.float32), a, b)
    if rng.random() < 0.5:
        band = 0.5 + 0.5 * np.sin(relief * rng.uniform(10, 40))
        blend = mix((band * 0.5).astype(np.float32), c, blend)
    return Image.fromarray((np.clip(blend, 0, 1) * 255).astype(np.uint8))


def collage(rng: Rng, size: int, palette: list[Colour]) -> Image.Image:
    """Shapes cut from paper, among them stick-like ones that could be mistaken for limbs."""
    image = _gradient(size, palette[0], nearby(rng, palette[0], 0.1))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(6, 26)):
        tone = _code(nearby(rng, palette[int(rng.integers(0, 5))], 0.1))
        (x, y), r = rng.random(2) * size, rng.uniform(0.02, 0.16) * size
        kind = rng.integers(0, 4)
        if kind == 0:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=tone)
        elif kind == 1:
            turn = rng.random() * 2 * np.pi + np.arange(rng.integers(3, 6)) * 2.1
            draw.polygon([(x + r * np.cos(t), y + r * np.sin(t)) for t in turn], fill=tone)
        elif kind == 2:
            draw.rectangle((x - r, y - r * 0.6, x + r, y + r * 0.6), fill=tone)
        else:
            dx, dy = rng.normal(0, 0.2, 2) * size
            width = rng.uniform(0.03, 0.08) * size
            draw.line((x, y, x + dx, y + dy), fill=tone, width=int(width))
            for px, py in ((x, y), (x + dx, y + dy)):
                draw.ellipse((px - width / 2, py - width / 2, px + width / 2, py + width / 2),
                             fill=tone)  # fmt: skip
    return image


_SCENES: tuple[tuple[Callable[[Rng, int, list[Colour]], Image.Image], float], ...] = (
    (hills, 0.27), (room, 0.25), (city, 0.13), (bokeh, 0.10), (plaster, 0.13), (collage, 0.12),
)  # fmt: skip


def background(rng: Rng, size: int) -> Array:
    """A random backdrop in 0..1, (size, size, 3)."""
    palette = [nearby(rng, colour(c), 0.03) for c in _PALETTES[rng.integers(len(_PALETTES))]]
    scene = _SCENES[rng.choice(len(_SCENES), p=[odds for _, odds in _SCENES])][0]
    image = scene(rng, size, palette)
    focus = rng.random()
    if focus < 0.6:  # a little out of focus, as behind a portrait
        image = image.filter(ImageFilter.BoxBlur(focus * 0.02 * size))
    rgb = np.asarray(image, np.float32) * np.float32(1 / 255)
    if rng.random() < 0.4:
        rgb = rgb * (1 + (value_noise(rng, size, 2, 6)[..., None] - 0.5) * rng.uniform(0.05, 0.25))
    return np.asarray(np.clip(rgb, 0, 1), np.float32)


def foreground(rng: Rng, canvas: Canvas, near: float) -> None:
    """Put one object in front of everything: a ball, a crate, a post, leaves or balloons."""
    size = canvas.depth.shape[0]
    tone = nearby(rng, colour(_PALETTES[rng.integers(len(_PALETTES))][rng.integers(5)]), 0.08)
    other = nearby(rng, (0.9, 0.85, 0.75), 0.1)
    # Mostly where it hides a part and not the whole person.
    x, y = rng.uniform(0.1, 0.9) * size, np.clip(rng.normal(0.62, 0.22), 0.1, 1.0) * size
    at = np.array([x, y, near], np.float32)
    kind = rng.integers(0, 5)
    if kind == 0:
        stripes = rng.integers(2, 4)

        def ball(s: Surface) -> Array:
            return mix(np.sin(stripes * (2.2 * s.nx + 1.3 * s.ny)) > 0, tone, other)

        canvas.ball(at, rng.uniform(0.06, 0.12) * size, ball)
    elif kind == 1:
        w, h = rng.uniform(0.06, 0.13, 2) * size
        tilt = rng.normal(0, 0.12)
        axes = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        corners = np.repeat(at[None], 4, 0)
        corners[:, :2] += np.array([(-w, h), (w, h), (w, -h), (-w, -h)]) @ axes

        def crate(s: Surface) -> Array:
            edge = (np.abs(s.u) > 0.8) | (np.abs(s.v - 0.5) > 0.42) | (np.abs(s.v - 0.5) < 0.05)
            return mix(edge, scaled(tone, 0.75), tone)

        canvas.slab(corners, 0.012 * size, crate)
    elif kind == 2:
        lean, r = rng.normal(0, 0.08, 2) * size, rng.uniform(0.012, 0.03) * size
        foot, top = at.copy(), at.copy()
        foot[:2], top[:2] = (x + lean[0], 1.1 * size), (x + lean[1], -0.1 * size)
        bands = rng.integers(6, 16)

        def post(s: Surface) -> Array:
            return mix(np.sin(bands * np.pi * s.v) > 0, tone, other)

        canvas.capsule(foot, top, r, r, post if rng.random() < 0.5 else tone)
    elif kind == 3:
        green = nearby(rng, (0.35, 0.55, 0.33), 0.08)
        for _ in range(rng.integers(5, 14)):
            tip, root = at.copy(), at.copy()
            root[:2] = x + rng.normal(0, 0.03) * size, size * 1.02
            tip[:2] = x + rng.normal(0, 0.10) * size, size * (1 - rng.uniform(0.08, 0.30))
            canvas.capsule(root, tip, 0.014 * size, 0.004 * size, nearby(rng, green, 0.04))
    else:
        hold = at.copy()
        hold[:2] = x + rng.normal(0, 0.05) * size, size * 1.05
        for _ in range(rng.integers(1, 4)):
            top = at.copy()
            top[:2] = x + rng.normal(0, 0.08) * size, rng.uniform(0.15, 0.6) * size
            canvas.capsule(hold, top, 0.003 * size, 0.003 * size, (0.95, 0.95, 0.95))
            canvas.ball(top, rng.uniform(0.045, 0.075) * size, nearby(rng, tone, 0.15))


def sample_light(rng: Rng) -> Light:
    """Light from above, from the left or the right."""
    direction = np.array([rng.normal(0, 0.5), -rng.uniform(0.4, 0.9), rng.uniform(0.4, 0.9)])
    direction /= np.linalg.norm(direction)
    warmth = rng.normal(0, 0.04)
    shadow = (0.50 + warmth, 0.46, 0.60 - warmth)
    return Light(tuple(float(v) for v in direction), shadow)  # type: ignore[arg-type]
