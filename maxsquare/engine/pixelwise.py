"""The plain formula: readable PyTorch, and the specification of every faster path.

Logits z are (N, K, *spatial). Every pixel has a potential phi and an index y: the class
into whose bin it falls (image-wise losses), or which it is to learn (cross entropy). An
index of -1 means that the pixel does not count, any other outside 0..C-1 makes the sum NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maxsquare.potentials import Label, Tsallis

# Stands for -inf, a class masked out, where logits are interpolated: 0 times -inf is NaN.
LOWEST_LOGIT = -1e30


class Problem(NamedTuple):
    """Everything about a sum of potentials that is not a tensor.

    potential: None if only the indices are wanted.
    binary: z holds one channel, a two-class problem with logits (z, 0).
    by_class: one bin per image and class rather than one per image.
    threshold: pixels not above this confidence have no index; None accepts every pixel.
    ignore_index: label that means -1.
    """

    potential: Tsallis | Label | None
    size: tuple[int, int] | None = None
    align_corners: bool = False
    binary: bool = False
    from_logits: bool = True
    by_class: bool = False
    threshold: float | None = None
    ignore_index: int = -1


def accumulate(
    z: Tensor,
    problem: Problem,
    *,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the potentials of the pixels that count into bins: sums and counts, (N, bins).

    guide: logits of a second head, averaged into the prediction.
    labels: (N, *spatial) indices that take the prediction's place.
    weigh: weights of the bins, (N, bins), from their counts; the sums are then weighted and
        those of all bins, (N, 1).
    """
    phi, y, counted = terms(z, problem, guide=guide, labels=labels, valid=valid)
    phi, y, counted = (t.flatten(1).unsqueeze(1) for t in (phi, y, counted))
    if problem.by_class:
        classes = torch.arange(2 if problem.binary else z.shape[1], device=z.device)
        counted = counted & (y == classes.unsqueeze(1))
    sums, counts = torch.where(counted, phi, 0).sum(2), counted.sum(2)
    return sums if weigh is None else (weigh(counts) * sums).sum(1, keepdim=True), counts


def terms(
    z: Tensor,
    problem: Problem,
    *,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Potential (0 where it does not count), index, counts or not: (N, *spatial) each."""
    if labels is not None:
        labels = labels.long()
        labels = torch.where(labels == problem.ignore_index, -1, labels)
        valid = labels != -1 if valid is None else valid & (labels != -1)
    z = full_resolution(z, problem, valid)
    if labels is not None:
        y = labels
    elif problem.by_class or isinstance(problem.potential, Label):
        y = _index(z, guide, problem, valid)
    else:
        y = torch.zeros_like(z[:, 0], dtype=torch.long)
    counted = y != -1 if valid is None else valid & (y != -1)
    assert problem.potential is not None
    phi = problem.potential.value(*_probabilities(z, problem), y)
    return torch.where(counted, phi, 0), y, counted


def predict(
    z: Tensor, problem: Problem, *, guide: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """The index of every pixel, (N, *spatial): the most probable class, the first of equals.

    With a guide, that of the mean probability. A pixel passes the threshold, if there is one,
    when one of its heads does; one that does not, or is not valid, gets -1. A pixel whose
    probabilities are NaN gets C, so that it shows.
    """
    y = _index(full_resolution(z, problem, valid), guide, problem, valid)
    return y if valid is None else torch.where(valid, y, -1)


def full_resolution(z: Tensor, problem: Problem, valid: Tensor | None) -> Tensor:
    """The (N, C, *spatial) logits or probabilities of all classes, in float32 at least."""
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if problem.size is not None:
        z = z.clamp_min(LOWEST_LOGIT) if problem.from_logits else z
        z = F.interpolate(z, problem.size, mode="bilinear", align_corners=problem.align_corners)
    if problem.binary:
        z = torch.cat((z, torch.zeros_like(z) if problem.from_logits else 1 - z), 1)
    # Whatever stands at an invalid pixel, NaN included, must reach neither value nor gradient.
    return z if valid is None else torch.where(valid.unsqueeze(1), z, 0)


def _index(z: Tensor, guide: Tensor | None, problem: Problem, valid: Tensor | None) -> Tensor:
    z = z.detach()
    if guide is None and problem.threshold is None:
        return z.argmax(1)
    heads = [z] if guide is None else [z, full_resolution(guide.detach(), problem, valid)]
    p = torch.stack([_probabilities(head, problem)[0] for head in heads])
    y = p.sum(0).argmax(1)
    if problem.threshold is not None:
        y = torch.where(p.amax((0, 2)) <= problem.threshold, -1, y)
    return torch.where(p.isnan().any(0).any(1), p.shape[2], y)


def _probabilities(z: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.from_logits:
        log_p = z.log_softmax(1)
        return log_p.exp(), log_p
    return z, z.clamp_min(torch.finfo(z.dtype).tiny).log()
