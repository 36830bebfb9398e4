"""Sums of pixel potentials per image and class, by whichever path is fastest."""

from maxsquare.engine.paths import accumulate, accumulate_both, predict, terms
from maxsquare.engine.pixelwise import Problem

__all__ = ["Problem", "accumulate", "accumulate_both", "predict", "terms"]
