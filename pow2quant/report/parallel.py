"""Parallel coordinates: a line for every point through what was varied and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pow2quant.report import figures, forest
from pow2quant.report.page import shortened
from pow2quant.report.points import Point

MOST_NAMES = 14
"""So many lines end in their names, the best ones."""

MOST_TICKS = 8


@dataclass(frozen=True)
class Column:
    """An axis. places: of each point from 0 (bottom) to 1, None where it has no value; ticks: (place, text)."""

    name: str
    places: Sequence[float | None]
    ticks: Sequence[tuple[float, str]]


def column(name: str, values: Sequence[Any]) -> Column:
    """Numbers stand by their size (logarithms where they span more than two decades), words evenly, in their order."""
    known = [v for v in values if v is not None]
    if known and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in known):
        return _numbers(name, values, sorted(set(known)))
    words = list(dict.fromkeys(map(str, known)))
    place = {word: 1 - (i + 0.5) / len(words) for i, word in enumerate(words)}
    every = -(-len(words) // MOST_TICKS)
    ticks = [(place[word], shortened(word, 24)) for word in words[::every]]
    return Column(name, [None if v is None else place[str(v)] for v in values], ticks)


def _numbers(name: str, values: Sequence[float | None], known: Sequence[float]) -> Column:
    wide = known[0] > 0 and known[-1] / known[0] > 100

    def at(v: float) -> float:
        low, high, here = (math.log(x) if wide else x for x in (known[0], known[-1], v))
        return 0.5 if low == high else 0.06 + 0.88 * (here - low) / (high - low)

    shown = known if len(known) <= MOST_TICKS else (known[0], known[len(known) // 2], known[-1])
    ticks = [(at(v), f"{v:,.4g}" if isinstance(v, float) else str(v)) for v in shown]
    return Column(name, [None if v is None else at(v) for v in values], _apart(ticks))


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those that do not touch the one before."""
    kept: list[tuple[float, str]] = []
    for place, text in ticks:
        if not kept or place - kept[-1][0] > 0.06:
            kept.append((place, text))
    return kept


def draw(columns: Sequence[Column], points: Sequence[Point], last: str, title: str, good: set[int]) -> str:
    """SVG. last: `change` or `value` of the points, the last axis. good: the points, by id, that have colour."""
    figure, (axes,) = figures.blank(7.6, 3.6)
    known = [(i, p) for i, p in enumerate(points) if p.is_drawn(last)]
    ends = _ends(points, last, [float(getattr(p, last)) for _, p in known])
    ranked = sorted(known, key=lambda pair: -(pair[1].gain(last) or 0.0))
    spread = min(0.5, 0.06 * len(ranked))
    ink = figures.COLOURS
    end = len(columns)
    names: list[tuple[float, float, str]] = []
    for rank, (i, point) in reversed(list(enumerate(ranked))):
        colour = ink["a"] if id(point) in good else ink["soft"]
        x = end + spread * rank / len(ranked)
        y = ends.place(getattr(point, last))
        path = [(n, c.places[i]) for n, c in enumerate(columns)]
        line = [(n, place) for n, place in path if place is not None] + [(x, y)]
        style: dict[str, Any] = {
            "linewidth": 1.6 if id(point) in good else 0.9,
            "alpha": 1.0 if len(known) < 60 else 0.5,
        }
        axes.plot(*zip(*line, strict=True), color=colour, **style)
        axes.plot([x], [y], "o", color=colour, markersize=3.5)
        if last == "change" and point.low is not None and point.high is not None:
            axes.plot([x, x], [ends.place(point.low), ends.place(point.high)], color=colour, linewidth=2.2, alpha=0.8)
        if rank < MOST_NAMES:
            names.append((x, y, point.name))
    _axes(axes, columns, ends, title)
    _names(axes, names, end + spread)
    axes.set_xlim(-0.25, end + spread + 0.95)
    return figures.svg(figure, "parallel")


@dataclass(frozen=True)
class _Ends:
    axis: forest.Axis

    def place(self, value: float) -> float:
        inside = min(max(value, self.axis.low), self.axis.high)
        return 0.03 + 0.94 * (inside - self.axis.low) / (self.axis.high - self.axis.low)


def _ends(points: Sequence[Point], last: str, values: Sequence[float]) -> _Ends:
    axis = forest.axis_of(points) if last == "change" else None
    if axis is None:
        middle, half = (max(values) + min(values)) / 2, max((max(values) - min(values)) / 2, 1.0)
        axis = forest.Axis(middle - half, middle + half)
    return _Ends(axis)


def _axes(axes: Any, columns: Sequence[Column], ends: _Ends, title: str) -> None:
    """The axes with their ticks and titles."""
    ink = figures.COLOURS
    axes.grid(visible=False)
    axes.set_ylim(-0.02, 1.12)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    for n in range(len(columns) + 1):
        axes.plot([n, n], [0, 1], color=ink["line"], linewidth=1.2, zorder=0)
    places = [(n, c.name, c.ticks) for n, c in enumerate(columns)]
    low, high = ends.axis.low, ends.axis.high
    ticks = [(ends.place(v), f"{v:+.3g}" if v else "0") for v in (low, 0.0, high) if low <= v <= high]
    for n, name, marks in [*places, (len(columns), title, ticks)]:
        side = {"ha": "right", "va": "center", "fontsize": 8, "color": ink["ink"]}
        for place, text in marks:
            axes.text(n - 0.03, place, text, **side)
        axes.text(n, 1.06, shortened(name, 26), ha="center", va="bottom", fontsize=8.5, color=ink["soft"])


def _names(axes: Any, names: Sequence[tuple[float, float, str]], right: float) -> None:
    """Writes names behind the ends (x, y) of their lines, moved apart."""
    ink, free = figures.COLOURS, 1.08
    for x, y, name in sorted(names, key=lambda n: (-n[1], n[0])):
        free = min(y, free - 0.062)
        axes.plot([x, right + 0.06, right + 0.14], [y, y, free], color=ink["line"], linewidth=0.8, zorder=0)
        axes.text(right + 0.16, free, shortened(name, 36), va="center", fontsize=7.5, color=ink["ink"])
