"""The scripts under examples/ as a user runs them: results, resuming, bad input."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

import adapt_online
import evaluate
import export_model
import minimal_loop
import train_uda
from uda import (
    adaptation,
    checkpoint,
    datasets,
    deeplab,
    evaluation,
    loading,
    outputs,
    report,
    scenes,
)
from uda.datasets import LABEL_SPACES
from uda.errors import UserError
from uda.presets import COMPARED, DEMO_CHECKPOINT, LISTED_IMAGES, PRESETS, Method, Settings

EXAMPLES = Path(train_uda.__file__).parent
SIZE = (32, 64)
SCENES = 4
# The demo, only much smaller.
TINY = (
    f"--scenes {SCENES} --source-size {SIZE[0]} {SIZE[1]} --target-size {SIZE[0]} {SIZE[1]} "
    "--source-steps 4 --source-horizon 4 --steps 3 --batch-size 2 --workers 0 --device cpu "
    "--log-every 1 --save-every 2 --evaluate-every 2"
).split()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    scenes.render(root, seed=loading.SCENES_SEED, train=SCENES, val=1, size=SIZE, source_size=SIZE)
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """The folder of an uninterrupted tiny run."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(out, data_root) == 0
    return out


@pytest.fixture
def own_data(tmp_path: Path, data_root: Path) -> Path:
    """Rendered data that a test may damage."""
    return Path(shutil.copytree(data_root, tmp_path / "data"))


def train(out: Path, data_root: Path, *options: str) -> int:
    return train_uda.main([*TINY, "--out", str(out), "--data-root", str(data_root), *options])


def run_script(out: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    """A tiny run in a process of its own."""
    command = [sys.executable, str(EXAMPLES / "train_uda.py"), *TINY, "--out", str(out), *options]
    # Another number of threads adds in another order: bitwise equality needs that of this process.
    same = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    environment = os.environ | same | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def only_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What a failed script said: one line, one sentence, no traceback."""
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def same(a: object, b: object) -> bool:
    """Bitwise equality of nested checkpoints."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def trained(path: Path) -> dict[str, Any]:
    """A checkpoint without what may differ between equal runs: clock, folder, names of logs."""
    state = checkpoint.load(path)
    del state["seconds"], state["settings"], state["log"]
    return state


def gradient(state: dict[str, Any]) -> torch.Tensor:
    """The momentum of all weights, which after one step is their gradient."""
    moments = state["optimizer"]["state"].values()
    return torch.cat([moment["momentum_buffer"].flatten() for moment in moments])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# Results


def test_main_job_writes_its_results(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    for stage in ("source_only", "target_statistics", "source_continued", "adapted"):
        per_class = metrics[stage]["per_class"]
        assert len(per_class) == 19
        present = [iou for iou in per_class.values() if iou is not None]
        assert all(0 <= iou <= 100 for iou in present)
        assert metrics[stage]["miou"] == pytest.approx(sum(present) / len(present))
    assert metrics["adapted"]["best"]["information"] >= metrics["adapted"]["information"]
    assert metrics["seconds"].keys() == {
        "source-only", "target-statistics", "source", "maxsquare-iw-multi"
    }  # fmt: skip
    assert metrics["settings"]["steps"] == 3
    assert torch.__version__.startswith(metrics["versions"]["torch"])
    with Image.open(finished / "panel.png") as panel:
        assert panel.width > 4 * SIZE[1]
    for name in ("last.pt", "best.pt", "source-only/last.pt"):
        assert checkpoint.load(finished / name)["network"] == "small"
    assert list(finished.glob("events.out.tfevents.*"))


def test_all_methods_start_from_one_source_model(
    tmp_path: Path, data_root: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "all", data_root, "--method", "all") == 0
    metrics = json.loads((tmp_path / "all" / "metrics.json").read_text())
    alone = json.loads((finished / "metrics.json").read_text())
    assert tuple(metrics["methods"]) == COMPARED
    assert metrics["source_only"] == alone["source_only"]
    assert metrics["methods"]["maxsquare-iw-multi"] == alone["adapted"] == metrics["adapted"]
    models = {method: trained(tmp_path / "all" / method / "last.pt") for method in COMPARED}
    assert same(models["maxsquare-iw-multi"], trained(finished / "last.pt"))
    assert not same(models["maxsquare"]["model"], models["source"]["model"])
    assert "mIoU" in capsys.readouterr().out


def test_comparison_needs_no_target_loss(
    tmp_path: Path, data_root: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "source", data_root, "--method", "source", "--no-compare") == 0
    alone, compared = (
        json.loads((out / "metrics.json").read_text()) for out in (tmp_path / "source", finished)
    )
    assert "target_statistics" not in alone
    assert compared["source_continued"] == alone["adapted"]
    source, statistics = (
        checkpoint.load(finished / stage / "last.pt")["model"]
        for stage in ("source-only", "target-statistics")
    )
    changed = {name for name in source if not torch.equal(source[name], statistics[name])}
    assert changed == {name for name in source if "running" in name or "num_batches" in name}


def test_adapted_model_may_take_its_statistics_from_the_target(
    tmp_path: Path, data_root: Path, finished: Path
) -> None:
    out = tmp_path / "run"
    assert train(out, data_root, "--bn-statistics", "target") == 0
    target, mixed = (checkpoint.load(folder / "last.pt")["model"] for folder in (out, finished))
    changed = {name for name in mixed if not torch.equal(mixed[name], target[name])}
    assert changed == {name for name in mixed if "running" in name or "num_batches" in name}
    controls = {
        json.loads((folder / "metrics.json").read_text())["source_continued"]["miou"]
        for folder in (out, finished)
    }
    assert len(controls) == 1


def test_target_statistics_are_those_of_the_target(data_root: Path) -> None:
    s = replace(PRESETS["demo"].settings, data_root=data_root, target_size=SIZE, source_size=SIZE)
    _, target, _ = loading.open_data(s)
    torch.manual_seed(0)
    network = loading.build_network(s)
    batches = [batch.image for batch in loading.batches(target, s, 0, 2, stream=2)]
    adaptation.target_statistics(network, batches)
    means = [network.conv1(images).mean(dim=(0, 2, 3)) for images in batches]
    # Two sums of the same numbers in float32, of magnitude 100.
    torch.testing.assert_close(
        network.bn1.running_mean, torch.stack(means).mean(dim=0), rtol=1e-4, atol=1e-3
    )


def test_source_stage_is_watched_at_home(tmp_path: Path) -> None:
    options = ["--source-evaluate-every", "3", "--steps", "0", "--no-compare"]
    assert train(tmp_path / "run", tmp_path / "data", *options) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    curve = metrics["source_validation"]
    assert [point["step"] for point in curve] == [3, 4]
    s = replace(PRESETS["demo"].settings, data_root=tmp_path / "data", source_size=SIZE)
    images = loading.open_source_validation(s)
    network, _ = loading.load_network(tmp_path / "run" / "source-only" / "last.pt")
    loader = loading.validation_loader(images, replace(s, workers=0))
    assert curve[-1] == {
        "step": 4,
        **report.entry(evaluation.evaluate(network, loader, images.space)),
    }


def test_exported_model_is_the_trained_one_in_half_precision(
    tmp_path: Path, data_root: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, small = finished / "source-only" / "last.pt", tmp_path / "model.safetensors"
    assert export_model.main([str(last), str(small)]) == 0
    # A name that is taken, and one that promises another format.
    for out in (small, tmp_path / "model.pt"):
        capsys.readouterr()
        before = files(tmp_path)
        assert export_model.main([str(last), str(out)]) == 2
        assert out.name in only_sentence(capsys)
        assert files(tmp_path) == before
    network, s = loading.load_network(small)
    assert (s.network, s.classes, s.data_root) == ("small", 19, None)
    for name, weight in checkpoint.load(last)["model"].items():
        rounded = weight.half().float() if weight.ndim > 1 else weight
        assert torch.equal(network.state_dict()[name], rounded)
    options = ["--init", str(small), "--source-steps", "0", "--steps", "0", "--no-compare"]
    assert train(tmp_path / "run", data_root, *options) == 0


def test_demo_adapts_the_shipped_model() -> None:
    s = train_uda.parse([])
    assert s.init == DEMO_CHECKPOINT
    assert DEMO_CHECKPOINT.stat().st_size <= 3e6
    network, trained = loading.load_network(DEMO_CHECKPOINT)
    assert (trained.network, trained.classes, trained.aspp) == (s.network, s.classes, s.aspp)
    assert all(weight.isfinite().all() for weight in network.state_dict().values())
    # Folders of the machine that made it are not for others.
    assert trained.data_root is trained.out is trained.init is None
    assert train_uda.parse(["--source-steps", "9"]).init is None


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "other shapes"])
def test_missing_or_damaged_shipped_model_is_named(
    damage: str,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shipped = tmp_path / "model.safetensors"
    if damage == "truncated":
        shipped.write_bytes(DEMO_CHECKPOINT.read_bytes()[:100_000])
    elif damage == "foreign":
        shipped.write_text("version https://git-lfs.github.com/spec/v1")
    elif damage == "other shapes":
        checkpoint.export(shipped, deeplab.deeplab_small(5).state_dict(), {})
    before = files(tmp_path)
    monkeypatch.setattr(train_uda, "DEMO_CHECKPOINT", shipped)
    assert train(tmp_path / "run", data_root, "--source-steps", "0") == 2
    assert str(shipped) in only_sentence(capsys)
    assert files(tmp_path) == before


@pytest.fixture
def eleven(tmp_path: Path) -> Path:
    """A user's own pair of data sets: two folders, eleven classes, ids of their own."""
    names = ["road", "kerb", "lawn", "water", "roof", "door", "cow", "boat", "sky", "sign", "dust"]
    generator = np.random.default_rng(0)
    for folder, split in (("Mine", "train"), ("Theirs", "train"), ("Theirs", "val")):
        for part in ("images", "labels"):
            (tmp_path / folder / part / split).mkdir(parents=True)
        for name in "abcd":
            classes = np.repeat(np.repeat(generator.integers(0, 11, (4, 8)), 8, 0), 8, 1)
            picture = Image.fromarray((classes[..., None] * (5, 15, 20)).astype(np.uint8))
            picture.save(tmp_path / folder / "images" / split / f"{name}.png")
            if split == "val" or folder == "Mine":
                ids = Image.fromarray((10 * classes + 3).astype(np.uint8))
                ids.save(tmp_path / folder / "labels" / split / f"{name}.png")
    ids = {str(10 * c + 3): name for c, name in enumerate(names)} | {"0": None}
    for folder in ("Mine", "Theirs"):
        (tmp_path / folder / "label_map.json").write_text(json.dumps(ids))
    return tmp_path


OWN_DATA = (
    "--source folder --source-folder Mine --target folder --target-folder Theirs --classes 11"
).split()


def test_own_pair_of_data_sets_with_eleven_classes(
    eleven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, eleven, *OWN_DATA, "--source-steps", "20", "--source-horizon", "0") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    names = list(json.loads((eleven / "Mine" / "label_map.json").read_text()).values())[:11]
    assert list(metrics["adapted"]["per_class"]) == names
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert not (eleven / "GTA5").exists()
    pictures = tmp_path / "pictures"
    assert evaluate.main([str(out / "last.pt"), "--out", str(pictures), "--workers", "0"]) == 0
    space = datasets.open_dataset("folder", eleven / "Theirs", "val", classes=11).space
    # A name that Cityscapes has keeps its colour there; the others have one each.
    assert space.colors[0] == LABEL_SPACES[19].colors[0]
    assert len({*space.colors}) == 11
    for path in pictures.iterdir():
        with Image.open(path) as picture:
            assert {color for _, color in picture.getcolors()} <= {*space.colors}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda names: [*names[:9], names[10], names[9]], "same order"),
        (lambda names: names[:10], "10 classes"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(
    damage: Callable[[list[str]], list[str]],
    named: str,
    eleven: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = eleven / "Theirs" / "label_map.json"
    names = list(json.loads(path.read_text()).values())[:11]
    path.write_text(json.dumps({str(i): name for i, name in enumerate(damage(names))}))
    assert train(tmp_path / "run", eleven, *OWN_DATA) == 2
    assert named in only_sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_options_of_the_first_step(tmp_path: Path, data_root: Path) -> None:
    """Faster arithmetic stays close, another seed does not."""
    variants = {
        "plain": ["--no-channels-last"],
        "bf16": ["--no-channels-last", "--precision", "bf16"],
        "channels last": ["--channels-last"],
        "seed": ["--no-channels-last", "--seed", "1"],
    }
    for name, options in variants.items():
        steps = ["--source-steps", "1", "--steps", "0", "--no-compare"]
        assert train(tmp_path / name, data_root, *steps, *options) == 0
    states = {name: trained(tmp_path / name / "source-only" / "last.pt") for name in variants}
    assert {w.dtype for w in states["bf16"]["model"].values()} == {torch.float32, torch.int64}
    plain, bf16, channels_last, seed = map(gradient, states.values())
    assert 0 < distance(bf16, plain) < 0.3
    assert 0 < distance(channels_last, plain) < 0.03
    assert distance(seed, plain) > 0.5


def test_adaptation_of_a_given_source_model_equals_the_whole_run(
    tmp_path: Path, data_root: Path, finished: Path
) -> None:
    source = finished / "source-only" / "last.pt"
    # --source-steps 0 would read the source from its start; one epoch on is where the run stopped.
    assert train(tmp_path / "two", data_root, "--init", str(source), "--source-steps", "0") == 0
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    whole = json.loads((finished / "metrics.json").read_text())
    assert metrics["source_only"] == whole["source_only"]


def test_default_folder_is_new_each_time(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = outputs.run_folder(PRESETS["demo"].settings)
    first.mkdir(parents=True)
    assert outputs.run_folder(PRESETS["demo"].settings) not in (first, Path("runs"))


# Pair of data sets: source only, entropy, maximum squares, image-wise, and multi-level.
PUBLISHED = {
    "gta5-cityscapes": ("36.9", "42.2", "44.3", "45.2", "46.4"),
    "synthia-cityscapes": (
        "30.1 / 34.3",
        "38.0 / 44.5",
        "39.3 / 45.8",
        "40.4 / 46.9",
        "41.4 / 48.2",
    ),
    "cityscapes-rome": ("51.0", None, "53.9", "54.5", None),
    "cityscapes-rio": ("48.9", None, "52.0", "53.3", None),
    "cityscapes-tokyo": ("47.8", None, "49.7", "50.5", None),
    "cityscapes-taipei": ("46.3", None, "49.8", "50.6", None),
}


def test_every_published_row_is_a_preset() -> None:
    rows = ("source", "entropy", "maxsquare", "maxsquare-iw", "maxsquare-iw-multi")
    wanted = {
        f"{pair}/{row}": number
        for pair, numbers in PUBLISHED.items()
        for row, number in zip(rows, numbers, strict=True)
        if number is not None
    }
    assert {n: p.published for n, p in PRESETS.items() if p.published != "-"} == wanted
    for name, preset in PRESETS.items():
        assert preset.settings.preset == name
        assert preset.settings.method in COMPARED


def test_the_page_on_reproducing_the_paper_has_the_published_numbers() -> None:
    lines = (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    (header,) = (row for row in rows if row[:2] == ["preset", "source"])
    told = {
        f"{row[0]}{method}": number
        for row in rows
        if row and f"{row[0]}source" in PRESETS
        for method, number in zip(header[1:], row[1:], strict=True)
        if number
    }
    assert told == {n: p.published for n, p in PRESETS.items() if p.published != "-"}


def test_a_preset_starts_from_a_source_model_with_the_heads_that_it_adapts() -> None:
    adapting = [p for name, p in PRESETS.items() if name != "demo" and p.settings.steps]
    assert len(adapting) == 16
    for preset in adapting:
        assert preset.start is not None
        start, multi = PRESETS[preset.start].settings, preset.settings.method == COMPARED[4]
        assert (start.source_steps, start.steps, start.source_horizon) == (80_000, 0, 200_000)
        assert start.low_weight == preset.settings.low_weight == (0.1 if multi else 0)
        assert (start.source, start.classes) == (preset.settings.source, preset.settings.classes)


def test_synthia_presets_have_the_ratio_of_their_commands() -> None:
    settings = PRESETS["synthia-cityscapes/maxsquare-iw"].settings
    assert (settings.ratio, settings.target_weight, settings.target_size) == (
        -0.2,
        (0.1,),
        (512, 1024),
    )
    loss = adaptation.methods(ratio=settings.ratio)["maxsquare-iw"]
    logits = torch.tensor([[9.0, 0], [9, 0], [9, 0], [0, 9]]).T[None]  # three pixels to one
    weights = torch.tensor([[3.0, 3, 3, 1]]) ** 0.2 / 4**1.2
    expected = -(weights * logits.softmax(1).square().sum(1)).sum() / 2
    assert loss is not None
    torch.testing.assert_close(loss(logits), expected)  # with two classes, 2/C is 1


def test_the_learning_rate_of_the_published_runs_does_not_quite_reach_zero() -> None:
    settings = PRESETS["gta5-cityscapes/maxsquare"].settings
    assert (settings.steps, settings.horizon) == (29_750, 29_760)
    assert settings.backbone_updates == "torch-1.0"


def test_the_learning_rate_falls_towards_the_horizon(
    tmp_path: Path, data_root: Path, finished: Path
) -> None:
    options = ["--source-steps", "1", "--lr", "0.5", "--horizon", "4", "--no-compare"]
    assert train(tmp_path, data_root, *options, "--method", "source") == 0
    s = PRESETS["demo"].settings
    for folder, rate in ((tmp_path, 0.5 * 0.5**0.9), (finished, s.lr * (1 / 3) ** 0.9)):
        group, *_ = trained(folder / "last.pt")["optimizer"]["param_groups"]
        assert group["lr"] == pytest.approx(rate)


def test_low_weight_zero_trains_one_head_of_the_source_model(
    tmp_path: Path, data_root: Path
) -> None:
    options = ["--steps", "0", "--method", "source", "--low-weight", "0"]
    for steps in ("1", "2"):
        assert train(tmp_path / steps, data_root, *options, "--source-steps", steps) == 0
    one, two = (trained(tmp_path / s / "source-only/last.pt")["model"] for s in ("1", "2"))
    bias = "conv2d_list.0.bias"
    assert torch.equal(one[f"layer5.{bias}"], two[f"layer5.{bias}"])
    assert not torch.equal(one[f"layer6.{bias}"], two[f"layer6.{bias}"])


SHORT = (
    "--preset gta5-cityscapes/source --network small --source-steps 1 --batch-size 2 --workers 0 "
    f"--device cpu --source-size {SIZE[0]} {SIZE[1]} --target-size {SIZE[0]} {SIZE[1]}"
).split()


def test_a_published_row_warns_without_the_published_list(
    tmp_path: Path, own_data: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = [*SHORT, "--data-root", str(own_data)]
    monkeypatch.setenv("COLUMNS", "300")
    list_file = own_data / "GTA5" / "list" / "train.txt"
    for how in (["--check-data"], ["--out", str(tmp_path / "run")]):
        assert train_uda.main([*options, *how]) == 0
        printed = capsys.readouterr().out
        assert "12,403" in printed and str(list_file) in printed
    # As many images as the published list, here: no warning.
    monkeypatch.setitem(LISTED_IMAGES, "gta5", SCENES)
    assert train_uda.main([*options, "--check-data"]) == 0
    assert "list/train.txt" not in capsys.readouterr().out


def test_every_method_can_be_chosen() -> None:
    assert set(get_args(Method)) - {"all"} == set(adaptation.methods())
    assert set(COMPARED) <= set(get_args(Method))


def test_list_presets_prints_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_uda.main(["--list-presets"]) == 0
    out = capsys.readouterr().out
    table, _, notes = out.partition('A row "starts from"')
    rows = [line.split() for line in table.splitlines() if line.strip(" ─")]
    assert [row[0] for row in rows] == ["preset", *PRESETS]
    (best,) = (row for row in rows if row[0] == "gta5-cityscapes/maxsquare-iw-multi")
    assert best[1:3] == ["46.4", "source-multi"]
    for told in ("torch 1.0.0", "GTA5/list/train.txt", "-0.2"):
        assert told in " ".join(notes.split())


def test_check_data_reports_counts(own_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_uda.main([*TINY, "--data-root", str(own_data), "--check-data"]) == 0
    assert f"{SCENES} of {SIZE[1]}x{SIZE[0]}" in capsys.readouterr().out
    (own_data / "GTA5" / "labels" / "00001.png").unlink()
    assert train_uda.main([*TINY, "--data-root", str(own_data), "--check-data"]) == 2
    assert str(own_data) in only_sentence(capsys)


def test_options_override_the_preset() -> None:
    preset = PRESETS["gta5-cityscapes/maxsquare-iw-multi"].settings
    settings = train_uda.parse(["--preset", preset.preset, "--lr", "0.5"])
    assert (settings.lr, settings.target_weight) == (0.5, preset.target_weight)


def test_settings_survive_json() -> None:
    for preset in PRESETS.values():
        settings = replace(preset.settings, out=Path("out"), init=Path("init.pt"))
        assert outputs.from_json(outputs.as_json(settings)) == settings


def test_settings_of_other_versions_are_understood() -> None:
    content = outputs.as_json(Settings(lr=0.5)) | {"of a later version": 1}
    content["backbone_updates"] = "published"  # its name up to 0.2.0
    content["target_weight"] = 0.1  # one number up to 0.2.0
    del content["aspp"], content["data_root"], content["source_size"]
    assert outputs.from_json(content) == Settings(lr=0.5, backbone_updates="duplicated")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"lr": math.nan}, "--lr"),
        ({"classes": 1}, "--classes"),
        ({"target_size": [0, 8]}, "--target-size"),
        ({"target_size": 8}, "holds settings"),
    ],
)
def test_checkpoint_with_unusable_settings_is_refused(
    damage: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = outputs.as_json(Settings()) | damage
    checkpoint.save(tmp_path / "odd.pt", {"settings": settings, "model": {}})
    for script in (evaluate, adapt_online):
        assert script.main([str(tmp_path / "odd.pt")]) == 2
        message = only_sentence(capsys)
        assert "odd.pt holds settings" in message and named in message


# Data order


def test_batches_depend_on_their_number_alone(data_root: Path) -> None:
    settings = train_uda.parse([*TINY, "--data-root", str(data_root)])
    source = loading.open_data(settings)[0]
    whole = list(loading.batches(source, settings, 0, 5, stream=0))
    rest = list(loading.batches(source, settings, 3, 5, stream=0))
    assert [batch.name for batch in whole[3:]] == [batch.name for batch in rest]
    assert all(torch.equal(a.image, b.image) for a, b in zip(whole[3:], rest, strict=True))
    assert whole[0].name != whole[2].name


def test_processes_share_each_batch(data_root: Path) -> None:
    settings = train_uda.parse([*TINY, "--data-root", str(data_root)])
    source = loading.open_data(settings)[0]
    whole = list(loading.batches(source, settings, 0, 3, stream=0))
    shares = [
        list(loading.batches(source, settings, 0, 3, stream=0, rank=r, world=2)) for r in (0, 1)
    ]
    for batch, first, second in zip(whole, *shares, strict=True):
        assert list(batch.name) == [*first.name, *second.name]


@pytest.mark.parametrize(
    "option", ["--processes", pytest.param("--machines", marks=pytest.mark.stress)]
)
def test_two_processes_train_as_one(own_data: Path, tmp_path: Path, option: str) -> None:
    """Half of the batch each and frozen BatchNorm give the weights of one process."""
    for path in (own_data / "GTA5" / "labels").iterdir():
        # A mean over pixels is the mean of its halves only if both count as many pixels.
        Image.new("L", (SIZE[1], SIZE[0]), 7).save(path)
    options = ["--scenes", "0", "--freeze-bn", "--method", "maxsquare-iw", "--source-steps", "1",
               "--steps", "1", "--no-compare"]  # fmt: skip
    assert train(tmp_path / "one", own_data, *options) == 0
    options += ["--data-root", str(own_data), option, "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        run_script(tmp_path / "two", *options, **address, NODE_RANK=str(rank))
        for rank in range(2 if option == "--machines" else 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("one", "two"))
    # Rounding switches some ReLUs of the untrained network: in float64 it is exact.
    assert distance(gradient(two), gradient(one)) < 0.03
    assert two["confusion"].sum() == one["confusion"].sum()


# Resuming


class Killed(BaseException):
    """Ends a run as a kill does: nothing in the scripts handles it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let the run die when `owner.name` is called for the `call`-th time."""
    original: Callable[..., object] = getattr(owner, name)
    calls = 0

    def dying(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


MOMENTS = {
    "in the source stage": (train_uda.adaptation, "source_step", 4),
    "in the adaptation": (train_uda.adaptation, "adaptation_step", 3),
    "while a checkpoint is written": (checkpoint.os, "fsync", 4),
    "between best and last": (checkpoint.os, "replace", 7),
    "before the report": (train_uda, "write_results", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_run_is_bit_identical(
    moment: str,
    tmp_path: Path,
    data_root: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, *MOMENTS[moment])
        train(tmp_path / "run", data_root)
    assert train(tmp_path / "run", data_root, "--resume") == 0
    for name in ("source-only/last.pt", "last.pt", "best.pt"):
        assert same(trained(tmp_path / "run" / name), trained(finished / name)), name
    resumed, whole = (
        json.loads((out / "metrics.json").read_text()) for out in (tmp_path / "run", finished)
    )
    assert resumed["adapted"] == whole["adapted"]
    assert resumed["source_only"] == whole["source_only"]


def test_resume_of_a_finished_run_changes_no_result(
    tmp_path: Path, data_root: Path, finished: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert train(run, data_root, "--resume") == 0
    assert (run / "last.pt").read_bytes() == (finished / "last.pt").read_bytes()


def test_resume_refuses_other_settings(
    data_root: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(finished)
    assert train(finished, data_root, "--resume", "--lr", "0.5") == 2
    assert "--lr" in only_sentence(capsys)
    assert files(finished) == before


def test_resume_refuses_other_numbers_of_images(
    own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another number of images has another order."""
    options = ["--scenes", "0", "--source-steps", "1", "--steps", "0", "--no-compare"]
    assert train(tmp_path / "run", own_data, *options) == 0
    (own_data / "GTA5" / "images" / "00001.png").unlink()
    capsys.readouterr()
    assert train(tmp_path / "run", own_data, *options, "--resume") == 2
    assert "training_images" in only_sentence(capsys)


@pytest.mark.parametrize("content", ["", "null", "\udcff"])
def test_resume_names_damaged_settings(
    content: str, tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / "last.pt").write_bytes(b"")
    before = files(tmp_path)
    assert train(tmp_path, data_root, "--resume") == 2
    assert "settings.json is damaged" in only_sentence(capsys)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("stage", "entry"),
    [("source-only", "random"), (".", "optimizer"), (".", "log"), ("target-statistics", "best")],
)
def test_resume_names_what_a_checkpoint_lacks(
    stage: str,
    entry: str,
    tmp_path: Path,
    data_root: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A checkpoint of 0.2.0 has no "log", for example."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    state = checkpoint.load(run / stage / "last.pt")
    del state[entry]
    checkpoint.save(run / stage / "last.pt", state)
    before = {name: content for name, content in files(run).items() if name.endswith(".pt")}
    assert train(run, data_root, "--resume") == 2
    message = only_sentence(capsys)
    assert "last.pt" in message and repr(entry) in message
    assert before.items() <= files(run).items()


def test_a_checkpoint_that_does_not_fit_is_named(
    tmp_path: Path, data_root: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for entry, value in (("model", {}), ("optimizer", {}), ("random", {"python": 1})):
        state = checkpoint.load(finished / "last.pt") | {entry: value}
        checkpoint.save(run / "last.pt", state)
        assert train(run, data_root, "--resume") == 2
        assert "last.pt does not hold the state of such a run" in only_sentence(capsys)


def test_a_kill_while_json_is_written_leaves_the_old_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "settings.json"
    outputs.write_json(path, {"lr": 1})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, checkpoint.os, "fsync", 1)
        outputs.write_json(path, {"lr": 2})
    assert outputs.read_json(path) == {"lr": 1}


# Bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--preset", "nonsense"], "--preset nonsense"),
        (["--backbone-updates", "published"], "write duplicated"),
        (["--batch-size", "0"], "--batch-size"),
        (["--source-size", "0", "4"], "--source-size"),
        (["--target-size", "32", "7"], "--target-size"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "99999999999"], "--seed"),
        (["--lr", "nan"], "--lr"),
        (["--weight-decay", "inf"], "--weight-decay"),
        (["--machines", "2"], "MASTER_ADDR"),
        (["--batch-size", "3", "--processes", "2"], "--processes"),
        (["--batch-size", "5"], "--batch-size 5"),
        (["--source-steps", "0", "--scenes", "0"], "--init"),
        (["--classes", "1"], "--classes"),
        (["--source-steps", "0", "--network", "resnet101"], "model.safetensors"),
        (["--threads", "-1"], "--threads"),
        (["--source-steps", "9"], "--source-horizon"),
        (["--horizon", "2"], "--horizon 2"),
        (["--horizon", "-1"], "--horizon"),
        (["--ratio", "-1.1"], "--ratio"),
        (["--low-weight", "0"], "--low-weight 0"),
        (["--target-weight"], "--target-weight needs"),
        (["--target-weight", "1", "-1"], "--target-weight must not be negative, not -1"),
        (["--target-weight", "1", "nan"], "--target-weight must be a finite number"),
        (["--target-weight", "1", "1.0"], "--target-weight has a value twice"),
        (["--target-weight", "1", "2", "--method", "all"], "--method all takes one"),
        (["--target-weight", "1", "2", "--method", "source"], "--method source takes one"),
        (["--init", "missing.pt"], "missing.pt"),
        (["--scenes", "0", "--data-root", "missing"], "missing"),
        (["--scenes", "0", "--source-evaluate-every", "2"], "list/val.txt"),
        (["--scenes", "0", "--target-folder", "missing"], "missing"),
        (["--resume"], "--out"),
        (["--resume", "--out", "missing"], "missing"),
        (["--check-data"], "--data-root"),
        (["--check-data", "--data-root", "missing"], "missing"),
    ],
)
def test_bad_option_is_refused_in_one_sentence(
    options: list[str],
    named: str,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if "--check-data" in options else ["--data-root", str(data_root)]
    assert train_uda.main([*TINY, *given, *options]) == 2
    assert named in only_sentence(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "nonsense"],
        ["--nonsense"],
        ["--lr", "fast"],
        ["--preset"],
        ["--preset", "--lr"],
    ],
)
def test_unparsable_command_line_is_refused(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert train_uda.main(options) == 2
    assert options[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cuda_without_gpu_is_refused(
    tmp_path: Path, data_root: Path, finished: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert train(tmp_path / "run", data_root, "--device", "cuda") == 2
    assert "--device cuda" in only_sentence(capsys)
    assert not (tmp_path / "run").exists()
    assert evaluate.main([str(finished / "last.pt"), "--device", "cuda"]) == 2
    assert "--device cuda" in only_sentence(capsys)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--init", "nope.pt"], "nope.pt"),
        (["--scenes", "0", "--data-root", "nope"], "nope"),
        (["--data-root", "foreign"], "foreign"),
        (["--data-root", "file"], "file"),
        (["--scenes", "6"], "scenes of other settings"),
        (["--batch-size", "5"], "--batch-size"),
    ],
)
def test_a_typo_leaves_the_folder_free(
    options: list[str],
    named: str,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign" / "GTA5").mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    assert train(tmp_path / "run", data_root, *options) == 2
    assert named in only_sentence(capsys)
    assert train_uda.main([*TINY, "--data-root", str(data_root), *options]) == 2
    assert named in only_sentence(capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_a_start_that_was_aborted_leaves_the_folder_free(
    tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json.partial").write_text("{")
    (tmp_path / "settings.json").write_text("{")
    steps = ["--source-steps", "1", "--steps", "0"]
    assert train(tmp_path, data_root, *steps) == 0
    assert outputs.read_json(tmp_path / "settings.json")["source_steps"] == 1
    before = files(tmp_path)
    assert train(tmp_path, data_root, *steps) == 2
    assert "--resume" in only_sentence(capsys)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "No space left on device."),
        (OSError(13, "Permission denied", "x.png"), "x.png: Permission denied."),
        (OSError("the reason"), "the reason"),
        (OSError(), "OSError"),
        (UserError("a\nb\nuda.errors.UserError: the reason"), "the reason"),
    ],
)
def test_every_error_becomes_a_sentence(error: Exception, told: str) -> None:
    assert report.sentence(error) == told


@pytest.mark.parametrize(
    ("script", "step"),
    [(train_uda, "run"), (evaluate, "load_network"), (adapt_online, "load_network")],
)
def test_ctrl_c_ends_a_script_in_one_sentence(
    script: ModuleType,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, step, stopped)
    assert script.main([] if script is train_uda else ["last.pt"]) == 130
    message = capsys.readouterr().err
    assert message.startswith("Stopped") and message.count("\n") == 1


def test_a_killed_loader_process_becomes_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    for error in (killed, ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        assert report.exit_code(partial(fail, error)) == 2
        assert "--workers" in only_sentence(capsys)
    with pytest.raises(RuntimeError, match="a bug"):
        report.exit_code(partial(fail, RuntimeError("a bug")))


@pytest.mark.stress
def test_a_loader_process_killed_a_moment_later_becomes_no_second_message() -> None:
    # A batch does not come because a process died; another is killed while the destructor of the
    # pass over the images waits for it.
    script = """
        import os, signal, sys, threading, time
        from torch.utils.data import DataLoader
        from uda import report

        class Images(list):
            def __getitem__(self, index):
                if index:
                    time.sleep(60)
                return os.getpid()

        def run():
            how = {"batch_size": None, "num_workers": 1, "multiprocessing_context": "fork"}
            batches = iter(DataLoader(Images(range(9)), **how))
            threading.Timer(0.5, os.kill, (next(batches), signal.SIGKILL)).start()
            raise EOFError

        sys.exit(report.exit_code(run))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2 and ended.stderr == f"{report.LOADER_KILLED}\n"


def test_occupied_folder_is_refused_and_untouched(
    tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    before = files(tmp_path)
    for options in ([], ["--resume"]):
        assert train(tmp_path, data_root, *options) == 2
        assert str(tmp_path) in only_sentence(capsys)
    assert train(tmp_path / "thesis.tex", data_root) == 2
    assert "thesis.tex" in only_sentence(capsys)
    assert files(tmp_path) == before


def test_foreign_data_root_is_refused_and_untouched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "GTA5" / "images").mkdir(parents=True)
    (tmp_path / "data" / "GTA5" / "images" / "00001.png").write_bytes(b"the real one")
    before = files(tmp_path / "data")
    assert train(tmp_path / "run", tmp_path / "data") == 2
    assert "GTA5" in only_sentence(capsys)
    assert files(tmp_path / "data") == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def relabel(path: Path) -> None:
    Image.new("L", (SIZE[1], SIZE[0]), 77).save(path)


@pytest.mark.parametrize(
    ("damage", "workers"), [(truncate, "0"), (relabel, "1"), (Path.unlink, "0")]
)
def test_damaged_label_is_named(
    damage: Callable[[Path], None],
    workers: str,
    own_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (own_data / "GTA5" / "labels").iterdir():
        damage(path)
    assert train(tmp_path / "run", own_data, "--scenes", "0", "--workers", workers) == 2
    assert "GTA5/labels/" in only_sentence(capsys).replace(os.sep, "/")


def test_truncated_target_image_is_named(
    own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (own_data / "Cityscapes" / "leftImg8bit" / "train").rglob("*.png"):
        truncate(path)
    assert train(tmp_path / "run", own_data) == 2
    assert "leftImg8bit" in only_sentence(capsys)


def test_target_training_labels_are_never_opened(
    own_data: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.rmtree(own_data / "Cityscapes" / "gtFine" / "train")
    assert train(tmp_path / "run", own_data, "--scenes", "0", "--no-compare") == 0
    assert same(trained(tmp_path / "run" / "last.pt"), trained(finished / "last.pt"))


@pytest.mark.parametrize(
    "options",
    [
        ["--network", "resnet101", "--source-steps", "0"],
        ["--classes", "16", "--source-steps", "0"],
    ],
)
def test_unfitting_init_is_refused(
    options: list[str],
    tmp_path: Path,
    data_root: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    init = finished / "last.pt"
    assert train(tmp_path / "run", data_root, "--init", str(init), *options) == 2
    assert str(init) in only_sentence(capsys)


def test_half_written_checkpoint_is_refused_and_kept(
    tmp_path: Path, data_root: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    half = (run / "last.pt").read_bytes()[:1000]
    (run / "last.pt").write_bytes(half)
    assert train(run, data_root, "--resume") == 2
    assert "last.pt" in only_sentence(capsys)
    assert (run / "last.pt").read_bytes() == half


def test_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = OSError(28, "No space left on device", "last.pt")

    def fsync(_: int) -> None:
        nonlocal saves
        saves += 1
        if saves == 3:  # the first is of settings.json
            raise full

    saves = 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", fsync)
        assert train(tmp_path / "run", data_root, "--no-compare") == 2
    assert "No space left on device" in only_sentence(capsys)
    assert checkpoint.load(tmp_path / "run" / "source-only" / "last.pt")["step"] == 2
    assert train(tmp_path / "run", data_root, "--resume", "--no-compare") == 0


def test_diverging_run_stops_before_it_saves(
    tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, data_root, "--source-lr", "1e30", "--save-every", "1") == 2
    assert "--source-lr" in only_sentence(capsys)
    # The loss is read before the update, so that the first one is finite, and no later one is.
    assert checkpoint.load(out / "source-only" / "last.pt")["step"] == 1


def test_bad_settings_raise() -> None:
    with pytest.raises(UserError, match="--target-weight"):
        Settings(target_weight=(-1.0,))


# The other scripts


def test_evaluate_repeats_the_score_of_the_run(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    assert evaluate.main([str(finished / "last.pt"), "--out", str(out), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((finished / "metrics.json").read_text())
    assert f"{metrics['adapted']['miou']:.1f}" in printed
    (picture,) = out.glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (SIZE[1], SIZE[0])
    assert evaluate.main([str(finished / "last.pt"), "--out", str(out)]) == 2
    assert str(out) in only_sentence(capsys)


def test_evaluate_resizes_labels_as_training_does(
    own_data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = (own_data / "Cityscapes" / "gtFine" / "val").rglob("*_labelIds.png")
    size = (5 * SIZE[1] // 8, 5 * SIZE[0] // 8)  # a ratio at which other rules differ
    with Image.open(file) as labels:
        labels.resize((2 * SIZE[1], 2 * SIZE[0]), Image.Resampling.NEAREST).save(file)
    settings = replace(PRESETS["demo"].settings, data_root=own_data, target_size=size[::-1])
    wanted = loading.open_data(settings)[2][0].labels
    seen = []

    def spy(model: object, loader: Any, *_: object, **__: object) -> Any:
        (sample,) = loader
        seen.append(sample[1][0])
        return evaluation.Scores(torch.eye(19), LABEL_SPACES[19].names)

    monkeypatch.setattr(evaluate, "evaluate", spy)
    options = ["--data-root", str(own_data), "--workers", "0"]
    options += ["--target-size", str(size[1]), str(size[0])]
    assert evaluate.main([str(finished / "last.pt"), *options]) == 0
    assert torch.equal(seen[0], wanted)
    assert seen[1].shape == (2 * SIZE[0], 2 * SIZE[1])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """The root of a `folder` data set with one image name in two folders."""
    root = tmp_path / "Own"
    for name in "ab":
        for part, gray in (("images", 90), ("labels", 7)):
            file = root / part / "val" / name / "x.png"
            file.parent.mkdir(parents=True)
            Image.new("L", (SIZE[1], SIZE[0]), gray).save(file)
    names = dict(enumerate(LABEL_SPACES[19].names))
    (root / "label_map.json").write_text(json.dumps(names))
    return root


def test_evaluate_keeps_the_folders_of_images_with_one_name(
    tmp_path: Path, finished: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    data = ["--data-root", str(tmp_path), "--target", "folder", "--target-folder", folders.name]
    options = [str(finished / "last.pt"), *data, "--workers", "0", "--out", str(out)]
    assert evaluate.main(options) == 0
    assert files(out).keys() == {os.path.join("a", "x.png"), os.path.join("b", "x.png")}
    shutil.rmtree(out)
    images = folders / "images" / "val"
    shutil.copy(images / "a" / "x.png", images / "a" / "x.jpg")
    capsys.readouterr()
    assert evaluate.main(options) == 2
    assert "x.jpg" in only_sentence(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("script", "options", "named"),
    [
        (evaluate, ["--workers", "-1"], "--workers"),
        (evaluate, ["--target-size", "1", "1"], "--target-size"),
        (evaluate, ["--split", "dusk"], "'dusk'"),
        (adapt_online, ["--batch-size", "0"], "--batch-size"),
        (adapt_online, ["--scenes", "0"], "--scenes"),
        (adapt_online, ["--batch-size", "-2"], "--batch-size"),
        (adapt_online, ["--lr", "-1"], "--lr"),
        (adapt_online, ["--lr", "0"], "--lr"),
        (adapt_online, ["--lr", "nan"], "--lr"),
        (adapt_online, ["--lr", "inf"], "--lr"),
    ],
)
def test_bad_option_of_the_other_scripts_is_refused(
    script: ModuleType,
    options: list[str],
    named: str,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script.main([str(finished / "last.pt"), *options]) == 2
    assert named in only_sentence(capsys)


def test_evaluate_questions_a_score_near_chance(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(finished / "last.pt")
    for name, weight in state["model"].items():
        if name.startswith("layer6"):
            # Every pixel becomes "train", which the scene does not show.
            weight.zero_()
            if name.endswith("bias"):
                weight[16] = 1
    checkpoint.save(tmp_path / "blind.pt", state)
    assert evaluate.main([str(tmp_path / "blind.pt"), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "preprocessing" in printed.partition("mIoU")[0]


def test_evaluate_names_a_missing_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["missing.pt"]) == 2
    assert "missing.pt" in only_sentence(capsys)


def test_adapt_online_compares_what_the_network_may_learn_from(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert adapt_online.main([str(finished / "source-only" / "last.pt")]) == 0
    (header,) = (line for line in capsys.readouterr().out.splitlines() if "IoU (%)" in line)
    for column in ("as trained", "statistics", "entropy", "maximum squares", "with information"):
        assert column in header


def test_adapt_online_runs_as_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert adapt_online.main(["--scenes", "2", "--batch-size", "2"]) == 0
    scored, predicted = capsys.readouterr().out.split("Predicted classes")
    assert "mIoU" in scored and "road" in scored
    rows = [re.findall(r"\d+\.\d", line) for line in predicted.splitlines() if "." in line]
    assert len(rows) == 19
    for column in zip(*rows, strict=True):
        assert sum(map(float, column)) == pytest.approx(100, abs=1)  # rounded to a tenth
    assert not list(tmp_path.iterdir())
    assert adapt_online.main(["--network", "package:factory"]) == 2
    assert "--network" in only_sentence(capsys)


def test_minimal_loop_runs_and_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    minimal_loop.main()
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    text = Path(minimal_loop.__file__).read_text()
    assert len(text.splitlines()) < 60
    assert "uda" not in text.replace("train_uda.py", "")
