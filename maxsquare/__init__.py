"""Losses that adapt a segmentation network to images nobody has labelled."""

from maxsquare import functional
from maxsquare.diagnostics import GradientProfile, class_gradient_share, gradient_profile
from maxsquare.losses import (
    EntropyLoss,
    IWEntropyLoss,
    IWMaxSquareLoss,
    InformationMaximizationLoss,
    MaxSquareLoss,
    MultiLevelGuidance,
    MultiLevelLoss,
    PseudoLabelLoss,
    TeacherLoss,
    TsallisEntropyLoss,
)

__version__ = "0.2.0"

__all__ = [
    "EntropyLoss",
    "GradientProfile",
    "IWEntropyLoss",
    "IWMaxSquareLoss",
    "InformationMaximizationLoss",
    "MaxSquareLoss",
    "MultiLevelGuidance",
    "MultiLevelLoss",
    "PseudoLabelLoss",
    "TeacherLoss",
    "TsallisEntropyLoss",
    "class_gradient_share",
    "functional",
    "gradient_profile",
]
