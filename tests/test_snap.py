"""The choosers of k, against brute force over every exponent and every even zero point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pow2quant.errors import ConfigError, EncodingError
from pow2quant.pow2_constraints import CHOOSERS, Encoding, Format, IntGrid, Observed, choose
from pow2quant.pow2_constraints.snap import (
    CANDIDATES,
    CHANNEL_SPREAD,
    FREE_FRACTIONS,
    HIGHEST,
    LOWEST,
    PERCENTILE,
    least_on_even,
)
from tests import strategies as our

RULES = sorted(CHOOSERS)
MANY = 400
SYMMETRIC = st.booleans()
ROWS = st.sampled_from([(1, 7), (2, 5), (3, 1), (4, 6)])
VECTORS = st.sampled_from([(1,), (2,), (5,), (16,)])


def zero_points(x, form):
    """Every zero point that a format allows for data x."""
    bits = form.grid.width
    return range(0, 2**bits, 2) if not form.symmetric and (x < 0).any() else [0]


def saturates(x, k, zero_point, grid):
    """Whether a code of x lies off the grid."""
    q = np.rint(x.astype(np.float64) / 2.0**k) + zero_point
    return bool((q < grid.qmin).any() or (q > grid.qmax).any())


def smallest_exponent(x, form):
    """The least k within the bounds at which some allowed zero point saturates nothing, by trying all."""
    for k in range(LOWEST, HIGHEST + 1):
        if not all(saturates(x, k, z, form.grid) for z in zero_points(x, form)):
            return k
    return HIGHEST


def error(x, encoding):
    """The squared error of fake quantization, in float64."""
    return float(np.square(x.astype(np.float64) - encoding.fake_quantize(x)).sum())


def least_error(x, form, top, floor=LOWEST):
    """The least error over the candidates of `mse` between two exponents, by trying all."""
    exponents = range(max(floor, top - CANDIDATES + 1), top + 1)
    return min(error(x, Encoding(2.0**k, z, form.grid)) for k in exponents for z in zero_points(x, form))


def row(encoding, c, form):
    """Channel c of a per-channel encoding and format, as those of a tensor."""
    bits = form.bits[c] if isinstance(form.bits, tuple) else form.bits
    one = Format(bits, form.symmetric, form.power_of_2)
    return Encoding(encoding.scale[c], encoding.zero_point[c], one.grid), one


def check_legal(encoding, form, low):
    """What every power-of-two encoding must be: on its grid (Encoding checks), within bounds, zero points even."""
    assert encoding.grid == IntGrid(form.bits, signed=form.symmetric)
    assert encoding.axis == form.axis
    assert encoding.is_power_of_two
    assert LOWEST <= encoding.exponent.min() <= encoding.exponent.max() <= HIGHEST
    assert not (encoding.zero_point % 2).any()
    assert not encoding.zero_point[..., low >= 0 if form.axis is not None else low[0] >= 0].any()
    if form.symmetric:
        assert encoding.symmetric


@pytest.mark.parametrize("rule", RULES)
@given(our.arrays(VECTORS) | our.extreme_arrays(), our.widths(), SYMMETRIC)
@example(np.array([-3.4e38, 3.4e38], np.float32), 8, False)
@example(np.array([-3.4e38], np.float32), 8, False)
@example(np.array([3.4e38], np.float32), 2, True)
@example(np.array([-1e-45], np.float32), 8, False)
def test_every_choice_is_legal(rule, x, bits, symmetric):
    form = Format(bits, symmetric)
    check_legal(choose(rule, Observed.of(x), form), form, np.array([x.min()]))


@pytest.mark.parametrize("rule", RULES)
@given(our.arrays(ROWS) | our.extreme_arrays((3, 2)), SYMMETRIC, st.data())
def test_every_choice_per_channel_is_legal_and_spread_at_most_so_far(rule, x, symmetric, data):
    x = x * np.ldexp(np.float32(1), data.draw(hnp.arrays(np.int32, (len(x), 1), elements=st.integers(-30, 0))))
    bits = data.draw(our.widths() | st.tuples(*[our.widths()] * len(x)))
    form = Format(bits, symmetric, axis=0)
    encoding = choose(rule, Observed.of(x, 0), form)
    check_legal(encoding, form, x.min(1))
    widest = choose("minmax", Observed.of(x, 0), form).exponent.max()
    assert encoding.exponent.min() >= widest - CHANNEL_SPREAD


@settings(max_examples=MANY)
@given(our.arrays(VECTORS), our.widths(2, 8), SYMMETRIC)
@example(np.array([127.5], np.float32), 8, True)
@example(np.array([-128.5], np.float32), 8, True)
@example(np.array([-0.5, 254.5], np.float32), 8, False)
@example(np.array([-1.0, 254.0], np.float32), 8, False)
@example(np.array([-3.0, 0.0], np.float32), 2, False)
@example(np.array([-0.5, 0.5], np.float32), 2, False)
def test_minmax_is_the_smallest_exponent_that_saturates_nothing(x, bits, symmetric):
    assume(x.any())
    form = Format(bits, symmetric)
    encoding = choose("minmax", Observed.of(x), form)
    k, zero_point = int(encoding.exponent), int(encoding.zero_point)
    assert k == smallest_exponent(x, form)
    assert zero_point in zero_points(x, form)
    assert not saturates(x, k, zero_point, form.grid)
    assert (np.abs(x - encoding.fake_quantize(x)) <= encoding.scale / 2).all()


@given(our.extreme_arrays(), our.widths(2, 8), SYMMETRIC)
def test_minmax_is_the_smallest_legal_exponent_for_extreme_data(x, bits, symmetric):
    assume(x.any())
    form = Format(bits, symmetric)
    encoding = choose("minmax", Observed.of(x), form)
    assert encoding.exponent == smallest_exponent(x, form)
    if encoding.exponent < HIGHEST:
        assert not saturates(x, int(encoding.exponent), int(encoding.zero_point), form.grid)


@settings(max_examples=MANY)
@given(our.arrays(ROWS), SYMMETRIC, st.data())
def test_minmax_per_channel_is_minmax_of_every_channel_above_the_floor(x, symmetric, data):
    x = x * np.ldexp(np.float32(1), data.draw(hnp.arrays(np.int32, (len(x), 1), elements=st.integers(-30, 0))))
    assume(x.any())
    bits = data.draw(our.widths(2, 6) | st.tuples(*[our.widths(2, 6)] * len(x)))
    form = Format(bits, symmetric, axis=0)
    encoding = choose("minmax", Observed.of(x, 0), form)
    alone = [smallest_exponent(values, row(encoding, c, form)[1]) for c, values in enumerate(x)]
    floor = max(k for k, values in zip(alone, x, strict=True) if values.any()) - CHANNEL_SPREAD
    assert encoding.exponent.tolist() == [max(k, floor) for k in alone]
    for c, values in enumerate(x):
        one, single = row(encoding, c, form)
        assert not saturates(values, int(one.exponent), int(one.zero_point), single.grid)


@settings(max_examples=MANY)
@given(our.arrays(VECTORS), our.widths(2, 7), SYMMETRIC)
@example(np.array([-0.5, 0.25, 7.0], np.float32), 2, False)
@example(np.array([-100.0, 1.0, 1.0, 1.0, 2.0], np.float32), 3, False)
@example(np.array([1.0, 1.0, 1.0, 100.0], np.float32), 3, True)
def test_mse_is_the_least_error_over_its_candidates(x, bits, symmetric):
    form = Format(bits, symmetric)
    top = int(choose("minmax", Observed.of(x), form).exponent)
    encoding = choose("mse", Observed.of(x), form)
    assert top - CANDIDATES < encoding.exponent <= top
    assert error(x, encoding) <= least_error(x, form, top) * (1 + 1e-5)


@settings(max_examples=MANY)
@given(our.arrays(ROWS), SYMMETRIC, st.data())
def test_mse_per_channel_is_the_least_error_in_every_channel(x, symmetric, data):
    bits = data.draw(our.widths(2, 5) | st.tuples(*[our.widths(2, 5)] * len(x)))
    form = Format(bits, symmetric, axis=0)
    tops = choose("minmax", Observed.of(x, 0), form).exponent
    encoding = choose("mse", Observed.of(x, 0), form)
    for c, values in enumerate(x):
        one, single = row(encoding, c, form)
        best = least_error(values, single, int(tops[c]), max(LOWEST, int(tops.max()) - CHANNEL_SPREAD))
        assert error(values, one) <= best * (1 + 1e-5)


@pytest.mark.parametrize("bits", [4, 8, 16, 24])
@pytest.mark.parametrize("tails", [1, 3, 1000])
def test_mse_finds_the_zero_point_of_a_large_sample(bits, tails):
    """The convex search, against every zero point around the choice and a coarse pass over all."""
    x = np.random.default_rng(bits).standard_t(tails, 4000).astype(np.float32) - np.float32(0.3)
    form = Format(bits, symmetric=False)
    top = int(choose("minmax", Observed.of(x), form).exponent)
    encoding = choose("mse", Observed.of(x), form)
    chosen = int(encoding.zero_point)
    near = range(max(0, chosen - 20), min(2**bits, chosen + 21), 2)
    coarse = range(0, 2**bits, max(2, 2**bits // 64))
    others = [
        error(x, Encoding(2.0**k, z, form.grid))
        for k in range(max(LOWEST, top - CANDIDATES + 1), top + 1)
        for z in (*near, *coarse)
    ]
    assert error(x, encoding) <= min(others) * (1 + 1e-5)


@pytest.mark.parametrize("axis", [None, 0])
def test_mse_of_more_data_than_one_block(axis):
    x = np.sort(np.abs(np.random.default_rng(0).standard_t(4, (3, 200_000)).astype(np.float32)))
    form = Format(4, symmetric=True, axis=axis)
    encoding = choose("mse", Observed.of(x, axis), form)
    for c, values in enumerate(x if axis is not None else [x.ravel()]):
        one, single = row(encoding, c, form) if axis is not None else (encoding, form)
        top = int(choose("minmax", Observed.of(values), single).exponent)
        assert error(values, one) <= least_error(values, single, top) * (1 + 1e-5)


def test_mse_gives_up_an_outlier_where_minmax_does_not():
    x = np.append(np.random.default_rng(1).normal(size=4096), 12).astype(np.float32)
    for symmetric in (True, False):
        form = Format(4, symmetric)
        assert choose("mse", Observed.of(x), form).exponent < choose("minmax", Observed.of(x), form).exponent


@pytest.mark.parametrize("symmetric", [True, False])
def test_of_equal_errors_the_larger_scale_wins(symmetric):
    """On two bits, 1.5 becomes 1 at scale 1 and 2 at scale 2; 0.25 becomes 0 and -2 is exact at both."""
    assert choose("mse", Observed.of([1.5, 0.25, -2.0]), Format(2, symmetric)).exponent == 1


@settings(max_examples=300)
@given(st.integers(0, 5000), st.integers(0, 5000), st.lists(st.integers(-100, 10_100), max_size=3), st.integers(0, 900))
def test_the_search_over_even_zero_points_finds_the_minimum(first, count, centres, flat):
    def convex(z):
        return sum((np.maximum(np.abs(z - c) - flat, 0) ** 2 for c in centres), np.zeros(len(z)))

    first, last = 2 * (first // 2), 2 * (first // 2 + count)
    zero_point, value = least_on_even(convex, first, last)
    every = np.arange(first, last + 1, 2)
    assert zero_point in every
    assert value == convex(np.array([zero_point]))[0] == convex(every).min()


@given(our.arrays(VECTORS), our.widths(), SYMMETRIC)
def test_percentile_of_a_small_sample_is_minmax(x, bits, symmetric):
    form = Format(bits, symmetric)
    assert choose("percentile", Observed.of(x), form) == choose("minmax", Observed.of(x), form)


@pytest.mark.parametrize("symmetric", [True, False])
@given(outliers=st.integers(1, 8), sign=st.sampled_from([-1, 1]), shift=st.integers(-6, 6))
def test_percentile_keeps_the_central_part(symmetric, outliers, sign, shift):
    """Of 10,001 sorted values the 5th from either end is the last that counts."""
    x = np.random.default_rng(outliers).uniform(-1, 1, 10_001)
    x[:outliers] = 50 * sign
    x = np.random.default_rng(0).permutation(x * 2.0**shift).astype(np.float32)
    dropped = round((100 - PERCENTILE) / 200 * 10_000)
    central = np.sort(x)[dropped:-dropped]
    form = Format(8, symmetric)
    assert dropped == 5
    assert choose("percentile", Observed.of(x), form) == choose("minmax", Observed.of(central), form)


def test_percentile_per_channel_is_that_of_every_channel():
    x = np.random.default_rng(2).standard_t(2, (3, 5000)).astype(np.float32)
    form = Format(8, symmetric=True, axis=0)
    encoding = choose("percentile", Observed.of(x, 0), form)
    for c, values in enumerate(x):
        one, single = row(encoding, c, form)
        assert one == choose("percentile", Observed.of(values), single)


@pytest.mark.parametrize("rule", RULES)
@given(our.arrays(VECTORS), our.widths(2, 8), SYMMETRIC, st.integers(-8, 8))
def test_data_times_a_power_of_two_moves_the_exponent(rule, x, bits, symmetric, shift):
    form = Format(bits, symmetric)
    assume(choose("minmax", Observed.of(x), form).exponent - 8 - CANDIDATES >= LOWEST)
    assume(x.any())
    one, other = choose(rule, Observed.of(x), form), choose(rule, Observed.of(x * np.float32(2.0**shift)), form)
    assert other.exponent == one.exponent + shift
    assert other.zero_point == one.zero_point


@pytest.mark.parametrize("rule", RULES)
@given(our.arrays(VECTORS), our.widths(2, 8), SYMMETRIC, st.randoms(use_true_random=False))
def test_the_order_of_the_data_does_not_matter(rule, x, bits, symmetric, random):
    shuffled = np.array(random.sample(x.tolist(), len(x)), np.float32)
    form = Format(bits, symmetric)
    one, other = choose(rule, Observed.of(x), form), choose(rule, Observed.of(shuffled), form)
    if rule == "mse":  # up to the rounding of a sum in another order
        assert error(x, one) == pytest.approx(error(x, other), rel=1e-5)
    else:
        assert one == other


@pytest.mark.parametrize("rule", RULES)
@given(our.arrays(VECTORS), our.widths(2, 8))
def test_signed_choices_do_not_depend_on_the_order_of_channels(rule, x, bits):
    rows = np.stack([x, x[::-1] * 2, x / 4])
    form = Format(bits, symmetric=True, axis=0)
    forward, backward = (choose(rule, Observed.of(r, 0), form).exponent for r in (rows, rows[::-1]))
    np.testing.assert_array_equal(forward, backward[::-1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("power_of_2", [True, False])
class TestDegenerateData:
    def test_zeros(self, rule, symmetric, power_of_2):
        encoding = choose(rule, Observed.of(np.zeros((4, 5))), Format(8, symmetric, power_of_2))
        assert encoding.zero_point == 0
        assert 2.0**-8 <= encoding.scale <= 2.0**-6

    def test_an_all_zero_channel(self, rule, symmetric, power_of_2):
        x = np.array([[0, 0, 0], [1, 0.5, 0.25]])
        encoding = choose(rule, Observed.of(x, 0), Format(8, symmetric, power_of_2, axis=0))
        assert not encoding.fake_quantize(x)[0].any()
        if power_of_2:
            assert encoding.exponent[0] == encoding.exponent[1] - CHANNEL_SPREAD

    def test_one_element_per_channel(self, rule, symmetric, power_of_2):
        x = np.array([[0.75], [-3.0], [0.0], [64.0]])
        encoding = choose(rule, Observed.of(x, 0), Format(8, symmetric, power_of_2, axis=0))
        np.testing.assert_allclose(encoding.fake_quantize(x), x, rtol=1e-6 if not power_of_2 else 0)

    @pytest.mark.parametrize("value", [3.0, -3.0, 0.1, 1e-40, -1e-40, 3e38, -3e38])
    def test_a_constant(self, rule, symmetric, power_of_2, value):
        encoding = choose(rule, Observed.of(np.full(7, value)), Format(8, symmetric, power_of_2))
        legal = not power_of_2 or abs(value) < 255 * 2.0**HIGHEST
        assert abs(encoding.fake_quantize(value) - value) <= encoding.scale / 2 or not legal

    def test_a_channel_axis_in_the_middle(self, rule, symmetric, power_of_2):
        x = np.random.default_rng(3).normal(size=(2, 3, 4)).astype(np.float32) * np.float32([[[1], [8], [0.1]]])
        middle = choose(rule, Observed.of(x, 1), Format(8, symmetric, power_of_2, axis=1))
        first = choose(rule, Observed.of(np.moveaxis(x, 1, 0), 0), Format(8, symmetric, power_of_2, axis=0))
        assert middle.axis == 1
        assert Encoding(middle.scale, middle.zero_point, middle.grid, 0) == first


@given(our.arrays(VECTORS) | our.extreme_arrays(), our.widths(2, 12), SYMMETRIC)
def test_free_minmax_is_the_classical_encoding(x, bits, symmetric):
    assume(0 < np.abs(x).max() < 1e38)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    encoding = choose("minmax", Observed.of(x), Format(bits, symmetric, power_of_2=False))
    half = 2 ** (bits - 1)
    expected = max(-low / half, high / (half - 1)) if symmetric else (high - low) / (2 * half - 1)
    expected = max(expected, float(np.finfo(np.float32).tiny))
    assert encoding.scale == np.float32(expected)
    assert encoding.zero_point == (0 if symmetric else np.rint(-low / expected))
    off = np.abs(x.astype(np.float64) - encoding.fake_quantize(x)).max()
    assert off <= expected * (0.5 if symmetric else 1) * (1 + 1e-3)


@given(our.arrays(VECTORS), our.widths(2, 8), SYMMETRIC)
def test_a_free_scale_is_never_coarser_than_a_power_of_two(x, bits, symmetric):
    assume(x.any())
    free, snapped = (choose("minmax", Observed.of(x), Format(bits, symmetric, p)) for p in (False, True))
    assert free.scale <= snapped.scale * (1 + 1 / (2**bits - 2))


@given(our.arrays(ROWS), our.widths(2, 8), SYMMETRIC)
def test_free_mse_is_the_least_error_over_its_fractions(x, bits, symmetric):
    form = Format(bits, symmetric, power_of_2=False, axis=0)
    encoding = choose("mse", Observed.of(x, 0), form)
    for c, values in enumerate(x):
        one, single = row(encoding, c, form)
        ends = np.array([min(0.0, values.min()), max(0.0, values.max())])
        candidates = [choose("minmax", Observed(*(ends * f)[:, None], values[None]), single) for f in FREE_FRACTIONS]
        assert error(values, one) <= min(error(values, e) for e in candidates) * (1 + 1e-4)
        assert error(values, one) <= error(values, candidates[0]) * (1 + 1e-4)


def test_what_was_observed():
    x = np.array([[[1, -2], [3, 4]], [[5, 6], [-7, 8]]])
    whole, first, last = (Observed.of(x, axis) for axis in (None, 0, -1))
    assert (whole.low, whole.high, whole.sample.shape) == (-7, 8, (1, 8))
    assert (first.low.tolist(), first.high.tolist()) == ([-2, -7], [4, 8])
    assert last.sample.tolist() == [[1, 3, 5, -7], [-2, 4, 6, 8]]
    assert first.sample.dtype == first.low.dtype == np.float32


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_observed_is_an_error(shape, axis):
    with pytest.raises(EncodingError, match="nothing was observed"):
        Observed.of(np.zeros(shape), axis)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_observed_are_errors(value, axis):
    with pytest.raises(EncodingError, match="holds NaN or infinity"):
        Observed.of([[1, 2], [value, 3]], axis)


def test_extremes_beyond_the_sample_count():
    """Running extremes over all batches, a sample of one: nothing that was seen saturates under minmax."""
    observed = Observed(np.float32([-40]), np.float32([90]), np.float32([[-1, 1]]))
    encoding = choose("minmax", observed, Format(8, symmetric=False))
    assert encoding.minimum <= -40
    assert encoding.maximum >= 90


def test_an_unknown_chooser_names_the_known_ones():
    with pytest.raises(ConfigError, match="unknown chooser 'mean'; known are minmax, mse, percentile"):
        choose("mean", Observed.of([1.0]), Format(8, True))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Format(8, True), "3 channels were observed for one encoding per tensor"),
        (Format((8, 4), True, axis=0), "3 channels were observed for 2 widths"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_a_format_for_other_channels_is_an_error(rule, form, message):
    with pytest.raises(EncodingError, match=message):
        choose(rule, Observed.of(np.ones((3, 2)), 0), form)


@pytest.mark.parametrize("rule", RULES)
def test_widths_per_channel_need_a_channel_axis(rule):
    with pytest.raises(EncodingError, match="1 widths for a scale of shape"):
        choose(rule, Observed.of([1.0, 2.0]), Format((8,), True))
