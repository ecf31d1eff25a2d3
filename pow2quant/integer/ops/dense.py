"""Gemm, and MatMul with a constant matrix: sums of products over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.c_layer import folded
from pow2quant.integer.c_text import ctype
from pow2quant.integer.nodes import attribute, title
from pow2quant.integer.program import Step, largest_sum
from pow2quant.integer.ternary import Ternary

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Ints, Program, Requantization


@dataclass(frozen=True, eq=False)
class Dense(Step):
    """y = requantize(w @ (x - zero) + bias) for every row of x.

    weight: (M, K). bias: (M,), in units of s_in * s_w. x: (…, K) -> y: (…, M).
    """

    weight: Ints
    bias: Ints
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        kind, zero = program.kinds[self], program.tensors[self.inputs[0]].zero
        rows = x.reshape(-1, self.weight.shape[1]).astype(kind) - kind.type(zero)
        accumulator = rows @ self.weight.T.astype(kind) + self.bias.astype(kind)
        return self.requantization(accumulator, channel_axis=-1)

    def emit_c(self, layer: Layer) -> str:
        """The code of zero goes into the bias."""
        x, result = layer.input(0), layer.output
        bias, bound = folded(self.weight, self.bias, x)
        a = layer.accumulator(bound, self.requantization)
        types = {"x": ctype(x)}
        if (ternary := Ternary.of(self.weight)) is not None:
            name, arrays = "ternary_dense", layer.ternary(ternary)
        else:
            weight = layer.array("weight", self.weight)
            name, arrays = "dense", weight.name
            types["w"] = weight.ctype
        folded_bias = layer.array("bias", bias, least="int32")
        outputs, length = self.weight.shape
        dense = layer.kernel(name, **types, b=folded_bias.ctype, a=a, y=ctype(result))
        rule = layer.rule(self.requantization)
        sizes = f"{x.size // length}, {length}, {outputs}"
        return f"{rule}\n{dense}(x, y, {sizes}, {arrays}, {folded_bias.name}, &rule);"

    def bound(self, program: Program) -> int:
        return largest_sum(self.weight, self.bias, program.tensors[self.inputs[0]])

    def work(self, program: Program) -> int:
        return program.tensors[self.output].size * int(self.weight.shape[1])


def lower_gemm(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Gemm with alpha = beta = 1."""
    for name, plain in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
        if (value := attribute(node, name, plain)) != plain:
            raise UnsupportedModelError(f"{title(node)}: {name} = {value:g}; only {plain:g} has integers")
    lower_matrix(graph, node, output, low, high, transposed=bool(attribute(node, "transB", 0)))


def lower_matrix(
    graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float, *, transposed: bool
) -> None:
    """x times a constant matrix (K, M), or (M, K) where it is `transposed`."""
    x = graph.read(node.input[0], rows=True)
    weight, encoding = graph.parameter(node.input[1])
    if weight.ndim != 2:
        raise UnsupportedModelError(f"{title(node)}: a constant of {weight.ndim} dimensions; a matrix has integers")
    if encoding.axis not in (None, 0 if transposed else 1):
        raise UnsupportedModelError(f"{node.input[1]}: one scale per channel along the summed axis {encoding.axis}")
    weight = weight if transposed else weight.T
    exponent = x.exponent + encoding.exponent
    bias = graph.bias(node, exponent, len(weight))
    requantization = graph.requantization(exponent, graph.declare(output), low, high)
    graph.steps.append(Dense(node.name or output, (x.name,), output, weight, bias, requantization))
