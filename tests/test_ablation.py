"""The ablation: its protocol on a task of a few numbers, and the street scenes as a task."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import ablation
import grid
import tables
from ablation import CRITERIA, FULL, METHODS, ROWS
from grid import SOURCE_ONLY, STATISTICS, Run
from maxsquare import Statistics
from street_scenes import SETTINGS, StreetScenes
from uda import deeplab
from uda.errors import UserError
from uda.evaluation import steadiness

SEEDS = 3
GRID = (0.1, 0.5, 2.5)


def informative(seed: int, row: int) -> int:
    """Where on the grid a method has the most information; it scores best elsewhere."""
    return (seed + row) % len(GRID)


class Numbers:
    """A model is a number, which is its score, and its information."""

    name = "numbers"
    score_name = "score (points)"
    weights = GRID

    def __init__(self, seconds: float = 0.0, data: str = "none") -> None:
        self.seconds = seconds
        self.base = {"data": data}

    def prepare(self, on_progress: Any) -> None:
        on_progress(1, 1)

    def train_source(self, seed: int) -> dict[str, Tensor]:
        return {"points": torch.tensor(10.0 + seed)}

    def target_statistics(self, source: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        return {"points": source["points"] + 0.25 + seed % 2}

    def adapt(
        self,
        source: dict[str, Tensor],
        seed: int,
        method: str,
        weight: float,
        *,
        prior: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        if method == "source":
            return {"points": source["points"] + 0.5 * seed}
        row = METHODS_OF.index((method, prior is not None))
        distance = abs(GRID.index(weight) - informative(seed, row))
        points = source["points"] + 1 + distance + 0.125 * seed**2 + row
        return {"points": points, "information": torch.tensor(-float(distance))}

    def score(self, weights: dict[str, Tensor]) -> tuple[float, dict[str, float | None]]:
        points = weights["points"].item()
        return points, {"first": points / 2, "second": None}

    def watch(self, weights: dict[str, Tensor]) -> Statistics:
        points = weights["points"]
        share = 1 / (1 + points / 10)
        return Statistics(
            entropy=-points,
            proportions=torch.stack([share, 1 - share]),
            diversity=points,
            information=weights.get("information", -points),
            classes=torch.tensor(2),
        )


# The method of each row with a target loss, and whether its prior is predicted.
METHODS_OF = [(ROWS[name].method, ROWS[name].predicted_prior) for name in METHODS]


@contextmanager
def threads(count: int, task: Numbers, folder: Path) -> Iterator[ThreadPoolExecutor]:
    """In place of worker processes, whose start takes longer than all runs."""
    with ThreadPoolExecutor(count) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "_task", task, raising=False)
        patch.setattr(grid, "_folder", folder, raising=False)
        yield pool


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Content of the run files, without the time they took."""
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("seed*.json")}
    return {name: {**result, "seconds": None} for name, result in read.items()}


@pytest.fixture(autouse=True, scope="module")
def numbers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "make_task", lambda options: Numbers())
        patch.setattr(grid, "workers", threads)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, numbers: None) -> Path:
    """The --work folder of a whole ablation."""
    work = tmp_path_factory.mktemp("ablation") / "work"
    options = f"--seeds {SEEDS} --workers 2 --work {work} --out {work.parent / 'out'}"
    assert ablation.main(options.split()) == 0
    return work


@pytest.fixture(scope="module")
def summary(uninterrupted: Path) -> dict[str, Any]:
    return ablation.summarize(*grid.load(uninterrupted, ROWS, SEEDS), SEEDS)


# Protocol


def model(task: Numbers, name: str, seed: int, weight: float) -> dict[str, Tensor]:
    """What a run of a row has to make."""
    source = task.train_source(seed)
    if name == SOURCE_ONLY:
        return source
    statistics = task.target_statistics(source, seed)
    if name == STATISTICS:
        return statistics
    row = ROWS[name]
    prior = task.watch(statistics).proportions if row.predicted_prior else None
    return task.adapt(source, seed, str(row.method), weight, prior=prior)


def test_a_row_takes_the_weight_of_the_highest_information(summary: dict[str, Any]) -> None:
    for index, name in enumerate(METHODS):
        if name in ablation.TERM:
            continue
        chosen = [GRID[informative(seed, index)] for seed in range(SEEDS)]
        assert summary["rows"][name]["weights"] == chosen
        # By the labels it would have been another one.
        for seed, at in enumerate(zip(*summary["grid"][name], strict=True)):
            assert summary["rows"][name]["scores"][seed] == min(at) < max(at)


def test_a_row_with_the_information_term_takes_the_steadiest_weight() -> None:
    runs = [Run(0, "entropy-prior", weight) for weight in GRID]
    finished: grid.Finished = {
        run: {"information": number, "steadiness": -abs(number - 1)}
        for number, run in enumerate(runs)
    }
    assert grid.choose(ROWS["entropy-prior"], runs, finished) == runs[1]
    assert grid.choose(ROWS["entropy"], runs, finished) == runs[2]


def test_rows_are_scores_of_the_chosen_runs(summary: dict[str, Any]) -> None:
    assert list(summary["rows"]) == list(ROWS)
    task = Numbers()
    for name, row in summary["rows"].items():
        weights = row["weights"] or [0.0] * SEEDS
        expected = [task.score(model(task, name, seed, weights[seed]))[0] for seed in range(SEEDS)]
        assert row["scores"] == expected
        assert row["mean"] == pytest.approx(sum(expected) / SEEDS)
        assert row["per_class"] == {"first": pytest.approx(row["mean"] / 2), "second": None}


def test_grid_and_effect_of_the_term_are_those_of_one_weight(summary: dict[str, Any]) -> None:
    task = Numbers()
    for name, at_weights in summary["grid"].items():
        for weight, scores in zip(GRID, at_weights, strict=True):
            models = [model(task, name, seed, weight) for seed in range(SEEDS)]
            assert scores == [task.score(made)[0] for made in models]
    assert len(summary["term"]) == len(ablation.TERM) * len(GRID)
    for effect in summary["term"]:
        at = GRID.index(effect["weight"])
        both = (summary["grid"][effect[key]][at] for key in ("row", "against"))
        deltas = [a - b for a, b in zip(*both, strict=True)]
        assert effect["mean"] == pytest.approx(sum(deltas) / SEEDS)


def test_criteria_are_judged_by_what_they_choose(summary: dict[str, Any]) -> None:
    """Minus the entropy of these models is their score, which makes it the perfect criterion."""
    perfect, found = summary["criteria"]["certainty"], summary["criteria"]["information"]
    assert summary["criteria"].keys() == CRITERIA.keys()
    assert perfect["correlation"] == pytest.approx([1.0] * SEEDS)
    assert perfect["regret"] == perfect["regret_of_weight"] == [0.0] * SEEDS
    for index, (missed, of_weight) in enumerate(
        zip(found["regret"], found["regret_of_weight"], strict=True)
    ):
        # The weight of the highest information is the nearest one, which scores lowest.
        far = [max(informative(index, row), 2 - informative(index, row)) for row in
               range(len(METHODS))]  # fmt: skip
        assert of_weight == pytest.approx(sum(far) / len(far))
        assert missed > 0
    # All models predict two classes: whoever chooses by that takes any of them.
    every = [
        Numbers().score(model(Numbers(), name, 0, weight))[0]
        for name in ROWS
        for weight in (GRID if name in METHODS else (0.0,))
    ]
    assert summary["criteria"]["classes"]["correlation"] == [0.0] * SEEDS
    mean = sum(every) / len(every)
    assert summary["criteria"]["classes"]["regret"][0] == pytest.approx(max(every) - mean)


def test_steadiness_falls_with_entropy_and_with_a_drift_of_the_proportions() -> None:
    assert steadiness(0.25, [0.5, 0.5], [0.5, 0.5]) == pytest.approx(-0.25)
    assert steadiness(0.0, [1.0, 0.0], [0.5, 0.5]) == pytest.approx(-math.log(2))
    assert math.isfinite(steadiness(0.0, [0.5, 0.5], [1.0, 0.0]))


def test_batch_norm_share_is_measured_for_every_trained_row(summary: dict[str, Any]) -> None:
    for name, row in summary["rows"].items():
        added = [0.25 + seed % 2 for seed in range(SEEDS)]
        expected = [score + more for score, more in zip(row["scores"], added, strict=True)]
        trained = name not in (SOURCE_ONLY, STATISTICS)
        assert row["scores_with_target_statistics"] == (expected if trained else [])


def test_nothing_starts_before_its_source_model() -> None:
    runs = grid.all_runs(ROWS, GRID, 2)
    assert len(runs) == 2 * (3 + len(METHODS) * len(GRID)) == len({*runs})
    sources = [Run(seed, SOURCE_ONLY) for seed in range(2)]
    assert grid.startable(runs, {}) == sources
    found = grid.startable(runs, {sources[1]: {}})
    assert set(found) == {sources[0], *(run for run in runs if run.seed == 1)}


def test_more_seeds_continue_the_runs_of_fewer(uninterrupted: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(uninterrupted, work)
    before = results(work)
    options = ["--workers", "1", "--work", str(work), "--out", str(tmp_path / "out")]
    assert ablation.main(["--seeds", str(SEEDS + 1), *options]) == 0
    assert before.items() < results(work).items()
    assert ablation.main(["--seeds", str(SEEDS), "--summary-only", *options]) == 0
    assert json.loads((tmp_path / "out" / "ablation-numbers.json").read_text())["seeds"] == SEEDS


# Intervals


def test_interval_is_students_t_of_paired_differences() -> None:
    difference = tables.difference([3.0, 5.0, 4.0, 9.0], [1.0, 6.0, 2.0, 4.0])
    deltas = torch.tensor([2.0, -1.0, 2.0, 5.0], dtype=torch.float64)
    half = stats.t.ppf(0.975, df=3) * deltas.std().item() / 2
    assert difference == {
        "mean": 2.0,
        "low": pytest.approx(2 - half),
        "high": pytest.approx(2 + half),
        "won": 3,
    }
    assert tables.difference([2.0, 3.0], [1.0, 2.0]) == {
        "mean": 1.0,
        "low": 1.0,
        "high": 1.0,
        "won": 2,
    }


def test_every_comparison_is_between_scores_of_the_same_seed(summary: dict[str, Any]) -> None:
    rows = summary["rows"]
    pairs = {(d["row"], d["against"]): d for d in summary["differences"]}
    assert set(pairs) == set(ablation.COMPARISONS)
    for (a, b), difference in pairs.items():
        deltas = [x - y for x, y in zip(rows[a]["scores"], rows[b]["scores"], strict=True)]
        assert difference["mean"] == pytest.approx(sum(deltas) / SEEDS)
        assert difference["won"] == sum(delta > 0 for delta in deltas)
        assert difference["low"] <= difference["mean"] <= difference["high"]


def test_statistics_of_the_target_in_every_model_explain_no_difference(
    summary: dict[str, Any],
) -> None:
    scores = {name: row["scores_with_target_statistics"] for name, row in summary["rows"].items()}
    scores[STATISTICS] = summary["rows"][STATISTICS]["scores"]
    pairs = {(d["row"], d["against"]): d for d in summary["differences_with_target_statistics"]}
    assert {("source", STATISTICS), (FULL, STATISTICS), (FULL, "source")} < set(pairs)
    for (a, b), difference in pairs.items():
        deltas = [x - y for x, y in zip(scores[a], scores[b], strict=True)]
        assert difference["mean"] == pytest.approx(sum(deltas) / SEEDS)


# The script

MAIN = (
    "import sys, ablation, grid, test_ablation\n"
    "grid.make_task = lambda options: test_ablation.Numbers(seconds=0.05)\n"
    "sys.exit(ablation.main(sys.argv[1:]))"
)


def test_a_killed_run_goes_on_and_ends_in_the_same_results(
    tmp_path: Path, uninterrupted: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    options = f"--seeds {SEEDS} --workers 1 --work {work} --out {out}".split()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    while len(results(work)) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # ends when no process is left that might write
    before = {path: path.stat().st_mtime_ns for path in work.glob("seed*.json")}
    assert 5 <= len(before) < len(results(uninterrupted))
    assert not out.exists()

    assert ablation.main(options) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert results(work) == results(uninterrupted)
    assert results(work).keys() == {f"{run.name}.json" for run in grid.all_runs(ROWS, GRID, SEEDS)}
    assert {path.name for path in out.iterdir()} == {
        f"ablation-numbers.{suffix}" for suffix in ("json", "csv", "md", "png", "svg")
    }


def test_summary_is_made_again_from_the_finished_runs(
    uninterrupted: Path, tmp_path: Path, summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--summary-only --seeds {SEEDS} --work {uninterrupted} --out {tmp_path}".split()
    assert ablation.main(options) == 0
    assert capsys.readouterr().out.lstrip().startswith(ablation.QUESTION)
    document = json.loads((tmp_path / "ablation-numbers.json").read_text())
    written, expected = (s["rows"][FULL]["scores"] for s in (document, summary))
    assert written == pytest.approx(expected, rel=1e-3)
    assert document["versions"]["torch"] == torch.__version__.partition("+")[0]
    with (tmp_path / "ablation-numbers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == SEEDS * len(ROWS)
    for line in lines:
        expected = summary["rows"][line["row"]]["scores"][int(line["seed"])]
        assert float(line["score"]) == pytest.approx(expected, rel=1e-3)
    text = (tmp_path / "ablation-numbers.md").read_text()
    for row in ROWS.values():
        assert f"| {row.label} |" in text


@pytest.mark.parametrize(
    ("options", "task", "sentence"),
    [
        (["--seeds", "3"], Numbers(data="other"), "holds runs with base data none, not other"),
        (["--seeds", "1"], Numbers(), "--seeds 1 gives no interval"),
        (["--workers", "0"], Numbers(), "--workers must be positive"),
    ],
)
def test_other_settings_are_refused_in_one_sentence(
    options: list[str],
    task: Numbers,
    sentence: str,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(grid, "make_task", lambda options: task)
    before = results(uninterrupted)
    assert (
        ablation.main([*options, "--work", str(uninterrupted), "--out", str(tmp_path / "out")]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sentence in error
    assert results(uninterrupted) == before and not (tmp_path / "out").exists()


def test_summary_of_unfinished_runs_is_refused(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--summary-only", "--work", str(tmp_path), "--out", str(tmp_path)]
    options += ["--seeds", str(SEEDS)]
    assert ablation.main(options) == 2
    assert "holds no runs" in capsys.readouterr().err
    (tmp_path / "settings.json").write_bytes((uninterrupted / "settings.json").read_bytes())
    assert ablation.main(options) == 2
    total = len(results(uninterrupted))
    assert f"holds 0 of {total} runs" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}"])
@pytest.mark.parametrize("name", ["settings.json", f"seed0-{SOURCE_ONLY}.json"])
@pytest.mark.parametrize("options", [[], ["--summary-only"]])
def test_a_damaged_file_is_named_and_kept(
    options: list[str],
    name: str,
    content: bytes,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    shutil.copytree(uninterrupted, work)
    (work / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    folders = ["--work", str(work), "--out", str(out)]
    assert ablation.main([*options, "--seeds", str(SEEDS), *folders]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {work / name} is damaged: ") and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    assert not out.exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear reader")
    with pytest.raises(UserError, match="something else"):
        grid.claim(tmp_path, Numbers(), workers=1)


# Street scenes

TINY = replace(
    SETTINGS,
    source_size=(32, 64),
    target_size=(32, 64),
    scenes=4,
    steps=2,
)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> StreetScenes:
    folder, files = tmp_path_factory.mktemp("scenes"), []
    for seed in range(2):
        torch.manual_seed(seed)
        weights = deeplab.deeplab_small(19).state_dict()
        files.append(folder / f"source{seed}.pt")
        torch.save(weights, files[-1])
    task = StreetScenes(folder / "data", files, TINY)
    task.prepare(lambda done, total: None)
    return task


@pytest.fixture(scope="module")
def source(scenes: StreetScenes) -> dict[str, Tensor]:
    return scenes.train_source(0)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_scenes_seeds_take_the_source_models_in_turn(
    scenes: StreetScenes, source: dict[str, Tensor]
) -> None:
    assert same(source, torch.load(scenes.sources[0]))
    assert same(source, scenes.train_source(2))
    assert not same(source, scenes.train_source(1))


def test_scenes_adapt_by_each_method_deterministically(
    scenes: StreetScenes, source: dict[str, Tensor]
) -> None:
    before = {key: value.clone() for key, value in source.items()}
    adapted = []
    prior = torch.linspace(1, 2, 19) / 28.5
    for method, predicted in (("source", False), *METHODS_OF):
        call = (source, 0, str(method), scenes.weights[-1])
        options = {"prior": prior} if predicted else {}
        adapted.append(scenes.adapt(*call, **options))
        assert same(adapted[-1], scenes.adapt(*call, **options)), method
    assert same(source, before)
    for i, one in enumerate(adapted):
        assert not any(same(one, other) for other in adapted[:i])


def test_scenes_target_statistics_change_nothing_else(
    scenes: StreetScenes, source: dict[str, Tensor]
) -> None:
    changed = scenes.target_statistics(source, 0)
    for key, value in source.items():
        assert torch.equal(changed[key], value) != key.endswith(BUFFERS), key


def test_scenes_scores_and_explanation_are_percent(
    scenes: StreetScenes, source: dict[str, Tensor]
) -> None:
    score, per_class = scenes.score(source)
    known = [value for value in per_class.values() if value is not None]
    assert score == pytest.approx(sum(known) / len(known))
    assert isinstance(scenes, grid.Explaining)
    confidence, share = scenes.explain(source)
    assert 100 / 19 < confidence <= 100
    assert sum(share.values()) == pytest.approx(100)
    assert list(share) == list(per_class)
