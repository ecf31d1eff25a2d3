"""Constants, and what is looked up in them."""

from __future__ import annotations

from pow2quant.frontends import modules as m
from pow2quant.frontends.writing import Formula, Node, OnnxGraph, Operator, Rows
from pow2quant.operators import Kind


def _constant(module: m.Constant, node: Node, graph: OnnxGraph) -> None:
    """Nothing to compute: the initializer is the result."""


def _expand(module: m.Expand, node: Node, graph: OnnxGraph) -> None:
    f = Formula(node, graph)
    rest = [1] * len(node.shapes[0])
    length = f("Shape", node.inputs[1], start=module.dim, end=module.dim + 1)
    parts = [f.integers(part) if part else "" for part in (rest[: module.dim], rest[module.dim + 1 :])]
    shape = f("Concat", *filter(None, (parts[0], length, parts[1])), axis=0)
    graph.node("Expand", [node.inputs[0], shape], node.output, node.name)


def _embedding(module: m.Embedding, node: Node, graph: OnnxGraph) -> None:
    graph.node("Gather", [node.parameters["weight"], node.inputs[0]], node.output, node.name, axis=0)


ROWS: Rows = {
    m.Constant: Operator("Constant", _constant, stored="value", integers=True, proved=True),
    m.Expand: Operator("Expand", _expand, integers=True, proved=True),
    m.Embedding: Operator("Gather", _embedding, stored="weight", own=Kind.COMPUTE, integers=True, proved=True),
}
