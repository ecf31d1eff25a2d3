"""Mul of two tensors, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pow2quant.integer.program import Step, on_one_scale

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program, Requantization


@dataclass(frozen=True, eq=False)
class Product(Step):
    """y = requantize((a - zero_a) * (b - zero_b))."""

    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        a, b = on_one_scale(program, self, inputs, (0, 0))
        return self.requantization(a * b)

    def emit_c(self, layer: Layer) -> str:

        def term(kind: str, *places: str) -> str:
            return " * ".join(layer.value(n, kind, place) for n, place in enumerate(places))

        return layer.elementwise(layer.broadcast(), term, self.requantization, self.bound(layer.program))

    def bound(self, program: Program) -> int:
        a, b = (program.tensors[name].magnitude for name in self.inputs)
        return a * b


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Mul of activations, or with an encoded constant."""
    a, b = (graph.operand(name, rows=True) for name in node.input)
    requantization = graph.requantization(a.exponent + b.exponent, graph.declare(output), low, high)
    graph.steps.append(Product(node.name or output, (a.name, b.name), output, requantization))
