"""What one step of adaptation costs, by its parts, at the sizes of a preset.

    python benchmarks/experiments/step_cost.py                # the published ResNet-101: 40 minutes
    python benchmarks/experiments/step_cost.py --preset demo  # the small network: a minute

Images of the preset's sizes are made for it and read from files as data sets are. Each method has a
process of its own, so that its peak memory is its own, too. A step is taken apart at the logits:
the losses see detached logits, and their gradient continues into the network, which computes the
same as a step of `uda.adaptation` does.
"""

from __future__ import annotations

import multiprocessing
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

import baselines
import cases
from alternatives import ADVERSARIAL, Discriminator, class_entropies
from maxsquare import functional
from tables import table
from uda import adaptation, loading, report
from uda.adaptation import reads_both_heads
from uda.datasets import open_dataset
from uda.errors import UserError
from uda.presets import PRESETS, Settings

QUESTION = "What does one step of adaptation cost, and which part of it?"
PARTS = ("loading", "network", "losses", "discriminator", "optimiser")
PUBLISHED = "published losses"
METHODS = ("source", "maxsquare-iw-multi", PUBLISHED, ADVERSARIAL)
# The sizes of the images as the data sets publish them, width and height.
NATIVE = {"gta5": (1914, 1052), "cityscapes": (2048, 1024)}
IMAGES = 2


@dataclass(frozen=True)
class Options:
    """Measure seconds and memory of a step, by parts."""

    preset: str = "gta5-cityscapes/maxsquare-iw-multi"
    """A preset from GTA5 to Cityscapes, or demo."""
    steps: int = 3
    """Steps that are measured, after one that is not."""
    threads: int | None = None
    """CPU threads; default: as many as PyTorch takes."""
    out: Path = cases.RESULTS
    """Folder for the table."""

    def __post_init__(self) -> None:
        if self.preset != "demo" and not self.preset.startswith("gta5-cityscapes/"):
            raise UserError(f"--preset must be demo or of gta5-cityscapes, not {self.preset}.")
        if self.preset not in PRESETS:
            raise UserError(
                f"--preset {self.preset} is not known: see train_uda.py --list-presets."
            )
        if self.steps < 1 or (self.threads is not None and self.threads < 1):
            raise UserError("--steps and --threads must be positive.")


class Cost(NamedTuple):
    """Seconds of each part, medians over the steps, and the process's peak memory in MiB."""

    seconds: dict[str, float]
    peak: float


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(lambda: run(report.command_line(Options, arguments), Console()))


def run(options: Options, console: Console) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    threads = options.threads or torch.get_num_threads()
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        s = replace(PRESETS[options.preset].settings, data_root=Path(folder), workers=0)
        make_images(s)
        context = multiprocessing.get_context("spawn")
        for method in METHODS:
            with ProcessPoolExecutor(1, context) as pool:
                costs[method] = pool.submit(measure, s, method, options.steps, threads).result()
            console.print(f"{method}: {sum(costs[method].seconds.values()):.2f} s a step")
    text = markdown(options, costs, {**cases.environment("cpu"), "threads": threads})
    console.print(Markdown(text))
    path = options.out / f"step-cost-{options.preset.replace('/', '-')}.md"
    path.write_text(text, encoding="utf-8")
    console.print(f"Table: {path}", soft_wrap=True)


# Data


def make_images(s: Settings) -> None:
    """Images and labels in the folders of the data sets, as smooth as photographs."""
    rng = np.random.default_rng(0)
    images = s.data_root / s.source_folder / "images"
    labels = s.data_root / s.source_folder / "labels"
    city = s.data_root / s.target_folder / "leftImg8bit" / "train" / "town"
    for folder in (images, labels, city):
        folder.mkdir(parents=True)
    for number in range(IMAGES * s.batch_size):
        smooth(rng, native(s, "gta5")).save(images / f"{number:05}.png")
        ids = rng.integers(0, 34, (30, 40)).astype(np.uint8)
        size = native(s, "gta5")
        Image.fromarray(ids).resize(size, Image.Resampling.NEAREST).save(
            labels / f"{number:05}.png"
        )
        smooth(rng, native(s, "cityscapes")).save(city / f"town_{number:06}_000019_leftImg8bit.png")


def native(s: Settings, kind: str) -> tuple[int, int]:
    if s.preset == "demo":
        height, width = s.source_size if kind == "gta5" else s.target_size
        return width, height
    return NATIVE[kind]


def smooth(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    coarse = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


# Measuring


class Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start


def measure(s: Settings, method: str, steps: int, threads: int) -> Cost:
    """Take the steps of a method in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    source_folder, target_folder = s.data_root / s.source_folder, s.data_root / s.target_folder
    domains = (
        open_dataset("gta5", source_folder, "train", size=s.source_size),
        open_dataset("cityscapes", target_folder, "train", size=s.target_size, labels=False),
    )
    source, target = (
        loading.batches(domain, s, 0, steps + 1, stream=stream)
        for stream, domain in enumerate(domains)
    )
    network = loading.build_network(s).train()
    if s.channels_last:
        network.to(memory_format=torch.channels_last)
    optimizer = adaptation.RepeatedSGD(
        adaptation.parameter_groups(network, s.lr, backbone_updates=s.backbone_updates),
        momentum=s.momentum,
        weight_decay=s.weight_decay,
    )
    step = Step(network, s, method)
    found = []
    for _ in range(steps + 1):
        clock = Clock()
        with clock("loading"):
            (images, labels, _), (target_images, _, _) = next(source), next(target)
        optimizer.zero_grad()
        step(clock, images, labels, target_images)
        with clock("optimiser"):
            optimizer.step()
        found.append(clock.seconds)
    medians = {part: statistics.median(each[part] for each in found[1:]) for part in PARTS}
    return Cost(medians, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class Step:
    """The gradient of one step of a method, part by part."""

    def __init__(self, network: nn.Module, s: Settings, method: str) -> None:
        self.network, self.s, self.method = network, s, method
        losses = adaptation.methods(ratio=s.ratio, threshold=s.threshold, low_weight=s.low_weight)
        self.target_loss = losses.get("maxsquare-iw-multi" if method == PUBLISHED else method)
        if method == ADVERSARIAL:
            self.judge = Discriminator(s.classes)
            self.judge_optimizer = torch.optim.Adam(self.judge.parameters())

    def __call__(self, clock: Clock, images: Tensor, labels: Tensor, target: Tensor) -> None:
        reads_both = reads_both_heads(self.target_loss)
        source_logits = self.domain(
            clock, images, lambda *heads: self.source_loss(labels, heads, reads_both)
        )
        if self.method == "source":
            return
        if self.method != ADVERSARIAL:
            self.domain(clock, target, lambda *heads: self.adapted(target, heads, reads_both))
            return
        size, corners = target.shape[-2:], True
        logits = self.domain(
            clock,
            target,
            lambda final, _: self.judge.loss(class_entropies(final, size, corners), 0.0),
            part="discriminator",
        )
        with clock("discriminator"):
            self.judge_optimizer.zero_grad()
            for z, shape, domain in ((source_logits, labels.shape[-2:], 0.0), (logits, size, 1.0)):
                self.judge.loss(class_entropies(z, shape, corners), domain).backward()
            self.judge_optimizer.step()

    def domain(
        self, clock: Clock, images: Tensor, loss: Callable[..., Tensor], part: str = "losses"
    ) -> Tensor:
        """Add the gradient of a loss of both heads; returns the final head's logits."""
        with clock("network"):
            heads = self.network(images)
        leaves = [head.detach().requires_grad_() for head in heads]
        with clock(part):
            gradients = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
        used = [(head, g) for head, g in zip(heads, gradients, strict=True) if g is not None]
        with clock("network"):
            torch.autograd.backward(*zip(*used, strict=True))
        return leaves[0].detach()

    def source_loss(self, labels: Tensor, heads: Sequence[Tensor], reads_both: bool) -> Tensor:
        final, low = (self.cross_entropy(head, labels) for head in heads)
        return final + self.s.low_weight * low if reads_both else final

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        size = (*labels.shape[-2:],)
        if self.method == PUBLISHED:
            return F.cross_entropy(baselines.upsample(logits, size), labels, ignore_index=-1)
        return functional.cross_entropy(logits, labels, size=size, align_corners=True)

    def adapted(self, target: Tensor, heads: Sequence[Tensor], reads_both: bool) -> Tensor:
        size = (*target.shape[-2:],)
        heads = heads if reads_both else heads[:1]
        if self.method == PUBLISHED:
            return baselines.published_multi_level(*(baselines.upsample(z, size) for z in heads))
        assert self.target_loss is not None
        loss: Tensor = self.target_loss(*heads, size=size, align_corners=True)
        return loss


# Report


def markdown(options: Options, costs: dict[str, Cost], environment: dict[str, Any]) -> str:
    s = PRESETS[options.preset].settings
    command = ["python", "benchmarks/experiments/step_cost.py", "--preset", options.preset]
    (height, width), (rows, columns) = s.source_size, s.target_size
    sections = [
        f"# {QUESTION}",
        f"`{shlex.join(command)}`: {cases.name_of(environment)}.",
        f"{s.batch_size} source images of {width}x{height} and {s.batch_size} target images of "
        f"{columns}x{rows}, network {s.network}, float32. Seconds of a step, median of "
        f"{options.steps}; the peak memory of the process, which has read nothing else.",
        table(
            ("", *PARTS, "step", "steps an hour", "peak memory, MiB"),
            [
                (
                    method,
                    *(f"{cost.seconds[part]:.3f}" if cost.seconds[part] else "–" for part in PARTS),
                    f"**{sum(cost.seconds.values()):.2f}**",
                    f"{3600 / sum(cost.seconds.values()):,.0f}",
                    f"{cost.peak:,.0f}",
                )
                for method, cost in costs.items()
            ],
        ),
    ]
    if options.preset != "demo":
        source_steps = PRESETS["gta5-cityscapes/source"].settings.source_steps
        source, step = (sum(costs[m].seconds.values()) for m in ("source", "maxsquare-iw-multi"))
        days = (source_steps * source + s.steps * step) / 86400
        sections.append(
            f"At this pace the whole procedure, {source_steps:,} steps of source training and "
            f"{s.steps:,} of adaptation, takes {days:,.0f} days."
        )
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    sys.exit(main())
