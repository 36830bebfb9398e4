"""The table of factors between other losses and these: every number in it is computed here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import maxsquare

ROOT = Path(__file__).parents[1]
# What the published code computed: case "a" has 19 classes, "b" 2, "c" 16 and "d" 150.
RECORDED = dict(np.load(Path(__file__).parent / "fixtures" / "losses.npz"))
PUBLISHED = {
    "published `MaxSquareloss()(pred, prob)`": "maxsquare",
    "published `IW_MaxSquareloss()(pred, prob)`, one image": "iw_maxsquare@0.2",
    "published `softCrossEntropy()(pred, prob)`": "entropy",
    "published `IWsoftCrossEntropy()(pred, prob)`, one image": "iw_entropy@0.2",
}
FACTORS: dict[str, Callable[[int], float]] = {
    "1": lambda classes: 1,
    "C": lambda classes: classes,
    "1 / C": lambda classes: 1 / classes,
    "2 / C": lambda classes: 2 / classes,
    "1 / ln C": lambda classes: 1 / math.log(classes),
    "C / ln C": lambda classes: classes / math.log(classes),
    "1 / ln 2": lambda classes: 1 / math.log(2),
    "C / ln 2": lambda classes: classes / math.log(2),
    "1 / (C ln 2)": lambda classes: 1 / (classes * math.log(2)),
}


def advent(logits: Tensor) -> Tensor:
    """Bits per pixel, as a share of the log2 C bits that are possible."""
    prob = logits.softmax(1)
    bits = -(prob * prob.log2()).sum(1)
    return bits.mean() / math.log2(logits.shape[1])


def tent(logits: Tensor) -> Tensor:
    """Nats per pixel."""
    return torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy().mean()


def bits_per_pixel(logits: Tensor) -> Tensor:
    prob = logits.softmax(1)
    return -(prob * prob.log2()).sum(1).mean()


def bits_per_entry(logits: Tensor) -> Tensor:
    prob = logits.softmax(1)
    return -(prob * prob.log2()).mean()


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "ADVENT's `entropy_loss(prob)`": advent,
    "TENT's `softmax_entropy(logits).mean()`": tent,
    "`-(prob * prob.log2()).sum(1).mean()`": bits_per_pixel,
    "`-(prob * prob.log2()).mean()`": bits_per_entry,
}


class Row(NamedTuple):
    so_far: str
    here: str
    reference: str
    reference_19: str
    paper: str
    paper_19: str


def rows() -> dict[str, Row]:
    """The table, wherever in the documentation it stands."""
    paths = [ROOT / "README.md", *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    (start,) = (i for i, line in enumerate(lines) if line.startswith("| so far |"))
    table = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        row = Row(*(cell.strip() for cell in line.strip().strip("|").split("|")))
        table[row.so_far] = row
    return table


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(loss, logits)
    return slope


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
@pytest.mark.parametrize("so_far", [*PUBLISHED, *FORMULAS])
@pytest.mark.parametrize("scale", ["reference", "paper"])
def test_the_other_loss_is_the_factor_times_ours(so_far: str, case: str, scale: str) -> None:
    row = rows()[so_far]
    logits = torch.from_numpy(RECORDED[f"{case}/logits"]).double().requires_grad_()
    ours = getattr(maxsquare, row.here.strip("`"))(scale=scale)(logits)
    if so_far in PUBLISHED:
        theirs, slope = (
            torch.from_numpy(RECORDED[f"{case}/{PUBLISHED[so_far]}/{what}"]).double()
            for what in ("loss", "grad")
        )
        tolerance = 1e-5  # recorded in float32
    else:
        theirs = FORMULAS[so_far](logits)
        slope = gradient(theirs, logits)
        tolerance = 1e-9
    factor = FACTORS[getattr(row, scale)](logits.shape[1])
    torch.testing.assert_close(factor * ours, theirs, rtol=tolerance, atol=0)
    error = (factor * gradient(ours, logits) - slope).norm()
    assert error <= tolerance * slope.norm()


def test_the_table_has_the_factors_for_19_classes() -> None:
    table = rows()
    assert table.keys() == {*PUBLISHED, *FORMULAS}
    for row in table.values():
        assert row.reference_19 == f"{FACTORS[row.reference](19):.4g}"
        assert row.paper_19 == f"{FACTORS[row.paper](19):.4g}"
