"""Softmax, the norms, and batch norm until it is folded."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
"""What a prepared network holds beside the rows of `operators.OPERATORS`, until `backends.fold` has folded it."""


class Softmax(nn.Softmax):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class LayerNorm(nn.LayerNorm):
    """Rounded once from float64; epsilon is a float32, as in ONNX."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (p.double() if p is not None else None for p in (self.weight, self.bias))
        eps = float(np.float32(self.eps))
        return F.layer_norm(input.double(), self.normalized_shape, weight, bias, eps).to(input.dtype)
