"""Functions of one tensor, element by element."""

from __future__ import annotations

import numpy as np
from torch import nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.writing import Emit, Node, OnnxGraph, Operator, Rows, plain


def _clip(low: float, high: float) -> Emit:
    return lambda module, node, graph: _emit_clip(low, high, node, graph)


def _emit_clip(low: float, high: float, node: Node, graph: OnnxGraph) -> None:
    bounds = [graph.constant(f"{node.name}.{n}", np.float32(v)) for n, v in (("min", low), ("max", high))]
    graph.node("Clip", [node.inputs[0], *bounds], node.output, node.name)


def _hardtanh(module: nn.Hardtanh, node: Node, graph: OnnxGraph) -> None:
    _emit_clip(module.min_val, module.max_val, node, graph)


def _silu(module: nn.SiLU, node: Node, graph: OnnxGraph) -> None:
    graph.node("Sigmoid", node.inputs, f"{node.name}.sigmoid", f"{node.name}.sigmoid")
    graph.node("Mul", [node.inputs[0], f"{node.name}.sigmoid"], node.output, node.name)


def _prelu(module: nn.PReLU, node: Node, graph: OnnxGraph) -> None:
    slope = module.weight.detach().cpu().numpy()
    shape = (-1, *[1] * (len(node.shapes[0]) - 2)) if slope.size > 1 else (1,)
    graph.node(
        "PRelu", [node.inputs[0], graph.constant(f"{node.name}.slope", slope.reshape(shape))], node.output, node.name
    )


def _scale(module: m.Scale, node: Node, graph: OnnxGraph) -> None:
    current = node.inputs[0]
    steps = [("Mul", "factor", float(module.factor), 1.0), ("Add", "offset", float(module.offset), 0.0)]
    wanted = [s for s in steps if s[2] != s[3]] or steps[:1]
    for op, label, value, _ in wanted:
        last = op == wanted[-1][0]
        result = node.output if last else f"{node.name}.scaled"
        constant = graph.constant(f"{node.name}.{label}", np.float32(value))
        graph.node(op, [current, constant], result, node.name if last else f"{node.name}.{label}")
        current = result


ROWS: Rows = {
    nn.ReLU: Operator("Relu", plain("Relu"), integers=True, proved=True),
    nn.ReLU6: Operator("Clip", _clip(0.0, 6.0), integers=True, proved=True),
    nn.Hardtanh: Operator("Clip", _hardtanh, integers=True, proved=True),
    m.Sigmoid: Operator("Sigmoid", plain("Sigmoid"), integers=True, proved=True),
    m.Tanh: Operator("Tanh", plain("Tanh"), integers=True, proved=True),
    m.Hardsigmoid: Operator("HardSigmoid", plain("HardSigmoid", alpha=1 / 6, beta=0.5), integers=True, proved=True),
    m.HardSwish: Operator("HardSwish", plain("HardSwish"), integers=True, proved=True),
    m.SiLU: Operator("Mul", _silu, integers=True, proved=True),
    m.GELU: Operator("Gelu", plain("Gelu", lambda x: {"approximate": x.approximate}), integers=True, proved=True),
    m.ELU: Operator("Elu", plain("Elu", lambda x: {"alpha": x.alpha}), integers=True, proved=True),
    m.LeakyReLU: Operator(
        "LeakyRelu", plain("LeakyRelu", lambda x: {"alpha": x.negative_slope}), integers=True, proved=True
    ),
    nn.PReLU: Operator("PRelu", _prelu, integers=True),
    m.Scale: Operator("Mul", _scale, clipped=True, integers=True, proved=True),
}
