"""Operations that move values: reshape, permute, slice, join, pad."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.indexing import bordered
from pow2quant.frontends.aten.layers import numbers
from pow2quant.frontends.builder import Builder, Handler, Parts


def _reshape(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Whatever the arguments are, the result's shape says it all."""
    if b.shape(node) == b.shape(a.self):
        return b.operand(node, a.self)
    shape = b.shape_with_batch(node)
    flat = len(shape) == 2 and shape[0] == -1 and b.rank(a.self) > 1
    module = nn.Flatten(1) if flat and b.shape(a.self)[0] == b.shape(node)[0] else m.Reshape(shape)
    return b.call(node, module, b.operand(node, a.self), kind="flatten" if flat else "reshape")


def permuted(b: Builder, node: fx.Node, x: fx.Node, order: Sequence[int]) -> fx.Node:
    """x with its dimensions in this order; x itself where it has them so."""
    return x if list(order) == sorted(order) else b.call(node, m.Permute(order), x)


def _permute(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    return permuted(b, node, b.operand(node, a.self), [int(d) % b.rank(a.self) for d in a.dims])


def _transpose(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    i, j = (int(getattr(a, names[0], getattr(a, names[1], 0))) for names in (("dim0", "axis0"), ("dim1", "axis1")))
    dims = list(range(b.rank(a.self)))
    dims[i], dims[j] = dims[j], dims[i]
    return permuted(b, node, b.operand(node, a.self), dims)


def _movedim(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    rank = b.rank(a.self)
    sources, targets = ([int(d) % rank for d in numbers(v, 1)] for v in (a.source, a.destination))
    order = [d for d in range(rank) if d not in sources]
    for target, source in sorted(zip(targets, sources, strict=True)):
        order.insert(target, source)
    return permuted(b, node, b.operand(node, a.self), order)


def _matrix_transposed(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    rank = b.rank(a.self)
    return b.call(node, m.Permute((*range(rank - 2), rank - 1, rank - 2)), b.operand(node, a.self))


def _reversed(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    return permuted(b, node, b.operand(node, a.self), range(b.rank(a.self))[::-1])


def cut(b: Builder, node: fx.Node, x: Any, dim: int, start: int, stop: int, step: int = 1) -> fx.Node:
    """x[…, start:stop:step, …] along `dim`; all of the batch, or an error."""
    dim %= b.rank(x)
    size = b.shape(x)[dim]
    start, stop, step = slice(start, stop, step).indices(size)
    if (start, stop, step) == (0, size, 1):
        return b.operand(node, x)
    if b.free(x)[dim]:
        raise b.unsupported(node, "slicing along the batch")
    return b.call(node, m.Slice([(dim, start, stop, step)]), b.operand(node, x))


def _slice(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    start, stop = 0 if a.start is None else int(a.start), 2**62 if a.end is None else int(a.end)
    return cut(b, node, a.self, int(a.dim), start, stop, int(a.step))


def one(b: Builder, node: fx.Node, x: Any, dim: int, index: int) -> fx.Node:
    """x[…, index, …]: without the dimension."""
    dim %= b.rank(x)
    if b.free(x)[dim]:
        raise b.unsupported(node, "one element of the batch")
    index %= b.shape(x)[dim]
    current = cut(b, node, x, dim, index, index + 1)
    shape = b.open_shape(x)
    return b.call(node, m.Reshape([*shape[:dim], *shape[dim + 1 :]]), current)


def _split(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
    """chunk, split, split_with_sizes: where each part begins follows from the results' shapes."""
    dim = int(a.dim) % b.rank(a.self)
    sizes = [int(part.shape[dim]) for part in node.meta["val"]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if b.free(a.self)[dim]:
        raise b.unsupported(node, "splitting along the batch")
    return lambda user, index: cut(b, user, a.self, dim, starts[index], starts[index] + sizes[index])


def _concat(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    dim = int(a.dim) % b.rank(node)
    parts = [p for p in a.tensors if b.rank(p) == b.rank(node)]
    if b.free(node)[dim]:
        raise b.unsupported(node, "joining along the batch")
    return join(b, node, dim, [b.real(node, p) for p in parts], parts)


def _along(dim: int) -> Handler:
    """hstack and the like: a concatenation along a dimension, the first one for vectors."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        return _concat(b, node, SimpleNamespace(tensors=a.tensors, dim=dim if b.rank(node) > 1 else 0))

    return handler


def join(b: Builder, node: fx.Node, dim: int, operands: Sequence[fx.Node], captured: Sequence[Any]) -> fx.Node:
    """Concatenation; constants among the operands are repeated along the batch."""
    data = next(o for o, p in zip(operands, captured, strict=True) if b.is_data(p))
    whole = [
        o if b.is_data(p) else b.call(node, m.Expand(b.free(node).index(True)), o, data)
        for o, p in zip(operands, captured, strict=True)
    ]
    return whole[0] if len(whole) == 1 else b.call(node, m.Concat(dim), *whole)


def _stack(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    dim = int(a.dim) % b.rank(node)
    shape = list(b.shape_with_batch(node))
    shape[dim] = 1
    operands = [b.call(node, m.Reshape(shape), b.real(node, p)) for p in a.tensors]
    return join(b, node, dim, operands, a.tensors)


def _scatter(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """A slice that is overwritten: what lies in front of it, the new values, what lies behind it."""
    dim = int(a.dim) % b.rank(a.self)
    if hasattr(a, "index"):
        start, step = int(a.index) % b.shape(a.self)[dim], 1
        stop = start + 1
    else:
        size = b.shape(a.self)[dim]
        start, stop, step = slice(a.start, a.end, int(a.step)).indices(size)
    if (start, stop, step) == (0, b.shape(a.self)[dim], 1) and not hasattr(a, "index"):
        return b.operand(node, a.src)
    if b.free(a.self)[dim]:
        raise b.unsupported(node, "overwriting along the batch")
    if step != 1:
        size, written = b.shape(a.self)[dim], list(range(start, stop, step))
        both = join(b, node, dim, [b.real(node, a.self), b.real(node, a.src)], [a.self, a.src])
        places = [size + written.index(i) if i in written else i for i in range(size)]
        return b.call(node, m.Take(dim, places), both)
    new, captured = b.operand(node, a.src), a.src
    if hasattr(a, "index"):
        shape = list(b.shape_with_batch(node))
        shape[dim] = 1
        new = b.call(node, m.Reshape(shape), new)
    front = [(cut(b, node, a.self, dim, 0, start), a.self)] if start else []
    back = [(cut(b, node, a.self, dim, stop, b.shape(a.self)[dim]), a.self)] if stop < b.shape(a.self)[dim] else []
    operands, sources = zip(*front, (new, captured), *back, strict=True)
    return join(b, node, dim, operands, sources)


def _copy(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """The new values of something that is overwritten."""
    if b.shape(a.src) != b.shape(a.self):
        raise b.unsupported(node, f"overwriting {b.shape(a.self)} with {b.shape(a.src)}")
    return b.operand(node, a.src)


def _pad(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    value = getattr(a, "value", 0)
    mode = getattr(a, "mode", "constant")
    pads = [int(p) for p in a.pad]
    if not any(pads):
        return b.operand(node, a.self)
    x = b.operand(node, a.self)
    if mode != "constant":
        return bordered(b, node, x, b.shape(a.self), pads, mode)
    number = 0.0 if value is None else b.number(value)
    if number is None:
        raise b.unsupported(node, "padding with a value that is computed from the inputs")
    return b.call(node, m.ConstantPad(pads, number) if number else m.ZeroPad(pads), x, kind="pad")


ROWS: dict[str, Handler] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as"),
        _reshape,
    ),
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("t", "numpy_T"), _reversed),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("mT", "adjoint", "mH"), _matrix_transposed),
    "hstack": _along(1), "vstack": _along(0), "dstack": _along(2),
    "slice": _slice, "select": lambda b, node, a: one(b, node, a.self, int(a.dim), int(a.index)),
    "unbind": lambda b, _, a: lambda user, index: one(b, user, a.self, int(a.dim), index),
    "narrow": lambda b, node, a: cut(b, node, a.self, int(a.dim), int(a.start), int(a.start) + int(a.length)),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _split),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concat),
    "stack": _stack, "copy": _copy,
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scatter),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}  # fmt: skip
