"""Functions of one tensor, element by element."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


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
