"""What came of a comparison: a cell for each configuration, as a table, a document and figures."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pow2quant.report import summary
from pow2quant.study.figures import COLOURS, MARKERS, blank, labelled, png
from pow2quant.study.trials import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """One configuration over its seeds: the task's leading metric, mean and standard deviation; SQNR in dB.

    original, value: of the float network (None where that is no question) and of the quantized one. best: whether no
    other method has a better mean with this network and these widths. spread: None for one seed. failed: seeds without
    a result, which the means leave out. change, change_low, change_high: of the metric against float and the ends of
    its 95 % interval, means over seeds; measured on `images` of `of_images`, of `classes`. Top-1 and top-5 in per cent,
    for classification. Of whole runs: whether all agree, the first seed's folder, and the size of its ONNX file.
    """

    network: str
    widths: str
    method: str
    seeds: int
    failed: int
    metric: str
    unit: str
    higher_is_better: bool
    original: float | None
    value: float
    spread: float | None
    sqnr_db: float | None
    seconds: float
    original_top1: float | None = None
    top1: float | None = None
    top5: float | None = None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    images: int = 0
    of_images: int = 0
    classes: int | None = None
    best: bool = False
    agrees: bool | None = None
    run: str | None = None
    file_bytes: int | None = None

    @property
    def quality(self) -> float:
        """The mean, so that more is better."""
        return self.value if self.higher_is_better else -self.value

    def text(self, value: float | None, spread: float | None = None) -> str:
        """A value of the metric, with the spread over seeds."""
        shown = summary.number(value, self.unit)
        return shown if spread is None else f"{shown.split()[0]} ± {self.text(spread)}"


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison: its folder, a cell for each configuration, and why trials failed."""

    folder: Path
    cells: list[Cell]
    errors: list[str]

    @property
    def best(self) -> list[Cell]:
        """Of each network, the configuration with the best mean."""
        networks = dict.fromkeys(cell.network for cell in self.cells)
        return [max((c for c in self.cells if c.network == n), key=lambda c: c.quality) for n in networks]


def cells(rows: Sequence[Row]) -> list[Cell]:
    """The rows of trials, gathered by network, widths and method."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    made = [_cell(key, own) for key, own in groups.items() if any(r["state"] == "complete" for r in own)]
    tops: dict[tuple[str, str], float] = {}
    for cell in made:
        place = cell.network, cell.widths
        tops[place] = max(tops.get(place, cell.quality), cell.quality)
    return [replace(c, best=c.quality == tops[c.network, c.widths]) for c in made]


def key_of(row: Row) -> tuple[str, str, str]:
    """Which cell a trial belongs to."""
    return str(row["network"]), str(row["widths"]), str(row["method"])


def _cell(key: tuple[str, str, str], rows: Sequence[Row]) -> Cell:
    complete = [r for r in rows if r["state"] == "complete"]

    def mean(column: str) -> float | None:
        values = [r[column] for r in complete if r.get(column) is not None]
        return round(statistics.fmean(values), 4) if values else None

    values = [r["quantized"] for r in complete]
    return Cell(
        *key,
        seeds=len(complete),
        failed=len(rows) - len(complete),
        **{name: complete[0][name] for name in ("metric", "unit", "higher_is_better")},
        original=mean("original"),
        value=round(statistics.fmean(values), 4),
        spread=round(statistics.stdev(values), 4) if len(values) > 1 else None,
        original_top1=mean("original_top1"),
        top1=mean("quantized_top1"),
        top5=mean("quantized_top5"),
        sqnr_db=mean("sqnr_db"),
        seconds=mean("duration_seconds") or 0.0,
        change=mean("change"),
        change_low=mean("change_low"),
        change_high=mean("change_high"),
        images=complete[0].get("images", 0),
        of_images=complete[0].get("of_images", 0),
        classes=complete[0].get("classes"),
        agrees=all(r["agrees"] for r in complete) if "agrees" in complete[0] else None,
        run=complete[0].get("run"),
        file_bytes=complete[0].get("file_bytes"),
    )


def header(found: Sequence[Cell]) -> list[str]:
    """The titles of the table's columns."""
    metrics = " / ".join(dict.fromkeys(summary.WORDS.get(cell.metric, cell.metric) for cell in found))
    return ["network", "widths", "method", "float", metrics, "95 % of the change", "SQNR dB", "seconds", ""]


def cells_of(cell: Cell) -> list[str]:
    """A line of the table, as text: mean and spread, the best marked."""
    return [
        cell.network,
        cell.widths,
        cell.method,
        cell.text(cell.original),
        cell.text(cell.value, cell.spread),
        summary.change(None, cell.change_low, cell.change_high, cell.unit),
        "-" if cell.sqnr_db is None else f"{cell.sqnr_db:.1f}",
        f"{cell.seconds:.1f}",
        "best" if cell.best else "",
    ]


def sentence(cell: Cell) -> str:
    """The best configuration of a network in one line."""
    many = f"{cell.seeds} seed{'s' if cell.seeds > 1 else ''}"
    metric = "" if cell.metric == "top1" else f"{summary.WORDS.get(cell.metric, cell.metric)} "
    against = [] if cell.original is None else [f"float {cell.text(cell.original)}"]
    return (
        f"{cell.network}: best is {cell.method} at {cell.widths}: {metric}{cell.text(cell.value, cell.spread)} "
        f"({', '.join([*against, many])})"
    )


def evaluated(found: Sequence[Cell]) -> str:
    """On how many images everything was measured, in a line; the same ones, since all have the same data."""
    texts = {summary.evaluated({"images": c.images, "of": c.of_images, "classes": c.classes}) for c in found}
    return f"evaluated: all on the same images: {', '.join(sorted(texts))}"


def markdown(found: Comparison) -> str:
    """The comparison as a document: the table, and the best of each network."""
    titles = header(found.cells)[:-1]
    rows = [tuple(titles), tuple("---" for _ in titles)]
    for cell in found.cells:
        *texts, mark = cells_of(cell)
        rows.append(tuple(f"**{text}**" if mark and i in (2, 4) else text for i, text in enumerate(texts)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    about = f"{titles[4]}, mean ± standard deviation over seeds; bold: the best method of a network and width."
    files = [name for name, _ in _named(found.cells)]
    parts = [
        "# Comparison",
        about,
        "\n".join(lines),
        evaluated(found.cells) if found.cells else "",
        "\n".join(f"- {sentence(cell)}" for cell in found.best),
        "\n".join(f"![{network}]({name})" for network, name in zip(_networks(found.cells), files, strict=True)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def document(found: Comparison) -> dict[str, object]:
    """The comparison for machines."""
    return {
        "folder": str(found.folder),
        "best": [asdict(cell) for cell in found.best],
        "cells": [asdict(cell) for cell in found.cells],
        "errors": found.errors,
    }


def csv_of(found: Sequence[Cell]) -> str:
    """The cells as CSV, a line for each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Cell.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(cell) for cell in found)
    return text.getvalue()


def _networks(found: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.network for cell in found))


def _named(found: Sequence[Cell]) -> Iterator[tuple[str, str]]:
    """(file name, network) of each figure."""
    for network in _networks(found):
        yield f"figure_{file_name(network)}.png", network


def file_name(network: str) -> str:
    """A network's name as a part of a file's."""
    return re.sub(r"[^A-Za-z0-9]+", "_", network).strip("_")


def figures(found: Sequence[Cell]) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG): of each network, the metric of every method at every width, with its spread."""
    for name, network in _named(found):
        yield name, png(_drawn([cell for cell in found if cell.network == network]))


def _drawn(found: Sequence[Cell]) -> Figure:
    figure, axes = blank()
    widths = list(dict.fromkeys(cell.widths for cell in found))
    methods = list(dict.fromkeys(cell.method for cell in found))
    for i, method in enumerate(methods):
        own = [cell for cell in found if cell.method == method]
        offset = 0.5 * ((i + 0.5) / len(methods) - 0.5)
        axes.errorbar(
            [widths.index(cell.widths) + offset for cell in own],
            [cell.value for cell in own],
            [cell.spread or 0.0 for cell in own],
            label=method,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="none",
            capsize=3,
            markersize=6,
        )
    originals = [cell.original for cell in found if cell.original is not None]
    if originals:
        axes.axhline(statistics.fmean(originals), color="#555555", linestyle="--", linewidth=1, label="float")
    axes.set_xticks(range(len(widths)), widths)
    axes.set_xlim(-0.5, len(widths) - 0.5)
    axes.set_ylabel(labelled(found[0].metric, found[0].unit))
    seeds = max(cell.seeds for cell in found)
    spread = f", mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"{found[0].network}{spread}", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure
