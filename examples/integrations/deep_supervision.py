"""Deep supervision, as in nnU-Net: a list of heads of different resolutions, in three dimensions.

Low-resolution logits: the heads as they are; every loss upsamples each of them to `size`.
align_corners: False, or that of the network's own upsampling.
"""

import torch
from torch import nn

from maxsquare import IWMaxSquareLoss, MultiLevelLoss, functional


class Network(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv3d(n, 8, 3, 1 if n == 1 else 2, 1) for n in (1, 8, 8))
        self.heads = nn.ModuleList(nn.Conv3d(8, classes, 1) for _ in self.levels)

    def forward(self, x):
        return [self.heads[i](x := self.levels[i](x).relu()) for i in range(3)]


def main():
    torch.manual_seed(0)
    network = Network(classes=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9)
    target_loss = MultiLevelLoss(IWMaxSquareLoss(), threshold=0.3)  # 0.95 once it is trained
    for step in range(3):
        (source, target), labels = torch.randn(2, 2, 1, 8, 16, 16), torch.randint(4, (2, 8, 16, 16))
        (logits, *low_logits), size = network(target), labels.shape[-3:]
        heads = enumerate(network(source))  # of full, half and quarter resolution
        loss = sum(0.5**i * functional.cross_entropy(head, labels, size=size) for i, head in heads)
        optimizer.zero_grad()
        (loss + 0.1 * target_loss(logits, low_logits, size=size)).backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
