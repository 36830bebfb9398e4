"""How to use the losses in an ordinary PyTorch loop; train_uda.py measures what they achieve.

The network learns to tell discs from squares; the target images are paler, noisier and unlabelled.
"""

import torch
from torch import nn
from torch.nn import functional as F

from maxsquare import IWMaxSquareLoss


def scenes(count, generator, *, contrast, noise):
    """Images (count, 1, 32, 32) and their labels: 0 background, 1 disc, 2 square."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centers = torch.randint(6, 26, (count, 4, 1, 1), generator=generator)
    dx, dy = (x - centers[:, :2]).abs(), (y - centers[:, 2:]).abs()
    disc = dx[:, 0] ** 2 + dy[:, 0] ** 2 < 36
    square = torch.maximum(dx[:, 1], dy[:, 1]) < 5
    labels = torch.where(disc, 1, torch.where(square, 2, 0))
    random = torch.randn(labels.shape, generator=generator)
    return (contrast * (labels > 0) + noise * random)[:, None], labels


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    source_images, source_labels = scenes(64, generator, contrast=1.0, noise=0.1)
    target_images, _ = scenes(64, generator, contrast=0.6, noise=0.25)
    network = nn.Sequential(  # its logits have half the images' resolution
        nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 3, kernel_size=5, padding=2),
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    target_loss = IWMaxSquareLoss(ratio=0.2, scale="reference")

    for step in range(120):
        # The network first learns the task from the source alone, then from the target as well.
        target_weight = 0.1 if step >= 80 else 0.0
        batch = slice(8 * (step % 8), 8 * (step % 8) + 8)

        logits = F.interpolate(network(source_images[batch]), size=(32, 32), mode="bilinear")
        source = F.cross_entropy(logits, source_labels[batch])
        # The upsampling happens inside the loss, which never stores the large logits.
        target = target_loss(network(target_images[batch]), size=(32, 32))

        optimizer.zero_grad()
        (source + target_weight * target).backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1:3}  source {source.item():.3f}  target {target.item():.4f}")


if __name__ == "__main__":
    main()
