"""Changes with their intervals as small drawings in a table, all on one axis: a forest plot whose rows sort."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pow2quant.report.points import Point

WIDTH, MARGIN = 180, 8
"""Of a drawing in pixels, and what is free at both of its ends."""

LEAST = {"%": 1.0, "dB": 1.0}
"""By unit: so far from 0 the axis reaches at the least, so that a small change looks small; else 2 % of the value."""

OUTLYING = 20
"""Where one interval reaches so many times further than the median one, the axis ends and an arrow stands for it."""


@dataclass(frozen=True)
class Bar:
    """A point's drawing, in pixels. beyond: -1 or 1 where the change itself lies outside the axis, else 0."""

    middle: float
    low: float
    high: float
    beyond: int
    lost: bool


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, in the metric's unit."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Where a value stands, in pixels; at the end where it is outside."""
        inside = min(max(value, self.low), self.high)
        return round(MARGIN + (WIDTH - 2 * MARGIN) * (inside - self.low) / (self.high - self.low), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, text) of three to five round values."""
        raw = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
        values = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self.at(v), f"{v:+.4g}" if round(v / step) else "0") for v in values]


def axis_of(points: Sequence[Point]) -> Axis | None:
    """The axis of the points' changes; None where none is known."""
    known = [p for p in points if p.is_drawn("change")]
    if not known:
        return None
    originals = [abs(p.original) for p in known if p.original]
    least = LEAST.get(known[0].unit, 0.02 * max(originals, default=1.0)) or 1.0
    reaches = sorted(max(map(abs, _ends(p))) for p in known)
    limit = max(least, OUTLYING * reaches[len(reaches) // 2])
    ends = [end for p in known for end in _ends(p)]
    return Axis(max(min(*ends, -least), -limit), min(max(*ends, least), limit))


def bars(points: Sequence[Point], axis: Axis) -> Iterator[Bar | None]:
    """The drawing of each point; None where its change is not known."""
    for point in points:
        if point.change is None or not point.is_drawn("change"):
            yield None
            continue
        low, high = _ends(point)
        beyond = -1 if point.change < axis.low else 1 if point.change > axis.high else 0
        yield Bar(axis.at(point.change), axis.at(low), axis.at(high), beyond, point.lost)


def _ends(point: Point) -> tuple[float, float]:
    """Of the interval; the change twice where there is none."""
    change = point.change or 0.0
    return change if point.low is None else point.low, change if point.high is None else point.high
