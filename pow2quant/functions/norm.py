"""Layer, group, instance and RMS norm in integers: exact sums, one square root and one division per row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

DEPTH = 16
"""Normalized values are integers in units of 2^-16."""

RECIPROCAL = 40
"""The reciprocal of a deviation counts in units of 2^-40."""


@dataclass(frozen=True)
class Norm:
    """Layer, group, instance and RMS norm, with one square root and one division per row of n values.

    Of integers q in units of 2^k, less their zero point: S = sum q, Q = sum q^2 (RMS: S = 0), e = round(eps n^2 4^-k),
    V = max(1, n Q - S^2 + e), s = floor(sqrt(V 4^f)), r = floor(2^40 / s), z = round((n q - S) r 2^(f - 40)) in units
    of 2^-16, and y = round(z gamma + beta) in units of 2^-`fine`; halves are rounded up. f: `precision`.

    shape: of a row, the last dimensions; groups: 0, or into how many rows the sample (C, …) of this shape is divided.
    gamma: integers in units of 2^-gamma_bits, one per value of a row, or per channel; beta: in 2^-(16 + gamma_bits).
    shifts: empty, or for every value of a row by how many bits it is shifted left in front of all this: the
    power-of-two factors of FQ-ViT (Lin et al. 2022).
    """

    shape: tuple[int, ...]
    groups: int
    centered: bool
    eps: float
    gamma: tuple[int, ...]
    beta: tuple[int, ...]
    gamma_bits: int
    shifts: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        groups: int,
        centered: bool,
        eps: float,
        gamma: Floats,
        beta: Floats,
        shifts: tuple[int, ...] = (),
    ) -> Norm | None:
        """The definition for these real factors and offsets; None where they do not fit.

        groups: 0, or with the sample's shape (C, …).
        """
        largest = float(np.abs(gamma).max(initial=0))
        if not (np.isfinite(gamma).all() and np.isfinite(beta).all()) or largest > 2**15 or eps < 0:
            return None
        bits = min(20, 15 - math.frexp(largest)[1]) if largest else 0
        units = [np.rint(np.ldexp(v.astype(np.float64), b)) for v, b in ((gamma, bits), (beta, bits + DEPTH))]
        if np.abs(units[1]).max(initial=0) > 2**45:
            return None
        factors, offsets = (tuple(int(v) for v in values.reshape(-1)) for values in units)
        made = cls(shape, groups, centered, eps, factors, offsets, bits, shifts)
        return made if made.fine >= 0 else None

    @property
    def length(self) -> int:
        """n."""
        return math.prod(self.shape) // max(1, self.groups)

    @property
    def inner(self) -> int:
        """So many values that follow each other have one gamma."""
        return math.prod(self.shape) // len(self.gamma)

    @property
    def largest(self) -> int:
        """No |z| is beyond it: |n q - S| <= sqrt(n V), and s >= 2^f sqrt(V) / 2."""
        return ((math.isqrt(4 * self.length) + 1) << DEPTH) + 1

    @property
    def magnitude(self) -> int:
        """No |z gamma + beta| is beyond it."""
        return self.largest * max(map(abs, self.gamma)) + max(map(abs, self.beta))

    @property
    def fine(self) -> int:
        """The result is in units of 2^-fine, so that none is beyond 2^24."""
        return min(DEPTH + self.gamma_bits, 23 - (self.magnitude >> (DEPTH + self.gamma_bits)).bit_length())

    @property
    def drop(self) -> int:
        """By how many bits z gamma + beta is finer than the result."""
        return DEPTH + self.gamma_bits - self.fine

    def epsilon(self, encoding: Encoding) -> int:
        """e."""
        return round(math.ldexp(float(np.float32(self.eps)) * self.length**2, -2 * int(encoding.exponent)))

    def precision(self, encoding: Encoding) -> int:
        """f, at most 8, so that V 4^f stays below 2^52; negative where nothing does."""
        apart = (int(encoding.grid.qmax) - int(encoding.grid.qmin)) << max(self.shifts, default=0)
        far = (apart + 1) // 2 if self.centered else self._farthest(encoding)
        return min(8, (52 - (self.length**2 * far**2 + self.epsilon(encoding)).bit_length()) // 2)

    def is_exact(self, encoding: Encoding) -> bool:
        """Whether every integer is within 2^53, for inputs with this encoding."""
        sums = self.length**2 * self._farthest(encoding) ** 2 + self.epsilon(encoding)
        return sums <= 2**53 and self.precision(encoding) >= 0 and self.magnitude <= 2**51 and self.fine >= 0

    def _farthest(self, encoding: Encoding) -> int:
        zero = int(encoding.zero_point)
        far = max(int(encoding.grid.qmax) - zero, zero - int(encoding.grid.qmin))
        return far << max(self.shifts, default=0)

    def multipliers(self) -> Ints:
        """2^shift of every value of a row; 1 where there are no shifts."""
        return np.array(1 << np.array(self.shifts or 0, np.int64))

    def factors(self) -> tuple[Ints, Ints]:
        """gamma and beta of every value of a row, in its shape; of a sample, where it is divided into groups."""
        found = (np.repeat(np.array(v, np.int64), self.inner).reshape(self.shape) for v in (self.gamma, self.beta))
        gamma, beta = found
        return gamma, beta
