"""One exponent for several tensors: the inputs and the result of a sum that never shifts.

Every tensor keeps its own grid and zero point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pow2quant.pow2_constraints.arithmetic import power_of_two
from pow2quant.pow2_constraints.snap import (
    CANDIDATES,
    LOWEST,
    error_by_zero_point,
    even_zero_points,
    least_on_even,
    minmax,
    running,
    zero_points,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pow2quant.pow2_constraints.encoding import Encoding
    from pow2quant.pow2_constraints.snap import Format, Observed


def choose_jointly(rule: str, observed: Sequence[Observed], forms: Sequence[Format]) -> list[Encoding]:
    """The encodings of tensors that share an exponent, one scale each.

    By `minmax` the exponent at which none saturates. Otherwise that of the least sum of the tensors' mean squared
    errors, which is the noise that they bring into the sum; exact over the exponents from the largest `minmax`
    downwards, with the best zero point of each tensor. Of equal errors the larger exponent wins.
    """
    top = max(int(minmax(seen, form).exponent) for seen, form in zip(observed, forms, strict=True))
    best, least = top, np.inf
    if rule != "minmax":
        for k in range(top, max(LOWEST - 1, top - CANDIDATES), -1):
            error = sum(mean_error(seen, form, k) for seen, form in zip(observed, forms, strict=True))
            if error < least:
                best, least = k, error
    return [at_exponent(seen, form, best) for seen, form in zip(observed, forms, strict=True)]


def at_exponent(observed: Observed, form: Format, k: int) -> Encoding:
    """The encoding of this exponent with the zero point of least squared error on the sample."""
    zero, _ = best_zero_point(observed, form, k)
    return form.encoding(power_of_two([k]), zero)


def mean_error(observed: Observed, form: Format, k: int) -> float:
    """The mean squared error at an exponent, with the best zero point."""
    return best_zero_point(observed, form, k)[1] / max(1, observed.sample.size)


def best_zero_point(observed: Observed, form: Format, k: int) -> tuple[int, float]:
    """The even zero point of least squared error, and that error; 0 on a signed grid and for non-negative data."""
    low, high = np.minimum(observed.low, 0).astype(np.float64), np.maximum(observed.high, 0).astype(np.float64)
    exponents = np.array([k])
    if form.symmetric or low[0] >= 0 or not observed.sample.size:
        zero = int(zero_points(low, high, exponents, form.grid)[0])
        scale = 2.0**k
        x = observed.sample.astype(np.float64)
        codes = np.clip(np.rint(x / scale), form.grid.qmin - zero, form.grid.qmax - zero)
        return zero, float(np.square(x - codes * scale).sum())
    x, qmax = np.sort(observed.sample[0]).astype(np.float64), int(form.grid.qmax)
    error = error_by_zero_point(x, running(x), running(x * x), 2.0**k, qmax)
    least, most = even_zero_points(low, high, exponents, form.grid)
    if least <= most:
        ends = (zero_points(low, high, exponents, form.grid),) * 2
    else:
        ends = np.clip(most, 0, qmax - 1), np.clip(least, 0, qmax - 1)
    return least_on_even(error, int(ends[0][0]), int(ends[1][0]))
