"""A metric, or its change, against a cost: every point with its name and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pow2quant.report import figures, forest, summary
from pow2quant.report.page import shortened
from pow2quant.report.points import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

MOST_NAMES = 25
"""So many points have their names beside them, the best ones."""

PLACES = ((7, 0, "left"), (-7, 0, "right"), (7, 9, "left"), (7, -9, "left"), (-7, 9, "right"), (-7, -9, "right"))
"""(right, up, alignment) in points: where a name may stand, the first that is free."""


def draw(points: Sequence[Point], cost: str, column: str) -> str:
    """SVG. cost: one of `points.FORMATS`; column: `value` or `change` of the points."""
    figure, (axes,) = figures.blank(7.6, 3.6)
    ink = figures.COLOURS
    xs, ys = [p.facts[cost] or 0.0 for p in points], [float(getattr(p, column)) for p in points]
    low, high = _span(points, ys, column)
    for point, x, y in zip(points, xs, ys, strict=True):
        inside = min(max(y, low), high)
        colour = ink["bad"] if point.lost else ink["a"]
        if column == "change" and point.low is not None and point.high is not None and low <= y <= high:
            axes.plot([x, x], [max(point.low, low), min(point.high, high)], color=colour, linewidth=1.3)
        marker = "o" if inside == y else "v" if y < low else "^"
        axes.plot([x], [inside], marker, color=colour, markersize=6)
    axes.margins(x=0.1)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    if column == "change":
        axes.axhline(0, color=ink["soft"], linestyle="--", linewidth=1)
    unit = points[0].unit
    metric = summary.WORDS.get(points[0].metric, points[0].metric)
    axes.set_xlabel(cost)
    words = f"change of {metric}" if column == "change" else metric
    axes.set_ylabel(", ".join(filter(None, [words, "points" if unit == "%" and column == "change" else unit])))
    figure.draw_without_rendering()  # names need to know where the points are
    best = sorted(points, key=lambda p: -(p.gain(column) or 0.0))[:MOST_NAMES]
    named = [(p.name, x, min(max(y, low), high)) for p, x, y in zip(points, xs, ys, strict=True) if p in best]
    _name(axes, named, list(zip(xs, ys, strict=True)))
    return figures.svg(figure, f"trade {cost}")


def _span(points: Sequence[Point], ys: Sequence[float], column: str) -> tuple[float, float]:
    """What the vertical axis spans: small changes look small, and what lies far outside is drawn at its end."""
    axis = forest.axis_of(points) if column == "change" else None
    if axis is not None:
        return axis.low, axis.high
    least = forest.LEAST.get(points[0].unit, 0.02 * max(map(abs, ys)) or 1.0)
    middle, half = (max(ys) + min(ys)) / 2, max((max(ys) - min(ys)) / 2, least)
    return middle - half, middle + half


def _name(axes: Axes, named: Sequence[tuple[str, float, float]], points: Sequence[tuple[float, float]]) -> None:
    """Writes names beside points so that they cover neither each other nor a point, where that is possible."""
    from matplotlib.transforms import Bbox

    scale = axes.figure.dpi / 72
    dots = [axes.transData.transform(p) for p in points]
    taken: list[Bbox] = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in dots]
    for name, x, y in sorted(named, key=lambda n: -n[2]):
        text = shortened(name, 26)
        at = axes.transData.transform((x, y))
        boxes = [_box(text, at, place, scale) for place in PLACES]
        costs = [sum(map(box.overlaps, taken)) + 3 * (not axes.bbox.containsx(box.x1)) for box in boxes]
        best = costs.index(min(costs))
        across, up, side = PLACES[best]
        taken.append(boxes[best])
        style: dict[str, Any] = {"ha": side, "va": "center", "fontsize": 8, "color": figures.COLOURS["ink"]}
        axes.annotate(text, (x, y), (across, up), textcoords="offset points", **style)


def _box(text: str, at: Any, place: tuple[int, int, str], scale: float) -> Bbox:
    """Where a name would stand, in pixels, by what its letters take on average."""
    from matplotlib.transforms import Bbox

    across, up, side = place
    width, height = 4.6 * len(text) * scale, 9 * scale
    left = at[0] + across * scale - (width if side == "right" else 0)
    return Bbox.from_bounds(left, at[1] + up * scale - height / 2, width, height)
