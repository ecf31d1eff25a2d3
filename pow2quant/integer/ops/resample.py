"""Resampling along dimensions (bilinear, bicubic, …): exact sums by integer weights, and one division that rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.functions import resampling
from pow2quant.integer.c_text import ctype, indented
from pow2quant.integer.nodes import title, without_integers
from pow2quant.integer.program import Step
from pow2quant.pow2_constraints.arithmetic import mean_round, saturate

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Ints, Program, Requantization


@dataclass(frozen=True, eq=False)
class Resample(Step):
    """y = round(sum of w (x - zero) / (divisor * 2^shift)) + zero, clipped; w: the product of a weight for each axis.

    axes: of a sample, whose sizes change or not. Along each of them result i reads the values from first[i] on, by
    weights[i]. A negative shift multiplies the sum.
    """

    axes: tuple[int, ...]
    first: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[tuple[int, ...], ...], ...]
    divisor: int
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        kind = program.kinds[self]
        sums = x.astype(kind) - kind.type(program.tensors[self.inputs[0]].zero)
        for axis, first, weights in zip(self.axes, self.first, self.weights, strict=True):
            places = np.array(first)[:, None] + np.arange(len(weights[0]))
            matrix = np.zeros((len(first), sums.shape[axis + 1]), kind)
            np.put_along_axis(matrix, places, np.array(weights, kind), 1)
            sums = np.moveaxis(np.tensordot(sums, matrix, ([axis + 1], [1])), -1, axis + 1)
        rule = self.requantization
        quotient = mean_round(sums.astype(np.int64), self.divisor, int(rule.shift), rule.rounding)
        return saturate(quotient + rule.zero, rule.low, rule.high)

    @property
    def up(self) -> int:
        """The numerator's shift to the left."""
        return max(0, -int(self.requantization.shift))

    def emit_c(self, layer: Layer) -> str:
        x, rule = layer.input(0), self.requantization
        a = layer.accumulator(self.bound(layer.program), replace(rule, shift=np.array(0)))  # the divisor has the shift
        divided = layer.kernel("divide_round", a=a)
        places = [f"i{axis}" for axis in range(len(x.shape))]
        factors, inner, sizes = [], [], list(x.shape)  # of the result, but for dimensions of one value
        for axis, first, weights in zip(self.axes, self.first, self.weights, strict=True):
            starts = layer.array(f"first{axis}", np.array(first)).name
            values = layer.array(f"weights{axis}", np.array(weights)).name
            count = len(weights[0])
            inner.append(f"for (int32_t k{axis} = 0; k{axis} < {count}; k{axis}++)")
            factors.append(f"({a}){values}[i{axis} * {count} + k{axis}]")
            places[axis], sizes[axis] = f"({starts}[i{axis}] + k{axis})", len(first)
        place = reduce(
            lambda outer, own: f"({outer}) * {own[1]} + {own[0]}", zip(places[1:], x.shape[1:], strict=True), places[0]
        )
        divisor = self.divisor << max(0, int(rule.shift))
        body = [
            f"{a} sum = 0;",
            *inner,
            f"    sum += {' * '.join(factors)} * {layer.value(0, a, place)};",
            f"sum = {divided}(sum * {1 << self.up}, {divisor}) + {rule.zero};",
            f"*y++ = ({ctype(layer.output)})(sum < {rule.low} ? {rule.low} : sum > {rule.high} ? {rule.high} : sum);",
        ]
        for axis, size in reversed(list(enumerate(sizes))):
            body = [f"for (int32_t i{axis} = 0; i{axis} < {size}; i{axis}++) {{", *indented(body), "}"]
        return "\n".join(body)

    def bound(self, program: Program) -> int:
        gain = math.prod(max(sum(map(abs, row)) for row in rows) for rows in self.weights)
        numerator = gain * program.tensors[self.inputs[0]].magnitude << self.up
        return max(numerator, self.divisor << max(0, int(self.requantization.shift)))

    def work(self, program: Program) -> int:
        return program.tensors[self.output].size * math.prod(len(rows[0]) for rows in self.weights)


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Div of weighted sums, see `functions.resampling`. Raises UnsupportedModelError for another."""
    found = resampling(graph.index, graph.encodings, node)
    if found is None or graph.rounding == "gemmlowp":
        raise UnsupportedModelError(without_integers(node, graph.encodings, graph.floats))
    x, target = graph.read(found.source), graph.declare(output)
    sizes, axes = list(x.shape), []
    for matrix, inner in found.maps:
        fitting = (d for d, n in enumerate(sizes) if n == matrix.shape[1] and math.prod(sizes[d + 1 :]) == inner)
        axis = next(fitting, None)
        if axis is None or axis in axes:
            raise UnsupportedModelError(
                f"{title(node)}: sums along joined dimensions, or twice along one, have no integers"
            )
        axes.append(axis)
        sizes[axis] = len(matrix)
    if math.prod(sizes) != target.size:
        raise UnsupportedModelError(f"{title(node)}: its sums are not of one sample")
    taps = [_taps(matrix) for matrix, _ in found.maps]
    firsts, weights = zip(*taps, strict=True)
    rule = graph.requantization(x.exponent, target, low, high)
    step = Resample(node.name or output, (x.name,), output, tuple(axes), firsts, weights, found.divisor, rule)
    graph.steps.append(step)


def _taps(matrix: Ints) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """A matrix (results, values) as the first value that each result reads, and as many weights for every result."""
    used = [np.flatnonzero(row) if row.any() else np.zeros(1, np.int64) for row in matrix]
    count = max(int(places[-1] - places[0]) + 1 for places in used)
    first = [min(int(places[0]), matrix.shape[1] - count) for places in used]
    rows = (tuple(int(v) for v in row[start : start + count]) for row, start in zip(matrix, first, strict=True))
    return tuple(first), tuple(rows)
