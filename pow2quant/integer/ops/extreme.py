"""Max and Min of two tensors: brought to the finer of their scales, compared, and rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.nodes import title
from pow2quant.integer.ops.sum import aligned
from pow2quant.integer.program import Step, on_one_scale

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program, Requantization


@dataclass(frozen=True, eq=False)
class Extreme(Step):
    """y = requantize(the larger, or the smaller, of (a - zero_a) * 2^shift_a and (b - zero_b) * 2^shift_b)."""

    shifts: tuple[int, int]
    largest: bool
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        a, b = on_one_scale(program, self, inputs, self.shifts)
        return self.requantization(np.maximum(a, b) if self.largest else np.minimum(a, b))

    def emit_c(self, layer: Layer) -> str:

        def term(kind: str, *places: str) -> str:
            values = [layer.value(n, kind, place) for n, place in enumerate(places)]
            a, b = (f"{v} * {1 << s}" if s else v for v, s in zip(values, self.shifts, strict=True))
            return f"{a} {'>' if self.largest else '<'} {b} ? {a} : {b}"

        return layer.elementwise(layer.broadcast(), term, self.requantization, self.bound(layer.program))

    def bound(self, program: Program) -> int:
        return max(program.tensors[n].magnitude << s for n, s in zip(self.inputs, self.shifts, strict=True))


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Max or Min of two tensors."""
    if len(node.input) != 2:
        raise UnsupportedModelError(f"{title(node)}: {len(node.input)} operands; two have integers")
    a, b = (graph.operand(name, rows=True) for name in node.input)
    exponent, shifts = aligned(node, a, b)
    rule = graph.requantization(exponent, graph.declare(output), low, high)
    graph.steps.append(Extreme(node.name or output, (a.name, b.name), output, shifts, node.op_type == "Max", rule))
