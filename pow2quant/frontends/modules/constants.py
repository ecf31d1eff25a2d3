"""Tensors that the network holds and does not compute."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

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
