"""Mul of two tensors, element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.integer.program import broadcast

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program, Requantization


@dataclass(frozen=True, eq=False)
class Product:
    """y = requantize((a - zero_a) * (b - zero_b))."""

    node: str
    inputs: tuple[str, str]
    output: str
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        """See `Step.run`."""
        result = program.tensors[self.output]
        a, b = (
            x.astype(np.int64) - program.tensors[name].zero
            for x, name in zip(broadcast(program, self.inputs, inputs), self.inputs, strict=True)
        )
        return self.requantization(a * b).astype(result.dtype)

    def emit_c(self, layer: Layer) -> str:
        """See `Step.emit_c`."""

        def term(kind: str, *places: str) -> str:
            return " * ".join(layer.value(n, kind, place) for n, place in enumerate(places))

        return layer.elementwise(layer.broadcast(), term, self.requantization, self.bound(layer.program))

    def bound(self, program: Program) -> int:
        """See `Step.bound`."""
        a, b = (program.tensors[name].magnitude for name in self.inputs)
        return a * b

    def work(self, program: Program) -> int:
        """See `Step.work`."""
        return program.tensors[self.output].size


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Mul of activations, or with an encoded constant."""
    a, b = (graph.operand(name, rows=True) for name in node.input)
    requantization = graph.requantization(np.array(a.exponent + b.exponent), graph.declare(output), low, high)
    graph.steps.append(Product(node.name or output, (a.name, b.name), output, requantization))
