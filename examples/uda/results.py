"""The results of a finished run: metrics.json, panel.png and the closing table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

from uda import plots
from uda.datasets import SegmentationDataset, to_rgb
from uda.evaluation import Scores, predict
from uda.loading import build_network
from uda.outputs import as_json, write_json
from uda.presets import PRESETS, Settings
from uda.report import entry, scores_table, versions

PANEL_ROWS = 4
SOURCE_ONLY, CONTROL = "source only", "source"


def write_results(
    source_only: Mapping[str, Any],
    statistics: Mapping[str, Any] | None,
    adapted: Mapping[str, Mapping[str, Any]],
    validation: SegmentationDataset,
    s: Settings,
    console: Console,
) -> None:
    """Report the last step of every stage, given their last states.

    Args:
        source_only: the source model.
        statistics: the same with BatchNorm statistics of the target; None: not measured.
        adapted: the adapted model by method; "source" is the control, without a target loss.
        validation: images of the target.
        s: the settings of the run.
        console: prints the table.
    """
    names = validation.space.names
    # Of several methods, the preset's own is shown in full.
    shown = s.method if s.method in adapted else PRESETS[s.preset].settings.method
    before = {SOURCE_ONLY: Scores(source_only["confusion"], names)}
    if statistics is not None:
        before["target statistics"] = Scores(statistics["confusion"], names)
    after = {method: Scores(state["confusion"], names) for method, state in adapted.items()}
    methods = {
        method: entry(scores) | {"best": adapted[method]["best"]}
        for method, scores in after.items()
    }
    stages = {
        state["stage"]: state for state in (source_only, statistics, *adapted.values()) if state
    }
    metrics = {
        **{name.replace(" ", "_"): entry(scores) for name, scores in before.items()},
        **({"source_continued": methods[CONTROL]} if CONTROL in methods else {}),
        "adapted": methods[shown],
        "methods": methods,
        "seconds": {stage: state["seconds"] for stage, state in stages.items()},
        "settings": as_json(s),
        "versions": versions(),
    }
    if source_only["source_validation"]:
        metrics["source_validation"] = source_only["source_validation"]
    if s.method != "all":
        del metrics["methods"]
    write_json(s.out / "metrics.json", metrics)
    write_panel(source_only, adapted[shown], validation, s)

    size = f"{s.target_size[1]}x{s.target_size[0]}"
    title = f"Target validation at {size}, after the last step ({s.method})"
    titles = {CONTROL: "source continued"}
    if len(after.keys() - {CONTROL}) == 1:
        titles = {shown: "adapted", **titles}
    columns = {titles.get(method, method): scores for method, scores in after.items()}
    console.print(scores_table(before | columns, title))
    if s.evaluate_every < s.steps:  # else the last evaluation is the only one
        console.print("Best evaluations, chosen on target labels, which a user does not have:")
        for method, state in adapted.items():
            best = state["best"]
            console.print(f"  {method}: mIoU {best['miou']:.1f} at {best['step']}")


def write_panel(
    source_only: Mapping[str, Any],
    adapted: Mapping[str, Any],
    validation: SegmentationDataset,
    s: Settings,
) -> None:
    """Some validation images with their labels and both models' predictions, as panel.png."""
    networks = []
    for state in (source_only, adapted):
        network = build_network(s).eval()
        network.load_state_dict(state["model"])
        networks.append(network)
    rows = []
    for index in torch.linspace(0, len(validation) - 1, PANEL_ROWS).long().unique().tolist():
        image, labels, _ = validation[index]
        before, after = (
            predict(network, image[None], s.target_size, align_corners=s.corners)[0].argmax(dim=0)
            for network in networks
        )
        rows.append((to_rgb(image, s.normalize), labels, before, after))
    plots.panel(rows, s.out / "panel.png", space=validation.space)
