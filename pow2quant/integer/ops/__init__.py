"""Every operation in integers: how it is lowered from ONNX, how the engine runs it, and how it is written as C.

A new operation is one file with a `Step` and a `lower` function, and a row of `LOWER`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pow2quant.functions import Definition, LogSoftmax, Lookup, Norm, Softmax
from pow2quant.integer.ops import (
    argmax,
    average,
    choice,
    convolution,
    copy,
    dense,
    extreme,
    log_softmax,
    matmul,
    maximum,
    norm,
    product,
    quotient,
    softmax,
    sum,
    table,
    view,
)

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.lowering import Lowering

Lower = Callable[["Lowering", "onnx.NodeProto", str, float, float], None]
"""(graph, node, name of the encoded result, real ends of fused ReLUs and clips) -> None; adds steps to the graph.

The name is the node's own result, or that of the ReLU or clip that is fused with it.
"""

LOWER: dict[str, Lower] = {
    "Add": sum.lower,
    "ArgMax": argmax.lower,
    "AveragePool": average.lower_pool,
    "Concat": copy.lower_concat,
    "Conv": convolution.lower,
    "ConvTranspose": convolution.lower_transposed,
    "DepthToSpace": copy.lower_depth_to_space,
    "Div": quotient.lower,
    "Dropout": view.lower,
    "Expand": copy.lower_expand,
    "Flatten": view.lower,
    "Gather": copy.lower_gather,
    "Gemm": dense.lower_gemm,
    "GlobalAveragePool": average.lower_mean,
    "GlobalMaxPool": maximum.lower,
    "Identity": view.lower,
    "MatMul": matmul.lower,
    "Max": extreme.lower,
    "MaxPool": maximum.lower,
    "Min": extreme.lower,
    "Mul": product.lower,
    "Pad": copy.lower_pad,
    "ReduceMax": maximum.lower,
    "ReduceMean": average.lower_mean,
    "ReduceSum": average.lower_mean,
    "Reshape": view.lower,
    "Resize": copy.lower_resize,
    "Slice": copy.lower_slice,
    "Split": copy.lower_split,
    "Squeeze": view.lower,
    "Sub": sum.lower,
    "Transpose": copy.lower_transpose,
    "Unsqueeze": view.lower,
    "Where": choice.lower,
}

LOWER_DEFINED: dict[type[Definition], Callable[[Lowering, onnx.NodeProto, Any], None]] = {
    Softmax: softmax.lower,
    LogSoftmax: log_softmax.lower,
    Norm: norm.lower,
    Lookup: table.lower_defined,
}
"""What lowers a node that bears an integer definition."""
