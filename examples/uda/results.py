"""What a finished run leaves behind: metrics.json, panel.png and the closing table."""

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


def write_results(
    source_only: Mapping[str, Any],
    adapted: Mapping[str, Mapping[str, Any]],
    validation: SegmentationDataset,
    s: Settings,
    console: Console,
) -> None:
    """Report the last step of every stage, given the states that `train` returned."""
    names = validation.space.names
    # Of several methods, the one shown in full is the preset's own.
    shown = s.method if s.method in adapted else PRESETS[s.preset].settings.method
    before = Scores(source_only["confusion"], names)
    after = {method: Scores(state["confusion"], names) for method, state in adapted.items()}
    methods = {
        method: entry(scores) | {"best": adapted[method]["best"]}
        for method, scores in after.items()
    }
    stages = {source_only["stage"]: source_only, **adapted}
    metrics = {
        "source_only": entry(before),
        "adapted": methods[shown],
        "methods": methods,
        "seconds": {stage: state["seconds"] for stage, state in stages.items()},
        "settings": as_json(s),
        "versions": versions(),
    }
    if len(methods) == 1:
        del metrics["methods"]
    write_json(s.out / "metrics.json", metrics)
    write_panel(source_only, adapted[shown], validation, s)

    title = f"Target validation at {s.target_size[1]}x{s.target_size[0]}, after the last step"
    console.print(scores_table({"source only": before, **after}, title))
    console.print("Best evaluations, chosen on target labels that a user does not have:")
    for method, state in adapted.items():
        console.print(f"  {method}: mIoU {state['best']['miou']:.1f} at {state['best']['step']}")


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
            predict(network, image[None], s.target_size)[0].argmax(dim=0) for network in networks
        )
        rows.append((to_rgb(image), labels, before, after))
    plots.panel(rows, s.out / "panel.png", space=validation.space)
