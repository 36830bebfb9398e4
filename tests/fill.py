"""Weights that two implementations share without a file: each tensor is drawn from a generator
seeded with the CRC-32 of its name. The recorded numbers in fixtures/ belong to them."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn


def fill(model: nn.Module) -> None:
    """Overwrite every weight and statistic of a model."""
    for key, tensor in model.state_dict().items():
        tensor.copy_(_values(key, tensor) if tensor.is_floating_point() else torch.zeros(()))


def _values(key: str, tensor: Tensor) -> Tensor:
    noise = torch.randn(
        tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))
    )
    if tensor.dim() == 4:  # convolution
        return noise * (2 / tensor[0].numel()) ** 0.5
    if key.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if key.endswith("weight"):  # BatchNorm
        return 0.5 + 0.1 * noise
    return 0.1 * noise
