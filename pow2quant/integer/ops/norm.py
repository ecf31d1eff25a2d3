"""Layer, group, instance and RMS norm: exact sums, one integer root, one division per row (`pow2quant.functions`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.functions import DEPTH, RECIPROCAL, Norm
from pow2quant.integer.c_text import ctype
from pow2quant.integer.program import Step, storage

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program, Requantization


@dataclass(frozen=True, eq=False)
class NormStep(Step):
    """y = requantize(y'), y' the definition's result in units of 2^-fine."""

    definition: Norm
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        tensor, defined = program.tensors[self.inputs[0]], self.definition
        n, f = defined.length, defined.precision(tensor.encoding)
        rows = ((x.astype(np.int64) - tensor.zero) * defined.multipliers()).reshape(-1, n)
        total = rows.sum(1, keepdims=True) * int(defined.centered)
        spread = n * (rows * rows).sum(1, keepdims=True) - total * total + defined.epsilon(tensor.encoding)
        root = np.floor(np.sqrt((np.maximum(spread, 1) << (2 * f)).astype(np.float64))).astype(np.int64)
        reciprocal = (1 << RECIPROCAL) // root
        down = RECIPROCAL - f - DEPTH
        z = ((n * rows - total) * reciprocal + (1 << (down - 1))) >> down
        gamma, beta = defined.factors()
        half = 1 << defined.drop >> 1
        y = (z.reshape(-1, *tensor.shape) * gamma + beta + half) >> defined.drop
        return self.requantization(y)

    def emit_c(self, layer: Layer) -> str:
        x, defined = layer.input(0), self.definition
        kind = layer.accumulator(self.bound(layer.program), self.requantization)
        gamma, beta = (
            layer.typed_array(what, np.array(v, storage(min(-1, *v), max(v))))
            for what, v in (("gamma", defined.gamma), ("beta", defined.beta))
        )
        shifts = "shifted" * bool(defined.shifts)
        norm = layer.kernel(
            "norm", x=ctype(x), g=gamma.ctype, b=beta.ctype, a=kind, y=ctype(layer.output), shifts=shifts
        )
        f = defined.precision(x.encoding)
        period = math.prod(defined.shape)
        numbers = [x.size // defined.length, defined.length, period, defined.inner, x.zero, int(defined.centered)]
        numbers += [f, RECIPROCAL - f - DEPTH, defined.drop]
        arguments = f"x, y, {', '.join(map(str, numbers))}, {defined.epsilon(x.encoding)}, {gamma.name}, {beta.name}"
        arguments += ", &rule"
        if defined.shifts:
            arguments += f", {layer.typed_array('shifts', np.array(defined.shifts, np.uint8)).name}"
        return f"{layer.rule(self.requantization)}\n{norm}({arguments});"

    def bound(self, program: Program) -> int:
        return (self.definition.magnitude >> self.definition.drop) + 1

    def work(self, program: Program) -> int:
        return 4 * program.tensors[self.output].size


def lower(graph: Lowering, node: onnx.NodeProto, defined: Norm) -> None:
    """A node that bears this definition."""
    (x,), target = graph.defined_inputs(node), graph.declare(node.output[0])
    requantization = graph.requantization(-defined.fine, target)
    graph.steps.append(NormStep(node.name or target.name, (x.name,), target.name, defined, requantization))
