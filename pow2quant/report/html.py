"""One run as a web page: a single file that needs no network and no script."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pow2quant.errors import FileFormatError

if TYPE_CHECKING:
    from jinja2 import Template

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


def render(report: Mapping[str, Any]) -> str:
    """The page of what report.json holds; what an older report lacks is left out."""
    return _template().render(
        report=report,
        agrees=_agrees(report),
        accuracies=list(_accuracies(report)),
        tensors=[_tensor(name, detail) for name, detail in report.get("final_quantization_details", {}).items()],
        front=_picture(report.get("search")),
        layers=[{**y, "shift": _shift(y.get("shift"))} for y in report.get("certificate", {}).get("layers", [])],
    )


def rebuild(folder: Path, output: Path | None = None) -> Path:
    """Writes `report.html` anew from a folder's `report.json`, into it or another, and returns its path.

    Raises FileFormatError when there is no report.json, or it is no report; OutputError when it cannot be written.
    """
    from pow2quant.adapters.files import write

    source = folder / "report.json"
    try:
        report = json.loads(source.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise TypeError(f"expected an object, got {type(report).__name__}")
        page = render(report)
    except OSError as error:
        raise FileFormatError(f"{source}: cannot be read: {error.strerror}; give a finished run's folder") from error
    except Exception as error:  # rendering trips over a foreign document in every way there is
        raise FileFormatError(f"{source}: not a report of pow2quant: {error}") from error
    target = (output or folder) / "report.html"
    write(target, page.encode())
    return target


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, Undefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )

    def stated(filter: Callable[..., str]) -> Callable[..., str]:
        return lambda v, *options: NOTHING if v is None or isinstance(v, Undefined) else filter(v, *options)

    filters = {"number": _number, "percent": "{:.2f} %".format, "size": _size}
    environment.filters |= {name: stated(filter) for name, filter in filters.items()}
    return environment.get_template("report.html.j2")


def _agrees(report: Mapping[str, Any]) -> bool | None:
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


UNITS = {"size": (1e3, "kB"), "average_bits": (1.0, "bits"), "bops": (1e9, "G"), "latency": (1e3, "ms")}
"""Of a search's costs: what they are divided by, and the unit that makes."""


def _picture(search: Any) -> dict[str, Any] | None:
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


def _tensor(name: str, detail: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table of tensors, channels summarized."""
    order = detail.get("exponent", detail.get("scale"))
    values = {"scale": detail.get("scale"), "hardware": detail.get("hardware_op")}
    row = {key: _span(order, value) for key, value in values.items()}
    if "exponent" in detail:
        row["scale"] = _span(order, order, "2^{}".format)
    return row | {
        "name": name,
        "kind": name.rpartition(".")[2].partition("_")[0] if "." in name else "input",
        "zero_point": _span(detail.get("zero_point"), detail.get("zero_point"), count=False),
        "bits": _span(detail.get("bitwidth"), detail.get("bitwidth"), count=False),
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
    return _span(shift, shift, lambda k: f"x >> {k}" if k > 0 else f"x << {-k}" if k < 0 else "x")


def _number(value: Any, digits: int | None = None) -> str:
    """`1,234` or `12.5`; `digits` decimals where they are given."""
    if isinstance(value, float) and not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    return f"{value:,.{digits}f}" if digits is not None else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _size(value: Any) -> str:
    """Bytes in binary units."""
    power = min(3, int(math.log2(value)) // 10) if value >= 1 else 0
    return f"{value / 1024**power:.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
