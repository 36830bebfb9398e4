"""Adapt a trained network while it works, on a stream of images that arrive without labels.

    python examples/test_time_adaptation.py runs/demo-maxsquare-iw-multi-seed0/source-only/last.pt

Only the scale and shift of BatchNorm learn, from the maximum squares loss of each batch, and
BatchNorm normalises with the statistics of that batch. Every image is predicted once, as it comes,
before the network has learnt from it. No source image is needed.
"""

from __future__ import annotations

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

from maxsquare import MaxSquareLoss
from uda import datasets, report
from uda.errors import UserError
from uda.evaluation import Scores, evaluate
from uda.loading import load_network


@dataclass(frozen=True)
class Options:
    """Compare a network as it was trained with one that adapts to the stream it is given."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of train_uda.py, best one that knows only the source."""
    data_root: Path | None = None
    """Folder that holds the data sets; default: that of the checkpoint's run."""
    batch_size: int = 4
    """Images that arrive together."""
    lr: float = 1e-3
    """Learning rate of BatchNorm's scales and shifts; 0 adapts the statistics alone."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be positive, not {self.batch_size}.")
        if not 0 <= self.lr < math.inf:
            raise UserError(f"--lr must be a number from 0 on, not {self.lr}.")


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(lambda: run(report.command_line(Options, arguments), Console()))


def run(options: Options, console: Console) -> None:
    network, s = load_network(options.checkpoint, data_root=options.data_root)
    if s.data_root is None:
        raise UserError("The checkpoint does not say where its data are: give --data-root.")
    stream = datasets.open_dataset(
        s.target, s.data_root / s.target_folder, "val", classes=s.classes, size=s.target_size
    )
    loader = DataLoader(stream, batch_size=options.batch_size)
    with console.status("as trained"):
        before = evaluate(network, loader, stream.space, flip=False)
    with console.status("adapting to the stream"):
        after = adapt(network, loader, stream.space, options.lr)
    columns = {"as trained": before, "adapting": after}
    console.print(report.scores_table(columns, "A stream of target images"))


def adapt(network: nn.Module, loader: DataLoader, space: datasets.LabelSpace, lr: float) -> Scores:
    """Predict and learn, batch by batch; the scores of the predictions."""
    network.train().requires_grad_(False)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    loss = MaxSquareLoss()
    confusion = MulticlassConfusionMatrix(len(space), ignore_index=-1)
    for images, labels, _ in loader:
        size = images.shape[-2:]
        logits, _ = network(images)
        if not logits.isfinite().all():
            raise UserError(f"The network diverges with --lr {lr}: give a smaller one.")
        optimizer.zero_grad()
        loss(logits, size=size, align_corners=True).backward()
        optimizer.step()
        with torch.no_grad():
            full = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        confusion.update(full.argmax(dim=1), labels)
    return Scores(confusion.compute(), space.names)


if __name__ == "__main__":
    sys.exit(main())
