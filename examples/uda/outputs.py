"""The folder of a run: who may write there, and what identifies the run in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from uda import checkpoint
from uda.errors import UserError
from uda.presets import Settings, option

try:
    import fcntl
except ImportError:  # Windows, where a second run is not kept out
    fcntl = None  # type: ignore[assignment]

SETTINGS = "settings.json"
LOCK = ".lock"
# The files of a start that failed before its first step: a new run may replace them.
ABORTED_START = frozenset({LOCK, SETTINGS, SETTINGS + checkpoint.PARTIAL})
# A resumed run may differ in these settings from the run it continues, and in no others.
FREE_ON_RESUME = frozenset(
    {"out", "resume", "data_root", "device", "workers", "log_every", "save_every"}
)


def run_folder(settings: Settings) -> Path:
    """The folder that this run may write to: new, without a run, or holding the one to be resumed.

    Nothing is created or changed yet.
    """
    if settings.out is None:
        if settings.resume:
            raise UserError("--resume continues the run in a folder: name that folder with --out.")
        name = f"{settings.preset.replace('/', '-')}-{settings.method}-seed{settings.seed}"
        folder, number = Path("runs") / name, 2
        while folder.exists():
            folder, number = Path("runs") / f"{name}-{number}", number + 1
        return folder
    folder = settings.out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: choose a new folder.")
    occupied = folder.is_dir() and any(path.name not in ABORTED_START for path in folder.iterdir())
    if occupied and not settings.resume:
        raise UserError(
            f"--out {folder} is not empty: choose another folder, or continue its run with "
            "--resume."
        )
    if settings.resume:
        _refuse_other_settings(folder / SETTINGS, settings)
    return folder


@contextlib.contextmanager
def claim(settings: Settings) -> Iterator[None]:
    """Keep other runs out of the folder of a run, and note the settings in it."""
    folder = settings.out
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, f"Another run writes to --out {folder}: choose another folder."):
        # Another run may have started and ended since the first check.
        run_folder(settings)
        write_json(folder / SETTINGS, as_json(settings))
        yield


@contextlib.contextmanager
def lock(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Keep other processes out that lock the same file, however this one ends.

    Args:
        path: a file for the purpose; it is made if missing, and stays.
        refusal: the UserError if another process has the lock; None: wait for it.
    """
    with path.open("a") as file:
        if fcntl is not None:
            try:
                # Loader processes inherit a lock of flock, but not this one, and may outlive a
                # killed run by seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if refusal is None else fcntl.LOCK_NB))
            except (BlockingIOError, PermissionError) as error:
                raise UserError(refusal) from error
            except OSError:
                pass  # a file system without locks
        yield


def _refuse_other_settings(path: Path, settings: Settings) -> None:
    if not path.is_file():
        raise UserError(f"--resume finds no run to continue, {path} does not exist: check --out.")
    earlier, now = read_json(path), as_json(settings)
    for name in sorted(now.keys() - FREE_ON_RESUME):
        if earlier.get(name) != now[name]:
            raise UserError(
                f"The run in {path.parent} has {option(name)} {earlier.get(name)}, not "
                f"{now[name]}: resume it with the options it was started with."
            )


def as_json(settings: Settings) -> dict[str, Any]:
    """Settings in types that JSON and checkpoints hold."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def from_json(content: Mapping[str, Any]) -> Settings:
    """The inverse of `as_json`, for settings of other versions too.

    A missing setting gets its default; one that no longer exists is ignored.
    """
    values = {}
    for name, hint in get_type_hints(Settings).items():
        if name in content:
            value = content[name]
            if name == "target_weight" and isinstance(value, (int, float)):  # up to 0.2.0
                value = (value,)
            elif isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, str) and Path in get_args(hint):
                value = Path(value)
            values[name] = value
    if values.get("backbone_updates") == "published":  # its name up to 0.2.0
        values["backbone_updates"] = "duplicated"
    return Settings(**values)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `path` so that it never holds half a document."""
    text = json.dumps(content, indent=2) + "\n"
    checkpoint.write(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of these scripts; UserError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it or remove it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no object): restore it or remove it.")
    return content
