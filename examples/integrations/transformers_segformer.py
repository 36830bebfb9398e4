"""SegFormer of transformers.

Low-resolution logits: `logits` of the output, at a quarter of the images' height and width.
align_corners: False, as in the network's own loss and post-processing.
"""

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from maxsquare import IWMaxSquareLoss
from maxsquare.functional import cross_entropy


def main():
    torch.manual_seed(0)
    # SegformerForSemanticSegmentation.from_pretrained(...) gives a trained one.
    tiny = {"hidden_sizes": (8, 16, 24, 32), "num_attention_heads": (1, 2, 3, 4)}
    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=19, **tiny))
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-5)
    target_loss = IWMaxSquareLoss(scale="reference")
    for step in range(3):
        source_images, target_images = torch.randn(2, 2, 3, 64, 128)
        labels = torch.randint(19, (2, 64, 128))
        upsampled = {"size": (64, 128), "align_corners": False}
        logits = network(source_images).logits
        source = cross_entropy(logits, labels, ignore_index=255, **upsampled)
        target = target_loss(network(target_images).logits, **upsampled)
        optimizer.zero_grad()
        (source + 0.1 * target).backward()
        optimizer.step()
        print(f"step {step}  source {source.item():.3f}  target {target.item():.4f}")


if __name__ == "__main__":
    main()
