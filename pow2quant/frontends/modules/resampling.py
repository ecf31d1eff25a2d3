"""Interpolation and average pools of any size: weighted sums along one dimension after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.frontends.modules.rounded import Rounded, single

LARGEST_DIVISOR = 1 << 12
"""Weights are integers over a divisor up to here where there is one, otherwise over this power of two times 16."""


class Resample(nn.Module):
    """Weighted sums along several dimensions, one division and one rounding.

    dims: counted from the end. weights: for each dimension (results, values), integers. divisor: of all of them. Sums
    of products of integers are exact in float64, so every order of summation gives the same.
    """

    def __init__(self, dims: Sequence[int], weights: Sequence[Tensor], divisor: int) -> None:
        super().__init__()
        self.dims, self.divisor = tuple(dims), single(divisor)
        for dim, weight in zip(dims, weights, strict=True):
            self.register_buffer(f"weight{-dim}", weight.detach().clone().float())

    def weight(self, dim: int) -> Tensor:
        """The weights along a dimension, (results, values)."""
        return self.get_buffer(f"weight{-dim}")

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        for dim in self.dims:
            wide = torch.tensordot(wide, self.weight(dim).double().to(x.device), ([x.ndim + dim], [1]))
            wide = wide.movedim(-1, dim)
        return (wide / self.divisor).to(x.dtype).contiguous()

    def extra_repr(self) -> str:
        return f"dims={self.dims}, divisor={self.divisor:.0f}"

    @classmethod
    def of(cls, functions: Sequence[Callable[[Tensor], Tensor] | None], sizes: Sequence[int]) -> Resample:
        """From what is done along each of the last dimensions; None: nothing.

        functions: linear, of (1, 1, values) or of (1, values, values, 1), and not changed by the other dimensions.
        sizes: of these dimensions.
        """
        dims, weights, divisor = [], [], 1
        for i, (function, size) in enumerate(zip(functions, sizes, strict=True)):
            if function is None:
                continue
            rows = function(torch.eye(size, dtype=torch.float64)[:, None])[:, 0].T  # what one value gives to each
            integers, own = _over_a_divisor(rows)
            dims.append(i - len(sizes))
            weights.append(integers)
            divisor *= own
        return cls(dims, weights, divisor)


class GridSample(Rounded):
    """Values of the first operand, (N, C, H, W), at the places that the second, (N, H', W', 2), says."""

    def __init__(self, mode: str, border: str, aligned: bool) -> None:
        """mode: bilinear, nearest or bicubic. border: zeros, border or reflection. aligned: -1 and 1 are centres."""
        super().__init__()
        self.mode, self.border, self.aligned = mode, border, aligned

    def compute(self, *tensors: Tensor) -> Tensor:
        x, grid = tensors
        return F.grid_sample(x, grid, self.mode, self.border, self.aligned)


def _over_a_divisor(rows: Tensor) -> tuple[Tensor, int]:
    """Integers (results, values) and what they are divided by; rounded where no small divisor makes them integers."""
    values, divisors = rows.unique(), torch.arange(1, LARGEST_DIVISOR + 1)
    scaled = values * divisors[:, None]
    fits = ((scaled - scaled.round()).abs() < 1e-6).all(1)
    if not fits.any():
        return _rounded(rows, LARGEST_DIVISOR * 16)
    divisor = int(divisors[fits][0])
    return (rows * divisor).round(), divisor


def _rounded(rows: Tensor, divisor: int) -> tuple[Tensor, int]:
    """The nearest integers; each row's largest takes what the others leave of its sum."""
    scaled = (rows * divisor).round()
    rest = (rows.sum(1) * divisor).round() - scaled.sum(1)
    scaled[torch.arange(len(rows)), rows.abs().argmax(1)] += rest
    return scaled, divisor
