r"""Pixel potentials: what one pixel pays for its class probabilities.

Every loss of this library sums a potential over pixels. With p = softmax(z) the
gradient with respect to the logits is closed form,

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
from typing import NamedTuple

import torch
from torch import Tensor

# Below, 1 / (q - 1) would be more than twice as large as any entropy of two classes.
POWER_FROM_Q = 1.5


class Tsallis(NamedTuple):
    """S_q + offset; q = 1 is Shannon's entropy, q = 2 with offset -1 minus the sum of squares.

    normalised: the probabilities are known to add up to one.
    """

    q: float
    normalised: bool = True
    offset: float = 0

    @property
    def shift(self) -> float:
        """a."""
        return 1 / (self.q - 1) if self.q >= POWER_FROM_Q else 0.0

    @property
    def constant(self) -> float:
        """What - sum_c t_c lacks."""
        return self.shift + self.offset

    def shifted_log(self, p: Tensor, log_p: Tensor) -> Tensor:
        """L(p), finite at p = 0, so that p L(p) = 0 there."""
        if self.q == 2:
            return p
        if self.shift:
            return torch.exp((self.q - 1) * log_p) * self.shift
        log_p = log_p.clamp_min(math.log(torch.finfo(log_p.dtype).tiny))
        return log_p if self.q == 1 else torch.expm1((self.q - 1) * log_p) / (self.q - 1)

    def terms(self, p: Tensor, log_p: Tensor, out: Tensor | None = None) -> Tensor:
        """t = p L(p); out: where it may be put, if it has no better place; then without a graph."""
        L = self.shifted_log(p, log_p)
        t = torch.mul(p, L, out=out if out is None or L is p else L)
        if self.q < 1 and self.normalised:
            # Where p has been rounded away, p^q is still something.
            rest = torch.exp(self.q * log_p) / (self.q - 1)
            t = torch.where(p < torch.finfo(p.dtype).tiny, rest, t)
        return t

    def value(self, p: Tensor, log_p: Tensor, y: Tensor | None = None) -> Tensor:
        """(N, C, *) probabilities and their logarithms -> (N, *)."""
        phi = self.constant - self.terms(p, log_p).sum(1)
        if self.normalised or self.shift or self.q == 1:
            return phi
        # With a = 0 the sum above takes 1 for the sum of the probabilities.
        return phi + (1 - p.sum(1)) / (self.q - 1)


class Label(NamedTuple):
    """Cross entropy -log p_y against the pixel's index y; g_c = -[c = y] / p_y.

    y = -1 is for the caller to leave out; any other y outside 0..C-1 is NaN, so that it shows.
    """

    def value(self, p: Tensor, log_p: Tensor, y: Tensor) -> Tensor:
        """(N, C, *) probabilities and their logarithms, (N, *) indices -> (N, *)."""
        classes = p.shape[1]
        phi = -log_p.gather(1, y.long().clamp(0, classes - 1).unsqueeze(1)).squeeze(1)
        known = (y >= -1) & (y < classes)
        return phi * torch.where(known, 1.0, math.nan).to(phi.dtype)
