"""The cost of a step: what is taken apart computes the same as the step itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import step_cost
from step_cost import METHODS, PARTS, PUBLISHED, Clock, Step
from uda import adaptation, loading
from uda.presets import PRESETS, Settings

SETTINGS = replace(PRESETS["demo"].settings, source_size=(36, 64), target_size=(32, 64))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(-1, 19, (2, 36, 64))
    return torch.randn(2, 3, 36, 64), labels, torch.randn(2, 3, 32, 64)


def network_of(s: Settings) -> nn.Module:
    torch.manual_seed(1)
    return loading.build_network(s).train()


def gradients_of(network: nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", ["maxsquare-iw-multi", PUBLISHED])
def test_the_parts_add_up_to_the_step(method: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """The published losses are the same formula in other operations: equal up to rounding."""
    network, clock = network_of(SETTINGS), Clock()
    Step(network, SETTINGS, method)(clock, *batch)
    whole = network_of(SETTINGS)
    adaptation.adaptation_step(
        whole,
        torch.optim.SGD(whole.parameters(), lr=0.0),
        *batch,
        adaptation.methods()["maxsquare-iw-multi"],
        target_weight=1.0,
        low_weight=SETTINGS.low_weight,
    )
    largest = max(grad.abs().max().item() for grad in gradients_of(whole))
    for ours, expected in zip(gradients_of(network), gradients_of(whole), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * largest)
    assert all(clock.seconds[part] > 0 for part in ("network", "losses"))
    assert clock.seconds["discriminator"] == 0


def test_costs_of_every_method_become_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process of its own is for its memory; it takes seconds to start.
    monkeypatch.setattr(step_cost, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    monkeypatch.setitem(PRESETS, "demo", replace(PRESETS["demo"], settings=SETTINGS))
    assert step_cost.main(["--steps", "1", "--threads", "1", "--preset", "demo", "--out",
                           str(tmp_path)]) == 0  # fmt: skip
    text = (tmp_path / "step-cost-demo.md").read_text()
    for method in METHODS:
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {method} |"))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        by_part = dict(zip(PARTS, cells, strict=False))
        assert (by_part["discriminator"] != "–") == (method == step_cost.ADVERSARIAL)
        assert float(by_part["loading"]) > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--preset", "synthia-cityscapes/maxsquare"], "must be demo or of gta5-cityscapes"),
        (["--preset", "gta5-cityscapes/nothing"], "is not known"),
        (["--steps", "0"], "must be positive"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_cost.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
