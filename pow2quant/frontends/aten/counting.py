"""Arithmetic of integers that count, such as tokens and places, and what stands at places that are computed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten import arithmetic, functions, indexing, reductions
from pow2quant.frontends.builder import Builder, Handler


def _is_whole(node: fx.Node) -> bool:
    """Whether a captured node's values are integers, truth values not among them."""
    dtype = node.meta["val"].dtype
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _whole(b: Builder, node: fx.Node, value: Any) -> fx.Node:
    """A captured operand as integers that count."""
    x = b.operand(node, value)
    return x if b.counts(value) else b.call(node, m.Whole(), x)


def _counted(operation: str, real: Handler) -> Handler:
    """Of integers that count: computed as such; of all else as of real numbers. operation: ONNX's name of it."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
        data = [x for x in (a.self, a.other) if b.is_data(x)]
        rounding = getattr(a, "rounding_mode", "floor")
        plain = getattr(a, "alpha", 1) == 1 and rounding in ("floor", "trunc")
        if not (plain and _is_whole(node) and any(b.counts(x) for x in data)):
            return real(b, node, a)
        first, other = (a.other, a.self) if operation == "rsub" else (a.self, a.other)
        kind = {"rsub": "Sub", "Div": "FloorDiv" if rounding == "floor" else "Div"}.get(operation, operation)
        if len(data) == 2:
            return b.call(node, m.Count(kind), _whole(b, node, first), _whole(b, node, other), kind="count")
        constant = other if b.is_data(first) else first
        values = b.tensor(node, constant) if isinstance(constant, fx.Node) else torch.tensor(constant)
        return b.call(node, m.Count(kind, values, first=constant is first), _whole(b, node, data[0]), kind="count")

    return handler


def _clamp(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    if not (_is_whole(node) and b.is_data(a.self) and b.counts(a.self)):
        return functions.ROWS["clamp"](b, node, a)
    x = b.operand(node, a.self)
    for operation, bound in (("Max", getattr(a, "min", None)), ("Min", getattr(a, "max", None))):
        number = None if bound is None else b.number(bound)
        if bound is not None and number is None:
            raise b.unsupported(node, "ends of integers that are no numbers")
        if number is not None:
            x = b.call(node, m.Count(operation, torch.tensor(int(number))), x, kind="count")
    return x


def _cumsum(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    if not _is_whole(node):
        return reductions.ROWS["cumsum"](b, node, a)
    (dim,) = reductions.dimensions(b, node, a)
    return b.call(node, m.CountUp(dim), _whole(b, node, a.self), kind="count")


def _gather(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    dim = int(a.dim) % b.rank(a.self)
    if not b.is_data(a.index):
        return indexing.ROWS["gather"](b, node, a)
    if b.free(a.self)[dim]:
        raise b.unsupported(node, "places along the batch")
    return b.call(node, m.Gathered(dim), b.operand(node, a.self), _whole(b, node, a.index))


def _written(b: Builder, node: fx.Node, a: SimpleNamespace, dim: int) -> fx.Node:
    """Values at constant places, the same in each sample: chosen from the tensor and the values behind one another."""
    source, sizes = getattr(a, "src", None), b.shape(node)[1:]
    same = b.free(a.index)[0] and b.is_data(a.self)
    if not same or (source is not None and b.shape(source) != b.shape(a.index)):
        raise b.unsupported(node, "values at constant places that do not grow with the batch, or of a constant")
    index, count = b.tensor(node, a.index)[:1], math.prod(sizes)
    places = torch.arange(index.numel()).reshape(index.shape) + count
    chosen = torch.arange(count).reshape(1, *sizes).scatter(dim, index, places)
    x = b.call(node, m.Reshape((-1, count)), b.operand(node, a.self))
    if b.is_data(source):
        values = b.call(node, m.Reshape((-1, places.numel())), b.operand(node, source))
    else:
        held = torch.tensor(float(b.number(a.value) or 0)) if source is None else b.tensor(node, source)[:1]
        values = b.call(node, m.Expand(), b.hold(node, held.expand(places.shape).reshape(1, -1)), x)
    taken = b.call(node, m.Take(1, chosen.flatten().tolist()), b.call(node, m.Concat(1), x, values))
    return b.call(node, m.Reshape(b.shape_with_batch(node)), taken)


def _scatter(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Values at places of a tensor; a constant tensor is repeated along the batch."""
    dim = int(a.dim) % b.rank(a.self)
    if b.free(node)[dim] or getattr(a, "reduce", None) is not None:
        raise b.unsupported(node, "values at places along the batch, or added to others")
    if not b.is_data(a.index):
        return _written(b, node, a, dim)
    places, source = _whole(b, node, a.index), getattr(a, "src", None)
    if source is None:
        values = b.hold(node, torch.full([1] * b.rank(node), float(b.number(a.value) or 0)))
    elif b.shape(source) == b.shape(a.index):
        values = b.operand(node, source)
    else:
        raise b.unsupported(node, f"values of shape {b.shape(source)} at places of shape {b.shape(a.index)}")
    x = b.operand(node, a.self)
    if not b.is_data(a.self):
        x = b.call(node, m.Expand(b.free(node).index(True)), x, places)
    return b.call(node, m.Scattered(dim), x, places, values)


ROWS: dict[str, Handler] = {
    **{
        name: _counted(operation, {**arithmetic.ROWS, **functions.ROWS}[name])
        for operation, names in (
            ("Add", ("add",)), ("Sub", ("sub",)), ("rsub", ("rsub",)), ("Mul", ("mul", "multiply")),
            ("Div", ("div", "divide", "floor_divide")), ("Mod", ("remainder",)),
        )
        for name in names
    },
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), _clamp),
    "cumsum": _cumsum, "gather": _gather, "scatter": _scatter,
}  # fmt: skip
