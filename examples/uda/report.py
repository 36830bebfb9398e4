"""The screen output of a run: progress bars, tables, errors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import maxsquare
from maxsquare import Statistics
from uda.datasets import LABEL_SPACES, DataReport
from uda.errors import UserError, one_line
from uda.evaluation import Scores, steadiness
from uda.presets import Preset

T = TypeVar("T")
LIBRARIES = ("torch", "torchvision", "lightning-fabric")
STOPPED = "Stopped before the end."
# What is watched of predictions, its name in a table, and its format.
WATCHED = {
    "information": ("information (nats)", ".2f"),
    "entropy": ("entropy (nats)", ".2f"),
    "classes": ("predicted classes", "d"),
    "steadiness": ("steadiness (nats)", ".2f"),
}
LOADER_KILLED = (
    "error: A process that loads images was killed, perhaps for want of memory: take fewer "
    "--workers, or free some."
)


def console(**options: Any) -> Console:
    """A console that shows names of files and classes as they are, brackets and colons included."""
    return Console(markup=False, emoji=False, **options)


class RateColumn(TextColumn):
    """Finished units per second."""

    def render(self, task: Any) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "-/s", style="cyan")


def progress_bar(console: Console) -> Progress:
    """A bar with count, rate and remaining time, which ends in a task's `note` field."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        RateColumn(""),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def entry(scores: Scores) -> dict[str, Any]:
    """Scores as metrics.json holds them, in percent."""
    values: dict[str, Any] = {"miou": scores.miou, "per_class": scores.per_class}
    if scores.names == LABEL_SPACES[16].names:
        values["miou_13"] = thirteen(scores).miou
    return values


def thirteen(scores: Scores) -> Scores:
    """SYNTHIA's 16-class predictions scored over the 13 classes that many papers report."""
    ids = [c for c, name in enumerate(scores.names) if name in LABEL_SPACES[13].names]
    return scores.subset(ids)


def watched(statistics: Statistics, before: Sequence[float] | None = None) -> dict[str, Any]:
    """Statistics of predictions as metrics.json holds them; before: as for `steadiness`."""
    entropy, proportions = statistics.entropy.item(), statistics.proportions.tolist()
    found = {
        "information": statistics.information.item(),
        "entropy": entropy,
        "classes": int(statistics.classes),
        "proportions": proportions,
    }
    return (
        found
        if before is None
        else found | {"steadiness": steadiness(entropy, proportions, before)}
    )


def watched_table(columns: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """What is known of predictions without labels, one column for each entry."""
    table = Table("on unlabelled target images", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    for key, (label, form) in WATCHED.items():
        found = [format(column[key], form) if key in column else "-" for column in columns.values()]
        if any(value != "-" for value in found):
            table.add_row(label, *found)
    return table


def scores_table(columns: Mapping[str, Scores], title: str) -> Table:
    """One row per class and one for the mean, one column for each entry."""
    table = Table("IoU (%)", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    for name in next(iter(columns.values())).per_class:
        table.add_row(name, *(_percent(scores.per_class[name]) for scores in columns.values()))
    table.add_section()
    table.add_row("mIoU", *(_percent(scores.miou) for scores in columns.values()), style="bold")
    if all(scores.names == LABEL_SPACES[16].names for scores in columns.values()):
        means = (_percent(thirteen(scores).miou) for scores in columns.values())
        table.add_row("mIoU, 13 classes", *means)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def presets_table(presets: Mapping[str, Preset]) -> Table:
    """Every preset with the settings in which the experiments differ."""
    table = Table(box=SIMPLE)
    columns = ("preset", "published", "starts from", "sizes", "steps", "lr", "weight", "ratio")
    for column in (*columns, "low, threshold"):
        table.add_column(column, no_wrap=True)
    table.add_column("note")
    for name, preset in presets.items():
        s = preset.settings
        sizes = (f"{width}x{height}" for height, width in (s.source_size, s.target_size))
        low = f"{s.low_weight:g}" if s.low_weight else "-"
        table.add_row(
            name,
            preset.published,
            preset.start.rpartition("/")[2] if preset.start else "-",
            " > ".join(sizes),
            f"{s.source_steps} + {s.steps}",
            f"{s.lr if s.steps else s.source_lr:g}",
            f"{s.target_weight[0]:g}" if s.steps else "-",
            f"{s.ratio:g}" if "-iw" in s.method else "-",
            f"{low}, {s.threshold:g}" if s.method.endswith("multi") else low,
            preset.note,
        )
    return table


def data_table(report: DataReport, title: str) -> Table:
    """The findings of `check_data` in one data set."""
    table = Table("", "", title=title, show_header=False)
    table.add_row("images", str(report.images))
    sizes = ", ".join(f"{n} of {w}x{h}" for (h, w), n in report.sizes.most_common(5))
    table.add_row("sizes", sizes)
    table.add_row("without label", _first(report.missing))
    table.add_row("unreadable", _first(report.unreadable))
    table.add_row("label of another size", _first(report.odd_sizes))
    table.add_section()
    for name, share in report.frequencies.items():
        table.add_row(name, f"{100 * share:.3f}%")
    return table


def _first(items: list[Any]) -> str:
    return f"{len(items)}, the first: {one_line(str(items[0]))}" if items else "0"


def versions() -> dict[str, str]:
    """Python and the libraries that a result depends on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "maxsquare": maxsquare.__version__, **found}


def command_line(form: type[T], arguments: Sequence[str] | None, **kwargs: Any) -> T:
    """`tyro.cli`, which explains a wrong option itself and exits with code 2."""
    return tyro.cli(form, args=arguments, **kwargs)


def sentence(error: Exception) -> str:
    """An error in one sentence."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return one_line(f"{where}{error.strerror}.")
    # An error in a loader process arrives behind that process's traceback.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[-1])


def exit_code(script: Callable[[], object], *, stopped: str = STOPPED) -> int:
    """Run a script; an error that its user can repair becomes a sentence on stderr, and so does
    Ctrl-C."""
    try:
        with _failed_writes_told_once():
            script()
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A loader process was killed: torch's watch over them may raise anywhere in the script, or
        # a batch never arrives.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        _end_watch()
        print(LOADER_KILLED, file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # from `command_line`, after --help or a wrong option
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    return 0


def _end_watch() -> None:
    """Keep torch's watch from raising again, in a destructor that waits for the processes."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def _failed_writes_told_once() -> Iterator[None]:
    """Print no traceback in TensorBoard's thread, which passes its errors to the main thread."""

    def tell(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            earlier(failure)

    earlier, threading.excepthook = threading.excepthook, tell
    try:
        yield
    finally:
        threading.excepthook = earlier


def end_on_signals(stopped: str = STOPPED) -> None:
    """Let Ctrl-C and SIGTERM end this program in a sentence, with the exit code of shells.

    The program ends at once, as after a kill: an exception that is raised at any moment may be lost
    or misread where a library is in the middle of a callback, a destructor or a fork.
    """
    program, signals = os.getpid(), (signal.SIGINT, signal.SIGTERM)

    def end(number: int, _: object) -> None:
        if os.getpid() != program:  # a loader process; a terminal sends it Ctrl-C, too
            return
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        os.write(2, f"{stopped}\n".encode())
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # show the cursor again, which a progress bar hides
        for child in multiprocessing.active_children():
            child.terminate()
        os._exit(128 + number)

    for number in signals:
        # nohup and the like start a program with signals ignored: leave them so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def losses(values: Mapping[str, float]) -> str:
    """The losses of the final head that are not zero, short enough for a progress bar."""
    shown = {name: values[name] for name in ("source", "target") if values[name]}
    return " ".join(f"{name} {value:.3g}" for name, value in shown.items())
