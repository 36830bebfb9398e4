"""A LightningModule in mixed precision: the losses take bfloat16 logits and compute in float32.

Low-resolution logits: those of torchvision's LRASPP before its own upsampling.
align_corners: as the network needs it; False for all networks of torchvision.
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from maxsquare import IWMaxSquareLoss
from maxsquare.functional import cross_entropy


class Adaptation(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = lraspp_mobilenet_v3_large(num_classes=19, weights_backbone=None)
        self.target_loss = IWMaxSquareLoss(scale="reference")

    def training_step(self, batch):
        (source_images, labels), (target_images,) = batch["source"], batch["target"]
        head, backbone = self.network.classifier, self.network.backbone
        upsampled = {"size": labels.shape[1:], "align_corners": False}
        source = cross_entropy(head(backbone(source_images)), labels, ignore_index=255, **upsampled)
        target = self.target_loss(head(backbone(target_images)), **upsampled)
        self.print(f"step {self.global_step}  source {source:.3f}  target {target:.4f}")
        return source + 0.1 * target

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=6e-5)


if __name__ == "__main__":
    images, labels = torch.randn(2, 6, 3, 64, 128), torch.randint(19, (6, 64, 128))
    data = {"source": TensorDataset(images[0], labels), "target": TensorDataset(images[1])}
    loaders = {domain: DataLoader(data[domain], batch_size=2) for domain in data}
    options = {"precision": "bf16-mixed", "logger": False, "enable_checkpointing": False}
    lightning.Trainer(max_steps=3, **options).fit(Adaptation(), loaders)
