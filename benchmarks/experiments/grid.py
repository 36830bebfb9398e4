"""Many methods at many target weights on many seeds: runs that are paired and can be continued.

An experiment names its rows; a task is a pair of domains with a network. Every seed runs every row
at every target weight from the same source model, and all see the same images in the same order,
so that their differences are paired. Each run is one file of results in a folder, which experiments
with rows in common share. A run that was stopped is made again, finished ones are kept.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from rich.console import Console

import cases
from maxsquare import Statistics
from uda import checkpoint, outputs, report
from uda.datasets import Progress
from uda.errors import UserError
from uda.evaluation import steadiness
from uda.presets import DEMO_CHECKPOINT, criterion_of

Weights = dict[str, torch.Tensor]


class Task(Protocol):
    """A pair of domains, a network, and a recipe for training on them.

    A model depends only on the arguments of the method that makes it, so that a run can be
    repeated. A task can be pickled: each worker process has its own.

    Attributes:
        name: stem of the result files.
        score_name: what `score` returns, with its unit.
        base: one line each on data, network and recipe.
        weights: the weights of the target loss at which each method runs.
    """

    name: str
    score_name: str
    base: dict[str, str]
    weights: tuple[float, ...]

    def prepare(self, on_progress: Progress) -> None:
        """Prepare the data that the runs share; called once, before any other method."""

    def train_source(self, seed: int) -> Weights:
        """A model that has learnt from labelled source images."""

    def target_statistics(self, source: Weights, seed: int) -> Weights:
        """The model with BatchNorm's running statistics taken from target training images."""

    def adapt(
        self,
        source: Weights,
        seed: int,
        method: str,
        weight: float,
        *,
        prior: torch.Tensor | None = None,
        ratio: float = 0.2,
        length: float = 1.0,
    ) -> Weights:
        """The model after further training with the target loss of a method ("source": none).

        prior: class proportions that the methods with an information term keep to; None: uniform.
        ratio: the exponent of class weights.
        length: of the training, in units of the usual number of steps.
        """

    def score(self, weights: Weights) -> tuple[float, dict[str, float | None]]:
        """The score on labelled target validation images, over all classes and of each."""

    def watch(self, weights: Weights) -> Statistics:
        """Statistics of the predictions on target training images, whose labels are not used."""

    def predictions(self, weights: Weights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and labels of the target validation images, batch by batch."""


def class_shares(labels: Iterable[torch.Tensor], classes: int) -> torch.Tensor:
    """The share of each class among the labelled pixels; labels: integers, -1 = ignored."""
    counts = sum(
        (each[each >= 0].bincount(minlength=classes) for each in labels), torch.zeros(classes)
    )
    return counts / counts.sum()


@runtime_checkable
class Explaining(Protocol):
    """A task that tells more about a model than its score."""

    def explain(self, weights: Weights) -> tuple[float, dict[str, float]]:
        """Mean confidence on target validation images, and share of each predicted class, in %."""


class Row(NamedTuple):
    """A line of a table, and the method that makes its model from the source model.

    method: None: no training. predicted_prior: the information term keeps to the mean prediction
    of the source model with target statistics. ratio, length: as in `Task.adapt`. only: the place
    of the only target weight in the task's; None: all of them.
    """

    label: str
    method: str | None = None
    predicted_prior: bool = False
    ratio: float = 0.2
    length: float = 1.0
    only: int | None = None

    @property
    def has_target_loss(self) -> bool:
        return self.method not in (None, "source")


SOURCE_ONLY, STATISTICS, CONTROL = "source-only", "target-statistics", "source"
# Rows of every experiment, to compare with.
REFERENCES = {
    SOURCE_ONLY: Row("source only"),
    STATISTICS: Row("target BatchNorm statistics"),
    CONTROL: Row("source, continued", "source"),
}
Rows = Mapping[str, Row]


class Run(NamedTuple):
    """One model to be made and scored."""

    seed: int
    row: str
    weight: float = 0.0

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.row}" + (f"-{self.weight:g}" if self.weight else "")


Finished = dict[Run, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What every experiment asks for."""

    task: Literal["scenes", "digits"] = "scenes"
    """What to adapt: rendered street scenes, or real handwriting of two sources."""
    seeds: int = 5
    """Seeds 0, 1, ...; more of them continue the runs of fewer."""
    workers: int = os.cpu_count() or 1
    """Processes that train at the same time, one thread each."""
    work: Path | None = None
    """Folder of the finished runs, from which a stopped run continues; default:
    runs/ablation-TASK."""
    data_root: Path | None = None
    """Folder of the rendered scenes (made if missing); default: data/ in --work."""
    sources: tuple[Path, ...] = ()
    """Source models of the street scenes, checkpoints or exported files, which the seeds use in
    turn; default: the source model of the demo."""
    out: Path = cases.RESULTS
    """Folder for tables and plot."""
    summary_only: bool = False
    """Make tables and plot from the finished runs in --work, and train nothing."""

    @property
    def folder(self) -> Path:
        return self.work or Path("runs") / f"ablation-{self.task}"


def main(
    run: Callable[[Any, Console], None], form: type[Options], arguments: Sequence[str] | None
) -> int:
    """Run an experiment with the options of the command line."""
    return report.exit_code(
        lambda: run(report.command_line(form, arguments), Console()),
        stopped="Stopped: the same command continues from here.",
    )


def finish(rows: Rows, options: Options, console: Console) -> tuple[dict[str, Any], Finished]:
    """Settings and results of all runs, of which those are made that are not there yet."""
    if options.seeds < 2:
        raise UserError(f"--seeds {options.seeds} gives no interval: take at least 2.")
    if options.workers < 1:
        raise UserError(f"--workers must be positive, not {options.workers}.")
    if not options.summary_only:
        try:
            train(make_task(options), rows, options, console)
        except BrokenProcessPool as error:
            raise UserError(
                "A training process was killed, perhaps for lack of memory: the same command "
                "continues from here, and takes less memory with fewer --workers."
            ) from error
    return load(options.folder, rows, options.seeds)


def make_task(options: Options) -> Task:
    # Each task needs packages that the other does not.
    if options.task == "digits":
        from digits import Digits

        return Digits()
    from street_scenes import StreetScenes

    data_root = options.data_root or options.folder / "data"
    return StreetScenes(data_root, options.sources or (DEMO_CHECKPOINT,))


# Runs


def all_runs(rows: Rows, weights: Sequence[float], seeds: int) -> list[Run]:
    """Every run, seed by seed."""
    return [
        run
        for seed in range(seeds)
        for name, row in rows.items()
        for run in runs_of(seed, name, row, weights)
    ]


def runs_of(seed: int, name: str, row: Row, weights: Sequence[float]) -> list[Run]:
    """The runs of a row: one for each weight, or one alone where there is no target loss."""
    if not row.has_target_loss:
        return [Run(seed, name)]
    return [Run(seed, name, w) for place, w in enumerate(weights) if row.only in (None, place)]


def choose(row: Row, runs: Iterable[Run], finished: Finished) -> Run:
    """Of the runs of a row at all its weights the one that train_uda.py chooses without labels."""
    criterion = criterion_of(str(row.method), row.ratio)
    return max(runs, key=lambda run: finished[run][criterion])


def startable(runs: Iterable[Run], finished: Finished) -> list[Run]:
    """The runs whose source model is there, including finished runs."""
    return [run for run in runs if run.row == SOURCE_ONLY or source_of(run) in finished]


def source_of(run: Run) -> Run:
    return Run(run.seed, SOURCE_ONLY)


def train(task: Task, rows: Rows, options: Options, console: Console) -> None:
    """Make every run that is not there yet."""
    folder = options.folder
    claim(folder, task, options.workers)
    runs = all_runs(rows, task.weights, options.seeds)
    finished = {run: result for run, result in read_runs(folder) if run in {*runs}}
    with report.progress_bar(console) as progress:
        # A run takes about a minute, so the remaining time is estimated from many runs.
        progress.speed_estimate_period = 3600.0
        preparing = progress.add_task("data", total=None, note="")
        task.prepare(lambda done, of: progress.update(preparing, completed=done, total=of))
        progress.remove_task(preparing)
        bar = progress.add_task("runs", total=len(runs), completed=len(finished), note="")
        with workers(options.workers, task, folder) as pool:
            running: dict[Future[dict[str, Any]], Run] = {}
            while True:
                for run in startable(runs, finished):
                    if len(running) == options.workers:
                        break
                    if run not in finished and run not in running.values():
                        running[pool.submit(execute, run, rows[run.row])] = run
                if not running:
                    break
                progress.update(bar, note=", ".join(run.name for run in running.values()))
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    finished[running.pop(future)] = future.result()
                    progress.advance(bar)


def claim(folder: Path, task: Task, workers: int) -> None:
    """Note in the folder what its runs depend on, or refuse a folder with other runs."""
    settings = {
        "task": task.name,
        "score": task.score_name,
        "base": task.base,
        "weights": list(task.weights),
        "versions": report.versions(),
    }
    path = settings_path(folder)
    if path.is_file():
        earlier = flat(read_settings(folder)["settings"])
        for name, value in flat(settings).items():
            if earlier.get(name) != value:
                raise UserError(
                    f"{folder} holds runs with {name} {earlier.get(name)}, not {value}: choose "
                    "another --work, or continue with the settings of these runs."
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something else: choose another --work.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**cases.environment("cpu"), "threads": 1, "workers": workers}
        outputs.write_json(path, {"settings": settings, "environment": environment})


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of mappings as entries of their own."""
    values = {}
    for name, value in settings.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        values |= {f"{name} {key}".strip(): entry for key, entry in entries}
    return values


def settings_path(folder: Path) -> Path:
    return folder / "settings.json"


def read_settings(folder: Path) -> dict[str, Any]:
    return read(settings_path(folder), ("settings", "environment"), "choose another --work")


def read_runs(folder: Path) -> Iterator[tuple[Run, dict[str, Any]]]:
    for path in sorted(folder.glob("seed*.json")):
        entries = ("run", "score", "per_class", "information", "proportions", "seconds")
        result = read(path, entries, "remove it, and its run is made again")
        yield Run(*result["run"]), result


def read(path: Path, entries: Iterable[str], remedy: str) -> dict[str, Any]:
    """The content of a JSON file of ours; UserError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text at all
        content = None
    if not isinstance(content, dict) or not content.keys() >= {*entries}:
        raise UserError(f"{path} is damaged: {remedy}.")
    return content


# Worker processes

_task: Task
_folder: Path


@contextmanager
def workers(count: int, task: Task, folder: Path) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each, which end when this one ends, however it does."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # libraries read it when they are imported
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=start_worker, initargs=(task, folder))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def start_worker(task: Task, folder: Path) -> None:
    global _task, _folder
    _task, _folder = task, folder
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def execute(run: Run, row: Row) -> dict[str, Any]:
    """Make the model of a run, score it, and note the result in the folder."""
    task, started = _task, time.perf_counter()
    path = _folder / f"{run.name}.json"
    source_path = _folder / f"seed{run.seed}-source.pt"
    if run.row == SOURCE_ONLY:
        weights = task.train_source(run.seed)
        checkpoint.save(source_path, weights)
    else:
        source = checkpoint.load(source_path)
        if row.method is None:
            weights = task.target_statistics(source, run.seed)
        else:
            prior = None
            if row.predicted_prior:
                prior = task.watch(task.target_statistics(source, run.seed)).proportions
            weights = task.adapt(
                source,
                run.seed,
                row.method,
                run.weight,
                prior=prior,
                ratio=row.ratio,
                length=row.length,
            )
    score, per_class = task.score(weights)
    seen = task.watch(weights)
    result: dict[str, Any] = {
        "run": run,
        "score": score,
        "per_class": per_class,
        "information": seen.information.item(),
        "certainty": -seen.entropy.item(),
        "classes": seen.classes.item(),
        "proportions": seen.proportions.tolist(),
    }
    if row.method is not None:
        # The gain of the loss beyond that of BatchNorm statistics of the target.
        with_statistics = task.target_statistics(weights, run.seed)
        result["score_with_target_statistics"], _ = task.score(with_statistics)
    if isinstance(task, Explaining):
        result["confidence"], result["share"] = task.explain(weights)
    result["seconds"] = time.perf_counter() - started
    outputs.write_json(path, result)
    return result


def load(folder: Path, rows: Rows, seeds: int) -> tuple[dict[str, Any], Finished]:
    """The settings of the runs in a folder, and their results; those of all seeds must be there."""
    if not settings_path(folder).is_file():
        raise UserError(f"{folder} holds no runs: check --work.")
    started_with = read_settings(folder)
    runs = all_runs(rows, started_with["settings"]["weights"], seeds)
    found = dict(read_runs(folder))
    finished = {run: found[run] for run in runs if run in found}
    if len(finished) < len(runs):
        raise UserError(
            f"{folder} holds {len(finished)} of {len(runs)} runs: finish them without "
            "--summary-only, or report fewer --seeds."
        )
    return started_with, {run: add_steadiness(result, finished) for run, result in finished.items()}


def add_steadiness(result: dict[str, Any], finished: Finished) -> dict[str, Any]:
    """A result with what chooses among models whose loss raises their information by itself."""
    seed, *_ = result["run"]
    before = finished[Run(seed, STATISTICS)]["proportions"]
    found = steadiness(-result["certainty"], result["proportions"], before)
    return result | {"steadiness": found}
