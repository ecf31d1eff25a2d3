"""Pooling and interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler


def _pool(module: type[nn.Module], names: Sequence[str]) -> Handler:
    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        values = {n: getattr(a, n, None) for n in names}
        given = {k: _plain(v) for k, v in values.items() if v is not None and v != []}
        return b.call(node, module(**given), b.operand(node, a.self), kind="pool")

    return handler


def _plain(value: Any) -> Any:
    """A list of equal numbers as one number, as PyTorch's modules hold it."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def _adaptive_average(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Global, or one that is a plain pool or a repetition for this input size."""
    given, wanted = b.shape(a.self)[2:], b.shape(node)[2:]
    x = b.operand(node, a.self)
    if given == wanted:
        return x
    if all(w == 1 for w in wanted):
        return b.call(node, m.Mean(range(2, 2 + len(wanted)), keepdim=True), x, kind="pool")
    if all(g % w == 0 for g, w in zip(given, wanted, strict=True)) and len(wanted) <= 2:
        kernel = tuple(g // w for g, w in zip(given, wanted, strict=True))
        pool = nn.AvgPool2d(kernel) if len(kernel) == 2 else nn.AvgPool1d(kernel[0])
        return b.call(node, pool, x, kind="pool")
    if all(w % g == 0 for g, w in zip(given, wanted, strict=True)):
        factors = [w // g for g, w in zip(given, wanted, strict=True)]
        return b.call(node, m.NearestUpsample(factors), x, kind="pool")
    raise b.unsupported(
        node, f"adaptive pooling from {given} to {wanted}: the sizes must divide (choose another input size)"
    )


def _nearest(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    x = getattr(a, "input", None) if hasattr(a, "input") else a.self
    given, wanted = b.shape(x)[2:], b.shape(node)[2:]
    if given == wanted:
        return b.operand(node, x)
    if any(w % g for g, w in zip(given, wanted, strict=True)):
        raise b.unsupported(node, f"interpolation mode='nearest' from {given} to {wanted}; only by whole factors")
    factors = [w // g for g, w in zip(given, wanted, strict=True)]
    return b.call(node, m.NearestUpsample(factors), b.operand(node, x), kind="upsample")


_POOL = ("kernel_size", "stride", "padding")

ROWS: dict[str, Handler] = {
    "max_pool1d": _pool(nn.MaxPool1d, (*_POOL, "dilation", "ceil_mode")),
    "max_pool2d": _pool(nn.MaxPool2d, (*_POOL, "dilation", "ceil_mode")),
    "avg_pool1d": _pool(nn.AvgPool1d, (*_POOL, "ceil_mode", "count_include_pad")),
    "avg_pool2d": _pool(nn.AvgPool2d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
    **{f"adaptive_avg_pool{n}d": _adaptive_average for n in (1, 2, 3)},
    **{f"upsample_nearest{n}d": _nearest for n in (1, 2, 3)},
}
