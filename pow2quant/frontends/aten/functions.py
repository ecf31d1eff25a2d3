"""Functions of one tensor, and operations that do nothing in eval mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler


def given(a: SimpleNamespace) -> Any:
    """The first operand, which schemas call `self` or `input`."""
    return getattr(a, "self", None) if hasattr(a, "self") else a.input


def unary(make: Callable[[SimpleNamespace], nn.Module]) -> Handler:
    """A row of a function of one tensor."""
    return lambda b, node, a: b.call(node, make(a), b.real(node, given(a)))


def of_operands(make: Callable[[], nn.Module], *names: str) -> Handler:
    """A row of an operation of these operands, and nothing else."""
    return lambda b, node, a: b.call(node, make(), *(b.real(node, getattr(a, name)) for name in names))


def _same(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    return b.operand(node, given(a))


def _dropout(kind: type[nn.Module]) -> Handler:
    """It does nothing in eval mode; the builder keeps it for those who train, as the user's module where it is one."""

    def row(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        users = b.module(node)
        b.drop_out(node, copy.copy(users) if isinstance(users, _DropoutNd) else kind(float(a.p)))
        return b.operand(node, given(a))

    return row


def _cast(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """A change of type or device; the network computes in float32 everywhere, and counts in whatever integers."""
    x = given(a)
    before, after = (n.meta["val"].dtype for n in (x, node))
    if after == torch.bool != before:
        different = m.CompareIntegers("NotEqual", torch.tensor(0)) if b.counts(x) else m.Compare("NotEqual", 0.0)
        return b.call(node, different, b.operand(node, x), kind="compare")
    if before.is_floating_point and not after.is_floating_point:
        raise b.unsupported(node, f"a cast to {after}")
    if after.is_floating_point and b.counts(x):
        return b.call(node, m.Real(), b.operand(node, x))
    return b.operand(node, x)


def _clamp(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    bounds = [getattr(a, k, None) for k in ("min", "max")]
    low, high = (b.number(bound) for bound in bounds)
    x = b.operand(node, a.self)
    if any(bound is not None and b.number(bound) is None for bound in bounds):
        for bound, module in zip(bounds, (m.Maximum(), m.Minimum()), strict=True):
            x = x if bound is None else b.call(node, module, x, b.tensor_or_number(node, bound))
        return x
    if low == 0 and high is None:
        return b.call(node, nn.ReLU(), x)
    if low is not None and high is not None and low <= 0 <= high:
        return b.call(node, nn.Hardtanh(low, high), x, kind="clamp")
    return b.call(node, m.Clamp(low, high), x)


def _hardtanh(a: SimpleNamespace) -> nn.Module:
    low, high = float(a.min_val), float(a.max_val)
    if not low <= 0 <= high:
        return m.Clamp(low, high)
    return nn.ReLU6() if (low, high) == (0.0, 6.0) else nn.Hardtanh(low, high)


def _elu(a: SimpleNamespace) -> nn.Module:
    """scale * (x where positive, else alpha * (exp(input_scale * x) - 1))."""
    alpha, scale, width = float(a.alpha), float(getattr(a, "scale", 1)), float(getattr(a, "input_scale", 1))
    return nn.ELU(alpha) if scale == width == 1 else m.ScaledELU(scale, alpha, 1 / width)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
"""Of Klambauer et al., 2017."""


def _pow(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    base, exponent = b.number(a.self), b.number(a.exponent)
    if base is not None and base > 0:
        return b.call(node, m.Exp(math.log(base)), b.operand(node, a.exponent))
    if exponent is None:
        raise b.unsupported(node, "a power with an exponent that is computed from the inputs")
    x = b.operand(node, a.self)
    if exponent in (1, 2):
        return x if exponent == 1 else b.call(node, m.Mul(), x, x)
    known: dict[float, type[nn.Module]] = {0.5: m.Sqrt, -0.5: m.Rsqrt, -1.0: m.Reciprocal}
    return b.call(node, known[exponent]() if exponent in known else m.Pow(exponent), x, kind="pow")


def _by_number(make: Callable[[float], nn.Module], what: str) -> Handler:
    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        number = b.number(a.other)
        if number is None:
            raise b.unsupported(node, f"{what} by a tensor")
        return b.call(node, make(number), b.operand(node, a.self))

    return handler


def _nan_to_num(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Nothing, as what is quantized is finite."""
    if a.posinf is not None or a.neginf is not None:
        raise b.unsupported(
            node, "nan_to_num() of infinite values; keep them finite, for a mask by -1e4 in place of -inf"
        )
    return b.operand(node, a.self)


def _round(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """To so many decimals, none by default."""
    x, unit = b.operand(node, a.self), 10.0 ** getattr(a, "decimals", 0)
    if unit == 1:
        return b.call(node, m.Round(), x)
    whole = b.call(node, m.Round(), b.call(node, m.Scale(unit), x))
    return b.call(node, m.Scale(1 / unit), whole)


def _glu(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """The first half times the sigmoid of the second."""
    dim = int(a.dim) % b.rank(a.self)
    half = b.shape(a.self)[dim] // 2
    x = b.operand(node, a.self)
    front, back = (b.call(node, m.Slice([(dim, at, at + half, 1)]), x, kind="part") for at in (0, half))
    return b.call(node, m.Mul(), front, b.call(node, nn.Sigmoid(), back, kind="gate"))


ROWS: dict[str, Handler] = {
    "relu": unary(lambda a: nn.ReLU()),
    "relu6": unary(lambda a: nn.ReLU6()),
    "hardtanh": unary(_hardtanh),
    "sigmoid": unary(lambda a: nn.Sigmoid()),
    "tanh": unary(lambda a: nn.Tanh()),
    "hardsigmoid": unary(lambda a: nn.Hardsigmoid()),
    "hardswish": unary(lambda a: nn.Hardswish()),
    "silu": unary(lambda a: nn.SiLU()),
    "gelu": unary(lambda a: nn.GELU(a.approximate)),
    "leaky_relu": unary(lambda a: nn.LeakyReLU(float(a.negative_slope))),
    "rrelu": unary(lambda a: nn.LeakyReLU((float(a.lower) + float(a.upper)) / 2)),
    "elu": unary(_elu),
    "celu": unary(lambda a: m.ScaledELU(1.0, float(a.alpha), float(a.alpha))),
    "selu": unary(lambda a: m.ScaledELU(SELU_SCALE, SELU_ALPHA)),
    "mish": unary(lambda a: nn.Mish()),
    "softplus": unary(lambda a: m.Softplus(float(a.beta))),
    "log_sigmoid": unary(lambda a: nn.LogSigmoid()),
    "softshrink": unary(lambda a: m.Softshrink(float(a.lambd))),
    "hardshrink": unary(lambda a: m.Threshold(float(a.lambd), 0.0, magnitude=True)),
    "threshold": unary(lambda a: m.Threshold(float(a.threshold), float(a.value))),
    "glu": _glu,
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp, "clip": _clamp,
    "abs": unary(lambda a: m.Abs()), "absolute": unary(lambda a: m.Abs()),
    "sqrt": unary(lambda a: m.Sqrt()),
    "rsqrt": unary(lambda a: m.Rsqrt()),
    "reciprocal": unary(lambda a: m.Reciprocal()),
    "exp": unary(lambda a: m.Exp()),
    "exp2": unary(lambda a: m.Exp(math.log(2))),
    "log": unary(lambda a: m.Log()),
    "log1p": unary(lambda a: m.Log(offset=1.0)),
    "log2": unary(lambda a: m.Log(1 / math.log(2))),
    "log10": unary(lambda a: m.Log(1 / math.log(10))),
    "expm1": unary(lambda a: m.Expm1()),
    "tan": unary(lambda a: m.Tan()), "atan": unary(lambda a: m.Atan()), "arctan": unary(lambda a: m.Atan()),
    "sinh": unary(lambda a: m.Sinh()), "cosh": unary(lambda a: m.Cosh()),
    "asinh": unary(lambda a: m.Asinh()), "arcsinh": unary(lambda a: m.Asinh()),
    "sin": unary(lambda a: m.Sin()), "cos": unary(lambda a: m.Cos()), "erf": unary(lambda a: m.Erf()),
    "sign": unary(lambda a: m.Sign()), "sgn": unary(lambda a: m.Sign()),
    "floor": unary(lambda a: m.Floor()), "ceil": unary(lambda a: m.Ceil()), "round": _round,
    "trunc": unary(lambda a: m.Trunc()), "fix": unary(lambda a: m.Trunc()), "frac": unary(lambda a: m.Fmod(1.0)),
    "pow": _pow,
    "fmod": _by_number(m.Fmod, "a remainder of a division"),
    "remainder": _by_number(m.Remainder, "a remainder of a division"),
    "floor_divide": _by_number(m.FloorDivide, "a division that is rounded down"),
    **dict.fromkeys(("to", "type_as", "_to_copy"), _cast),
    "nan_to_num": _nan_to_num,
    "dropout": _dropout(nn.Dropout),
    "alpha_dropout": _dropout(nn.AlphaDropout),
    "feature_dropout": _dropout(nn.Dropout2d),
    "feature_alpha_dropout": _dropout(nn.FeatureAlphaDropout),
    **dict.fromkeys(
        (
            *("native_dropout", "contiguous", "clone", "detach", "alias", "lift_fresh_copy"),
            *("view_as_real_copy", "positive"),
        ),
        _same,
    ),
}  # fmt: skip
