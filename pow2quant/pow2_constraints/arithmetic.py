"""The arithmetic of power-of-two quantization, defined once: exponents, rounding, shifting, saturation.

Everything here is exact. Integers are int64 (or Python's own), floats are only ever scaled by powers of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

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


ROUNDINGS = {
    "half_even": "to the nearest integer; halves to the even one",
    "half_up": "to the nearest integer; halves up, as (v + 2^(s - 1)) >> s does",
    "half_away": "to the nearest integer; halves away from zero",
    "gemmlowp": "first v / 2 with halves up, then v / 2^(s - 1) with halves away from zero",
    "truncate": "towards zero",
    "floor": "down, as v >> s does",
}
"""The rules by which v / 2^s becomes an integer, in words. Every layer of the package names them so."""

HALF_EVEN: Final = "half_even"
"""ONNX's rule, and the default everywhere."""


def shift_round(value: ArrayLike, shift: ArrayLike, rounding: str = HALF_EVEN) -> NDArray[np.int64]:
    """value / 2^shift, rounded by a rule of `ROUNDINGS`; a negative shift multiplies.

    value: int64 of any shape; shift: integers broadcastable to it. Exact for every value (`gemmlowp`: below 2^63 - 1)
    and every shift to the right; to the left, while value * 2^-shift fits int64.
    `shift_round(5, 1)` is 2 (2.5 to even), `shift_round(7, 1)` is 4, `shift_round(-5, 1)` is -2.
    """
    v, s = np.asarray(value, np.int64), np.asarray(shift, np.int64)
    if rounding == "gemmlowp":
        v, rounding = v + ((v & 1) & (s > 0)), "half_away"  # half of it, rounded up, is then exact
    right = np.clip(s, 1, 63)
    floor = np.right_shift(v, right)
    rest = v - np.left_shift(floor, right)
    half = np.left_shift(np.int64(1), right - 1)
    rounded = floor + _upwards(v, floor, rest, half, rounding)
    if (right == s).all():
        return np.asarray(rounded)
    left = np.left_shift(v, np.clip(-s, 0, 63))
    return np.where(s > 63, _vanishing(v, s, rounding), np.where(s > 0, rounded, left))


def divide_round(numerator: ArrayLike, denominator: ArrayLike, rounding: str = HALF_EVEN) -> NDArray[np.int64]:
    """numerator / denominator, rounded by a rule of `ROUNDINGS` (the arithmetic of averages).

    numerator: int64 of any shape; denominator: positive integers broadcastable to it. `gemmlowp` is a rule for shifts;
    `mean_round` has its averages.
    """
    n, d = np.asarray(numerator, np.int64), np.asarray(denominator, np.int64)
    floor, rest = np.divmod(n, d)
    return np.asarray(floor + _upwards(n, floor, rest, d - rest, rounding))


def mean_round(total: ArrayLike, count: ArrayLike, shift: int, rounding: str = HALF_EVEN) -> NDArray[np.int64]:
    """total / (count * 2^shift), rounded by a rule of `ROUNDINGS`: the average of `count` values in other units.

    total: int64 of any shape; count: positive integers broadcastable to it. By `gemmlowp`, as TFLite Micro does it, the
    factor is 1 / count in 31 bits, which is not exact unless count is a power of two.
    """
    t, n = np.asarray(total, np.int64), np.asarray(count, np.int64)
    if rounding != "gemmlowp":
        return divide_round(np.left_shift(t, max(0, -shift)), np.left_shift(n, max(0, shift)), rounding)
    log = np.frexp(n.astype(np.float64))[1].astype(np.int64) - 1  # floor(log2(count)), exact below 2^53
    right = shift - 1 + log
    product = np.left_shift(t, np.maximum(-right, 0)) * (np.left_shift(np.int64(1) << 30, log) // n)
    return shift_round(shift_round(product, 31, "half_up"), np.maximum(right, 0), "half_away")


def round_real(x: ArrayLike, rounding: str = HALF_EVEN, shift: ArrayLike = 0) -> NDArray[Any]:
    """Real numbers, each the exact quotient v / 2^shift of an integer, rounded by a rule of `ROUNDINGS`.

    x: float32 or float64 of any shape, with v below 2^24 or 2^53. shift: integers broadcastable to it; only `gemmlowp`
    looks at it. The same integers as `shift_round(v, shift, rounding)`, in the type of x.
    """
    real = np.asarray(x)
    if rounding == "gemmlowp":
        s = np.maximum(np.asarray(shift, np.int64), 0)
        odd = (np.mod(np.ldexp(real, s), 2) == 1) & (s > 0)
        real, rounding = real + np.ldexp(odd.astype(real.dtype), -s), "half_away"
    if rounding == "half_even":
        return np.asarray(np.rint(real))
    floor = np.floor(real)
    return np.asarray(floor + _upwards(real, floor, real - floor, 0.5, rounding))


def _upwards(value: NDArray[Any], floor: NDArray[Any], rest: Any, other: Any, rounding: str) -> NDArray[np.bool_] | int:
    """Whether a quotient is rounded up from its floor.

    rest: how far it is from there. other: how far at the middle, or how far from the next integer.
    """
    if rounding == HALF_EVEN:
        return np.asarray(rest > other - (floor & 1))  # an odd floor also gives way to a tie
    if rounding == "half_up":
        return np.asarray(rest >= other)
    if rounding == "half_away":
        return np.asarray((rest > other) | ((rest == other) & (value >= 0)))
    if rounding == "truncate":
        return np.asarray((value < 0) & (rest > 0))
    if rounding == "floor":
        return 0
    raise ValueError(f"rounding: {rounding!r} is unknown; known are {', '.join(ROUNDINGS)}")


def _vanishing(value: NDArray[np.int64], shift: NDArray[np.int64], rounding: str) -> NDArray[np.int64]:
    """value / 2^shift for a shift beyond 63: nothing but a sign is left."""
    tie = (shift == 64) & (value == np.iinfo(np.int64).min)
    below = (value < 0) if rounding == "floor" else tie & (rounding == "half_away")
    return -below.astype(np.int64)


def saturate(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> NDArray[np.int64]:
    """Clips integers to [low, high], the ends of a grid."""
    return np.clip(np.asarray(value, np.int64), np.asarray(low, np.int64), np.asarray(high, np.int64))


def requantize(
    accumulator: ArrayLike,
    shift: ArrayLike,
    zero_point: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    rounding: str = HALF_EVEN,
) -> NDArray[np.int64]:
    """saturate(round(accumulator / 2^shift) + zero_point): how a layer's result becomes codes.

    accumulator: int64 in units of s_in * s_w; shift = k_out - (k_in + k_w); [low, high]: the output grid.
    rounding: a rule of `ROUNDINGS`.
    """
    return saturate(shift_round(accumulator, shift, rounding) + np.asarray(zero_point, np.int64), low, high)
