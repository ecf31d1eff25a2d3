"""Functions of one tensor as tables from code to code, and the encodings of which definitions speak."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

WIDEST = 16
"""Inputs have at most so many bits."""

Ends = tuple[int, int, int, int]
"""What a table knows of an encoding: exponent, zero point, least and largest code."""


@dataclass(frozen=True)
class Lookup:
    """A function of one tensor, element by element: for every code of the input the result's.

    source, result: the encodings between which it holds. codes: how far each result is above the least code, 16 bits
    each, least significant byte first, in base64. They are stored and never computed again: libraries differ in the
    last bits of exp or erf, and a rounding beside a tie would move.
    """

    source: Ends
    result: Ends
    codes: str

    @classmethod
    def of(cls, source: Encoding, result: Encoding, values: Floats, rounding: str) -> Lookup:
        """values: the function of `source`'s real values, from the least code on; infinite ones saturate (exp).

        rounding: of the target.
        """
        above = result.quantize(np.nan_to_num(values, nan=np.nan), rounding=rounding) - int(result.grid.qmin)
        return cls(_ends(source), _ends(result), base64.b64encode(above.astype("<u2").tobytes()).decode())

    def fits(self, source: Encoding, result: Encoding) -> bool:
        """Whether it is a table between these encodings."""
        ends = accepts(source) and accepts(result) and (_ends(source), _ends(result)) == (self.source, self.result)
        above = self._above()
        codes = self.source[3] - self.source[2] + 1
        return ends and len(above) == codes and int(above.max(initial=0)) <= self.result[3] - self.result[2]

    def results(self) -> Ints:
        """The result's codes, from the input's least code on."""
        return self._above() + self.result[2]

    def values(self) -> Floats:
        """The results as real values."""
        return np.ldexp((self.results() - self.result[1]).astype(np.float32), self.result[0])

    def _above(self) -> Ints:
        try:
            return np.frombuffer(base64.b64decode(self.codes, validate=True), "<u2").astype(np.int64)
        except ValueError:
            return np.zeros(0, np.int64)


def _ends(encoding: Encoding) -> Ends:
    grid = encoding.grid
    return int(encoding.exponent), int(encoding.zero_point), int(grid.qmin), int(grid.qmax)


def accepts(encoding: Encoding | None) -> bool:
    """Whether the definitions speak of an input with this encoding: one scale of 2^k, and not too many codes."""
    return (
        encoding is not None
        and encoding.scale.ndim == 0
        and encoding.is_power_of_two
        and encoding.grid.width <= WIDEST
        and -64 <= int(encoding.exponent) <= 64
    )
