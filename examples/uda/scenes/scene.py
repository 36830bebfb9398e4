"""One scene, from the sky to the sensor."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from uda.scenes.camera import as_camera, as_game, paint_bonnet, textured
from uda.scenes.canvas import SUPERSAMPLING, Canvas
from uda.scenes.ground import drop_shadows, paint_ground, paint_hills, paint_sky
from uda.scenes.plan import Street, plan_furniture, plan_lots, plan_people, plan_traffic
from uda.scenes.styles import BORDER, Style

# Scene i features the i-th of these, cyclically, so that no split lacks one.
FEATURES = (
    "train", "cyclist", "lights", "bus", "bicycles", "wall",
    "motorcyclist", "truck", "lights", "fence", "motorcycles", "cyclist",
)  # fmt: skip


def scene(
    key: Sequence[int], style: Style, size: tuple[int, int], feature: str
) -> tuple[np.ndarray, np.ndarray]:
    """One street: (H, W, 3) uint8 picture and (H, W) uint8 Cityscapes ids."""
    rng = np.random.default_rng(np.random.SeedSequence(list(key)))
    r = random.Random(int(rng.integers(2**63)))
    canvas = Canvas(r, style, size)
    paint_sky(canvas, rng, r, style)
    street = Street(canvas, r, style, feature)
    plan_lots(street)
    plan_furniture(street)
    plan_traffic(street)
    plan_people(street)
    paint_hills(canvas, r, style)
    paint_ground(street)
    drop_shadows(canvas, r, style)
    for _, draw in sorted(street.things, key=lambda thing: -thing[0]):
        draw()
    if style.camera:
        paint_bonnet(canvas, r)
    small = canvas.picture.reduce(SUPERSAMPLING)
    labels = np.array(canvas.labels)[::SUPERSAMPLING, ::SUPERSAMPLING]
    picture = textured(np.asarray(small, dtype=np.float32), labels, rng, style)
    if not style.camera:
        return as_game(picture, r), labels
    labels[:, 0] = labels[:, -1] = BORDER
    return as_camera(picture, r, rng), labels
