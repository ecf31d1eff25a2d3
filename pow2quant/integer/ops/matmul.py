"""MatMul, of two activations or of an activation and a constant matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.c_text import ctype
from pow2quant.integer.nodes import title
from pow2quant.integer.ops.dense import lower_matrix
from pow2quant.integer.program import Step

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program, Requantization


@dataclass(frozen=True, eq=False)
class MatMul(Step):
    """y = requantize((a - zero_a) @ (b - zero_b)): (…, T, K) @ (…, K, M) -> (…, T, M), equal in front."""

    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        kind = program.kinds[self]
        a, b = (
            x.astype(kind) - kind.type(program.tensors[name].zero) for x, name in zip(inputs, self.inputs, strict=True)
        )
        return self.requantization(a @ b)

    def emit_c(self, layer: Layer) -> str:
        a, b = layer.input(0), layer.input(1)
        kind = layer.accumulator(self.bound(layer.program), self.requantization)
        matmul = layer.kernel("matmul", x=ctype(a), w=ctype(b), a=kind, y=ctype(layer.output))
        rows, length = a.shape[-2:]
        sizes = f"{math.prod(a.shape[:-2])}, {rows}, {length}, {b.shape[-1]}, {a.zero}, {b.zero}"
        operands = f"{layer.operand(0)}, {layer.operand(1)}"
        return f"{layer.rule(self.requantization)}\n{matmul}({operands}, y, {sizes}, &rule);"

    def bound(self, program: Program) -> int:
        a, b = (program.tensors[name] for name in self.inputs)
        return a.shape[-1] * a.magnitude * b.magnitude

    def work(self, program: Program) -> int:
        return program.tensors[self.output].size * program.tensors[self.inputs[0]].shape[-1]


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """MatMul. Raises UnsupportedModelError where shapes broadcast, but for one constant matrix in front of another."""
    if node.input[1] in graph.floats:
        lower_matrix(graph, node, output, low, high, transposed=False)
        return
    a, b = (graph.operand(name, rows=True) for name in node.input)
    in_front = a.constant is not None and len(a.shape) == 2 and math.prod(b.shape[:-2]) == 1
    if not in_front and (len(a.shape) < 2 or a.shape[:-2] != b.shape[:-2]):
        raise UnsupportedModelError(f"{title(node)}: {a.shape} @ {b.shape} broadcasts; equal leading dimensions do not")
    requantization = graph.requantization(a.exponent + b.exponent, graph.declare(output), low, high)
    graph.steps.append(MatMul(node.name or output, (a.name, b.name), output, requantization))
