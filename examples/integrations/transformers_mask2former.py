"""Mask2Former of transformers, which predicts masks and their classes instead of a class per pixel.

Low-resolution logits: none. Classes and masks give low-resolution probabilities: from_logits=False.
align_corners: False, as in the network's post-processing.
"""

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from maxsquare import IWMaxSquareLoss


def probabilities(output):
    """(N, C, height / 4, width / 4), scaled to add up to one over the classes of a pixel."""
    classes = output.class_queries_logits.softmax(-1)[..., :-1]  # the last one is "no object"
    scores = torch.einsum("nqc,nqhw->nchw", classes, output.masks_queries_logits.sigmoid())
    return scores / scores.sum(1, keepdim=True)


def main():
    torch.manual_seed(0)
    # Mask2FormerForUniversalSegmentation.from_pretrained(...) gives a trained one.
    tiny = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 10, "train_num_points": 64}
    network = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(num_labels=19, **tiny))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    target_loss = IWMaxSquareLoss(scale="reference", from_logits=False)
    for step in range(3):
        source_images, target_images = torch.randn(2, 2, 3, 64, 128)
        masks, classes = torch.ones(1, 64, 128), torch.tensor([step])  # of every source image
        source = network(source_images, mask_labels=[masks] * 2, class_labels=[classes] * 2).loss
        target = target_loss(probabilities(network(target_images)), size=(64, 128))
        optimizer.zero_grad()
        (source + 0.1 * target).backward()
        optimizer.step()
        print(f"step {step}  source {source.item():.3f}  target {target.item():.4f}")


if __name__ == "__main__":
    main()
