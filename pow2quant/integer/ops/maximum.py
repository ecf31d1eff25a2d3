"""MaxPool, GlobalMaxPool and ReduceMax: the largest code of a window is the code of the largest value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.c_text import ctype
from pow2quant.integer.nodes import attribute, axes_of, title
from pow2quant.integer.ops import volume
from pow2quant.integer.ops.average import reduced
from pow2quant.integer.ops.copy import Copy, passing
from pow2quant.integer.program import Step

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.nodes import Window
    from pow2quant.integer.program import Codes, Program, Tensor


@dataclass(frozen=True, eq=False)
class Maximum(Step):
    """The largest code of every window; what lies beyond the map does not count."""

    window: Window

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        lowest = program.tensors[self.inputs[0]].low
        patches = self.window.patches(x.reshape(len(x), -1, *self.window.size), lowest)
        codes: Codes = patches.max((-2, -1))
        return codes

    def emit_c(self, layer: Layer) -> str:
        x = layer.input(0)
        channels = x.size // math.prod(self.window.size)
        maximum = layer.kernel("maximum", x=ctype(x), y=ctype(layer.output))
        return f"{layer.window(self.window, channels)}\n{maximum}(x, y, &window, {x.low});"

    def work(self, program: Program) -> int:
        return program.tensors[self.output].size * math.prod(self.window.kernel)


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """MaxPool, GlobalMaxPool or ReduceMax; a requantization behind it where the encoding changes."""
    if len(node.output) > 1 and node.output[1]:
        raise UnsupportedModelError(f"{title(node)}: its indices have no integers")
    x, target = graph.read(node.input[0], rows=node.op_type == "ReduceMax"), graph.declare(output)
    if node.op_type == "ReduceMax":
        source, window = reduced(graph, node, output)
        _add(graph, node.name or output, graph.read(source, rows=True), target, window, low, high)
        return
    kernel = x.shape[1:] if node.op_type == "GlobalMaxPool" else attribute(node, "kernel_shape", [])
    axes, name = axes_of(node, kernel, x.shape[1:], target.shape[1:]), node.name or output
    source, window = volume.window(graph, name, x, axes, x.low)
    _add(graph, name, graph.tensors[source], target, window, low, high)


def _add(graph: Lowering, name: str, x: Tensor, target: Tensor, window: Window, low: float, high: float) -> None:
    requantization = passing(graph, x, target, low, high)
    if requantization is None:
        graph.steps.append(Maximum(name, (x.name,), target.name, window))
        return
    between = graph.declare(f"{name}.maximum", target.shape, x.encoding)
    graph.steps.append(Maximum(name, (x.name,), between.name, window))
    graph.steps.append(Copy.whole(name, between, target, requantization))
