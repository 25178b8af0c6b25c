"""A small z-buffered painter: solids made of rounded shapes, lit like clay.

Every solid is a shape swept by a sphere, seen along the z axis. Its outline is a distance
field, which gives smooth edges for one multiplication; the sphere gives the surface its
depth and its normal. Depth decides per pixel who is in front, so limbs may cross freely.

Coordinates: x to the right, y down, z towards the viewer, all in canvas pixels;
the centre of the top left pixel is (0, 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Surface:
    """What a paint is told about each pixel of a solid: arrays of one shape (h, w).

    ``u`` runs across the solid from -1 to 1 and ``v`` along it from 0 to 1;
    ``nx, ny, nz`` is the unit normal.
    """

    u: Array
    v: Array
    nx: Array
    ny: Array
    nz: Array


Paint = Colour | Callable[[Surface], Array]


@dataclass(frozen=True)
class Light:
    """Light from one direction (a unit vector towards it); shadows take a tint, never black."""

    direction: tuple[float, float, float] = (-0.4, -0.7, 0.6)
    shadow: Colour = (0.50, 0.46, 0.62)

    def shade(self, colour: Array, surface: Surface) -> Array:
        x, y, z = self.direction
        # Half-Lambert: clay has no hard terminator. The rim darkens, so that two limbs of
        # one colour stay apart where they cross.
        lit = 0.5 + 0.5 * (surface.nx * x + surface.ny * y + surface.nz * z)
        lit *= 0.55 + 0.45 * surface.nz
        shadow = np.asarray(self.shadow, np.float32)
        factor = shadow + (1.08 - shadow) * np.minimum(1.25 * lit, 1.0)[..., None]
        return np.asarray(colour * factor, np.float32)


def scaled(colour: Colour, factor: float) -> Colour:
    """A darker or lighter colour."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def mix(where: Array | NDArray[np.bool_], inside: Colour, outside: Colour | Array) -> Array:
    """The colour ``inside`` where the mask is 1, ``outside`` where it is 0: (h, w, 3)."""
    a, b = np.asarray(inside, np.float32), np.asarray(outside, np.float32)
    return np.asarray(b + (a - b) * where.astype(np.float32)[..., None], np.float32)


class Canvas:
    """An image under construction: ``rgb`` (H, W, 3) in 0..1 and ``depth`` (H, W).

    ``depth`` is -inf where only the background shows.
    """

    def __init__(self, background: Array, light: Light) -> None:
        self.rgb = background
        self.light = light
        height, width = background.shape[:2]
        self.depth: Array = np.full((height, width), -np.inf, np.float32)
        self._x: Array = np.arange(width, dtype=np.float32)[None, :]
        self._y: Array = np.arange(height, dtype=np.float32)[:, None]

    def capsule(
        self, start: Array, end: Array, radius: float, end_radius: float, paint: Paint
    ) -> None:
        """A cone with round ends from ``start`` to ``end``, both (3,)."""
        box = self._box(np.stack([start, end]), max(radius, end_radius))
        if box is None:
            return
        x, y = self._x[:, box[1]] - float(start[0]), self._y[box[0]] - float(start[1])
        ax, ay, az = (float(v) for v in end - start)
        # Seen end-on the axis has no length in the picture; the nearer end is what shows.
        length2 = ax * ax + ay * ay
        v = np.clip((x * ax + y * ay) / (length2 + 1e-3), 0.0, 1.0)
        inverse = 1.0 / (radius + (end_radius - radius) * v)
        nx, ny = (x - v * ax) * inverse, (y - v * ay) * inverse
        distance2 = nx * nx + ny * ny
        nz = np.sqrt(np.maximum(1.0 - distance2, 0.0))
        cover = np.clip((1.0 - np.sqrt(distance2)) / inverse + 0.5, 0.0, 1.0)
        length = max(length2**0.5, 1e-3)
        u = (nx * -ay + ny * ax) / length
        along = 1.0 if length2 < 1.0 and az > 0 else v
        depth = float(start[2]) + along * az + nz / inverse
        self._blend(box, cover, depth, Surface(u, v, nx, ny, nz), paint)

    def ball(self, centre: Array, radius: float, paint: Paint) -> None:
        """A sphere around ``centre`` (3,)."""
        self.capsule(centre, centre, radius, radius, paint)

    def slab(self, corners: Array, radius: float, paint: Paint) -> None:
        """A padded quadrilateral, such as a torso: its corners (4, 3), padded by ``radius``.

        Corners 0 and 1 are the bottom side and 2 and 3 the top one, 0 below 3 and 1 below 2;
        v runs from the bottom to the top, u from the left to the right of that direction.
        """
        box = self._box(corners, radius)
        if box is None:
            return
        x, y = self._x[:, box[1]], self._y[box[0]]
        signed = _polygon_distance(_convex_hull(corners[:, :2]), x, y) - radius
        cover = np.clip(0.5 - signed, 0.0, 1.0)

        bottom, top = (corners[0] + corners[1]) / 2, (corners[2] + corners[3]) / 2
        ax, ay, az = (float(v) for v in top - bottom)
        length = max((ax * ax + ay * ay) ** 0.5, 1e-3)
        dx, dy = ax / length, ay / length
        px, py = x - float(bottom[0]), y - float(bottom[1])
        v = (px * dx + py * dy) / length
        sides = ((corners[1] - corners[0]) / 2, (corners[2] - corners[3]) / 2)
        # Half widths, signed: negative where corner 1 lies to the left of corner 0.
        half = [float(s[1] * dx - s[0] * dy) for s in sides]
        tilt = float(sides[1][2] + sides[0][2]) / 2
        inside = np.clip(v, 0.0, 1.0)
        width = np.maximum(abs(half[0]) * (1 - inside) + abs(half[1]) * inside, 0.0) + radius
        u = np.clip((py * dx - px * dy) / width, -1.0, 1.0)
        nz = np.sqrt(np.maximum(1.0 - 0.9 * u * u, 0.0))
        nx, ny = -dy * u, dx * u
        sign = 1.0 if half[0] + half[1] >= 0 else -1.0
        depth = float(bottom[2]) + inside * az + sign * tilt * u + radius * nz
        self._blend(box, cover, depth, Surface(u, v, nx, ny, nz), paint)

    def _box(self, points: Array, radius: float) -> tuple[slice, slice] | None:
        height, width = self.depth.shape
        x0, y0 = (int(v) for v in np.floor(points[:, :2].min(0) - radius - 1))
        x1, y1 = (int(v) for v in np.ceil(points[:, :2].max(0) + radius + 2))
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None

    def _blend(
        self, box: tuple[slice, slice], cover: Array, depth: Array, surface: Surface, paint: Paint
    ) -> None:
        cover = cover * (depth > self.depth[box])
        colour = paint(surface) if callable(paint) else np.asarray(paint, np.float32)
        shaded = self.light.shade(colour, surface)
        rgb = self.rgb[box]
        rgb += (shaded - rgb) * cover[..., None]
        solid = cover > 0.5
        self.depth[box][solid] = np.broadcast_to(depth, solid.shape)[solid]


def _convex_hull(points: Array) -> list[tuple[float, float]]:
    """Counter-clockwise convex hull of a few points (monotone chain)."""
    ordered = sorted((float(x), float(y)) for x, y in points)

    def chain(sequence: list[tuple[float, float]]) -> list[tuple[float, float]]:
        hull: list[tuple[float, float]] = []
        for p in sequence:
            while len(hull) > 1:
                (ax, ay), (bx, by) = hull[-2], hull[-1]
                if (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax) > 0:
                    break
                hull.pop()
            hull.append(p)
        return hull[:-1]

    return chain(ordered) + chain(ordered[::-1])


def _polygon_distance(polygon: list[tuple[float, float]], x: Array, y: Array) -> Array:
    """Signed distance to a convex counter-clockwise polygon: negative inside, (h, w)."""
    nearest2 = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    inside = np.ones(nearest2.shape, bool)
    for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        t = np.clip((px * ex + py * ey) / max(ex * ex + ey * ey, 1e-6), 0.0, 1.0)
        nearest2 = np.minimum(nearest2, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        inside &= ex * py - ey * px >= 0
    distance = np.sqrt(nearest2)
    return np.where(inside & (len(polygon) > 2), -distance, distance).astype(np.float32)
