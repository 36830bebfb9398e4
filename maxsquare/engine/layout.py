"""The memory layout of logits, and the source positions of upsampled pixels."""

from __future__ import annotations

from torch import Tensor


def flat_stride(z: Tensor) -> int | None:
    """The stride from one pixel to the next, if one stride covers all spatial dimensions."""
    step, expected = None, None
    for length, stride in zip(reversed(z.shape[2:]), reversed(z.stride()[2:]), strict=True):
        if length == 1:
            continue
        if step is None:
            step = expected = stride
        if stride != expected:
            return None
        expected = stride * length
    return 1 if step is None else step


def strides(z: Tensor, flat: bool) -> tuple[int, ...]:
    """Strides of images, channels and three spatial dimensions; if flat, the last is of pixels."""
    images, channels, *spatial = z.stride()
    if flat:
        spatial = [flat_stride(z) or 0]
    return images, channels, *[0] * (3 - len(spatial)), *spatial


def axis(source: int, size: int, align_corners: bool) -> tuple[int, int, int, int, int]:
    """(scale, offset, denominator, source, size) of an axis.

    Pixel k lies at (k * scale + offset) / denominator. These are the positions of
    `F.interpolate` as exact fractions: far from the origin, float32 would lose most digits.
    """
    if align_corners:
        return max(source - 1, 1), 0, max(size - 1, 1), source, size
    return 2 * source, source - size, 2 * size, source, size
