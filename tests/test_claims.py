"""The paper's claims: the baselines, the weights that classes receive, and the script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_ablation import GRID, Numbers, threads
from torch import Tensor, nn

import ablation
import alternatives
import claims
import grid
from alternatives import Discriminator, GlobalWeightsLoss
from maxsquare import IWMaxSquareLoss, MaxSquareLoss
from uda import adaptation
from uda.datasets import Sample

SEEDS = 2
CALL = {"size": (9, 17), "align_corners": True}


# Global weights


def test_global_weights_are_those_of_an_image_with_these_shares() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 9, 17, dtype=torch.float64, requires_grad=True)
    shares = logits.argmax(1).flatten().bincount(minlength=5) / logits[0, 0].numel()
    for ratio in (-0.2, 0.2, 1.0):
        ours = GlobalWeightsLoss(shares, ratio)(logits, **CALL)
        image_wise = IWMaxSquareLoss(ratio, scale="reference")(logits)
        torch.testing.assert_close(ours, image_wise)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, image_wise)]
        torch.testing.assert_close(*gradients)


def test_global_weights_do_not_depend_on_the_image() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, 5)
    shares = torch.tensor([0.7, 0.3, 0.0])  # the last counts as the one before
    p = F.interpolate(logits, mode="bilinear", **CALL).softmax(1)
    weights = torch.tensor([0.7, 0.3, 0.3]) ** -0.5
    each = weights[p.argmax(1)] * p.square().sum(1) / 3
    torch.testing.assert_close(
        GlobalWeightsLoss(shares, 0.5)(logits, **CALL), -each.mean(dim=(1, 2)).mean()
    )


# The discriminator


class TwoHeads(nn.Module):
    """A convolution for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer6 = nn.Conv2d(3, 4, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.layer6(F.avg_pool2d(images, 2)), None


def batches(steps: int, offset: float) -> list[Sample]:
    generator = torch.Generator().manual_seed(int(offset))
    return [
        Sample(
            torch.randn(2, 3, 64, 64, generator=generator) + offset,
            torch.randint(4, (2, 64, 64), generator=generator),
            "",
        )
        for _ in range(steps)
    ]


def train(method: str, weight: float, steps: int = 3, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = TwoHeads()
    training = alternatives.adapt(
        model,
        adaptation.RepeatedSGD(adaptation.parameter_groups(model, 0.01)),
        batches(steps, 0.0),
        batches(steps, 1.0),
        [0.01] * steps,
        method,
        target_weight=weight,
        low_weight=0.0,
        seed=seed,
        source_shares=lambda: torch.full((4,), 0.25),
    )
    assert len([*training]) == steps
    return model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_without_weight_the_discriminator_teaches_the_network_nothing() -> None:
    assert same(train("adversarial", 0.0), train("source", 0.0))
    assert not same(train("adversarial", 1.0), train("source", 0.0))


def test_adversarial_training_is_determined_by_its_seed() -> None:
    state = torch.get_rng_state()
    first = train("adversarial", 8.0)
    torch.manual_seed(5)
    assert same(train("adversarial", 8.0), first)
    assert not same(train("adversarial", 8.0, seed=1), first)
    torch.set_rng_state(state)


def test_a_discriminator_learns_to_tell_domains_apart() -> None:
    torch.manual_seed(0)
    judge = Discriminator(4)
    assert judge(torch.zeros(2, 4, 96, 64)).shape == (2, 1, 3, 2)
    optimizer = torch.optim.Adam(judge.parameters(), 1e-3)
    sure, unsure = (
        20 * torch.eye(4)[torch.randint(4, (2, 64, 64))].movedim(3, 1),
        torch.randn(2, 4, 64, 64),
    )
    seen = [alternatives.class_entropies(z, (64, 64), True) for z in (sure, unsure)]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = judge.loss(seen[0], alternatives.SOURCE) + judge.loss(seen[1], alternatives.TARGET)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_what_the_discriminator_sees_sums_to_the_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9, 17)
    entropy = torch.distributions.Categorical(logits=logits.movedim(1, 3)).entropy()
    seen = alternatives.class_entropies(logits, (9, 17), True)
    torch.testing.assert_close(seen.sum(1) * torch.tensor(4.0).log(), entropy)


# Classes


def test_thirds_hold_every_class_once_from_frequent_to_rare() -> None:
    shares = {str(number): (number * 7 % 19 + 1) / 190 for number in range(19)}
    thirds = claims.thirds_of(shares)
    assert [len(members) for members in thirds.values()] == [6, 7, 6]
    ordered = [name for members in thirds.values() for name in members]
    assert sorted(ordered, key=int) == [*shares]
    assert [shares[name] for name in ordered] == sorted(shares.values(), reverse=True)


def test_received_weights_are_ours_pixel_by_pixel() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 9, 17), torch.randint(-1, 3, (3, 9, 17))
    for counted in claims.COUNTED:
        sums, pixels = [0.0] * 4, [0] * 4
        for image, truth in zip(logits.argmax(1), labels, strict=True):
            found = truth if counted == "truth" else image
            kept = truth >= 0
            if counted == "labels=":
                kept &= torch.isin(found, truth[kept])
            counts = (found if counted == "prediction" else truth)[kept].bincount(minlength=4)
            for y, c in zip(truth[kept].tolist(), found[kept].tolist(), strict=True):
                sums[y] += (counts[c] * counts.sum()).item() ** -0.5
                pixels[y] += 1
        mean = sum(sums) / sum(pixels)
        ours = claims.received([(logits, labels)], 0.5, counted)
        expected = [total / count / mean for total, count in zip(sums[:3], pixels, strict=False)]
        torch.testing.assert_close(ours[:3], torch.tensor(expected))


def test_scores_are_those_of_every_weight_and_of_the_weight_that_each_criterion_takes() -> None:
    weights, row = (1.0, 4.0, 16.0), grid.Row("", "maxsquare")
    finished: dict[grid.Run, dict[str, Any]] = {
        run: {
            "run": run,
            "score": 10.0 * place + run.seed,
            "information": (place == run.seed) * 1.0,
            "steadiness": -float(place),
        }
        for seed in range(SEEDS)
        for place, run in enumerate(grid.runs_of(seed, "", row, weights))
    }
    assert claims.at_every_weight("", row, weights, SEEDS, finished) == {
        **{"1": 0.5, "4": 10.5, "16": 20.5},
        **{"information": (0 + 11) / 2, "steadiness": 0.5},
    }


def test_class_shares_count_labelled_pixels() -> None:
    shares = grid.class_shares([torch.tensor([0, 0, 2, -1]), torch.tensor([[2]])], 4)
    assert shares.tolist() == [0.5, 0.0, 0.5, 0.0]


# The script


class Classes(Numbers):
    """A model is a number; every method has its own, and each class an IoU that depends on it."""

    name = "digits"

    def adapt(
        self, source: dict[str, Tensor], seed: int, method: str, weight: float, **options: Any
    ) -> dict[str, Tensor]:
        points = source["points"] + len(method) + options["ratio"] + options["length"] / 8
        return {"points": points, "information": torch.tensor(-weight)}

    def score(self, weights: dict[str, Tensor]) -> tuple[float, dict[str, float | None]]:
        points = weights["points"].item()
        return points, {"rare": points / 2, "common": points, "absent": None, "usual": 3.0}

    def predictions(self, weights: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.tensor([[[1] * 12 + [3] * 6 + [0] * 2]])
        yield F.one_hot(labels, 4).movedim(3, 1).float(), labels


@pytest.fixture(scope="module", autouse=True)
def classes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "make_task", lambda options: Classes())
        patch.setattr(grid, "workers", threads)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, classes: None) -> Path:
    """A folder with finished runs (work) and their report (out)."""
    folder = tmp_path_factory.mktemp("claims")
    assert claims.main(options(folder)) == 0
    return folder


def options(folder: Path, *more: str) -> list[str]:
    work, out = str(folder / "work"), str(folder / "out")
    return ["--task", "digits", "--seeds", str(SEEDS), "--work", work, "--out", out, *more]


def test_rows_share_their_runs_with_the_ablation() -> None:
    rows = claims.rows("digits")
    assert rows.items() >= ablation.ROWS.items()
    assert rows[claims.SQUARES_AT[0.2]] == ablation.ROWS["maxsquare-iw"]
    assert rows[claims.ENTROPY_AT[0.0]] == ablation.ROWS["entropy"]
    for ratio in claims.RATIOS:
        assert rows[claims.SQUARES_AT[ratio]].ratio == ratio
    longer = [row for row in rows.values() if row.length == claims.LONGER]
    assert [len(grid.runs_of(0, "", row, GRID)) for row in longer] == [1] * 4


def test_ratio_0_of_entropy_is_plain_entropy_and_of_squares_twice_the_plain_ones() -> None:
    logits = torch.randn(2, 5, 6, 7)
    entropy, image_wise = (
        adaptation.methods(ratio=0.0)[name] for name in ("entropy-iw", "maxsquare-iw")
    )
    plain = adaptation.methods()
    torch.testing.assert_close(entropy(logits), plain["entropy"](logits))
    torch.testing.assert_close(image_wise(logits), 2 * plain["maxsquare"](logits))
    assert isinstance(plain["maxsquare"], MaxSquareLoss)


def test_gains_are_paired_with_the_source_model_that_continued(made: Path) -> None:
    summary = json.loads((made / "out" / "claims-digits.json").read_text())
    assert summary["thirds"] == {"frequent": ["common"], "middle": ["usual"], "rare": ["rare"]}
    rows = summary["rows"]
    assert rows.keys() == claims.rows("digits").keys()
    more = len("maxsquare") - len("source")
    assert rows["maxsquare"]["gain"]["mean"] == pytest.approx(more, rel=1e-3)
    gains = {third: gain["mean"] for third, gain in rows["maxsquare"]["gain_of_thirds"].items()}
    assert gains == {
        "frequent": pytest.approx(more, rel=1e-3),
        "middle": 0.0,
        "rare": pytest.approx(more / 2, rel=1e-3),
    }
    assert rows["maxsquare"]["gain_of_classes"]["rare"] == pytest.approx(more / 2, rel=1e-3)
    step = next(step for step in summary["steps"] if step["row"] == "maxsquare-iw")
    assert step["against"] == "maxsquare"
    assert step["gain"]["mean"] == pytest.approx(len("-iw"), rel=1e-3)
    assert step["gain_of_thirds"]["rare"]["mean"] == pytest.approx(len("-iw") / 2, rel=1e-3)
    longer = rows["maxsquare-longer"]
    assert longer["weights"] == [GRID[1]] * SEEDS
    assert longer["gain"]["mean"] == pytest.approx(more + 3 / 8, rel=1e-3)


def test_tables_and_plot_are_made_again_from_the_finished_runs(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "work", tmp_path / "work")
    assert claims.main(options(tmp_path, "--summary-only")) == 0
    for name in ("claims-digits.json", "claims-digits.md"):
        assert (tmp_path / "out" / name).read_text() == (made / "out" / name).read_text()
    assert (tmp_path / "out" / "claims-digits.png").stat().st_size > 10_000
    text = (made / "out" / "claims-digits.md").read_text()
    for row in claims.rows("digits").values():
        shown = row.label in text
        assert shown or row.method in (None, "source")


@pytest.mark.parametrize(
    ("remove", "sentence"),
    [
        ("settings.json", "holds no runs"),
        ("seed0-source.json", "runs: finish them without --summary-only"),
        ("classes.json", "classes.json is missing: make it without --summary-only"),
    ],
)
def test_what_is_missing_is_named_in_one_sentence(
    remove: str, sentence: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "work", tmp_path / "work")
    (tmp_path / "work" / remove).unlink()
    assert claims.main(options(tmp_path, "--summary-only")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not (tmp_path / "out").exists()


def test_results_of_another_version_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "work", tmp_path / "work")
    path = tmp_path / "work" / "seed0-source.json"
    result = json.loads(path.read_text())
    del result["information"]
    path.write_text(json.dumps(result))
    assert claims.main(options(tmp_path, "--summary-only")) == 2
    assert "seed0-source.json is damaged" in capsys.readouterr().err
