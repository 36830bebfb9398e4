"""mmsegmentation: a target loss in its registry, for a head's `loss_decode` and for a UDA step.

In a configuration: custom_imports = dict(imports=["mmseg_loss"]), and within decode_head
loss_decode=[dict(type="CrossEntropyLoss", avg_non_ignore=True), dict(type="TargetMaxSquareLoss")].
Low-resolution logits: those of a head's forward, with `size`; loss_decode gets upsampled ones.
align_corners: the head's attribute of that name.
"""

from mmseg.registry import MODELS
from torch import nn

from maxsquare import IWMaxSquareLoss


@MODELS.register_module()
class TargetMaxSquareLoss(nn.Module):
    def __init__(self, ratio=0.2, loss_weight=0.1, loss_name="loss_max_square"):
        super().__init__()
        self.terms = IWMaxSquareLoss(ratio, scale="reference", reduction="none")
        self.mean = IWMaxSquareLoss(ratio, scale="reference")
        self.loss_weight, self.loss_name = loss_weight, loss_name

    def forward(self, logits, label=None, weight=None, size=None, align_corners=False, **_):
        """All pixels, labelled or not; weight (N, H, W) is a factor of each, 0 leaves it out."""
        call = {"size": size, "align_corners": align_corners}
        if weight is None:
            return self.loss_weight * self.mean(logits, **call)
        terms = weight * self.terms(logits, valid=weight > 0, **call)
        return self.loss_weight * terms.flatten(1).sum(1).mean()


def target_step(model, images, loss):
    """The target loss of unlabelled images, of an EncoderDecoder's low-resolution logits."""
    head = model.decode_head
    logits = head(model.extract_feat(images))
    return loss(logits, size=images.shape[2:], align_corners=head.align_corners)
