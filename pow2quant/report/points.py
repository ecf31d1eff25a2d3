"""Configurations that were tried, in the form in which the pages of studies show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pow2quant.report import summary
from pow2quant.report.page import stem
from pow2quant.report.verdict import NEGLIGIBLE

FILE, PACKED, SQNR, SPEED, SECONDS = "ONNX file, KiB", "packed weights, KiB", "SQNR, dB", "speed", "seconds"
BITS, OPERATIONS, LATENCY = "bits of a weight", "bit operations, M", "latency, ms"

FORMATS = {
    SQNR: "{:.1f}",
    FILE: "{:,.1f}",
    PACKED: "{:,.1f}",
    BITS: "{:.2f}",
    OPERATIONS: "{:,.3f}",
    LATENCY: "{:.4g}",
    SPEED: "{:.2f}\u00d7",
    SECONDS: "{:,.0f}",
    "seeds": "{:d}",
}
"""What may be known of a point beside its metric, in the order of the columns, and how it is written."""

CHOSEN = " (chosen)"

COSTS = (FILE, PACKED, OPERATIONS, LATENCY)
"""What a metric is weighed against."""


@dataclass(frozen=True)
class Point:
    """A configuration that was tried, and what came of it.

    name: what it is called in figures. settings: what was varied. original, value: the metric of the float network and
    of the quantized one. change: of the metric, low and high the ends of its 95 % interval; None where they are not
    known. spread: standard deviation over seeds. facts: see FORMATS. group: points of one are compared. sample: equal
    for points that were measured on the same images. agrees: whether all executors do; None: they were not compared.
    folder: of a run of its own.
    """

    name: str
    metric: str
    unit: str
    higher_is_better: bool
    original: float | None
    value: float | None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, float | None] = field(default_factory=dict)
    group: str = ""
    evaluated: str = ""
    sample: str | None = None
    agrees: bool | None = None
    folder: Path | None = None

    @property
    def shown(self) -> str:
        """The metric as it is written."""
        text = summary.number(self.value, self.unit)
        return text if self.spread is None else f"{text.split()[0]} ± {summary.number(self.spread, self.unit)}"

    @property
    def changed(self) -> str:
        """The change, with its interval."""
        return summary.change(self.change, self.low, self.high, self.unit)

    @property
    def float_text(self) -> str:
        """The float network's metric as it is written."""
        return summary.number(self.original, self.unit)

    def is_drawn(self, column: str) -> bool:
        """Whether a column (`value`, `change`) has a number, and a finite one."""
        value: float | None = getattr(self, column)
        return value is not None and math.isfinite(value)

    def gain(self, column: str) -> float | None:
        """A column (`value`, `change`) so that more is better."""
        value: float | None = getattr(self, column)
        return value if value is None or self.higher_is_better else -value

    @property
    def most(self) -> float | None:
        """The better end of the interval of the gain."""
        end = self.high if self.higher_is_better else self.low
        return end if end is None or self.higher_is_better else -end

    @property
    def lost(self) -> bool:
        """Whether quality is clearly lost, as a run's verdict says it."""
        gain = self.gain("change")
        negligible = NEGLIGIBLE.get(self.unit, 0.01 * abs(self.original or 0.0))
        return gain is not None and self.most is not None and self.most < 0 and gain < -negligible

    def may_equal(self, best: Point) -> bool:
        """Whether the interval of the change reaches the best one's change."""
        aim = best.gain("change")
        return aim is not None and self.most is not None and self.most >= aim


def alike(points: Sequence[Point]) -> bool:
    """Whether all were measured on the same images."""
    return summary.measured_alike([p.sample for p in points])


def of_row(row: Mapping[str, Any], axes: list[str], folder: Path) -> Point:
    """A finished trial of study.json in `folder`; `axes` are the settings that vary."""
    settings = {axis.rpartition(".")[2]: row[axis] for axis in axes if axis in row}
    size = row.get("file_bytes")
    return Point(
        name=_named(settings) or f"trial {row['trial']}",
        **{key: row[key] for key in ("metric", "unit", "higher_is_better", "original", "change")},
        value=row["quantized"],
        low=row["change_low"],
        high=row["change_high"],
        settings=settings,
        facts={SQNR: row["sqnr_db"], FILE: size and size / 1024, SECONDS: row.get("duration_seconds")},
        evaluated=summary.evaluated(
            {"images": row["images"], "of": row.get("of_images", 0), "classes": row.get("classes")}
        ),
        sample=row.get("sample"),
        agrees=row.get("agrees"),
        folder=_run(row, folder),
    )


def _named(settings: Mapping[str, Any]) -> str:
    """`bitwidth 4, gptq, not per channel`: words stand alone, numbers behind what they are of."""

    def said(name: str, value: Any) -> str:
        if isinstance(value, bool):
            return name if value else f"not {name}"
        return value if isinstance(value, str) else f"{name} {value}"

    return ", ".join(said(name.replace("_", " "), value) for name, value in settings.items())


def _run(row: Mapping[str, Any], folder: Path) -> Path | None:
    """The folder of a trial that was a whole run, beside the study's files; it may have been made elsewhere."""
    return folder / "runs" / stem(row["run"]) if row.get("run") else None


def of_cell(cell: Mapping[str, Any], networks: int, folder: Path) -> Point:
    """A configuration of comparison.json in `folder`, over its seeds."""
    names = (cell["network"],) if networks > 1 else ()
    size = cell.get("file_bytes")
    return Point(
        name=" ".join((*names, cell["widths"], cell["method"])),
        **{key: cell[key] for key in ("metric", "unit", "higher_is_better", "original", "value", "spread", "change")},
        low=cell["change_low"],
        high=cell["change_high"],
        settings={key: cell[key] for key in ("network", "widths", "method")},
        facts={SQNR: cell["sqnr_db"], FILE: size and size / 1024, "seeds": cell["seeds"], SECONDS: cell["seconds"]},
        group=cell["network"],
        evaluated=summary.evaluated({"images": cell["images"], "of": cell["of_images"], "classes": cell["classes"]}),
        sample="the same",
        agrees=cell.get("agrees"),
        folder=_run(cell, folder),
    )


def of_plan(plan: Mapping[str, Any], number: int, search: Mapping[str, Any]) -> Point:
    """A plan of search.json, the `number`-th from the cheapest up."""
    low, high = plan.get("change_interval") or (None, None)
    packed, latency, bops = plan.get("size"), plan.get("latency"), plan.get("bops")
    return Point(
        name=f"{plan['kind'] if plan['kind'] != 'found' else f'plan {number}'}{CHOSEN if plan['chosen'] else ''}",
        **{key: search[key] for key in ("metric", "unit", "higher_is_better")},
        original=search["float_accuracy"],
        value=plan["accuracy"],
        change=plan.get("change"),
        low=low,
        high=high,
        facts={
            PACKED: packed and packed / 1024,
            BITS: plan.get("average_bits"),
            OPERATIONS: bops and bops / 1e6,
            LATENCY: latency and latency / 1e3,
        },
        evaluated=search["evaluated"],
        sample="the same",
    )


def of_report(name: str, folder: Path | None, report: Mapping[str, Any]) -> Point:
    """A finished run."""
    metric, values = summary.leading(report)
    first, final = values.get("float"), values.get("quantized")
    evaluation, latency = report.get("evaluation") or {}, report.get("latency") or {}
    low, high = evaluation.get("interval") or (None, None)
    size, pair = (
        (report.get("model_size_bytes") or {}).get("quantized"),
        (latency.get("float"), latency.get("quantized")),
    )
    steps = [s for s in report.get("pipeline_steps") or [] if s not in ("calibrate", "export")]
    return Point(
        name=name,
        metric=metric,
        unit=values.get("unit", ""),
        higher_is_better=values.get("higher_is_better", True),
        original=first,
        value=final,
        change=None if first is None or final is None else final - first,
        low=low,
        high=high,
        settings={
            "model": stem(report.get("model") or "") or None,
            "data": stem(report.get("dataset") or "") or None,
            "backend": report.get("backend"),
            "bits": summary.widths(report) or None,
            "scales": "2^k" if report.get("quantization_type") == "power_of_2" else "free",
            "methods": " → ".join(steps) or "none",
        },
        facts={
            SQNR: report.get("final_sqnr_db"),
            FILE: size and size / 1024,
            SPEED: pair[0] / pair[1] if pair[0] and pair[1] else None,
            SECONDS: report.get("duration_seconds"),
        },
        evaluated=summary.evaluated(evaluation),
        sample=evaluation.get("sample"),
        agrees=summary.agrees(report),
        folder=folder,
    )
