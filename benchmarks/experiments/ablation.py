"""Which part of the method helps, and by how much: all target losses under the same conditions.

    python benchmarks/experiments/ablation.py  # rendered street scenes: an hour, 2 cores
    python benchmarks/experiments/ablation.py --task digits  # real handwriting: a quarter of that
    python benchmarks/experiments/ablation.py --summary-only  # tables and plots again

Every seed runs every method at several target weights from the same source model, and all see the
same images in the same order, so that their differences are paired. Of these weights each seed and
method takes the one whose model has the highest information on unlabelled target images, so that no
target label influences a number in the tables. A run that was stopped continues where it was.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown
from scipy.stats import spearmanr, ttest_rel

import cases
from maxsquare import Statistics
from uda import checkpoint, outputs, report
from uda.datasets import Progress
from uda.errors import UserError
from uda.presets import DEMO_CHECKPOINT

QUESTION = "Which part of the method helps on the target, and by how much?"

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
    ) -> Weights:
        """The model after further training with the target loss of a method ("source": none).

        prior: class proportions that the methods with an information term keep to; None: uniform.
        """

    def score(self, weights: Weights) -> tuple[float, dict[str, float | None]]:
        """The score on labelled target validation images, over all classes and of each."""

    def watch(self, weights: Weights) -> Statistics:
        """Statistics of the predictions on target training images, whose labels are not used."""


@runtime_checkable
class Explaining(Protocol):
    """A task that tells more about a model than its score."""

    def explain(self, weights: Weights) -> tuple[float, dict[str, float]]:
        """Mean confidence on target validation images, and share of each predicted class, in %."""


class Row(NamedTuple):
    """A line of the table, and the method that makes its model from the source model."""

    label: str
    method: str | None = None
    predicted_prior: bool = False


SOURCE_ONLY = "source-only"
STATISTICS = "target-statistics"
CONTROL = "source"
FULL = "maxsquare-iw-multi"
ROWS = {
    SOURCE_ONLY: Row("source only"),
    STATISTICS: Row("target BatchNorm statistics"),
    CONTROL: Row("source, continued", "source"),
    "entropy": Row("entropy", "entropy"),
    "entropy-information": Row("entropy + information", "entropy-information"),
    "entropy-prior": Row("entropy + information, predicted prior", "entropy-information", True),
    "maxsquare": Row("maximum squares", "maxsquare"),
    "maxsquare-information": Row("maximum squares + information", "maxsquare-information"),
    "maxsquare-prior": Row(
        "maximum squares + information, predicted prior", "maxsquare-information", True
    ),
    "maxsquare-iw": Row("IW (image-wise)", "maxsquare-iw"),
    "maxsquare-iw-information": Row("IW + information", "maxsquare-iw-information"),
    "maxsquare-iw-prior": Row(
        "IW + information, predicted prior", "maxsquare-iw-information", True
    ),
    FULL: Row("IW + Multi(-level)", FULL),
    "pseudo-label": Row("pseudo labels", "pseudo-label"),
}
METHODS = [name for name, row in ROWS.items() if row.method not in (None, CONTROL)]
# Methods with the information term, and the method without it.
TERM = {
    f"{name}-{term}": name
    for name in ("entropy", "maxsquare", "maxsquare-iw")
    for term in ("information", "prior")
}
# Pairs of rows whose difference is a step; the steps of the paper come first.
STEPS = {
    ("maxsquare", "entropy"): "maximum squares − entropy",
    ("maxsquare-iw", "maxsquare"): "IW − maximum squares",
    (FULL, "maxsquare-iw"): "Multi − IW",
    **{pair: f"{ROWS[pair[0]].label} − without" for pair in TERM.items()},
    ("maxsquare-iw", "pseudo-label"): "IW − pseudo labels",
}
# What can be seen without labels, and how it is read: the higher, the better the model seems.
CRITERIA = {
    "information": "information",
    "certainty": "low entropy",
    "classes": "predicted classes",
    "steadiness": "low entropy, steady proportions",
}
COMPARISONS = (
    *((name, SOURCE_ONLY) for name in ROWS if name != SOURCE_ONLY),
    *((name, CONTROL) for name in METHODS),
    *STEPS,
)
# With the target's BatchNorm statistics in every model, so that they explain no difference.
EQUALISED = (
    *((name, STATISTICS) for name in (CONTROL, *METHODS)),
    *((name, CONTROL) for name in METHODS),
    *STEPS,
)

# Percent of all pixels; a class that is predicted less often counts as given up.
GIVEN_UP_BELOW = 0.1


@dataclass(frozen=True)
class Options:
    """Compare the target losses, with error bars over seeds."""

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


class Run(NamedTuple):
    """One model to be made and scored."""

    seed: int
    row: str
    weight: float = 0.0

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.row}" + (f"-{self.weight:g}" if self.weight else "")


Finished = dict[Run, dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(
        lambda: run(report.command_line(Options, arguments), Console()),
        stopped="Stopped: the same command continues from here.",
    )


def run(options: Options, console: Console) -> None:
    if options.seeds < 2:
        raise UserError(f"--seeds {options.seeds} gives no interval: take at least 2.")
    if options.workers < 1:
        raise UserError(f"--workers must be positive, not {options.workers}.")
    folder = options.work or Path("runs") / f"ablation-{options.task}"
    if not options.summary_only:
        try:
            train(make_task(options, folder), folder, options, console)
        except BrokenProcessPool as error:
            raise UserError(
                "A training process was killed, perhaps for lack of memory: the same command "
                "continues from here, and takes less memory with fewer --workers."
            ) from error
    write(summarize(*load(folder, options.seeds), options.seeds), options.out, console)


def make_task(options: Options, folder: Path) -> Task:
    # Each task needs packages that the other does not.
    if options.task == "digits":
        from digits import Digits

        return Digits()
    from street_scenes import StreetScenes

    return StreetScenes(options.data_root or folder / "data", options.sources or (DEMO_CHECKPOINT,))


# Runs


def all_runs(weights: Sequence[float], seeds: int) -> list[Run]:
    """Every run, seed by seed."""
    return [run for seed in range(seeds) for name in ROWS for run in runs_of(seed, name, weights)]


def runs_of(seed: int, row: str, weights: Sequence[float]) -> list[Run]:
    """The runs of a row: one for each weight, or one alone where there is no target loss."""
    return [Run(seed, row, weight) for weight in (weights if row in METHODS else (0.0,))]


def startable(runs: Iterable[Run], finished: Finished) -> list[Run]:
    """The runs whose source model is there, including finished runs."""
    return [run for run in runs if run.row == SOURCE_ONLY or source_of(run) in finished]


def source_of(run: Run) -> Run:
    return Run(run.seed, SOURCE_ONLY)


def choose(seed: int, row: str, weights: Sequence[float], finished: Finished) -> Run:
    """The run that stands for a row: of all its weights the one of the highest information."""
    return max(runs_of(seed, row, weights), key=lambda run: finished[run]["information"])


def train(task: Task, folder: Path, options: Options, console: Console) -> None:
    """Finish every run that is not finished yet."""
    claim(folder, task, options)
    finished = dict(read_runs(folder))
    runs = all_runs(task.weights, options.seeds)
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
                        running[pool.submit(execute, run)] = run
                if not running:
                    break
                progress.update(bar, note=", ".join(run.name for run in running.values()))
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    finished[running.pop(future)] = future.result()
                    progress.advance(bar)


def claim(folder: Path, task: Task, options: Options) -> None:
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
        environment = {**cases.environment("cpu"), "threads": 1, "workers": options.workers}
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


def execute(run: Run) -> dict[str, Any]:
    """Make the model of a run, score it, and note the result in the folder."""
    task, started = _task, time.perf_counter()
    path = _folder / f"{run.name}.json"
    source_path = _folder / f"seed{run.seed}-source.pt"
    row = ROWS[run.row]
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
            weights = task.adapt(source, run.seed, row.method, run.weight, prior=prior)
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


# Summary


def load(folder: Path, seeds: int) -> tuple[dict[str, Any], Finished]:
    """The settings of the runs in a folder, and their results; those of all seeds must be there."""
    if not settings_path(folder).is_file():
        raise UserError(f"{folder} holds no runs: check --work.")
    started_with = read_settings(folder)
    runs, found = all_runs(started_with["settings"]["weights"], seeds), dict(read_runs(folder))
    finished = {run: found[run] for run in runs if run in found}
    if len(finished) < len(runs):
        raise UserError(
            f"{folder} holds {len(finished)} of {len(runs)} runs: finish them without "
            "--summary-only, or report fewer --seeds."
        )
    return started_with, finished


def summarize(started_with: Mapping[str, Any], finished: Finished, seeds: int) -> dict[str, Any]:
    """Everything that is reported, as the JSON file holds it."""
    settings = started_with["settings"]
    weights = settings["weights"]
    finished = {run: add_steadiness(result, run, finished) for run, result in finished.items()}
    chosen = {
        name: [choose(seed, name, weights, finished) for seed in range(seeds)] for name in ROWS
    }
    rows = {
        name: summarize_row(name, runs, [finished[run] for run in runs])
        for name, runs in chosen.items()
    }
    scores = {name: row["scores"] for name, row in rows.items()}
    equalised = {name: row["scores_with_target_statistics"] for name, row in rows.items()}
    equalised[STATISTICS] = scores[STATISTICS]
    options = ["--task", settings["task"], "--seeds", str(seeds)]
    return {
        "question": QUESTION,
        "command": shlex.join(["python", "benchmarks/experiments/ablation.py", *options]),
        **settings,
        "seeds": seeds,
        "environment": started_with["environment"],
        "rows": rows,
        "differences": [
            {"row": a, "against": b, **difference(scores[a], scores[b])} for a, b in COMPARISONS
        ],
        "differences_with_target_statistics": [
            {"row": a, "against": b, **difference(equalised[a], equalised[b])} for a, b in EQUALISED
        ],
        "grid": {
            name: [scores_at(name, weight, seeds, finished) for weight in weights]
            for name in METHODS
        },
        "term": [
            {
                "row": row,
                "against": against,
                "weight": weight,
                **difference(
                    scores_at(row, weight, seeds, finished),
                    scores_at(against, weight, seeds, finished),
                ),
            }
            for row, against in TERM.items()
            for weight in weights
        ],
        "criteria": {
            name: summarize_criterion(name, weights, seeds, finished) for name in CRITERIA
        },
        "seconds_of_all_runs": sum(result["seconds"] for result in finished.values()),
    }


def add_steadiness(result: dict[str, Any], run: Run, finished: Finished) -> dict[str, Any]:
    """With minus the entropy and minus the divergence of the class proportions from those of the
    source model with target statistics."""
    now, before = (
        torch.tensor(r["proportions"]) for r in (result, finished[Run(run.seed, STATISTICS)])
    )
    divergence = (torch.special.xlogy(now, now) - torch.special.xlogy(now, before)).sum().item()
    return result | {"steadiness": result["certainty"] - divergence}


def scores_at(row: str, weight: float, seeds: int, finished: Finished) -> list[float]:
    """The score of each seed of a method at a weight."""
    return [finished[Run(seed, row, weight)]["score"] for seed in range(seeds)]


def summarize_criterion(
    criterion: str, weights: Sequence[float], seeds: int, finished: Finished
) -> dict[str, list[float]]:
    """How well a criterion without labels chooses, for each seed.

    correlation: Spearman's, with the score over all models. regret: points that the model of the
    highest value lies below the best one. regret_of_weight: the same among the weights of one
    method, the mean over methods.
    """
    found: dict[str, list[float]] = {"correlation": [], "regret": [], "regret_of_weight": []}
    for seed in range(seeds):
        models = {name: runs_of(seed, name, weights) for name in ROWS}
        every = [finished[run] for runs in models.values() for run in runs]
        found["correlation"].append(correlation(every, criterion))
        found["regret"].append(regret(every, criterion))
        found["regret_of_weight"].append(
            statistics.mean(
                regret([finished[run] for run in models[name]], criterion) for name in METHODS
            )
        )
    return found


def correlation(models: Sequence[Mapping[str, Any]], criterion: str) -> float:
    """Spearman's, of the criterion with the score; 0 where the criterion tells no models apart."""
    values, scores = ([model[key] for model in models] for key in (criterion, "score"))
    return float(spearmanr(values, scores).statistic) if len({*values}) > 1 else 0.0


def regret(models: Sequence[Mapping[str, Any]], criterion: str) -> float:
    """Points between the best score and the mean score of those with the highest value."""
    highest = max(model[criterion] for model in models)
    taken = [model["score"] for model in models if model[criterion] == highest]
    return max(model["score"] for model in models) - statistics.mean(taken)


def summarize_row(
    name: str, runs: Sequence[Run], results: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    row = ROWS[name]

    def values(key: str) -> list[Any]:
        return [result[key] for result in results if key in result]

    shares = mean_per_class(values("share"))
    return {
        **row._asdict(),
        "weights": [run.weight for run in runs] if name in METHODS else [],
        "scores": values("score"),
        "mean": statistics.mean(values("score")),
        "per_class": mean_per_class(values("per_class")),
        "per_class_of_seeds": values("per_class"),
        "scores_with_target_statistics": values("score_with_target_statistics"),
        "confidence": mean(values("confidence")),
        "share": shares,
        "classes_predicted": sum(share >= GIVEN_UP_BELOW for share in shares.values()) or None,
        "seconds": values("seconds"),
    }


def mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def mean_per_class(
    results: Sequence[Mapping[str, float | None]],
) -> dict[str, float | None]:
    """Mean over seeds; None for a class without a score on some seed."""
    classes = results[0] if results else ()
    columns = {c: [result[c] for result in results] for c in classes}
    return {c: None if None in values else mean(values) for c, values in columns.items()}


def difference(scores: Sequence[float], against: Sequence[float]) -> dict[str, Any]:
    """Mean paired difference over seeds with its 95% confidence interval (Student's t)."""
    differences = [a - b for a, b in zip(scores, against, strict=True)]
    if len({*differences}) == 1:  # t is not defined without spread
        low = high = differences[0]
    else:
        low, high = map(float, ttest_rel(scores, against).confidence_interval(0.95))
    return {
        "mean": statistics.mean(differences),
        "low": low,
        "high": high,
        "won": sum(d > 0 for d in differences),
    }


# Report


def write(summary: dict[str, Any], folder: Path, console: Console) -> None:
    stem = f"ablation-{summary['task']}"
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(summary)
    console.print(Markdown(text))
    cases.save_json(summary, folder / f"{stem}.json")
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    write_csv(summary, folder / f"{stem}.csv")
    figure = plot(summary)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{stem}.{suffix}", dpi=130)
    console.print(f"Tables and plot: {folder / stem}.*", soft_wrap=True)


def write_csv(summary: Mapping[str, Any], path: Path) -> None:
    """One line for each seed and row."""
    classes = list(summary["rows"][SOURCE_ONLY]["per_class"])
    header = "seed row weight score with_target_statistics seconds"
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*header.split(), *classes])
        for name, row in summary["rows"].items():
            with_statistics = row["scores_with_target_statistics"] or [None] * summary["seeds"]
            for seed in range(summary["seeds"]):
                values = (row["scores"][seed], with_statistics[seed], row["seconds"][seed])
                per_class = row["per_class_of_seeds"][seed]
                lines.writerow(
                    [
                        seed,
                        name,
                        *(row["weights"][seed : seed + 1] or [None]),
                        *map(short, (*values, *(per_class[c] for c in classes))),
                    ]
                )


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables, with the explanations that they need."""
    score, environment = summary["score"], summary["environment"]
    sections = [
        f"# {QUESTION}",
        f"`{summary['command']}`: {cases.name_of(environment)}, "
        f"{summary['seconds_of_all_runs'] / 60:.0f} minutes of computing in "
        f"{environment['workers']} processes.",
        "\n".join(f"- {name}: {text}" for name, text in summary["base"].items()),
        f"{score[0].upper()}{score[1:]}, seeds 0 to {summary['seeds'] - 1}. Each seed takes the "
        f"weight, of {', '.join(f'{weight:g}' for weight in summary['weights'])}, at which the "
        "information on unlabelled target training images is highest. Differences are paired: "
        "all rows of a seed start from one source model and see the same images. Each has "
        "its 95% confidence interval (Student's t over seeds, not corrected for the number of "
        "comparisons) and the seeds won.",
        results_table(summary),
        "## Step by step",
        steps_table(summary),
        "## What the losses teach the weights",
        "The same after BatchNorm's statistics were taken from target training images in every "
        "model, so that they explain no difference; mean confidence (%) and classes predicted on "
        f"at least {GIVEN_UP_BELOW}% of the pixels, of the models as they are.",
        models_table(summary),
        "## The information term at every weight",
        f"{score[0].upper()}{score[1:]}, mean over seeds.",
        grid_table(summary),
        "With the term − without:",
        term_table(summary),
        "## Choosing without labels",
        "Over all models of a seed (those without a target loss, and every method at every "
        "weight): Spearman's correlation of the criterion with the score, and the points by which "
        "the chosen model misses the best one; then the same among the weights of one method, "
        "mean over methods. Mean over seeds, and their range.",
        criteria_table(summary),
        "## Per class",
        f"{score}, mean over seeds.",
        per_class_table(summary),
    ]
    return "\n\n".join(sections) + "\n"


def results_table(summary: Mapping[str, Any]) -> str:
    differences, seeds = pairs(summary), summary["seeds"]
    return table(
        ("", "weights", "mean", "seeds", "less source only", "less source, continued"),
        [
            (
                ROWS[name].label,
                ", ".join(f"{weight:g}" for weight in row["weights"]) or "–",
                f"**{row['mean']:.1f}**",
                ", ".join(f"{value:.1f}" for value in row["scores"]),
                compared(differences.get((name, SOURCE_ONLY)), seeds),
                compared(differences.get((name, CONTROL)), seeds),
            )
            for name, row in summary["rows"].items()
        ],
    )


def steps_table(summary: Mapping[str, Any]) -> str:
    seeds = summary["seeds"]
    as_they_are, equalised = pairs(summary), pairs(summary, "differences_with_target_statistics")
    return table(
        ("", "as they are", "all with target statistics"),
        [
            (text, compared(as_they_are[pair], seeds), compared(equalised[pair], seeds))
            for pair, text in STEPS.items()
        ],
    )


def models_table(summary: Mapping[str, Any]) -> str:
    equalised, seeds = pairs(summary, "differences_with_target_statistics"), summary["seeds"]
    return table(
        (
            "",
            "with target statistics",
            "less the source model with them",
            "less source, continued, with them",
            "confidence",
            "classes",
        ),
        [
            (
                ROWS[name].label,
                number(mean(row["scores_with_target_statistics"]), ".1f"),
                compared(equalised.get((name, STATISTICS)), seeds),
                compared(equalised.get((name, CONTROL)), seeds),
                number(row["confidence"], ".1f"),
                number(row["classes_predicted"], "d"),
            )
            for name, row in summary["rows"].items()
        ],
    )


def grid_table(summary: Mapping[str, Any]) -> str:
    return table(
        ("", *(f"weight {weight:g}" for weight in summary["weights"])),
        [
            (ROWS[name].label, *(f"{statistics.mean(scores):.1f}" for scores in grid))
            for name, grid in summary["grid"].items()
        ],
    )


def term_table(summary: Mapping[str, Any]) -> str:
    found = {(d["row"], d["weight"]): d for d in summary["term"]}
    return table(
        ("", *(f"weight {weight:g}" for weight in summary["weights"])),
        [
            (
                ROWS[row].label,
                *(compared(found[row, w], summary["seeds"]) for w in summary["weights"]),
            )
            for row in TERM
        ],
    )


def criteria_table(summary: Mapping[str, Any]) -> str:
    return table(
        ("", "correlation", "points missed", "points missed by the weight"),
        [
            (CRITERIA[name], *map(mean_and_range, found.values()))
            for name, found in summary["criteria"].items()
        ],
    )


def mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def per_class_table(summary: Mapping[str, Any]) -> str:
    rows = summary["rows"]
    return table(
        ("", *(ROWS[name].label for name in rows)),
        [
            (c, *(number(row["per_class"][c], ".1f") for row in rows.values()))
            for c in rows[SOURCE_ONLY]["per_class"]
        ],
    )


def pairs(
    summary: Mapping[str, Any], of: str = "differences"
) -> dict[tuple[str, str], Mapping[str, float]]:
    """The differences by the rows that they compare."""
    return {(d["row"], d["against"]): d for d in summary[of]}


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def compared(difference: Mapping[str, float] | None, seeds: int) -> str:
    if difference is None:
        return "–"
    form = "{mean:+.2f} [{low:+.2f}, {high:+.2f}] {won}/{seeds}"
    return form.format(**difference, seeds=seeds)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def plot(summary: Mapping[str, Any]) -> Figure:
    """Scores of all seeds, gains over the source model, and the steps between rows.

    Differences are shown twice: of the models as they are, and filled with the target's BatchNorm
    statistics in all of them.
    """
    rows, seeds = summary["rows"], summary["seeds"]
    as_they_are, equalised = pairs(summary), pairs(summary, "differences_with_target_statistics")
    # A gap separates the rows without a target loss from those with one.
    gaps = {SOURCE_ONLY: 0.0, METHODS[0]: 0.5}
    places: dict[str, float] = {}
    gap = 0.0
    for line, name in enumerate(rows):
        gap = gaps.get(name, gap)
        places[name] = line + gap

    figure = Figure(figsize=(8.2, 7.2), layout="constrained")
    figure.suptitle(cases.name_of(summary["environment"]), fontsize=7, color="0.4")
    above, below = figure.subfigures(2, 1, height_ratios=(len(rows) + 3, len(STEPS) + 2))
    dots, gains = above.subplots(1, 2, sharey=True)
    steps = below.subplots()

    dots.axvline(rows[SOURCE_ONLY]["mean"], color="0.7", linewidth=1)
    for name, row in rows.items():
        spread = [places[name] + 0.3 * (seed / (seeds - 1) - 0.5) for seed in range(seeds)]
        dots.plot(row["scores"], spread, "o", color=color(name), markersize=4, alpha=0.6)
        dots.plot([row["mean"]] * 2, places[name] + torch.tensor([-0.35, 0.35]), color=color(name))
    dots.set_yticks([*places.values()], [ROWS[name].label for name in places], fontsize=9)
    dots.invert_yaxis()
    dots.set_xlabel(f"{summary['score']}: seeds, and their mean", fontsize=9)

    for name in rows:
        if name != SOURCE_ONLY:
            gain = as_they_are[name, SOURCE_ONLY]
            draw_interval(gains, places[name] - 0.15, gain, color(name), "white")
        if gain := equalised.get((name, STATISTICS)):
            draw_interval(gains, places[name] + 0.15, gain, color(name))
    gains.set_xlabel(
        "gain over the source model, 95% CI\nfilled: both with target statistics", fontsize=9
    )

    for line, pair in enumerate(STEPS):
        draw_interval(steps, line - 0.12, as_they_are[pair], color(pair[0]), "white")
        draw_interval(steps, line + 0.12, equalised[pair], color(pair[0]))
    steps.set_yticks(range(len(STEPS)), [*STEPS.values()], fontsize=9)
    steps.margins(y=0.08)
    steps.invert_yaxis()
    steps.set_xlabel(
        "difference between two rows, 95% CI; filled: both with target statistics", fontsize=9
    )
    for axes in (gains, steps):
        axes.axvline(0, color="0.7", linewidth=1, zorder=0)
    for axes in (dots, gains, steps):
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def color(row: str) -> str:
    """By group; Okabe and Ito's palette, which colour-blind readers can tell apart."""
    return "#0072B2" if row in METHODS else "0.35"


def draw_interval(
    axes: Axes, y: float, difference: Mapping[str, float], color: str, fill: str | None = None
) -> None:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    axes.errorbar(
        mean,
        y,
        xerr=[[mean - low], [high - mean]],
        fmt="o",
        color=color,
        markerfacecolor=fill or color,
        capsize=3,
        markersize=5,
    )


if __name__ == "__main__":
    sys.exit(main())
