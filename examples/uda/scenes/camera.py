"""Turn a clean picture into the image of a game or of a dashboard camera."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from uda.scenes.canvas import Canvas, smooth_noise
from uda.scenes.styles import EGO_VEHICLE, Style


def paint_bonnet(canvas: Canvas, r: random.Random) -> None:
    """Paint the camera's own car, which is not counted, as in the real labels."""
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


def textured(
    picture: np.ndarray, labels: np.ndarray, rng: np.random.Generator, style: Style
) -> np.ndarray:
    contrast = np.zeros((2, 256), dtype=np.float32)
    for label, fine, coarse in style.texture:
        contrast[:, label] = fine, coarse
    size = (labels.shape[0], labels.shape[1])
    scale = size[1] / 320
    fine = smooth_noise(rng, size, [(1.3 * scale, 1.3 * scale)])
    coarse = smooth_noise(rng, size, [(c * scale, 2 * c * scale) for c in (3.0, 8.0, 20.0)])
    gain = 1 + contrast[0][labels] * fine + contrast[1][labels] * coarse
    return picture * gain[..., None]


def as_game(picture: np.ndarray, r: random.Random) -> np.ndarray:
    """Make the picture saturated, contrasty and crisp."""
    gray = picture.mean(axis=2, keepdims=True)
    picture = gray + r.uniform(1.15, 1.4) * (picture - gray)
    picture = 128 + r.uniform(1.02, 1.14) * (picture - 128) + r.uniform(-8, 10)
    tint = r.choice(((1.0, 1.0, 1.0), (1.06, 1.0, 0.9), (0.98, 1.0, 1.04)))
    crisp = Image.fromarray(
        (picture * np.array(tint, np.float32)).round().clip(0, 255).astype(np.uint8)
    )
    scale = picture.shape[1] / 320
    return np.asarray(crisp.filter(ImageFilter.UnsharpMask(1.0 * scale, 60, 0)))


def as_camera(picture: np.ndarray, r: random.Random, rng: np.random.Generator) -> np.ndarray:
    """Apply exposure, white balance, vignetting, tone curve, optical blur and sensor noise."""
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
