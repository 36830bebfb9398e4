"""Test-time adaptation of a segmentation network in the manner of TENT; here torchvision's LRASPP.

One image is a batch, except for DeepLabv3, which pools an image to one pixel before a BatchNorm.
Low-resolution logits: call backbone and classifier; the network's own forward upsamples.
align_corners: False, as in that forward. (Plain losses collapse on long streams.)
"""

import torch
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from maxsquare import EntropyLoss, InformationMaximizationLoss, MaxSquareLoss


def prepare(network):
    """Freeze everything but scales and shifts, which are returned; use each batch's statistics."""
    network.eval().requires_grad_(False)  # eval: no dropout
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    for norm in norms:
        norm.requires_grad_(True)
        norm.running_mean = norm.running_var = None  # without them BatchNorm uses the batch's
    return [parameter for norm in norms for parameter in norm.parameters()]


def main():
    for target_loss in (EntropyLoss(), InformationMaximizationLoss(MaxSquareLoss())):
        torch.manual_seed(0)
        network = lraspp_mobilenet_v3_large(num_classes=19, weights_backbone=None)
        optimizer = torch.optim.SGD(prepare(network), lr=1e-3, momentum=0.9)
        for step in range(3):
            logits = network.classifier(network.backbone(torch.randn(1, 3, 64, 128)))
            loss = target_loss(logits, size=(64, 128), align_corners=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step}  {type(target_loss).__name__} {loss.item():.4f}")


if __name__ == "__main__":
    main()
