"""Train a segmentation network on labelled source images, then adapt it to unlabelled target ones.

    python examples/train_uda.py                              the demo: minutes on a CPU
    python examples/train_uda.py --method all                 every method from one source model
    python examples/train_uda.py --preset gta5-cityscapes/maxsquare-iw --data-root DIR --init FILE
    python examples/train_uda.py --help                       every setting

The method itself is in uda/adaptation.py. The folder of a run receives

    settings.json            what was asked for
    source-only/last.pt      the source model
    last.pt, best.pt         the adapted model (--method all: in a folder per method)
    metrics.json, panel.png  results per class, and some predictions as pictures
    events.out.*             TensorBoard logs

"best" is chosen on the labels of the target's validation images, as in the published runs. Who has
no target labels cannot choose so: the results called "adapted" are those after the last step.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from lightning_fabric import Fabric
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

import maxsquare
from uda import adaptation, checkpoint, deeplab, loading, outputs, report
from uda.datasets import SegmentationDataset
from uda.errors import UserError
from uda.evaluation import evaluate
from uda.presets import COMPARED, PRESETS, Settings
from uda.results import write_results

SOURCE_ONLY = "source-only"
# The list of presets is not squeezed into a narrower terminal.
PRESETS_WIDTH = 150


@dataclass(frozen=True)
class Job:
    """What the stages of a run share."""

    settings: Settings
    fabric: Fabric
    console: Console
    source: SegmentationDataset
    target: SegmentationDataset
    validation: SegmentationDataset


def main(arguments: Sequence[str] | None = None) -> int:
    console = Console()
    try:
        settings = parse(arguments)
        if settings.list_presets:
            console = Console(width=max(console.width, PRESETS_WIDTH))
            console.print(report.presets_table(PRESETS))
        elif settings.check_data:
            loading.check_data(settings, console)
        else:
            run(settings, console)
    except (UserError, OSError) as error:
        print(f"error: {report.sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped: the same options with --out and --resume go on from here.", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> Settings:
    """Settings from the command line: those of the preset, overridden by the options given."""

    @dataclass(frozen=True)
    class Chosen:
        preset: str = Settings.preset

    chosen, _ = tyro.cli(Chosen, args=arguments, return_unknown_args=True, add_help=False)
    if chosen.preset not in PRESETS:
        raise UserError(f"There is no --preset {chosen.preset}: --list-presets shows all of them.")
    return report.command_line(Settings, arguments, default=PRESETS[chosen.preset].settings)


def run(settings: Settings, console: Console) -> None:
    if not settings.source_steps and not settings.init:
        raise UserError(
            f"--preset {settings.preset} adapts a source model: give it as --init FILE, or train "
            "one first with --source-steps."
        )
    out = outputs.run_folder(settings)
    fabric = start_fabric(settings)
    settings = replace(settings, out=out, data_root=settings.data_root or out / "data")
    if fabric.is_global_zero:
        out.mkdir(parents=True, exist_ok=True)
        outputs.write_json(out / "settings.json", outputs.as_json(settings))
        console.print(f"Writing to {out}")
        if settings.scenes:
            with report.progress_bar(console) as progress:
                task = progress.add_task("rendering scenes", total=None, note="")
                loading.render_scenes(
                    settings,
                    lambda done, of: progress.update(task, completed=done, total=of),
                )
    else:
        console.quiet = True
    fabric.barrier()
    job = Job(settings, fabric, console, *loading.open_data(settings))

    source_only = train(job, SOURCE_ONLY, out / SOURCE_ONLY, settings.source_steps)
    if settings.method == "all":
        folders = {method: out / method for method in COMPARED}
    else:
        folders = {settings.method: out}
    adapted = {
        method: train(job, method, folder, settings.steps, start=source_only["model"])
        for method, folder in folders.items()
    }
    if fabric.is_global_zero:
        write_results(source_only, adapted, job.validation, settings, console)
    if fabric.world_size > 1:
        # A process that exits with its connections open may abort.
        torch.distributed.destroy_process_group()


def start_fabric(settings: Settings) -> Fabric:
    gpus = torch.cuda.device_count()
    device = settings.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus < settings.processes:
        raise UserError(
            f"--device cuda needs {settings.processes} GPU(s) for --processes "
            f"{settings.processes} and finds {gpus}: choose --device cpu or fewer processes."
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


def train(
    job: Job, stage: str, folder: Path, steps: int, *, start: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One stage, the source stage or the adaptation by one method; returns its last state.

    Weights come from the stage's own last checkpoint when a run is resumed, else from `start` (the
    source model), else from --init, else they are random.
    """
    s, fabric = job.settings, job.fabric
    on_source = stage == SOURCE_ONLY
    lr, horizon = (s.source_lr, s.source_horizon) if on_source else (s.lr, s.steps)
    methods = adaptation.methods(ratio=s.ratio, threshold=s.threshold, low_weight=s.low_weight)
    target_loss = None if on_source else methods[stage]
    folder.mkdir(parents=True, exist_ok=True)

    fabric.seed_everything(s.seed, verbose=False)
    network = loading.build_network(s)
    optimizer = adaptation.RepeatedSGD(
        adaptation.parameter_groups(network, lr, backbone_updates=s.backbone_updates),
        momentum=s.momentum,
        weight_decay=s.weight_decay,
    )
    # All there is to a run between two steps: what save writes and what resuming reads.
    state: dict[str, Any] = {
        "stage": stage,
        "network": s.network,
        "classes": s.classes,
        "settings": outputs.as_json(s),
        "step": 0,
        "seconds": 0.0,
        "confusion": None,
        "best": None,
    }
    if s.resume and (folder / "last.pt").is_file():
        expect = {name: state[name] for name in ("stage", "network", "classes")}
        state = checkpoint.load(folder / "last.pt", expect=expect)
        network.load_state_dict(state["model"])
        checkpoint.restore_random_state(state["random"])
    elif start is not None:
        network.load_state_dict(start)
    elif s.init is not None:
        has_heads = deeplab.load_weights(network, s.init)
        if not has_heads and not s.source_steps:
            raise UserError(f"--init {s.init} has no classifier: train one with --source-steps.")

    if s.channels_last:
        network.to(memory_format=torch.channels_last)
    model, stepper = fabric.setup(torch.compile(network) if s.compile else network, optimizer)
    if "optimizer" in state:  # momentum goes where the weights are, so only now
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    first, share = state["step"], {"rank": fabric.global_rank, "world": fabric.world_size}
    # The adaptation reads on in the source where the source stage stopped.
    offset = 0 if on_source else s.source_steps
    source_batches = loading.batches(
        job.source, s, offset + first, offset + steps, stream=0, **share
    )
    target_batches = loading.batches(job.target, s, first, steps, stream=1, **share)
    if target_loss is None:
        target_batches = [None] * (steps - first)
    both_heads = on_source or isinstance(target_loss, maxsquare.MultiLevelLoss)
    options = {"low_weight": s.low_weight if both_heads else 0.0, "backward": fabric.backward}

    started = time.perf_counter() - state["seconds"]
    log = SummaryWriter(str(folder), purge_step=first) if fabric.is_global_zero else None
    progress = report.progress_bar(job.console)

    def save(name: str) -> None:
        state["seconds"] = time.perf_counter() - started
        state["model"], state["optimizer"] = network.state_dict(), optimizer.state_dict()
        state["random"] = checkpoint.random_state()
        if fabric.is_global_zero:
            checkpoint.save(folder / name, state)

    def assess() -> None:
        loader = loading.validation_loader(job.validation, s, **share)
        task = progress.add_task("evaluation", total=len(loader.dataset), note="")
        with fabric.autocast():
            scores = evaluate(
                network,
                loader,
                job.validation.space,
                device=fabric.device,
                on_progress=lambda images: progress.advance(task, images),
            )
        progress.remove_task(task)
        state["confusion"] = scores.confusion
        if log:
            log.add_scalar("validation/miou", scores.miou, state["step"])
        if state["best"] is None or scores.miou > state["best"]["miou"]:
            state["best"] = {"step": state["step"], **report.entry(scores)}
            save("best.pt")

    with progress:
        bar = progress.add_task(stage, total=steps, completed=first, note="")
        for source, target in zip(source_batches, target_batches, strict=True):
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
                values = {name: value.item() for name, value in losses._asdict().items()}
                if not all(map(math.isfinite, values.values())):
                    rate_option = "--source-lr" if on_source else "--lr"
                    raise UserError(f"Losses at step {step} are {values}: lower {rate_option}.")
                progress.update(bar, note=report.losses(values))
                for name, value in (values | {"lr": rate}).items() if log else ():
                    log.add_scalar(f"train/{name}", value, step)
            if assesses:
                assess()
            if saves:
                save("last.pt")
        if state["confusion"] is None:  # a stage of no steps: the weights it was given
            assess()
            save("last.pt")
    if log:
        log.close()
    return state


if __name__ == "__main__":
    sys.exit(main())
