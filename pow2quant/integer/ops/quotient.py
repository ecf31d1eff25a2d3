"""Div of two tensors, element by element: one exact quotient of integers that rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.functions import farthest, quotient, resampling, rounds_alike
from pow2quant.integer.nodes import title, without_integers
from pow2quant.integer.ops import resample
from pow2quant.integer.program import Step, on_one_scale
from pow2quant.pow2_constraints.arithmetic import divide_round

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program, Requantization

BEYOND = 1 << 18
"""What is divided by zero: further from zero than any code."""


@dataclass(frozen=True, eq=False)
class Quotient(Step):
    """y = requantize(round((a - zero_a) 2^up / ((b - zero_b) 2^down))); 0 / 0 is 0, anything else / 0 saturates.

    shifts: up and down, of which one is 0. requantization: without a shift.
    """

    shifts: tuple[int, int]
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        a, b = (x.astype(np.int64) for x in on_one_scale(program, self, inputs, self.shifts))
        whole = divide_round(np.where(b < 0, -a, a), np.maximum(np.abs(b), 1), self.requantization.rounding)
        return self.requantization(np.where(b == 0, np.sign(a) * BEYOND, whole))

    def emit_c(self, layer: Layer) -> str:
        bound = self.bound(layer.program)
        divided = layer.kernel("quotient", a=layer.accumulator(bound, self.requantization))

        def term(kind: str, *places: str) -> str:
            values = (layer.value(n, kind, place) for n, place in enumerate(places))
            a, b = (f"{v} * {1 << s}" if s else v for v, s in zip(values, self.shifts, strict=True))
            return f"{divided}({a}, {b}, {BEYOND})"

        return layer.elementwise(layer.broadcast(), term, self.requantization, bound)

    def bound(self, program: Program) -> int:
        sizes = (program.tensors[n].magnitude << s for n, s in zip(self.inputs, self.shifts, strict=True))
        return max(BEYOND, *sizes)


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Div of weighted sums by a number, or of two encoded tensors. Raises UnsupportedModelError for another."""
    if resampling(graph.index, graph.encodings, node) is not None:
        resample.lower(graph, node, output, low, high)
        return
    found = quotient(graph.index, graph.encodings, node)
    if found is None or graph.rounding == "gemmlowp":
        raise UnsupportedModelError(without_integers(node, graph.encodings, graph.floats))
    a, b = (graph.operand(name, rows=True) for name in (found.numerator, found.denominator))
    target = graph.declare(output)
    rule = graph.requantization(a.exponent - b.exponent, target, low, high)
    shift = int(rule.shift)
    reach = math.ldexp(float(a.magnitude), -shift)
    if not rounds_alike(b.magnitude, shift, min(farthest(target.encoding), reach)):
        width = target.encoding.grid.width
        raise UnsupportedModelError(
            f"{title(node)}: quotients by up to {b.magnitude} on {width} bits are finer than ONNX's float32"
        )
    step = Quotient(
        node.name or output, (a.name, b.name), output, (max(0, -shift), max(0, shift)), replace(rule, shift=np.array(0))
    )
    graph.steps.append(step)
