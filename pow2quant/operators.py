"""What each ONNX operation is: the one table that placement, export, clips, certificate and lowering read.

A new operation is one row of `OPERATIONS`, one row in a front end, and, where it has integers, one file in
`integer/ops/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How an operation treats encodings."""

    WEIGHTED = "has a weight and possibly a bias; its result gets a quantizer"
    COMPUTE = "its result gets a quantizer"
    CLIP = "like COMPUTE, but shares one quantizer with the operation in front when it is its only reader"
    PASS = "moves values; its result has its input's encoding"
    CONCAT = "its inputs share its encoding where no other reader forbids it"
    INDEX = "its result is integers that count, without an encoding"


class Double(Enum):
    """Whether an operation of a QDQ file is computed in double, and rounded to float32 once."""

    NEVER = "in float32, by onnxruntime's choice of kernels or by ours"
    BETWEEN = "where it is between two that are, or next to one, and nothing is rounded in between"
    ABOVE_8_BITS = "unless its input and its result have 8 bits, on which float32 agrees with it"
    ALWAYS = "two libraries' float32 kernels differ in the last bit"


class Values(Enum):
    """Where the values of a result come from."""

    MOVED = "its first input's, in other places"
    FILLED = "its first input's, in other places, and zeros or repetitions between them"
    SELECTED = "its first input's: the largest or least of several"
    CLIPPED = "its first input's, but for the ends"
    JOINED = "those of all its inputs"
    SUMS_OF_PRODUCTS = "sums of products of two tensors"
    SUM = "sums of two tensors, or of one"
    PRODUCT = "products of two tensors"
    AVERAGE = "averages"
    FUNCTION = "a function of one tensor, element by element"
    FLOAT = "sums and quotients in float"
    NONE = "no real numbers: shapes, indexes, constants"


@dataclass(frozen=True)
class Operation:
    """A row: what is true of one ONNX operation, in every executor.

    keeps_axes: channels of the result are those of its first input. propagated: onnxruntime's
    QDQPropagationTransformer moves a Q or repeats a DQ past it. kernel: onnxruntime has an integer kernel for it.
    clipped: it shares one quantizer with a ReLU or Clip behind it.
    """

    kind: Kind
    values: Values
    double: Double = Double.NEVER
    keeps_axes: bool = False
    propagated: bool = False
    kernel: bool = False
    clipped: bool = False


def _rows(names: str, kind: Kind, values: Values, double: Double = Double.NEVER, **more: bool) -> dict[str, Operation]:
    return dict.fromkeys(names.split(), Operation(kind, values, double, **more))


_PASS, _COMPUTE, _BETWEEN = Kind.PASS, Kind.COMPUTE, Double.BETWEEN

OPERATIONS: dict[str, Operation] = {
    **_rows("Conv Gemm", Kind.WEIGHTED, Values.SUMS_OF_PRODUCTS, kernel=True, clipped=True),
    **_rows("ConvTranspose", Kind.WEIGHTED, Values.SUMS_OF_PRODUCTS, clipped=True),
    **_rows("MatMul", _COMPUTE, Values.SUMS_OF_PRODUCTS, _BETWEEN, kernel=True),
    **_rows("Add", _COMPUTE, Values.SUM, _BETWEEN, kernel=True, clipped=True),
    **_rows("Sub", _COMPUTE, Values.SUM, _BETWEEN, clipped=True),
    **_rows("ReduceSum", _COMPUTE, Values.SUM, _BETWEEN),
    **_rows("Mul", _COMPUTE, Values.PRODUCT, _BETWEEN, kernel=True, clipped=True),
    **_rows("AveragePool GlobalAveragePool", _COMPUTE, Values.AVERAGE),
    **_rows("ReduceMean", _COMPUTE, Values.AVERAGE, _BETWEEN),
    **_rows("Relu Clip", Kind.CLIP, Values.CLIPPED, _BETWEEN, keeps_axes=True),
    **_rows("Flatten Squeeze Unsqueeze", _PASS, Values.MOVED, propagated=True),
    **_rows("Reshape Slice Transpose", _PASS, Values.MOVED, _BETWEEN, propagated=True),
    **_rows("Expand Gather", _PASS, Values.MOVED, _BETWEEN),
    **_rows("DepthToSpace GatherElements SpaceToDepth Split Tile", _PASS, Values.MOVED),
    **_rows("Dropout Identity", _PASS, Values.MOVED, keeps_axes=True),
    **_rows("Pad", _PASS, Values.FILLED, _BETWEEN),
    **_rows("Resize", _PASS, Values.FILLED),
    **_rows("MaxPool", _PASS, Values.SELECTED, keeps_axes=True, propagated=True),
    **_rows("GlobalMaxPool", _PASS, Values.SELECTED, keeps_axes=True),
    **_rows("ReduceMax ReduceMin TopK", _PASS, Values.SELECTED),
    **_rows("Concat", Kind.CONCAT, Values.JOINED, _BETWEEN, kernel=True),
    **_rows("Max Min", _COMPUTE, Values.JOINED, _BETWEEN, keeps_axes=True),
    **_rows("Where", _COMPUTE, Values.JOINED, _BETWEEN),
    **_rows("ScatterElements", _COMPUTE, Values.JOINED),
    **_rows("ArgMax", Kind.INDEX, Values.NONE),
    **_rows("Constant", _COMPUTE, Values.NONE),
    **_rows("Shape", Kind.INDEX, Values.NONE),
    **_rows("Abs Ceil Floor Neg Round Sign", _COMPUTE, Values.FUNCTION, _BETWEEN),
    **_rows("Equal Greater GreaterOrEqual Less LessOrEqual Not", _COMPUTE, Values.FUNCTION, _BETWEEN),
    **_rows("Asinh Atan Cast Cosh Elu Erf Gelu HardSigmoid HardSwish LeakyRelu Mish", _COMPUTE, Values.FUNCTION),
    **_rows("PRelu Sinh Softplus Tan", _COMPUTE, Values.FUNCTION),
    **_rows("Sigmoid Tanh", _COMPUTE, Values.FUNCTION, Double.ABOVE_8_BITS),
    **_rows("Cos Exp Log Pow Sin Sqrt", _COMPUTE, Values.FUNCTION, Double.ALWAYS),
    **_rows("LayerNormalization LogSoftmax Softmax", _COMPUTE, Values.FLOAT, Double.ALWAYS),
    **_rows("Div GridSample ReduceLogSumExp ReduceProd", _COMPUTE, Values.FLOAT, Double.ALWAYS),
    **_rows("CumSum", _COMPUTE, Values.FLOAT),
}
"""By ONNX operation type (domain `ai.onnx`)."""

MOVES = (Values.MOVED, Values.FILLED, Values.SELECTED)
"""A result of these values lies on its first input's grid."""


def values(op: str) -> Values | None:
    """Where the values of an operation's result come from; None for one that is not in the table."""
    row = OPERATIONS.get(op)
    return None if row is None else row.values


def operations(*wanted: Values) -> tuple[str, ...]:
    """The operations whose results have such values."""
    return tuple(op for op, row in OPERATIONS.items() if row.values in wanted)
