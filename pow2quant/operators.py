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


@dataclass(frozen=True)
class Operation:
    """A row: what is true of one ONNX operation, whoever computes it."""

    kind: Kind


OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), Operation(Kind.WEIGHTED)),
    **dict.fromkeys(("Relu", "Clip"), Operation(Kind.CLIP)),
    "Concat": Operation(Kind.CONCAT),
    "ArgMax": Operation(Kind.INDEX),
    **dict.fromkeys(
        ("MaxPool", "Flatten", "Reshape", "Transpose", "Slice", "Pad", "Resize", "Expand", "Gather"),
        Operation(Kind.PASS),
    ),
    **dict.fromkeys(
        (
            *("Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Elu", "LeakyRelu", "PRelu"),
            *("Softmax", "LayerNormalization", "AveragePool", "ReduceMean", "Add", "Sub", "Mul", "MatMul"),
            "Constant",
        ),
        Operation(Kind.COMPUTE),
    ),
}
"""By ONNX operation type (domain `ai.onnx`)."""
