"""Figures with axes, drawn by matplotlib as SVG that takes its colours from the page, so that they follow its theme.

matplotlib rather than plotly: it is a dependency already, its SVG needs no script, and a figure is 5 to 20 kB, where
plotly's script alone is more than 4 MB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#010101",
    "soft": "#010102",
    "line": "#010103",
    "a": "#010104",
    "b": "#010105",
    "c": "#010106",
    "d": "#010107",
    "e": "#010108",
    "bad": "#010109",
}
"""What is drawn -> what stands in the SVG until it becomes `var(--name)`: the palette is the page's."""

SUPERFLUOUS = (
    r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->",
    r' xmlns(:\w+)?="[^"]*"| version="[^"]*"| font-family: [^;"]*;',
    r'(?<=<svg) width="[^"]*" height="[^"]*"',
    r"<defs>\s*</defs>|<g/>",
    r"\n(?=\s*[LMCQz\"])|(?<=\n)\s+",
)
"""What a page does not need of matplotlib's SVG, as patterns, in order."""

SERIES = ("a", "b", "c", "d", "e")
MARKERS = ("o", "s", "^", "D", "v")


def training(epochs: Sequence[Mapping[str, Any]], lines: Mapping[str, float], metric: str = "", unit: str = "%") -> str:
    """Loss and a metric (top-1 accuracy where none is named) by epoch. lines: its values to compare with, by label."""
    figure, (loss, accuracy) = _figure("training", 7.6, 2.9, columns=2)
    trained = [e for e in epochs if e.get("loss") is not None]
    loss.plot([e["epoch"] for e in trained], [e["loss"] for e in trained], "o-", color=COLOURS["a"], markersize=3)
    loss.set_ylabel("training loss")
    accuracy.plot([e["epoch"] for e in epochs], [e["accuracy"] for e in epochs], "o-", color=COLOURS["b"], markersize=3)
    for (label, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        accuracy.axhline(
            value, color=COLOURS["soft"], linestyle=style, linewidth=1, label=f"{label} {value:.4g} {unit}"
        )
    accuracy.set_ylabel(", ".join(word for word in (metric or "top-1 accuracy", unit) if word))
    if lines:
        accuracy.legend(fontsize=8, frameon=False)
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        _whole_numbers(axes)
    return _svg(figure, "training")


MOST_NAMES = 40
"""At most so many names stand at an axis."""


def profile(series: Mapping[str, Sequence[float | None]], what: str, names: Sequence[str] = ()) -> str:
    """Signal to noise in dB along the network, a line for each of the series. None leaves a gap.

    what: the axis' label. names: of the operations, which then stand at the axis, of long networks every n-th.
    """
    figure, (axes,) = _figure("profile", 7.6, 3.4 if names else 2.7)
    for (name, values), colour, marker in zip(series.items(), SERIES, MARKERS, strict=False):
        points = [(i, v) for i, v in enumerate(values, 1) if v is not None]
        style: Any = {"marker": marker, "markersize": 3.5 if len(values) < 60 else 2, "color": COLOURS[colour]}
        axes.plot([i for i, _ in points], [v for _, v in points], linewidth=1.2, label=_label(name), **style)
    axes.set_ylabel("signal to noise, dB")
    axes.set_xlabel(what)
    _whole_numbers(axes)
    if names:
        places = range(1, len(names) + 1, -(-len(names) // MOST_NAMES))
        ends = [name if len(name) < 20 else f"…{name[-18:]}" for name in names]
        texts = [f"{ends[i - 1]} {i}".replace("$", r"\$") for i in places]  # a dollar would begin a formula
        axes.set_xticks(list(places), texts, rotation=50, ha="right", rotation_mode="anchor", fontsize=7)
    axes.legend(
        fontsize=8, frameon=False, ncols=len(series), loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderpad=0
    )
    return _svg(figure, "profile")


def trade(points: Sequence[tuple[str, float, float]], x: str, y: str) -> str:
    """Runs as points: (label, x, y)."""
    figure, (axes,) = _figure("trade", 7.6, 3.0)
    for i, (label, across, up) in enumerate(points):
        colour, marker = COLOURS[SERIES[i % len(SERIES)]], MARKERS[i // len(SERIES) % len(MARKERS)]
        axes.plot([across], [up], marker, color=colour, markersize=7, label=_label(label))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(0.12, 0.15)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, "trade")


def _label(name: str) -> str:
    """A name as it stands in a legend, which leaves out what begins with an underscore."""
    return f"\u200b{name}"


def _figure(name: str, width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for a in axes:
        a.grid(color=COLOURS["line"], linewidth=0.7)
        a.set_axisbelow(True)
        a.tick_params(colors=COLOURS["soft"], labelsize=8, length=0)
        for side, spine in a.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(COLOURS["line"])
        for label in (a.xaxis.label, a.yaxis.label):
            label.set_color(COLOURS["soft"])
            label.set_fontsize(8.5)
    return figure, axes


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page: no header, no ids that nothing refers to, the page's colours."""
    import matplotlib

    for axes in figure.axes:
        if legend := axes.get_legend():
            for label in legend.get_texts():
                label.set_color(COLOURS["ink"])
                label.set_parse_math(False)
    content = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    text = content.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    for superfluous in SUPERFLUOUS:
        text = re.sub(superfluous, "", text, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    for colour, stands in COLOURS.items():
        text = text.replace(stands, f"var(--{colour})")
    return text.strip()
