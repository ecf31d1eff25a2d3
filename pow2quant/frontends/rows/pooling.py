"""Pools and means."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.writing import Emit, Node, OnnxGraph, Operator, Rows, many, pads_of


def _pool(op: str, spatial: int) -> Emit:
    def emit(module: Any, node: Node, graph: OnnxGraph) -> None:
        kernel = many(module.kernel_size, spatial)
        pads = many(module.padding, spatial)
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": many(module.stride if module.stride is not None else kernel, spatial),
            "pads": pads_of(pads, pads),
            "ceil_mode": int(module.ceil_mode),
        }
        if op == "MaxPool":
            attributes["dilations"] = many(module.dilation, spatial)
        else:
            # Without padding it means nothing, but onnxruntime's kernel then also counts what lies beyond the map.
            attributes["count_include_pad"] = int(module.count_include_pad and any(pads))
        graph.node(op, node.inputs, node.output, node.name, **attributes)

    return emit


def _mean(module: m.Mean, node: Node, graph: OnnxGraph) -> None:
    axes = graph.constant(f"{node.name}.axes", np.array(module.dims, np.int64))
    graph.node("ReduceMean", [node.inputs[0], axes], node.output, node.name, keepdims=int(module.keepdim))


ROWS: Rows = {
    nn.AvgPool1d: Operator("AveragePool", _pool("AveragePool", 1), integers=True, proved=True),
    nn.AvgPool2d: Operator("AveragePool", _pool("AveragePool", 2), integers=True, proved=True),
    m.Mean: Operator("ReduceMean", _mean, integers=True, proved=True),
    nn.MaxPool1d: Operator("MaxPool", _pool("MaxPool", 1), integers=True, proved=True),
    nn.MaxPool2d: Operator("MaxPool", _pool("MaxPool", 2), integers=True, proved=True),
}
