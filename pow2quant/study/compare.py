"""`pow2quant compare`: methods by bit widths by networks, several seeds of each; mean, spread, and the best by name."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pow2quant.backends.base import SILENT, Progress
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError
from pow2quant.plugins import names
from pow2quant.report import summary
from pow2quant.saving import write
from pow2quant.study.figures import COLOURS, MARKERS, blank, png
from pow2quant.study.ledger import Plan
from pow2quant.study.space import axis
from pow2quant.study.sweep import RESULTS, Stopped, Study, report, running_on, table, tried
from pow2quant.study.trials import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("none", "output_mse+bias_correction", "gpfq")
WIDTHS = ("8:8", "4:8", "4:4")
TABLE, MARKDOWN, SUMMARY = "comparison.csv", "comparison.md", "comparison.json"


@dataclass(frozen=True)
class Cell:
    """One configuration over its seeds: top-1 in per cent, mean and standard deviation; SQNR of the logits in dB.

    best: whether no other method has a higher mean with this network and these widths. spread: None for one seed.
    failed: seeds without a result, which the means leave out. change, change_low, change_high: of top-1 against float,
    in points, and the ends of its 95 % interval, means over seeds; measured on `images` of `of_images`, of `classes`.
    """

    network: str
    widths: str
    method: str
    seeds: int
    failed: int
    original_top1: float
    top1: float
    spread: float | None
    top5: float | None
    sqnr_db: float | None
    seconds: float
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    images: int = 0
    of_images: int = 0
    classes: int | None = None
    best: bool = False


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison: its folder, a cell for each configuration, and why trials failed."""

    folder: Path
    cells: list[Cell]
    errors: list[str]

    @property
    def best(self) -> list[Cell]:
        """Of each network, the configuration with the highest mean."""
        networks = dict.fromkeys(cell.network for cell in self.cells)
        return [max((c for c in self.cells if c.network == n), key=lambda c: c.top1) for n in networks]


def study(
    base: RunConfig,
    networks: Sequence[tuple[str, str | None]],
    widths: Sequence[str],
    methods: Sequence[str],
    seeds: str,
    runs: str | None = None,
    name: str | None = None,
) -> Study:
    """Every method (`a+b`, `none`) with every width (`W:A`), network (name, weights) and seed.

    A method has the parameters that the base gives it. Raises ConfigError for what is not legal.
    """
    parameters = {method.name: dict(method.parameters) for method in base.ptq.applied}
    chains = {c: {"ptq.methods": [{n: parameters.get(n, {})} for n in c.split("+")]} for c in methods}
    models = networks or [(base.model.name, base.model.weights)]
    short = [re.split(r"[:/\\]", model)[-1] for model, _ in models]
    if len(set(short)) < len(short):
        short = [model for model, _ in models]
    if len(set(short)) < len(short):
        raise ConfigError("--model: the same network twice; their functions need names of their own")
    named = {
        label: {"model.name": model, "model.weights": weights}
        for label, (model, weights) in zip(short, models, strict=True)
    }
    grid = (
        axis("network", named),
        axis("widths", {_width(text)[0]: _width(text)[1] for text in widths}),
        axis("method", chains),
        axis("seed", seeds),
    )
    return Study(base, Plan((grid,), seed=base.seed), runs, name)


def _width(text: str) -> tuple[str, Mapping[str, int]]:
    """`4:8` is W4A8: 4-bit weights, 8-bit activations; an input keeps 8 bits, as an image has."""
    found = re.fullmatch(r"[wW]?(\d+)[:aA](\d+)", text)
    if found is None:
        raise ConfigError(f"--widths {text}: expected WEIGHTS:ACTIVATIONS, as in 4:8")
    weight, activation = int(found[1]), int(found[2])
    keys = {"weight": weight, "output": activation, "input": max(8, activation)}
    return f"W{weight}A{activation}", {f"quantization.{role}.bitwidth": bits for role, bits in keys.items()}


def compare(
    study: Study,
    output: Path,
    *,
    storage: str | None = None,
    jobs: int = 1,
    progress: Progress = SILENT,
    stopped: Stopped = running_on,
) -> Comparison:
    """Runs what is left of a comparison and writes it into `output`: markdown, CSV, JSON and a figure per network.

    Where trials are whole runs, report.html compares the first seed of each configuration.
    """
    for rows in tried(study, output, storage=storage, jobs=jobs, progress=progress, stopped=stopped):
        write(output / RESULTS, table(rows, study.axes).encode())
    found = Comparison(output, cells(rows), [str(r["error"]) for r in rows if r["state"] == "failed"])
    write(output / TABLE, _csv(found.cells).encode())
    write(output / MARKDOWN, markdown(found).encode())
    write(output / SUMMARY, json.dumps(document(found), indent=1).encode())
    for name, picture in figures(found.cells):
        write(output / name, picture)
    first = {(r["network"], r["widths"], r["method"]): r for r in reversed(rows) if r["state"] == "complete"}
    report(list(reversed(first.values())), output)
    return found


def cells(rows: Sequence[Row]) -> list[Cell]:
    """The rows of trials, gathered by network, widths and method."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row["network"]), str(row["widths"]), str(row["method"])), []).append(row)
    made = [_cell(key, own) for key, own in groups.items() if any(r["state"] == "complete" for r in own)]
    tops: dict[tuple[str, str], float] = {}
    for cell in made:
        place = cell.network, cell.widths
        tops[place] = max(tops.get(place, cell.top1), cell.top1)
    return [Cell(**{**asdict(c), "best": c.top1 == tops[c.network, c.widths]}) for c in made]


def _cell(key: tuple[str, str, str], rows: Sequence[Row]) -> Cell:
    complete = [r for r in rows if r["state"] == "complete"]

    def mean(column: str) -> float | None:
        values = [r[column] for r in complete if r.get(column) is not None]
        return round(statistics.fmean(values), 4) if values else None

    top1 = [r["quantized_top1"] for r in complete]
    return Cell(
        *key,
        seeds=len(complete),
        failed=len(rows) - len(complete),
        original_top1=mean("original_top1") or 0.0,
        top1=round(statistics.fmean(top1), 4),
        spread=round(statistics.stdev(top1), 4) if len(top1) > 1 else None,
        top5=mean("quantized_top5"),
        sqnr_db=mean("sqnr_db"),
        seconds=mean("duration_seconds") or 0.0,
        change=mean("change"),
        change_low=mean("change_low"),
        change_high=mean("change_high"),
        images=complete[0].get("images", 0),
        of_images=complete[0].get("of_images", 0),
        classes=complete[0].get("classes"),
    )


HEADER = ("network", "widths", "method", "float", "top-1", "95 % of the change", "SQNR dB", "seconds", "")


def cells_of(cell: Cell) -> list[str]:
    """A line of the table, as text: mean and spread, the best marked."""
    spread = "" if cell.spread is None else f" ± {cell.spread:.2f}"
    return [
        cell.network,
        cell.widths,
        cell.method,
        f"{cell.original_top1:.2f}",
        f"{cell.top1:.2f}{spread}",
        "-" if cell.change_low is None else f"{cell.change_low:+.2f} to {cell.change_high:+.2f}",
        "-" if cell.sqnr_db is None else f"{cell.sqnr_db:.1f}",
        f"{cell.seconds:.1f}",
        "best" if cell.best else "",
    ]


def sentence(cell: Cell) -> str:
    """The best configuration of a network in one line."""
    spread = "" if cell.spread is None else f" ± {cell.spread:.2f}"
    many = f"{cell.seeds} seed{'s' if cell.seeds > 1 else ''}"
    return (
        f"{cell.network}: best is {cell.method} at {cell.widths}: {cell.top1:.2f}{spread} % "
        f"(float {cell.original_top1:.2f} %, {many})"
    )


def evaluated(found: Sequence[Cell]) -> str:
    """On how many images everything was measured, in a line; the same ones, since all have the same data."""
    texts = {summary.evaluated({"images": c.images, "of": c.of_images, "classes": c.classes}) for c in found}
    return f"evaluated: all on the same images: {', '.join(sorted(texts))}"


def markdown(found: Comparison) -> str:
    """The comparison as a document: the table, and the best of each network."""
    rows = [HEADER[:-1], tuple("---" for _ in HEADER[:-1])]
    for cell in found.cells:
        *texts, mark = cells_of(cell)
        rows.append(tuple(f"**{text}**" if mark and i in (2, 4) else text for i, text in enumerate(texts)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    about = "Top-1 in per cent, mean ± standard deviation over seeds; bold: the best method of a network and width."
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


def _csv(found: Sequence[Cell]) -> str:
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
        yield f"figure_{re.sub(r'[^A-Za-z0-9]+', '_', network).strip('_')}.png", network


def figures(found: Sequence[Cell]) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG): of each network, top-1 of every method at every width, with its spread."""
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
            [cell.top1 for cell in own],
            [cell.spread or 0.0 for cell in own],
            label=method,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="none",
            capsize=3,
            markersize=6,
        )
    original = statistics.fmean(cell.original_top1 for cell in found)
    axes.axhline(original, color="#555555", linestyle="--", linewidth=1, label="float")
    axes.set_xticks(range(len(widths)), widths)
    axes.set_xlim(-0.5, len(widths) - 0.5)
    axes.set_ylabel("top-1, % of test images")
    seeds = max(cell.seeds for cell in found)
    spread = f", mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"{found[0].network}{spread}", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure


def checked(methods: Sequence[str]) -> None:
    """Raises ConfigError for a method that there is not."""
    known = names("methods")
    for chain in methods:
        for name in chain.split("+"):
            if name != "none" and name not in known:
                raise ConfigError(f"--method {chain}: {name} is unknown; known: {', '.join(known)}")
