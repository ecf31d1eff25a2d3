"""Exponents are exact, rounding is half to even: against `math` and `fractions`."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pow2quant.errors import EncodingError, NotPowerOfTwoError
from pow2quant.pow2_constraints import (
    ceil_exponent,
    divide_round,
    exact_exponent,
    power_of_two,
    requantize,
    saturate,
    shift_round,
)
from pow2quant.pow2_constraints.arithmetic import EXPONENTS
from tests import strategies as our

INT64 = st.integers(-(2**63), 2**63 - 1)
K = np.array(EXPONENTS)


def test_a_power_of_two_is_exact_for_every_normal_float32():
    powers = power_of_two(K)
    assert powers.dtype == np.float32
    assert [Fraction(float(p)) for p in powers] == [Fraction(2) ** k for k in EXPONENTS]
    np.testing.assert_array_equal(exact_exponent(powers), K)


def test_exponents_span_the_normal_float32():
    assert power_of_two(EXPONENTS[0]) == np.finfo(np.float32).tiny
    assert float(power_of_two(EXPONENTS[-1])) * 2 > float(np.finfo(np.float32).max)


@pytest.mark.parametrize("k", [EXPONENTS.start - 1, EXPONENTS.stop])
def test_a_power_that_is_no_normal_float32_is_refused(k):
    with pytest.raises(ValueError, match=rf"\[-126, 127\], got k = {k}$"):
        power_of_two([0, k, 1])


def test_powers_and_exponents_keep_the_shape():
    assert power_of_two(3).shape == exact_exponent(np.float32(8)).shape == ()
    assert power_of_two(np.zeros((2, 0), int)).shape == (2, 0)
    assert exact_exponent(np.ones((2, 3))).shape == ceil_exponent(np.ones((2, 3))).shape == (2, 3)


@pytest.mark.parametrize("toward", [0, np.inf], ids=["below", "above"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_one_ulp_beside_a_power_of_two_is_no_power_of_two(kind, toward):
    for k in EXPONENTS:
        neighbour = np.nextafter(kind(2.0**k), kind(toward))
        with pytest.raises(NotPowerOfTwoError):
            exact_exponent([1.0, neighbour])


@pytest.mark.parametrize("wrong", [0.0, -1.0, -0.0, 3.0, 0.1, math.inf, -math.inf, math.nan])
def test_the_error_names_the_tensor_and_the_value(wrong):
    with pytest.raises(NotPowerOfTwoError, match=rf"^conv1\.weight: {wrong!r} is not a power of two$") as caught:
        exact_exponent([0.5, wrong], "conv1.weight")
    assert isinstance(caught.value, EncodingError)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_ceil_exponent_is_exact_at_and_beside_every_power(kind):
    powers = np.ldexp(kind(1), K.astype(np.int32))
    np.testing.assert_array_equal(ceil_exponent(powers), K)
    np.testing.assert_array_equal(ceil_exponent(np.nextafter(powers, kind(0))), K)
    np.testing.assert_array_equal(ceil_exponent(np.nextafter(powers, kind(np.inf))), K + 1)


@given(st.floats(0, exclude_min=True, allow_infinity=False))
def test_ceil_exponent_is_the_smallest_that_covers(x):
    k = int(ceil_exponent(x))
    assert Fraction(2) ** (k - 1) < Fraction(x) <= Fraction(2) ** k


@given(INT64, st.integers(0, 80))
@example(2**63 - 1, 63)
@example(-(2**63), 63)
@example(-(2**63), 64)
@example(2**62, 63)
@example(2**62 + 1, 63)
@example(-1, 63)
def test_shift_round_rounds_half_to_even(value, shift):
    assert shift_round(value, shift) == round(Fraction(value, 2**shift))


@given(st.integers(-(2**40), 2**40), st.integers(1, 50))
def test_shift_round_rounds_ties_to_even(odd, shift):
    """Every example is a tie: an odd number of halves."""
    value = (2 * odd + 1) * 2 ** (min(shift, 20) - 1)
    assert shift_round(value, min(shift, 20)) == round(Fraction(2 * odd + 1, 2))


@given(st.integers(-(2**20), 2**20), st.integers(0, 42))
@example(-1, 63)
@example(0, 1000)
def test_a_negative_shift_multiplies(value, shift):
    assert shift_round(value, -shift) == value * 2**shift


@given(st.lists(st.tuples(st.integers(-(2**31), 2**31), st.integers(-20, 70)), min_size=1))
def test_shift_round_works_elementwise_and_broadcasts(pairs):
    values, shifts = map(np.array, zip(*pairs, strict=True))
    table = shift_round(values[:, None], shifts)
    assert table.dtype == np.int64
    assert table.tolist() == [[round(v / Fraction(2) ** s) for s in shifts.tolist()] for v in values.tolist()]


@pytest.mark.parametrize(("value", "shift", "expected"), [(5, 1, 2), (7, 1, 4), (-5, 1, -2), (-7, 1, -4), (6, 2, 2)])
def test_documented_shifts(value, shift, expected):
    assert shift_round(value, shift) == expected


@given(INT64, st.integers(1, 2**63 - 1))
@example(2**63 - 1, 2**63 - 1)
@example(-(2**63), 2**63 - 1)
@example(2**62, 2**63 - 1)
def test_divide_round_rounds_half_to_even(numerator, denominator):
    assert divide_round(numerator, denominator) == round(Fraction(numerator, denominator))


@given(st.integers(-(2**40), 2**40), st.integers(1, 2**20))
def test_divide_round_rounds_ties_to_even(odd, half):
    assert divide_round((2 * odd + 1) * half, 2 * half) == round(Fraction(2 * odd + 1, 2))


def test_divide_round_broadcasts():
    quotients = divide_round(np.arange(-8, 9)[:, None], [1, 2, 3, 4])
    assert quotients.tolist() == [[round(Fraction(n, d)) for d in (1, 2, 3, 4)] for n in range(-8, 9)]


def test_saturate_clips_to_the_ends_of_the_grid():
    assert saturate([-200, -128, 0, 127, 128], -128, 127).tolist() == [-128, -128, 0, 127, 127]
    assert saturate([[-9, 9], [-9, 9]], [-8, -2], [7, 1]).tolist() == [[-8, 1], [-8, 1]]


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1), st.integers(-10, 40), our.grids(), st.data())
def test_requantize_rounds_then_moves_then_saturates(accumulators, shift, grid, data):
    low, high = int(grid.qmin), int(grid.qmax)
    zero_point = data.draw(st.integers(low, high))
    expected = [min(max(round(a / Fraction(2) ** shift) + zero_point, low), high) for a in accumulators]
    assert requantize(accumulators, shift, zero_point, low, high).tolist() == expected


def test_requantize_works_per_channel():
    codes = requantize([[10, 10], [-300, 300]], shift=[1, 2], zero_point=[4, 0], low=[0, -8], high=[15, 7])
    assert codes.tolist() == [[9, 2], [0, 7]]
