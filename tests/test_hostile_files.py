"""Whatever a file says that the examples read: one clear sentence, soon, in bounded memory, and no
code in it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import re
import shutil
import signal
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import adapt_online
import evaluate
import export_model
import train_uda
from uda import checkpoint, datasets, deeplab, loading, outputs, report, scenes
from uda.errors import UserError
from uda.presets import Settings

TREES = Path(__file__).parent / "fixtures" / "trees"
# Bounds on what one file may cost. The largest picture that is read takes most (see its test).
SECONDS, MEBIBYTES = 5, 256
LARGEST_PICTURE_MEBIBYTES = 1024


class TooSlow(BaseException):
    """No Exception, which a reader might take for damage in the file."""


@contextmanager
def quick() -> Iterator[None]:
    """Fail if what happens inside takes more processor time, or waits."""

    def stop(*_: object) -> None:
        raise TooSlow

    # On a busy machine the clock says little: it is for what would wait forever.
    watches = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS),
               (signal.ITIMER_REAL, signal.SIGALRM, 600))  # fmt: skip
    handlers = [signal.signal(number, stop) for _, number, _ in watches]
    for watch, _, seconds in watches:
        signal.setitimer(watch, seconds)
    try:
        yield
    finally:
        for (watch, number, _), handler in zip(watches, handlers, strict=True):
            signal.setitimer(watch, 0)
            signal.signal(number, handler)


@contextmanager
def bounded(mebibytes: int = MEBIBYTES) -> Iterator[None]:
    """Fail if what happens inside takes more memory."""
    before = resident("VmRSS", forget_peak=True)
    yield
    assert resident("VmHWM") - before < mebibytes


def resident(line: str, *, forget_peak: bool = False) -> int:
    """Mebibytes that Linux counts; elsewhere 0."""
    if not os.path.exists("/proc/self/clear_refs"):
        return 0
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition(line + ":")[2].split()[0]) // 1024


@contextmanager
def refusal(*told: str) -> Iterator[None]:
    """Demand a UserError that tells this in one line without control characters."""
    with bounded(), quick(), pytest.raises(UserError) as error:
        yield
    sentence = str(error.value)
    assert sentence.isprintable() and len(sentence) < 2100
    for text in told:
        assert text in sentence


def refused(script: Any, arguments: Sequence[object], capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence in which a script refuses; without a reader's traceback before it."""
    with bounded(), quick():
        assert script.main([str(argument) for argument in arguments]) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ") and message.endswith("\n") and message[:-1].isprintable()
    return message


# Pictures


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )  # fmt: skip


def png(
    width: int, height: int, rows: bytes, *, depth: int = 8, color: int = 0, before: bytes = b""
) -> bytes:
    """A PNG file of raw rows; color 0 is grey, 2 colour, 3 palette, 4 and 6 with transparency."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    step = len(rows) // height
    data = b"".join(b"\0" + rows[step * y : step * (y + 1)] for y in range(height))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before
        + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )  # fmt: skip


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PALETTE = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
GREY = Image.new("L", (4, 2), 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of one picture, 4 x 2 pixels of which the left half is id 3, the other id 9."""
    root = tmp_path / "folder"
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    (root / "images" / "train" / "a.png").write_bytes(saved(GREY, "PNG"))
    (root / "labels" / "train" / "a.png").write_bytes(png(4, 2, bytes([3, 3, 9, 9] * 2)))
    (root / "label_map.json").write_text('{"9": "road", "3": "lake", "0": null}')
    return root


def read(folder: Path, classes: int = 2, *, images: int = 1) -> datasets.Sample:
    """The first sample of the data set in a folder, which must have so many images."""
    dataset = datasets.open_dataset("folder", folder, "train", classes=classes)
    assert len(dataset) == images
    return dataset[0]


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"some text",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        saved(Image.fromarray(np.full((2, 4), np.nan, np.float32)), "TIFF"),
        saved(GREY, "GIF"),
        saved(GREY, "BMP"),
        saved(GREY, "WEBP"),
        saved(GREY, "JPEG2000"),
    ],
    ids=["eps", "text", "svg", "tiff", "gif", "bmp", "webp", "jpeg2000"],
)
def test_other_formats_are_refused_whatever_their_name(
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


def test_labels_are_never_read_from_a_lossy_file(folder: Path) -> None:
    path = folder / "labels" / "train" / "a.png"
    path.write_bytes(saved(Image.new("L", (4, 2), 3), "JPEG"))
    with refusal(str(path), "it is no PNG file"):
        read(folder)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (png(4, 2, bytes([5] * 8)), (5, 5, 5)),
        (png(8, 2, b"\xff\xff", depth=1), (255, 255, 255)),
        (png(4, 2, bytes([5, 0] * 8), color=4), (5, 5, 5)),
        (png(4, 2, bytes([1, 2, 3] * 8), color=2), (1, 2, 3)),
        (png(4, 2, bytes([1, 2, 3, 0] * 8), color=6), (1, 2, 3)),
        (png(4, 2, bytes([1, 9, 2, 9, 3, 9] * 8), color=2, depth=16), (1, 2, 3)),
        (png(4, 2, bytes([1] * 8), color=3, before=PALETTE), (40, 50, 60)),
        (png(8, 2, b"\xff\xff", color=3, depth=1, before=PALETTE), (40, 50, 60)),
        (png(4, 2, bytes([1] * 8), color=3, before=PALETTE + chunk(b"tRNS", b"\0\x80")),
         (40, 50, 60)),
        (saved(Image.new("CMYK", (4, 2), (0, 0, 0, 255)), "JPEG"), (0, 0, 0)),
        # Of an animation the first frame, as other tools do.
        (saved(GREY, "PNG", save_all=True, append_images=[Image.new("L", (4, 2), 8)]), (7, 7, 7)),
    ],
    ids=["grey", "1-bit", "grey-alpha", "rgb", "rgb-alpha", "rgb-16", "palette", "palette-1",
         "palette-alpha", "cmyk", "apng"],
)  # fmt: skip
def test_images_of_every_mode_become_rgb(
    content: bytes, wanted: tuple[int, ...], folder: Path
) -> None:
    (folder / "images" / "train" / "a.png").write_bytes(content)
    dataset = datasets.open_dataset("folder", folder, "train", classes=2, labels=False)
    rgb = datasets.to_rgb(dataset[0].image)
    assert (rgb == torch.tensor(wanted).view(3, 1, 1)).all()


def test_an_image_whose_grey_values_have_no_8_bits_is_refused(folder: Path) -> None:
    path = folder / "images" / "train" / "a.png"
    path.write_bytes(png(4, 2, bytes([1, 0] * 8), depth=16))
    with refusal(str(path), "16 bits"):
        read(folder)


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        (png(4, 2, bytes([1, 2, 3, 4] * 2)), [1, 2, 3, 4]),
        (png(4, 2, bytes([1, 2, 3, 4] * 2), color=3, before=PALETTE), [1, 2, 3, 4]),
        (png(4, 2, bytes([0, 1, 0, 2, 0, 3, 0, 4] * 2), depth=16), [1, 2, 3, 4]),
        (png(4, 2, bytes([0, 1, 9, 9, 9, 9] * 8), color=2, depth=16), [1, 1, 1, 1]),
        (png(4, 2, bytes([4, 4, 4] * 8), color=2), [4, 4, 4, 4]),
        (png(4, 2, bytes([4, 4, 4, 255] * 8), color=6), [4, 4, 4, 4]),
        (png(4, 2, b"\x50\x50", depth=1), [0, 1, 0, 1]),
    ],
    ids=["grey", "palette", "grey-16", "rgb-16", "rgb-grey", "rgb-alpha-grey", "1-bit"],
)
def test_labels_of_every_mode_are_ids(content: bytes, ids: list[int], folder: Path) -> None:
    (folder / "labels" / "train" / "a.png").write_bytes(content)
    names = {str(i): f"class {i}" for i in range(5)}
    (folder / "label_map.json").write_text(json.dumps(names))
    assert (read(folder, classes=5).labels == torch.tensor(ids)).all()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (png(4, 2, bytes([1, 3] * 8), depth=16), "above 255"),
        (png(4, 2, bytes([3, 9, 9] * 8), color=2), "it is a picture"),
        (png(4, 2, bytes([3, 0] * 8), color=4), "it is a picture"),
        (png(4, 2, bytes([3, 3, 9, 9] * 8), color=4, depth=16), "it is a picture"),
        (png(4, 2, bytes([3, 255] * 4)), "label id 255"),
    ],
    ids=["large", "rgb", "grey-alpha", "grey-alpha-16", "unknown"],
)
def test_label_files_that_are_no_map_of_ids_are_refused(
    content: bytes, told: str, folder: Path
) -> None:
    path = folder / "labels" / "train" / "a.png"
    path.write_bytes(content)
    with refusal(str(path), told):
        read(folder)


def test_an_image_is_turned_upright_and_its_labels_must_be_so_too(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    # Stored 2 x 4 pixels, black above white: upright, white is left of black.
    stored = Image.fromarray(np.repeat(np.uint8([[0], [0], [255], [255]]), 2, axis=1))
    path = folder / "images" / "train" / "a.png"
    path.write_bytes(saved(stored, "PNG", exif=exif.tobytes()))
    sample = read(folder)
    assert sample.image.shape[1:] == sample.labels.shape == (2, 4)
    assert (sample.image[:, :, :2] > sample.image[:, :, 2:]).all()
    label = folder / "labels" / "train" / "a.png"
    label.write_bytes(png(2, 4, bytes([3] * 8)))
    with refusal(str(path), str(label), "across each other"):
        read(folder)
    report = datasets.check_data(datasets.open_dataset("folder", folder, "train", classes=2))
    assert len(report.unreadable) == 1 and not report.usable


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize(
    ("width", "side"),
    [(2**31 - 1, 2**31 - 1), (2**31, 2**31), (100_000, 100_000), (13_000, 13_000), (8, 2**23)],
    ids=["2^31-1", "2^31", "100000", "13000", "strip"],
)
def test_a_picture_that_unpacks_to_gigabytes_is_refused(
    part: str, width: int, side: int, folder: Path
) -> None:
    packer, data = zlib.compressobj(), b""
    for _ in range(min(side, 500)):
        data += packer.compress(bytes(min(side, 100_000) // 8 + 1))
    content = png(1, 1, b"\0", depth=1)
    header = b"IHDR" + struct.pack(">II", width, side) + content[24:29]
    bomb = content[:12] + header + struct.pack(">I", zlib.crc32(header))
    bomb += chunk(b"IDAT", data + packer.flush()) + chunk(b"IEND", b"")
    path = folder / part / "train" / "a.png"
    path.write_bytes(bomb)
    assert len(bomb) < 2**17
    with refusal(str(path), "cannot be read (Image size"):
        read(folder)


def test_a_note_in_a_picture_that_unpacks_to_gigabytes_is_refused(folder: Path) -> None:
    packer = zlib.compressobj(1)
    note = b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    path = folder / "images" / "train" / "a.png"
    path.write_bytes(png(4, 2, bytes(8), before=chunk(b"zTXt", b"k\0\0" + note)))
    with refusal(str(path), "too large"):
        read(folder)


def test_the_largest_picture_that_is_read_takes_a_gibibyte(tmp_path: Path) -> None:
    side = int(datasets.MOST_PIXELS**0.5)
    content = saved(Image.new("L", (side, side), 7), "PNG", compress_level=1)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for part in ("images", "labels"):
        (tmp_path / part / "1.png").write_bytes(content)
    dataset = datasets.open_dataset("gta5", tmp_path, "train", size=(8, 8))
    with bounded(LARGEST_PICTURE_MEBIBYTES), quick():
        assert (dataset[0].labels == 0).all()


# Folders and names


def test_linked_folders_and_files_are_read(folder: Path, tmp_path: Path) -> None:
    # As users of Cityscapes keep it: cities on another disk, the set itself elsewhere.
    for part in ("images", "labels"):
        city, elsewhere = folder / part / "train" / "aachen", tmp_path / "disk" / part
        elsewhere.mkdir(parents=True)
        shutil.copy(folder / part / "train" / "a.png", elsewhere / "b.png")
        city.symlink_to(elsewhere, target_is_directory=True)
        (folder / part / "train" / "c.png").symlink_to(elsewhere / "b.png")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    dataset = datasets.open_dataset("folder", tmp_path / "link", "train", classes=2)
    assert [sample.name for sample in dataset] == ["a", "b", "c"]


def test_links_in_a_circle_and_twice_to_one_folder_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    link = folder / "images" / "train" / "again"
    link.symlink_to(folder / "images", target_is_directory=True)
    with refusal(str(link), "are one folder"):
        read(folder)
    link.unlink()
    # Two links in every folder of a chain: a million ways to its end.
    chain = [tmp_path / str(i) for i in range(20)]
    for here, after in zip(chain, [*chain[1:], tmp_path], strict=True):
        here.mkdir()
        for name in "ab":
            (here / name).symlink_to(after, target_is_directory=True)
    link.symlink_to(chain[0], target_is_directory=True)
    with refusal("are one folder"):
        read(folder)


def dangle(path: Path) -> None:
    path.symlink_to("nowhere")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [dangle, circle, endless, os.mkfifo])
@pytest.mark.parametrize(
    "name", ["images/train/b.png", "labels/train/a.png", "label_map.json", "../GTA5/list/train.txt"]
)
def test_what_is_no_file_is_named(make: Callable[[Path], None], name: str, folder: Path) -> None:
    gta5 = Path(shutil.copytree(TREES / "GTA5", folder.parent / "GTA5"))
    path = (folder / name).resolve()
    path.unlink(missing_ok=True)
    make(path)
    with refusal(str(path)):
        read(folder)
        datasets.open_dataset("gta5", gta5, "train")


@pytest.mark.parametrize("make", [dangle, circle, endless, os.mkfifo, os.mkdir])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_that_is_no_file_is_named(
    make: Callable[[Path], None], suffix: str, tmp_path: Path
) -> None:
    make(tmp_path / f"odd{suffix}")
    with refusal(f"odd{suffix} cannot be read"):
        checkpoint.read(tmp_path / f"odd{suffix}")


def test_hidden_files_and_folders_of_any_name_are_no_images(folder: Path) -> None:
    images = folder / "images" / "train"
    (images / "._a.png").write_bytes(b"\0\5\x16\7")  # macOS, beside a.png
    (images / ".ipynb_checkpoints").mkdir()
    shutil.copy(images / "a.png", images / ".ipynb_checkpoints" / "a-checkpoint.png")
    (images / "x.png").mkdir()
    read(folder, images=1)


NAMES = {
    "space": "a b",
    "newline": "a\nb",
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "bidi": "a\u202egnp.b",
    "unicode": "straße_日本_é",
    "markup": "[red][bold]",
    "emoji": ":smile:",
    "bytes": os.fsdecode(b"a\xff"),
    "long": "n" * 250,
    "dash": "-rf",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_odd_names_are_read_and_shown_without_harm(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    for part in (images, labels):
        (part / "a.png").rename(part / f"{name}.png")
    assert read(folder).name == name
    (labels / f"{name}.png").unlink()
    shown = name if name.isprintable() else ascii(name)[1:-1]
    with refusal(shown):
        read(folder)
    printed = check_data(folder.rename(folder.parent / name), capfd)
    assert not [c for c in printed if unicodedata.category(c) == "Cc" and c != "\n"]
    assert shown in printed.replace("\n", "") or len(shown) > 100


def check_data(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What train_uda.py --check-data prints about a data set of two classes."""
    for part in ("images", "labels"):
        (folder / part / "val").symlink_to("train")
    names = {"source_folder": folder.name, "target_folder": folder.name}
    s = Settings(source="folder", target="folder", classes=2, data_root=folder.parent, **names)

    def script() -> None:
        loading.check_data(s, report.PlainConsole())

    assert report.exit_code(script) in (0, 2)
    printed = capfd.readouterr()
    return printed.out + printed.err


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
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xef\xbb\xbf00001\r\n\r\n00002", None),
        (b"x" * 300, "does not exist"),
        (b"00001\n\x1b[2J", r"\x1b[2J.png, which does not exist"),
        (b"../../" * 1000, "does not exist"),
        (b"0001\x00", "does not exist"),
        ("00001\n".encode("utf-16"), "cannot be read"),
        (None, "more than"),
    ],
    ids=["windows", "long", "escape", "path", "null", "utf-16", "sparse"],
)
def test_list_files(content: bytes | None, told: str | None, tmp_path: Path) -> None:
    root = Path(shutil.copytree(TREES / "GTA5", tmp_path / "GTA5"))
    path = root / "list" / "train.txt"
    path.write_bytes(content or b"")
    if content is None:
        os.truncate(path, 2**30)
    if told is None:
        assert len(datasets.open_dataset("gta5", root, "train")) == 2
    else:
        with refusal(str(path), told):
            datasets.open_dataset("gta5", root, "train")


def test_a_listed_name_may_hold_spaces(tmp_path: Path) -> None:
    root = Path(shutil.copytree(TREES / "GTA5", tmp_path / "GTA5"))
    for part in ("images", "labels"):
        (root / part / "00001.png").rename(root / part / "a long name.png")
    (root / "list" / "train.txt").write_text("a long name\n2\n")
    dataset = datasets.open_dataset("gta5", root, "train")
    assert [sample.name for sample in dataset] == ["a long name", "00002"]


# JSON

JSON_LIES = {
    "deep": "[" * 10_000,
    "deeper": '{"a":' * 100_000,
    "twice": '{"classes": 2, "classes": 3}',
    "digits": f'{{"classes": {"9" * 5000}}}',
    "utf-16": '{"9": "a"}'.encode("utf-16"),
    "latin-1": b'{"9": "\xe9"}',
    "control": b'{"9": "\x1b"}',
    "null": b"\0" * 100,
    "sparse": None,
}


@pytest.mark.parametrize("content", JSON_LIES.values(), ids=JSON_LIES)
@pytest.mark.parametrize("name", ["label_map.json", "settings.json", "scenes.json"])
def test_json_that_lies_is_refused(name: str, content: Any, folder: Path) -> None:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content or b"")
    if content is None:
        os.truncate(path, 2**30)
    with refusal(str(path)):
        if name == "label_map.json":
            read(folder)
        elif name == "settings.json":
            outputs.run_folder(Settings(out=folder, resume=True))
        else:
            scenes.check(folder, seed=0, train=1, val=1, size=(8, 8), source_size=(8, 8))


def test_json_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    path = folder / "label_map.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    read(folder)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ('"9": "a", "3": "b", "09": "b"', "two entries for one label id"),
        ('"9": "a", "3": "b", "9": "b"', "'9' twice"),
        ('"9": "a", "3": "b", "-1": null', "ids from 0 to 255"),
        ('"9": "a", "3": "b", "256": null', "ids from 0 to 255"),
        ('"9": "a", "3": "b", "1e2": null', "not a JSON object"),
        ('"9": "a", "3": "b", "2.5": null', "not a JSON object"),
        ('"9": "a", "3": 1', "class names"),
        ('"9": "a", "3": NaN', "class names"),
        ('"9": "a", "3": ["b"]', "class names"),
        ('"9": "a", "3": ""', "class names"),
        ('"9": "a", "3": "\\u001b[2J"', "class names"),
        ('"9": "a", "3": "b\\nc"', "class names"),
        (f'"9": "a", "3": "{"b" * 1000}"', "class names"),
        (",".join(f'"{i}": "{i}"' for i in range(256)), "more than 255"),
    ],
)
def test_label_maps_that_lie_are_refused(entries: str, told: str, folder: Path) -> None:
    (folder / "label_map.json").write_text("{" + entries + "}")
    with refusal("label_map.json", told):
        read(folder)


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", ":smile:", "a b", "$x^2$", "日本"])
def test_class_names_are_shown_as_they_are(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "label_map.json").write_text(json.dumps({"9": name, "3": "lake"}))
    assert name in check_data(folder, capfd)


# Checkpoints


class Call:
    """What a pickle says when it wants a function called."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> bytes:
    """The archive of a checkpoint with changed entries, whole in itself."""
    file = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(file, "w", **options) as changed:
        for entry in archive.infolist():
            content = change(entry.filename, archive.read(entry))
            changed.writestr(entry.filename, content)
    return file.getvalue()


def attacks(call: Call, tmp_path: Path) -> Iterator[bytes]:
    """Files that want a function called, one for each format that torch has ever read."""
    for zipped in (True, False):
        for content in ({"model": call}, {"a": [{"b": call}]}, call, {call: 1}):
            torch.save(content, tmp_path / "attack", _use_new_zipfile_serialization=zipped)
            yield (tmp_path / "attack").read_bytes()
    torch.save({"model": {}}, tmp_path / "plain")
    for protocol in range(6):
        pickled = pickle.dumps({"model": call}, protocol)
        yield pickled
        yield rewritten(tmp_path / "plain", lambda name, content, pickled=pickled: (
            pickled if name.endswith("data.pkl") else content))  # fmt: skip
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:") as archive:
            for name in ("storages", "tensors", "pickle"):
                entry = tarfile.TarInfo(name)
                entry.size = len(pickled)
                archive.addfile(entry, io.BytesIO(pickled))
        yield file.getvalue()
        # As TorchScript's archives have them.
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name in ("constants.pkl", "data.pkl", "code/__torch__.py", "version"):
                archive.writestr(f"archive/{name}", pickled)
        yield file.getvalue()


def test_no_format_of_checkpoints_runs_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    hit = [Call(os.mkdir, str(ran)), Call(eval, f"__import__('os').mkdir({str(ran)!r})")]
    tried = 0
    for call in hit:
        for content in attacks(call, tmp_path):
            path = tmp_path / "backbone.pth"
            path.write_bytes(content)
            with refusal(str(path), "cannot be read as a checkpoint"):
                checkpoint.read(path)
            tried += 1
    assert tried == 2 * (8 + 4 * 6)
    for script, arguments in scripts(path, tmp_path):
        assert str(path) in refused(script, arguments, capfd)
    assert not ran.exists()


def scripts(path: Path, out: Path) -> list[tuple[Any, list[object]]]:
    """Every script that reads a checkpoint."""
    return [
        (evaluate, [path, "--data-root", TREES]),
        (adapt_online, [path, "--data-root", TREES]),
        (export_model, [path, out / "out.safetensors"]),
        (train_uda, ["--init", path, "--data-root", out / "data", "--out", out / "run"]),
    ]


def test_code_in_a_file_is_named(tmp_path: Path) -> None:
    torch.save({"model": Call(eval, "1")}, tmp_path / "evil.pt")
    with refusal("it calls for __builtin__.eval, which no weights need"):
        checkpoint.read(tmp_path / "evil.pt")


class Raw:
    """Pickles as a call that torch's own reader would follow, without making the result here."""

    def __init__(self, module: str, name: str, *arguments: object) -> None:
        self.parts = (module, name, arguments)

    def pickled(self) -> bytes:
        module, name, arguments = self.parts
        pickled = b"".join(
            argument.pickled() if isinstance(argument, Raw) else pickle.dumps(argument, 2)[2:-1]
            for argument in arguments
        )
        return b"c" + f"{module}\n{name}\n".encode() + b"(" + pickled + b"tR"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        Raw("builtins", "bytearray", 10**11),
        Raw("collections", "Counter", Raw("builtins", "bytearray", 2**33)),
        Raw("builtins", "set", Raw("builtins", "bytearray", 2**33)),
        Raw("torch", "FloatTensor", 2**32),
        Raw("torch.storage", "UntypedStorage", 2**40),
        Raw("_codecs", "encode", Raw("builtins", "bytearray", 2**33), "hex"),
    ],
    ids=["bytearray", "count", "set", "tensor", "storage", "encode"],
)
def test_a_file_cannot_ask_for_memory_or_hours(call: Raw, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "greedy.pt"
    pickled = b"\x80\x02" + call.pickled() + b"."
    torch.save({}, path)
    if zipped:
        path.write_bytes(
            rewritten(path, lambda n, content: pickled if n.endswith("data.pkl") else content)
        )
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        empty = pickle.dumps({}, 2)
        path.write_bytes(content.replace(empty, pickled, 1))
        assert path.read_bytes() != content
    with refusal("greedy.pt", "which no weights need"):
        checkpoint.read(path)


@pytest.mark.parametrize("target", ["data/0", "data.pkl"])
def test_an_archive_that_unpacks_to_gigabytes_is_refused(target: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"model": {"w": torch.zeros(9)}}, path)
    path.write_bytes(
        rewritten(
            path,
            lambda name, content: content + bytes(2**28 if name.endswith(target) else 0),
            compression=zipfile.ZIP_DEFLATED,
            compresslevel=1,
        )
    )
    assert path.stat().st_size < 2**21
    with refusal("it unpacks to more than its own size"):
        checkpoint.read(path)


def test_one_stretch_of_an_archive_in_many_entries_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlapping.pt"
    torch.save({"model": {"w": torch.zeros(2**18)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (weights,) = (e for e in archive.infolist() if e.filename.endswith("data/0"))
        for i in range(1, 1000):
            entry = zipfile.ZipInfo(weights.filename[:-1] + str(i))
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(entry, field, getattr(weights, field))
            archive.filelist.append(entry)
        archive._didModify = True
    with refusal("it unpacks to more than its own size"):
        checkpoint.read(path)


def test_a_flipped_bit_among_the_weights_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(content)
    with refusal("last/data/0 in it is damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numpy_numbers_of_published_checkpoints_are_read(kind: type, tmp_path: Path) -> None:
    torch.save({"best_MIou": kind(44.25 if kind != np.int64 else 44)}, tmp_path / "published.pth")
    state = checkpoint.read(tmp_path / "published.pth")
    assert state == {"best_MIou": 44.25 if kind != np.int64 else 44}
    assert type(state["best_MIou"]) in (int, float)


def test_a_numpy_number_that_lies_is_refused(tmp_path: Path) -> None:
    class Kind(Call):
        def __reduce__(self) -> tuple[object, ...]:
            # Flags that let NumPy take the eight bytes for a pointer.
            return (np.dtype, ("V8", False, True), (3, "|", None, None, None, 8, 1, 0x3D))

    scalar = np.float64(0).__reduce__()[0]
    torch.save({"best": Call(scalar, Kind(len), b"A" * 8)}, tmp_path / "odd.pt")
    with refusal("odd.pt cannot be read"):
        checkpoint.read(tmp_path / "odd.pt")


def laughs() -> list[Any]:
    """A list that takes 10^30 characters to write down."""
    content: list[Any] = ["ha"]
    for _ in range(30):
        content = [content] * 10
    return content


LIES = {
    "classes": {"classes": 10**9},
    "classes beyond labels": {"classes": 256},
    "negative classes": {"classes": -1},
    "float classes": {"classes": 19.0},
    "size": {"target_size": [10**9, 10**9]},
    "size of one side": {"target_size": [8, 2**40]},
    "no size": {"target_size": [0, 0]},
    "laughs": {"target_folder": laughs()},
    "tensor": {"classes": torch.zeros(9)},
    "nan": {"lr": float("nan")},
    "long": {"network": "x" * 10**6},
    "control": {"network": "\x1b[2J"},
    "large": {"seed": 2**200},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_settings_that_lie_are_refused(lie: dict[str, Any], tmp_path: Path) -> None:
    content = outputs.as_json(Settings(network="small")) | lie
    path = tmp_path / "odd.pt"
    checkpoint.save(path, {"settings": content, "model": {"w": torch.zeros(1)}})
    with refusal(str(path), "holds settings that this script cannot use"):
        loading.load_network(path)


def test_endless_numbers_in_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    for number in ("1" + 4000 * "0", "1" + 10**6 * "0", "1e999", "NaN"):
        for name in ("classes", "lr", "target_size"):
            path.write_bytes(
                tensors({"__metadata__": {"settings": f'{{"{name}": {number}}}'}}, b"")
            )
            with refusal(str(path)):
                loading.load_network(path)


ODD_WEIGHTS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: torch.zeros(1, dtype=torch.uint8),
    "expanded": lambda: torch.zeros(1).expand(10**6, 10**6),
    "complex": lambda: torch.zeros(1, dtype=torch.complex64),
    "meta": lambda: torch.zeros(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2)]),
    "text": lambda: "text",
    "none": lambda: None,
}


@pytest.mark.parametrize("make", ODD_WEIGHTS.values(), ids=ODD_WEIGHTS)
@pytest.mark.filterwarnings("ignore")  # of torch, that such tensors are new or old
def test_odd_weights_are_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"model": {"conv1.weight": make()}}, path)
    with refusal(str(path)):
        loading.load_network(path, classes=2, network="small")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"\x1b[2J" + "k" * 10**6 + "conv1.weight": torch.zeros(1)}, "settings": {}},
        {"model": {}, "settings": {}},
        {"model": {"model": {"model": {}}}, "settings": {}},
        {"model": [1], "settings": [1]},
        {"model": "text", "settings": "text"},
        {"settings": {}},
        {},
        [1],
        None,
    ],
    ids=["long", "empty", "deep", "lists", "texts", "without", "nothing", "list", "none"],
)
def test_odd_contents_are_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    with refusal(str(path)):
        loading.load_network(path, classes=2, network="small")


def test_every_script_refuses_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd\n\x1b[2J.pt"
    checkpoint.save(path, {"model": {"conv1.weight": torch.zeros(1).expand(10**6, 10**6)},
                           "settings": {}})  # fmt: skip
    for script, arguments in scripts(path, tmp_path):
        assert r"odd\n\x1b[2J.pt" in refused(script, arguments, capfd)
    assert os.listdir(tmp_path) == [path.name]


def test_integers_are_no_weights(tmp_path: Path) -> None:
    network = deeplab.deeplab_small(2)
    weights = network.state_dict()
    weights["conv1.weight"] = weights["conv1.weight"].to(torch.uint8)
    checkpoint.save(tmp_path / "quantised.pt", {"model": weights})
    with refusal("has conv1.weight in torch.uint8"):
        deeplab.load_weights(network, tmp_path / "quantised.pt")


@pytest.mark.parametrize("value", [laughs(), torch.zeros(9), torch.tensor(19), [19], None])
def test_an_entry_of_another_type_is_refused(value: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "odd.pt", {"classes": value})
    with refusal("odd.pt", "'classes' is of type"):
        checkpoint.load(tmp_path / "odd.pt", expect={"classes": 19})


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("model", {}), ("model", {"conv1.weight": torch.zeros(1)}), ("random", {}),
        ("random", {"python": 1, "numpy": 2, "torch": 3, "cuda": 4}), ("optimizer", []),
        ("step", "1"), ("step", 1.5),
        ("best", 1), ("source_validation", {}), ("confusion", [1]), ("seconds", "1"),
        ("log", [1]), ("training_images", 4),
    ],
)  # fmt: skip
def test_a_run_is_not_resumed_from_what_is_no_state_of_it(
    entry: str, value: Any, tmp_path: Path
) -> None:
    s = Settings(network="small", classes=2, resume=True)
    network = loading.build_network(s)
    job: Any = train_uda.Job(s, *[None] * 2, *[range(4)] * 3)  # of data sets, it reads the length
    state = train_uda.begin(job, "source-only", tmp_path, network, network.state_dict())
    state |= {"model": network.state_dict(), "random": checkpoint.random_state(), "optimizer": {}}
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    train_uda.begin(job, "source-only", tmp_path, network, None)
    checkpoint.save(path, state | {entry: value})
    with refusal(str(path)):
        train_uda.begin(job, "source-only", tmp_path, network, None)


def tensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        tensors({}, length=2**63),
        tensors({}, length=2**64 - 1),
        tensors({}, length=10**8),
        tensors({"w": entry()}, length=5),
        tensors({"w": entry()}, bytes(7)),
        tensors({"w": entry()}, bytes(9)),
        tensors({"w": entry(), "v": entry()}),
        tensors({"w": entry(), "v": entry(shape=[1], offsets=[4, 8])}),
        tensors({"w": entry(offsets=[8, 0])}),
        tensors({"w": entry(offsets=[0, 2**63])}),
        tensors({"w": entry(shape=[-2])}),
        tensors({"w": entry(shape=[2**63, 2**63])}),
        tensors({"w": entry(shape=[2**32, 2**32, 0], offsets=[0, 0])}, b""),
        tensors({"w": entry(shape=[3])}),
        tensors({"w": entry(dtype="F64")}),
        tensors({"w": entry(dtype="OBJECT")}),
        tensors({"w": 1}),
        tensors([]),
        tensors(b"[" * 10**6),
        tensors(b'{"w": ' * 10**5),
        tensors(b"\xff" * 8),
        tensors({"__metadata__": {"settings": "[" * 10**5}}, b""),
        tensors({"__metadata__": {"settings": '{"a":1,"a":2}'}}, b""),
        tensors({"__metadata__": {"settings": " " * 10**7}}, b""),
        tensors({"__metadata__": {"settings": 1}}, b""),
    ],
)
def test_safetensors_that_lie_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with refusal(str(path)):
        loading.load_network(path)


# Mutated files

HOSTILE = (
    *(number.to_bytes(4, "big") for number in (0, 1, 2**31, 2**32 - 1)),
    *(number.to_bytes(8, "little") for number in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)),
    *(text.encode() for text in (
        "-1", "1e999", "NaN", "null", "true", '"', "[", "{", ",", ":", "99999999999999999999",
        '"\\ud800"', "\x1b[2J", "\n", "../", "[" * 3000, '"a":' , "0.5",
    )),
    b"\xff", b"\0" * 64, b"\xef\xbb\xbf",
)  # fmt: skip
Edit = tuple[str, int, int, int]


def edited(parts: Sequence[bytes], edits: Sequence[Edit]) -> list[bytes]:
    """The parts of a file after some edits; numbers count parts and bytes round and round."""
    parts = [*parts]
    for kind, number, place, value in edits:
        if not parts:
            break
        number %= len(parts)
        part = bytearray(parts[number])
        place %= len(part) + 1
        hostile = HOSTILE[value % len(HOSTILE)]
        if kind == "flip" and place < len(part):
            part[place] ^= 1 << value % 8
        elif kind == "write":
            part[place : place + len(hostile)] = hostile
        elif kind == "insert":
            part[place:place] = hostile
        elif kind == "cut":
            del part[place:]
        elif kind == "splice":
            part[place:] = parts[value % len(parts)]
        parts[number] = bytes(part)
        if kind == "drop":
            del parts[number]
        elif kind == "double":
            parts.insert(value % len(parts), parts[number])
    return parts


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "write", "insert", "cut", "splice", "drop", "double"]),
        st.integers(0, 2**16), st.integers(0, 2**16), st.integers(0, 2**8),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


class Format(NamedTuple):
    """How a valid file falls into parts, how these become a file again, and what reads it."""

    name: str
    valid: Callable[[Path], Iterable[bytes]]
    parts: Callable[[bytes], Sequence[bytes]]
    whole: Callable[[Sequence[bytes]], bytes]
    read: Callable[[Path], object]
    mebibytes: int


def one(content: bytes) -> list[bytes]:
    return [content]


def chunks(content: bytes) -> list[bytes]:
    """The chunks of a PNG file, each its kind and its content."""
    found, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        found.append(content[place + 4 : place + 8 + length])
        place += 12 + length
    return found


def of_chunks(parts: Sequence[bytes]) -> bytes:
    """A PNG file whose chunks have the right length and checksum, whatever is in them."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(part[:4], part[4:]) for part in parts)


def segments(content: bytes) -> list[bytes]:
    return re.split(rb"(?=\xff[\xc0-\xfe])", content)


def lines(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


def tokens(content: bytes) -> list[bytes]:
    return re.findall(rb'"[^"]*"|[^\s"\[\]{},:]+|\s+|.', content)


def operations(content: bytes) -> list[bytes]:
    """The operations of the pickle in the archive of a checkpoint, then the entries beside it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith("data.pkl"))
    pickled = entries.pop(name)
    starts = [place for _, _, place in pickletools.genops(pickled)]
    pieces = [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    # An entry is its name, a line's end, its content.
    return [*pieces, *(b"\n".join((n.encode(), c)) for n, c in entries.items() if b"\n" not in c)]


def of_operations(parts: Sequence[bytes]) -> bytes:
    """An archive with right checksums of such a pickle and such entries."""
    file, pickled = io.BytesIO(), b""
    with zipfile.ZipFile(file, "w") as archive:
        for part in parts:
            if part.startswith(b"mutated/"):
                name, _, content = part.partition(b"\n")
                if name.decode("latin-1") not in archive.namelist():
                    archive.writestr(name.decode("latin-1"), content)
            else:
                pickled += part
        archive.writestr("mutated/data.pkl", pickled)
    return file.getvalue()


def header_and_data(content: bytes) -> list[bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return [*tokens(content[8 : 8 + length]), content[8 + length :]]


def of_header_and_data(parts: Sequence[bytes]) -> bytes:
    header = b"".join(parts[:-1])
    return struct.pack("<Q", len(header)) + header + b"".join(parts[-1:])


def pictures(_: Path) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    palette = Image.fromarray(noise[..., 0]).convert("P")
    return [
        saved(Image.fromarray(noise), "PNG", exif=exif.tobytes()),
        saved(palette, "PNG", transparency=b"\0\x80"),
        png(4, 2, bytes([0, 1, 9, 9, 9, 9] * 8), color=2, depth=16),
        png(4, 2, bytes([0, 1] * 8), depth=16, before=chunk(b"tEXt", b"a\0b")),
        png(8, 2, b"\x50\x50", depth=1, before=chunk(b"zTXt", b"k\0\0" + zlib.compress(b"text"))),
        saved(GREY, "PNG", save_all=True, append_images=[Image.new("L", (4, 2), 8)]),
    ]


def photographs(_: Path) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 9, 3), dtype=np.uint8))
    return [
        saved(noise, "JPEG", exif=exif.tobytes(), comment=b"comment"),
        saved(noise.convert("L"), "JPEG", progressive=True),
        saved(noise.convert("CMYK"), "JPEG", icc_profile=bytes(200)),
    ]


def read_picture(path: Path) -> None:
    """As an image and, if it is one, as labels too."""
    for label in (None, path):
        dataset = datasets.SegmentationDataset(
            [(path, label)], datasets.LABEL_SPACES[19], dict.fromkeys(range(256), -1),
            size=(8, 8), augment=None, seed=0, full_labels=False, normalize="published",
        )  # fmt: skip
        assert dataset[0].image.shape == (3, 8, 8)


def checkpoints(folder: Path, *, zipped: bool = True) -> Iterator[bytes]:
    """Of a run, with the first of its weights alone to be quick, and of published code."""
    s = Settings(network="small", classes=2)
    weights = loading.build_network(s).state_dict()
    of_a_run = {
        "model": dict(list(weights.items())[:6]), "settings": outputs.as_json(s),
        "step": 3, "best": {"miou": np.float64(1.5)}, "random": {"torch": torch.get_rng_state()},
    }  # fmt: skip
    published = {"state_dict": {"module.conv1.weight": torch.zeros(2, 3)}, "best": np.float64(4)}
    for content in (of_a_run, published):
        torch.save(content, folder / "mutated", _use_new_zipfile_serialization=zipped)
        yield (folder / "mutated").read_bytes()


def exported(folder: Path) -> Iterator[bytes]:
    s = Settings(network="small", classes=2)
    checkpoint.export(folder / "valid", loading.build_network(s).state_dict(), outputs.as_json(s))
    yield (folder / "valid").read_bytes()


def noted_settings(_: Path) -> list[bytes]:
    return [json.dumps(outputs.as_json(Settings())).encode()]


def read_label_map(path: Path) -> None:
    datasets.open_dataset("folder", path.parent, "train", classes=2)


def read_settings(path: Path) -> None:
    outputs.run_folder(Settings(out=path.parent, resume=True))


def read_scenes(path: Path) -> None:
    scenes.check(path.parent, seed=0, train=1, val=1, size=(8, 8), source_size=(8, 8))


def read_list(path: Path) -> None:
    datasets.open_dataset("gta5", path.parents[1], "train", labels=False)


PICTURE, OTHER = LARGEST_PICTURE_MEBIBYTES, MEBIBYTES
FORMATS = {
    "png": Format("a.png", pictures, chunks, of_chunks, read_picture, PICTURE),
    "png bytes": Format("a.png", pictures, one, b"".join, read_picture, PICTURE),
    "jpeg": Format("a.jpg", photographs, segments, b"".join, read_picture, PICTURE),
    "pickle": Format("a.pt", checkpoints, operations, of_operations, loading.load_network, OTHER),
    "zip bytes": Format("a.pt", checkpoints, one, b"".join, loading.load_network, OTHER),
    "legacy bytes": Format("a.pth", partial(checkpoints, zipped=False), one, b"".join,
                           loading.load_network, OTHER),
    "safetensors": Format("a.safetensors", exported, header_and_data, of_header_and_data,
                          loading.load_network, OTHER),
    "safetensors bytes": Format("a.safetensors", exported, one, b"".join,
                                loading.load_network, OTHER),
    "label map": Format("label_map.json", lambda _: [b'{"9": "road", "3": "lake", "0": null}'],
                        tokens, b"".join, read_label_map, OTHER),
    "settings": Format("settings.json", noted_settings, tokens, b"".join, read_settings, OTHER),
    "scenes": Format("scenes.json", lambda _: [b'{"grammar": 1, "seed": 0, "size": [8, 8]}'],
                     tokens, b"".join, read_scenes, OTHER),
    "list": Format("list/train.txt", lambda _: [b"00001\n2\n\r\na b\n"], lines,
                   b"".join, read_list, OTHER),
}  # fmt: skip


# Of pictures that it reads, or that we refuse.
PILLOW_WARNS = ("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def search(kind: str, examples: int, folder: Path) -> None:
    """Read so many mutations of the valid files of a format."""
    how = FORMATS[kind]
    path = folder / how.name
    path.parent.mkdir(exist_ok=True)
    (folder / "images" / "00001.png").write_bytes(saved(GREY, "PNG"))
    (folder / "images" / "00002.png").write_bytes(saved(GREY, "PNG"))
    valid = [how.parts(content) for content in how.valid(folder)]
    for parts in valid:
        path.write_bytes(how.whole(parts))
        with suppress(UserError):  # of what is valid, but no network of ours
            how.read(path)

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from(valid), EDITS)
    def check(parts: Sequence[bytes], edits: Sequence[Edit]) -> None:
        path.write_bytes(how.whole(edited(parts, edits)))
        with quick():
            try:
                how.read(path)
            except UserError as error:
                assert str(error).isprintable()

    with bounded(how.mebibytes):
        check()


@pytest.mark.filterwarnings(*PILLOW_WARNS)
@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_files_are_read_or_refused(kind: str, folder: Path) -> None:
    search(kind, 40, folder)


@pytest.mark.stress
@pytest.mark.filterwarnings(*PILLOW_WARNS)
@pytest.mark.parametrize("kind", FORMATS)
def test_many_mutated_files_are_read_or_refused(
    kind: str, folder: Path, stress_budget: Callable[[float], float]
) -> None:
    search(kind, int(stress_budget(600)), folder)
