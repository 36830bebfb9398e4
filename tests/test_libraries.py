"""The library of the CPU kernels is found or compiled once, on any machine, whatever goes wrong."""

from __future__ import annotations

import _ctypes
import ctypes
import errno
import importlib.util
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import assert_close, loss_named, oracle, random_logits, value_and_gradient

from maxsquare.engine import cpu, libraries, operators

pytestmark = pytest.mark.skipif(not any(libraries.compilers()), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as the machine's own compiler makes them in an empty cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        assert libraries.compiled(torch.float32)
    (path,) = folder.glob("maxsquare/*")
    return path


class Compiler:
    """A command that notes its arguments, and gives the compiled kernels without delay."""

    def __init__(self, path: Path, compiled: Path) -> None:
        self.path, self.calls_path = path, path.with_suffix(".calls")
        self.calls_path.touch()
        self.write(f'for output; do :; done; cp {compiled} "$output"')

    def write(self, action: str) -> None:
        self.path.write_text(
            f'#!/bin/sh\necho "$@" >> {shlex.quote(str(self.calls_path))}\n{action}\n'
        )
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.calls_path.read_text().splitlines()

    def load(self) -> None:
        with mock.patch.object(libraries, "compilers", lambda: iter([[str(self.path)]])):
            assert libraries.compiled(torch.float32)


def forget() -> None:
    """What a process knows of its kernels."""
    libraries.LIBRARIES.clear()
    operators._KERNELS.clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of a process that has not compiled, and for which none is named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "ziglang", None)
    forget()
    yield tmp_path / "cache" / "maxsquare"
    forget()


@pytest.fixture
def compiler(tmp_path: Path, compiled: Path, cache: Path) -> Compiler:
    return Compiler(tmp_path / "compiler", compiled)


def warnings_of_losses(*dtypes: torch.dtype) -> list[str]:
    """What a user is shown while losses of these dtypes are computed, rightly, twice over."""
    member = loss_named("iw_max_square")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for dtype in (*dtypes, *dtypes):
            z = random_logits((1, 3, 4, 5)).to(dtype)
            for size in (None, (9, 11)):
                loss = partial(member.make(), size=size)
                formula = lambda z, size=size: oracle(member, (z,), size=size)  # noqa: E731
                value, (slope,) = value_and_gradient(loss, (z,))
                exact, (exact_slope,) = value_and_gradient(formula, (z.double(),))
                assert_close(value, exact, dtype)
                assert_close(slope, exact_slope, dtype)
    return [str(warning.message) for warning in caught]


# Kept


def test_kernels_are_compiled_once_and_found_again(compiler: Compiler, cache: Path) -> None:
    for _ in range(3):
        compiler.load()
    assert len(compiler.calls) == 1
    (path,) = cache.iterdir()
    assert path.suffix == ".so"


def test_a_warm_start_takes_little_time_and_no_compiler(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.load()
    monkeypatch.setattr(subprocess, "run", None)
    begin = time.process_time()
    compiler.load()
    # Of the processor, so that other processes do not count.
    assert time.process_time() - begin < 0.05


@pytest.mark.parametrize("changed", ["source", "flags", "compiler", "processor"])
def test_whatever_changes_the_kernels_compiles_them_again(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str
) -> None:
    compiler.load()
    if changed == "source":
        other = tmp_path / "cpu.cpp"
        other.write_bytes(libraries.SOURCE.read_bytes() + b"\n")
        monkeypatch.setattr(libraries, "SOURCE", other)
    elif changed == "flags":
        monkeypatch.setattr(libraries, "FLAGS", (*libraries.FLAGS, "-g"))
    elif changed == "compiler":
        compiler.write(compiler.path.read_text().splitlines()[-1] + "  # another version")
    else:
        monkeypatch.setattr(libraries, "processor", lambda: "another")
    compiler.load()
    assert len(compiler.calls) == 2


def test_the_processor_is_known_by_more_than_its_architecture() -> None:
    if Path("/proc/cpuinfo").exists():
        assert len(libraries.processor()) > 100


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "no library"])
def test_a_damaged_file_is_compiled_again(compiler: Compiler, cache: Path, damage: str) -> None:
    compiler.load()
    (path,) = cache.iterdir()
    # Written anew: what is mapped into this process must not change.
    content = bytearray(path.read_bytes())
    path.unlink()
    content[len(content) // 2] ^= 4
    path.write_bytes(
        {
            "truncated": bytes(content[: len(content) // 2]),
            "empty": b"",
            "one bit": bytes(content),
            "no library": b"not a library",
        }[damage]
    )
    compiler.load()
    compiler.load()
    assert len(compiler.calls) == 2
    (path,) = cache.iterdir()
    assert path.read_bytes() != bytes(content)


def test_what_an_interrupted_process_left_is_harmless(compiler: Compiler, cache: Path) -> None:
    compiler.load()
    (path,) = cache.iterdir()
    path.unlink()
    key = path.stem.rsplit("-", 1)[0]
    (cache / f".{os.getpid()}-1").write_bytes(b"half of it")
    (cache / f"{key}-{'0' * 32}.so").write_bytes(b"half of it")
    (cache / f"{key}-folder.so").mkdir()
    compiler.load()
    compiler.load()
    assert len(compiler.calls) == 2 and path.exists()


def test_kernels_made_before_are_loaded_where_no_compiler_is_left(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler.load()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert not any(libraries.compilers())
    assert not warnings_of_losses(torch.float32)
    assert Path(libraries.library(torch.float32)._name).parent == cache
    # Neither those of another processor nor those of double precision.
    assert len(warnings_of_losses(torch.float64)) == 1
    forget()
    monkeypatch.setattr(libraries, "processor", lambda: "another")
    assert len(warnings_of_losses(torch.float32)) == 1


# Ready-made


@pytest.fixture
def ready(
    compiled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Path]:
    """Puts ready-made libraries beside the source; a processor with AVX2, and no compiler."""
    folder = tmp_path / "package"
    folder.mkdir()
    shutil.copy(libraries.SOURCE, folder)
    monkeypatch.setattr(libraries, "SOURCE", folder / "cpu.cpp")
    monkeypatch.setattr(libraries, "ARM", False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

    def put(level: str) -> Path:
        return Path(shutil.copy(compiled, folder / f"cpu-{level}-single.so"))

    return put


@pytest.mark.parametrize(
    ("capability", "level"),
    [("AVX2", "x86-64-v3"), ("AVX512", "x86-64-v4"), ("DEFAULT", None), ("SVE256", None)],
)
def test_the_ready_made_library_is_the_best_that_the_processor_can_run(
    ready: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capability: str, level: str | None
) -> None:
    paths = {each: ready(each) for each in ("x86-64-v3", "x86-64-v4", "arm64")}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = libraries.ready_made(torch.float32)
    assert (found and found._name) == (level and str(paths[level]))
    monkeypatch.setattr(libraries, "ARM", True)
    assert libraries.ready_made(torch.float32)._name == str(paths["arm64"])


def test_avx_512_does_with_a_library_for_less(
    ready: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    path = ready("x86-64-v3")
    assert libraries.ready_made(torch.float32)._name == str(path)


def test_a_ready_made_library_goes_before_the_usual_compilers(
    ready: Callable[..., Path], tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, usual = ready("x86-64-v3"), Compiler(tmp_path / "cc", compiled)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert not warnings_of_losses(torch.float32, torch.bfloat16)
    assert libraries.library(torch.float32)._name == str(path) and not usual.calls
    # There is none of double precision.
    assert libraries.library(torch.float64) and len(usual.calls) == 1


def test_a_compiler_that_is_named_goes_before_a_ready_made_library(
    ready: Callable[..., Path], compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ready("x86-64-v3")
    monkeypatch.setenv("CXX", str(compiler.path))
    monkeypatch.setenv("PATH", "/bin")
    assert libraries.library(torch.float32)._name != str(path) and len(compiler.calls) == 1
    # Where it fails there are kernels all the same.
    forget()
    shutil.rmtree(libraries.cache_folder())
    compiler.write("exit 1")
    assert not warnings_of_losses(torch.float32)
    assert libraries.library(torch.float32)._name == str(path) and len(compiler.calls) == 2


def test_a_ready_made_library_that_cannot_be_loaded_is_done_without(
    ready: Callable[..., Path], tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready("x86-64-v3").write_bytes(b"of another system")
    usual = Compiler(tmp_path / "cc", compiled)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert not warnings_of_losses(torch.float32)
    assert len(usual.calls) == 1


# Whose compiler


def installed_compilers() -> Iterator[Any]:
    """The compilers of this machine."""
    for name in ("g++", "clang", "clang++", *(f"clang-{version}" for version in range(15, 30))):
        if path := shutil.which(name):
            yield pytest.param([path], id=name)
    if importlib.util.find_spec("ziglang"):
        command = [sys.executable, "-m", "ziglang", "c++"]
        # Into an empty cache it first compiles its own libraries.
        yield pytest.param(command, id="ziglang", marks=pytest.mark.stress)


@pytest.mark.parametrize("command", [*installed_compilers()])
def test_every_compiler_makes_kernels_that_load_and_compute(
    cache: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("CXX", shlex.join(command))
    assert not warnings_of_losses(torch.float32)
    assert Path(libraries.library(torch.float32)._name).parent == cache


def test_ziglang_is_found_without_a_path(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ziglang")
    monkeypatch.setenv("PATH", "")
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("needs ziglang")
    ((program, command),) = libraries.compilers()
    assert Path(program).is_file() and command == "cc"


def test_a_compiler_that_does_not_know_the_native_processor_is_tried_without(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = compiler.path.read_text().splitlines()[-1]
    compiler.write(
        'case "$*" in *=native*) echo "error: unknown target CPU \'native\'" >&2; exit 1;; esac\n'
        + action
    )
    compiler.load()
    assert ["native" in call for call in compiler.calls] == [True, False]
    compiler.load()
    assert len(compiler.calls) == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (r"C:\LLVM\bin\clang.exe -O2", [r"C:\LLVM\bin\clang.exe", "-O2"]),
        (r'"C:\Program Files\LLVM\clang.exe" -O2', [r"C:\Program Files\LLVM\clang.exe", "-O2"]),
        (r'"C:\LLVM', [r'"C:\LLVM']),
    ],
)
def test_a_path_of_windows_keeps_its_backslashes(
    monkeypatch: pytest.MonkeyPatch, command: str, words: list[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        assert libraries.split(command) == words


def test_a_path_with_a_space_needs_no_quotation_marks(
    compiled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = Compiler(tmp_path / "my compiler", compiled)
    monkeypatch.setenv("CXX", str(compiler.path))
    assert libraries.library(torch.float32) and len(compiler.calls) == 1


@pytest.mark.parametrize("name", ["CXX", "CC"])
def test_the_environment_names_the_compiler_and_its_options(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, f"{shlex.quote(str(compiler.path))} -option 'with space'")
    assert not warnings_of_losses(torch.float32, torch.bfloat16)
    (call,) = compiler.calls
    assert call.startswith("-option with space ") and "-DDOUBLE" not in call
    assert libraries.library(torch.float64)
    assert "-DDOUBLE" in compiler.calls[-1]


def test_cxx_goes_before_cc_which_goes_before_the_usual_ones(
    tmp_path: Path, compiled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cc, cxx, usual = (Compiler(tmp_path / name, compiled) for name in ("for_c", "for_cxx", "cc"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CC", "for_c")
    monkeypatch.setenv("CXX", "for_cxx")
    assert libraries.library(torch.float32)
    assert [len(each.calls) for each in (cxx, cc, usual)] == [1, 0, 0]
    forget()
    cxx.write("exit 1")
    assert libraries.library(torch.float32)
    assert [len(each.calls) for each in (cxx, cc, usual)] == [2, 1, 0]
    forget()
    monkeypatch.delenv("CC")
    monkeypatch.delenv("CXX")
    assert libraries.library(torch.float32)
    assert [len(each.calls) for each in (cxx, cc, usual)] == [2, 1, 1]


# What goes wrong


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("echo 'error: no cc1plus' >&2; echo 'terminated.' >&2; exit 1", "error: no cc1plus"),
        ("echo 'killed' >&2; exit 1", "killed"),
        ("exit 3", "exit status 3"),
        ('for output; do :; done; echo nonsense > "$output"', " cpu.so: file too short)"),
        (f'for output; do :; done; cp {_ctypes.__file__} "$output"', "does not export the kernels"),
        ("exit 0", "No such file"),
        ("exec sleep 30", "longer than 0.3 seconds"),
        (r"printf 'error: \377\n' >&2; exit 1", "error: \ufffd"),
    ],
    ids=["error", "reason", "no reason", "nonsense", "foreign", "nothing", "endless", "not a text"],
)
def test_a_compiler_that_fails_gives_one_warning_and_the_plain_formula(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, action: str, told: str
) -> None:
    monkeypatch.setenv("CXX", str(compiler.path))
    monkeypatch.setattr(libraries, "COMPILER_SECONDS", 0.3)
    compiler.write(action)
    (message,) = warnings_of_losses(torch.float32, torch.bfloat16, torch.float64)
    assert str(compiler.path) in message and told in message
    assert "apt-get install g++" in message and "CXX" in message
    # Each dtype is tried once.
    assert len(compiler.calls) == 2
    assert operators.kernels_for(torch.zeros(1, 2, 3)) is None


@pytest.mark.parametrize("named", ["no-such-compiler -O3", 'no-such-compiler "', " ", None])
def test_no_compiler_gives_one_warning_and_the_plain_formula(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str | None
) -> None:
    if named is not None:
        monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("PATH", str(tmp_path))
    (message,) = warnings_of_losses(torch.float32, torch.bfloat16, torch.float64)
    assert ("no-such-compiler" if named and named.strip() else "there is none") in message
    assert "apt-get install g++" in message and "pip install ziglang" in message


@pytest.mark.parametrize(
    ("system", "told"),
    [("linux", "apt-get install g++"), ("darwin", "xcode-select"), ("win32", "Visual Studio")],
)
def test_the_advice_is_for_this_system(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, told: str
) -> None:
    monkeypatch.setattr(libraries, "compilers", lambda: iter(()))
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(OSError, match=re.escape(told)) as caught:
        libraries.compiled(torch.float32)
    assert "pip install ziglang" in str(caught.value)


def test_a_source_that_is_not_there_is_told_as_that(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in an application that was frozen without the files of the package."""
    monkeypatch.setattr(libraries, "SOURCE", tmp_path / "cpu.cpp")
    (message,) = warnings_of_losses(torch.float32, torch.float64)
    assert f"source is at {tmp_path / 'cpu.cpp'}" in message and "frozen" in message
    assert "apt-get" not in message


def test_a_cache_folder_that_cannot_be_written_to_is_done_without(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", str(compiler.path))
    assert not warnings_of_losses(torch.float32)
    assert len(compiler.calls) == 1
    assert operators.kernels_for(torch.zeros(1, 2, 3)) is cpu


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_leaves_nothing(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    write_bytes = Path.write_bytes

    def write_half(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        raise full

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(Path, "write_bytes", write_half)
        else:
            patch.setattr(os, "replace", mock.Mock(side_effect=full))
        compiler.load()
    assert not list(cache.iterdir())
    compiler.load()
    compiler.load()
    assert len(compiler.calls) == 2 and len(list(cache.iterdir())) == 1


def test_a_library_that_another_user_put_there_is_not_loaded(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.load()
    (path,) = cache.iterdir()
    other = os.geteuid() + 1
    # Only the superuser can give a file away; else this process becomes somebody else.
    if os.geteuid() == 0:
        os.chown(path, other, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: other)
    compiler.load()
    assert len(compiler.calls) == 2
    assert path.exists()


@pytest.mark.parametrize("folder", ["scratch", "cache"])
def test_a_folder_from_which_nothing_is_executed_is_done_without(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """As /tmp and /home are mounted on some machines."""
    load = ctypes.CDLL
    within = str(cache) if folder == "cache" else tempfile.gettempdir() + "/tmp"

    def load_elsewhere(path: str) -> ctypes.CDLL:
        if path.startswith(within):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", load_elsewhere)
    for calls in (1, 1) if folder == "scratch" else (1, 2):
        compiler.load()
        assert len(compiler.calls) == calls


def test_a_scratch_folder_that_cannot_be_removed_is_done_without(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems, where a library in use leaves a file behind."""
    with monkeypatch.context() as patch:
        busy = OSError(errno.ENOTEMPTY, "Directory not empty")
        patch.setattr(os, "rmdir", mock.Mock(side_effect=busy))
        compiler.load()


def test_a_relative_cache_folder_is_not_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert libraries.cache_folder() == tmp_path / "home" / ".cache" / "maxsquare"


def test_a_user_without_a_home_keeps_nothing(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    before = set(tmp_path.iterdir())
    compiler.load()
    assert set(tmp_path.iterdir()) == before


def test_threads_that_need_kernels_at_once_wait_for_one_compiler(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.write(f"sleep 0.3\n{compiler.path.read_text().splitlines()[-1]}")
    monkeypatch.setenv("CXX", str(compiler.path))
    start = threading.Barrier(4)

    def load(_: int) -> object:
        start.wait(60)
        return libraries.library(torch.float32)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(map(id, pool.map(load, range(4))))) == 1
    assert len(compiler.calls) == 1 and libraries.library(torch.float32)


FIRST_LOSS = """
import os, signal, sys, threading, time, torch, maxsquare
from maxsquare.engine import libraries

def compute():
    print(maxsquare.MaxSquareLoss()(torch.eye(2)).item(), bool(libraries.library(torch.float32)))

if sys.argv[1:] == ["disturbed"]:
    interrupts = []
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
    thread = threading.Thread(target=compute)
    thread.start()
    time.sleep(0.5)
    if not os.fork():
        sys.exit()
    os.kill(0, signal.SIGINT)
    thread.join()
    assert interrupts
else:
    compute()
"""


class FirstLoss(subprocess.Popen[str]):
    """A process that computes a loss, and knows no other compiler than this one."""

    def __init__(self, compiler: Compiler, *arguments: str) -> None:
        super().__init__(
            # Of Python 3.12, about forks beside threads.
            [*(sys.executable, "-W", "error", "-W", "ignore:.*fork.*:DeprecationWarning")]
            + ["-c", FIRST_LOSS, *arguments],
            env={**os.environ, "CXX": str(compiler.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def assert_right(self) -> None:
        output, errors = self.communicate(timeout=120)
        value, with_kernels = output.split()
        exact = -0.5 * torch.eye(2, dtype=torch.float64).softmax(1).square().sum(1).mean()
        assert abs(float(value) - exact) < 1e-6
        assert with_kernels == "True" and not errors and self.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_neither_an_interrupt_nor_a_fork_disturbs_a_compiler(compiler: Compiler) -> None:
    """Control-C goes to all processes at a terminal; a process may go on after it."""
    compiler.write(f"sleep 1\n{compiler.path.read_text().splitlines()[-1]}")
    FirstLoss(compiler, "disturbed").assert_right()
    assert len(compiler.calls) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_compilation_leaves_the_next_process_kernels(
    compiler: Compiler, cache: Path
) -> None:
    action = compiler.path.read_text().splitlines()[-1]
    begun = compiler.path.with_suffix(".begun")
    # Half of it is written when the process dies.
    compiler.write(f'for output; do :; done; echo half > "$output"; touch {begun}; sleep 1; exit 1')
    killed, beside = FirstLoss(compiler), None
    while not begun.exists():
        assert killed.poll() is None
        time.sleep(0.01)
    compiler.write(action)
    beside = FirstLoss(compiler)
    killed.kill()
    killed.communicate()
    beside.assert_right()
    (path,) = cache.iterdir()
    assert path.suffix == ".so"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_compile_at_once_all_get_kernels(compiler: Compiler, cache: Path) -> None:
    compiler.write(f"sleep 0.3\n{compiler.path.read_text().splitlines()[-1]}")
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            signal.alarm(60)
            try:
                compiler.load()
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    calls = len(compiler.calls)
    assert 1 <= calls <= 3  # a late one finds what the first has made
    (path,) = cache.iterdir()
    compiler.load()
    assert len(compiler.calls) == calls


@pytest.mark.stress
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_killed_at_any_moment_leave_the_others_kernels(
    compiler: Compiler, compiled: Path, cache: Path, stress_budget: Callable[[float], float]
) -> None:
    compiler.write(
        f'for output; do :; done; head -c 9999 {compiled} > "$output"; sleep 0.1\n'
        f'cp {compiled} "$output"; sleep 0.1'
    )
    moments = random.Random(0)

    def fork() -> int:
        if child := os.fork():
            return child
        signal.alarm(120)
        try:
            compiler.load()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    begin = time.monotonic()
    assert os.waitpid(fork(), 0)[1] == 0
    duration = time.monotonic() - begin
    for _ in range(round(stress_budget(20))):
        next(cache.glob("*.so")).unlink()
        killed, beside = fork(), fork()
        time.sleep(moments.uniform(0, 2 * duration))
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        assert os.waitpid(beside, 0)[1] == 0
        assert os.waitpid(fork(), 0)[1] == 0
        (path,) = cache.glob("*.so")
        assert libraries.digest(path.read_bytes()) in path.name
