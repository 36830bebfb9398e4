"""How long value and gradient take: maxsquare against what one would write instead.

    python benchmarks/speed.py --quick                 # 19 classes at 512x1024: some minutes
    python benchmarks/speed.py --quick --busy 2        # beside two processes that compute
    python benchmarks/speed.py --quick --keep-memory   # with freed memory kept for the next tensor
    python benchmarks/speed.py --quick --no-kernels    # as on a machine without a C++ compiler
    python benchmarks/speed.py --quick --heights 1024 --batches 4   # a batch for a GPU
    python benchmarks/speed.py --quick --wall          # on a GPU: as the host sees the calls
    python benchmarks/speed.py          # the whole grid, as far as memory and --minutes allow

All competitors run in one process in interleaved rounds, so that whatever else the machine does
meets each of them; all cases of the headline are interleaved too. Ratios are of medians; their
range is the quartiles of the rounds' ratios. On a GPU it is the GPU's own time that counts, as in a
training step, whose host runs ahead.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

import cases
from cases import (
    ALONE,
    COMPILED,
    CROSS_ENTROPY,
    OURS,
    OURS_COMPILED,
    PLAIN,
    PUBLISHED,
    Bar,
    Case,
)
from maxsquare import MaxSquareLoss
from uda import report
from uda.errors import UserError

Key = TypeVar("Key")

QUESTION = (
    "How long do value and gradient of a target loss take: against what one would write "
    "instead, and against the best that the machine could do?"
)
BYTES_FLOOR = "floor: bytes"
EXP_FLOOR = "floor: exponentials"
FLOORS = (BYTES_FLOOR, EXP_FLOOR)

MIN_ROUNDS = 3
SHORTEST_SAMPLE = 0.02  # seconds; the clock and the start of a kernel must not be seen in it
# Calls of a sample on a GPU, and the cycles, some 20 ms, in which the host launches them.
GPU_CALLS, HEAD_START = 5, 40_000_000
COPY_BYTES = 2**28  # far more than a cache holds
EXP_ELEMENTS_PER_THREAD = 2**15  # operand and result stay in a level-2 cache of 1 MiB
# Full-resolution logits that a competitor holds at its peak, by benchmarks/memory.py; input too.
PEAK_TENSORS = {
    **{OURS: 2, ALONE: 2, CROSS_ENTROPY: 4},
    **{COMPILED: 6, OURS_COMPILED: 6, PLAIN: 6, PUBLISHED: 14},
}


@dataclass(frozen=True)
class Options:
    """Time value and gradient of the losses.

    The first of the classes, heights, batches and dtypes make the headline, where all losses
    run; at all other combinations the maximum squares loss runs alone.
    """

    quick: bool = False
    """The headline alone."""
    classes: tuple[int, ...] = (19, 2, 150)
    """Class counts."""
    heights: tuple[int, ...] = (512, 1024)
    """Heights of the result, which is twice as wide."""
    batches: tuple[int, ...] = (1, 4)
    """Images in a batch."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Dtypes of the logits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; "auto" takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads; default: as many as PyTorch takes."""
    rounds: int = 25
    """Rounds of a case at most."""
    seconds: float = 8.0
    """Time for the rounds of a case, of which at least three run; the headline's share theirs."""
    slowest: float = 5.0
    """Competitors that are expected to take more seconds than this a call are left out."""
    minutes: float = 45.0
    """After that no further case is started."""
    busy: int = 0
    """Processes that compute beside it, as the workers of a data loader do."""
    wall: bool = False
    """On a GPU: the time of calls as the host sees them, instead of the GPU's own."""
    keep_memory: bool = False
    """Let glibc keep freed memory for the next tensor, as other allocators do; else the system
    hands out every large gradient anew, page by page."""
    no_kernels: bool = False
    """Without the kernels of maxsquare, whose losses are then ordinary PyTorch; these compete
    under torch.compile, too."""
    compile: bool = True
    """Whether torch.compile competes; compiling takes longer than measuring."""
    out: Path = cases.RESULTS
    """Folder for figures and plots; those of another grid than the default have their own names."""

    def __post_init__(self) -> None:
        cases.refuse_impossible(self)
        if self.rounds < MIN_ROUNDS:
            raise UserError(f"--rounds must be at least {MIN_ROUNDS}, not {self.rounds}.")
        if self.wall and cases.resolve_device(self.device) == "cpu":
            raise UserError("--wall needs a GPU: on a CPU there is no other time.")
        if self.busy < 0:
            raise UserError(f"--busy must be 0 or more, not {self.busy}.")
        for name in ("seconds", "slowest", "minutes"):
            value = getattr(self, name)
            if not value >= 0:  # nor is it for NaN
                raise UserError(f"--{name} must be 0 or more, not {value}.")


class Row(NamedTuple):
    """A competitor's time in ms and its ratio to ours: above 1 it is slower than ours."""

    competitor: str
    ms: float
    ms_quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


class Timed(NamedTuple):
    """A case, a row for each competitor and floor, and why others were left out."""

    case: Case
    rows: list[Row]
    skipped: dict[str, str]


class Machine(NamedTuple):
    """The best that it can do, per second; exponentials are measured on CPUs only."""

    copied_bytes: float
    exponentials: float | None


class Scaling(NamedTuple):
    """Time of ours in ms against a size, and the exponent of the power law through the points."""

    axis: str
    upsampled: bool
    sizes: list[int]
    ms: list[float]
    exponent: float


class Claim(NamedTuple):
    """At the headline a competitor takes at least `ratio` times as long as ours, or another."""

    loss: str
    upsampled: bool
    competitor: str
    ratio: float
    against: str = OURS


# On two CPU threads, or a GPU of the H100's class.
CLAIMED_CASE = {
    "cpu": {"classes": 19, "height": 512, "batch": 1, "dtype": "float32"},
    "cuda": {"classes": 19, "height": 1024, "batch": 4, "dtype": "float32"},
}
CLAIMS = {
    "cpu": (
        Claim("max_square", False, PUBLISHED, 25),
        Claim("max_square", False, CROSS_ENTROPY, 2.5),
        Claim("iw_max_square", False, ALONE, 1 / 1.3),
        Claim("max_square", True, PUBLISHED, 50),
        Claim("max_square", True, CROSS_ENTROPY, 10),
        Claim("max_square", True, COMPILED, 10),
        Claim("max_square", True, EXP_FLOOR, 1 / 2.2),
        Claim("information", True, ALONE, 1 / 3.2),
        Claim("multi_level", True, PUBLISHED, 30),
    ),
    "cuda": (
        Claim("max_square", False, BYTES_FLOOR, 1 / 1.3),
        Claim("max_square", False, COMPILED, 2),
        Claim("max_square", True, COMPILED, 15),
        Claim("max_square", True, PUBLISHED, 200),
        Claim("multi_level", True, COMPILED, 8),
    ),
}
# With the gradient's memory at hand; the larger of both floors.
KEPT_MEMORY_CLAIMS = (Claim("max_square", False, EXP_FLOOR, 1 / 2.5),)
# Without kernels the losses take at most a tenth longer than the shortest good PyTorch.
NO_KERNELS_CLAIMS = tuple(
    Claim(loss, upsampled, plain, 1 / 1.1, ours)
    for loss in ("max_square", "iw_max_square", "information", "multi_level")
    for upsampled in (False, True)
    for plain, ours in ((PLAIN, OURS), (COMPILED, OURS_COMPILED))
)
# Beside other processes no ratio is to fall below this share of what is claimed.
BUSY_SHARE = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    return report.exit_code(lambda: run(report.command_line(Options, arguments), Console()))


def run(options: Options, console: Console) -> None:
    if options.keep_memory:
        keep_memory()
    if options.no_kernels:
        hide_compilers()
    device = cases.resolve_device(options.device)
    # A folder that cannot be written to shows before anything is measured.
    options.out.mkdir(parents=True, exist_ok=True)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    environment = cases.environment(device)
    console.print(QUESTION)
    console.print(f"On {cases.name_of(environment)}.")
    # The floors are those of the machine alone.
    machine = measure_machine(device)
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)
    ]
    try:
        compete(options, device, machine, environment, console)
    finally:
        for process in busy:
            process.kill()


def compete(
    options: Options, device: str, machine: Machine, environment: dict[str, Any], console: Console
) -> None:
    began = time.perf_counter()
    timed: list[Timed] = []
    headline_cases = grid(replace(options, quick=True), device)
    other_cases = grid(options, device)[len(headline_cases) :]
    for group in [headline_cases, *([case] for case in other_cases)]:
        if timed and time.perf_counter() - began > 60 * options.minutes:
            late = f"--minutes {options.minutes:g} are over"
            found = [Timed(case, [], {"all": late}) for case in group]
        else:
            found = time_cases(group, timed, machine, options)
        for result in found:
            print_case(result, console)
        timed += found
    scalings = [
        measure_scaling(timed[0].case._replace(upsampled=upsampled), axis, options)
        for axis in ("pixels", "classes")
        for upsampled in (False, True)
    ]
    # With memory at hand everybody is faster; the other claims are not made for that.
    claims = KEPT_MEMORY_CLAIMS if options.keep_memory else CLAIMS[device]
    claims = NO_KERNELS_CLAIMS if options.no_kernels else claims
    if options.busy:
        claims = tuple(claim._replace(ratio=BUSY_SHARE * claim.ratio) for claim in claims)
    verdicts = judge(timed, claims)
    print_summary(timed, scalings, verdicts, console)

    document = {
        "question": QUESTION,
        "environment": environment,
        "options": {name: value for name, value in asdict(options).items() if name != "out"},
        "machine": machine._asdict(),
        "cases": [
            {**t._asdict(), "case": t.case._asdict(), "rows": [row._asdict() for row in t.rows]}
            for t in timed
        ],
        "scaling": [scaling._asdict() for scaling in scalings],
        "claims": verdicts,
    }
    stem = stem_of(options, device)
    cases.save_json(document, options.out / f"{stem}-{device}.json")
    for name, figure in {
        stem: plot_headline(timed[: len(headline_cases)]),
        f"{stem}-grid": plot_grid(timed),
        f"{stem}-scaling": plot_scaling(scalings),
    }.items():
        cases.save_plot(figure, options.out / f"{name}-{device}.png", environment)
    console.print(f"Figures and plots: {options.out}/{stem}*-{device}.*", soft_wrap=True)


# Measuring


def grid(options: Options, device: str) -> list[Case]:
    """The headline with every loss, then all other combinations with the first loss."""
    combinations = itertools.product(
        options.dtypes, options.batches, options.classes, options.heights
    )
    found = []
    for number, (dtype, batch, classes, height) in enumerate(combinations):
        for loss in list(cases.LOSSES)[: 1 if number else None]:
            for upsampled in (False, True):
                found.append(Case(loss, classes, height, batch, dtype, upsampled, device))
        if options.quick:
            break
    return found


def stem_of(options: Options, device: str) -> str:
    """Of the files: only the whole grid takes the place of an earlier whole grid."""
    if options.quick:
        beside = f"-busy-{options.busy}" if options.busy else ""
        kept = "-kept-memory" if options.keep_memory else ""
        case = grid(options, device)[0]
        size = "" if (case.batch, case.height) == (1, 512) else f"-{case.batch}x{case.height}"
        return (
            f"speed-quick{size}{beside}{kept}{'-no-kernels' if options.no_kernels else ''}"
            f"{'-wall' if options.wall else ''}"
        )
    return "speed" if grid(options, device) == grid(Options(), device) else "speed-part"


def time_cases(
    group: Sequence[Case], earlier: list[Timed], machine: Machine, options: Options
) -> list[Timed]:
    """Time the competitors of some cases, all of them interleaved."""
    if options.compile:
        torch.compiler.reset()
    contests = [prepare(case, earlier, options) for case in group]
    runs = {
        (number, name): run
        for number, (runs_of_case, _) in enumerate(contests)
        for name, run in runs_of_case.items()
    }
    samples = measure(
        runs,
        group[0].device,
        rounds=options.rounds,
        seconds=options.seconds * len(group),
        wall=options.wall,
    )
    timed = []
    for number, (case, (runs_of_case, skipped)) in enumerate(zip(group, contests, strict=True)):
        times = {name: samples[number, name] for name in runs_of_case}
        if times:
            for name, seconds in floors(case, machine).items():
                times[name] = [seconds] * len(times[OURS])
        rows = [make_row(name, t, times[OURS]) for name, t in times.items()]
        timed.append(Timed(case, rows, skipped))
    return timed


def prepare(
    case: Case, earlier: list[Timed], options: Options
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The competitors for which there is memory and patience, and why others are left out."""
    losses = cases.competitors(case)
    skipped = {}
    if options.compile:
        # Competitors of all cases share code, of which eight compiled forms are kept by default.
        torch._dynamo.config.recompile_limit = 1000
        losses[COMPILED] = torch.compile(losses.get(PLAIN, losses[CROSS_ENTROPY]), dynamic=False)
        if options.no_kernels:
            losses[OURS_COMPILED] = torch.compile(losses[OURS], dynamic=False)
    else:
        skipped[COMPILED] = "--no-compile"
    for name in list(losses):
        needed, expected = PEAK_TENSORS[name] * case.logits_bytes, expected_ms(case, name, earlier)
        if needed > cases.available_bytes(case.device):
            skipped[name] = f"needs about {needed / 2**30:.0f} GiB"
        elif expected > 1000 * options.slowest:
            skipped[name] = f"would take about {expected / 1000:.0f} s a call"
    if OURS in skipped:
        return {}, skipped

    inputs = cases.make_inputs(case)
    runs: dict[str, Callable[[], object]] = {
        name: partial(cases.value_and_gradient, loss_of, inputs)
        for name, loss_of in losses.items()
        if name not in skipped
    }
    for name in (COMPILED, OURS_COMPILED):
        try:
            runs.get(name, lambda: None)()
        except Exception as error:  # a compiler that is missing or fails may raise anything
            del runs[name]
            first_line = str(error).strip().split("\n")[0]
            skipped[name] = f"{type(error).__name__}: {first_line}"
    return runs, skipped


def measure(
    runs: Mapping[Key, Callable[[], object]],
    device: str,
    *,
    rounds: int,
    seconds: float,
    wall: bool = False,
) -> dict[Key, list[float]]:
    """Seconds of a call, one sample a round.

    Every round has an order of its own: what a call leaves in caches and free memory is not
    always found by the same other.
    """

    def sample(run: Callable[[], object], calls: int) -> float:
        if device == "cuda" and not wall:
            return gpu_seconds(run)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, run in runs.items():
        run()
        calls[name] = math.ceil(SHORTEST_SAMPLE / sample(run, 1))
    samples: dict[Key, list[float]] = {name: [] for name in runs}
    names, shuffled, end = list(runs), random.Random(0), time.perf_counter() + seconds
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name in shuffled.sample(names, len(names)):
            samples[name].append(sample(runs[name], calls[name]))
    return samples


def gpu_seconds(run: Callable[[], object]) -> float:
    """Seconds of a call on the GPU, which waits until the host has launched all calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    start.record()
    for _ in range(GPU_CALLS):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / GPU_CALLS


def keep_memory() -> None:
    """Have glibc take large tensors from its heap, and not give the heap's end back."""
    mmap_threshold, trim_threshold, most = -3, -1, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise UserError("--keep-memory needs glibc, the usual C library on Linux.") from None
    mallopt(mmap_threshold, most)
    mallopt(trim_threshold, most)


def hide_compilers() -> None:
    """Let maxsquare find neither a compiler nor kernels that were compiled before."""
    found = {name: os.environ.get(name) for name in ("CXX", "XDG_CACHE_HOME")}
    with tempfile.TemporaryDirectory() as empty, warnings.catch_warnings(record=True) as warned:
        os.environ |= {"CXX": "no-compiler", "XDG_CACHE_HOME": empty}
        warnings.simplefilter("always")
        for dtype in cases.DTYPES.values():
            MaxSquareLoss()(torch.zeros(1, 2, 1, 1, dtype=dtype))
    for name, value in found.items():  # torch.compile needs them
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    if not any("without its kernels" in str(warning.message) for warning in warned):
        raise UserError("--no-kernels finds ready-made kernels: install from the source archive.")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def make_row(name: str, times: Sequence[float], ours: Sequence[float]) -> Row:
    ratios = [theirs / own for theirs, own in zip(times, ours, strict=True)]
    median = statistics.median(times)
    return Row(
        name,
        1000 * median,
        quartiles([1000 * t for t in times]),
        median / statistics.median(ours),
        quartiles(ratios),
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def expected_ms(case: Case, name: str, earlier: list[Timed]) -> float:
    """From the time of a logit in the most similar case so far; 0 if there is none."""
    known = [
        (abs(math.log(case.logits / t.case.logits)), row.ms / t.case.logits)
        for t in earlier
        for row in t.rows
        if row.competitor == name and (t.case.loss, t.case.upsampled) == (case.loss, case.upsampled)
    ]
    return min(known)[1] * case.logits if known else 0.0


def measure_machine(device: str) -> Machine:
    """Copied bytes count twice, read and written; exponentials are taken within the cache."""
    source = torch.zeros(COPY_BYTES // 4, device=device)
    runs: dict[str, Callable[[], object]] = {
        "copy": partial(torch.empty_like(source).copy_, source)
    }
    x = torch.zeros(EXP_ELEMENTS_PER_THREAD * torch.get_num_threads())
    if device == "cpu":
        runs["exp"] = partial(torch.exp, x, out=torch.empty_like(x))
    samples = measure(runs, device, rounds=15, seconds=2)
    # A floor is what the machine can do at best.
    seconds = {name: min(times) for name, times in samples.items()}
    return Machine(
        2 * COPY_BYTES / seconds["copy"], x.numel() / seconds["exp"] if "exp" in seconds else None
    )


def floors(case: Case, machine: Machine) -> dict[str, float]:
    """Seconds to read the given logits twice and write their gradient, and of one exp a logit."""
    found = {BYTES_FLOOR: 3 * case.heads * case.given_bytes / machine.copied_bytes}
    if machine.exponentials is not None:
        found[EXP_FLOOR] = case.heads * case.logits / machine.exponentials
    return found


def measure_scaling(case: Case, axis: str, options: Options) -> Scaling:
    """Time ours at several sizes, interleaved like competitors."""
    if axis == "pixels":
        points = [case._replace(height=case.height * k // 4) for k in (1, 2, 4, 8)]
        sizes = [math.prod(point.size) for point in points]
    else:
        points = [case._replace(classes=case.classes * k) for k in (1, 2, 4, 8)]
        points = [point._replace(height=case.height // 2) for point in points]
        sizes = [point.classes for point in points]
    runs = {
        str(point): partial(
            cases.value_and_gradient, cases.competitors(point)[OURS], cases.make_inputs(point)
        )
        for point in points
    }
    samples = measure(
        runs, case.device, rounds=options.rounds, seconds=options.seconds, wall=options.wall
    )
    ms = [1000 * statistics.median(times) for times in samples.values()]
    fit = statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, ms)])
    return Scaling(axis, case.upsampled, sizes, ms, fit.slope)


def judge(timed: list[Timed], claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Each claim with the ratio that was measured."""
    verdicts = []
    for claim in claims:
        for t in timed:
            fields = CLAIMED_CASE[t.case.device] | {
                "loss": claim.loss,
                "upsampled": claim.upsampled,
            }
            if fields.items() <= t.case._asdict().items():
                ratios = {OURS: 1.0} | {row.competitor: row.ratio for row in t.rows}
                if {claim.competitor, claim.against} <= ratios.keys():
                    measured = ratios[claim.competitor] / ratios[claim.against]
                    met = measured >= claim.ratio
                    verdicts.append({**claim._asdict(), "measured": measured, "met": met})
    return verdicts


# Telling


def print_case(t: Timed, console: Console) -> None:
    table = Table("competitor", title=str(t.case), title_justify="left")
    for heading in ("ms", "quartiles", "x ours", "quartiles"):
        table.add_column(heading, justify="right")
    for row in t.rows:
        table.add_row(
            row.competitor,
            f"{row.ms:.3f}",
            "{:.3f} - {:.3f}".format(*row.ms_quartiles),
            f"{row.ratio:.2f}",
            "{:.2f} - {:.2f}".format(*row.ratio_quartiles),
            end_section=row.competitor == OURS,
        )
    console.print(table if t.rows else str(t.case), soft_wrap=not t.rows)
    for name, reason in t.skipped.items():
        console.print(f"{name} left out: {reason}", soft_wrap=True, markup=False)


def print_summary(
    timed: list[Timed], scalings: list[Scaling], verdicts: list[dict[str, Any]], console: Console
) -> None:
    for scaling in scalings:
        console.print(
            f"Time grows with the {scaling.axis} to the power {scaling.exponent:.2f}"
            + (", upsampled." if scaling.upsampled else ".")
        )
    if verdicts:
        console.print("Claims, made for two CPU threads or a batch on a GPU of the H100's class:")
    for claim in verdicts:
        console.print(
            f"{'met' if claim['met'] else 'NOT met':7}  {claim['loss']}"
            f"{', upsampled' if claim['upsampled'] else ''}: {claim['competitor']} takes "
            f"{claim['measured']:.2f} times as long as {claim['against']}; claimed "
            f"{claim['ratio']:.2f}",
            soft_wrap=True,
        )
    lost = [
        f"  {t.case}: {row.competitor} takes {row.ratio:.2f} times as long"
        for t in timed
        for row in t.rows
        if row.ratio < 1 and row.competitor not in (*FLOORS, ALONE, OURS_COMPILED)
    ]
    console.print("Where maxsquare loses:" if lost else "Nowhere does maxsquare lose.")
    console.print("\n".join(lost), soft_wrap=True, markup=False)


def plot_headline(timed: list[Timed]) -> Figure:
    """Bars of the headline's times."""
    columns = [
        {
            t.case: [
                Bar(row.competitor, row.ms, f"{short(row.ms)} ms ({short(row.ratio)}x)")
                for row in t.rows
            ]
            for t in timed
            if t.case.upsampled == upsampled
        }
        for upsampled in (False, True)
    ]
    return cases.plot_bars(columns, "value and gradient (ms); in brackets: times as long as ours")


def short(value: float) -> str:
    """With three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def plot_grid(timed: list[Timed]) -> Figure:
    """How many times as long each competitor takes, against the number of logits."""
    figure = Figure(figsize=(11, 4))
    for axes, upsampled in zip(figure.subplots(1, 2), (False, True), strict=True):
        for name, color in cases.COLORS.items():
            for dtype, marker in (("float32", "o"), ("bfloat16", "^")):
                points = [
                    (t.case.logits, row.ratio)
                    for t in timed
                    for row in t.rows
                    if (t.case.loss, t.case.upsampled) == ("max_square", upsampled)
                    and (t.case.dtype, row.competitor) == (dtype, name)
                    and name != OURS
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    axes.scatter(x, y, 25, color, marker=marker, label=f"{name}, {dtype}")
        axes.axhline(1, color=cases.COLORS[OURS], label=OURS)
        axes.set(xscale="log", yscale="log", xlabel="logits at full resolution")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title("upsampled from stride 8" if upsampled else "logits at full resolution")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("times as long as maxsquare")
    # Beside the axes, where it hides no point.
    figure.legend(
        *figure.axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=7
    )
    return figure


def plot_scaling(scalings: list[Scaling]) -> Figure:
    """Time of ours against pixels and against classes; the lines have slope 1."""
    figure = Figure(figsize=(9, 4))
    for axes, axis in zip(figure.subplots(1, 2), ("pixels", "classes"), strict=True):
        for scaling in (s for s in scalings if s.axis == axis):
            color = cases.COLORS[ALONE if scaling.upsampled else OURS]
            name = "upsampled" if scaling.upsampled else "full resolution"
            label = f"{name}: exponent {scaling.exponent:.2f}"
            axes.plot(scaling.sizes, scaling.ms, "o", color=color, label=label)
            pace = scaling.ms[-1] / scaling.sizes[-1]
            axes.plot(scaling.sizes, [pace * size for size in scaling.sizes], color=color)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="value and gradient (ms)")
        sizes = scalings[0 if axis == "pixels" else -1].sizes
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        # Powers of ten alone may be a single one.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(title="lines: exactly linear", fontsize=8)
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    sys.exit(main())
