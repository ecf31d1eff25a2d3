"""Softmax and the norms."""

from __future__ import annotations

import numpy as np
from torch import nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.writing import Node, OnnxGraph, Operator, Rows


def _softmax(module: nn.Softmax, node: Node, graph: OnnxGraph) -> None:
    graph.node("Softmax", node.inputs, node.output, node.name, axis=module.dim)


def _layer_norm(module: nn.LayerNorm, node: Node, graph: OnnxGraph) -> None:
    inputs = [node.inputs[0]]
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if value is not None:
            inputs.append(graph.constant(f"{node.name}.{name}", value.detach().cpu().numpy()))
        elif name == "weight":
            inputs.append(graph.constant(f"{node.name}.{name}", np.ones(module.normalized_shape, np.float32)))
    axis = -len(module.normalized_shape)
    graph.node("LayerNormalization", inputs, node.output, node.name, axis=axis, epsilon=module.eps)


ROWS: Rows = {
    m.Softmax: Operator("Softmax", _softmax),
    m.LayerNorm: Operator("LayerNormalization", _layer_norm),
}
