"""Sums, products, comparisons and reductions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pow2quant.frontends import modules as m
from pow2quant.frontends.rows.composed import nonzero, not_below
from pow2quant.frontends.writing import Emit, Formula, Node, OnnxGraph, Operator, Rows, formula, plain


def _div(f: Formula, module: m.Div, x: str, y: str) -> str:
    return f("Div", x, nonzero(f, y))


def _select(f: Formula, module: m.Select, condition: str, x: str, y: str) -> str:
    return f("Where", f("Greater", condition, f.number(0.5)), x, y)


def _mask(f: Formula, module: Any) -> str:
    return f.graph.constant(f"{f.name}.mask", module.mask.cpu().numpy())


def _masked(f: Formula, module: m.Masked, x: str) -> str:
    return f("Where", _mask(f, module), f.number(module.value), x)


def _choose(f: Formula, module: m.Choose, x: str, y: str) -> str:
    return f("Where", _mask(f, module), x, y)


def _cumsum(f: Formula, module: m.CumSum, x: str) -> str:
    return f("CumSum", x, f.integers(module.dim))


def reduce(f: Formula, op: str, x: str, module: Any) -> str:
    """A reduction over the module's dimensions."""
    return f(op, x, f.integers(module.dims), keepdims=int(module.keepdim))


def _reduction(op: str) -> Emit:
    return formula(lambda f, module, x: reduce(f, op, x, module))


def _counted(write: Callable[[Formula, Any, int, str], str]) -> Emit:
    """Of a module that needs to know how many values it reduces to one."""

    def emit(module: Any, node: Node, graph: OnnxGraph) -> None:
        n = math.prod(node.shapes[0][d] for d in module.dims)
        formula(lambda f, module, x: write(f, module, n, x))(module, node, graph)

    return emit


def _variance(f: Formula, module: m.Variance, n: int, x: str) -> str:
    total, squares = reduce(f, "ReduceSum", x, module), reduce(f, "ReduceSum", f("Mul", x, x), module)
    spread = not_below(f, f("Sub", f("Mul", squares, f.number(n)), f("Mul", total, total)), 0)
    variance = f("Div", spread, f.number(n * (n - module.correction)))
    return f("Sqrt", variance) if module.root else variance


def _norm(f: Formula, module: m.Norm, x: str) -> str:
    if module.order == 1:
        return reduce(f, "ReduceSum", f("Abs", x), module)
    return f("Sqrt", reduce(f, "ReduceSum", f("Mul", x, x), module))


def _mean(module: m.Mean, node: Node, graph: OnnxGraph) -> None:
    axes = graph.constant(f"{node.name}.axes", np.array(module.dims, np.int64))
    graph.node("ReduceMean", [node.inputs[0], axes], node.output, node.name, keepdims=int(module.keepdim))


ROWS: Rows = {
    m.Add: Operator("Add", plain("Add"), clipped=True, integers=True, proved=True),
    m.Sub: Operator("Sub", plain("Sub"), clipped=True, integers=True, proved=True),
    m.Mul: Operator("Mul", plain("Mul"), clipped=True, integers=True, proved=True),
    m.MatMul: Operator("MatMul", plain("MatMul"), integers=True, proved=True),
    m.Div: Operator("Div", formula(_div), integers=True, proved=True),
    m.Maximum: Operator("Max", plain("Max"), integers=True, proved=True),
    m.Minimum: Operator("Min", plain("Min"), integers=True, proved=True),
    m.Select: Operator("Where", formula(_select), integers=True, proved=True),
    m.Masked: Operator("Where", formula(_masked), integers=True, proved=True),
    m.Choose: Operator("Where", formula(_choose), integers=True, proved=True),
    m.Mean: Operator("ReduceMean", _mean, integers=True, proved=True),
    m.Sum: Operator("ReduceSum", _reduction("ReduceSum"), integers=True, proved=True),
    m.Largest: Operator("ReduceMax", _reduction("ReduceMax"), integers=True, proved=True),
    m.Least: Operator("ReduceMin", _reduction("ReduceMin"), proved=True),
    m.LogSumExp: Operator("ReduceLogSumExp", _reduction("ReduceLogSumExp")),
    m.Product: Operator("ReduceProd", _reduction("ReduceProd")),
    m.Variance: Operator("Div", _counted(_variance)),
    m.Norm: Operator("Sqrt", formula(_norm)),
    m.CumSum: Operator("CumSum", formula(_cumsum)),
}
