"""Shared fixtures. Warnings are errors in every test (`filterwarnings` in pyproject.toml)."""

from __future__ import annotations

import pytest
import torch

# Imported for its doctests, it would import the kernels before Triton's interpreter is chosen.
collect_ignore = ["compile_kernels.py"]


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
