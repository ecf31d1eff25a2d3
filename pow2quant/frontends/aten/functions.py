"""Functions of one tensor: activations, clipping, softmax, means; and operations that do nothing in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler


def _input(a: SimpleNamespace) -> Any:
    """The first operand, which schemas call `self` or `input`."""
    return getattr(a, "self", None) if hasattr(a, "self") else a.input


def _unary(make: Callable[[SimpleNamespace], nn.Module], kind: str | None = None) -> Handler:
    return lambda b, node, a: b.call(node, make(a), b.operand(node, _input(a)), kind=kind)


def _same(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    return b.operand(node, _input(a))


def _cast(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """A change of type or device; the network computes in float32 everywhere."""
    if not node.meta["val"].is_floating_point():
        raise b.unsupported(node, f"a cast to {node.meta['val'].dtype}")
    return b.operand(node, _input(a))


def _clamp(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    low, high = (b.number(getattr(a, k, None)) for k in ("min", "max"))
    for bound in (getattr(a, "min", None), getattr(a, "max", None)):
        if bound is not None and b.number(bound) is None:
            raise b.unsupported(node, "clamp() with bounds that are no numbers")
    if low == 0 and high is None:
        return b.call(node, nn.ReLU(), b.operand(node, a.self))
    if low is None or high is None:
        raise b.unsupported(node, "clamp() needs both bounds (or min=0)")
    return b.call(node, nn.Hardtanh(low, high), b.operand(node, a.self), kind="clamp")


def _hardtanh(a: SimpleNamespace) -> nn.Module:
    low, high = float(a.min_val), float(a.max_val)
    return nn.ReLU6() if (low, high) == (0.0, 6.0) else nn.Hardtanh(low, high)


def _elu(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    if a.scale != 1 or a.input_scale != 1:
        raise b.unsupported(node, "elu() with a scale")
    return b.call(node, nn.ELU(float(a.alpha)), b.operand(node, a.self))


def _mean(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    rank = b.rank(a.self)
    dims = getattr(a, "dim", None)
    dims = sorted(int(d) % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank)))
    if any(b.free(a.self)[d] for d in dims):
        raise b.unsupported(node, "a mean over the batch")
    return b.call(node, m.Mean(dims, bool(getattr(a, "keepdim", False))), b.operand(node, a.self), kind="mean")


ROWS: dict[str, Handler] = {
    "relu": _unary(lambda a: nn.ReLU()),
    "relu6": _unary(lambda a: nn.ReLU6()),
    "hardtanh": _unary(_hardtanh),
    "sigmoid": _unary(lambda a: nn.Sigmoid()),
    "tanh": _unary(lambda a: nn.Tanh()),
    "hardsigmoid": _unary(lambda a: nn.Hardsigmoid()),
    "hardswish": _unary(lambda a: nn.Hardswish()),
    "silu": _unary(lambda a: nn.SiLU()),
    "gelu": _unary(lambda a: nn.GELU(a.approximate)),
    "leaky_relu": _unary(lambda a: nn.LeakyReLU(float(a.negative_slope))),
    "elu": _elu,
    "softmax": _unary(lambda a: nn.Softmax(int(a.dim))),
    "_softmax": _unary(lambda a: nn.Softmax(int(a.dim))),
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp, "clip": _clamp,
    "mean": _mean,
    **dict.fromkeys(("to", "type_as", "_to_copy"), _cast),
    **dict.fromkeys(
        (
            *("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout"),
            *("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "view_as_real_copy", "positive"),
        ),
        _same,
    ),
}  # fmt: skip
