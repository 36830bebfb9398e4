"""The street scenes that this project draws, as a task for the ablation.

Source and target are those of the demo (examples/train_uda.py): the same kinds of things, drawn in
two styles. So are network, optimiser, learning rates and source model; the adaptation is shorter,
so that the whole ablation takes a few hours of computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from uda import adaptation, deeplab, loading
from uda.adaptation import BackboneUpdates
from uda.datasets import Progress
from uda.evaluation import evaluate, predict
from uda.presets import PRESETS, SHIPPED, Settings

SETTINGS = replace(PRESETS["demo"].settings, steps=50, device="cpu", workers=0)

# Every method may choose among the same multiples of its published weight. That weight was
# published for 29,750 steps; 50 steps need a stronger pull.
MULTIPLES = (10.0, 50.0, 250.0, 1250.0)
BASE_WEIGHTS = {
    "entropy": 0.1,
    "tsallis-1.5": 0.1,
    "maxsquare": 0.1,
    "maxsquare-iw": 0.1,
    "maxsquare-iw-multi": 0.09,
    # Not published. This is a cross entropy, not divided by the number of classes as the others
    # are, so that a fifth of their weight is already four times as much.
    "pseudo-label": 0.02,
}

# Streams of random numbers for the order of images, as in train_uda.py.
SOURCE_STREAM, TARGET_STREAM, STATISTICS_STREAM = range(3)
STATISTICS_BATCHES = 30
EXPLAINED = 4  # every fourth validation image is looked at closely


class StreetScenes:
    """Rendered scenes in two styles and the demo's small DeepLabv2.

    Args:
        data_root: folder of the scenes; what is missing there is drawn.
        sources: files of source models, which the seeds take in turn.
        settings: sizes, steps and learning rates.
    """

    name = "scenes"
    score_name = "target mIoU (%)"

    def __init__(
        self,
        data_root: Path,
        sources: Sequence[Path] = (SHIPPED,),
        settings: Settings = SETTINGS,
    ) -> None:
        self.sources = sources
        self.settings = s = replace(settings, data_root=data_root)
        self.weights = {
            method: tuple(round(multiple * weight, 6) for multiple in MULTIPLES)
            for method, weight in BASE_WEIGHTS.items()
        }
        named = ", ".join(f"{path.parent.name}/{path.name}" for path in sources)
        self.base = {
            "data": f"{s.scenes} rendered street scenes per domain for training, "
            f"{max(s.scenes // 4, 1)} of the target for validation, "
            f"{s.target_size[1]}x{s.target_size[0]} pixels, {s.classes} classes",
            "network": "DeepLabv2 with two heads on a small ResNet",
            "source models": f"{named} (--sources), which the seeds take in turn",
            "adaptation": f"{s.steps} steps of {s.batch_size} + {s.batch_size} images, "
            f"learning rate {s.lr:g} (heads x10), SGD, momentum {s.momentum:g}, weight decay "
            f"{s.weight_decay:g}, poly decay",
            "target statistics": f"{STATISTICS_BATCHES * s.batch_size} target training images",
        }

    def prepare(self, on_progress: Progress) -> None:
        loading.render_scenes(self.settings, on_progress)

    def train_source(self, seed: int) -> dict[str, Tensor]:
        network = loading.build_network(self.settings)
        deeplab.load_weights(network, self.sources[seed % len(self.sources)])
        return network.state_dict()

    def target_statistics(self, source: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        s = replace(self.settings, seed=seed)
        network = self._network(source)
        _, target, _ = loading.open_data(s)
        batches = loading.batches(target, s, 0, STATISTICS_BATCHES, stream=STATISTICS_STREAM)
        adaptation.target_statistics(network, (batch.image for batch in batches))
        return network.state_dict()

    def adapt(
        self,
        source: dict[str, Tensor],
        seed: int,
        method: str,
        weight: float,
        *,
        updates: BackboneUpdates = "once",
        lr_multiple: float = 1.0,
    ) -> dict[str, Tensor]:
        s = self.settings
        adapting = replace(
            s,
            seed=seed,
            target_weight=weight,
            backbone_updates=updates,
        )
        return _train(
            self._network(source),
            adapting,
            method,
            s.steps,
            s.lr,
            both_heads=method.endswith("multi"),
            lr_multiple=lr_multiple,
        )

    def score(self, weights: dict[str, Tensor]) -> tuple[float, dict[str, float | None]]:
        _, _, validation = loading.open_data(self.settings)
        loader = loading.validation_loader(validation, self.settings)
        scores = evaluate(self._network(weights), loader, validation.space, flip=False)
        return scores.miou, scores.per_class

    @torch.no_grad()
    def explain(self, weights: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
        s, network = self.settings, self._network(weights).eval()
        _, _, validation = loading.open_data(s)
        some = Subset(validation, range(0, len(validation), EXPLAINED))
        confidences, counts = [], torch.zeros(s.classes)
        for images, _, _ in loading.validation_loader(some, s):
            confidence, predicted = predict(network, images, s.target_size, flip=False).max(dim=1)
            confidences.append(confidence.mean(dim=(1, 2)))
            counts += predicted.flatten().bincount(minlength=s.classes)
        share = (100 * counts / counts.sum()).tolist()
        return (
            100 * torch.cat(confidences).mean().item(),
            dict(zip(validation.space.names, share, strict=True)),
        )

    def _network(self, weights: dict[str, Tensor]) -> deeplab.DeepLabV2:
        network = loading.build_network(self.settings)
        network.load_state_dict(weights)
        return network


def _train(
    network: deeplab.DeepLabV2,
    s: Settings,
    method: str,
    steps: int,
    lr: float,
    *,
    both_heads: bool,
    lr_multiple: float = 1.0,
) -> dict[str, Tensor]:
    """The adaptation as in train_uda.py; the learning rate reaches zero at its end."""
    losses = adaptation.methods(ratio=s.ratio, threshold=s.threshold, low_weight=s.low_weight)
    target_loss = losses[method]
    *backbone, heads = adaptation.parameter_groups(network, lr, backbone_updates=s.backbone_updates)
    for group in backbone:
        group["lr_multiple"] *= lr_multiple
    optimizer = adaptation.RepeatedSGD(
        [*backbone, heads], lr=lr, momentum=s.momentum, weight_decay=s.weight_decay
    )
    source, target, _ = loading.open_data(s)
    source_batches = loading.batches(source, s, 0, steps, stream=SOURCE_STREAM)
    target_batches = loading.batches(target, s, 0, steps, stream=TARGET_STREAM)
    low_weight = s.low_weight if both_heads else 0.0

    if s.channels_last:
        network.to(memory_format=torch.channels_last)
    network.train()
    for step, (images, labels, _) in enumerate(source_batches):
        adaptation.set_learning_rate(optimizer, adaptation.poly_lr(step, steps, lr))
        if target_loss is None:
            adaptation.source_step(network, optimizer, images, labels, low_weight=low_weight)
        else:
            adaptation.adaptation_step(
                network,
                optimizer,
                images,
                labels,
                next(target_batches).image,
                target_loss,
                target_weight=s.target_weight,
                low_weight=low_weight,
            )
    return network.state_dict()
