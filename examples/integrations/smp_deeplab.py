"""A network of segmentation_models_pytorch.

Low-resolution logits: upsampling=1, an argument of DeepLabV3(Plus), FPN, PAN, PSPNet, Segformer and
UPerNet. The logits of a Unet have the images' resolution: leave out `size`.
align_corners: True, as in the upsampling that this replaces.
"""

import segmentation_models_pytorch as smp
import torch

from maxsquare import IWMaxSquareLoss
from maxsquare.functional import cross_entropy


def main():
    torch.manual_seed(0)
    network = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=19, upsampling=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=2.5e-4, momentum=0.9)
    target_loss = IWMaxSquareLoss(scale="reference")
    for step in range(3):
        source_images, target_images = torch.randn(2, 2, 3, 64, 128)
        labels = torch.randint(19, (2, 64, 128))
        upsampled = {"size": (64, 128), "align_corners": True}
        source = cross_entropy(network(source_images), labels, ignore_index=255, **upsampled)
        target = target_loss(network(target_images), **upsampled)
        optimizer.zero_grad()
        (source + 0.1 * target).backward()
        optimizer.step()
        print(f"step {step}  source {source.item():.3f}  target {target.item():.4f}")


if __name__ == "__main__":
    main()
