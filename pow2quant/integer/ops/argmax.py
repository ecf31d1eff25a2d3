"""ArgMax: where the largest code stands, which is where the largest value does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.c_text import ctype
from pow2quant.integer.nodes import attribute, title
from pow2quant.integer.program import Step, storage
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program


@dataclass(frozen=True, eq=False)
class ArgMax(Step):
    """y = the index of the largest code along `axis`, the first of equal ones. axis: counted from the end."""

    axis: int

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        return np.asarray(np.argmax(x, self.axis))

    def emit_c(self, layer: Layer) -> str:
        x = layer.input(0)
        axis = len(x.shape) + self.axis
        outer, count, inner = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
        return (
            f"for (int32_t o = 0; o < {outer}; o++)\n    for (int32_t i = 0; i < {inner}; i++) {{\n"
            f"        const {ctype(x)} *values = x + o * {count * inner} + i;\n        int32_t best = 0;\n"
            f"        for (int32_t k = 1; k < {count}; k++)\n"
            f"            if (values[k * {inner}] > values[best * {inner}])\n                best = k;\n"
            f"        y[o * {inner} + i] = ({ctype(layer.output)})best;\n    }}"
        )

    def work(self, program: Program) -> int:
        return program.tensors[self.inputs[0]].size


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """ArgMax; its result has a scale of 1, in the narrowest type that holds every index."""
    if attribute(node, "select_last_index", 0):
        raise UnsupportedModelError(f"{title(node)}: only the first of equal values has integers")
    x, shape = graph.read(node.input[0], rows=True), graph.shape(node.input[0])
    axis = int(attribute(node, "axis", 0)) % len(shape) - len(shape)
    bits = 8 * storage(0, shape[axis] - 1).itemsize
    graph.encodings[output] = Encoding(np.ones((), np.float32), np.zeros((), np.int64), IntGrid(bits, signed=False))
    graph.declare(output)
    graph.steps.append(ArgMax(node.name or output, (x.name,), output, axis))
