"""Hypothesis strategies that tests share: grids, encodings, tables, and data that are hard to quantize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pow2quant.pow2_constraints import Encoding, IntGrid, power_of_two

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy
    from numpy.typing import NDArray

ORDINARY_EXPONENTS = range(-24, 9)
"""Exponents of scales in real networks; codes of up to 16 bits times these never overflow or vanish in float32."""


def widths(low: int = 2, high: int = 16) -> SearchStrategy[int]:
    """Widths of grids, in bits."""
    return st.integers(low, high)


def exponents(allowed: range = ORDINARY_EXPONENTS) -> SearchStrategy[int]:
    """The k of a scale 2^k."""
    return st.integers(allowed[0], allowed[-1])


@st.composite
def grids(
    draw: st.DrawFn,
    bits: SearchStrategy[int] | None = None,
    channels: int | None = None,
    signed: SearchStrategy[bool] | None = None,
) -> IntGrid:
    """Signed, unsigned and narrow grids; with `channels`, sometimes one width per channel."""
    width = widths() if bits is None else bits
    both: int | tuple[int, ...] = draw(width)
    if channels is not None and draw(st.booleans()):
        both = tuple(draw(st.lists(width, min_size=channels, max_size=channels)))
    sign = draw(st.booleans() if signed is None else signed)
    return IntGrid(both, sign, narrow=sign and draw(st.booleans()))


@st.composite
def encodings(
    draw: st.DrawFn,
    shape: tuple[int, ...] | None = None,
    grid: SearchStrategy[IntGrid] | None = None,
    allowed: range = ORDINARY_EXPONENTS,
    power_of_2: bool = True,
) -> Encoding:
    """Encodings per tensor and, where `shape` names a tensor's shape, per channel of any of its axes."""
    axis = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    channels = None if axis is None or shape is None else shape[axis]
    on = draw(grids(channels=channels) if grid is None else grid)
    size = () if channels is None else (channels,)
    scale = power_of_two(draw(hnp.arrays(np.int64, size, elements=exponents(allowed))))
    if not power_of_2:
        scale = scale * draw(hnp.arrays(np.float32, size, elements=st.floats(0.5, 1, width=32)))
    low, high = (np.broadcast_to(end, size) for end in (on.qmin, on.qmax))
    share = draw(hnp.arrays(np.float64, size, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
    zero_point = np.rint(low + (high - low) * share) * draw(st.booleans())
    return Encoding(scale, zero_point.clip(low, high), on, axis)


def tables(names: SearchStrategy[str] | None = None, **kwargs: Any) -> SearchStrategy[dict[str, Encoding]]:
    """Encodings by site name."""
    module = st.from_regex(r"[a-z]{1,6}(\.[0-9a-z]{1,3}){0,2}\.(weight|output)", fullmatch=True)
    return st.dictionaries(module if names is None else names, encodings(**kwargs), max_size=5)


def floats(limit: float = float(np.finfo(np.float32).max)) -> SearchStrategy[float]:
    """Finite float32 values up to `limit`: zeros of both signs, denormals and extremes among them."""
    return st.floats(-limit, limit, width=32, allow_nan=False)


def halves(limit: int = 1 << 12) -> SearchStrategy[float]:
    """Multiples of 1/2 (with scale 1, every odd one is a tie)."""
    return st.integers(-limit, limit).map(lambda i: i / 2)


@st.composite
def arrays(
    draw: st.DrawFn,
    shape: tuple[int, ...] | SearchStrategy[tuple[int, ...]] = (8,),
    shift: range = range(-16, 9),
) -> NDArray[np.float32]:
    """Data that are hard to quantize, times one 2^j: ties, zeros, ordinary values, heavy tails; of one sign or both."""
    size = shape if isinstance(shape, tuple) else draw(shape)
    if draw(st.booleans()):
        values = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_t(2, size).astype(np.float32)
    else:
        elements = draw(st.sampled_from([halves(16), halves(), floats(1.0), floats(1e3)]))
        values = draw(hnp.arrays(np.float32, size, elements=elements, fill=st.nothing()))
    sign = draw(st.sampled_from([None, None, 1, -1]))
    return (values if sign is None else np.abs(values) * np.float32(sign)) * power_of_two(draw(exponents(shift)))


def extreme_arrays(shape: tuple[int, ...] = (6,)) -> SearchStrategy[NDArray[np.float32]]:
    """Arrays of any finite float32, or of denormals only."""
    denormals = st.integers(-(1 << 23) + 1, (1 << 23) - 1).map(lambda i: i * 2.0**-149)
    return st.sampled_from([floats(), denormals]).flatmap(
        lambda e: hnp.arrays(np.float32, shape, elements=e, fill=st.nothing())
    )
