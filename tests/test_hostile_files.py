"""Files that a user did not make: no code in them runs, and each refusal is one clear sentence."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import folder_of_one_picture, saved
from PIL import Image

import adapt_online
import evaluate
import export_model
import train_uda
from uda import checkpoint, datasets, deeplab, loading, outputs, report
from uda.errors import UserError
from uda.presets import Settings

GREY = Image.new("L", (4, 2), 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of_one_picture(tmp_path / "folder")


@contextmanager
def refusal(*told: str) -> Iterator[None]:
    """Demand a UserError that tells this in one line without control characters."""
    with pytest.raises(UserError) as error:
        yield
    assert str(error.value).isprintable()
    for text in told:
        assert text in str(error.value)


def read(folder: Path) -> datasets.Sample:
    return datasets.open_dataset("folder", folder, "train", classes=2)[0]


# Code


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def attacks(call: Call, tmp_path: Path) -> Iterator[bytes]:
    """Files that ask to call a function, in every format that torch has ever read."""
    for zipped in (True, False):
        for content in ({"model": call}, {"a": [{"b": call}]}, call, {call: 1}):
            torch.save(content, tmp_path / "attack", _use_new_zipfile_serialization=zipped)
            yield (tmp_path / "attack").read_bytes()
    for protocol in range(6):
        pickled = pickle.dumps({"model": call}, protocol)
        yield pickled
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:") as archive:
            for name in ("storages", "tensors", "pickle"):
                entry = tarfile.TarInfo(name)
                entry.size = len(pickled)
                archive.addfile(entry, io.BytesIO(pickled))
        yield file.getvalue()
        # The entries of a checkpoint, and of a TorchScript archive.
        for names in (["data.pkl"], ["constants.pkl", "data.pkl", "code/__torch__.py"]):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                for name in (*names, "version", "byteorder"):
                    archive.writestr(f"archive/{name}", pickled)
            yield file.getvalue()


def test_no_format_of_checkpoints_runs_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran, path, tried = tmp_path / "ran", tmp_path / "backbone.pth", 0
    for call in (Call(os.mkdir, str(ran)), Call(eval, f"__import__('os').mkdir({str(ran)!r})")):
        for content in attacks(call, tmp_path):
            path.write_bytes(content)
            with refusal(str(path), "cannot be read as a checkpoint"):
                checkpoint.read(path)
            tried += 1
    assert tried == 2 * (8 + 4 * 6)
    torch.save({"model": call}, path)
    data = ["--data-root", str(tmp_path)]
    for script, arguments in (
        (evaluate, [str(path), *data]),
        (adapt_online, [str(path), *data]),
        (export_model, [str(path), str(tmp_path / "out.safetensors")]),
        (train_uda, ["--init", str(path), "--out", str(tmp_path / "run")]),
    ):
        assert script.main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        assert str(path) in message
    assert not ran.exists() and not (tmp_path / "run").exists()


def test_a_numpy_number_cannot_name_an_address(tmp_path: Path) -> None:
    class Kind(Call):
        def __reduce__(self) -> tuple[object, ...]:
            # Flags that make NumPy read the eight bytes as a pointer.
            return (np.dtype, ("V8", False, True), (3, "|", None, None, None, 8, 1, 0x3D))

    scalar = np.float64(0).__reduce__()[0]
    torch.save({"best": Call(scalar, Kind(len), b"A" * 8)}, tmp_path / "odd.pt")
    assert checkpoint.read(tmp_path / "odd.pt")["best"] == b"A" * 8


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        saved(GREY, "TIFF"),
        saved(GREY, "GIF"),
    ],
    ids=["eps", "svg", "tiff", "gif"],
)
def test_pictures_of_other_formats_are_refused_whatever_their_name(
    content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow's reader of EPS runs the program gs.
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {folder}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    for part in ("images", "labels"):
        path = folder / part / "train" / "a.png"
        before = path.read_bytes()
        path.write_bytes(content)
        with refusal(str(path), "it is no PNG"):
            read(folder)
        path.write_bytes(before)
    assert not (folder / "ran").exists()


# Damage


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file with some bytes overwritten near its start, where they mean most, or cut short."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(min(len(changed), 500))] = draw.randrange(256)
    return bytes(changed[: draw.choice((len(changed), draw.randrange(len(changed))))])


def a_checkpoint(folder: Path, **options: Any) -> bytes:
    settings = outputs.as_json(Settings(network="small", classes=2))
    torch.save(
        {"model": {"conv1.weight": torch.zeros(3)}, "settings": settings, "step": 3},
        folder / "valid",
        **options,
    )
    return (folder / "valid").read_bytes()


def exported(folder: Path) -> bytes:
    weights = deeplab.deeplab_small(2).state_dict()
    checkpoint.export(folder / "valid", weights, outputs.as_json(Settings(network="small")))
    return (folder / "valid").read_bytes()


FORMATS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "zip": ("a.pt", a_checkpoint),
    "legacy": ("a.pth", lambda f: a_checkpoint(f, _use_new_zipfile_serialization=False)),
    "safetensors": ("a.safetensors", exported),
    "png": ("images/train/a.png", lambda f: (f / "images/train/a.png").read_bytes()),
    "labels": ("labels/train/a.png", lambda f: (f / "labels/train/a.png").read_bytes()),
    "label map": ("label_map.json", lambda f: (f / "label_map.json").read_bytes()),
}


@pytest.mark.filterwarnings("ignore")  # what torch and Pillow find odd about a file that they read
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(kind: str, folder: Path) -> None:
    name, valid = FORMATS[kind]
    path, content, draw, refused = folder / name, valid(folder), random.Random(0), 0
    for _ in range(150):
        path.write_bytes(damaged(content, draw))
        try:
            if path.parent == folder and path.suffix != ".json":
                checkpoint.read(path)
            else:
                read(folder)
        except UserError as error:
            assert str(path) in str(error) and str(error).isprintable()
            refused += 1
    assert refused > 20


# Names

NAMES = {
    "space": "a b",
    "newline": "a\nb",
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "bidi": "a\u202egnp.b",
    "unicode": "straße_日本_é",
    "markup": "[red][bold]",
    "emoji": ":smile:",
    "bytes": os.fsdecode(b"a\xff"),
    "dash": "-rf",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_odd_names_are_read_and_shown_without_harm(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    for part in (images, labels):
        (part / "a.png").rename(part / f"{name}.png")
    assert read(folder).name == name
    (labels / f"{name}.png").unlink()
    shown = name if name.isprintable() else ascii(name)[1:-1]
    with refusal(shown):
        read(folder)
    (images.parent / "val").symlink_to("train")
    (labels.parent / "val").symlink_to("train")
    names = {"source_folder": "folder", "target_folder": "folder"}
    s = Settings(source="folder", target="folder", classes=2, data_root=folder.parent, **names)
    assert report.exit_code(lambda: loading.check_data(s, report.console())) == 2
    printed = "".join(capfd.readouterr())
    assert not [c for c in printed if unicodedata.category(c) == "Cc" and c != "\n"]
    assert shown in printed.replace("\n", "")


def test_an_error_of_a_loader_process_is_one_sentence_too(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for part in ("images", "labels"):
        (folder / part / "train" / "a.png").rename(folder / part / "train" / "a\nb.png")
    (folder / "labels" / "train" / "a\nb.png").write_bytes(b"")
    dataset = datasets.open_dataset("folder", folder, "train", classes=2)
    loader = torch.utils.data.DataLoader(dataset, num_workers=1)
    assert report.exit_code(lambda: next(iter(loader))) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: The label file ") and r"a\nb.png" in message
    assert message.count("\n") == 1 and message.endswith("replace the file.\n")
