"""Integers that count: compared, computed with, and as places of values."""

from __future__ import annotations

from pow2quant.frontends import modules as m
from pow2quant.frontends.rows.composed import FLOAT, INT64, compared
from pow2quant.frontends.writing import Formula, Node, OnnxGraph, Operator, Rows, formula, plain
from pow2quant.operators import Kind


def _compare(f: Formula, module: m.CompareIntegers, x: str) -> str:
    return compared(f, module.relation, f("Cast", x, to=INT64), f.integers(module.values.cpu().numpy()))


def _count(f: Formula, module: m.Count, *inputs: str) -> str:
    operands = [f("Cast", x, to=INT64) for x in inputs]
    if module.values is not None:
        operands.append(f.integers(module.values.cpu().numpy()))
    x, y = reversed(operands) if module.first else operands
    if module.operation == "FloorDiv":
        return f("Div", f("Sub", x, f("Mod", x, y)), y)
    return f(module.operation, x, y)


def _count_up(f: Formula, module: m.CountUp, x: str) -> str:
    return f("CumSum", f("Cast", x, to=INT64), f.integers(module.dim))


def _places(module: m.Places, node: Node, graph: OnnxGraph) -> None:
    count = graph.constant(f"{node.name}.count", [module.count])
    inputs = [node.inputs[0], count]
    graph.node("TopK", inputs, f"{node.name}.values", node.name, axis=module.dim, largest=int(module.largest))
    graph.nodes[-1].output.append(node.output)


def _scattered(f: Formula, module: m.Scattered, x: str, places: str, values: str) -> str:
    values = f("Expand", values, f("Shape", places))
    return f("ScatterElements", x, places, values, axis=module.dim)


ROWS: Rows = {
    m.CompareIntegers: Operator("Cast", formula(_compare), integers=True, proved=True),
    m.Count: Operator("Add", formula(_count), own=Kind.INDEX),
    m.CountUp: Operator("CumSum", formula(_count_up), own=Kind.INDEX),
    m.Real: Operator("Cast", plain("Cast", to=FLOAT), integers=True),
    m.Whole: Operator("Cast", formula(lambda f, module, x: f("Cast", f("Round", x), to=INT64)), own=Kind.INDEX),
    m.ArgMax: Operator(
        "ArgMax", plain("ArgMax", lambda x: {"axis": x.dim, "keepdims": int(x.keepdim)}), integers=True, proved=True
    ),
    m.Places: Operator("TopK", _places, own=Kind.INDEX, proved=True),
    m.Gathered: Operator("GatherElements", plain("GatherElements", lambda x: {"axis": x.dim}), proved=True),
    m.Scattered: Operator("ScatterElements", formula(_scattered), proved=True),
}
