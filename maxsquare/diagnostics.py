"""The effect of a loss on a model: gradients by confidence and class, statistics of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maxsquare import functional
from maxsquare.checks import (
    can_read,
    check_labels,
    check_logits,
    check_map,
    check_options,
    check_size,
    warn_of_probabilities,
)
from maxsquare.engine.plain import LogitsSpec, upsampled
from maxsquare.functional import Size
from maxsquare.losses import _TargetLoss


class GradientProfile(NamedTuple):
    """A loss as a function of one pixel's confidence; float64 arrays of equal length.

    p: probability of the first class. value: the loss. slope_p: d value / d p, where the other
    classes share the rest evenly. slope_logit: d value / d z of the first class.
    """

    p: Tensor
    value: Tensor
    slope_p: Tensor
    slope_logit: Tensor


def gradient_profile(
    loss: nn.Module, points: int | Sequence[float] | Tensor = 199, classes: int = 2
) -> GradientProfile:
    r"""How value and slope of a loss change with the confidence p of one pixel.

    The pixel has probability p for its first class and (1 - p) / (C - 1) for each of the
    others; with activation="sigmoid" it is one channel with probability p. The pixel is a whole
    image, so image-wise weights are 1. The slope with respect to p is taken along this path;
    the paper's Figure 1 shows C = 2. The slope of entropy diverges as p -> 1, that of maximum
    squares grows linearly.

    Args:
        loss: a loss of one head's logits of this library; its reduction does not matter.
        points: how many values of p, evenly spaced inside (0, 1), or the values themselves.
        classes: C, at least 2.

    Returns:
        `GradientProfile` of arrays (points,), float64 on the CPU.

    Raises:
        TypeError: `loss` is not a loss of one head's logits, or `points` are not numbers.
        ValueError: a value of `points` outside (0, 1), or fewer than 2 classes.

    Example:
        >>> from maxsquare import MaxSquareLoss
        >>> gradient_profile(MaxSquareLoss(), points=[0.5, 0.75]).slope_p  # 1 - 2 p
        tensor([ 0.0000, -0.5000], dtype=torch.float64)

    Source: M. Chen et al., ICCV 2019, Figure 1.
    """
    _check_single_head(loss)
    if isinstance(classes, bool) or not isinstance(classes, int):
        raise TypeError(f"classes must be an int, not {classes!r}")
    if classes < 2:
        raise ValueError(f"classes must be at least 2, not {classes}")
    p = _confidences(points).requires_grad_()

    pixelwise = copy(loss)
    pixelwise.reduction, pixelwise.from_logits = "none", True  # type: ignore[assignment]
    with torch.enable_grad():
        if loss.activation == "sigmoid":
            z = torch.logit(p).view(-1, 1, 1)
        else:
            rest = ((1 - p) / (classes - 1)).log()
            z = torch.stack([p.log(), *[rest] * (classes - 1)], 1).unsqueeze(2)
        value = pixelwise(z).flatten()
    slope_p, slope_z = torch.autograd.grad(value, (p, z), torch.ones_like(value))
    return GradientProfile(p.detach(), value.detach(), slope_p, slope_z[:, 0, 0])


def class_gradient_share(
    loss: nn.Module,
    logits: Tensor,
    labels: Tensor,
    *,
    size: Size = None,
    align_corners: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    r"""The share of the whole gradient that the pixels of every class receive.

    .. math:: s_k = \frac{\sum_{n : y_n = k} \lVert \partial\ell/\partial z_n \rVert_1}
                         {\sum_{n : y_n \in 0..C-1} \lVert \partial\ell/\partial z_n \rVert_1}

    Args:
        loss: a loss of one head's logits of this library.
        logits: (N, C) or (N, C, *spatial).
        labels: integers (N, *spatial of the result), the class y of every pixel: ground truth,
            or the prediction where there is none. Values outside 0..C-1 are left out.
        size, align_corners: the gradient is taken at the resolution of the upsampled logits.
        valid: bool, of the shape of `labels`: the pixels that the loss counts.

    Returns:
        (C,) shares between 0 and 1 that add up to 1, or zeros where there is no gradient;
        float32 for half-precision logits.

    Raises:
        TypeError: `loss` is not a loss of one head's logits; a wrong dtype.
        ValueError: a wrong shape or device.

    Example:
        >>> import torch
        >>> from maxsquare import MaxSquareLoss
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> class_gradient_share(MaxSquareLoss(), logits, torch.tensor([0, 1]))
        tensor([0.5000, 0.5000])

    Source: ours; it measures the imbalance that M. Chen et al., ICCV 2019, argue from Figure 2.
    """
    _check_single_head(loss)
    check_options(align_corners=align_corners)
    check_logits("logits", logits, str(loss.activation))
    spec = LogitsSpec(
        check_size(size, logits), bool(align_corners), from_logits=bool(loss.from_logits)
    )
    check_labels(labels)
    check_map("labels", labels, logits, spec.spatial(logits))
    # In half precision the gradient of a mean over many pixels would underflow.
    z = upsampled(logits.detach(), spec)
    with torch.enable_grad():
        z = z.requires_grad_()
        total = loss(z, valid=valid).sum()
    (slope,) = torch.autograd.grad(total, z)
    # Apple's GPUs have no float64.
    widest = torch.float32 if slope.device.type == "mps" else torch.float64
    strength = slope.abs().sum(1, dtype=widest)
    shares = torch.stack([(strength * (labels == k)).sum() for k in range(logits.shape[1])])
    return (shares / shares.sum().clamp_min(torch.finfo(widest).tiny)).to(z.dtype)


class Statistics(NamedTuple):
    """Statistics of predictions on unlabelled images: scalars in nats, and proportions (C,).

    entropy: the mean over pixels of the entropy H(p). proportions: the mean prediction. diversity:
    the entropy of that mean. information: diversity - entropy, the mutual information of pixel and
    class. classes: how many classes are predicted for at least one pixel.
    """

    entropy: Tensor
    proportions: Tensor
    diversity: Tensor
    information: Tensor
    classes: Tensor


class PredictionStatistics:
    r"""Statistics of a network's predictions over a whole unlabelled data set.

    .. math:: I = H(\bar p) - \frac{1}{N} \sum_n H(p_n), \qquad
              \bar p = \frac{1}{N} \sum_n p_n

    Without labels, choose the weight or checkpoint with the highest information I. A low mean
    entropy alone is no criterion: it is lowest when one class has replaced all others, and a
    falling number of predicted classes is the first sign of that.

    Raises:
        TypeError, ValueError: from `update`, as the losses; ValueError from `compute` if no pixel
            was counted, and from `update` if the number of classes changes.

    Example:
        >>> import torch
        >>> statistics = PredictionStatistics()
        >>> for logits in (torch.tensor([[[9.0], [0.0]]]), torch.tensor([[[0.0], [9.0]]])):
        ...     statistics.update(logits)
        >>> round(statistics.compute().information.item(), 2)  # log 2: confident, both classes
        0.69

    Source: the mutual information of A. Krause et al., NIPS 2010, as a selection criterion.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def update(
        self,
        logits: Tensor,
        *,
        size: Size = None,
        align_corners: bool = False,
        valid: Tensor | None = None,
    ) -> None:
        """Count the predictions of a batch of logits (N, C) or (N, C, *spatial)."""
        call = {"size": size, "align_corners": align_corners, "valid": valid}
        z = logits.detach() if isinstance(logits, Tensor) else logits
        entropy = functional.entropy(z, reduction="sum", **call)  # type: ignore[arg-type]
        proportions = functional.class_proportions(z, **call)  # type: ignore[arg-type]
        pixels, counts = functional.prediction_counts(z, **call)  # type: ignore[arg-type]
        # Apple's GPUs have no float64.
        widest = torch.float32 if z.device.type == "mps" else torch.float64
        parts = (
            entropy.view(1).to(widest),
            pixels.sum().view(1).to(widest),
            (proportions.to(widest) * pixels.unsqueeze(1)).sum(0),
            counts.sum(0).to(widest),
        )
        if not self._sums:
            if z.is_cpu and can_read(z):  # on a GPU the host would wait
                warn_of_probabilities(type(self).__name__, "logits", z, "softmax", True)
            self._sums = list(parts)
            return
        if len(self._sums[2]) != len(parts[2]):
            raise ValueError(
                f"logits must have {len(self._sums[2])} classes as before, not {len(parts[2])}"
            )
        self._sums = [a + b for a, b in zip(self._sums, parts, strict=True)]

    def compute(self) -> Statistics:
        """The statistics of all predictions since the last reset; the host waits for a GPU."""
        if not self._sums or not self._sums[1].item():
            raise ValueError("compute needs at least one counted pixel: call update before")
        entropy, pixels, sums, counts = self._sums
        proportions = sums / pixels
        # -p log p is 0 where p is 0.
        diversity = -torch.special.xlogy(proportions, proportions).sum()
        mean_entropy = (entropy / pixels).squeeze(0)
        information = diversity - mean_entropy
        return Statistics(mean_entropy, proportions, diversity, information, (counts > 0).sum())


def _check_single_head(loss: nn.Module) -> None:
    if not isinstance(loss, _TargetLoss):
        raise TypeError(f"loss must be a loss of one head's logits, not {loss!r}")


def _confidences(points: int | Sequence[float] | Tensor) -> Tensor:
    if isinstance(points, int) and not isinstance(points, bool):
        if points < 1:
            raise ValueError(f"points must be at least 1, not {points}")
        return torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1]
    if not isinstance(points, (Sequence, Tensor)) or isinstance(points, str):
        raise TypeError(f"points must be an int or values of p, not {points!r}")
    try:
        if isinstance(points, Tensor) and points.is_complex():
            raise TypeError
        p = torch.as_tensor(points, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError):
        raise TypeError(f"points must be an int or values of p, not {points!r}") from None
    if p.dim() != 1 or not len(p) or not bool(((p > 0) & (p < 1)).all()):
        raise ValueError(f"points must be values of p inside (0, 1), not {points!r}")
    return p
