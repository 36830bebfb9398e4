"""The published implementation's numbers, with scale="reference"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maxsquare import (
    EntropyLoss,
    IWEntropyLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelGuidance,
    PseudoLabelLoss,
    functional,
)

RECORDED = dict(np.load(Path(__file__).parent / "fixtures" / "losses.npz"))
CASES = ("a", "b", "c", "d")
RATIOS = (0.0, 0.2, 0.5, 1.0)
TARGET_LOSSES: dict[str, nn.Module] = {
    "maxsquare": MaxSquareLoss(scale="reference"),
    "entropy": EntropyLoss(scale="reference"),
    **{f"iw_maxsquare@{r}": IWMaxSquareLoss(ratio=r, scale="reference") for r in RATIOS},
    **{f"iw_entropy@{r}": IWEntropyLoss(ratio=r, scale="reference") for r in RATIOS},
    **{f"hard@{t}": PseudoLabelLoss(threshold=t) for t in (0.6, 0.95)},
}


def recorded(key: str) -> Tensor:
    return torch.from_numpy(RECORDED[key])


def check(name: str, gradient_name: str, loss_of: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Loss and gradient to 1e-5 relative; where the published loss is NaN ours must be 0."""
    x = x.clone().requires_grad_()
    loss = loss_of(x)
    (gradient,) = torch.autograd.grad(loss, x)
    expected = recorded(f"{name}/loss").nan_to_num(0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    expected_gradient = recorded(f"{name}/{gradient_name}").nan_to_num(0.0)
    error = (gradient - expected_gradient).norm()
    assert error <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TARGET_LOSSES)
def test_target_loss_equals_the_published_number(case: str, name: str) -> None:
    check(f"{case}/{name}", "grad", TARGET_LOSSES[name], recorded(f"{case}/logits"))


@pytest.mark.parametrize("case", CASES)
def test_weights_from_a_label_map_equal_the_published_number(case: str) -> None:
    loss, labels = IWMaxSquareLoss(ratio=0.2, scale="reference"), recorded(f"{case}/label")
    check(
        f"{case}/iw_maxsquare_label@0.2",
        "grad",
        lambda logits: loss(logits, labels=labels),
        recorded(f"{case}/logits"),
    )


@pytest.mark.parametrize("case", CASES)
def test_guidance_equals_the_published_number(case: str) -> None:
    logits = recorded(f"{case}/logits")
    check(
        f"{case}/guidance@0.95",
        "grad_low",
        lambda low_logits: MultiLevelGuidance(threshold=0.95)(logits, low_logits),
        recorded(f"{case}/logits_low"),
    )


@pytest.mark.parametrize("case", CASES)
def test_guidance_labels_equal_the_published_labels(case: str) -> None:
    labels = functional.guidance_labels(
        recorded(f"{case}/logits"), recorded(f"{case}/logits_low"), threshold=0.95
    )
    assert torch.equal(labels, recorded(f"{case}/guidance@0.95/label"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threshold", [0.6, 0.95])
def test_a_head_that_guides_itself_gives_the_published_hard_labels(
    case: str, threshold: float
) -> None:
    logits = recorded(f"{case}/logits")
    labels = functional.guidance_labels(logits, logits, threshold=threshold)
    assert torch.equal(labels, recorded(f"{case}/hard@{threshold}/label"))


def test_every_recorded_number_is_compared() -> None:
    compared = {f"{case}/{name}" for case in CASES for name in TARGET_LOSSES}
    compared |= {f"{case}/iw_maxsquare_label@0.2" for case in CASES}
    compared |= {f"{case}/guidance@0.95" for case in CASES}
    inputs = {f"{case}/{name}" for case in CASES for name in ("logits", "logits_low", "label")}
    assert {key for key in RECORDED if key not in inputs} == {
        key for key in RECORDED if key.rpartition("/")[0] in compared
    }
    assert compared <= {key.rpartition("/")[0] for key in RECORDED}
