"""Finished runs, read for the page that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pow2quant import run_folder
from pow2quant.report import points, summary
from pow2quant.report.page import guarded, read
from pow2quant.report.study import Study


def of_folders(folders: Sequence[Path]) -> Study:
    """The comparison of finished runs. Raises FileFormatError for a folder without a readable report."""
    verdicts, found = [], []
    for folder, name in zip(folders, names(folders), strict=True):
        file = folder / run_folder.REPORT
        verdict, point = guarded(file, partial(_of_report, name, file))
        verdicts.append(verdict)
        found.append(point)
    same = {key: {point.settings[key] for point in found} for key in ("model", "data", "backend")}
    about = [next(iter(values)) for values in same.values() if len(values) == 1]
    title = f"{len(found)} runs compared"
    return Study(title, " · ".join(filter(None, about)), "run", found, verdicts=verdicts)


def _of_report(name: str, file: Path) -> tuple[tuple[str, bool | None, str], points.Point]:
    report = read(file)
    text = (report.get("verdict") or {}).get("text") or "Not validated."
    return (name, summary.agrees(report), text), points.of_report(name, file.parent, report)


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
