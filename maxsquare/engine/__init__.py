"""How losses are computed: two operators, their kernels, and the plain formula behind them."""

from maxsquare.engine.operators import classify, weighted_sum
from maxsquare.engine.plain import accumulation_dtype, number_of_classes, weighted_terms

__all__ = [
    "accumulation_dtype",
    "classify",
    "number_of_classes",
    "weighted_sum",
    "weighted_terms",
]
