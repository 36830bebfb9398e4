"""What the paper compares with: class weights over the whole data set, and a discriminator.

The methods of `uda.adaptation` and two more, for the experiments alone:

    maxsquare-global  image-wise maximum squares with the class shares of the source labels in place
                      of those that are predicted in the image
    adversarial       a discriminator tells source from target by the entropy of each class at each
                      pixel, and the network learns to deceive it (T.-H. Vu et al., "ADVENT:
                      Adversarial Entropy Minimization for Domain Adaptation in Semantic
                      Segmentation", CVPR 2019), with a quarter of its channels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maxsquare
from maxsquare import functional
from uda import adaptation
from uda.adaptation import Losses
from uda.datasets import Sample

GLOBAL_WEIGHTS, ADVERSARIAL = "maxsquare-global", "adversarial"
# The published weights are 0.001 (adversarial) and 0.1 (maximum squares): experiments weight both
# by the same grid.
ADVERSARIAL_UNIT = 0.01
DISCRIMINATOR_RATE = 1e-3
# Of the discriminator's classes.
SOURCE, TARGET = 0.0, 1.0


def adapt(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Iterable[Sample],
    target: Iterable[Sample],
    rates: Sequence[float],
    method: str,
    *,
    target_weight: float,
    low_weight: float,
    source_shares: Callable[[], Tensor],
    ratio: float = 0.2,
    prior: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> Iterator[Losses]:
    """`adaptation.adapt` with a method by its name.

    source_shares: the share of each class in the source labels, where a method asks for it.
    seed: of the discriminator's first weights.
    """
    if method == ADVERSARIAL:
        weight = ADVERSARIAL_UNIT * target_weight
        return adapt_adversarially(
            model, optimizer, source, target, rates, target_weight=weight, seed=seed, **options
        )
    loss: nn.Module | None
    if method == GLOBAL_WEIGHTS:
        loss = GlobalWeightsLoss(source_shares(), ratio)
    else:
        loss = adaptation.methods(ratio=ratio, low_weight=low_weight, prior=prior)[method]
    return adaptation.adapt(
        model,
        optimizer,
        source,
        target,
        rates,
        loss,
        target_weight=target_weight,
        low_weight=low_weight,
        **options,
    )


class GlobalWeightsLoss(nn.Module):
    r"""`IWMaxSquareLoss` with the same class shares in every image.

    The weight of a pixel is 1 / (f_{c*}^a N): c* is its predicted class, f_c the share of class c,
    N the number of pixels of the image. A class without any share counts as the rarest one.

    Args:
        shares: f, (C,).
        ratio: the exponent a.
    """

    weights: Tensor

    def __init__(self, shares: Tensor, ratio: float = 0.2) -> None:
        super().__init__()
        self.register_buffer("weights", shares.clamp(min=shares[shares > 0].min()) ** -ratio)
        self.loss = maxsquare.IWMaxSquareLoss(ratio=0, scale="reference", reduction="none")

    def forward(self, logits: Tensor, *, size: Sequence[int], align_corners: bool) -> Tensor:
        each = self.loss(logits, size=size, align_corners=align_corners)
        with torch.no_grad():
            predicted = upsample(logits, size, align_corners).argmax(dim=1)
        return (self.weights[predicted] * each).sum() / len(logits)


class Discriminator(nn.Sequential):
    """Tells domains apart, patch by patch: (N, C, H, W) to logits (N, 1, H / 32, W / 32)."""

    def __init__(self, classes: int, width: int = 16) -> None:
        channels = [classes, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, kernel_size=4, stride=2, padding=1))

    def loss(self, images: Tensor, domain: float) -> Tensor:
        """Cross entropy against one domain at all patches."""
        logits = self(images)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))


def adapt_adversarially(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Iterable[Sample],
    target: Iterable[Sample],
    rates: Sequence[float],
    *,
    target_weight: float,
    seed: int = 0,
    align_corners: bool = True,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Iterator[Losses]:
    """Learn from labelled source images, and to make target predictions look like source ones.

    The network and the discriminator take a step each. Only the final head learns; otherwise as
    `adaptation.adapt`.
    """
    judge: Discriminator | None = None
    for rate, labelled, unlabelled in zip(rates, source, target, strict=True):
        adaptation.set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        images, labels, _ = labelled
        source_logits, _ = model(images)
        source_loss = functional.cross_entropy(
            source_logits, labels, size=labels.shape[-2:], align_corners=align_corners
        )
        backward(source_loss)

        target_logits, _ = model(unlabelled.image)
        if judge is None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                judge = Discriminator(target_logits.shape[1]).to(target_logits.device)
            judge_optimizer = torch.optim.Adam(judge.parameters(), betas=(0.9, 0.99))
        size = unlabelled.image.shape[-2:]
        judge.requires_grad_(False)
        seen = class_entropies(target_logits, size, align_corners)
        target_loss = target_weight * judge.loss(seen, SOURCE)
        backward(target_loss)
        optimizer.step()

        judge.requires_grad_(True)
        judge_optimizer.param_groups[0]["lr"] = DISCRIMINATOR_RATE * rate / rates[0]
        judge_optimizer.zero_grad()
        shown = class_entropies(source_logits.detach(), labels.shape[-2:], align_corners)
        judged = judge.loss(shown, SOURCE) + judge.loss(seen.detach(), TARGET)
        (judged / 2).backward()
        judge_optimizer.step()
        yield Losses(source_loss.detach(), source_loss.new_zeros(()), target_loss.detach())


def class_entropies(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """-p log p of each class, in units of log C: what the discriminator sees."""
    log_p = upsample(logits.float(), size, align_corners).log_softmax(dim=1)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


def upsample(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(logits, size=(*size,), mode="bilinear", align_corners=align_corners)
