"""Where a target loss puts its gradient: over confidence, and over the classes of real images.

    python benchmarks/experiments/gradient_profiles.py   # the paper's Figure 1: seconds
    python benchmarks/experiments/gradient_profiles.py RUN/source-only/last.pt   # and Figure 2

Figure 1 shows the Tsallis entropies S_q of one pixel and their slopes. All curves show S_q itself,
so that they are comparable: S_1 is `EntropyLoss`, and S_2 is 1 + 2 `MaxSquareLoss`.

With a checkpoint of train_uda.py the script also measures its network on the target's validation
images, in evaluation mode and without flips:

- the share of a loss's gradient, with respect to the full-resolution logits, that the pixels of
  each class of the ground truth receive, under three losses. Shares are taken batch by batch, with
  the batch size of the checkpoint's run, and averaged over the images.
- the confidence of the network in a class against the IoU of that class: Figure 2. The confidence
  in class c is the mean of p_c over all pixels that are predicted as c, which needs no label.
"""

from __future__ import annotations

import csv
import itertools
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import torch
import tyro
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as Line
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox
from rich.console import Console
from rich.table import Table
from scipy.stats import linregress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset
from torchmetrics.classification import MulticlassConfusionMatrix

import cases
from maxsquare import (
    EntropyLoss,
    GradientProfile,
    IWMaxSquareLoss,
    MaxSquareLoss,
    TsallisEntropyLoss,
    class_gradient_share,
    gradient_profile,
)
from uda import report
from uda.datasets import LabelSpace, Sample, SegmentationDataset
from uda.errors import UserError
from uda.evaluation import Scores
from uda.loading import load_network, open_validation, validation_loader
from uda.presets import Settings

QUESTION = (
    "How does the gradient of a target loss depend on a pixel's confidence, and which classes "
    "receive it?"
)
# The shares do not depend on the scale of a loss.
LOSSES: dict[str, nn.Module] = {
    "entropy": EntropyLoss(),
    "maximum squares": MaxSquareLoss(),
    "image-wise maximum squares": IWMaxSquareLoss(ratio=0.2),
}
KNOWN_Q = {1.0: " (entropy)", 2.0: " (maximum squares)"}
TABLE_P = (0.6, 0.9, 0.99)

# Okabe and Ito's palette, which colour-blind readers can distinguish; each loss also has a shape.
MARKS = dict(zip(LOSSES, (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^")), strict=True))
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
BLUE = "#0072B2"
# Offsets of a name from its point, in points, and the alignment of each.
BESIDE = (((6, 0), "left"), ((-6, 0), "right"), ((0, 9), "center"), ((0, -9), "center"))
# Offsets at the end of a line, near ones first.
APART = [
    ((across if end == "left" else -across, up), end)
    for across, up in sorted(
        itertools.product((12, 24, 36, 48), (-54, -42, -30, -18, 18, 30, 42, 54)),
        key=lambda place: math.hypot(*place),
    )
    for end in ("left", "right")
]
# Distances from a name to other points, and from its line to their centres, in pixels.
NAME_DISTANCE, LINE_DISTANCE = 10, 5
# Any two points lie on a line.
POINTS_OF_A_FIT = 3
NO_FIT = "too few different points for a fit"
DPI = 130


@dataclass(frozen=True)
class Options:
    """Plot the gradient of the losses over confidence and, for a trained network, over classes."""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """A checkpoint of train_uda.py, preferably of a source model; default: Figure 1 only."""
    data_root: Path | None = None
    """Folder that holds the data sets; default: that of the checkpoint's run."""
    network: str | None = None
    """package.module:factory of a network of your own, if the checkpoint belongs to one."""
    images: int | None = None
    """Number of validation images, spread evenly over all of them; default: all."""
    q: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0)
    """Members of the Tsallis family in Figure 1."""
    classes: int = 2
    """Number of classes in Figure 1; the classes that are not shown share the rest evenly."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network computes; "auto" takes a GPU if there is one."""
    out: Path = cases.RESULTS
    """Folder for figures and numbers."""


class Measured(NamedTuple):
    """The predictions of a network on the target; tensors (C,), float64.

    predicted: pixels predicted as each class. certainty: mean probability of the class on these
    pixels, NaN if there are none. shares: by loss, the share of the gradient of each class.
    """

    scores: Scores
    predicted: Tensor
    certainty: Tensor
    shares: dict[str, Tensor]


class Fit(NamedTuple):
    """IoU = intercept + slope * probability by least squares, both in percent; Pearson's r.

    p_value: two-sided, of the hypothesis that there is no correlation. n: classes.
    """

    slope: float
    intercept: float
    r: float
    p_value: float
    n: int

    def __str__(self) -> str:
        return f"r = {self.r:.2f} (p = {self.p_value:.2g}, n = {self.n} classes)"


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    return report.exit_code(lambda: run(report.command_line(Options, arguments), given, Console()))


def run(options: Options, given: Sequence[str], console: Console) -> None:
    # Find mistakes before anything is computed or written.
    profiles = profile(options.q, options.classes)
    if options.checkpoint is None and (options.data_root or options.images is not None):
        raise UserError("--data-root and --images belong to a checkpoint: name one.")
    opened = options.checkpoint and open_checkpoint(options.checkpoint, options)
    device = cases.resolve_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)

    record = {
        "question": QUESTION,
        "command": shlex.join(["python", "benchmarks/experiments/gradient_profiles.py", *given]),
        "environment": report.versions() | cases.environment(device),
    }
    console.print(QUESTION)
    console.print(profile_table(profiles, options.classes))
    save(
        options.out / "gradient-profiles",
        plot_profiles(profiles, options.classes),
        profile_rows(profiles),
        record | {"q": options.q, "classes": options.classes},
    )
    if opened:
        network, images, space, s = opened
        loader = validation_loader(images, s)
        with report.progress_bar(console) as progress:
            task = progress.add_task("measuring", total=len(images), note="")
            measured = measure(
                network.to(device),
                loader,
                space,
                align_corners=s.corners,
                device=device,
                on_progress=lambda count: progress.advance(task, count),
            )
        fit = fit_line(measured)
        record |= {
            "checkpoint": str(options.checkpoint),
            "images": len(images),
            "batch_size": s.batch_size,
            "size": s.target_size,
            "miou_percent": measured.scores.miou,
        }
        save(
            options.out / "class-gradient-share",
            plot_shares(measured),
            share_rows(measured),
            record,
        )
        save(
            options.out / "probability-iou",
            plot_certainty(measured, fit),
            certainty_rows(measured),
            record | {"fit": fit and fit._asdict()},
        )
        console.print(share_table(measured))
        console.print(f"Mean probability against IoU: {fit or NO_FIT}.")
    console.print(f"Figures and numbers: {options.out}/*.svg, .png, .csv, .json", soft_wrap=True)


# Figure 1: over confidence


def profile(qs: Sequence[float], classes: int) -> dict[float, GradientProfile]:
    """S_q and its slopes for each q, in ascending order."""
    if not qs:
        raise UserError("--q names no member of the family: give one number or more.")
    if min(qs) <= 0 or not all(map(math.isfinite, qs)):
        raise UserError(f"--q must be numbers above 0, not {' '.join(map(str, qs))}.")
    if classes < 2:
        raise UserError(f"--classes must be at least 2, not {classes}.")
    return {q: gradient_profile(TsallisEntropyLoss(q), classes=classes) for q in sorted(qs)}


def profile_rows(profiles: Mapping[float, GradientProfile]) -> list[dict[str, Any]]:
    names = ("p", "S_q", "dS_q/dp", "dS_q/dlogit")
    return [
        {"q": q} | dict(zip(names, point, strict=True))
        for q, curves in profiles.items()
        for point in zip(*(curve.tolist() for curve in curves), strict=True)
    ]


def profile_table(qs: Iterable[float], classes: int) -> Table:
    """The slopes of an uncertain and of a certain pixel."""
    title = f"Slopes of S_q with respect to p and to the logit z, {classes} classes"
    table = Table("q", title=title, title_justify="left")
    for variable in "pz":
        for p in TABLE_P:
            table.add_column(f"dS/d{variable}\np = {p:g}", justify="right")
    for q in qs:
        curves = gradient_profile(TsallisEntropyLoss(q), TABLE_P, classes)
        slopes = torch.cat([curves.slope_p, curves.slope_logit])
        table.add_row(f"{q:g}", *(f"{slope:.3g}" for slope in slopes.tolist()))
    return table


def plot_profiles(profiles: Mapping[float, GradientProfile], classes: int) -> Figure:
    """Value, slope with respect to p and slope with respect to the logit, side by side."""
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    panels = {
        "value": "value $S_q$",
        "slope_p": r"slope with respect to $p$, $\partial S_q/\partial p$",
        "slope_logit": r"slope with respect to the logit, $\partial S_q/\partial z$",
    }
    # From dark to light, so that the order of q shows in greyscale.
    shades = torch.linspace(0, 0.85, len(profiles)).tolist()
    for axes, (field, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.axhline(0, color="0.8", linewidth=0.8)
        for i, (q, curves) in enumerate(profiles.items()):
            axes.plot(
                curves.p,
                getattr(curves, field),
                label=f"q = {q:g}{KNOWN_Q.get(q, '')}",
                color=colormaps["viridis"](shades[i]),
                linestyle=LINES[i % len(LINES)],
                linewidth=2.4 if q in KNOWN_Q else 1.6,
            )
        axes.set_title(title, size=9.5)
        axes.set_xlabel("probability $p$ of one class")
        axes.set_xlim(0, 1)
    figure.axes[0].set_ylabel("dimensionless ($q$ = 1: nats)")
    figure.suptitle(
        rf"Tsallis entropy $S_q = (1 - \sum_c p_c^q)\,/\,(q - 1)$ of one pixel, {classes} classes;"
        " not rescaled: $S_2$ = 1 + 2 × maximum squares",
        size=9.5,
    )
    legend = figure.axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=5, frameon=False, handlelength=3)
    return figure


# Figure 2 and the shares: over the classes of the target


def open_checkpoint(
    path: Path, options: Options
) -> tuple[nn.Module, Subset[Sample], LabelSpace, Settings]:
    """The network, its validation images, their classes, and the settings of its run."""
    if options.images is not None and options.images < 1:
        raise UserError(f"--images must be at least 1, not {options.images}.")
    network, s = load_network(path, data_root=options.data_root, network=options.network)
    if s.data_root is None:
        raise UserError("The checkpoint does not say where its data are: give --data-root.")
    validation = open_validation(s)
    return network, spread(validation, options.images), validation.space, s


def spread(dataset: SegmentationDataset, images: int | None) -> Subset[Sample]:
    """So many images, evenly spaced because neighbours show the same city; None: all."""
    count = len(dataset) if images is None else min(images, len(dataset))
    return Subset(dataset, [i * len(dataset) // count for i in range(count)])


@torch.no_grad()
def measure(
    network: nn.Module,
    loader: Iterable[Sample],
    space: LabelSpace,
    *,
    align_corners: bool = True,
    device: str = "cpu",
    on_progress: Callable[[int], object] = lambda images: None,
) -> Measured:
    """One pass over labelled images: scores, certainty and shares of every class."""
    classes = len(space)
    matrix = MulticlassConfusionMatrix(classes, ignore_index=-1)
    predicted = torch.zeros(classes, dtype=torch.float64)
    probability = torch.zeros_like(predicted)
    shares = {name: torch.zeros_like(predicted) for name in LOSSES}
    network.eval()
    for images, labels, _ in loader:
        how = {"size": tuple(labels.shape[-2:]), "align_corners": align_corners}
        logits, _ = network(images.to(device))
        full = F.interpolate(logits, mode="bilinear", **how)
        largest, prediction = (x.cpu() for x in full.softmax(dim=1).max(dim=1))
        matrix.update(prediction, labels)
        prediction, largest = prediction.flatten(), largest.flatten().double()
        predicted += prediction.bincount(minlength=classes)
        probability += prediction.bincount(largest, minlength=classes)
        for name, loss in LOSSES.items():
            share = class_gradient_share(loss, logits, labels.to(device), **how)
            # The last batch may be smaller, but every image has the same weight.
            shares[name] += len(images) * share.cpu()
        on_progress(len(images))
    if not matrix.confmat.any():
        raise UserError("The images hold no labelled pixel: no class can be told.")
    # A batch without any gradient has no shares to count.
    shares = {name: share / share.sum() for name, share in shares.items()}
    return Measured(
        Scores(matrix.compute(), space.names), predicted, probability / predicted, shares
    )


def labelled(measured: Measured) -> Tensor:
    """Pixels of each class in the ground truth."""
    return measured.scores.confusion.sum(dim=1)


def share_rows(measured: Measured) -> list[dict[str, Any]]:
    pixels = labelled(measured) / labelled(measured).sum()
    return [
        {
            "class": name,
            "iou_percent": iou,
            "pixels_percent": 100 * pixels[c].item(),
            **{share_column(loss): 100 * s[c].item() for loss, s in measured.shares.items()},
        }
        for c, (name, iou) in enumerate(measured.scores.per_class.items())
    ]


def share_column(loss: str) -> str:
    return f"{loss.replace(' ', '_')}_gradient_percent"


def share_table(measured: Measured) -> Table:
    title = "Percent: IoU, pixels in the ground truth, and the gradient they receive under"
    table = Table("class", title=title, title_justify="left")
    for column in ("IoU", "pixels", *LOSSES):
        table.add_column(column, justify="right")
    for row in share_rows(measured):
        name, *values = row.values()
        table.add_row(name, *("-" if value is None else f"{value:.2f}" for value in values))
    return table


def plot_shares(measured: Measured) -> Figure:
    """Dots for the shares on a log scale beside the share of pixels, and bars of IoU."""
    rows = [row for row in share_rows(measured) if row["pixels_percent"] > 0]
    rows.sort(key=lambda row: row["iou_percent"])
    pixels, ious = ([row[name] for row in rows] for name in ("pixels_percent", "iou_percent"))
    lines = range(len(rows))
    figure = Figure(figsize=(9, 1.6 + 0.27 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left.scatter(pixels, lines, marker="|", s=240, color="0.35", linewidths=2.2, label="pixels")
    for (loss, (color, marker)), dodge in zip(MARKS.items(), (0.26, 0, -0.26), strict=True):
        values = [row[share_column(loss)] for row in rows]
        places = [line + dodge for line in lines]
        left.scatter(values, places, marker=marker, s=24, color=color, label=loss)
    left.set(xscale="log", xlabel="share of the labelled pixels, and of their gradient (%)")
    left.set_yticks(lines, [row["class"] for row in rows])
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_locator(NullLocator())
    left.grid(axis="x", color="0.9", linewidth=0.8)
    left.set_axisbelow(True)
    for axes in (left, right):
        for line in lines[::2]:
            axes.axhspan(line - 0.5, line + 0.5, color="0.96", zorder=0)
        axes.set_ylim(-0.5, len(rows) - 0.5)
    bars = right.barh(lines, ious, color="0.7")
    right.bar_label(bars, fmt="{:.0f}", padding=3, size=8.5)
    right.set(xlabel="IoU (%)", xlim=(0, 112))
    classes = len(measured.predicted)
    absent = classes - len(rows)
    figure.suptitle(
        "Gradient of the target loss that each class of the ground truth receives"
        + (f" (without {absent} of {classes}, which do not occur)" if absent else ""),
        size=10,
    )
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def pointed(measured: Measured) -> list[int]:
    """The classes with a point in Figure 2: predicted at least once, and in the ground truth."""
    return torch.nonzero((measured.predicted > 0) & (labelled(measured) > 0)).flatten().tolist()


def points(measured: Measured) -> tuple[list[float], list[float]]:
    """Mean probability and IoU of those classes, in percent."""
    ious = [*measured.scores.per_class.values()]
    chosen = pointed(measured)
    return (100 * measured.certainty[chosen]).tolist(), [ious[c] for c in chosen]


def fit_line(measured: Measured) -> Fit | None:
    """The line through the points; None where they do not determine it or its correlation."""
    x, y = points(measured)
    if len(x) < POINTS_OF_A_FIT or min(x) == max(x) or min(y) == max(y):
        return None
    line = linregress(x, y)
    numbers = (line.slope, line.intercept, line.rvalue, line.pvalue)
    return Fit(*map(float, numbers), n=len(x))


def certainty_rows(measured: Measured) -> list[dict[str, Any]]:
    return [
        {
            "class": name,
            "mean_probability_percent": None if pixels == 0 else 100 * certainty,
            "iou_percent": iou,
            "predicted_pixels": int(pixels),
            "labelled_pixels": truth,
        }
        for (name, iou), pixels, certainty, truth in zip(
            measured.scores.per_class.items(),
            measured.predicted.tolist(),
            measured.certainty.tolist(),
            labelled(measured).tolist(),
            strict=True,
        )
    ]


def plot_certainty(measured: Measured, fit: Fit | None) -> Figure:
    """A named point for each class, and the line through them."""
    x, y = points(measured)
    names = [measured.scores.names[c] for c in pointed(measured)]
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.subplots()
    if fit:
        ends = [min(x), max(x)]
        axes.plot(ends, [fit.intercept + fit.slope * end for end in ends], color="0.7", zorder=1)
        # Leave room for names below the lowest point, but not for a line that goes far below 0.
        axes.set_ylim(min(y) - 0.1 * max(y), 1.1 * max(y))
    # White edges separate overlapping points.
    axes.scatter(x, y, color=BLUE, s=30, zorder=2, edgecolors="white", linewidths=0.6)
    axes.set(
        xlabel="mean probability of the class on the pixels predicted as it (%)", ylabel="IoU (%)"
    )
    axes.margins(0.08)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    classes = len(measured.predicted)
    left_out = classes - len(x)
    axes.set_title(
        f"Mean probability and IoU of the target's classes: {fit or NO_FIT}"
        + (
            f"\n{left_out} of {classes} classes have no point: never predicted, or absent"
            if left_out
            else ""
        ),
        size=10,
    )
    name_points(axes, x, y, names)
    return figure


def name_points(axes: Axes, x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> None:
    """Write each name beside its point or, where that is occupied, farther away with a line."""
    axes.figure.draw_without_rendering()  # texts can be measured only after the layout
    centers = [(*axes.transData.transform(point),) for point in zip(x, y, strict=True)]
    written: list[Bbox] = []
    lines: list[Line] = []

    def flaws(box: Bbox, line: Line) -> int:
        others = [Bbox([center, center]) for center in centers if center != (*line.vertices[0],)]
        near_line = [*written, *(other.padded(LINE_DISTANCE) for other in others)]
        return (
            sum(not axes.bbox.contains(*corner) for corner in box.corners())
            + box.padded(NAME_DISTANCE).count_overlaps(others)
            + box.count_overlaps(written)
            + sum(other.intersects_bbox(box) for other in lines)
            + sum(line.intersects_bbox(other) for other in near_line)
            + sum(line.intersects_path(other) for other in lines)
        )

    for *point, name, center in zip(x, y, names, centers, strict=True):
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", size=8.5, va="center")
        tried = []
        for place, end in (*BESIDE, *APART):
            text.set(position=place, ha=end)
            box = text.get_window_extent()
            nearest = min(max(center[0], box.x0), box.x1), (box.y0 + box.y1) / 2
            tried.append((place, end, box, Line([center, nearest])))
        place, end, box, line = min(tried, key=lambda found: flaws(*found[2:]))
        text.set(position=place, ha=end)
        written.append(box)
        lines.append(line)
        if (place, end) in APART:
            leader = {
                "arrowstyle": "-",
                "color": "0.3",
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
            }
            axes.annotate("", point, place, textcoords="offset points", arrowprops=leader)


# Writing


def save(
    stem: Path, figure: Figure, rows: Sequence[Mapping[str, Any]], record: dict[str, Any]
) -> None:
    """Write a figure, its numbers and their record; figure and numbers are reproducible."""
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(stem.with_suffix(".png"), dpi=DPI)
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    cases.save_json(record, stem.with_suffix(".json"))


if __name__ == "__main__":
    sys.exit(main())
