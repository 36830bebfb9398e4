"""Paired differences over seeds, and how reports write and draw them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console
from rich.markdown import Markdown
from scipy.stats import ttest_rel

import cases


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


def mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


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


def save(summary: dict[str, Any], text: str, folder: Path, stem: str, console: Console) -> None:
    """Print the tables, and write them and everything that they are made of."""
    console.print(Markdown(text))
    folder.mkdir(parents=True, exist_ok=True)
    cases.save_json(summary, folder / f"{stem}.json")
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    console.print(f"Tables and plot: {folder / stem}.*", soft_wrap=True)
