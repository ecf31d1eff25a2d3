"""Where: one of two tensors or numbers, element by element, on one scale, and rounded once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.nodes import title
from pow2quant.integer.ops.sum import aligned
from pow2quant.integer.ops.table import values_by_code
from pow2quant.integer.program import Step, Tensor, on_one_scale
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program, Requantization

TRUTH = Encoding(np.ones((), np.float32), np.zeros((), np.int64), IntGrid(8, signed=False))
"""Of constant truth values: codes 0 and 1."""


@dataclass(frozen=True, eq=False)
class Choice(Step):
    """y = requantize((a - zero_a) * 2^shift_a where condition - zero > limit, else (b - zero_b) * 2^shift_b).

    The inputs are condition, a and b. shifts: of all three, 0 for the condition.
    """

    limit: int
    shifts: tuple[int, int, int]
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        condition, a, b = on_one_scale(program, self, inputs, self.shifts)
        return self.requantization(np.where(condition > self.limit, a, b))

    def emit_c(self, layer: Layer) -> str:

        def term(kind: str, *places: str) -> str:
            values = [layer.value(n, kind, place) for n, place in enumerate(places)]
            condition, a, b = (f"{v} * {1 << s}" if s else v for v, s in zip(values, self.shifts, strict=True))
            return f"{condition} > {self.limit} ? {a} : {b}"

        return layer.elementwise(layer.broadcast(), term, self.requantization, self.bound(layer.program))

    def bound(self, program: Program) -> int:
        return max(program.tensors[n].magnitude << s for n, s in zip(self.inputs, self.shifts, strict=True))


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Where, of a constant condition or of one that a single encoded tensor decides."""
    target = graph.declare(output)
    condition, limit = _condition(graph, node)
    a, b = (_operand(graph, name, target, low, high) for name in node.input[1:])
    exponent, shifts = aligned(node, a, b)
    rule = graph.requantization(exponent, target, low, high)
    names = (condition.name, a.name, b.name)
    graph.steps.append(Choice(node.name or output, names, output, limit, (0, *shifts), rule))


def _operand(graph: Lowering, name: str, target: Tensor, low: float, high: float) -> Tensor:
    """A tensor; a number without encoding is what it is rounded to in the result."""
    if name in graph.encodings or name not in graph.floats or graph.floats[name].size > 1:
        return graph.operand(name, rows=True)
    number = np.clip(np.nan_to_num(graph.floats[name].reshape(()), nan=np.nan), low, high)
    code = target.encoding.quantize(number, name, rounding=graph.rounding)
    found = graph.tensors[f"{target.name}.{name}"] = Tensor(f"{target.name}.{name}", (), target.encoding, code)
    return found


def _condition(graph: Lowering, node: onnx.NodeProto) -> tuple[Tensor, int]:
    """The tensor that decides, and the largest value that is false, in units of its scale.

    Raises UnsupportedModelError for a condition that is not one bound of a single tensor.
    """
    name = node.input[0]
    if name in graph.floats:
        tensor = graph.declare(name, graph.floats[name].shape, TRUTH)
        graph.tensors[name] = replace(tensor, constant=graph.floats[name].astype(np.int64))
    if name in graph.tensors:
        return graph.read(name, rows=True), 0
    tensor, truths = values_by_code(graph, graph.producers[name])
    if truths.ndim > 1 or (np.diff(truths.astype(np.int64)) < 0).any():
        raise UnsupportedModelError(f"{title(node)}: its condition is not one lower bound of {tensor.name}")
    return tensor, tensor.low - tensor.zero + int((~truths.astype(bool)).sum()) - 1
