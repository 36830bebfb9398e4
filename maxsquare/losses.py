"""The losses as modules: options and formulas. `maxsquare.functional` computes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from maxsquare import functional
from maxsquare.checks import (
    can_read,
    check_logits,
    check_options,
    check_ratio,
    warn_of_probabilities,
)
from maxsquare.functional import Size

HINTS = {
    "num_class": "the logits tell how many classes there are",
    "num_classes": "the logits tell how many classes there are",
    "ignore_index": "give the mask of the pixels that count to the call, as valid",
    "scale": "it would change nothing",
    "ratio": "the image-wise losses have it",
}
Loss = TypeVar("Loss", bound=type)


def _explains_options(loss: Loss) -> Loss:
    """Let the constructor of a loss explain why it does not have an option."""
    construct = loss.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        names = [field.name for field in fields(loss)]
        for option in options:
            if option not in names:
                hint = f": {HINTS[option]}" if option in HINTS else ""
                raise TypeError(
                    f"{loss.__name__} has the options {', '.join(names)}, not {option}{hint}"
                )
        construct(self, *arguments, **options)

    loss.__init__ = __init__  # type: ignore[misc]
    return loss


@dataclass(eq=False, repr=False)
class _PixelLoss(nn.Module):
    """Declares the options of all losses; the fields of a loss are the options of its function."""

    _: KW_ONLY
    reduction: str = "mean"
    activation: str = "softmax"
    from_logits: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        self._looked_at_input = False
        # The compiler cannot read the fields of a dataclass.
        self._names = tuple(field.name for field in fields(self))
        check_options(**self.options())

    def options(self) -> dict[str, Any]:
        """The options by name, as the functional form takes them."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())

    def _warn_if_probabilities(self, logits: Tensor) -> None:
        """Warn, at the first call only, of probabilities given as logits and the reverse."""
        if not self._looked_at_input and isinstance(logits, Tensor) and can_read(logits):
            self._looked_at_input = True
            check_logits("logits", logits, self.activation)
            name = type(self).__name__
            warn_of_probabilities(name, logits, self.activation, self.from_logits)

    def _refuse(
        self, takes: str, unexpected: tuple[object, ...], unknown: dict[str, object]
    ) -> None:
        """Say what to write instead of arguments that a call does not take."""
        name = type(self).__name__
        if unexpected:
            raise TypeError(
                f"{name} takes {takes} alone by position, and options by name: probabilities and "
                "numbers of classes are its own business"
            )
        for option in unknown:
            raise TypeError(
                f"{name} takes {takes}, size, align_corners, valid and labels, not {option}: its "
                f"other options are those of {name}(...)"
            )


@dataclass(eq=False, repr=False)
class _TargetLoss(_PixelLoss):
    """A loss of one head's logits alone."""

    function: ClassVar[Callable[..., Tensor]]

    def forward(
        self,
        logits: Tensor,
        *unexpected: object,
        size: Size = None,
        align_corners: bool = False,
        valid: Tensor | None = None,
        labels: Tensor | None = None,
        **unknown: object,
    ) -> Tensor:
        """The loss of logits (N, C, *spatial); see the class for the arguments."""
        self._refuse("logits", unexpected, unknown)
        self._warn_if_probabilities(logits)
        return type(self).function(
            logits,
            size=size,
            align_corners=align_corners,
            valid=valid,
            labels=labels,
            **self.options(),
        )


@_explains_options
@dataclass(eq=False, repr=False)
class MaxSquareLoss(_TargetLoss):
    r"""Rewards confident predictions, with a gradient that grows only linearly in confidence.

    .. math:: \ell = -\frac{1}{2N} \sum_{n=1}^{N} \sum_{c=1}^{C} p_{n,c}^2, \qquad
              p = \operatorname{softmax}(z)

    d l / d z_{n,c} = -p_{n,c} (p_{n,c} - sum_k p_{n,k}^2) / N. Minimising it maximises the
    Pearson chi-squared divergence C sum_c p_c^2 - 1 of the prediction from uniform.

    Args:
        reduction: "mean" over the valid pixels of the batch (of several processes: README.md),
            "sum", or "none".
        scale: "paper", the formula above; "reference", times 1 / C, is what the published code
            computes: the published weights (lambda) belong to it.
        activation: "softmax", or "sigmoid": each channel is a problem of two classes with logits
            (z, 0), and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions; float16, bfloat16,
            float32 or float64, any strides. (N, C) is one image of N pixels.
        size: (height, width) to which the logits are first upsampled bilinearly; None: as is.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.

    Shape:
        A scalar; with reduction="none" (N, *spatial), under sigmoid (N, C, *spatial), 0 where not
        valid. float32 for half-precision logits. Dimensionless. 0 if nothing is valid.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> import torch
        >>> loss = MaxSquareLoss()
        >>> logits = torch.zeros(2, 4, 8, 8, requires_grad=True)
        >>> loss(logits, size=(64, 64), align_corners=True).detach()  # uniform: -1 / (2 C)
        tensor(-0.1250)

    Source: M. Chen, H. Xue, D. Cai, "Domain Adaptation for Semantic Segmentation with Maximum
    Squares Loss", ICCV 2019, the maximum squares loss.
    """

    _: KW_ONLY
    scale: str = "paper"
    function = staticmethod(functional.max_square)


@_explains_options
@dataclass(eq=False, repr=False)
class IWMaxSquareLoss(_TargetLoss):
    r"""Maximum squares with the classes of every image balanced, so that rare ones count.

    .. math:: \ell = -\frac{1}{B} \sum_{b=1}^{B} \sum_{n} \frac{w_{b,n}}{2} \sum_c p_{b,n,c}^2,
              \qquad w_{b,n} = \frac{1}{\max(N_{b,c^*}^{\,a}\, N_b^{1-a},\ 1)}

    c* is the predicted class of pixel n, N_{b,c*} how many pixels of image b have it, N_b how
    many are valid, B the number of images. The weights are constants for the gradient, which is
    d l / d z_{n,c} = -w_{b,n} p_{n,c} (p_{n,c} - sum_k p_{n,k}^2) / B.
    `functional.image_weights` returns them.

    Args:
        ratio: the exponent a, from -1 to 1: 0 weighs all pixels alike, 1 all classes; 0.2 as
            published. A negative one favours frequent classes (the SYNTHIA runs had -0.2).
        ignore_index: a label that is not counted where `labels` are given.
        reduction: "mean" over images of the weighted sum over pixels (of several processes:
            README.md), "sum" over both, or "none".
        scale: "paper", the formula above; "reference", times 2 / C, is what the published code
            computes (it leaves out the half): the published weights (lambda) belong to it.
        activation: "softmax", or "sigmoid": each channel is a problem of two classes with logits
            (z, 0), counted as an image of its own, and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions; float16, bfloat16,
            float32 or float64, any strides. (N, C) is one image of N pixels.
        size: (height, width) to which the logits are first upsampled bilinearly; None: as is.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.
        labels: integers (N, *spatial of the result). N_{b,c} and N_b are counted from this map
            instead of the prediction; values outside 0..C-1 are not counted. A pixel predicted as a
            class that the map lacks has weight 1, a thousandfold of the others', as published: let
            `valid` leave such pixels out, or count from the prediction.

    Shape:
        A scalar; with reduction="none" (N, *spatial), under sigmoid (N, C, *spatial), 0 where not
        valid. float32 for half-precision logits. Dimensionless. 0 if nothing is valid.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> import torch
        >>> loss = IWMaxSquareLoss(ratio=0.2, scale="reference")
        >>> loss(torch.zeros(2, 4, 8, 8)).item()  # -(1 / C) (N / N_weight) (1 / C)
        -0.0625

    Source: M. Chen et al., ICCV 2019, the image-wise weighting factor.
    """

    ratio: float = 0.2
    _: KW_ONLY
    ignore_index: int = -1
    scale: str = "paper"
    function = staticmethod(functional.max_square)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        super().__post_init__()


@_explains_options
@dataclass(eq=False, repr=False)
class EntropyLoss(_TargetLoss):
    r"""Rewards confident predictions by Shannon's entropy, the usual choice before.

    .. math:: \ell = -\frac{1}{N} \sum_{n=1}^{N} \sum_{c=1}^{C} p_{n,c} \log p_{n,c}

    d l / d z_{n,c} = -p_{n,c} (log p_{n,c} - sum_k p_{n,k} log p_{n,k}) / N: in terms of p the
    slope diverges as p -> 1, so that pixels already well classified take most of the gradient.

    Args:
        reduction: "mean" over the valid pixels of the batch (of several processes: README.md),
            "sum", or "none".
        scale: "paper", the formula above; "reference", times 1 / C, is what the published code
            computes: the published weights (lambda) belong to it.
        activation: "softmax", or "sigmoid": each channel is a problem of two classes with logits
            (z, 0), and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions; float16, bfloat16,
            float32 or float64, any strides. (N, C) is one image of N pixels.
        size: (height, width) to which the logits are first upsampled bilinearly; None: as is.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.

    Shape:
        A scalar; with reduction="none" (N, *spatial), under sigmoid (N, C, *spatial), 0 where not
        valid. float32 for half-precision logits. In nats. 0 if nothing is valid.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> import torch
        >>> round(EntropyLoss()(torch.zeros(1, 4, 8, 8)).item(), 4)  # log C
        1.3863

    Source: M. Chen et al., ICCV 2019, entropy minimisation (after Grandvalet and Bengio, 2005).
    """

    _: KW_ONLY
    scale: str = "paper"
    function = staticmethod(functional.entropy)


@_explains_options
@dataclass(eq=False, repr=False)
class IWEntropyLoss(_TargetLoss):
    r"""Entropy with the classes of every image balanced, so that rare ones count.

    .. math:: \ell = -\frac{1}{B} \sum_{b=1}^{B} \sum_n w_{b,n} \sum_c p_{b,n,c} \log p_{b,n,c},
              \qquad w_{b,n} = \frac{1}{\max(N_{b,c^*}^{\,a}\, N_b^{1-a},\ 1)}

    c* is the predicted class of pixel n, N_{b,c*} how many pixels of image b have it, N_b how
    many are valid, B the number of images. The weights are constants for the gradient, which is
    that of `EntropyLoss` with w_{b,n} / B in place of 1 / N.

    Args:
        ratio: the exponent a, from -1 to 1: 0 weighs all pixels alike, 1 all classes; 0.2 as
            published. A negative one favours frequent classes (the SYNTHIA runs had -0.2).
        ignore_index: a label that is not counted where `labels` are given.
        reduction: "mean" over images of the weighted sum over pixels (of several processes:
            README.md), "sum" over both, or "none".
        scale: "paper", the formula above; "reference", times 1 / C, is what the published code
            computes: the published weights (lambda) belong to it.
        activation: "softmax", or "sigmoid": each channel is a problem of two classes with logits
            (z, 0), counted as an image of its own, and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions; float16, bfloat16,
            float32 or float64, any strides. (N, C) is one image of N pixels.
        size: (height, width) to which the logits are first upsampled bilinearly; None: as is.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.
        labels: integers (N, *spatial of the result). N_{b,c} and N_b are counted from this map
            instead of the prediction; values outside 0..C-1 are not counted. A pixel predicted as a
            class that the map lacks has weight 1, a thousandfold of the others', as published: let
            `valid` leave such pixels out, or count from the prediction.

    Shape:
        A scalar; with reduction="none" (N, *spatial), under sigmoid (N, C, *spatial), 0 where not
        valid. float32 for half-precision logits. In nats. 0 if nothing is valid.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> import torch
        >>> round(IWEntropyLoss(ratio=0.2)(torch.zeros(1, 4, 8, 8)).item(), 4)
        1.3863

    Source: M. Chen et al., ICCV 2019, the image-wise weighting factor on the entropy.
    """

    ratio: float = 0.2
    _: KW_ONLY
    ignore_index: int = -1
    scale: str = "paper"
    function = staticmethod(functional.entropy)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        super().__post_init__()


@_explains_options
@dataclass(eq=False, repr=False)
class TsallisEntropyLoss(_TargetLoss):
    r"""One dial from entropy minimisation (q = 1) to maximum squares (q = 2) and beyond.

    .. math:: \ell = \frac{1}{N} \sum_n S_q(p_n), \qquad
              S_q(p) = \frac{1 - \sum_c p_c^q}{q - 1}, \quad S_1(p) = -\sum_c p_c \log p_c

    d S_q / d z_c = -q / (q - 1) (p_c^q - p_c sum_k p_k^q). S_2 is 1 + 2 `MaxSquareLoss`.

    Args:
        q: above 0; the larger, the more the gradient keeps to uncertain pixels.
        ratio: None, or the exponent of image-wise weights, from -1 to 1, as in `IWEntropyLoss`.
        ignore_index: a label that is not counted where `labels` are given.
        reduction: "mean" over the valid pixels of the batch (with a ratio, over images of the
            weighted sum over pixels; of several processes: README.md), "sum", or "none".
        scale: "paper", the formula above; "reference", times 1 / C, the convention of the
            published entropy.
        activation: "softmax", or "sigmoid": each channel is a problem of two classes with logits
            (z, 0), counted as an image of its own, and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions; float16, bfloat16,
            float32 or float64, any strides. (N, C) is one image of N pixels.
        size: (height, width) to which the logits are first upsampled bilinearly; None: as is.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.
        labels: with a ratio, integers (N, *spatial of the result): classes are counted from this
            map instead of the prediction; values outside 0..C-1 are not counted.

    Shape:
        A scalar; with reduction="none" (N, *spatial), under sigmoid (N, C, *spatial), 0 where not
        valid. float32 for half-precision logits. Dimensionless. 0 if nothing is valid.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> import torch
        >>> TsallisEntropyLoss(1.5, ratio=0.2)(torch.zeros(1, 4, 8, 8)).item()
        1.0

    Source: ours; C. Tsallis, "Possible generalization of Boltzmann-Gibbs statistics", 1988.
    """

    q: float
    ratio: float | None = None
    _: KW_ONLY
    ignore_index: int = -1
    scale: str = "paper"
    function = staticmethod(functional.tsallis_entropy)


@_explains_options
@dataclass(eq=False, repr=False)
class PseudoLabelLoss(_TargetLoss):
    r"""Cross entropy against the prediction itself wherever it is confident.

    .. math:: \ell = \frac{1}{|A|} \sum_{n \in A} -\log \max_c p_{n,c}, \qquad
              A = \{n : \max_c p_{n,c} > t\}

    d l / d z_{n,c} = (p_{n,c} - [c = c*]) / |A| on A, and 0 elsewhere.

    Args:
        threshold: t, from 0 to 1; 0.95 as published.
        reduction: "mean" over the accepted pixels (of several processes: README.md), "sum", or
            "none" (0 where not accepted).
        activation: "softmax", or "sigmoid": each channel is a problem of two classes with logits
            (z, 0), and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions; float16, bfloat16,
            float32 or float64, any strides. (N, C) is one image of N pixels.
        size: (height, width) to which the logits are first upsampled bilinearly; None: as is.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.

    Shape:
        A scalar; with reduction="none" (N, *spatial), under sigmoid (N, C, *spatial), 0 where not
        accepted. float32 for half-precision logits. In nats. 0 if nothing is accepted.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> import torch
        >>> PseudoLabelLoss(threshold=0.95)(torch.zeros(1, 4, 8, 8)).item()  # nothing confident
        0.0

    Source: M. Chen et al., ICCV 2019, the hard pseudo label (after D.-H. Lee, 2013).
    """

    threshold: float = 0.95
    function = staticmethod(functional.pseudo_label_loss)


@_explains_options
@dataclass(eq=False, repr=False)
class MultiLevelGuidance(_PixelLoss):
    r"""Low-level heads learn, by cross entropy, from the prediction averaged over both heads.

    .. math:: \ell = \frac{1}{|A|} \sum_{n \in A} -\log p^{low}_{n, y_n}, \qquad
              y_n = \arg\max_c \tfrac{1}{2} (p_{n,c} + p^{low}_{n,c})

    A are the pixels at which max_c p_{n,c} > t or max_c p^low_{n,c} > t. The labels y are
    constants: the gradient, (p^low_{n,c} - [c = y_n]) / |A|, reaches the low-level head only.

    Args:
        threshold: t, from 0 to 1; 0.95 as published.
        reduction: "mean" over the accepted pixels (of several processes: README.md), "sum", or
            "none" (0 where not accepted).
        activation: "softmax", or "sigmoid": each channel is a problem of two classes with logits
            (z, 0), and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions; float16, bfloat16,
            float32 or float64, any strides; of the final head.
        low_logits: those of the low-level head, of the same shape (with `size`, of any height and
            width), or a list of several heads', whose losses are added.
        size: (height, width) to which the logits are first upsampled bilinearly; None: as is.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.

    Shape:
        A scalar; with reduction="none" (N, *spatial), under sigmoid (N, C, *spatial), 0 where not
        accepted. float32 for half-precision logits. In nats. 0 if nothing is accepted.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> import torch
        >>> logits, low_logits = torch.tensor([[[9.0], [0.0]]]), torch.zeros(1, 2, 1)
        >>> round(MultiLevelGuidance()(logits, low_logits).item(), 4)  # -log(1 / 2)
        0.6931

    Source: M. Chen et al., ICCV 2019, multi-level self-produced guidance.
    """

    threshold: float = 0.95

    def forward(
        self,
        logits: Tensor,
        low_logits: Tensor | Sequence[Tensor],
        *,
        size: Size = None,
        align_corners: bool = False,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The sum of the low-level heads' losses; see the class for the arguments."""
        self._warn_if_probabilities(logits)
        return functional.guidance_loss(
            logits,
            low_logits,
            size=size,
            align_corners=align_corners,
            valid=valid,
            **self.options(),
        )


class MultiLevelLoss(nn.Module):
    r"""A target loss on the final head, and guidance by it for the low-level heads.

    .. math:: \ell = \ell_{target}(z) + \lambda\, \ell_{guidance}(z, z^{low})

    Args:
        target_loss: any loss of one head's logits of this library; the guidance takes its
            reduction, activation and from_logits.
        threshold: of the guidance, from 0 to 1, as in `MultiLevelGuidance`.
        weight: lambda, at least 0; 0.1 as published (there lambda_seg, so that this whole
            loss is to be multiplied by lambda_target).

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions, of the final head.
        low_logits: those of the low-level head, of the same shape (with `size`, of any height and
            width), or a list of several heads'.
        size: (height, width) to which all logits are first upsampled bilinearly; None: as is.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.
        labels: for an image-wise target loss: a map from which it counts classes.

    Shape:
        A scalar; with reduction="none" (N, *spatial), under sigmoid (N, C, *spatial).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, or value of an option.

    Example:
        >>> import torch
        >>> loss = MultiLevelLoss(IWMaxSquareLoss(scale="reference"))
        >>> logits, low_logits = torch.zeros(1, 19, 9, 17), torch.zeros(1, 19, 9, 17)
        >>> loss(logits, low_logits, size=(65, 129), align_corners=True).shape
        torch.Size([])

    Source: M. Chen et al., ICCV 2019, the full objective on the target domain.
    """

    def __init__(
        self, target_loss: nn.Module, threshold: float = 0.95, weight: float = 0.1
    ) -> None:
        super().__init__()
        if not isinstance(target_loss, _TargetLoss):
            raise TypeError(f"target_loss must be a loss of one head's logits, not {target_loss!r}")
        check_options(weight=weight)
        self.target_loss = target_loss
        self.guidance = MultiLevelGuidance(
            threshold,
            reduction=target_loss.reduction,
            activation=target_loss.activation,
            from_logits=target_loss.from_logits,
        )
        self.weight = weight

    def forward(
        self,
        logits: Tensor,
        low_logits: Tensor | Sequence[Tensor],
        *,
        size: Size = None,
        align_corners: bool = False,
        valid: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Target loss plus weighted guidance; see the class for the arguments."""
        call: dict[str, Any] = {"size": size, "align_corners": align_corners, "valid": valid}
        target: Tensor = self.target_loss(logits, **call, labels=labels)
        guidance: Tensor = self.guidance(logits, low_logits, **call)
        return target + self.weight * guidance

    def extra_repr(self) -> str:
        return f"weight={self.weight!r}"
