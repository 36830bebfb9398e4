"""Weight and checkpoint of an adaptation, chosen without labels of the target."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_examples import (
    OWN_DATA,
    Killed,
    data_root,
    eleven,
    finished,
    kill_at,
    only_sentence,
    same,
    train,
    trained,
)
from test_interruptions import curves

import train_uda
from maxsquare import PredictionStatistics
from uda import adaptation, checkpoint, loading
from uda.evaluation import steadiness
from uda.presets import PRESETS

__all__ = ["data_root", "eleven", "finished"]  # fixtures


def metrics_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


# Several weights

WEIGHTS = "--target-weight 0.5 5 500 --no-compare".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """The folder of a run with three weights, killed and resumed on the way."""
    out = tmp_path_factory.mktemp("runs") / "weights"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, adaptation, "adaptation_step", 5)  # within the second weight
        train(out, data_root, *WEIGHTS)
    assert train(out, data_root, *WEIGHTS, "--resume") == 0
    return out


def test_each_weight_is_a_run_of_its_own_from_one_source_model(
    weights: Path, finished: Path
) -> None:
    metrics = metrics_of(weights)
    assert metrics["weights"].keys() == {"weight-0.5", "weight-5", "weight-500"}
    alone = trained(finished / "last.pt")  # the demo's weight is 5
    among = trained(weights / "weight-5" / "last.pt")
    assert same(among["model"], alone["model"]) and same(among["watched"], alone["watched"])
    assert metrics["weights"]["weight-5"] == metrics_of(finished)["adapted"]
    assert metrics["settings"]["target_weight"] == [0.5, 5, 500]


def test_the_weight_of_the_highest_information_is_adapted(
    weights: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = metrics_of(weights)
    others = {name: run["information"] for name, run in found["weights"].items()}
    chosen = max(others, key=others.__getitem__)
    assert len({*others.values()}) == 3
    assert found["adapted"] == found["weights"][chosen]
    assert train(weights, data_root, *WEIGHTS, "--resume") == 0
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"{chosen}/last.pt" in printed and "information" in printed


def test_a_loss_that_raises_the_information_is_chosen_by_steadiness(
    tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = "--method maxsquare-information --target-weight 0.5 500 --no-compare".split()
    assert train(out, data_root, *options) == 0
    metrics, printed = metrics_of(out), capsys.readouterr().out
    before = metrics["target_statistics"]["proportions"]
    for run in metrics["weights"].values():
        expected = steadiness(run["entropy"], run["proportions"], before)
        assert run["steadiness"] == pytest.approx(expected)
    chosen = max(metrics["weights"].values(), key=lambda run: run["steadiness"])
    assert metrics["adapted"] == chosen
    assert "steadiness (nats)" in printed and "Of the highest steadiness" in printed
    for folder in out.glob("weight-*"):
        best = checkpoint.load(folder / "best.pt")["best"]
        assert best["steadiness"] >= checkpoint.load(folder / "last.pt")["watched"]["steadiness"]


# What is watched


def test_information_is_that_of_unlabelled_target_training_images(finished: Path) -> None:
    """As the last checkpoint's network has it, by the library's own statistics."""
    network, s = loading.load_network(finished / "last.pt", data_root=None)
    network.eval()
    statistics = PredictionStatistics()
    watched = loading.open_watched(s)
    assert all(label is None for _, label in watched.dataset.pairs)
    with torch.no_grad():
        for image, _, _ in watched:
            statistics.update(network(image[None])[0], size=s.target_size, align_corners=True)
    expected = statistics.compute()
    found = metrics_of(finished)["adapted"]
    assert found["information"] == pytest.approx(expected.information.item(), rel=1e-4)
    assert found["entropy"] == pytest.approx(expected.entropy.item(), rel=1e-4)
    assert found["classes"] == expected.classes.item()


def test_curves_show_information_entropy_and_classes(finished: Path) -> None:
    logged = curves(finished)
    for name in ("information", "entropy", "classes"):
        steps = [step for step, _ in logged[f"target/{name}"]]
        assert steps == [2, 3]
        assert logged[f"target/{name}"][-1][1] == pytest.approx(
            metrics_of(finished)["adapted"][name], rel=1e-6
        )


def test_steadiness_chooses_where_the_loss_raises_information_by_itself() -> None:
    steady = {
        (method, ratio)
        for method in ("all", *adaptation.methods())
        for ratio in (-0.2, 0.2, 0.49, 0.5, 1.0)
        if replace(PRESETS["demo"].settings, method=method, ratio=ratio).criterion == "steadiness"
    }
    with_term = {m for m in adaptation.methods() if m.endswith("-information")}
    image_wise = {"maxsquare-iw", "maxsquare-iw-multi", "entropy-iw", "all"}
    assert {method for method, ratio in steady if ratio < 0.5} == with_term
    assert {method for method, ratio in steady if ratio >= 0.5} == with_term | image_wise


@pytest.mark.parametrize(("select", "criterion"), [("information", 0), ("labels", 1)])
def test_best_is_chosen_by_what_was_selected(
    select: str,
    criterion: int,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Information and mIoU are made to disagree: the one falls from evaluation to evaluation."""
    falling, original = iter([3.0, 2.0, 1.0]), train_uda.watch

    def watch(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return found._replace(information=torch.tensor(next(falling)))

    class Rising(train_uda.Scores):
        mious = iter([1.0, 2.0, 3.0])

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            object.__setattr__(self, "of_this", next(self.mious))

        @property
        def miou(self) -> float:
            return self.of_this  # type: ignore[attr-defined, no-any-return]

    evaluate = train_uda.evaluate
    monkeypatch.setattr(train_uda, "watch", watch)
    monkeypatch.setattr(
        train_uda,
        "evaluate",
        lambda *args, **kwargs: Rising(*vars(evaluate(*args, **kwargs)).values()),
    )
    options = ("--no-compare", "--select", select, "--steps", "2", "--evaluate-every", "1")
    assert train(tmp_path / "run", data_root, *options) == 0
    best = checkpoint.load(tmp_path / "run" / "best.pt")["best"]
    assert (best["step"], best["information"], best["miou"]) == [(1, 2.0, 2.0), (2, 1.0, 3.0)][
        criterion
    ]
    assert ("by information", "on target labels")[criterion] in capsys.readouterr().out


def test_published_presets_select_by_labels_and_the_demo_does_not() -> None:
    for name, preset in PRESETS.items():
        assert preset.settings.select == ("information" if name == "demo" else "labels")


@pytest.mark.parametrize(("classes", "warnings"), [([8, 4, 4, 4], 0), ([8, 3, 2, 3], 1)])
def test_a_collapse_is_told_once(
    classes: list[int],
    warnings: int,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the source model's 8 predicted classes fewer than half are left."""
    predicted, watch = iter(classes), train_uda.watch
    monkeypatch.setattr(
        train_uda,
        "watch",
        lambda *args, **kwargs: watch(*args, **kwargs)._replace(
            classes=torch.tensor(next(predicted))
        ),
    )
    options = ("--no-compare", "--evaluate-every", "1", "--method", "maxsquare")
    assert train(tmp_path / "run", data_root, *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("warning: maxsquare predicts 3 classes") == warnings
    assert printed.count("warning") == warnings


# The prior


def test_a_predicted_prior_is_that_of_the_source_model_with_target_statistics(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    priors, methods = [], adaptation.methods

    def noted(**options: Any) -> Any:
        priors.append(options["prior"])
        return methods(**options)

    monkeypatch.setattr(adaptation, "methods", noted)
    options = ("--method", "maxsquare-information", "--no-compare", "--steps", "1")
    for prior in ("uniform", "predicted"):
        assert train(tmp_path / prior, data_root, *options, "--prior", prior) == 0
    expected = metrics_of(tmp_path / "predicted")["target_statistics"]["proportions"]
    assert priors[0] is None and sum(expected) == pytest.approx(1)
    torch.testing.assert_close(priors[1], torch.tensor(expected), atol=3e-3, rtol=0)
    assert priors[1].min() > 0 and priors[1].sum().item() == pytest.approx(1)
    uniform, predicted = (
        trained(tmp_path / prior / "last.pt")["model"]["layer6.conv2d_list.0.weight"]
        for prior in ("uniform", "predicted")
    )
    assert not torch.equal(uniform, predicted)


# A target without any label


@pytest.fixture
def unlabelled(eleven: Path) -> Path:
    """A user's pair of data sets whose target has nothing but images."""
    shutil.rmtree(eleven / "Theirs" / "labels")
    shutil.rmtree(eleven / "Theirs" / "images" / "val")
    (eleven / "Theirs" / "label_map.json").unlink()
    return eleven


def test_a_target_without_labels_is_adapted_to_and_chosen_for(
    unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = (*OWN_DATA, "--target-weight", "1", "2")
    assert train(out, unlabelled, *options) == 0
    metrics = metrics_of(out)
    assert "miou" not in metrics["adapted"] and metrics["adapted"]["information"] > 0
    printed = capsys.readouterr().out
    assert "information" in printed and "mIoU" not in printed
    with Image.open(out / "panel.png") as panel:
        assert 3 * 64 < panel.width < 4 * 64  # no column of labels
    assert (out / "weight-1" / "best.pt").is_file()
    assert train(out, unlabelled, *options, "--resume") == 0


def test_labels_cannot_select_where_there_are_none(
    unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", unlabelled, *OWN_DATA, "--select", "labels") == 2
    assert "--select labels needs" in only_sentence(capsys)
    assert not (tmp_path / "run").exists()


# The teacher


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_is_resumed_with_the_run(
    precision: str, tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--method", "teacher", "--threshold", "0.06", "--no-compare")
    options += ("--precision", precision)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, data_root, *options) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, adaptation, "adaptation_step", 3)
        train(broken, data_root, *options)
    assert train(broken, data_root, *options, "--resume") == 0
    ends = [trained(out / "last.pt") for out in (whole, broken)]
    assert same(*ends)
    teacher, model = ends[0]["teacher"], ends[0]["model"]
    assert not torch.equal(teacher["module.conv1.weight"], model["conv1.weight"])


def test_a_teacher_is_the_moving_average_and_drops_nothing() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5)
    ).train()
    teacher = adaptation.make_teacher(model, decay=0.75)
    assert [module.training for module in teacher.module] == [False, True, False]
    teacher.update_parameters(model)  # the first update copies
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    teacher.update_parameters(model)
    torch.testing.assert_close(teacher.module[0].weight, before + 0.25)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_student_sees_square_parts_of_its_images() -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 3, 36, 70) + 1
    seen = adaptation.masked(images, share=0.25, patches=8)
    side = 5  # 36 / 8, rounded up
    hidden = (seen == 0).all(1)
    assert torch.equal(
        seen[~hidden[:, None].expand_as(seen)], images[~hidden[:, None].expand_as(seen)]
    )
    for row in range(0, 36, side):
        for column in range(0, 70, side):
            patch = hidden[:, row : row + side, column : column + side].flatten(1)
            assert torch.equal(patch.all(1), patch.any(1))
    assert 0.15 < hidden.float().mean() < 0.35
