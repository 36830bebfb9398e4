"""Checkpoints that survive a kill, a full disk and a wrong file.

A checkpoint is one dictionary of tensors, numbers, strings and containers of these. It is read
without running code from the file (``weights_only``), so a file from anywhere is safe to open.
Weights for others are exported as a safetensors file in half precision (`export`).
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from uda.errors import UserError

# The ending of a file's name while it is being written.
PARTIAL = ".partial"


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
    except (OSError, RuntimeError) as error:
        # torch's archive writer turns every exception while it writes into a RuntimeError.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        # Signals raise within any line: Ctrl-C, and PyTorch's word of a loader process that died.
        for cause in (reason, error):
            if isinstance(cause, KeyboardInterrupt) or "DataLoader worker" in str(cause):
                raise cause from None
        with contextlib.suppress(OSError):  # a read-only file system refuses this, too
            partial.unlink()
        raise UserError(
            f"{path} could not be written ({_reason(reason or error)}): free some space or choose "
            "another --out (the old file is kept)."
        ) from error


def load(
    path: Path, *, expect: Mapping[str, Any] | None = None, needs: Iterable[str] = ()
) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote.

    Args:
        path: the file.
        expect: entries that must be in the checkpoint with exactly these values, such as
            ``{"network": "small", "classes": 19}``.
        needs: entries that must be there with any value.

    Raises:
        UserError: the file is missing, half-written, or of another kind, or differs from `expect`.
    """
    state, expect = read(path), expect or {}
    for name in (*expect, *needs):
        if name not in state:
            raise UserError(
                f"{path} is no checkpoint of this version of the script: it has no entry {name!r}."
            )
    for name, wanted in expect.items():
        if state[name] != wanted:
            raise UserError(
                f"{path} was written with {name} = {state[name]}, but this run has {name} = "
                f"{wanted}: give the matching option or another checkpoint."
            )
    return state


def read(path: Path) -> dict[str, Any]:
    """The dictionary in any file that ``torch.save`` wrote, on the CPU; UserError if none is.

    A safetensors file gives its weights as "model", and "settings" if it holds any.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch.load does not compare the checksums.
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged byte can make the unpickler raise anything
        raise UserError(
            f"{path} cannot be read as a checkpoint ({_reason(error)}): give a complete file "
            "written by torch.save or safetensors."
        ) from error
    if not isinstance(state, dict):
        raise UserError(
            f"{path} holds a {type(state).__name__}, not a dictionary of weights: "
            "give a checkpoint or a state dict."
        )
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file, either by themselves or under "model" or "state_dict"."""
    content = read(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    weights = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if len(weights) < len(content) or not weights:
        raise UserError(
            f'{path} holds no weights, neither by themselves nor under "model" or "state_dict".'
        )
    return weights


def strip_prefix(weights: Mapping[str, Tensor], first: str) -> dict[str, Tensor]:
    """Remove from all names what precedes the network's `first` name, such as "module."."""
    # Deeper modules may use the name again, behind a longer prefix.
    found = min((key for key in weights if key.endswith(first)), key=len, default=first)
    prefix = found.removesuffix(first)
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], path: Path, *, optional: tuple[str, ...] = ()
) -> None:
    """Give a network the weights of a file, which must fit.

    Args:
        network: receives the weights.
        weights: the weights by the names of the network.
        path: the file that they come from.
        optional: beginnings of names that the file may lack.

    Raises:
        UserError: names the first weights that are missing, unknown, or of another shape or type.
    """
    own = network.state_dict()
    # Files from before torch 0.4.1 do not count batches, and no code here needs that number.
    missing = [
        key
        for key in own
        if key not in weights and not key.startswith(optional)
        if not key.endswith("num_batches_tracked")
    ]
    unknown = [key for key in weights if key not in own]
    shared = [(key, weights[key], wanted) for key, wanted in own.items() if key in weights]
    misshapen = [
        f"{key} {tuple(weight.shape)} where this network has {tuple(wanted.shape)}"
        for key, weight, wanted in shared
        if weight.shape != wanted.shape
    ]
    # The integers of a quantised model mean nothing without their scale.
    mistyped = [
        f"{key} in {weight.dtype}"
        for key, weight, wanted in shared
        if weight.is_floating_point() != wanted.is_floating_point()
    ]
    problems = {"lacks": missing, "has unknown": unknown, "has": misshapen or mistyped}
    for problem, keys in problems.items():
        if keys:
            listed = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(
                f"{path} does not fit this network: it {problem} {listed}; "
                "give weights of the same architecture and number of classes."
            )
    network.load_state_dict(weights, strict=False)


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        state: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}
        settings = (file.metadata() or {}).get("settings")
    return state if settings is None else state | {"settings": json.loads(settings)}


class _NumpyType:
    """Stands in for numpy.dtype, which trusts the memory layout that a pickle describes."""

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


def _numpy_number(kind: _NumpyType, content: bytes) -> int | float:
    (number,) = np.frombuffer(content, kind.name).tolist()
    return number


# The best score in checkpoints of the published code is a NumPy number.
_NUMPY_NUMBERS = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
]


def export(path: Path, weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Write the weights of a network as safetensors in half precision, with their settings.

    Vectors keep their precision: they are small, and BatchNorm's variances of images on the scale
    0..255 can exceed the range of half precision.
    """
    tensors = {
        name: (weight.half() if weight.ndim > 1 else weight).contiguous()
        for name, weight in weights.items()
    }
    content = safetensors.torch.save(tensors, {"settings": json.dumps(settings)})
    write(path, lambda file: file.write(content))


def _reason(error: BaseException) -> str:
    """The cause of an error in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pickle.UnpicklingError):  # torch explains it in a page
        return "it is damaged, or holds more than tensors, numbers and strings"
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turn what goes wrong while the content of a checkpoint is restored into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} does not hold the state of such a run ({_reason(error)}): give its other "
            "options again, or another checkpoint."
        ) from error


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
    """Restore a `random_state`, without the generators of CUDA devices that are absent."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
