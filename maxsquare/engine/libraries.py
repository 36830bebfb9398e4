"""The library of the CPU kernels: `cpu.cpp`, compiled on first use.

The machine's own compiler makes it for the processor at hand, as Triton and torch.compile make
their kernels, and the result is kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
# Not -ffast-math, which would lose NaN and infinities.
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O3", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-w"),
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
)
COMPILER_SECONDS = 120


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for logits of a dtype; None, after a warning, where they cannot be made."""
    if dtype not in LIBRARIES:
        with COMPILING:
            if dtype not in LIBRARIES:
                LIBRARIES[dtype] = make_library(dtype)
    return LIBRARIES[dtype]


LIBRARIES: dict[torch.dtype, ctypes.CDLL | None] = {}
# Threads that need the kernels at once wait for one compiler.
COMPILING = threading.RLock()


def make_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """`library`, by the first compiler that makes it."""
    flags = (*FLAGS, "-DDOUBLE") if dtype == torch.float64 else FLAGS
    problem = "there is none"
    for compiler in compilers():
        try:
            return load(compiler, flags)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[-1])
        except subprocess.TimeoutExpired:
            reason = f"takes longer than {COMPILER_SECONDS} seconds"
        except OSError as error:  # of the loader, it has no other text than a temporary name
            reason = error.strerror or "what it makes cannot be loaded"
        problem = f"{shlex.join(compiler)}: {reason}"
    warnings.warn(
        "maxsquare computes slowly on this CPU, as no C++ compiler makes its kernels "
        f"({problem}). Install one (Debian and Ubuntu: apt-get install g++), or name it in the "
        "environment variable CXX.",
        stacklevel=3,
    )
    return None


def compilers() -> Iterator[list[str]]:
    """Commands to try: that of CXX or CC, else those that are usual."""
    named = [os.environ[name] for name in ("CXX", "CC") if os.environ.get(name, "").strip()]
    for command in named or ("cc", "gcc", "clang"):
        try:
            program, *options = shlex.split(command)
        except ValueError:  # a quotation mark without its pair
            program, *options = command.split()
        path = shutil.which(program)
        if path or named:  # one that was named and is not there is a problem to tell
            yield [path or program, *options]


def load(compiler: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    """The compiled kernels, from the user's cache folder if they are there."""
    key = digest(SOURCE.read_bytes(), repr((compiler, flags)), identity(compiler), processor())
    folder = cache_folder()
    for path in folder.glob(f"cpu-{key}-*.so"):
        try:
            # What another user put there may be anything.
            if hasattr(os, "geteuid") and path.stat().st_uid not in (0, os.geteuid()):
                continue
            # A damaged library would take the process down with it, so its name has its checksum.
            if path.stem.endswith(digest(path.read_bytes())):
                return ctypes.CDLL(str(path))
            path.unlink()
        except OSError:  # unreadable, or on a file system from which nothing is executed
            continue
    # Not TemporaryDirectory: a process forked meanwhile would remove it at its end.
    scratch = tempfile.mkdtemp()
    try:
        fresh = Path(scratch, "cpu.so")
        subprocess.run(
            [*compiler, *flags, str(SOURCE), "-o", str(fresh)],
            check=True,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMPILER_SECONDS,
            # Control-C is for this process, which may go on after it.
            start_new_session=True,
        )
        kept = keep(fresh, folder, key)
        # Nothing is executed from some folders for temporary files, nor from some home folders.
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(fresh))
    finally:
        # A library in use cannot be removed everywhere.
        shutil.rmtree(scratch, ignore_errors=True)


def keep(fresh: Path, folder: Path, key: str) -> Path:
    """Where a compiled library is kept; where it is, if the folder does not take it."""
    content = fresh.read_bytes()
    kept = folder / f"cpu-{key}-{digest(content)}.so"
    part = folder / f".{fresh.parent.name}"  # a name that no other process has
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, kept)
        return kept
    except OSError:  # the next process compiles again
        return fresh
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):  # as the standard of XDG_CACHE_HOME demands
            return Path(folder, "maxsquare")
    return Path(os.devnull)  # nobody's home: nothing is kept


def identity(compiler: list[str]) -> str:
    """What changes with another version of the compiler; asking it would take much longer."""
    program = os.path.realpath(compiler[0])
    status = os.stat(program)
    return f"{program} {status.st_size} {status.st_mtime_ns}"


def processor() -> str:
    """What changes with another processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    known = [line for line in lines if line.startswith(names)]
    return repr((platform.machine(), platform.processor(), known))


def digest(*parts: bytes | str) -> str:
    joined = b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha256(joined).hexdigest()[:32]


def start_anew() -> None:
    """A forked process has none of its parent's threads, which may have held the lock."""
    global COMPILING
    COMPILING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)
