"""Objects beside the street: trees, hedges, lamps, signals, signs, bins."""

from __future__ import annotations

import math
import random

from uda.scenes.canvas import Body, Canvas, Place
from uda.scenes.styles import (
    LIGHT,
    POLE,
    SIGN,
    STATIC,
    VEGETATION,
    Color,
    Point,
    Style,
    jittered,
    scaled,
)


def draw_blobs(
    canvas: Canvas,
    r: random.Random,
    center: Point,
    across: float,
    up: float,
    color: Color,
) -> None:
    """Paint leaves as a cloud of overlapping balls, darker below and away from the sun."""
    size = canvas.pixels(across, center[2])
    if size < 2:
        canvas.ball(center, across, up, color, VEGETATION)
        return
    count = min(70, max(10, int(size * 1.2)))
    canvas.ball(center, 0.8 * across, 0.8 * up, scaled(color, 0.62), VEGETATION)
    spots = [(r.uniform(-1, 1), r.uniform(-1, 1)) for _ in range(count)]
    spots.sort(key=lambda spot: spot[1])
    for dx, dy in spots:
        reach = math.hypot(dx, dy)
        if reach > 1:
            dx, dy = dx / reach, dy / reach
        lit = 0.78 + 0.3 * dy + 0.25 * canvas.diffuse * dx * canvas.sun[0] + r.uniform(-0.14, 0.14)
        radius = r.uniform(0.16, 0.34)
        spot = (center[0] + 0.85 * dx * across, center[1] + 0.85 * dy * up, center[2])
        canvas.ball(spot, radius * across, radius * up, scaled(color, lit), VEGETATION)


def draw_tree(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    x, z, _ = place
    bark = jittered(r, (86, 68, 54), 0.15)
    leaves = jittered(r, r.choice(style.leaves), 0.12)
    if not style.camera and r.random() < 0.45:
        tall = r.uniform(7, 13)
        lean = r.uniform(-0.6, 0.6)
        canvas.rod(
            (x, 0, z), (x + lean, tall, z), 0.3, jittered(r, (140, 116, 88), 0.1), VEGETATION
        )
        for k in range(14):
            angle = k * math.tau / 14 + r.uniform(-0.2, 0.2)
            out, drop = r.uniform(1.4, 2.2), r.uniform(-0.7, 0.3)
            mid = (x + lean + 0.6 * out * math.cos(angle), tall + 0.5 + 0.3 * math.sin(angle), z)
            end = (x + lean + out * math.cos(angle), tall + drop + 0.6 * math.sin(angle), z)
            frond = scaled(leaves, r.uniform(0.75, 1.15))
            canvas.rod((x + lean, tall, z), mid, 0.3, frond, VEGETATION)
            canvas.rod(mid, end, 0.2, frond, VEGETATION)
        return
    tall = r.uniform(5, 10)
    across = r.uniform(0.22, 0.36) * tall
    crown = 0.64 * tall
    canvas.rod((x, 0, z), (x, crown, z), 0.045 * tall, bark, VEGETATION)
    draw_blobs(canvas, r, (x, crown, z), across, 0.4 * tall, leaves)


def draw_hedge(
    canvas: Canvas, r: random.Random, style: Style, x: float, z1: float, z2: float
) -> None:
    high = r.uniform(0.9, 1.8)
    leaves = jittered(r, r.choice(style.leaves), 0.1)
    canvas.face(
        [(x, 0, z1), (x, 0, z2), (x, high, z2), (x, high, z1)], scaled(leaves, 0.7), VEGETATION
    )
    z = z2
    while z > max(z1, 2.0):
        for level in (0.3, 0.65, 0.9):
            lit = scaled(leaves, 0.6 + 0.45 * level + r.uniform(-0.1, 0.1))
            spot = (x + r.uniform(-0.2, 0.2), level * high, z)
            canvas.ball(spot, 0.35 * high, 0.25 * high, lit, VEGETATION)
        z -= 0.4 * high


def draw_lamp(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
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


def draw_utility_pole(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    x, z, _ = place
    wood: Color = (108, 84, 64)
    canvas.rod((x, 0, z), (x, 9.5, z), 0.24, wood, POLE)
    for h in (8.2, 9.0):
        canvas.rod((x - 1.1, h, z), (x + 1.1, h, z), 0.14, wood, POLE)


def _draw_signal_head(canvas: Canvas, r: random.Random, x: float, h: float, z: float) -> None:
    housing: Color = (34, 36, 38)
    lit = r.randrange(3)
    corners = [(x - 0.2, h, z), (x + 0.2, h, z), (x + 0.2, h + 1.05, z), (x - 0.2, h + 1.05, z)]
    canvas.face(corners, housing, LIGHT)
    for k, color in enumerate(((40, 220, 120), (250, 180, 40), (240, 40, 36))):
        glow = color if k == lit else scaled(color, 0.25)
        canvas.ball((x, h + 0.19 + 0.33 * k, z), 0.13, 0.13, glow)


def draw_signal(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
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


def draw_sign(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
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


def draw_bin(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    body = Body(canvas, *place)
    color = r.choice(((60, 74, 60), (90, 92, 94), (150, 80, 40), (40, 60, 110)))
    high = r.uniform(0.8, 1.3)
    body.box(((-0.3, 0), (-0.3, high), (0.3, high), (0.3, 0)), lambda _: 0.3, color, STATIC)


def draw_bollard(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    x, z, _ = place
    canvas.rod((x, 0, z), (x, 0.95, z), 0.13, (96, 98, 100), POLE)
    canvas.rod((x, 0.72, z), (x, 0.82, z), 0.14, (200, 60, 50), POLE)
