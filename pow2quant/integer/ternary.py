"""Ternary weights as integers: two bits and two shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.integer.program import Ints


@dataclass(frozen=True, eq=False)
class Ternary:
    """A weight whose every output channel holds -2^negative, 0 and 2^positive only.

    codes: -1, 0 or 1, (C_out, …). negative, positive: shifts, (C_out,); 0 where a channel has none of that sign.
    """

    codes: Ints
    negative: Ints
    positive: Ints

    @classmethod
    def of(cls, weight: Ints) -> Ternary | None:
        """The same integers (C_out, …), or None where a channel holds others. [[-4, 0, 1]] has shifts 2 and 0."""
        rows = weight.reshape(len(weight), -1)
        shifts = []
        for side in (-rows, rows):
            largest = np.maximum(side.max(1, initial=1), 1)
            shift = np.frexp(largest)[1] - 1
            if ((side > 0) & (side != largest[:, None])).any() or (largest != np.left_shift(1, shift)).any():
                return None
            shifts.append(shift.astype(np.int64))
        return cls(np.sign(weight), *shifts)

    @property
    def is_shifted(self) -> bool:
        """Whether the codes are not the integers themselves."""
        return bool(self.negative.any() or self.positive.any())

    def packed(self) -> NDArray[np.uint8]:
        """(C_out, bytes): four codes to a byte, the first in its lowest bits, two's complement."""
        rows = self.codes.reshape(len(self.codes), -1)
        padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).reshape(len(rows), -1, 4) & 3
        packed: NDArray[np.uint8] = (padded << (2 * np.arange(4))).sum(2).astype(np.uint8)
        return packed
