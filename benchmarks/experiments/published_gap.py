"""How a re-implementation from the paper alone differs from the published code, and by how much.

    python benchmarks/experiments/published_gap.py  # half an hour on a quiet core
    python benchmarks/experiments/published_gap.py --seeds 0  # the optimiser alone: a minute

The arithmetic of the optimiser is that of the full-size runs. The scores come from a small network
on handwritten digits (the ablation's task): they show the direction of a difference there, not how
many points it is worth on Cityscapes. Each row changes one part of the published procedure, in the
source stage and in the adaptation; the ablation chose the target weight.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

import cases
from digits import Digits
from tables import compared, difference, table
from uda import report
from uda.adaptation import (
    REPEATS,
    BackboneUpdates,
    RepeatedSGD,
    parameter_groups,
    poly_lr,
    set_learning_rate,
)
from uda.errors import UserError
from uda.presets import PRESETS

QUESTION = "How does a re-implementation from the paper alone differ from the published code?"
METHOD = "maxsquare-iw"
TARGET_WEIGHT = 12.5
RESULT = "published-gap.md"


class Row(NamedTuple):
    """A procedure of both stages."""

    label: str
    updates: BackboneUpdates = "torch-1.0"
    lr_multiple: float = 1.0
    both_heads: bool = False


PUBLISHED, *CHANGED = (
    Row("as published"),
    Row("optimiser of today's torch, same list", updates="duplicated"),
    Row("every tensor updated once", updates="once"),
    Row("once, with three times the backbone's rate", updates="once", lr_multiple=3.0),
    Row("source model trained with both heads", both_heads=True),
)


@dataclass(frozen=True)
class Options:
    """Measure what the undocumented parts of the published procedure change."""

    seeds: int = 5
    """Number of seeds of the runs on digits; 0: no runs."""
    source_steps: int = Digits.source_steps
    """Optimiser steps of a source model of digits."""
    steps: int = Digits.steps
    """Optimiser steps of an adaptation on digits."""
    out: Path = cases.RESULTS
    """Folder for the tables."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    return report.exit_code(lambda: run(report.command_line(Options, arguments), given, Console()))


def run(options: Options, given: Sequence[str], console: Console) -> None:
    if options.seeds == 1 or min(options.seeds, options.source_steps, options.steps) < 0:
        raise UserError("--seeds must be 0 or at least 2, and no number of steps negative.")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/experiments/published_gap.py", *given])
    environment = cases.name_of(cases.environment("cpu"))
    sections = [f"# {QUESTION}", f"`{command}`: {environment}.", *optimiser_sections()]
    if options.seeds:
        task = Digits(source_steps=options.source_steps, steps=options.steps)
        task.prepare(lambda done, of: None)
        scores: dict[Row, list[tuple[float, float]]] = {row: [] for row in (PUBLISHED, *CHANGED)}
        with report.progress_bar(console) as progress:
            bar = progress.add_task("digits", total=options.seeds * len(scores), note="")
            for seed in range(options.seeds):
                for row, values in scores.items():
                    values.append(source_and_adapted(task, seed, row))
                    progress.advance(bar)
        sections += digits_sections(task, scores)
    text = "\n\n".join(sections) + "\n"
    console.print(Markdown(text))
    (options.out / RESULT).write_text(text, encoding="utf-8")
    console.print(f"Tables: {options.out / RESULT}", soft_wrap=True)


def optimiser_sections() -> Iterator[str]:
    """Length of the first step and decay over a stage, for tensors listed three and four times."""
    s = PRESETS["gta5-cityscapes/source"].settings
    rows = []
    for updates in REPEATS:
        moved = train(updates, start=0.0, gradient=-1.0)
        left = train(
            updates,
            start=1.0,
            gradient=0.0,
            steps=s.source_steps,
            horizon=s.source_horizon,
            lr=s.source_lr,
            weight_decay=s.weight_decay,
        )
        cells = (*(f"{x:.2f}" for x in moved), *(f"{1 - x:.0%}" for x in left))
        rows.append((f"`{updates}`", *cells))
    yield "## The optimiser, exactly"
    yield (
        "First step in units of learning rate times gradient, and by how much weight decay alone "
        f"shrinks a weight over the published source stage ({s.source_steps:,} steps of a "
        f"{s.source_horizon:,} horizon, without any gradient)."
    )
    header = ("updates", "first step", "of a shortcut", "shrinks by", "a shortcut by")
    yield table(header, rows)


def train(
    updates: BackboneUpdates,
    *,
    start: float,
    gradient: float,
    steps: int = 1,
    horizon: int = 1,
    lr: float = 1.0,
    weight_decay: float = 0.0,
) -> list[float]:
    """A weight of a stage and a weight of a shortcut after steps under a constant gradient."""
    layers = {name: nn.Linear(1, 1, bias=False) for name in ("conv1", "downsample")}
    model = nn.ModuleDict({"layer1": nn.ModuleDict(layers)}).double()
    groups = parameter_groups(model, lr, backbone_updates=updates)
    optimizer = RepeatedSGD(groups, momentum=0.9, weight_decay=weight_decay)
    for parameter in model.parameters():
        nn.init.constant_(parameter, start)
    for step in range(steps):
        set_learning_rate(optimizer, poly_lr(step, horizon, lr))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return [parameter.item() for parameter in model.parameters()]


def source_and_adapted(task: Digits, seed: int, row: Row) -> tuple[float, float]:
    """Target mIoU before and after adaptation."""
    source = task.train_source(
        seed, updates=row.updates, lr_multiple=row.lr_multiple, both_heads=row.both_heads
    )
    adapted = task.adapt(
        source, seed, METHOD, TARGET_WEIGHT, updates=row.updates, lr_multiple=row.lr_multiple
    )
    return task.score(source)[0], task.score(adapted)[0]


def digits_sections(task: Digits, scores: dict[Row, list[tuple[float, float]]]) -> Iterator[str]:
    yield "## Handwritten digits, a simulation in small"
    yield "\n".join(f"- {name}: {text}" for name, text in task.base.items())
    yield (
        f"Target mIoU (%) over seeds, `{METHOD}` with weight {TARGET_WEIGHT:g}; differences are "
        "paired by seed, with 95% confidence intervals (Student's t) and the seeds won."
    )
    columns = {row: tuple(zip(*values, strict=True)) for row, values in scores.items()}
    rows = []
    for row, stages in columns.items():
        cells = []
        for values, published in zip(stages, columns[PUBLISHED], strict=True):
            cells.append(f"{statistics.mean(values):.1f}")
            less = None if row == PUBLISHED else difference(values, published)
            cells.append(compared(less, len(values)))
        rows.append((row.label, *cells))
    header = ("", "source only", "less as published", "adapted", "less as published")
    yield table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
