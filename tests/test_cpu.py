"""The CPU kernels give the same bits on any number of threads, within bounds of memory.

What they compute is in `test_kernels.py`, how they come to be compiled in `test_libraries.py`.
"""

from __future__ import annotations

import os
import shlex
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import Case, make_case
from torch import Tensor

from maxsquare.engine import LogitsSpec, cpu, libraries
from maxsquare.potentials import CrossEntropy, Linear, Tsallis

pytestmark = pytest.mark.skipif(not any(libraries.compilers()), reason="needs a C++ compiler")

# Threads and processes


def large_cases(dtype: torch.dtype) -> list[Case]:
    """Of more chunks than threads, and work enough for each."""
    shapes = {None: (2, 19, 128, 192), (200, 301): (2, 19, 23, 33)}
    return [
        make_case(shape, kind, potential, LogitsSpec(size)).to(dtype)
        for size, shape in shapes.items()
        for kind, potential in (
            ("argmax", Tsallis(2)),
            ("guide", CrossEntropy()),
            ("labels", Tsallis(1)),
            ("argmax", Linear()),
        )
    ]


def bits(case: Case) -> list[Tensor]:
    y, counts = case.classify(cpu)
    return [y, counts, *case.weighted_sum(cpu, y), case.class_sums(cpu)]


def assert_same_bits(results: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_threads_and_every_repeat_gives_the_same_bits(
    set_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    all_cases = large_cases(dtype)
    set_threads(1)
    expected = [bits(case) for case in all_cases]
    for count in (2, 3, 8, 8, 1):
        set_threads(count)
        cpu.start_anew()
        for case, values in zip(all_cases, expected, strict=True):
            assert_same_bits(bits(case), values)
        # The caller is one of them.
        assert bool(cpu.HELPERS.threads) is (count > 1)


def test_every_place_in_a_batch_gives_the_same_bits() -> None:
    for case in large_cases(torch.float32):
        batch = bits(replace(case, by_class=False))
        for n in range(2):
            alone = {
                name: None if (tensor := getattr(case, name)) is None else tensor[n : n + 1]
                for name in ("z", "guide", "labels", "valid")
            }
            one = replace(case, **alone, by_class=False)
            assert_same_bits(bits(one)[:2], [result[n : n + 1] for result in batch[:2]])
            weights = torch.ones(2, 19 if isinstance(case.potential, Linear) else 1)
            together, single = (
                cpu.weighted_sum(
                    *(each.z, weights[: len(each.z)], each.classify(cpu)[0], None),
                    *(each.potential, each.spec, True),
                )
                for each in (case, one)
            )
            assert_same_bits(list(single), [result[n : n + 1] for result in together])
            assert_same_bits([one.class_sums(cpu)], [case.class_sums(cpu)[n : n + 1]])


def test_several_callers_at_once_get_the_bits_of_one(set_threads: Callable[[int], None]) -> None:
    set_threads(3)
    all_cases = large_cases(torch.float32) * 2
    expected = [bits(case) for case in all_cases]
    start = threading.Barrier(8)

    def call(case: Case) -> list[Tensor]:
        start.wait(60)
        torch.set_num_threads(3)
        return bits(case)

    with ThreadPoolExecutor(8) as callers:
        for results, values in zip(callers.map(call, all_cases), expected, strict=True):
            assert_same_bits(results, values)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("before", [True, False], ids=["threads started", "no thread yet"])
def test_a_forked_process_computes_the_same_bits(
    set_threads: Callable[[int], None], before: bool
) -> None:
    set_threads(3)
    case = large_cases(torch.float32)[0]
    cpu.start_anew()
    expected = bits(case) if before else None
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        # One that hangs is ended by the alarm, with nothing sent.
        signal.alarm(60)
        try:
            for result in bits(case)[1:3]:
                os.write(sender, result.numpy().tobytes())
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as stream:
        received = stream.read()
    os.waitpid(child, 0)
    numbers = (expected or bits(case))[1:3]
    assert received == b"".join(result.numpy().tobytes() for result in numbers)


def test_a_library_that_expects_other_structures_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cpu.kernel("class_sums", torch.float32)
    cpu.kernel.cache_clear()
    monkeypatch.setattr(cpu, "CALL", struct.Struct(cpu.CALL.format + "q"))
    with pytest.raises(AssertionError, match="call_bytes"):
        cpu.kernel("class_sums", torch.float32)


# Memory

PEAK = """
import resource, sys, torch
import maxsquare
torch.set_num_threads(1)
shape, size, limit = (1, 19, *map(int, sys.argv[1:3])), sys.argv[3], float(sys.argv[4])
size = None if size == "none" else tuple(map(int, size.split("x")))
loss = maxsquare.IWMaxSquareLoss()
def run(z):
    loss(z, size=size, align_corners=size is not None).backward()
run(torch.randn(1, 19, 5, 7).requires_grad_())
z = torch.randn(shape).requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(z)
extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
extra -= 0 if size else z.numel() * 4 / 2**20
print(extra)
sys.exit(extra > limit)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    ("shape", "size", "limit"),
    [((1024, 1024), "none", 8), ((129, 257), "1024x2048", 7)],
    ids=["as is", "upsampled"],
)
def test_peak_memory_stays_far_below_a_tensor_of_logits(
    shape: tuple[int, int], size: str, limit: int
) -> None:
    """In MiB beyond logits and gradient, where full-resolution logits are 76 and 152."""
    arguments = [*map(str, shape), size, str(limit)]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


# Sanitizers


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is preloaded as on Linux")
def test_the_kernels_stay_in_bounds_and_defined(tmp_path: Path) -> None:
    """`test_kernels.py`, with kernels and tensors that AddressSanitizer and UBSan watch."""
    compiler = next(libraries.compilers())
    sanitizers = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # PyTorch throws exceptions, which the sanitizer follows if it finds their library.
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not Path(sanitizers[0]).is_absolute():
        pytest.skip(f"{shlex.join(compiler)} has no libasan.so")
    wrapper = tmp_path / "compiler"
    # Options at the end, as the last level of optimisation counts: a higher one takes a minute.
    wrapper.write_text(
        f'#!/bin/sh\nunset LD_PRELOAD\nexec {shlex.join(compiler)} "$@" -O1 -g '
        "-fsanitize=address,undefined -fno-sanitize-recover=all\n"
    )
    wrapper.chmod(0o755)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", "-o", "addopts="),
            *(str(Path(__file__).with_name("test_kernels.py")), "-k", "not Triton and not plain"),
        ],
        env={
            **os.environ,
            "CXX": str(wrapper),
            "XDG_CACHE_HOME": str(tmp_path),
            "LD_PRELOAD": " ".join(sanitizers),
            # What Python does not free at its end is not ours to judge.
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[:8000]
    # Single and double precision were made by the wrapper.
    assert len(list(tmp_path.glob("maxsquare/*.so"))) == 2
