"""What a target is: the arithmetic of one runtime or chip, and which plans it can take."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from pow2quant.mappings.legal import Legal, integer, one_of
from pow2quant.operators import OPERATIONS, Values, values
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN, ROUNDINGS

WIDTHS = {"weight": range(2, 17), "input": range(2, 17), "output": range(2, 17), "bias": range(8, 33)}
"""The bits that a tensor of each role can have."""

Rule = Annotated[str, one_of(lambda: ROUNDINGS)]
TableRule = Annotated[str, one_of(lambda: ROUNDINGS.keys() - {"gemmlowp"})]
Widths = Annotated[
    tuple[int, ...],
    Legal(lambda: "a list of integers from 2 to 16, such as [4, 8]", lambda v: set(v) <= set(WIDTHS["weight"])),
]
Shifts = Annotated[
    tuple[int, int] | None,
    Legal(lambda: "two integers, the least and the largest, such as [0, 31]", lambda v: v[0] <= v[1]),
]
Operations = Annotated[
    tuple[str, ...],
    Legal(lambda: f"a list of {', '.join(sorted(OPERATIONS))}", lambda v: set(v) <= OPERATIONS.keys()),
]


@dataclass(frozen=True)
class Roundings:
    """How each kind of operation rounds its result to its grid: a rule of `arithmetic.ROUNDINGS`.

    products: sums of products (Conv, ConvTranspose, Gemm, MatMul). sums: Add, Sub, ReduceSum. averages: AveragePool,
    ReduceMean. multiplications: Mul of two tensors. moves: what only brings values to another scale (Concat, Clip,
    Max). functions: the tables of functions of one tensor, such as Sigmoid. Inputs of the network are always rounded
    half to even.
    """

    products: Rule = HALF_EVEN
    sums: Rule = HALF_EVEN
    averages: Rule = HALF_EVEN
    multiplications: Rule = HALF_EVEN
    moves: Rule = HALF_EVEN
    functions: TableRule = HALF_EVEN

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
    Values.FUNCTION: "functions",
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

    weight_bits: Widths = ()
    input_bits: Widths = ()
    output_bits: Widths = ()
    bias_bits: Annotated[int | None, integer(8, 32)] = None
    symmetric: bool = False
    per_tensor: bool = False
    product_shift: Shifts = None
    sum_shift: Shifts = None
    accumulator_bits: Annotated[int | None, integer(2, 64)] = None
    operations: Operations = ()

    @property
    def bound_exponents(self) -> bool:
        """Whether not every exponent is legal."""
        return any(limit is not None for limit in (self.product_shift, self.sum_shift, self.accumulator_bits))


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
