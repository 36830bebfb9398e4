"""Losses that adapt a segmentation network to images nobody has labelled."""

from maxsquare import functional
from maxsquare.diagnostics import (
    GradientProfile,
    PredictionStatistics,
    Statistics,
    class_gradient_share,
    gradient_profile,
)
from maxsquare.losses import (
    EntropyLoss,
    InformationMaximizationLoss,
    IWEntropyLoss,
    IWMaxSquareLoss,
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
    "PredictionStatistics",
    "PseudoLabelLoss",
    "Statistics",
    "TeacherLoss",
    "TsallisEntropyLoss",
    "class_gradient_share",
    "functional",
    "gradient_profile",
]
