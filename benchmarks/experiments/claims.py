"""Do the paper's claims hold here: rare classes, the ratio, global weights, a discriminator?

    python benchmarks/experiments/claims.py --task digits --seeds 3  # after the ablation, an hour
    python benchmarks/experiments/claims.py --summary-only  # tables and plot again

Continues the runs of ablation.py in the same folder with more rows: other exponents of the class
weights, the two baselines of `alternatives`, and longer training. Classes are then looked at by
their frequency: the frequent, the middle and the rare third of them, by the labels of the target's
validation images, which choose nothing.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console

import ablation
import cases
import grid
from alternatives import ADVERSARIAL, GLOBAL_WEIGHTS, upsample
from grid import CONTROL, SOURCE_ONLY, Finished, Row, class_shares
from maxsquare import functional
from tables import compared, difference, save, table
from uda import checkpoint, outputs
from uda.errors import UserError

QUESTION = "Do the paper's claims hold: rare classes, the ratio, global weights, a discriminator?"
RATIOS = (-0.2, 0.0, 0.2, 0.5, 1.0)
# How the pixels of a class are counted: those that are predicted, as the losses do by themselves;
# those in the labels, while the prediction says of which class a pixel is (the losses' option); or
# with the labels for both, as if the prediction were right.
COUNTED = ("prediction", "labels=", "truth")
THIRDS = ("frequent", "middle", "rare")
LONGER = 4.0
CRITERIA = ("information", "steadiness")
# What a step with a discriminator costs, in steps of image-wise maximum squares (processor time of
# one thread).
ADVERSARIAL_COST = {"scenes": 1.4, "digits": 1.5}


# The rows of each loss by their ratio. At 0 the reference scale of image-wise maximum squares is
# twice that of plain ones; of entropy both are the same.
SQUARES_AT = {
    ratio: "maxsquare-iw" if ratio == 0.2 else f"maxsquare-iw-ratio{ratio:g}" for ratio in RATIOS
}
ENTROPY_AT = {ratio: f"entropy-iw-ratio{ratio:g}" if ratio else "entropy" for ratio in RATIOS}
# Pairs of rows whose difference is a claim of the paper, or ours.
STEPS = (
    ("maxsquare", "entropy"),
    ("maxsquare-iw", "maxsquare"),
    (ENTROPY_AT[0.2], "entropy"),
    (ablation.FULL, "maxsquare-iw"),
    ("maxsquare-iw", GLOBAL_WEIGHTS),
    ("maxsquare-iw", ADVERSARIAL),
)


def rows(task: str) -> dict[str, Row]:
    """Every row: those of the ablation first."""
    added = {
        at[ratio]: Row(f"{label}, ratio {ratio:g}", method, ratio=ratio)
        for at, label, method in (
            (SQUARES_AT, "IW", "maxsquare-iw"),
            (ENTROPY_AT, "IW entropy", "entropy-iw"),
        )
        for ratio in RATIOS
    }
    equal_time = 1 / ADVERSARIAL_COST[task]
    added |= {
        GLOBAL_WEIGHTS: Row("global weights", GLOBAL_WEIGHTS),
        f"{GLOBAL_WEIGHTS}-ratio1": Row("global weights, ratio 1", GLOBAL_WEIGHTS, ratio=1.0),
        ADVERSARIAL: Row("discriminator", ADVERSARIAL),
        f"{ADVERSARIAL}-equal-time": Row(
            "discriminator, equal time", ADVERSARIAL, length=equal_time
        ),
    }
    added |= {
        f"{name}-longer": ablation.ROWS[name]._replace(
            label=f"{ablation.ROWS[name].label}, {LONGER:g}x the steps", length=LONGER, only=1
        )
        for name in (CONTROL, "maxsquare", "maxsquare-iw", ablation.FULL)
    }
    return ablation.ROWS | {name: row for name, row in added.items() if name not in ablation.ROWS}


@dataclass(frozen=True)
class Options(grid.Options):
    """Look at classes by their frequency, at other ratios, baselines, and longer training."""


def main(arguments: Sequence[str] | None = None) -> int:
    return grid.main(run, Options, arguments)


def run(options: Options, console: Console) -> None:
    started_with, finished = grid.finish(rows(options.task), options, console)
    classes = options.folder / "classes.json"
    if not options.summary_only:
        outputs.write_json(classes, describe_classes(grid.make_task(options), options.folder))
    elif not classes.is_file():
        raise UserError(f"{classes} is missing: make it without --summary-only.")
    described = grid.read(classes, ("shares", "received"), "make it again without --summary-only")
    write(summarize(started_with, finished, options, described), options.out, console)


# What the classes are, and the weights that they receive


def describe_classes(task: grid.Task, folder: Path) -> dict[str, Any]:
    """The share of each class in the target's labels, and the weights of its pixels.

    received: for every ratio and way to count, the mean weight of the pixels of each class under
    the source model with target statistics (seed 0), in units of the mean over all pixels.
    """
    source = checkpoint.load(folder / "seed0-source.pt")
    predictions = [*task.predictions(task.target_statistics(source, 0))]
    classes = predictions[0][0].shape[1]
    shares = class_shares((labels for _, labels in predictions), classes)
    return {
        "shares": shares.tolist(),
        "received": [
            {
                "ratio": ratio,
                "counted": counted,
                "weights": received(predictions, ratio, counted).tolist(),
            }
            for ratio in RATIOS
            for counted in COUNTED
        ],
    }


def received(
    predictions: Iterable[tuple[torch.Tensor, torch.Tensor]], ratio: float, counted: str
) -> torch.Tensor:
    """The mean weight of the pixels of each class, (C,); counted: one of `COUNTED`."""
    total = pixels = torch.zeros(())
    for logits, labels in predictions:
        classes = logits.shape[1]
        truth = F.one_hot(labels.clamp(min=0), classes).movedim(3, 1).float()
        z = truth if counted == "truth" else upsample(logits, labels.shape[1:], align_corners=True)
        valid = labels >= 0
        if counted == "labels=":  # a class that is missing there has a weight out of proportion
            present = (truth * valid[:, None]).flatten(2).any(dim=2)
            valid &= present.gather(1, z.argmax(1).flatten(1)).view_as(labels)
        given = labels if counted == "labels=" else None
        weights = functional.image_weights(z, ratio=ratio, valid=valid, labels=given)
        total = total + labels[valid].bincount(weights[valid], minlength=classes)
        pixels = pixels + labels[valid].bincount(minlength=classes)
    return total / pixels / (total.sum() / pixels.sum())


# Summary


def summarize(
    started_with: Mapping[str, Any],
    finished: Finished,
    options: Options,
    described: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is reported, as the JSON file holds it."""
    settings, seeds = started_with["settings"], options.seeds
    names = [*finished[grid.Run(0, SOURCE_ONLY)]["per_class"]]
    shares = dict(zip(names, described["shares"], strict=True))
    thirds = thirds_of(shares)
    chosen = {
        name: [
            grid.choose(row, grid.runs_of(seed, name, row, settings["weights"]), finished)
            for seed in range(seeds)
        ]
        for name, row in rows(settings["task"]).items()
    }
    results = {name: [finished[run] for run in runs] for name, runs in chosen.items()}
    control = results[CONTROL]
    command = ["--task", settings["task"], "--seeds", str(seeds)]
    return {
        "question": QUESTION,
        "command": shlex.join(["python", "benchmarks/experiments/claims.py", *command]),
        **settings,
        "seeds": seeds,
        "environment": started_with["environment"],
        "shares": shares,
        "thirds": thirds,
        "received": [
            {
                **measured,
                "thirds": {
                    third: statistics.mean(
                        weight
                        for name, weight in zip(names, measured["weights"], strict=True)
                        if name in members
                    )
                    for third, members in thirds.items()
                },
            }
            for measured in described["received"]
        ],
        "rows": {
            name: {
                "label": row.label,
                "weights": [run.weight for run in chosen[name]],
                "scores": [result["score"] for result in results[name]],
                "at_every_weight": at_every_weight(name, row, settings["weights"], seeds, finished),
                "classes_predicted": statistics.mean(r["classes"] for r in results[name]),
                "gain": difference(
                    [r["score"] for r in results[name]], [r["score"] for r in control]
                ),
                "gain_of_thirds": gain_of_thirds(results[name], control, thirds),
                "gain_of_classes": {
                    c: statistics.mean(
                        iou(ours, c) - iou(theirs, c)
                        for ours, theirs in zip(results[name], control, strict=True)
                    )
                    for c in names
                },
            }
            for name, row in rows(settings["task"]).items()
        },
        "steps": [
            {
                "row": a,
                "against": b,
                "gain": difference(*([r["score"] for r in results[name]] for name in (a, b))),
                "gain_of_thirds": gain_of_thirds(results[a], results[b], thirds),
            }
            for a, b in STEPS
        ],
    }


def gain_of_thirds(
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    thirds: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, Any]]:
    return {
        third: difference(mean_iou(ours, members), mean_iou(theirs, members))
        for third, members in thirds.items()
    }


def at_every_weight(
    name: str, row: Row, weights: Sequence[float], seeds: int, finished: Finished
) -> dict[str, float]:
    """The mean score at each weight, and of the weights that two criteria choose without labels."""
    models = [
        [finished[run] for run in grid.runs_of(seed, name, row, weights)] for seed in range(seeds)
    ]
    chosen_by = {
        criterion: [max(of_seed, key=lambda model: model[criterion]) for of_seed in models]
        for criterion in CRITERIA
    }
    columns = {f"{same[0]['run'][2]:g}": same for same in zip(*models, strict=True)} | chosen_by
    return {
        column: statistics.mean(model["score"] for model in column_models)
        for column, column_models in columns.items()
    }


def thirds_of(shares: Mapping[str, float]) -> dict[str, list[str]]:
    """The classes that occur by their frequency, in three groups of equal size, or nearly."""
    ordered = sorted((name for name in shares if shares[name] > 0), key=lambda name: -shares[name])
    cuts = [round(len(ordered) * k / 3) for k in range(4)]
    return {
        third: ordered[first:last]
        for third, first, last in zip(THIRDS, cuts, cuts[1:], strict=False)
    }


def iou(result: Mapping[str, Any], name: str) -> float:
    """A class that neither occurs nor is predicted is no loss: 0 in every model."""
    return result["per_class"][name] or 0.0


def mean_iou(results: Sequence[Mapping[str, Any]], members: Sequence[str]) -> list[float]:
    return [statistics.mean(iou(result, name) for name in members) for result in results]


# Report


def write(summary: dict[str, Any], folder: Path, console: Console) -> None:
    stem = f"claims-{summary['task']}"
    save(summary, markdown(summary), folder, stem, console)
    plot(summary).savefig(folder / f"{stem}.png", dpi=130)


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables, with the explanations that they need."""
    task, environment = summary["task"], summary["environment"]
    rows_of_losses = [row for row in summary["rows"] if row in ablation.METHODS]
    of_ratios = [at[ratio] for at in (SQUARES_AT, ENTROPY_AT) for ratio in RATIOS]
    sections = [
        f"# {QUESTION}",
        f"`{summary['command']}`: {cases.name_of(environment)}.",
        "\n".join(f"- {name}: {text}" for name, text in summary["base"].items()),
        f"Seeds 0 to {summary['seeds'] - 1}; each takes the weight, of "
        f"{', '.join(f'{weight:g}' for weight in summary['weights'])}, as the ablation does: that "
        "of the highest information on unlabelled target training images or, with an information "
        "term, of low entropy at steady proportions. Gains are points of IoU over the source "
        "model that continued without a target loss, paired, with their 95% confidence interval "
        "(Student's t over seeds) and the seeds won.",
        "\n".join(
            f"- {third}: " + ", ".join(f"{c} ({summary['shares'][c]:.2%})" for c in members)
            for third, members in summary["thirds"].items()
        ),
        "## Rare and frequent classes",
        thirds_table(summary, rows_of_losses),
        "Differences of two rows, paired:",
        steps_table(summary),
        "## The ratio",
        thirds_table(summary, of_ratios),
        f"{summary['score']} at every weight, mean over seeds, and at the weights of the highest "
        "information and of low entropy at steady proportions:",
        weights_table(summary, of_ratios),
        "The mean weight of the pixels of a third under the source model with target statistics, "
        "in units of the mean over all pixels. Pixels are counted by their predicted class, as the "
        "losses do by themselves; by the labels, and looked up by the predicted class (the option "
        "`labels=`); or counted and looked up by the labels, as if the prediction were right. "
        "With the option, pixels whose predicted class is not in the labels of the image are left "
        "out.",
        received_table(summary),
        "## What a discriminator and global weights do",
        thirds_table(summary, baselines(task)),
        "## Longer",
        thirds_table(summary, [*longer(task)]),
    ]
    return "\n\n".join(sections) + "\n"


def baselines(task: str) -> list[str]:
    named = (GLOBAL_WEIGHTS, ADVERSARIAL)
    return ["maxsquare", "maxsquare-iw", *(name for name in rows(task) if name.startswith(named))]


def longer(task: str) -> list[str]:
    return [name for name, row in rows(task).items() if row.length == LONGER]


def thirds_table(summary: Mapping[str, Any], names: Sequence[str]) -> str:
    seeds = summary["seeds"]
    found = [(name, summary["rows"][name]) for name in names]
    return table(
        ("", "weights", summary["score"], "gain", *THIRDS, "classes predicted"),
        [
            (
                row["label"],
                ", ".join(f"{weight:g}" for weight in row["weights"] if weight) or "–",
                f"{statistics.mean(row['scores']):.1f}",
                *(compared(d, seeds) for d in (row["gain"], *row["gain_of_thirds"].values())),
                f"{row['classes_predicted']:.1f}",
            )
            for name, row in found
        ],
    )


def steps_table(summary: Mapping[str, Any]) -> str:
    label = {name: row["label"] for name, row in summary["rows"].items()}
    return table(
        ("", summary["score"], *THIRDS),
        [
            (
                f"{label[step['row']]} − {label[step['against']]}",
                *(
                    compared(d, summary["seeds"])
                    for d in (step["gain"], *step["gain_of_thirds"].values())
                ),
            )
            for step in summary["steps"]
        ],
    )


def weights_table(summary: Mapping[str, Any], names: Sequence[str]) -> str:
    found = [summary["rows"][name] for name in names]
    return table(
        ("", *found[0]["at_every_weight"]),
        [
            (row["label"], *(f"{score:.1f}" for score in row["at_every_weight"].values()))
            for row in found
        ],
    )


def received_table(summary: Mapping[str, Any]) -> str:
    return table(
        ("ratio", "counted by", *THIRDS),
        [
            (
                f"{measured['ratio']:g}",
                measured["counted"],
                *(f"{weight:.2f}" for weight in measured["thirds"].values()),
            )
            for measured in summary["received"]
            if measured["ratio"]
        ],
    )


# What the picture compares: a row, the row it is compared with, and the title.
PANELS = (
    ("maxsquare", CONTROL, "maximum squares − source, continued"),
    ("maxsquare-iw", "maxsquare", "image-wise − maximum squares"),
    (ADVERSARIAL, "maxsquare-iw", "discriminator − image-wise"),
)


def plot(summary: Mapping[str, Any]) -> Figure:
    """The gain of every class over the logarithm of its frequency."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    figure.suptitle(f"{summary['task']}, {cases.name_of(summary['environment'])}", fontsize=8)
    all_axes = figure.subplots(1, len(PANELS), sharex=True)
    for axes, (row, against, title) in zip(all_axes, PANELS, strict=True):
        ours, theirs = (summary["rows"][name]["gain_of_classes"] for name in (row, against))
        axes.axhline(0, color="0.7", linewidth=1)
        for name, share in summary["shares"].items():
            if share > 0:
                point = (100 * share, ours[name] - theirs[name])
                axes.plot(*point, "o", color=cases.COLORS[cases.OURS], markersize=4)
                # The names of the most frequent classes would reach into the next panel.
                side, offset = ("right", (-4, 2)) if share > 0.2 else ("left", (3, 2))
                axes.annotate(name, point, offset, textcoords="offset points", fontsize=6, ha=side)
        axes.set_xscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("pixels of the class (%)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("difference of IoU (points)", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
