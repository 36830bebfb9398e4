"""Score a checkpoint on labelled images, at the network's size and at full resolution.

    python examples/evaluate.py runs/demo-maxsquare-iw-multi-seed0/last.pt
    python examples/evaluate.py published.pth --data-root DIR --out predictions

Options that are not given are taken from the run that wrote the checkpoint. A checkpoint of the
published code holds only weights and gets the settings of its GTA5 to Cityscapes runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

from uda import datasets, plots, report
from uda.datasets import Kind
from uda.deeplab import Aspp
from uda.errors import UserError
from uda.evaluation import evaluate, predict
from uda.loading import choose_device, load_network

FULL = "full resolution"


@dataclass(frozen=True)
class Options:
    """Score a checkpoint on labelled images and, on request, write its predictions as pictures."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint of train_uda.py or of the published code."""
    data_root: Path | None = None
    """Folder that holds the data sets."""
    target: Kind | None = None
    """Layout of the data set."""
    target_folder: str | None = None
    """Folder of the data set under --data-root."""
    split: str = "val"
    """Part of the data set."""
    classes: int | None = None
    """Number of classes: 19, 16 or 13 of Cityscapes, or as many as a folder's label map names."""
    target_size: tuple[int, int] | None = None
    """Height and width at which the network sees the images."""
    network: str | None = None
    """Architecture of the checkpoint: small, resnet101 or package.module:factory. The last must be
    given even if the checkpoint names it, because it runs code."""
    align_corners: bool = False
    """Upsample the logits of a network of your own with align_corners=True."""
    aspp: Aspp | None = None
    """Dilations of the classifier heads that the checkpoint was trained with."""
    normalize: datasets.Normalization | None = None
    """Preprocessing: BGR minus the published mean, or RGB as torchvision's weights expect it."""
    flip: bool = True
    """Average the predictions for an image and its mirror image."""
    out: Path | None = None
    """Folder for the predictions in the data set's colours, new or empty; default: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; "auto" takes a GPU if there is one."""
    workers: int = 2
    """Processes that load images; 0 loads them in this process."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"--workers must not be negative, not {self.workers}.")


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(lambda: run(report.command_line(Options, arguments), report.console()))


def run(options: Options, console: Console) -> None:
    if options.out and options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out} is not empty: choose another folder.")
    device = choose_device(options.device)
    network, s = load_network(
        options.checkpoint,
        data_root=options.data_root,
        target=options.target,
        target_folder=options.target_folder,
        classes=options.classes,
        target_size=options.target_size,
        network=options.network,
        aspp=options.aspp,
        normalize=options.normalize,
        align_corners=options.align_corners or None,
    )
    if s.data_root is None:
        raise UserError("The checkpoint does not say where its data are: give --data-root.")
    network.to(device).eval()
    height, width = s.target_size
    loaders = {}
    for name, full_labels in ((f"{width}x{height}", False), (FULL, True)):
        dataset = datasets.open_dataset(
            s.target,
            s.data_root / s.target_folder,
            options.split,
            classes=s.classes,
            size=s.target_size,
            normalize=s.normalize,
            full_labels=full_labels,
        )
        # One image at a time, because label files of one data set may differ in size.
        loaders[name] = DataLoader(dataset, batch_size=1, num_workers=options.workers)
    pictures = picture_files(dataset, options.out) if options.out else []
    columns = {}
    with report.progress_bar(console) as progress:
        for name, loader in loaders.items():
            task = progress.add_task(name, total=len(dataset), note="")
            columns[name] = evaluate(
                network,
                loader,
                dataset.space,
                flip=options.flip,
                align_corners=s.corners,
                device=device,
                on_progress=lambda images, task=task: progress.advance(task, images),
            )
    # Random guessing of equally frequent classes reaches at most this.
    if all(scores.miou < 100 / len(dataset.space) for scores in columns.values()):
        console.print(
            "This is no better than chance. Does the checkpoint expect another preprocessing "
            "(--normalize), other classes (--classes) or other heads (--aspp)?"
        )
    console.print(report.scores_table(columns, f"{options.checkpoint} on {options.split}"))
    for name, scores in columns.items():
        console.print(
            f"{name}: pixel accuracy {scores.pixel_accuracy:.1f}, mean accuracy "
            f"{scores.mean_accuracy:.1f}, mean precision {scores.mean_precision:.1f}"
        )
    if options.out:
        with report.progress_bar(console) as progress:
            task = progress.add_task("writing predictions", total=len(dataset), note="")
            for (image, labels, _), file in zip(loaders[FULL], pictures, strict=True):
                probabilities = predict(
                    network,
                    image.to(device),
                    labels.shape[-2:],
                    flip=options.flip,
                    align_corners=s.corners,
                )
                picture = plots.colorize(probabilities[0].argmax(dim=0).cpu(), dataset.space)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file)
                progress.advance(task)


def picture_files(dataset: datasets.SegmentationDataset, out: Path) -> list[Path]:
    """The file for the prediction of each image: it has the image's name.

    If images of several folders share a name, their folders are kept.
    """
    images = [image for image, _ in dataset.pairs]
    files = [out / f"{image.stem}.png" for image in images]
    if len(set(files)) < len(set(images)):
        shared = os.path.commonpath([image.parent for image in images])
        files = [out / image.relative_to(shared).with_suffix(".png") for image in images]
    first: dict[Path, Path] = {}
    for image, file in zip(images, files, strict=True):
        if first.setdefault(file, image) != image:
            raise UserError(
                f"{image} and {first[file]} would both have their predictions in {file}: rename "
                "one of them."
            )
    return files


if __name__ == "__main__":
    report.end_on_signals()
    sys.exit(main())
