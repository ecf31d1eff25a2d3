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
    """y = requantize((a - zero_a) @ (b - zero_b)): (…, T, K) @ (…, K, M) -> (…, T, M); what is in front broadcasts."""

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
        full = layer.output.shape[:-2]
        sizes = f"{math.prod(full)}, {rows}, {length}, {b.shape[-1]}, {a.zero}, {b.zero}"
        for operand in (a, b):
            period, inner = _repeated(operand.shape[:-2], full) or (1, 1)  # `lower` has refused what has none
            sizes += f", {period}, {inner}"
        operands = f"{layer.operand(0)}, {layer.operand(1)}"
        return f"{layer.rule(self.requantization)}\n{matmul}({operands}, y, {sizes}, &rule);"

    def bound(self, program: Program) -> int:
        a, b = (program.tensors[name] for name in self.inputs)
        return a.shape[-1] * a.magnitude * b.magnitude

    def work(self, program: Program) -> int:
        return program.tensors[self.output].size * program.tensors[self.inputs[0]].shape[-1]


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """MatMul. Raises UnsupportedModelError where dimensions in front broadcast in more than one place."""
    if node.input[1] in graph.floats and graph.floats[node.input[1]].ndim <= 2:
        lower_matrix(graph, node, output, low, high, transposed=False)
        return
    a, b = (graph.operand(name, rows=True) for name in node.input)
    target = graph.declare(output)
    if len(a.shape) < 2 or any(_repeated(operand.shape[:-2], target.shape[:-2]) is None for operand in (a, b)):
        shapes = f"{a.shape} @ {b.shape}"
        raise UnsupportedModelError(f"{title(node)}: {shapes}: dimensions in front broadcast in more than one place")
    requantization = graph.requantization(a.exponent + b.exponent, target, low, high)
    graph.steps.append(MatMul(node.name or output, (a.name, b.name), output, requantization))


def _repeated(own: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, int] | None:
    """(period, inner): which matrix of an operand product o reads, o // period * inner + o % inner of them all.

    own, full: what is in front of the matrices, of the operand and of the result. None where several runs of dimensions
    are repeated.
    """
    while len(own) > len(full) and own[0] == 1:
        own = own[1:]
    if len(own) > len(full):
        return None
    padded = (1,) * (len(full) - len(own)) + own
    repeated = [i for i, (n, m) in enumerate(zip(padded, full, strict=True)) if n != m]
    if not repeated:
        return 1, 1
    first, last = repeated[0], repeated[-1] + 1
    if any(n > 1 for n in padded[first:last]):
        return None
    inner = math.prod(full[last:])
    return math.prod(full[first:last]) * inner, inner
