"""Sums, products and means of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pow2quant.frontends.modules.exact import Function
from pow2quant.frontends.modules.rounded import Described, Rounded, nonzero, single
from pow2quant.functions import Lookup
from pow2quant.pow2_constraints import Encoding


class Add(nn.Module):
    """x + y, broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Sub(nn.Module):
    """x - y, broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y


class Mul(nn.Module):
    """x * y, broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


class MatMul(nn.Module):
    """x @ y of two activations."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


class Scale(Function):
    """factor * x + offset with two numbers: a one-input function, a table where float32 may not hold the products.

    written: the numbers stand in the network's code, so that other weights do not change them.
    """

    def __init__(self, factor: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.written = True
        self.register_buffer("factor", torch.tensor(float(factor)))
        self.register_buffer("offset", torch.tensor(float(offset)))

    factor: Tensor
    offset: Tensor
    _numbers: tuple[float, float] | None = None

    def plain(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> Lookup | None:
        """See `Exact.definition`. Numbers of at most 8 bits give products that are exact anyway."""
        numbers = float(self.factor), float(self.offset)
        if all(math.ldexp(math.frexp(number)[0], 8).is_integer() for number in numbers):
            return None
        if numbers != self._numbers:
            self._numbers, self._known = numbers, None
        return super().definition(shape, encoding, target)

    def extra_repr(self) -> str:
        return f"factor={float(self.factor)}, offset={float(self.offset)}"


class Div(Rounded):
    """x / y, broadcasting; 0 / 0 is 0, anything else divided by zero saturates."""

    def compute(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return x / nonzero(y)


class Maximum(nn.Module):
    """The larger of x and y, broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(x, y)


class Minimum(nn.Module):
    """The smaller of x and y, broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.minimum(x, y)


class Select(nn.Module):
    """x where the condition, 0 or 1 as `Compare` gives it, is 1, else y."""

    def forward(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(condition > 0.5, x, y)


class Choose(nn.Module):
    """x where the constant mask is true, else y. mask: truth values that broadcast against both."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.detach().clone().bool())

    mask: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.mask, x, y)


class Masked(Described):
    """`value` where the constant mask is true, else x. mask: truth values that broadcast against x."""

    def __init__(self, mask: Tensor, value: float) -> None:
        super().__init__()
        self.register_buffer("mask", mask.detach().clone().bool())
        self.value = single(value)

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self.value, x)


class Reduction(Described):
    """Something of all values along `dims`."""

    def __init__(self, dims: Sequence[int], keepdim: bool) -> None:
        super().__init__()
        self.dims, self.keepdim = tuple(dims), keepdim

    def count(self, x: Tensor) -> int:
        """How many values are reduced to one."""
        return math.prod(x.shape[d] for d in self.dims)


class Mean(Reduction):
    """The mean over `dims`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, self.keepdim)


class Sum(Reduction):
    """The sum over `dims`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.dims, self.keepdim)


class Largest(Reduction):
    """The largest value along `dims`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(self.dims, self.keepdim)


class Least(Reduction):
    """The least value along `dims`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amin(self.dims, self.keepdim)


class LogSumExp(Reduction):
    """log(sum(exp(x))) over `dims`, rounded once from float64."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x.double(), self.dims, self.keepdim).to(x.dtype)


class Product(Reduction):
    """The product over one dimension, rounded once from float64."""

    def forward(self, x: Tensor) -> Tensor:
        (dim,) = self.dims
        return torch.prod(x.double(), dim, self.keepdim).to(x.dtype)


class Variance(Reduction):
    """The variance over `dims`, or its root, of sums that are exact in float64, and rounded once.

    With S the sum, Q that of squares: (n Q - S^2) / (n (n - correction)).
    """

    def __init__(self, dims: Sequence[int], keepdim: bool, correction: float = 1.0, root: bool = False) -> None:
        super().__init__(dims, keepdim)
        self.correction, self.root = correction, root

    def forward(self, x: Tensor) -> Tensor:
        n, wide = self.count(x), x.double()
        total, squares = (y.sum(self.dims, self.keepdim) for y in (wide, wide * wide))
        spread = (squares * single(n) - total * total).clamp(min=0) / single(n * (n - self.correction))
        return (torch.sqrt(spread) if self.root else spread).to(x.dtype)


class Norm(Reduction):
    """The sum of magnitudes (order 1) or the root of the sum of squares (order 2) over `dims`, rounded once."""

    def __init__(self, dims: Sequence[int], keepdim: bool, order: int = 2) -> None:
        super().__init__(dims, keepdim)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        if self.order == 1:
            return wide.abs().sum(self.dims, self.keepdim).to(x.dtype)
        return torch.sqrt((wide * wide).sum(self.dims, self.keepdim)).to(x.dtype)


class CumSum(Described):
    """Sums of everything in front, along one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, self.dim)
