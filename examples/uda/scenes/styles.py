"""The differences of the two worlds (proportions, colours, textures), and the label ids."""

from __future__ import annotations

import random
from dataclasses import dataclass

Color = tuple[float, float, float]
Point = tuple[float, float, float]

# Cityscapes ids, as in label files.
EGO_VEHICLE, BORDER, STATIC, GROUND = 1, 3, 4, 6
ROAD, SIDEWALK, PARKING, RAIL_TRACK, BUILDING, WALL, FENCE = 7, 8, 9, 10, 11, 12, 13
POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY = 17, 19, 20, 21, 22, 23
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 24, 25, 26, 27, 28, 31, 32, 33


@dataclass(frozen=True)
class Style:
    """The appearance of a world; ranges are (low, high), lengths in metres."""

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


GAME = Style(
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

CAMERA = Style(
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


def scaled(color: Color, k: float) -> Color:
    return (color[0] * k, color[1] * k, color[2] * k)


def blend(a: Color, b: Color, t: float) -> Color:
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def jittered(r: random.Random, color: Color, amount: float) -> Color:
    k = 1 + r.uniform(-amount, amount)
    return (
        color[0] * k * (1 + r.uniform(-amount, amount) / 3),
        color[1] * k,
        color[2] * k * (1 + r.uniform(-amount, amount) / 3),
    )
