"""What a target is: the arithmetic of one runtime or chip, and which plans it can take."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from pow2quant.operators import Values, values
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN

Rule = Literal["half_even", "half_up", "half_away", "gemmlowp", "truncate", "floor"]


@dataclass(frozen=True)
class Roundings:
    """How each kind of operation rounds its result to its grid: a rule of `arithmetic.ROUNDINGS`.

    products: sums of products (Conv, ConvTranspose, Gemm, MatMul). sums: Add, Sub, ReduceSum. averages: AveragePool,
    ReduceMean. multiplications: Mul of two tensors. moves: what only brings values to another scale (Concat, Clip,
    Max). Inputs of the network, and functions, which are stored tables, are always rounded half to even.
    """

    products: Rule = HALF_EVEN
    sums: Rule = HALF_EVEN
    averages: Rule = HALF_EVEN
    multiplications: Rule = HALF_EVEN
    moves: Rule = HALF_EVEN

    def of(self, operation: str) -> str:
        """The rule of an ONNX operation, by its type."""
        kind = KINDS.get(values(operation) or Values.NONE)
        return HALF_EVEN if kind is None else str(getattr(self, kind))


KINDS = {
    Values.SUMS_OF_PRODUCTS: "products",
    Values.SUM: "sums",
    Values.AVERAGE: "averages",
    Values.PRODUCT: "multiplications",
    Values.MOVED: "moves",
    Values.FILLED: "moves",
    Values.SELECTED: "moves",
    Values.CLIPPED: "moves",
    Values.JOINED: "moves",
}
"""The field of `Roundings` by where a result's values come from."""


@dataclass(frozen=True)
class Limits:
    """Which plans a target takes; None and () where it takes all.

    weight_bits, input_bits, output_bits: legal widths. bias_bits: the widest bias. symmetric: activations have zero
    point 0 on a signed grid. per_tensor: weights have one scale. product_shift: the least and the largest shift to the
    right behind a sum of products, k_out - (k_in + k_w). sum_shift: the least and the largest k_out - k_in of each
    input of a sum. accumulator_bits: what holds every partial sum. operations: ONNX operations that it has.
    """

    weight_bits: tuple[int, ...] = ()
    input_bits: tuple[int, ...] = ()
    output_bits: tuple[int, ...] = ()
    bias_bits: int | None = None
    symmetric: bool = False
    per_tensor: bool = False
    product_shift: tuple[int, int] | None = None
    sum_shift: tuple[int, int] | None = None
    accumulator_bits: int | None = None
    operations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One runtime or chip. Frozen: `Target()` is onnxruntime's arithmetic, the default.

    summary: one line. rounding, limits: see there. tied_sums: the inputs and the result of a sum, a Concat, a maximum
    or a minimum have one exponent, so that it never shifts. open_sums: what a layer gives to a sum alone is not rounded
    before it. executors: validators that have this arithmetic, by name. formats: exporters that make its files. source:
    where the rules come from, and whether an executor was run.
    """

    name: str = "onnxruntime"
    summary: str = field(default="", compare=False)
    rounding: Roundings = Roundings()
    limits: Limits = Limits()
    tied_sums: bool = False
    open_sums: bool = False
    executors: tuple[str, ...] = ("onnxruntime", "engine", "c")
    formats: tuple[str, ...] = ("qdq",)
    source: str = field(default="", compare=False)

    @property
    def rounding_matters(self) -> bool:
        """Whether some operation rounds otherwise than ONNX says."""
        return any(getattr(self.rounding, f.name) != HALF_EVEN for f in fields(Roundings))


DEFAULT = Target()
"""What is meant where nothing is said. Its preset has the same rules, and words beside them."""
