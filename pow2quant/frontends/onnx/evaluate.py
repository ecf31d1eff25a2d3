"""Constant parts of an ONNX graph, computed by onnx's reference evaluator, and never larger than a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from pow2quant.frontends.onnx.file import attribute, plain_floats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Sequence[NDArray[Any] | None]

LARGEST = 1 << 28
"""Elements that a constant may have."""


def _inputs(node: NodeProto, x: Arrays) -> int:
    return sum(a.size for a in x if a is not None)


def _broadcast(node: NodeProto, x: Arrays) -> int:
    return math.prod(np.broadcast_shapes(*(a.shape for a in x if a is not None)))


def _shape(at: int) -> Callable[[NodeProto, Arrays], int]:
    """The size is the product of an operand's values."""
    return lambda node, x: math.prod(max(1, int(d)) for d in _given(x, at).tolist())


def _given(x: Arrays, at: int) -> NDArray[Any]:
    operand = x[at] if at < len(x) else None
    if operand is None:
        raise ValueError(f"operand {at} is missing")
    return operand


def _expand(node: NodeProto, x: Arrays) -> int:
    shape = tuple(max(0, int(d)) for d in _given(x, 1).tolist())
    return math.prod(np.broadcast_shapes(_given(x, 0).shape, shape))


def _tile(node: NodeProto, x: Arrays) -> int:
    return _given(x, 0).size * _shape(1)(node, x)


def _range(node: NodeProto, x: Arrays) -> int:
    start, limit, delta = (float(_given(x, i)) for i in range(3))
    return max(0, math.ceil((limit - start) / delta))


def _gather(node: NodeProto, x: Arrays) -> int:
    data, axis = _given(x, 0), attribute(node, "axis", 0)
    return int(_given(x, 1).size * (data.size // max(1, data.shape[axis])))


def _pad(node: NodeProto, x: Arrays) -> int:
    data = _given(x, 0)
    pads = attribute(node, "pads") or _given(x, 1).tolist()
    return math.prod(
        d + abs(int(a)) + abs(int(b)) for d, a, b in zip(data.shape, pads, pads[data.ndim :], strict=False)
    )


def _matmul(node: NodeProto, x: Arrays) -> int:
    return int(_given(x, 0).size * max(1, _given(x, 1).shape[-1]))


def _one_hot(node: NodeProto, x: Arrays) -> int:
    return _given(x, 0).size * max(1, int(_given(x, 1).reshape(-1)[0]))


EVALUATED: dict[str, Callable[[NodeProto, Arrays], int]] = {
    **dict.fromkeys(
        (
            *("Abs", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Cos", "Erf", "Exp", "Flatten", "Floor"),
            *("Identity", "Log", "Neg", "Not", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
            *("ReduceL2", "ReduceSumSquare", "Reciprocal", "Relu", "Reshape", "Round", "ScatterND", "Shape", "Sigmoid"),
            *("Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Tanh", "Transpose"),
            *("Trilu", "Unsqueeze", "CumSum", "ArgMax", "ArgMin", "NonZero", "GatherElements", "GatherND", "IsNaN"),
            *("ScatterElements", "Dropout", "DequantizeLinear", "IsInf", "Tan", "Atan"),
        ),
        _inputs,
    ),
    **dict.fromkeys(
        (
            *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mod", "Equal", "Less", "Greater", "LessOrEqual", "Or"),
            *("GreaterOrEqual", "Where", "Xor", "Sum", "PRelu"),
        ),
        _broadcast,
    ),
    "ConstantOfShape": _shape(0), "Expand": _expand, "Tile": _tile, "Range": _range, "Gather": _gather, "Pad": _pad,
    "MatMul": _matmul, "Gemm": _matmul, "OneHot": _one_hot, "EyeLike": _inputs,
}  # fmt: skip
"""The operations that are computed when all their operands are constants, and how large their results are."""


def evaluate(node: NodeProto, operands: Arrays, opset: int) -> list[NDArray[Any]]:
    """The results of one node. Raises ValueError when they would be larger than `LARGEST` elements."""
    if EVALUATED[node.op_type](node, operands) > LARGEST:
        raise ValueError(f"makes a constant of more than {LARGEST:,} elements")
    graph = helper.make_graph(
        [node],
        "constant",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in {n: a for n, a in zip(node.input, operands, strict=True) if a is not None}.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output if name],
    )
    opset = max(opset, 19) if node.op_type == "DequantizeLinear" else opset  # onnx evaluates no older one
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    feeds = {n: a for n, a in zip(node.input, operands, strict=True) if a is not None}
    with np.errstate(all="ignore"):
        results = ReferenceEvaluator(model).run(None, feeds)
    return [plain_floats(np.asarray(r)) for r in results]
