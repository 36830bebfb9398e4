"""What the undocumented parts of the published procedure change, as benchmarks/ measures it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

import published_gap
from digits import Digits
from uda.adaptation import BackboneUpdates
from uda.presets import PRESETS

RULES: dict[BackboneUpdates, tuple[float, float]] = {
    "torch-1.0": (5.61, 9.049),
    "duplicated": (3, 4),
    "once": (1, 1),
}


@pytest.mark.parametrize("updates", RULES)
def test_the_first_step_is_that_of_a_tensor_listed_three_and_four_times(
    updates: BackboneUpdates,
) -> None:
    moved = published_gap.train(updates, start=0.0, gradient=-1.0)
    assert moved == pytest.approx(RULES[updates])


def test_torch_1_0_decays_as_often_as_all_listings_before_together() -> None:
    def decays(updates: BackboneUpdates) -> list[float]:
        stage = {"steps": 500, "horizon": 1000, "lr": 1e-3, "weight_decay": 5e-3}
        left = published_gap.train(updates, start=1.0, gradient=0.0, **stage)  # type: ignore[arg-type]
        return [-math.log(value) for value in left]

    once = decays("once")
    for updates, times in (("duplicated", (3, 4)), ("torch-1.0", (1 + 2 + 3, 1 + 2 + 3 + 4))):
        ratios = [a / b for a, b in zip(decays(updates), once, strict=True)]
        assert ratios == pytest.approx(times, rel=0.03)


def test_tables_hold_means_and_paired_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "gta5-cityscapes/source"
    short = replace(PRESETS[name], settings=replace(PRESETS[name].settings, source_steps=2))
    monkeypatch.setitem(PRESETS, name, short)

    def scores(task: Digits, seed: int, row: published_gap.Row) -> tuple[float, float]:
        assert (task.source_steps, task.steps) == (7, 3)
        return 10.0 + seed, 20.0 + seed - 3 * (row.updates == "once")

    monkeypatch.setattr(published_gap, "source_and_adapted", scores)
    options = ["--seeds", "3", "--source-steps", "7", "--steps", "3", "--out", str(tmp_path)]
    assert published_gap.main(options) == 0
    text = (tmp_path / published_gap.RESULT).read_text()
    assert "--seeds 3 --source-steps 7" in text
    assert "| `torch-1.0` | 5.61 | 9.05 |" in text
    assert "| as published | 11.0 | – | 21.0 | – |" in text
    assert "| every tensor updated once | 11.0 | +0.00 [+0.00, +0.00] 0/3 | 18.0 | -3.00" in text
    assert published_gap.RESULT in capsys.readouterr().out


def test_every_row_is_a_procedure_of_its_own() -> None:
    task = Digits(source_steps=2, steps=1, batch_size=2, validation_canvases=2)
    models = []
    for row in (published_gap.PUBLISHED, *published_gap.CHANGED):
        options = row._asdict()
        del options["label"]
        source = task.train_source(0, **options)
        models.append({name: weight.double().sum().item() for name, weight in source.items()})
    assert all(a != b for i, a in enumerate(models) for b in models[:i])
    before, after = published_gap.source_and_adapted(task, 0, published_gap.PUBLISHED)
    assert all(0 <= score <= 100 for score in (before, after))


def test_one_seed_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert published_gap.main(["--seeds", "1", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "--seeds" in error
    assert not (tmp_path / "out").exists()
