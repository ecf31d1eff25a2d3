"""Tensors that the network holds and does not compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.frontends.modules.functions import RELATIONS
from pow2quant.frontends.modules.rounded import Described


class Constant(nn.Module):
    """A tensor that is an operand, such as a position embedding; it has an encoding like any other tensor.

    value: any shape that broadcasts against the other operand, a batch of one in front.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone().float())

    def forward(self) -> Tensor:
        return self.value

    def extra_repr(self) -> str:
        return f"shape={tuple(self.value.shape)}"


class Expand(Described):
    """The first operand, repeated along `dim` as often as the second is long there: a constant gets the batch."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        shape = [-1] * x.ndim
        shape[self.dim] = like.shape[self.dim]
        return x.expand(shape)


class Embedding(nn.Embedding):
    """Rows of `weight` by index. A maximal norm is not renewed: that would write into the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight)


class CompareIntegers(nn.Module):
    """1 where an integer is equal to, larger, less, … than a constant one, else 0. relation: ONNX's name of it.

    values: integers of any shape that broadcasts against the operand.
    """

    def __init__(self, relation: str, values: Tensor) -> None:
        super().__init__()
        self.relation = relation
        self.register_buffer("values", values.detach().clone().long())

    values: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return RELATIONS[self.relation](x, self.values).float()

    def extra_repr(self) -> str:
        return f"{self.relation}, shape={tuple(self.values.shape)}"


class Real(nn.Module):
    """Integers that count, as real numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class ArgMax(nn.Module):
    """The index of the largest value along `dim`, the first of equal ones."""

    def __init__(self, dim: int, keepdim: bool) -> None:
        super().__init__()
        self.dim, self.keepdim = dim, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return torch.argmax(x, self.dim, self.keepdim)
