"""One run as a web page: a single file that needs no network, and no script but to sort and to zoom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pow2quant import foreign, run_folder
from pow2quant.report import costs, explain, graph, histograms, layers, summary
from pow2quant.report.page import page, read
from pow2quant.report.scales import exponents, tensor
from pow2quant.report.statistics import middle, tax_db
from pow2quant.report.summary import evaluated

ACCURACIES = {
    "initial": "float",
    "ptq": "simulation after PTQ",
    "qat_best": "simulation, best of QAT",
    "final": "simulation",
    "onnxruntime": "onnxruntime",
}
"""`<key>_accuracy` in report.json -> what it is the accuracy of, in the order of the work."""


METRICS = "training_metrics.json"
NOISIEST = 12


def render(
    report: Mapping[str, Any],
    statistics: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    config: str = "",
    sources: explain.Sources | None = None,
) -> str:
    """The page of what report.json holds; what an older report lacks is left out.

    statistics, metrics, config: statistics.json, training_metrics.json and config.yaml, where the run has them.
    sources: what the layers that cost most are explained from.
    """
    measured = (statistics or {}).get("tensors") or {}
    rows = list(layers.rows(report, statistics or {}))
    drawn = [histograms.draw(name, tensor, _scale(report, name)) for name, tensor in measured.items()]
    costly = costs.costly((statistics or {}).get("network") or [], measured, report.get("pipeline_steps") or ())
    parts: dict[str, Any] = {
        "accuracies": list(_accuracies(report)),
        "scores": _scores(report),
        "layers": rows,
        "network": (statistics or {}).get("network"),
        "costs": costly,
        "explained": [(cost.layer, "\n".join(explain.lines(sources.explained(cost.layer)))) for cost in costly]
        if sources
        else [],
        "by_class": _by_class(report),
        "worst": [w for w in (statistics or {}).get("worst") or [] if _is_picture(w.get("image"))],
        "dead": [(name, t["dead_channels"]) for name, t in measured.items() if t.get("dead_channels")],
        "histograms": drawn,
        "noisiest": sorted(drawn, key=lambda h: math.inf if h.sqnr_db is None else h.sqnr_db)[:NOISIEST],
        "tax": list(_tax(measured)),
        "tensors": [tensor(name, detail) for name, detail in report.get("final_quantization_details", {}).items()],
    }
    return page(
        "report.html.j2",
        report=report,
        statistics=statistics,
        measured=measured,
        agrees=summary.agrees(report),
        evaluated=evaluated(report.get("evaluation")),
        higher_is_better=_leading(report).get("higher_is_better", True),
        intervals=(report.get("evaluation") or {}).get("intervals") or {},
        widths=summary.widths(report),
        strips=layers.picture(report, parts["network"], rows) if parts["network"] else None,
        profile=layers.profile(rows) if measured else None,
        curves=_curves(report, metrics or {}),
        config=config,
        narrow=any(spec and spec.get("bitwidth") != 8 for spec in _specs(report)),
        sections=[(id, title) for id, title, part in SECTIONS if parts.get(part) or report.get(part)],
        left=graph.LEFT,
        width=graph.WIDTH,
        height=graph.HEIGHT,
        pitch=graph.PITCH,
        middle=graph.LEFT + graph.WIDTH // 2,
        **parts,
    )


SECTIONS = (
    ("accuracy", "Accuracy", "accuracies"),
    ("scores", "Quality", "scores"),
    ("classes", "Class by class", "by_class"),
    ("worst", "Samples that got worse", "worst"),
    ("agreement", "Agreement", "validation"),
    ("costs", "Layers that cost most", "costs"),
    ("explained", "Step by step", "explained"),
    ("dead", "Dead channels", "dead"),
    ("layers", "Layer by layer", "layers"),
    ("network", "Network", "network"),
    ("histograms", "Histograms", "histograms"),
    ("tax", "Cost of powers of two", "tax"),
    ("training", "Training", "training"),
    ("search", "Mixed precision", "search"),
    ("cost", "Size and speed", "model_size_bytes"),
    ("reproduce", "Reproduce it", "environment"),
    ("tensors", "Every tensor", "tensors"),
)
"""(anchor, title, what it needs) of the page, in order."""


def page_of(folder: Path) -> str:
    """The page of a run's folder."""
    config = folder / run_folder.CONFIG
    return render(
        read(folder / run_folder.REPORT),
        _beside(folder / run_folder.STATISTICS),
        _beside(folder / METRICS),
        foreign.text(config, foreign.MOST_TEXT) if config.is_file() else "",
        explain.Sources(folder) if explain.Sources.there(folder) else None,
    )


def _beside(path: Path) -> dict[str, Any] | None:
    """A file that not every run has."""
    return read(path) if path.is_file() else None


def _accuracies(report: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None, float | None]]:
    """(what, top-1, top-5 or None, change of top-1 against float in points) of what was measured."""
    first = report.get("initial_accuracy")
    for key, label in ACCURACIES.items():
        top1, top5 = report.get(f"{key}_accuracy"), report.get(f"{key}_accuracy_top5")
        repeats = key == "ptq" and "qat_best_accuracy" not in report and "final_accuracy" in report
        if top1 is not None and not repeats:
            yield label, top1, top5, None if first is None or key == "initial" else top1 - first


def _scores(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """The table of a task that is not classification; None without metrics."""
    header, rows = summary.scores(report)
    header = [header[0], *(f"{name}#" for name in header[1:])]
    return (header, rows) if rows and report.get("initial_accuracy") is None else None


MOST_CLASSES = 40
"""So many classes are shown."""


def _by_class(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Classes with their change in points; where they are many, those that changed most."""
    found = [row | {"change": row["quantized"] - row["float"]} for row in report.get("by_class") or []]
    if len(found) > MOST_CLASSES:
        found = sorted(found, key=lambda row: -abs(row["change"]))[:MOST_CLASSES]
    return found


def _is_picture(text: Any) -> bool:
    """Whether it is nothing, or a picture that this package wrote, and no address."""
    return text is None or (isinstance(text, str) and text.startswith("data:image/png;base64,"))


def _leading(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the report says of the metric that leads."""
    return next(iter((report.get("metrics") or {}).values()), {})


def _specs(report: Mapping[str, Any]) -> list[Any]:
    """How weights and activations are quantized, as far as the report says."""
    roles = report.get("config") or {}
    return [roles.get(role) for role in ("weight", "output")]


def _curves(report: Mapping[str, Any], metrics: Mapping[str, Any]) -> Any:
    """The chart of training, None without one."""
    from markupsafe import Markup

    from pow2quant.report import figures

    if not metrics.get("epochs"):
        return None
    leading = _leading(report)
    compared = {"float": "initial", "after PTQ": "ptq", "final": "final"}
    values = {"initial": leading.get("float"), "ptq": leading.get("ptq"), "final": leading.get("quantized")}
    lines = {label: report.get(f"{key}_accuracy") or values[key] for label, key in compared.items()}
    known = {k: v for k, v in lines.items() if v is not None}
    return Markup(figures.training(metrics["epochs"], known, metrics.get("metric", ""), metrics.get("unit", "%")))


def _tax(tensors: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What free scales would gain: weights, then activations."""
    for role, roles in (("weights", ("weight",)), ("activations", ("input", "output"))):
        known = {name: gain for name, t in tensors.items() if t.get("role") in roles for gain in tax_db([dict(t)])}
        if known:
            worst = max(known, key=lambda name: known[name])
            typical = middle(list(known.values()))
            yield {"role": role, "count": len(known), "median": typical, "worst": worst, "most": known[worst]}


def _scale(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What is known of a tensor's encoding, and its scale in words."""
    detail = (report.get("final_quantization_details") or {}).get(name) or {}
    return {**detail, "words": exponents(detail, count=False)}
