"""One run as a web page: a single file that needs no network, and no script but to sort and to zoom."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pow2quant import foreign, run_folder
from pow2quant.errors import FileFormatError
from pow2quant.report import costs, graph, histograms, summary
from pow2quant.report.statistics import middle, tax_db
from pow2quant.report.summary import evaluated

if TYPE_CHECKING:
    from jinja2 import Environment

NOTHING = "\u2013"
"""Stands where a report does not say."""

ACCURACIES = {
    "initial": "float",
    "ptq": "simulation after PTQ",
    "qat_best": "simulation, best of QAT",
    "final": "simulation",
    "onnxruntime": "onnxruntime",
}
"""`<key>_accuracy` in report.json -> what it is the accuracy of, in the order of the work."""

TONES = (30, 20, 12, 6)
"""Signal to noise in dB from which on a box of the graph has the best colour, the second best, and so on."""

METRICS = "training_metrics.json"
NOISIEST = 12


def render(
    report: Mapping[str, Any],
    statistics: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    config: str = "",
) -> str:
    """The page of what report.json holds; what an older report lacks is left out.

    statistics, metrics, config: statistics.json, training_metrics.json and config.yaml, where the run has them.
    """
    measured = (statistics or {}).get("tensors") or {}
    layers = list(_layers(report, statistics or {}))
    drawn = [histograms.draw(name, tensor, _scale(report, name)) for name, tensor in measured.items()]
    parts: dict[str, Any] = {
        "accuracies": list(_accuracies(report)),
        "scores": _scores(report),
        "scored_by": summary.WORDS.get(name := (report.get("search") or {}).get("metric", "top1"), name),
        "said": partial(summary.number, unit=(report.get("search") or {}).get("unit", "%")),
        "layers": layers,
        "network": (statistics or {}).get("network"),
        "costs": costs.costly((statistics or {}).get("network") or [], measured, report.get("pipeline_steps") or ()),
        "by_class": _by_class(report),
        "worst": [w for w in (statistics or {}).get("worst") or [] if _is_picture(w.get("image"))],
        "dead": [(name, t["dead_channels"]) for name, t in measured.items() if t.get("dead_channels")],
        "histograms": drawn,
        "noisiest": sorted(drawn, key=lambda h: math.inf if h.sqnr_db is None else h.sqnr_db)[:NOISIEST],
        "tax": list(_tax(measured)),
        "tensors": [_tensor(name, detail) for name, detail in report.get("final_quantization_details", {}).items()],
    }
    return page(
        "report.html.j2",
        report=report,
        statistics=statistics,
        measured=measured,
        agrees=agrees(report),
        evaluated=evaluated(report.get("evaluation")),
        higher_is_better=_leading(report).get("higher_is_better", True),
        intervals=(report.get("evaluation") or {}).get("intervals") or {},
        widths=_widths(report),
        strips=_picture(report, parts["network"], layers) if parts["network"] else None,
        profile=_profile(layers) if measured else None,
        curves=_curves(report, metrics or {}),
        config=config,
        front=_front(report.get("search")),
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
    ("worst", "Samples that lost most", "worst"),
    ("agreement", "Agreement", "validation"),
    ("costs", "Layers that cost most", "costs"),
    ("dead", "Dead channels", "dead"),
    ("layers", "Layer by layer", "layers"),
    ("network", "Network", "network"),
    ("histograms", "Histograms", "histograms"),
    ("tax", "Cost of powers of two", "tax"),
    ("training", "Training", "training"),
    ("search", "Mixed precision", "search"),
    ("cost", "Size and speed", "model_size_bytes"),
    ("reproduce", "Repeat it", "environment"),
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
    )


def rebuild(folder: Path, output: Path | None = None) -> Path:
    """Writes `report.html` anew from the files of a run's folder, into it or another, and returns its path.

    Raises FileFormatError when there is no report.json, or it is no report; OutputError when it cannot be written.
    """
    from pow2quant.saving import write

    page = guarded(folder / run_folder.REPORT, lambda: page_of(folder))
    target = (output or folder) / "report.html"
    write(target, page.encode())
    return target


def guarded(source: Path, make: Callable[[], str]) -> str:
    """What `make` makes of a file; its errors become a FileFormatError that names the file."""
    try:
        return make()
    except FileFormatError:
        raise
    except OSError as error:
        raise FileFormatError(f"{source}: cannot be read: {error.strerror}; give a finished run's folder") from error
    except Exception as error:  # rendering trips over a foreign document in every way there is
        raise FileFormatError(f"{source}: not a report of pow2quant: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    found = foreign.parsed(foreign.text(path, foreign.MOST_JSON))
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, got {type(found).__name__}")
    return found


def _beside(path: Path) -> dict[str, Any] | None:
    """A file that not every run has."""
    return read(path) if path.is_file() else None


def page(template: str, **values: Any) -> str:
    """A template of this package, rendered."""
    from markupsafe import Markup

    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Figures and script are this package's own; everything else is escaped.
    return _environment().get_template(template).render(values, script=Markup(script), script_hash=f"sha256-{digest}")


TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, Undefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)

    def stated(filter: Callable[..., str], otherwise: str = NOTHING) -> Callable[..., str]:
        return lambda v, *options: otherwise if v is None or isinstance(v, Undefined) else filter(v, *options)

    filters = {
        "number": _number,
        "percent": "{:.2f} %".format,
        "size": _size,
        "duration": _duration,
        "milliseconds": _milliseconds,
        "signed": "{:+.4g}".format,
    }
    environment.filters |= {name: stated(filter) for name, filter in filters.items()}
    environment.filters |= {"plain": stated(repr, ""), "shortened": _shortened, "stem": stem}
    return environment


def agrees(report: Mapping[str, Any]) -> bool | None:
    """Whether no element differs; None where nothing was compared."""
    counts = [agreement.get("differing") for agreement in report.get("validation") or []]
    return not any(counts) if counts else None


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


def _widths(report: Mapping[str, Any]) -> str:
    """`W4 A8`: the widths of weights and activations; nothing where the report does not say."""
    roles = report.get("config") or {}
    found = [(letter, roles[role]) for letter, role in (("W", "weight"), ("A", "output")) if role in roles]
    return " ".join(f"{letter}{spec['bitwidth']}" if spec else f"{letter} float" for letter, spec in found)


UNITS = {"size": (1e3, "kB"), "average_bits": (1.0, "bits"), "bops": (1e9, "G"), "latency": (1e3, "ms")}
"""Of a search's costs: what they are divided by, and the unit that makes."""


def _front(search: Any) -> dict[str, Any] | None:
    """The points of a search as places in a picture of 600 x 260, and the texts at the ends of its axis."""
    if not search:
        return None
    axis, points = search["axis"], search["points"]
    unit, word = UNITS[axis]
    xs, ys = [p[axis] for p in points], [*(p["accuracy"] for p in points), search["float_accuracy"]]

    def place(x: float, y: float) -> tuple[float, float]:
        wide, high = max(xs) - min(xs) or 1, max(ys) - min(ys) or 1
        return round(30 + 540 * (x - min(xs)) / wide, 1), round(240 - 220 * (y - min(ys)) / high, 1)

    places = [p | {"at": place(p[axis], p["accuracy"])} for p in points]
    return {
        "points": places,
        "line": " ".join("{},{}".format(*p["at"]) for p in places if p["on_front"]),
        "float": place(min(xs), search["float_accuracy"])[1],
        "ends": [f"{v / unit:.4g} {word}" for v in (min(xs), max(xs))],
    }


class _Layer(dict[str, Any]):
    """A row of the table of layers; what is not known of it is None."""

    def __missing__(self, key: str) -> None:
        return None


def _layers(report: Mapping[str, Any], statistics: Mapping[str, Any]) -> Iterator[_Layer]:
    """A row per operation: the network's where it was measured, else those of the certificate."""
    details = report.get("final_quantization_details") or {}
    tensors = statistics.get("tensors") or {}
    bounds = {bound["node"]: bound for bound in (report.get("certificate") or {}).get("layers") or []}
    boxes = statistics.get("network") or [_alone(bound) for bound in bounds.values()]
    for box in boxes:
        bound = next((bounds[node] for node in box["nodes"] if node in bounds), None)
        output, weight = (details.get(box[key]) or {} for key in ("writes", "weight"))
        measured, of_weight = (tensors.get(box[key]) or {} for key in ("writes", "weight"))
        if bound is None and not measured:
            continue
        shift = (bound or {}).get("shift")
        yield _Layer(
            name=box["name"],
            op=" ".join(filter(None, (box["op"], box["detail"]))),
            writes=box["writes"],
            weight=_exponents(weight, count=False),
            weight_order=_least(weight),
            output=_exponents(output),
            output_order=_least(output),
            shift=_shift(shift),
            shift_order=min(shift) if isinstance(shift, list) else "" if shift is None else shift,
            weight_db=of_weight.get("sqnr_db"),
            output_db=measured.get("sqnr_db"),
            network_db=measured.get("network_sqnr_db"),
            clipped=measured.get("clipped"),
            largest=(bound or {}).get("accumulator_max"),
            bits=(bound or {}).get("bits"),
            safe=None if bound is None else bound.get("int32_safe"),
            proved=None if bound is None else bool(bound.get("proved")),
            reason=(bound or {}).get("reason"),
        )


def _alone(bound: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of the certificate as a box."""
    node = bound["node"]
    return {
        "name": node,
        "op": bound.get("op", NOTHING),
        "detail": "",
        "nodes": [node],
        "writes": bound.get("tensor"),
        "weight": f"{node}.weight",
    }


def _profile(layers: Sequence[_Layer]) -> Any:
    """The chart of signal to noise along the network, None where there is nothing to draw."""
    from markupsafe import Markup

    from pow2quant.report import figures

    series = {"network so far": "network_db", "this output alone": "output_db", "these weights alone": "weight_db"}
    values = {label: [y[key] for y in layers] for label, key in series.items()}
    values = {label: found for label, found in values.items() if any(v is not None for v in found)}
    names = [y["name"] for y in layers]
    return Markup(figures.profile(values, "operation, and its number in the table", names)) if values else None


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


def _picture(
    report: Mapping[str, Any], network: Sequence[Mapping[str, Any]], layers: Sequence[_Layer]
) -> tuple[graph.Strip, ...]:
    details = dict(report.get("final_quantization_details") or {})
    for box in network:  # what only moves values has its input's encoding
        if box["writes"] not in details and box["reads"] and box["reads"][0] in details:
            details[box["writes"]] = details[box["reads"][0]]
    rows = {y["name"]: y for y in layers}
    notes = {}
    for box in network:
        row = rows.get(box["name"], _Layer())
        quality = row["network_db"]
        notes[box["name"]] = {
            "weights": f"weights {row['weight']}" if box["weight"] in details else None,
            "quality": "" if quality is None else f"{quality:.1f} dB",
            "tone": None if quality is None else sum(quality < tone for tone in TONES),
            "title": f"shift {row['shift']}" if row["shift"] not in (None, NOTHING) else None,
        }
    return graph.draw(network, {name: _label(detail) for name, detail in details.items()}, notes)


def _label(detail: Mapping[str, Any]) -> str:
    """`2^-5 · u8`: what is written at a tensor's line."""
    scale, bits = _exponents(detail, count=False), detail.get("bitwidth")
    kind = "" if bits is None or isinstance(bits, list) else f" · {'s' if detail.get('signed') else 'u'}{bits}"
    return f"{scale}{kind}"


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
    return {**detail, "words": _exponents(detail, count=False)}


def _exponents(detail: Mapping[str, Any], count: bool = True) -> str:
    """`2^-9 … 2^-6 (64 channels)`; free scales as numbers."""
    order = detail.get("exponent", detail.get("scale"))
    return _span(order, order, power if "exponent" in detail else None, count)


def power(k: int) -> str:
    """`2⁻⁹`."""
    return "2" + str(k).translate(SUPERSCRIPTS)


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _least(detail: Mapping[str, Any]) -> Any:
    """What a tensor is sorted by: its smallest exponent, or scale; nothing where there is none."""
    order = detail.get("exponent", detail.get("scale"))
    return min(order, default="") if isinstance(order, list) else "" if order is None else order


def _tensor(name: str, detail: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of tensors, channels summarized."""
    order = detail.get("exponent", detail.get("scale"))
    return {
        "name": name,
        "kind": name.rpartition(".")[2].partition("_")[0] if "." in name else "input",
        "scale": _exponents(detail),
        "hardware": _span(order, detail.get("hardware_op")),
        "zero_point": _span(detail.get("zero_point"), detail.get("zero_point"), count=False),
        "bits": _span(detail.get("bitwidth"), detail.get("bitwidth"), count=False),
        "order": _least(detail),
    }


def _span(order: Any, values: Any, text: Any = None, count: bool = True) -> str:
    """One value, or of one per channel the smallest and the largest: `2^-9 … 2^-6 (64 channels)`.

    order: what they are sorted by.
    """
    text = text or (lambda value: f"{value:.6g}" if isinstance(value, float) else str(value))
    if values is None:
        return NOTHING
    if not isinstance(values, Sequence) or isinstance(values, str):
        return str(text(values))
    if not values:
        return NOTHING
    ordered = [text(value) for _, value in sorted(zip(order, values, strict=True), key=lambda pair: pair[0])]
    ends = ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} … {ordered[-1]}"
    return f"{ends} ({len(values)} channels)" if count and len(values) > 1 else str(ends)


def _shift(shift: Any) -> str:
    """A layer's shift from accumulator to output as hardware does it."""
    return _span(shift, shift, lambda k: f">> {k}" if k > 0 else f"<< {-k}" if k < 0 else "none", count=False)


def stem(model: str) -> str:
    """A model's name without the folders of its file."""
    return model.replace("\\", "/").rpartition("/")[2]


def _shortened(text: str, most: int) -> str:
    """Its beginning and its end, where it is longer than `most`."""
    head = most // 3
    return text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}"


def _number(value: Any, digits: int | None = None) -> str:
    """`1,234` or `12.5`; `digits` decimals where they are given."""
    if isinstance(value, float) and not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    return f"{value:,.{digits}f}" if digits is not None else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _duration(seconds: Any) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _milliseconds(seconds: Any) -> str:
    return f"{1000 * seconds:.3g} ms"


def _size(value: Any) -> str:
    """Bytes in binary units."""
    power = min(3, int(math.log2(value)) // 10) if value >= 1 else 0
    return f"{value / 1024**power:.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
