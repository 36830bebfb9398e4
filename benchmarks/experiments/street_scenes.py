"""The street scenes that this project draws, as a task for the ablation.

Source, target, network, optimiser and learning rate are those of the demo (examples/train_uda.py):
streets with the same kinds of objects in two styles. The adaptation is shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

import alternatives
from grid import class_shares
from maxsquare import Statistics
from uda import adaptation, deeplab, loading
from uda.datasets import Progress
from uda.evaluation import evaluate, predict, watch
from uda.presets import DEMO_CHECKPOINT, PRESETS, Settings

SETTINGS = replace(PRESETS["demo"].settings, steps=100, device="cpu", workers=0)

# Random streams for the order of images, as in train_uda.py.
SOURCE_STREAM, TARGET_STREAM, STATISTICS_STREAM = range(3)
STATISTICS_BATCHES = 30
EXPLAINED = 4  # `explain` uses every fourth validation image


class StreetScenes:
    """Rendered scenes in two styles and the demo's small DeepLabv2.

    Args:
        data_root: folder of the scenes; missing ones are rendered.
        sources: files of source models; seed i uses number i, round and round.
        settings: sizes, steps and learning rates.
    """

    name = "scenes"
    score_name = "target mIoU (%)"
    # The published 0.1 is for 29,750 steps; fewer steps need a larger weight.
    weights = (2.0, 8.0, 32.0)

    def __init__(
        self,
        data_root: Path,
        sources: Sequence[Path] = (DEMO_CHECKPOINT,),
        settings: Settings = SETTINGS,
    ) -> None:
        self.sources = sources
        self.settings = s = replace(settings, data_root=data_root)
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
        prior: Tensor | None = None,
        ratio: float = 0.2,
        length: float = 1.0,
    ) -> dict[str, Tensor]:
        steps = round(self.settings.steps * length)
        s = replace(self.settings, seed=seed, steps=steps, ratio=ratio)
        return self._adapt(self._network(source), s, method, weight, prior)

    def source_shares(self) -> Tensor:
        """The share of each class in the labels of the source."""
        source, _, _ = loading.open_data(self.settings)
        batches = loading.validation_loader(source, self.settings)
        return class_shares((batch.labels for batch in batches), self.settings.classes)

    def predictions(self, weights: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The final head's logits and the labels of the target's validation images."""
        _, _, validation = loading.open_data(self.settings)
        network = self._network(weights).eval()
        for images, labels, _ in loading.validation_loader(validation, self.settings):
            yield network(images)[0], labels

    def score(self, weights: dict[str, Tensor]) -> tuple[float, dict[str, float | None]]:
        _, _, validation = loading.open_data(self.settings)
        loader = loading.validation_loader(validation, self.settings)
        scores = evaluate(self._network(weights), loader, validation.space, flip=False)
        return scores.miou, scores.per_class

    def watch(self, weights: dict[str, Tensor]) -> Statistics:
        s = self.settings
        return watch(self._network(weights), loading.validation_loader(loading.open_watched(s), s))

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

    def _adapt(
        self, network: nn.Module, s: Settings, method: str, weight: float, prior: Tensor | None
    ) -> dict[str, Tensor]:
        """The adaptation of train_uda.py without checkpoints or evaluations."""
        source, target, _ = loading.open_data(s)
        network.to(memory_format=torch.channels_last).train()  # faster on a CPU
        optimizer = adaptation.RepeatedSGD(
            adaptation.parameter_groups(network, s.lr, backbone_updates=s.backbone_updates),
            momentum=s.momentum,
            weight_decay=s.weight_decay,
        )
        training = alternatives.adapt(
            network,
            optimizer,
            loading.batches(source, s, 0, s.steps, stream=SOURCE_STREAM),
            loading.batches(target, s, 0, s.steps, stream=TARGET_STREAM),
            [*adaptation.learning_rates(s.lr, range(s.steps), s.steps)],
            method,
            target_weight=weight,
            low_weight=s.low_weight,
            ratio=s.ratio,
            prior=prior,
            seed=s.seed,
            source_shares=self.source_shares,
        )
        for _ in training:
            pass
        return network.state_dict()

    def _network(self, weights: dict[str, Tensor]) -> nn.Module:
        network = loading.build_network(self.settings)
        network.load_state_dict(weights)
        return network
