"""DeepLabv2 with two classifier heads, and the files its weights come from.

The network is a ResNet whose last two stages keep stride 8 and dilate their convolutions instead.
The final head reads the last stage, the low-level head the stage before it; multi-level guidance
trains the low-level head on the target. Layer names and shapes are those of the published
implementation, so that its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from uda import checkpoint

Aspp = Literal["published", "all"]
DILATIONS = (6, 12, 18, 24)
# The published head returns inside its loop over the dilations, so that it uses only two.
DILATIONS_USED: dict[Aspp, int] = {"published": 2, "all": 4}
HEADS = ("layer5.", "layer6.")
# torchvision's weights expect RGB / 255 divided by these; ours see BGR on the scale 0..255.
TORCHVISION_STD = (0.229, 0.224, 0.225)


class AtrousHead(nn.Module):
    """Sum of 3x3 classifiers at several dilations (ASPP).

    All four are always present, so that every checkpoint fits; those that are not used are frozen.
    """

    def __init__(self, channels: int, classes: int, aspp: Aspp) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(channels, classes, kernel_size=3, padding=d, dilation=d) for d in DILATIONS
        )
        for conv in self.conv2d_list:
            nn.init.normal_(conv.weight, std=0.01)
        self.used = DILATIONS_USED[aspp]
        self.conv2d_list[self.used :].requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        logits = self.conv2d_list[0](features)
        for conv in self.conv2d_list[1 : self.used]:
            logits = logits + conv(features)
        return logits


class DeepLabV2(nn.Module):
    """DeepLabv2: a dilated bottleneck ResNet with a final and a low-level classifier head.

    Args:
        classes: number of classes of both heads.
        blocks: number of bottleneck blocks in each of the four stages.
        width: channels of the stem; stage i ends in 4 * width * 2^i channels.
        aspp: "published" uses the head's dilations 6 and 12 only, "all" adds 18 and 24.
        freeze_bn: keep BatchNorm on its running statistics while training.

    Shape: images (N, 3, H, W), BGR minus the mean, to a pair (logits, low_logits), each
        (N, classes, h, w) at stride 8. They are not upsampled: give the losses ``size=(H, W)`` and
        ``align_corners=True``.
    """

    def __init__(
        self,
        classes: int,
        *,
        blocks: Sequence[int],
        width: int = 64,
        aspp: Aspp = "published",
        freeze_bn: bool = False,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        if aspp not in DILATIONS_USED:
            raise ValueError(f'aspp must be "published" or "all", got {aspp!r}')
        self.freeze_bn = freeze_bn
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width).requires_grad_(False)
        self.relu = nn.ReLU(inplace=True)
        # ceil_mode: images of 8k and of 8k + 1 pixels both give k + 1 positions, so that the
        # corners of the logits are the corners of the image (align_corners).
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = _stage(width, width, blocks[0])
        self.layer2 = _stage(4 * width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(8 * width, 4 * width, blocks[2], dilation=2)
        self.layer4 = _stage(16 * width, 8 * width, blocks[3], dilation=4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.layer5 = AtrousHead(16 * width, classes, aspp)
        self.layer6 = AtrousHead(32 * width, classes, aspp)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer3(self.layer2(self.layer1(stem)))
        return self.layer6(self.layer4(features)), self.layer5(features)

    def train(self, mode: bool = True) -> DeepLabV2:
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def _stage(
    channels: int, width: int, blocks: int, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """One ResNet stage; unlike torchvision, the first 1x1 convolution carries the stride."""
    out_channels = width * Bottleneck.expansion
    shortcut = nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )
    first = Bottleneck(channels, width, downsample=shortcut, dilation=dilation)
    first.conv1.stride = (stride, stride)
    rest = (Bottleneck(out_channels, width, dilation=dilation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def deeplab_resnet101(
    classes: int, *, aspp: Aspp = "published", freeze_bn: bool = False
) -> DeepLabV2:
    """The published network."""
    return DeepLabV2(classes, blocks=(3, 4, 23, 3), aspp=aspp, freeze_bn=freeze_bn)


def deeplab_small(classes: int, *, aspp: Aspp = "published", freeze_bn: bool = False) -> DeepLabV2:
    """A narrow, shallow network that trains from scratch on a CPU in minutes."""
    return DeepLabV2(classes, blocks=(1, 2, 2, 1), width=16, aspp=aspp, freeze_bn=freeze_bn)


def load_weights(model: DeepLabV2, path: Path) -> bool:
    """Load a file of weights into a model.

    There are two kinds of files. A *checkpoint* holds both heads and must fit completely. An
    *initialisation* (published ImageNet or COCO weights, or torchvision's ResNet-101) has no second
    head: its backbone is loaded, other classifiers in it are ignored, and the heads stay as they
    are. Weights may lie in the file itself or under "model" or "state_dict"; a common prefix of
    their names ("module.", "Scale.") is removed. torchvision's first convolution expects RGB of
    unit variance and is rescaled to our BGR minus mean (the means differ by less than one grey
    level of 255).

    Returns:
        Whether the heads were loaded too.

    Raises:
        UserError: the file cannot be read or does not fit; names the first keys at fault.
    """
    weights = checkpoint.read_weights(path)
    is_torchvision = "fc.weight" in weights
    weights = checkpoint.strip_prefix(weights, "conv1.weight")
    is_checkpoint = any(key.startswith("layer6.") for key in weights)
    if not is_checkpoint:
        weights = {key: w for key, w in weights.items() if not key.startswith(("fc.", *HEADS))}
        if is_torchvision:
            std = torch.tensor(TORCHVISION_STD).view(1, 3, 1, 1)
            weights["conv1.weight"] = (weights["conv1.weight"] / (255 * std)).flip(1)
    checkpoint.load_weights(model, weights, path, optional=() if is_checkpoint else HEADS)
    return is_checkpoint
