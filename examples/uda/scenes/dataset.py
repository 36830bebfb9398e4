"""The data set on disk, in the layouts and encodings of GTA5 and Cityscapes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from uda.datasets import CITYSCAPES_CLASSES, Progress
from uda.errors import UserError
from uda.outputs import LOCK, lock, read_json
from uda.scenes.scene import FEATURES, scene
from uda.scenes.styles import CAMERA, GAME

_POOL_FROM = 64  # images; for fewer, worker processes cost more time than they save
_MARKER = "scenes.json"
_GRAMMAR = 1  # increase it when the same seed gives other pictures
# Streams of random numbers: source, target training, target validation, source validation.
_SOURCE, _TARGET, _TARGET_VAL, _SOURCE_VAL = range(4)
_CITIES = (("ahorn", "birke", "linde", "ulme"), ("eiche", "kiefer"))


class _Plan(NamedTuple):
    """The arguments of `render`, which determine every picture of a data set."""

    seed: int
    train: int
    val: int
    size: tuple[int, int]
    source_size: tuple[int, int]
    source_val: int

    @property
    def settings(self) -> dict[str, object]:
        """The plan as the folder of the data set notes it."""
        noted = {"grammar": _GRAMMAR, **self._asdict()}
        if not self.source_val:
            del noted["source_val"]
        return noted | {"size": [*self.size], "source_size": [*self.source_size]}


class _Job(NamedTuple):
    """One picture to render; seed, `split` and `number` determine its content."""

    image: Path
    labels: Path
    seed: int
    split: int
    number: int
    size: tuple[int, int]


def render(
    root: str | Path,
    *,
    seed: int,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (160, 320),
    source_size: tuple[int, int] | None = None,
    source_val: int = 0,
    on_progress: Progress | None = None,
) -> None:
    """Write a source set in the GTA5 and a target set in the Cityscapes layout and encoding.

    Files that an earlier call with the same settings finished are kept, so that an interrupted
    call can be repeated. The same settings give the same pictures.

    Args:
        root: folder for GTA5/ and Cityscapes/; made if missing.
        seed: seed of all random numbers.
        train: number of source pictures, and of target training pictures.
        val: number of target validation pictures.
        size: (height, width) of target pictures.
        source_size: (height, width) of source pictures; by default one eighth taller than the
            target's, like a 16:9 game beside a 2:1 camera.
        source_val: number of source validation pictures, which GTA5/list/ separates from the
            training pictures; with 0 there is no list, and all are for training.
        on_progress: called with (pictures done, pictures in all).

    Raises:
        UserError: root holds other data, or cannot be written.
    """
    root = Path(root)
    source_size = source_size or (size[0] * 9 // 8, size[1])
    plan = _Plan(seed, train, val, size, source_size, source_val)
    jobs = _jobs(root, plan)
    try:
        _claim(root, plan.settings)
        _write_lists(root / "GTA5" / "list", train, source_val)
        for folder in {path.parent for job in jobs for path in (job.image, job.labels)}:
            folder.mkdir(parents=True, exist_ok=True)
        todo = [job for job in jobs if not (job.image.is_file() and job.labels.is_file())]
        done = len(jobs) - len(todo)
        for _ in _rendered(todo):
            done += 1
            if on_progress is not None:
                on_progress(done, len(jobs))
    except BrokenProcessPool as error:
        raise UserError(
            "A process that draws scenes was killed, perhaps for want of memory: free some, and "
            "start again; what is drawn is kept."
        ) from error
    except OSError as error:
        raise UserError(
            f"The scenes cannot be written to {root} ({error}): free space there or choose "
            "another folder."
        ) from error


def check(
    root: str | Path,
    *,
    seed: int,
    train: int,
    val: int,
    size: tuple[int, int],
    source_size: tuple[int, int],
    source_val: int = 0,
) -> None:
    """Raise the UserError of `render` if the folder holds other data; writes nothing."""
    _holds(Path(root), _Plan(seed, train, val, size, source_size, source_val).settings)


def _claim(root: Path, settings: dict[str, object]) -> None:
    """Note in the folder what it holds, or refuse a folder that holds something else."""
    if _holds(root, settings):
        return
    root.mkdir(parents=True, exist_ok=True)
    with lock(root / LOCK):  # another run with other settings may claim it at the same moment
        if not _holds(root, settings):
            content = json.dumps(settings)
            _replace(root / _MARKER, lambda part: part.write_text(content, encoding="utf-8"))


def _holds(root: Path, settings: dict[str, object]) -> bool:
    """Whether the folder holds these scenes; UserError if it holds something else."""
    marker = root / _MARKER
    if marker.is_file():
        if read_json(marker) != settings:
            raise UserError(
                f"{root} holds scenes of other settings (see {marker}): choose another folder or "
                "remove this one."
            )
        return True
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: choose a folder for the scenes.")
    for name in ("GTA5", "Cityscapes"):
        if (root / name).exists():
            raise UserError(
                f"{root / name} exists and was not rendered by this program: choose another "
                "folder for the scenes."
            )
    return False


def _jobs(root: Path, plan: _Plan) -> list[_Job]:
    seed, train, val, size, source_size, source_val = plan
    jobs = []
    images, labels = root / "GTA5" / "images", root / "GTA5" / "labels"
    # The number of training pictures changes the file name of a source validation picture, but not
    # its content.
    for split, first, count in ((_SOURCE, 1, train), (_SOURCE_VAL, train + 1, source_val)):
        for i in range(count):
            name = f"{first + i:05d}.png"
            jobs.append(_Job(images / name, labels / name, seed, split, i, source_size))
    for split, part, count in ((_TARGET, "train", train), (_TARGET_VAL, "val", val)):
        for i in range(count):
            cities = _CITIES[split - _TARGET]
            city = cities[i % len(cities)]
            images = root / "Cityscapes" / "leftImg8bit" / part / city
            labels = root / "Cityscapes" / "gtFine" / part / city
            # The real frames are the 20th of their sequences.
            name = f"{city}_{i:06d}_000019"
            image, label = f"{name}_leftImg8bit.png", f"{name}_gtFine_labelIds.png"
            jobs.append(_Job(images / image, labels / label, seed, split, i, size))
    return jobs


def _write_lists(folder: Path, train: int, source_val: int) -> None:
    """List which source pictures are for training and which for validation."""
    if not source_val:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, count in (("train", 1, train), ("val", train + 1, source_val)):
        path = folder / f"{split}.txt"
        names = "".join(f"{i:05d}\n" for i in range(first, first + count))
        if not path.is_file():  # a finished data set may be read-only
            _replace(path, lambda part, names=names: part.write_text(names, encoding="utf-8"))


def _rendered(jobs: Sequence[_Job]) -> Iterator[None]:
    if len(jobs) < _POOL_FROM:
        yield from map(_render, jobs)
        return
    # Spawned, because a fork of a process that has run torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    workers = min(_cores(), 16)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        with _without_ctrl_c():
            done = pool.map(_render, jobs, chunksize=4)
        yield from done


def _end_with_parent() -> None:
    """Let this worker process end when the process that started it is killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Let the processes that are started here ignore Ctrl-C, which their parent handles."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _render(job: _Job) -> None:
    style = GAME if job.split in (_SOURCE, _SOURCE_VAL) else CAMERA
    feature = FEATURES[job.number % len(FEATURES)]
    picture, ids = scene((job.seed, job.split, job.number), style, job.size, feature)
    labels = Image.fromarray(ids)
    if style is GAME:
        labels.putpalette(_PALETTE)
    for path, image in ((job.image, Image.fromarray(picture)), (job.labels, labels)):
        _replace(path, lambda part, image=image: image.save(part, "png", compress_level=1))


def _palette() -> bytes:
    colors = np.zeros((256, 3), dtype=np.uint8)
    for _, label, color in CITYSCAPES_CLASSES:
        colors[label] = color
    return colors.tobytes()


_PALETTE = _palette()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
