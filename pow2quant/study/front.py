"""What a search found, for people and for tables: points of cost and accuracy, and which of them no other beats."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import Any

from pow2quant.study.limits import SHOWN
from pow2quant.tasks.base import Metric

LABELS = {"size": "size, kB", "average_bits": "average bits of a weight", "bops": "bit operations, G", "latency": "ms"}
UNITS = {"size": 1e3, "average_bits": 1.0, "bops": 1e9, "latency": 1e3}
STYLES = {"uniform": ("s", "tab:orange"), "found": ("o", "tab:blue")}


@dataclass(frozen=True)
class Point:
    """A plan that was evaluated. kind: `uniform` (with the width) or `found`.

    accuracy: the metric times `sign`, so that more is better; top-1 in per cent where the task is classification.
    interval: 95 % of the metric's change against the float network; None where it has none.
    """

    kind: str
    plan: Mapping[str, str]
    accuracy: float
    loss: float
    costs: Mapping[str, float]
    sign: int = 1
    interval: tuple[float, float] | None = None

    @property
    def value(self) -> float:
        """The metric."""
        return self.sign * self.accuracy

    def to_json(self) -> dict[str, Any]:
        """In JSON's types, without the plan."""
        return {"kind": self.kind, "accuracy": self.value, "predicted": self.loss, **self.costs}


def front(points: Sequence[Point], axis: str) -> list[Point]:
    """The points that no other beats in accuracy without costing more, from the cheapest up."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.costs[axis], -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def table(points: Sequence[Point], axis: str, chosen: Point) -> str:
    """All points as CSV, from the cheapest up; the sizes in bytes, latencies in microseconds."""
    text = StringIO()
    undominated = front(points, axis)
    rows = [
        {**p.to_json(), "on_front": p in undominated, "chosen": p == chosen}
        for p in sorted(points, key=lambda p: p.costs[axis])
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw(
    points: Sequence[Point], axis: str, chosen: Point, initial: float, floor: float | None, metric: Metric
) -> bytes:
    """The picture, PNG. initial: of the float network; floor: what is asked for; both with the points' sign."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    unit = UNITS[axis]
    best = front(points, axis)
    axes.step([p.costs[axis] / unit for p in best], [p.value for p in best], where="post", color="gray", lw=1)
    for kind, (marker, color) in STYLES.items():
        own = [p for p in points if p.kind.startswith(kind)]
        axes.plot([p.costs[axis] / unit for p in own], [p.value for p in own], marker, color=color, label=kind)
        for p in own if kind == "uniform" else ():
            at = (p.costs[axis] / unit, p.value)
            axes.annotate(p.kind.removeprefix("uniform "), at, (4, -11), textcoords="offset points", fontsize=8)
    axes.plot(
        chosen.costs[axis] / unit, chosen.value, "*", color="black", ms=14, label=f"chosen: {metric.text(chosen.value)}"
    )
    wanted = {"float": (initial, "gray", "--"), "asked for": (floor, "tab:red", ":")}
    for label, (quality, color, style) in wanted.items():
        if quality is not None:
            value = chosen.sign * quality
            axes.axhline(value, color=color, linestyle=style, label=f"{label}: {metric.text(value)}")
    axes.set_xlabel(LABELS[axis])
    axes.set_ylabel("top-1 accuracy, %" if metric.key == "accuracy" else f"{metric.name} {metric.unit}".strip())
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def shown(point: Point) -> dict[str, str]:
    """A point's costs with their units."""
    return {name: SHOWN[name](value) for name, value in point.costs.items()}
