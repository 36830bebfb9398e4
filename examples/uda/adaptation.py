"""Unsupervised domain adaptation with a maximum squares loss: one step, and the loops over steps.

We have labelled images of one domain (the source, say rendered streets) and unlabelled images of
another (the target, say real streets). A network first learns from the source alone
(`train_source`). On the target it is then less accurate, and less certain. Adaptation (`adapt`)
continues to learn from the source labels, while a target loss pushes the predicted class
probabilities p of every target pixel towards certainty. Entropy minimisation does that too, but its
gradient is largest on pixels that are nearly certain already, so that easy classes (road, sky)
drown out the hard ones. The gradient of the maximum squares loss -sum_c p_c^2 / 2 grows only
linearly with p. Its image-wise form also divides the loss of a pixel by (a power of) the number of
pixels that are predicted as the same class in that image, so that rare classes count. The
multi-level form also teaches a second, low-level head: wherever either head is confident, the class
on which they agree on average becomes a label for the low-level head, which improves the features
that both heads share. No discriminator and no target label is needed.

Nothing in these losses keeps a class from swallowing the others. The methods called -information
add the divergence of the mean prediction from uniform, which does. The method called teacher learns
from the moving average of the model: what the average sees in an image becomes labels for the
model, which sees only parts of that image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import maxsquare
from maxsquare import functional
from uda.datasets import Sample
from uda.deeplab import HEADS

BackboneUpdates = Literal["torch-1.0", "duplicated", "once"]
# How often one step updates (stem, stages, shortcuts); see RepeatedSGD.
REPEATS: dict[BackboneUpdates, tuple[int, int, int]] = {
    "torch-1.0": (1, 3, 4),
    "duplicated": (1, 3, 4),
    "once": (1, 1, 1),
}


def methods(
    *,
    ratio: float = 0.2,
    threshold: float = 0.95,
    low_weight: float = 0.1,
    prior: Tensor | None = None,
) -> dict[str, nn.Module | None]:
    """The target loss of each method, by name; None: learn from the source alone.

    The published target weights (0.1, and 0.09 for maxsquare-iw-multi) belong to these defaults
    and to scale="reference". prior: class proportions from which the methods called -information
    keep the mean prediction from moving away; None: uniform.
    """
    entropy = maxsquare.EntropyLoss(scale="reference")
    plain = maxsquare.MaxSquareLoss(scale="reference")
    image_wise = maxsquare.IWMaxSquareLoss(ratio=ratio, scale="reference")
    return {
        "source": None,
        "entropy": entropy,
        "entropy-information": maxsquare.InformationMaximizationLoss(entropy, prior=prior),
        "entropy-iw": maxsquare.IWEntropyLoss(ratio=ratio, scale="reference"),
        "tsallis-1.5": maxsquare.TsallisEntropyLoss(1.5, scale="reference"),
        "maxsquare": plain,
        "maxsquare-information": maxsquare.InformationMaximizationLoss(plain, prior=prior),
        "maxsquare-iw": image_wise,
        "maxsquare-iw-information": maxsquare.InformationMaximizationLoss(image_wise, prior=prior),
        "maxsquare-iw-multi": maxsquare.MultiLevelLoss(
            image_wise, threshold=threshold, weight=low_weight
        ),
        "pseudo-label": maxsquare.PseudoLabelLoss(threshold=threshold),
        "teacher": maxsquare.TeacherLoss(threshold=threshold, average="share"),
    }


class Losses(NamedTuple):
    """The terms of one step as they entered the objective, weights included; detached scalars."""

    source: Tensor
    source_low: Tensor
    target: Tensor


def adaptation_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source_images: Tensor,
    source_labels: Tensor,
    target_images: Tensor,
    target_loss: nn.Module,
    *,
    target_weight: float,
    low_weight: float = 0.0,
    align_corners: bool = True,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    teacher: nn.Module | None = None,
) -> Losses:
    """Learn from labelled source images and unlabelled target images; one optimiser step.

    Each domain passes through the network by itself: BatchNorm normalises each with its own batch
    statistics, and only one graph is in memory at a time.

    Args:
        model: images (N, 3, H, W) to (logits, low_logits) at any stride, in training mode;
            low_logits is None for a network of one head.
        optimizer: updates the model; set its learning rate first (`set_learning_rate`).
        source_images, source_labels: (N, 3, H, W) and (N, H, W), -1 = ignored.
        target_images: (M, 3, H', W').
        target_loss: any maxsquare loss; a MultiLevelLoss sees both heads, others the final one.
        target_weight: weight of the target loss; its size depends on the loss's ``scale``.
        low_weight: weight of the low-level head's source cross entropy; 0 leaves that head alone.
        align_corners: how logits are upsampled, as in `torch.nn.functional.interpolate`.
        backward: computes the gradients; ``fabric.backward`` under Lightning Fabric.
        teacher: its logits of the whole target images are the second argument of the target loss,
            a `TeacherLoss`, and the model sees these images `masked`; see `make_teacher`.

    Returns:
        The losses, on the model's device: the step does not synchronise, reading their values does.
    """
    optimizer.zero_grad()
    source, source_low = source_losses(
        model, source_images, source_labels, low_weight, align_corners
    )
    backward(source + source_low)

    logits, low_logits = model(target_images if teacher is None else masked(target_images))
    heads = (logits, low_logits) if reads_both_heads(target_loss) else (logits,)
    if teacher is not None:
        with torch.no_grad():
            heads = (logits, teacher(target_images)[0])
    size = target_images.shape[-2:]
    target = target_weight * target_loss(*heads, size=size, align_corners=align_corners)
    backward(target)

    optimizer.step()
    return Losses(source.detach(), source_low.detach(), target.detach())


def source_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source_images: Tensor,
    source_labels: Tensor,
    *,
    low_weight: float = 0.0,
    align_corners: bool = True,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Losses:
    """Learn from labelled source images alone; arguments as in `adaptation_step`."""
    optimizer.zero_grad()
    source, source_low = source_losses(
        model, source_images, source_labels, low_weight, align_corners
    )
    backward(source + source_low)
    optimizer.step()
    return Losses(source.detach(), source_low.detach(), target=source.new_zeros(()))


def train_source(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Sample],
    rates: Iterable[float],
    **options: Any,
) -> Iterator[Losses]:
    """Take one `source_step` with these options for every learning rate; yields its losses."""
    for rate, (images, labels, _) in zip(rates, batches, strict=True):
        set_learning_rate(optimizer, rate)
        yield source_step(model, optimizer, images, labels, **options)


def adapt(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Iterable[Sample],
    target: Iterable[Sample],
    rates: Iterable[float],
    target_loss: nn.Module | None,
    *,
    target_weight: float,
    low_weight: float,
    teacher: AveragedModel | None = None,
    **options: Any,
) -> Iterator[Losses]:
    """Take one `adaptation_step` for every learning rate; yields its losses.

    Args:
        model, optimizer: as in `adaptation_step`.
        source, target: one batch per step; the labels of the target are not used.
        rates: learning rate of each step, see `learning_rates`.
        target_loss: one of `methods`; None learns from the source alone and leaves `target` unread.
        target_weight: weight of the target loss.
        low_weight: weight of the low-level head's source cross entropy, where the target loss reads
            that head.
        teacher: from `make_teacher`, where the target loss learns from one; follows the model.
        options: others of `adaptation_step`.
    """
    if target_loss is None:
        yield from train_source(model, optimizer, source, rates, **options)
        return
    for rate, (images, labels, _), (target_images, _, _) in zip(rates, source, target, strict=True):
        set_learning_rate(optimizer, rate)
        losses = adaptation_step(
            model,
            optimizer,
            images,
            labels,
            target_images,
            target_loss,
            target_weight=target_weight,
            low_weight=low_weight if reads_both_heads(target_loss) else 0.0,
            teacher=teacher,
            **options,
        )
        if teacher is not None:
            teacher.update_parameters(model)
        yield losses


def make_teacher(model: nn.Module, decay: float = 0.99) -> AveragedModel:
    """The exponential moving average of a model; `AveragedModel.update_parameters` moves it.

    It normalises by batch statistics where the model does (BatchNorm), and drops no units.
    """
    teacher = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for module in teacher.modules():
        module.training &= isinstance(module, _BatchNorm)
    return teacher.requires_grad_(False)


def masked(images: Tensor, share: float = 0.5, patches: int = 8) -> Tensor:
    """Images in which a share of the square patches is set to 0, the mean colour.

    To label what it does not see, a model has to use context (MIC, Hoyer et al., CVPR 2023).

    Args:
        images: (N, 3, H, W), normalised.
        share: of the patches that are hidden.
        patches: number of patches along the shorter side.
    """
    height, width = images.shape[-2:]
    side = -(-min(height, width) // patches)
    grid = torch.rand(len(images), 1, -(-height // side), -(-width // side), device=images.device)
    visible = F.interpolate((grid >= share).to(images.dtype), scale_factor=side)
    return images * visible[..., :height, :width]


def target_statistics(model: nn.Module, target_images: Iterable[Tensor]) -> None:
    """Let BatchNorm take its running statistics from batches of target images, and learn nothing.

    This measures one part of every adaptation: while a network adapts, target images enter these
    statistics, whatever the loss.
    """
    update_bn(target_images, model)


def source_losses(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    low_weight: float,
    align_corners: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the final head, and of the low-level head times its weight."""
    logits, low_logits = model(images)
    options = {"size": labels.shape[-2:], "align_corners": align_corners}
    source = functional.cross_entropy(logits, labels, **options)
    # With weight 0 the low head gets no gradient: even a zero gradient would decay its weights.
    if low_weight == 0 or low_logits is None:
        return source, source.new_zeros(())
    return source, low_weight * functional.cross_entropy(low_logits, labels, **options)


def reads_both_heads(target_loss: nn.Module | None) -> bool:
    """Whether a target loss takes the low-level logits, too."""
    return isinstance(target_loss, (maxsquare.MultiLevelLoss, maxsquare.MultiLevelGuidance))


def poly_lr(step: int, total: int, base: float, power: float = 0.9) -> float:
    """Learning rate of step 0, 1, ..., total - 1: base * (1 - step / total)^power."""
    return base * (1 - step / total) ** power


def learning_rates(base: float, steps: range, total: int) -> Iterator[float]:
    """`poly_lr` of each step."""
    return (poly_lr(step, total, base) for step in steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `parameter_groups` its multiple of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiple"]


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    backbone_updates: BackboneUpdates = "once",
    head_multiple: float = 10.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of a network as groups for `RepeatedSGD`.

    Args:
        model: a DeepLabV2, or a network with the same names of layers; a network with other names
            has no heads here and learns at ``lr`` throughout.
        lr: learning rate of the backbone.
        backbone_updates: "once" updates every tensor once per step. "duplicated" updates the
            residual stages three times and their shortcuts four times, as often as the published
            code lists them: the backbone then moves about three times as far as ``lr`` says.
            "torch-1.0" follows the rule of torch 1.0.0, the version that the published code names,
            whose weight decay is about twice as strong; see `RepeatedSGD`.
        head_multiple: the heads' learning rate in units of ``lr``.
    """
    if backbone_updates not in REPEATS:
        raise ValueError(f"backbone_updates must be in {[*REPEATS]}, got {backbone_updates!r}")
    stem: list[Tensor] = []
    stages: list[Tensor] = []
    shortcuts: list[Tensor] = []
    heads: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(head in name for head in HEADS):
            heads.append(parameter)
        elif ".downsample." in name:
            shortcuts.append(parameter)
        elif "layer" in name:
            stages.append(parameter)
        else:
            stem.append(parameter)
    backbone = zip((stem, stages, shortcuts), REPEATS[backbone_updates], strict=True)
    groups = [{"params": p, "lr_multiple": 1.0, "repeats": repeats} for p, repeats in backbone]
    groups.append({"params": heads, "lr_multiple": head_multiple, "repeats": 1})
    carry = backbone_updates == "torch-1.0"
    return [{**group, "lr": lr * group["lr_multiple"], "carry": carry} for group in groups]


class RepeatedSGD(torch.optim.SGD):
    """SGD whose step updates each parameter group ``group["repeats"]`` times.

    The published code lists a backbone tensor once for every module that contains it, three or
    four times. torch.optim.SGD loops over that list and so updates the tensor three or four times
    in a row, each time with the momentum of the previous update. Two versions of torch differ:

    - Today's rule, where ``group["carry"]`` is False or missing: every update has the same gradient
      g and adds the weight decay of the present value, g + wd w. The very first step has no
      momentum yet, and each listing starts its own.
    - The rule of torch 1.0.0, where it is True: weight decay is added to the gradient in place, so
      that the k-th update decays k times, g + wd (w_1 + ... + w_k), and the updates of the very
      first step share their momentum, too. A first step of three updates then has the length of
      1 + 1.9 + 2.71 = 5.61 gradients, where today's has 3.

    This class needs no duplicates in the list. torch deprecates them, and its foreach and fused
    kernels update them differently (they decay the shared momentum for all listings before any of
    them adds its gradient).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        first = not self.state
        try:
            for repeat in range(max(group["repeats"] for group in groups)):
                listed = [group for group in groups if group["repeats"] > repeat]
                self.param_groups = [self._begin(group, first) for group in listed]
                super().step()
        finally:
            self.param_groups = groups
        return loss

    def _begin(self, group: dict[str, Any], first: bool) -> dict[str, Any]:
        """The group as its next update sees it."""
        if not group.get("carry"):
            if first:
                for parameter in group["params"]:
                    self.state.pop(parameter, None)
            return group
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=group["weight_decay"])
        return {**group, "weight_decay": 0}
