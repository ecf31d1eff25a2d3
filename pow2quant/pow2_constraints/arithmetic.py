"""The arithmetic of power-of-two quantization, defined once: exponents, rounding, shifting, saturation.

Everything here is exact. Integers are int64 (or Python's own), floats are only ever scaled by powers of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import NotPowerOfTwoError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

EXPONENTS = range(-126, 128)
"""Exponents k for which 2^k is a normal float32."""


def power_of_two(exponent: ArrayLike) -> NDArray[np.float32]:
    """2^k, exactly.

    exponent: integers of any shape, each in `EXPONENTS`. Returns float32 of the same shape.
    Raises ValueError for an exponent whose power is no normal float32.
    """
    k = np.asarray(exponent, dtype=np.int64)
    outside = (k < EXPONENTS.start) | (k >= EXPONENTS.stop)
    if outside.any():
        first, last = EXPONENTS[0], EXPONENTS[-1]
        raise ValueError(f"2^k is a normal float32 for k in [{first}, {last}], got k = {k[outside][0]}")
    return np.ldexp(np.float32(1), k.astype(np.int32))


def exact_exponent(scale: ArrayLike, name: str = "scale") -> NDArray[np.int64]:
    """The k of scale = 2^k, without tolerance.

    scale: positive floats of any shape. Returns int64 of the same shape.
    Raises NotPowerOfTwoError, naming `name`, when a scale is not exactly a power of two (one ulp suffices).
    """
    values = np.asarray(scale)
    mantissa, exponent = np.frexp(values)
    wrong = mantissa != 0.5  # so it is for 0, negative numbers, infinity and NaN too
    if wrong.any():
        raise NotPowerOfTwoError(f"{name}: {float(values[wrong][0])!r} is not a power of two")
    return np.asarray(exponent - 1, np.int64)


def ceil_exponent(x: ArrayLike) -> NDArray[np.int64]:
    """The smallest k with 2^k >= x, exactly (`ceil(log2(x))` is wrong one ulp above a power of two).

    x: positive floats of any shape. Returns int64 of the same shape.
    """
    mantissa, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    return np.asarray(exponent - (mantissa == 0.5), np.int64)


def shift_round(value: ArrayLike, shift: ArrayLike) -> NDArray[np.int64]:
    """value / 2^shift, rounded half to even; a negative shift multiplies.

    value: int64 of any shape; shift: integers broadcastable to it. Exact for every value and every shift to the right;
    to the left, while value * 2^-shift fits int64.
    `shift_round(5, 1)` is 2 (2.5 to even), `shift_round(7, 1)` is 4, `shift_round(-5, 1)` is -2.
    """
    v, s = np.asarray(value, np.int64), np.asarray(shift, np.int64)
    right = np.clip(s, 1, 63)
    floor = np.right_shift(v, right)
    rest = v - np.left_shift(floor, right)
    half = np.left_shift(np.int64(1), right - 1)
    rounded = floor + (rest > half - (floor & 1))  # an odd floor also gives way to a tie
    if (right == s).all():
        return np.asarray(rounded)
    left = np.left_shift(v, np.clip(-s, 0, 63))
    return np.where(s > 63, 0, np.where(s > 0, rounded, left))


def divide_round(numerator: ArrayLike, denominator: ArrayLike) -> NDArray[np.int64]:
    """numerator / denominator, rounded half to even (the arithmetic of averages).

    numerator: int64 of any shape; denominator: positive integers broadcastable to it.
    """
    n, d = np.asarray(numerator, np.int64), np.asarray(denominator, np.int64)
    floor, rest = np.divmod(n, d)
    return np.asarray(floor + (rest > d - rest - (floor & 1)))


def saturate(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> NDArray[np.int64]:
    """Clips integers to [low, high], the ends of a grid."""
    return np.clip(np.asarray(value, np.int64), np.asarray(low, np.int64), np.asarray(high, np.int64))


def requantize(
    accumulator: ArrayLike, shift: ArrayLike, zero_point: ArrayLike, low: ArrayLike, high: ArrayLike
) -> NDArray[np.int64]:
    """saturate(round_half_even(accumulator / 2^shift) + zero_point): how a layer's result becomes codes.

    accumulator: int64 in units of s_in * s_w; shift = k_out - (k_in + k_w); [low, high]: the output grid.
    """
    return saturate(shift_round(accumulator, shift) + np.asarray(zero_point, np.int64), low, high)
