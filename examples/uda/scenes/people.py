"""Pedestrians, and riders of bicycles and motorcycles."""

from __future__ import annotations

import random

from uda.scenes.canvas import Body, Canvas, Place
from uda.scenes.styles import PERSON, RIDER, Color, Point, Style, jittered, scaled
from uda.scenes.vehicles import draw_bicycle, draw_motorcycle


def draw_person(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    body = Body(canvas, *place)
    tall = r.uniform(1.5, 1.9)
    coat = jittered(r, r.choice(style.clothes), 0.15)
    legs = jittered(r, r.choice(style.clothes), 0.15)
    skin: Color = r.choice(((214, 170, 140), (160, 112, 84), (96, 66, 50), (226, 186, 158)))
    hair: Color = r.choice(((40, 30, 26), (90, 66, 40), (150, 146, 140), (24, 22, 22)))
    step = r.uniform(0.0, 0.32) * tall / 1.7
    lit = canvas.light((0.0, 0.3, -1.0))
    coat, legs, skin, hair = (scaled(color, lit) for color in (coat, legs, skin, hair))

    def rod(a: Point, b: Point, width: float, color: Color) -> None:
        canvas.rod(body.at(*a), body.at(*b), width, color, PERSON)

    hip, shoulder = 0.5 * tall, 0.8 * tall
    for s, l in ((-1, step), (1, -step)):  # noqa: E741
        rod((l, s * 0.09, 0.03), (0, s * 0.09, hip), 0.16, legs)
        rod((l + 0.08, s * 0.09, 0.04), (l - 0.03, s * 0.09, 0.04), 0.12, (28, 26, 26))
        rod((0, s * 0.24, shoulder - 0.04), (-l, s * 0.27, hip + 0.04), 0.12, scaled(coat, 0.88))
    rod((0, 0, hip), (0, 0, shoulder - 0.12), 0.4, coat)
    rod((0, -0.12, shoulder - 0.05), (0, 0.12, shoulder - 0.05), 0.24, coat)
    if r.random() < 0.25:
        rod((-0.1, -0.3, hip), (-0.1, -0.3, hip + 0.25), 0.28, scaled(legs, 0.7))
    canvas.ball(body.at(0, 0, 0.92 * tall), 0.11, 0.14, skin, PERSON)
    canvas.ball(body.at(-0.02, 0, 0.95 * tall), 0.11, 0.09, hair, PERSON)


def _draw_rider(canvas: Canvas, r: random.Random, style: Style, body: Body, seat: float) -> None:
    coat = jittered(r, r.choice(style.clothes), 0.15)
    legs = jittered(r, r.choice(style.clothes), 0.15)
    helmet = r.choice(((220, 220, 216), (40, 40, 44), (180, 50, 44), (60, 90, 150)))
    skin: Color = (206, 164, 136)

    def rod(a: Point, b: Point, width: float, color: Color) -> None:
        canvas.rod(body.at(*a), body.at(*b), width, color, RIDER)

    for s in (-1, 1):
        rod((-0.15, s * 0.1, seat), (0.28, s * 0.15, seat - 0.12), 0.17, legs)
        rod((0.28, s * 0.15, seat - 0.12), (0.05, s * 0.14, 0.3), 0.14, legs)
        rod((0.15, s * 0.2, seat + 0.5), (0.45, s * 0.26, seat + 0.15), 0.12, scaled(coat, 0.88))
    rod((-0.15, 0, seat + 0.05), (0.12, 0, seat + 0.42), 0.38, coat)
    rod((0.12, -0.12, seat + 0.5), (0.12, 0.12, seat + 0.5), 0.22, coat)
    canvas.ball(body.at(0.22, 0, seat + 0.72), 0.12, 0.15, skin, RIDER)
    canvas.ball(body.at(0.2, 0, seat + 0.77), 0.14, 0.12, helmet, RIDER)


def draw_cyclist(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    draw_bicycle(canvas, r, style, place)
    _draw_rider(canvas, r, style, Body(canvas, *place), 0.95)


def draw_motorcyclist(canvas: Canvas, r: random.Random, style: Style, place: Place) -> None:
    draw_motorcycle(canvas, r, style, place)
    _draw_rider(canvas, r, style, Body(canvas, *place), 0.88)
