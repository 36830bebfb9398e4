"""The library of the CPU kernels: ready-made in a wheel, or compiled from `cpu.cpp` on first use.

As with Triton and torch.compile, a compiler of this machine builds it for its processor, and the
user's cache folder keeps the result.
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
# -ffast-math would break NaN and infinities. Without exceptions and type information the library
# does not need C++'s standard library, which the commands for C (cc, clang) do not link.
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O3", "-shared", "-w", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math"),
    *(() if sys.platform == "win32" else ("-fPIC",)),
)
ARM = platform.machine().lower() in ("aarch64", "arm64")
NATIVE = "-mcpu=native" if ARM else "-march=native"
# Zig compiles its own libraries before the first program, which can take minutes.
COMPILER_SECONDS = 300
ADVICE = {
    "darwin": "pip install ziglang, or xcode-select --install",
    "win32": "pip install ziglang; cl of Visual Studio does not take the options",
}
ADVICE_ELSEWHERE = "pip install ziglang, or on Debian and Ubuntu apt-get install g++"


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for an accumulation dtype; None, after a warning, if there are none."""
    if dtype not in LIBRARIES:
        with COMPILING:
            if dtype not in LIBRARIES:
                LIBRARIES[dtype] = find_library(dtype)
    return LIBRARIES[dtype]


LIBRARIES: dict[torch.dtype, ctypes.CDLL | None] = {}
# Threads that need the kernels at the same time wait for one compiler.
COMPILING = threading.RLock()


def find_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Try a compiler that the user names, then a ready-made library, then the usual compilers."""
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
    """The library for this processor in the wheel, if there is one."""
    precision = "double" if dtype == torch.float64 else "single"
    for level in levels():
        for path in SOURCE.parent.glob(f"cpu-{level}-{precision}.*"):
            with contextlib.suppress(OSError):  # on a file system mounted noexec
                return open_library(path)
    return None


def levels() -> tuple[str, ...]:
    """The instruction sets of ready-made libraries that this processor has, the best first."""
    if ARM:
        return ("arm64",)
    # PyTorch queries the processor on every system. Those with AVX2 and FMA support x86-64-v3,
    # those with AVX-512 BW, DQ and VL support x86-64-v4.
    known = {"AVX512": ("x86-64-v4", "x86-64-v3"), "AVX2": ("x86-64-v3",)}
    return known.get(torch.backends.cpu.get_cpu_capability(), ())


# Compiled -----------------------------------------------------------------------------------------


def compiled(dtype: torch.dtype) -> ctypes.CDLL:
    """The library that a compiler of this machine builds or has built; OSError if none can."""
    if not SOURCE.exists():
        raise FileNotFoundError(
            f"neither a ready-made library nor their source is at {SOURCE}. "
            "A frozen application must take both along"
        )
    flags = (*FLAGS, "-DDOUBLE") if dtype == torch.float64 else FLAGS
    # The library's content and processor, which suffice to find one if no compiler works. Another
    # compiler or version compiles again, because it may be faster or have fixed a bug.
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
    """The commands to try: those of CXX and CC, or the usual ones."""
    if named := named_compilers():
        for program, *options in named:
            # A missing program stays in the list, so that the error names it.
            yield [shutil.which(program) or program, *options]
        return
    # On Windows clang needs Visual Studio, and GCC does not align the stack for vectors.
    for program in () if sys.platform == "win32" else ("cc", "gcc", "clang"):
        if path := shutil.which(program):
            yield [path]
    # The program behind `python -m ziglang cc`, whose version `identity` sees.
    if (ziglang := importlib.util.find_spec("ziglang")) and ziglang.origin:
        if path := shutil.which("zig", path=os.path.dirname(ziglang.origin)):
            yield [path, "cc"]


def named_compilers() -> list[list[str]]:
    """The commands of CXX and CC, split into words."""
    named = [os.environ[name] for name in ("CXX", "CC") if os.environ.get(name, "").strip()]
    return [[command] if shutil.which(command) else split(command) for command in named]


def split(command: str) -> list[str]:
    """The words of a command; on Windows a backslash is part of a path."""
    try:
        if sys.platform == "win32":
            return [word.strip('"') for word in shlex.split(command, posix=False)]
        return shlex.split(command)
    except ValueError:  # an unbalanced quotation mark
        return command.split()


def cached(key: str) -> ctypes.CDLL | None:
    """A library from the user's cache folder."""
    for path in cache_folder().glob(f"cpu-{key}-*.so"):
        try:
            # Files of other users are not trusted.
            if hasattr(os, "geteuid") and path.stat().st_uid not in (0, os.geteuid()):
                continue
            # A damaged library would crash the process, so its name contains its checksum.
            if path.stem.endswith(digest(path.read_bytes())):
                return open_library(path)
            path.unlink()
        except OSError:  # unreadable, or on a file system mounted noexec
            continue
    return None


def compile_with(compiler: list[str], flags: tuple[str, ...], key: str) -> ctypes.CDLL:
    """Compile the library, and keep it in the user's cache folder."""
    # With TemporaryDirectory, a process forked meanwhile would remove it at exit.
    scratch = tempfile.mkdtemp()
    try:
        fresh = Path(scratch, "cpu.so")
        command = [*compiler, *flags, NATIVE, str(SOURCE), "-o", str(fresh)]
        try:
            call_compiler(command)
        except subprocess.CalledProcessError as error:
            # Some compilers do not support this option.
            if "native" not in error.stderr:
                raise
            call_compiler([word for word in command if word != NATIVE])
        kept = keep(fresh, key)
        # Temporary folders and home folders may be mounted noexec.
        with contextlib.suppress(OSError):
            return open_library(kept)
        return open_library(fresh)
    except OSError as error:
        # The message is the same for every dtype, so that Python shows it once.
        raise OSError(str(error).replace(scratch + os.sep, "")) from error
    finally:
        # Some systems cannot remove a library that is in use.
        shutil.rmtree(scratch, ignore_errors=True)


def call_compiler(command: list[str]) -> None:
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=COMPILER_SECONDS,
        # Ctrl-C must not reach the compiler, because this process may continue.
        start_new_session=True,
    )


def keep(fresh: Path, key: str) -> Path:
    """Copy a library to the cache folder and return its path, or the old one if that fails."""
    content = fresh.read_bytes()
    folder = cache_folder()
    kept = folder / f"cpu-{key}-{digest(content)}.so"
    part = folder / f".{fresh.parent.name}"  # a name that no other process uses
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
    """Load a library; OSError if that fails or if it is another one."""
    kernels = ctypes.CDLL(str(path))
    if not hasattr(kernels, "weighted_sum"):
        raise OSError(f"{path}: does not export the kernels")
    return kernels


def cache_folder() -> Path:
    """The folder that keeps compiled kernels."""
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):  # as the XDG standard requires
            return Path(folder, "maxsquare")
    return Path(os.devnull)  # no home folder: nothing is kept


def identity(compiler: list[str]) -> str:
    """A string that changes with the compiler's version; running it would take much longer."""
    program = os.path.realpath(compiler[0])
    status = os.stat(program)
    return f"{program} {status.st_size} {status.st_mtime_ns}"


def processor() -> str:
    """A string that changes with the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    known = [line for line in lines if line.startswith(names)]
    # On some systems `platform.processor` runs a command that is not always on the path.
    return repr((platform.machine(), known or platform.processor()))


def digest(*parts: bytes | str) -> str:
    joined = b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha256(joined).hexdigest()[:32]


def start_anew() -> None:
    """Renew the lock in a forked process, which lacks the thread that may have held it."""
    global COMPILING
    COMPILING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)
