"""Promises of uda.deeplab: the published network, number for number, and its weights files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fill import fill
from torch import Tensor, nn

from uda import checkpoint
from uda.deeplab import DeepLabV2, deeplab_resnet101, deeplab_small, load_weights
from uda.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
Weights = dict[str, Tensor]


def recorded(key: str) -> Tensor:
    with np.load(FIXTURES / "model.npz") as arrays:
        return torch.from_numpy(arrays[key])


def upsampled(logits: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)


def tiny(**options: object) -> DeepLabV2:
    return DeepLabV2(5, blocks=(1, 1, 1, 1), width=8, **options)  # type: ignore[arg-type]


def test_resnet101_has_the_published_keys_and_shapes() -> None:
    with torch.device("meta"):
        model = deeplab_resnet101(19)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == json.loads((FIXTURES / "deeplab_resnet101_keys.json").read_text())


def test_resnet101_gives_the_published_logits() -> None:
    model = deeplab_resnet101(19).eval()
    fill(model)
    images = recorded("resnet101/input")
    with torch.no_grad():
        for head, logits in zip(("final", "low"), model(images), strict=True):
            got = upsampled(logits, images)[..., ::4, ::4]
            wanted = recorded(f"resnet101/{head}")
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_training_mode_gives_the_published_logits_and_statistics() -> None:
    model = DeepLabV2(5, blocks=(1, 1, 1, 1)).train()
    fill(model)
    images = recorded("tiny/input")
    for head, logits in zip(("final", "low"), model(images), strict=True):
        wanted = recorded(f"tiny_train/{head}")
        assert (upsampled(logits, images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    mean = recorded("tiny_train/layer4_running_mean")
    torch.testing.assert_close(model.layer4[0].bn3.running_mean, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(33, 65), (32, 64)])
def test_logits_reach_from_corner_to_corner_at_stride_8(
    size: tuple[int, int],
) -> None:
    for logits in deeplab_small(4)(torch.randn(2, 3, *size)):
        assert logits.shape == (2, 4, 5, 9)


@pytest.mark.parametrize(("aspp", "used"), [("published", (6, 12)), ("all", (6, 12, 18, 24))])
def test_aspp_sums_its_dilations(aspp: str, used: tuple[int, ...]) -> None:
    head = tiny(aspp=aspp).layer6
    features = torch.randn(1, 256, 9, 9)
    parts = [
        F.conv2d(features, conv.weight, conv.bias, padding=d, dilation=d)
        for d, conv in zip((6, 12, 18, 24), head.conv2d_list, strict=True)
        if d in used
    ]
    torch.testing.assert_close(head(features), torch.stack(parts).sum(0))
    trained = [conv.weight.requires_grad for conv in head.conv2d_list]
    assert trained == [d in used for d in (6, 12, 18, 24)]


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    images = torch.randn(2, 3, 33, 33)
    for freeze_bn in (True, False):
        model = tiny(freeze_bn=freeze_bn).train()
        before = model.layer1[0].bn1.running_mean.clone()
        model(images)
        assert torch.equal(model.layer1[0].bn1.running_mean, before) is freeze_bn


def test_every_trained_parameter_gets_a_gradient_and_the_stem_affine_none() -> None:
    model = tiny().train()
    logits, low_logits = model(torch.randn(2, 3, 33, 33))
    (logits.square().sum() + low_logits.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
    assert not model.bn1.weight.requires_grad


def test_bad_options_raise() -> None:
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        deeplab_small(1)
    with pytest.raises(ValueError, match="aspp must be .* got 'none'"):
        tiny(aspp="none")


def heads_of(model: nn.Module) -> Weights:
    return {k: v for k, v in model.state_dict().items() if k.startswith(("layer5.", "layer6."))}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: tensor for key, tensor in weights.items()}


def with_score(weights: Weights) -> dict[str, object]:
    return {"state_dict": prefixed("module.", weights), "best_MIou": np.float64(0.46), "epoch": 3}


@pytest.mark.parametrize(
    "form",
    [
        dict,
        lambda weights: prefixed("module.", weights),
        lambda weights: prefixed("_orig_mod.", weights),
        lambda weights: {"state_dict": weights},
        lambda weights: {"model": weights, "step": 7},
        with_score,
        lambda weights: {k: v for k, v in weights.items() if "num_batches" not in k},
    ],
    ids=["bare", "module.", "compiled", "wrapped", "ours", "published", "old"],
)
def test_checkpoints_load_in_every_published_form(
    form: Callable[[Weights], object], tmp_path: Path
) -> None:
    saved, model = tiny(), tiny()
    fill(saved)
    torch.save(form(saved.state_dict()), tmp_path / "weights.pth")
    assert load_weights(model, tmp_path / "weights.pth") is True
    for key, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_initialisation_fills_the_backbone_and_leaves_the_heads(tmp_path: Path) -> None:
    saved, model = tiny(), tiny()
    fill(saved)
    weights = {k: v for k, v in saved.state_dict().items() if not k.startswith("layer6.")}
    # The published file's one classifier has other classes and another width than our low head.
    weights["layer5.conv2d_list.0.weight"] = torch.zeros(21, 256, 3, 3)
    torch.save(prefixed("Scale.", weights), tmp_path / "init.pth")
    heads = {key: tensor.clone() for key, tensor in heads_of(model).items()}
    assert load_weights(model, tmp_path / "init.pth") is False
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, heads.get(key, saved.state_dict()[key])), key


def test_torchvision_weights_see_our_images_as_theirs(tmp_path: Path) -> None:
    theirs, model = torchvision.models.resnet101(), deeplab_resnet101(3)
    torch.save(theirs.state_dict(), tmp_path / "resnet101.pth")
    assert load_weights(model, tmp_path / "resnet101.pth") is False
    assert torch.equal(model.layer3[22].conv2.weight, theirs.layer3[22].conv2.weight)
    rgb = torch.rand(1, 3, 16, 16)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    # Without their means, both stems being linear.
    torch.testing.assert_close(model.conv1(255 * rgb.flip(1)), theirs.conv1(rgb / std))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: DeepLabV2(4, blocks=(1, 1, 1, 1), width=8).state_dict(),
            r"layer5.*\(4, 128, 3, 3\)",
        ),
        (lambda: DeepLabV2(5, blocks=(2, 1, 1, 1), width=8).state_dict(), r"unknown layer1\.1"),
        (lambda: DeepLabV2(5, blocks=(1, 1, 1, 1), width=4).state_dict(), r"has conv1\.weight"),
        (lambda: heads_of(tiny()), "conv1.weight"),
        (lambda: {"epoch": 3}, "holds no weights"),
        (lambda: [1, 2], "list, not a dictionary"),
    ],
    ids=["classes", "deeper", "narrower", "no backbone", "no tensors", "no dictionary"],
)
def test_weights_that_do_not_fit_are_named(
    content: Callable[[], object], message: str, tmp_path: Path
) -> None:
    torch.save(content(), tmp_path / "other.pth")
    model = tiny()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_weights(model, tmp_path / "other.pth")
    assert "other.pth" in str(caught.value)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    weights = tiny().state_dict()
    weights["conv1.weight"] = weights["conv1.weight"].to(torch.uint8)
    torch.save(weights, tmp_path / "quantised.pth")
    with pytest.raises(UserError, match=r"has conv1\.weight in torch\.uint8"):
        load_weights(tiny(), tmp_path / "quantised.pth")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    weights = tiny().state_dict()
    del weights["layer2.0.conv3.weight"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part\.pth .* lacks layer2\.0\.conv3\.weight"):
        load_weights(tiny(), tmp_path / "part.pth")


def test_own_checkpoints_load_as_weights(tmp_path: Path) -> None:
    saved, model = tiny(), tiny()
    checkpoint.save(tmp_path / "last.pt", {"model": saved.state_dict(), "classes": 5})
    assert load_weights(model, tmp_path / "last.pt") is True
    assert torch.equal(model.conv1.weight, saved.conv1.weight)
