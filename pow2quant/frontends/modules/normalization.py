"""Softmax, the norms, and batch norm until it is folded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant import functions
from pow2quant.frontends.modules.exact import Exact
from pow2quant.frontends.modules.rounded import Described, single
from pow2quant.pow2_constraints import Encoding

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""What a prepared network holds beside the rows of `operators.OPERATORS`, until `backends.fold` has folded it."""


class ExactSoftmax(Exact):
    """A softmax: rounded once from float64, or `functions.Softmax`.

    levels: of powers of two to which the integers round, 0 for none; the float function is not rounded.
    """

    levels: int = 0

    def integers(
        self, codes: Tensor, defined: functions.Softmax, encoding: Encoding, keep: Tensor | None = None
    ) -> Tensor:
        """`functions.Softmax` in float64."""
        table = torch.from_numpy(defined.table(encoding).copy()).to(codes.device)
        kept, seen = defined.kept(), codes
        if kept is not None:
            seen = seen - functions.HIDDEN * ~torch.from_numpy(kept).to(codes.device)
        if keep is not None:
            seen = seen - functions.HIDDEN * (keep <= HALF)
        apart = (seen.amax(defined.axis, keepdim=True) - seen).clamp_(max=len(table) - 1)
        entries = table.to(torch.float32 if defined.is_single else torch.float64)[apart.long()]
        if defined.levels:
            powers = torch.from_numpy(defined.powers()).to(codes)
            quotient = 2 * entries.sum(defined.axis, keepdim=True) / (3 * entries)
            return powers[quotient.floor_().clamp_(max=len(powers) - 1).long()].mul_(2.0**-functions.FINE)
        reciprocal = torch.floor(2.0**defined.reciprocal_bits / entries.sum(defined.axis, keepdim=True))
        result = entries.mul_(reciprocal)
        if not defined.is_single:
            result.mul_(2.0 ** (functions.FINE - defined.reciprocal_bits)).floor_()
        return result.mul_(2.0**-functions.FINE)


class Softmax(ExactSoftmax, nn.Softmax):
    """Rounded once from float64, or `functions.Softmax`."""

    def plain(self, x: Tensor) -> Tensor:
        return nn.Softmax.forward(self, x.double()).to(x.dtype)

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> functions.Softmax | None:
        if self.dim is None or self.dim % len(shape) == 0:
            return None
        axis = self.dim % len(shape) - len(shape)
        return functions.Softmax.of(axis, shape[axis], target.grid.width, levels=self.levels)


class ExactNorm(Exact):
    """A norm: rounded once from float64, or `functions.Norm`."""

    def integers(self, codes: Tensor, defined: functions.Norm, encoding: Encoding) -> Tensor:
        """`functions.Norm` in float64."""
        if defined.shifts:
            codes = codes * torch.from_numpy(defined.multipliers()).to(codes)
        n, f = defined.length, defined.precision(encoding)
        axes = tuple(range(-len(defined.shape), 0)) if not defined.groups else (-1,)
        rows = codes.reshape(len(codes), defined.groups, -1) if defined.groups else codes
        spread = (rows * rows).sum(axes, keepdim=True) * n
        centred = rows * n
        if defined.centered:
            total = rows.sum(axes, keepdim=True)
            spread, centred = spread - total * total, centred - total
        root = torch.sqrt((spread + defined.epsilon(encoding)).clamp(min=1) * 4.0**f).floor()
        reciprocal = torch.floor(2.0**functions.RECIPROCAL / root)
        down = 2.0 ** (f + functions.DEPTH - functions.RECIPROCAL)
        z = torch.floor(centred * reciprocal * down + 0.5).reshape(codes.shape)
        gamma, beta = (torch.from_numpy(v).to(codes) for v in defined.factors())
        return torch.floor((z * gamma + beta) * 2.0**-defined.drop + 0.5) * 2.0**-defined.fine

    def _definition(
        self, shape: tuple[int, ...], groups: int, centered: bool, eps: float, channels: int, encoding: Encoding
    ) -> functions.Norm | None:
        gamma, beta = (
            np.full(channels, missing, np.float32) if p is None else p.detach().float().cpu().numpy()
            for p, missing in ((getattr(self, name, None), value) for name, value in (("weight", 1), ("bias", 0)))
        )
        shifts = getattr(self, "shifts", None)
        bits = () if shifts is None else tuple(int(s) for s in shifts)
        defined = functions.Norm.of(shape, groups, centered, single(eps), gamma, beta, bits)
        return defined if defined is not None and defined.is_exact(encoding) else None


class ShiftedNorm(ExactNorm):
    """A norm over the last dimensions. Its buffer `shifts`, where it has one, says by what x is multiplied first.

    shifts: (C,) of whole numbers, for factors of 2^shift.
    """

    normalized_shape: tuple[int, ...]

    def factors(self) -> Tensor | None:
        """2^shift, (C,); None where there are no shifts."""
        shifts: Tensor | None = getattr(self, "shifts", None)
        return None if shifts is None else shifts.exp2()

    def shifted(self, x: Tensor) -> Tensor:
        """x with the shifts."""
        factors = self.factors()
        return x if factors is None else x * factors


class LayerNorm(ShiftedNorm, nn.LayerNorm):
    """Rounded once from float64, epsilon a float32, as in ONNX; or `functions.Norm`."""

    def plain(self, x: Tensor) -> Tensor:
        x = self.shifted(x)
        weight, bias = (p.double() if p is not None else None for p in (self.weight, self.bias))
        eps = float(np.float32(self.eps))
        return F.layer_norm(x.double(), self.normalized_shape, weight, bias, eps).to(x.dtype)

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> functions.Norm | None:
        if len(shape) <= len(self.normalized_shape):
            return None
        rows = tuple(self.normalized_shape)
        return self._definition(rows, 0, True, self.eps, math.prod(rows), encoding)


class LogSoftmax(Exact, nn.LogSoftmax):
    """Rounded once from float64, or `functions.LogSoftmax`."""

    def plain(self, x: Tensor) -> Tensor:
        return nn.LogSoftmax.forward(self, x.double()).to(x.dtype)

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> functions.LogSoftmax | None:
        if self.dim is None or self.dim % len(shape) == 0 or target.scale.ndim or not target.is_power_of_two:
            return None
        axis = self.dim % len(shape) - len(shape)
        return functions.LogSoftmax.of(axis, shape[axis], encoding, target)

    def integers(self, codes: Tensor, defined: functions.LogSoftmax, encoding: Encoding) -> Tensor:
        """`functions.LogSoftmax` in float64."""
        table, bounds = (torch.from_numpy(v.copy()).to(codes) for v in (defined.table(encoding), defined.bounds()))
        apart = codes.amax(defined.axis, keepdim=True) - codes
        total = table[apart.clamp(max=len(table) - 1).long()].sum(defined.axis, keepdim=True)
        logarithm = torch.searchsorted(bounds, total, right=True)
        return -(apart * 2.0 ** (int(encoding.exponent) + defined.fine) + logarithm) * 2.0**-defined.fine


class MaskedSoftmax(ExactSoftmax):
    """softmax(factor * x + mask) of what is kept along `dim`, rounded once from float64, or `functions.Softmax`.

    The latter where the mask holds nothing but 0 and what takes values out, and leaves something of every row.

    mask: broadcasts against x; what it adds takes a value out where no value of x makes up for it. None: there is none.
    A second operand that broadcasts against x keeps values, with a 1, or takes them out, with a 0.
    """

    def __init__(self, dim: int, factor: float = 1.0, mask: Tensor | None = None, asks: bool = False) -> None:
        """asks: whether there is a second operand."""
        super().__init__()
        self.dim, self.factor, self.asks = dim, single(factor), asks
        self.register_buffer("mask", None if mask is None else mask.detach().float().clamp(min=LOWEST))

    mask: Tensor | None

    def plain(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        scores = x.double() * self.factor
        scores = scores if self.mask is None else scores + self.mask.double()
        scores = scores if keep is None else scores + LOWEST * (keep <= HALF)
        return torch.softmax(scores, self.dim).to(x.dtype)

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> functions.Softmax | None:
        axis = self.dim % len(shape) - len(shape)
        if axis == -len(shape) or self.factor <= 0:
            return None
        keep = None
        if self.mask is not None:
            apart = self.factor * (int(encoding.grid.qmax) - int(encoding.grid.qmin)) * 2.0 ** int(encoding.exponent)
            taken_out = self.mask.cpu() <= -apart - ENOUGH
            keep = (~taken_out).numpy()
            if bool((self.mask.cpu()[~taken_out] != 0).any()) or keep.ndim > len(shape):
                return None
            if not np.broadcast_to(keep, (1,) * max(0, len(shape) - keep.ndim) + keep.shape).any(axis).all():
                return None
        return functions.Softmax.of(axis, shape[axis], target.grid.width, self.factor, keep, self.asks, self.levels)

    def _piece(self, x: Tensor) -> int:
        own = self.mask is not None and self.mask.ndim == x.ndim  # its first dimension may be that of x
        return max(1, len(x)) if own else super()._piece(x)

    def extra_repr(self) -> str:
        shape = None if self.mask is None else tuple(self.mask.shape)
        return f"dim={self.dim}, factor={self.factor}, mask={shape}"


LOWEST = -(2.0**100)
"""What stands for minus infinity in a mask."""

HALF = 0.5
"""What is kept has a larger value, what is not a smaller one."""

ENOUGH = 20
"""exp(-ENOUGH), 2e-9, is 0 in every table of exponentials."""


class Normalize(Described, ExactNorm):
    """x / max(|x|, eps) along `dims`, |x| the root of the sum of squares: once rounded from float64, or integers.

    The latter along the last dimensions, where no |x| but 0 is below eps.
    """

    def __init__(self, dims: Sequence[int], eps: float = 1e-12) -> None:
        super().__init__()
        self.dims, self.eps = tuple(dims), single(eps)

    def plain(self, x: Tensor) -> Tensor:
        wide = x.double()
        length = torch.sqrt((wide * wide).sum(self.dims, keepdim=True))
        return (wide / length.clamp(min=self.eps)).to(x.dtype)

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> functions.Norm | None:
        first = len(shape) - len(self.dims)
        if first == 0 or sorted(d % len(shape) for d in self.dims) != list(range(first, len(shape))):
            return None
        rows, gamma = shape[first:], np.full(1, math.prod(shape[first:]) ** -0.5, np.float32)
        defined = functions.Norm.of(rows, 0, False, 0.0, gamma, np.zeros(1, np.float32))
        fits = self.eps <= math.ldexp(1, int(encoding.exponent)) and defined is not None and defined.is_exact(encoding)
        return defined if fits else None


class RMSNorm(ShiftedNorm, nn.RMSNorm):
    """x / sqrt(mean of squares + eps) * weight over the last dimensions, once rounded from float64; or integers."""

    def plain(self, x: Tensor) -> Tensor:
        dims, wide = tuple(range(-len(self.normalized_shape), 0)), self.shifted(x).double()
        mean = (wide * wide).sum(dims, keepdim=True) / single(math.prod(self.normalized_shape))
        result = wide / torch.sqrt(mean + single(self._epsilon))
        return (result if self.weight is None else result * self.weight.double()).to(x.dtype)

    @property
    def _epsilon(self) -> float:
        return torch.finfo(torch.float32).eps if self.eps is None else self.eps

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> functions.Norm | None:
        if len(shape) <= len(self.normalized_shape):
            return None
        rows = tuple(self.normalized_shape)
        return self._definition(rows, 0, False, self._epsilon, math.prod(rows), encoding)


class GroupNorm(ExactNorm, nn.GroupNorm):
    """Rounded once from float64, from sums of values and of squares, S and Q, that are exact there; or integers.

    (n x - S) / sqrt(n Q - S^2 + n^2 eps) * weight + bias, with the n values of each group of channels.
    """

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> functions.Norm | None:
        return self._definition(tuple(shape[1:]), self.num_groups, True, self.eps, self.num_channels, encoding)

    def plain(self, input: Tensor) -> Tensor:
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
