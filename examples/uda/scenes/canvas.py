"""The picture and its labels, painted in metres through a pinhole camera."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from uda.scenes.styles import SKY, Color, Point, Style, blend, scaled

NEAR = 0.6  # metres; nearer parts are not drawn
FAR = 400.0
SUPERSAMPLING = 2


class Canvas:
    """A picture and its labels, painted with shapes given in metres around the street.

    x points right from the middle of the street, y up, z along the street; the street bends by
    `curve` * z^2 to the right. The pinhole camera stands at (eye_x, eye, 0).
    """

    def __init__(self, r: random.Random, style: Style, size: tuple[int, int]) -> None:
        self.height, self.width = (SUPERSAMPLING * side for side in size)
        self.focal = r.uniform(*style.focal) * self.width
        self.eye = r.uniform(*style.eye)
        self.eye_x = 0.0
        self.horizon = r.uniform(*style.horizon) * self.height
        self.curve = r.choice((0.0, 0.0, 1.0)) * r.uniform(-0.0016, 0.0016)
        self.middle = self.width / 2 + r.uniform(-0.06, 0.06) * self.width
        self.haze: Color = (200, 205, 210)
        self.clear = 1.0  # distance over which haze takes 1 - 1/e of the colour
        self.sun: Point = (0.0, 1.0, 0.0)  # unit vector towards the sun
        self.ambient, self.diffuse = 0.7, 0.4
        self.picture = Image.new("RGB", (self.width, self.height))
        self.labels = Image.new("L", (self.width, self.height), SKY)
        self.shade = Image.new("L", (self.width, self.height))
        self._pen = ImageDraw.Draw(self.picture)
        self._label_pen = ImageDraw.Draw(self.labels)
        self._shade_pen = ImageDraw.Draw(self.shade)

    def restart(self) -> None:
        """Paint on the current picture, after it was replaced."""
        self._pen = ImageDraw.Draw(self.picture)

    def bend(self, z: float) -> float:
        return self.curve * min(z, 150.0) ** 2

    def project(self, point: Point) -> tuple[float, float]:
        x, y, z = point
        k = self.focal / max(z, NEAR)
        return (
            self.middle + k * (x + self.bend(z) - self.eye_x),
            self.horizon + k * (self.eye - y),
        )

    def pixels(self, metres: float, z: float) -> float:
        return metres * self.focal / max(z, NEAR)

    def fill(self, color: Color, z: float) -> tuple[int, int, int]:
        red, green, blue = blend(color, self.haze, 1 - math.exp(-z / self.clear))
        return (
            min(255, max(0, round(red))),
            min(255, max(0, round(green))),
            min(255, max(0, round(blue))),
        )

    def light(self, normal: Point) -> float:
        sun = sum(a * b for a, b in zip(normal, self.sun, strict=True))
        return self.ambient + self.diffuse * max(0.0, sun)

    def face(self, points: Sequence[Point], color: Color, label: int | None = None) -> None:
        """Fill a flat polygon; without a label, the pixels keep theirs."""
        if min(point[2] for point in points) < NEAR:
            points = _in_front(points)
            if not points:
                return
        corners = [self.project(point) for point in points]
        z = sum(point[2] for point in points) / len(points)
        self._pen.polygon(corners, fill=self.fill(color, z))
        if label is not None:
            self._label_pen.polygon(corners, fill=label)

    def rod(self, a: Point, b: Point, width: float, color: Color, label: int | None = None) -> None:
        """Draw a round bar that is `width` metres thick."""
        z = (a[2] + b[2]) / 2
        if z < NEAR:
            return
        ends = (self.project(a), self.project(b))
        thick = max(1, round(self.pixels(width, z)))
        self._pen.line(ends, fill=self.fill(color, z), width=thick)
        if label is not None:
            self._label_pen.line(ends, fill=label, width=thick)
        if thick >= 4:
            for end in (a, b):
                self.ball(end, width / 2, width / 2, color, label)

    def ball(
        self, center: Point, across: float, up: float, color: Color, label: int | None = None
    ) -> None:
        """Draw an ellipse that faces the camera, with half axes in metres."""
        if center[2] < NEAR:
            return
        u, v = self.project(center)
        a, b = self.pixels(across, center[2]), self.pixels(up, center[2])
        self._pen.ellipse((u - a, v - b, u + a, v + b), fill=self.fill(color, center[2]))
        if label is not None:
            self._label_pen.ellipse((u - a, v - b, u + a, v + b), fill=label)

    def disc(self, corners: Sequence[tuple[float, float]], label: int) -> None:
        """Label a polygon of pixel corners and leave its colours as they are."""
        self._label_pen.polygon(corners, fill=label)

    def cast(self, footprint: Sequence[tuple[float, float]], height: float) -> None:
        """Add the ground shadow of an upright body to the shade, seen from the sun."""
        dx, dz = (-self.sun[0] / self.sun[1] * height, -self.sun[2] / self.sun[1] * height)
        top = [(x + dx, z + dz) for x, z in footprint]
        shapes = [footprint, top]
        for i in range(len(footprint)):
            j = (i + 1) % len(footprint)
            shapes.append((footprint[i], footprint[j], top[j], top[i]))
        for shape in shapes:
            points = [(x, 0.0, z) for x, z in shape]
            if min(z for _, z in shape) < NEAR:
                points = _in_front(points)
            if points:
                self._shade_pen.polygon([self.project(point) for point in points], fill=255)


def _in_front(points: Sequence[Point]) -> list[Point]:
    """Cut a polygon at the plane z = NEAR."""
    kept: list[Point] = []
    for (xa, ya, za), (xb, yb, zb) in zip(points, [*points[1:], points[0]], strict=True):
        if za >= NEAR:
            kept.append((xa, ya, za))
        if (za >= NEAR) != (zb >= NEAR):
            t = (NEAR - za) / (zb - za)
            kept.append((xa + t * (xb - xa), ya + t * (yb - ya), NEAR))
    return kept


class Body:
    """An object with a place and a heading: l along it, s to its right, h above the ground."""

    def __init__(self, canvas: Canvas, x: float, z: float, yaw: float) -> None:
        self.canvas, self.x, self.z = canvas, x, z
        self._sin, self._cos = math.sin(yaw), math.cos(yaw)

    def at(self, l: float, s: float, h: float) -> Point:  # noqa: E741
        return (
            self.x + l * self._sin + s * self._cos,
            h,
            self.z + l * self._cos - s * self._sin,
        )

    def faces_camera(self, points: Sequence[Point], normal: Point) -> bool:
        x, y, z = points[0]
        eye = (self.canvas.eye_x - self.canvas.bend(z) - x, self.canvas.eye - y, -z)
        return sum(a * b for a, b in zip(normal, eye, strict=True)) > 0

    def panel(
        self, corners: Sequence[Point], out: Point, color: Color, label: int | None = None
    ) -> None:
        """Fill a polygon of (l, s, h) corners that faces `out`, if it is visible."""
        points = [self.at(*corner) for corner in corners]
        ox, oy, oz = self.at(*out)
        normal = (ox - self.x, oy, oz - self.z)
        if self.faces_camera(points, normal):
            self.canvas.face(points, scaled(color, self.canvas.light(normal)), label)

    def box(
        self,
        profile: Sequence[tuple[float, float]],
        half_width: Callable[[float], float],
        color: Color,
        label: int,
    ) -> None:
        """Paint the visible faces of a side view of (l, h) corners, extruded to a width."""
        edges = list(zip(profile, [*profile[1:], profile[0]], strict=True))
        for s in (-1, 1):
            self.panel([(c, s * half_width(h), h) for c, h in profile], (0, s, 0), color, label)
        for (l1, h1), (l2, h2) in edges:
            a, b = half_width(h1), half_width(h2)
            length = math.hypot(l2 - l1, h2 - h1)
            # The profiles run clockwise (rear up, roof, front down): outward is to the left.
            out = ((h1 - h2) / length, 0.0, (l2 - l1) / length)
            self.panel([(l1, -a, h1), (l2, -b, h2), (l2, b, h2), (l1, a, h1)], out, color, label)

    def wheels(self, places: Sequence[float], half_width: float, radius: float) -> None:
        for s in (-1, 1):
            for place in places:
                for size, color in ((1.0, (26, 26, 28)), (0.55, (120, 122, 126))):
                    corners = [
                        (
                            place + size * radius * math.cos(k * math.pi / 6),
                            s * (half_width + 0.01),
                            radius + size * radius * math.sin(k * math.pi / 6),
                        )
                        for k in range(12)
                    ]
                    self.panel(corners, (0, s, 0), color)

    def contact(self, length: float, width: float) -> None:
        """Darken the ground under the object."""
        shape = ((-1, -1), (-1, 1), (1, 1), (1, -1))
        corners = [self.at(a * length / 2, b * width / 2, 0.0) for a, b in shape]
        self.canvas.face(corners, (30, 30, 32), None)


class Place(NamedTuple):
    """The place of an object; yaw 0 heads away from the camera, pi towards it."""

    x: float
    z: float
    yaw: float


def pieces(z1: float, z2: float, step: float) -> list[tuple[float, float]]:
    """Cut a stretch of the street, from NEAR on, into short ones, the farthest first."""
    z1 = max(z1, NEAR)
    if z2 <= z1:
        return []
    count = max(1, round((z2 - z1) / step))
    cuts = [z1 + k * (z2 - z1) / count for k in range(count + 1)]
    return [*pairwise(cuts)][::-1]


def smooth_noise(
    rng: np.random.Generator, size: tuple[int, int], cells: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Smooth noise of unit deviation: a sum of layers, each with cells of (down, across) pixels."""
    total = np.zeros(size, dtype=np.float32)
    for down, across in cells:
        grid = (int(size[0] / down) + 3, int(size[1] / across) + 3)
        layer = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
        total += np.asarray(layer.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return total / max(float(total.std()), 1e-6)
