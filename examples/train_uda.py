"""Train a segmentation network on labelled source images, then adapt it to unlabelled target ones.

    python examples/train_uda.py                              the demo: minutes on a CPU
    python examples/train_uda.py --method all                 every method from one source model
    python examples/train_uda.py --source-steps 4000          a source model of one's own
    python examples/train_uda.py --source folder --target folder --classes 11 --data-root DIR ...
    python examples/train_uda.py --preset gta5-cityscapes/maxsquare-iw --data-root DIR --init FILE
    python examples/train_uda.py --help                       every setting

The method itself is in uda/adaptation.py. The folder of a run receives

    settings.json            what was asked for
    source-only/last.pt      the source model
    target-statistics/       with --compare: that model with BatchNorm statistics of the target
    source/                  and trained on for as many steps on the source alone
    last.pt, best.pt         the adapted model (--method all: in a folder per method)
    metrics.json, panel.png  results per class, and some predictions as pictures
    events.out.*             TensorBoard logs

"best" is chosen on the labels of the target's validation images, as in the published runs. Who has
no target labels cannot choose so: the results called "adapted" are those after the last step.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import maxsquare
from uda import adaptation, checkpoint, deeplab, loading, outputs, report
from uda.datasets import Sample, SegmentationDataset
from uda.errors import UserError
from uda.evaluation import Scores, evaluate
from uda.presets import COMPARED, NOTES, PRESETS, SHIPPED, Settings
from uda.results import write_results

STOPPED = "Stopped: the same options with --out and --resume go on from here."
SOURCE_ONLY = "source-only"
CONTROL = "source"  # the method
STATISTICS = "target-statistics"
# The files of TensorBoard's log.
LOGS = "events.out.tfevents.*"
# How many target training images BatchNorm statistics are taken from.
STATISTICS_IMAGES = 60
# What a checkpoint of a stage holds, beside what it must have been written with.
SAVED = {
    "settings": dict,
    "step": int,
    "seconds": float,
    "confusion": torch.Tensor | None,
    "best": dict | None,
    "source_validation": list,
    "log": dict,
    "model": dict,
    "random": dict,
}
# Streams of random numbers for the order of images.
SOURCE_STREAM, TARGET_STREAM, STATISTICS_STREAM = range(3)
# Where several machines meet, and which of them this one is.
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# The list of presets is not squeezed into a narrower terminal: no line of it is longer.
PRESETS_WIDTH = 180


@dataclass(frozen=True)
class Job:
    """What the stages of a run share."""

    settings: Settings
    fabric: Fabric
    console: Console
    source: SegmentationDataset
    target: SegmentationDataset
    validation: SegmentationDataset

    @property
    def share(self) -> dict[str, int]:
        """Which part of every batch is this process's."""
        return {"rank": self.fabric.global_rank, "world": self.fabric.world_size}


def main(arguments: Sequence[str] | None = None) -> int:
    def script() -> None:
        console = report.PlainConsole()
        settings = parse(arguments)
        if settings.list_presets:
            console = report.PlainConsole(width=max(console.width, PRESETS_WIDTH))
            console.print(report.presets_table(PRESETS))
            console.print(*NOTES, sep="\n", highlight=False)
        elif settings.check_data:
            loading.check_data(settings, console)
        else:
            run(settings, console)

    return report.exit_code(script, stopped=STOPPED)


def parse(arguments: Sequence[str] | None) -> Settings:
    """Settings from the command line: those of the preset, overridden by the options given."""

    @dataclass(frozen=True)
    class Chosen:
        preset: str = Settings.preset

    chosen, _ = report.command_line(Chosen, arguments, return_unknown_args=True, add_help=False)
    if chosen.preset not in PRESETS:
        raise UserError(f"There is no --preset {chosen.preset}: --list-presets shows all of them.")
    settings = report.command_line(Settings, arguments, default=PRESETS[chosen.preset].settings)
    if (settings.source, settings.target) != ("gta5", "cityscapes"):  # not what scenes are
        settings = replace(settings, scenes=0)
    if settings.scenes and not settings.source_steps and not settings.init:
        settings = replace(settings, init=SHIPPED)
    return settings


def run(settings: Settings, console: Console) -> None:
    if not settings.source_steps and not settings.init:
        raise UserError(
            f"--preset {settings.preset} adapts a source model: give it as --init FILE, or train "
            "one first with --source-steps."
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    out = outputs.run_folder(settings)
    settings = replace(settings, out=out, data_root=settings.data_root or out / "data")
    # What can be wrong shows in every process, before they wait for each other and before a
    # folder is made in which the corrected command would find a run.
    data = None
    if settings.scenes:
        loading.check_scenes(settings)
    else:
        data = loading.open_data(settings)
    if settings.init and not resumes(settings, out / SOURCE_ONLY):
        loading.load_init(loading.build_network(settings), settings)
    fabric = start_fabric(settings)
    with outputs.claim(settings) if fabric.is_global_zero else contextlib.nullcontext():
        if fabric.is_global_zero:
            console.print(f"Writing to {out}")
            if settings.scenes:
                draw_scenes(settings, console)
        else:
            console.quiet = True
        fabric.barrier()
        data = data or loading.open_data(settings)
        run_stages(Job(settings, fabric, console, *data))
    if fabric.world_size > 1:
        # A process that exits with its connections open may abort.
        torch.distributed.destroy_process_group()


def draw_scenes(settings: Settings, console: Console) -> None:
    with report.progress_bar(console) as progress:
        task = progress.add_task("rendering scenes", total=None, note="")
        loading.render_scenes(
            settings, lambda done, of: progress.update(task, completed=done, total=of)
        )


def run_stages(job: Job) -> None:
    """Everything from the source model, or its training, to the results."""
    settings, fabric, console, out = job.settings, job.fabric, job.console, job.settings.out
    if warning := loading.list_warning(settings, len(job.source)):
        console.print(warning)

    source_only = train(job, SOURCE_ONLY, out / SOURCE_ONLY, settings.source_steps)
    start = source_only["model"]
    statistics = None
    if settings.compare:
        statistics = take_statistics(job, out / STATISTICS, start)
    if settings.method == "all":
        folders = {method: out / method for method in COMPARED}
    else:
        folders = {settings.method: out}
    if settings.compare:
        folders = {CONTROL: out / CONTROL} | folders
    adapted = {
        method: train(job, method, folder, settings.steps, start=start)
        for method, folder in folders.items()
    }
    if fabric.is_global_zero:
        write_results(source_only, statistics, adapted, job.validation, settings, console)


def start_fabric(settings: Settings) -> Fabric:
    device = loading.choose_device(settings.device, settings.processes)
    launched = SLURMEnvironment.detect() or TorchElasticEnvironment.detect()
    unset = [name for name in MEETING_POINT if name not in os.environ]
    if settings.machines > 1 and unset and not launched:
        raise UserError(
            f"--machines {settings.machines} needs {', '.join(unset)} in the environment, else "
            "the machines wait for each other forever: set what --help says."
        )
    together = settings.processes * settings.machines > 1
    fabric = Fabric(
        accelerator=device,
        devices=settings.processes,
        num_nodes=settings.machines,
        # The heads that a method leaves alone receive no gradient.
        strategy="ddp_find_unused_parameters_true" if together else "auto",
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric


def resumes(settings: Settings, folder: Path) -> bool:
    """Whether a stage goes on from its own last checkpoint."""
    return settings.resume and (folder / "last.pt").is_file()


def train(
    job: Job, name: str, folder: Path, steps: int, *, start: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One stage, the source stage or the adaptation by one method; returns its last state."""
    s, fabric = job.settings, job.fabric
    on_source = name == SOURCE_ONLY
    lr, horizon = (s.source_lr, s.source_horizon) if on_source else (s.lr, s.horizon)
    horizon = horizon or steps
    methods = adaptation.methods(ratio=s.ratio, threshold=s.threshold, low_weight=s.low_weight)
    target_loss = None if on_source else methods[name]
    both_heads = on_source or isinstance(target_loss, maxsquare.MultiLevelLoss)
    options = {"low_weight": s.low_weight if both_heads else 0.0, "backward": fabric.backward}
    folder.mkdir(parents=True, exist_ok=True)

    fabric.seed_everything(s.seed, verbose=False)
    network = loading.build_network(s)
    optimizer = adaptation.RepeatedSGD(
        adaptation.parameter_groups(network, lr, backbone_updates=s.backbone_updates),
        momentum=s.momentum,
        weight_decay=s.weight_decay,
    )
    state = begin(job, name, folder, network, start)
    if s.channels_last:
        network.to(memory_format=torch.channels_last)
    model, stepper = fabric.setup(torch.compile(network) if s.compile else network, optimizer)
    if "optimizer" in state:  # momentum goes where the weights are, so only now
        with checkpoint.restoring(folder / "last.pt"):
            optimizer.load_state_dict(state["optimizer"])
    model.train()

    with report.progress_bar(job.console) as progress:
        stage = Stage(job, folder, network, optimizer, state, progress)
        bar = progress.add_task(name, total=steps, completed=state["step"], note="")
        for source, target in batch_pairs(job, state["step"], steps, on_source, target_loss):
            rate = adaptation.poly_lr(state["step"], horizon, lr)
            adaptation.set_learning_rate(optimizer, rate)
            images, labels = fabric.to_device((source.image, source.labels))
            if target is None:
                losses = adaptation.source_step(model, stepper, images, labels, **options)
            else:
                losses = adaptation.adaptation_step(
                    model,
                    stepper,
                    images,
                    labels,
                    fabric.to_device(target.image),
                    target_loss,
                    target_weight=s.target_weight,
                    **options,
                )
            state["step"] += 1
            step, last = state["step"], state["step"] == steps
            progress.advance(bar)
            assesses = last or (not on_source and step % s.evaluate_every == 0)
            saves = assesses or step % s.save_every == 0
            if saves or step % s.log_every == 0:
                values = {term: value.item() for term, value in losses._asdict().items()}
                if not all(map(math.isfinite, values.values())):
                    rate_option = "--source-lr" if on_source else "--lr"
                    raise UserError(f"Losses at step {step} are {values}: lower {rate_option}.")
                progress.update(bar, note=report.losses(values))
                logged = values | {"lr": rate}
                stage.log({f"train/{term}": value for term, value in logged.items()})
            if on_source and s.source_evaluate_every:
                if last or step % s.source_evaluate_every == 0:
                    stage.assess_at_home()
            if last and target_loss is not None and s.bn_statistics == "target":
                stage.take_statistics()
            if assesses:
                stage.assess()
            if saves:
                stage.save("last.pt")
        if state["confusion"] is None:  # a stage of no steps: the weights it was given
            stage.assess()
            stage.save("last.pt")
    stage.close()
    return state


def take_statistics(job: Job, folder: Path, start: dict[str, Any]) -> dict[str, Any]:
    """The source model with BatchNorm statistics of target training images; returns its state."""
    s, fabric = job.settings, job.fabric
    folder.mkdir(parents=True, exist_ok=True)
    fabric.seed_everything(s.seed, verbose=False)
    network = loading.build_network(s)
    state = begin(job, STATISTICS, folder, network, start)
    network.to(fabric.device)
    with report.progress_bar(job.console) as progress:
        stage = Stage(job, folder, network, None, state, progress)
        if state["confusion"] is None:
            stage.take_statistics()
            stage.assess()
            stage.save("last.pt")
    stage.close()
    return state


def begin(
    job: Job,
    name: str,
    folder: Path,
    network: deeplab.DeepLabV2,
    start: dict[str, Any] | None,
) -> dict[str, Any]:
    """Give the network of a stage its weights; returns the state from which the stage goes on.

    Weights come from the stage's own last checkpoint when a run is resumed, else from `start` (the
    source model), else from --init, else they are random.
    """
    s = job.settings
    # With weights, momentum and random generators, which `Stage.save` adds, all there is to a run
    # between two steps.
    state: dict[str, Any] = {
        "stage": name,
        "network": s.network,
        "classes": s.classes,
        # Other numbers of images would come in another order.
        "training_images": {"source": len(job.source), "target": len(job.target)},
        "settings": outputs.as_json(s),
        "step": 0,
        "seconds": 0.0,
        "confusion": None,
        "best": None,
        "source_validation": [],
        "log": {},  # the size of each of its files
    }
    if resumes(s, folder):
        same = ("stage", "network", "classes", "training_images")
        expect = {entry: state[entry] for entry in same}
        needs = SAVED if name == STATISTICS else SAVED | {"optimizer": dict}
        state = checkpoint.load(folder / "last.pt", expect=expect, needs=needs)
        with checkpoint.restoring(folder / "last.pt"):
            network.load_state_dict(state["model"])
            checkpoint.restore_random_state(state["random"])
    elif start is not None:
        network.load_state_dict(start)
    elif s.init is not None:
        loading.load_init(network, s)
    return state


def batch_pairs(
    job: Job, first: int, steps: int, on_source: bool, target_loss: nn.Module | None
) -> Iterator[tuple[Sample, Sample | None]]:
    """The source and target batches of the steps that are left; None where no target is read."""
    s = job.settings
    # The adaptation reads on in the source where the source stage stopped.
    offset = 0 if on_source else s.source_steps
    source = loading.batches(
        job.source, s, offset + first, offset + steps, stream=SOURCE_STREAM, **job.share
    )
    target: Iterable[Sample | None] = [None] * (steps - first)
    if target_loss is not None:
        target = loading.batches(job.target, s, first, steps, stream=TARGET_STREAM, **job.share)
    return zip(source, target, strict=True)


class Stage:
    """What a stage under way writes: checkpoints of its state, evaluations and the log."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        network: deeplab.DeepLabV2,
        optimizer: torch.optim.Optimizer | None,
        state: dict[str, Any],
        progress: Progress,
    ) -> None:
        self.job, self.folder, self.progress = job, folder, progress
        self.network, self.optimizer, self.state = network, optimizer, state
        self.started = time.perf_counter() - state["seconds"]
        self.writer = None
        if job.fabric.is_global_zero:
            # What a killed run logged after its last checkpoint will be logged again.
            for file in folder.glob(LOGS):
                os.truncate(file, state["log"].get(file.name, 0))
            self.writer = SummaryWriter(str(folder))

    def save(self, name: str) -> None:
        self.state["seconds"] = time.perf_counter() - self.started
        self.state["model"] = self.network.state_dict()
        if self.optimizer is not None:
            self.state["optimizer"] = self.optimizer.state_dict()
        self.state["random"] = checkpoint.random_state()
        if self.writer:
            self.writer.flush()
            logs = self.folder.glob(LOGS)
            self.state["log"] = {file.name: file.stat().st_size for file in logs}
            checkpoint.save(self.folder / name, self.state)

    def take_statistics(self) -> None:
        """Take BatchNorm's running statistics from target training images."""
        job, s, progress = self.job, self.job.settings, self.progress
        count = math.ceil(min(STATISTICS_IMAGES, len(job.target)) / s.batch_size)
        # Every process reads all images, because statistics are not exchanged.
        batches = loading.batches(job.target, s, 0, count, stream=STATISTICS_STREAM)
        images = (job.fabric.to_device(batch.image) for batch in batches)
        task = progress.add_task("target statistics", total=count, note="")
        adaptation.target_statistics(self.network, progress.track(images, task_id=task))

    def assess(self) -> None:
        """Score the network on the validation images, and keep the best one so far."""
        state, scores = self.state, self._score(self.job.validation)
        state["confusion"] = scores.confusion
        self.log({"validation/miou": scores.miou})
        if state["best"] is None or scores.miou > state["best"]["miou"]:
            state["best"] = {"step": state["step"], **report.entry(scores)}
            self.save("best.pt")

    def assess_at_home(self) -> None:
        """Score the network on the source's validation images, whose labels everyone has."""
        state, scores = self.state, self._score(loading.open_source_validation(self.job.settings))
        state["source_validation"].append({"step": state["step"], **report.entry(scores)})
        self.log({"validation/source_miou": scores.miou})

    def _score(self, dataset: SegmentationDataset) -> Scores:
        job, progress = self.job, self.progress
        loader = loading.validation_loader(dataset, job.settings, **job.share)
        task = progress.add_task("evaluation", total=len(loader.dataset), note="")
        with job.fabric.autocast():
            scores = evaluate(
                self.network,
                loader,
                dataset.space,
                device=job.fabric.device,
                on_progress=lambda images: progress.advance(task, images),
            )
        progress.remove_task(task)
        return scores

    def log(self, values: Mapping[str, float]) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.state["step"])

    def close(self) -> None:
        if self.writer:
            self.writer.close()


if __name__ == "__main__":
    report.end_on_signals(STOPPED)
    sys.exit(main())
