"""Add and Sub: two tensors brought to the finer of their scales, and one rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.nodes import title
from pow2quant.integer.program import Step, on_one_scale
from pow2quant.operators import Values, values
from pow2quant.pow2_constraints import Encoding, IntGrid, power_of_two

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program, Requantization, Tensor

LARGEST_SHIFT = 40
"""Codes of 16 bits, this far apart, still add up within 64 bits."""


@dataclass(frozen=True, eq=False)
class Sum(Step):
    """y = requantize((a - zero_a) * 2^shift_a +- (b - zero_b) * 2^shift_b), one of the shifts zero."""

    shifts: tuple[int, int]
    subtracts: bool
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        a, b = on_one_scale(program, self, inputs, self.shifts)
        return self.requantization(a - b if self.subtracts else a + b)

    def emit_c(self, layer: Layer) -> str:
        sign = "-" if self.subtracts else "+"

        def term(kind: str, *places: str) -> str:
            operands = [layer.value(n, kind, place) for n, place in enumerate(places)]
            factors = [f" * {1 << shift}" if shift else "" for shift in self.shifts]
            return f" {sign} ".join(value + factor for value, factor in zip(operands, factors, strict=True))

        return layer.elementwise(layer.broadcast(), term, self.requantization, self.bound(layer.program))

    def bound(self, program: Program) -> int:
        (a, b), (i, j) = (program.tensors[name].ends for name in self.inputs), self.shifts
        low, high = (-b[1], -b[0]) if self.subtracts else b
        return max((a[1] << i) + (high << j), -(a[0] << i) - (low << j))


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Add or Sub. Raises UnsupportedModelError where the scales are further apart than 64 bits can hold."""
    a, b = (_summand(graph, name) for name in node.input)
    exponent, shifts = aligned(node, a, b)
    requantization = graph.requantization(exponent, graph.declare(output), low, high)
    names = (a.name, b.name)
    graph.steps.append(Sum(node.name or output, names, output, shifts, node.op_type == "Sub", requantization))


def _summand(graph: Lowering, name: str) -> Tensor:
    """An operand. A layer's result that is not rounded is read as it was accumulated.

    It counts in the unit of its finest channel then. Raises UnsupportedModelError where that needs more than 32 bits.
    """
    producer = graph.producers.get(name)
    if name in graph.tensors or producer is None or values(producer.op_type) is not Values.SUMS_OF_PRODUCTS:
        return graph.operand(name, rows=True)
    x, weight = graph.tensors.get(producer.input[0]), graph.encodings.get(producer.input[1])
    if x is None or weight is None or not weight.is_power_of_two:
        return graph.operand(name, rows=True)
    unit, zero = power_of_two(x.exponent + weight.exponent.min()), np.zeros((), np.int64)
    graph.encodings[name] = Encoding(unit, zero, IntGrid(32, signed=True))
    graph.lower(producer, name)
    step: Any = graph.steps[-1]
    largest = step.bound(graph) << max(0, -int(step.requantization.shift.min()))
    bits = largest.bit_length() + 1
    if bits > 32:
        raise UnsupportedModelError(f"{title(producer)}: its sums need {bits} bits in front of another sum; at most 32")
    encoding = graph.encodings[name] = Encoding(unit, zero, IntGrid(max(bits, 2), signed=True))
    graph.tensors[name] = replace(graph.tensors[name], encoding=encoding)
    return graph.tensors[name]


def aligned(node: onnx.NodeProto, a: Tensor, b: Tensor) -> tuple[int, tuple[int, int]]:
    """The finer exponent of two operands, and the shifts that bring both to it. Raises UnsupportedModelError."""
    exponent = min(a.exponent, b.exponent)
    shifts = (a.exponent - exponent, b.exponent - exponent)
    if max(shifts) > LARGEST_SHIFT:
        raise UnsupportedModelError(f"{title(node)}: scales 2^{max(shifts)} apart; at most 2^{LARGEST_SHIFT}")
    return exponent, shifts
