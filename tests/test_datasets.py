"""The loaders read the published layouts as the published loaders do, and refuse what is broken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import chunk, folder_of_one_picture, png, saved
from PIL import Image
from torch.utils.data import DataLoader

from uda import datasets
from uda.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
TREES = FIXTURES / "trees"
SIZE = (32, 64)

PUBLISHED = [
    ("cityscapes_val", "cityscapes", "Cityscapes", "val", 19),
    ("cityscapes_val_16", "cityscapes", "Cityscapes", "val", 16),
    ("cityscapes_val_13", "cityscapes", "Cityscapes", "val", 13),
    ("gta5_train", "gta5", "GTA5", "train", 19),
    ("nthu_val_13", "cross-city", "NTHU/Rome", "val", 13),
    ("synthia_train", "synthia", "SYNTHIA", "train", 19),
    ("synthia_train_16", "synthia", "SYNTHIA", "train", 16),
]


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TREES, tmp_path / "trees"))


@pytest.mark.parametrize(("key", "kind", "root", "split", "classes"), PUBLISHED)
def test_samples_equal_the_published_loaders(
    key: str, kind: datasets.Kind, root: str, split: str, classes: int
) -> None:
    published = np.load(FIXTURES / "data.npz")
    dataset = datasets.open_dataset(kind, TREES / root, split, classes=classes, size=SIZE)
    assert len(dataset) == sum(name.startswith(f"{key}/") for name in published if "label" in name)
    for index, sample in enumerate(dataset[i] for i in range(len(dataset))):
        assert sample.image.dtype == torch.float32
        assert sample.labels.dtype == torch.int64
        np.testing.assert_array_equal(sample.labels, published[f"{key}/{index}/label"])
        if not key.startswith("synthia"):
            np.testing.assert_array_equal(sample.image, published[f"{key}/{index}/image"])


@pytest.mark.parametrize("classes", [19, 16, 13])
def test_label_space_keeps_the_cityscapes_order(classes: int) -> None:
    space = datasets.LABEL_SPACES[classes]
    full = datasets.LABEL_SPACES[19]
    assert len(space) == len(space.names) == len(space.colors) == classes
    assert space.names == tuple(full.names[train_id] for train_id in space.train_ids)
    assert list(space.train_ids) == sorted(space.train_ids)
    dropped = {19: set(), 16: {"terrain", "truck", "train"}}
    dropped[13] = dropped[16] | {"wall", "fence", "pole"}
    assert set(full.names) - set(space.names) == dropped[classes]


def test_without_labels_no_label_file_is_opened(trees: Path) -> None:
    shutil.rmtree(trees / "Cityscapes" / "gtFine")
    dataset = datasets.open_dataset(
        "cityscapes", trees / "Cityscapes", "train", size=SIZE, labels=False
    )
    assert [label for _, label in dataset.pairs] == [None]
    assert (dataset[0].labels == -1).all()


def test_full_labels_keep_the_size_of_their_file() -> None:
    root = TREES / "Cityscapes"
    dataset = datasets.open_dataset("cityscapes", root, "val", size=SIZE, full_labels=True)
    assert dataset[0].image.shape == (3, *SIZE)
    assert dataset[0].labels.shape == (48, 96)
    own = datasets.open_dataset("cityscapes", root, "val")[0]
    assert own.image.shape == (3, 48, 96)
    assert torch.equal(own.labels, dataset[0].labels)


@pytest.mark.parametrize("normalize", ["published", "imagenet"])
def test_to_rgb_undoes_the_normalization(normalize: datasets.Normalization) -> None:
    dataset = datasets.open_dataset("gta5", TREES / "GTA5", "train", normalize=normalize)
    with Image.open(dataset.pairs[0][0]) as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(datasets.to_rgb(dataset[0].image, normalize), expected)


def test_flip_mirrors_image_and_labels_together() -> None:
    plain = datasets.open_dataset("gta5", TREES / "GTA5", "train", size=SIZE)[0]
    dataset = datasets.open_dataset("gta5", TREES / "GTA5", "train", size=SIZE, augment="flip")
    flips = 0
    for epoch in range(40):
        dataset.set_epoch(epoch)
        sample = dataset[0]
        flipped = torch.equal(sample.labels, plain.labels.flip(-1))
        assert flipped or torch.equal(sample.labels, plain.labels)
        assert torch.equal(sample.image, plain.image.flip(-1) if flipped else plain.image)
        flips += flipped
    assert 8 <= flips <= 32


def test_published_augmentation_also_blurs_and_never_the_labels() -> None:
    plain = datasets.open_dataset("gta5", TREES / "GTA5", "train", size=SIZE)[0]
    dataset = datasets.open_dataset("gta5", TREES / "GTA5", "train", size=SIZE, augment="published")
    blurred = 0
    for epoch in range(40):
        dataset.set_epoch(epoch)
        image, labels, _ = dataset[0]
        if torch.equal(labels, plain.labels.flip(-1)):
            image, labels = image.flip(-1), labels.flip(-1)
        assert torch.equal(labels, plain.labels)
        if not torch.equal(image, plain.image):
            blurred += 1
            assert image.std() < plain.image.std()
    assert 8 <= blurred <= 32


def test_augmentation_depends_on_seed_epoch_and_index_only() -> None:
    def images(seed: int, epoch: int, order: tuple[int, ...] = (0, 1)) -> torch.Tensor:
        dataset = datasets.open_dataset(
            "gta5", TREES / "GTA5", "train", size=SIZE, augment="published", seed=seed
        )
        dataset.set_epoch(epoch)
        drawn = {index: dataset[index].image for index in order}
        return torch.stack([drawn[0], drawn[1]])

    before = torch.random.get_rng_state()
    assert torch.equal(images(0, 3), images(0, 3, order=(1, 0)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert any(not torch.equal(images(0, epoch), images(0, 0)) for epoch in range(1, 5))
    assert any(not torch.equal(images(seed, 0), images(0, 0)) for seed in range(1, 5))


def test_workers_that_outlive_an_epoch_see_the_next_one() -> None:
    dataset = datasets.open_dataset("gta5", TREES / "GTA5", "train", size=SIZE, augment="published")
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for index, sample in enumerate(loader):
            assert torch.equal(sample.image[0], dataset[index].image)
            assert tuple(sample.name) == (dataset[index].name,)


def test_list_files_choose_images_and_spare_leading_zeros(trees: Path) -> None:
    root = trees / "GTA5"
    assert [sample.name for sample in datasets.open_dataset("gta5", root, "val")] == ["00002"]
    (root / "list" / "train.txt").write_text("2\n")
    assert [sample.name for sample in datasets.open_dataset("gta5", root, "train")] == ["00002"]
    shutil.rmtree(root / "list")
    assert len(datasets.open_dataset("gta5", root, "train")) == 2
    with pytest.raises(UserError, match=r"list/val\.txt"):
        datasets.open_dataset("gta5", root, "val")


@pytest.mark.parametrize(
    ("kind", "root", "list_file"),
    [
        ("gta5", "GTA5", "GTA5/list/train.txt"),
        ("synthia", "SYNTHIA", "SYNTHIA/list/train.txt"),
        ("cityscapes", "Cityscapes", "city_list/train.txt"),
        ("cross-city", "NTHU/Rome", "NTHU/Rome/List/train.txt"),
    ],
)
def test_listed_image_that_is_absent_is_named(
    trees: Path, kind: datasets.Kind, root: str, list_file: str
) -> None:
    (trees / list_file).write_text("train_aachen_000000_000123")
    with pytest.raises(UserError, match=r"aachen_000000_000123.*does not exist") as refusal:
        datasets.open_dataset(kind, trees / root, "train", labels=False)
    assert str(trees / list_file) in str(refusal.value)


def test_image_and_labels_of_two_sizes_become_one(trees: Path) -> None:
    path = trees / "GTA5" / "labels" / "00001.png"
    with Image.open(path) as labels:
        labels.resize((48, 26), Image.Resampling.NEAREST).save(path)
    sample = datasets.open_dataset("gta5", trees / "GTA5", "train", size=SIZE)[0]
    assert sample.image.shape[1:] == sample.labels.shape == SIZE


def test_labels_are_resized_by_pillows_nearest(trees: Path) -> None:
    path = trees / "GTA5" / "labels" / "00001.png"
    classes = torch.arange(2048).expand(1024, -1) % 19
    ids = np.array([row[1] for row in datasets.CITYSCAPES_CLASSES], dtype=np.uint8)[classes]
    Image.fromarray(ids).save(path)
    labels = datasets.open_dataset("gta5", trees / "GTA5", "train", size=(640, 1280))[0].labels
    pillow = Image.fromarray(classes.byte().numpy()).resize((1280, 640), Image.Resampling.NEAREST)
    assert np.array_equal(labels, pillow)
    # torch has another rule where a pixel's centre lies between two of the file's.
    torchs = F.interpolate(classes[None, None].float(), (640, 1280), mode="nearest-exact")[0, 0]
    assert (labels != torchs).float().mean() > 0.05


def test_licence_plate_is_not_counted(trees: Path) -> None:
    path = trees / "GTA5" / "labels" / "00001.png"
    Image.fromarray(np.full((52, 96), 34, dtype=np.uint8)).save(path)
    assert (datasets.open_dataset("gta5", trees / "GTA5", "train")[0].labels == -1).all()


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.9])
def test_truncated_file_is_named(trees: Path, part: str, kept: float) -> None:
    path = trees / "GTA5" / part / "00001.png"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    dataset = datasets.open_dataset("gta5", trees / "GTA5", "train", size=SIZE)
    with pytest.raises(UserError, match=r"cannot be read") as refusal:
        dataset[0]
    assert str(path) in str(refusal.value)
    assert dataset[1].name == "00002"


@pytest.mark.parametrize("part", ["images", "labels"])
def test_file_whose_header_claims_a_huge_picture_is_named(trees: Path, part: str) -> None:
    path = trees / "GTA5" / part / "00001.png"
    path.write_bytes(saved(Image.new("1", (13_500, 13_500)), "PNG"))
    dataset = datasets.open_dataset("gta5", trees / "GTA5", "train", size=SIZE)
    with pytest.raises(UserError, match=r"cannot be read \(Image size") as refusal:
        dataset[0]
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xef\xbb\xbf00001\r\n\r\n00002", None),  # as Windows writes it
        (b"00001\n 2 \n", None),
        (b"x" * 300, "does not exist"),
        ("00001\n".encode("utf-16"), r"list/train\.txt cannot be read"),
    ],
    ids=["windows", "spaces", "long", "utf-16"],
)
def test_list_files_name_images_or_are_named(content: bytes, told: str | None, trees: Path) -> None:
    (trees / "GTA5" / "list" / "train.txt").write_bytes(content)
    if told is None:
        assert len(datasets.open_dataset("gta5", trees / "GTA5", "train")) == 2
    else:
        with pytest.raises(UserError, match=told):
            datasets.open_dataset("gta5", trees / "GTA5", "train")


def test_a_listed_name_may_hold_spaces(trees: Path) -> None:
    for part in ("images", "labels"):
        (trees / "GTA5" / part / "00001.png").rename(trees / "GTA5" / part / "a long name.png")
    (trees / "GTA5" / "list" / "train.txt").write_text("a long name\n2\n")
    dataset = datasets.open_dataset("gta5", trees / "GTA5", "train")
    assert [sample.name for sample in dataset] == ["a long name", "00002"]


@pytest.mark.parametrize(
    ("kind", "root", "label", "unknown"),
    [
        ("gta5", "GTA5", "labels/00001.png", 77),
        ("synthia", "SYNTHIA", "GT/LABELS/0000000.png", 23),
        (
            "cityscapes",
            "Cityscapes",
            "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
            100,
        ),
    ],
)
def test_unknown_label_id_is_named(
    trees: Path, kind: datasets.Kind, root: str, label: str, unknown: int
) -> None:
    path = trees / root / label
    Image.fromarray(np.full((50, 96), unknown, dtype=np.uint8)).save(path)
    dataset = datasets.open_dataset(kind, trees / root, "train")
    with pytest.raises(UserError, match=f"label id {unknown}") as refusal:
        dataset[0]
    assert str(path) in str(refusal.value)


def test_image_without_label_is_refused_or_listed(trees: Path) -> None:
    label = trees / "GTA5" / "labels" / "00002.png"
    label.unlink()
    with pytest.raises(UserError, match=r"1 of 2 images have no label") as refusal:
        datasets.open_dataset("gta5", trees / "GTA5", "train")
    assert str(label) in str(refusal.value)
    dataset = datasets.open_dataset("gta5", trees / "GTA5", "train", allow_missing=True)
    with pytest.raises(UserError, match=r"00002\.png does not exist"):
        dataset[1]


def test_split_without_published_labels_says_so() -> None:
    with pytest.raises(UserError, match=r"published without labels"):
        datasets.open_dataset("cross-city", TREES / "NTHU" / "Rome", "train", classes=13)
    unlabelled = datasets.open_dataset(
        "cross-city", TREES / "NTHU" / "Rome", "train", classes=13, labels=False
    )
    assert [sample.name for sample in unlabelled] == ["pano_1"]


@pytest.mark.parametrize(
    ("kind", "root", "split", "options", "message"),
    [
        ("gta5", "nowhere", "train", {}, r"nowhere does not exist: check --data-root"),
        ("gta5", "SYNTHIA", "train", {}, r"images.*does not exist"),
        (
            "cityscapes",
            "Cityscapes",
            "test",
            {},
            r"leftImg8bit/test does not exist: .* split 'test'",
        ),
        ("cross-city", "NTHU/Rome", "dusk", {}, r"'dusk'"),
        ("kitti", "GTA5", "train", {}, r"kind 'kitti': choose one of gta5"),
        ("gta5", "GTA5", "train", {"classes": 20}, r"20 classes: choose 19, 16 or 13"),
        ("gta5", "GTA5", "train", {"augment": "mixup"}, r"augmentation 'mixup'"),
    ],
)
def test_wrong_request_is_one_clear_sentence(
    trees: Path, kind: str, root: str, split: str, options: dict[str, object], message: str
) -> None:
    (trees / "GTA5" / "list" / "train.txt").write_text("1\n")
    if root == "SYNTHIA":
        shutil.rmtree(trees / root / "list")
    with pytest.raises(UserError, match=message) as refusal:
        datasets.open_dataset(kind, trees / root, split, **options)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_folder_without_images_is_refused(trees: Path) -> None:
    (trees / "city_list" / "val.txt").unlink()
    for image in (trees / "Cityscapes" / "leftImg8bit" / "val").rglob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"no image of split 'val' in the cityscapes layout"):
        datasets.open_dataset("cityscapes", trees / "Cityscapes", "val")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of_one_picture(tmp_path / "folder")


def read(folder: Path, classes: int = 2) -> datasets.Sample:
    """The only sample of the data set in a folder."""
    (sample,) = datasets.open_dataset("folder", folder, "train", classes=classes)
    return sample


def test_folder_numbers_classes_in_the_order_of_its_map(folder: Path) -> None:
    dataset = datasets.open_dataset("folder", folder, "train", classes=2)
    assert dataset.space.names == ("road", "lake")
    assert dataset.space.colors[0] == datasets.LABEL_SPACES[19].colors[0]
    assert (dataset[0].labels == torch.tensor([1, 1, 0, 0])).all()


def test_a_label_map_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    path = folder / "label_map.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not a JSON object"),
        ("[1]", r"not a JSON object"),
        ("3", r"not a JSON object"),
        ('{"road": "7"}', r"not a JSON object"),
        ('{"2.5": "road", "7": "lake"}', r"not a JSON object"),
        ('{"300": "road", "1": "lake"}', r"ids from 0 to 255"),
        ('{"-1": "road", "1": "lake"}', r"ids from 0 to 255"),
        ('{"9": "road", "1": 2}', r"class names"),
        ('{"9": "road", "1": ["lake"]}', r"class names"),
        ('{"9": "road", "1": ""}', r"class names"),
        ('{"9": "road", "1": "\\u001b[2J"}', r"class names"),
        ('{"9": "road", "3": "lake", "9": "lake"}', r"two entries for one label id"),
        ('{"9": "road", "3": "lake", "09": "lake"}', r"two entries for one label id"),
        ('{"7": "road"}', r"names 1 classes, but 2"),
        (json.dumps({str(i): str(i) for i in range(256)}), r"more than 255"),
    ],
)
def test_broken_label_map_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "label_map.json").write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        datasets.open_dataset("folder", folder, "train", classes=2)
    assert "label_map.json" in str(refusal.value)


PALETTE = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))


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
        (png(4, 2, bytes([1] * 8), color=3, before=PALETTE + chunk(b"tRNS", b"\0\x80")),
         (40, 50, 60)),
        (saved(Image.new("CMYK", (4, 2), (0, 0, 0, 255)), "JPEG"), (0, 0, 0)),
    ],
    ids=["grey", "1-bit", "grey-alpha", "rgb", "rgb-alpha", "rgb-16", "palette", "palette-alpha",
         "cmyk"],
)  # fmt: skip
def test_images_of_every_mode_become_rgb(
    content: bytes, wanted: tuple[int, ...], folder: Path
) -> None:
    (folder / "images" / "train" / "a.png").write_bytes(content)
    dataset = datasets.open_dataset("folder", folder, "train", classes=2, labels=False)
    rgb = datasets.to_rgb(dataset[0].image)
    assert (rgb == torch.tensor(wanted).view(3, 1, 1)).all()


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
    ("part", "content", "told"),
    [
        ("images", png(4, 2, bytes([1, 0] * 8), depth=16), "16 bits"),
        ("labels", png(4, 2, bytes([1, 3] * 8), depth=16), "above 255"),
        ("labels", png(4, 2, bytes([3, 9, 9] * 8), color=2), "it is a picture"),
        ("labels", png(4, 2, bytes([3, 0] * 8), color=4), "it is a picture"),
        ("labels", png(4, 2, bytes([3, 255] * 4)), "label id 255"),
        ("labels", saved(Image.new("L", (4, 2), 3), "JPEG"), "it is no PNG file"),  # lossy
    ],
    ids=["grey-16", "large", "rgb", "grey-alpha", "unknown", "jpeg"],
)
def test_pictures_with_other_values_are_refused(
    part: str, content: bytes, told: str, folder: Path
) -> None:
    path = folder / part / "train" / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as refusal:
        read(folder)
    assert str(path) in str(refusal.value)


def test_an_image_is_turned_upright_and_its_labels_must_be_so_too(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    # Stored as 2 x 4 pixels, black above white: upright, white is left of black.
    stored = Image.fromarray(np.repeat(np.uint8([[0], [0], [255], [255]]), 2, axis=1))
    path = folder / "images" / "train" / "a.png"
    path.write_bytes(saved(stored, "PNG", exif=exif.tobytes()))
    sample = read(folder)
    assert sample.image.shape[1:] == sample.labels.shape == (2, 4)
    assert (sample.image[:, :, :2] > sample.image[:, :, 2:]).all()
    (folder / "labels" / "train" / "a.png").write_bytes(png(2, 4, bytes([3] * 8)))
    with pytest.raises(UserError, match="across each other"):
        read(folder)
    report = datasets.check_data(datasets.open_dataset("folder", folder, "train", classes=2))
    assert len(report.unreadable) == 1 and not report.usable


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


def test_a_link_in_a_circle_is_named(folder: Path) -> None:
    link = folder / "images" / "train" / "again"
    link.symlink_to(folder / "images", target_is_directory=True)
    with pytest.raises(UserError, match="are one folder") as refusal:
        read(folder)
    assert str(link) in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["images/train/a.png", "labels/train/a.png", "label_map.json", "GTA5/list/train.txt"]
)
def test_a_link_to_nothing_is_named(name: str, folder: Path) -> None:
    shutil.copytree(TREES / "GTA5", folder / "GTA5")
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    with pytest.raises(UserError) as refusal:
        read(folder)
        datasets.open_dataset("gta5", folder / "GTA5", "train")
    assert str(folder / name) in str(refusal.value)


def test_a_folder_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = folder / "images" / "train" / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read everything
        if path == str(closed):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\)"):
        read(folder)


def test_hidden_files_and_folders_of_any_name_are_no_images(folder: Path) -> None:
    images = folder / "images" / "train"
    (images / "._a.png").write_bytes(b"\0\5\x16\7")  # macOS, beside a.png
    (images / ".ipynb_checkpoints").mkdir()
    shutil.copy(images / "a.png", images / ".ipynb_checkpoints" / "a-checkpoint.png")
    (images / "x.png").mkdir()
    read(folder)


def test_folder_without_label_map_serves_as_target(folder: Path) -> None:
    (folder / "label_map.json").unlink()
    with pytest.raises(UserError, match=r"label_map\.json does not exist"):
        datasets.open_dataset("folder", folder, "train")
    target = datasets.open_dataset("folder", folder, "train", labels=False)
    assert target.space == datasets.LABEL_SPACES[19]
    assert (target[0].labels == -1).all()


def test_check_data_reports_what_is_there(trees: Path) -> None:
    root = trees / "GTA5"
    shutil.copy(root / "images" / "00001.png", root / "images" / "00003.png")
    shutil.copy(root / "images" / "00001.png", root / "images" / "00004.png")
    (root / "images" / "00005.png").write_bytes(b"no picture")
    with Image.open(root / "labels" / "00002.png") as labels:
        labels.resize((48, 26), Image.Resampling.NEAREST).save(root / "labels" / "00002.png")
    for number, share in (("00001", 48), ("00004", 12)):
        ids = np.full((52, 96), 7, dtype=np.uint8)
        ids[:, :share] = 26
        ids[:2] = 0
        Image.fromarray(ids).save(root / "labels" / f"{number}.png")
    (root / "labels" / "00002.png").rename(root / "labels" / "odd.png")
    shutil.copy(root / "images" / "00002.png", root / "images" / "odd.png")
    (root / "list" / "train.txt").write_text("00001\n00002\n00003\n00004\n00005\n")
    calls: list[tuple[int, int]] = []
    dataset = datasets.open_dataset("gta5", root, "train", allow_missing=True)
    report = datasets.check_data(dataset, lambda done, total: calls.append((done, total)))
    assert calls == [(done, 5) for done in range(1, 6)]
    assert report.images == 5
    assert [path.name for path in report.missing] == ["00002.png", "00003.png"]
    assert len(report.unreadable) == 1
    assert "00005.png" in report.unreadable[0]
    assert report.sizes == {(52, 96): 4}
    assert report.frequencies["car"] == pytest.approx((48 + 12) / (2 * 96))
    assert report.frequencies["road"] == pytest.approx(1 - report.frequencies["car"])
    assert report.pixels[-1] == 2 * 2 * 96
    assert not report.usable


def test_check_data_lists_labels_of_another_size(trees: Path) -> None:
    path = trees / "GTA5" / "labels" / "00002.png"
    with Image.open(path) as labels:
        labels.resize((48, 26), Image.Resampling.NEAREST).save(path)
    report = datasets.check_data(datasets.open_dataset("gta5", trees / "GTA5", "train"))
    image = trees / "GTA5" / "images" / "00002.png"
    assert report.odd_sizes == [image]
    assert report.usable
