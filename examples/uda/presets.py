"""Every setting of the adaptation script, and the published experiments as rows of such settings.

`Settings` is the only place where a default lives: the command line is generated from it, a preset
is an instance of it, and a run writes it beside its results.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uda.adaptation import BackboneUpdates
from uda.datasets import MOST_CLASSES, Kind, Normalization
from uda.deeplab import Aspp
from uda.errors import UserError

Method = Literal[
    "source",
    "entropy",
    "entropy-information",
    "entropy-iw",
    "tsallis-1.5",
    "maxsquare",
    "maxsquare-information",
    "maxsquare-iw",
    "maxsquare-iw-information",
    "maxsquare-iw-multi",
    "pseudo-label",
    "teacher",
    "all",
]
# The methods that the paper compares; "all" runs them.
COMPARED = ("source", "entropy", "maxsquare", "maxsquare-iw", "maxsquare-iw-multi", "pseudo-label")
DEEPLABS = ("small", "resnet101")
LARGEST_SEED = 2**32 - 1  # of NumPy's generators
# The stride of the network. A smaller image has one position of logits, and BatchNorm cannot
# average over a batch of one.
SMALLEST_SIDE = 8
# From this ratio on information takes ruined models for the best (benchmarks/README.md).
LARGE_RATIO = 0.5
POSITIVE = "source_lr lr batch_size processes machines log_every save_every evaluate_every".split()
NOT_NEGATIVE = (
    "seed scenes source_steps source_horizon steps horizon momentum weight_decay low_weight "
    "workers source_evaluate_every threads"
).split()
Select = Literal["information", "labels"]


@dataclass(frozen=True)
class Settings:
    """Adapt a segmentation network to unlabelled images.

    A network is trained on labelled source images, then adapted to unlabelled target images, and
    evaluated on held-out target images after both stages. Without arguments, this runs the demo: it
    renders street scenes and adapts the source model that comes with this script to them.
    """

    preset: str = "demo"
    """Set of settings to start from (--list-presets shows them); other options override it."""
    method: Method = "maxsquare-iw-multi"
    """Target loss of the second stage. "source" continues on the source alone (the control);
    "all" runs the methods that the paper compares, from one source model. Those called
    -information keep classes from swallowing others."""
    seed: int = 0
    """Seed of the initial weights, the data order and the augmentation."""
    out: Path | None = None
    """Folder for everything the run writes, new or empty; default: a new one under runs/."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint (give its other options again)."""
    init: Path | None = None
    """Weights to start from: a checkpoint of this script, of the published code, or torchvision's
    ResNet-101. With --source-steps 0 they are the source model that is adapted; the demo then
    takes the model that comes with this script."""
    compare: bool = False
    """Also measure two controls without a target loss: the source model with BatchNorm statistics
    of the target, and the source model after as many further steps on the source alone."""
    list_presets: bool = False
    """Print the presets with their settings and published results, then stop."""
    check_data: bool = False
    """Read the data sets, report counts, missing pairs and class frequencies, then stop."""

    data_root: Path | None = None
    """Folder that holds the data sets; for rendered scenes, the folder that keeps them (default:
    data/ in --out)."""
    source: Kind = "gta5"
    """Layout of the labelled source data set."""
    source_folder: str = "GTA5"
    """Folder of the source data set under --data-root."""
    target: Kind = "cityscapes"
    """Layout of the target data set; its training labels are never opened."""
    target_folder: str = "Cityscapes"
    """Folder of the target data set under --data-root."""
    classes: int = 19
    """Number of classes: 19, 16 or 13 of Cityscapes; for the layout "folder", as many as its
    label_map.json names."""
    source_size: tuple[int, int] = (720, 1280)
    """Height and width at which the network sees source images."""
    target_size: tuple[int, int] = (512, 1024)
    """Height and width at which the network sees target images."""
    augment: Literal["none", "flip", "published"] = "published"
    """Random changes of the training images: none, a flip, or a flip and a blur."""
    scenes: int = 0
    """Draw this many training images per domain, and a quarter as many for validation, into
    --data-root unless they are there; 0, and always for layouts other than gta5 and cityscapes:
    use the data sets that are there."""

    normalize: Normalization = "published"
    """Preprocessing: BGR minus the published mean, or RGB as torchvision's weights expect it."""

    network: str = "resnet101"
    """DeepLabv2 on the published ResNet-101; "small", which trains from scratch on a CPU; or a
    network of your own as package.module:factory, a callable that takes the number of classes and
    returns an nn.Module."""
    align_corners: bool = False
    """Upsample the logits of a network of your own with align_corners=True, as those of DeepLabv2
    always are."""
    aspp: Aspp = "published"
    """Dilations of the classifier heads: 6 and 12 as the published code, or 6, 12, 18 and 24."""
    freeze_bn: bool = False
    """Keep BatchNorm on its running statistics while training."""

    source_steps: int = 0
    """Optimiser steps of the source stage; 0 starts from the model given by --init."""
    source_horizon: int = 200_000
    """Step at which the source stage's learning rate would reach zero; 0: at its end."""
    source_lr: float = 2.5e-4
    """Learning rate of the source stage; the heads learn at ten times this rate."""
    steps: int = 29_750
    """Optimiser steps of the adaptation; 0: none."""
    horizon: int = 29_760
    """Step at which the adaptation's learning rate would reach zero; 0: at its end. The published
    code counts 2,976 images a pass where there are 2,975."""
    lr: float = 2.5e-4
    """Learning rate of the adaptation; the heads learn at ten times this rate."""
    batch_size: int = 1
    """Images of each domain per step, over all processes."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    backbone_updates: BackboneUpdates = "torch-1.0"
    """The published optimiser lists each backbone tensor three or four times, and so updates it as
    often in each step. "torch-1.0" follows the rule of torch 1.0.0, as the published runs did;
    "duplicated" that of today's torch, with about half the weight decay. "once" updates once."""

    target_weight: tuple[float, ...] = (0.1,)
    """Weight of the target loss, for scale="reference". Several make one run each, from the same
    source model; the one of the highest information on target images counts as adapted."""
    ratio: float = 0.2
    """Exponent of the image-wise class weights, from -1 to 1: 0 gives all pixels the same weight, 1
    all classes, and a negative one gives the pixels of frequent classes more."""
    prior: Literal["uniform", "predicted"] = "uniform"
    """Class proportions to which methods called -information pull the mean prediction: the same for
    all classes, or those that the source model predicts with BatchNorm statistics of the target,
    which suits data in which one class (a background, say) covers most pixels."""
    threshold: float = 0.95
    """Confidence above which a prediction becomes a pseudo label or guides the low-level head."""
    low_weight: float = 0.1
    """Weight of the low-level head: of its source cross entropy, in the source stage and in
    multi-level methods, and of its guidance in the target loss; 0 leaves that head alone."""

    bn_statistics: Literal["training", "target"] = "training"
    """BatchNorm's running statistics in the adapted model: "training" keeps those of training, into
    which source and target images enter in turn (published); "target" takes them from target images
    at the end."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; "auto" takes a GPU if there is one."""
    processes: int = 1
    """Processes on this machine that share each batch, one GPU each (or CPU processes)."""
    machines: int = 1
    """Machines that share each batch, with a common --out and --data-root. Start the same command
    on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set as torch.distributed expects."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; weights and losses stay in fp32."""
    channels_last: bool = False
    """Store images and features channels-last in memory, which is faster."""
    compile: bool = False
    """Compile the network with torch.compile."""
    threads: int = 0
    """Threads for computing on a CPU; 0: as many as PyTorch chooses."""
    workers: int = 2
    """Processes that load images; 0 loads them in the training process."""

    log_every: int = 10
    """Steps between two entries of the TensorBoard log."""
    save_every: int = 500
    """Steps between two checkpoints."""
    evaluate_every: int = 2_975
    """Steps between two evaluations during the adaptation, from which best.pt is chosen."""
    select: Select = "information"
    """What chooses best.pt: "information" on unlabelled target training images, or mIoU on the
    "labels" of the target's validation images, as the published runs did. A loss of a method
    called -information raises the information by itself: for these, "information" chooses where
    entropy is low and classes are predicted as often as before."""
    source_evaluate_every: int = 0
    """Steps between two evaluations of the source stage on the source's own validation images
    (split "val" of its layout; scenes draw a quarter as many); 0: none."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{option(name)} must be a finite number, not {number}.")
            if name in POSITIVE and value <= 0:
                raise UserError(f"{option(name)} must be positive, not {value}.")
            if name in NOT_NEGATIVE and value < 0:
                raise UserError(f"{option(name)} must not be negative, not {value}.")
        self._check_target_weight()
        for name in ("source_size", "target_size"):
            height, width = getattr(self, name)
            if min(height, width) < SMALLEST_SIDE:
                raise UserError(
                    f"{option(name)} {height} {width} is too small for the network: take at least "
                    f"{SMALLEST_SIDE} pixels each way."
                )
        if not self.has_deeplab and ":" not in self.network:
            raise UserError(
                f"--network {self.network} is neither {' nor '.join(DEEPLABS)}: name a network of "
                "your own as package.module:factory."
            )
        if not 2 <= self.classes <= MOST_CLASSES:
            raise UserError(f"--classes must be from 2 to {MOST_CLASSES}, not {self.classes}.")
        if self.seed > LARGEST_SEED:
            raise UserError(f"--seed must be at most {LARGEST_SEED}, not {self.seed}.")
        for name, lowest in (("ratio", -1), ("threshold", 0)):
            if not lowest <= getattr(self, name) <= 1:
                raise UserError(
                    f"{option(name)} must be from {lowest} to 1, not {getattr(self, name)}."
                )
        if self.low_weight == 0 and self.method in ("maxsquare-iw-multi", "all"):
            raise UserError(
                f"--method {self.method} needs the low-level head, which --low-weight 0 leaves "
                "alone: give a weight, 0.1 as published."
            )
        if self.batch_size % (self.processes * self.machines):
            raise UserError(
                f"--batch-size {self.batch_size} does not divide among --processes "
                f"{self.processes} on each of --machines {self.machines}: make it a multiple."
            )
        if 0 < self.scenes < self.batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is more than the images of --scenes "
                f"{self.scenes}: choose a smaller batch."
            )
        for prefix in ("source_", ""):
            horizon, steps = prefix + "horizon", prefix + "steps"
            if 0 < getattr(self, horizon) < getattr(self, steps):
                raise UserError(
                    f"{option(horizon)} {getattr(self, horizon)} ends before {option(steps)} "
                    f"{getattr(self, steps)}: make it at least as large, or 0."
                )

    def _check_target_weight(self) -> None:
        weights = self.target_weight
        if not weights:
            raise UserError("--target-weight needs at least one value.")
        if min(weights) < 0:
            raise UserError(f"--target-weight must not be negative, not {min(weights)}.")
        if len({*weights}) < len(weights):
            raise UserError(f"--target-weight has a value twice ({_listed(weights)}): remove one.")
        if len(weights) > 1 and self.method in ("all", "source"):
            raise UserError(
                f"--method {self.method} takes one --target-weight, not {_listed(weights)}: choose "
                "a method, or one weight."
            )

    @property
    def has_deeplab(self) -> bool:
        """Whether the network is one of this example's."""
        return self.network in DEEPLABS

    @property
    def criterion(self) -> Literal["information", "steadiness"]:
        """What chooses without labels."""
        return criterion_of(self.method, self.ratio)

    @property
    def corners(self) -> bool:
        """The align_corners with which logits are upsampled."""
        return self.has_deeplab or self.align_corners


def criterion_of(method: str, ratio: float) -> Literal["information", "steadiness"]:
    """What chooses among models of a method without labels.

    Steadiness does where the loss raises the information by itself: with the information term, and
    with image-wise weights of a large ratio, which favour whatever is predicted rarely. "all" has
    such weights in it.
    """
    favours_rare = ("-iw" in method or method == "all") and ratio >= LARGE_RATIO
    return "steadiness" if method.endswith("-information") or favours_rare else "information"


def _listed(weights: tuple[float, ...]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)


def option(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Preset:
    """Settings, their published target mIoU in percent, and what the publication leaves open."""

    settings: Settings
    published: str = "-"
    note: str = ""

    @property
    def start(self) -> str | None:
        """The preset whose last checkpoint is the --init of this one; None: it has none."""
        if self.settings.source_steps or self.settings.scenes:
            return None
        pair = self.settings.preset.rpartition("/")[0]
        # Only the multi-level method was started from a source model that had trained both heads.
        return f"{pair}/source-multi" if self.settings.low_weight else f"{pair}/source"


# The published training lists name fewer images than the data sets have (24,966 and 9,400).
LISTED_IMAGES: Mapping[Kind, int] = {"gta5": 12_403, "synthia": 9_000}
# Notes on many rows, which --list-presets shows under the table.
NOTES = (
    'A row "starts from" the row of that name of the same pair: give its last.pt as --init.',
    "published: target mIoU in percent, for SYNTHIA over 16 / 13 classes.",
    "source: trains the final head only; source-multi: both, for the multi-level method.",
    "SYNTHIA: every printed image-wise command ran with ratio -0.2, as such or as a 0.2 that the "
    "code negated; the table is older than these commands, and no command for multi was printed.",
    "best.pt: the published rows choose it on target labels (--select labels), as was published.",
    "optimiser: --backbone-updates torch-1.0, because the published README names torch 1.0.0. With "
    "that version's optimiser the published loop and this one are equal in float64; under today's "
    "torch its first step is 1.87 times shorter (shortcuts 2.26), its weight decay half as strong.",
    "lists: the published runs read 12,403 of GTA5's 24,966 images and 9,000 of SYNTHIA's 9,400; "
    "their lists go to GTA5/list/train.txt and SYNTHIA/list/train.txt under --data-root, one "
    "image number a line.",
)

_GTA5 = Settings(select="labels")
_SYNTHIA = dataclasses.replace(
    _GTA5,
    source="synthia",
    source_folder="SYNTHIA",
    source_size=(760, 1280),
    classes=16,
    ratio=-0.2,
)
_CROSS_CITY = dataclasses.replace(
    _GTA5,
    source="cityscapes",
    source_folder="Cityscapes",
    source_size=(512, 1024),
    target="cross-city",
    classes=13,
)
_SOURCE_MULTI = {"method": "source", "source_steps": 80_000, "steps": 0}
_SOURCE = _SOURCE_MULTI | {"low_weight": 0.0}
_ENTROPY = {"method": "entropy", "low_weight": 0.0}
_PLAIN = {"method": "maxsquare", "low_weight": 0.0}
_IMAGE_WISE = {"method": "maxsquare-iw", "low_weight": 0.0}
_MULTI = {"method": "maxsquare-iw-multi"}
# The source model that comes with the demo, with its card beside it.
DEMO_CHECKPOINT = Path(__file__).resolve().parents[1] / "source_model" / "model.safetensors"
_DEMO = Settings(
    source_size=(180, 320),
    target_size=(160, 320),
    scenes=400,
    network="small",
    compare=True,
    source_horizon=0,
    source_lr=1e-2,
    steps=250,
    horizon=0,
    lr=5e-3,
    batch_size=2,
    # The published 0.1 is for 29,750 steps; fewer steps need a larger weight.
    target_weight=(5.0,),
    backbone_updates="once",
    channels_last=True,
    # On busy cores threads wait for each other, and two are slower than one.
    threads=1,
    workers=1,
    save_every=100,
    evaluate_every=250,
)
_CITIES = {
    # city: source only, maximum squares, image-wise maximum squares
    "rome": ("51.0", "53.9", "54.5"),
    "rio": ("48.9", "52.0", "53.3"),
    "tokyo": ("47.8", "49.7", "50.5"),
    "taipei": ("46.3", "49.8", "50.6"),
}
_NO_WEIGHT = "weight not published"


def _row(base: Settings, published: str = "-", note: str = "", **changes: object) -> Preset:
    return Preset(dataclasses.replace(base, **changes), published, note)  # type: ignore[arg-type]


_ROWS = {
    "demo": _row(_DEMO, note="rendered scenes, on a CPU"),
    "gta5-cityscapes/source": _row(_GTA5, "36.9", **_SOURCE),
    "gta5-cityscapes/source-multi": _row(_GTA5, **_SOURCE_MULTI),
    "gta5-cityscapes/entropy": _row(_GTA5, "42.2", _NO_WEIGHT, **_ENTROPY),
    "gta5-cityscapes/maxsquare": _row(_GTA5, "44.3", **_PLAIN),
    "gta5-cityscapes/maxsquare-iw": _row(_GTA5, "45.2", **_IMAGE_WISE),
    "gta5-cityscapes/maxsquare-iw-multi": _row(
        _GTA5, "46.4", target_size=(640, 1280), target_weight=(0.09,), **_MULTI
    ),
    "synthia-cityscapes/source": _row(_SYNTHIA, "30.1 / 34.3", **_SOURCE),
    "synthia-cityscapes/source-multi": _row(_SYNTHIA, **_SOURCE_MULTI),
    "synthia-cityscapes/entropy": _row(_SYNTHIA, "38.0 / 44.5", _NO_WEIGHT, **_ENTROPY),
    "synthia-cityscapes/maxsquare": _row(_SYNTHIA, "39.3 / 45.8", **_PLAIN),
    "synthia-cityscapes/maxsquare-iw": _row(
        _SYNTHIA, "40.4 / 46.9", "table older than the command", **_IMAGE_WISE
    ),
    "synthia-cityscapes/maxsquare-iw-multi": _row(
        _SYNTHIA, "41.4 / 48.2", "no command printed", **_MULTI
    ),
}
for _city, (_source, _plain, _image_wise) in _CITIES.items():
    _base = dataclasses.replace(_CROSS_CITY, target_folder=f"NTHU/{_city.title()}")
    _ROWS |= {
        f"cityscapes-{_city}/source": _row(_base, _source, **_SOURCE),
        f"cityscapes-{_city}/maxsquare": _row(_base, _plain, **_PLAIN),
        f"cityscapes-{_city}/maxsquare-iw": _row(_base, _image_wise, **_IMAGE_WISE),
    }

PRESETS = {
    name: dataclasses.replace(row, settings=dataclasses.replace(row.settings, preset=name))
    for name, row in _ROWS.items()
}
