"""What quantization does to every tensor, from samples of it: noise, clipping, histogram, the price of 2^k.

Signal to noise in dB: 10 log10(sum x^2 / sum (x - x_q)^2); None where nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pow2quant.pow2_constraints import Format, Observed, choose

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding

BINS = 64
"""At most about so many bins in a histogram."""

ROWS, COLUMNS = 64, 128
"""At most so many channels, and values of each, on which the best scales are chosen."""

BEYOND = 0.25
"""A histogram reaches so far beyond the grid, as a share of it; the outermost bins hold what lies further out."""


class Sample(Protocol):
    """Values of one tensor in the float network, in front of its quantizer and behind it."""

    @property
    def role(self) -> str: ...
    @property
    def exact(self) -> NDArray[np.float32]: ...
    @property
    def entering(self) -> NDArray[np.float32]: ...
    @property
    def quantized(self) -> NDArray[np.float32]: ...
    @property
    def dead(self) -> tuple[int, ...]: ...


def of_tensor(encoding: Encoding, sample: Sample) -> dict[str, Any]:
    """What report pages show of one tensor, in JSON's types.

    `sqnr_db`: of this quantizer alone. A weight that a method has put onto its grid already is compared with the
    float network's. `network_sqnr_db` (activations): against the float network, so with all noise that came in.
    `dead_channels` (activations): see `Sampled`. `clipped`: per cent of the values that saturate. `power_of_2_db`,
    `free_scale_db`: rounding with the scales of least squared error on the same values, 2^k and free. `histogram`:
    in units of the scale (each channel's own) around the zero point: `start` of the first bin, `width` of each,
    `counts`; `low` and `high`: the ends of the grid.
    """
    is_weight = sample.role == "weight"
    rounded_before = is_weight and np.array_equal(sample.entering, sample.quantized)
    x = sample.exact if rounded_before else sample.entering
    steps = x.astype(np.float64) / encoding.along(encoding.scale, x.shape)
    grid, zero = encoding.grid, encoding.zero_point
    low, high = (encoding.along(np.asarray(end - zero), x.shape) for end in (grid.qmin, grid.qmax))
    found: dict[str, Any] = {"role": sample.role, "sqnr_db": sqnr_db(x, sample.quantized)}
    if not is_weight:
        found |= {"network_sqnr_db": sqnr_db(sample.exact, sample.quantized), "dead_channels": list(sample.dead)}
    power, free = _least_noise(encoding, x)
    return found | {
        "minimum": float(x.min()),
        "maximum": float(x.max()),
        "clipped": round(100 * float(np.mean((np.rint(steps) < low) | (np.rint(steps) > high))), 4),
        "power_of_2_db": power,
        "free_scale_db": free,
        "histogram": histogram(steps, int(np.min(low)), int(np.max(high))),
    }


def sqnr_db(x: NDArray[np.float32], quantized: NDArray[np.float32]) -> float | None:
    """Signal to noise in dB; None where there is no noise, or no signal."""
    signal, noise = (float(np.square(v, dtype=np.float64).sum()) for v in (x, quantized.astype(np.float64) - x))
    return round(10 * math.log10(signal / noise), 2) if signal and noise else None


def histogram(steps: NDArray[np.float64], low: int, high: int) -> dict[str, Any]:
    """Counts of values in units of the scale, in bins of a power of two of them."""
    margin = BEYOND * (high - low)
    first, last = max(float(steps.min()), low - margin), min(float(steps.max()), high + margin)
    width = 2.0 ** math.ceil(math.log2(max(last - first, 1) / BINS))
    start = math.floor(first / width) * width
    bins = max(1, math.ceil((last - start) / width))
    places = np.clip(np.floor((steps - start) / width), 0, bins - 1).astype(np.int64)
    counts = np.bincount(places.ravel(), minlength=bins)
    return {"start": start, "width": width, "counts": counts.tolist(), "low": low, "high": high}


def _least_noise(encoding: Encoding, x: NDArray[np.float32]) -> tuple[float | None, float | None]:
    """SQNR with the 2^k and with the free scale of least squared error at the same width, on a part of the values."""
    rows = (
        x.reshape(1, -1)
        if encoding.axis is None
        else np.moveaxis(x, encoding.axis, 0).reshape(x.shape[encoding.axis], -1)
    )
    some = np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(np.int64)
    width = COLUMNS * ROWS // len(some)
    rows = rows[some][:, np.linspace(0, rows.shape[1] - 1, min(width, rows.shape[1])).astype(np.int64)]
    bits = encoding.grid.bits
    if isinstance(bits, tuple):
        bits = tuple(bits[i] for i in some)
    axis = None if encoding.axis is None else 0
    seen = Observed.of(rows, axis)
    powers, free = (
        choose("mse", seen, Format(bits, encoding.grid.signed, power_of_2, axis)).fake_quantize(rows)
        for power_of_2 in (True, False)
    )
    return sqnr_db(rows, powers), sqnr_db(rows, free)


def tax_db(tensors: Iterable[dict[str, Any]]) -> list[float]:
    """What free scales of least squared error would gain, in dB, tensor by tensor where both have noise."""
    pairs = ((t.get("power_of_2_db"), t.get("free_scale_db")) for t in tensors)
    return [free - power for power, free in pairs if free is not None and power is not None]


def middle(values: list[float]) -> float | None:
    """The median; None of nothing."""
    return median(values) if values else None
