"""torchvision's DeepLabv3, whose auxiliary head is the low-level head of the multi-level loss.

Low-resolution logits: call the backbone and the heads; the network's own forward upsamples.
align_corners: False, as in that forward.
"""

import torch
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from maxsquare import IWMaxSquareLoss, MultiLevelLoss
from maxsquare.functional import cross_entropy


def low_resolution(network, images):
    features = network.backbone(images)
    return network.classifier(features["out"]), network.aux_classifier(features["aux"])


def main():
    torch.manual_seed(0)
    network = deeplabv3_mobilenet_v3_large(num_classes=19, aux_loss=True, weights_backbone=None)
    optimizer = torch.optim.SGD(network.parameters(), lr=2.5e-4, momentum=0.9)
    target_loss = MultiLevelLoss(IWMaxSquareLoss(scale="reference"), weight=0.1)
    for step in range(3):
        source_images, target_images = torch.randn(2, 2, 3, 64, 128)
        labels = torch.randint(19, (2, 64, 128))
        upsampled = {"size": (64, 128), "align_corners": False}
        logits, aux_logits = low_resolution(network, source_images)
        source = cross_entropy(logits, labels, ignore_index=255, **upsampled)
        source += 0.1 * cross_entropy(aux_logits, labels, ignore_index=255, **upsampled)
        target = target_loss(*low_resolution(network, target_images), **upsampled)
        optimizer.zero_grad()
        (source + 0.09 * target).backward()
        optimizer.step()
        print(f"step {step}  source {source.item():.3f}  target {target.item():.4f}")


if __name__ == "__main__":
    main()
