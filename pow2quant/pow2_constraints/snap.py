"""Choosers of k: from what was observed of a tensor to its encoding.

A chooser takes an `Observed` and a `Format` and returns an `Encoding`; each is a row of `CHOOSERS`. With
`power_of_2=False` the same criteria choose a free scale, so that the cost of the constraint can be stated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import ConfigError, EncodingError
from pow2quant.pow2_constraints.arithmetic import ceil_exponent, power_of_two
from pow2quant.pow2_constraints.encoding import Encoding, IntGrid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

LOWEST, HIGHEST = -32, 31
"""Exponents that a chooser may choose: what a 32-bit shifter reaches."""

CHANNEL_SPREAD = 16
"""A channel's exponent is at most this far below the `minmax` of the widest channel; below it, a channel is noise."""

CANDIDATES = 12
"""`mse` looks at this many exponents, from that of `minmax` downwards."""

PERCENTILE = 99.9
"""Share of the sample, in per cent, that `percentile` keeps unclipped; `percentile:99` keeps 99."""

BLOCK = 1 << 17
"""Values that `mse` looks at in one piece: they and their codes stay in the cache."""

FREE_FRACTIONS = np.linspace(1.0, 0.2, 81)
"""Fractions of the full range that a free scale is chosen from under `mse`."""


@dataclass(frozen=True)
class Observed:
    """What was seen of a tensor, per channel (C rows) or as a whole (one row).

    low, high: float32 (C,), the extremes of all data; sample: float32 (C, n), the data or a stated sample of it.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    sample: NDArray[np.float32]

    @classmethod
    def of(cls, x: ArrayLike, axis: int | None = None) -> Observed:
        """Everything about `x`. A weight (64, 3, 7, 7) with axis 0 gives 64 rows of 147 values.

        Raises EncodingError when x is empty or not finite.
        """
        values = np.asarray(x, np.float32)
        if not values.size:
            raise EncodingError("nothing was observed: the tensor is empty")
        rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        low, high = rows.min(1), rows.max(1)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise EncodingError("holds NaN or infinity")
        return cls(low, high, rows)


@dataclass(frozen=True)
class Format:
    """What a chooser may choose from.

    bits: the width, or one per channel. symmetric: a signed grid with zero point 0; otherwise an unsigned grid with an
    even zero point, which is 0 where the data are non-negative. axis: the channel axis, or None for one encoding.
    """

    bits: int | tuple[int, ...]
    symmetric: bool
    power_of_2: bool = True
    axis: int | None = None

    @property
    def grid(self) -> IntGrid:
        """The grid that codes live on."""
        return IntGrid(self.bits, signed=self.symmetric)

    def encoding(self, scale: ArrayLike, zero_point: ArrayLike = 0) -> Encoding:
        """Builds the encoding from arrays (C,); without a channel axis, C is 1 and the arrays become scalars."""
        s, z = np.asarray(scale, np.float32), np.asarray(zero_point, np.int64)
        if self.axis is None:
            s, z = s[0], z[0] if z.ndim else z
        return Encoding(s, z, self.grid, self.axis)


def choose(rule: str, observed: Observed, form: Format) -> Encoding:
    """The encoding that `rule` (a key of `CHOOSERS`, or `percentile:SHARE`) chooses.

    Raises ConfigError for an unknown rule, EncodingError when `form` does not fit the number of observed channels.
    """
    if not is_chooser(rule):
        raise ConfigError(f"range: unknown chooser {rule!r}; known are {', '.join(sorted(CHOOSERS))}")
    channels = len(observed.low)
    if form.axis is None and channels != 1:
        raise EncodingError(f"{channels} channels were observed for one encoding per tensor")
    if isinstance(form.bits, tuple) and len(form.bits) != channels:
        raise EncodingError(f"{channels} channels were observed for {len(form.bits)} widths")
    name, _, share = rule.partition(":")
    return percentile(observed, form, float(share)) if share else CHOOSERS[name](observed, form)


def is_chooser(rule: str) -> bool:
    """Whether `choose` knows a rule."""
    name, _, share = rule.partition(":")
    if name != "percentile" or not share:
        return rule in CHOOSERS
    return share.replace(".", "", 1).isdecimal() and 0 < float(share) <= 100


def minmax(observed: Observed, form: Format) -> Encoding:
    """The smallest scale at which nothing that was observed saturates: every error is at most scale / 2.

    A power of two is the smallest from 2^`LOWEST` on, at most `CHANNEL_SPREAD` below the widest channel's; data too
    wide for 2^`HIGHEST` saturate. A free scale rounds the zero point, which may cost another scale / 2.
    """
    low, high = _with_zero(observed)
    if not form.power_of_2:
        return _free(low, high, form)
    k, _ = _exponents(low, high, form)
    return form.encoding(power_of_two(k), zero_points(low, high, k, form.grid))


def percentile(observed: Observed, form: Format, share: float = PERCENTILE) -> Encoding:
    """`minmax` over the central `share` per cent of the sample."""
    tail = (100 - share) / 2
    low, high = np.percentile(observed.sample, [tail, 100 - tail], axis=1, method="nearest").astype(np.float32)
    return minmax(Observed(low, high, observed.sample), form)


def mse(observed: Observed, form: Format) -> Encoding:
    """The encoding of least squared error on the sample.

    Exact over the candidates: the exponent of `minmax` and the `CANDIDATES` - 1 below it, within the same bounds, each
    with zero point 0; on an unsigned grid, where a value is negative, with every even zero point. Of equal errors the
    larger scale wins. A free scale is the best of `FREE_FRACTIONS` of the full range.
    """
    low, high = _with_zero(observed)
    if not form.power_of_2:
        return _free_mse(observed.sample, low, high, form)
    top, floor = _exponents(low, high, form)
    shifted = (low < 0) & (not form.symmetric)
    k, zero_point = _least_error(observed.sample, np.flatnonzero(~shifted), top, floor, form.grid), np.zeros_like(top)
    widths = np.broadcast_to(form.bits, top.shape)
    for row in np.flatnonzero(shifted):
        exponents = range(top[row], max(floor - 1, top[row] - CANDIDATES), -1)
        k[row], zero_point[row] = _least_error_with_zero_point(
            observed.sample[row], low[[row]], high[[row]], exponents, IntGrid(int(widths[row]), signed=False)
        )
    return form.encoding(power_of_two(k), zero_point)


CHOOSERS: dict[str, Callable[[Observed, Format], Encoding]] = {"minmax": minmax, "mse": mse, "percentile": percentile}


def _with_zero(observed: Observed) -> tuple[Floats, Floats]:
    """The extremes in float64, zero included (a padded or dead value must be representable)."""
    return np.minimum(observed.low, 0).astype(np.float64), np.maximum(observed.high, 0).astype(np.float64)


def _exponents(low: Floats, high: Floats, form: Format) -> tuple[Ints, int]:
    """Per row the smallest exponent that saturates nothing, within the bounds; and the lower bound."""
    top = np.minimum(_covering_exponent(low, high, form.grid), HIGHEST)
    floor = LOWEST if form.axis is None else max(LOWEST, int(top.max()) - CHANNEL_SPREAD)
    return np.maximum(top, floor), floor


def _covering_exponent(low: Floats, high: Floats, grid: IntGrid) -> Ints:
    """The smallest k at which nothing in [low, high] saturates; for an all-zero row the smallest sensible one."""
    extent = np.maximum(-low, high) if grid.signed else high - low
    if not extent.any():
        return np.full(extent.shape, -grid.width)
    # At k the extent has more than 2^(bits - 1) steps and at most 2^bits, so the answer is k, k + 1 or k + 2.
    k = np.where(extent > 0, ceil_exponent(extent) - np.asarray(grid.bits), LOWEST)
    for _ in range(2):
        fits = _fits(low, high, k, grid)
        if fits.all():
            break
        k = k + ~fits
    return k


def _fits(low: Floats, high: Floats, k: Ints, grid: IntGrid) -> NDArray[np.bool_]:
    """Whether no code of [low, high] saturates, with zero point 0 or, on an unsigned grid, an even one."""
    if grid.signed:
        return (np.rint(np.ldexp(low, -k)) >= grid.qmin) & (np.rint(np.ldexp(high, -k)) <= grid.qmax)
    least, most = even_zero_points(low, high, k, grid)
    return least <= most


def even_zero_points(low: Floats, high: Floats, k: Ints, grid: IntGrid) -> tuple[Floats, Floats]:
    """The least even zero point at which `low` does not saturate, the greatest at which `high` does not."""
    least, most = -np.rint(np.ldexp(low, -k)), grid.qmax - np.rint(np.ldexp(high, -k))
    return 2 * np.ceil(least / 2), 2 * np.floor(most / 2)


def zero_points(low: Floats, high: Floats, k: Ints, grid: IntGrid) -> Ints:
    """0 for a signed grid and non-negative data; otherwise the middle even one (where nothing fits, on the grid)."""
    least, most = even_zero_points(low, high, k, grid)
    middle = np.clip(2 * np.floor((least + most) / 4), 0, grid.qmax - 1)
    return np.where(grid.signed | (low >= 0), 0, middle).astype(np.int64)


def _least_error(rows: NDArray[np.float32], active: Ints, top: Ints, floor: int, grid: IntGrid) -> Ints:
    """`top` (C,), and in the `active` rows of (C, n) the exponent from `floor` to it of least squared error.

    The zero point is 0.
    """
    low, high = (np.broadcast_to(v, top.shape).astype(np.float32) for v in (grid.qmin, grid.qmax))
    smallest, largest = rows.min(1).astype(np.float64), rows.max(1).astype(np.float64)
    best, best_error = top.copy(), np.full(top.shape, np.inf)
    for step in range(CANDIDATES):
        active = active[top[active] - step >= floor]
        if not active.size:
            break
        scale = power_of_two(top[active] - step)
        # What saturates is a lower bound of the error that only grows as k falls: first that of the extreme values,
        over = np.maximum(largest[active] - high[active] * scale, low[active] * scale - smallest[active])
        promising = np.square(np.maximum(over, 0)) < best_error[active]
        active, scale = active[promising], scale[promising]
        error = _squared_error(rows, active, scale, low[active], high[active])
        better = active[error < best_error[active]]
        best[better] = top[better] - step
        best_error[active] = np.minimum(best_error[active], error)
        # then all that cannot be rounding.
        active = active[error - rows.shape[1] * np.square(scale / 2, dtype=np.float64) < best_error[active]]
    return best


@np.errstate(over="ignore")  # infinite where even 2^HIGHEST is far too small
def _squared_error(
    rows: NDArray[np.float32],
    active: Ints,
    scale: NDArray[np.float32],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
) -> Floats:
    """Sum over each of the `active` rows of (x - fake_quantize(x))^2; [low, high]: the grid less the zero point."""
    error = np.zeros(len(active))
    width = min(rows.shape[1], BLOCK)
    height = BLOCK // width
    for start in range(0, len(active), height):
        part = slice(start, start + height)
        for column in range(0, rows.shape[1], width):
            x = rows[active[part], column : column + width]
            x /= scale[part, None]
            codes = np.rint(x)
            x -= np.clip(codes, low[part, None], high[part, None], out=codes)
            x *= x
            error[part] += x.sum(1)
    return error * np.square(scale, dtype=np.float64)


def _least_error_with_zero_point(
    sample: NDArray[np.float32], low: Floats, high: Floats, exponents: range, grid: IntGrid
) -> tuple[int, int]:
    """The (k, even zero point) of least squared error on one row of data.

    low, high: (1,), the extremes of all data; exponents: the candidates, from that of `minmax` downwards.
    """
    x = np.sort(sample).astype(np.float64)
    sums, squares = running(x), running(x * x)
    qmax = int(grid.qmax)
    best = (np.inf, exponents[0], 0)
    for k in exponents:
        over = x[-1] - x[0] - qmax * 2.0**k  # the two extreme values saturate by as much, together
        if over > 0 and over**2 / 2 >= best[0]:
            break
        error = error_by_zero_point(x, sums, squares, 2.0**k, qmax)
        least, most = even_zero_points(low, high, np.array([k]), grid)
        useful = zero_points(low, high, np.array([k]), grid) if least <= most else np.clip([*most, *least], 0, qmax - 1)
        zero_point, value = least_on_even(error, int(useful[0]), int(useful[-1]))
        if value < best[0]:
            best = (value, k, zero_point)
    return best[1], best[2]


def error_by_zero_point(x: Floats, sums: Floats, squares: Floats, scale: float, qmax: int) -> Callable[[Ints], Floats]:
    """The squared error of sorted data (n,) as a function of the zero points, without another pass over the data.

    sums, squares: the running sums of x and x^2. Each value's error is convex in the zero point, so their sum is.
    """
    codes = x / scale
    np.rint(codes, out=codes)
    lost = codes * scale
    np.subtract(x, lost, out=lost)
    rounding = running(np.square(lost, out=lost))

    def error(zero_point: Ints) -> Floats:
        first, last = -zero_point, qmax - zero_point
        i, j = codes.searchsorted(first), codes.searchsorted(last, "right")
        low, high = first * scale, last * scale
        below = squares[i] - 2 * low * sums[i] + low**2 * i
        above = squares[-1] - squares[j] - 2 * high * (sums[-1] - sums[j]) + high**2 * (len(x) - j)
        return np.asarray(below + rounding[j] - rounding[i] + above)

    return error


def least_on_even(function: Callable[[Ints], Floats], first: int, last: int) -> tuple[int, float]:
    """The even argument in [first, last], both even, and the value where a convex function is least."""
    while True:
        step = max(2, (last - first) // 256 // 2 * 2)
        arguments = np.arange(first, last + 1, step)
        values = function(arguments)
        at = int(values.argmin())
        if step == 2:
            return int(arguments[at]), float(values[at])
        first, last = max(first, int(arguments[at]) - step), min(last, int(arguments[at]) + step)


def running(values: Floats) -> Floats:
    """The running sums of (n,), and a zero in front: (n + 1,)."""
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    return sums


def _free(low: Floats, high: Floats, form: Format) -> Encoding:
    """The classical asymmetric or symmetric min-max encoding with a free scale."""
    grid = form.grid
    extent = np.maximum(low / grid.qmin, high / grid.qmax) if form.symmetric else (high - low) / grid.qmax
    scale = np.where(extent > 0, np.maximum(extent, np.finfo(np.float32).tiny), 1.0 / grid.qmax)
    return form.encoding(scale, 0 if form.symmetric else np.rint(-low / scale))


def _free_mse(sample: NDArray[np.float32], low: Floats, high: Floats, form: Format) -> Encoding:
    """Of the free encodings over `FREE_FRACTIONS` of the range, per row the one of least squared error."""
    every = np.arange(len(low))
    best, best_error = np.ones(len(low)), np.full(len(low), np.inf)
    for fraction in FREE_FRACTIONS:
        encoding = _free(low * fraction, high * fraction, form)
        ends = (encoding.grid.qmin - encoding.zero_point, encoding.grid.qmax - encoding.zero_point)
        scale, first, last = (np.broadcast_to(v, low.shape).astype(np.float32) for v in (encoding.scale, *ends))
        error = _squared_error(sample, every, scale, first, last)
        best[error < best_error] = fraction
        best_error = np.minimum(best_error, error)
    return _free(low * best, high * best, form)
