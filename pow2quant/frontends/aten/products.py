"""Products along named dimensions, as permutations around one matrix product."""

from __future__ import annotations

import math
import string
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.layers import linear, of_rows
from pow2quant.frontends.aten.shapes import permuted
from pow2quant.frontends.builder import Builder, Handler


def _einsum(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Of one operand, or two by two from the left."""
    names, output = _letters(b, a)
    if any(len(set(n)) < len(n) for n in names):
        raise b.unsupported(node, f"einsum({a.equation!r}): a diagonal")
    operands = [b.operand(node, t) for t in a.tensors]
    sizes = {c: (b.shape(t)[i], b.free(t)[i]) for n, t in zip(names, a.tensors, strict=True) for i, c in enumerate(n)}
    if len(names) == 1:
        return _permuted(b, node, *_summed(b, node, operands[0], names[0], output), output)
    data = [i for i, t in enumerate(a.tensors) if b.is_data(t)]
    if len(names) == 2 and len(data) == 1:
        at, weight = data[0], b.tensor(node, a.tensors[1 - data[0]])
        product = _weighted(b, node, operands[at], names[at], weight, names[1 - at], output, sizes)
        if product is not None:
            return product
    while len(names) > 1:
        read = output + "".join(names[2:])
        kept = "".join(c for c in dict.fromkeys(names[0] + names[1]) if c in read) if names[2:] else output
        for i, other in ((0, 1), (1, 0)):
            operands[i], names[i] = _summed(b, node, operands[i], names[i], kept + names[other])
        operands[:2], names[:2] = [_product(b, node, operands[:2], names[:2], kept, sizes)], [kept]
    return operands[0]


def _letters(b: Builder, a: SimpleNamespace) -> tuple[list[str], str]:
    """What the dimensions of the operands and of the result are called; dots become letters, the last ones first."""
    inputs, arrow, output = a.equation.replace(" ", "").partition("->")
    unused = [c for c in string.ascii_letters if c not in a.equation]
    names, longest = [], ""
    for name, tensor in zip(inputs.split(","), a.tensors, strict=True):
        dots = "".join(unused[: b.rank(tensor) - len(name.replace("...", ""))])[::-1] if "..." in name else ""
        names.append(name.replace("...", dots))
        longest = max(longest, dots, key=len)
    if not arrow:
        output = longest + "".join(sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1))
    return names, output.replace("...", longest)


Sizes = dict[str, tuple[int, bool]]
"""By a dimension's letter its size, and whether it grows with the batch."""


def _summed(b: Builder, node: fx.Node, x: fx.Node, names: str, kept: str) -> tuple[fx.Node, str]:
    """Sums over the dimensions that nothing else names."""
    gone = [i for i, c in enumerate(names) if c not in kept]
    if not gone:
        return x, names
    return b.call(node, m.Sum(gone, keepdim=False), x), "".join(c for c in names if c in kept)


def _permuted(b: Builder, node: fx.Node, x: fx.Node, names: str, wanted: str) -> fx.Node:
    return permuted(b, node, x, [names.index(c) for c in wanted])


def _product(
    b: Builder, node: fx.Node, operands: list[fx.Node], names: list[str], output: str, sizes: Sizes
) -> fx.Node:
    """(shared, rows, summed) @ (shared, summed, columns)."""
    first, second = names
    shared = "".join(c for c in output if c in first and c in second)
    rows = "".join(c for c in output if c in first and c not in second)
    columns = "".join(c for c in output if c in second and c not in first)
    summed = "".join(c for c in first if c in second and c not in output)
    left = _grouped(b, node, operands[0], first, (*shared, rows, summed), sizes)
    right = _grouped(b, node, operands[1], second, (*shared, summed, columns), sizes)
    product = b.call(node, m.MatMul(), left, right)
    apart = _split(b, node, product, (*shared, rows, columns), sizes)
    return _permuted(b, node, apart, shared + rows + columns, output)


def _weighted(
    b: Builder, node: fx.Node, x: fx.Node, names: str, weight: torch.Tensor, own: str, output: str, sizes: Sizes
) -> fx.Node | None:
    """The product with a constant as a linear layer; None where it has a matrix for each of several places."""
    kept = "".join(c for c in own if c in names or c in output)
    summed = "".join(c for c in names if c in kept and c not in output)
    columns = "".join(c for c in kept if c not in names)
    if not summed or len(kept) > len(summed) + len(columns):
        return None
    matrix = torch.einsum(f"{own}->{columns}{summed}", weight.detach().float())
    x, names = _summed(b, node, x, names, output + kept)
    rows = "".join(c for c in names if c not in summed)
    shape = [_size(c, sizes) for c in rows]
    x = _permuted(b, node, x, names, rows + summed)
    if len(summed) > 1:
        x = b.call(node, m.Reshape([*shape, _size(summed, sizes)]), x)
    x = of_rows(b, node, x, [*shape, _size(columns, sizes)], matrix.reshape(_size(columns, sizes), -1))
    if len(columns) != 1:
        x = b.call(node, m.Reshape([*shape, *(_size(c, sizes) for c in columns)]), x)
    return _permuted(b, node, x, rows + columns, output)


def _grouped(b: Builder, node: fx.Node, x: fx.Node, names: str, groups: tuple[str, ...], sizes: Sizes) -> fx.Node:
    """Dimensions in another order, neighbours joined; an empty group is a dimension of one."""
    x = _permuted(b, node, x, names, "".join(groups))
    if all(len(g) == 1 for g in groups):
        return x
    return b.call(node, m.Reshape([_size(g, sizes) for g in groups]), x)


def _split(b: Builder, node: fx.Node, x: fx.Node, groups: tuple[str, ...], sizes: Sizes) -> fx.Node:
    if all(len(g) == 1 for g in groups):
        return x
    return b.call(node, m.Reshape([_size(c, sizes) for g in groups for c in g]), x)


def _size(group: str, sizes: Sizes) -> int:
    return -1 if any(sizes[c][1] for c in group) else math.prod(sizes[c][0] for c in group)


def scaled(b: Builder, node: fx.Node, x: fx.Node, factor: float) -> fx.Node:
    """factor * x; x itself where the factor is one."""
    return x if factor == 1 else b.call(node, m.Scale(float(factor)), x)


def times(b: Builder, node: fx.Node, value: Any, factor: float) -> fx.Node:
    """The same of a captured operand, which may be a constant."""
    if b.is_data(value):
        return scaled(b, node, b.real(node, value), factor)
    return b.hold(node, b.tensor(node, value) * factor)


def _baddbmm(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """beta * self + alpha * batch1 @ batch2."""
    product = b.call(node, m.MatMul(), b.operand(node, a.batch1), b.operand(node, a.batch2))
    terms = [times(b, node, a.self, a.beta), scaled(b, node, product, a.alpha)]
    return b.call(node, m.Add(), *terms)


def _bilinear(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """sum of x1[i] * weight[o, i, j] * x2[j]: a linear layer of x1, and a product with x2."""
    if b.rank(a.input1) != 2:
        raise b.unsupported(node, "bilinear() of more than vectors")
    weight = b.parameter(node, a.weight)
    outputs, first, second = weight.shape
    matrix = weight.detach().permute(0, 2, 1).reshape(outputs * second, first).contiguous()
    rows = linear(b, node, a.input1, matrix, None, None)
    rows = b.call(node, m.Reshape((-1, outputs, second)), rows)
    column = b.call(node, m.Reshape((-1, second, 1)), b.operand(node, a.input2))
    result = b.call(node, m.Reshape((-1, outputs)), b.call(node, m.MatMul(), rows, column))
    return result if a.bias is None else b.call(node, m.Add(), result, b.operand(node, a.bias))


def _index_add(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """self, and slices of `source` added at constant places: a linear layer along the dimension."""
    dim = int(a.dim) % b.rank(a.self)
    if b.free(a.self)[dim]:
        raise b.unsupported(node, "places along the batch")
    source = getattr(a, "source", None) or a.src
    index = b.tensor(node, a.index)
    if index.ndim > 1:  # scatter_add: a place for each value
        along = index.movedim(dim, -1).reshape(-1, index.shape[dim])
        if b.shape(source)[dim] != index.shape[dim] or not torch.equal(along, along[:1].expand_as(along)):
            raise b.unsupported(node, "places that are not the same for the whole slice")
        index = along[0]
    places = torch.nn.functional.one_hot(index.long() % b.shape(a.self)[dim], b.shape(a.self)[dim]).float()
    total = _combined(b, node, source, dim, places.t().contiguous() * float(getattr(a, "alpha", 1)))
    held = b.constants.get(a.self)
    empty = isinstance(held, torch.Tensor) and not held.any()
    return total if empty else b.call(node, m.Add(), b.operand(node, a.self), total)


def _combined(b: Builder, node: fx.Node, x: fx.Node, dim: int, weight: torch.Tensor) -> fx.Node:
    """weight (out, in): sums of slices along a dimension."""
    rest = [d for d in range(b.rank(x)) if d != dim]
    shape = [*(-1 if b.free(x)[d] else b.shape(x)[d] for d in rest), weight.shape[0]]
    if dim == len(rest):
        return of_rows(b, node, b.operand(node, x), shape, weight)
    order = [*rest, dim]
    turned = of_rows(b, node, b.call(node, m.Permute(order), b.operand(node, x)), shape, weight)
    return b.call(node, m.Permute([order.index(d) for d in range(len(order))]), turned)


ROWS: dict[str, Handler] = {
    "einsum": _einsum, "baddbmm": _baddbmm, "bilinear": _bilinear,
    **dict.fromkeys(("index_add", "scatter_add"), _index_add),
}  # fmt: skip
