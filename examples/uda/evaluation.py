"""Scores of a segmentation model: one confusion matrix over the whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from maxsquare import PredictionStatistics, Statistics
from uda.datasets import LabelSpace, Sample
from uda.errors import UserError

NOT_FINITE = (
    "The network's outputs are not finite: give other weights, or train these with a lower "
    "learning rate."
)

# A class that is never predicted must not make a divergence infinite.
SMALLEST_SHARE = 1e-4


@dataclass(frozen=True)
class Scores:
    """The scores of a confusion matrix, in percent.

    A mean is taken over the classes whose score is defined: the IoU unless the class is absent from
    both labels and predictions, accuracy if it is in the labels, precision if it was predicted.

    Args:
        confusion: (C, C) pixel counts; rows are labels, columns predictions.
        names: the C classes.
        ids: the classes over which means are taken; None: all.
    """

    confusion: Tensor
    names: tuple[str, ...]
    ids: tuple[int, ...] | None = None

    @property
    def miou(self) -> float:
        hits, labelled, predicted = self._counts()
        return self._mean(hits / (labelled + predicted - hits))

    @property
    def mean_accuracy(self) -> float:
        hits, labelled, _ = self._counts()
        return self._mean(hits / labelled)

    @property
    def mean_precision(self) -> float:
        hits, _, predicted = self._counts()
        return self._mean(hits / predicted)

    @property
    def pixel_accuracy(self) -> float:
        hits, labelled, _ = self._counts()
        return 100 * (hits.sum() / labelled.sum()).item()

    @property
    def per_class(self) -> dict[str, float | None]:
        """IoU of each class, None where the class is absent from labels and predictions."""
        hits, labelled, predicted = self._counts()
        iou = (100 * hits / (labelled + predicted - hits)).tolist()
        return {self.names[c]: None if iou[c] != iou[c] else iou[c] for c in self._ids()}

    def subset(self, ids: Sequence[int]) -> Scores:
        """The same predictions scored over fewer classes, e.g. SYNTHIA's 13 of 16.

        Pixels of the other classes still count as confusions; pixel accuracy stays that of all.
        """
        return Scores(self.confusion, self.names, tuple(ids))

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        confusion = self.confusion.double()
        return confusion.diagonal(), confusion.sum(1), confusion.sum(0)

    def _ids(self) -> Sequence[int]:
        return range(len(self.names)) if self.ids is None else self.ids

    def _mean(self, scores: Tensor) -> float:
        return 100 * scores[list(self._ids())].nanmean().item()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Sample],
    space: LabelSpace,
    *,
    flip: bool = True,
    align_corners: bool = True,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], object] | None = None,
) -> Scores:
    """Score a model on labelled images.

    Args:
        model: images to (logits, low_logits); put into evaluation mode and back.
        loader: batches of samples; predictions are upsampled to the size of their labels, which
            may be larger than the images (full resolution).
        space: the label space of the loader's labels.
        align_corners: how logits are upsampled, as in `torch.nn.functional.interpolate`.
        flip: average the class probabilities (not the logits) of an image and its mirror image.
        device: where the model is.
        on_progress: called after each batch with the number of its images.

    In a distributed run each process scores its own share of the images, and every process
    returns the scores of all of them.

    Raises:
        UserError: the model's outputs are not finite, so that their argmax is meaningless.
    """
    matrix = MulticlassConfusionMatrix(len(space.names), ignore_index=-1, validate_args=False)
    matrix = matrix.to(device)
    was_training = model.training
    model.eval()
    finite = torch.ones((), dtype=torch.bool, device=device)
    for images, labels, _ in loader:
        images, labels = images.to(device), labels.to(device)
        size = tuple(labels.shape[-2:])
        probabilities = predict(model, images, size, flip=flip, align_corners=align_corners)
        finite &= probabilities.isfinite().all()
        matrix.update(probabilities.argmax(dim=1), labels)
        if on_progress is not None:
            on_progress(len(images))
    model.train(was_training)
    confusion = matrix.compute().cpu()
    # Read once, because reading synchronises, and only after all processes have exchanged matrices.
    if not finite:
        raise UserError(NOT_FINITE)
    return Scores(confusion, tuple(space.names))


@torch.no_grad()
def watch(
    model: nn.Module,
    loader: Iterable[Sample],
    *,
    align_corners: bool = True,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], object] | None = None,
) -> Statistics:
    """What a model predicts on images, whose labels are not used; arguments as in `evaluate`.

    In a distributed run each process counts the images of its own loader.
    """
    statistics = PredictionStatistics()
    was_training = model.training
    model.eval()
    for images, _, _ in loader:
        logits, _ = model(images.to(device))
        statistics.update(logits, size=tuple(images.shape[-2:]), align_corners=align_corners)
        if on_progress is not None:
            on_progress(len(images))
    model.train(was_training)
    found = statistics.compute()
    if not found.information.isfinite():
        raise UserError(NOT_FINITE)
    return found


def steadiness(entropy: float, proportions: Sequence[float], before: Sequence[float]) -> float:
    """What chooses among models whose loss raises their information by itself.

    It is high where the network is sure of each pixel and predicts the classes as often as before:
    minus the mean entropy, minus the divergence of the class proportions from those before, in
    nats. before: proportions of the source model with BatchNorm statistics of the target.
    """
    now, earlier = torch.tensor(proportions), torch.tensor(before).clamp_min(SMALLEST_SHARE)
    divergence = torch.special.xlogy(now, now) - torch.special.xlogy(now, earlier)
    return -entropy - divergence.sum().item()


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    size: tuple[int, int],
    *,
    flip: bool = True,
    align_corners: bool = True,
) -> Tensor:
    """Class probabilities (N, C, *size) of the final head, averaged over the mirror image."""

    def probabilities(images: Tensor) -> Tensor:
        logits, _ = model(images)
        full = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
        return full.softmax(dim=1)

    if not flip:
        return probabilities(images)
    return (probabilities(images) + probabilities(images.flip(-1)).flip(-1)) / 2
