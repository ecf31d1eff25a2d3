"""What writer and reader share: how nodes are named, refused and replaced, and which results stay on a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto

from pow2quant.adapters.files import GRIDS
from pow2quant.errors import FileFormatError, UnsupportedModelError
from pow2quant.operators import OPERATIONS, Kind, Values, operations
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx
    from numpy.typing import NDArray

SELECTING = (*operations(Values.MOVED, Values.SELECTED), "Concat")
"""Operators whose results are values of their first input (of all, for Concat), so that they stay on its grid.

A Clip behind them would be idle, and onnxruntime 1.31 fails to optimize it for signed tensors: it inserts another Q in
front of the Clip, and then turns int8 into uint8 everywhere but in that Q.
"""

BIASED = tuple(op for op, row in OPERATIONS.items() if row.kind is Kind.WEIGHTED)
"""Operators whose third input is a bias."""

INTEGER_OPERATORS = {
    *("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("QGemm", "QAttention", "QEmbedLayerNormalization"),
}
"""Operators on integers, besides those whose name begins with QLinear: the other format of quantized ONNX files."""


def selects(node: NodeProto, read: list[Encoding | None], encoding: Encoding) -> bool:
    """Whether the results of a node that reads these encodings are on the grid of `encoding` by themselves."""
    selected = read if node.op_type == "Concat" else read[:1]
    return node.op_type in SELECTING and all(one == encoding for one in selected)


def plain_encoding(
    scale: NDArray[Any], zero_point: NDArray[Any], grid: IntGrid, axis: int | None, block: int | None = None
) -> Encoding:
    """The encoding that scale and zero point tell by themselves: a single scale is taken for the whole tensor.

    axis: that of the channels, also where the scales are those of blocks.
    """
    if block is not None:
        return Encoding(scale, zero_point, grid, axis, block)
    if scale.size == 1:
        return Encoding(scale.reshape(()), zero_point.reshape(()), grid)
    return Encoding(scale, zero_point, grid, axis)


def is_narrower(grid: IntGrid, storage: IntGrid) -> bool:
    """Whether a grid leaves out integers that its storage has."""
    return bool((grid.qmin != storage.qmin).any() or (grid.qmax != storage.qmax).any())


def ends(encoding: Encoding) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and the largest value of an encoding, as a Clip takes them."""
    return encoding.minimum.astype(np.float32), encoding.maximum.astype(np.float32)


def is_a(node: NodeProto | None, *op_types: str) -> bool:
    """Whether the node is of one of these types, in ONNX's own domain or in onnxruntime's."""
    return node is not None and node.op_type in op_types and node.domain in ("", "ai.onnx", "com.microsoft")


def title(node: NodeProto) -> str:
    """How messages name a node."""
    return f"{node.op_type} {node.name or node.output[0]}"


def refusal(node: NodeProto, problem: str) -> FileFormatError:
    """The error that names a node and what is wrong with it."""
    return FileFormatError(f"node {title(node)} {problem}")


def refuse_control_flow(graph: onnx.GraphProto) -> None:
    """Raises UnsupportedModelError, naming the node, where one contains a graph."""
    for node in graph.node:
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise UnsupportedModelError(f"node {title(node)} contains a graph; control flow cannot be quantized")


def refuse_integer_operators(graph: onnx.GraphProto) -> None:
    """Raises FileFormatError, naming the node, where one computes on integers."""
    for node in graph.node:
        if node.op_type.startswith(("QLinear", "QOrdered")) or node.op_type in INTEGER_OPERATORS:
            raise refusal(
                node,
                "computes on integers: the file is in the QOperator format or dynamically quantized; write it in the "
                "QDQ format instead (onnxruntime: quantize_static with quant_format=QuantFormat.QDQ)",
            )


def set_metadata(model: ModelProto, text: str | None) -> None:
    """Puts the exact grids into the file's metadata, or takes them out."""
    replace(model.metadata_props, [entry for entry in model.metadata_props if entry.key != GRIDS])
    if text is not None:
        model.metadata_props.add(key=GRIDS, value=text)


def replace(repeated: Any, items: Iterable[Any]) -> None:
    """Replaces the items of a protobuf list."""
    items = list(items)
    del repeated[:]
    repeated.extend(items)
