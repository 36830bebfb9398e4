"""Cars, buses, trams, trucks, bicycles and motorcycles."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from uda.scenes.canvas import Body, Canvas, Place
from uda.scenes.styles import (
    BICYCLE,
    BUS,
    CAR,
    MOTORCYCLE,
    TRAIN,
    TRUCK,
    Color,
    Style,
    blend,
    jittered,
    scaled,
)

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


def draw_car(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    shapes = (
        (_HATCHBACK, _HATCHBACK, _ESTATE, _ESTATE, _SEDAN, _OFFROADER, _VAN)
        if style.camera
        else (_SEDAN, _SEDAN, _SPORTS, _PICKUP, _OFFROADER, _VAN)
    )
    shape = r.choice(shapes)
    paint = jittered(r, r.choice(style.paints), 0.12)
    body = Body(canvas, *place)
    top = max(h for _, h in shape.profile)
    wide, belt = shape.half_width, shape.belt

    def half_width(h: float) -> float:
        return wide * (1 - 0.17 * max(0.0, h - belt) / (top - belt))

    front, rear = shape.profile[-1][0], shape.profile[0][0]
    body.contact(front - rear - 0.1, 2 * wide)
    body.box(shape.profile, half_width, paint, CAR)
    glass = blend(_GLASS, canvas.haze, r.uniform(0.0, 0.25))
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
    body: Body, end: float, s: float, h: float, a: float, b: float, side: int, color: Color
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
    canvas: Canvas,
    place: Place,
    label: int,
    paint: Color,
    stripe: Color,
    size: tuple[float, float, float],
) -> None:
    """A long box with a band of windows: a bus, or one car of a train."""
    length, width, height = size
    body = Body(canvas, *place)
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


def draw_bus(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    paints: tuple[Color, ...] = (
        ((196, 160, 52), (170, 46, 42), (176, 178, 176), (60, 90, 120))
        if style.camera
        else ((240, 240, 235), (30, 90, 190), (220, 60, 40))
    )
    paint = jittered(r, r.choice(paints), 0.08)
    stripe = scaled(r.choice(style.paints), 0.9)
    _draw_coach(canvas, place, BUS, paint, stripe, (r.uniform(10, 12.5), 2.5, 3.05))


def draw_train(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    paints: tuple[Color, ...] = (
        ((198, 178, 62), (160, 44, 40), (188, 190, 190), (74, 116, 92))
        if style.camera
        else ((196, 202, 210), (230, 230, 235))
    )
    paint = jittered(r, r.choice(paints), 0.08)
    stripe: Color = (150, 150, 152) if style.camera else (30, 70, 180)
    x, z, yaw = place
    size = (8.5, 2.4, 3.3) if style.camera else (13.0, 2.9, 3.8)
    cars = 4 if style.camera else 3
    for k in reversed(range(cars)):
        middle = z + k * (size[0] + 0.5)
        _draw_coach(canvas, Place(x, middle, yaw), TRAIN, paint, stripe, size)
    if style.camera:
        canvas.rod((x - 0.5, 3.35, z), (x + 0.3, 4.4, z + 0.8), 0.07, (60, 60, 62), TRAIN)
        canvas.rod((x + 0.3, 4.4, z + 0.8), (x - 0.6, 5.3, z + 0.2), 0.07, (60, 60, 62), TRAIN)


def draw_truck(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    x, z, yaw = place
    cargo = jittered(
        r, r.choice(((214, 214, 210), (190, 186, 172), (90, 110, 140), (180, 70, 50))), 0.1
    )
    paint = jittered(r, r.choice(style.paints), 0.12)
    body = Body(canvas, x, z, yaw)
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
        _plate(body, -4.02, 0, (0.95 + high) / 2, 0.02, (high - 1) / 2, -1, scaled(cargo, 0.6))
        for s in (-1, 1):
            _plate(body, -3.95, s * 0.9, 0.75, 0.16, 0.1, -1, (200, 26, 24))

    # The part that is farther away is painted first.
    for part in (cab, box) if math.cos(yaw) > 0 else (box, cab):
        part()
    body.wheels((-3.0, -1.9, 3.0), 1.15, 0.46)


def _draw_wheel(body: Body, l: float, radius: float, tyre: float, label: int) -> None:  # noqa: E741
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


def draw_bicycle(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    body = Body(canvas, *place)
    paint = jittered(r, r.choice(style.paints), 0.2)
    for l in (-0.52, 0.52):  # noqa: E741
        _draw_wheel(body, l, 0.34, 0.05, BICYCLE)
    hub, pedals, saddle, head = (-0.52, 0.34), (-0.08, 0.32), (-0.2, 0.9), (0.36, 0.92)
    for a, b in ((hub, pedals), (pedals, saddle), (pedals, head), (saddle, head), (hub, saddle),
                 (head, (0.52, 0.34))):  # fmt: skip
        canvas.rod(body.at(a[0], 0, a[1]), body.at(b[0], 0, b[1]), 0.05, paint, BICYCLE)
    canvas.rod(body.at(0.38, -0.28, 1.02), body.at(0.38, 0.28, 1.02), 0.05, (40, 40, 42), BICYCLE)
    canvas.rod(body.at(-0.32, 0, 0.95), body.at(-0.1, 0, 0.95), 0.09, (34, 32, 32), BICYCLE)


def draw_motorcycle(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    body = Body(canvas, *place)
    paint = jittered(r, r.choice(style.paints), 0.2)
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
