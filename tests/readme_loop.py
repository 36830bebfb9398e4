"""Runs the Python of a page on a reader's network and data, with torch and maxsquare alone.

python tests/readme_loop.py README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import maxsquare


class TwoHeads(nn.Module):
    """Stands for the reader's network: two heads at an eighth of the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.final = nn.Conv2d(3, 5, 8, stride=8)
        self.low = nn.Conv2d(3, 5, 8, stride=8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.final(images), self.low(images)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def train(block: str) -> None:
    """Run a block that trains the reader's network, and see that all of it was trained."""
    torch.manual_seed(0)
    model = TwoHeads()
    labels = torch.randint(0, 5, (2, 16, 24))
    labels[:, :3] = 255  # as in the label files of Cityscapes
    batch = ((torch.rand(2, 3, 16, 24), labels), torch.rand(2, 3, 24, 32))
    names: dict[str, Any] = {
        "model": model,
        "loader": [batch] * 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    before = [parameter.detach().clone() for parameter in model.parameters()]
    exec(block, names)
    after = list(model.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert not any(map(torch.equal, before, after))


if __name__ == "__main__":
    found = blocks(Path(sys.argv[1]), "python")
    assert found
    for block in found:
        train(block)
    print(f"{sys.argv[1]}: maxsquare {maxsquare.__version__} of {maxsquare.__path__[0]},", end=" ")
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
