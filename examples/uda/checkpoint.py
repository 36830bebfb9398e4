"""Checkpoints that survive a kill, a full disk and a wrong file.

A checkpoint is one dictionary of tensors, numbers, strings and containers of these. It is read
without running code from the file (``weights_only``), so a file from anywhere is safe to open.
Weights to be handed on are a safetensors file in half precision (`export`).
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch

from uda.errors import UserError

# What a file is called while it is being written.
PARTIAL = ".partial"
# Older checkpoints hold their best score as a NumPy number; these names rebuild it, nothing else.
_scalar = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "int64")},
]


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` as a checkpoint; whole or not at all, as `write` does."""
    write(path, lambda file: torch.save(dict(state), file))


def write(path: Path, content: Callable[[BinaryIO], object]) -> None:
    """Let `content` write a file so that `path` holds either its old content or all of the new one.

    Raises:
        UserError: the file cannot be written, for example because the disk is full; an older file
            of that name is still there.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    # torch's archive writer turns some failed writes into RuntimeError
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written ({_reason(error)}); free some space or choose another "
            "--out (what was there before is kept)"
        ) from error


def load(
    path: Path, *, expect: Mapping[str, Any] | None = None, needs: Iterable[str] = ()
) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote.

    Args:
        path: the file.
        expect: entries that must be in the checkpoint with just these values, such as
            ``{"architecture": "small", "classes": 19}``.
        needs: entries that must be there with any value.

    Raises:
        UserError: the file is missing, half-written, or of another kind, or differs from `expect`.
    """
    state, expect = read(path), expect or {}
    for name in (*expect, *needs):
        if name not in state:
            raise UserError(f"{path} is no checkpoint of this script: it has no entry {name!r}")
    for name, wanted in expect.items():
        if state[name] != wanted:
            raise UserError(
                f"{path} was written with {name} = {state[name]}, but this run has {name} = "
                f"{wanted}; give the matching option or another checkpoint"
            )
    return state


def export(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the weights of a checkpoint as safetensors in half precision, with their settings.

    Vectors keep their precision: there are few, and BatchNorm's variances of images on the scale
    0..255 can exceed what half precision holds.
    """
    tensors = {
        name: (weight.half() if weight.ndim > 1 else weight).contiguous()
        for name, weight in state["model"].items()
    }
    content = safetensors.torch.save(tensors, {"settings": json.dumps(settings)})
    write(path, lambda file: file.write(content))


def _read_safetensors(path: Path) -> dict[str, Any]:
    path.stat()  # of a missing file: the reason alone, without the path once more
    with safetensors.safe_open(path, framework="pt") as file:
        state: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}
        settings = (file.metadata() or {}).get("settings")
    return state if settings is None else state | {"settings": json.loads(settings)}


def read(path: Path) -> dict[str, Any]:
    """The dictionary in any file that ``torch.save`` wrote, on the CPU; UserError if none is.

    Of a safetensors file: its weights as "model", and "settings" if it holds any.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS), warnings.catch_warnings():
            # What torch finds odd about a file is no use beside the one sentence of the refusal.
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged byte can make the unpickler run into anything, an IndexError or a KeyError as well.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({_reason(error)}); give a complete file "
            "written by torch.save or safetensors"
        ) from error
    if not isinstance(state, dict):
        raise UserError(
            f"{path} holds a {type(state).__name__}, not a dictionary of weights; "
            "give a checkpoint or a state dict"
        )
    return state


def _reason(error: Exception) -> str:
    """The first line of an error: what a user needs of it in one sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def random_state() -> dict[str, Any]:
    """The state of every global random generator: Python, NumPy, torch, and each CUDA device."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned; generators of absent CUDA devices are left out."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
