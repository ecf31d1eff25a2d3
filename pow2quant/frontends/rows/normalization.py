"""Softmax and the norms."""

from __future__ import annotations

import math

import numpy as np
import torch

from pow2quant.frontends import modules as m
from pow2quant.frontends.modules.normalization import HALF, LOWEST
from pow2quant.frontends.rows.composed import not_below, product, times
from pow2quant.frontends.writing import Formula, Node, OnnxGraph, Operator, Rows, formula, plain


def _masked_softmax(f: Formula, module: m.MaskedSoftmax, x: str, keep: str = "") -> str:
    scores = times(f, x, module.factor)
    scores = scores if module.mask is None else f("Add", scores, f.floats(module.mask.cpu().numpy()))
    if keep:
        hidden = f("Where", f("Greater", keep, f.number(HALF)), f.number(0), f.number(LOWEST))
        scores = f("Add", scores, hidden)
    return f("Softmax", scores, axis=module.dim)


def _shifted(f: Formula, module: m.ShiftedNorm, x: str) -> str:
    factors = module.factors()
    return x if factors is None else f("Mul", x, f.floats(factors.cpu().numpy()))


def _layer_norm(module: m.LayerNorm, node: Node, graph: OnnxGraph) -> None:
    inputs = [_shifted(Formula(node, graph), module, node.inputs[0])]
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if value is not None:
            inputs.append(graph.constant(f"{node.name}.{name}", value.detach().cpu().numpy()))
        elif name == "weight":
            inputs.append(graph.constant(f"{node.name}.{name}", np.ones(module.normalized_shape, np.float32)))
    axis = -len(module.normalized_shape)
    graph.node("LayerNormalization", inputs, node.output, node.name, axis=axis, epsilon=module.eps)


def _normalize(f: Formula, module: m.Normalize, x: str) -> str:
    squares = f("ReduceSum", f("Mul", x, x), f.integers(module.dims), keepdims=1)
    return f("Div", x, not_below(f, f("Sqrt", squares), module.eps))


def _rms_norm(f: Formula, module: m.RMSNorm, x: str) -> str:
    shape, x = module.normalized_shape, _shifted(f, module, x)
    squares = f("ReduceSum", f("Mul", x, x), f.integers(range(-len(shape), 0)), keepdims=1)
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    result = f("Div", x, f("Sqrt", f("Add", f("Div", squares, f.number(math.prod(shape))), f.number(eps))))
    return result if module.weight is None else f("Mul", result, f.floats(module.weight.detach().cpu().numpy()))


def _group_norm(module: m.GroupNorm, node: Node, graph: OnnxGraph) -> None:
    shape = node.shapes[0]
    n = math.prod(shape[1:]) // module.num_groups

    def write(f: Formula, module: m.GroupNorm, x: str) -> str:
        grouped = f("Reshape", x, f.integers([0, module.num_groups, -1]))
        axis = f.integers([2])
        total, squares = (f("ReduceSum", y, axis, keepdims=1) for y in (grouped, f("Mul", grouped, grouped)))
        spread = not_below(f, f("Sub", f("Mul", squares, f.number(n)), f("Mul", total, total)), 0)
        deviation = f("Sqrt", f("Add", spread, f.number(module.eps * n * n)))
        centred = f("Sub", f("Mul", grouped, f.number(n)), total)
        result = f("Reshape", f("Div", centred, deviation), f.integers([0, *shape[1:]]))
        if module.affine:
            weight, bias = (
                p.detach().cpu().numpy().reshape(-1, *[1] * (len(shape) - 2)) for p in (module.weight, module.bias)
            )
            result = f("Add", f("Mul", result, f.floats(weight)), f.floats(bias))
        return result

    formula(write)(module, node, graph)


def _local_response_norm(module: m.LocalResponseNorm, node: Node, graph: OnnxGraph) -> None:
    channels, *spatial = node.shapes[0][1:]

    def write(f: Formula, module: m.LocalResponseNorm, x: str) -> str:
        rows = f("Reshape", x, f.integers([0, channels, -1]))
        squares = product(f, f.floats(module.band(channels).numpy()), f("Mul", rows, rows))
        divisor = f("Add", f("Mul", squares, f.number(module.alpha / module.size)), f.number(module.k))
        result = f("Div", rows, f("Pow", divisor, f.number(module.beta)))
        return f("Reshape", result, f.integers([0, channels, *spatial]))

    formula(write)(module, node, graph)


ROWS: Rows = {
    m.Softmax: Operator("Softmax", plain("Softmax", lambda x: {"axis": x.dim}), integers=True, proved=True),
    m.LogSoftmax: Operator("LogSoftmax", plain("LogSoftmax", lambda x: {"axis": x.dim}), integers=True, proved=True),
    m.MaskedSoftmax: Operator("Softmax", formula(_masked_softmax), integers=True, proved=True),
    m.LayerNorm: Operator("LayerNormalization", _layer_norm, integers=True, proved=True),
    m.Normalize: Operator("Div", formula(_normalize), integers=True, proved=True),
    m.RMSNorm: Operator("Div", formula(_rms_norm), integers=True, proved=True),
    m.GroupNorm: Operator("Div", _group_norm, integers=True, proved=True),
    m.LocalResponseNorm: Operator("Div", _local_response_norm),
}
