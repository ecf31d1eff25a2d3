"""Pooling and interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.functions import given
from pow2quant.frontends.aten.layers import numbers, of_rows
from pow2quant.frontends.builder import Builder, Handler, Parts

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

ALONG: dict[int, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    1: (lambda x: x, lambda y: y),
    2: (lambda x: x[..., None].repeat(1, 1, 1, 2), lambda y: y[..., 0]),
    3: (lambda x: x[..., None, None].repeat(1, 1, 1, 2, 2), lambda y: y[..., 0, 0]),
}
"""How a function of so many dimensions is applied along one: in and out of them. (Two places in the others: with one,
PyTorch 2.15 smooths along the wrong dimension.)"""


def _spatial(b: Builder, node: fx.Node, x: Any) -> int:
    """How many dimensions a window has."""
    if b.rank(x) < 3:
        raise b.unsupported(node, "a pool of (N, L), which has no channels; write x.unsqueeze(1) in front of it")
    return b.rank(x) - 2


def _max_pool(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    spatial = _spatial(b, node, a.self)
    options = {k: _plain(v) for k in (*POOL, "dilation", "ceil_mode") if (v := getattr(a, k, None)) not in (None, [])}
    return b.call(node, MAX_POOLS[spatial - 1](**options), b.operand(node, a.self), kind="pool")


def _max_pool_parts(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
    """The same, in operations that give the places as well."""
    return lambda user, index: _only_values(b, user, index, lambda: _max_pool(b, user, a))


def _only_values(b: Builder, node: fx.Node, index: int, values: Callable[[], fx.Node]) -> fx.Node:
    if index:
        raise b.unsupported(node, "the places of the largest values")
    return values()


def _average_pool(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """PyTorch's, or where executors disagree about a window beyond the padding, weighted sums."""
    spatial = _spatial(b, node, a.self)
    names = (*POOL, "ceil_mode", "count_include_pad")
    options = {k: _plain(v) for k in names if (v := getattr(a, k, None)) is not None and v != []}
    override = getattr(a, "divisor_override", None)
    padded = any(numbers(a.padding, spatial)) and a.count_include_pad
    if override is None and not (a.ceil_mode and padded):
        return b.call(node, AVERAGE_POOLS[spatial - 1](**options), b.operand(node, a.self), kind="pool")
    kernel, padding = numbers(a.kernel_size, spatial), numbers(a.padding, spatial)
    stride = numbers(a.stride, spatial) if a.stride else kernel
    if override is not None and a.ceil_mode:
        raise b.unsupported(node, "an average pool with a divisor of its own and ceil_mode")
    include = a.count_include_pad or override is not None
    windows = zip(kernel, stride, padding, strict=True)
    options = {"ceil_mode": bool(a.ceil_mode), "count_include_pad": bool(include)}
    functions = [partial(F.avg_pool1d, kernel_size=k, stride=s, padding=p, **options) for k, s, p in windows]
    module = m.Resample.of(functions, b.shape(a.self)[2:])
    if override is not None:
        module.divisor = module.divisor * override / math.prod(kernel)
    return b.call(node, module, b.operand(node, a.self), kind="pool")


def _plain(value: Any) -> Any:
    """A list of equal numbers as one number, as PyTorch's modules hold it."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def _adaptive_average(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Global, or one that is a plain pool, a repetition, or weighted sums for this input size."""
    given, wanted = b.shape(a.self)[2:], b.shape(node)[2:]
    x = b.operand(node, a.self)
    if given == wanted:
        return x
    if all(w == 1 for w in wanted):
        return b.call(node, m.Mean(range(2, 2 + len(wanted)), keepdim=True), x, kind="pool")
    if all(g % w == 0 for g, w in zip(given, wanted, strict=True)):
        kernel = _plain([g // w for g, w in zip(given, wanted, strict=True)])
        return b.call(node, AVERAGE_POOLS[len(wanted) - 1](kernel), x, kind="pool")
    if all(w % g == 0 for g, w in zip(given, wanted, strict=True)) and len(wanted) < 3:
        factors = [w // g for g, w in zip(given, wanted, strict=True)]
        return b.call(node, m.NearestUpsample(factors), x, kind="pool")
    functions = [partial(F.adaptive_avg_pool1d, output_size=w) for w in wanted]
    return b.call(node, m.Resample.of(functions, given), x, kind="pool")


def _adaptive_max(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
    """Windows of different lengths: their values are repeated until all are equally long."""

    def pool(user: fx.Node) -> fx.Node:
        given, wanted = b.shape(a.self)[2:], tuple(node.meta["val"][0].shape[2:])
        x, kernel = b.operand(user, a.self), []
        for d, (n, count) in enumerate(zip(given, wanted, strict=True)):
            windows = [range(i * n // count, -(-(i + 1) * n // count)) for i in range(count)]
            length = max(map(len, windows))
            places = [w[min(j, len(w) - 1)] for w in windows for j in range(length)]
            x = x if places == list(range(n)) else b.call(user, m.Take(d + 2, places), x)
            kernel.append(length)
        return x if set(kernel) == {1} else b.call(user, MAX_POOLS[len(kernel) - 1](_plain(kernel)), x, kind="pool")

    return lambda user, index: _only_values(b, user, index, lambda: pool(user))


def _nearest(exact: bool) -> Handler:
    """A repetition by whole factors; otherwise places that are taken along each dimension."""
    along = torch.ops.aten._upsample_nearest_exact1d if exact else torch.ops.aten.upsample_nearest1d

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        source = given(a)
        before, after, x = b.shape(source)[2:], b.shape(node)[2:], b.operand(node, source)
        scales = _scales(a, len(before))
        taken = [
            along(torch.arange(n, dtype=torch.float32)[None, None], [size], scale)[0, 0].long().tolist()
            for n, size, scale in zip(before, after, scales, strict=True)
        ]
        repeats = [[i // max(1, s // n) for i in range(s)] for n, s in zip(before, after, strict=True)]
        if taken == repeats and len(before) < 3 and all(s % n == 0 for n, s in zip(before, after, strict=True)):
            factors = [s // n for n, s in zip(before, after, strict=True)]
            return x if set(factors) == {1} else b.call(node, m.NearestUpsample(factors), x, kind="upsample")
        for d, places in enumerate(taken):
            x = x if places == list(range(before[d])) else b.call(node, m.Take(d + 2, places), x, kind="upsample")
        return x

    return handler


def _scales(a: SimpleNamespace, spatial: int) -> list[float | None]:
    """The factors that a call states, for each dimension; None where the sizes tell them."""
    stated = getattr(a, "scale_factors", None)
    if stated is not None:
        return [float(s) for s in stated]
    names = ("scales",) if spatial == 1 else ("scales_d", "scales_h", "scales_w")[-spatial:]
    return [None if (s := getattr(a, name, None)) is None else float(s) for name in names]


def _smooth(operation: Any) -> Handler:
    """Interpolation with weights, dimension by dimension."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        source = given(a)
        before, after = b.shape(source)[2:], b.shape(node)[2:]
        scales, spatial = _scales(a, len(before)), len(before)
        into, out = ALONG[spatial]

        def along(size: int, scale: float | None) -> Callable[[Tensor], Tensor]:
            rest = [2] * (spatial - 1)
            factors = [scale, *([None] * (spatial - 1))]
            return lambda x: out(operation(into(x), [size, *rest], bool(a.align_corners), *factors))

        same = [n == size and scale in (None, 1.0) for n, size, scale in zip(before, after, scales, strict=True)]
        functions = [None if same[d] else along(after[d], scales[d]) for d in range(spatial)]
        x = b.operand(node, source)
        return x if all(same) else b.call(node, m.Resample.of(functions, before), x, kind="upsample")

    return handler


SAMPLED, BORDERS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
"""By PyTorch's numbers."""


def _grid_sample(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """With a constant grid: weighted sums of all places of the map."""
    if b.rank(a.input) != 4:
        raise b.unsupported(node, "grid_sample() in 3-D")
    if b.is_data(a.grid):
        module = m.GridSample(SAMPLED[a.interpolation_mode], BORDERS[a.padding_mode], bool(a.align_corners))
        return b.call(node, module, b.operand(node, a.input), b.operand(node, a.grid))
    _, channels, height, width = b.shape(a.input)
    grid = b.tensor(node, a.grid)[:1].double()

    def sampled(x: Tensor) -> Tensor:
        maps = x.reshape(1, -1, height, width)
        found: Tensor = torch.ops.aten.grid_sampler(maps, grid, a.interpolation_mode, a.padding_mode, a.align_corners)
        return found.reshape(*x.shape[:2], -1)

    flat = b.call(node, m.Reshape((-1, channels, height * width)), b.operand(node, a.input))
    result = b.call(node, m.Resample.of([sampled], [height * width]), flat, kind="sample")
    return b.call(node, m.Reshape(b.shape_with_batch(node)), result)


def _affine_grid(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Places of (N, H, W), each a sum of theta's columns: (N, 2, 3) -> (N, H, W, 2)."""
    if b.rank(a.theta) != 3:
        raise b.unsupported(node, "affine_grid() in 3-D")
    _, height, width, _ = b.shape(node)
    units = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    places = torch.nn.functional.affine_grid(units, [1, 1, height, width], bool(a.align_corners)).reshape(-1, 2)
    weight = torch.cat((places, torch.ones(len(places), 1)), 1)
    found = of_rows(b, node, b.operand(node, a.theta), (-1, 2, height * width), weight)
    return b.call(node, m.Reshape(b.shape_with_batch(node)), b.call(node, m.Permute((0, 2, 1)), found))


POOL: Sequence[str] = ("kernel_size", "stride", "padding")

ROWS: dict[str, Handler] = {
    **{f"max_pool{n}d": _max_pool for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _max_pool_parts for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _average_pool for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": _adaptive_average for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d": _adaptive_average for n in (2, 3)},
    **{f"adaptive_max_pool{n}d": _adaptive_max for n in (1, 2, 3)},
    **{f"upsample_nearest{n}d": _nearest(exact=False) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _nearest(exact=True) for n in (1, 2, 3)},
    "upsample_linear1d": _smooth(torch.ops.aten.upsample_linear1d),
    "upsample_bilinear2d": _smooth(torch.ops.aten.upsample_bilinear2d),
    "upsample_trilinear3d": _smooth(torch.ops.aten.upsample_trilinear3d),
    "upsample_bicubic2d": _smooth(torch.ops.aten.upsample_bicubic2d),
    "_upsample_bilinear2d_aa": _smooth(torch.ops.aten._upsample_bilinear2d_aa),
    "_upsample_bicubic2d_aa": _smooth(torch.ops.aten._upsample_bicubic2d_aa),
    "grid_sampler": _grid_sample,
    "affine_grid_generator": _affine_grid,
}
