"""The computation of losses: three operators, their kernels, and the plain formula behind them."""

from maxsquare.engine.operators import class_sums, classify, prepare, weighted_sum
from maxsquare.engine.plain import LogitsSpec, accumulation_dtype, weighted_terms

__all__ = [
    "LogitsSpec",
    "accumulation_dtype",
    "class_sums",
    "classify",
    "prepare",
    "weighted_sum",
    "weighted_terms",
]
