"""Pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.rows.composed import product
from pow2quant.frontends.writing import Emit, Formula, Node, OnnxGraph, Operator, Rows, formula, many, pads_of


def _pool(op: str, spatial: int) -> Emit:
    def emit(module: Any, node: Node, graph: OnnxGraph) -> None:
        kernel = many(module.kernel_size, spatial)
        strides = many(module.stride if module.stride is not None else kernel, spatial)
        pads = many(module.padding, spatial)
        dilations = many(getattr(module, "dilation", 1), spatial)
        spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        behind = getattr(module, "behind", None)
        behind = _behind(node.shapes[0][2:], spans, strides, pads) if module.ceil_mode else behind
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": strides,
            "pads": pads_of(pads, behind or pads),
            "ceil_mode": int(module.ceil_mode and behind is None),
        }
        if op == "MaxPool":
            attributes["dilations"] = dilations
        else:
            # Without padding it means nothing, but onnxruntime's kernel then also counts what lies beyond the map.
            attributes["count_include_pad"] = int(module.count_include_pad and any(pads))
        graph.node(op, node.inputs, node.output, node.name, **attributes)

    return emit


def _padded_max_pool(module: m.PaddedMaxPool, node: Node, graph: OnnxGraph) -> None:
    _pool("MaxPool", len(module.kernel_size))(module, node, graph)


def _behind(sizes: Sequence[int], spans: list[int], strides: list[int], pads: list[int]) -> list[int] | None:
    """The padding behind a map that gives as many windows as PyTorch's `ceil_mode`; None where ONNX's gives these.

    A window that would begin behind the map and its padding in front is one that PyTorch leaves out.
    """
    rows = list(zip(sizes, spans, strides, pads, strict=True))
    whole = [-((span - size - 2 * pad) // stride) + 1 for size, span, stride, pad in rows]
    counts = [n - ((n - 1) * stride >= size + pad) for n, (size, _, stride, pad) in zip(whole, rows, strict=True)]
    if counts == whole:
        return None
    return [max(0, (n - 1) * s + span - size - pad) for n, (size, span, s, pad) in zip(counts, rows, strict=True)]


def _resample(module: m.Resample, node: Node, graph: OnnxGraph) -> None:
    sizes = list(node.shapes[0])

    def write(f: Formula, module: m.Resample, x: str) -> str:
        for dim in module.dims:
            inner = sizes[len(sizes) + dim + 1 :]
            values = module.weight(dim).cpu().numpy()
            weight = f.floats(values if inner else values.T)
            if len(inner) > 1:
                x = f("Reshape", x, f.integers([0, *sizes[1 : len(sizes) + dim + 1], -1]))
            x = product(f, weight, x) if inner else product(f, x, weight)
            sizes[dim] = len(module.weight(dim))
            if len(inner) > 1:
                x = f("Reshape", x, f.integers([0, *sizes[1:]]))
        return f("Div", x, f.number(module.divisor))

    formula(write)(module, node, graph)


def _grid_sample(f: Formula, module: m.GridSample, x: str, grid: str) -> str:
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(module.mode, module.mode)
    return f("GridSample", x, grid, mode=mode, padding_mode=module.border, align_corners=int(module.aligned))


ROWS: Rows = {
    m.GridSample: Operator("GridSample", formula(_grid_sample)),
    m.Resample: Operator("Div", _resample, integers=True, proved=True),
    nn.AvgPool1d: Operator("AveragePool", _pool("AveragePool", 1), integers=True, proved=True),
    nn.AvgPool2d: Operator("AveragePool", _pool("AveragePool", 2), integers=True, proved=True),
    nn.AvgPool3d: Operator("AveragePool", _pool("AveragePool", 3), integers=True, proved=True),
    nn.MaxPool3d: Operator("MaxPool", _pool("MaxPool", 3), integers=True, proved=True),
    m.PaddedMaxPool: Operator("MaxPool", _padded_max_pool, integers=True, proved=True),
    nn.MaxPool1d: Operator("MaxPool", _pool("MaxPool", 1), integers=True, proved=True),
    nn.MaxPool2d: Operator("MaxPool", _pool("MaxPool", 2), integers=True, proved=True),
}
