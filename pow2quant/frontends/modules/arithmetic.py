"""Sums, products and means of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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


class Scale(nn.Module):
    """factor * x + offset with two numbers: a one-input function."""

    def __init__(self, factor: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(float(factor)))
        self.register_buffer("offset", torch.tensor(float(offset)))

    factor: Tensor
    offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset

    def extra_repr(self) -> str:
        return f"factor={float(self.factor)}, offset={float(self.offset)}"


class Mean(nn.Module):
    """The mean over `dims`."""

    def __init__(self, dims: Sequence[int], keepdim: bool) -> None:
        super().__init__()
        self.dims, self.keepdim = tuple(dims), keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, self.keepdim)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, keepdim={self.keepdim}"
