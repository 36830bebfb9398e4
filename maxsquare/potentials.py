r"""Pixel potentials: what one pixel pays for its class probabilities, and the slope of that.

Every loss of this library sums a potential over pixels. With p = softmax(z) the slope with
respect to the logits is closed form,

.. math:: \partial\phi/\partial z_c = p_c (g_c - \textstyle\sum_k p_k g_k),
          \qquad g_c = \partial\phi/\partial p_c .

For the Tsallis entropies take L(p) = (p^{q-1} - 1) / (q - 1) + a, the q-logarithm shifted
by a constant, and t_c = p_c L(p_c). Then g_c = -q L(p_c) + constant, and

.. math:: S_q = a - \textstyle\sum_c t_c, \qquad
          \partial S_q/\partial z_c = -q\,(t_c - p_c \textstyle\sum_k t_k) .

The shift is free, and saves digits: a = 1 / (q - 1) makes L a plain power, without a
difference that flat predictions would lose; but near q = 1 it is huge, and a = 0 with
expm1((q-1) log p) / (q - 1) is exact all the way to the logarithm at q = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Below, 1 / (q - 1) would be more than twice as large as any entropy of two classes.
POWER_FROM_Q = 1.5

# The forms that t takes in the kernels, and the potential that has none.
SQUARE, SHANNON, POWER, NEAR_ONE, LABEL = range(5)


@dataclass(frozen=True)
class Tsallis:
    """S_q + offset; q = 1 is Shannon's entropy, q = 2 with offset -1 minus the sum of squares.

    normalised: the probabilities are known to add up to one.
    """

    q: float
    offset: float = 0
    normalised: bool = True

    def shift(self) -> float:
        """a."""
        return 1 / (self.q - 1) if self.q >= POWER_FROM_Q else 0.0

    def kind(self) -> int:
        """The form of t."""
        if self.q in (1, 2):
            return SHANNON if self.q == 1 else SQUARE
        return POWER if self.shift() else NEAR_ONE

    def terms(self, p: Tensor, log_p: Tensor) -> Tensor:
        """t = p L(p), with L finite at p = 0 so that t is 0 there."""
        q, tiny, kind = self.q, torch.finfo(p.dtype).tiny, self.kind()
        if kind == SQUARE:
            return p * p
        if kind == POWER:
            return p * torch.exp((q - 1) * log_p) * self.shift()
        bounded = log_p.clamp_min(math.log(tiny))
        if kind == SHANNON:
            return p * bounded
        t = p * torch.expm1((q - 1) * bounded) / (q - 1)
        if q < 1 and self.normalised:
            # Where p has been rounded away, p^q is still something.
            t = torch.where(p < tiny, torch.exp(q * log_p) / (q - 1), t)
        return t

    def value(self, p: Tensor, log_p: Tensor, y: Tensor | None = None) -> Tensor:
        """(N, C, *) probabilities and their logarithms -> (N, *)."""
        phi = self.shift() + self.offset - self.terms(p, log_p).sum(1)
        if self.normalised or self.shift() or self.q == 1:
            return phi
        # With a = 0 the sum above takes 1 for the sum of the probabilities.
        return phi + (1 - p.sum(1)) / (self.q - 1)

    def slope(self, p: Tensor, log_p: Tensor, y: Tensor | None = None) -> Tensor:
        """The slope of the value with respect to the logits, (N, C, *)."""
        t = self.terms(p, log_p)
        return -self.q * (t - p * t.sum(1, keepdim=True))


@dataclass(frozen=True)
class Label:
    """Cross entropy -log p_y against the pixel's class y; g_c = -[c = y] / p_y.

    A pixel whose y is no class has the value of some class: its weight is 0 or NaN.
    """

    def kind(self) -> int:
        """The form of the slope."""
        return LABEL

    def value(self, p: Tensor, log_p: Tensor, y: Tensor | None) -> Tensor:
        """(N, C, *) probabilities and their logarithms, (N, *) classes -> (N, *)."""
        return -log_p.gather(1, self._class(p, y)).squeeze(1)

    def slope(self, p: Tensor, log_p: Tensor, y: Tensor | None) -> Tensor:
        """The slope of the value with respect to the logits, (N, C, *): p_c - [c = y]."""
        return p.scatter_add(1, self._class(p, y), -torch.ones_like(p[:, :1]))

    @staticmethod
    def _class(p: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return y.long().clamp(0, p.shape[1] - 1).unsqueeze(1)


Potential = Tsallis | Label
