"""What one would write without the library: each loss in a few lines that anyone believes.

`published_*` perform, operation by operation, what the method's published code performs;
`plain_*` are the shortest good PyTorch. All are scaled as the published code scales them
(scale="reference"), take logits at full resolution, and leave gradients to autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -1


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """What ends every segmentation network; DeepLabv2 aligns the corners."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True)


def published_max_square(logits: Tensor) -> Tensor:
    """The mask compares probabilities with the ignored label, so that it is always true."""
    p = logits.softmax(1)
    mask = p != IGNORE_INDEX
    return -p.square()[mask].mean() / 2


def published_iw_max_square(logits: Tensor, ratio: float = 0.2) -> Tensor:
    """Each image's histogram of predictions is made on the CPU, each pixel looks its weight up."""
    p = logits.softmax(1)
    weights = []
    for predicted in p.detach().argmax(1):
        classes = p.shape[1]
        counts = torch.histc(predicted.cpu().float(), bins=classes, min=0, max=classes - 1)
        weight = 1 / (counts**ratio * counts.sum() ** (1 - ratio)).clamp_min(1)
        weights.append(weight.to(p.device)[predicted])
    mask = p != IGNORE_INDEX
    weighted = p.square() * torch.stack(weights).unsqueeze(1)
    return -weighted[mask].sum() / (p.shape[0] * p.shape[1])


def published_multi_level(
    logits: Tensor, low_logits: Tensor, threshold: float = 0.95, weight: float = 0.1
) -> Tensor:
    """Image-wise maximum squares on the final head, guidance by both for the low-level head."""
    p, low_p = logits.detach().softmax(1), low_logits.detach().softmax(1)
    confident = (p.max(1).values > threshold) | (low_p.max(1).values > threshold)
    labels = ((p + low_p) / 2).argmax(1)
    labels[~confident] = IGNORE_INDEX
    guidance = F.cross_entropy(low_logits, labels, ignore_index=IGNORE_INDEX)
    return published_iw_max_square(logits) + weight * guidance


def plain_max_square(logits: Tensor) -> Tensor:
    """The mean of the squares."""
    return -logits.softmax(1).square().mean() / 2


def plain_iw_max_square(logits: Tensor, ratio: float = 0.2) -> Tensor:
    """The histogram stays on the device, and weights multiply pixels rather than entries."""
    p = logits.softmax(1).flatten(2)
    y = p.argmax(1)
    counts = torch.zeros_like(p[:, :, 0], dtype=torch.float32)
    counts.scatter_add_(1, y, torch.ones_like(y, dtype=counts.dtype))
    weights = 1 / (counts**ratio * counts.sum(1, keepdim=True) ** (1 - ratio)).clamp_min(1)
    return -(p.square().sum(1) * weights.gather(1, y)).sum() / (p.shape[0] * p.shape[1])


def plain_information(logits: Tensor) -> Tensor:
    """Maximum squares, and the squared distance of the mean prediction from uniform."""
    p = logits.softmax(1)
    distance = (p.mean((0, 2, 3)) - 1 / p.shape[1]).square().sum() / p.shape[1]
    return (distance - p.square().mean()) / 2


def plain_multi_level(
    logits: Tensor, low_logits: Tensor, threshold: float = 0.95, weight: float = 0.1
) -> Tensor:
    """The same without indexing by masks."""
    with torch.no_grad():
        p, low_p = logits.softmax(1), low_logits.softmax(1)
        labels = (p + low_p).argmax(1)
        confidence = torch.maximum(p.amax(1), low_p.amax(1))
        labels = torch.where(confidence > threshold, labels, IGNORE_INDEX)
    guidance = F.cross_entropy(low_logits, labels, ignore_index=IGNORE_INDEX)
    return plain_iw_max_square(logits) + weight * guidance


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that every network trains with: what a dense loss costs anyway."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
