"""Integers that count, such as tokens and places: they have no scale, and are computed as integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pow2quant.frontends.modules.functions import RELATIONS
from pow2quant.frontends.modules.rounded import Described

COUNTING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "FloorDiv": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "Mod": torch.remainder,
    "Max": torch.maximum,
    "Min": torch.minimum,
}
"""By ONNX's name; Div rounds towards zero there. FloorDiv, which ONNX does not have, rounds down."""


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


class Count(Described):
    """Arithmetic of two integers, or of one and constant ones. operation: ONNX's name of it, see `COUNTING`.

    values: integers of any shape that broadcasts against the operand. first: they are the first operand.
    """

    def __init__(self, operation: str, values: Tensor | None = None, first: bool = False) -> None:
        super().__init__()
        self.operation, self.first = operation, first
        self.register_buffer("values", None if values is None else values.detach().clone().long())

    values: Tensor | None

    def forward(self, x: Tensor, *other: Tensor) -> Tensor:
        operands = [x.long(), *(y.long() for y in other)] if self.values is None else [x.long(), self.values]
        return COUNTING[self.operation](*(reversed(operands) if self.first else operands))


class CountUp(Described):
    """The sums of integers and of all in front of them along `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x.long(), self.dim)


class Real(nn.Module):
    """Integers that count, as real numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Whole(nn.Module):
    """Truth values as integers that count."""

    def forward(self, x: Tensor) -> Tensor:
        return x.round().long()


class ArgMax(nn.Module):
    """The index of the largest value along `dim`, the first of equal ones."""

    def __init__(self, dim: int, keepdim: bool) -> None:
        super().__init__()
        self.dim, self.keepdim = dim, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return torch.argmax(x, self.dim, self.keepdim)


class Places(Described):
    """Where the `count` largest values stand along `dim`, or the least ones, in order; of equal ones the first."""

    def __init__(self, count: int, dim: int, largest: bool = True) -> None:
        super().__init__()
        self.count, self.dim, self.largest = count, dim, largest

    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x, dim=self.dim, descending=self.largest, stable=True).indices.narrow(self.dim, 0, self.count)


class Gathered(Described):
    """The values of the first operand along `dim` that stand at places which the second says."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return torch.gather(x, self.dim, places)


class Scattered(Described):
    """The first operand, with the values of the third at the places along `dim` that the second says."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, places: Tensor, values: Tensor) -> Tensor:
        return torch.scatter(x, self.dim, places, values.expand(places.shape))
