"""Losses that adapt a segmentation network to images nobody has labelled."""

from maxsquare import functional
from maxsquare.diagnostics import GradientProfile, class_gradient_share, gradient_profile
from maxsquare.losses import (
    EntropyLoss,
    IWEntropyLoss,
    IWMaxSquareLoss,
    MaxSquareLoss,
    MultiLevelGuidance,
    MultiLevelLoss,
    PseudoLabelLoss,
    TsallisEntropyLoss,
)

__version__ = "0.2.0"

__all__ = [
    "EntropyLoss",
    "GradientProfile",
    "IWEntropyLoss",
    "IWMaxSquareLoss",
    "MaxSquareLoss",
    "MultiLevelGuidance",
    "MultiLevelLoss",
    "PseudoLabelLoss",
    "TsallisEntropyLoss",
    "class_gradient_share",
    "functional",
    "gradient_profile",
]
