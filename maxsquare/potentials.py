r"""Pixel potentials: the cost of one pixel's class probabilities, and its gradient.

Every loss of this library sums a potential over pixels. With p = softmax(z) the gradient with
respect to the logits has the closed form

.. math:: \partial\phi/\partial z_c = p_c (g_c - \textstyle\sum_k p_k g_k),
          \qquad g_c = \partial\phi/\partial p_c .

For the Tsallis entropies take L(p) = (p^{q-1} - 1) / (q - 1) + a, the q-logarithm shifted
by a constant, and t_c = p_c L(p_c). Then g_c = -q L(p_c) + constant, and

.. math:: S_q = a - \textstyle\sum_c t_c, \qquad
          \partial S_q/\partial z_c = -q\,(t_c - p_c \textstyle\sum_k t_k) .

Any shift is correct, and the right one saves digits: a = 1 / (q - 1) makes L a plain power,
without a difference in which flat predictions cancel. Near q = 1 that shift is huge; there a = 0
with expm1((q-1) log p) / (q - 1) is accurate up to the logarithm at q = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# For a smaller q, 1 / (q - 1) is more than twice as large as any entropy of two classes.
POWER_FROM_Q = 1.5

# The formulas of t in the kernels, and the two potentials without t.
SQUARE, SHANNON, POWER, NEAR_ONE, CROSS_ENTROPY, LINEAR = range(6)


class Probabilities:
    """p and log p of logits or probabilities z (N, C, *), computed when a potential needs them."""

    def __init__(self, z: Tensor, from_logits: bool = True) -> None:
        self.z, self.from_logits = z, from_logits

    def p(self) -> Tensor:
        return self.z.softmax(1) if self.from_logits else self.z

    def log_p(self) -> Tensor:
        if self.from_logits:
            return self.z.log_softmax(1)
        return self.z.clamp_min(torch.finfo(self.z.dtype).tiny).log()

    def both(self) -> tuple[Tensor, Tensor]:
        log_p = self.log_p()
        return log_p.exp() if self.from_logits else self.z, log_p


@dataclass(frozen=True)
class Tsallis:
    """S_q + offset: Shannon's entropy if q = 1, minus the sum of squares if q = 2 and offset -1.

    normalised: whether the probabilities are known to sum to one.
    """

    q: float
    offset: float = 0
    normalised: bool = True

    def shift(self) -> float:
        """The shift a."""
        return 1 / (self.q - 1) if self.q >= POWER_FROM_Q else 0.0

    def kind(self) -> int:
        """The formula of t."""
        if self.q in (1, 2):
            return SHANNON if self.q == 1 else SQUARE
        return POWER if self.shift() else NEAR_ONE

    def terms(self, probabilities: Probabilities) -> Tensor:
        """t = p L(p), with L finite at p = 0 so that t is 0 there."""
        q, kind = self.q, self.kind()
        if kind == SQUARE:
            return probabilities.p().square()
        p, log_p = probabilities.both()
        tiny = torch.finfo(p.dtype).tiny
        if kind == POWER:
            return p * torch.exp((q - 1) * log_p) * self.shift()
        bounded = log_p.clamp_min(math.log(tiny))
        if kind == SHANNON:
            return p * bounded
        t = p * torch.expm1((q - 1) * bounded) / (q - 1)
        if q < 1 and self.normalised:
            # p underflows earlier than p^q.
            t = torch.where(p < tiny, torch.exp(q * log_p) / (q - 1), t)
        return t

    def value(self, probabilities: Probabilities) -> Tensor:
        """The potential of every pixel, (N, *)."""
        phi = self.shift() + self.offset - self.terms(probabilities).sum(1)
        if self.normalised or self.shift() or self.q == 1:
            return phi
        # With a = 0 the sum above assumes that the probabilities sum to 1.
        return phi + (1 - probabilities.p().sum(1)) / (self.q - 1)


@dataclass(frozen=True)
class CrossEntropy:
    """-log p_y of the pixel's class y; g_c = -[c = y] / p_y."""

    def kind(self) -> int:
        return CROSS_ENTROPY

    def value(self, probabilities: Probabilities, y: Tensor) -> Tensor:
        """The potential of every pixel, (N, *), for its class y (N, *)."""
        log_p = probabilities.log_p()
        # A pixel without a class takes the value of another one: its weight is 0 or NaN.
        c = y.long().clamp(0, log_p.shape[1] - 1).unsqueeze(1)
        return -log_p.gather(1, c).squeeze(1)


@dataclass(frozen=True)
class Linear:
    """sum_c G_c p_c, where G (N, C) are the coefficients of each image; g_c = G_c.

    It gives the gradient of a function of the class sums; G is that function's gradient by them.
    """

    def kind(self) -> int:
        return LINEAR

    def value(self, probabilities: Probabilities, coefficients: Tensor) -> Tensor:
        """The potential of every pixel, (N, *)."""
        p = probabilities.p()
        return (coefficients.view(*coefficients.shape, *[1] * (p.dim() - 2)) * p).sum(1)


Potential = Tsallis | CrossEntropy | Linear


def numbers_of(potential: Potential) -> tuple[int, float, float]:
    """A potential as the options of an operator: kind, q and offset."""
    if isinstance(potential, Tsallis):
        return potential.kind(), potential.q, potential.offset
    return potential.kind(), 0.0, 0.0


def potential_of(kind: int, q: float, offset: float) -> Potential:
    """The inverse of `numbers_of`."""
    if kind == LINEAR:
        return Linear()
    return CrossEntropy() if kind == CROSS_ENTROPY else Tsallis(q, offset)
