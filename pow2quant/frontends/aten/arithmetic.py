"""Sums, differences, products and quotients of two operands, and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.functions import of_operands, unary
from pow2quant.frontends.aten.layers import linear, of_rows
from pow2quant.frontends.aten.normalization import along_last, normalized
from pow2quant.frontends.aten.products import scaled, times
from pow2quant.frontends.builder import Builder, Handler


def _binary(make: Callable[[], nn.Module], scalar: Callable[[float, bool], nn.Module]) -> Handler:
    """Two tensors; a tensor and a number; or a tensor and one number per channel.

    scalar: (number, whether it is the first operand) -> the function of the other operand.
    """

    def with_number(b: Builder, node: fx.Node, module: nn.Module, number: Any, x: Any) -> fx.Node:
        if isinstance(module, m.Scale):
            module.written = b.is_written(number)
        return b.call(node, module, b.real(node, x))

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        left, right = a.self, a.other
        factor = b.number(getattr(a, "alpha", 1))
        numbers = [b.number(v) for v in (left, right)]
        if numbers[1] is not None and factor is not None and b.is_data(left):
            return with_number(b, node, scalar(numbers[1] * factor, False), right, left)
        if factor != 1:
            scaled = b.call(node, m.Scale(float(factor or 0)), b.real(node, right))
            return b.call(node, make(), b.real(node, left), scaled)
        if numbers[0] is not None and b.is_data(right):
            return with_number(b, node, scalar(numbers[0], True), left, right)
        for value, other in ((right, left), (left, right)):
            affine = _per_channel(b, node, make(), value, other, swapped=value is left)
            if affine is not None:
                kind = make().__class__.__name__.lower()
                return b.call(node, affine, b.real(node, other), kind=kind)
        return b.call(node, make(), b.real(node, left), b.real(node, right))

    return handler


def _per_channel(b: Builder, node: fx.Node, op: nn.Module, value: Any, x: Any, swapped: bool) -> nn.Module | None:
    """x * p or x ± p with one number per channel as a 1x1 depthwise convolution; None where it is something else."""
    if b.is_data(value) or not b.is_data(x) or not isinstance(op, (m.Mul, m.Add, m.Sub)):
        return None
    rank, p = b.rank(x), b.tensor(node, value)
    if rank not in (3, 4, 5) or b.free(x)[1] or p.ndim < rank - 1:
        return None
    channels = b.shape(x)[1]
    if tuple(p.shape[-(rank - 1) :]) != (channels, *[1] * (rank - 2)) or p.numel() != channels:
        return None
    p, one = p.detach().float().flatten(), torch.ones(channels)
    if isinstance(op, m.Mul):
        weight, bias = p, None
    elif isinstance(op, m.Add):
        weight, bias = one, p
    else:
        weight, bias = (-one, p) if swapped else (one, -p)
    return m.depthwise(weight, bias, rank)


_add = _binary(m.Add, lambda c, _: m.Scale(1.0, c))
_sub = _binary(m.Sub, lambda c, swapped: m.Scale(-1.0, c) if swapped else m.Scale(1.0, -c))
_mul = _binary(m.Mul, lambda c, _: m.Scale(c))


def _rsub(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """other - alpha * self."""
    a.self, a.other = a.other, a.self
    number = b.number(a.self)
    if number is not None:
        return b.call(node, m.Scale(-float(a.alpha), number), b.real(node, a.other))
    return _result(_sub(b, node, a))


def _div(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    number = b.number(a.other)
    if getattr(a, "rounding_mode", None) is not None:
        if number is None:
            raise b.unsupported(node, f"a division with rounding_mode={a.rounding_mode!r} by what is no number")
        rounded = m.FloorDivide(number) if a.rounding_mode == "floor" else m.TruncDivide(number)
        return b.call(node, rounded, b.real(node, a.self))
    whole = normalized(b, node, a) if b.is_data(a.other) and b.is_data(a.self) else None
    if whole is not None:
        return along_last(b, node, whole, b.real(node, a.self), b.rank(a.self))
    if number is not None:
        return b.call(node, m.Scale(1.0 / number), b.real(node, a.self))
    if not b.is_data(a.other):
        return b.call(node, m.Mul(), b.real(node, a.self), b.hold(node, 1.0 / b.tensor(node, a.other)))
    if b.number(a.self) is not None:
        return scaled(b, node, b.call(node, m.Reciprocal(), b.real(node, a.other)), b.number(a.self) or 0.0)
    return b.call(node, m.Div(), b.real(node, a.self), b.real(node, a.other))


def _addcmul(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """self + value * tensor1 * tensor2."""
    product = scaled(b, node, _result(_mul(b, node, SimpleNamespace(self=a.tensor1, other=a.tensor2))), a.value)
    return b.call(node, m.Add(), b.real(node, a.self), product)


def _addcdiv(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """self + value * tensor1 / tensor2."""
    quotient = scaled(b, node, _result(_div(b, node, SimpleNamespace(self=a.tensor1, other=a.tensor2))), a.value)
    return b.call(node, m.Add(), b.real(node, a.self), quotient)


def _lerp(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """self + weight * (end - self)."""
    difference = b.call(node, m.Sub(), b.real(node, a.end), b.real(node, a.self))
    share = b.number(a.weight)
    part = (
        b.call(node, m.Mul(), difference, b.real(node, a.weight))
        if share is None
        else scaled(b, node, difference, share)
    )
    return b.call(node, m.Add(), b.real(node, a.self), part)


def _matrix_vector(b: Builder, node: fx.Node, matrix: Any, vector: Any) -> fx.Node:
    """(…, C) @ (C): a linear layer with one output, whose dimension goes."""
    if b.is_data(vector):
        raise b.unsupported(node, "a product with a vector that is computed from the inputs: it has no batch")
    shape = [*b.open_shape(matrix)[:-1], 1]
    column = of_rows(b, node, b.real(node, matrix), shape, b.tensor(node, vector).float()[None])
    return b.call(node, m.Reshape(b.shape_with_batch(node)), column)


def _matmul(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """Of two activations, or of an activation and a matrix of weights, which is a linear layer."""
    other = getattr(a, "other", None) or getattr(a, "mat2", None)
    left = getattr(a, "self", None)
    if not b.is_data(other) and b.rank(other) == 2 and b.rank(left) >= 2:
        return linear(b, node, left, b.tensor(node, other).t().contiguous(), None, None)
    if b.rank(other) == 1 and b.rank(left) >= 2:
        return _matrix_vector(b, node, left, other)
    if b.rank(left) < 2:
        raise b.unsupported(node, "a product of a vector, which has no batch")
    return b.call(node, m.MatMul(), b.real(node, left), b.real(node, other))


def _addmm(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """self + mat1 @ mat2."""
    plain = not b.is_data(a.mat2) and not b.is_data(a.self) and a.alpha == 1 and a.beta == 1
    if plain and (b.rank(a.self) == 1 or b.shape(a.self)[0] == 1):
        weight, offset = b.tensor(node, a.mat2).t().contiguous(), b.tensor(node, a.self).flatten()
        return linear(b, node, a.mat1, weight, offset, None)
    product = b.call(node, m.MatMul(), b.real(node, a.mat1), b.real(node, a.mat2))
    return b.call(node, m.Add(), scaled(b, node, product, a.alpha), times(b, node, a.self, a.beta))


def _result(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


ROWS: dict[str, Handler] = {
    "add": _add, "sub": _sub, "mul": _mul, "multiply": _mul, "rsub": _rsub,
    "neg": unary(lambda a: m.Scale(-1.0)), "square": of_operands(m.Mul, "self", "self"),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    "addcmul": _addcmul, "addcdiv": _addcdiv, "lerp": _lerp,
    "mv": lambda b, node, a: _matrix_vector(b, node, a.self, a.vec),
    "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "addmm": _addmm,
}  # fmt: skip
