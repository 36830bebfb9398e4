"""Test-time adaptation of a classifier of timm, in the manner of TENT (Wang et al., ICLR 2021).

The network predicts every batch when it arrives, then takes one step on its own prediction, with
TENT's entropy or with maximum squares. Only scale and shift of the normalisation layers learn.
Low-resolution logits and align_corners: a classifier's logits are (N, C); nothing is upsampled.
"""

import timm
import torch
from torch import nn

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
        network = timm.create_model("resnet10t", num_classes=10)  # pretrained=True: a trained one
        optimizer = torch.optim.SGD(prepare(network), lr=1e-3, momentum=0.9)
        for step in range(3):
            logits = network(torch.randn(8, 3, 64, 64))  # the prediction is their argmax
            loss = target_loss(logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step}  {type(target_loss).__name__} {loss.item():.4f}")


if __name__ == "__main__":
    main()
