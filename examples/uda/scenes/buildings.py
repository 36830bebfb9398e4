"""Houses, walls and fences."""

from __future__ import annotations

import math
import random

from uda.scenes.canvas import NEAR, Canvas, pieces
from uda.scenes.styles import BUILDING, FENCE, WALL, Color, Style, blend, jittered, scaled


def draw_wall(
    canvas: Canvas, r: random.Random, style: Style, x: float, z1: float, z2: float
) -> None:
    side = math.copysign(1, x)
    high = r.uniform(1.7, 3.0)
    kinds: tuple[Color, ...] = (
        ((128, 122, 114), (124, 92, 76), (150, 146, 136))
        if style.camera
        else ((214, 196, 164), (190, 188, 182), (176, 120, 92))
    )
    color = jittered(r, r.choice(kinds), 0.08)
    lit = scaled(color, canvas.light((-side, 0, 0)))
    canvas.face([(x, 0, z1), (x + 0.4 * side, 0, z1), (x + 0.4 * side, high, z1), (x, high, z1)],
                scaled(color, canvas.light((0, 0, -1))), WALL)  # fmt: skip
    for a, b in pieces(z1, z2, 4.0):
        canvas.face([(x, 0, a), (x, 0, b), (x, high, b), (x, high, a)], lit, WALL)
        canvas.face([(x, 0, a), (x, 0, a + 0.3), (x, high, a + 0.3), (x, high, a)],
                    scaled(lit, 0.9))  # fmt: skip
        top = [(x, high - 0.15, a), (x, high - 0.15, b), (x, high, b), (x, high, a)]
        canvas.face(top, scaled(lit, 1.15))


def draw_fence(
    canvas: Canvas, r: random.Random, style: Style, x: float, z1: float, z2: float
) -> None:
    high = r.uniform(1.1, 2.0)
    kinds: tuple[Color, ...] = (
        ((70, 76, 72), (110, 90, 70), (52, 66, 58))
        if style.camera
        else ((236, 236, 232), (150, 110, 76), (60, 62, 66))
    )
    color = jittered(r, r.choice(kinds), 0.1)
    solid = r.random() < 0.35
    for a, b in pieces(z1, z2, 2.4):
        outline = [(x, 0, a), (x, 0, b), (x, high, b), (x, high, a)]
        canvas.disc([canvas.project(point) for point in outline], FENCE)
        if solid:
            canvas.face(outline, scaled(color, r.uniform(0.85, 0.95)), FENCE)
        canvas.rod((x, 0, a), (x, high + 0.1, a), 0.1, color, FENCE)
        for h in (0.12, 0.92):
            canvas.rod((x, h * high, a), (x, h * high, b), 0.07, color, FENCE)
        bars = min(16, max(2, int(canvas.pixels(b - a, (a + b) / 2) / 8)))
        for k in range(1, bars):
            z = a + k * (b - a) / bars
            canvas.rod((x, 0.1 * high, z), (x, high, z), 0.05, color, FENCE)


def draw_building(
    canvas: Canvas, r: random.Random, style: Style, x: float, z1: float, z2: float
) -> None:
    side = math.copysign(1, x)
    floors = r.randint(*r.choice(style.floors))
    storey = r.uniform(2.9, 3.5)
    ground = storey + 0.5
    high = ground + (floors - 1) * storey
    deep = r.uniform(9, 14)
    wall = jittered(r, r.choice(style.walls), 0.1)
    trim = scaled(wall, r.choice((0.7, 0.8, 1.18)))
    roof = jittered(r, r.choice(style.roofs), 0.1)
    back = x + side * deep
    street_light, end_light = canvas.light((-side, 0, 0)), canvas.light((0, 0, -1))
    front, end = scaled(wall, street_light), scaled(wall, end_light)
    near = max(z1, NEAR)

    canvas.face([(x, 0, z1), (back, 0, z1), (back, high, z1), (x, high, z1)], end, BUILDING)
    pitched = style.camera or (floors <= 2 and r.random() < 0.6)
    if pitched:
        ridge, top = (x + back) / 2, high + r.uniform(2.0, 4.5)
        tiles = scaled(roof, canvas.light((-0.6 * side, 0.8, 0)))
        canvas.face([(x, high, z1), (back, high, z1), (ridge, top, z1)], end, BUILDING)
        for a, b in pieces(z1, z2, 8.0):
            canvas.face([(x, high, a), (x, high, b), (ridge, top, b), (ridge, top, a)], tiles,
                        BUILDING)  # fmt: skip
        if r.random() < 0.6:
            z = r.uniform(z1, z2)
            canvas.rod((ridge, top - 0.5, z), (ridge, top + 1.0, z), 0.7, scaled(roof, 0.8),
                       BUILDING)  # fmt: skip
    for a, b in pieces(z1, z2, 8.0):
        canvas.face([(x, 0, a), (x, 0, b), (x, high, b), (x, high, a)], front, BUILDING)

    glass = blend((58, 66, 76), (150, 180, 215), r.uniform(0.0, 0.35 if style.camera else 0.8))
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
            for a, b in pieces(z1, z2, 8.0):
                canvas.face([(x, low, a), (x, low, b), (x, lintel + 0.3, b), (x, lintel + 0.3, a)],
                            scaled(glass, street_light))  # fmt: skip
            canvas.face([(x, low, z1), (back, low, z1), (back, lintel + 0.3, z1),
                         (x, lintel + 0.3, z1)], scaled(glass, end_light))  # fmt: skip
            continue
        if style.camera and floor > 0 and floor == floors - 1:
            canvas.rod((x, h, near), (x, h, z2), 0.25, scaled(trim, street_light))
        for k in reversed(range(bays)):
            a = z1 + (k + 0.5 - wide / 2) * (z2 - z1) / bays
            b = z1 + (k + 0.5 + wide / 2) * (z2 - z1) / bays
            if b < 2 or canvas.pixels(b - a, b) * abs(x) / b < 1:
                continue
            bottom = 0.15 if floor == 0 and k % 3 == 1 else low
            pane = scaled(glass, street_light * r.uniform(0.75, 1.15))
            rim = [(x, bottom - 0.12, a - 0.1), (x, bottom - 0.12, b + 0.1),
                   (x, lintel + 0.12, b + 0.1), (x, lintel + 0.12, a - 0.1)]  # fmt: skip
            canvas.face(rim, scaled(trim, street_light))
            canvas.face([(x, bottom, a), (x, bottom, b), (x, lintel, b), (x, lintel, a)], pane)
        for k in range(3):
            a = x + side * deep * (k + 0.3) / 3
            b = x + side * deep * (k + 0.7) / 3
            if z1 > 4:
                canvas.face([(a, low, z1), (b, low, z1), (b, lintel, z1), (a, lintel, z1)],
                            scaled(glass, end_light * r.uniform(0.8, 1.1)))  # fmt: skip
    if r.random() < (0.35 if style.camera else 0.45) and z2 > 5:
        awning = jittered(r, r.choice(style.paints), 0.1)
        a, b = near + 0.2 * (z2 - near), near + 0.8 * (z2 - near)
        out = x - side * 1.1
        canvas.face([(x, 3.2, a), (x, 3.2, b), (out, 2.7, b), (out, 2.7, a)],
                    scaled(awning, canvas.light((0, 1, 0))), BUILDING)  # fmt: skip
        canvas.face([(x, 3.2, a), (out, 2.7, a), (x, 2.7, a)], scaled(awning, 0.7), BUILDING)


def draw_distant_block(canvas: Canvas, x: float, z: float, high: float, wall: Color) -> None:
    a, b = x - 14, x + 14
    lit = scaled(wall, canvas.light((0, 0, -1)))
    canvas.face([(a, 0, z), (b, 0, z), (b, high, z), (a, high, z)], lit, BUILDING)
    for k in range(1, int(high / 3.2)):
        for j in range(7):
            left, low = a + 1 + 4 * j, 3.2 * k
            canvas.face([(left, low, z), (left + 2.2, low, z), (left + 2.2, low + 1.7, z),
                         (left, low + 1.7, z)], scaled(lit, 0.66))  # fmt: skip
