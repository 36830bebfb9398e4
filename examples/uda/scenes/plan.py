"""The plan of a scene: its objects and their places, the farthest painted first."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from uda.scenes.buildings import draw_building, draw_distant_block, draw_fence, draw_wall
from uda.scenes.canvas import Body, Canvas, Place, pieces
from uda.scenes.furniture import (
    draw_bin,
    draw_blobs,
    draw_bollard,
    draw_hedge,
    draw_lamp,
    draw_sign,
    draw_signal,
    draw_tree,
    draw_utility_pole,
)
from uda.scenes.people import draw_cyclist, draw_motorcyclist, draw_person
from uda.scenes.styles import TERRAIN, Style, jittered
from uda.scenes.vehicles import (
    draw_bicycle,
    draw_bus,
    draw_car,
    draw_motorcycle,
    draw_train,
    draw_truck,
)


class Street:
    """The parts of the street, and the objects that are painted on and beside it.

    `half` and `walk` are the distances from the middle to the kerb and to the lots, `median` is the
    distance to the innermost lanes, `crossing` the z range of a cross street, `rails` the x of a
    track.
    """

    def __init__(self, canvas: Canvas, r: random.Random, style: Style, feature: str) -> None:
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
        """Middle of a lane; 0, 1, ... are ours, from the median on, -1, -2, ... are oncoming."""
        inner = lane if lane >= 0 else -lane - 1
        x = self.median + (inner + 0.5) * self.style.lane
        return x if lane >= 0 else -x

    def add(self, z: float, draw: Callable[[], None]) -> None:
        self.things.append((z, draw))

    def put(
        self,
        draw: Callable[[Canvas, random.Random, Style, Place], None],
        x: float,
        z: float,
        yaw: float = 0.0,
        shadow: tuple[float, float, float] = (0.2, 0.2, 1.7),
    ) -> None:
        """Place an object and cast the shadow of a box of length, width, height around it."""
        place = Place(x, z, yaw)
        self.add(z, lambda: draw(self.canvas, self.r, self.style, place))
        body = Body(self.canvas, x, z, yaw)
        a, b = shadow[0] / 2, shadow[1] / 2
        corners = [body.at(c * a, s * b, 0) for c, s in ((-1, -1), (-1, 1), (1, 1), (1, -1))]
        self.canvas.cast([(x, z) for x, _, z in corners], shadow[2])

    def on_crossing(self, z: float, margin: float = 0.0) -> bool:
        crossing = self.crossing
        return crossing is not None and crossing[0] - margin < z < crossing[1] + margin


def plan_lots(street: Street) -> None:
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
    # Objects close the view where the street ends.
    for k in range(26):
        x = (k - 12.5) * 22 + r.uniform(-8, 8)
        z = r.uniform(150, 210)
        if r.random() < (0.55 if style.camera else 0.35):
            high = (
                r.uniform(10, 22) if style.camera else r.choice((12, 25, 60)) * r.uniform(0.6, 1.3)
            )
            wall = jittered(r, r.choice(style.walls), 0.1)
            street.add(
                z,
                lambda x=x, z=z, high=high, wall=wall: draw_distant_block(canvas, x, z, high, wall),
            )
        else:
            leaves = jittered(r, r.choice(style.leaves), 0.1)
            street.add(
                z,
                lambda x=x, z=z, leaves=leaves: draw_blobs(
                    canvas, r, (x, 5.0, z), 15.0, 7.0, leaves
                ),
            )


def _plan_lot(street: Street, kind: str, side: int, z1: float, z2: float) -> None:
    r, style, canvas = street.r, street.style, street.canvas
    x = side * street.walk
    if kind == "building":
        x += side * r.uniform(*style.setback)
        street.add(z2, lambda: draw_building(canvas, r, style, x, z1, z2))
        canvas.cast([(x, z1), (x, z2), (x + side, z2), (x + side, z1)], 9.0)
        return
    grass = jittered(r, style.grass, 0.12)

    def lawn() -> None:
        for a, b in pieces(z1, z2, 6.0):
            far = x + side * 45
            canvas.face([(x, 0, a), (x, 0, b), (far, 0, b), (far, 0, a)], grass, TERRAIN)

    # This lies a little behind the objects of the lot and in front of all that are farther away.
    street.add(z2 + 0.02, lawn)
    trees = {"park": (2, 5), "wall": (1, 4), "fence": (0, 3)}[kind]
    for _ in range(r.randint(*trees)):
        tree_x = x + side * r.uniform(2.5, 12)
        street.put(draw_tree, tree_x, r.uniform(z1, z2), shadow=(2.5, 2.5, 6.0))
    if kind == "fence" and r.random() < 0.5:
        setback = x + side * r.uniform(9, 14)
        street.add(z2 + 0.01, lambda: draw_building(canvas, r, style, setback, z1, z2))
    # This is nearer than everything behind it.
    if kind == "wall":
        street.add(z1, lambda: draw_wall(canvas, r, style, x, z1, z2))
        canvas.cast([(x, z1), (x, z2), (x + side * 0.4, z2), (x + side * 0.4, z1)], 2.3)
    elif kind == "fence":
        street.add(z1, lambda: draw_fence(canvas, r, style, x, z1, z2))
    elif r.random() < 0.5:
        street.add(z1, lambda: draw_hedge(canvas, r, style, x, z1, z2))


def plan_furniture(street: Street) -> None:
    r, style = street.r, street.style
    for side in (-1, 1):
        kerb = side * (street.half + 0.5)
        z = r.uniform(6, 20)
        utility = not style.camera and r.random() < 0.4
        while z < 110:
            if not street.on_crossing(z, 1.0):
                pole = draw_utility_pole if utility else draw_lamp
                street.put(pole, kerb, z, shadow=(0.2, 0.2, 7.0))
            z += r.uniform(16, 26)
        if r.random() < 0.6:
            z = r.uniform(4, 14)
            while z < 100:
                if not street.on_crossing(z, 2.0):
                    tree_x = kerb + side * r.uniform(0.3, 1.0)
                    street.put(draw_tree, tree_x, z, shadow=(2.5, 2.5, 6.0))
                z += r.uniform(9, 22)
        for _ in range(r.randint(1, 4)):
            z = r.uniform(6, 50)
            if not street.on_crossing(z):
                street.put(draw_sign, kerb + side * r.uniform(-0.1, 0.5), z)
        if r.random() < 0.35:
            z = r.uniform(6, 30)
            if not street.on_crossing(z):
                street.put(draw_bin, kerb + side * 0.4, z, shadow=(0.6, 0.6, 1.0))
        if style.camera and r.random() < 0.3:
            z = r.uniform(6, 12)
            for k in range(r.randint(3, 7)):
                if not street.on_crossing(z + 1.6 * k):
                    street.put(draw_bollard, kerb, z + 1.6 * k, shadow=(0.15, 0.15, 0.9))
    if street.crossing:
        for side in (-1, 1):
            street.put(draw_signal, side * (street.half + 0.4), street.crossing[0] - 0.8)
        street.put(draw_signal, -(street.half + 0.4), street.crossing[1] + 0.8)


def plan_traffic(street: Street) -> None:
    r, style, feature = street.r, street.style, street.feature
    car = (4.2, 1.8, 1.4)
    taken: list[tuple[float, float]] = []

    def free(x: float, z: float, gap: float) -> bool:
        if any(abs(x - tx) < 1.7 and abs(z - tz) < gap for tx, tz in taken):
            return False
        taken.append((x, z))
        return True

    def lane_ahead(lane: int) -> float:
        """A distance at which an object in this lane is visible and collides with no other."""
        return r.uniform(9, 22) if lane != street.ego_lane else r.uniform(13, 30)

    lanes = range(-street.lanes, street.lanes)
    side_lanes = [lane for lane in lanes if lane != street.ego_lane]
    if feature == "train" and street.rails is not None:
        z = r.uniform(13, 24)
        street.put(draw_train, street.rails, z, math.pi, (8, 2.5, 3.3))
        taken.extend((street.rails, z + 5 * k) for k in range(-1, 9))
    for kind, draw, length in (("bus", draw_bus, 11.0), ("truck", draw_truck, 8.0)):
        if feature == kind or r.random() < 0.06:
            lane = r.choice(side_lanes if feature == kind else lanes)
            x, z = street.lane_x(lane), lane_ahead(lane) + length / 2
            if free(x, z, 12):
                street.put(draw, x, z, 0.0 if lane >= 0 else math.pi, (length, 2.4, 3))
    for kind, draw in (("cyclist", draw_cyclist), ("motorcyclist", draw_motorcyclist)):
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
            street.put(draw_car, x, z, 0.0 if lane >= 0 else math.pi, car)
    if street.crossing and r.random() < 0.5:
        middle = (street.crossing[0] + street.crossing[1]) / 2
        for _ in range(r.randint(1, 2)):
            x, z, yaw = (
                r.uniform(-9, 9),
                middle + r.choice((-2, 2)),
                r.choice((-1, 1)) * math.pi / 2,
            )
            if free(x, z, 6) and free(x - 2.2, z, 1) and free(x + 2.2, z, 1):
                street.put(draw_car, x, z, yaw, car)
    for side, parked in zip((-1, 1), street.parked, strict=True):
        z = r.uniform(4, 11)
        while parked and z < 80:
            if not street.on_crossing(z, 5.0) and r.random() < 0.8:
                x = side * (street.half - 1.05)
                if free(x, z, 4.6):
                    street.put(draw_car, x, z, 0.0 if side > 0 else math.pi, car)
            z += r.uniform(5.2, 6.5)


def plan_people(street: Street) -> None:
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
            street.put(draw_person, x + 0.6 * k, z + 0.2 * k, yaw, (0.3, 0.45, 1.7))
    for kind, draw, chance in (
        ("bicycles", draw_bicycle, 0.15 if style.camera else 0.04),
        ("motorcycles", draw_motorcycle, 0.05),
    ):
        if feature == kind or r.random() < chance:
            side, z = r.choice((-1, 1)), r.uniform(6, 13)
            yaw = r.choice((0.0, math.pi / 2, 1.1)) + r.uniform(-0.2, 0.2)
            for _ in range(r.randint(1, 3 if kind == "motorcycles" else 4)):
                x = side * (street.half + 0.7 + 0.15 * r.random())
                if not street.on_crossing(z):
                    street.put(draw, x, z, yaw + r.uniform(-0.1, 0.1), (1.6, 0.4, 1.0))
                z += 0.9 + r.random()
