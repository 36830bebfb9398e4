"""Train a segmentation network on labelled source images, then adapt it to unlabelled target ones.

    python examples/train_uda.py                              the demo: minutes on a CPU
    python examples/train_uda.py --method all                 every method from one source model
    python examples/train_uda.py --target-weight 1 2 4 8      the weight, chosen without labels
    python examples/train_uda.py --source-steps 4000          a source model of your own
    python examples/train_uda.py --source folder --target folder --classes 11 --data-root DIR ...
    python examples/train_uda.py --preset gta5-cityscapes/maxsquare-iw --data-root DIR --init FILE
    python examples/train_uda.py --help                       every setting

The method itself is in uda/adaptation.py. A run writes into its folder

    settings.json            the settings of the run
    source-only/last.pt      the source model
    target-statistics/       with --compare: that model with BatchNorm statistics of the target
    source/                  and the same model after as many further steps on the source alone
    last.pt, best.pt         the adapted model (of several methods or weights: in a folder each)
    metrics.json, panel.png  results per class, and some predictions as pictures
    events.out.*             TensorBoard logs

The results called "adapted" are those of the last step; of several --target-weight they are those
of the weight with the highest information on unlabelled target images. "best" is the evaluation of
the highest information, or with --select labels that of the highest mIoU on the target's validation
images, as in the published runs. A target without labels is adapted to and chosen for all the same.
For methods called -information, and image-wise ones with a --ratio from 0.5 on, steadiness takes
the place of information (uda/evaluation.py).
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
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from rich.console import Console
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from maxsquare import TeacherLoss
from uda import adaptation, checkpoint, loading, outputs, report
from uda.adaptation import Losses
from uda.datasets import Sample, SegmentationDataset
from uda.errors import UserError
from uda.evaluation import SMALLEST_SHARE, Scores, evaluate, watch
from uda.presets import COMPARED, DEMO_CHECKPOINT, NOTES, PRESETS, Settings
from uda.results import write_results

STOPPED = "Stopped: the same options with --out and --resume go on from here."
SOURCE_ONLY = "source-only"
CONTROL = "source"  # the method
STATISTICS = "target-statistics"
# The files of TensorBoard's log.
LOGS = "events.out.tfevents.*"
# Number of target training images from which BatchNorm statistics are taken.
STATISTICS_IMAGES = 60
# Random streams for the order of images.
SOURCE_STREAM, TARGET_STREAM, STATISTICS_STREAM = range(3)
# The variables that tell several machines where to meet, and each one its number.
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# No line of the list of presets is longer; a narrower terminal must not squeeze it.
PRESETS_WIDTH = 180

State = dict[str, Any]  # what a checkpoint of a stage holds


@dataclass(frozen=True)
class Job:
    """What the stages of a run share."""

    settings: Settings
    fabric: Fabric
    console: Console
    source: SegmentationDataset
    target: SegmentationDataset
    validation: SegmentationDataset | None

    @property
    def share(self) -> dict[str, int]:
        """Which part of every batch belongs to this process."""
        return {"rank": self.fabric.global_rank, "world": self.fabric.world_size}

    def source_batches(self, steps: range) -> Iterator[Sample]:
        return self._batches(self.source, steps, SOURCE_STREAM)

    def target_batches(self, steps: range) -> Iterator[Sample]:
        return self._batches(self.target, steps, TARGET_STREAM)

    def _batches(self, dataset: SegmentationDataset, steps: range, stream: int) -> Iterator[Sample]:
        first, last = steps.start, steps.stop
        batches = loading.batches(dataset, self.settings, first, last, stream=stream, **self.share)
        return map(self.fabric.to_device, batches)


def main(arguments: Sequence[str] | None = None) -> int:
    def script() -> None:
        console = report.console()
        settings = parse(arguments)
        if settings.list_presets:
            console = report.console(width=max(console.width, PRESETS_WIDTH))
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
        backbone_updates: str = ""

    chosen, _ = report.command_line(Chosen, arguments, return_unknown_args=True, add_help=False)
    if chosen.preset not in PRESETS:
        raise UserError(f"There is no --preset {chosen.preset}: --list-presets shows all of them.")
    if chosen.backbone_updates == "published":
        raise UserError("--backbone-updates published has a new name: write duplicated instead.")
    settings = report.command_line(Settings, arguments, default=PRESETS[chosen.preset].settings)
    if (settings.source, settings.target) != ("gta5", "cityscapes"):  # the layouts of the scenes
        settings = replace(settings, scenes=0)
    if settings.scenes and not settings.source_steps and not settings.init:
        settings = replace(settings, init=DEMO_CHECKPOINT)
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
    # Every process finds the mistakes in the options before it waits for the others, and before
    # there is a folder that the corrected command would take for another run.
    data = None
    if settings.scenes:
        loading.check_scenes(settings)
    else:
        data = loading.open_data(settings)
    loading.check_network(settings)
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
        # A process that exits with open connections may abort.
        torch.distributed.destroy_process_group()


def draw_scenes(settings: Settings, console: Console) -> None:
    with report.progress_bar(console) as progress:
        task = progress.add_task("rendering scenes", total=None, note="")
        loading.render_scenes(
            settings, lambda done, of: progress.update(task, completed=done, total=of)
        )


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
        # Heads that a method does not train receive no gradient.
        strategy="ddp_find_unused_parameters_true" if together else "auto",
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric


def run_stages(job: Job) -> None:
    """The source model, what it is compared with, its adaptation, and the results of all."""
    s, out = job.settings, job.settings.out
    if warning := loading.list_warning(s, len(job.source)):
        job.console.print(warning)

    source_only = train_source(job, out / SOURCE_ONLY)
    statistics = before = None
    if s.compare or s.prior == "predicted" or s.criterion == "steadiness":
        statistics = take_statistics(job, out / STATISTICS, source_only)
        before = statistics["watched"]["proportions"]
    adapted = {
        name: adapt(job, name, chosen, source_only, before)
        for name, chosen in adaptations(s).items()
    }
    if job.fabric.is_global_zero:
        write_results(
            source_only, statistics, adapted, job.source.space, job.validation, s, job.console
        )


class Adaptation(NamedTuple):
    """An adaptation of the source model, and the folder that it writes to."""

    method: str
    weight: float
    folder: Path


def adaptations(s: Settings) -> dict[str, Adaptation]:
    """Every adaptation of a run, by its name in the results."""
    weight, out = s.target_weight[0], s.out
    if s.method == "all":
        found = {method: Adaptation(method, weight, out / method) for method in COMPARED}
    elif len(s.target_weight) > 1:
        names = {f"weight-{weight:g}": weight for weight in s.target_weight}
        found = {name: Adaptation(s.method, weight, out / name) for name, weight in names.items()}
    else:
        found = {s.method: Adaptation(s.method, weight, out)}
    if s.compare:
        found = {CONTROL: Adaptation(CONTROL, weight, out / CONTROL)} | found
    return found


def train_source(job: Job, folder: Path) -> State:
    """The source stage; returns its last state."""
    s = job.settings
    with Stage(job, SOURCE_ONLY, folder) as stage:
        model, fabric_optimizer = stage.prepare(s.source_lr, s.source_steps)
        steps = range(stage.state["step"], s.source_steps)
        training = adaptation.train_source(
            model,
            fabric_optimizer,
            job.source_batches(steps),
            adaptation.learning_rates(s.source_lr, steps, s.source_horizon or s.source_steps),
            low_weight=s.low_weight,
            align_corners=s.corners,
            backward=job.fabric.backward,
        )
        for step, losses in stage.count(training):
            last = step == s.source_steps
            saves = last or step % s.save_every == 0
            if saves or step % s.log_every == 0:
                stage.log_losses(losses)
            if s.source_evaluate_every and (last or step % s.source_evaluate_every == 0):
                stage.evaluate_source()
            if last:
                stage.evaluate()
            if saves:
                stage.save("last.pt")
        return stage.finish()


def adapt(
    job: Job, name: str, chosen: Adaptation, source: State, before: Sequence[float] | None
) -> State:
    """One adaptation of the source model by one method at one weight; returns its last state.

    before: class proportions predicted by the source model with BatchNorm statistics of the target.
    """
    s, prior = job.settings, None
    if s.prior == "predicted":
        prior = torch.tensor(before).clamp_min(SMALLEST_SHARE)
        prior /= prior.sum()
    methods = adaptation.methods(
        ratio=s.ratio, threshold=s.threshold, low_weight=s.low_weight, prior=prior
    )
    target_loss = methods[chosen.method]
    if target_loss is not None:
        target_loss.to(job.fabric.device)  # its prior is a buffer
    with Stage(job, name, chosen.folder, source, before) as stage:
        model, fabric_optimizer = stage.prepare(s.lr, s.steps)
        teacher = stage.make_teacher() if isinstance(target_loss, TeacherLoss) else None
        steps = range(stage.state["step"], s.steps)
        # The source images continue where the source stage stopped.
        source_steps = range(s.source_steps + steps.start, s.source_steps + steps.stop)
        training = adaptation.adapt(
            model,
            fabric_optimizer,
            job.source_batches(source_steps),
            job.target_batches(steps),
            adaptation.learning_rates(s.lr, steps, s.horizon or s.steps),
            target_loss,
            target_weight=chosen.weight,
            low_weight=s.low_weight,
            teacher=teacher,
            align_corners=s.corners,
            backward=job.fabric.backward,
        )
        for step, losses in stage.count(training):
            last = step == s.steps
            evaluates = last or step % s.evaluate_every == 0
            saves = evaluates or step % s.save_every == 0
            if saves or step % s.log_every == 0:
                stage.log_losses(losses)
            if last and target_loss is not None and s.bn_statistics == "target":
                stage.take_statistics()
            if evaluates:
                stage.evaluate()
            if saves:
                stage.save("last.pt")
        return stage.finish()


def take_statistics(job: Job, folder: Path, source: State) -> State:
    """The source model with BatchNorm statistics of target training images; returns its state."""
    with Stage(job, STATISTICS, folder, source) as stage:
        if stage.state["watched"] is None:
            stage.take_statistics()
        return stage.finish()


def resumes(settings: Settings, folder: Path) -> bool:
    """Whether a stage continues from its own last checkpoint."""
    return settings.resume and (folder / "last.pt").is_file()


class Stage:
    """A stage of a run: its network and optimiser, and the files that it writes.

    `state` becomes the checkpoint. Together with the weights, momentum and random generators, which
    `save` adds, it is everything that a run is between two steps.
    """

    def __init__(
        self,
        job: Job,
        name: str,
        folder: Path,
        source: State | None = None,
        before: Sequence[float] | None = None,
    ) -> None:
        """Build the network and give it its weights.

        A resumed stage takes them from its own last checkpoint; otherwise they are those of the
        source model, else of --init, else random.
        """
        s = job.settings
        self.job, self.name, self.folder, self.source = job, name, folder, source
        self.before = before if s.criterion == "steadiness" else None
        self.progress = report.progress_bar(job.console)
        self.optimizer: torch.optim.Optimizer | None = None
        self.teacher: AveragedModel | None = None
        self.warned = False
        folder.mkdir(parents=True, exist_ok=True)
        job.fabric.seed_everything(s.seed, verbose=False)
        self.network = loading.build_network(s)
        self.state: State = {
            "stage": name,
            "network": s.network,
            "classes": s.classes,
            # Another number of images would be read in another order.
            "training_images": {"source": len(job.source), "target": len(job.target)},
            "settings": outputs.as_json(s),
            "step": 0,
            "seconds": 0.0,
            "confusion": None,
            "watched": None,
            "best": None,
            "source_validation": [],
            "log": {},  # the size of each of its files
        }
        if resumes(s, folder):
            self._resume()
        elif source is not None:
            self.network.load_state_dict(source["model"])
        elif s.init is not None:
            loading.load_init(self.network, s)
        self.network.to(job.fabric.device)
        self.started = time.perf_counter() - self.state["seconds"]
        self.writer = None
        if job.fabric.is_global_zero:
            # The steps that a killed run logged after its last checkpoint will be logged again.
            for file in folder.glob(LOGS):
                os.truncate(file, self.state["log"].get(file.name, 0))
            self.writer = SummaryWriter(str(folder))

    def _resume(self) -> None:
        path = self.folder / "last.pt"
        same = ("stage", "network", "classes", "training_images")
        trained = () if self.name == STATISTICS else ("optimizer",)
        self.state = checkpoint.load(
            path,
            expect={entry: self.state[entry] for entry in same},
            needs=(*self.state, "model", "random", *trained),
        )
        with checkpoint.restoring(path):
            self.network.load_state_dict(self.state["model"])
            checkpoint.restore_random_state(self.state["random"])

    def __enter__(self) -> Stage:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.stop()
        if self.writer and kind is None:  # a disk that is full has already raised
            self.writer.close()

    def prepare(self, lr: float, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimiser as Fabric runs them, and a progress bar of so many steps."""
        s, network = self.job.settings, self.network
        if s.channels_last:
            network.to(memory_format=torch.channels_last)
        self.optimizer = adaptation.RepeatedSGD(
            adaptation.parameter_groups(network, lr, backbone_updates=s.backbone_updates),
            momentum=s.momentum,
            weight_decay=s.weight_decay,
        )
        if "optimizer" in self.state:
            with checkpoint.restoring(self.folder / "last.pt"):
                self.optimizer.load_state_dict(self.state["optimizer"])
        model, fabric_optimizer = self.job.fabric.setup(
            torch.compile(network) if s.compile else network, self.optimizer
        )
        model.train()
        done = self.state["step"]
        self.bar = self.progress.add_task(self.name, total=steps, completed=done, note="")
        return model, fabric_optimizer

    def make_teacher(self) -> AveragedModel:
        """The moving average of the network, after `prepare`."""
        self.teacher = adaptation.make_teacher(self.network)
        if "optimizer" in self.state:
            with checkpoint.restoring(self.folder / "last.pt"):
                self.teacher.load_state_dict(self.state["teacher"])
        return self.teacher

    def count(self, training: Iterable[Losses]) -> Iterator[tuple[int, Losses]]:
        """Number the steps of a training loop, and show them."""
        for losses in training:
            self.state["step"] += 1
            self.progress.advance(self.bar)
            yield self.state["step"], losses

    def log_losses(self, losses: Losses) -> None:
        """Log the losses and the learning rate; stop if the run diverges."""
        values = {term: value.item() for term, value in losses._asdict().items()}
        if not all(map(math.isfinite, values.values())):
            option = "--source-lr" if self.name == SOURCE_ONLY else "--lr"
            raise UserError(f"Losses at step {self.state['step']} are {values}: lower {option}.")
        self.progress.update(self.bar, note=report.losses(values))
        rate = self.optimizer.param_groups[0]["lr"]
        self.log({f"train/{term}": value for term, value in (values | {"lr": rate}).items()})

    def take_statistics(self) -> None:
        """Take BatchNorm's running statistics from target training images."""
        job, s, progress = self.job, self.job.settings, self.progress
        count = math.ceil(min(STATISTICS_IMAGES, len(job.target)) / s.batch_size)
        # Every process reads all images, because statistics are not exchanged.
        batches = loading.batches(job.target, s, 0, count, stream=STATISTICS_STREAM)
        images = (job.fabric.to_device(batch.image) for batch in batches)
        task = progress.add_task("target statistics", total=count, note="")
        adaptation.target_statistics(self.network, progress.track(images, task_id=task))

    def evaluate(self) -> None:
        """Watch the network's predictions, score them if there are labels, and keep the best."""
        state, validation = self.state, self.job.validation
        state["watched"] = watched = self._watch()
        self.log({f"target/{name}": watched[name] for name in report.WATCHED if name in watched})
        found = {"step": state["step"], **watched}
        if validation is not None:
            scores = self._score(validation)
            state["confusion"] = scores.confusion
            self.log({"validation/miou": scores.miou})
            found |= report.entry(scores)
        s = self.job.settings
        criterion = "miou" if s.select == "labels" else s.criterion
        if self.before is None and criterion == "steadiness":  # the source model itself
            criterion = "information"
        if state["best"] is None or found[criterion] > state["best"][criterion]:
            state["best"] = found
            self.save("best.pt")

    def _watch(self) -> dict[str, Any]:
        """Statistics of the predictions on target training images; warns of a collapse."""
        job, progress = self.job, self.progress
        # Every process reads all images, because statistics are not exchanged.
        loader = loading.validation_loader(loading.open_watched(job.settings), job.settings)
        task = progress.add_task("predictions", total=len(loader.dataset), note="")
        with job.fabric.autocast():
            statistics = watch(
                self.network,
                loader,
                align_corners=job.settings.corners,
                device=job.fabric.device,
                on_progress=lambda images: progress.advance(task, images),
            )
        progress.remove_task(task)
        watched = report.watched(statistics, self.before)
        before = self.source["watched"]["classes"] if self.source else 0
        if 2 * watched["classes"] < before and not self.warned:
            self.warned = True
            job.console.print(
                f"warning: {self.name} predicts {watched['classes']} classes on target images, the "
                f"source model {before}: some classes swallow the others. Lower --target-weight, "
                "or choose a --method with -information."
            )
        return watched

    def evaluate_source(self) -> None:
        """Score the network on the source's own validation images, whose labels are at hand."""
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
                align_corners=job.settings.corners,
                device=job.fabric.device,
                on_progress=lambda images: progress.advance(task, images),
            )
        progress.remove_task(task)
        return scores

    def finish(self) -> State:
        """Evaluate a stage of no steps, too; returns the state."""
        if self.state["watched"] is None:
            self.evaluate()
            self.save("last.pt")
        return self.state

    def save(self, name: str) -> None:
        self.state["seconds"] = time.perf_counter() - self.started
        self.state["model"] = self.network.state_dict()
        if self.optimizer is not None:
            self.state["optimizer"] = self.optimizer.state_dict()
        if self.teacher is not None:
            self.state["teacher"] = self.teacher.state_dict()
        self.state["random"] = checkpoint.random_state()
        if self.writer:
            self.writer.flush()
            logs = self.folder.glob(LOGS)
            self.state["log"] = {file.name: file.stat().st_size for file in logs}
            checkpoint.save(self.folder / name, self.state)

    def log(self, values: Mapping[str, float]) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.state["step"])


if __name__ == "__main__":
    report.end_on_signals(STOPPED)
    sys.exit(main())
