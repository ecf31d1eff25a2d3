"""Softmax in integers: a table of exponentials, their sum, and at most one division per row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding

    Ints = NDArray[np.int64]

FINE = 24
"""Probabilities are integers in units of 2^-24."""

HIDDEN = 1 << 18
"""So much lower than its code, beyond what any code or table reaches, lies what a softmax does not keep."""


@dataclass(frozen=True)
class Softmax:
    """Softmax along an axis, with one division per row.

    Of codes q in units of 2^k: d = max q - q, E = round(2^m exp(-d factor 2^k)), S = sum E, r = floor(2^R / S), and
    p = floor(E r 2^(24 - R)) in units of 2^-24. What is not kept lies 2^18 lower: it has E = 0, and does not count in
    the maximum, unless nothing of its row is kept.

    axis: from the end. table_bits, reciprocal_bits: m and R. keep: the shape of a mask and its truth values, packed,
    in hexadecimal; it broadcasts against the tensor, and keeps something of every row. masked: a second operand says
    what is kept, by values of more than 0.5, and broadcasts likewise.

    levels: 0; or p is one of so many powers of two, from 1 down, or 0, and nothing is divided. It is 2^-a, where so
    many a >= 0 have 3 E 2^a <= 2 S, and 0 from a = levels on. That is log2(S / E), rounded as in FQ-ViT's
    Log-Int-Softmax (Lin et al. 2022).
    """

    axis: int
    table_bits: int
    reciprocal_bits: int
    factor: float = 1.0
    keep: tuple[tuple[int, ...], str] | None = None
    masked: bool = False
    levels: int = 0

    @classmethod
    def of(
        cls,
        axis: int,
        length: int,
        bits: int,
        factor: float = 1.0,
        keep: NDArray[np.bool_] | None = None,
        masked: bool = False,
        levels: int = 0,
    ) -> Softmax | None:
        """The definition for rows of so many values and a result of so many bits; None for rows that are too long.

        Up to 8 bits and rows of 4,096, m = 12 and R = 24 keep every integer within 24 bits; the reciprocal then costs
        at most 1/16 of the result's step.
        """
        packed = None if keep is None else (keep.shape, np.packbits(keep).tobytes().hex())
        if bits <= 8 and length <= 4096 and not levels:
            return cls(axis, 12, FINE, factor, packed, masked)
        table_bits = min(16, 24 - max(1, length - 1).bit_length())
        return cls(axis, table_bits, 40, factor, packed, masked, levels) if table_bits >= 8 else None

    @property
    def is_single(self) -> bool:
        """Whether every integer is at most 2^24: float32 and int32 hold it."""
        return self.reciprocal_bits == FINE

    def table(self, encoding: Encoding) -> Ints:
        """E for d = 0, 1, …; the last entry, 0, is that of every larger d."""
        span = int(encoding.grid.qmax) - int(encoding.grid.qmin)
        return exponentials(int(encoding.exponent), span, self.table_bits, self.factor)

    def powers(self) -> Ints:
        """p, where there are levels, for floor(2 S / (3 E)) = 0, 1, …; the last, 0, is that of all larger ones."""
        quotients = np.arange(1 << (self.levels - 1))
        return np.append(1 << (FINE - np.frexp(quotients)[1].astype(np.int64)), 0)

    def kept(self) -> NDArray[np.bool_] | None:
        """The mask, or None."""
        if self.keep is None:
            return None
        shape, text = self.keep
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=math.prod(shape))
        return bits.reshape(shape).astype(bool)


@lru_cache(maxsize=256)
def exponentials(exponent: int, span: int, bits: int, factor: float) -> Ints:
    """round(2^bits exp(-d factor 2^exponent)) for d = 0, 1, …, at most `span`; the last entry is the first 0."""
    step = math.ldexp(factor, exponent)
    count = min(span, int((bits + 1) * math.log(2) / step) + 1) + 1
    entries = np.rint(np.ldexp(np.exp(-step * np.arange(count, dtype=np.float64)), bits)).astype(np.int64)
    entries = np.append(entries[entries > 0], 0)
    entries.setflags(write=False)
    return entries
