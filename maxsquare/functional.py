"""The losses as functions, with their image weights, guidance and reductions.

The functions take the options of the modules in `maxsquare`, with the same names and defaults; the
modules document them, the formulas, shapes and errors. Each loss takes at most three steps: it
classifies every pixel, derives weights from the class counts, and sums weighted potentials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maxsquare import engine
from maxsquare.checks import (
    Activation,
    Average,
    Reduction,
    Scale,
    check_classes,
    check_heads,
    check_image_wise,
    check_labels,
    check_logits,
    check_map,
    check_number,
    check_options,
    check_size,
    check_teacher,
    check_weight,
    warn_at_first_call,
    warn_of_uncounted,
)
from maxsquare.engine import LogitsSpec
from maxsquare.potentials import CrossEntropy, Potential, Tsallis

Size = int | Sequence[int] | None

__all__ = [
    "class_proportions",
    "cross_entropy",
    "entropy",
    "guidance_labels",
    "guidance_loss",
    "image_weights",
    "max_square",
    "pseudo_label_loss",
    "teacher_loss",
    "tsallis_entropy",
]


def max_square(
    logits: Tensor,
    *,
    ratio: float | None = None,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
    scale: Scale = "paper",
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """-1/2 sum_c p_c^2, as in `maxsquare.MaxSquareLoss`, or with a ratio in `IWMaxSquareLoss`."""
    return _tsallis_loss(
        logits,
        # The sum of squares is 1 - S_2.
        Tsallis(2, offset=-1, normalised=from_logits),
        factor=0.5,
        # The published image-wise code leaves out the half.
        reference_factor=0.5 if ratio is None else 1,
        ratio=ratio,
        size=size,
        align_corners=align_corners,
        valid=valid,
        labels=labels,
        ignore_index=ignore_index,
        reduction=reduction,
        scale=scale,
        activation=activation,
        from_logits=from_logits,
    )


def entropy(
    logits: Tensor,
    *,
    ratio: float | None = None,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
    scale: Scale = "paper",
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """-sum_c p_c log p_c, as in `maxsquare.EntropyLoss`, or with a ratio in `IWEntropyLoss`."""
    return _tsallis_loss(
        logits,
        Tsallis(1, normalised=from_logits),
        ratio=ratio,
        size=size,
        align_corners=align_corners,
        valid=valid,
        labels=labels,
        ignore_index=ignore_index,
        reduction=reduction,
        scale=scale,
        activation=activation,
        from_logits=from_logits,
    )


def tsallis_entropy(
    logits: Tensor,
    q: float,
    *,
    ratio: float | None = None,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
    scale: Scale = "paper",
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """(1 - sum_c p_c^q) / (q - 1), as in `maxsquare.TsallisEntropyLoss`."""
    check_options(q=q)
    return _tsallis_loss(
        logits,
        Tsallis(q, normalised=from_logits),
        ratio=ratio,
        size=size,
        align_corners=align_corners,
        valid=valid,
        labels=labels,
        ignore_index=ignore_index,
        reduction=reduction,
        scale=scale,
        activation=activation,
        from_logits=from_logits,
    )


def pseudo_label_loss(
    logits: Tensor,
    *,
    threshold: float = 0.95,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: Reduction = "mean",
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """Cross entropy against the confident prediction itself, as in `maxsquare.PseudoLabelLoss`."""
    check_image_wise(labels, None)
    z, valid, spec = _prepare(
        logits,
        size,
        align_corners,
        valid,
        activation,
        from_logits,
        reduction=reduction,
        threshold=threshold,
    )
    y, counts = engine.classify(z, None, None, valid, spec, float(threshold))
    return _label_loss(logits, z, y, counts, reduction, spec)


def guidance_labels(
    logits: Tensor,
    low_logits: Tensor,
    *,
    threshold: float = 0.95,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    ignore_index: int = -1,
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """The self-produced labels of `maxsquare.MultiLevelGuidance`, int64 (N, *spatial).

    A label is the class of the largest mean probability of both heads if one of them exceeds the
    threshold, `ignore_index` if neither does, and C if a probability is NaN. With
    activation="sigmoid" the shape is (N, C, *spatial), and a label is 1 (on), 0 (off) or 2 (NaN).
    Options, errors and source are those of `maxsquare.MultiLevelGuidance`.

    Example:
        >>> logits, low_logits = torch.tensor([[[9.0, 1.0], [0.0, 0.0]]]), torch.zeros(1, 2, 2)
        >>> guidance_labels(logits, low_logits)  # the second pixel is unsure
        tensor([[ 0, -1]])
    """
    z, valid, spec = _prepare(
        logits,
        size,
        align_corners,
        valid,
        activation,
        from_logits,
        threshold=threshold,
        ignore_index=ignore_index,
    )
    (low_logits,) = check_heads([low_logits], logits, resized=size is not None)
    warn_at_first_call("low_logits", [low_logits], activation, from_logits)
    low, low_spec = _images(low_logits, spec)
    y, _ = engine.classify(low, z, None, valid, low_spec, float(threshold))
    y = y.long()
    if spec.binary:  # the first class is "on"
        y = torch.where((y == 0) | (y == 1), 1 - y, y)
    return _pixels(torch.where(y == -1, ignore_index, y), logits, spec)


def guidance_loss(
    logits: Tensor,
    low_logits: Tensor | Sequence[Tensor],
    *,
    threshold: float = 0.95,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """Cross entropy against the averaged prediction, as in `maxsquare.MultiLevelGuidance`."""
    z, valid, spec = _prepare(
        logits,
        size,
        align_corners,
        valid,
        activation,
        from_logits,
        reduction=reduction,
        threshold=threshold,
    )
    heads = check_heads(low_logits, logits, resized=size is not None)
    warn_at_first_call("low_logits", heads, activation, from_logits)
    losses = []
    for head in heads:
        low, low_spec = _images(head, spec)
        y, counts = engine.classify(low, z, None, valid, low_spec, float(threshold))
        losses.append(_label_loss(logits, low, y, counts, reduction, low_spec))
    return torch.stack(losses).sum(0)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -1,
    reduction: Reduction = "mean",
    activation: Activation = "softmax",
) -> Tensor:
    r"""Cross entropy -log p_y of labelled pixels, which upsamples the logits itself.

    .. math:: \frac{1}{|V|} \sum_{n \in V} -\log p_{n, y_n}, \qquad
              V = \{n : y_n \notin \{-1, \text{ignore\_index}\}\}

    Its gradient with respect to the logits is (p_c - [c = y_n]) / |V|.

    Args:
        logits: (N, C) or (N, C, *spatial), floating point.
        labels: (N, *spatial of the result), integers. -1 and `ignore_index` do not count; any
            other label outside 0..C-1 is an error on the CPU, and makes the loss NaN on a GPU (to
            raise an error, the host would have to wait for it).
        size: one int for each spatial dimension, to which the logits are upsampled linearly first.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool, of the shape of `labels`; the pixels that count.
        weight: (C,), floating point, the weight of the pixels labelled as each class; None: 1. The
            mean divides by the sum of the weights of the pixels that count, as PyTorch's does.
        ignore_index: a further label that does not count.
        reduction: "mean" over the pixels that count (for several processes see README.md), "sum",
            or "none".
        activation: "softmax", or "sigmoid": the binary cross entropy of every channel, which is on
            where the label is that channel; a single channel is on where the label is 1.

    Shape:
        A scalar; with reduction="none" (N, *spatial), with sigmoid (N, C, *spatial). float32 for
        half-precision logits.

    Raises:
        TypeError: a tensor of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> logits = torch.zeros(1, 4, 3, 5)
        >>> labels = torch.zeros(1, 24, 40, dtype=torch.long)
        >>> round(cross_entropy(logits, labels, size=(24, 40), align_corners=True).item(), 4)
        1.3863

    Source: the supervised term of M. Chen et al., ICCV 2019, as in every segmentation network.
    """
    z, valid, spec = _prepare(
        logits,
        size,
        align_corners,
        valid,
        activation,
        reduction=reduction,
        ignore_index=ignore_index,
    )
    check_labels(labels)
    check_map("labels", labels, logits, spec.spatial(z), overlapping=spec.binary)
    y, counts = _label_classes(labels, logits, z, valid, ignore_index, spec)
    classes = max(logits.shape[1], 2)
    check_classes(labels, counts[..., -1], classes, ignore_index)
    if weight is None:
        return _label_loss(logits, z, y, counts, reduction, spec)
    check_weight(weight, logits, activation)
    weights = weight.detach().to(engine.accumulation_dtype(z.dtype)).repeat(z.shape[0], 1)
    if reduction == "mean":
        total = (counts[:, :-1] * weights).sum()
        # If no pixel counts, the loss is 0 / 1, as without weights.
        weights = weights / torch.where(total > 0, total, 1)
    return _reduce(logits, z, weights, y, None, CrossEntropy(), reduction, spec)


def image_weights(
    logits: Tensor,
    *,
    ratio: float = 0.2,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -1,
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    r"""The weight that an image-wise loss gives to every pixel, (N, *spatial); 0 if not valid.

    .. math:: w_n = 1 / \max(N_c^a\, N^{1-a},\ 1), \qquad a = \text{ratio}

    c is the predicted class of the pixel, N_c the number of pixels of that class in its image, and
    N the number of all of them. With activation="sigmoid" the shape is (N, C, *spatial). Options,
    errors and source are those of `maxsquare.IWMaxSquareLoss`.

    Example:
        >>> image_weights(torch.eye(2).view(1, 2, 2), ratio=1.0)  # one pixel of each class
        tensor([[1., 1.]])
    """
    check_number("ratio", ratio)
    z, valid, spec = _prepare(
        logits, size, align_corners, valid, activation, from_logits, ignore_index=ignore_index
    )
    y, counts = engine.classify(z, None, None, valid, spec)
    if labels is not None:
        counts = _label_counts(labels, logits, z, valid, ignore_index, spec)
    classes = spec.classes(z)
    weights = _class_weights(counts, ratio, z.dtype)
    y = y.long()
    w = weights.gather(1, y.clamp(0, classes - 1).flatten(1)).view_as(y)
    w = torch.where(y < 0, 0, torch.where(y == classes, math.nan, w))
    return _pixels(w, logits, spec)


def class_proportions(
    logits: Tensor,
    *,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    r"""The mean probability of every class over the valid pixels of an image, (N, C).

    .. math:: \bar p_{b,c} = \frac{1}{N_b} \sum_n p_{b,n,c}

    Its gradient with respect to z_{n,c} is p_{n,c} (G_c - sum_k p_{n,k} G_k) / N_b, where G is the
    upstream gradient. An image without valid pixels gives zeros. With activation="sigmoid" the
    result is the mean of every channel. Logits (N, C) are one image of N pixels. Options, shapes
    and errors are those of `maxsquare.MaxSquareLoss`; half-precision logits give float32.

    Example:
        >>> class_proportions(torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]]))
        tensor([[0.5000, 0.5000]])

    Source: the mean prediction of A. Krause et al., NIPS 2010.
    """
    z, valid, spec = _prepare(logits, size, align_corners, valid, activation, from_logits)
    sums, counted = _class_sums(z, valid, spec)
    proportions = sums / counted.clamp_min(1).unsqueeze(1)
    return proportions[:, 0].view(-1, logits.shape[1]) if spec.binary else proportions


def teacher_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    threshold: float = 0.95,
    average: Average = "accepted",
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
    activation: Activation = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """Cross entropy against the classes of a confident teacher, as in `maxsquare.TeacherLoss`."""
    z, valid, spec = _prepare(
        logits,
        size,
        align_corners,
        valid,
        activation,
        from_logits,
        reduction=reduction,
        threshold=threshold,
        average=average,
    )
    check_teacher(teacher_logits, logits, resized=size is not None)
    warn_at_first_call("teacher_logits", [teacher_logits], activation, from_logits)
    teacher, teacher_spec = _images(teacher_logits, spec)
    y, counts = engine.classify(teacher, None, None, valid, teacher_spec, float(threshold))
    accepted = counts[:, :-1].sum()
    if average == "accepted":
        weights = _mean_weights(accepted, z, reduction)
    else:
        everywhere, counts = engine.classify(teacher, None, None, valid, teacher_spec)
        counted = counts[:, :-1].sum()
        weights = _mean_weights(counted, z, reduction)
        if average == "share":
            y, weights = everywhere, weights * accepted / counted.clamp_min(1)
    return _reduce(logits, z, weights, y, None, CrossEntropy(), reduction, spec)


def prediction_divergence(
    logits: Tensor,
    *,
    q: float,
    prior: Tensor | None,
    ratio: float | None,
    size: Size,
    align_corners: bool,
    valid: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    activation: Activation,
    from_logits: bool,
) -> Tensor:
    """The divergence D_q of `maxsquare.InformationMaximizationLoss`, times the pixels' weights.

    A loss with this ratio and reduction gives its pixels these weights. They sum to 1 for a mean
    over pixels; with reduction="none" every pixel has its own share of the term.
    """
    z, counted_map, spec = _prepare(logits, size, align_corners, valid, activation, from_logits)
    sums, counted = _class_sums(z, counted_map, spec)
    groups = logits.shape[1] if spec.binary else 1
    # Shape (channels or 1, classes): with sigmoid every channel has its own mean prediction.
    total = counted.view(-1, groups).sum(0).clamp_min(1).unsqueeze(1)
    mean = sums.view(-1, groups, sums.shape[1]).sum(0) / total
    classes = mean.shape[1]
    if prior is None:
        tau = torch.full_like(mean, 1 / classes)
    else:
        if len(prior) != logits.shape[1]:
            raise ValueError(f"prior must have {logits.shape[1]} classes, not {len(prior)}")
        prior = prior.to(mean)
        tau = torch.stack((prior, 1 - prior), 1) if spec.binary else prior.unsqueeze(0)
    divergence = _bregman_divergence(mean, tau, q)
    if reduction == "none":
        if ratio is not None:
            weights = image_weights(
                logits,
                ratio=ratio,
                size=size,
                align_corners=align_corners,
                valid=valid,
                labels=labels,
                ignore_index=ignore_index,
                activation=activation,
                from_logits=from_logits,
            )
        else:
            ones = z.new_ones((z.shape[0], *spec.spatial(z)), dtype=mean.dtype)
            ones = ones if counted_map is None else ones * counted_map
            weights = _pixels(ones, logits, spec)
        if spec.binary:
            return weights * divergence.view(1, -1, *[1] * (weights.dim() - 2))
        return weights * divergence
    if ratio is None:
        weight = counted.to(mean.dtype)
        weight = weight / counted.sum().clamp_min(1) if reduction == "mean" else weight
    else:
        _, predicted = engine.classify(z, None, None, counted_map, spec)
        counts = predicted
        if labels is not None:
            counts = _label_counts(labels, logits, z, counted_map, ignore_index, spec)
        class_weights = _class_weights(counts, ratio, z.dtype)
        weight = (class_weights * predicted[:, :-1]).sum(1)
        weight = weight / max(z.shape[0], 1) if reduction == "mean" else weight
    return (weight.view(-1, groups).sum(0) * divergence).sum()


def upsampled_once(
    heads: Sequence[Any], size: Size, align_corners: bool, from_logits: bool
) -> list[Tensor] | None:
    """Heads that several terms of a loss read, at their full resolution; None if kernels upsample.

    Also None for what the terms refuse, and in their own words.
    """
    if size is None or not all(isinstance(head, Tensor) for head in heads):
        return None
    upsampled, first = [], heads[0]
    for head in heads:
        alike = head.dtype == first.dtype and head.shape[:2] == first.shape[:2]
        if not alike or head.dim() < 3 or not head.is_floating_point():
            return None
        spec = LogitsSpec(check_size(size, head), bool(align_corners), False, bool(from_logits))
        z, spec = engine.prepare(_drop_subclass(head), spec)
        if spec.has_kernels:
            return None
        upsampled.append(z)
    return upsampled


def prediction_counts(
    logits: Tensor, *, size: Size, align_corners: bool, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The numbers (N,) of counted pixels, and (N, C) of pixels predicted as each class."""
    z, valid, spec = _prepare(logits, size, align_corners, valid)
    _, counts = engine.classify(z, None, None, valid, spec)
    return counts.sum(1), counts[:, :-1]


def scale_factor(
    scale: Scale, classes: int, factor: float = 1, reference_factor: float = 1
) -> float:
    """The factor of the entropy in a loss with this `scale`."""
    return factor if scale == "paper" else reference_factor / classes


def _class_sums(z: Tensor, valid: Tensor | None, spec: LogitsSpec) -> tuple[Tensor, Tensor]:
    """The sums (N, C) of probabilities, and the numbers (N,) of counted pixels."""
    if valid is None:
        counted = z.new_full((z.shape[0],), math.prod(spec.spatial(z)), dtype=torch.long)
    else:
        counted = valid.flatten(1).sum(1)
    return engine.class_sums(z, valid, spec), counted


def _bregman_divergence(p: Tensor, tau: Tensor, q: float) -> Tensor:
    """D_q(p, tau) over the last dimension, with L of potentials.py and a = 0, exact near q = 1.

    D = sum p L(p) - tau L(tau) - (p - tau) (q L(tau) + 1), as p^q = p + (q - 1) p L(p).
    """
    tiny = torch.finfo(p.dtype).tiny

    def L(p: Tensor) -> Tensor:
        log_p = p.clamp_min(tiny).log()
        return log_p if q == 1 else torch.expm1((q - 1) * log_p) / (q - 1)

    return (p * L(p) - tau * L(tau) - (p - tau) * (q * L(tau) + 1)).sum(-1)


def _tsallis_loss(
    logits: Tensor,
    potential: Tsallis,
    *,
    factor: float = 1,
    reference_factor: float = 1,
    ratio: float | None,
    size: Size,
    align_corners: bool,
    valid: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    scale: Scale,
    activation: Activation,
    from_logits: bool,
) -> Tensor:
    """A Tsallis entropy, plain or image-wise, times its factor."""
    z, valid, spec = _prepare(
        logits,
        size,
        align_corners,
        valid,
        activation,
        from_logits,
        ratio=ratio,
        reduction=reduction,
        scale=scale,
        ignore_index=ignore_index,
    )
    if labels is not None:
        check_image_wise(labels, ratio)
    multiple, y = scale_factor(scale, spec.classes(z), factor, reference_factor), None
    if ratio is None:
        pixels = z.shape[0] * math.prod(spec.spatial(z))
        counted = pixels if valid is None else valid.count_nonzero()
        weights = _mean_weights(counted, z, reduction, multiple)
    else:
        y, counts = engine.classify(z, None, None, valid, spec)
        if labels is not None:
            counts = _label_counts(labels, logits, z, valid, ignore_index, spec)
        weights = multiple * _class_weights(counts, ratio, z.dtype)
        weights = weights / max(z.shape[0], 1) if reduction == "mean" else weights
    return _reduce(logits, z, weights, y, valid, potential, reduction, spec)


def _label_loss(
    logits: Tensor, z: Tensor, y: Tensor, counts: Tensor, reduction: Reduction, spec: LogitsSpec
) -> Tensor:
    """Cross entropy against the classes y."""
    weights = _mean_weights(counts[..., :-1].sum(), z, reduction)
    return _reduce(logits, z, weights, y, None, CrossEntropy(), reduction, spec)


def _reduce(
    logits: Tensor,
    z: Tensor,
    weights: Tensor,
    y: Tensor | None,
    valid: Tensor | None,
    potential: Potential,
    reduction: Reduction,
    spec: LogitsSpec,
) -> Tensor:
    """The sum of the weighted potentials, or with reduction="none" the map of them."""
    if reduction == "none":
        terms = engine.weighted_terms(z, weights, y, valid, potential, spec)
        return _pixels(terms, logits, spec)
    return engine.weighted_sum(z, weights, y, valid, potential, spec)


def _prepare(
    logits: Tensor,
    size: Size,
    align_corners: bool,
    valid: Tensor | None,
    activation: Activation = "softmax",
    from_logits: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor | None, LogitsSpec]:
    """Check options and input; return logits and mask as images, and the spec."""
    how = {"activation": activation, "from_logits": from_logits, "align_corners": align_corners}
    check_options(**options, **how)
    check_logits("logits", logits, activation)
    binary = activation == "sigmoid"
    warn_at_first_call("logits", [logits], activation, from_logits)
    z, spec = _images(
        logits,
        LogitsSpec(check_size(size, logits), bool(align_corners), binary, bool(from_logits)),
    )
    if valid is not None:
        check_map("valid", valid, logits, spec.spatial(z))
        valid = _image_maps(valid, logits, spec)
    return z, valid, spec


def _mean_weights(
    counted: Tensor | int, z: Tensor, reduction: Reduction, factor: float = 1
) -> Tensor:
    """The weights (N, 1) of pixels in a sum, or in the mean over all counted pixels."""
    if reduction == "mean" and factor in (0.5, 1) and type(counted) is int:
        # With these factors Python divides to the same bits as a tensor, but faster. A compiler may
        # count symbolically, and would then treat the quotient as a constant.
        if not torch.compiler.is_compiling():
            factor, reduction = factor / max(counted, 1), "sum"
    weights = z.new_full((z.shape[0], 1), factor, dtype=engine.accumulation_dtype(z.dtype))
    if reduction != "mean":
        return weights
    # If no pixel counts, the loss is 0 / 1, a zero that keeps its graph.
    return weights / (counted.clamp_min(1) if isinstance(counted, Tensor) else max(counted, 1))


def _class_weights(counts: Tensor, ratio: float, dtype: torch.dtype) -> Tensor:
    """(N, C + 1) counts -> (N, C) weights 1 / max(N_c^a N^(1-a), 1), all 1 where N is 0."""
    # The last bit of a power depends on its position in the tensor; rounding from float64 drops it.
    on_mps = counts.device.type == "mps"  # which has no float64
    n = counts[..., :-1].to(torch.float32 if on_mps else torch.float64)
    total = n.sum(1, keepdim=True)
    weights = 1 / torch.where(total > 0, n**ratio * total ** (1 - ratio), 1).clamp_min(1)
    return weights.to(engine.accumulation_dtype(dtype))


def _label_counts(
    labels: Tensor,
    logits: Tensor,
    z: Tensor,
    valid: Tensor | None,
    ignore_index: int,
    spec: LogitsSpec,
) -> Tensor:
    """The counts of classes in every image, from a label map."""
    check_map("labels", labels, logits, spec.spatial(z))
    y, counts = _label_classes(labels, logits, z, valid, ignore_index, spec)
    warn_of_uncounted(counts, y, valid, logits.shape[1] if spec.binary else 1)
    return counts


def _label_classes(
    labels: Tensor,
    logits: Tensor,
    z: Tensor,
    valid: Tensor | None,
    ignore_index: int,
    spec: LogitsSpec,
) -> tuple[Tensor, Tensor]:
    """The class of every pixel of a label map, and the counts of classes in every image."""
    y = _image_maps(labels.long() if spec.binary else labels, logits, spec)
    if spec.binary:
        # Channel c has two classes: 0 for pixels of class c, and 1 for all others. A single channel
        # stands for class 1, the foreground.
        channels = logits.shape[1]
        own = torch.arange(channels, device=y.device) if channels > 1 else y.new_ones(1)
        own = own.repeat(y.shape[0] // channels).view(-1, *[1] * (y.dim() - 1))
        known = (y >= 0) & (y < max(channels, 2))
        ignored = (y == -1) | (y == ignore_index)
        y = torch.where(ignored, -1, torch.where(known, (y != own).long(), 2))
        ignore_index = -1
    return engine.classify(z, None, y, valid, spec, ignore_index=ignore_index)


def _images(logits: Tensor, spec: LogitsSpec) -> tuple[Tensor, LogitsSpec]:
    """Logits as (images, channels, *spatial): (N, C) is one image, with sigmoid one per channel."""
    z = logits if type(logits) is Tensor else _drop_subclass(logits)
    z = z.t().unsqueeze(0) if z.dim() == 2 else z
    return engine.prepare(z.flatten(0, 1).unsqueeze(1) if spec.binary else z, spec)


def _image_maps(pixels: Tensor, logits: Tensor, spec: LogitsSpec) -> Tensor:
    """A map (N, *spatial) as (images, *spatial), repeated for every channel with sigmoid."""
    pixels = pixels if type(pixels) is Tensor else _drop_subclass(pixels)
    pixels = pixels.unsqueeze(0) if logits.dim() == 2 else pixels
    return pixels.repeat_interleave(logits.shape[1], 0) if spec.binary else pixels


def _pixels(maps: Tensor, logits: Tensor, spec: LogitsSpec) -> Tensor:
    """The inverse: (images, *spatial) as (N, *spatial), with sigmoid as (N, C, *spatial)."""
    if spec.binary:
        channels = logits.shape[1]
        maps = maps.reshape(maps.shape[0] // channels, channels, *maps.shape[1:])
    if logits.dim() == 2:
        return maps.squeeze(0).t() if spec.binary else maps.squeeze(0)
    return maps


def _drop_subclass(tensor: Tensor) -> Tensor:
    """Strip a tensor subclass that only adds metadata: it would slow every operation."""
    if torch.compiler.is_compiling():
        return tensor
    adds_metadata = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return tensor.as_subclass(Tensor) if adds_metadata else tensor
