"""Modules that compute in float64 and round once, and what they have in common."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.functions import TINY


class Described(nn.Module):
    """A module whose text says what it holds, but for tensors."""

    def extra_repr(self) -> str:
        hidden = ("training", "ends")
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if k not in hidden and not k.startswith("_"))


class Rounded(Described):
    """A function that is computed in float64 and rounded once. Its constants are float32 numbers, as in ONNX."""

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.compute(*(x.double() for x in tensors)).to(tensors[0].dtype)

    def compute(self, *tensors: Tensor) -> Tensor:
        """The function of float64 tensors."""
        raise NotImplementedError


def single(value: float) -> float:
    """The nearest float32 number."""
    return float(np.float32(value))


def nonzero(x: Tensor) -> Tensor:
    """x, zeros replaced: of either sign, they give the same quotients."""
    return torch.where(x == 0, TINY, x)
