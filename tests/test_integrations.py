"""The examples with other libraries' networks: each runs, and what it says of its library is so."""

from __future__ import annotations

import importlib
import math
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maxsquare import MaxSquareLoss, functional

FOLDER = Path(__file__).parents[1] / "examples" / "integrations"
LIBRARIES = {
    "deep_supervision": "torch",
    "lightning_module": "lightning",
    "mean_teacher": "torchvision",
    "monai_unet": "monai",
    "smp_deeplab": "segmentation_models_pytorch",
    "tent_classification": "timm",
    "tent_segmentation": "torchvision",
    "torchvision_deeplab": "torchvision",
    "transformers_mask2former": "transformers",
    "transformers_segformer": "transformers",
}

# They have no training loop of their own: a framework's runner calls them.
PARTS = {"mmseg_loss": "mmseg"}


def example(name: str) -> ModuleType:
    """An example's module; skips where its library is not installed."""
    pytest.importorskip(LIBRARIES[name], reason=f"needs {LIBRARIES[name]}: .[integrations]")
    return importlib.import_module(f"integrations.{name}")


def upsample(logits: Tensor, images: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("name", LIBRARIES)
# Lightning itself uses a name that PyTorch has replaced, and cannot size bfloat16 in its summary.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_example_trains_and_leaves_no_file(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = example(name)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(module.__file__), run_name="__main__")
    losses = re.findall(r"step \d .* (-?[\d.]+|-?nan|-?inf)\b", capsys.readouterr().out)
    assert len(losses) == (6 if name.startswith("tent") else 3)
    assert all(math.isfinite(float(loss)) for loss in losses)
    assert not list(tmp_path.iterdir())


def test_every_example_can_be_copied_and_says_what_a_user_asks() -> None:
    paths = {path.stem: path for path in FOLDER.glob("*.py")}
    assert paths.keys() == LIBRARIES.keys() | PARTS.keys()
    for path in paths.values():
        text = path.read_text(encoding="utf-8")
        docstring = text.split('"""')[1]
        assert "Low-resolution logits" in docstring and "align_corners" in docstring
        assert len(text.splitlines()) <= 40
        # One file is enough: nothing is imported from beside it.
        assert not re.search(r"^(from|import) (integrations|uda)\b", text, re.MULTILINE)


def test_torchvision_upsamples_its_heads_as_the_example_says() -> None:
    module = example("torchvision_deeplab")
    network = module.deeplabv3_mobilenet_v3_large(
        num_classes=5, aux_loss=True, weights_backbone=None
    ).eval()
    images = torch.randn(2, 3, 64, 96)
    heads = module.low_resolution(network, images)
    for logits, full in zip(heads, network(images).values(), strict=True):
        assert logits.shape[2] < images.shape[2]
        torch.testing.assert_close(upsample(logits, images, align_corners=False), full)


def test_lraspp_upsamples_as_the_examples_say() -> None:
    module = example("tent_segmentation")
    network = module.lraspp_mobilenet_v3_large(num_classes=5, weights_backbone=None).eval()
    images = torch.randn(2, 3, 64, 96)
    logits = network.classifier(network.backbone(images))
    assert logits.shape[2] < images.shape[2]
    full = network(images)["out"]
    torch.testing.assert_close(upsample(logits, images, align_corners=False), full)


@pytest.mark.parametrize(
    "architecture",
    ["DeepLabV3", "DeepLabV3Plus", "FPN", "PAN", "PSPNet", "Segformer", "UPerNet"],
)
def test_smp_upsamples_as_the_example_says(architecture: str) -> None:
    smp = example("smp_deeplab").smp
    create = getattr(smp, architecture)
    options = {"encoder_weights": None, "classes": 5}
    full = create("resnet18", **options).eval()
    low = create("resnet18", **options, upsampling=1).eval()
    low.load_state_dict(full.state_dict())
    images = torch.randn(2, 3, 128, 160)
    logits = low(images)
    assert logits.shape[2] < images.shape[2]
    torch.testing.assert_close(upsample(logits, images, align_corners=True), full(images))


def test_logits_of_an_smp_unet_have_the_resolution_of_the_images() -> None:
    smp = example("smp_deeplab").smp
    logits = smp.Unet("resnet18", encoder_weights=None, classes=5)(torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, 5, 64, 96)


def test_segformer_computes_the_loss_of_the_example() -> None:
    module = example("transformers_segformer")
    tiny = {"hidden_sizes": (8, 16, 24, 32), "num_attention_heads": (1, 2, 3, 4)}
    config = module.SegformerConfig(num_labels=5, **tiny)
    network = module.SegformerForSemanticSegmentation(config).eval()
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(5, (2, 64, 96))
    labels[:, :8] = 255
    output = network(images, labels=labels)
    assert output.logits.shape == (2, 5, 16, 24)
    ours = functional.cross_entropy(output.logits, labels, size=(64, 96), ignore_index=255)
    torch.testing.assert_close(ours, output.loss)


def test_mask2former_predicts_the_class_of_the_largest_probability() -> None:
    module = example("transformers_mask2former")
    from transformers import Mask2FormerImageProcessor

    # 384 is the resolution at which the post-processing reads the masks.
    output = SimpleNamespace(
        class_queries_logits=3 * torch.randn(2, 7, 6),
        masks_queries_logits=3 * torch.randn(2, 7, 384, 384),
    )
    p = module.probabilities(output)
    torch.testing.assert_close(p.sum(1), torch.ones(2, 384, 384))
    prediction = Mask2FormerImageProcessor().post_process_semantic_segmentation(output)
    assert torch.equal(p.argmax(1), torch.stack(prediction))


def test_logits_of_a_monai_unet_have_the_resolution_of_the_volume() -> None:
    module = example("monai_unet")
    network = module.UNet(3, 1, 4, channels=(8, 16), strides=(2,))
    volumes = module.MetaTensor(torch.randn(2, 1, 8, 12, 16))
    logits = network(volumes.as_tensor())
    assert type(logits) is Tensor
    assert logits.shape == (2, 4, 8, 12, 16)


def test_loss_of_lightnings_bfloat16_logits_is_float32() -> None:
    network = example("lightning_module").Adaptation().network
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network.classifier(network.backbone(torch.randn(2, 3, 64, 96)))
        assert logits.dtype == torch.bfloat16
        assert MaxSquareLoss()(logits, size=(64, 96)).dtype == torch.float32


@pytest.fixture(scope="module")
def mmseg_loss() -> ModuleType:
    """mmsegmentation with mmcv-lite, whose missing operators no segmentor here calls."""
    operators = ModuleType("mmcv._ext")
    operators.__getattr__ = lambda name: None  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("mmcv._ext")
        except ImportError:
            patch.setitem(sys.modules, "mmcv._ext", operators)
        try:
            importlib.import_module("mmseg.models")
        except (ImportError, AssertionError) as error:  # its versions of mmcv are asserted
            pytest.skip(f"needs mmsegmentation: .[mmsegmentation] ({error})")
        return importlib.import_module("integrations.mmseg_loss")


def segmentor(*losses: dict[str, Any]) -> nn.Module:
    registry = importlib.import_module("mmseg.registry")
    norm = {"norm_cfg": {"type": "BN"}}
    head = {"type": "FCNHead", "in_channels": 512, "in_index": 3, "channels": 8, "num_convs": 1}
    model: nn.Module = registry.MODELS.build(
        {
            "type": "EncoderDecoder",
            "backbone": {"type": "ResNetV1c", "depth": 18, **norm},
            "decode_head": {**head, "num_classes": 5, "loss_decode": list(losses), **norm},
            "test_cfg": {"mode": "whole"},
        }
    )
    return model.eval()  # no dropout, and the same logits at every call


IMAGES = torch.linspace(-2, 2, 2 * 3 * 64 * 64).sin().view(2, 3, 64, 64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", [None, {"type": "OHEMPixelSampler", "thresh": 0.2}])
def test_mmsegs_decode_head_calls_the_loss_after_its_own_upsampling(
    mmseg_loss: ModuleType, sampler: dict[str, Any] | None
) -> None:
    structures = importlib.import_module("mmseg.structures")
    PixelData = importlib.import_module("mmengine.structures").PixelData
    model = segmentor(
        {"type": "CrossEntropyLoss", "avg_non_ignore": True},
        {"type": "TargetMaxSquareLoss", "ratio": 0.3, "loss_weight": 0.7},
    )
    labels = torch.randint(5, (2, 1, 64, 64))
    labels[0] = 255  # an image without labels counts all the same
    samples = [structures.SegDataSample(gt_sem_seg=PixelData(data=y)) for y in labels]
    head = model.decode_head
    if sampler:
        head.sampler = importlib.import_module("mmseg.structures").build_pixel_sampler(
            sampler, context=head
        )
    losses = model.loss(IMAGES, samples)
    assert losses.keys() == {"decode.loss_ce", "decode.loss_max_square", "decode.acc_seg"}
    logits = upsample(head(model.extract_feat(IMAGES)), IMAGES, head.align_corners)
    valid = head.sampler.sample(logits, labels) > 0 if sampler else None
    expected = 0.7 * functional.max_square(logits, ratio=0.3, scale="reference", valid=valid)
    torch.testing.assert_close(losses["decode.loss_max_square"], expected)
    gradient, wanted = (
        torch.autograd.grad(loss, head.conv_seg.weight)[0]
        for loss in (losses["decode.loss_max_square"], expected)
    )
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.filterwarnings("ignore")
def test_mmsegs_low_resolution_logits_have_the_loss_of_a_step_without_labels(
    mmseg_loss: ModuleType,
) -> None:
    model = segmentor({"type": "CrossEntropyLoss", "avg_non_ignore": True})
    registry = importlib.import_module("mmseg.registry")
    loss = registry.MODELS.build({"type": "TargetMaxSquareLoss", "loss_name": "loss_target"})
    assert loss.loss_name == "loss_target"
    logits = model.decode_head(model.extract_feat(IMAGES))
    assert logits.shape[2] < IMAGES.shape[2]
    full = upsample(logits, IMAGES, model.decode_head.align_corners)
    expected = 0.1 * functional.max_square(full, ratio=0.2, scale="reference")
    torch.testing.assert_close(mmseg_loss.target_step(model, IMAGES, loss), expected)
    weight = torch.rand(2, 64, 64)
    terms = functional.max_square(full, ratio=0.2, scale="reference", reduction="none")
    weighted = loss(logits, None, weight=weight, size=(64, 64), ignore_index=255)
    torch.testing.assert_close(weighted, 0.1 * (weight * terms).sum((1, 2)).mean())


@pytest.mark.parametrize("name", ["tent_classification", "tent_segmentation"])
def test_tent_learns_scales_and_shifts_alone_and_normalises_by_the_batch(name: str) -> None:
    module = example(name)
    if name == "tent_classification":
        network = module.timm.create_model("resnet10t", num_classes=10)
    else:
        network = module.lraspp_mobilenet_v3_large(num_classes=10, weights_backbone=None)
    images = 3 + 2 * torch.randn(4, 3, 64, 64)  # not the statistics that the network has kept
    expected = _predict(network.train().apply(_without_dropout), name, images)
    optimizer = torch.optim.SGD(module.prepare(network), lr=0.1)
    torch.testing.assert_close(_predict(network, name, images), expected)

    norms = {n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    MaxSquareLoss()(_predict(network, name, images)).backward()
    optimizer.step()
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert {key.rpartition(".")[0] for key in changed} <= norms


def _predict(network: nn.Module, name: str, images: Tensor) -> Tensor:
    logits: Tensor = network(images) if name == "tent_classification" else network(images)["out"]
    return logits


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.eval()
