"""AveragePool, GlobalAveragePool, ReduceMean, ReduceSum: an exact sum, and one division that rounds half to even."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.c_text import ctype
from pow2quant.integer.nodes import Axis, Window, attribute, axes_of, reduced_axes, title
from pow2quant.integer.ops import volume
from pow2quant.integer.ops.copy import Copy, Part
from pow2quant.integer.program import Step
from pow2quant.pow2_constraints.arithmetic import mean_round, saturate

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Ints, Program, Requantization


@dataclass(frozen=True, eq=False)
class Average(Step):
    """y = round(sum over a window of (x - zero) / (count * 2^shift)) + zero, clipped.

    counts: by how many values each result is divided, () or (result height, result width). The shift is that of the
    requantization; a negative one multiplies the sum.
    """

    window: Window
    counts: Ints
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        maps = x.reshape(len(x), -1, *self.window.size).astype(np.int64) - program.tensors[self.inputs[0]].zero
        sums = self.window.patches(maps, 0).sum((-2, -1))
        rule = self.requantization
        quotient = mean_round(sums, self.counts, int(rule.shift), rule.rounding)
        return saturate(quotient + rule.zero, rule.low, rule.high)

    @property
    def up(self) -> int:
        """The numerator's shift to the left."""
        return max(0, -int(self.requantization.shift))

    @property
    def down(self) -> int:
        """The divisor's shift to the left."""
        return max(0, int(self.requantization.shift))

    def emit_c(self, layer: Layer) -> str:
        rule = self.requantization
        if rule.rounding == "gemmlowp":
            return self._emit_multiplied(layer)
        divided = replace(rule, shift=np.array(0))  # the counts' part
        a = layer.accumulator(self.bound(layer.program), divided)
        counts = np.left_shift(self.counts, self.down).reshape(-1).astype(a.removesuffix("_t"))
        return self._emit(layer, a, counts, 1 << self.up)

    def _emit_multiplied(self, layer: Layer) -> str:
        """The body that multiplies with 31 bits of 1 / count, see `arithmetic.mean_round`."""
        layer.sums = "int64_t"
        log = int(self.counts.max()).bit_length() - 1
        factors = (2**30 << np.frexp(self.counts.astype(np.float64))[1].astype(np.int64) - 1) // self.counts
        if len(np.unique(self.counts)) > 1:
            raise self.refused("a divisor that depends on the place, with rounding gemmlowp")
        return self._emit(layer, "int64_t", factors.reshape(-1), int(self.requantization.shift) - 1 + log)

    def _emit(self, layer: Layer, a: str, counts: Ints, up: int) -> str:
        x, rule = layer.input(0), self.requantization
        average = layer.kernel("average", x=ctype(x), a=a, y=ctype(layer.output))
        places = f"{layer.typed_array('counts', counts).name}, {int(self.counts.ndim > 0)}"
        numbers = f"{x.zero}, {places}, {up}, {rule.zero}, {rule.low}, {rule.high}"
        window = layer.window(self.window, x.size // math.prod(self.window.size))
        return f"{window}\n{average}(x, y, &window, {numbers});"

    def bound(self, program: Program) -> int:
        numerator = math.prod(self.window.kernel) * program.tensors[self.inputs[0]].magnitude << self.up
        return max(numerator, int(self.counts.max()) << self.down)

    def work(self, program: Program) -> int:
        return program.tensors[self.output].size * math.prod(self.window.kernel)


def lower_pool(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """AveragePool. Raises UnsupportedModelError where executors disagree about the divisor."""
    x, target = graph.read(node.input[0]), graph.declare(output)
    axes = axes_of(node, attribute(node, "kernel_shape", []), x.shape[1:], target.shape[1:])
    source, window = volume.window(graph, node.name or output, x, axes, x.zero)
    counts_padding = int(attribute(node, "count_include_pad", 0))
    if counts_padding and attribute(node, "ceil_mode", 0):
        raise UnsupportedModelError(f"{title(node)}: ceil_mode with count_include_pad has no agreed divisor")
    counts = reduce(np.multiply.outer, [axis.seen(bool(counts_padding)) for axis in axes]).reshape(window.result)
    if (counts == counts.flat[0]).all():
        counts = counts[0, 0]
    requantization = graph.requantization(x.exponent, target, low, high)
    graph.steps.append(Average(node.name or output, (source,), output, window, np.asarray(counts), requantization))


def lower_mean(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """GlobalAveragePool, ReduceMean or ReduceSum over any dimensions but the batch."""
    x, target = graph.read(node.input[0], rows=True), graph.declare(output)
    source, window = reduced(graph, node, output)
    requantization = graph.requantization(x.exponent, target, low, high)
    count = np.array(1 if node.op_type == "ReduceSum" else math.prod(window.kernel))
    graph.steps.append(Average(node.name or output, (source,), output, window, count, requantization))


def reduced(graph: Lowering, node: onnx.NodeProto, output: str) -> tuple[str, Window]:
    """The tensor with the reduced dimensions moved to its end, and the window that covers them."""
    x = graph.read(node.input[0], rows=True)
    rank = len(graph.shape(node.input[0]))
    front = rank - len(x.shape)
    axes = reduced_axes(node, graph.floats, rank)
    if axes is None:
        raise UnsupportedModelError(f"{title(node)}: its axes are computed, not constant")
    name, source = node.name or output, x.name
    kept = [a for a in range(front, rank) if a not in axes]
    order = [*kept, *axes]
    if order != sorted(order):
        view = np.arange(x.size).reshape(x.shape).transpose([a - front for a in order])
        source = f"{name}.transposed"
        graph.declare(source, view.shape, x.encoding)
        graph.steps.append(Copy(name, (x.name,), source, (Part.of(0, view, np.arange(x.size).reshape(view.shape)),)))
    length = math.prod(x.shape[a - front] for a in axes)
    return source, Window.along([Axis(length, length, result=1)])
