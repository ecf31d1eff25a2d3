"""Gather with computed indices: rows of a stored matrix, as an embedding takes them by its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.nodes import attribute, title
from pow2quant.integer.program import Step

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program


@dataclass(frozen=True, eq=False)
class Embedding(Step):
    """y[…] = table[x[…]]; table: (rows, C), codes of the result. x: indices, one of which is no row's is clipped."""

    table: Codes

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        return self.table[np.clip(x.astype(np.int64), 0, len(self.table) - 1)]

    def emit_c(self, layer: Layer) -> str:
        x, result = layer.input(0), layer.output
        table = layer.typed_array("table", self.table.astype(result.dtype))
        rows, width = self.table.shape
        return (
            f"for (int32_t i = 0; i < {x.size}; i++) {{\n    const int32_t row = x[i] < {rows} ? x[i] : {rows - 1};\n"
            f"    memcpy(y + i * {width}, {table.name} + row * {width}, {width} * sizeof *y);\n}}"
        )

    def bound(self, program: Program) -> int:
        return int(np.abs(self.table).max())


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Gather along the first dimension of an encoded constant. Raises UnsupportedModelError for another."""
    matrix = graph.operand(node.input[0])
    if matrix.constant is None or matrix.constant.ndim < 2 or attribute(node, "axis", 0) != 0:
        raise UnsupportedModelError(f"{title(node)}: only rows of a constant are taken by computed indices")
    x, target = graph.read(node.input[1], rows=True), graph.declare(output)
    requantization = graph.requantization(matrix.exponent, target, low, high)
    table = requantization(matrix.constant - matrix.zero).reshape(len(matrix.constant), -1)
    graph.steps.append(Embedding(node.name or output, (x.name,), output, table))
