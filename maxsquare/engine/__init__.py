"""Sums of pixel potentials per image and class, by whichever path is fastest."""

from maxsquare.engine.paths import accumulate, predict, terms
from maxsquare.engine.pixelwise import Problem

__all__ = ["Problem", "accumulate", "predict", "terms"]
