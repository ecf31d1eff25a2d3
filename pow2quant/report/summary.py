"""A run in a few lines: for a terminal, and for a notebook's cell."""

from __future__ import annotations

import html as escaping
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pow2quant import run_folder

WORST = 5
"""So many layers are named, those with the least signal to noise."""

WORDS = {
    "top1": "top-1",
    "top5": "top-5",
    "pixel_accuracy": "pixels",
    "label_accuracy": "labels",
    "miou": "mIoU",
    "sqnr": "SQNR",
}
"""What metrics are called on a screen, where that is not their name."""

EXECUTORS = {
    "float": "float",
    "ptq": "after PTQ",
    "qat_best": "best of training",
    "quantized": "simulation",
    "onnxruntime": "onnxruntime",
}
"""Whose values report.json has of each metric, in the order of the work."""


def scores(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What the task's metrics say of each executor, as a table: its header and its rows; no rows without metrics."""
    metrics: Mapping[str, Any] = report.get("metrics") or {}
    task = report.get("task", "")
    header = ["accuracy" if task == "classification" else task, *(WORDS.get(name, name) for name in metrics)]
    if not metrics:
        return header, []
    intervals = (report.get("evaluation") or {}).get("intervals") or {}
    leading = next(iter(metrics.values()))
    rows = []
    for key, label in EXECUTORS.items():
        values = [number(m.get(key), m.get("unit", "")) for m in metrics.values()]
        if any(m.get(key) is not None for m in metrics.values()):
            rows.append([label, values[0], ends(intervals.get(key), leading.get("unit", "")), *values[1:]])
    return [*header[:2], "95 % interval", *header[2:]], rows


def ends(interval: Sequence[float] | None, unit: str) -> str:
    """`96.4 to 98.9 %`; `-` for nothing."""
    if interval is None:
        return "-"
    low, high = (f"{end:.2f}" if unit else f"{end:.4g}" for end in interval)
    return f"{low} to {high} {unit}".rstrip()


def evaluated(evaluation: Mapping[str, Any] | None) -> str:
    """On what the figures were measured: `320 of 450 images, 10 of 10 classes`."""
    if not evaluation:
        return "-"
    images, total = evaluation["images"], evaluation["of"]
    words = f"all {total:,} images" if images == total else f"{images:,} of {total:,} images, a stratified sample"
    classes, known = evaluation.get("classes"), evaluation.get("of_classes")
    if not classes:
        return words.replace(", a stratified", ", an evenly spaced")
    return f"{words}, {classes} of {max(known or 0, classes)} classes"


def number(value: float | None, unit: str) -> str:
    """Two decimals of per cent and dB, four digits of all else; `-` for nothing."""
    if value is None:
        return "-"
    return f"{value:.2f} {unit}" if unit else f"{value:.4g}"


def leading(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The leading metric of a report and its values by executor; without metrics the SQNR of the outputs in dB."""
    for name, values in (report.get("metrics") or {}).items():
        return name, values
    accuracy = {"float": report.get("initial_accuracy"), "quantized": report.get("final_accuracy")}
    if accuracy["quantized"] is not None:  # a report of a version that knew no other task
        return "top1", {**accuracy, "unit": "%", "higher_is_better": True}
    return "sqnr", {"float": None, "quantized": report.get("final_sqnr_db"), "unit": "dB", "higher_is_better": True}


def agrees(report: Mapping[str, Any]) -> bool | None:
    """Whether no element differs; None where nothing was compared."""
    counts = [agreement.get("differing") for agreement in report.get("validation") or []]
    return not any(counts) if counts else None


def widths(report: Mapping[str, Any]) -> str:
    """`W4 A8`: the widths of weights and activations; nothing where the report does not say."""
    roles = report.get("config") or {}
    found = [(letter, roles[role]) for letter, role in (("W", "weight"), ("A", "output")) if role in roles]
    return " ".join(f"{letter}{spec['bitwidth']}" if spec else f"{letter} float" for letter, spec in found)


def measured_alike(samples: Sequence[str | None]) -> bool:
    """Whether all were measured on the same images, by `evaluation.sample` of their reports."""
    return len(set(samples)) == 1 and samples[0] is not None


def change(value: float | None, low: float | None, high: float | None, unit: str) -> str:
    """`-0.25 (-1.01 to +0.51)`: a change and its 95 % interval, or one of the two; `-` for neither."""

    def signed(number: float) -> str:
        return f"{number:+.2f}" if unit else f"{number:+.3g}"

    interval = "" if low is None or high is None else f"{signed(low)} to {signed(high)}"
    if value is None:
        return interval or "-"
    return f"{signed(value)} ({interval})" if interval else signed(value)


def worst(folder: Path, count: int = WORST) -> list[tuple[str, float]]:
    """The tensors with the least signal to noise against the float network, in dB; none without statistics."""
    file = folder / run_folder.STATISTICS
    if not file.is_file():
        return []
    tensors = json.loads(file.read_text(encoding="utf-8"))["tensors"]
    found = {name: t.get("network_sqnr_db", t.get("sqnr_db")) for name, t in tensors.items()}
    known = [(name, db) for name, db in found.items() if db is not None]
    return sorted(known, key=lambda pair: pair[1])[:count]


def facts(report: Mapping[str, Any]) -> dict[str, str]:
    """The sentences about a run, by label."""
    sqnr, sizes = report.get("final_sqnr_db"), report["model_size_bytes"]
    return {
        "verdict": report["verdict"]["agreement"],
        "quality": report["verdict"]["change"],
        "evaluated": evaluated(report.get("evaluation")),
        "certificate": report["certificate"]["sentence"],
        "outputs": "equal to float" if sqnr is None else f"{sqnr} dB SQNR against float",
        "size": f"{sizes['quantized']:,} bytes (float: {sizes['float']:,})",
        **needed(report.get("resources")),
    }


def needed(resources: Mapping[str, Any] | None) -> dict[str, str]:
    """What the network needs as integers, as a labelled sentence; empty where it has none."""
    if resources is None:
        return {}
    bits = resources["accumulator_bits"]
    return {
        "integers": f"RAM {resources['ram_bytes']:,} bytes, flash {resources['flash_bytes']:,} bytes, "
        f"{resources['macs']:,} multiply-accumulates" + (f", accumulators of {bits} bits" if bits else "")
    }


def text(report: Mapping[str, Any], folder: Path) -> str:
    """A run in plain lines: verdict, certificate, scores, and the layers that lose most."""
    lines = [f"{label}: {value}" for label, value in facts(report).items()]
    lines += [f"warning: {warning}" for warning in report["verdict"]["warnings"]]
    header, rows = scores(report)
    lines += ["", *_aligned([header, *rows])] if rows else []
    found = worst(folder)
    lines += ["", "least signal to noise:", *_aligned([[f"  {n}", f"{db:.1f} dB"] for n, db in found])] if found else []
    return "\n".join(lines)


def html(report: Mapping[str, Any], folder: Path) -> str:
    """The same as HTML."""
    colour = "#2a7d2a" if agrees(report) is not False else "#b3261e"
    lines = "".join(
        f"<div{f' style=color:{colour}' if label == 'verdict' else ''}><b>{label}</b>: {_safe(value)}</div>"
        for label, value in facts(report).items()
    )
    lines += "".join(f"<div><b>warning</b>: {_safe(warning)}</div>" for warning in report["verdict"]["warnings"])
    header, rows = scores(report)
    tables = _table(header, rows) if rows else ""
    found = worst(folder)
    if found:
        tables += _table(["least signal to noise", "dB"], [[name, f"{db:.1f}"] for name, db in found])
    return f"<div>{lines}{tables}</div>"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _safe(value: str) -> str:
    return escaping.escape(value)
