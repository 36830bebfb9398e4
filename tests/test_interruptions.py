"""What a run of days must survive: kills, full disks, lost data, impatience, other runs."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from interrupted import (
    Moment,
    Run,
    draw_in_processes,
    kill_loaders,
    measure,
    press_ctrl_c,
    press_ctrl_c_twice,
    refuse,
    send,
    set_clock_back,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_examples import same, trained

from uda import checkpoint, outputs

TINY = (
    "--scenes 4 --source-size 32 64 --target-size 32 64 --source-steps 5 --source-horizon 5 "
    "--steps 5 --batch-size 2 --workers 0 --device cpu --log-every 1 --save-every 2 "
    "--evaluate-every 2 --source-evaluate-every 3 --no-compare"
).split()
# What a run writes.
FILES = (
    ".lock", "settings.json", "scenes.json", "images", "labels", "tfevents", "best.pt", "last.pt",
    "metrics.json", "panel.png",
)  # fmt: skip
KILL, TERMINATE = partial(send, signal.SIGKILL), partial(send, signal.SIGTERM)
Start = Callable[..., Run]
Budget = Callable[[float], float]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start tiny runs; what they leave running, when a test fails, ends with the test."""
    runs: list[Run] = []

    def begin(out: Path, *options: str, **how: Any) -> Run:
        logs = tmp_path / "logs" / str(len(runs))
        runs.append(Run(logs, [*TINY, "--out", str(out), *options], **how))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder, [*TINY, "--out", str(folder / "run")])
    assert run.wait() == 0, run.said()
    return run


def results(out: Path) -> dict[str, Any]:
    """All that a run leaves behind but for what may differ: clock, folders, and names of logs."""
    found: dict[str, Any] = {}
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        if path.suffix == ".pt":
            found[name] = trained(path)
        elif path.suffix == ".png":
            found[name] = path.read_bytes()
        elif "tfevents" in name:
            found[f"log of {path.parent.relative_to(out)}"] = curves(path.parent)
    found["metrics"] = metrics = outputs.read_json(out / "metrics.json")
    del metrics["seconds"], metrics["settings"]
    return found


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a stage has logged, as TensorBoard reads it."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: sorted((event.step, event.value) for event in log.Scalars(tag))
        for tag in log.Tags()["scalars"]
    }


def assert_equal(out: Path, whole: Run) -> None:
    """A run has ended as if nothing had happened to it, its log without a step twice or never."""
    found, wanted = results(out), results(whole.logs / "run")
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert same(found[name], wanted[name]), (name, found[name], wanted[name])


def assert_undamaged(out: Path) -> None:
    """Whatever has its name, and not that of an unfinished file, is whole."""
    for path in out.rglob("*"):
        if path.suffix == ".pt":
            checkpoint.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()


def assert_one_sentence(run: Run, *told: str) -> None:
    assert run.wait() == 2, run.said()
    assert run.said().startswith("error: ") and run.said().count("\n") == 1, run.said()
    assert all(word in run.said() for word in told), run.said()


def go_on(out: Path) -> list[str]:
    """The option with which the run in a folder goes on, if it has come so far as to be one."""
    return ["--resume"] if (out / outputs.SETTINGS).exists() else []


def assert_goes_on(out: Path, whole: Run, start: Start) -> None:
    run = start(out, *go_on(out))
    assert run.wait() == 0, run.said()
    assert_equal(out, whole)


def assert_outlives(
    out: Path, whole: Run, start: Start, moments: Iterable[Moment], check: Callable[[Run], None]
) -> list[str]:
    """Interrupt a run at moments, let it go on after each, and compare its end.

    Returns which file each of the interruptions came beside.
    """
    beside = []
    for number, moment in enumerate(moments):
        # With and without loader processes.
        run = start(out, *go_on(out), "--workers", str(number % 2), moment=moment)
        if run.wait() == 0:  # it ended before the moment came
            assert_equal(out, whole)
            return beside
        check(run)
        assert_undamaged(out)
        beside.append(run.beside(FILES))
    assert_goes_on(out, whole, start)
    return beside


def killed(run: Run) -> None:
    assert run.wait() == -signal.SIGKILL, run.said()


def stopped(run: Run) -> None:
    """Ctrl-C and SIGTERM end a run in one sentence, with a shell's exit code, and its processes."""
    assert run.wait() == (143 if run.moment.action is TERMINATE else 130), run.said()
    assert run.said().startswith("Stopped") and run.said().count("\n") == 1, run.said()
    assert_soon_gone(run)


def random_moments(whole: Run, draw: random.Random, *actions: Callable[[], object]) -> Iterator:
    """Half of them are an operation itself, half lie in the fifty milliseconds after it."""
    operations = whole.operations()
    while True:
        # Every kind of file alike, else most moments would be those of the log.
        on = draw.choice(("", *FILES))
        yield Moment(
            draw.choice(actions),
            count=draw.randint(1, sum(on in line for line in operations)),
            on=on,
            delay=draw.choice((0.0, draw.uniform(0, 0.05))),
        )


# Kills and stops


@pytest.mark.parametrize(
    ("moments", "check"),
    [
        (
            (
                Moment(KILL, on="images", count=5),
                Moment(KILL, on="source-only/events", count=20),
                Moment(KILL, on="panel.png", count=2),
            ),
            killed,
        ),
        (
            (
                Moment(press_ctrl_c, on="labels", count=5),
                Moment(press_ctrl_c, on="source-only/events", count=20),
                Moment(TERMINATE, on="source-only/last.pt", delay=0.005),
            ),
            stopped,
        ),
    ],
    ids=["kills", "stops"],
)
def test_an_interrupted_run_goes_on_to_a_bit_identical_end(
    moments: Sequence[Moment],
    check: Callable[[Run], None],
    tmp_path: Path,
    whole: Run,
    start: Start,
) -> None:
    beside = assert_outlives(tmp_path / "run", whole, start, moments, check)
    assert len(beside) == len(moments)


@pytest.mark.stress
@pytest.mark.parametrize(
    ("usual", "actions", "check"),
    [(25, (KILL,), killed), (10, (press_ctrl_c, TERMINATE), stopped)],
    ids=["kills", "stops"],
)
def test_a_run_interrupted_at_random_goes_on_to_a_bit_identical_end(
    usual: int,
    actions: Sequence[Callable[[], object]],
    check: Callable[[Run], None],
    tmp_path: Path,
    whole: Run,
    start: Start,
    stress_budget: Budget,
) -> None:
    moments = random_moments(whole, random.Random(0), *actions)
    beside, lives = Counter[str](), 0
    while beside.total() < stress_budget(usual):
        lives += 1
        out = tmp_path / str(lives)
        beside.update(assert_outlives(out, whole, start, islice(moments, 4), check))
    print(f"{beside.total()} interruptions of {lives} runs: {dict(beside)}")


@pytest.mark.stress
def test_loader_processes_end_with_a_killed_run(tmp_path: Path, start: Start) -> None:
    moment = Moment(KILL, on="source-only/events", count=4)
    run = start(tmp_path / "run", "--workers", "2", moment=moment)
    killed(run)
    assert_soon_gone(run)


def assert_soon_gone(run: Run) -> None:
    deadline = time.monotonic() + 60  # torch's loader processes look after their parent every 5 s
    while members := run.members():
        assert time.monotonic() < deadline, members
        time.sleep(0.1)


@pytest.mark.parametrize(
    "lasting", [False, pytest.param(True, marks=pytest.mark.stress)], ids=["once", "lasting"]
)
def test_a_killed_loader_process_is_one_sentence(
    lasting: bool, tmp_path: Path, whole: Run, start: Start
) -> None:
    # The log of the first step: a pass over the images is still under way.
    moment = Moment(kill_loaders, on="source-only/events", count=4, lasting=lasting)
    run = start(tmp_path / "run", "--workers", "1", moment=moment)
    assert_one_sentence(run, "killed", "--workers")
    assert not run.members()
    if lasting:
        assert_goes_on(tmp_path / "run", whole, start)


@pytest.mark.stress
def test_ctrl_c_pressed_twice_is_pressed_once(tmp_path: Path, start: Start) -> None:
    moment = Moment(press_ctrl_c_twice, on="last.pt")
    run = start(tmp_path / "run", "--workers", "1", moment=moment)
    stopped(run)


# Failing writes


def test_a_full_disk_is_one_sentence_where_the_log_is_written(tmp_path: Path, start: Start) -> None:
    moment = Moment(partial(refuse, errno.ENOSPC), on="tfevents", count=9, lasting=True)
    assert_one_sentence(start(tmp_path / "run", moment=moment), "No space left on device")


@pytest.mark.stress
def test_a_write_that_fails_anywhere_is_one_sentence_and_costs_nothing(
    tmp_path: Path, whole: Run, start: Start, stress_budget: Budget
) -> None:
    draw, failures = random.Random(2), Counter[str]()
    reasons = [partial(refuse, number) for number in (errno.ENOSPC, errno.EROFS, errno.EIO)]
    for moment in islice(random_moments(whole, draw, *reasons), round(stress_budget(10))):
        moment = replace(moment, delay=0.0, lasting=draw.random() < 0.5)
        out = tmp_path / str(failures.total())
        run = start(out, moment=moment)
        assert_one_sentence(run, os.strerror(moment.action.args[0]))
        failures[run.beside(FILES)] += 1
        assert_undamaged(out)
        assert_goes_on(out, whole, start)
    print(f"{failures.total()} failed writes: {dict(failures)}")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a file system, where that is allowed."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mounted(*arguments: str) -> Path:
        command = ["mount", *arguments, str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount")
        return folder

    yield mounted
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@pytest.mark.stress
def test_a_full_file_system_is_one_sentence_and_costs_nothing(
    tmp_path: Path, whole: Run, start: Start, mount: Callable[..., Path], stress_budget: Budget
) -> None:
    folder = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    draw, failures = random.Random(3), Counter[str]()
    size = sum(file.stat().st_size for file in (whole.logs / "run").rglob("*") if file.is_file())
    for life in range(round(stress_budget(4))):
        out = folder / str(life)
        # Half of them too small for the log of the source stage.
        kilobytes = draw.randrange(80, size >> 10) if life % 2 else draw.randrange(80, 200)
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)
        run = start(out)
        assert_one_sentence(run, "No space left on device")
        failures[run.beside(FILES)] += 1
        assert_undamaged(out)
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
        assert_goes_on(out, whole, start)
        shutil.rmtree(out)
    print(f"{failures.total()} full file systems: {dict(failures)}")


@pytest.mark.stress
def test_a_read_only_folder_is_one_sentence(
    tmp_path: Path, whole: Run, start: Start, mount: Callable[..., Path]
) -> None:
    folder = mount("-t", "tmpfs", "tmpfs")
    shutil.copytree(whole.logs / "run", folder / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    assert_one_sentence(start(folder / "run", "--resume"), "Read-only file system")
    assert_one_sentence(start(folder / "new"), "Read-only file system")
    # Data may be read-only.
    run = start(tmp_path / "run", "--data-root", str(folder / "run" / "data"))
    assert run.wait() == 0, run.said()


# Lost data


@pytest.mark.stress
@pytest.mark.parametrize(
    ("workers", "lost"),
    [("1", "data"), ("0", "data/GTA5/images"), ("1", "data/GTA5/images/00001.png")],
)
def test_lost_data_are_one_sentence(
    workers: str, lost: str, tmp_path: Path, whole: Run, start: Start
) -> None:
    out = tmp_path / "run"
    remove = os.remove if lost.endswith("png") else shutil.rmtree
    moment = Moment(partial(remove, out / lost), on="source-only/last.pt")
    run = start(out, "--workers", workers, moment=moment)
    assert_one_sentence(run, str(out / "data"))
    assert not run.members()
    assert_goes_on(out, whole, start)  # which draws again what is lost


# Other runs


def paused(start: Start, out: Path, on: str, *options: str) -> Run:
    """A run that has come to a moment and waits there for `proceed`."""
    run = start(out, *options, moment=Moment(partial(send, signal.SIGSTOP), on=on))
    wait_until(run, lambda: any(on in line for line in run.operations()))
    return run


def wait_until(run: Run, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and run.process.is_alive(), run.said()
        time.sleep(0.01)


def proceed(run: Run) -> None:
    os.kill(run.process.pid, signal.SIGCONT)


def test_a_second_run_is_kept_out_of_a_folder_until_the_first_one_ends(
    tmp_path: Path, whole: Run, start: Start
) -> None:
    out = tmp_path / "run"
    first = paused(start, out, "source-only/last.pt")
    for options in ([], ["--resume"]):
        assert_one_sentence(start(out, *options), f"--out {out}")
    first.process.kill()
    killed(first)
    # Two that go on at once: the lock did not survive the kill, and keeps one of them out.
    first = paused(start, out, "metrics.json", "--resume")
    assert_one_sentence(start(out, "--resume"), "Another run", f"--out {out}")
    proceed(first)
    assert first.wait() == 0, first.said()
    assert_equal(out, whole)


@pytest.mark.stress
def test_a_run_that_came_second_by_a_moment_overwrites_nothing(
    tmp_path: Path, whole: Run, start: Start
) -> None:
    out = tmp_path / "run"
    second = paused(start, out, f"{out.name}/.lock")
    assert_goes_on(out, whole, start)
    proceed(second)
    assert_one_sentence(second, "is not empty")
    assert_equal(out, whole)


@pytest.mark.stress
def test_runs_that_draw_into_one_data_root_at_once_share_it_or_are_refused(
    tmp_path: Path, whole: Run, start: Start
) -> None:
    root = tmp_path / "data"
    data = ("--data-root", str(root))
    second = paused(start, tmp_path / "second", "data/.lock", *data)
    other = paused(start, tmp_path / "other", "data/.lock", *data, "--scenes", "5")
    first = start(tmp_path / "first", *data)
    wait_until(first, (root / "GTA5").is_dir)
    proceed(second)
    assert first.wait() == second.wait() == 0, first.said() + second.said()
    proceed(other)
    assert_one_sentence(other, "scenes of other settings")
    for run in ("first", "second"):
        shutil.copytree(root, tmp_path / run / "data")
        assert_equal(tmp_path / run, whole)


# The clock


@pytest.mark.stress
def test_a_clock_set_back_changes_nothing(tmp_path: Path, whole: Run, start: Start) -> None:
    out = tmp_path / "run"
    moment = Moment(KILL, on="run/last.pt", count=4)
    killed(start(out, moment=moment, before=set_clock_back))
    run = start(out, "--resume", before=set_clock_back)
    assert run.wait() == 0, run.said()
    assert_equal(out, whole)


# Processes that draw scenes


@pytest.mark.stress
@pytest.mark.parametrize("how", ["killed", "stopped", "one killed"])
def test_processes_that_draw_end_with_the_run(
    how: str, tmp_path: Path, whole: Run, start: Start
) -> None:
    out = tmp_path / "run"
    run = start(out, before=draw_in_processes)
    drawn = out / "data" / "GTA5" / "images"
    if how == "stopped":  # while the processes start
        wait_until(run, drawn.exists)
        time.sleep(0.5)
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait() == 130
        assert run.said().startswith("Stopped") and run.said().count("\n") == 1, run.said()
    else:
        wait_until(run, (drawn / "00001.png").exists)
        if how == "killed":
            run.process.kill()
            killed(run)
        else:
            for pid in run.members():
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            assert_one_sentence(run, "killed")
    assert_soon_gone(run)
    assert_undamaged(out)
    assert_goes_on(out, whole, start)


# Many steps


@pytest.mark.parametrize("usual", [60, pytest.param(600, marks=pytest.mark.stress)])
def test_memory_handles_and_threads_stay_the_same_over_many_steps(
    usual: int, tmp_path: Path, start: Start, stress_budget: Budget
) -> None:
    # At least as many as every test run takes.
    steps, notes = max(round(stress_budget(usual)), 60), tmp_path / "notes"
    options = (
        "--scenes 12 --source-steps 1 --source-evaluate-every 0 --workers 1 "
        f"--steps {steps} --horizon 0 --log-every 5 --save-every 20 --evaluate-every 20"
    ).split()
    run = start(tmp_path / "run", *options, before=partial(measure, notes, 5))
    assert run.wait(timeout=300 + steps) == 0, run.said()
    rows = [[int(number) for number in line.split()] for line in notes.read_text().splitlines()]
    # The allocator, and what the first evaluation and checkpoint need, come to rest first.
    pages, handles, *threads = zip(*rows[6:], strict=True)
    assert max(pages) < 1.02 * min(pages), pages
    # A batch on its way from a loader process is a handle more, for a moment.
    half = len(handles) // 2
    assert min(handles[:half]) == min(handles[half:]) >= max(handles) - 2, handles
    assert all(len(set(numbers)) == 1 for numbers in threads), threads
