"""Checkpoints that survive a kill, a full disk and a wrong file.

A checkpoint is one dictionary of tensors, numbers, strings and containers of these. It is read
without running code from the file (``weights_only``), so a file from anywhere is safe to open.
Weights to be handed on are a safetensors file in half precision (`export`).
"""

from __future__ import annotations

import contextlib
import json
import os
import pickletools
import random
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch

from uda.errors import UserError, shown
from uda.files import parse_json

# What a file is called while it is being written.
PARTIAL = ".partial"
# All that a file of weights names: it is what tensors, numbers and strings are rebuilt with.
_NAMES = frozenset(
    """
    collections.OrderedDict _codecs.encode torch.Size torch.device
    torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter
    torch.DoubleStorage torch.FloatStorage torch.HalfStorage torch.BFloat16Storage
    torch.LongStorage torch.IntStorage torch.ShortStorage torch.CharStorage torch.ByteStorage
    torch.BoolStorage
    numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray.scalar
    """.split()
)
# Of names and shapes, which are a few hundred kilobytes; the numbers lie apart from them.
_LARGEST_PICKLE = 2**24
# A file from before torch 1.6 is five pickles, then the numbers.
_LEGACY_PICKLES = 5


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
        # Whatever is raised while torch's archive writer writes, it raises a RuntimeError instead.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, KeyboardInterrupt):
            raise reason from None
        with contextlib.suppress(OSError):  # a read-only file system refuses this, too
            partial.unlink()
        raise UserError(
            f"{path} could not be written ({_reason(reason or error)}); free some space or choose "
            "another --out (what was there before is kept)"
        ) from error


def load(
    path: Path, *, expect: Mapping[str, Any] | None = None, needs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote.

    Args:
        path: the file.
        expect: entries that must be in the checkpoint with just these values, such as
            ``{"architecture": "small", "classes": 19}``.
        needs: entries that must be there with any value of a type, such as ``{"step": int}``.

    Raises:
        UserError: the file is missing, half-written, or of another kind, or differs from `expect`.
    """
    state, expect = read(path), expect or {}
    needs = {name: type(wanted) for name, wanted in expect.items()} | dict(needs or {})
    for name, kind in needs.items():
        if name not in state:
            raise UserError(f"{path} is no checkpoint of this script: it has no entry {name!r}")
        if not isinstance(state[name], kind):
            raise UserError(
                f"{path} is no checkpoint of this script: its entry {name!r} is of type "
                f"{type(state[name]).__name__}"
            )
    for name, wanted in expect.items():
        if state[name] != wanted:
            raise UserError(
                f"{path} was written with {name} = {shown(state[name])}, but this run has {name} = "
                f"{wanted}; give the matching option or another checkpoint"
            )
    return state


def export(path: Path, weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Write the weights of a network as safetensors in half precision, with their settings.

    Vectors keep their precision: there are few, and BatchNorm's variances of images on the scale
    0..255 can exceed what half precision holds.
    """
    tensors = {
        name: (weight.half() if weight.ndim > 1 else weight).contiguous()
        for name, weight in weights.items()
    }
    content = safetensors.torch.save(tensors, {"settings": json.dumps(settings)})
    write(path, lambda file: file.write(content))


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        state: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}
        settings = (file.metadata() or {}).get("settings")
    return state if settings is None else state | {"settings": parse_json(settings)}


class _NumpyType:
    """Stands in for numpy.dtype, whose own way to read a pickle trusts what the pickle says."""

    def __init__(self, name: str, *_: object) -> None:
        self.code = {"f8": "d", "f4": "f", "i8": "q"}[name]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {"<": "<", ">": ">"}[state[1]]


def _numpy_number(kind: _NumpyType, content: bytes) -> float:
    return struct.unpack(kind.order + kind.code, content)[0]


# Checkpoints of the published code hold their best score as a NumPy number.
_STAND_INS = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
]


def read(path: Path) -> dict[str, Any]:
    """The dictionary in any file that ``torch.save`` wrote, on the CPU; UserError if none is.

    Of a safetensors file: its weights as "model", and "settings" if it holds any.

    Whatever the file says, no code out of it runs, and what it unpacks to is no larger than the
    file itself.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no file")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        _inspect(path)
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
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


def _inspect(path: Path) -> None:
    """Refuse a damaged file, and what is harmless to open but not to the machine.

    torch.load would inflate kilobytes to gigabytes, make a bytearray of any length that a pickle
    asks for, and count its elements for hours. It does not notice a flipped bit among the weights.
    """
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not is_archive:
            for _ in range(_LEGACY_PICKLES):
                _refuse_other_names(file)
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it unpacks to more than its own size")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                with archive.open(entry) as file:
                    _refuse_other_names(file)


def _refuse_other_names(file: IO[bytes]) -> None:
    """Read over one pickle, without doing what it says."""
    start = file.tell()
    for operation, argument, position in pickletools.genops(file):
        if position is not None and position - start > _LARGEST_PICKLE:
            raise ValueError(f"a pickle in it has more than {_LARGEST_PICKLE:,} bytes")
        # Others that name something, such as STACK_GLOBAL, torch.load refuses.
        if operation.name == "GLOBAL" and argument.replace(" ", ".") not in _NAMES:
            raise ValueError(f"it calls for {argument.replace(' ', '.')}, which no weights need")


def _reason(error: BaseException) -> str:
    """The first line of an error: what a user needs of it in one sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Whatever does not fit in a checkpoint, while its content is put to use, names its file."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} does not hold the state of such a run ({_reason(error)}); give its other "
            "options again, or another checkpoint"
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
    """Put back what `random_state` returned; generators of absent CUDA devices are left out."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
