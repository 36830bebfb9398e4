"""`train_uda.py` in processes that a test disturbs, at moments that do not depend on the clock.

The processes are forked from one that has imported the script, which takes longer than the tiny
runs of these tests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import train_uda
from uda import report
from uda.scenes import dataset as rendering

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["interrupted", "pytest"])
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Moment:
    """When something happens to a run: at the `count`-th operation with `on` in its line.

    Operations are those on files that Python's audit hooks report, before they are carried out:
    opened for writing, renamed, removed, and folders made. A delay lets something happen in the
    midst of a write, or between the operations.
    """

    action: Callable[[], object]
    count: int = 1
    on: str = ""
    delay: float = 0.0
    lasting: bool = False
    """Act on all later operations, too."""


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def press_ctrl_c() -> None:
    """As a terminal does: the children hear it, too."""
    os.killpg(os.getpid(), signal.SIGINT)


def press_ctrl_c_twice() -> None:
    press_ctrl_c()
    threading.Timer(0.002, press_ctrl_c).start()


def kill_loaders() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


def set_clock_back() -> None:
    """Every reading of the clock is an hour before the last one."""
    start, readings = time.time(), iter(range(10**9))
    time.time = lambda: start - 3600 * next(readings)


def draw_in_processes() -> None:
    """Draw even a few scenes as many are drawn."""
    rendering._POOL_FROM = 1
    rendering._cores = lambda: 1


def measure(file: Path, every: int) -> None:
    """Note what the process holds before every so many steps of the adaptation."""
    step, calls = train_uda.adaptation.adaptation_step, iter(range(10**9))

    def measured(*args: Any, **kwargs: Any) -> Any:
        if next(calls) % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with file.open("a") as notes:
                print(pages, len(os.listdir("/proc/self/fd")), threading.active_count(),
                      len(os.listdir("/proc/self/task")), file=notes)  # fmt: skip
        return step(*args, **kwargs)

    train_uda.adaptation.adaptation_step = measured


class Run:
    """A run in a process and a process group of its own, which writes what it says into files."""

    def __init__(
        self,
        logs: Path,
        options: list[str],
        *,
        moment: Moment | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self.moment = logs, moment
        self.process = CONTEXT.Process(target=_main, args=(logs, options, moment, before))
        # With the first process starts the one that is forked, and imports from here.
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            self.process.start()

    def wait(self, timeout: float = 300) -> int:
        """The exit code; negative: the signal that ended it. A busy machine needs a minute."""
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, f"still running after {timeout} s: {self.operations()[-3:]}"
        return code

    def said(self) -> str:
        """What it wrote on stderr."""
        return (self.logs / "stderr").read_text()

    def operations(self) -> list[str]:
        path = self.logs / "operations"
        return path.read_text().splitlines() if path.exists() else []

    def beside(self, names: Iterable[str]) -> str:
        """Which of the names is in the last operation."""
        last = self.operations()[-1]
        return next((name for name in names if name in last), "elsewhere")

    def members(self) -> list[int]:
        """The living processes of the run's group."""
        pids = map(int, filter(str.isdigit, os.listdir("/proc")))
        return [pid for pid in pids if _group(pid) == self.process.pid]

    def end(self) -> None:
        """Leave nothing running, whatever a failed test left."""
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)
        self.process.join()


def _group(pid: int) -> int | None:
    try:
        state, _, group, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # ended meanwhile
        return None
    return None if state == "Z" else int(group)


def _main(
    logs: Path,
    options: list[str],
    moment: Moment | None,
    before: Callable[[], object] | None,
) -> None:
    os.setsid()
    # As in a process that no fork server started: else loader processes come from another one.
    multiprocessing.set_start_method(None, force=True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # A shell that starts a command in the background lets it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()
    sys.addaudithook(_Watch(logs / "operations", moment))
    report.end_on_signals(train_uda.STOPPED)
    sys.exit(train_uda.main(options))


class _Watch:
    """An audit hook that notes operations on files, and acts at a moment."""

    def __init__(self, log: Path, moment: Moment | None) -> None:
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.process, self.moment, self.seen = os.getpid(), moment, 0
        self.acting = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & _WRITES and not isinstance(args[0], int)
        if not writes and event not in ("os.rename", "os.remove", "os.mkdir"):
            return
        if self.acting or os.getpid() != self.process:  # its own operations; a loader process
            return
        line = f"{event} {os.fsdecode(args[0])}\n"
        os.write(self.log, line.encode())
        moment = self.moment
        if moment is None or moment.on not in line:
            return
        self.seen += 1
        if self.seen == moment.count or (moment.lasting and self.seen > moment.count):
            if moment.delay:
                threading.Timer(moment.delay, moment.action).start()
                return
            self.acting = True
            try:
                moment.action()
            finally:
                self.acting = False
