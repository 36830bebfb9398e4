"""The street scenes that this project draws, as a task for the ablation.

Source, target, network, optimiser and learning rate are those of the demo (examples/train_uda.py):
streets with the same kinds of objects in two styles. The adaptation is shorter and uses bfloat16,
which takes a third less time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Subset

from maxsquare import Statistics
from uda import adaptation, deeplab, loading
from uda.datasets import Progress
from uda.evaluation import evaluate, predict, watch
from uda.presets import DEMO_CHECKPOINT, PRESETS, Settings

SETTINGS = replace(PRESETS["demo"].settings, steps=150, device="cpu", workers=0)

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
            f"{s.weight_decay:g}, poly decay, bfloat16",
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
    ) -> dict[str, Tensor]:
        s = replace(self.settings, seed=seed, method=method, target_weight=(weight,))
        return _adapt(self._network(source), s, prior)

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

    def _network(self, weights: dict[str, Tensor]) -> nn.Module:
        network = loading.build_network(self.settings)
        network.load_state_dict(weights)
        return network


def _adapt(network: nn.Module, s: Settings, prior: Tensor | None) -> dict[str, Tensor]:
    """The adaptation of train_uda.py in bfloat16, without checkpoints or evaluations."""
    losses = adaptation.methods(
        ratio=s.ratio, threshold=s.threshold, low_weight=s.low_weight, prior=prior
    )
    source, target, _ = loading.open_data(s)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    network.to(memory_format=torch.channels_last)  # faster on a CPU
    model, fabric_optimizer = fabric.setup(
        network,
        adaptation.RepeatedSGD(
            adaptation.parameter_groups(network, s.lr, backbone_updates=s.backbone_updates),
            momentum=s.momentum,
            weight_decay=s.weight_decay,
        ),
    )
    model.train()
    training = adaptation.adapt(
        model,
        fabric_optimizer,
        loading.batches(source, s, 0, s.steps, stream=SOURCE_STREAM),
        loading.batches(target, s, 0, s.steps, stream=TARGET_STREAM),
        adaptation.learning_rates(s.lr, range(s.steps), s.steps),
        losses[s.method],
        target_weight=s.target_weight[0],
        low_weight=s.low_weight,
        backward=fabric.backward,
    )
    for _ in training:
        pass
    return network.state_dict()
