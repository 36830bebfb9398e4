"""The folder of a run: who may write there, and what identifies the run in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from uda import checkpoint
from uda.errors import UserError, shown
from uda.files import read_json
from uda.presets import Settings, option

try:
    import fcntl
except ImportError:  # Windows, where nobody keeps a second run out
    fcntl = None  # type: ignore[assignment]

SETTINGS = "settings.json"
LOCK = ".lock"
# What a start that failed before its first step leaves behind: nothing that is worth keeping.
ABORTED_START = frozenset({LOCK, SETTINGS, SETTINGS + checkpoint.PARTIAL})
# No setting comes near it, and Python takes minutes to write a number of a million digits.
_TOO_LARGE = 2**63
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
    """Make the folder of a run this process's own, and note the settings in it."""
    folder = settings.out
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, f"Another run writes to --out {folder}: choose another folder."):
        # Another run may have come and gone since the first look.
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
                # Unlike flock, not inherited by loader processes, which outlive a killed run by
                # seconds.
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
                f"The run in {path.parent} has {option(name)} {shown(earlier.get(name))}, not "
                f"{shown(now[name])}: resume it with the options it was started with."
            )


def as_json(settings: Settings) -> dict[str, Any]:
    """Settings in types that JSON and checkpoints hold."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def from_json(content: object) -> Settings:
    """The inverse of `as_json`, for settings of other versions too.

    What is missing has its default, and what no longer exists is left out.

    Raises:
        UserError: these are no settings, or one has a value that it cannot have.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"they are a {type(content).__name__}, not names with values")
    values = {}
    for name, hint in get_type_hints(Settings).items():
        if name not in content:
            continue
        value = content[name]
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and Path in get_args(hint):
            value = Path(value)
        if not _fits(value, hint):
            raise UserError(f"{option(name)} cannot be {shown(content[name])}")
        values[name] = value
    return Settings(**values)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of the type that `Settings` gives to a setting."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if kind in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if kind is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(map(_fits, value, arguments))
        )
    # Not isinstance, for which True and False are numbers.
    if hint in (int, float):
        return type(value) in (int, hint) and abs(value) < _TOO_LARGE
    return isinstance(value, hint)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `path` so that it never holds half a document."""
    text = json.dumps(content, indent=2) + "\n"
    checkpoint.write(path, lambda file: file.write(text.encode()))
