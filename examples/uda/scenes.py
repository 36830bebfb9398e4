"""Procedural street scenes in two styles, written as small GTA5 and Cityscapes data sets.

One grammar makes every scene: a street in perspective between two rows of lots (buildings, walls,
fences, parks), with furniture, people and vehicles that hide each other by depth. The labels are
those of the real data sets, ids that are not counted included. Of every twelve scenes at least one
features each rare class, so that all 19 occur in a split of a dozen, yet stay rare in pixels.

The styles differ as a game and a dashboard camera in Europe differ, for these reasons:

    layout      A game shows wide North American roads, with yellow centre lines, signals on mast
                arms, towers and bungalows with gaps, palms and hills. The camera sees narrow
                streets of row houses with pitched roofs, parked cars, hedges, trams, and more
                people and bicycles.
    viewpoint   A game camera is free: wider lens, varying height and horizon, no bonnet. A
                dashboard camera is fixed: longer lens, 1.2 m high, its own bonnet below (void).
    light       A game has a blue sky, hard shadows, clear air and saturated paint. The camera has
                mostly overcast sky, soft shadows, haze and greyish paint.
    materials   Game surfaces are smooth. Real ones are worn: asphalt with patches and cracks,
                stained plaster, leaves that mottle.
    sensor      A game image has no sensor. The camera has exposure, white balance, a tone curve,
                vignetting, optical blur and noise that grows with brightness.

These numbers were set by looking at the pictures and at class frequencies, never by training.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from uda.datasets import CITYSCAPES_CLASSES, Progress
from uda.errors import UserError
from uda.outputs import read_json

Color = tuple[float, float, float]
Point = tuple[float, float, float]

# Cityscapes ids, as label files hold them.
EGO_VEHICLE, BORDER, STATIC, GROUND = 1, 3, 4, 6
ROAD, SIDEWALK, PARKING, RAIL_TRACK, BUILDING, WALL, FENCE = 7, 8, 9, 10, 11, 12, 13
POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY = 17, 19, 20, 21, 22, 23
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 24, 25, 26, 27, 28, 31, 32, 33

_NEAR = 0.6  # metres; nothing nearer to the eye is drawn
_FAR = 400.0
_SUPERSAMPLING = 2
_POOL_FROM = 64  # images; below, starting worker processes costs more than it saves


@dataclass(frozen=True)
class _Style:
    """What tells the two worlds apart; ranges are (low, high), lengths in metres."""

    focal: tuple[float, float]  # in image widths
    eye: tuple[float, float]
    horizon: tuple[float, float]  # from the top, in image heights
    lanes: tuple[int, ...]  # per direction
    lane: float
    sidewalk: tuple[float, float]
    parked: float  # chance that a side of the street has parked cars
    lots: tuple[tuple[str, float], ...]  # kind of lot, weight
    floors: tuple[tuple[int, int], ...]  # ranges, one drawn per building
    setback: tuple[float, float]
    walls: tuple[Color, ...]
    roofs: tuple[Color, ...]
    paints: tuple[Color, ...]
    leaves: tuple[Color, ...]
    clothes: tuple[Color, ...]
    asphalt: Color
    pavement: Color
    grass: Color
    persons: tuple[int, int]
    cars: tuple[int, int]
    texture: tuple[tuple[int, float, float], ...]  # label id, fine and coarse contrast
    camera: bool


_GAME = _Style(
    focal=(0.72, 0.95),
    eye=(1.4, 2.3),
    horizon=(0.40, 0.52),
    lanes=(2, 2, 3),
    lane=3.5,
    sidewalk=(3.5, 7.0),
    parked=0.3,
    lots=(("building", 0.62), ("park", 0.15), ("wall", 0.13), ("fence", 0.10)),
    floors=((1, 2), (1, 3), (3, 6), (8, 22)),
    setback=(0.0, 5.0),
    walls=(
        (222, 205, 170), (196, 160, 120), (236, 228, 214), (170, 178, 190), (120, 140, 165),
        (205, 140, 110), (150, 110, 85), (240, 214, 150),
    ),
    roofs=((110, 100, 92), (140, 120, 100)),
    paints=(
        (200, 25, 30), (25, 60, 170), (245, 245, 245), (20, 20, 24), (235, 180, 20),
        (170, 175, 185), (20, 120, 60), (120, 25, 110), (230, 110, 20),
    ),
    leaves=((52, 110, 32), (70, 130, 40), (40, 92, 38), (96, 138, 48)),
    clothes=(
        (220, 40, 40), (40, 80, 200), (240, 240, 240), (30, 30, 35), (60, 160, 80),
        (230, 190, 60), (90, 110, 150),
    ),
    asphalt=(92, 92, 96),
    pavement=(178, 170, 158),
    grass=(120, 150, 62),
    persons=(1, 6),
    cars=(1, 5),
    texture=(
        (ROAD, 0.02, 0.02), (SIDEWALK, 0.02, 0.02), (BUILDING, 0.01, 0.02), (WALL, 0.02, 0.03),
        (VEGETATION, 0.07, 0.05), (TERRAIN, 0.05, 0.06), (GROUND, 0.04, 0.06),
    ),
    camera=False,
)  # fmt: skip

_CAMERA = _Style(
    focal=(1.04, 1.12),
    eye=(1.18, 1.28),
    horizon=(0.40, 0.45),
    lanes=(1, 1, 1, 2),
    lane=3.1,
    sidewalk=(2.4, 5.2),
    parked=0.42,
    lots=(("building", 0.70), ("park", 0.17), ("wall", 0.06), ("fence", 0.07)),
    floors=((2, 4), (3, 5), (3, 5), (4, 6)),
    setback=(0.0, 0.8),
    walls=(
        (176, 164, 142), (150, 132, 112), (188, 180, 166), (134, 112, 96), (158, 150, 146),
        (168, 142, 112), (124, 122, 120), (186, 168, 128),
    ),
    roofs=((112, 66, 52), (92, 60, 50), (78, 76, 78), (98, 88, 82)),
    paints=(
        (40, 42, 46), (92, 96, 102), (150, 153, 156), (196, 198, 196), (52, 62, 86),
        (92, 34, 36), (64, 78, 72), (120, 112, 98), (28, 30, 34),
    ),
    leaves=((60, 76, 42), (74, 88, 52), (50, 64, 42), (92, 94, 52)),
    clothes=(
        (38, 40, 46), (62, 66, 78), (88, 72, 62), (112, 108, 104), (70, 38, 42), (44, 58, 84),
        (134, 126, 112), (28, 28, 30),
    ),
    asphalt=(104, 103, 104),
    pavement=(136, 132, 128),
    grass=(96, 104, 62),
    persons=(3, 10),
    cars=(2, 5),
    texture=(
        (ROAD, 0.035, 0.045), (SIDEWALK, 0.05, 0.05), (BUILDING, 0.03, 0.06), (WALL, 0.06, 0.08),
        (VEGETATION, 0.10, 0.12), (TERRAIN, 0.10, 0.12), (PARKING, 0.04, 0.05),
        (GROUND, 0.07, 0.08), (FENCE, 0.06, 0.06), (RAIL_TRACK, 0.06, 0.05),
    ),
    camera=True,
)  # fmt: skip

# Feature of scene i is the i-th of these, cyclically: what no split may lack.
_FEATURES = (
    "train", "cyclist", "lights", "bus", "bicycles", "wall",
    "motorcyclist", "truck", "lights", "fence", "motorcycles", "cyclist",
)  # fmt: skip


def _scaled(color: Color, k: float) -> Color:
    return (color[0] * k, color[1] * k, color[2] * k)


def _blend(a: Color, b: Color, t: float) -> Color:
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def _jittered(r: random.Random, color: Color, amount: float) -> Color:
    k = 1 + r.uniform(-amount, amount)
    return (
        color[0] * k * (1 + r.uniform(-amount, amount) / 3),
        color[1] * k,
        color[2] * k * (1 + r.uniform(-amount, amount) / 3),
    )


class _Canvas:
    """A picture and its labels, painted with shapes given in metres around the street.

    x points right from the middle of the street, y up, z along the street; the street bends by
    `curve` * z^2 to the right. The pinhole camera stands at (eye_x, eye, 0).
    """

    def __init__(self, r: random.Random, style: _Style, size: tuple[int, int]) -> None:
        self.height, self.width = (_SUPERSAMPLING * side for side in size)
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
        k = self.focal / max(z, _NEAR)
        return (
            self.middle + k * (x + self.bend(z) - self.eye_x),
            self.horizon + k * (self.eye - y),
        )

    def pixels(self, metres: float, z: float) -> float:
        return metres * self.focal / max(z, _NEAR)

    def fill(self, color: Color, z: float) -> tuple[int, int, int]:
        red, green, blue = _blend(color, self.haze, 1 - math.exp(-z / self.clear))
        return (
            min(255, max(0, round(red))),
            min(255, max(0, round(green))),
            min(255, max(0, round(blue))),
        )

    def light(self, normal: Point) -> float:
        sun = sum(a * b for a, b in zip(normal, self.sun, strict=True))
        return self.ambient + self.diffuse * max(0.0, sun)

    def face(self, points: Sequence[Point], color: Color, label: int | None = None) -> None:
        """Fill a flat polygon; without a label, the one below stays."""
        if min(point[2] for point in points) < _NEAR:
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
        if z < _NEAR:
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
        if center[2] < _NEAR:
            return
        u, v = self.project(center)
        a, b = self.pixels(across, center[2]), self.pixels(up, center[2])
        self._pen.ellipse((u - a, v - b, u + a, v + b), fill=self.fill(color, center[2]))
        if label is not None:
            self._label_pen.ellipse((u - a, v - b, u + a, v + b), fill=label)

    def disc(self, corners: Sequence[tuple[float, float]], label: int) -> None:
        """Label a polygon of pixel corners and leave what is seen through it."""
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
            if min(z for _, z in shape) < _NEAR:
                points = _in_front(points)
            if points:
                self._shade_pen.polygon([self.project(point) for point in points], fill=255)


def _in_front(points: Sequence[Point]) -> list[Point]:
    """Cut a polygon at the plane z = _NEAR."""
    kept: list[Point] = []
    for (xa, ya, za), (xb, yb, zb) in zip(points, [*points[1:], points[0]], strict=True):
        if za >= _NEAR:
            kept.append((xa, ya, za))
        if (za >= _NEAR) != (zb >= _NEAR):
            t = (_NEAR - za) / (zb - za)
            kept.append((xa + t * (xb - xa), ya + t * (yb - ya), _NEAR))
    return kept


class _Body:
    """A thing with a place and a heading: l along it, s to its right, h above the ground."""

    def __init__(self, canvas: _Canvas, x: float, z: float, yaw: float) -> None:
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
        """Fill a polygon of (l, s, h) corners whose outward direction is `out`, if it is seen."""
        points = [self.at(*corner) for corner in corners]
        ox, oy, oz = self.at(*out)
        normal = (ox - self.x, oy, oz - self.z)
        if self.faces_camera(points, normal):
            self.canvas.face(points, _scaled(color, self.canvas.light(normal)), label)

    def box(
        self,
        profile: Sequence[tuple[float, float]],
        half_width: Callable[[float], float],
        color: Color,
        label: int,
    ) -> None:
        """Paint the seen faces of a side view of (l, h) corners, pulled out to a width."""
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
        """Darken the ground under the thing."""
        shape = ((-1, -1), (-1, 1), (1, 1), (1, -1))
        corners = [self.at(a * length / 2, b * width / 2, 0.0) for a, b in shape]
        self.canvas.face(corners, (30, 30, 32), None)


class _Place(NamedTuple):
    """Where a thing stands; yaw 0 heads away from the camera, pi towards it."""

    x: float
    z: float
    yaw: float


# Vehicles: side views as (l, h) corners from the rear bumper over the roof to the front one, the
# edges that are glass, and the height at which windows begin.


class _Shape(NamedTuple):
    profile: tuple[tuple[float, float], ...]
    glass: tuple[int, ...]
    belt: float
    half_width: float


_HATCHBACK = _Shape(
    ((-2, 0.28), (-2.05, 0.85), (-1.75, 1.44), (0.3, 1.47), (1.1, 0.95), (2, 0.8), (2.1, 0.28)),
    (1, 3), 0.93, 0.88,
)  # fmt: skip
_SEDAN = _Shape(
    ((-2.3, 0.28), (-2.35, 0.88), (-1.75, 0.97), (-1.1, 1.4), (0.3, 1.43), (1.1, 0.95),
     (2.2, 0.77), (2.3, 0.28)),
    (2, 4), 0.93, 0.9,
)  # fmt: skip
_ESTATE = _Shape(
    ((-2.3, 0.28), (-2.35, 0.9), (-2.0, 1.42), (0.3, 1.46), (1.15, 0.95), (2.2, 0.78),
     (2.3, 0.28)),
    (1, 3), 0.95, 0.9,
)  # fmt: skip
_OFFROADER = _Shape(
    ((-2.2, 0.38), (-2.25, 1.02), (-2.05, 1.7), (0.5, 1.74), (1.15, 1.12), (2.1, 1.0),
     (2.25, 0.38)),
    (1, 3), 1.08, 0.97,
)  # fmt: skip
_VAN = _Shape(
    ((-2.5, 0.3), (-2.5, 1.05), (-2.45, 1.98), (1.2, 2.02), (1.95, 1.15), (2.5, 0.95),
     (2.55, 0.3)),
    (1, 3), 1.12, 0.96,
)  # fmt: skip
_PICKUP = _Shape(
    ((-2.7, 0.42), (-2.7, 1.0), (-0.7, 1.02), (-0.55, 1.68), (0.7, 1.72), (1.3, 1.1),
     (2.6, 1.0), (2.7, 0.42)),
    (2, 4), 1.08, 0.98,
)  # fmt: skip
_SPORTS = _Shape(
    ((-2.2, 0.22), (-2.25, 0.85), (-1.7, 0.92), (-0.7, 1.2), (0.0, 1.22), (0.95, 0.85),
     (2.2, 0.62), (2.3, 0.22)),
    (2, 4), 0.86, 0.95,
)  # fmt: skip

_GLASS: Color = (46, 56, 66)


def _draw_car(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    shapes = (
        (_HATCHBACK, _HATCHBACK, _ESTATE, _ESTATE, _SEDAN, _OFFROADER, _VAN)
        if style.camera
        else (_SEDAN, _SEDAN, _SPORTS, _PICKUP, _OFFROADER, _VAN)
    )
    shape = r.choice(shapes)
    paint = _jittered(r, r.choice(style.paints), 0.12)
    body = _Body(canvas, *place)
    top = max(h for _, h in shape.profile)
    wide, belt = shape.half_width, shape.belt

    def half_width(h: float) -> float:
        return wide * (1 - 0.17 * max(0.0, h - belt) / (top - belt))

    front, rear = shape.profile[-1][0], shape.profile[0][0]
    body.contact(front - rear - 0.1, 2 * wide)
    body.box(shape.profile, half_width, paint, CAR)
    glass = _blend(_GLASS, canvas.haze, r.uniform(0.0, 0.25))
    for edge in shape.glass:
        (l1, h1), (l2, h2) = shape.profile[edge], shape.profile[edge + 1]
        out = ((h1 - h2), 0.0, (l2 - l1))
        corners = []
        for t, s in ((0.1, -0.88), (0.9, -0.86), (0.9, 0.86), (0.1, 0.88)):
            h = h1 + t * (h2 - h1)
            corners.append((l1 + t * (l2 - l1), s * half_width(h), h))
        body.panel(corners, out, glass)
    cabin = _above(shape.profile, belt)
    mid_l = sum(c for c, _ in cabin) / len(cabin)
    mid_h = sum(h for _, h in cabin) / len(cabin)
    window = [(mid_l + 0.84 * (c - mid_l), mid_h + 0.74 * (h - mid_h)) for c, h in cabin]
    for s in (-1, 1):
        body.panel([(c, s * half_width(h), h) for c, h in window], (0, s, 0), glass)
        pillar = ((-0.05, belt), (-0.05, top), (0.05, top), (0.05, belt))
        offset = r.uniform(-0.5, -0.3)
        corners = [(offset + c, s * half_width(h), h - 0.02) for c, h in pillar]
        body.panel(corners, (0, s, 0), paint)
    body.wheels((rear + 0.8, front - 0.8), wide, 0.32)
    low = shape.profile[1][1]
    for end, side in ((rear - 0.06, -1), (front + 0.02, 1)):
        lamp: Color = (200, 26, 24) if side < 0 else (240, 236, 220)
        height = low - 0.12 if side < 0 else shape.profile[-2][1] - 0.14
        for s in (-1, 1):
            _plate(body, end, s * (wide - 0.22), height, 0.17, 0.1, side, lamp)
        _plate(body, end, 0, 0.5, 0.27, 0.07, side, (226, 226, 220))
        _plate(body, end, 0, 0.33, wide - 0.03, 0.06, side, (40, 40, 42))


def _plate(
    body: _Body, end: float, s: float, h: float, a: float, b: float, side: int, color: Color
) -> None:
    """A rectangle of half sizes a, b on the rear (side -1) or front (side 1) of a vehicle."""
    corners = [(end, s - a, h - b), (end, s + a, h - b), (end, s + a, h + b), (end, s - a, h + b)]
    body.panel(corners, (side, 0, 0), color)


def _above(profile: Sequence[tuple[float, float]], level: float) -> list[tuple[float, float]]:
    kept: list[tuple[float, float]] = []
    for (la, ha), (lb, hb) in zip(profile, [*profile[1:], profile[0]], strict=True):
        if ha >= level:
            kept.append((la, ha))
        if (ha >= level) != (hb >= level):
            kept.append((la + (level - ha) / (hb - ha) * (lb - la), level))
    return kept


def _draw_coach(
    canvas: _Canvas,
    place: _Place,
    label: int,
    paint: Color,
    stripe: Color,
    size: tuple[float, float, float],
) -> None:
    """A long box with a band of windows: a bus, or one car of a train."""
    length, width, height = size
    body = _Body(canvas, *place)
    a, w = length / 2, width / 2
    body.contact(length, width)
    profile = ((-a, 0.3), (-a, height), (a, height), (a, 0.3))
    body.box(profile, lambda _: w, paint, label)
    windows = max(3, round(length / 1.7))
    for s in (-1, 1):
        side = (0, s, 0)
        low = 0.3 + 0.12 * height
        body.panel([(-a, s * w, 0.3), (a, s * w, 0.3), (a, s * w, low), (-a, s * w, low)], side,
                   stripe)  # fmt: skip
        for k in range(windows):
            l1 = -a + (k + 0.1) * length / windows
            l2 = -a + (k + 0.9) * length / windows
            door = label == BUS and k % 4 == 1
            h1, h2 = 0.35 if door else 0.42 * height, 0.8 * height
            body.panel([(l1, s * w, h1), (l2, s * w, h1), (l2, s * w, h2), (l1, s * w, h2)], side,
                       _GLASS)  # fmt: skip
    for side_l in (-1, 1):
        _plate(body, side_l * a, 0, 0.6 * height, w - 0.15, 0.22 * height, side_l, _GLASS)
        _plate(body, side_l * a, 0, 0.9 * height, w - 0.4, 0.05 * height, side_l, (230, 150, 40))
        lamp: Color = (200, 26, 24) if side_l < 0 else (240, 236, 220)
        for s in (-1, 1):
            _plate(body, side_l * a, s * (w - 0.25), 0.75, 0.14, 0.12, side_l, lamp)
    if label == BUS:
        body.wheels((-a + 2.6, a - 2.4), w, 0.48)


def _draw_bus(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    paints: tuple[Color, ...] = (
        ((196, 160, 52), (170, 46, 42), (176, 178, 176), (60, 90, 120))
        if style.camera
        else ((240, 240, 235), (30, 90, 190), (220, 60, 40))
    )
    paint = _jittered(r, r.choice(paints), 0.08)
    stripe = _scaled(r.choice(style.paints), 0.9)
    _draw_coach(canvas, place, BUS, paint, stripe, (r.uniform(10, 12.5), 2.5, 3.05))


def _draw_train(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    paints: tuple[Color, ...] = (
        ((198, 178, 62), (160, 44, 40), (188, 190, 190), (74, 116, 92))
        if style.camera
        else ((196, 202, 210), (230, 230, 235))
    )
    paint = _jittered(r, r.choice(paints), 0.08)
    stripe: Color = (150, 150, 152) if style.camera else (30, 70, 180)
    x, z, yaw = place
    size = (8.5, 2.4, 3.3) if style.camera else (13.0, 2.9, 3.8)
    cars = 4 if style.camera else 3
    for k in reversed(range(cars)):
        middle = z + k * (size[0] + 0.5)
        _draw_coach(canvas, _Place(x, middle, yaw), TRAIN, paint, stripe, size)
    if style.camera:
        canvas.rod((x - 0.5, 3.35, z), (x + 0.3, 4.4, z + 0.8), 0.07, (60, 60, 62), TRAIN)
        canvas.rod((x + 0.3, 4.4, z + 0.8), (x - 0.6, 5.3, z + 0.2), 0.07, (60, 60, 62), TRAIN)


def _draw_truck(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    x, z, yaw = place
    cargo = _jittered(
        r, r.choice(((214, 214, 210), (190, 186, 172), (90, 110, 140), (180, 70, 50))), 0.1
    )
    paint = _jittered(r, r.choice(style.paints), 0.12)
    body = _Body(canvas, x, z, yaw)
    body.contact(8.2, 2.4)
    high = r.uniform(3.0, 3.6)

    def cab() -> None:
        profile = ((1.9, 0.45), (1.9, 2.7), (3.5, 2.7), (4.0, 1.5), (4.05, 0.45))
        body.box(profile, lambda _: 1.15, paint, TRUCK)
        body.panel([(3.6, -1, 2.5), (3.6, 1, 2.5), (4, 1, 1.6), (4, -1, 1.6)], (1, 0, 0.4), _GLASS)
        for s in (-1, 1):
            window = [(2.2, s * 1.15, 1.6), (2.2, s * 1.15, 2.45), (3.4, s * 1.15, 2.45),
                      (3.8, s * 1.15, 1.6)]  # fmt: skip
            body.panel(window, (0, s, 0), _GLASS)
            _plate(body, 4.06, s * 0.85, 0.85, 0.2, 0.12, 1, (240, 236, 220))

    def box() -> None:
        profile = ((-4.0, 0.95), (-4.0, high), (1.7, high), (1.7, 0.95))
        body.box(profile, lambda _: 1.22, cargo, TRUCK)
        bumper = ((-3.9, 0.5), (-3.9, 0.95), (1.9, 0.95), (1.9, 0.5))
        body.box(bumper, lambda _: 1.1, (44, 44, 46), TRUCK)
        _plate(body, -4.02, 0, (0.95 + high) / 2, 0.02, (high - 1) / 2, -1, _scaled(cargo, 0.6))
        for s in (-1, 1):
            _plate(body, -3.95, s * 0.9, 0.75, 0.16, 0.1, -1, (200, 26, 24))

    # What is farther away goes first.
    for part in (cab, box) if math.cos(yaw) > 0 else (box, cab):
        part()
    body.wheels((-3.0, -1.9, 3.0), 1.15, 0.46)


def _draw_person(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    body = _Body(canvas, *place)
    tall = r.uniform(1.5, 1.9)
    coat = _jittered(r, r.choice(style.clothes), 0.15)
    legs = _jittered(r, r.choice(style.clothes), 0.15)
    skin: Color = r.choice(((214, 170, 140), (160, 112, 84), (96, 66, 50), (226, 186, 158)))
    hair: Color = r.choice(((40, 30, 26), (90, 66, 40), (150, 146, 140), (24, 22, 22)))
    step = r.uniform(0.0, 0.32) * tall / 1.7
    lit = canvas.light((0.0, 0.3, -1.0))
    coat, legs, skin, hair = (_scaled(color, lit) for color in (coat, legs, skin, hair))

    def rod(a: Point, b: Point, width: float, color: Color) -> None:
        canvas.rod(body.at(*a), body.at(*b), width, color, PERSON)

    hip, shoulder = 0.5 * tall, 0.8 * tall
    for s, l in ((-1, step), (1, -step)):  # noqa: E741
        rod((l, s * 0.09, 0.03), (0, s * 0.09, hip), 0.16, legs)
        rod((l + 0.08, s * 0.09, 0.04), (l - 0.03, s * 0.09, 0.04), 0.12, (28, 26, 26))
        rod((0, s * 0.24, shoulder - 0.04), (-l, s * 0.27, hip + 0.04), 0.12, _scaled(coat, 0.88))
    rod((0, 0, hip), (0, 0, shoulder - 0.12), 0.4, coat)
    rod((0, -0.12, shoulder - 0.05), (0, 0.12, shoulder - 0.05), 0.24, coat)
    if r.random() < 0.25:
        rod((-0.1, -0.3, hip), (-0.1, -0.3, hip + 0.25), 0.28, _scaled(legs, 0.7))
    canvas.ball(body.at(0, 0, 0.92 * tall), 0.11, 0.14, skin, PERSON)
    canvas.ball(body.at(-0.02, 0, 0.95 * tall), 0.11, 0.09, hair, PERSON)


def _draw_rider(canvas: _Canvas, r: random.Random, style: _Style, body: _Body, seat: float) -> None:
    coat = _jittered(r, r.choice(style.clothes), 0.15)
    legs = _jittered(r, r.choice(style.clothes), 0.15)
    helmet = r.choice(((220, 220, 216), (40, 40, 44), (180, 50, 44), (60, 90, 150)))
    skin: Color = (206, 164, 136)

    def rod(a: Point, b: Point, width: float, color: Color) -> None:
        canvas.rod(body.at(*a), body.at(*b), width, color, RIDER)

    for s in (-1, 1):
        rod((-0.15, s * 0.1, seat), (0.28, s * 0.15, seat - 0.12), 0.17, legs)
        rod((0.28, s * 0.15, seat - 0.12), (0.05, s * 0.14, 0.3), 0.14, legs)
        rod((0.15, s * 0.2, seat + 0.5), (0.45, s * 0.26, seat + 0.15), 0.12, _scaled(coat, 0.88))
    rod((-0.15, 0, seat + 0.05), (0.12, 0, seat + 0.42), 0.38, coat)
    rod((0.12, -0.12, seat + 0.5), (0.12, 0.12, seat + 0.5), 0.22, coat)
    canvas.ball(body.at(0.22, 0, seat + 0.72), 0.12, 0.15, skin, RIDER)
    canvas.ball(body.at(0.2, 0, seat + 0.77), 0.14, 0.12, helmet, RIDER)


def _draw_wheel(body: _Body, l: float, radius: float, tyre: float, label: int) -> None:  # noqa: E741
    """A spoked wheel; its disc is labelled as the annotators of Cityscapes fill it."""
    canvas = body.canvas
    rim = [
        body.at(
            l + radius * math.cos(k * math.pi / 8), 0, radius + radius * math.sin(k * math.pi / 8)
        )
        for k in range(17)
    ]
    disc = [canvas.project(point) for point in rim]
    if body.z > 2:
        canvas.disc(disc, label)
    for a, b in pairwise(rim):
        canvas.rod(a, b, tyre, (30, 30, 32), label)


def _draw_bicycle(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    body = _Body(canvas, *place)
    paint = _jittered(r, r.choice(style.paints), 0.2)
    for l in (-0.52, 0.52):  # noqa: E741
        _draw_wheel(body, l, 0.34, 0.05, BICYCLE)
    hub, pedals, saddle, head = (-0.52, 0.34), (-0.08, 0.32), (-0.2, 0.9), (0.36, 0.92)
    for a, b in ((hub, pedals), (pedals, saddle), (pedals, head), (saddle, head), (hub, saddle),
                 (head, (0.52, 0.34))):  # fmt: skip
        canvas.rod(body.at(a[0], 0, a[1]), body.at(b[0], 0, b[1]), 0.05, paint, BICYCLE)
    canvas.rod(body.at(0.38, -0.28, 1.02), body.at(0.38, 0.28, 1.02), 0.05, (40, 40, 42), BICYCLE)
    canvas.rod(body.at(-0.32, 0, 0.95), body.at(-0.1, 0, 0.95), 0.09, (34, 32, 32), BICYCLE)


def _draw_motorcycle(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    body = _Body(canvas, *place)
    paint = _jittered(r, r.choice(style.paints), 0.2)
    for l in (0.68, -0.68):  # noqa: E741
        _draw_wheel(body, l, 0.31, 0.14, MOTORCYCLE)
    tank = ((-0.75, 0.62), (-0.8, 0.85), (-0.1, 0.8), (0.15, 1.0), (0.5, 0.95), (0.4, 0.3),
            (-0.4, 0.28))  # fmt: skip
    body.box(tank, lambda h: 0.2 if h > 0.5 else 0.14, paint, MOTORCYCLE)
    canvas.rod(body.at(0.5, 0, 0.95), body.at(0.68, 0, 0.31), 0.1, (120, 122, 126), MOTORCYCLE)
    canvas.rod(
        body.at(0.42, -0.36, 1.06), body.at(0.42, 0.36, 1.06), 0.06, (40, 40, 42), MOTORCYCLE
    )
    _plate(body, -0.82, 0, 0.78, 0.1, 0.06, -1, (200, 26, 24))
    _plate(body, 0.56, 0, 0.95, 0.11, 0.1, 1, (240, 236, 220))


def _draw_cyclist(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    _draw_bicycle(canvas, r, style, place)
    _draw_rider(canvas, r, style, _Body(canvas, *place), 0.95)


def _draw_motorcyclist(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    _draw_motorcycle(canvas, r, style, place)
    _draw_rider(canvas, r, style, _Body(canvas, *place), 0.88)


# Things that stand beside the street.


def _draw_blobs(
    canvas: _Canvas,
    r: random.Random,
    center: Point,
    across: float,
    up: float,
    color: Color,
) -> None:
    """Leaves: a cloud of overlapping balls, darker below and away from the sun."""
    size = canvas.pixels(across, center[2])
    if size < 2:
        canvas.ball(center, across, up, color, VEGETATION)
        return
    count = min(70, max(10, int(size * 1.2)))
    canvas.ball(center, 0.8 * across, 0.8 * up, _scaled(color, 0.62), VEGETATION)
    spots = [(r.uniform(-1, 1), r.uniform(-1, 1)) for _ in range(count)]
    spots.sort(key=lambda spot: spot[1])
    for dx, dy in spots:
        reach = math.hypot(dx, dy)
        if reach > 1:
            dx, dy = dx / reach, dy / reach
        lit = 0.78 + 0.3 * dy + 0.25 * canvas.diffuse * dx * canvas.sun[0] + r.uniform(-0.14, 0.14)
        radius = r.uniform(0.16, 0.34)
        spot = (center[0] + 0.85 * dx * across, center[1] + 0.85 * dy * up, center[2])
        canvas.ball(spot, radius * across, radius * up, _scaled(color, lit), VEGETATION)


def _draw_tree(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    x, z, _ = place
    bark = _jittered(r, (86, 68, 54), 0.15)
    leaves = _jittered(r, r.choice(style.leaves), 0.12)
    if not style.camera and r.random() < 0.45:
        tall = r.uniform(7, 13)
        lean = r.uniform(-0.6, 0.6)
        canvas.rod(
            (x, 0, z), (x + lean, tall, z), 0.3, _jittered(r, (140, 116, 88), 0.1), VEGETATION
        )
        for k in range(14):
            angle = k * math.tau / 14 + r.uniform(-0.2, 0.2)
            out, drop = r.uniform(1.4, 2.2), r.uniform(-0.7, 0.3)
            mid = (x + lean + 0.6 * out * math.cos(angle), tall + 0.5 + 0.3 * math.sin(angle), z)
            end = (x + lean + out * math.cos(angle), tall + drop + 0.6 * math.sin(angle), z)
            frond = _scaled(leaves, r.uniform(0.75, 1.15))
            canvas.rod((x + lean, tall, z), mid, 0.3, frond, VEGETATION)
            canvas.rod(mid, end, 0.2, frond, VEGETATION)
        return
    tall = r.uniform(5, 10)
    across = r.uniform(0.22, 0.36) * tall
    crown = 0.64 * tall
    canvas.rod((x, 0, z), (x, crown, z), 0.045 * tall, bark, VEGETATION)
    _draw_blobs(canvas, r, (x, crown, z), across, 0.4 * tall, leaves)


def _draw_hedge(
    canvas: _Canvas, r: random.Random, style: _Style, x: float, z1: float, z2: float
) -> None:
    high = r.uniform(0.9, 1.8)
    leaves = _jittered(r, r.choice(style.leaves), 0.1)
    canvas.face(
        [(x, 0, z1), (x, 0, z2), (x, high, z2), (x, high, z1)], _scaled(leaves, 0.7), VEGETATION
    )
    z = z2
    while z > max(z1, 2.0):
        for level in (0.3, 0.65, 0.9):
            lit = _scaled(leaves, 0.6 + 0.45 * level + r.uniform(-0.1, 0.1))
            spot = (x + r.uniform(-0.2, 0.2), level * high, z)
            canvas.ball(spot, 0.35 * high, 0.25 * high, lit, VEGETATION)
        z -= 0.4 * high


def _draw_lamp(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    x, z, _ = place
    inward = -math.copysign(1, x)
    color: Color = (112, 116, 114) if style.camera else (70, 76, 84)
    tall = r.uniform(5.5, 8.5)
    canvas.rod((x, 0, z), (x, tall, z), 0.16, color, POLE)
    canvas.rod((x, tall, z), (x + 1.6 * inward, tall + 0.25, z), 0.11, color, POLE)
    head = x + 1.6 * inward
    canvas.rod(
        (head - 0.3, tall + 0.2, z), (head + 0.3, tall + 0.25, z), 0.2, (214, 214, 204), POLE
    )


def _draw_utility_pole(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    x, z, _ = place
    wood: Color = (108, 84, 64)
    canvas.rod((x, 0, z), (x, 9.5, z), 0.24, wood, POLE)
    for h in (8.2, 9.0):
        canvas.rod((x - 1.1, h, z), (x + 1.1, h, z), 0.14, wood, POLE)


def _draw_signal_head(canvas: _Canvas, r: random.Random, x: float, h: float, z: float) -> None:
    housing: Color = (34, 36, 38)
    lit = r.randrange(3)
    corners = [(x - 0.2, h, z), (x + 0.2, h, z), (x + 0.2, h + 1.05, z), (x - 0.2, h + 1.05, z)]
    canvas.face(corners, housing, LIGHT)
    for k, color in enumerate(((40, 220, 120), (250, 180, 40), (240, 40, 36))):
        glow = color if k == lit else _scaled(color, 0.25)
        canvas.ball((x, h + 0.19 + 0.33 * k, z), 0.13, 0.13, glow)


def _draw_signal(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    x, z, _ = place
    color: Color = (104, 108, 108) if style.camera else (60, 66, 70)
    inward = -math.copysign(1, x)
    if style.camera:
        canvas.rod((x, 0, z), (x, 3.3, z), 0.15, color, POLE)
        _draw_signal_head(canvas, r, x, 2.35, z - 0.1)
        return
    canvas.rod((x, 0, z), (x, 6.2, z), 0.22, color, POLE)
    canvas.rod((x, 6.0, z), (x + inward * abs(x) * 0.95, 6.2, z), 0.15, color, POLE)
    for reach in (0.35, 0.85):
        _draw_signal_head(canvas, r, x + inward * abs(x) * reach, 5.2, z - 0.1)
    _draw_signal_head(canvas, r, x, 2.6, z - 0.1)


def _draw_sign(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    x, z, _ = place
    h = r.uniform(2.1, 2.6)
    canvas.rod((x, 0, z), (x, h + 0.4, z), 0.08, (128, 130, 130), POLE)
    z -= 0.06

    def outline(corners: int, radius: float, turn: float, color: Color) -> None:
        points = [
            (x + radius * math.sin(turn + k * math.tau / corners),
             h + radius * math.cos(turn + k * math.tau / corners), z)
            for k in range(corners)
        ]  # fmt: skip
        canvas.face(points, color, SIGN)

    def board(a: float, b: float, color: Color) -> None:
        canvas.face([(x - a, h - b, z), (x + a, h - b, z), (x + a, h + b, z), (x - a, h + b, z)],
                    color, SIGN)  # fmt: skip

    red: Color = (196, 34, 36)
    white: Color = (232, 232, 228)
    yellow: Color = (236, 190, 40)
    if style.camera:
        kind = r.randrange(5)
        if kind == 0:
            outline(14, 0.36, 0, red)
            outline(14, 0.26, 0, white)
        elif kind == 1:
            outline(3, 0.46, 0, red)
            outline(3, 0.29, 0, white)
        elif kind == 2:
            outline(14, 0.36, 0, (36, 78, 156))
            board(0.05, 0.2, white)
        elif kind == 3:
            outline(4, 0.42, 0, white)
            outline(4, 0.31, 0, yellow)
        else:
            board(0.36, 0.36, (36, 78, 156))
            board(0.1, 0.22, white)
    else:
        kind = r.randrange(4)
        if kind == 0:
            outline(8, 0.44, math.pi / 8, white)
            outline(8, 0.39, math.pi / 8, red)
            board(0.26, 0.08, white)
        elif kind == 1:
            board(0.32, 0.42, white)
            board(0.2, 0.12, (30, 30, 30))
        elif kind == 2:
            outline(4, 0.52, 0, yellow)
            board(0.06, 0.22, (30, 30, 30))
        else:
            board(0.75, 0.2, (24, 120, 64))
            board(0.5, 0.05, white)


def _draw_bin(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    body = _Body(canvas, *place)
    color = r.choice(((60, 74, 60), (90, 92, 94), (150, 80, 40), (40, 60, 110)))
    high = r.uniform(0.8, 1.3)
    body.box(((-0.3, 0), (-0.3, high), (0.3, high), (0.3, 0)), lambda _: 0.3, color, STATIC)


def _draw_bollard(canvas: _Canvas, r: random.Random, style: _Style, place: _Place) -> None:
    x, z, _ = place
    canvas.rod((x, 0, z), (x, 0.95, z), 0.13, (96, 98, 100), POLE)
    canvas.rod((x, 0.72, z), (x, 0.82, z), 0.14, (200, 60, 50), POLE)


def _draw_wall(
    canvas: _Canvas, r: random.Random, style: _Style, x: float, z1: float, z2: float
) -> None:
    side = math.copysign(1, x)
    high = r.uniform(1.7, 3.0)
    kinds: tuple[Color, ...] = (
        ((128, 122, 114), (124, 92, 76), (150, 146, 136))
        if style.camera
        else ((214, 196, 164), (190, 188, 182), (176, 120, 92))
    )
    color = _jittered(r, r.choice(kinds), 0.08)
    lit = _scaled(color, canvas.light((-side, 0, 0)))
    canvas.face([(x, 0, z1), (x + 0.4 * side, 0, z1), (x + 0.4 * side, high, z1), (x, high, z1)],
                _scaled(color, canvas.light((0, 0, -1))), WALL)  # fmt: skip
    for a, b in _pieces(z1, z2, 4.0):
        canvas.face([(x, 0, a), (x, 0, b), (x, high, b), (x, high, a)], lit, WALL)
        canvas.face([(x, 0, a), (x, 0, a + 0.3), (x, high, a + 0.3), (x, high, a)],
                    _scaled(lit, 0.9))  # fmt: skip
        top = [(x, high - 0.15, a), (x, high - 0.15, b), (x, high, b), (x, high, a)]
        canvas.face(top, _scaled(lit, 1.15))


def _draw_fence(
    canvas: _Canvas, r: random.Random, style: _Style, x: float, z1: float, z2: float
) -> None:
    high = r.uniform(1.1, 2.0)
    kinds: tuple[Color, ...] = (
        ((70, 76, 72), (110, 90, 70), (52, 66, 58))
        if style.camera
        else ((236, 236, 232), (150, 110, 76), (60, 62, 66))
    )
    color = _jittered(r, r.choice(kinds), 0.1)
    solid = r.random() < 0.35
    for a, b in _pieces(z1, z2, 2.4):
        outline = [(x, 0, a), (x, 0, b), (x, high, b), (x, high, a)]
        canvas.disc([canvas.project(point) for point in outline], FENCE)
        if solid:
            canvas.face(outline, _scaled(color, r.uniform(0.85, 0.95)), FENCE)
        canvas.rod((x, 0, a), (x, high + 0.1, a), 0.1, color, FENCE)
        for h in (0.12, 0.92):
            canvas.rod((x, h * high, a), (x, h * high, b), 0.07, color, FENCE)
        bars = min(16, max(2, int(canvas.pixels(b - a, (a + b) / 2) / 8)))
        for k in range(1, bars):
            z = a + k * (b - a) / bars
            canvas.rod((x, 0.1 * high, z), (x, high, z), 0.05, color, FENCE)


def _pieces(z1: float, z2: float, step: float) -> list[tuple[float, float]]:
    """Cut a stretch of the street into short ones, the farthest first, from _NEAR on."""
    z1 = max(z1, _NEAR)
    if z2 <= z1:
        return []
    count = max(1, round((z2 - z1) / step))
    cuts = [z1 + k * (z2 - z1) / count for k in range(count + 1)]
    return [*pairwise(cuts)][::-1]


def _draw_building(
    canvas: _Canvas, r: random.Random, style: _Style, x: float, z1: float, z2: float
) -> None:
    side = math.copysign(1, x)
    floors = r.randint(*r.choice(style.floors))
    storey = r.uniform(2.9, 3.5)
    ground = storey + 0.5
    high = ground + (floors - 1) * storey
    deep = r.uniform(9, 14)
    wall = _jittered(r, r.choice(style.walls), 0.1)
    trim = _scaled(wall, r.choice((0.7, 0.8, 1.18)))
    roof = _jittered(r, r.choice(style.roofs), 0.1)
    back = x + side * deep
    street_light, end_light = canvas.light((-side, 0, 0)), canvas.light((0, 0, -1))
    front, end = _scaled(wall, street_light), _scaled(wall, end_light)
    near = max(z1, _NEAR)

    canvas.face([(x, 0, z1), (back, 0, z1), (back, high, z1), (x, high, z1)], end, BUILDING)
    pitched = style.camera or (floors <= 2 and r.random() < 0.6)
    if pitched:
        ridge, top = (x + back) / 2, high + r.uniform(2.0, 4.5)
        tiles = _scaled(roof, canvas.light((-0.6 * side, 0.8, 0)))
        canvas.face([(x, high, z1), (back, high, z1), (ridge, top, z1)], end, BUILDING)
        for a, b in _pieces(z1, z2, 8.0):
            canvas.face([(x, high, a), (x, high, b), (ridge, top, b), (ridge, top, a)], tiles,
                        BUILDING)  # fmt: skip
        if r.random() < 0.6:
            z = r.uniform(z1, z2)
            canvas.rod((ridge, top - 0.5, z), (ridge, top + 1.0, z), 0.7, _scaled(roof, 0.8),
                       BUILDING)  # fmt: skip
    for a, b in _pieces(z1, z2, 8.0):
        canvas.face([(x, 0, a), (x, 0, b), (x, high, b), (x, high, a)], front, BUILDING)

    glass = _blend((58, 66, 76), (150, 180, 215), r.uniform(0.0, 0.35 if style.camera else 0.8))
    tower = floors > 7 and r.random() < 0.6
    bays = max(2, round((z2 - z1) / r.uniform(2.0, 3.2)))
    wide = r.uniform(0.42, 0.62)
    sill, head = 0.28, r.uniform(0.78, 0.86)
    for floor in range(floors):
        h = 0.0 if floor == 0 else ground + (floor - 1) * storey
        if canvas.pixels(storey, near + 2) < 4:
            break
        low, lintel = h + sill * storey, h + head * storey
        if tower and floor > 0:
            for a, b in _pieces(z1, z2, 8.0):
                canvas.face([(x, low, a), (x, low, b), (x, lintel + 0.3, b), (x, lintel + 0.3, a)],
                            _scaled(glass, street_light))  # fmt: skip
            canvas.face([(x, low, z1), (back, low, z1), (back, lintel + 0.3, z1),
                         (x, lintel + 0.3, z1)], _scaled(glass, end_light))  # fmt: skip
            continue
        if style.camera and floor > 0 and floor == floors - 1:
            canvas.rod((x, h, near), (x, h, z2), 0.25, _scaled(trim, street_light))
        for k in reversed(range(bays)):
            a = z1 + (k + 0.5 - wide / 2) * (z2 - z1) / bays
            b = z1 + (k + 0.5 + wide / 2) * (z2 - z1) / bays
            if b < 2 or canvas.pixels(b - a, b) * abs(x) / b < 1:
                continue
            bottom = 0.15 if floor == 0 and k % 3 == 1 else low
            pane = _scaled(glass, street_light * r.uniform(0.75, 1.15))
            rim = [(x, bottom - 0.12, a - 0.1), (x, bottom - 0.12, b + 0.1),
                   (x, lintel + 0.12, b + 0.1), (x, lintel + 0.12, a - 0.1)]  # fmt: skip
            canvas.face(rim, _scaled(trim, street_light))
            canvas.face([(x, bottom, a), (x, bottom, b), (x, lintel, b), (x, lintel, a)], pane)
        for k in range(3):
            a = x + side * deep * (k + 0.3) / 3
            b = x + side * deep * (k + 0.7) / 3
            if z1 > 4:
                canvas.face([(a, low, z1), (b, low, z1), (b, lintel, z1), (a, lintel, z1)],
                            _scaled(glass, end_light * r.uniform(0.8, 1.1)))  # fmt: skip
    if r.random() < (0.35 if style.camera else 0.45) and z2 > 5:
        awning = _jittered(r, r.choice(style.paints), 0.1)
        a, b = near + 0.2 * (z2 - near), near + 0.8 * (z2 - near)
        out = x - side * 1.1
        canvas.face([(x, 3.2, a), (x, 3.2, b), (out, 2.7, b), (out, 2.7, a)],
                    _scaled(awning, canvas.light((0, 1, 0))), BUILDING)  # fmt: skip
        canvas.face([(x, 3.2, a), (out, 2.7, a), (x, 2.7, a)], _scaled(awning, 0.7), BUILDING)


def _draw_distant_block(canvas: _Canvas, x: float, z: float, high: float, wall: Color) -> None:
    a, b = x - 14, x + 14
    lit = _scaled(wall, canvas.light((0, 0, -1)))
    canvas.face([(a, 0, z), (b, 0, z), (b, high, z), (a, high, z)], lit, BUILDING)
    for k in range(1, int(high / 3.2)):
        for j in range(7):
            left, low = a + 1 + 4 * j, 3.2 * k
            canvas.face([(left, low, z), (left + 2.2, low, z), (left + 2.2, low + 1.7, z),
                         (left, low + 1.7, z)], _scaled(lit, 0.66))  # fmt: skip


# The plan of a scene: what stands where, the farthest painted first.


class _Street:
    """Where the parts of the street lie, and what is to be painted on and beside it.

    `half` and `walk` are the distances from the middle to the kerb and to the lots, `median` that
    to the innermost lanes, `crossing` the z range of a cross street, `rails` the x of a track.
    """

    def __init__(self, canvas: _Canvas, r: random.Random, style: _Style, feature: str) -> None:
        self.canvas, self.r, self.style, self.feature = canvas, r, style, feature
        self.things: list[tuple[float, Callable[[], None]]] = []
        self.lanes = r.choice(style.lanes)
        self.parked = [r.random() < style.parked for _ in range(2)]
        bay = 2.1 if any(self.parked) else 0.0
        self.median = 2.4 if feature == "train" and not style.camera else 0.0
        self.half = self.median + self.lanes * style.lane + bay
        self.walk = self.half + r.uniform(*style.sidewalk)
        start = r.uniform(14, 34)
        crossed = feature == "lights" or r.random() < 0.3
        self.crossing = (start, start + r.uniform(8, 14)) if crossed else None
        self.rails = None
        if feature == "train":
            self.rails = -style.lane / 2 if style.camera else 0.0
        self.verge = r.random() < (0.35 if style.camera else 0.5)
        self.ego_lane = r.randrange(self.lanes)
        canvas.eye_x = self.lane_x(self.ego_lane) + r.uniform(-0.3, 0.3)

    def lane_x(self, lane: int) -> float:
        """Middle of a lane; 0, 1, ... are ours from the median on, -1, -2, ... come towards us."""
        inner = lane if lane >= 0 else -lane - 1
        x = self.median + (inner + 0.5) * self.style.lane
        return x if lane >= 0 else -x

    def add(self, z: float, draw: Callable[[], None]) -> None:
        self.things.append((z, draw))

    def put(
        self,
        draw: Callable[[_Canvas, random.Random, _Style, _Place], None],
        x: float,
        z: float,
        yaw: float = 0.0,
        shadow: tuple[float, float, float] = (0.2, 0.2, 1.7),
    ) -> None:
        """Place a thing and cast the shadow of a box of length, width, height around it."""
        place = _Place(x, z, yaw)
        self.add(z, lambda: draw(self.canvas, self.r, self.style, place))
        body = _Body(self.canvas, x, z, yaw)
        a, b = shadow[0] / 2, shadow[1] / 2
        corners = [body.at(c * a, s * b, 0) for c, s in ((-1, -1), (-1, 1), (1, 1), (1, -1))]
        self.canvas.cast([(x, z) for x, _, z in corners], shadow[2])

    def on_crossing(self, z: float, margin: float = 0.0) -> bool:
        crossing = self.crossing
        return crossing is not None and crossing[0] - margin < z < crossing[1] + margin


def _plan_lots(street: _Street) -> None:
    r, style, canvas = street.r, street.style, street.canvas
    kinds = [kind for kind, _ in style.lots]
    weights = [weight for _, weight in style.lots]
    featured = r.choice((-1, 1))
    for side in (-1, 1):
        z = r.uniform(-8, 0)
        while z < 130:
            length = r.uniform(8, 16) if style.camera else r.uniform(10, 26)
            if street.crossing and z < street.crossing[1] and z + length > street.crossing[0]:
                if street.crossing[0] - z < 5:
                    z = street.crossing[1] + 0.5
                    continue
                length = street.crossing[0] - z - 0.5
            kind = r.choices(kinds, weights)[0]
            if side == featured and z < 14 < z + length + 6 and street.feature in kinds:
                kind = street.feature
            _plan_lot(street, kind, side, z, z + length)
            z += length + (r.uniform(1, 6) if r.random() < 0.2 else 0.0)
    # What closes the view where the street ends.
    for k in range(26):
        x = (k - 12.5) * 22 + r.uniform(-8, 8)
        z = r.uniform(150, 210)
        if r.random() < (0.55 if style.camera else 0.35):
            high = (
                r.uniform(10, 22) if style.camera else r.choice((12, 25, 60)) * r.uniform(0.6, 1.3)
            )
            wall = _jittered(r, r.choice(style.walls), 0.1)
            street.add(
                z,
                lambda x=x, z=z, high=high, wall=wall: _draw_distant_block(
                    canvas, x, z, high, wall
                ),
            )
        else:
            leaves = _jittered(r, r.choice(style.leaves), 0.1)
            street.add(
                z,
                lambda x=x, z=z, leaves=leaves: _draw_blobs(
                    canvas, r, (x, 5.0, z), 15.0, 7.0, leaves
                ),
            )


def _plan_lot(street: _Street, kind: str, side: int, z1: float, z2: float) -> None:
    r, style, canvas = street.r, street.style, street.canvas
    x = side * street.walk
    if kind == "building":
        x += side * r.uniform(*style.setback)
        street.add(z2, lambda: _draw_building(canvas, r, style, x, z1, z2))
        canvas.cast([(x, z1), (x, z2), (x + side, z2), (x + side, z1)], 9.0)
        return
    grass = _jittered(r, style.grass, 0.12)

    def lawn() -> None:
        for a, b in _pieces(z1, z2, 6.0):
            far = x + side * 45
            canvas.face([(x, 0, a), (x, 0, b), (far, 0, b), (far, 0, a)], grass, TERRAIN)

    # A little behind the lot's own things, in front of whatever stands farther away.
    street.add(z2 + 0.02, lawn)
    trees = {"park": (2, 5), "wall": (1, 4), "fence": (0, 3)}[kind]
    for _ in range(r.randint(*trees)):
        tree_x = x + side * r.uniform(2.5, 12)
        street.put(_draw_tree, tree_x, r.uniform(z1, z2), shadow=(2.5, 2.5, 6.0))
    if kind == "fence" and r.random() < 0.5:
        setback = x + side * r.uniform(9, 14)
        street.add(z2 + 0.01, lambda: _draw_building(canvas, r, style, setback, z1, z2))
    # Nearer than all that stands behind it.
    if kind == "wall":
        street.add(z1, lambda: _draw_wall(canvas, r, style, x, z1, z2))
        canvas.cast([(x, z1), (x, z2), (x + side * 0.4, z2), (x + side * 0.4, z1)], 2.3)
    elif kind == "fence":
        street.add(z1, lambda: _draw_fence(canvas, r, style, x, z1, z2))
    elif r.random() < 0.5:
        street.add(z1, lambda: _draw_hedge(canvas, r, style, x, z1, z2))


def _plan_furniture(street: _Street) -> None:
    r, style = street.r, street.style
    for side in (-1, 1):
        kerb = side * (street.half + 0.5)
        z = r.uniform(6, 20)
        utility = not style.camera and r.random() < 0.4
        while z < 110:
            if not street.on_crossing(z, 1.0):
                pole = _draw_utility_pole if utility else _draw_lamp
                street.put(pole, kerb, z, shadow=(0.2, 0.2, 7.0))
            z += r.uniform(16, 26)
        if r.random() < 0.6:
            z = r.uniform(4, 14)
            while z < 100:
                if not street.on_crossing(z, 2.0):
                    tree_x = kerb + side * r.uniform(0.3, 1.0)
                    street.put(_draw_tree, tree_x, z, shadow=(2.5, 2.5, 6.0))
                z += r.uniform(9, 22)
        for _ in range(r.randint(1, 4)):
            z = r.uniform(6, 50)
            if not street.on_crossing(z):
                street.put(_draw_sign, kerb + side * r.uniform(-0.1, 0.5), z)
        if r.random() < 0.35:
            z = r.uniform(6, 30)
            if not street.on_crossing(z):
                street.put(_draw_bin, kerb + side * 0.4, z, shadow=(0.6, 0.6, 1.0))
        if style.camera and r.random() < 0.3:
            z = r.uniform(6, 12)
            for k in range(r.randint(3, 7)):
                if not street.on_crossing(z + 1.6 * k):
                    street.put(_draw_bollard, kerb, z + 1.6 * k, shadow=(0.15, 0.15, 0.9))
    if street.crossing:
        for side in (-1, 1):
            street.put(_draw_signal, side * (street.half + 0.4), street.crossing[0] - 0.8)
        street.put(_draw_signal, -(street.half + 0.4), street.crossing[1] + 0.8)


def _plan_traffic(street: _Street) -> None:
    r, style, feature = street.r, street.style, street.feature
    car = (4.2, 1.8, 1.4)
    taken: list[tuple[float, float]] = []

    def free(x: float, z: float, gap: float) -> bool:
        if any(abs(x - tx) < 1.7 and abs(z - tz) < gap for tx, tz in taken):
            return False
        taken.append((x, z))
        return True

    def lane_ahead(lane: int) -> float:
        """A distance at which something in this lane is seen, and no collision."""
        return r.uniform(9, 22) if lane != street.ego_lane else r.uniform(13, 30)

    lanes = range(-street.lanes, street.lanes)
    side_lanes = [lane for lane in lanes if lane != street.ego_lane]
    if feature == "train" and street.rails is not None:
        z = r.uniform(13, 24)
        street.put(_draw_train, street.rails, z, math.pi, (8, 2.5, 3.3))
        taken.extend((street.rails, z + 5 * k) for k in range(-1, 9))
    for kind, draw, length in (("bus", _draw_bus, 11.0), ("truck", _draw_truck, 8.0)):
        if feature == kind or r.random() < 0.06:
            lane = r.choice(side_lanes if feature == kind else lanes)
            x, z = street.lane_x(lane), lane_ahead(lane) + length / 2
            if free(x, z, 12):
                street.put(draw, x, z, 0.0 if lane >= 0 else math.pi, (length, 2.4, 3))
    for kind, draw in (("cyclist", _draw_cyclist), ("motorcyclist", _draw_motorcyclist)):
        for k in range(2):
            if (feature == kind and (k == 0 or r.random() < 0.5)) or r.random() < 0.05:
                lane = r.choice(lanes)
                outward = 0.9 if lane >= 0 else -0.9
                x = street.lane_x(lane) + (outward if kind == "cyclist" else 0.0)
                z, yaw = r.uniform(8, 20), 0.0 if lane >= 0 else math.pi
                if r.random() < 0.35 and kind == "cyclist":
                    yaw = r.choice((-1, 1)) * r.uniform(1.1, 1.9)
                if free(x, z, 3):
                    street.put(draw, x, z, yaw + r.uniform(-0.25, 0.25), (1.6, 0.5, 1.6))
    for _ in range(r.randint(*style.cars)):
        lane = r.choice(lanes)
        x, z = street.lane_x(lane) + r.uniform(-0.3, 0.3), lane_ahead(lane) + r.expovariate(1 / 18)
        if free(x, z, 7):
            street.put(_draw_car, x, z, 0.0 if lane >= 0 else math.pi, car)
    if street.crossing and r.random() < 0.5:
        middle = (street.crossing[0] + street.crossing[1]) / 2
        for _ in range(r.randint(1, 2)):
            x, z, yaw = (
                r.uniform(-9, 9),
                middle + r.choice((-2, 2)),
                r.choice((-1, 1)) * math.pi / 2,
            )
            if free(x, z, 6) and free(x - 2.2, z, 1) and free(x + 2.2, z, 1):
                street.put(_draw_car, x, z, yaw, car)
    for side, parked in zip((-1, 1), street.parked, strict=True):
        z = r.uniform(4, 11)
        while parked and z < 80:
            if not street.on_crossing(z, 5.0) and r.random() < 0.8:
                x = side * (street.half - 1.05)
                if free(x, z, 4.6):
                    street.put(_draw_car, x, z, 0.0 if side > 0 else math.pi, car)
            z += r.uniform(5.2, 6.5)


def _plan_people(street: _Street) -> None:
    r, style, feature = street.r, street.style, street.feature

    def sidewalk_x(side: int) -> float:
        return side * r.uniform(street.half + 0.4, street.walk - 0.3)

    for _ in range(r.randint(*style.persons)):
        side, z = r.choice((-1, 1)), 5 + r.expovariate(1 / 14)
        x, yaw = sidewalk_x(side), r.choice((0.0, math.pi)) + r.uniform(-0.6, 0.6)
        if street.crossing and r.random() < 0.3:
            z, x = street.crossing[0] - 1.8 + r.uniform(-0.8, 0.8), r.uniform(-1, 1) * street.half
            yaw = math.pi / 2
        for k in range(2 if r.random() < 0.3 else 1):
            street.put(_draw_person, x + 0.6 * k, z + 0.2 * k, yaw, (0.3, 0.45, 1.7))
    for kind, draw, chance in (
        ("bicycles", _draw_bicycle, 0.15 if style.camera else 0.04),
        ("motorcycles", _draw_motorcycle, 0.05),
    ):
        if feature == kind or r.random() < chance:
            side, z = r.choice((-1, 1)), r.uniform(6, 13)
            yaw = r.choice((0.0, math.pi / 2, 1.1)) + r.uniform(-0.2, 0.2)
            for _ in range(r.randint(1, 3 if kind == "motorcycles" else 4)):
                x = side * (street.half + 0.7 + 0.15 * r.random())
                if not street.on_crossing(z):
                    street.put(draw, x, z, yaw + r.uniform(-0.1, 0.1), (1.6, 0.4, 1.0))
                z += 0.9 + r.random()


# Sky, ground, and the way from a clean picture to what a game or a camera shows.


def _noise(
    rng: np.random.Generator, size: tuple[int, int], cells: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Smooth noise of unit deviation: a sum of layers, each with cells of (down, across) pixels."""
    total = np.zeros(size, dtype=np.float32)
    for down, across in cells:
        grid = (int(size[0] / down) + 3, int(size[1] / across) + 3)
        layer = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
        total += np.asarray(layer.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return total / max(float(total.std()), 1e-6)


def _paint_sky(canvas: _Canvas, rng: np.random.Generator, r: random.Random, style: _Style) -> None:
    skies: tuple[tuple[Color, Color, Color, float], ...]  # zenith, horizon, cloud, cover
    if style.camera:
        skies = (
            ((196, 201, 206), (226, 227, 226), (240, 240, 238), 0.6),
            ((176, 184, 192), (212, 215, 216), (222, 223, 222), 0.7),
            ((140, 166, 198), (214, 222, 228), (236, 236, 232), 0.4),
        )
    else:
        skies = (
            ((56, 118, 212), (176, 212, 240), (250, 250, 252), 0.4),
            ((38, 96, 196), (150, 200, 244), (255, 255, 255), 0.25),
            ((92, 118, 186), (250, 206, 150), (255, 226, 190), 0.4),
        )
    zenith, low, cloud, cover = r.choice(skies)
    rows = np.clip(np.arange(canvas.height) / canvas.horizon, 0, 1)[:, None, None] ** 0.8
    sky = np.asarray(zenith) * (1 - rows) + np.asarray(low) * rows
    small = (canvas.height // 4, canvas.width // 4)
    scale = canvas.width / 640
    cells = [(c * scale, 2 * c * scale) for c in (30, 14, 7)]
    noise = _noise(rng, small, cells) - 1 + 2 * cover
    clouds = 1 / (1 + np.exp(-noise * (1.2 if style.camera else 3.5)))
    mask = np.asarray(Image.fromarray(clouds).resize((canvas.width, canvas.height)))[..., None]
    sky = sky + (np.asarray(cloud) - sky) * mask * (0.9 - 0.5 * rows)
    canvas.picture = Image.fromarray(sky.round().clip(0, 255).astype(np.uint8))
    canvas.restart()
    canvas.haze = _blend(low, cloud, 0.3)
    if style.camera:
        sunny = r.random() < 0.3
        canvas.clear = r.uniform(180, 420)
        canvas.ambient, canvas.diffuse = (0.66, 0.36) if sunny else (0.82, 0.16)
    else:
        canvas.clear = r.uniform(450, 800)
        canvas.ambient, canvas.diffuse = 0.62, 0.5
    height, angle = r.uniform(0.45, 1.1), r.uniform(0, math.tau)
    flat = math.cos(height)
    canvas.sun = (flat * math.cos(angle), math.sin(height), flat * math.sin(angle))


def _paint_hills(canvas: _Canvas, r: random.Random, style: _Style) -> None:
    if style.camera or r.random() < 0.4:
        return
    color = _jittered(r, (132, 128, 84), 0.15)
    turns = [(r.uniform(0.8, 3.0), r.uniform(0, math.tau), r.uniform(4, 14)) for _ in range(4)]
    for k in range(40):
        x1, x2 = ((k + j) * 25.0 - 500 for j in (0, 1))
        tops = [
            12 + sum(a * (1 + math.sin(f * x / 160 + t)) for f, t, a in turns) for x in (x1, x2)
        ]
        z = _FAR - 20
        canvas.face([(x1, 0, z), (x2, 0, z), (x2, tops[1], z), (x1, tops[0], z)], color, TERRAIN)


def _paint_ground(street: _Street) -> None:
    canvas, r, style = street.canvas, street.r, street.style
    asphalt = _jittered(r, style.asphalt, 0.14)
    pavement = _jittered(r, style.pavement, 0.1)
    grass = _jittered(r, style.grass, 0.1)
    half, walk = street.half, street.walk
    outside = (SIDEWALK, pavement) if r.random() < 0.5 else (TERRAIN, grass)
    if r.random() < 0.2:
        outside = (GROUND, _jittered(r, (150, 138, 116), 0.1))
    bay_label = PARKING if style.camera and r.random() < 0.25 else ROAD
    cuts = [_NEAR + 0.4]
    while cuts[-1] < _FAR:
        cuts.append(cuts[-1] * 1.16 + 0.2)
    crossing = street.crossing
    if crossing:
        cuts = sorted({*(z for z in cuts if not street.on_crossing(z)), *crossing})

    def strip(x1: float, x2: float, z1: float, z2: float, color: Color, label: int) -> None:
        canvas.face([(x1, 0, z1), (x1, 0, z2), (x2, 0, z2), (x2, 0, z1)], color, label)

    for z1, z2 in [*pairwise(cuts)][::-1]:
        if crossing and crossing[0] <= z1 < crossing[1]:
            strip(-300, 300, z1, z2, asphalt, ROAD)
            continue
        strip(-900, 900, z1, z2, outside[1], outside[0])
        strip(-walk, walk, z1, z2, pavement, SIDEWALK)
        if street.verge:
            for side in (-1, 1):
                strip(side * half, side * (half + 0.35 * (walk - half)), z1, z2, grass, TERRAIN)
        strip(-half - 0.15, half + 0.15, z1, z2, _scaled(pavement, 1.12), SIDEWALK)
        strip(-half, half, z1, z2, asphalt, ROAD)
        for side, parked in zip((-1, 1), street.parked, strict=True):
            if parked:
                strip(side * (half - 2.1), side * half, z1, z2, _scaled(asphalt, 0.93), bay_label)
        if street.median:
            strip(-street.median, street.median, z1, z2, (138, 128, 116), RAIL_TRACK)
    _paint_markings(street, asphalt)


def _paint_markings(street: _Street, asphalt: Color) -> None:
    canvas, r, style = street.canvas, street.r, street.style
    white: Color = (214, 214, 208) if style.camera else (240, 240, 236)
    yellow: Color = (226, 178, 50)

    def line(x: float, z1: float, z2: float, width: float, color: Color) -> None:
        for a, b in _pieces(z1, z2, 5.0):
            if not street.on_crossing((a + b) / 2, 2.5):
                a1, a2 = x - width / 2, x + width / 2
                canvas.face([(a1, 0, a), (a1, 0, b), (a2, 0, b), (a2, 0, a)], color)

    def dashes(x: float, color: Color) -> None:
        z = r.uniform(0, 6)
        while z < 90:
            line(x, z, z + 3.0, 0.13, color)
            z += 8.0

    if style.camera:
        for _ in range(r.randint(3, 9)):
            x, z = r.uniform(-street.half, street.half - 2), r.uniform(4, 40)
            a, b = r.uniform(0.4, 2.2), r.uniform(0.8, 5.0)
            shade = _scaled(asphalt, r.choice((0.86, 0.92, 1.08)))
            canvas.face([(x, 0, z), (x, 0, z + b), (x + a, 0, z + b), (x + a, 0, z)], shade)
        for _ in range(r.randint(0, 3)):
            x, z = r.uniform(-street.half, street.half), r.uniform(5, 25)
            ring = [(x + 0.35 * math.cos(k), 0.0, z + 0.35 * math.sin(k)) for k in range(7)]
            canvas.face(ring, _scaled(asphalt, 0.7))
        if r.random() < 0.75:
            dashes(0.0, white)
    elif not street.median:
        for x in (-0.14, 0.14):
            line(x, 0, 140, 0.12, yellow)
    for lane in range(1, street.lanes):
        for side in (-1, 1):
            dashes(side * (street.median + lane * style.lane), white)
    if any(street.parked) or not style.camera:
        edge = street.median + street.lanes * style.lane
        for side in (-1, 1):
            line(side * edge, 0, 120, 0.12, white)
    if street.rails is not None:
        for x in (-0.75, 0.75):
            line(street.rails + x, 0, 140, 0.14, (76, 72, 70))
    if street.crossing:
        near = street.crossing[0] - 2.6
        x = -street.half + 0.4
        while x < street.half - 0.5:
            ends = ((x, near), (x, near + 2), (x + 0.5, near + 2), (x + 0.5, near))
            canvas.face([(a, 0.0, b) for a, b in ends], white)
            x += 1.0


def _drop_shadows(canvas: _Canvas, r: random.Random, style: _Style) -> None:
    """Darken what was painted so far where the sun does not reach."""
    soft = canvas.diffuse < 0.2
    scale = canvas.width / 640
    shade = canvas.shade.filter(ImageFilter.GaussianBlur((7 if soft else 1.2) * scale))
    depth = 0.16 if soft else r.uniform(0.34, 0.46)
    dark = canvas.picture.point(lambda v: v * (1 - depth))
    canvas.picture.paste(dark, mask=shade)


def _paint_bonnet(canvas: _Canvas, r: random.Random) -> None:
    """The camera's own car, as the real labels have it: not counted."""
    width, height = canvas.width, canvas.height
    top = height * 0.905
    pen, label_pen = ImageDraw.Draw(canvas.picture), ImageDraw.Draw(canvas.labels)
    for k in range(8):
        inset = k * 0.012 * height
        box = (-0.25 * width, top + inset, 1.25 * width, height * 1.6)
        gray = round(78 - 7 * k)
        pen.ellipse(box, fill=(gray, gray + 2, gray + 4))
        if k == 0:
            label_pen.ellipse(box, fill=EGO_VEHICLE)
    u, v, a = width / 2, top + 0.005 * height, 0.012 * height
    pen.ellipse((u - a, v - a, u + a, v + a), outline=(150, 152, 154), width=2)


def _textured(
    picture: np.ndarray, labels: np.ndarray, rng: np.random.Generator, style: _Style
) -> np.ndarray:
    contrast = np.zeros((2, 256), dtype=np.float32)
    for label, fine, coarse in style.texture:
        contrast[:, label] = fine, coarse
    size = (labels.shape[0], labels.shape[1])
    scale = size[1] / 320
    fine = _noise(rng, size, [(1.3 * scale, 1.3 * scale)])
    coarse = _noise(rng, size, [(c * scale, 2 * c * scale) for c in (3.0, 8.0, 20.0)])
    gain = 1 + contrast[0][labels] * fine + contrast[1][labels] * coarse
    return picture * gain[..., None]


def _as_game(picture: np.ndarray, r: random.Random) -> np.ndarray:
    """Saturated, contrasty and crisp."""
    gray = picture.mean(axis=2, keepdims=True)
    picture = gray + r.uniform(1.15, 1.4) * (picture - gray)
    picture = 128 + r.uniform(1.02, 1.14) * (picture - 128) + r.uniform(-8, 10)
    tint = r.choice(((1.0, 1.0, 1.0), (1.06, 1.0, 0.9), (0.98, 1.0, 1.04)))
    crisp = Image.fromarray(
        (picture * np.array(tint, np.float32)).round().clip(0, 255).astype(np.uint8)
    )
    scale = picture.shape[1] / 320
    return np.asarray(crisp.filter(ImageFilter.UnsharpMask(1.0 * scale, 60, 0)))


def _as_camera(picture: np.ndarray, r: random.Random, rng: np.random.Generator) -> np.ndarray:
    """Exposure, white balance, vignetting, tone curve, optical blur and sensor noise."""
    height, width = picture.shape[:2]
    balance = np.array((r.uniform(0.92, 1.04), 1.0, r.uniform(0.9, 1.06)), np.float32)
    v, u = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    vignette = 1 - r.uniform(0.1, 0.24) * (u * u + 0.6 * v * v)
    light = (picture.clip(0, 255) / 255) ** 2.2 * balance * vignette[..., None]
    light *= 2 ** r.uniform(-1.1, -0.1)
    # Shoulder for the highlights, then the display's gamma.
    shown = (light * 1.25 / (light + 0.25)) ** (1 / 1.5)
    scale = width / 320
    blurred = Image.fromarray((255 * shown).round().clip(0, 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(r.uniform(0.35, 0.75) * scale)
    )
    level = np.asarray(blurred, dtype=np.float32)
    gain = r.uniform(0.25, 0.7)
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    return (level + noise * np.sqrt(1.0 + gain * level * 0.2)).round().clip(0, 255).astype(np.uint8)


def _scene(
    key: Sequence[int], style: _Style, size: tuple[int, int], feature: str
) -> tuple[np.ndarray, np.ndarray]:
    """One street: (H, W, 3) uint8 picture and (H, W) uint8 Cityscapes ids."""
    rng = np.random.default_rng(np.random.SeedSequence(list(key)))
    r = random.Random(int(rng.integers(2**63)))
    canvas = _Canvas(r, style, size)
    _paint_sky(canvas, rng, r, style)
    street = _Street(canvas, r, style, feature)
    _plan_lots(street)
    _plan_furniture(street)
    _plan_traffic(street)
    _plan_people(street)
    _paint_hills(canvas, r, style)
    _paint_ground(street)
    _drop_shadows(canvas, r, style)
    for _, draw in sorted(street.things, key=lambda thing: -thing[0]):
        draw()
    if style.camera:
        _paint_bonnet(canvas, r)
    small = canvas.picture.reduce(_SUPERSAMPLING)
    labels = np.array(canvas.labels)[::_SUPERSAMPLING, ::_SUPERSAMPLING]
    picture = _textured(np.asarray(small, dtype=np.float32), labels, rng, style)
    if not style.camera:
        return _as_game(picture, r), labels
    labels[:, 0] = labels[:, -1] = BORDER
    return _as_camera(picture, r, rng), labels


# The data set on disk.

_MARKER = "scenes.json"
_GRAMMAR = 1  # raise when the same seed begins to give other pictures
_CITIES = (("ahorn", "birke", "linde", "ulme"), ("eiche", "kiefer"))


class _Job(NamedTuple):
    """One picture to render; `split` and `number` with the seed decide all of it."""

    image: Path
    labels: Path
    seed: int
    split: int
    number: int
    size: tuple[int, int]


def render(
    root: str | Path,
    *,
    seed: int,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (160, 320),
    source_size: tuple[int, int] | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Write a source set in the GTA5 and a target set in the Cityscapes layout and encoding.

    Files that an earlier call with the same settings finished are kept, so that an interrupted
    call can be repeated. The same settings give the same pictures.

    Args:
        root: folder for GTA5/ and Cityscapes/; made if missing.
        seed: of everything random.
        train: number of source pictures, and of target training pictures.
        val: number of target validation pictures.
        size: (height, width) of target pictures.
        source_size: of source pictures; by default one eighth taller than the target's, as a
            16:9 game beside a 2:1 camera.
        on_progress: called with (pictures done, pictures in all).

    Raises:
        UserError: root holds other data, or cannot be written.
    """
    root = Path(root)
    source_size = source_size or (size[0] * 9 // 8, size[1])
    settings = _settings(seed, train, val, size, source_size)
    jobs = _jobs(root, seed, train, val, size, source_size)
    try:
        _claim(root, settings)
        for folder in {path.parent for job in jobs for path in (job.image, job.labels)}:
            folder.mkdir(parents=True, exist_ok=True)
        # The labels are written last: where they are, the picture is complete.
        todo = [job for job in jobs if not job.labels.is_file()]
        done = len(jobs) - len(todo)
        for _ in _rendered(todo):
            done += 1
            if on_progress is not None:
                on_progress(done, len(jobs))
    except OSError as error:
        raise UserError(
            f"The scenes cannot be written to {root} ({error}): free space there or choose "
            "another folder."
        ) from error


def check(
    root: str | Path,
    *,
    seed: int,
    train: int,
    val: int,
    size: tuple[int, int],
    source_size: tuple[int, int],
) -> None:
    """Raise the UserError of a `render` into a folder that holds other data; writes nothing."""
    _holds(Path(root), _settings(seed, train, val, size, source_size))


def _settings(
    seed: int, train: int, val: int, size: tuple[int, int], source_size: tuple[int, int]
) -> dict[str, object]:
    """What decides every picture of a data set, as its folder notes it."""
    return {
        "grammar": _GRAMMAR,
        "seed": seed,
        "train": train,
        "val": val,
        "size": [*size],
        "source_size": [*source_size],
    }


def _claim(root: Path, settings: dict[str, object]) -> None:
    """Note in the folder what it holds, or refuse a folder that holds something else."""
    if not _holds(root, settings):
        root.mkdir(parents=True, exist_ok=True)
        _replace(root / _MARKER, lambda part: part.write_text(json.dumps(settings)))


def _holds(root: Path, settings: dict[str, object]) -> bool:
    """Whether the folder is noted to hold these scenes; UserError if it holds something else."""
    marker = root / _MARKER
    if marker.is_file():
        if read_json(marker) != settings:
            raise UserError(
                f"{root} holds scenes of other settings (see {marker}): choose another folder or "
                "remove this one."
            )
        return True
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: choose a folder for the scenes.")
    for name in ("GTA5", "Cityscapes"):
        if (root / name).exists():
            raise UserError(
                f"{root / name} exists and was not rendered by this program: choose another "
                "folder for the scenes."
            )
    return False


def _jobs(
    root: Path,
    seed: int,
    train: int,
    val: int,
    size: tuple[int, int],
    source_size: tuple[int, int],
) -> list[_Job]:
    jobs = []
    for i in range(train):
        name = f"{i + 1:05d}.png"
        images, labels = root / "GTA5" / "images", root / "GTA5" / "labels"
        jobs.append(_Job(images / name, labels / name, seed, 0, i, source_size))
    for split, part, count in ((1, "train", train), (2, "val", val)):
        for i in range(count):
            cities = _CITIES[split - 1]
            city = cities[i % len(cities)]
            images = root / "Cityscapes" / "leftImg8bit" / part / city
            labels = root / "Cityscapes" / "gtFine" / part / city
            # The real frames are the 20th of their sequences.
            name = f"{city}_{i:06d}_000019"
            image, label = f"{name}_leftImg8bit.png", f"{name}_gtFine_labelIds.png"
            jobs.append(_Job(images / image, labels / label, seed, split, i, size))
    return jobs


def _rendered(jobs: Sequence[_Job]) -> Iterator[None]:
    if len(jobs) < _POOL_FROM:
        yield from map(_render, jobs)
        return
    # Fresh processes: forking one that has run torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(_cores(), 16), mp_context=context) as pool:
        yield from pool.map(_render, jobs, chunksize=4)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _render(job: _Job) -> None:
    style = _GAME if job.split == 0 else _CAMERA
    feature = _FEATURES[job.number % len(_FEATURES)]
    picture, ids = _scene((job.seed, job.split, job.number), style, job.size, feature)
    labels = Image.fromarray(ids)
    if job.split == 0:
        labels.putpalette(_PALETTE)
    for path, image in ((job.image, Image.fromarray(picture)), (job.labels, labels)):
        _replace(path, lambda part, image=image: image.save(part, "png", compress_level=1))


def _palette() -> bytes:
    colors = np.zeros((256, 3), dtype=np.uint8)
    for _, label, color in CITYSCAPES_CLASSES:
        colors[label] = color
    return colors.tobytes()


_PALETTE = _palette()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
