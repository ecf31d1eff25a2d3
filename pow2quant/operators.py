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
    BETWEEN = "where it stands between two that are, or beside one, and nothing is rounded between them"
    ABOVE_8_BITS = "unless its input and its result have 8 bits, on which float32 agrees with it"
    ALWAYS = "two libraries' float32 kernels differ in the last bit"


@dataclass(frozen=True)
class Operation:
    """A row: what is true of one ONNX operation, whoever computes it."""

    kind: Kind
    double: Double = Double.NEVER


OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), Operation(Kind.WEIGHTED)),
    **dict.fromkeys(("Relu", "Clip"), Operation(Kind.CLIP, Double.BETWEEN)),
    "Concat": Operation(Kind.CONCAT, Double.BETWEEN),
    "ArgMax": Operation(Kind.INDEX),
    **dict.fromkeys(("MaxPool", "Flatten", "Resize", "ReduceMax", "ReduceMin", "TopK"), Operation(Kind.PASS)),
    **dict.fromkeys(("Reshape", "Transpose", "Slice", "Pad", "Expand", "Gather"), Operation(Kind.PASS, Double.BETWEEN)),
    **dict.fromkeys(
        (
            "HardSigmoid",
            "HardSwish",
            "Gelu",
            "Elu",
            "LeakyRelu",
            "PRelu",
            "Erf",
            "AveragePool",
            "Cast",
            "Constant",
            "CumSum",
        ),
        Operation(Kind.COMPUTE),
    ),
    **dict.fromkeys(
        (
            *("Add", "Sub", "Mul", "MatMul", "Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Max", "Min", "Where"),
            *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "ReduceMean", "ReduceSum"),
        ),
        Operation(Kind.COMPUTE, Double.BETWEEN),
    ),
    **dict.fromkeys(("Sigmoid", "Tanh"), Operation(Kind.COMPUTE, Double.ABOVE_8_BITS)),
    **dict.fromkeys(
        (
            *("Softmax", "LogSoftmax", "LayerNormalization", "Exp", "Log", "Sqrt", "Div", "Pow", "Sin", "Cos"),
            *("ReduceLogSumExp", "ReduceProd"),
        ),
        Operation(Kind.COMPUTE, Double.ALWAYS),
    ),
}
"""By ONNX operation type (domain `ai.onnx`)."""
