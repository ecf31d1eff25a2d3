"""Noise along the network, a line for each of several runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pow2quant import run_folder
from pow2quant.report.page import read
from pow2quant.report.points import Point

MOST_LINES = 5
"""So many runs have a line each."""


def profile(found: Sequence[Point]) -> Any:
    """The chart; None unless at least two runs have statistics, and those of one network."""
    from markupsafe import Markup

    from pow2quant.report import figures

    lines = list(_lines(found[:MOST_LINES]))
    if len(lines) < 2 or len({names for _, names, _ in lines}) != 1:
        return None
    series = {name: values for name, _, values in lines}
    return Markup(figures.profile(series, "operation, in order of computation"))


def _lines(found: Sequence[Point]) -> Iterator[tuple[str, tuple[str, ...], list[float | None]]]:
    """Of each run with statistics its name, the tensors, and signal to noise in dB at each that was measured."""
    for point in found:
        file = point.folder and point.folder / run_folder.STATISTICS
        statistics = read(file) if file and file.is_file() else {}
        if network := statistics.get("network"):
            tensors = statistics.get("tensors") or {}
            measured = [tensors[y["writes"]] for y in network if y["writes"] in tensors]
            yield point.name, tuple(y["writes"] for y in network), [t.get("network_sqnr_db") for t in measured]
