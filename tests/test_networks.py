"""`train_uda.py --network package.module:factory` with networks of other libraries."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_examples import Killed, gradient, kill_at, only_sentence, same, trained
from torch import Tensor, nn

import adapt_online
import evaluate
import export_model
import train_uda
from uda import adaptation, checkpoint, loading, networks, scenes
from uda.errors import UserError
from uda.presets import Settings

SIZE = (64, 96)  # U-Nets need multiples of 32
TINY = (
    f"--scenes 4 --source-size {SIZE[0]} {SIZE[1]} --target-size {SIZE[0]} {SIZE[1]} "
    "--source-steps 1 --steps 2 --method maxsquare-iw --no-compare --batch-size 2 --workers 0 "
    "--device cpu --log-every 1 --save-every 1 --evaluate-every 2 --normalize imagenet"
).split()


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    scenes.render(root, seed=loading.SCENES_SEED, train=4, val=1, size=SIZE, source_size=SIZE)
    return root


def train(out: Path, data_root: Path, network: str, *options: str) -> int:
    folders = ["--out", str(out), "--data-root", str(data_root)]
    return train_uda.main([*TINY, *folders, "--network", f"{__name__}:{network}", *options])


# Factories


def deeplabv3(classes: int) -> nn.Module:
    """A mapping of "out" and "aux", upsampled, with BatchNorm."""
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    return segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes, aux_loss=True
    )


def unet(classes: int) -> nn.Module:
    """A tensor of logits at full resolution."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet(
        "mobilenet_v2", encoder_weights=None, decoder_channels=(32, 16, 8, 8, 8), classes=classes
    )


def segformer(classes: int) -> nn.Module:
    """An object with logits at a quarter of the resolution; LayerNorm and dropout."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=classes,
        depths=[1] * 4,
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
    )
    return transformers.SegformerForSemanticSegmentation(config)


class Returning(nn.Module):
    """Logits at stride 4, given back as something else."""

    def __init__(self, classes: int, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, classes, kernel_size=4, stride=4)
        self.give = give

    def forward(self, images: Tensor) -> Any:
        return self.give(self.conv(images))


def two_heads(classes: int) -> nn.Module:
    return Returning(classes, lambda logits: (logits, logits[..., ::2, ::2] / 2))


def one_head(classes: int) -> nn.Module:
    return Returning(classes, lambda logits: logits)


# What comes back

two_classes = one_head(2)
a_number = 3


def no_module(classes: int) -> int:
    return classes


def no_argument() -> nn.Module:
    raise AssertionError


def other_classes(classes: int) -> nn.Module:
    return one_head(classes + 2)


def flat(classes: int) -> nn.Module:
    return Returning(classes, lambda logits: logits.mean(dim=(2, 3)))


def integers(classes: int) -> nn.Module:
    return Returning(classes, lambda logits: {"out": logits.argmax(dim=1, keepdim=True)})


def a_text(classes: int) -> nn.Module:
    return Returning(classes, lambda logits: {"text": "logits"})


def nothing(classes: int) -> nn.Module:
    return Returning(classes, lambda logits: ())


def picky(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, classes))


@pytest.mark.parametrize(
    ("network", "told"),
    [
        ("nonsense", "neither small nor resnet101"),
        ("no.such.module:factory", "cannot be imported (ModuleNotFoundError"),
        (f"{__name__}:missing", "has no attribute 'missing'"),
        (f"{__name__}:", "cannot be imported"),
        (f"{__name__}:a_number", "is a int, not a callable"),
        (f"{__name__}:no_module", "returned a int, not an nn.Module"),
        (f"{__name__}:no_argument", "fails for 19 classes: TypeError"),
        (f"{__name__}:other_classes", "returned torch.float32 of shape (1, 21, 16, 24)"),
        (f"{__name__}:flat", "returned torch.float32 of shape (1, 19)"),
        (f"{__name__}:integers", "returned torch.int64 of shape (1, 1, 16, 24)"),
        (f"{__name__}:a_text", "returned a dict"),
        (f"{__name__}:nothing", "returned a tuple"),
        (f"{__name__}:picky", "fails for images of 96x64: RuntimeError"),
    ],
)
def test_a_network_that_is_none_is_named_with_what_came_back(
    network: str, told: str, tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ["--out", str(out), "--data-root", str(data_root), "--network", network]
    assert train_uda.main([*TINY, *options]) == 2
    message = only_sentence(capsys)
    assert network in message and told in message
    assert not out.exists()


def test_a_module_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "from torch import nn",
        "class Nets:",
        "    conv = staticmethod(lambda classes: nn.Conv2d(3, classes, 1))",
    )
    (tmp_path / "mine.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    logits, low_logits = networks.build("mine:Nets.conv", 4)(torch.zeros(1, 3, 8, 8))
    assert logits.shape == (1, 4, 8, 8) and low_logits is None


@pytest.mark.parametrize(
    ("give", "has_low"),
    [
        (lambda logits: logits, False),
        (lambda logits: (logits, -logits), True),
        (lambda logits: [logits, logits.repeat(1, 9, 1, 1)], False),  # features
        (lambda logits: {"out": logits, "aux": -logits}, True),
        (lambda logits: {"loss": logits.mean(), "logits": logits}, False),
        (lambda logits: {"aux": -logits, "out": logits}, True),
        (lambda logits: {"main": logits}, False),
    ],
    ids=["tensor", "pair", "with features", "mapping", "with loss", "out last", "other name"],
)
def test_every_form_of_output_becomes_two_heads(
    give: Callable[[Tensor], Any], has_low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "factory", lambda classes: Returning(classes, give))
    network, images = networks.build(f"{__name__}:factory", 5), torch.randn(2, 3, 8, 8)
    logits, low_logits = network(images)
    assert torch.equal(logits, network.conv(images))
    assert torch.equal(low_logits, -logits) if has_low else low_logits is None


# Whole runs


@pytest.mark.parametrize(
    ("network", "method"),
    [
        ("deeplabv3", "maxsquare-iw-multi"),
        pytest.param("unet", "maxsquare-iw", marks=pytest.mark.stress),
        ("segformer", "maxsquare-iw"),
    ],
)
def test_a_network_of_another_library_is_adapted_and_resumed(
    network: str,
    method: str,
    tmp_path: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, whole, options = tmp_path / "run", tmp_path / "whole", ["--method", method]
    assert train(whole, data_root, network, *options) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, adaptation, "adaptation_step", 2)
        train(run, data_root, network, *options)
    assert train(run, data_root, network, *options, "--resume") == 0
    for name in ("source-only/last.pt", "last.pt"):
        assert same(trained(run / name), trained(whole / name)), name

    # The weights are those of the library's own network.
    source, adapted = (trained(whole / name) for name in ("source-only/last.pt", "last.pt"))
    assert gradient(source).norm() > 0
    own = globals()[network](19)
    own.load_state_dict(adapted["model"])
    # evaluate.py repeats the score, but a file does not choose the code that runs.
    capsys.readouterr()
    last, given = str(whole / "last.pt"), ["--network", f"{__name__}:{network}"]
    assert evaluate.main([last, "--workers", "0"]) == 2
    assert f"--network {__name__}:{network}" in only_sentence(capsys)
    assert evaluate.main([last, "--workers", "0", *given]) == 0
    metrics = json.loads((whole / "metrics.json").read_text())
    assert f"{metrics['adapted']['miou']:.1f}" in capsys.readouterr().out
    # As a file for others, it is a source model.
    exported = tmp_path / "model.safetensors"
    assert export_model.main([str(whole / "source-only/last.pt"), str(exported)]) == 0
    options += ["--source-steps", "0", "--steps", "1", "--init", str(exported)]
    assert train(tmp_path / "two", data_root, network, *options) == 0


def test_a_network_adapts_online(data_root: Path, tmp_path: Path) -> None:
    given = ["--network", f"{__name__}:segformer"]
    weights = {"state_dict": {f"module.{k}": w for k, w in segformer(19).state_dict().items()}}
    torch.save(weights, tmp_path / "weights.pth")
    options = ["--init", str(tmp_path / "weights.pth"), "--source-steps", "0", "--steps", "0"]
    assert train(tmp_path / "run", data_root, "segformer", *options) == 0
    assert adapt_online.main([str(tmp_path / "run" / "last.pt"), *given]) == 0


def test_multi_level_methods_need_a_second_head(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("maxsquare-iw-multi", "all"):
        assert train(tmp_path / "one", data_root, "one_head", "--method", method) == 2
        assert "needs a second head" in only_sentence(capsys)
    assert not (tmp_path / "one").exists()
    # Without BatchNorm there are no statistics to compare with.
    options = ["--method", "maxsquare-iw-multi", "--compare"]
    assert train(tmp_path / "two", data_root, "two_heads", *options) == 0
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for stage in ("target_statistics", "source_only"):
        del metrics[stage]["proportions"]  # a list, which approx does not enter
    same = pytest.approx(metrics["source_only"].pop("information"))
    assert metrics["target_statistics"].pop("information") == same
    assert metrics["target_statistics"] == metrics["source_only"]


@pytest.mark.parametrize("options", [["--backbone-updates", "torch-1.0"], ["--freeze-bn"]])
def test_options_of_deeplab_are_refused(
    options: list[str], data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", data_root, "one_head", *options) == 2
    assert options[0] in only_sentence(capsys)


def test_align_corners_and_normalize_take_part(data_root: Path, tmp_path: Path) -> None:
    for name, options in (
        ("plain", []),
        ("corners", ["--align-corners"]),
        ("published", ["--normalize", "published"]),
    ):
        options = ["--source-steps", "1", "--steps", "1", *options]
        assert train(tmp_path / name, data_root, "one_head", *options) == 0
    plain, corners, published = (
        gradient(trained(tmp_path / name / "source-only" / "last.pt"))
        for name in ("plain", "corners", "published")
    )
    assert not torch.equal(plain, corners) and not torch.equal(plain, published)
    assert Settings(network="small").corners and not Settings(network="a:b").corners


def test_weights_that_do_not_fit_are_named(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.torch.save_file(one_head(7).state_dict(), tmp_path / "seven.safetensors")
    options = ["--source-steps", "0", "--init", str(tmp_path / "seven.safetensors")]
    assert train(tmp_path / "run", data_root, "one_head", *options) == 2
    message = only_sentence(capsys)
    assert "seven.safetensors does not fit" in message and "(7, 3, 4, 4)" in message


def test_a_file_does_not_choose_the_code_that_runs(tmp_path: Path) -> None:
    settings = {"network": f"{__name__}:no_argument", "classes": 2}
    checkpoint.save(tmp_path / "evil.pt", {"model": {}, "settings": settings})
    with pytest.raises(UserError, match=r"evil\.pt belongs to --network"):
        loading.load_network(tmp_path / "evil.pt")
