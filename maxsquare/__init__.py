"""Losses that adapt a segmentation network to images nobody has labelled.

Modules, called with the network's logits at its own resolution and `size=`:

- `MaxSquareLoss`, `IWMaxSquareLoss`: maximum squares, and with weights that balance classes.
- `EntropyLoss`, `IWEntropyLoss`: entropy minimisation, and with these weights.
- `TsallisEntropyLoss`: the family that has both.
- `PseudoLabelLoss`, `TeacherLoss`: cross entropy against sure predictions.
- `InformationMaximizationLoss`: around any of these, keeps classes from being swallowed.
- `MultiLevelGuidance`, `MultiLevelLoss`: low-level heads learn from the averaged prediction.

Functions of the same options, in `maxsquare.functional`:

- `max_square`, `entropy`, `tsallis_entropy`, `pseudo_label_loss`, `teacher_loss`, `guidance_loss`:
  the modules above.
- `cross_entropy`: the source loss, the upsampling included.
- `image_weights`, `guidance_labels`, `class_proportions`: what the losses are made of.

Diagnostics:

- `PredictionStatistics`: chooses weights and checkpoints without labels; returns `Statistics`.
- `gradient_profile`, `class_gradient_share`: what a loss does with confidence and with classes.
"""

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

__version__ = "0.3.0"

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
