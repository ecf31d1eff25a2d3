"""How each ONNX operation without weights is computed by PyTorch: one row each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pow2quant.frontends.aten.functions import SELU_ALPHA, SELU_SCALE
from pow2quant.frontends.onnx import places, recurrent, shapes, windows
from pow2quant.frontends.onnx.step import Row, Step, number, scalar, tensor


def _unary(function: Callable[[Tensor], Tensor]) -> Row:
    return lambda s, x: function(x)


def _binary(function: Callable[[Any, Any], Any]) -> Row:
    """Of two tensors, or a tensor and a number."""

    def row(s: Step, left: Any, right: Any) -> Any:
        left, right = (number(v) for v in (left, right))
        return function(left, right)

    return row


def _compared(function: Callable[[Any, Any], Any]) -> Row:
    return lambda s, left, right: function(tensor(left), number(right))


def _all(function: Callable[[Any, Any], Any]) -> Row:
    """Of any number of tensors, two by two."""
    return lambda s, *x: reduce(function, (tensor(v) for v in x))


def _extreme(clamp: str, function: Callable[[Any, Any], Any]) -> Row:
    """The larger or smaller of tensors; beside a number it is a clamp."""

    def row(s: Step, *given: Any) -> Any:
        operands = sorted((number(v) for v in given), key=lambda v: not isinstance(v, Tensor))
        return reduce(lambda a, b: function(a, b) if isinstance(b, Tensor) else torch.clamp(a, **{clamp: b}), operands)

    return row


def _divide(left: Any, right: Any) -> Any:
    whole = not any(v.is_floating_point() if isinstance(v, Tensor) else isinstance(v, float) for v in (left, right))
    return torch.div(left, right, rounding_mode="trunc") if whole else left / right


def _clip(s: Step, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    least, most = (s.attribute(k) if v is None else number(v) for v, k in ((low, "min"), (high, "max")))
    least = None if least is None or least < -1e30 else least
    most = None if most is None or most > 1e30 else most
    if least is None and most is None:
        return x
    if least == 0 and most in (None, 6.0):
        return F.relu(x) if most is None else F.relu6(x)
    return torch.clamp(x, least, most)


def _selu(s: Step, x: Tensor) -> Tensor:
    alpha, gamma = s.attribute("alpha", SELU_ALPHA), s.attribute("gamma", SELU_SCALE)
    if abs(alpha - SELU_ALPHA) < 1e-6 and abs(gamma - SELU_SCALE) < 1e-6:
        return F.selu(x)
    result: Tensor = torch.ops.aten.elu(x, alpha, gamma)
    return result


def _hard_sigmoid(s: Step, x: Tensor) -> Tensor:
    alpha, beta = s.attribute("alpha", 0.2), s.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Row:
    """Before opset 13, over all dimensions from the axis on."""

    def row(s: Step, x: Tensor) -> Tensor:
        old = s.opset < 13
        axis = s.attribute("axis", 1 if old else -1) % x.ndim
        if not old or math.prod(x.shape[axis + 1 :]) == 1:
            return function(x, axis)
        return function(x.flatten(axis), axis).reshape(x.shape)

    return row


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Row:
    def row(s: Step, x: Tensor, axes: Any = None) -> Tensor:
        given = s.integers("axes", axes)
        if not given and s.attribute("noop_with_empty_axes", 0):
            return x
        dims = sorted(a % x.ndim for a in (given or range(x.ndim)))
        return function(x, dims, bool(s.attribute("keepdims", 1)))

    return row


def _norm(order: int) -> Row:
    return _reduction(lambda x, dims, keep: torch.linalg.vector_norm(x, order, dims, keep))


def _arg(function: Callable[..., Tensor]) -> Row:
    def row(s: Step, x: Tensor) -> Tensor:
        if s.attribute("select_last_index", 0):
            raise s.error("the last of equal values (select_last_index) is not supported")
        return function(x, s.attribute("axis", 0), bool(s.attribute("keepdims", 1)))

    return row


def _topk(s: Step, x: Tensor, k: Any) -> Any:
    count = s.integers("k", k) or [1]
    return torch.topk(x, count[0], s.attribute("axis", -1), bool(s.attribute("largest", 1)))


def _instance_norm(s: Step, x: Tensor, scale: Any, bias: Any) -> Tensor:
    return F.instance_norm(x, weight=tensor(scale), bias=tensor(bias), eps=s.attribute("epsilon", 1e-5))


def _group_norm(s: Step, x: Tensor, scale: Any, bias: Any) -> Tensor:
    groups, scale, bias = s.attribute("num_groups"), tensor(scale), tensor(bias)
    if len(scale) != x.shape[1]:  # opset 18: one number per group
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, s.attribute("epsilon", 1e-5))


def _layer_norm(s: Step, x: Tensor, scale: Any, bias: Any = None) -> Tensor:
    shape = list(x.shape[s.attribute("axis", -1) :])
    scale, bias = (None if v is None else tensor(v).expand(shape) for v in (scale, bias))
    return F.layer_norm(x, shape, scale, bias, s.attribute("epsilon", 1e-5))


def _gemm(s: Step, a: Any, b: Any, c: Any = None) -> Tensor:
    left, right = tensor(a), tensor(b)
    left = left.t() if s.attribute("transA", 0) else left
    right = right.t() if s.attribute("transB", 0) else right
    product = torch.matmul(left, right)
    alpha, beta = s.attribute("alpha", 1.0), s.attribute("beta", 1.0)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (number(c) if beta == 1 else number(c) * beta)


def _where(s: Step, condition: Any, x: Any, y: Any) -> Tensor:
    return torch.where(tensor(condition).bool(), tensor(x), tensor(y))


def _cumsum(s: Step, x: Tensor, axis: Any) -> Tensor:
    if s.attribute("exclusive", 0):
        raise s.error("exclusive sums are not supported")
    dim = int(scalar(axis, 0))
    return torch.cumsum(x.flip(dim), dim).flip(dim) if s.attribute("reverse", 0) else torch.cumsum(x, dim)


def _mod(s: Step, left: Any, right: Any) -> Tensor:
    x, divisor = tensor(left), number(right)
    if not s.attribute("fmod", 0):
        return torch.remainder(x, divisor)
    return torch.sign(x) * torch.remainder(x.abs(), abs(divisor))  # with the sign of the dividend


def _shrink(s: Step, x: Tensor) -> Tensor:
    bound, bias = s.attribute("lambd", 0.5), s.attribute("bias", 0.0)
    if bias not in (0.0, bound):
        raise s.error("a bias other than 0 and lambd is not supported")
    return F.softshrink(x, bound) if bias else F.hardshrink(x, bound)


def _swish(s: Step, x: Tensor) -> Tensor:
    alpha = s.attribute("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for d in reversed(dims):
        x = torch.prod(x, d, keep)
    return x


def _logical(function: Callable[[Tensor, Tensor], Tensor]) -> Row:
    return lambda s, a, b: function(tensor(a), tensor(b))


ROWS: dict[str, Row] = {
    **places.ROWS, **recurrent.ROWS, **shapes.ROWS, **windows.ROWS,
    "Relu": _unary(F.relu), "Sigmoid": _unary(torch.sigmoid), "Tanh": _unary(torch.tanh),
    "Softplus": _unary(F.softplus), "Softsign": _unary(F.softsign), "Exp": _unary(torch.exp), "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt), "Abs": _unary(torch.abs), "Neg": _unary(torch.neg), "Erf": _unary(torch.erf),
    "Reciprocal": _unary(torch.reciprocal), "Floor": _unary(torch.floor), "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round), "Sign": _unary(torch.sign), "Sin": _unary(torch.sin), "Cos": _unary(torch.cos),
    "Tan": _unary(torch.tan), "Atan": _unary(torch.atan), "Sinh": _unary(torch.sinh), "Cosh": _unary(torch.cosh),
    "Asinh": _unary(torch.asinh),
    "Mish": _unary(F.mish), "HardSwish": _unary(F.hardswish), "Silu": _unary(F.silu), "Not": _unary(torch.logical_not),
    "Selu": _selu, "Clip": _clip, "HardSigmoid": _hard_sigmoid,
    "Celu": lambda s, x: F.celu(x, s.attribute("alpha", 1.0)),
    "Elu": lambda s, x: F.elu(x, s.attribute("alpha", 1.0)),
    "LeakyRelu": lambda s, x: F.leaky_relu(x, s.attribute("alpha", 0.01)),
    "ThresholdedRelu": lambda s, x: F.threshold(x, s.attribute("alpha", 1.0), 0.0),
    "Gelu": lambda s, x: F.gelu(x, approximate=s.attribute("approximate", "none")),
    "Softmax": _softmax(torch.softmax), "LogSoftmax": _softmax(torch.log_softmax),
    "Add": _binary(lambda a, b: a + b), "Sub": _binary(lambda a, b: a - b), "Mul": _binary(lambda a, b: a * b),
    "Div": _binary(_divide), "Pow": _binary(lambda a, b: a ** b), "Sum": _all(torch.add),
    "Max": _extreme("min", torch.maximum), "Min": _extreme("max", torch.minimum),
    "PRelu": lambda s, x, slope: torch.where(x < 0, x * tensor(slope), x),
    "Equal": _compared(torch.eq), "Greater": _compared(torch.gt), "Less": _compared(torch.lt),
    "GreaterOrEqual": _compared(torch.ge), "LessOrEqual": _compared(torch.le),
    "And": _logical(torch.logical_and), "Or": _logical(torch.logical_or), "Where": _where,
    "MatMul": lambda s, a, b: torch.matmul(tensor(a), tensor(b)), "Gemm": _gemm,
    "Einsum": lambda s, *x: torch.einsum(s.attribute("equation"), *(tensor(v) for v in x)),
    "ReduceMean": _reduction(torch.mean), "ReduceSum": _reduction(torch.sum), "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin), "ReduceL2": _norm(2), "ReduceL1": _norm(1),
    "ReduceSumSquare": _reduction(lambda x, d, k: torch.sum(x * x, d, k)),
    "ReduceLogSumExp": _reduction(torch.logsumexp), "ReduceProd": _reduction(_product),
    "ReduceLogSum": _reduction(lambda x, d, k: torch.log(torch.sum(x, d, k))), "Mod": _mod, "Shrink": _shrink,
    "Swish": _swish, "Xor": _logical(torch.logical_xor), "Mean": lambda s, *x: _all(torch.add)(s, *x) / len(x),
    "ArgMax": _arg(torch.argmax), "ArgMin": _arg(torch.argmin), "TopK": _topk, "CumSum": _cumsum,
    "InstanceNormalization": _instance_norm, "GroupNormalization": _group_norm, "LayerNormalization": _layer_norm,
    "LpNormalization": lambda s, x: F.normalize(x, s.attribute("p", 2), s.attribute("axis", -1)),
}  # fmt: skip
"""By operation type: of the domain `ai.onnx`, and `Silu`, which `patterns` writes."""
