"""The plain formula: readable, differentiable PyTorch, and the specification of the kernels.

Logits z are (N, K, *spatial). The class y of a pixel is -1 if the pixel does not count, and C,
the number of classes, if its class is undefined: its loss is then NaN, to make the error visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maxsquare.potentials import CrossEntropy, Linear, Potential, Probabilities

# Replaces -inf, the logit of a masked class, before interpolation: 0 times -inf is NaN.
LOWEST_LOGIT = -1e30


@dataclass(frozen=True)
class LogitsSpec:
    """How to read logits.

    size: one length for each spatial dimension, to which they are upsampled linearly, or None.
    align_corners: as in `F.interpolate`. binary: the only channel z stands for two classes with
    logits (z, 0). from_logits: False if the input holds probabilities. has_kernels: False if no
    kernel takes them.
    """

    size: tuple[int, ...] | None = None
    align_corners: bool = False
    binary: bool = False
    from_logits: bool = True
    has_kernels: bool = True

    def classes(self, z: Tensor) -> int:
        return 2 if self.binary else z.shape[1]

    def spatial(self, z: Tensor) -> tuple[int, ...]:
        """The shape of a map of pixels without its images."""
        return tuple(z.shape[2:]) if self.size is None else self.size


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss of such logits is computed and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_dtype(classes: int) -> torch.dtype:
    """The narrowest dtype that holds -1 to C, because class maps are large."""
    return torch.int8 if classes < 128 else torch.int32


def classify(
    z: Tensor,
    guide: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    spec: LogitsSpec,
    threshold: float | None = None,
    ignore_index: int = -1,
) -> tuple[Tensor, Tensor]:
    """The class y of every pixel, (N, *spatial), and the counts of 0..C in every image, (N, C + 1).

    y is the most probable class, and the first of several equal ones. With a threshold, y is -1
    where the probability does not exceed it; with a guide too, y is the class of the largest mean
    probability of both heads, and -1 where neither exceeds the threshold. With labels, y is the
    label. y is -1 where a pixel is not valid.
    """
    classes = spec.classes(z)
    if labels is not None:
        y = labelled(labels, valid, classes, ignore_index)
    else:
        heads = [full_resolution(head.detach(), spec) for head in (z, guide) if head is not None]
        if threshold is None:
            largest, y = heads[0].max(1)
            largest = largest.unsqueeze(0)
        else:
            heads = [Probabilities(head, spec.from_logits).p() for head in heads]
            largest = torch.stack([p.amax(1) for p in heads])
            y = torch.where((largest > threshold).any(0), sum(heads[1:], heads[0]).argmax(1), -1)
        undefined = (largest - largest != 0).any(0)
        y = torch.where(undefined, classes, y)
        y = y if valid is None else torch.where(valid, y, -1)
    # One bin more than there are classes, for pixels that do not count.
    bins = y.flatten(1) + 1
    ones = torch.ones((), dtype=torch.long, device=z.device).expand_as(bins)
    counts = torch.zeros(len(y), classes + 2, dtype=torch.long, device=z.device)
    return y, counts.scatter_add(1, bins, ones)[:, 1:]


def labelled(labels: Tensor, valid: Tensor | None, classes: int, ignore_index: int) -> Tensor:
    """The class of every pixel of a label map."""
    y = labels.long()
    known = (y >= 0) & (y < classes)
    counted = (y != -1) & (y != ignore_index)
    counted = counted if valid is None else counted & valid
    y = torch.where(counted, torch.where(known, y, classes), -1)
    # Labels may have any layout, but kernels read class maps in the order of the pixels.
    return y.contiguous()


def weighted_terms(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    spec: LogitsSpec,
) -> Tensor:
    """w phi(p) of every pixel, (N, *spatial), where w is weights[n, y], or weights[n, 0]."""
    z = full_resolution(z, spec)
    # Classes leave out pixels of the cross entropy. Elsewhere they weight pixels, and are -1 only
    # where `valid` leaves out the pixel.
    counted = valid
    if isinstance(potential, CrossEntropy):
        assert y is not None
        counted = y >= 0 if valid is None else (y >= 0) & valid
    # A pixel that does not count must affect nothing, even if it holds NaN.
    if counted is not None:
        z = torch.where(counted.unsqueeze(1), z, 0)
    probabilities = Probabilities(z, spec.from_logits)
    if isinstance(potential, Linear):
        terms = potential.value(probabilities, weights)
    elif isinstance(potential, CrossEntropy):
        assert y is not None
        terms = pixel_weights(z, weights, y) * potential.value(probabilities, y)
    else:
        terms = pixel_weights(z, weights, y) * potential.value(probabilities)
    return terms if counted is None else torch.where(counted, terms, 0)


def pixel_weights(z: Tensor, weights: Tensor, y: Tensor | None) -> Tensor:
    """The weight of every pixel of full-resolution logits: 0 where y is -1, NaN where it is C."""
    if y is None:
        return weights.view(-1, *[1] * (z.dim() - 2))
    padded = F.pad(F.pad(weights.expand(-1, z.shape[1]), (1, 0)), (0, 1), value=torch.nan)
    return padded.gather(1, y.flatten(1).long() + 1).view_as(y)


def weighted_sum(
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    spec: LogitsSpec,
    needs_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The sum of `weighted_terms` over the pixels of every image, (N,), and its gradient by z.

    The gradient is None if it is not needed. It has the dtype of z at full resolution, and the
    accumulation dtype if z is upsampled.
    """

    def sums_of(z: Tensor) -> Tensor:
        terms = weighted_terms(z, weights, y, valid, potential, spec)
        return terms.flatten(1).sum(1)

    if not needs_grad:
        return sums_of(z), None
    z_wide = z.detach().to(accumulation_dtype(z.dtype))
    sums, backward, *_ = torch.func.vjp(sums_of, z_wide)
    (grad,) = backward(torch.ones_like(sums))
    return sums, grad.to(z.dtype) if spec.size is None else grad


# Kernels may leave the sum of each image in several parts; here it is one.
weighted_parts = weighted_sum


def class_sums(z: Tensor, valid: Tensor | None, spec: LogitsSpec) -> Tensor:
    """The sum of p_c over the pixels of every image, (N, C)."""
    z = full_resolution(z, spec)
    if valid is not None:
        z = torch.where(valid.unsqueeze(1), z, 0)
    p = Probabilities(z, spec.from_logits).p()
    if valid is not None:
        p = torch.where(valid.unsqueeze(1), p, 0)
    return p.flatten(2).sum(2)


def full_resolution(z: Tensor, spec: LogitsSpec) -> Tensor:
    """The (N, C, *spatial) logits or probabilities of all classes, in their accumulation dtype."""
    z = upsampled(z, spec)
    if spec.binary:
        z = torch.cat((z, torch.zeros_like(z) if spec.from_logits else 1 - z), 1)
    return z


def upsampled(z: Tensor, spec: LogitsSpec) -> Tensor:
    """Logits at their full resolution, in their accumulation dtype."""
    z = z.to(accumulation_dtype(z.dtype))
    if spec.spatial(z) == z.shape[2:]:
        return z
    z = z.clamp_min(LOWEST_LOGIT) if spec.from_logits else z
    mode = ("linear", "bilinear", "trilinear")[z.dim() - 3]
    return F.interpolate(z, spec.size, mode=mode, align_corners=spec.align_corners)
