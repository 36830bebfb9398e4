"""The folder of a run: who may write there, and what identifies the run in it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uda.errors import UserError
from uda.presets import Settings, option

# A resumed run may differ in these settings from the run it continues, and in no others.
FREE_ON_RESUME = frozenset(
    {"out", "resume", "data_root", "device", "workers", "log_every", "save_every"}
)


def run_folder(settings: Settings) -> Path:
    """The folder that this run may write to: new, empty, or holding the run to be resumed.

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
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not settings.resume:
        raise UserError(
            f"--out {folder} is not empty: choose another folder, or continue its run with "
            "--resume."
        )
    if settings.resume:
        _refuse_other_settings(folder / "settings.json", settings)
    return folder


def _refuse_other_settings(path: Path, settings: Settings) -> None:
    if not path.is_file():
        raise UserError(f"--resume finds no run to continue, {path} does not exist: check --out.")
    earlier, now = json.loads(path.read_text()), as_json(settings)
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
    """The inverse of `as_json`."""
    values = dict(content)
    for name in ("out", "init", "data_root"):
        values[name] = values[name] and Path(values[name])
    for name in ("source_size", "target_size"):
        values[name] = tuple(values[name])
    return Settings(**values)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `path` so that it never holds half a document."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
