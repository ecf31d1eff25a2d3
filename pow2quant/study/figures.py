"""Figures of a study: the leading metric over what was varied, a line for each of the other settings."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pow2quant.report.summary import WORDS
from pow2quant.study.space import Axis, Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 10
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#7b3294", "#a6611a")
"""Okabe and Ito's, which colour-blind readers tell apart, and two more."""
MARKERS = "osD^vP*Xhd"

Row = Mapping[str, Any]


def figures(grids: Sequence[Grid], rows: Sequence[Row]) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG) for each grid and each of its axes that has several values with results."""
    several = len(grids) > 1
    for index, grid in enumerate(grids):
        own = [r for r in rows if r.get("grid", 0) == index and r["state"] == "complete"]
        for axis in grid:
            if len({str(r[axis.name]) for r in own}) > 1:
                name = re.sub(r"\W+", "_", axis.name.rpartition(".")[2])
                yield f"figure_{f'{index + 1}_' if several else ''}{name}.png", png(_drawn(axis, grid, own))


def png(figure: Figure) -> bytes:
    """The picture's file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def blank(width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, without matplotlib's global state."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _drawn(axis: Axis, grid: Grid, rows: Sequence[Row]) -> Figure:
    others = [a.name for a in grid if a.name != axis.name and len({str(r[a.name]) for r in rows}) > 1]
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(str(row[name]) for name in others), []).append(row)
    figure, axes = blank()
    labels = list(dict.fromkeys(row[axis.name] for row in _ordered(rows, axis)))
    numeric = all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)
    place = {str(label): label if numeric else i for i, label in enumerate(labels)}
    crowded = len(lines) > MOST_LINES
    for i, (key, own) in enumerate(lines.items()):
        own = _ordered(own, axis)
        xs, ys = [place[str(r[axis.name])] for r in own], [r["quantized"] for r in own]
        named = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in zip(others, key, strict=True))
        style = {"color": "#0072b2", "alpha": 0.35} if crowded else {"color": COLOURS[i], "marker": MARKERS[i]}
        axes.plot(xs, ys, label=named or "quantized", markersize=5, linewidth=1.5, **style)
    _originals(axes, rows)
    if not numeric or len(labels) <= 10:
        axes.set_xticks([place[str(label)] for label in labels], [str(label) for label in labels])
    axes.set_xlabel(axis.name.rpartition(".")[2].replace("_", " ").replace("+", " = "))
    axes.set_ylabel(labelled(rows[0]["metric"], rows[0]["unit"]))
    fixed = {a.name: rows[0][a.name] for a in grid if a.name not in (axis.name, *others)}
    about = [str(rows[0]["network"]), str(rows[0]["methods"]) if len({r["methods"] for r in rows}) == 1 else ""]
    about += [f"{name.rpartition('.')[2]} {value}" for name, value in fixed.items()]
    axes.set_title(", ".join(filter(None, [*about, f"{rows[0]['images']:,} images"])), fontsize=10, loc="left")
    if not crowded:
        axes.legend(frameon=False, fontsize=9)
    return figure


def labelled(metric: str, unit: str) -> str:
    """An axis's label: `mIoU, %`; of a share of images, of what."""
    name = WORDS.get(metric, metric)
    return f"{name}, % of test images" if metric in ("top1", "top5") else ", ".join(filter(None, [name, unit]))


def _originals(axes: Axes, rows: Sequence[Row]) -> None:
    """A dashed line at the metric of each float network, where it has one."""
    for i, value in enumerate(sorted({r["original"] for r in rows if r["original"] is not None})):
        axes.axhline(value, color="#555555", linestyle="--", linewidth=1, label=None if i else "float")


def _ordered(rows: Sequence[Row], axis: Axis) -> list[Row]:
    """In the order of the axis: by number where there are numbers, else as the labels were given."""
    values = [row[axis.name] for row in rows]
    if all(isinstance(v, int | float) for v in values):
        return sorted(rows, key=lambda row: float(row[axis.name]))
    order = [str(label) for label in axis.points]
    return sorted(rows, key=lambda row: order.index(str(row[axis.name])))
