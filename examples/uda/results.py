"""The results of a finished run: metrics.json, panel.png and the closing table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

from uda import plots
from uda.datasets import LabelSpace, SegmentationDataset, to_rgb
from uda.evaluation import Scores, predict
from uda.loading import build_network, open_watched
from uda.outputs import as_json, write_json
from uda.presets import PRESETS, Settings
from uda.report import entry, scores_table, versions, watched_table

PANEL_ROWS = 4
SOURCE_ONLY, CONTROL = "source only", "source"


def write_results(
    source_only: Mapping[str, Any],
    statistics: Mapping[str, Any] | None,
    adapted: Mapping[str, Mapping[str, Any]],
    space: LabelSpace,
    validation: SegmentationDataset | None,
    s: Settings,
    console: Console,
) -> None:
    """Report the last step of every stage, given their last states.

    Args:
        source_only: the source model.
        statistics: the same with BatchNorm statistics of the target; None: not measured.
        adapted: the adapted models by method, or by weight; "source" is the control, without a
            target loss.
        space: the classes.
        validation: labelled images of the target; None: it has no labels.
        s: the settings of the run.
        console: prints the table.
    """
    shown = shown_of(adapted, s)
    before = {SOURCE_ONLY: source_only}
    if statistics is not None:
        before["target statistics"] = statistics
    names = None if validation is None else space.names
    adaptations = {
        name: entry_of(state, names) | {"best": state["best"]} for name, state in adapted.items()
    }
    stages = {
        state["stage"]: state for state in (source_only, statistics, *adapted.values()) if state
    }
    metrics = {
        **{name.replace(" ", "_"): entry_of(state, names) for name, state in before.items()},
        **({"source_continued": adaptations[CONTROL]} if CONTROL in adapted else {}),
        "adapted": adaptations[shown],
        "seconds": {stage: state["seconds"] for stage, state in stages.items()},
        "settings": as_json(s),
        "versions": versions(),
    }
    if s.method == "all":
        metrics["methods"] = adaptations
    if len(s.target_weight) > 1:
        metrics["weights"] = adaptations
    if source_only["source_validation"]:
        metrics["source_validation"] = source_only["source_validation"]
    write_json(s.out / "metrics.json", metrics)
    write_panel(source_only, adapted[shown], space, validation, s)

    size = f"{s.target_size[1]}x{s.target_size[0]}"
    title = f"Target at {size}, after the last step ({s.method})"
    titles = {CONTROL: "source continued"}
    if len(adapted.keys() - {CONTROL}) == 1:
        titles = {shown: "adapted", **titles}
    columns = before | {titles.get(name, name): state for name, state in adapted.items()}
    if names is not None:
        scores = {name: Scores(state["confusion"], names) for name, state in columns.items()}
        console.print(scores_table(scores, title))
    console.print(watched_table({name: state["watched"] for name, state in columns.items()}, title))
    if len(s.target_weight) > 1:
        console.print(f"Of the highest {s.criterion}, and so adapted: {s.out / shown / 'last.pt'}")
    if s.evaluate_every < s.steps:  # else the last evaluation is the only one
        write_best(adapted, s, console)


def shown_of(adapted: Mapping[str, Mapping[str, Any]], s: Settings) -> str:
    """Which adaptation is shown in full: of several weights the one of the highest criterion."""
    if s.method in adapted:
        return s.method
    if s.method == "all":
        return PRESETS[s.preset].settings.method
    weights = adapted.keys() - {CONTROL}
    return max(sorted(weights), key=lambda name: adapted[name]["watched"][s.criterion])


def entry_of(state: Mapping[str, Any], names: tuple[str, ...] | None) -> dict[str, Any]:
    """What metrics.json says of the last evaluation of a stage."""
    scores = {} if names is None else entry(Scores(state["confusion"], names))
    return scores | state["watched"]


def write_best(adapted: Mapping[str, Mapping[str, Any]], s: Settings, console: Console) -> None:
    """Print the evaluations that best.pt was chosen from."""
    by_labels = s.select == "labels"
    reason = f"by {s.criterion}"
    if by_labels:
        reason = "on target labels, which a user does not have"
    console.print(f"Best evaluations, chosen {reason}:")
    for name, state in adapted.items():
        best = state["best"]
        found = f"mIoU {best['miou']:.1f}, " if "miou" in best else ""
        console.print(f"  {name}: {found}{s.criterion} {best[s.criterion]:.2f} at {best['step']}")


def write_panel(
    source_only: Mapping[str, Any],
    adapted: Mapping[str, Any],
    space: LabelSpace,
    validation: SegmentationDataset | None,
    s: Settings,
) -> None:
    """Some images with both models' predictions, and labels if there are any, as panel.png."""
    networks = []
    for state in (source_only, adapted):
        network = build_network(s).eval()
        network.load_state_dict(state["model"])
        networks.append(network)
    rows, images = [], validation or open_watched(s)
    for index in torch.linspace(0, len(images) - 1, PANEL_ROWS).long().unique().tolist():
        image, labels, _ = images[index]
        predictions = [
            predict(network, image[None], s.target_size, align_corners=s.corners)[0].argmax(dim=0)
            for network in networks
        ]
        maps = predictions if validation is None else [labels, *predictions]
        rows.append((to_rgb(image, s.normalize), *maps))
    titles = [title for title in plots.TITLES if validation or title != "ground truth"]
    plots.panel(rows, s.out / "panel.png", space=space, titles=titles)
