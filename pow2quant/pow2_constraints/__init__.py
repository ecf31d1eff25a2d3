"""Integer grids, encodings, exact power-of-two arithmetic and the choosers of k. Pure numpy."""

from pow2quant.pow2_constraints.arithmetic import (
    ceil_exponent,
    divide_round,
    exact_exponent,
    power_of_two,
    requantize,
    saturate,
    shift_round,
)
from pow2quant.pow2_constraints.encoding import Encoding, IntGrid
from pow2quant.pow2_constraints.snap import CHOOSERS, Format, Observed, choose, is_chooser

__all__ = [
    "CHOOSERS",
    "Encoding",
    "Format",
    "IntGrid",
    "Observed",
    "ceil_exponent",
    "choose",
    "divide_round",
    "exact_exponent",
    "is_chooser",
    "power_of_two",
    "requantize",
    "saturate",
    "shift_round",
]
