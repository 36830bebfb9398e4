"""The losses as modules, with their options and formulas; `maxsquare.functional` computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from maxsquare import functional
from maxsquare.checks import (
    Activation,
    Average,
    Reduction,
    Scale,
    can_read,
    check_number,
    check_options,
    check_prior,
    warn_of_probabilities,
)
from maxsquare.functional import Size


class _Loss(nn.Module):
    """A loss whose options are its public attributes."""

    _input_was_read = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        check_options(**options)
        for name, value in options.items():
            setattr(self, name, value)
        self._option_names = tuple(options)

    def options(self) -> dict[str, Any]:
        """The options by name, as the function of the loss takes them."""
        options = {}
        for name in self._option_names:
            options[name] = getattr(self, name)
        return options

    def extra_repr(self) -> str:
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        public.pop("training", None)
        return ", ".join(f"{name}={value!r}" for name, value in public.items())


def _warn_of_probabilities(loss: nn.Module, options: nn.Module, **heads: Any) -> None:
    """Warn, at the first call only, of probabilities given as logits and the reverse."""
    activation, from_logits = str(options.activation), bool(options.from_logits)
    for argument, given in heads.items():
        for head in given if isinstance(given, (list, tuple)) else [given]:
            if not can_read(head):
                return
            warn_of_probabilities(type(loss).__name__, argument, head, activation, from_logits)
    loss._input_was_read = True  # type: ignore[assignment]


class _TargetLoss(_Loss):
    """A loss of one head's logits alone."""

    function: ClassVar[Callable[..., Tensor]]

    def forward(
        self,
        logits: Tensor,
        *,
        size: Size = None,
        align_corners: bool = False,
        valid: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (N, C, *spatial); the class documents the arguments."""
        value = type(self).function(
            logits,
            size=size,
            align_corners=align_corners,
            valid=valid,
            labels=labels,
            **self.options(),
        )
        if not self._input_was_read:
            _warn_of_probabilities(self, self, logits=logits)
        return value

    def _entropy(self, classes: int) -> tuple[float, float]:
        """q and the factor of the Tsallis entropy S_q in this loss."""
        return 1, 1


class MaxSquareLoss(_TargetLoss):
    r"""Rewards confident predictions, with a gradient that grows only linearly in confidence.

    .. math:: \ell = -\frac{1}{2N} \sum_{n=1}^{N} \sum_{c=1}^{C} p_{n,c}^2, \qquad
              p = \operatorname{softmax}(z)

    d l / d z_{n,c} = -p_{n,c} (p_{n,c} - sum_k p_{n,k}^2) / N. Minimising it maximises the
    Pearson chi-squared divergence C sum_c p_c^2 - 1 of the prediction from uniform.

    Args:
        ratio: None, or the exponent of image-wise weights, as in `IWMaxSquareLoss`.
        ignore_index: a label that is not counted where `labels` are given.
        reduction: "mean" over the valid pixels of the batch (for several processes see README.md),
            "sum", or "none".
        scale: "paper", the formula above; "reference", times 1 / C, as in the published code,
            which the published weights (lambda) assume.
        activation: "softmax", or "sigmoid": treats each channel as an independent binary problem
            with logits (z, 0), and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits: (N, C) or (N, C, *spatial) with up to three spatial dimensions; float16, bfloat16,
            float32 or float64, any strides. (N, C) is one image of N pixels.
        size: (height, width) to which the logits are first upsampled bilinearly, or None.
            (depth, height, width) and (length,) upsample trilinearly and linearly, with the
            upsampled logits in memory.
        align_corners: as in `torch.nn.functional.interpolate`; DeepLabv2 needs True.
        valid: bool (N, *spatial of the result), the pixels that count; None: all.

    Shape:
        A scalar, 0 if nothing is valid; with reduction="none" (N, *spatial), with sigmoid
        (N, C, *spatial), 0 where not valid. float32 for half-precision logits. Dimensionless.

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

    function = staticmethod(functional.max_square)

    def __init__(
        self,
        *,
        ratio: float | None = None,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
        scale: Scale = "paper",
        activation: Activation = "softmax",
        from_logits: bool = True,
    ) -> None:
        super().__init__(
            ratio=ratio,
            ignore_index=ignore_index,
            reduction=reduction,
            scale=scale,
            activation=activation,
            from_logits=from_logits,
        )

    def _entropy(self, classes: int) -> tuple[float, float]:
        reference_factor = 0.5 if self.ratio is None else 1
        return 2, functional.scale_factor(self.scale, classes, 0.5, reference_factor)  # type: ignore[arg-type]


class IWMaxSquareLoss(MaxSquareLoss):
    r"""Maximum squares with weights that balance the classes of every image.

    .. math:: \ell = -\frac{1}{B} \sum_{b=1}^{B} \sum_{n} \frac{w_{b,n}}{2} \sum_c p_{b,n,c}^2,
              \qquad w_{b,n} = \frac{1}{\max(N_{b,c^*}^{\,a}\, N_b^{1-a},\ 1)}

    c* is the predicted class of pixel n, N_{b,c*} the number of pixels of image b with that class,
    N_b the number of its valid pixels, B that of images. The gradient treats weights as constants:
    d l / d z_{n,c} = -w_{b,n} p_{n,c} (p_{n,c} - sum_k p_{n,k}^2) / B.
    `functional.image_weights` returns them.

    Args:
        ratio: the exponent a, from -1 to 1: 0 weights all pixels equally, 1 all classes; 0.2 as
            published. A negative one favours frequent classes (the SYNTHIA runs used -0.2).
        ignore_index: a label that is not counted where `labels` are given.
        reduction: "mean" over images of the weighted sum over pixels (for several
            processes see README.md), "sum" over both, or "none".
        scale: "paper", the formula above; "reference", times 2 / C, as in the published code
            (without the half), which the published weights (lambda) assume.
        activation: "softmax", or "sigmoid": treats each channel as an independent binary problem
            with logits (z, 0), which counts its own classes, and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call:
        logits, size, align_corners, valid: as in `MaxSquareLoss`.
        labels: integers (N, *spatial of the result). N_{b,c} and N_b are counted from this map
            instead of the prediction; values outside 0..C-1 are not counted. A pixel whose
            predicted class is missing from the map has weight 1, a thousand times that of others,
            as published: exclude such pixels with `valid`, or count from the prediction.

    Shape, Raises: as in `MaxSquareLoss`.

    Example:
        >>> import torch
        >>> loss = IWMaxSquareLoss(ratio=0.2, scale="reference")
        >>> loss(torch.zeros(2, 4, 8, 8)).item()  # -(1 / C) (N / N_weight) (1 / C)
        -0.0625

    Source: M. Chen et al., ICCV 2019, the image-wise weighting factor.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        *,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
        scale: Scale = "paper",
        activation: Activation = "softmax",
        from_logits: bool = True,
    ) -> None:
        check_number("ratio", ratio)
        super().__init__(
            ratio=ratio,
            ignore_index=ignore_index,
            reduction=reduction,
            scale=scale,
            activation=activation,
            from_logits=from_logits,
        )


class EntropyLoss(_TargetLoss):
    r"""Rewards confident predictions by Shannon's entropy, the usual choice before maximum squares.

    .. math:: \ell = -\frac{1}{N} \sum_{n=1}^{N} \sum_{c=1}^{C} p_{n,c} \log p_{n,c}

    d l / d z_{n,c} = -p_{n,c} (log p_{n,c} - sum_k p_{n,k} log p_{n,k}) / N: in terms of p the
    slope diverges as p -> 1, so pixels that are already well classified dominate the gradient.

    Args:
        ratio: None, or the exponent of image-wise weights, as in `IWEntropyLoss`.
        ignore_index: a label that is not counted where `labels` are given.
        reduction: "mean" over the valid pixels of the batch (for several processes see README.md),
            "sum", or "none".
        scale: "paper", the formula above; "reference", times 1 / C, as in the published code,
            which the published weights (lambda) assume.
        activation: "softmax", or "sigmoid": treats each channel as an independent binary problem
            with logits (z, 0), and C = 2.
        from_logits: whether the input holds logits; False if it holds probabilities.

    Call, Shape, Raises: as in `MaxSquareLoss`; the value is in nats.

    Example:
        >>> import torch
        >>> round(EntropyLoss()(torch.zeros(1, 4, 8, 8)).item(), 4)  # log C
        1.3863

    Source: M. Chen et al., ICCV 2019, entropy minimisation (after Grandvalet and Bengio, 2005).
    """

    function = staticmethod(functional.entropy)

    def __init__(
        self,
        *,
        ratio: float | None = None,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
        scale: Scale = "paper",
        activation: Activation = "softmax",
        from_logits: bool = True,
    ) -> None:
        super().__init__(
            ratio=ratio,
            ignore_index=ignore_index,
            reduction=reduction,
            scale=scale,
            activation=activation,
            from_logits=from_logits,
        )

    def _entropy(self, classes: int) -> tuple[float, float]:
        return 1, functional.scale_factor(self.scale, classes)  # type: ignore[arg-type]


class IWEntropyLoss(EntropyLoss):
    r"""Entropy with weights that balance the classes of every image.

    .. math:: \ell = -\frac{1}{B} \sum_{b=1}^{B} \sum_n w_{b,n} \sum_c p_{b,n,c} \log p_{b,n,c},
              \qquad w_{b,n} = \frac{1}{\max(N_{b,c^*}^{\,a}\, N_b^{1-a},\ 1)}

    c* is the predicted class of pixel n, N_{b,c*} the number of pixels of image b with that class,
    N_b the number of its valid pixels, B that of images. The gradient treats weights as constants:
    it is that of `EntropyLoss` with w_{b,n} / B in place of 1 / N.

    Args:
        ratio: the exponent a, from -1 to 1; 0.2 as published.
        ignore_index, activation, from_logits: as in `IWMaxSquareLoss`.
        reduction: "mean" over images of the weighted sum over pixels (for several
            processes see README.md), "sum" over both, or "none".
        scale: "paper", the formula above; "reference", times 1 / C, as in the published code,
            which the published weights (lambda) assume.

    Call, Shape, Raises: as in `IWMaxSquareLoss`; the value is in nats.

    Example:
        >>> import torch
        >>> round(IWEntropyLoss(ratio=0.2)(torch.zeros(1, 4, 8, 8)).item(), 4)
        1.3863

    Source: M. Chen et al., ICCV 2019, the image-wise weighting factor on the entropy.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        *,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
        scale: Scale = "paper",
        activation: Activation = "softmax",
        from_logits: bool = True,
    ) -> None:
        check_number("ratio", ratio)
        super().__init__(
            ratio=ratio,
            ignore_index=ignore_index,
            reduction=reduction,
            scale=scale,
            activation=activation,
            from_logits=from_logits,
        )


class TsallisEntropyLoss(_TargetLoss):
    r"""One dial from entropy minimisation (q = 1) to maximum squares (q = 2) and beyond.

    .. math:: \ell = \frac{1}{N} \sum_n S_q(p_n), \qquad
              S_q(p) = \frac{1 - \sum_c p_c^q}{q - 1}, \quad S_1(p) = -\sum_c p_c \log p_c

    d S_q / d z_c = -q / (q - 1) (p_c^q - p_c sum_k p_k^q). S_2 is 1 + 2 `MaxSquareLoss`.

    Args:
        q: above 0; a larger q concentrates the gradient on uncertain pixels.
        ratio: None, or the exponent of image-wise weights, from -1 to 1, as in `IWEntropyLoss`.
        ignore_index: a label that is not counted where `labels` are given.
        reduction: "mean" over the valid pixels of the batch (with a ratio, over images of the
            weighted sum over pixels; for several processes see README.md), "sum", or "none".
        scale: "paper", the formula above; "reference", times 1 / C, the convention of the
            published entropy.
        activation, from_logits: as in `MaxSquareLoss`.

    Call, Shape, Raises: as in `IWMaxSquareLoss`; labels require a ratio.

    Example:
        >>> import torch
        >>> TsallisEntropyLoss(1.5, ratio=0.2)(torch.zeros(1, 4, 8, 8)).item()
        1.0

    Source: ours; C. Tsallis, "Possible generalization of Boltzmann-Gibbs statistics", 1988.
    """

    function = staticmethod(functional.tsallis_entropy)

    def __init__(
        self,
        q: float,
        ratio: float | None = None,
        *,
        ignore_index: int = -1,
        reduction: Reduction = "mean",
        scale: Scale = "paper",
        activation: Activation = "softmax",
        from_logits: bool = True,
    ) -> None:
        super().__init__(
            q=q,
            ratio=ratio,
            ignore_index=ignore_index,
            reduction=reduction,
            scale=scale,
            activation=activation,
            from_logits=from_logits,
        )

    def _entropy(self, classes: int) -> tuple[float, float]:
        return self.q, functional.scale_factor(self.scale, classes)  # type: ignore[return-value,arg-type]


class PseudoLabelLoss(_TargetLoss):
    r"""Cross entropy against the prediction itself wherever it is confident.

    .. math:: \ell = \frac{1}{|A|} \sum_{n \in A} -\log \max_c p_{n,c}, \qquad
              A = \{n : \max_c p_{n,c} > t\}

    d l / d z_{n,c} = (p_{n,c} - [c = c*]) / |A| on A, and 0 elsewhere.

    Args:
        threshold: t, from 0 to 1; 0.95 as published.
        reduction: "mean" over the accepted pixels (for several processes see README.md), "sum", or
            "none" (0 where not accepted).
        activation, from_logits: as in `MaxSquareLoss`.

    Call, Shape, Raises: as in `MaxSquareLoss`; the value is in nats, 0 if nothing is accepted.

    Example:
        >>> import torch
        >>> PseudoLabelLoss(threshold=0.95)(torch.zeros(1, 4, 8, 8)).item()  # nothing confident
        0.0

    Source: M. Chen et al., ICCV 2019, the hard pseudo label (after D.-H. Lee, 2013).
    """

    function = staticmethod(functional.pseudo_label_loss)

    def __init__(
        self,
        threshold: float = 0.95,
        *,
        reduction: Reduction = "mean",
        activation: Activation = "softmax",
        from_logits: bool = True,
    ) -> None:
        super().__init__(
            threshold=threshold,
            reduction=reduction,
            activation=activation,
            from_logits=from_logits,
        )


class TeacherLoss(_Loss):
    r"""Cross entropy of a student against the classes that its teacher predicts with confidence.

    .. math:: \ell = \frac{1}{M} \sum_{n \in A} -\log p_{n, y_n}, \qquad
              y_n = \arg\max_c p^T_{n,c}, \quad A = \{n : \max_c p^T_{n,c} > t\}

    The teacher is constant: the gradient, (p_{n,c} - [c = y_n]) / M on A, is the student's.

    Args:
        threshold: t, from 0 to 1.
        average: what "mean" divides by. "accepted": M = |A|. "valid": M = N, all valid pixels.
            "share": the mean over all valid pixels, confident or not, times the share |A| / N.
        reduction: "mean" (for several processes see README.md), "sum" of the same terms, or "none".
        activation, from_logits: as in `MaxSquareLoss`.

    Call:
        logits: the student's, as in `MaxSquareLoss`.
        teacher_logits: the teacher's, of the same shape (with `size`, of any height and width).
        size, align_corners, valid: as in `MaxSquareLoss`.

    Shape, Raises: as in `MaxSquareLoss`; the value is in nats, 0 if nothing is accepted.

    Example:
        >>> import torch
        >>> logits, teacher_logits = torch.zeros(1, 2, 1), torch.tensor([[[9.0], [0.0]]])
        >>> round(TeacherLoss()(logits, teacher_logits).item(), 4)  # -log(1 / 2)
        0.6931

    Source: "accepted" as M. Chen et al.'s pseudo labels; "valid" as L. Yang et al., "Revisiting
    Weak-to-Strong Consistency" (UniMatch), CVPR 2023; "share" as L. Hoyer et al., "DAFormer",
    CVPR 2022, and "MIC", CVPR 2023.
    """

    def __init__(
        self,
        threshold: float = 0.95,
        average: Average = "accepted",
        *,
        reduction: Reduction = "mean",
        activation: Activation = "softmax",
        from_logits: bool = True,
    ) -> None:
        super().__init__(
            threshold=threshold,
            average=average,
            reduction=reduction,
            activation=activation,
            from_logits=from_logits,
        )

    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        *,
        size: Size = None,
        align_corners: bool = False,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The student's loss; the class documents the arguments."""
        value = functional.teacher_loss(
            logits,
            teacher_logits,
            size=size,
            align_corners=align_corners,
            valid=valid,
            **self.options(),
        )
        if not self._input_was_read:
            _warn_of_probabilities(self, self, logits=logits, teacher_logits=teacher_logits)
        return value


class InformationMaximizationLoss(nn.Module):
    r"""A target loss plus a term that prevents classes from being absorbed by others.

    .. math:: \ell = \ell_{target} + \lambda f D_q(\bar p, \tau), \qquad
              D_q = \frac{1}{q-1} \sum_c \bar p_c^q - \tau_c^q - q \tau_c^{q-1} (\bar p_c - \tau_c)

    p_bar is the mean of p over the valid pixels of the batch, tau the prior, q that of the target
    loss (1 for pseudo labels), and f the factor that the target loss gives its entropy. D_1 is the
    Kullback-Leibler divergence sum_c p_bar_c log(p_bar_c / tau_c); D_2 = sum_c (p_bar_c - tau_c)^2.
    With a plain loss, weight 1 and a uniform prior, the loss is, up to a constant, minus the mutual
    information of pixel and class in the entropy of that loss. With an image-wise loss, f includes
    the sum of an image's weights, averaged over images, as a constant for the gradient.

    The mean is over the batch: with one image, the term pushes that image towards all classes, so
    larger batches make it milder. Each of several processes takes the mean of its own batch.

    Args:
        target_loss: any loss of one head's logits of this library.
        weight: lambda, at least 0.
        prior: tau, the expected proportions (C,) of the classes, with sum 1; None: uniform. With
            activation="sigmoid", the expected share of each channel; None: one half.

    Call, Shape, Raises: as the target loss.

    Example:
        >>> import torch
        >>> loss = InformationMaximizationLoss(EntropyLoss())
        >>> one_class, all_classes = torch.zeros(1, 3, 3), 99 * torch.eye(3).unsqueeze(0)
        >>> one_class[:, 0] = 99
        >>> round(loss(one_class).item() - loss(all_classes).item(), 4)  # log 3
        1.0986

    Source: A. Krause et al., "Discriminative Clustering by Regularized Information Maximization",
    NIPS 2010, and J. Liang et al., "Do We Really Need to Access the Source Data?" (SHOT), ICML
    2020, for q = 1; the Bregman divergence of the other entropies is ours.
    """

    prior: Tensor | None

    def __init__(
        self,
        target_loss: nn.Module,
        weight: float = 1.0,
        prior: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(target_loss, _TargetLoss):
            raise TypeError(f"target_loss must be a loss of one head's logits, not {target_loss!r}")
        check_options(weight=weight)
        self.target_loss = target_loss
        self.weight = weight
        tau = check_prior(prior, str(target_loss.activation))
        self.register_buffer("prior", tau, persistent=False)

    def forward(
        self,
        logits: Tensor,
        *,
        size: Size = None,
        align_corners: bool = False,
        valid: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Target loss plus weighted divergence; the class documents the arguments."""
        once = functional.upsampled_once([logits], size, align_corners, self.from_logits)
        if once is not None:
            (logits,), size = once, None
        call: dict[str, Any] = {"size": size, "align_corners": align_corners, "valid": valid}
        target: Tensor = self.target_loss(logits, labels=labels, **call)
        options: dict[str, Any] = {
            name: getattr(self.target_loss, name, None)
            for name in ("ratio", "reduction", "activation", "from_logits")
        }
        classes = logits.shape[1] if options["activation"] == "softmax" else 2
        q, factor = self.target_loss._entropy(classes)
        divergence = functional.prediction_divergence(
            logits,
            q=q,
            prior=self.prior,
            labels=labels,
            ignore_index=getattr(self.target_loss, "ignore_index", -1),
            **call,
            **options,
        )
        return target + self.weight * factor * divergence

    @property
    def reduction(self) -> Reduction:
        return self.target_loss.reduction  # type: ignore[return-value]

    @property
    def activation(self) -> Activation:
        return self.target_loss.activation  # type: ignore[return-value]

    @property
    def from_logits(self) -> bool:
        return self.target_loss.from_logits  # type: ignore[return-value]

    def extra_repr(self) -> str:
        # Seven digits, because float32 has no more.
        prior = None if self.prior is None else [round(p, 7) for p in self.prior.tolist()]
        return f"weight={self.weight!r}, prior={prior!r}"


class MultiLevelGuidance(_Loss):
    r"""Low-level heads learn, by cross entropy, from the prediction averaged over both heads.

    .. math:: \ell = \frac{1}{|A|} \sum_{n \in A} -\log p^{low}_{n, y_n}, \qquad
              y_n = \arg\max_c \tfrac{1}{2} (p_{n,c} + p^{low}_{n,c})

    A is the set of pixels with max_c p_{n,c} > t or max_c p^low_{n,c} > t. The labels y are
    constant: the gradient, (p^low_{n,c} - [c = y_n]) / |A|, reaches only the low-level head.

    Args:
        threshold: t, from 0 to 1; 0.95 as published.
        reduction: "mean" over the accepted pixels (for several processes see README.md), "sum", or
            "none" (0 where not accepted).
        activation, from_logits: as in `MaxSquareLoss`.

    Call:
        logits: those of the final head, as in `MaxSquareLoss`.
        low_logits: those of the low-level head, of the same shape (with `size`, of any height and
            width), or a list for several heads, whose losses are added.
        size, align_corners, valid: as in `MaxSquareLoss`.

    Shape, Raises: as in `MaxSquareLoss`; the value is in nats, 0 if nothing is accepted.

    Example:
        >>> import torch
        >>> logits, low_logits = torch.tensor([[[9.0], [0.0]]]), torch.zeros(1, 2, 1)
        >>> round(MultiLevelGuidance()(logits, low_logits).item(), 4)  # -log(1 / 2)
        0.6931

    Source: M. Chen et al., ICCV 2019, multi-level self-produced guidance.
    """

    def __init__(
        self,
        threshold: float = 0.95,
        *,
        reduction: Reduction = "mean",
        activation: Activation = "softmax",
        from_logits: bool = True,
    ) -> None:
        super().__init__(
            threshold=threshold,
            reduction=reduction,
            activation=activation,
            from_logits=from_logits,
        )

    def forward(
        self,
        logits: Tensor,
        low_logits: Tensor | Sequence[Tensor],
        *,
        size: Size = None,
        align_corners: bool = False,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The sum of the low-level heads' losses; the class documents the arguments."""
        value = functional.guidance_loss(
            logits,
            low_logits,
            size=size,
            align_corners=align_corners,
            valid=valid,
            **self.options(),
        )
        if not self._input_was_read:
            _warn_of_probabilities(self, self, logits=logits, low_logits=low_logits)
        return value


class MultiLevelLoss(nn.Module):
    r"""A target loss on the final head, and guidance by it for the low-level heads.

    .. math:: \ell = \ell_{target}(z) + \lambda\, \ell_{guidance}(z, z^{low})

    Args:
        target_loss: any loss of one head's logits of this library, or an
            `InformationMaximizationLoss`; the guidance uses its reduction, activation and
            from_logits.
        threshold: that of the guidance, from 0 to 1, as in `MultiLevelGuidance`.
        weight: lambda, at least 0; 0.1 as published (lambda_seg; multiply this whole loss by
            lambda_target).

    Call:
        logits, low_logits, size, align_corners, valid: as in `MultiLevelGuidance`.
        labels: the map from which an image-wise target loss counts classes.

    Shape, Raises: as the target loss.

    Example:
        >>> import torch
        >>> loss = MultiLevelLoss(IWMaxSquareLoss(scale="reference"))
        >>> logits, low_logits = torch.zeros(1, 19, 9, 17), torch.zeros(1, 19, 9, 17)
        >>> loss(logits, low_logits, size=(65, 129), align_corners=True).shape
        torch.Size([])

    Source: M. Chen et al., ICCV 2019, the full objective on the target domain.
    """

    _input_was_read = False

    def __init__(
        self, target_loss: nn.Module, threshold: float = 0.95, weight: float = 0.1
    ) -> None:
        super().__init__()
        if not isinstance(target_loss, (_TargetLoss, InformationMaximizationLoss)):
            raise TypeError(f"target_loss must be a loss of one head's logits, not {target_loss!r}")
        check_options(threshold=threshold, weight=weight)
        self.target_loss = target_loss
        self.threshold = threshold
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
        """Target loss plus weighted guidance; the class documents the arguments."""
        heads = [logits, *(low_logits if isinstance(low_logits, (list, tuple)) else [low_logits])]
        from_logits = bool(self.target_loss.from_logits)
        once = functional.upsampled_once(heads, size, align_corners, from_logits)
        if once is not None:
            (logits, *low_logits), size = once, None
        call: dict[str, Any] = {"size": size, "align_corners": align_corners, "valid": valid}
        target: Tensor = self.target_loss(logits, labels=labels, **call)
        guidance = functional.guidance_loss(
            logits,
            low_logits,
            threshold=self.threshold,
            reduction=self.target_loss.reduction,  # type: ignore[arg-type]
            activation=self.target_loss.activation,  # type: ignore[arg-type]
            from_logits=self.target_loss.from_logits,  # type: ignore[arg-type]
            **call,
        )
        if not self._input_was_read:
            # The target loss reads the logits.
            _warn_of_probabilities(self, self.target_loss, low_logits=low_logits)
        return target + self.weight * guidance

    def extra_repr(self) -> str:
        return f"threshold={self.threshold!r}, weight={self.weight!r}"
