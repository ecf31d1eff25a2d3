"""Histograms as SVG paths: there may be hundreds on a page, and a plotting library takes 50 ms and 10 kB for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 300, 78
"""Of the drawing without its labels, in the units of the SVG's viewBox."""

LINES = 33
"""At most so many lines of the grid: every code, or every 2^n-th."""


@dataclass(frozen=True)
class Histogram:
    """One tensor. grid, inside, outside, ends: SVG paths; labels: (x, text-anchor, text) below them."""

    name: str
    words: str
    quality: str
    sqnr_db: float | None
    grid: str
    inside: str
    outside: str
    ends: str
    labels: tuple[tuple[float, str, str], ...]


def draw(name: str, tensor: Mapping[str, Any], encoding: Mapping[str, Any]) -> Histogram:
    """The histogram of what `statistics.of_tensor` says. encoding: `bitwidth`, `scale`, and its scale in `words`."""
    found = tensor["histogram"]
    start, width, counts, low, high = (found[key] for key in ("start", "width", "counts", "low", "high"))
    left = min(start, low - 1)
    right = max(start + width * len(counts), high + 1)
    if high - low > 4 * width * len(counts):  # the values use a corner of the grid: show that corner
        left, right = start - width * len(counts) / 4, start + 1.25 * width * len(counts)

    across = right - left or 1.0  # float64 may not tell them apart, far from zero

    def x(steps: float) -> float:
        return float(round(WIDTH * (steps - left) / across, 1))

    step = 2 ** max(0, math.ceil(math.log2(max(1.0, (min(high, right) - max(low, left)) / (LINES - 1)))))
    codes = range(math.ceil(max(low, left) / step) * step, math.floor(min(high, right)) + 1, step)
    top = max(counts) or 1
    bars: dict[bool, list[str]] = {True: [], False: []}
    for i, count in enumerate(counts):
        if count:
            first, tall = start + i * width, round(HEIGHT * math.sqrt(count / top), 1)
            inside = low - 0.5 < first + width and first < high + 0.5
            bars[inside].append(
                f"M{x(first)} {HEIGHT}v{-tall}h{max(0.5, round(x(first + width) - x(first), 1))}v{tall}z"
            )
    ends = [end for end in (low, high) if left <= end <= right]
    words = [f"{encoding['words']}", _bits(encoding.get("bitwidth"))]
    if tensor["clipped"]:
        words.append(f"{tensor['clipped']:.2g} % clipped")
    return Histogram(
        name=name,
        words=" · ".join(filter(None, words)),
        quality="no loss" if tensor["sqnr_db"] is None else f"{tensor['sqnr_db']:.1f} dB",
        sqnr_db=tensor["sqnr_db"],
        grid="".join(f"M{x(code)} 0V{HEIGHT}" for code in codes),
        inside="".join(bars[True]),
        outside="".join(bars[False]),
        ends="".join(f"M{x(end)} 0V{HEIGHT}" for end in ends),
        labels=tuple(_labels(x, ends, left, right, encoding.get("scale"))),
    )


def _labels(x: Any, ends: list[int], left: float, right: float, scale: Any) -> Any:
    """Zero and the ends of the grid, in real values where there is one scale for all, else in steps."""
    places = sorted({*ends, *([0] if left <= 0 <= right else [])})
    for i, place in enumerate(places):
        at = x(place)
        if i and at - x(places[i - 1]) < 34:
            continue
        text = f"{place * scale:.4g}" if isinstance(scale, float) else f"{place} steps" if place else "0"
        yield at, "start" if at < 20 else "end" if at > WIDTH - 30 else "middle", text.replace("-", "\u2212")


def _bits(bits: Any) -> str:
    if bits is None:
        return ""
    return f"{min(bits)} … {max(bits)} bits" if isinstance(bits, list) else f"{bits} bits"
