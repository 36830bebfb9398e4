"""The embedded data: real layouts, all classes, the same pictures from the same seed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uda import datasets, scenes
from uda.errors import UserError
from uda.scenes import dataset as rendering
from uda.scenes import styles

# A dozen scenes per split hold every class; the size keeps small things a few pixels wide.
SETTINGS = {"seed": 3, "train": 12, "val": 12, "size": (96, 192)}
TINY = {"seed": 0, "train": 2, "val": 1, "size": (24, 48)}
SPLITS = [("gta5", "GTA5", "train"), ("cityscapes", "Cityscapes", "train"),
          ("cityscapes", "Cityscapes", "val")]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    scenes.render(root, **SETTINGS)
    return root


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("[!.]*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("kind", "folder", "split"), SPLITS)
def test_every_split_has_all_classes_with_a_long_tail(
    root: Path, kind: datasets.Kind, folder: str, split: str
) -> None:
    dataset = datasets.open_dataset(kind, root / folder, split)
    report = datasets.check_data(dataset)
    assert report.images == 12
    assert report.usable
    assert not report.odd_sizes
    assert min(report.frequencies.values()) > 0
    common = ("road", "building", "vegetation", "sky")
    assert sum(report.frequencies[name] for name in common) > 0.6
    rare = ("traffic light", "rider", "motorcycle", "bicycle", "train", "bus", "truck")
    assert max(report.frequencies[name] for name in rare) < 0.05
    assert report.pixels[-1] > 0


def test_encodings_are_those_of_the_real_sets(root: Path) -> None:
    with Image.open(root / "GTA5" / "labels" / "00001.png") as labels:
        assert labels.mode == "P"
        assert labels.getpalette()[3 * styles.ROAD :][:3] == [128, 64, 128]
    with Image.open(root / "GTA5" / "images" / "00001.png") as image:
        assert (image.mode, image.size) == ("RGB", (192, 108))
    path = next((root / "Cityscapes" / "gtFine" / "val").rglob("*_gtFine_labelIds.png"))
    with Image.open(path) as labels:
        assert (labels.mode, labels.size) == ("L", (192, 96))
        ids = np.asarray(labels)
    # The camera's own car lies below the street.
    assert ids[-1, 96] == styles.EGO_VEHICLE
    assert styles.ROAD in ids


def test_the_two_styles_look_different(root: Path) -> None:
    def saturation(kind: datasets.Kind, folder: str) -> float:
        dataset = datasets.open_dataset(kind, root / folder, "train")
        rgb = [datasets.to_rgb(sample.image).float() for sample in dataset]
        return float(sum((image.amax(0) - image.amin(0)).mean() for image in rgb) / len(rgb))

    assert saturation("gta5", "GTA5") > 1.5 * saturation("cityscapes", "Cityscapes")


def test_same_settings_give_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        scenes.render(tmp_path / name, **{**TINY, "seed": seed})
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_a_longer_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    scenes.render(tmp_path / "short", **TINY)
    scenes.render(tmp_path / "long", **{**TINY, "train": 3})
    short, long = contents(tmp_path / "short"), contents(tmp_path / "long")
    del short["scenes.json"]
    assert short.items() < long.items()


def test_source_validation_pictures_are_listed_apart(tmp_path: Path) -> None:
    scenes.render(tmp_path / "without", **TINY)
    scenes.render(tmp_path / "with", **TINY, source_val=3)
    sets = {
        split: datasets.open_dataset("gta5", tmp_path / "with" / "GTA5", split)
        for split in ("train", "val")
    }
    assert {split: len(found) for split, found in sets.items()} == {"train": 2, "val": 3}
    without, extended = contents(tmp_path / "without"), contents(tmp_path / "with")
    del without["scenes.json"]
    assert without.items() < extended.items()
    pictures = [file for name, file in extended.items() if name.startswith("GTA5/images/")]
    assert len(pictures) == len({*pictures}) == 5
    with pytest.raises(UserError, match=r"scenes of other settings"):
        scenes.check(tmp_path / "with", **TINY, source_size=(27, 48), source_val=2)


def test_worker_processes_render_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes.render(tmp_path / "one", **TINY)
    monkeypatch.setattr(rendering, "_POOL_FROM", 1)
    monkeypatch.setattr(rendering, "_cores", lambda: 1)
    scenes.render(tmp_path / "many", **TINY)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_an_interrupted_call_is_completed(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scenes.render(tmp_path / "scenes", **TINY, on_progress=interrupt)
    kept = tmp_path / "scenes" / "GTA5" / "images" / "00001.png"
    written = kept.stat().st_mtime_ns
    calls: list[tuple[int, int]] = []
    scenes.render(tmp_path / "scenes", **TINY, on_progress=lambda *call: calls.append(call))
    assert calls == [(4, 5), (5, 5)]
    assert kept.stat().st_mtime_ns == written
    scenes.render(tmp_path / "whole", **TINY)
    assert contents(tmp_path / "scenes") == contents(tmp_path / "whole")


def test_a_finished_set_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    scenes.render(tmp_path, **TINY, source_val=1)
    monkeypatch.setattr(os, "replace", refuse)
    scenes.render(tmp_path, **TINY, source_val=1)


@pytest.mark.parametrize("lost", ["images", "labels"])
def test_a_lost_file_is_drawn_again(lost: str, tmp_path: Path) -> None:
    scenes.render(tmp_path, **TINY)
    before = contents(tmp_path)
    (tmp_path / "GTA5" / lost / "00001.png").unlink()
    scenes.render(tmp_path, **TINY)
    assert contents(tmp_path) == before


def test_other_settings_and_other_data_are_not_overwritten(tmp_path: Path) -> None:
    scenes.render(tmp_path / "scenes", **TINY)
    before = contents(tmp_path / "scenes")
    with pytest.raises(UserError, match=r"scenes of other settings"):
        scenes.render(tmp_path / "scenes", **{**TINY, "seed": 1})
    assert contents(tmp_path / "scenes") == before
    (tmp_path / "real" / "Cityscapes").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Cityscapes exists and was not rendered"):
        scenes.render(tmp_path / "real", **TINY)
    assert not contents(tmp_path / "real")


@pytest.mark.parametrize("content", ["", "{", "null", "[]"])
def test_a_damaged_note_of_the_settings_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "scenes.json").write_text(content)
    with pytest.raises(UserError, match=r"scenes\.json is damaged"):
        scenes.render(tmp_path, **TINY)
    assert contents(tmp_path) == {"scenes.json": content.encode()}


def test_a_full_disk_leaves_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def replace_until_full(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_until_full)
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        scenes.render(tmp_path / "scenes", **TINY)
    assert len(contents(tmp_path / "scenes")) == 4
    monkeypatch.undo()
    scenes.render(tmp_path / "scenes", **TINY)
    assert len(contents(tmp_path / "scenes")) == 2 * (2 + 2 + 1) + 1
