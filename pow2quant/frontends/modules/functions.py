"""Functions of one tensor, element by element."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.frontends.modules.rounded import TINY, Rounded, nonzero, single


class HardSwish(nn.Module):
    """x * clip(x / 6 + 1/2, 0, 1) in the order of ONNX HardSwish-14, to the last bit of float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.clamp(x * float(np.float32(1 / 6)) + 0.5, 0, 1)


class Sigmoid(nn.Sigmoid):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class Tanh(nn.Tanh):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class SiLU(nn.SiLU):
    """x * sigmoid(x), rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.double()
        return (x * torch.sigmoid(x)).to(input.dtype)


class GELU(nn.GELU):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class ELU(nn.ELU):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.double()
        return torch.where(x > 0, x, self.alpha * (torch.exp(x) - 1)).to(input.dtype)


class Abs(nn.Module):
    """|x|."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Sqrt(Rounded):
    """The square root; that of a negative number is 0."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.sqrt(x.clamp(min=0))


class Rsqrt(Rounded):
    """1 / sqrt(x); of what is not positive, that of a tiny number."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 1 / torch.sqrt(x.clamp(min=TINY))


class Reciprocal(Rounded):
    """1 / x."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 1 / nonzero(x)


class Exp(Rounded):
    """exp(factor * x)."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = single(factor)

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.exp(x * self.factor)


class Log(Rounded):
    """factor * log(x + offset); of what is not positive, that of a tiny number."""

    def __init__(self, factor: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.factor, self.offset = single(factor), single(offset)

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.log((x + self.offset).clamp(min=TINY)) * self.factor


class Pow(Rounded):
    """x ** exponent; with an exponent that is no integer, negative numbers count as 0."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = single(exponent)

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x if self.exponent.is_integer() else x.clamp(min=0)
        return torch.pow(nonzero(x) if self.exponent < 0 else x, self.exponent)


class Sin(Rounded):
    """sin(x)."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.sin(x)


class Cos(Rounded):
    """cos(x)."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cos(x)


class Erf(Rounded):
    """The error function."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.erf(x)


class Sign(nn.Module):
    """-1, 0 or 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x)


class Floor(nn.Module):
    """The largest integer that is not larger."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(x)


class Ceil(nn.Module):
    """The least integer that is not less."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ceil(x)


class Round(nn.Module):
    """The nearest integer, halves to even."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x)


class FloorDivide(Rounded):
    """floor(x / divisor)."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = single(divisor)

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.floor(x / self.divisor)


class Remainder(FloorDivide):
    """x - divisor * floor(x / divisor), with the divisor's sign."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x - super().compute(x) * self.divisor


class Softplus(Rounded):
    """log(1 + exp(beta * x)) / beta."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = single(beta)

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return softplus(x * self.beta) / self.beta


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return x.clamp(min=0) + torch.log(1 + torch.exp(-x.abs()))


class LogSigmoid(Rounded):
    """log(sigmoid(x))."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return -softplus(-x)


class Mish(Rounded):
    """x * tanh(log(1 + exp(x)))."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * torch.tanh(softplus(x))


class Softsign(Rounded):
    """x / (1 + |x|)."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x / (1 + x.abs())


class Tanhshrink(Rounded):
    """x - tanh(x)."""

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x - torch.tanh(x)


class ScaledELU(Rounded):
    """scale * (x where it is positive, else alpha * (exp(x / width) - 1)): SELU, CELU and ELU with three numbers."""

    def __init__(self, scale: float, alpha: float, width: float = 1.0) -> None:
        super().__init__()
        self.scale, self.alpha, self.width = single(scale), single(alpha), single(width)

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        negative = (torch.exp(x.clamp(max=0) / self.width) - 1) * self.alpha
        return (x.clamp(min=0) + negative) * self.scale


class Softshrink(nn.Module):
    """x without what lies between -bound and bound."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = single(bound)

    def forward(self, x: Tensor) -> Tensor:
        return x - x.clamp(-self.bound, self.bound)


class Threshold(nn.Module):
    """x where it, or its magnitude, is larger than `threshold`, else `value`."""

    def __init__(self, threshold: float, value: float, magnitude: bool = False) -> None:
        super().__init__()
        self.threshold, self.value, self.magnitude = single(threshold), single(value), magnitude

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x.abs() if self.magnitude else x) > self.threshold, x, self.value)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, value={self.value}, magnitude={self.magnitude}"


class Clamp(nn.Module):
    """x, not below `low` and not above `high`, of which one may be None."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = (None if v is None else single(v) for v in (low, high))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"


class Compare(nn.Module):
    """1 where x is larger, less, … than `number`, else 0. relation: ONNX's name of a comparison."""

    def __init__(self, relation: str, number: float) -> None:
        super().__init__()
        self.relation, self.number = relation, single(number)

    def forward(self, x: Tensor) -> Tensor:
        return RELATIONS[self.relation](x, self.number).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.relation}, number={self.number}"


RELATIONS: dict[str, Callable[..., Tensor]] = {
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Equal": torch.eq,
}
"""Comparisons by ONNX name."""
