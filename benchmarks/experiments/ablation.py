"""Which part of the method helps, and by how much: all target losses under the same conditions.

    python benchmarks/experiments/ablation.py --seeds 3  # rendered street scenes: two hours
    python benchmarks/experiments/ablation.py --task digits --seeds 3  # real handwriting: an hour
    python benchmarks/experiments/ablation.py --summary-only  # tables and plots again

Every seed runs every method at several target weights from the same source model, and all see the
same images in the same order, so that their differences are paired. Of these weights each seed and
method takes one that is chosen on unlabelled target images, as train_uda.py chooses it: no target
label influences a number in the tables. A run that was stopped continues where it was.
"""

from __future__ import annotations

import csv
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import spearmanr

import cases
import grid
from grid import CONTROL, REFERENCES, SOURCE_ONLY, STATISTICS, Finished, Row, Run
from tables import compared, difference, draw_interval, mean, mean_and_range, number, save, table

QUESTION = "Which part of the method helps on the target, and by how much?"

FULL = "maxsquare-iw-multi"
ROWS = {
    **REFERENCES,
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
METHODS = [name for name, row in ROWS.items() if row.has_target_loss]
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
class Options(grid.Options):
    """Compare the target losses, with error bars over seeds."""


def main(arguments: Sequence[str] | None = None) -> int:
    return grid.main(run, Options, arguments)


def run(options: Options, console: Console) -> None:
    started_with, finished = grid.finish(ROWS, options, console)
    write(summarize(started_with, finished, options.seeds), options.out, console)


# Summary


def runs_of(seed: int, name: str, weights: Sequence[float]) -> list[Run]:
    return grid.runs_of(seed, name, ROWS[name], weights)


def summarize(started_with: Mapping[str, Any], finished: Finished, seeds: int) -> dict[str, Any]:
    """Everything that is reported, as the JSON file holds it."""
    settings = started_with["settings"]
    weights = settings["weights"]
    chosen = {
        name: [grid.choose(row, runs_of(seed, name, weights), finished) for seed in range(seeds)]
        for name, row in ROWS.items()
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


def mean_per_class(
    results: Sequence[Mapping[str, float | None]],
) -> dict[str, float | None]:
    """Mean over seeds; None for a class without a score on some seed."""
    classes = results[0] if results else ()
    columns = {c: [result[c] for result in results] for c in classes}
    return {c: None if None in values else mean(values) for c, values in columns.items()}


# Report


def write(summary: dict[str, Any], folder: Path, console: Console) -> None:
    stem = f"ablation-{summary['task']}"
    save(summary, markdown(summary), folder, stem, console)
    write_csv(summary, folder / f"{stem}.csv")
    figure = plot(summary)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{stem}.{suffix}", dpi=130)


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
        f"weight, of {', '.join(f'{weight:g}' for weight in summary['weights'])}, at which, on "
        "unlabelled target training images, information is highest, or with an information term "
        "low entropy at steady proportions. Differences are paired: all rows of a seed start "
        "from one source model and see the same images. Each has "
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


if __name__ == "__main__":
    sys.exit(main())
