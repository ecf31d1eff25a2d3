"""LogSoftmax: the largest code, a table of exponentials, and where their sum stands among bounds (`functions`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.functions import LogSoftmax
from pow2quant.integer.c_text import ctype
from pow2quant.integer.program import Step, storage

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Ints, Program, Requantization


@dataclass(frozen=True, eq=False)
class LogSoftmaxStep(Step):
    """y = requantize(-(d 2^shift + L)): d = largest code - x along `axis` (from the end), L = how many bounds are <= S.

    exponentials: E for d = 0, 1, …, and 0 for all that follow; S = sum E.
    """

    axis: int
    shift: int
    exponentials: Ints
    bounds: Ints
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        codes = inputs[0].astype(np.int64).reshape(-1, *program.tensors[self.inputs[0]].shape)
        apart = codes.max(self.axis, keepdims=True) - codes
        total = self.exponentials[np.minimum(apart, len(self.exponentials) - 1)].sum(self.axis, keepdims=True)
        return self.requantization(-((apart << self.shift) + np.searchsorted(self.bounds, total, side="right")))

    def emit_c(self, layer: Layer) -> str:
        x = layer.input(0)
        entries = layer.typed_array("exponentials", self.exponentials.astype(storage(0, int(self.exponentials.max()))))
        bounds = layer.typed_array("bounds", np.append(self.bounds, 1 << 30).astype(np.int32))
        length = x.shape[self.axis]
        inner = math.prod(x.shape[self.axis + 1 :]) if self.axis < -1 else 1
        kind = layer.accumulator(self.bound(layer.program), self.requantization)
        kernel = layer.kernel("log_softmax", x=ctype(x), t=entries.ctype, a=kind, y=ctype(layer.output))
        numbers = (x.size // length // inner, length, inner, len(self.exponentials) - 1, len(self.bounds), self.shift)
        arguments = f"{layer.operand(0)}, y, {', '.join(map(str, numbers))}, {entries.name}, {bounds.name}, &rule"
        return f"{layer.rule(self.requantization)}\n{kernel}({arguments});"

    def bound(self, program: Program) -> int:
        x = program.tensors[self.inputs[0]]
        sums = x.shape[self.axis] * int(self.exponentials.max())
        return max(((x.high - x.low) << self.shift) + len(self.bounds), sums)

    def work(self, program: Program) -> int:
        return 3 * program.tensors[self.output].size


def lower(graph: Lowering, node: onnx.NodeProto, defined: LogSoftmax) -> None:
    """A node that bears this definition."""
    (x,), target = graph.defined_inputs(node), graph.declare(node.output[0])
    step = LogSoftmaxStep(
        node.name or target.name,
        (x.name,),
        target.name,
        defined.axis,
        x.exponent + defined.fine,
        defined.table(x.encoding),
        defined.bounds(),
        graph.requantization(-defined.fine, target),
    )
    graph.steps.append(step)
