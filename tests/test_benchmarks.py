"""The benchmarks: baselines that compute the same, and scripts that write what they measured."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import memory
import speed
from cases import COMPILED, CROSS_ENTROPY, OURS, PLAIN, PUBLISHED, Case
from maxsquare import functional
from speed import Claim, Options, Row, Timed

TINY = (
    "--heights 16 8 --classes 3 --batches 1 --dtypes float32 --rounds 3 --seconds 0 "
    "--threads 1 --no-compile --device cpu"
).split()


@pytest.fixture(autouse=True, scope="module")
def small_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "SHORTEST_SAMPLE", 1e-9)
        patch.setattr(speed, "COPY_BYTES", 2**16)
        yield


@pytest.fixture(scope="module")
def timed(
    tmp_path_factory: pytest.TempPathFactory, small_samples: None
) -> tuple[Path, dict[str, Any], str]:
    """Folder, figures and output of a tiny run of speed.py."""
    folder = tmp_path_factory.mktemp("results")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert speed.main([*TINY, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "speed-part-cpu.json").read_text()), output.getvalue()


def inputs_in_double(case: Case) -> cases.Inputs:
    heads, labels = cases.make_inputs(case)
    labels[:, 0] = -1
    return cases.Inputs([head.detach().double().requires_grad_() for head in heads], labels)


# Baselines


@pytest.mark.parametrize("upsampled", [False, True])
@pytest.mark.parametrize(
    ("loss", "baseline"),
    [
        *itertools.product(("max_square", "iw_max_square", "multi_level"), (PUBLISHED, PLAIN)),
        ("information", PLAIN),
        ("cross_entropy", CROSS_ENTROPY),
    ],
)
def test_baseline_equals_the_library(loss: cases.LossName, baseline: str, upsampled: bool) -> None:
    case = Case(loss, classes=5, height=16, batch=2, upsampled=upsampled)
    inputs, losses = inputs_in_double(case), cases.competitors(case)
    value, gradients = cases.value_and_gradient(losses[OURS], inputs)
    expected, expected_gradients = cases.value_and_gradient(losses[baseline], inputs)
    # Histograms count in float32; the two terms of the multi-level loss may cancel.
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.norm() > 0
        assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


def test_some_pixels_of_the_inputs_pass_the_threshold_and_some_do_not() -> None:
    inputs = inputs_in_double(Case("multi_level", classes=19, height=32))
    labels = functional.guidance_labels(*inputs.heads)
    assert 0.1 < (labels >= 0).double().mean() < 0.9


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_every_loss_meets_the_cross_entropy(loss: cases.LossName) -> None:
    names = list(cases.competitors(Case(loss, classes=3, height=16)))
    assert names[0] == OURS
    assert CROSS_ENTROPY in names


# Speed


def test_speed_writes_every_competitor_of_every_case(
    timed: tuple[Path, dict[str, Any], str],
) -> None:
    _, document, _ = timed
    measured = [Case(**entry["case"]) for entry in document["cases"]]
    headline = [
        Case(loss, 3, 16, upsampled=upsampled)
        for loss in cases.LOSSES
        for upsampled in (False, True)
    ]
    assert measured == [*headline, *(case._replace(height=8) for case in headline[:2])]
    for entry in document["cases"]:
        rows = {row["competitor"]: row for row in entry["rows"]}
        assert list(rows) == [*cases.competitors(Case(**entry["case"])), *speed.FLOORS]
        assert entry["skipped"] == {COMPILED: "--no-compile"}
        assert rows[OURS]["ratio"] == 1
        for row in rows.values():
            assert row["ratio"] == pytest.approx(row["ms"] / rows[OURS]["ms"], rel=1e-3)
            low, high = row["ms_quartiles"]
            assert 0 < low <= row["ms"] <= high


def test_speed_names_the_machine_and_its_pace(timed: tuple[Path, dict[str, Any], str]) -> None:
    _, document, _ = timed
    assert document["environment"]["threads"] == 1
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["cpu"]
    assert document["options"]["classes"] == [3] and "out" not in document["options"]
    assert document["machine"]["copied_bytes"] > 0
    assert document["machine"]["exponentials"] > 0
    assert document["claims"] == []  # they speak of another size
    assert [(s["axis"], s["sizes"]) for s in document["scaling"]] == [
        *[("pixels", [4 * 8, 8 * 16, 16 * 32, 32 * 64])] * 2,
        *[("classes", [3, 6, 12, 24])] * 2,
    ]


def test_speed_prints_question_tables_losses_and_paths(
    timed: tuple[Path, dict[str, Any], str],
) -> None:
    folder, document, output = timed
    assert output.startswith("How long do value and gradient")
    assert f"{COMPILED} left out: --no-compile" in output
    places = [output.index(str(Case(**entry["case"]))) for entry in document["cases"]]
    assert places == sorted(places)
    assert "axsquare lose" in output  # where, or that nowhere
    assert output.rstrip().endswith(f"Figures and plots: {folder}/speed-part*-cpu.*")
    assert {path.name for path in folder.iterdir()} == {
        "speed-part-cpu.json",
        "speed-part-cpu.png",
        "speed-part-grid-cpu.png",
        "speed-part-scaling-cpu.png",
    }


def test_only_the_whole_grid_takes_the_place_of_the_whole_grid() -> None:
    assert speed.stem_of(Options(), "cpu") == "speed"
    assert speed.stem_of(Options(rounds=9, out=Path("elsewhere")), "cpu") == "speed"
    assert speed.stem_of(Options(quick=True), "cpu") == "speed-quick"
    assert speed.stem_of(Options(heights=(512,)), "cpu") == "speed-part"
    batch = Options(quick=True, heights=(1024,), batches=(4,))
    assert speed.stem_of(batch, "cuda") == "speed-quick-4x1024"


def test_a_cpu_has_no_time_but_that_of_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--wall", "--device", "cpu"]) == 2
    assert "--wall needs a GPU" in capsys.readouterr().err


def test_a_bar_too_short_to_be_drawn_keeps_its_number() -> None:
    case = Case("max_square", classes=3, height=8)
    rows = [
        Row(OURS, 30, (30, 30), 1, (1, 1)),
        Row(speed.BYTES_FLOOR, 0.0123, (0, 0), 4e-4, (0, 0)),
    ]
    upsampled = Timed(case._replace(upsampled=True), rows, {})
    _, right = speed.plot_headline([Timed(case, rows[:1], {}), upsampled]).axes
    assert [label.get_text() for label in right.get_yticklabels()] == [OURS, speed.BYTES_FLOOR]
    number = next(text for text in right.texts if text.get_text() == " 0.0123 ms (0.0004x)")
    assert number.get_position()[0] >= right.get_xlim()[0] > 0.0123


def test_time_over_classes_has_more_than_one_tick() -> None:
    ms = {"pixels": [1.5, 4.9, 20.7, 77.5], "classes": [4.6, 8.6, 20.9, 39.5]}
    scalings = [
        speed.Scaling(axis, upsampled, [1, 2, 4, 8], ms[axis], 1.0)
        for axis in ms
        for upsampled in (False, True)
    ]
    for axes in speed.plot_scaling(scalings).axes:
        low, high = axes.get_ylim()
        assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


@pytest.mark.parametrize(("threads", "text"), [(1, "CPU, 1 thread,"), (2, "CPU, 2 threads,")])
def test_machine_has_as_many_threads_as_it_says(threads: int, text: str) -> None:
    environment = {"cpu": "CPU", "gpu": None, "threads": threads, "torch": "2", "date": "today"}
    assert cases.name_of(environment).startswith(text)


def test_grid_holds_the_published_shapes_and_starts_with_the_headline() -> None:
    grid = speed.grid(Options(), "cpu")
    headline = [case for case in grid if case[1:5] == (19, 512, 1, "float32")]
    assert grid[: len(headline)] == headline == speed.grid(Options(quick=True), "cpu")
    assert {case.loss for case in headline} == set(cases.LOSSES)
    assert {case[1:6] for case in grid if case.loss == "max_square"} == set(
        itertools.product((2, 19, 150), (512, 1024), (1, 4), cases.DTYPES, (False, True))
    )
    assert Case("max_square", 19, 512, upsampled=True).given_size == (65, 129)
    assert Case("max_square", 19, 1024, upsampled=True).given_size == (129, 257)


def test_every_round_has_all_competitors_in_an_order_of_its_own() -> None:
    called: list[str] = []
    runs = {name: lambda name=name: called.append(name) for name in "abcd"}
    samples = speed.measure(runs, "cpu", rounds=6, seconds=60)
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abcd", 6)
    # Twice each before the rounds, to warm up and to see how long it takes.
    rounds = ["".join(called[start : start + 4]) for start in range(8, 32, 4)]
    assert len(called) == 32 and all(sorted(order) == [*"abcd"] for order in rounds)
    assert len(set(rounds)) > 1


def test_the_cases_of_the_headline_share_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    group = [Case("max_square", 3, 8), Case("cross_entropy", 3, 8)]
    competitors = [[*cases.competitors(case)] for case in group]
    taken: list[tuple[int, str]] = []

    def measure(runs: dict[Any, Any], *_: object, **limits: float) -> dict[Any, list[float]]:
        taken.extend(runs)
        assert limits == {"rounds": 3, "seconds": 14, "wall": False}
        return {key: [1.0 + key[0]] for key in runs}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "quartiles", lambda values: (values[0], values[0]))
    options = Options(compile=False, rounds=3, seconds=7)
    timed = speed.time_cases(group, [], speed.Machine(1e9, None), options)
    assert taken == [(n, name) for n, names in enumerate(competitors) for name in names]
    for n, (result, case) in enumerate(zip(timed, group, strict=True)):
        assert result.case == case
        assert [row.ms for row in result.rows[:-1]] == [1000 * (n + 1)] * len(competitors[n])


def test_what_does_not_fit_or_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case, machine = Case("max_square", classes=3, height=8), speed.Machine(1e9, None)
    options = Options(compile=False, seconds=0, rounds=3, slowest=2)
    # Ours has room, and so has the cross entropy; the first case shows one of them to be slow.
    monkeypatch.setattr(cases, "available_bytes", lambda device: 5 * case.logits_bytes)
    earlier = Timed(
        case._replace(height=4), [Row(CROSS_ENTROPY, 1000, (0, 0), 1, (1, 1))], skipped={}
    )
    (timed,) = speed.time_cases([case], [earlier], machine, options)
    assert timed.skipped == {
        COMPILED: "--no-compile",
        PUBLISHED: "needs about 0 GiB",
        PLAIN: "needs about 0 GiB",
        CROSS_ENTROPY: "would take about 4 s a call",
    }
    assert [row.competitor for row in timed.rows] == [OURS, speed.BYTES_FLOOR]
    monkeypatch.setattr(cases, "available_bytes", lambda device: 0)
    (timed,) = speed.time_cases([case], [], machine, options)
    assert timed.rows == []


def test_a_compiler_that_fails_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(inputs: cases.Inputs) -> None:
        raise RuntimeError("no C++ compiler\nmore about it")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fail)
    case, options = Case("max_square", classes=3, height=8), Options(seconds=0, rounds=3)
    (timed,) = speed.time_cases([case], [], speed.Machine(1e9, 1e9), options)
    assert timed.skipped == {COMPILED: "RuntimeError: no C++ compiler"}
    assert PLAIN in [row.competitor for row in timed.rows]


def test_cases_after_the_time_limit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "speed-cpu.json"
    whole.write_text("of the whole grid")
    assert speed.main([*TINY, "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert whole.read_text() == "of the whole grid"
    document = json.loads((tmp_path / "speed-part-cpu.json").read_text())
    measured = [bool(entry["rows"]) for entry in document["cases"]]
    headline = 2 * len(cases.LOSSES)
    assert measured == [True] * headline + [False] * 2
    assert document["cases"][headline]["skipped"] == {"all": "--minutes 0 are over"}
    output = capsys.readouterr().out
    assert output.count("all left out: --minutes 0 are over") == 2
    assert output.rstrip().endswith(f"{tmp_path}/speed-part*-cpu.*")


def test_claims_are_judged_by_the_ratio_at_their_own_case() -> None:
    case = Case("max_square", classes=19, height=512)
    timed = [
        Timed(case, [Row(PLAIN, 3, (3, 3), 3, (3, 3))], {}),
        Timed(case._replace(height=1024), [Row(PLAIN, 9, (9, 9), 9, (9, 9))], {}),
    ]
    claims = [Claim("max_square", False, PLAIN, 2.5), Claim("max_square", False, PLAIN, 4)]
    assert [(v["measured"], v["met"]) for v in speed.judge(timed, claims)] == [
        (3, True),
        (3, False),
    ]
    assert speed.judge(timed, [Claim("max_square", True, PLAIN, 1)]) == []


@pytest.mark.parametrize("axis", ["pixels", "classes"])
def test_exponent_is_that_of_the_cost(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"pixels": [128, 512, 2048, 8192], "classes": [3, 6, 12, 24]}[axis]

    def measure(runs: dict[str, Any], *_: object, **__: object) -> dict[str, list[float]]:
        assert len(runs) == len(sizes)
        return {name: [1e-6 * size**1.5] for name, size in zip(runs, sizes, strict=True)}

    monkeypatch.setattr(speed, "measure", measure)
    scaling = speed.measure_scaling(Case("max_square", 3, 32), axis, Options())
    assert scaling.sizes == sizes
    assert scaling.exponent == pytest.approx(1.5)


def test_floors_count_bytes_and_exponentials() -> None:
    machine = speed.Machine(copied_bytes=1e6, exponentials=1e5)
    whole = Case("max_square", classes=2, height=8)
    assert speed.floors(whole, machine) == {
        speed.BYTES_FLOOR: 3 * (2 * 8 * 16 * 4) / 1e6,
        speed.EXP_FLOOR: 2 * 8 * 16 / 1e5,
    }
    upsampled = Case("multi_level", classes=2, height=8, upsampled=True, dtype="bfloat16")
    assert speed.floors(upsampled, machine) == {
        speed.BYTES_FLOOR: 2 * 3 * (2 * 2 * 3 * 2) / 1e6,
        speed.EXP_FLOOR: 2 * 2 * 8 * 16 / 1e5,
    }


# Memory

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@on_linux
def test_memory_writes_what_a_tensor_of_known_size_confirms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = dict(os.environ)
    options = "--losses cross_entropy --classes 3 --heights 256 --threads 1 --device cpu".split()
    assert memory.main([*options, "--out", str(tmp_path)]) == 0
    assert dict(os.environ) == variables  # the allocator's settings are the measured processes'
    output = capsys.readouterr().out
    assert output.startswith("How much memory")
    assert output.rstrip().endswith(f"{tmp_path}/memory-part-cpu.*")
    assert (tmp_path / "memory-part-cpu.png").exists()
    assert not (tmp_path / "memory-cpu.json").exists()  # which is for the default cases
    document = json.loads((tmp_path / "memory-part-cpu.json").read_text())
    assert document["known_mib"]["measured"] == pytest.approx(memory.KNOWN_BYTES / 2**20, abs=2)
    assert document["environment"]["threads"] == 1
    for entry in document["cases"]:
        case = Case(**entry["case"])
        rows = {row["competitor"]: row for row in entry["rows"]}
        assert list(rows) == [OURS, CROSS_ENTROPY]
        # The probabilities and the gradient with respect to the full-resolution logits.
        assert 2 <= rows[CROSS_ENTROPY]["full_logits"] < 6
        for row in rows.values():
            gradient = row["beyond_inputs"] - row["beyond_gradient"]
            assert gradient == pytest.approx(case.given_bytes / 2**20, abs=0.01)


@on_linux
@pytest.mark.parametrize("upsampled", [False, True])
def test_peak_memory_of_ours_is_small(upsampled: bool) -> None:
    """About four times what was measured, and a third of the plain composition's peak."""
    case = Case("max_square", classes=19, height=512, upsampled=upsampled)
    row = memory.make_row(case, OURS, memory.measure("cpu", 2, memory.peak_bytes, case, OURS))
    # Resident memory is counted in batches of pages.
    assert 0.99 * case.given_bytes / 2**20 <= row.beyond_inputs
    if upsampled:
        assert row.full_logits < 1
    else:
        assert row.beyond_gradient < 16


def test_memory_claims_are_judged_at_their_own_case() -> None:
    case = Case("max_square", classes=19, height=1024)
    rows = [memory.make_row(case, OURS, case.logits_bytes + 20 * 2**20)]
    (verdict,) = memory.judge([(case, rows), (case._replace(height=512), rows)])
    assert (verdict["mib"], verdict["met"]) == (20, False)
    upsampled = case._replace(upsampled=True)
    (verdict,) = memory.judge([(upsampled, [memory.make_row(upsampled, OURS, 6 * 2**20)])])
    assert verdict["met"]


# Command lines

WRONG = [
    *(
        (script, options, told)
        for script in (speed, memory)
        for options, told in {
            "--dtypes": "--dtypes is empty",
            "--heights": "--heights is empty",
            "--heights -5": "--heights must be at least 8, not -5",
            "--heights 512 0": "--heights must be at least 8, not 0",
            "--classes 1": "--classes must be at least 2, not 1",
            "--batches 0": "--batches must be at least 1, not 0",
            "--threads 0": "--threads must be at least 1, not 0",
            "--threads -1": "--threads must be at least 1, not -1",
            "--device cuda": "--device cuda finds no GPU",
        }.items()
    ),
    (memory, "--losses", "--losses is empty"),
    (speed, "--rounds 0", "--rounds must be at least 3, not 0"),
    (speed, "--seconds -1", "--seconds must be 0 or more"),
    (speed, "--minutes nan", "--minutes must be 0 or more"),
]


@pytest.mark.parametrize(("script", "options", "told"), WRONG)
def test_wrong_options_are_told_in_one_sentence_before_anything_is_written(
    script: Any,
    options: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--out", str(tmp_path / "out"), *options.split()]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert told in output.err
    assert not output.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [speed, memory])
@pytest.mark.parametrize("options", ["--bogus", "--dtypes int8"])
def test_a_command_line_that_cannot_be_parsed_is_refused_before_anything_is_written(
    script: Any, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--out", str(tmp_path / "out"), *options.split()]) == 2
    output = capsys.readouterr()
    assert options.split()[-1] in output.err
    assert not output.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [speed, memory])
def test_a_file_in_the_place_of_the_folder_shows_before_anything_is_measured(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert script.main(["--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    output = capsys.readouterr()
    assert str(tmp_path / "file") in output.err and output.err.count("\n") == 1
    assert not output.out
    assert (tmp_path / "file").read_text() == "mine"
