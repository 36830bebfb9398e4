"""Adapt a trained network while it predicts, on a stream of images without labels.

    python examples/adapt_online.py runs/demo-maxsquare-iw-multi-seed0/source-only/last.pt

Every image is predicted once, when it arrives, before the network learns from it, and no source
image is needed. The script compares five networks: the network as it was trained; one whose
BatchNorm uses the statistics of each batch; and three that also learn BatchNorm's scales and shifts
from each batch, by its entropy (TENT, Wang et al., ICLR 2021), by its maximum squares loss, or by
that loss with information maximisation, which keeps classes from being lost.
integrations/tent_segmentation.py shows the same in forty lines, for a network of your own.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from integrations.tent_segmentation import prepare
from maxsquare import EntropyLoss, InformationMaximizationLoss, MaxSquareLoss
from uda import report
from uda.datasets import LabelSpace
from uda.errors import UserError
from uda.evaluation import Scores, evaluate
from uda.loading import load_network, open_validation


@dataclass(frozen=True)
class Options:
    """Compare a network as it was trained with networks that adapt to a stream of images."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of train_uda.py, preferably of a source model."""
    data_root: Path | None = None
    """Folder that holds the data sets; default: that of the checkpoint's run."""
    network: str | None = None
    """package.module:factory of a network of your own, if the checkpoint belongs to one."""
    batch_size: int = 4
    """Images that arrive together."""
    lr: float = 1e-3
    """Learning rate of BatchNorm's scales and shifts."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be positive, not {self.batch_size}.")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr must be a positive number, not {self.lr}.")


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(lambda: run(report.command_line(Options, arguments), report.console()))


def run(options: Options, console: Console) -> None:
    network, s = load_network(
        options.checkpoint, data_root=options.data_root, network=options.network
    )
    if s.data_root is None:
        raise UserError("The checkpoint does not say where its data are: give --data-root.")
    stream = open_validation(s)
    loader = DataLoader(stream, batch_size=options.batch_size)
    how = {"space": stream.space, "align_corners": s.corners}
    columns = {}
    with console.status("predicting"):
        columns["as trained"] = evaluate(network, loader, flip=False, **how)
        normalised = copy.deepcopy(network)
        if not prepare(normalised):
            raise UserError("The network has no normalisation layers to adapt: give another.")
        columns["statistics"] = evaluate(normalised, loader, flip=False, **how)
    losses = {
        "entropy": EntropyLoss(),
        "maximum squares": MaxSquareLoss(),
        "with information": InformationMaximizationLoss(MaxSquareLoss()),
    }
    for name, loss in losses.items():
        with console.status(f"adapting by {name}"):
            adapting = copy.deepcopy(network)
            columns[name] = adapt(adapting, loader, loss, options.lr, **how)
    console.print(report.scores_table(columns, "A stream of target images"))


def adapt(
    network: nn.Module,
    loader: DataLoader,
    loss: nn.Module,
    lr: float,
    *,
    space: LabelSpace,
    align_corners: bool,
) -> Scores:
    """Predict each batch, then learn from it; returns the scores of the predictions."""
    optimizer = torch.optim.SGD(prepare(network), lr=lr, momentum=0.9)
    confusion = MulticlassConfusionMatrix(len(space), ignore_index=-1)
    for images, labels, _ in loader:
        size = images.shape[-2:]
        logits, _ = network(images)
        if not logits.isfinite().all():
            raise UserError(f"The network diverges with --lr {lr}: give a smaller one.")
        optimizer.zero_grad()
        loss(logits, size=size, align_corners=align_corners).backward()
        optimizer.step()
        with torch.no_grad():
            full = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
        confusion.update(full.argmax(dim=1), labels)
    return Scores(confusion.compute(), space.names)


if __name__ == "__main__":
    report.end_on_signals()
    sys.exit(main())
