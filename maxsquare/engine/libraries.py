"""The library of the CPU kernels: ready-made in a wheel, or compiled from `cpu.cpp` on first use.

A compiler of this machine makes it for its processor, as Triton and torch.compile make their
kernels, and the result is kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
# Not -ffast-math, which would lose NaN and infinities. Without exceptions and type information the
# library needs nothing of C++'s own library, which the command for C (cc, clang) does not link.
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O3", "-shared", "-w", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math"),
    *(() if sys.platform == "win32" else ("-fPIC",)),
)
ARM = platform.machine().lower() in ("aarch64", "arm64")
NATIVE = "-mcpu=native" if ARM else "-march=native"
# Zig compiles its own libraries before the first program: minutes on a slow machine.
COMPILER_SECONDS = 300
ADVICE = {
    "darwin": "pip install ziglang, or xcode-select --install",
    "win32": "pip install ziglang; cl of Visual Studio does not take the options",
}
ADVICE_ELSEWHERE = "pip install ziglang, or on Debian and Ubuntu apt-get install g++"


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for logits of a dtype; None, after a warning, where there are none."""
    if dtype not in LIBRARIES:
        with COMPILING:
            if dtype not in LIBRARIES:
                LIBRARIES[dtype] = find_library(dtype)
    return LIBRARIES[dtype]


LIBRARIES: dict[torch.dtype, ctypes.CDLL | None] = {}
# Threads that need the kernels at once wait for one compiler.
COMPILING = threading.RLock()


def find_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """`library`: by a compiler that the user names, else ready-made, else by a usual compiler."""
    named = named_compilers()
    found = None if named else ready_made(dtype)
    try:
        return found or compiled(dtype)
    except OSError as error:
        found = ready_made(dtype) if named else None
        if not found:
            warnings.warn(
                f"maxsquare computes slowly on this CPU, without its kernels: {error}.",
                stacklevel=3,
            )
        return found


# Ready-made ---------------------------------------------------------------------------------------


def ready_made(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library that came with the wheel for this processor, if one did."""
    precision = "double" if dtype == torch.float64 else "single"
    for level in levels():
        for path in SOURCE.parent.glob(f"cpu-{level}-{precision}.*"):
            with contextlib.suppress(OSError):  # on a file system from which nothing is executed
                return open_library(path)
    return None


def levels() -> tuple[str, ...]:
    """What a ready-made library may demand of this processor, the most first."""
    if ARM:
        return ("arm64",)
    # PyTorch asks the processor on every system. Those with AVX2 and FMA have all of x86-64-v3,
    # those with AVX-512 BW, DQ and VL all of x86-64-v4.
    known = {"AVX512": ("x86-64-v4", "x86-64-v3"), "AVX2": ("x86-64-v3",)}
    return known.get(torch.backends.cpu.get_cpu_capability(), ())


# Compiled -----------------------------------------------------------------------------------------


def compiled(dtype: torch.dtype) -> ctypes.CDLL:
    """The library that a compiler of this machine makes, or made before; OSError: none does."""
    if not SOURCE.exists():
        raise FileNotFoundError(
            f"neither a ready-made library nor their source is at {SOURCE}. "
            "A frozen application must take both along"
        )
    flags = (*FLAGS, "-DDOUBLE") if dtype == torch.float64 else FLAGS
    # What the library computes, and for which processor: any compiler's will do where none works.
    # Another compiler, or another version, compiles anew, as it may be faster or have lost a bug.
    content = digest(SOURCE.read_bytes(), repr(flags), processor())
    problem = "there is none"
    for compiler in compilers():
        try:
            key = f"{content}-{digest(repr(compiler), identity(compiler))}"
            return cached(key) or compile_with(compiler, flags, key)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[-1])
        except subprocess.TimeoutExpired:
            reason = f"takes longer than {COMPILER_SECONDS} seconds"
        except OSError as error:
            reason = str(error)
        problem = f"{shlex.join(compiler)}: {reason}"
    found = cached(f"{content}-*")
    if not found:
        raise OSError(
            f"no C++ compiler makes them ({problem}). Install one "
            f"({ADVICE.get(sys.platform, ADVICE_ELSEWHERE)}), "
            "or name it in the environment variable CXX"
        )
    return found


def compilers() -> Iterator[list[str]]:
    """Commands to try: those of CXX and CC, else those that are usual."""
    if named := named_compilers():
        for program, *options in named:
            # One that is not there is a problem to tell.
            yield [shutil.which(program) or program, *options]
        return
    # On Windows clang needs Visual Studio, and GCC does not align the stack for vectors.
    for program in () if sys.platform == "win32" else ("cc", "gcc", "clang"):
        if path := shutil.which(program):
            yield [path]
    # `python -m ziglang cc`, by its program, whose version `identity` sees.
    if (ziglang := importlib.util.find_spec("ziglang")) and ziglang.origin:
        if path := shutil.which("zig", path=os.path.dirname(ziglang.origin)):
            yield [path, "cc"]


def named_compilers() -> list[list[str]]:
    """The commands of CXX and CC, taken apart."""
    named = [os.environ[name] for name in ("CXX", "CC") if os.environ.get(name, "").strip()]
    return [[command] if shutil.which(command) else split(command) for command in named]


def split(command: str) -> list[str]:
    """A command's words; a backslash of Windows is part of a path."""
    try:
        if sys.platform == "win32":
            return [word.strip('"') for word in shlex.split(command, posix=False)]
        return shlex.split(command)
    except ValueError:  # a quotation mark without its pair
        return command.split()


def cached(key: str) -> ctypes.CDLL | None:
    """A library of the user's cache folder."""
    for path in cache_folder().glob(f"cpu-{key}-*.so"):
        try:
            # What another user put there may be anything.
            if hasattr(os, "geteuid") and path.stat().st_uid not in (0, os.geteuid()):
                continue
            # A damaged library would take the process down with it, so its name has its checksum.
            if path.stem.endswith(digest(path.read_bytes())):
                return open_library(path)
            path.unlink()
        except OSError:  # unreadable, or on a file system from which nothing is executed
            continue
    return None


def compile_with(compiler: list[str], flags: tuple[str, ...], key: str) -> ctypes.CDLL:
    """The library that a compiler makes, which the user's cache folder keeps."""
    # Not TemporaryDirectory: a process forked meanwhile would remove it at its end.
    scratch = tempfile.mkdtemp()
    try:
        fresh = Path(scratch, "cpu.so")
        command = [*compiler, *flags, NATIVE, str(SOURCE), "-o", str(fresh)]
        try:
            call_compiler(command)
        except subprocess.CalledProcessError as error:
            # Some compilers know no processor of this name.
            if "native" not in error.stderr:
                raise
            call_compiler([word for word in command if word != NATIVE])
        kept = keep(fresh, key)
        # Nothing is executed from some folders for temporary files, nor from some home folders.
        with contextlib.suppress(OSError):
            return open_library(kept)
        return open_library(fresh)
    except OSError as error:
        # The same words for every dtype, so that they are shown once.
        raise OSError(str(error).replace(scratch + os.sep, "")) from error
    finally:
        # A library in use cannot be removed everywhere.
        shutil.rmtree(scratch, ignore_errors=True)


def call_compiler(command: list[str]) -> None:
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=COMPILER_SECONDS,
        # Control-C is for this process, which may go on after it.
        start_new_session=True,
    )


def keep(fresh: Path, key: str) -> Path:
    """Where a compiled library is kept; where it is, if the folder does not take it."""
    content = fresh.read_bytes()
    folder = cache_folder()
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


def open_library(path: Path) -> ctypes.CDLL:
    """The library of a file; OSError: it cannot be loaded, or is another."""
    kernels = ctypes.CDLL(str(path))
    if not hasattr(kernels, "weighted_sum"):
        raise OSError(f"{path}: does not export the kernels")
    return kernels


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
    # On some systems `platform.processor` calls a command, which is not always on the path.
    return repr((platform.machine(), known or platform.processor()))


def digest(*parts: bytes | str) -> str:
    joined = b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha256(joined).hexdigest()[:32]


def start_anew() -> None:
    """A forked process has none of its parent's threads, which may have held the lock."""
    global COMPILING
    COMPILING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)
