"""Softmax, the norms, and batch norm until it is folded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.frontends.modules.rounded import Rounded, single

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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


class LogSoftmax(nn.LogSoftmax):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class MaskedSoftmax(nn.Module):
    """softmax(factor * x + mask) along `dim`, rounded once from float64; nothing is rounded between.

    mask: broadcasts against x; -inf, or anything below -2^100, takes a value out. None: there is none.
    """

    def __init__(self, dim: int, factor: float = 1.0, mask: Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.factor = dim, single(factor)
        self.register_buffer("mask", None if mask is None else mask.detach().float().clamp(min=LOWEST))

    mask: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        scores = x.double() * self.factor
        scores = scores if self.mask is None else scores + self.mask.double()
        return torch.softmax(scores, self.dim).to(x.dtype)

    def extra_repr(self) -> str:
        shape = None if self.mask is None else tuple(self.mask.shape)
        return f"dim={self.dim}, factor={self.factor}, mask={shape}"


LOWEST = -(2.0**100)
"""What stands for minus infinity in a mask."""


class Normalize(Rounded):
    """x / max(|x|, eps) along `dims`, |x| the root of the sum of squares."""

    def __init__(self, dims: Sequence[int], eps: float = 1e-12) -> None:
        super().__init__()
        self.dims, self.eps = tuple(dims), single(eps)

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x / torch.sqrt((x * x).sum(self.dims, keepdim=True)).clamp(min=self.eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of squares + eps) * weight over the last dimensions, rounded once from float64."""

    def forward(self, x: Tensor) -> Tensor:
        dims, wide = tuple(range(-len(self.normalized_shape), 0)), x.double()
        mean = (wide * wide).sum(dims, keepdim=True) / single(math.prod(self.normalized_shape))
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        result = wide / torch.sqrt(mean + single(eps))
        return (result if self.weight is None else result * self.weight.double()).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """Rounded once from float64, from sums of values and of squares, S and Q, that are exact there.

    (n x - S) / sqrt(n Q - S^2 + n^2 eps) * weight + bias, with the n values of each group of channels.
    """

    def forward(self, input: Tensor) -> Tensor:
        wide = input.double().reshape(input.shape[0], self.num_groups, -1)
        n = single(wide.shape[2])
        total, squares = (y.sum(2, keepdim=True) for y in (wide, wide * wide))
        spread = (squares * n - total * total).clamp(min=0) + single(self.eps * n * n)
        result = ((wide * n - total) / torch.sqrt(spread)).reshape(input.shape)
        if self.affine:
            shape = (-1, *[1] * (input.ndim - 2))
            result = result * self.weight.double().reshape(shape) + self.bias.double().reshape(shape)
        return result.to(input.dtype)


class LocalResponseNorm(nn.LocalResponseNorm):
    """x / (k + alpha / size * sum of squares of `size` channels) ^ beta, rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        wide = input.double().flatten(2)
        squares = torch.matmul(self.band(input.shape[1]).double().to(input.device), wide * wide)
        divisor = (squares * single(self.alpha / self.size) + single(self.k)) ** single(self.beta)
        return (wide / divisor).reshape(input.shape).to(input.dtype)

    def band(self, channels: int) -> Tensor:
        """Which channels are summed up for each, (C, C) of 0 and 1."""
        index = torch.arange(channels)
        apart = index[None] - index[:, None]
        return ((-(self.size // 2) <= apart) & (apart < self.size - self.size // 2)).float()
