"""Adapt a trained network while it predicts, on a stream of images without labels.

    python examples/adapt_online.py
    python examples/adapt_online.py runs/demo-maxsquare-iw-multi-seed0/source-only/last.pt

The first command takes the demo's source model and a hundred scenes that it draws, and four minutes
of one core; the second a network of your own. Every image is predicted once, when it arrives,
before the network learns from it, and no source image is needed. The script compares five networks:
the network as it was trained; one whose BatchNorm uses the statistics of each batch; and three that
also learn BatchNorm's scales and shifts from each batch, by its entropy (TENT, Wang et al., ICLR
2021), by its maximum squares loss, or by that loss with information maximisation, which keeps
classes from being lost. The first table needs labels; the second, the shares of predicted classes,
does not, and shows first which classes a network loses. integrations/tent_segmentation.py shows the
same in forty lines, for a network of your own.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from integrations.tent_segmentation import prepare
from maxsquare import EntropyLoss, InformationMaximizationLoss, MaxSquareLoss
from uda import report, scenes
from uda.datasets import LabelSpace
from uda.errors import UserError
from uda.evaluation import Scores, evaluate
from uda.loading import SCENES_SEED, load_network, open_validation
from uda.presets import DEMO_CHECKPOINT, PRESETS, Settings


@dataclass(frozen=True)
class Options:
    """Compare a network as it was trained with networks that adapt to a stream of images."""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """A checkpoint of train_uda.py, preferably of a source model; default: the demo's source model
    and scenes, which are drawn into a temporary folder."""
    data_root: Path | None = None
    """Folder that holds the data sets; default: that of the checkpoint's run."""
    scenes: int = 100
    """How many scenes are drawn if no checkpoint is given."""
    network: str | None = None
    """package.module:factory of a network of your own, if the checkpoint belongs to one."""
    batch_size: int = 4
    """Images that arrive together."""
    lr: float = 1e-3
    """Learning rate of BatchNorm's scales and shifts."""

    def __post_init__(self) -> None:
        if self.scenes < 1:
            raise UserError(f"--scenes must be positive, not {self.scenes}.")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be positive, not {self.batch_size}.")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr must be a positive number, not {self.lr}.")


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(lambda: run(report.command_line(Options, arguments), report.console()))


def run(options: Options, console: Console) -> None:
    given = {"data_root": options.data_root, "network": options.network}
    if options.checkpoint is not None:
        compare(*load_network(options.checkpoint, **given), options, console)
        return
    if options.network is not None:
        raise UserError("--network needs a checkpoint of that network: give one.")
    demo = vars(PRESETS["demo"].settings)
    with tempfile.TemporaryDirectory() as folder:
        if options.data_root is None:
            sizes = {"size": demo["target_size"], "source_size": demo["source_size"]}
            with console.status("drawing scenes"):
                scenes.render(folder, seed=SCENES_SEED, train=1, val=options.scenes, **sizes)
        given = demo | {"data_root": options.data_root or Path(folder)}
        compare(*load_network(DEMO_CHECKPOINT, **given), options, console)


def compare(network: nn.Module, s: Settings, options: Options, console: Console) -> None:
    """Print the scores of five networks on one stream, and the classes that they predict."""
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
    console.print(shares_table(columns))


def shares_table(columns: dict[str, Scores]) -> Table:
    """The share of pixels that is predicted as each class, and how many classes are predicted."""
    table = Table("predicted (%)", title="Predicted classes")
    shares = []
    for name, scores in columns.items():
        table.add_column(name, justify="right")
        predicted = scores.confusion.sum(0)
        shares.append((100 * predicted / predicted.sum()).tolist())
    for name, row in zip(
        next(iter(columns.values())).names, zip(*shares, strict=True), strict=True
    ):
        table.add_row(name, *(f"{share:.1f}" for share in row))
    table.add_section()
    counts = (sum(share > 0 for share in column) for column in shares)
    table.add_row("classes", *map(str, counts), style="bold")
    return table


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
