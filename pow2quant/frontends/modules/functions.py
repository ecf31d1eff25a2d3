"""Functions of one tensor, element by element."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.frontends.modules.exact import Function
from pow2quant.frontends.modules.rounded import Described, nonzero, single
from pow2quant.functions import TINY


class HardSwish(Function):
    """x * clip(x / 6 + 1/2, 0, 1) in the order of ONNX HardSwish-14, to the last bit of float32."""

    def plain(self, x: Tensor) -> Tensor:
        return x * torch.clamp(x * float(np.float32(1 / 6)) + 0.5, 0, 1)


class Sigmoid(Function, nn.Sigmoid):
    """Rounded once from float64, or a table."""


class Tanh(Function, nn.Tanh):
    """Rounded once from float64, or a table."""


class SiLU(Function, nn.SiLU):
    """x * sigmoid(x), rounded once from float64, or a table."""

    def compute(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class GELU(Function, nn.GELU):
    """Rounded once from float64, or a table."""


class ELU(Function, nn.ELU):
    """Rounded once from float64, or a table."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.alpha * (torch.exp(x) - 1))


class LeakyReLU(Function, nn.LeakyReLU):
    """x, or negative_slope * x where it is negative, or a table."""

    def plain(self, x: Tensor) -> Tensor:
        return nn.LeakyReLU.forward(self, x)


class Hardsigmoid(Function, nn.Hardsigmoid):
    """clip(x / 6 + 1/2, 0, 1), or a table."""

    def plain(self, x: Tensor) -> Tensor:
        return nn.Hardsigmoid.forward(self, x)


class Abs(Function):
    """|x|."""

    def plain(self, x: Tensor) -> Tensor:
        return x.abs()


class Sqrt(Function):
    """The square root; that of a negative number is 0."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.sqrt(x.clamp(min=0))


class Rsqrt(Function):
    """1 / sqrt(x); of what is not positive, that of a tiny number."""

    def compute(self, x: Tensor) -> Tensor:
        return 1 / torch.sqrt(x.clamp(min=TINY))


class Reciprocal(Function):
    """1 / x."""

    def compute(self, x: Tensor) -> Tensor:
        return 1 / nonzero(x)


class Exp(Function):
    """exp(factor * x)."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = single(factor)

    def compute(self, x: Tensor) -> Tensor:
        return torch.exp(x * self.factor)


class Expm1(Function):
    """exp(x) - 1."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.exp(x) - 1


class Log(Function):
    """factor * log(x + offset); of what is not positive, that of a tiny number."""

    def __init__(self, factor: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.factor, self.offset = single(factor), single(offset)

    def compute(self, x: Tensor) -> Tensor:
        return torch.log((x + self.offset).clamp(min=TINY)) * self.factor


class Pow(Function):
    """x ** exponent; with an exponent that is no integer, negative numbers count as 0."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = single(exponent)

    def compute(self, x: Tensor) -> Tensor:
        x = x if self.exponent.is_integer() else x.clamp(min=0)
        return torch.pow(nonzero(x) if self.exponent < 0 else x, self.exponent)


class Sin(Function):
    """sin(x)."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Cos(Function):
    """cos(x)."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.cos(x)


class Tan(Function):
    """tan(x)."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.tan(x)


class Atan(Function):
    """arctan(x)."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.atan(x)


class Sinh(Function):
    """sinh(x)."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.sinh(x)


class Cosh(Function):
    """cosh(x)."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.cosh(x)


class Asinh(Function):
    """arsinh(x)."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.asinh(x)


class Erf(Function):
    """The error function."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.erf(x)


class Sign(Function):
    """-1, 0 or 1."""

    def plain(self, x: Tensor) -> Tensor:
        return torch.sign(x)


class Floor(Function):
    """The largest integer that is not larger."""

    def plain(self, x: Tensor) -> Tensor:
        return torch.floor(x)


class Ceil(Function):
    """The least integer that is not less."""

    def plain(self, x: Tensor) -> Tensor:
        return torch.ceil(x)


class Round(Function):
    """The nearest integer, halves to even."""

    def plain(self, x: Tensor) -> Tensor:
        return torch.round(x)


class Trunc(Function):
    """x without its fraction: rounded towards zero."""

    def plain(self, x: Tensor) -> Tensor:
        return torch.trunc(x)


class FloorDivide(Function):
    """floor(x / divisor)."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = single(divisor)

    def compute(self, x: Tensor) -> Tensor:
        return torch.floor(x / self.divisor)


class Remainder(FloorDivide):
    """x - divisor * floor(x / divisor), with the divisor's sign."""

    def compute(self, x: Tensor) -> Tensor:
        return x - super().compute(x) * self.divisor


class TruncDivide(FloorDivide):
    """x / divisor, rounded towards zero."""

    def compute(self, x: Tensor) -> Tensor:
        return torch.trunc(x / self.divisor)


class Fmod(TruncDivide):
    """x - divisor * trunc(x / divisor), with the sign of x."""

    def compute(self, x: Tensor) -> Tensor:
        return x - super().compute(x) * self.divisor


class Softplus(Function):
    """log(1 + exp(beta * x)) / beta."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = single(beta)

    def compute(self, x: Tensor) -> Tensor:
        return softplus(x * self.beta) / self.beta


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return x.clamp(min=0) + torch.log(1 + torch.exp(-x.abs()))


class LogSigmoid(Function):
    """log(sigmoid(x))."""

    def compute(self, x: Tensor) -> Tensor:
        return -softplus(-x)


class Mish(Function):
    """x * tanh(log(1 + exp(x)))."""

    def compute(self, x: Tensor) -> Tensor:
        return x * torch.tanh(softplus(x))


class Softsign(Function):
    """x / (1 + |x|)."""

    def compute(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())


class Tanhshrink(Function):
    """x - tanh(x)."""

    def compute(self, x: Tensor) -> Tensor:
        return x - torch.tanh(x)


class ScaledELU(Function):
    """scale * (x where it is positive, else alpha * (exp(x / width) - 1)): SELU, CELU and ELU with three numbers."""

    def __init__(self, scale: float, alpha: float, width: float = 1.0) -> None:
        super().__init__()
        self.scale, self.alpha, self.width = single(scale), single(alpha), single(width)

    def compute(self, x: Tensor) -> Tensor:
        negative = (torch.exp(x.clamp(max=0) / self.width) - 1) * self.alpha
        return (x.clamp(min=0) + negative) * self.scale


class Softshrink(nn.Module):
    """x without what lies between -bound and bound."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = single(bound)

    def forward(self, x: Tensor) -> Tensor:
        return x - x.clamp(-self.bound, self.bound)


class Threshold(Function):
    """x where it, or its magnitude, is larger than `threshold`, else `value`."""

    def __init__(self, threshold: float, value: float, magnitude: bool = False) -> None:
        super().__init__()
        self.threshold, self.value, self.magnitude = single(threshold), single(value), magnitude

    def plain(self, x: Tensor) -> Tensor:
        return torch.where((x.abs() if self.magnitude else x) > self.threshold, x, self.value)


class Clamp(Described):
    """x, not below `low` and not above `high`, of which one may be None."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = (None if v is None else single(v) for v in (low, high))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


class Compare(Function):
    """1 where x is larger, less, … than `number`, else 0. relation: ONNX's name of a comparison."""

    def __init__(self, relation: str, number: float) -> None:
        super().__init__()
        self.relation, self.number = relation, single(number)

    def plain(self, x: Tensor) -> Tensor:
        return RELATIONS[self.relation](x, self.number).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.relation}, number={self.number}"


RELATIONS: dict[str, Callable[..., Tensor]] = {
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Equal": torch.eq,
    "NotEqual": torch.ne,
}
"""Comparisons by ONNX name; ONNX writes `NotEqual` as `Equal` and `Not`."""
