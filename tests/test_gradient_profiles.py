"""The paper's figures, measured: the numbers behind them, the fit, and what the script leaves."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fill import fill
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from torch import Tensor, nn

import gradient_profiles as profiles
from gradient_profiles import NO_FIT, Measured
from uda import checkpoint, datasets, outputs, scenes
from uda.datasets import LABEL_SPACES, LabelSpace, Sample
from uda.errors import UserError
from uda.evaluation import Scores
from uda.loading import build_network, load_network
from uda.presets import Settings

SIZE = (32, 64)
# Of unequal size, so that it matters how they are averaged.
BATCHES = ([0, 1], [2])
FIGURES = {"gradient-profiles", "class-gradient-share", "probability-iou"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny network that predicts several classes, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data"
    scenes.render(data, seed=0, train=1, val=3, size=SIZE, source_size=SIZE)
    s = Settings(network="small", target_size=SIZE, batch_size=2, workers=0, data_root=data)
    network = build_network(s)
    fill(network)
    state = {"model": network.state_dict(), "settings": outputs.as_json(s)}
    checkpoint.save(folder / "last.pt", state)
    return folder / "last.pt"


@pytest.fixture(scope="module")
def results(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the script wrote for that checkpoint."""
    out = tmp_path_factory.mktemp("results") / "new"
    assert profiles.main([str(trained), "--out", str(out), "--device", "cpu"]) == 0
    return out


def numbers(path: Path) -> dict[str, list[float | str | None]]:
    """The columns of a table; None where a cell is empty."""
    with path.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    columns: dict[str, list[float | str | None]] = {name: [] for name in rows[0]}
    for row, name in itertools.product(rows, columns):
        cell = row[name]
        columns[name].append((cell if name == "class" else float(cell)) if cell else None)
    return columns


def by_hand(trained: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Probabilities in double precision (N, 19, H, W) and labels of the batches."""
    network, s = load_network(trained)
    network.eval()
    validation = datasets.open_dataset("cityscapes", s.data_root / "Cityscapes", "val", size=SIZE)
    probabilities, labels = [], []
    for batch in BATCHES:
        images = torch.stack([validation[i].image for i in batch])
        with torch.no_grad():
            logits = network(images)[0].double()
        full = F.interpolate(logits, SIZE, mode="bilinear", align_corners=True)
        probabilities.append(full.softmax(dim=1))
        labels.append(torch.stack([validation[i].labels for i in batch]))
    return probabilities, labels


# Figure 1


def test_figure_1_holds_the_closed_forms(results: Path) -> None:
    table = {
        name: torch.tensor(c) for name, c in numbers(results / "gradient-profiles.csv").items()
    }
    assert table["q"].unique().tolist() == [1, 1.5, 2, 2.5, 3]
    for q in table["q"].unique().tolist():
        _, p, value, slope_p, slope_z = (c[table["q"] == q].double() for c in table.values())
        rest = 1 - p
        if q == 1:
            expected, slope = -p * p.log() - rest * rest.log(), (rest / p).log()
        else:
            expected = (1 - p**q - rest**q) / (q - 1)
            slope = q * (rest ** (q - 1) - p ** (q - 1)) / (q - 1)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slope_p, slope, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slope_z, p * rest * slope, rtol=1e-5, atol=1e-6)


def test_figure_1_alone_needs_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiles.main(["--q", "3", "2", "--classes", "3", "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"gradient-profiles"}
    table = {
        name: torch.tensor(c) for name, c in numbers(tmp_path / "gradient-profiles.csv").items()
    }
    assert table["q"].unique_consecutive().tolist() == [2, 3]
    p, slope = (table[name][table["q"] == 2] for name in ("p", "dS_q/dp"))
    torch.testing.assert_close(slope, 1 - 3 * p, rtol=1e-5, atol=1e-6)
    output = capsys.readouterr().out
    assert output.startswith("How does the gradient of a target loss depend")
    assert f"{1 - 3 * 0.9:.3g}" in output


# A trained network


def test_shares_are_the_mean_over_batches_of_the_gradient_by_class(
    trained: Path, results: Path
) -> None:
    expected = {name: torch.zeros(19, dtype=torch.float64) for name in profiles.LOSSES}
    for p, labels in zip(*by_hand(trained), strict=True):
        log_p = p.log()
        entropy = p * (log_p - (p * log_p).sum(1, keepdim=True))
        squares = p * (p - (p * p).sum(1, keepdim=True))
        counts = F.one_hot(p.argmax(1), 19).sum((1, 2)).double()
        counts = torch.stack([n[c] for n, c in zip(counts, p.argmax(1), strict=True)])
        weights = 1 / (counts**0.2 * (SIZE[0] * SIZE[1]) ** 0.8)
        gradients = (entropy, squares, weights[:, None] * squares)
        for share, gradient in zip(expected.values(), gradients, strict=True):
            strength = gradient.abs().sum(1)
            by_class = torch.stack([strength[labels == c].sum() for c in range(19)])
            share += len(labels) / 3 * by_class / by_class.sum()
    table = numbers(results / "class-gradient-share.csv")
    assert table["class"] == list(LABEL_SPACES[19].names)
    for name, share in expected.items():
        column = table[profiles.share_column(name)]
        assert sum(column) == pytest.approx(100, rel=1e-5)
        assert column == pytest.approx((100 * share).tolist(), rel=1e-3, abs=1e-4)


def test_certainty_is_the_probability_of_predicted_pixels_and_iou_that_of_counts(
    trained: Path, results: Path
) -> None:
    probabilities, labels = (torch.cat(parts) for parts in by_hand(trained))
    largest, predicted = probabilities.max(dim=1)
    table = numbers(results / "probability-iou.csv")
    for c in range(19):
        of_class, truth, counted = predicted == c, labels == c, labels >= 0
        assert table["predicted_pixels"][c] == of_class.sum()
        assert table["labelled_pixels"][c] == truth.sum()
        union = ((of_class | truth) & counted).sum()
        iou = (100 * (of_class & truth).sum() / union).item() if union else None
        assert table["iou_percent"][c] == (iou if iou is None else pytest.approx(iou, rel=1e-4))
        mean = (100 * largest[of_class].mean()).item() if of_class.any() else None
        given = table["mean_probability_percent"][c]
        assert given == (mean if mean is None else pytest.approx(mean, rel=1e-4))
    shown = json.loads((results / "probability-iou.json").read_text())["fit"]["n"]
    assert shown == sum(
        bool(seen and there)
        for seen, there in zip(table["predicted_pixels"], table["labelled_pixels"], strict=True)
    )
    assert 2 < shown < 19
    pixels = numbers(results / "class-gradient-share.csv")["pixels_percent"]
    total = sum(table["labelled_pixels"])
    assert pixels == pytest.approx([100 * n / total for n in table["labelled_pixels"]], rel=1e-4)


class Blank(nn.Module):
    """Two even classes wherever it looks."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = images.new_zeros(len(images), 2, 2, 2)
        return logits, logits


def test_images_without_labelled_pixels_are_told() -> None:
    space = LabelSpace(("a", "b"), ((0, 0, 0), (1, 1, 1)), (0, 1))
    nothing = Sample(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), -1), "x")
    labelled = Sample(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4).long(), "x")
    with pytest.raises(UserError, match="no labelled pixel"):
        profiles.measure(Blank(), [nothing], space)
    # A logit's slope is zero at even odds: no gradient, hence no share, but a score.
    assert profiles.measure(Blank(), [nothing, labelled], space).scores.miou == 100


@pytest.mark.parametrize(
    ("images", "chosen"), [(None, range(10)), (3, (0, 3, 6)), (1, (0,)), (99, range(10))]
)
def test_images_are_spread_over_the_data_set(images: int | None, chosen: tuple[int, ...]) -> None:
    assert [*profiles.spread(range(10), images)] == [*chosen]


# Fit and plots


def hand_made(certainty: list[float], ious: list[int]) -> Measured:
    """Classes with that IoU in percent, one absent from the labels, one never predicted."""
    classes = len(ious) + 2
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    for c, iou in enumerate(ious):
        confusion[c, c], confusion[c, -2] = iou, 100 - iou
    confusion[-1, -2] = 7
    names = tuple("abcdefgh"[:classes])
    predicted = torch.tensor([1.0] * (classes - 1) + [0])
    percent = torch.tensor([*certainty, 50, torch.nan], dtype=torch.float64)
    shares = {name: torch.full((classes,), 1 / classes) for name in profiles.LOSSES}
    return Measured(Scores(confusion, names), predicted, percent / 100, shares)


def test_fit_is_that_of_the_textbook() -> None:
    fit = profiles.fit_line(hand_made([1, 2, 3, 4, 5], [2, 4, 5, 4, 5]))
    assert fit is not None and fit.n == 5
    assert fit[:3] == pytest.approx((0.6, 2.2, 0.6**0.5))
    assert fit.p_value == pytest.approx(0.1240, abs=1e-4)
    assert str(fit) == "r = 0.77 (p = 0.12, n = 5 classes)"


@pytest.mark.parametrize(
    ("certainty", "ious"),
    [([], []), ([1, 2], [3, 4]), ([1, 2, 3], [0, 0, 0]), ([5, 5, 5], [1, 2, 3])],
)
def test_points_that_make_no_line_have_no_fit(certainty: list[float], ious: list[int]) -> None:
    measured = hand_made(certainty, ious)
    assert profiles.fit_line(measured) is None
    assert NO_FIT in profiles.plot_certainty(measured, None).axes[0].get_title()


def test_figure_2_names_its_points_and_counts_the_others() -> None:
    measured = hand_made([50, 50.1, 50.2, 60], [20, 20, 20, 30])
    axes = profiles.plot_certainty(measured, profiles.fit_line(measured)).axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["a", "b", "c", "d"]
    assert "2 of 6 classes have no point" in axes.get_title()
    assert "n = 4" in axes.get_title()


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([50, 51, 52, 50, 51], [50, 50, 50, 52, 52]),
        ([25.7, 26.1, 27.1, 27.6, 38], [0, 0, 0, 1.4, 1.6]),
    ],
)
def test_names_of_crowded_points_cannot_be_taken_for_each_other(
    x: list[float], y: list[float]
) -> None:
    axes = Figure(figsize=(8, 5)).subplots()
    axes.set(xlim=(0, 100), ylim=(-10, 100))
    names = ["traffic light", "traffic sign", "pole", "rider", "car"]
    profiles.name_points(axes, x, y, names)
    named = {text.get_text(): text for text in axes.texts if text.get_text()}
    assert [*named] == names
    boxes = [text.get_window_extent() for text in named.values()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    centers = [(*axes.transData.transform(point),) for point in zip(x, y, strict=True)]
    # A line leads to the point itself; a name without one is nearer to its own than to any other.
    leaders = [(text.xy, text.xyann) for text in axes.texts if not text.get_text()]
    assert 0 < len(leaders) < len(names)
    for text, box, center, point in zip(
        named.values(), boxes, centers, zip(x, y, strict=True), strict=True
    ):
        assert text.xy == point
        if (point, text.xyann) not in leaders:
            assert min(centers, key=lambda other: distance(box, other)) == center


def distance(box: Bbox, point: tuple[float, float]) -> float:
    x, y = point
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def test_shares_are_shown_of_the_classes_that_occur_from_hard_to_easy() -> None:
    figure = profiles.plot_shares(hand_made([1, 2, 3], [5, 30, 20]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["e", "a", "c", "b"]
    assert "without 1 of 5" in figure.get_suptitle()


# What is left behind


def test_every_figure_has_its_numbers_and_its_record(trained: Path, results: Path) -> None:
    endings = ("svg", "png", "csv", "json")
    written = {path.name for path in results.iterdir()}
    assert written == {f"{name}.{ending}" for name in FIGURES for ending in endings}
    for name in FIGURES:
        record = json.loads((results / f"{name}.json").read_text())
        assert record["command"].startswith(
            f"python benchmarks/experiments/gradient_profiles.py {trained}"
        )
        assert record["environment"]["torch"] == torch.__version__
        assert record["environment"].keys() >= {"python", "maxsquare", "cpu", "date"}
        assert (results / f"{name}.svg").stat().st_size < 200_000


def test_figures_and_numbers_come_out_identical(trained: Path, results: Path) -> None:
    def contents() -> dict[str, bytes]:
        paths = (path for path in results.iterdir() if path.suffix != ".json")
        return {path.name: path.read_bytes() for path in paths}

    before = contents()
    for path in results.glob("*.svg"):
        path.write_text("an earlier result")
    assert profiles.main([str(trained), "--out", str(results), "--device", "cpu"]) == 0
    assert contents() == before


def test_fewer_images_are_recorded(trained: Path, tmp_path: Path) -> None:
    options = ["--images", "2", "--out", str(tmp_path), "--device", "cpu"]
    assert profiles.main([str(trained), *options]) == 0
    record = json.loads((tmp_path / "class-gradient-share.json").read_text())
    assert (record["images"], record["batch_size"], record["size"]) == (2, 2, list(SIZE))
    seen = sum(numbers(tmp_path / "probability-iou.csv")["predicted_pixels"])
    assert seen == 2 * SIZE[0] * SIZE[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing.pt"], "missing.pt"),
        (["CHECKPOINT", "--images", "0"], "--images"),
        (["CHECKPOINT", "--data-root", "nowhere"], "nowhere"),
        (["--images", "3"], "checkpoint"),
        (["--data-root", "data"], "checkpoint"),
        (["--q", "1", "0"], "--q must be"),
        (["--q", "nan"], "--q must be"),
        (["--q"], "--q"),
        (["--classes", "1"], "--classes must be"),
        (["--device", "cuda"], "--device cuda finds no GPU"),
    ],
)
def test_bad_input_is_told_in_one_sentence_and_writes_nothing(
    arguments: list[str],
    told: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    given = [str(trained) if argument == "CHECKPOINT" else argument for argument in arguments]
    assert profiles.main([*given, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert told in message
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert profiles.main(["--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
