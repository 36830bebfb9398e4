"""Bilinear interpolation as two sparse matrices, one for each axis, and their transposes.

The weights are those of `torch.nn.functional.interpolate(mode="bilinear")`, computed in
float64: in float32 the position of a pixel far from the origin loses most of its digits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Some neighbouring rows of an interpolation matrix, and the columns where they are not 0."""

    out: slice
    source: slice
    weights: Tensor


@functools.lru_cache(maxsize=64)
def axis_bands(
    size: int, source_size: int, align_corners: bool, step: int, dtype: torch.dtype
) -> tuple[Band, ...]:
    """The (size, source_size) interpolation matrix of one axis, cut into `step` rows each.

    Kept, because a training loop asks for the same few of them in every step.
    """
    position = torch.arange(size, dtype=torch.float64, device="cpu")
    if align_corners:
        position *= (source_size - 1) / max(size - 1, 1)
    else:
        position = ((position + 0.5) * (source_size / size) - 0.5).clamp_min_(0)
    low = position.floor().clamp_(max=source_size - 1)
    share = (position - low).unsqueeze(1)
    low = low.long().unsqueeze(1)
    high = (low + 1).clamp_(max=source_size - 1)

    bands = []
    for start in range(0, size, step):
        out = slice(start, min(start + step, size))
        source = slice(int(low[out.start]), int(high[out.stop - 1]) + 1)
        weights = torch.zeros(
            out.stop - out.start, source.stop - source.start, dtype=torch.float64, device="cpu"
        )
        weights.scatter_add_(1, low[out] - source.start, 1 - share[out])
        weights.scatter_add_(1, high[out] - source.start, share[out])
        bands.append(Band(out, source, weights.to(dtype)))
    return tuple(bands)
