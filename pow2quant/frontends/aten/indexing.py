"""Operations that take values from constant places: repetitions, turns, borders, indices, shuffles, patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.layers import numbers
from pow2quant.frontends.builder import Builder, Handler, Parts
from pow2quant.frontends.modules.weighted import convolution


def take(b: Builder, node: fx.Node, x: fx.Node, dim: int, places: Sequence[int], size: int) -> fx.Node:
    """x at these places along `dim`, of so many; x itself where that is all of it in order."""
    return x if list(places) == list(range(size)) else b.call(node, m.Take(dim, places), x)


def _along(b: Builder, node: fx.Node, x: Any, dim: int) -> tuple[int, int]:
    """A dimension counted from the front, and its size. Raises UnsupportedModelError for the batch."""
    dim %= b.rank(x)
    if b.free(x)[dim]:
        raise b.unsupported(node, "places along the batch")
    return dim, b.shape(x)[dim]


def bordered(b: Builder, node: fx.Node, x: fx.Node, shape: Sequence[int], pads: Sequence[int], mode: str) -> fx.Node:
    """Borders that repeat, mirror or continue what is inside; pads: last dimension first."""
    for i in range(len(pads) // 2):
        dim, before, after = len(shape) - 1 - i, pads[2 * i], pads[2 * i + 1]
        if not (before or after):
            continue
        size = shape[dim]
        row = torch.arange(size, dtype=torch.float32)[None, None]
        places = torch.nn.functional.pad(row, (before, after), mode=mode)[0, 0].long().tolist()
        x = take(b, node, x, dim, places, size)
    return x


def _border(mode: str) -> Handler:
    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        return bordered(b, node, b.operand(node, a.self), b.shape(a.self), [int(p) for p in a.padding], mode)

    return handler


def _flip(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    x = b.operand(node, a.self)
    for d in a.dims if isinstance(a.dims, (list, tuple)) else [a.dims]:
        dim, size = _along(b, node, a.self, int(d))
        x = take(b, node, x, dim, range(size)[::-1], size)
    return x


def _roll(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    if not a.dims:
        raise b.unsupported(node, "roll() without dimensions")
    x = b.operand(node, a.self)
    for shift, d in zip(numbers(a.shifts, 1), numbers(a.dims, 1), strict=True):
        dim, size = _along(b, node, a.self, d)
        x = take(b, node, x, dim, [(i - shift) % size for i in range(size)], size)
    return x


def _index_select(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    dim, size = _along(b, node, a.self, int(a.dim))
    places = [int(i) % size for i in b.tensor(node, a.index).flatten()]
    return take(b, node, b.operand(node, a.self), dim, places, size)


def _index(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """x[:, i, j]: constant indices of neighbouring dimensions, as one index of both."""
    held = [d for d, index in enumerate(a.indices) if index is not None]
    if any(b.is_data(a.indices[d]) for d in held) or held != list(range(held[0], held[-1] + 1)):
        raise b.unsupported(node, "indices that are computed from the inputs, or of dimensions that are not neighbours")
    tensors = [b.tensor(node, a.indices[d]) for d in held]
    tensors = [p for t in tensors for p in (t.nonzero(as_tuple=True) if t.dtype == torch.bool else (t,))]
    dims = list(range(held[0], held[0] + len(tensors)))
    for d in dims:
        _along(b, node, a.self, d)
    sizes = [b.shape(a.self)[d] for d in dims]
    linear = torch.zeros((), dtype=torch.int64)
    for t, size in zip(torch.broadcast_tensors(*tensors), sizes, strict=True):
        linear = linear * size + t % size
    x, shape = b.operand(node, a.self), b.open_shape(a.self)
    if len(dims) > 1:
        x = b.call(node, m.Reshape([*shape[: dims[0]], math.prod(sizes), *shape[dims[-1] + 1 :]]), x)
    x = take(b, node, x, dims[0], linear.flatten().tolist(), math.prod(sizes))
    return x if linear.ndim == 1 else b.call(node, m.Reshape(b.shape_with_batch(node)), x)


def _gather(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Constant places of each row: of the flat image where they are not the same for all."""
    dim, _ = _along(b, node, a.self, int(a.dim))
    if not (b.free(node)[0] and not any(b.free(node)[1:])):
        raise b.unsupported(node, "gather() with indices that do not grow with the batch")
    index = b.tensor(node, a.index)[:1].expand(1, *b.shape(node)[1:])
    places = torch.arange(math.prod(b.shape(a.self)[1:])).reshape(1, *b.shape(a.self)[1:])
    flat = places.gather(dim, index).flatten().tolist() if dim else []
    x = b.call(node, m.Reshape((-1, places.numel())), b.operand(node, a.self))
    return b.call(node, m.Reshape(b.shape_with_batch(node)), b.call(node, m.Take(1, flat), x))


def _repeat(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """repeat, tile: the whole, so often along each dimension."""
    times = [int(r) for r in (a.repeats if hasattr(a, "repeats") else a.dims)]
    rank, x = max(len(times), b.rank(a.self)), b.operand(node, a.self)
    times = [1] * (rank - len(times)) + times
    shape = [1] * (rank - b.rank(a.self)) + list(b.shape(a.self))
    if rank > b.rank(a.self):
        raise b.unsupported(node, "repetitions that add dimensions")
    for dim, (count, size) in enumerate(zip(times, shape, strict=True)):
        if count != 1:
            _along(b, node, a.self, dim)
            x = take(b, node, x, dim, list(range(size)) * count, size)
    return x


def _repeat_interleave(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    if not isinstance(a.repeats, int) or a.dim is None:
        raise b.unsupported(node, "repeat_interleave() with several counts, or without a dimension")
    dim, size = _along(b, node, a.self, int(a.dim))
    return take(b, node, b.operand(node, a.self), dim, [i for i in range(size) for _ in range(a.repeats)], size)


def expand(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Dimensions of one are repeated; new ones in front of a tensor with a batch are not possible."""
    before, after = b.shape(a.self), b.shape(node)
    x = b.operand(node, a.self)
    if len(before) < len(after):
        raise b.unsupported(node, f"expanding {before} to {after}")
    for dim, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            x = take(b, node, x, dim, [0] * new, old)
    return x


def _broadcast_tensors(b: Builder, _: fx.Node, a: SimpleNamespace) -> Parts:
    def part(user: fx.Node, index: int) -> fx.Node:
        one = a.tensors[index]
        if b.is_data(one):
            return expand(b, user, SimpleNamespace(self=one))
        sizes = [1 if free else d for d, free in zip(b.shape(user), b.free(user), strict=True)]
        held = b.hold(user, b.tensor(user, one).expand(sizes))
        data = next(x for x in a.tensors if b.is_data(x) and b.rank(x) == len(sizes))
        return b.call(user, m.Expand(b.free(user).index(True)), held, b.operand(user, data))

    return part


def _shuffled(b: Builder, node: fx.Node, x: Any, split: Sequence[int], order: Sequence[int]) -> fx.Node:
    """Splits dimensions, exchanges them, and joins them to the result's shape."""
    parts = b.call(node, m.Reshape((-1, *split)), b.operand(node, x))
    return b.call(node, m.Reshape(b.shape_with_batch(node)), b.call(node, m.Permute(order), parts))


def _pixel_shuffle(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    r, (_, c, h, w) = int(a.upscale_factor), b.shape(a.self)
    return _shuffled(b, node, a.self, (c // r**2, r, r, h, w), (0, 1, 4, 2, 5, 3))


def _pixel_unshuffle(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    r, (_, c, h, w) = int(a.downscale_factor), b.shape(a.self)
    return _shuffled(b, node, a.self, (c, h // r, r, w // r, r), (0, 1, 3, 5, 2, 4))


def _channel_shuffle(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    groups, (_, c, *rest) = int(a.groups), b.shape(a.self)
    return _shuffled(b, node, a.self, (groups, c // groups, *rest), (0, 2, 1, *range(3, 3 + len(rest))))


def _patches(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """im2col: (N, C, H, W) -> (N, C * kernel, places)."""
    kernel, dilation, padding, stride = (numbers(v, 2) for v in (a.kernel_size, a.dilation, a.padding, a.stride))
    x, (_, channels, *sizes) = b.operand(node, a.self), b.shape(a.self)
    if any(padding):
        x = b.call(node, m.ZeroPad((padding[1], padding[1], padding[0], padding[0])), x, kind="pad")
    counts = []
    for i in range(2):
        size = sizes[i] + 2 * padding[i]
        count = (size - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        places = [k * dilation[i] + j * stride[i] for k in range(kernel[i]) for j in range(count)]
        x = take(b, node, x, i + 2, places, size)
        counts.append(count)
    split = b.call(node, m.Reshape((-1, channels, kernel[0], counts[0], kernel[1], counts[1])), x)
    return b.call(node, m.Reshape(b.shape_with_batch(node)), b.call(node, m.Permute((0, 1, 2, 4, 3, 5)), split))


def _folded(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """col2im: (N, C * kernel, places) -> (N, C, H, W), sums where patches overlap: a transposed convolution."""
    kernel, dilation, padding, stride = (numbers(v, 2) for v in (a.kernel_size, a.dilation, a.padding, a.stride))
    if b.rank(a.self) != 3:
        raise b.unsupported(node, "fold() without a batch")
    sizes, (_, channels, *_) = numbers(a.output_size, 2), b.shape(node)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    counts = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(sizes, padding, reach, stride, strict=True)]
    x, area = b.operand(node, a.self), math.prod(kernel)
    if kernel == stride and not any(padding) and all(c * k == n for c, k, n in zip(counts, kernel, sizes, strict=True)):
        patches = b.call(node, m.Reshape((-1, channels, *kernel, *counts)), x)
        return b.call(node, m.Reshape(b.shape_with_batch(node)), b.call(node, m.Permute((0, 1, 4, 2, 5, 3)), patches))
    rest = [n - ((c - 1) * s - 2 * p + r) for n, c, s, p, r in zip(sizes, counts, stride, padding, reach, strict=True)]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": tuple(rest)}
    ones = torch.eye(area).reshape(area, 1, *kernel).repeat(channels, 1, 1, 1)
    layer = convolution(torch.nn.Parameter(ones), None, channels, transposed=True, **options)
    return b.call(node, layer, b.call(node, m.Reshape((-1, channels * area, *counts)), x), kind="fold")


def _diagonal(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Of two dimensions, which become the last one."""
    (first, rows), (second, columns) = (_along(b, node, a.self, int(d)) for d in (a.dim1, a.dim2))
    rest, offset = [d for d in range(b.rank(a.self)) if d not in (first, second)], int(a.offset)
    x, shape = b.call(node, m.Permute([*rest, first, second]), b.operand(node, a.self)), b.open_shape(a.self)
    flat = b.call(node, m.Reshape([*(shape[d] for d in rest), rows * columns]), x)
    places = [i * columns + i + offset for i in range(rows) if 0 <= i + offset < columns]
    return b.call(node, m.Take(len(rest), places), flat)


def _unfold(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Windows along one dimension, which become the last one."""
    dim, size = _along(b, node, a.self, int(a.dimension))
    starts = range(0, size - int(a.size) + 1, int(a.step))
    x = take(b, node, b.operand(node, a.self), dim, [s + i for s in starts for i in range(int(a.size))], size)
    shape = b.open_shape(a.self)
    x = b.call(node, m.Reshape([*shape[:dim], len(starts), int(a.size), *shape[dim + 1 :]]), x)
    order = [*range(dim + 1), *range(dim + 2, b.rank(node)), dim + 1]
    return x if order == sorted(order) else b.call(node, m.Permute(order), x)


def _embedding(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    if b.is_data(a.weight):
        raise b.unsupported(node, "an embedding with a weight that is computed from the inputs")
    if not b.counts(a.indices):
        raise b.unsupported(node, "an embedding of places that are computed; make them an input of the network")
    return lookup(b, node, a.weight, b.operand(node, a.indices))


def lookup(b: Builder, node: fx.Node, weight: Any, indices: fx.Node) -> fx.Node:
    """Rows of a weight."""
    held: Tensor = b.parameter(node, weight)
    with torch.device("meta"):
        layer = torch.nn.Embedding(*held.shape)
    layer.weight = held
    return b.call(node, layer, indices, name=b.owner(node, weight))


def _embedding_bag(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
    """Bags of equal length: the sum, mean or largest of an embedding's rows."""
    modes = (m.Sum, m.Mean, m.Largest)

    def bag(user: fx.Node) -> fx.Node:
        starts = b.constants.get(a.offsets)
        count = int(node.meta["val"][0].shape[0])
        length = b.shape(a.indices)[0] // count
        if starts is None or starts.tolist() != [i * length for i in range(count)] or a.per_sample_weights is not None:
            raise b.unsupported(user, "bags of different lengths, or with weights")
        rows = b.call(user, m.Reshape((-1, length)), b.operand(user, a.indices))
        return b.call(user, modes[int(a.mode)]([1], keepdim=False), lookup(b, user, a.weight, rows), kind="bag")

    return lambda user, index: bag(user)


ROWS: dict[str, Handler] = {
    "flip": _flip, "roll": _roll, "index_select": _index_select, "index": _index, "gather": _gather,
    **dict.fromkeys(("repeat", "tile"), _repeat), "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    "broadcast_tensors": _broadcast_tensors,
    "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_unshuffle, "channel_shuffle": _channel_shuffle,
    **{f"reflection_pad{n}d": _border("reflect") for n in (1, 2, 3)},
    **{f"replication_pad{n}d": _border("replicate") for n in (1, 2, 3)},
    "im2col": _patches, "col2im": _folded, "diagonal": _diagonal, "unfold": _unfold,
    "embedding": _embedding, "embedding_bag": _embedding_bag,
}  # fmt: skip
