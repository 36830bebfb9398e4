r"""Pixel potentials: what one pixel pays for its class probabilities.

Every loss of this library sums a potential over pixels. With p = softmax(z) the
gradient with respect to the logits is closed form,

.. math:: \partial\phi/\partial z_c = p_c (g_c - \textstyle\sum_k p_k g_k),
          \qquad g_c = \partial\phi/\partial p_c .

For the Tsallis entropies write L(p) = (p^{q-1} - 1) / (q - 1) (the q-logarithm; log p
as q -> 1). Then S_q = -sum_c p_c L(p_c), g_c = -(1 + q L(p_c)), and

.. math:: \partial S_q/\partial z_c = -q\,(p_c L(p_c) + p_c S_q) .

Writing L as expm1((q-1) log p) / (q-1) keeps every digit as q -> 1, where
(1 - sum_c p_c^q) / (q - 1) would be a difference of nearly equal numbers. For arguments that
need not add up to one the two differ by (1 - sum_c p_c) / (q - 1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Tsallis(NamedTuple):
    """S_q of the class probabilities; q = 1 is Shannon's entropy, q = 2 maximum squares.

    normalised: the probabilities are known to add up to one.
    """

    q: float
    normalised: bool = True

    def value(self, p: Tensor, log_p: Tensor, y: Tensor | None = None) -> Tensor:
        """(N, C, *) probabilities and their logarithms -> (N, *)."""
        phi = -(p * self.q_log(p, log_p)).sum(1)
        return phi if self.normalised or self.q == 1 else phi + (1 - p.sum(1)) / (self.q - 1)

    def q_log(self, p: Tensor, log_p: Tensor) -> Tensor:
        """L(p), with log p held finite so that p L(p) = 0 at p = 0."""
        if self.q == 2:
            return p - 1
        log_p = log_p.clamp_min(math.log(torch.finfo(log_p.dtype).tiny))
        return log_p if self.q == 1 else torch.expm1((self.q - 1) * log_p) / (self.q - 1)


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
