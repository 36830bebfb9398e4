"""Sums of pixel potentials per image and class, by whichever path is fastest."""

from maxsquare.engine.pixelwise import Problem, accumulate, predict, terms

__all__ = ["Problem", "accumulate", "predict", "terms"]
