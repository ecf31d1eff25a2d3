"""Every rounding rule, against Python's fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pow2quant.pow2_constraints.arithmetic import ROUNDINGS, divide_round, mean_round, requantize, shift_round

HALF = Fraction(1, 2)
SUMS = st.integers(-(2**40), 2**40)
NEAR = st.integers(-40, 40)


def half_away(x: Fraction) -> int:
    return math.floor(x + HALF) if x >= 0 else math.ceil(x - HALF)


EXACT = {
    "half_even": round,
    "half_up": lambda x: math.floor(x + HALF),
    "half_away": half_away,
    "truncate": math.trunc,
    "floor": math.floor,
}


def gemmlowp(value: int, shift: int) -> int:
    """`MultiplyByQuantizedMultiplier(value, 2^30, 1 - shift)` of gemmlowp's fixedpoint.h, in integers."""
    left, right = max(0, 1 - shift), max(0, shift - 1)
    product = (value << left) * 2**30
    nudge = 2**30 if product >= 0 else 1 - 2**30
    high = abs(product + nudge) // 2**31 * (1 if product + nudge >= 0 else -1)
    mask = (1 << right) - 1
    threshold = (mask >> 1) + (high < 0)
    return (high >> right) + ((high & mask) > threshold)


def test_each_rule_has_a_brute_force_here():
    assert set(ROUNDINGS) == {*EXACT, "gemmlowp"}


@pytest.mark.parametrize("rule", EXACT)
@given(value=SUMS | NEAR, shift=st.integers(-8, 70))
def test_a_shift_rounds_the_exact_quotient(rule, value, shift):
    assert shift_round(value, shift, rule) == EXACT[rule](Fraction(value) / Fraction(2) ** shift)


@pytest.mark.parametrize("rule", EXACT)
def test_shifts_beyond_all_bits_leave_what_the_exact_quotient_leaves(rule):
    for value in (-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1):
        for shift in (62, 63, 64, 65, 200):
            assert shift_round(value, shift, rule) == EXACT[rule](Fraction(value, 2**shift)), (value, shift)


@given(value=st.integers(-(2**30), 2**30) | NEAR, shift=st.integers(0, 30))
def test_the_double_rounding_is_that_of_fixed_point_multiplication(value, shift):
    assert shift_round(value, shift, "gemmlowp") == gemmlowp(value, shift)


@pytest.mark.parametrize("rule", EXACT)
@given(value=SUMS | NEAR, count=st.integers(1, 100), shift=st.integers(-8, 8))
def test_averages_round_the_exact_quotient(rule, value, count, shift):
    exact = Fraction(value, count) / Fraction(2) ** shift
    assert mean_round(value, count, shift, rule) == EXACT[rule](exact)
    assert divide_round(value, count, rule) == EXACT[rule](Fraction(value, count))


@given(value=st.integers(-(2**20), 2**20) | NEAR, log=st.integers(0, 8), shift=st.integers(0, 8))
def test_a_double_rounded_average_of_a_power_of_two_is_a_shift(value, log, shift):
    assert mean_round(value, 2**log, shift, "gemmlowp") == shift_round(value, log + shift, "gemmlowp")


def test_a_double_rounded_average_is_rounded_twice():
    assert mean_round([49, -49, 245], 49, 0, "gemmlowp").tolist() == [1, -1, 5]
    assert mean_round(171, 49, 0, "gemmlowp") == 4  # 3.49 becomes 56 / 16, and that 4
    assert mean_round(171, 49, 0) == 3


@pytest.mark.parametrize("rule", ROUNDINGS)
def test_arrays_are_rounded_as_their_elements_are(rule):
    values, shifts = np.arange(-20, 21), np.arange(-2, 5)[:, None]
    one_by_one = [[int(shift_round(v, s, rule)) for v in values] for s in shifts[:, 0]]
    assert shift_round(values, shifts, rule).tolist() == one_by_one


def test_the_rules_differ_where_they_should():
    rounded = {rule: requantize([-6, -5, -3, -2, 2, 3, 5, 6], 2, 0, -99, 99, rule).tolist() for rule in ROUNDINGS}
    assert rounded == {
        "half_even": [-2, -1, -1, 0, 0, 1, 1, 2],
        "half_up": [-1, -1, -1, 0, 1, 1, 1, 2],
        "half_away": [-2, -1, -1, -1, 1, 1, 1, 2],
        "gemmlowp": [-2, -1, -1, -1, 1, 1, 2, 2],
        "truncate": [-1, -1, 0, 0, 0, 0, 1, 1],
        "floor": [-2, -2, -1, -1, 0, 0, 1, 1],
    }


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="half_odd"):
        shift_round(3, 1, "half_odd")
