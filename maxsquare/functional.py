"""Every definition: the losses, their image weights, guidance and reductions.

The functions take the options of the modules in `maxsquare`, under the same names and with
the same defaults; formulas, shapes and errors are told there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maxsquare import engine
from maxsquare.checks import (
    check_heads,
    check_image_wise,
    check_labels,
    check_logits,
    check_map,
    check_options,
    check_ratio,
    check_size,
)
from maxsquare.engine import Problem
from maxsquare.potentials import Label, Tsallis

Size = int | Sequence[int] | None


class _Definition(NamedTuple):
    """A target loss: factor (S_q + offset) per pixel.

    published: times 1 / C, what the published code multiplies its image-wise form by.
    """

    q: float
    factor: float = 1
    offset: float = 0
    published: float = 1


_ENTROPY = _Definition(1)
# The sum of squares is 1 - S_2; the published image-wise code leaves out the half.
_MAX_SQUARE = _Definition(2, factor=0.5, offset=-1, published=2)


class _LowHead(NamedTuple):
    """A head to be guided, and how."""

    logits: Tensor | Sequence[Tensor]
    threshold: float
    weight: float


_TSALLIS_OPTIONS = ("ratio", "ignore_index", "reduction", "scale", "activation", "from_logits")
# The options that a guidance shares with the target loss beside it.
_SHARED = ("reduction", "activation", "from_logits")


def max_square(
    logits: Tensor,
    *,
    ratio: float | None = None,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    scale: str = "paper",
    activation: str = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """-1/2 sum_c p_c^2: `maxsquare.MaxSquareLoss`; with a ratio, `maxsquare.IWMaxSquareLoss`."""
    return _tsallis_loss(
        logits,
        _MAX_SQUARE,
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
    reduction: str = "mean",
    scale: str = "paper",
    activation: str = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """-sum_c p_c log p_c: `maxsquare.EntropyLoss`; with a ratio, `maxsquare.IWEntropyLoss`."""
    return _tsallis_loss(
        logits,
        _ENTROPY,
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
    reduction: str = "mean",
    scale: str = "paper",
    activation: str = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """(1 - sum_c p_c^q) / (q - 1): `maxsquare.TsallisEntropyLoss`."""
    return _tsallis_loss(
        logits,
        _Definition(q),
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
    reduction: str = "mean",
    scale: str = "paper",
    activation: str = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """Cross entropy against the confident prediction itself: `maxsquare.PseudoLabelLoss`."""
    check_image_wise(labels, None)
    check_options(
        reduction=reduction,
        scale=scale,
        activation=activation,
        from_logits=from_logits,
        align_corners=align_corners,
        threshold=threshold,
    )
    check_logits("logits", logits, activation)
    size = check_size(size, logits)
    check_map("valid", valid, logits, size)
    problem = Problem(
        Label(), size, align_corners, activation == "sigmoid", from_logits, threshold=threshold
    )
    return _label_loss(logits, problem, reduction, valid=valid)


def guidance_labels(
    logits: Tensor,
    low_logits: Tensor,
    *,
    threshold: float = 0.95,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    ignore_index: int = -1,
    activation: str = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """The self-produced labels of `maxsquare.MultiLevelGuidance`, int64 (N, *spatial).

    The class of the larger mean probability of both heads where one of them is above the
    threshold, `ignore_index` elsewhere, C where a probability is NaN. With
    activation="sigmoid" (N, C, *spatial): 1 on, 0 off, 2 NaN. Options, errors and source as in
    `maxsquare.MultiLevelGuidance`.

    Example:
        >>> logits, low_logits = torch.tensor([[[9.0, 1.0], [0.0, 0.0]]]), torch.zeros(1, 2, 2)
        >>> guidance_labels(logits, low_logits)  # the second pixel is not sure
        tensor([[ 0, -1]])
    """
    check_options(
        activation=activation,
        from_logits=from_logits,
        align_corners=align_corners,
        threshold=threshold,
        ignore_index=ignore_index,
    )
    check_logits("logits", logits, activation)
    size = check_size(size, logits)
    (low_logits,) = check_heads([low_logits], logits, resized=size is not None)
    check_map("valid", valid, logits, size)
    binary = activation == "sigmoid"
    problem = Problem(Label(), size, align_corners, binary, from_logits, threshold=threshold)
    y = engine.predict(
        _images(low_logits, binary),
        problem,
        guide=_images(logits, binary),
        valid=None if valid is None else _image_maps(valid, logits, binary),
    )
    if binary:
        y = torch.where((y == 0) | (y == 1), 1 - y, y)
    return _pixels(torch.where(y == -1, ignore_index, y), logits, binary)


def guidance_loss(
    logits: Tensor,
    low_logits: Tensor | Sequence[Tensor],
    *,
    threshold: float = 0.95,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    reduction: str = "mean",
    scale: str = "paper",
    activation: str = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """Low-level heads learn from the averaged prediction: `maxsquare.MultiLevelGuidance`."""
    check_options(
        reduction=reduction,
        scale=scale,
        activation=activation,
        from_logits=from_logits,
        align_corners=align_corners,
        threshold=threshold,
    )
    check_logits("logits", logits, activation)
    size = check_size(size, logits)
    check_map("valid", valid, logits, size)
    problem = Problem(
        Label(), size, align_corners, activation == "sigmoid", from_logits, threshold=threshold
    )
    heads = check_heads(low_logits, logits, resized=size is not None)
    losses = [_label_loss(head, problem, reduction, guide=logits, valid=valid) for head in heads]
    return torch.stack(losses).sum(0)


def multi_level_loss(
    logits: Tensor,
    low_logits: Tensor | Sequence[Tensor],
    target: Callable[..., Tensor] = max_square,
    options: Mapping[str, Any] = MappingProxyType({}),
    *,
    threshold: float = 0.95,
    weight: float = 0.1,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """The final head's target loss plus weighted guidance: `maxsquare.MultiLevelLoss`.

    target, options: `max_square`, `entropy`, `tsallis_entropy` or `pseudo_label_loss`, and its
    options; the guidance shares its reduction, activation and from_logits. Everything else,
    errors and source as in `maxsquare.MultiLevelLoss`.

    Example:
        >>> logits, low_logits = torch.zeros(1, 4, 3, 5), torch.zeros(1, 4, 3, 5)
        >>> loss = multi_level_loss(logits, low_logits, entropy, {"reduction": "sum"})
        >>> round(loss.item(), 4)  # 15 log 4
        20.7944
    """
    if not callable(target):
        raise TypeError(f"target must be a loss function of maxsquare.functional, not {target!r}")
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping of the target's options, not {options!r}")
    shared = {name: options[name] for name in _SHARED if name in options}
    check_options(threshold=threshold, weight=weight, **shared)
    call: dict[str, Any] = {"size": size, "align_corners": align_corners, "valid": valid}
    rest = dict(options)
    definition = {max_square: _MAX_SQUARE, entropy: _ENTROPY}.get(target)
    if target is tsallis_entropy and "q" in rest:
        definition = _Definition(rest.pop("q"))
    several = isinstance(low_logits, Sequence) and len(low_logits) > 1
    if definition is None or several or options.get("reduction") == "none":
        guidance = guidance_loss(logits, low_logits, threshold=threshold, **call, **shared)
        return target(logits, **call, labels=labels, **options) + weight * guidance
    for name in rest:
        if name not in _TSALLIS_OPTIONS:
            raise TypeError(f"options must be those of {target.__name__}, not {name!r}")
    low_head = _LowHead(low_logits, threshold, weight)
    return _tsallis_loss(logits, definition, low_head, **call, labels=labels, **rest)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross entropy -log p_y of labelled pixels, the upsampling of the logits included.

    .. math:: \frac{1}{|V|} \sum_{n \in V} -\log p_{n, y_n}, \qquad
              V = \{n : y_n \notin \{-1, \text{ignore\_index}\}\}

    Its gradient with respect to the logits is (p_c - [c = y_n]) / |V|.

    Args:
        logits: (N, C) or (N, C, *spatial), floating point.
        labels: (N, *spatial of the result), integers. -1 and `ignore_index` do not count; any
            other label outside 0..C-1 makes the loss NaN (to raise an error, the host would
            have to wait for the device).
        size: height and width to which the logits are upsampled bilinearly first.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool, the shape of `labels`; pixels that count.
        ignore_index: a further label that does not count.
        reduction: "mean" over the pixels that count, "sum", or "none".

    Shape:
        A scalar; (N, *spatial) with reduction="none". float32 for half-precision logits.

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
    check_options(reduction=reduction, align_corners=align_corners, ignore_index=ignore_index)
    check_logits("logits", logits, "softmax")
    size = check_size(size, logits)
    check_labels(labels)
    check_map("labels", labels, logits, size)
    check_map("valid", valid, logits, size)
    problem = Problem(Label(), size, align_corners, ignore_index=ignore_index)
    return _label_loss(logits, problem, reduction, labels=labels, valid=valid)


def image_weights(
    logits: Tensor,
    *,
    ratio: float = 0.2,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -1,
    activation: str = "softmax",
    from_logits: bool = True,
) -> Tensor:
    r"""The weight that an image-wise loss gives to every pixel, (N, *spatial); 0 if not valid.

    .. math:: w_n = 1 / \max(N_c^a\, N^{1-a},\ 1), \qquad a = \text{ratio}

    c is the pixel's predicted class, N_c the number of the image's pixels of that class and
    N that of all. Options, errors and source as in `maxsquare.IWMaxSquareLoss`; with
    activation="sigmoid" the shape is (N, C, *spatial).

    Example:
        >>> image_weights(torch.eye(2).view(1, 2, 2), ratio=1.0)  # one pixel of either class
        tensor([[1., 1.]])
    """
    check_ratio(ratio)
    check_options(
        activation=activation,
        from_logits=from_logits,
        align_corners=align_corners,
        ignore_index=ignore_index,
    )
    check_logits("logits", logits, activation)
    size = check_size(size, logits)
    check_map("valid", valid, logits, size)
    check_map("labels", labels, logits, size)
    binary = activation == "sigmoid"
    problem = Problem(Tsallis(2), size, align_corners, binary, from_logits, by_class=True)
    z = _images(logits, binary)
    valid = None if valid is None else _image_maps(valid, logits, binary)
    y = engine.predict(z, problem, valid=valid)
    counts = _count(y, 2 if binary else z.shape[1])
    if labels is not None:
        counts = _label_counts(labels, logits, binary, ignore_index, valid)
    weights = _bin_weights(counts, ratio, z.dtype)
    return _pixels(torch.where(y >= 0, _look_up(weights, y), 0), logits, binary)


def _tsallis_loss(
    logits: Tensor,
    definition: _Definition,
    low_head: _LowHead | None = None,
    *,
    ratio: float | None = None,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    scale: str = "paper",
    activation: str = "softmax",
    from_logits: bool = True,
) -> Tensor:
    """The loss of a definition, reduced; with a low-level head, plus its weighted guidance."""
    q, factor, offset, published = definition
    check_options(
        reduction=reduction,
        scale=scale,
        activation=activation,
        from_logits=from_logits,
        align_corners=align_corners,
        ratio=ratio,
        q=q,
        ignore_index=ignore_index,
    )
    check_logits("logits", logits, activation)
    size = check_size(size, logits)
    check_map("valid", valid, logits, size)
    check_image_wise(labels, ratio)
    check_map("labels", labels, logits, size)

    binary = activation == "sigmoid"
    z = _images(logits, binary)
    valid = None if valid is None else _image_maps(valid, logits, binary)
    image_wise = ratio is not None
    potential = Tsallis(q, normalised=from_logits, offset=offset)
    problem = Problem(potential, size, align_corners, binary, from_logits, by_class=image_wise)
    classes = 2 if binary else z.shape[1]
    if scale == "reference":
        factor *= (published if image_wise else 1) / classes
    given = None
    if labels is not None:
        given = _label_counts(labels, logits, binary, ignore_index, valid)

    if reduction == "none":
        phi, y, counted = engine.terms(z, problem, valid=valid)
        phi = factor * phi
        if ratio is not None:
            counts = _count(torch.where(counted, y, -1), classes) if given is None else given
            phi = phi * _look_up(_bin_weights(counts, ratio, phi.dtype), y)
        return _pixels(phi, logits, binary)

    def weigh(counts: Tensor) -> Tensor:
        if ratio is None:
            return _pixel_weights(counts, reduction, z.dtype, factor)
        weights = _bin_weights(counts if given is None else given, ratio, z.dtype)
        return factor * weights / (max(counts.shape[0], 1) if reduction == "mean" else 1)

    how: dict[str, Any] = {"valid": valid, "weigh": weigh}
    if low_head is None:
        sums, _ = engine.accumulate(z, problem, **how)
        return sums.sum()
    guided = problem._replace(potential=Label(), by_class=False, threshold=low_head.threshold)
    (low_logits,) = check_heads(low_head.logits, logits, resized=size is not None)
    low = _images(low_logits, binary)
    (sums, _), (low_sums, counts) = engine.accumulate_both(z, problem, low, guided, **how)
    low_weights = _pixel_weights(counts, reduction, z.dtype, low_head.weight)
    return sums.sum() + (low_weights * low_sums).sum()


def _label_loss(
    logits: Tensor,
    problem: Problem,
    reduction: str,
    *,
    guide: Tensor | None = None,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    z = _images(logits, problem.binary)
    guide = None if guide is None else _images(guide, problem.binary)
    labels = None if labels is None else _image_maps(labels, logits, problem.binary)
    valid = None if valid is None else _image_maps(valid, logits, problem.binary)
    if reduction == "none":
        phi, _, _ = engine.terms(z, problem, guide=guide, labels=labels, valid=valid)
        return _pixels(phi, logits, problem.binary)
    weigh = partial(_pixel_weights, reduction=reduction, dtype=z.dtype)
    sums, _ = engine.accumulate(z, problem, guide=guide, labels=labels, valid=valid, weigh=weigh)
    return sums.sum()


def _pixel_weights(counts: Tensor, reduction: str, dtype: torch.dtype, factor: float = 1) -> Tensor:
    """(N, 1) counts -> (N, 1) weights of the pixels in their sum, or mean over the batch."""
    # Nothing counted: 0 / 1, a zero that keeps its graph.
    pixels = counts.sum().clamp_min(1) if reduction == "mean" else 1
    return torch.full_like(counts, factor, dtype=_accumulating(dtype)) / pixels


def _bin_weights(counts: Tensor, ratio: float, dtype: torch.dtype) -> Tensor:
    """(N, C) counts -> (N, C) weights 1 / max(N_c^a N^(1-a), 1)."""
    n = counts.to(_accumulating(dtype))
    return 1 / (n**ratio * n.sum(1, keepdim=True) ** (1 - ratio)).clamp_min(1)


def _accumulating(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the engine adds up terms of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _look_up(weights: Tensor, y: Tensor) -> Tensor:
    """The weight of each pixel's bin: (N, C) and (N, *spatial) -> (N, *spatial)."""
    return weights.gather(1, y.clamp_min(0).flatten(1)).view_as(y)


def _label_counts(
    labels: Tensor, logits: Tensor, binary: bool, ignore_index: int, valid: Tensor | None
) -> Tensor:
    """Pixels of each class of a given label map, per image; other values are not counted."""
    labels = labels.long()
    y = torch.where(labels == ignore_index, -1, labels)
    if binary:
        # Channel c is a problem of two classes: 0, a pixel labelled c, and 1, any other.
        y = _image_maps(torch.where(y < logits.shape[1], y, -1), logits, binary)
        channels = logits.shape[1]
        channel = torch.arange(channels, device=y.device).repeat(y.shape[0] // channels)
        y = torch.where(y < 0, y, (y != channel.view(-1, *[1] * (y.dim() - 1))).long())
    else:
        y = _image_maps(y, logits, binary)
    y = y if valid is None else torch.where(valid, y, -1)
    return _count(y, 2 if binary else logits.shape[1])


def _count(y: Tensor, classes: int) -> Tensor:
    """(N, *spatial) indices -> (N, classes) numbers of pixels; those outside do not count."""
    y = y.flatten(1)
    inside = (y >= 0) & (y < classes)
    counts = torch.zeros(y.shape[0], classes, dtype=torch.long, device=y.device)
    return counts.scatter_add(1, torch.where(inside, y, 0), inside.long())


def _images(logits: Tensor, binary: bool) -> Tensor:
    """Logits as (images, channels, *spatial): (N, C) is one image; sigmoid, one per channel."""
    z = logits.t().unsqueeze(0) if logits.dim() == 2 else logits
    return z.flatten(0, 1).unsqueeze(1) if binary else z


def _image_maps(pixels: Tensor, logits: Tensor, binary: bool) -> Tensor:
    """A map (N, *spatial) as (images, *spatial), repeated for every channel under sigmoid."""
    pixels = pixels.unsqueeze(0) if logits.dim() == 2 else pixels
    return pixels.repeat_interleave(logits.shape[1], 0) if binary else pixels


def _pixels(maps: Tensor, logits: Tensor, binary: bool) -> Tensor:
    """The way back: (images, *spatial) as (N, *spatial), under sigmoid (N, C, *spatial)."""
    if binary:
        channels = logits.shape[1]
        maps = maps.reshape(maps.shape[0] // channels, channels, *maps.shape[1:])
    if logits.dim() == 2:
        return maps.squeeze(0).t() if binary else maps.squeeze(0)
    return maps
