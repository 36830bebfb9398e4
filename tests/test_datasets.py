"""The loaders read the published layouts as the published loaders do, and refuse what is broken."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    loader = DataLoader(
        dataset, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
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
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    dataset = datasets.open_dataset("gta5", trees / "GTA5", "train", size=SIZE)
    with pytest.raises(UserError, match=r"cannot be read \(Image size") as refusal:
        dataset[0]
    assert str(path) in str(refusal.value)


def test_list_file_that_is_no_text_is_named(trees: Path) -> None:
    (trees / "GTA5" / "list" / "train.txt").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(UserError, match=r"list/train\.txt cannot be read"):
        datasets.open_dataset("gta5", trees / "GTA5", "train")


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
    """A generic data set: one picture whose left half is id 3 and whose right half is id 9."""
    root = tmp_path / "folder"
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    ids = np.full((8, 16), 9, dtype=np.uint8)
    ids[:, :8] = 3
    Image.fromarray(ids).convert("RGB").save(root / "images" / "train" / "a.jpg")
    Image.fromarray(ids).save(root / "labels" / "train" / "a.png")
    (root / "label_map.json").write_text(json.dumps({"9": "road", "3": "lake", "0": None}))
    return root


def test_folder_numbers_classes_in_the_order_of_its_map(folder: Path) -> None:
    dataset = datasets.open_dataset("folder", folder, "train", classes=2)
    assert dataset.space.names == ("road", "lake")
    assert dataset.space.colors[0] == datasets.LABEL_SPACES[19].colors[0]
    assert (dataset[0].labels[:, :8] == 1).all()
    assert (dataset[0].labels[:, 8:] == 0).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not a JSON object"),
        ("[1]", r"not a JSON object"),
        ('{"road": "7"}', r"not a JSON object"),
        ('{"300": "road", "1": "lake"}', r"ids from 0 to 255"),
        ('{"7": "road"}', r"names 1 classes, but 2"),
    ],
)
def test_broken_label_map_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "label_map.json").write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        datasets.open_dataset("folder", folder, "train", classes=2)
    assert "label_map.json" in str(refusal.value)


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
    assert report.odd_sizes == [(image, (52, 96), (26, 48))]
    assert report.usable
