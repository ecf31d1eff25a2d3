"""Sums, means, extremes and norms over dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.shapes import cut, join
from pow2quant.frontends.builder import Builder, Handler, Parts


def dimensions(b: Builder, node: fx.Node, a: SimpleNamespace) -> list[int]:
    """Over which dimensions: all where none are named. Raises UnsupportedModelError for the batch."""
    rank, dims = b.rank(a.self), getattr(a, "dim", None)
    wanted: Sequence[int] = [dims] if isinstance(dims, int) else (dims or range(rank))
    found = sorted(int(d) % rank for d in wanted)
    if any(b.free(a.self)[d] for d in found):
        raise b.unsupported(node, "a sum, mean, norm or extreme over the batch")
    return found


def reduced(b: Builder, node: fx.Node, a: SimpleNamespace) -> tuple[list[int], bool]:
    """The `dimensions`, and whether they stay as ones."""
    return dimensions(b, node, a), bool(getattr(a, "keepdim", False))


def _reduction(make: type[m.Reduction], kind: str | None = None, truths: bool = False) -> Handler:
    """truths: of truth values only."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        if truths and a.self.meta["val"].dtype != torch.bool:
            raise b.unsupported(node, "of what is no truth value; compare it first (x != 0)")
        return b.call(node, make(*reduced(b, node, a)), b.operand(node, a.self), kind=kind)

    return handler


def _spread(root: bool) -> Handler:
    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        correction = getattr(a, "correction", None)
        if hasattr(a, "unbiased"):
            correction = 1 if a.unbiased else 0
        module = m.Variance(*reduced(b, node, a), 1.0 if correction is None else float(correction), root)
        return b.call(node, module, b.operand(node, a.self), kind="std" if root else "var")

    return handler


def _norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    order = getattr(a, "ord", getattr(a, "p", 2))
    order, x = 2 if order is None else order, b.operand(node, a.self)
    along = reduced(b, node, a)
    if order == float("inf"):
        return b.call(node, m.Largest(*along), b.call(node, m.Abs(), x), kind="norm")
    if order not in (1, 2):
        raise b.unsupported(node, f"a norm of order {order}; 1, 2 and infinity are supported")
    return b.call(node, m.Norm(*along, int(order)), x)


def _of_pair(make: Callable[[int], m.Reduction]) -> Handler:
    """Of two tensors, as a reduction of both, stacked: (along which dimension) -> it."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        pair, rank = (a.self, a.other), b.rank(node)
        if any(b.shape(x) != b.shape(node) or not b.is_data(x) for x in pair):
            raise b.unsupported(node, "of tensors of different shapes, or of a constant")
        columns = [b.call(node, m.Reshape([*b.shape_with_batch(node), 1]), b.operand(node, x)) for x in pair]
        return b.call(node, make(rank), join(b, node, rank, columns, pair))

    return handler


def _cdist(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """The norms of all differences of rows: (…, P, C), (…, R, C) -> (…, P, R)."""
    first, second = (_unsqueezed(b, node, x, at) for x, at in ((a.x1, -2), (a.x2, -3)))
    difference = b.call(node, m.Sub(), first, second)
    if a.p not in (1, 2):
        raise b.unsupported(node, f"distances of order {a.p}; 1 and 2 are supported")
    return b.call(node, m.Norm([b.rank(node)], False, int(a.p)), difference)


def _pairwise_distance(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """The norm of the differences along the last dimension, a small number added to each."""
    if a.p not in (1, 2):
        raise b.unsupported(node, f"distances of order {a.p}; 1 and 2 are supported")
    difference = b.call(node, m.Sub(), b.operand(node, a.x1), b.operand(node, a.x2))
    shifted = b.call(node, m.Scale(1.0, float(a.eps)), difference)
    return b.call(node, m.Norm([b.rank(a.x1) - 1], bool(a.keepdim), int(a.p)), shifted)


def _unsqueezed(b: Builder, node: fx.Node, x: fx.Node, at: int) -> fx.Node:
    if not b.is_data(x):
        return b.hold(node, b.tensor(node, x).unsqueeze(at))
    shape = b.open_shape(x)
    shape.insert(len(shape) + 1 + at, 1)
    return b.call(node, m.Reshape(shape), b.operand(node, x))


def _extreme(of_one: type[m.Reduction], of_two: type[nn.Module]) -> Handler:
    """max and min: of two tensors; along a dimension, with its places; or of everything."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node | Parts:
        if hasattr(a, "other"):
            return b.call(node, of_two(), b.tensor_or_number(node, a.self), b.tensor_or_number(node, a.other))
        dims, keepdim = reduced(b, node, a)
        if not hasattr(a, "dim"):
            return b.call(node, of_one(dims, keepdim), b.operand(node, a.self))

        def part(user: fx.Node, index: int) -> fx.Node:
            x = b.operand(user, a.self)
            if index == 0:
                return b.call(user, of_one(dims, keepdim), x)
            return b.call(user, m.ArgMax(dims[0], keepdim), x if of_one is m.Largest else _negated(b, user, x))

        return part

    return handler


def _negated(b: Builder, node: fx.Node, x: fx.Node) -> fx.Node:
    return b.call(node, m.Scale(-1.0), x)


def _arg(sign: int) -> Handler:
    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        if a.dim is None:
            raise b.unsupported(node, "the place of the largest value of all; name a dimension")
        (dim,) = dimensions(b, node, a)
        x = b.operand(node, a.self)
        return b.call(node, m.ArgMax(dim, bool(a.keepdim)), x if sign > 0 else _negated(b, node, x))

    return handler


def _topk(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
    dim = int(a.dim) % b.rank(a.self)

    def part(user: fx.Node, index: int) -> fx.Node:
        if b.free(a.self)[dim] or not a.sorted:
            raise b.unsupported(user, "topk(): of the batch, or unsorted values")
        return b.call(user, (m.Places if index else m.TopK)(int(a.k), dim, bool(a.largest)), b.operand(user, a.self))

    return part


def _sort(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
    dim = int(a.dim) % b.rank(a.self)

    def part(user: fx.Node, index: int) -> fx.Node:
        if b.free(a.self)[dim]:
            raise b.unsupported(user, "sort() along the batch")
        module = (m.Places if index else m.TopK)(b.shape(a.self)[dim], dim, bool(a.descending))
        return b.call(user, module, b.operand(user, a.self), kind="sort")

    return part


def _ranked(place: Callable[[int, SimpleNamespace], int]) -> Handler:
    """Along a dimension, one of the values in ascending order: (how many, arguments) -> which, from 1 on."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
        (dim,) = dimensions(b, node, a)
        k = place(b.shape(a.self)[dim], a)

        def part(user: fx.Node, index: int) -> fx.Node:
            if index:
                raise b.unsupported(user, "the place of a value; its value alone is supported")
            least = b.call(user, m.TopK(k, dim, largest=False), b.operand(user, a.self))
            last = b.call(user, m.Slice([(dim, k - 1, k, 1)]), least)
            shape = b.open_shape(a.self)
            return last if a.keepdim else b.call(user, m.Reshape([*shape[:dim], *shape[dim + 1 :]]), last)

        return part

    return handler


def _cumprod(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Products of everything in front, one behind the other."""
    (dim,) = dimensions(b, node, a)
    parts = [cut(b, node, a.self, dim, i, i + 1) for i in range(b.shape(a.self)[dim])]
    for i, factor in enumerate(parts[1:]):
        parts[i + 1] = b.call(node, m.Mul(), parts[i], factor)
    return join(b, node, dim, parts, [a.self] * len(parts))


ROWS: dict[str, Handler] = {
    "mean": _reduction(m.Mean, "mean"),
    "sum": _reduction(m.Sum),
    "amax": _reduction(m.Largest), "amin": _reduction(m.Least),
    "any": _reduction(m.Largest, truths=True), "all": _reduction(m.Least, truths=True),
    "max": _extreme(m.Largest, m.Maximum), "min": _extreme(m.Least, m.Minimum),
    "maximum": _extreme(m.Largest, m.Maximum), "minimum": _extreme(m.Least, m.Minimum),
    "fmax": _extreme(m.Largest, m.Maximum), "fmin": _extreme(m.Least, m.Minimum),
    "var": _spread(root=False), "std": _spread(root=True),
    "linalg_vector_norm": _norm, "norm": _norm, "cdist": _cdist, "pairwise_distance": _pairwise_distance,
    "logsumexp": _reduction(m.LogSumExp), "prod": _reduction(m.Product),
    "argmax": _arg(1), "argmin": _arg(-1), "topk": _topk,
    "cumsum": lambda b, node, a: b.call(node, m.CumSum(*dimensions(b, node, a)), b.operand(node, a.self)),
    "sort": _sort, "argsort": lambda b, node, a: _sort(b, node, a)(node, 1),
    "median": _ranked(lambda n, a: (n + 1) // 2), "kthvalue": _ranked(lambda n, a: int(a.k)),
    "cumprod": _cumprod,
    "hypot": _of_pair(lambda rank: m.Norm([rank], False, 2)),
    "logaddexp": _of_pair(lambda rank: m.LogSumExp([rank], False)),
}  # fmt: skip
