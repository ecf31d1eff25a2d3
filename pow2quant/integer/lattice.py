"""Where a tensor's values lie: integers between two ends, in units of a power of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.pow2_constraints.arithmetic import EXPONENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

FLOAT32_EXACT = 2**24
"""float32 holds every integer up to here."""

FLOAT64_EXACT = 2**53
"""float64 holds every integer up to here."""


class NotProvedError(Exception):
    """Something cannot be proved: carries the reason, and the accumulator as far as it is known."""

    def __init__(self, reason: str, accumulator: Lattice | None = None) -> None:
        super().__init__(reason)
        self.accumulator = accumulator


@dataclass(frozen=True, eq=False)
class Lattice:
    """Values n * 2^exponent with integers low <= n <= high and low <= 0 <= high.

    All three broadcast against the tensor: () or (1, C, 1, 1), …. The ends are float64: integers, exact to 2^53.
    """

    exponent: Ints
    low: Floats
    high: Floats

    @classmethod
    def of_encoding(cls, encoding: Encoding, ndim: int | None) -> Lattice:
        """Every value of an encoded tensor with `ndim` dimensions (None: unknown)."""
        zero, grid = encoding.zero_point, encoding.grid
        low, high = ((q - zero).astype(np.float64) for q in (grid.qmin, grid.qmax))
        whole = cls(encoding.exponent, low, high)
        return whole.collapsed() if ndim is None else whole.reshaped(encoding.along(zero, [1] * ndim).shape)

    @classmethod
    def of_integers(cls, exponent: Ints, n: Floats) -> Lattice:
        """The constants n * 2^exponent, and zero."""
        return cls(exponent, np.minimum(n, 0), np.maximum(n, 0))

    @classmethod
    def of_constants(cls, values: NDArray[Any]) -> Lattice:
        """Float constants, each on the coarsest lattice that holds it. Raises NotProvedError for NaN and infinity."""
        if not np.isfinite(values).all():
            raise NotProvedError("a constant is not finite")
        mantissa, exponent = np.frexp(values.astype(np.float64))
        n = np.ldexp(mantissa, 53).astype(np.int64)
        zeros = np.where(n == 0, 53, np.frexp((n & -n).astype(np.float64))[1] - 1)
        k = np.where(n == 0, 0, exponent.astype(np.int64) - 53 + zeros)
        return cls.of_integers(k, (n >> zeros).astype(np.float64))

    @property
    def magnitude(self) -> Floats:
        """The largest |n|."""
        return np.maximum(-self.low, self.high)

    def at(self, exponent: Ints) -> Lattice:
        """The same values on the finer lattice 2^exponent."""
        steps = self.exponent - exponent
        k = np.array(np.broadcast_to(exponent, np.shape(steps)))
        return Lattice(k, np.ldexp(self.low, steps), np.ldexp(self.high, steps))

    def collapsed(self) -> Lattice:
        """One lattice for all channels."""
        finest = np.asarray(self.exponent.min())
        fine = self.at(finest)
        return Lattice(finest, np.asarray(fine.low.min()), np.asarray(fine.high.max()))

    def reshaped(self, shape: tuple[int, ...]) -> Lattice:
        """The same lattices, per-channel arrays (C,) in another shape."""
        return Lattice(self.exponent.reshape(shape), self.low.reshape(shape), self.high.reshape(shape))

    def times(self, n: int) -> Lattice:
        """Sums of n values."""
        return Lattice(self.exponent, n * self.low, n * self.high)

    def __add__(self, other: Lattice) -> Lattice:
        """Sums of one value each."""
        a, b = _aligned(self, other)
        return Lattice(a.exponent, a.low + b.low, a.high + b.high)

    def __neg__(self) -> Lattice:
        return Lattice(self.exponent, -self.high, -self.low)

    def __mul__(self, other: Lattice) -> Lattice:
        """Products of one value each."""
        corners = [x * y for x in (self.low, self.high) for y in (other.low, other.high)]
        low, high = np.minimum.reduce(corners), np.maximum.reduce(corners)
        return Lattice(self.exponent + other.exponent, low, high)

    def __or__(self, other: Lattice) -> Lattice:
        """The values of both."""
        a, b = _aligned(self, other)
        return Lattice(a.exponent, np.minimum(a.low, b.low), np.maximum(a.high, b.high))

    def require_exact(
        self, what: str = "the accumulator", accumulator: Lattice | None = None, limit: int = FLOAT32_EXACT
    ) -> None:
        """Raises NotProvedError, with `accumulator` or this lattice, unless float32 holds every n * 2^exponent.

        limit: the largest n, 2^53 for float64.
        """
        known = self if accumulator is None else accumulator
        largest, finest, coarsest = self.magnitude.max(), self.exponent.min(), self.exponent.max()
        if largest > limit and limit > FLOAT32_EXACT:
            raise NotProvedError(f"{what} may reach {largest:,.0f}; float64 is exact to 2^53", known)
        if largest > limit:
            raise NotProvedError(f"{what} may reach {largest:,.0f}; float32 is exact to 2^24 = 16,777,216", known)
        if finest < EXPONENTS.start or coarsest + 24 >= EXPONENTS.stop:
            raise NotProvedError(f"{what} counts in units of 2^{finest} to 2^{coarsest}: float32 cannot", known)


def _aligned(a: Lattice, b: Lattice) -> tuple[Lattice, Lattice]:
    finer = np.minimum(a.exponent, b.exponent)
    return a.at(finer), b.at(finer)
