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
    figure, (loss, accuracy) = blank(7.6, 2.9, columns=2)
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
    return svg(figure, "training")


MOST_NAMES = 40
"""At most so many names stand at an axis."""


def profile(series: Mapping[str, Sequence[float | None]], what: str, names: Sequence[str] = ()) -> str:
    """Signal to noise in dB along the network, a line for each of the series. None leaves a gap.

    what: the axis' label. names: of the operations, which then stand at the axis, of long networks every n-th.
    """
    figure, (axes,) = blank(7.6, 3.4 if names else 2.7)
    for (name, values), colour, marker in zip(series.items(), SERIES, MARKERS, strict=False):
        points = [(i, v) for i, v in enumerate(values, 1) if v is not None]
        style: Any = {"marker": marker, "markersize": 3.5 if len(values) < 60 else 2, "color": COLOURS[colour]}
        axes.plot([i for i, _ in points], [v for _, v in points], linewidth=1.2, label=plain(name), **style)
    axes.set_ylabel("signal to noise, dB")
    axes.set_xlabel(what)
    _whole_numbers(axes)
    if names:
        places = range(1, len(names) + 1, -(-len(names) // MOST_NAMES))
        ends = [name if len(name) < 20 else f"…{name[-18:]}" for name in names]
        texts = [f"{ends[i - 1]} ({i})".replace("$", r"\$") for i in places]  # a dollar would begin a formula
        axes.set_xticks(list(places), texts, rotation=50, ha="right", rotation_mode="anchor", fontsize=7)
    axes.legend(
        fontsize=8, frameon=False, ncols=len(series), loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderpad=0
    )
    return svg(figure, "profile")


def plain(name: str) -> str:
    """A name as it stands in a legend, which leaves out what begins with an underscore."""
    return f"\u200b{name}"


def blank(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many inches with axes side by side, without matplotlib's global state."""
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


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page: no header, no ids that nothing refers to, the page's colours."""
    import matplotlib

    for axes in figure.axes:
        legend = axes.get_legend()
        labels = legend.get_texts() if legend else []
        for label in labels:
            label.set_color(COLOURS["ink"])
        for text in (*labels, *axes.texts):
            text.set_parse_math(False)  # a dollar in a name would begin a formula
    content = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    drawn = content.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace("xlink:href", "href")
    for superfluous in SUPERFLUOUS:
        drawn = re.sub(superfluous, "", drawn, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", drawn))
    drawn = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", drawn)
    for colour, stands in COLOURS.items():
        drawn = drawn.replace(stands, f"var(--{colour})")
    return drawn.strip()
