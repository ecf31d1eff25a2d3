"""The pages that a folder gets, made of nothing but its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pow2quant import run_folder
from pow2quant.report import comparison, html, study
from pow2quant.report.page import guarded, read
from pow2quant.saving import write

PAGE, SEARCH_PAGE = "report.html", "search.html"


def _of(make: Callable[[dict[str, Any], Path], study.Study]) -> Callable[[Path, Path], str]:
    return lambda file, output: study.render(make(read(file), file.parent), output)


PAGES: tuple[tuple[str, str, Callable[[Path, Path], str]], ...] = (
    (run_folder.REPORT, PAGE, lambda file, output: html.page_of(file.parent)),
    (run_folder.SEARCH, SEARCH_PAGE, _of(study.of_search)),
    (run_folder.STUDY, PAGE, _of(study.of_trials)),
    (run_folder.COMPARISON, PAGE, _of(study.of_cells)),
)
"""(file, the page that is made of it, how: of the file and the folder in which the page will be)."""


def rebuild(folder: Path, output: Path | None = None) -> list[Path]:
    """Writes the pages of a run's or a study's folder anew, into it or another; their paths.

    Raises FileFormatError when the folder is neither, or a file cannot be read; OutputError when a page cannot be
    written.
    """
    target = output or folder
    made = [row for row in PAGES if (folder / row[0]).is_file()] or PAGES[:1]
    for name, page, make in made:
        file = folder / name
        write(target / page, guarded(file, lambda file=file, make=make: make(file, target)).encode())  # type: ignore[misc]
    return [target / page for _, page, _ in made]


def compare(folders: list[Path], output: Path) -> Path:
    """Writes `report.html` of several finished runs' folders into `output` and returns its path.

    Raises FileFormatError for a folder without a readable report; OutputError when the page cannot be written.
    """
    found = comparison.of_folders(folders)
    first = folders[0] / run_folder.REPORT
    write(output / PAGE, guarded(first, lambda: study.render(found, output)).encode())
    return output / PAGE
