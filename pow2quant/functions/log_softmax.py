"""The logarithm of Softmax in integers: a table of exponentials, and where their sum stands among bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.functions.softmax import exponentials

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding

    Ints = NDArray[np.int64]

MOST_BOUNDS = 1 << 16
"""A logarithm of a sum is one of at most so many."""


@dataclass(frozen=True)
class LogSoftmax:
    """The logarithm of Softmax along an axis, without a division.

    Of codes q in units of 2^k: d = max q - q, E = round(2^m exp(-d 2^k)), S = sum E, L = how many of the integers
    B_i = ceil(2^m exp((i - 1/2) 2^-f)), i = 1, 2, …, are not above S, which is log(S / 2^m) in units of 2^-f, rounded;
    y = -(d 2^(k + f) + L) in units of 2^-f.

    axis: from the end. table_bits, fine: m and f. length: of a row.
    """

    axis: int
    table_bits: int
    fine: int
    length: int

    @classmethod
    def of(cls, axis: int, length: int, source: Encoding, target: Encoding) -> LogSoftmax | None:
        """The definition for rows of so many values; None where its integers leave 24 bits, or L may be too many.

        f is so that y is exact but for L, and L is rounded to an eighth of the result's step, or finer, if that is
        possible.
        """
        least, bits = max(0, -int(source.exponent)), min(16, 24 - max(1, length - 1).bit_length())
        fines = range(max(least, 3 - int(target.exponent)), least - 1, -1)
        found = (made for fine in fines if (made := cls(axis, bits, fine, length)).is_exact(source))
        return next(found, None)

    def is_exact(self, source: Encoding) -> bool:
        """Whether every integer is at most 2^24: float32 and int32 hold it."""
        shift = int(source.exponent) + self.fine
        if not (8 <= self.table_bits <= 16 and self.length << self.table_bits <= 1 << 24 and 0 <= shift <= 24):
            return False
        most = self.fine <= 40 and math.log(self.length) * 2**self.fine < MOST_BOUNDS
        span = int(source.grid.qmax) - int(source.grid.qmin)
        return most and (span << shift) + MOST_BOUNDS <= 1 << 24

    def table(self, source: Encoding) -> Ints:
        """E for d = 0, 1, …; the last entry, 0, is that of every larger d."""
        span = int(source.grid.qmax) - int(source.grid.qmin)
        return exponentials(int(source.exponent), span, self.table_bits, 1.0)

    def bounds(self) -> Ints:
        """B_1, B_2, … up to the largest S."""
        count = int(math.log(self.length) * 2**self.fine + 0.5)
        found: Ints = np.ceil(
            np.ldexp(np.exp((np.arange(1, count + 1) - 0.5) * 2.0**-self.fine), self.table_bits)
        ).astype(np.int64)
        return found
