"""From settings to scenes, data sets, batches and the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Subset

from uda import checkpoint, datasets, deeplab, networks, scenes
from uda.datasets import Progress, Sample, SegmentationDataset
from uda.errors import UserError, one_line
from uda.outputs import from_json
from uda.presets import LISTED_IMAGES, Settings
from uda.report import data_table, progress_bar

# Number of unlabelled target images on which predictions are watched.
WATCHED_IMAGES = 60
# The rendered scenes do not depend on --seed: runs with different seeds share one data set.
SCENES_SEED = 0


def check_scenes(s: Settings) -> None:
    """Refuse a data root that holds anything but the scenes of these settings; writes nothing."""
    scenes.check(s.data_root, **_scenes_of(s))


def render_scenes(s: Settings, on_progress: Progress) -> None:
    """Draw the demo's data sets into the data root, as far as they are not there yet."""
    scenes.render(s.data_root, **_scenes_of(s), on_progress=on_progress)


def _scenes_of(s: Settings) -> dict[str, Any]:
    return {
        "seed": SCENES_SEED,
        "train": s.scenes,
        "val": max(s.scenes // 4, 1),
        "size": s.target_size,
        "source_size": s.source_size,
        "source_val": max(s.scenes // 4, 1) if s.source_evaluate_every else 0,
    }


def open_data(
    s: Settings,
) -> tuple[SegmentationDataset, SegmentationDataset, SegmentationDataset | None]:
    """Source with labels, target without, and the target's validation images if it has labels."""
    training = {
        "classes": s.classes,
        "augment": None if s.augment == "none" else s.augment,
        "normalize": s.normalize,
        "seed": s.seed,
    }
    source_root, target_root = s.data_root / s.source_folder, s.data_root / s.target_folder
    source = datasets.open_dataset(s.source, source_root, "train", size=s.source_size, **training)
    target = datasets.open_dataset(
        s.target, target_root, "train", size=s.target_size, labels=False, **training
    )
    validation = open_validation(s) if has_validation(s) else None
    if s.source_evaluate_every:
        open_source_validation(s)  # to find out now, not after many steps, if it is missing
    if validation and source.space.names != validation.space.names:
        raise UserError(
            f"{source_root} and {target_root} do not name the same classes in the same order "
            f"({', '.join(source.space.names)} and {', '.join(validation.space.names)}): make "
            "them agree."
        )
    for dataset, folder in ((source, source_root), (target, target_root)):
        if len(dataset) < s.batch_size:
            raise UserError(
                f"{folder} holds {len(dataset)} training images, fewer than --batch-size "
                f"{s.batch_size}: choose a smaller batch."
            )
    return source, target, validation


def list_warning(s: Settings, images: int) -> str | None:
    """A warning if the number of source images differs from that of the published list."""
    listed = LISTED_IMAGES.get(s.source)
    if s.preset == Settings.preset or listed in (None, images):
        return None
    path = s.data_root / s.source_folder / "list" / "train.txt"
    return (
        f"warning: {s.source_folder} has {images:,} training images, the published runs read "
        f"{listed:,}: put their list at {path}, one image number a line."
    )


def has_validation(s: Settings) -> bool:
    """Whether the target has labels to validate with; a folder of images may have none."""
    labels = s.data_root / s.target_folder / "labels"
    if s.target != "folder" or labels.exists():
        return True
    if s.select == "labels":
        raise UserError(f"--select labels needs {labels}: give labels, or choose information.")
    return False


def open_validation(s: Settings) -> SegmentationDataset:
    """The target's validation images, with labels."""
    root, options = s.data_root / s.target_folder, {"classes": s.classes, "normalize": s.normalize}
    return datasets.open_dataset(s.target, root, "val", size=s.target_size, **options)


def open_watched(s: Settings) -> Subset[Sample]:
    """Some of the target's training images, as they are and without labels, evenly spaced."""
    root, options = s.data_root / s.target_folder, {"classes": s.classes, "normalize": s.normalize}
    dataset = datasets.open_dataset(
        s.target, root, "train", size=s.target_size, labels=False, **options
    )
    count = min(WATCHED_IMAGES, len(dataset))
    return Subset(dataset, [len(dataset) * k // count for k in range(count)])


def open_source_validation(s: Settings) -> SegmentationDataset:
    """The source's own validation images, with labels."""
    root, options = s.data_root / s.source_folder, {"classes": s.classes, "normalize": s.normalize}
    return datasets.open_dataset(s.source, root, "val", size=s.source_size, **options)


def batches(
    dataset: SegmentationDataset,
    s: Settings,
    first: int,
    last: int,
    *,
    stream: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Sample]:
    """Batches number `first` to `last` - 1 of an endless shuffled pass over a data set.

    A batch depends only on the seed, the stream and its number, so that a resumed run sees the
    same data as an uninterrupted one. Each of `world` processes receives its share of the batch.
    """
    per_epoch = len(dataset) // s.batch_size
    while first < last:
        epoch, position = divmod(first, per_epoch)
        order = np.random.default_rng([s.seed, stream, epoch]).permutation(len(dataset))
        epoch_batches = order[: per_epoch * s.batch_size].reshape(per_epoch, s.batch_size)
        chosen = epoch_batches[position : position + last - first, rank::world]
        dataset.set_epoch(epoch)
        yield from _loader(dataset, s, batch_sampler=chosen.tolist())
        first += len(chosen)


def validation_loader(
    dataset: torch.utils.data.Dataset[Sample], s: Settings, *, rank: int = 0, world: int = 1
) -> DataLoader[Sample]:
    """This process's share of images to be evaluated, in their order."""
    share = Subset(dataset, range(rank, len(dataset), world))
    return _loader(share, s, batch_size=max(s.batch_size // world, 1))


def _loader(
    dataset: torch.utils.data.Dataset[Sample], s: Settings, **options: Any
) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        num_workers=s.workers,
        pin_memory=s.device != "cpu" and torch.cuda.is_available(),
        generator=torch.Generator(),  # leaves the global random state alone
        **options,
    )


def choose_device(wanted: str, processes: int = 1) -> str:
    """ "cpu" or "cuda"; UserError if there are not as many GPUs as processes that need one."""
    gpus = torch.cuda.device_count()
    device = wanted if wanted != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and gpus < processes:
        fewer = "" if processes == 1 else f" for --processes {processes}"
        raise UserError(
            f"--device cuda needs {processes} GPU(s){fewer} and finds {gpus}: choose --device cpu"
            f"{' or fewer processes' if fewer else ''}."
        )
    return device


def build_network(s: Settings) -> nn.Module:
    """The network of a run, with its initial weights."""
    if not s.has_deeplab:
        return networks.build(s.network, s.classes)
    make = deeplab.deeplab_small if s.network == "small" else deeplab.deeplab_resnet101
    return make(s.classes, aspp=s.aspp, freeze_bn=s.freeze_bn)


def load_init(network: nn.Module, s: Settings) -> None:
    """Give a network the weights of --init."""
    if not s.has_deeplab:
        networks.load_weights(network, s.init)
    elif not deeplab.load_weights(network, s.init) and not s.source_steps:
        raise UserError(f"--init {s.init} has no classifier: train one with --source-steps.")


def check_network(s: Settings) -> None:
    """Refuse a network of the user's own that cannot do what the settings ask for."""
    if s.has_deeplab:
        return
    if s.backbone_updates != "once" or s.freeze_bn:
        raise UserError(
            f"--network {s.network} cannot have --backbone-updates {s.backbone_updates} or "
            "--freeze-bn, which are for DeepLabv2: give --backbone-updates once --no-freeze-bn."
        )
    network = build_network(s)
    has_low_head = networks.try_out(network, (s.source_size, s.target_size), s.network)
    if not has_low_head and s.method in ("maxsquare-iw-multi", "all"):
        raise UserError(
            f"--method {s.method} needs a second head, but --network {s.network} has one only: "
            "choose another method, such as maxsquare-iw."
        )


def load_network(path: Path, **changes: Any) -> tuple[nn.Module, Settings]:
    """The network of a checkpoint and the settings of its run.

    A checkpoint of the published code holds no settings: it gets the defaults. `changes` that are
    not None replace settings. They must name a network of the user's own again, because a file must
    not choose the code that runs.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        s = from_json(checkpoint.read(path).get("settings", {}))
    except (UserError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds settings that this script cannot use ({str(error).rstrip('.')}): give "
            "another checkpoint."
        ) from error
    s = replace(s, **given)
    if not s.has_deeplab and "network" not in given:
        raise UserError(
            f"{path} belongs to --network {s.network}: give that option, too, if you trust it."
        )
    network = build_network(s)
    if not s.has_deeplab:
        networks.load_weights(network, path)
    elif not deeplab.load_weights(network, path):
        raise UserError(f"{path} holds no classifier, only a backbone: give a trained checkpoint.")
    return network, s


def check_data(s: Settings, console: Console) -> None:
    """Read every file of the source and of the labelled target, and print a report."""
    if s.data_root is None:
        raise UserError("--check-data needs the folder of the data sets: give it as --data-root.")
    parts = [(s.source, s.source_folder, "train")]
    if has_validation(s):
        parts.append((s.target, s.target_folder, "val"))
    found = []
    with progress_bar(console) as progress:
        for kind, folder, split in parts:
            dataset = datasets.open_dataset(
                kind, s.data_root / folder, split, classes=s.classes, allow_missing=True
            )
            task = progress.add_task(one_line(f"{folder} {split}"), total=len(dataset), note="")
            found.append(
                datasets.check_data(
                    dataset, lambda done, _, task=task: progress.update(task, completed=done)
                )
            )
    for (_, folder, split), result in zip(parts, found, strict=True):
        console.print(data_table(result, f"{folder} {split}"))
    if warning := list_warning(s, found[0].images):
        console.print(warning)
    if not all(result.usable for result in found):
        raise UserError(f"{s.data_root} has unusable files: repair those listed above.")
