"""The integer definitions of functions that are not sums of products, and how an ONNX node says which one it has.

A node of an artifact that bears a definition (`mark`, `definition`) means these integers, in every executor: the
simulation, the nodes of a QDQ file that `adapters/onnx_qdq/exact.py` writes in its place, the engine and C. Results of
Softmax and the norms are integers of at most 2^24, so that float32 holds them, and an ordinary requantization follows;
a table holds the codes themselves.
"""

from pow2quant.functions.divisions import TINY, Quotient, Resampling, farthest, quotient, resampling, rounds_alike
from pow2quant.functions.log_softmax import LogSoftmax
from pow2quant.functions.lookup import WIDEST, Lookup, accepts
from pow2quant.functions.nodes import KEY, KINDS, Definition, definition, inside_definitions, mark, region
from pow2quant.functions.norm import DEPTH, RECIPROCAL, Norm
from pow2quant.functions.softmax import FINE, HIDDEN, Softmax

__all__ = [
    "DEPTH",
    "FINE",
    "HIDDEN",
    "KEY",
    "KINDS",
    "RECIPROCAL",
    "TINY",
    "WIDEST",
    "Definition",
    "LogSoftmax",
    "Lookup",
    "Norm",
    "Quotient",
    "Resampling",
    "Softmax",
    "accepts",
    "definition",
    "farthest",
    "inside_definitions",
    "mark",
    "quotient",
    "region",
    "resampling",
    "rounds_alike",
]
