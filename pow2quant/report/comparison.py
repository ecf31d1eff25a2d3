"""Several runs on one page: what each costs and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pow2quant import run_folder
from pow2quant.report.html import _widths, agrees, guarded, page, read
from pow2quant.report.summary import WORDS, change, evaluated, leading, number

MOST_LINES = 5
"""So many runs have a line each in the chart of noise along the network."""


def compare(folders: Sequence[Path], output: Path) -> Path:
    """Writes `report.html` of finished runs' folders into `output` and returns its path.

    Raises FileFormatError for a folder without a readable report; OutputError when the page cannot be written.
    """
    from pow2quant.saving import write

    runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def load(folder: Path, name: str) -> str:
        statistics = folder / run_folder.STATISTICS
        runs[name] = read(folder / run_folder.REPORT), read(statistics) if statistics.is_file() else {}
        return ""

    for folder, name in zip(folders, names(folders), strict=True):
        guarded(folder / run_folder.REPORT, lambda folder=folder, name=name: load(folder, name))  # type: ignore[misc]
    first = folders[0] / run_folder.REPORT
    target = output / "report.html"
    write(target, guarded(first, lambda: render(runs)).encode())
    return target


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `a/w4`, `b/w4`; one that is given twice is numbered."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    found: list[str] = []
    for part in parts:
        name = "/".join(part[-depth:])
        again = sum(other == part for other in parts[: len(found)])
        found.append(f"{name} ({again + 1})" if again else name)
    return found


def render(runs: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """The page of (report, statistics) by the runs' names."""
    rows = [_row(name, report) for name, (report, _) in runs.items()]
    same = measured_alike([r["sample"] for r in rows])
    value = "value" if same else "change"
    sign = 1 if all(r["higher_is_better"] for r in rows) else -1
    judged = (r for r in rows if r[value] is not None) if len({r["metric"] for r in rows}) == 1 else iter(())
    best = max(judged, key=lambda r: (sign * r[value], -r["bytes"]), default=None)
    return page(
        "comparison.html.j2",
        rows=rows,
        best=best,
        same=same,
        agree=[r["agrees"] for r in rows],
        metric=" / ".join(dict.fromkeys(r["metric"] for r in rows)),
        trade=_trade(rows, value) if best else None,
        profile=_profile({name: statistics for name, (_, statistics) in runs.items()}),
        verdicts=[
            (name, agrees(report), (report.get("verdict") or {}).get("text")) for name, (report, _) in runs.items()
        ],
        several={key: len({r[key] for r in rows}) > 1 for key in ("model", "dataset", "backend", "scales")},
    )


def measured_alike(samples: Sequence[str | None]) -> bool:
    """Whether all runs were measured on the same images, by `evaluation.sample` of their reports."""
    return len(set(samples)) == 1 and samples[0] is not None


def _row(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    sizes, latency = report.get("model_size_bytes") or {}, report.get("latency") or {}
    metric, values = leading(report)
    first, final, unit = values.get("float"), values.get("quantized"), values.get("unit", "")
    changed = None if first is None or final is None else final - first
    evaluation = report.get("evaluation") or {}
    low, high = evaluation.get("interval") or (None, None)
    pair = latency.get("float"), latency.get("quantized")
    return {
        "name": name,
        "model": report.get("model"),
        "dataset": report.get("dataset"),
        "backend": report.get("backend"),
        "widths": _widths(report),
        "scales": "2^k" if report.get("quantization_type") == "power_of_2" else "free",
        "steps": " → ".join(s for s in report.get("pipeline_steps") or [] if s not in ("calibrate", "export")),
        "metric": WORDS.get(metric, metric),
        "unit": unit,
        "higher_is_better": values.get("higher_is_better", True),
        "float": first,
        "value": final,
        "change": changed,
        "shown": [number(first, unit), number(final, unit), change(changed, None, None, unit)],
        "sqnr": report.get("final_sqnr_db"),
        "bytes": sizes.get("quantized") or 0,
        "speed": pair[0] / pair[1] if pair[0] and pair[1] else None,
        "seconds": report.get("duration_seconds"),
        "interval": change(None, low, high, unit),
        "evaluated": evaluated(evaluation),
        "sample": evaluation.get("sample"),
        "agrees": agrees(report),
    }


def _trade(rows: Sequence[Mapping[str, Any]], value: str) -> Any:
    """The metric or its change against size, where there are two runs with both."""
    from markupsafe import Markup

    from pow2quant.report import figures

    points = [(r["name"], r["bytes"] / 1024, r[value]) for r in rows if r["bytes"] and r[value] is not None]
    if len(points) < 2:
        return None
    label = ", ".join(filter(None, [rows[0]["metric"], rows[0]["unit"]]))
    if value == "change":
        label = f"change of {label}"
    return Markup(figures.trade(points, "quantized ONNX file, KiB", label))


def _profile(statistics: Mapping[str, Mapping[str, Any]]) -> Any:
    """Noise along the network, where at least two runs were measured and are of one network."""
    from markupsafe import Markup

    from pow2quant.report import figures

    series = dict(_series(statistics))
    networks = {tuple(y["writes"] for y in statistics[name]["network"]) for name in series}
    if len(networks) != 1 or len(series) < 2:
        return None
    return Markup(figures.profile(series, "operation, in order of computation"))


def _series(statistics: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[float | None]]]:
    for name, found in list(statistics.items())[:MOST_LINES]:
        if network := found.get("network"):
            tensors = found.get("tensors") or {}
            measured = [tensors[y["writes"]] for y in network if y["writes"] in tensors]
            yield name, [t.get("network_sqnr_db") for t in measured]
