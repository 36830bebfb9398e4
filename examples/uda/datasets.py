"""Street-scene data sets in their published folder layouts, read into training samples.

Every data set becomes the same three things: pairs of an image file and a label file, a table from
the ids in the label files to the classes of a label space, and a few joint transforms.

Layouts (`kind`, then what lies under `root`):

    gta5        images/00001.png, labels/00001.png (palette index = Cityscapes id)
    synthia     RGB/0000000.png, GT/LABELS/0000000.png (16 bit, SYNTHIA id in the red channel)
    cityscapes  leftImg8bit/{split}/{city}/*_leftImg8bit.png,
                gtFine/{split}/{city}/*_gtFine_labelIds.png
    cross-city  Images/Train, Images/Test, Labels/Test/*_eval.png (root is the city's folder)
    folder      images/[{split}/], labels/[{split}/] with the same names, and label_map.json:
                {"7": "road", "8": "sidewalk", "0": null}, from id to class name or ignored;
                the classes are numbered in the order in which the map names them; a target may
                have no labels/ at all

A list file restricts a split to the names in it, one a line: list/{split}.txt (gta5, synthia),
List/{train,test}.txt (cross-city), or city_list/{split}.txt beside the Cityscapes folder.

Images are PNG or JPEG files. They are turned upright as their EXIF data say, and transparency is
dropped. Labels are PNG files that hold ids as grey values, as palette indices, or in the red
channel of 16-bit colours. Linked files and folders are read like others, hidden ones are not.
"""

from __future__ import annotations

import colorsys
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as transforms

from uda.errors import UserError

Kind = Literal["gta5", "synthia", "cityscapes", "cross-city", "folder"]
Augmentation = Literal["flip", "published"]
Normalization = Literal["published", "imagenet"]
Pair = tuple[Path, "Path | None"]
Progress = Callable[[int, int], None]

PUBLISHED_MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
IMAGENET_STD_RGB = (0.229, 0.224, 0.225)

# "Not counted" in the 8-bit label images between file and sample; a sample has -1.
_IGNORED = 255
MOST_CLASSES = 255  # the other values of 8 bits
_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


@dataclass(frozen=True)
class LabelSpace:
    """The classes that a model tells apart, in the order of its outputs.

    Args:
        names: name of each class.
        colors: red, green, blue (0 to 255) of each class in pictures.
        train_ids: the 19-class Cityscapes train id of each class.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    train_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)


# In the order of their train ids: name, id in Cityscapes label files, colour in pictures.
CITYSCAPES_CLASSES: tuple[tuple[str, int, tuple[int, int, int]], ...] = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)


def _cityscapes_space(train_ids: Sequence[int]) -> LabelSpace:
    rows = [CITYSCAPES_CLASSES[train_id] for train_id in train_ids]
    return LabelSpace(tuple(row[0] for row in rows), tuple(row[2] for row in rows), (*train_ids,))


LABEL_SPACES: Mapping[int, LabelSpace] = {
    19: _cityscapes_space(range(19)),
    # What SYNTHIA shares with Cityscapes, and the subset without wall, fence and pole.
    16: _cityscapes_space((0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)),
    13: _cityscapes_space((0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)),
}

# From the ids in a label file to the 19 train ids; -1 is a known id that is not counted.
# 34 (GTA5) and 255 (8-bit form of -1) are the licence plate.
_CITYSCAPES_IDS: Mapping[int, int] = {
    **dict.fromkeys((*range(35), 255), -1),
    **{row[1]: train_id for train_id, row in enumerate(CITYSCAPES_CLASSES)},
}
_SYNTHIA_IDS: Mapping[int, int] = {
    **dict.fromkeys(range(23), -1),
    **{1: 10, 2: 2, 3: 0, 4: 1, 5: 4, 6: 8, 7: 5, 8: 13, 9: 7, 10: 11, 11: 18, 12: 17},
    **{15: 6, 16: 9, 17: 12, 18: 14, 19: 15, 20: 16, 21: 3},
}


class Sample(NamedTuple):
    """One image with its labels.

    `image` is (3, H, W) float32; `labels` is (H, W) int64 with -1 = not counted; `name` is the
    image file's name without its suffix.
    """

    image: torch.Tensor
    labels: torch.Tensor
    name: str


@dataclass(eq=False)
class SegmentationDataset(Dataset[Sample]):
    """Image and label files as samples; `open_dataset` makes one from a folder.

    The augmentation of a sample depends only on (seed, epoch, index), so that a resumed run sees
    the same data as an uninterrupted one, in any number of worker processes.
    """

    pairs: list[Pair]
    space: LabelSpace
    ids: Mapping[int, int]
    size: tuple[int, int] | None = None
    augment: Augmentation | None = None
    seed: int = 0
    full_labels: bool = False
    normalize: Normalization = "published"

    def __post_init__(self) -> None:
        self._transform = _augmentation(self.augment) if self.augment else None
        # In shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from the next sample on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        image_path, label_path = self.pairs[index]
        picture = _read_image(image_path)
        own_width, own_height = picture.size
        height, width = self.size or (own_height, own_width)
        # PIL to PIL: the published numbers come from Pillow's resampling of 8-bit images.
        picture = transforms.resize(picture, [height, width], InterpolationMode.BICUBIC)
        if label_path is None:
            classes = np.full((height, width), _IGNORED, dtype=np.uint8)
        else:
            classes = self.read_labels(label_path)
            _refuse_sideways(self.pairs[index], (own_height, own_width), classes.shape)
            if not self.full_labels:
                resized = transforms.resize(
                    Image.fromarray(classes), [height, width], InterpolationMode.NEAREST
                )
                classes = np.asarray(resized)
        image: torch.Tensor = tv_tensors.Image(transforms.pil_to_tensor(picture))
        labels: torch.Tensor = tv_tensors.Mask(torch.from_numpy(classes.astype(np.int64)))
        if self._transform is not None:
            key = np.random.SeedSequence([self.seed, int(self._epoch), index])
            # Not torch.manual_seed: it would also reset the accelerators' generators.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(key.generate_state(1, np.uint64)[0]))
                image, labels = self._transform(image, labels)
        labels = labels.as_subclass(torch.Tensor)
        return Sample(
            _normalized(image.as_subclass(torch.Tensor), self.normalize),
            labels.masked_fill(labels == _IGNORED, -1),
            image_path.stem,
        )

    def read_labels(self, path: Path) -> np.ndarray:
        """The label file at its own size as uint8 classes of the space, 255 = not counted."""
        table = np.full(257, -1, dtype=np.int16)
        classes = {train_id: c for c, train_id in enumerate(self.space.train_ids)}
        for file_id, train_id in self.ids.items():
            table[file_id] = classes.get(train_id, _IGNORED)
        file_ids = np.minimum(_read_ids(path).astype(np.uint16), 256)
        found = table[file_ids]
        if (found < 0).any():
            unknown = sorted(set(file_ids[found < 0].tolist()))
            raise UserError(
                f"{path} holds label id {unknown[0] if unknown[0] < 256 else 'above 255'}, which "
                "the label table of its data set does not know: check that --data-root has the "
                "published label files (for cityscapes: *_labelIds.png)."
            )
        return found.astype(np.uint8)


def open_dataset(
    kind: Kind,
    root: str | Path,
    split: str,
    *,
    classes: int = 19,
    size: tuple[int, int] | None = None,
    augment: Augmentation | None = None,
    labels: bool = True,
    seed: int = 0,
    full_labels: bool = False,
    normalize: Normalization = "published",
    allow_missing: bool = False,
) -> SegmentationDataset:
    """List the files of a data set, which become samples when they are indexed.

    Args:
        kind: layout of the files, see this module's text.
        root: folder of the data set.
        split: "train", "val", ... as the layout calls it; cross-city has "train" and "test",
            and "val" means "test".
        classes: 19, 16 or 13 Cityscapes classes; for `folder` with a label map, the number of
            classes that the map names.
        size: (height, width) of image and labels; None keeps the image's own size.
        augment: None; "flip" mirrors half of the samples; "published" also blurs half of them,
            with a Gaussian of radius 0 to 1 pixel.
        labels: False never opens a label file and gives every pixel -1.
        seed: of the augmentations.
        full_labels: keep the labels at the size of their file, for evaluation at full resolution.
        normalize: "published" is BGR minus the published mean; "imagenet" is RGB as torchvision's
            ImageNet weights expect it.
        allow_missing: list images whose label file is missing instead of refusing them, for
            `check_data`.

    Raises:
        UserError: a folder, a listed image or a label is missing, or there is no image at all.
    """
    root = Path(root)
    if kind not in _PAIRS:
        raise UserError(f"Unknown data set kind {kind!r}: choose one of {', '.join(_PAIRS)}.")
    if classes not in LABEL_SPACES and kind != "folder":
        raise UserError(f"There is no label space of {classes} classes: choose 19, 16 or 13.")
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist: check --data-root.")
    if kind == "folder":
        space, ids = _folder_space(root, classes, labels)
    else:
        space = LABEL_SPACES[classes]
        ids = _SYNTHIA_IDS if kind == "synthia" else _CITYSCAPES_IDS
    pairs = _PAIRS[kind](root, split)
    if not pairs:
        raise UserError(
            f"{root} holds no image of split {split!r} in the {kind} layout: check --data-root."
        )
    if not labels:
        pairs = [(image, None) for image, _ in pairs]
    elif not allow_missing:
        _refuse_missing(pairs)
    return SegmentationDataset(
        pairs,
        space,
        ids,
        size=size,
        augment=augment,
        seed=seed,
        full_labels=full_labels,
        normalize=normalize,
    )


def to_rgb(image: torch.Tensor, normalize: Normalization = "published") -> torch.Tensor:
    """Undo the normalization of a `Sample.image`: (3, H, W) uint8 in RGB, for pictures."""
    image = image.detach().float().cpu()
    if normalize == "published":
        rgb = (image + torch.tensor(PUBLISHED_MEAN_BGR).view(3, 1, 1)).flip(0)
    else:
        mean, std = torch.tensor(IMAGENET_MEAN_RGB), torch.tensor(IMAGENET_STD_RGB)
        rgb = 255 * (image * std.view(3, 1, 1) + mean.view(3, 1, 1))
    return rgb.round().clamp(0, 255).to(torch.uint8)


def _normalized(image: torch.Tensor, normalize: Normalization) -> torch.Tensor:
    if normalize == "published":
        return image.flip(0).float() - torch.tensor(PUBLISHED_MEAN_BGR).view(3, 1, 1)
    return transforms.normalize(image.float() / 255, [*IMAGENET_MEAN_RGB], [*IMAGENET_STD_RGB])


def _augmentation(augment: Augmentation) -> v2.Transform:
    if augment == "flip":
        return v2.RandomHorizontalFlip(0.5)
    if augment != "published":
        raise UserError(f"Unknown augmentation {augment!r}: choose 'flip' or 'published'.")
    # Pillow's radius is the standard deviation; 7 taps reach 3 deviations of the widest.
    blur = v2.GaussianBlur(kernel_size=7, sigma=(1e-3, 1.0))
    return v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomApply([blur], p=0.5)])


# Layouts: each lists (image, label) files; a label that the layout lacks is None.


def _gta5_pairs(root: Path, split: str) -> list[Pair]:
    return _numbered_pairs(root, split, root / "images", root / "labels", digits=5)


def _synthia_pairs(root: Path, split: str) -> list[Pair]:
    return _numbered_pairs(root, split, root / "RGB", root / "GT" / "LABELS", digits=7)


def _numbered_pairs(
    root: Path, split: str, images: Path, labels: Path, *, digits: int
) -> list[Pair]:
    names = _listed(root / "list" / f"{split}.txt")
    if names is not None:
        paths = [images / f"{name.zfill(digits)}.png" for name in names]
        _refuse_absent(paths, root / "list" / f"{split}.txt")
    elif split == "train":
        paths = _images(images)
    else:
        raise UserError(
            f"{root} has no list/{split}.txt, and without a list every image is of split 'train'."
        )
    return [(path, labels / f"{path.stem}.png") for path in paths]


def _cityscapes_pairs(root: Path, split: str) -> list[Pair]:
    folder = root / "leftImg8bit" / split
    list_file = root.parent / "city_list" / f"{split}.txt"
    names = _listed(list_file)
    if names is None:
        paths = [path for path in _images(folder, split) if path.stem.endswith("_leftImg8bit")]
    else:
        stems = [name.removeprefix(f"{split}_") for name in names]
        paths = [folder / stem.split("_")[0] / f"{stem}_leftImg8bit.png" for stem in stems]
        _refuse_absent(paths, list_file)
    labels = root / "gtFine" / split
    return [
        (
            path,
            labels
            / path.parent.name
            / f"{path.stem.removesuffix('_leftImg8bit')}_gtFine_labelIds.png",
        )
        for path in paths
    ]


def _cross_city_pairs(root: Path, split: str) -> list[Pair]:
    if split not in ("train", "test", "val"):
        raise UserError(f"cross-city has the splits 'train' and 'test', not {split!r}.")
    part = "Train" if split == "train" else "Test"
    paths = _images(root / "Images" / part)
    list_file = root / "List" / f"{part.lower()}.txt"
    names = _listed(list_file)
    if names is not None:
        by_name = {path.stem: path for path in paths}
        paths = [by_name.get(name, root / "Images" / part / f"{name}.png") for name in names]
        _refuse_absent(paths, list_file)
    if part == "Train":
        return [(path, None) for path in paths]
    return [(path, root / "Labels" / "Test" / f"{path.stem}_eval.png") for path in paths]


def _folder_pairs(root: Path, split: str) -> list[Pair]:
    images, labels = root / "images", root / "labels"
    if (images / split).is_dir():
        images, labels = images / split, labels / split
    return [
        (path, (labels / path.relative_to(images)).with_suffix(".png")) for path in _images(images)
    ]


_PAIRS: Mapping[str, Callable[[Path, str], list[Pair]]] = {
    "gta5": _gta5_pairs,
    "synthia": _synthia_pairs,
    "cityscapes": _cityscapes_pairs,
    "cross-city": _cross_city_pairs,
    "folder": _folder_pairs,
}


def _folder_space(root: Path, classes: int, labels: bool) -> tuple[LabelSpace, Mapping[int, int]]:
    path = root / "label_map.json"
    if not path.is_file():
        if labels:
            raise UserError(
                f"{path} does not exist: write it as an object from label id to class name "
                'or null, for example {"7": "road", "0": null}.'
            )
        return LABEL_SPACES.get(classes) or _numbered_space(classes), {}
    try:
        # As pairs: a dictionary would keep the last of two names for one id without a word.
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
        entries = [(int(file_id), name) for file_id, name in pairs]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a JSON object from label id to class name or null ({error}): repair it."
        ) from error
    ids = dict(entries)
    if len(ids) < len(entries):
        raise UserError(f"{path} has two entries for one label id: remove one of them.")
    if not all(0 <= i < 256 and (name is None or _is_name(name)) for i, name in entries):
        raise UserError(
            f"{path} must map ids from 0 to 255 to class names (printable characters) or null: "
            "repair the other entries."
        )
    names = tuple(dict.fromkeys(name for name in ids.values() if name is not None))
    if len(names) > MOST_CLASSES:
        raise UserError(f"{path} names {len(names)} classes, more than {MOST_CLASSES}: join some.")
    if len(names) != classes:
        raise UserError(
            f"{path} names {len(names)} classes, but {classes} were asked for: make them agree."
        )
    known = {row[0]: row[2] for row in CITYSCAPES_CLASSES}
    colors = tuple(known.get(name, _color(c, len(names))) for c, name in enumerate(names))
    classes_of = {i: -1 if name is None else names.index(name) for i, name in ids.items()}
    return LabelSpace(names, colors, (*range(len(names)),)), classes_of


def _numbered_space(classes: int) -> LabelSpace:
    """For images without labels, whose classes have no names."""
    ids = range(classes)
    return LabelSpace(
        tuple(f"class {c}" for c in ids), tuple(_color(c, classes) for c in ids), (*ids,)
    )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name != "" and name.isprintable()


def _color(c: int, classes: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(c / classes, 0.7, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def _listed(path: Path) -> list[str] | None:
    if not os.path.lexists(path):
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(_unreadable("list file", path, error)) from error
    return [line.strip() for line in lines if line.strip()]


def _images(folder: Path, split: str | None = None) -> list[Path]:
    if not folder.is_dir():
        part = "" if split is None else f" and split {split!r}"
        raise UserError(f"The data folder {folder} does not exist: check --data-root{part}.")
    found, seen = [], dict[str, str]()
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        # Links may lead in circles, or to one folder in several ways.
        first = seen.setdefault(os.path.realpath(parent), parent)
        if first != parent:
            raise UserError(f"{parent} and {first} are one folder: remove the link to it.")
        # macOS writes ._x.png beside x.png, and Jupyter .ipynb_checkpoints.
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in _IMAGE_SUFFIXES]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise UserError(
        f"{error.filename} cannot be read ({error.strerror}): repair it or remove it."
    ) from error


def _refuse_absent(paths: Sequence[Path], list_file: Path) -> None:
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(
                f"{list_file} lists {path}, which does not exist: restore the image or edit "
                "the list."
            )


def _refuse_missing(pairs: Sequence[Pair]) -> None:
    missing = _missing(pairs)
    if missing:
        image, label = missing[0]
        wanted = f"(expected {label})" if label else "(this split is published without labels)"
        raise UserError(
            f"{len(missing)} of {len(pairs)} images have no label, the first is {image} {wanted}: "
            "restore the label files or remove the images."
        )


def _missing(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair[1] is None or not os.path.isfile(pair[1])]


def _refuse_sideways(pair: Pair, size: tuple[int, ...], label_size: tuple[int, ...]) -> None:
    """Refuse labels that are turned by 90 degrees against their image.

    Resizing makes other sizes agree.
    """
    if size != label_size and size == label_size[::-1]:
        raise UserError(
            f"{pair[0]} and its labels {pair[1]} lie across each other: turn one of the two."
        )


@contextmanager
def _opened(what: str, path: Path, *formats: str) -> Iterator[Image.Image]:
    """An image file of one of some formats; everything wrong with it becomes a UserError."""
    try:
        # Some of Pillow's other decoders run programs, such as Ghostscript.
        with Image.open(path, formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:
        wanted = ValueError(f"it is no {' or '.join(formats)} file")
        raise UserError(_unreadable(what, path, wanted)) from error
    # A damaged byte can make a decoder raise anything.
    except Exception as error:
        raise UserError(_unreadable(what, path, error)) from error


def _read_image(path: Path) -> Image.Image:
    with _opened("image", path, "PNG", "JPEG") as image:
        if image.mode.startswith("I"):
            raise ValueError("its grey values have 16 bits, not 8")
        ImageOps.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)  # else Pillow warns that it drops it
        return image.convert("RGB")


def _read_ids(path: Path) -> np.ndarray:
    if not os.path.lexists(path):
        raise UserError(f"The label file {path} does not exist: restore it.")
    with _opened("label file", path, "PNG") as image:
        coded = image.tile[0][3]
        in_low_byte = coded in ("RGB;16B", "RGBA;16B")
        if in_low_byte:
            # Pillow keeps the upper byte of 16-bit colour (big-endian in the file), but the ids
            # are in the lower one: declared as little-endian, the lower byte is kept.
            image.tile = [
                (codec, box, offset, raw.replace(";16B", ";16L"))
                for codec, box, offset, raw in image.tile
            ]
        ImageOps.exif_transpose(image, in_place=True)
        values = np.asarray(image)
        if values.ndim == 2:
            return values
        is_grey = coded in ("RGB", "RGBA") and (values[..., :3] == values[..., :1]).all()
        if not (in_low_byte or is_grey):
            raise ValueError("it is a picture, not a map of label ids")
        return values[..., 0]


def _unreadable(what: str, path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return f"The {what} {path} cannot be read ({reason}): replace the file."


@dataclass
class DataReport:
    """The findings of `check_data`.

    Args:
        space: the classes that were counted.
        images: number of images in the list.
        missing: images without a label file.
        unreadable: one sentence for each file that is damaged or holds an unknown label id.
        sizes: number of images of each (height, width).
        odd_sizes: images whose labels have another size.
        pixels: (C + 1,) int64, pixels of each class, then those not counted.
    """

    space: LabelSpace
    images: int
    missing: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    odd_sizes: list[Path] = field(default_factory=list)
    pixels: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def frequencies(self) -> dict[str, float]:
        """Share of each class among the counted pixels; all 0 where nothing was counted."""
        counts = self.pixels[:-1].double()
        shares = counts / counts.sum().clamp(min=1)
        return dict(zip(self.space.names, shares.tolist(), strict=True))

    @property
    def usable(self) -> bool:
        """Whether training could read every pair; labels of another size are no fault."""
        return not self.missing and not self.unreadable


def check_data(dataset: SegmentationDataset, progress: Progress | None = None) -> DataReport:
    """Read every file of a data set and count images, missing files and pixels of each class.

    Args:
        dataset: opened with `allow_missing=True` where missing labels should be listed. With
            `labels=False` only the images are read.
        progress: called with (files done, files in all) after each pair.
    """
    report = DataReport(dataset.space, len(dataset))
    report.pixels = torch.zeros(len(dataset.space) + 1, dtype=torch.int64)
    # Threads suffice, because decoding releases the interpreter lock.
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda pair: _check_pair(dataset, pair), dataset.pairs)
        for done, (pair, checked) in enumerate(zip(dataset.pairs, found, strict=True), 1):
            if isinstance(checked, UserError):
                report.unreadable.append(str(checked))
            else:
                size, label_size, pixels = checked
                report.sizes[size] += 1
                report.pixels += pixels
                if label_size is not None and label_size != size:
                    report.odd_sizes.append(pair[0])
                if pair[1] is not None and label_size is None:
                    report.missing.append(pair[0])
            if progress is not None:
                progress(done, len(dataset))
    return report


def _check_pair(
    dataset: SegmentationDataset, pair: Pair
) -> tuple[tuple[int, int], tuple[int, int] | None, torch.Tensor] | UserError:
    image_path, label_path = pair
    classes = len(dataset.space)
    try:
        image = _read_image(image_path)
        size = (image.height, image.width)
        if label_path is None or not os.path.isfile(label_path):
            return size, None, torch.zeros(classes + 1, dtype=torch.int64)
        labels = dataset.read_labels(label_path)
        _refuse_sideways(pair, size, labels.shape)
    except UserError as error:
        return error
    counts = torch.from_numpy(np.bincount(labels.ravel(), minlength=256))
    pixels = torch.cat([counts[:classes], counts[_IGNORED:]])
    return size, (labels.shape[0], labels.shape[1]), pixels
