"""Operations that leave every code where it is: Flatten, Reshape, Squeeze, Unsqueeze, Identity, Dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pow2quant.integer.ops.copy import Copy, passing
from pow2quant.integer.program import Step

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Program


@dataclass(frozen=True, eq=False)
class View(Step):
    """The input's codes in another shape: the output may share its memory."""

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        return x

    def emit_c(self, layer: Layer) -> str:
        """A wider type takes memory of its own."""
        if layer.input(0).dtype == layer.output.dtype:
            return ""
        return f"for (int32_t i = 0; i < {layer.output.size}; i++)\n    y[i] = x[i];"

    def work(self, program: Program) -> int:
        return 0


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """A view, or where the encoding changes a copy."""
    source, target = graph.read(node.input[0], rows=True), graph.declare(output)
    requantization = passing(graph, source, target, low, high)
    name = node.name or output
    if requantization is None:
        graph.steps.append(View(name, (source.name,), output))
    else:
        graph.steps.append(Copy.whole(name, source, target, requantization))
