"""A three-dimensional U-Net of MONAI.

Low-resolution logits: none. A U-Net's logits have the volume's resolution: leave out `size`.
align_corners: nothing is upsampled.
Batches of MONAI's loaders are MetaTensors; `as_tensor()` saves their bookkeeping in every layer.
"""

import torch
from monai.data import MetaTensor
from monai.networks.nets import UNet

from maxsquare import IWMaxSquareLoss
from maxsquare.functional import cross_entropy


def main():
    torch.manual_seed(0)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=4, channels=(8, 16), strides=(2,))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    target_loss = IWMaxSquareLoss(scale="reference")
    for step in range(3):
        source_volumes, target_volumes = (MetaTensor(torch.randn(2, 1, 24, 32, 32)) for _ in "st")
        labels = torch.randint(4, (2, 24, 32, 32))
        source = cross_entropy(network(source_volumes.as_tensor()), labels, ignore_index=255)
        target = target_loss(network(target_volumes.as_tensor()))
        optimizer.zero_grad()
        (source + 0.1 * target).backward()
        optimizer.step()
        print(f"step {step}  source {source.item():.3f}  target {target.item():.4f}")


if __name__ == "__main__":
    main()
