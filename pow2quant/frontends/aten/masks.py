"""Comparisons, and choices between two tensors: a truth value is a 0 or a 1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.functions import of_operands, unary
from pow2quant.frontends.builder import Builder, Handler

MIRRORED = {"Greater": "Less", "GreaterOrEqual": "LessOrEqual", "Less": "Greater", "LessOrEqual": "GreaterOrEqual"}


def _compare(relation: str) -> Handler:
    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        number, x, kind = b.number(a.other), a.self, relation
        data = next(v for v in (a.self, a.other) if b.is_data(v))
        if b.counts(data):
            return _compare_integers(b, node, relation, a)
        if number is None and b.number(a.self) is not None:
            number, x, kind = b.number(a.self), a.other, MIRRORED.get(relation, relation)
        if number is not None:
            return b.call(node, m.Compare(kind, number), b.operand(node, x))
        difference = b.call(node, m.Sub(), b.operand(node, a.self), b.operand(node, a.other))
        return b.call(node, m.Compare(relation, 0.0), difference)

    return handler


def _compare_integers(b: Builder, node: fx.Node, relation: str, a: SimpleNamespace) -> fx.Node:
    """Of integers that count (tokens), with constants."""
    x, other, kind = a.self, a.other, relation
    if not b.is_data(x):
        x, other, kind = other, x, MIRRORED.get(relation, relation)
    if b.is_data(other):
        raise b.unsupported(node, "a comparison of integers that are both computed from the inputs")
    values = b.tensor(node, other) if isinstance(other, fx.Node) else torch.tensor(other)
    if not torch.equal(values, values.long()):
        raise b.unsupported(node, "a comparison of integers with other numbers")
    return b.call(node, m.CompareIntegers(kind, values), b.operand(node, x), kind="compare")


def _one_hot(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    column = b.call(node, m.Reshape([*b.open_shape(a.self), 1]), b.operand(node, a.self))
    return b.call(node, m.CompareIntegers("Equal", torch.arange(b.shape(node)[-1])), column, kind="one_hot")


def choose(b: Builder, node: fx.Node, condition: Any, x: Any, y: Any) -> fx.Node:
    """x where the condition is true, else y; tensors or numbers."""
    if b.is_data(condition):
        return b.call(node, m.Select(), b.operand(node, condition), *(b.tensor_or_number(node, v) for v in (x, y)))
    mask = b.tensor(node, condition).bool()
    for value, other, where in ((x, y, mask), (y, x, ~mask)):
        number = b.number(value)
        if number is not None and b.is_data(other) and b.shape(other) == b.shape(node):
            return b.call(node, m.Masked(where, number), b.operand(node, other))
    return b.call(node, m.Choose(mask), *(b.tensor_or_number(node, v) for v in (x, y)))


def _index_fill(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """A number at constant places along a dimension."""
    dim, number = int(a.dim) % b.rank(a.self), b.number(a.value)
    if number is None or b.free(a.self)[dim]:
        raise b.unsupported(node, "places along the batch, or a value that is computed from the inputs")
    filled = torch.zeros(b.shape(a.self)[dim], dtype=torch.bool)
    filled[b.tensor(node, a.index).long().flatten()] = True
    shape = [len(filled) if d == dim else 1 for d in range(b.rank(a.self))]
    return b.call(node, m.Masked(filled.reshape(shape), number), b.operand(node, a.self))


def _triangle(keep: Any) -> Handler:
    """Only what lies above, or below, a diagonal of the last two dimensions."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        outside = keep(torch.ones(b.shape(a.self)[-2:]), int(a.diagonal)) == 0
        return b.call(node, m.Masked(outside, 0.0), b.operand(node, a.self))

    return handler


ROWS: dict[str, Handler] = {
    "gt": _compare("Greater"), "ge": _compare("GreaterOrEqual"), "lt": _compare("Less"),
    "le": _compare("LessOrEqual"), "eq": _compare("Equal"), "ne": _compare("NotEqual"),
    **dict.fromkeys(("logical_not", "bitwise_not"), unary(lambda a: m.Scale(-1.0, 1.0))),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), of_operands(m.Minimum, "self", "other")),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), _compare("NotEqual")),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), of_operands(m.Maximum, "self", "other")),
    "where": lambda b, node, a: choose(b, node, a.condition, a.self, a.other),
    "masked_fill": lambda b, node, a: choose(b, node, a.mask, a.value, a.self),
    "tril": _triangle(torch.tril), "triu": _triangle(torch.triu),
    "one_hot": _one_hot, "index_fill": _index_fill,
}  # fmt: skip
