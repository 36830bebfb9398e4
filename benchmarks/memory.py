"""How much memory value and gradient need: maxsquare against what one would write instead.

    python benchmarks/memory.py   # 19 classes at 1024x2048: some minutes

The peak is counted from the moment when the inputs exist. On a GPU PyTorch's allocator knows
it. On a CPU every figure comes from a process of its own: the kernel's high-water mark of its
resident memory (VmHWM; ru_maxrss would start at that of the parent), after a tiny run has loaded
the code and started the threads, with an allocator that returns memory as soon as it is freed. A
tensor of known size shows that this reads true.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import cases
from cases import ALONE, OURS, Bar, Case
from uda.errors import UserError

QUESTION = (
    "How much memory do value and gradient of a target loss need beyond their inputs, "
    "against what one would write instead?"
)
MIB = 2**20
KNOWN_BYTES = 96 * MIB
# While PyTorch is imported, a process may hold this much more than thereafter.
BALLAST_BYTES = 64 * MIB
# Freed blocks of more than a page or so go back to the system, from one arena alone.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384"}

# At 19 classes, 1024x2048, float32.
PLAIN_PATH_MIB = 16  # beyond the logits and their gradient
UPSAMPLED_SHARE = 0.04  # of one head's full-resolution logits, beyond the inputs


@dataclass(frozen=True)
class Options:
    """Measure the peak memory of value and gradient of the losses."""

    classes: tuple[int, ...] = (19,)
    """Class counts."""
    heights: tuple[int, ...] = (1024,)
    """Heights of the result, which is twice as wide."""
    batches: tuple[int, ...] = (1,)
    """Images in a batch."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Dtypes of the logits."""
    losses: tuple[cases.LossName, ...] = tuple(cases.LOSSES)
    """Losses."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; "auto" takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads; default: as many as PyTorch takes."""
    out: Path = cases.RESULTS
    """Folder for figures and plot; those of other than the default cases have their own names."""

    def __post_init__(self) -> None:
        cases.refuse_impossible(self)


class Row(NamedTuple):
    """Peaks in MiB: beyond the inputs, and beyond the gradient as well."""

    competitor: str
    beyond_inputs: float
    beyond_gradient: float
    full_logits: float  # the first of them in units of one head's full-resolution logits


def main(arguments: Sequence[str] | None = None) -> int:
    # Here, because each measured process imports this file and would load all of that.
    from uda import report

    return report.exit_code(lambda: run(report.command_line(Options, arguments), Console()))


def run(options: Options, console: Console) -> None:
    device = cases.resolve_device(options.device)
    if device == "cpu" and not sys.platform.startswith("linux"):
        raise UserError("Without a GPU, peaks can be read on Linux only.")
    # A folder that cannot be written to shows before anything is measured.
    options.out.mkdir(parents=True, exist_ok=True)
    threads = options.threads or torch.get_num_threads()
    environment = {**cases.environment(device), "threads": threads}
    console.print(QUESTION)
    console.print(f"On {cases.name_of(environment)}.")
    known = measure(device, threads, peak_of_known_tensor, device)
    console.print(f"A tensor of {KNOWN_BYTES / MIB:.1f} MiB, dropped again: {known / MIB:.1f} MiB.")

    measured: list[tuple[Case, list[Row]]] = []
    for case in grid(options, device):
        rows = []
        for name in cases.competitors(case):
            if name != ALONE:
                rows.append(make_row(case, name, measure(device, threads, peak_bytes, case, name)))
        measured.append((case, rows))
        print_case(case, rows, console)
    verdicts = judge(measured)
    for verdict in verdicts:
        console.print(
            f"{'met' if verdict['met'] else 'NOT met':7}  {verdict['case']}: "
            f"{verdict['mib']:.1f} MiB; claimed at most {verdict['claimed_mib']:.1f}",
            soft_wrap=True,
        )

    document = {
        "question": QUESTION,
        "environment": environment,
        "known_mib": {"made": KNOWN_BYTES / MIB, "measured": known / MIB},
        "cases": [
            {"case": case._asdict(), "rows": [row._asdict() for row in rows]}
            for case, rows in measured
        ],
        "claims": verdicts,
    }
    # Only the default cases take the place of earlier ones.
    stem = "memory" if grid(options, device) == grid(Options(), device) else "memory-part"
    path = options.out / f"{stem}-{device}.json"
    cases.save_json(document, path)
    cases.save_plot(plot(measured), path.with_suffix(".png"), environment)
    console.print(f"Figures and plot: {path.with_suffix('')}.*", soft_wrap=True)


# Measuring


def grid(options: Options, device: str) -> list[Case]:
    return [
        Case(loss, classes, height, batch, dtype, upsampled, device)
        for dtype in options.dtypes
        for batch in options.batches
        for classes in options.classes
        for height in options.heights
        for loss in options.losses
        for upsampled in (False, True)
    ]


def measure(device: str, threads: int, peak: Callable[..., int], *arguments: object) -> int:
    """The peak in bytes; on a CPU in a fresh process whose allocator keeps nothing."""
    if device == "cuda":
        return peak(*arguments)
    before = dict(os.environ)
    os.environ.update(ALLOCATOR)
    try:
        # Spawned, not forked: a fork would start from the memory of this process.
        context = get_context("spawn")
        with ProcessPoolExecutor(
            1, context, initializer=torch.set_num_threads, initargs=(threads,)
        ) as process:
            return process.submit(peak, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def peak_bytes(case: Case, name: str) -> int:
    """Peak of one competitor's value and gradient beyond the inputs."""
    loss_of = cases.competitors(case)[name]
    tiny = case._replace(height=16)
    cases.value_and_gradient(cases.competitors(tiny)[name], cases.make_inputs(tiny))
    inputs = cases.make_inputs(case)
    return peak_during(lambda: cases.value_and_gradient(loss_of, inputs), case.device)


def peak_of_known_tensor(device: str) -> int:
    return peak_during(lambda: torch.ones(KNOWN_BYTES, dtype=torch.uint8, device=device), device)


def peak_during(function: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    # With it the process holds more than ever before, so that the mark rises from here.
    ballast = torch.ones(BALLAST_BYTES, dtype=torch.uint8)
    before = high_water_bytes()
    function()
    peak = high_water_bytes() - before
    del ballast
    return peak


def high_water_bytes() -> int:
    """The most resident memory that this process has ever held."""
    lines = dict(
        line.split(":")
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    return int(lines["VmHWM"].split()[0]) * 1024


def make_row(case: Case, name: str, peak: int) -> Row:
    heads = 2 if case.loss == "multi_level" else 1
    beyond_gradient = peak - heads * case.given_bytes
    return Row(name, peak / MIB, beyond_gradient / MIB, peak / case.logits_bytes)


def judge(measured: list[tuple[Case, list[Row]]]) -> list[dict[str, Any]]:
    """What is claimed of the maximum squares loss, and what was measured."""
    verdicts = []
    for case, rows in measured:
        if case[:5] != ("max_square", 19, 1024, 1, "float32"):
            continue
        ours = next(row for row in rows if row.competitor == OURS)
        if case.upsampled:
            mib, claimed = ours.beyond_inputs, UPSAMPLED_SHARE * case.logits_bytes / MIB
        else:
            mib, claimed = ours.beyond_gradient, PLAIN_PATH_MIB
        verdict = {"case": str(case), "mib": mib, "claimed_mib": claimed, "met": mib <= claimed}
        verdicts.append(verdict)
    return verdicts


# Telling


def print_case(case: Case, rows: list[Row], console: Console) -> None:
    table = Table("competitor", title=str(case), title_justify="left")
    for heading in ("MiB beyond inputs", "MiB beyond gradient", "full-size logits", "x ours"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.competitor,
            f"{row.beyond_inputs:.1f}",
            f"{row.beyond_gradient:.1f}",
            f"{row.full_logits:.2f}",
            f"{row.beyond_inputs / max(rows[0].beyond_inputs, 1 / 256):.2f}",
        )
    console.print(table)


def plot(measured: list[tuple[Case, list[Row]]]) -> Figure:
    """Bars of the peaks beyond the inputs."""
    columns = [
        {
            case: [
                Bar(row.competitor, row.beyond_inputs, f"{row.beyond_inputs:.0f} MiB")
                for row in rows
            ]
            for case, rows in measured
            if case.upsampled == upsampled
        }
        for upsampled in (False, True)
    ]
    return cases.plot_bars(columns, "peak memory beyond the inputs (MiB)")


if __name__ == "__main__":
    sys.exit(main())
