"""What the benchmarks share: cases, their inputs, the competitors, and the machine's name."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import baselines
from maxsquare import (
    InformationMaximizationLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelLoss,
    functional,
)
from uda.errors import UserError

RESULTS = Path(__file__).parent / "results"

OURS = "maxsquare"
PUBLISHED = "published code"
PLAIN = "plain PyTorch"
COMPILED = "torch.compile"
CROSS_ENTROPY = "F.cross_entropy"
ALONE = "maxsquare, maximum squares alone"
OURS_COMPILED = "maxsquare, torch.compile"

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    OURS: "#0072B2",
    ALONE: "#56B4E9",
    OURS_COMPILED: "#F0E442",
    CROSS_ENTROPY: "#009E73",
    COMPILED: "#E69F00",
    PLAIN: "#CC79A7",
    PUBLISHED: "#D55E00",
}

LossName = Literal["max_square", "iw_max_square", "information", "multi_level", "cross_entropy"]
LOSSES: dict[LossName, dict[str, Callable[..., Tensor]]] = {
    "max_square": {
        OURS: MaxSquareLoss(scale="reference"),
        PUBLISHED: baselines.published_max_square,
        PLAIN: baselines.plain_max_square,
    },
    "iw_max_square": {
        OURS: IWMaxSquareLoss(scale="reference"),
        ALONE: MaxSquareLoss(scale="reference"),
        PUBLISHED: baselines.published_iw_max_square,
        PLAIN: baselines.plain_iw_max_square,
    },
    "information": {
        OURS: InformationMaximizationLoss(MaxSquareLoss(scale="reference")),
        ALONE: MaxSquareLoss(scale="reference"),
        PLAIN: baselines.plain_information,
    },
    "multi_level": {
        OURS: MultiLevelLoss(IWMaxSquareLoss(scale="reference")),
        PUBLISHED: baselines.published_multi_level,
        PLAIN: baselines.plain_multi_level,
    },
    "cross_entropy": {OURS: functional.cross_entropy},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STRIDE = 8  # of a network whose logits are to be upsampled


class Case(NamedTuple):
    """One problem: a loss of logits (batch, classes, height, 2 height), as a street is seen.

    upsampled: the network gives an eighth of that resolution, and the upsampling is part of
        what is measured.
    """

    loss: LossName
    classes: int
    height: int
    batch: int = 1
    dtype: str = "float32"
    upsampled: bool = False
    device: str = "cpu"

    @property
    def size(self) -> tuple[int, int]:
        return self.height, 2 * self.height

    @property
    def given_size(self) -> tuple[int, int]:
        """Resolution of the logits that are given."""
        height, width = self.size
        return (height // STRIDE + 1, width // STRIDE + 1) if self.upsampled else self.size

    @property
    def logits(self) -> int:
        """How many there are of one head at full resolution."""
        return self.batch * self.classes * math.prod(self.size)

    @property
    def heads(self) -> int:
        return 2 if self.loss == "multi_level" else 1

    @property
    def logits_bytes(self) -> int:
        return self.logits * DTYPES[self.dtype].itemsize

    @property
    def given_bytes(self) -> int:
        """Of one head's logits as they are given; its gradient has as many."""
        return self.logits_bytes * math.prod(self.given_size) // math.prod(self.size)

    def __str__(self) -> str:
        shape = f"({self.batch}, {self.classes}, {self.size[0]}, {self.size[1]})"
        origin = "x".join(map(str, self.given_size))
        return f"{self.loss} {shape} {self.dtype}" + (
            f", upsampled from {origin}" if self.upsampled else ""
        )


class Inputs(NamedTuple):
    """heads: one leaf of logits, or two (final and low-level); labels: of all pixels."""

    heads: list[Tensor]
    labels: Tensor


def make_inputs(case: Case) -> Inputs:
    """Logits as of a half-trained network: some pixels are certain, most are not."""
    generator = torch.Generator(case.device).manual_seed(0)
    heads = []
    for _ in range(case.heads):
        shape = (case.batch, case.classes, *case.given_size)
        head = torch.empty(shape, dtype=DTYPES[case.dtype], device=case.device)
        heads.append(head.normal_(std=4, generator=generator).requires_grad_())
    labels = torch.empty((case.batch, *case.size), dtype=torch.long, device=case.device)
    labels.random_(0, case.classes, generator=generator)
    return Inputs(heads, labels)


def competitors(case: Case) -> dict[str, Callable[[Inputs], Tensor]]:
    """Loss of the inputs by every competitor; ours comes first."""

    def ours(loss: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
        options: dict[str, Any] = (
            {"size": case.size, "align_corners": True} if case.upsampled else {}
        )
        if case.loss == "cross_entropy":
            return lambda inputs: loss(inputs.heads[0], inputs.labels, **options)
        if case.loss == "multi_level":
            return lambda inputs: loss(*inputs.heads, **options)
        return lambda inputs: loss(inputs.heads[0], **options)

    def theirs(loss: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
        return lambda inputs: loss(*full_resolution(inputs))

    def full_resolution(inputs: Inputs) -> list[Tensor]:
        if not case.upsampled:
            return inputs.heads
        return [baselines.upsample(head, case.size) for head in inputs.heads]

    def cross_entropy(inputs: Inputs) -> Tensor:
        losses = [baselines.cross_entropy(z, inputs.labels) for z in full_resolution(inputs)]
        return torch.stack(losses).sum()

    made_of = {OURS: ours, ALONE: ours}
    losses = LOSSES[case.loss]
    return {name: made_of.get(name, theirs)(loss) for name, loss in losses.items()} | {
        CROSS_ENTROPY: cross_entropy
    }


def value_and_gradient(
    loss_of: Callable[[Inputs], Tensor], inputs: Inputs
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a training step asks of a loss, and what the benchmarks measure."""
    loss = loss_of(inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs.heads)


def available_bytes(device: str) -> int:
    """Memory that a case can have."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_impossible(options: Any) -> None:
    """Raise a UserError for values of the options that make no case, or none that can run."""
    for name, value in vars(options).items():
        if value == ():
            raise UserError(f"--{name} is empty: give one value or more.")
    for name, least in {"classes": 2, "heights": STRIDE, "batches": 1}.items():
        smallest = min(getattr(options, name))
        if smallest < least:
            raise UserError(f"--{name} must be at least {least}, not {smallest}.")
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads must be at least 1, not {options.threads}.")


def resolve_device(device: str) -> str:
    """ "auto" is a GPU if there is one."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise UserError("--device cuda finds no GPU: choose --device cpu.")
    return ("cuda" if found else "cpu") if device == "auto" else device


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "date": date.today().isoformat(),
        # Of the last minute before: close to 0 on a machine that does nothing else.
        "load": os.getloadavg()[0],
    }


def name_of(environment: dict[str, Any]) -> str:
    """The machine in one line."""
    threads = environment["threads"]
    cpu = f"{environment['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    processor = environment["gpu"] or cpu
    return f"{processor}, torch {environment['torch']}, {environment['date']}"


def save_json(document: dict[str, Any], path: Path) -> None:
    """Write figures to four significant digits."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [shorten(entry) for entry in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(shorten(document), indent=1) + "\n", encoding="utf-8")


class Bar(NamedTuple):
    """One competitor's figure in a plot, and its text."""

    competitor: str
    value: float
    text: str


def plot_bars(columns: Sequence[Mapping[Case, Sequence[Bar]]], xlabel: str) -> Figure:
    """Horizontal bars on a log scale: in each column a titled group for each case."""
    lines = max(sum(1.5 + len(bars) for bars in groups.values()) for groups in columns)
    figure = Figure(figsize=(14, 1 + 0.2 * lines))
    values = [bar.value for groups in columns for bars in groups.values() for bar in bars]
    # A bar that is far shorter than the others would flatten them; its number alone is shown.
    left = max(0.7 * min(values), max(values) / 1000)
    for axes, groups in zip(figure.subplots(1, len(columns)), columns, strict=True):
        ticks: dict[float, str] = {}
        y = 0.0
        for case, bars in groups.items():
            axes.text(0.01, y, str(case), transform=axes.get_yaxis_transform(), va="center", size=8)
            for bar in bars:
                y += 1
                ticks[y] = bar.competitor
                axes.barh(y, bar.value, height=0.85, color=COLORS.get(bar.competitor, "0.75"))
                axes.text(max(bar.value, left), y, " " + bar.text, va="center", size=8)
            y += 1.5
        axes.set_yticks([*ticks], [*ticks.values()], size=8)
        axes.set_ylim(y - 0.5, -0.8)
        # Room for the text at the right end.
        axes.set(xscale="log", xlim=(left, 8 * max(values)), xlabel=xlabel)
    return figure


def save_plot(figure: Figure, path: Path, environment: dict[str, Any]) -> None:
    """Write a picture that names the machine."""
    figure.suptitle(name_of(environment), fontsize=8, color="0.4")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
