"""Sky, hills, ground, markings and shadows, on which everything else is painted."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
from PIL import Image, ImageFilter

from uda.scenes.canvas import FAR, NEAR, Canvas, pieces, smooth_noise
from uda.scenes.plan import Street
from uda.scenes.styles import (
    GROUND,
    PARKING,
    RAIL_TRACK,
    ROAD,
    SIDEWALK,
    TERRAIN,
    Color,
    Style,
    blend,
    jittered,
    scaled,
)


def paint_sky(canvas: Canvas, rng: np.random.Generator, r: random.Random, style: Style) -> None:
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
    noise = smooth_noise(rng, small, cells) - 1 + 2 * cover
    clouds = 1 / (1 + np.exp(-noise * (1.2 if style.camera else 3.5)))
    mask = np.asarray(Image.fromarray(clouds).resize((canvas.width, canvas.height)))[..., None]
    sky = sky + (np.asarray(cloud) - sky) * mask * (0.9 - 0.5 * rows)
    canvas.picture = Image.fromarray(sky.round().clip(0, 255).astype(np.uint8))
    canvas.restart()
    canvas.haze = blend(low, cloud, 0.3)
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


def paint_hills(canvas: Canvas, r: random.Random, style: Style) -> None:
    if style.camera or r.random() < 0.4:
        return
    color = jittered(r, (132, 128, 84), 0.15)
    turns = [(r.uniform(0.8, 3.0), r.uniform(0, math.tau), r.uniform(4, 14)) for _ in range(4)]
    for k in range(40):
        x1, x2 = ((k + j) * 25.0 - 500 for j in (0, 1))
        tops = [
            12 + sum(a * (1 + math.sin(f * x / 160 + t)) for f, t, a in turns) for x in (x1, x2)
        ]
        z = FAR - 20
        canvas.face([(x1, 0, z), (x2, 0, z), (x2, tops[1], z), (x1, tops[0], z)], color, TERRAIN)


def paint_ground(street: Street) -> None:
    canvas, r, style = street.canvas, street.r, street.style
    asphalt = jittered(r, style.asphalt, 0.14)
    pavement = jittered(r, style.pavement, 0.1)
    grass = jittered(r, style.grass, 0.1)
    half, walk = street.half, street.walk
    outside = (SIDEWALK, pavement) if r.random() < 0.5 else (TERRAIN, grass)
    if r.random() < 0.2:
        outside = (GROUND, jittered(r, (150, 138, 116), 0.1))
    bay_label = PARKING if style.camera and r.random() < 0.25 else ROAD
    cuts = [NEAR + 0.4]
    while cuts[-1] < FAR:
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
        strip(-half - 0.15, half + 0.15, z1, z2, scaled(pavement, 1.12), SIDEWALK)
        strip(-half, half, z1, z2, asphalt, ROAD)
        for side, parked in zip((-1, 1), street.parked, strict=True):
            if parked:
                strip(side * (half - 2.1), side * half, z1, z2, scaled(asphalt, 0.93), bay_label)
        if street.median:
            strip(-street.median, street.median, z1, z2, (138, 128, 116), RAIL_TRACK)
    _paint_markings(street, asphalt)


def _paint_markings(street: Street, asphalt: Color) -> None:
    canvas, r, style = street.canvas, street.r, street.style
    white: Color = (214, 214, 208) if style.camera else (240, 240, 236)
    yellow: Color = (226, 178, 50)

    def line(x: float, z1: float, z2: float, width: float, color: Color) -> None:
        for a, b in pieces(z1, z2, 5.0):
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
            shade = scaled(asphalt, r.choice((0.86, 0.92, 1.08)))
            canvas.face([(x, 0, z), (x, 0, z + b), (x + a, 0, z + b), (x + a, 0, z)], shade)
        for _ in range(r.randint(0, 3)):
            x, z = r.uniform(-street.half, street.half), r.uniform(5, 25)
            ring = [(x + 0.35 * math.cos(k), 0.0, z + 0.35 * math.sin(k)) for k in range(7)]
            canvas.face(ring, scaled(asphalt, 0.7))
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


def drop_shadows(canvas: Canvas, r: random.Random, style: Style) -> None:
    """Darken the painted parts that the sun does not reach."""
    soft = canvas.diffuse < 0.2
    scale = canvas.width / 640
    shade = canvas.shade.filter(ImageFilter.GaussianBlur((7 if soft else 1.2) * scale))
    depth = 0.16 if soft else r.uniform(0.34, 0.46)
    dark = canvas.picture.point(lambda v: v * (1 - depth))
    canvas.picture.paste(dark, mask=shade)
