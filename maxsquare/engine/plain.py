"""The plain formula: readable PyTorch, and the specification of the kernels.

Logits z are (N, K, *spatial). The class y of a pixel is -1 if the pixel does not count, and C,
the number of classes, if it has none that is defined: its loss is then NaN, not hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maxsquare.potentials import Potential

# Stands for -inf, a class that is masked out, where logits are interpolated: 0 times -inf is NaN.
LOWEST_LOGIT = -1e30


def number_of_classes(z: Tensor, binary: bool) -> int:
    """binary: z holds one channel, a problem of two classes with logits (z, 0)."""
    return 2 if binary else z.shape[1]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which logits of a dtype are computed, and their loss is returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_dtype(classes: int) -> torch.dtype:
    """The narrowest dtype that holds -1 to C; of a map it matters."""
    return torch.int8 if classes < 128 else torch.int32


def classify(
    z: Tensor,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    size: tuple[int, int] | None = None,
    align_corners: bool = False,
    binary: bool = False,
    threshold: float | None = None,
    ignore_index: int = -1,
    from_logits: bool = True,
) -> tuple[Tensor, Tensor]:
    """The class y of every pixel, (N, *spatial), and the counts of 0..C in every image, (N, C + 1).

    The most probable class, the first of equals. With a threshold, -1 where it is not above it;
    with a guide too, the class of the larger mean probability, and -1 where neither head is above
    it. With labels, these. -1 where not valid.
    """
    classes = number_of_classes(z, binary)
    if labels is not None:
        y = labelled(labels, valid, classes, ignore_index).long()
    else:
        heads = [z.detach()] if guide is None else [z.detach(), guide.detach()]
        scores = torch.stack(
            [full_resolution(head, size, align_corners, binary, from_logits) for head in heads], 1
        )
        largest = scores.amax(2)
        undefined = (largest - largest != 0).any(1)
        if threshold is not None:
            scores = probabilities(scores.movedim(2, 1), from_logits)[0].movedim(1, 2)
        y = scores.sum(1).argmax(1)
        if threshold is not None:
            y = torch.where(scores.amax((1, 2)) <= threshold, -1, y)
        y = torch.where(undefined, classes, y)
        y = y if valid is None else torch.where(valid, y, -1)
    bins = y.flatten(1) + 1
    counts = torch.zeros(len(y), classes + 2, dtype=torch.long, device=z.device)
    counts = counts.scatter_add(1, bins, torch.ones_like(bins))[:, 1:]
    return y.to(index_dtype(classes)), counts


def labelled(labels: Tensor, valid: Tensor | None, classes: int, ignore_index: int) -> Tensor:
    """The class of every pixel of a label map."""
    y = labels.long()
    known = (y >= 0) & (y < classes)
    counted = (y != -1) & (y != ignore_index)
    counted = counted if valid is None else counted & valid
    y = torch.where(counted, torch.where(known, y, classes), -1)
    # Labels of any layout: a map of classes is read in the order of its pixels.
    return y.to(index_dtype(classes)).contiguous()


def weighted_terms(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    size: tuple[int, int] | None = None,
    align_corners: bool = False,
    binary: bool = False,
    from_logits: bool = True,
) -> Tensor:
    """w phi(p) of every pixel, (N, *spatial), where w is weights[n, y], or weights[n, 0]."""
    z = full_resolution(z, size, align_corners, binary, from_logits)
    w, counted = pixel_weights(z, weights, y, valid)
    # Whatever stands at a pixel that does not count, NaN included, must reach nothing.
    z = torch.where(counted.unsqueeze(1), z, 0)
    phi = potential.value(*probabilities(z, from_logits), y)
    return torch.where(counted, w * phi, 0)


def weighted_sum(z: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """The sum of `weighted_terms` over the pixels of every image, (N,)."""
    return weighted_terms(z, *arguments, **options).flatten(1).sum(1)


def weighted_sum_and_slope(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    size: tuple[int, int] | None,
    align_corners: bool,
    binary: bool,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    """`weighted_sum`, and the slope of all its sums by z: none if not wanted.

    The slope is in z's dtype at full resolution, in that of its accumulation where upsampled.
    """
    sums = weighted_sum(z, weights, y, valid, potential, size, align_corners, binary)
    if not with_slope:
        return sums, None
    z_wide = z.detach().to(sums.dtype)
    full, backward, *_ = torch.func.vjp(
        lambda z: full_resolution(z, size, align_corners, binary), z_wide
    )
    w, counted = pixel_weights(full, weights, y, valid)
    p, log_p = probabilities(torch.where(counted.unsqueeze(1), full, 0))
    full_slope = torch.where(counted, w, 0).unsqueeze(1) * potential.slope(p, log_p, y)
    (slope,) = backward(full_slope)
    return sums, slope.to(z.dtype) if size is None else slope


def full_resolution(
    z: Tensor,
    size: tuple[int, int] | None,
    align_corners: bool,
    binary: bool,
    from_logits: bool = True,
) -> Tensor:
    """The (N, C, *spatial) logits or probabilities of all classes, in their accumulation dtype."""
    z = z.to(accumulation_dtype(z.dtype))
    if size is not None:
        z = z.clamp_min(LOWEST_LOGIT) if from_logits else z
        z = F.interpolate(z, size, mode="bilinear", align_corners=align_corners)
    if binary:
        z = torch.cat((z, torch.zeros_like(z) if from_logits else 1 - z), 1)
    return z


def probabilities(z: Tensor, from_logits: bool = True) -> tuple[Tensor, Tensor]:
    """p and log p."""
    if from_logits:
        log_p = z.log_softmax(1)
        return log_p.exp(), log_p
    return z, z.clamp_min(torch.finfo(z.dtype).tiny).log()


def pixel_weights(
    z: Tensor, weights: Tensor, y: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weight of every pixel, NaN where y is C, and which pixels count: (N, *spatial) each."""
    if y is None:
        w = weights.view(-1, *[1] * (z.dim() - 2)).expand_as(z[:, 0])
        return w, torch.ones_like(w, dtype=torch.bool) if valid is None else valid
    y = y.long()
    w = weights.gather(1, y.clamp(0, weights.shape[1] - 1).flatten(1)).view_as(y)
    w = torch.where(y == z.shape[1], torch.nan, w)
    return w, y >= 0 if valid is None else (y >= 0) & valid
