"""Shared fixtures. Warnings are errors in every test (`filterwarnings` in pyproject.toml)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# The processes of pytest-xdist share the cores: with several threads each they would wait for each
# other. Libraries read it when they are imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Imported for its doctests, it would import the kernels before Triton's interpreter is chosen.
collect_ignore = ["compiled_kernels.py"]
if sys.platform != "linux":  # they fork, and read /proc
    collect_ignore += ["interrupted.py", "test_interruptions.py"]


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a promise must hold on."""
    return torch.device(request.param)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stress",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="how many times the usual budget each test of `-m stress` spends (default: 1)",
    )
    parser.addoption(
        "--wheels",
        type=Path,
        metavar="FOLDER",
        help="wheels that `hatch_build.py` has built there (default: they are built, for minutes)",
    )


@pytest.fixture
def stress_budget(request: pytest.FixtureRequest) -> Callable[[float], float]:
    """The share that `--stress` grants of a usual amount (of seconds, of examples, of kills).

    It is at least 1, as a test of nothing would pass.
    """
    factor = request.config.getoption("--stress")
    return lambda usual: max(usual * factor, 1)
