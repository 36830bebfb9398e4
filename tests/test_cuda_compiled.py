"""The Triton kernels as an H100 would launch them: compiled and counted, not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import triton_kernels

pytestmark = [
    pytest.mark.stress,  # to compile them takes a minute
    pytest.mark.skipif(sys.platform != "linux" or triton_kernels() is None, reason="needs Triton"),
]


@pytest.fixture(scope="module", params=["installed", "oldest"])
def report(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What the installed Triton makes of the kernels, and another in the folder OLDEST_TRITON."""
    script = Path(__file__).with_name("compiled_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if request.param == "oldest":
        folder = os.environ.get("OLDEST_TRITON")
        if folder is None:
            pytest.skip("needs a folder with the oldest Triton: OLDEST_TRITON")
        environment["PYTHONPATH"] = folder
    done = subprocess.run(
        [sys.executable, str(script), "90"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_no_kernel_spills_its_registers(report: dict[str, dict[str, Any]]) -> None:
    assert len(report) >= 20
    assert {name: kernel for name, kernel in report.items() if kernel["spills"]} == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_resolution_is_read_and_written_16_bytes_at_a_time(
    dtype: str, report: dict[str, dict[str, Any]]
) -> None:
    kernels = {k: v for k, v in report.items() if f"full {dtype} gradient" in k}
    assert len(kernels) == 3
    for kernel in kernels.values():
        # 19 classes of 64 pixels by a warp of 32 lanes; half precision holds two in a word.
        vectors = 10 if dtype == "float32" else 5
        assert kernel["widths"]["LDG.128"] == kernel["widths"]["STG.128"] == vectors
        assert kernel["registers"] <= 128
        if dtype == "float32":
            assert kernel["instructions"] <= 1150


@pytest.mark.parametrize(("dtype", "load"), [("float32", "LDG.32"), ("bfloat16", "LDG.U16")])
def test_channels_last_is_read_along_the_classes(
    dtype: str, load: str, report: dict[str, dict[str, Any]]
) -> None:
    (kernel,) = (v for k, v in report.items() if f"channels-last {dtype}" in k)
    # A warp holds 16 pixels, and reads the 19 neighbouring classes of each in one access.
    assert 16 <= kernel["widths"][load] <= 17
    assert kernel["registers"] <= 96


def test_an_upsampled_row_takes_few_instructions(report: dict[str, dict[str, Any]]) -> None:
    rows = {k: v for k, v in report.items() if k.endswith("_upsampled")}
    assert len(rows) == 10
    for name, kernel in rows.items():
        # A pixel of each of 32 lanes; any power takes two exponentials a class.
        assert 0 < kernel["loop"] <= (520 if "q = 0.5" in name else 500), name
