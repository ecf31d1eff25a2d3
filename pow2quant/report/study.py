"""Many configurations on one page: what each keeps and costs, with intervals; for sweeps, comparisons and searches."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pow2quant.report import forest, noise, parallel, points, summary
from pow2quant.report.page import NOTHING, page
from pow2quant.report.points import COSTS, FORMATS, Point

MOST = 500
"""So many points are shown, the first ones."""

RUN_BEST = "pow2quant ptq --config best.yaml --output run"


@dataclass(frozen=True)
class Study:
    """What a page shows. title, about: the page's head. noun: what a point is. found: in the order of the table.

    failed: what came to no result, and why. verdicts: of runs, (name, agrees, text). to_do: what
    to do with the result, and the command.
    """

    title: str
    about: str
    noun: str
    found: Sequence[Point]
    failed: Sequence[tuple[str, str]] = ()
    verdicts: Sequence[tuple[str, bool | None, str]] = ()
    to_do: tuple[str, str] | None = None


def of_trials(document: Mapping[str, Any], folder: Path) -> Study:
    """The study of study.json, whose runs are in `folder`."""
    axes, rows = list(document["axes"]), document["rows"]
    found = [points.of_row(row, axes, folder) for row in rows if row["state"] == "complete"]
    column = _column(found)
    found.sort(key=lambda p: _order(p, column), reverse=True)
    failed = [(f"trial {row['trial']}", row["error"]) for row in rows if row["state"] == "failed"]
    networks = dict.fromkeys(f"{row['network']} on {row['dataset']}" for row in rows if "network" in row)
    done, total = len(found) + len(failed), document["trials"]
    to_do = (f"best.yaml is the configuration of {found[0].name}", RUN_BEST) if found else None
    title = f"{done} trials" if done == total else f"{done} of {total} trials"
    return Study(title, " · ".join([*networks, document["study"]]), "trial", found, failed, to_do=to_do)


def of_cells(document: Mapping[str, Any], folder: Path) -> Study:
    """The comparison of comparison.json, whose runs are in `folder`."""
    cells = document["cells"]
    networks = list(dict.fromkeys(cell["network"] for cell in cells))
    found = [points.of_cell(cell, len(networks), folder) for cell in cells]
    failed = [("a trial", error) for error in dict.fromkeys(document["errors"])]
    return Study(f"{len(cells)} configurations compared", ", ".join(networks), "configuration", found, failed)


def of_search(document: Mapping[str, Any], folder: Path) -> Study:
    """The search of search.json."""
    plans = document["points"]
    asked = "most accuracy" if document["objective"] == "accuracy" else f"least {document['objective']}"
    about = f"{asked} with {', '.join(document['constraints'])}; sensitivities by {document['sensitivity']}"
    found = [points.of_plan(plan, i, document) for i, plan in enumerate(plans, 1)]
    chosen = next(p for p, plan in zip(found, plans, strict=True) if plan["chosen"])
    taken = f"Chosen: {chosen.name.removesuffix(points.CHOSEN)}, {chosen.shown} (change {chosen.changed}): plan.yaml"
    to_do = taken, "pow2quant qat --config plan.yaml --output trained"
    return Study(f"Mixed precision: {len(plans)} plans", about, "plan", found, to_do=to_do)


def render(study: Study, output: Path) -> str:
    """The page. output: the folder in which it will be, from which links to runs start."""
    shown = study.found[:MOST]
    one_metric = len({(p.metric, p.unit) for p in shown}) == 1
    column = _column(shown)
    best = _best(shown, column) if one_metric else []
    good = {id(p) for p in shown for b in best if p.group == b.group and (p is b or p.may_equal(b))}
    axis = forest.axis_of(shown) if one_metric else None
    facts = [name for name in FORMATS if any(p.facts.get(name) is not None for p in shown)]
    settings = _varied(shown)
    columns = [name for name in settings if not all(str(p.settings.get(name)) in p.name for p in shown)]
    return page(
        "study.html.j2",
        study=study,
        rows=[
            {
                "point": p,
                "bar": bar,
                "best": any(p is b for b in best),
                "good": id(p) in good,
                "settings": [p.settings.get(name) for name in columns],
                "facts": [(p.facts.get(name), _written(name, p.facts.get(name))) for name in facts],
                "link": _link(p.folder, output),
            }
            for p, bar in zip(shown, forest.bars(shown, axis) if axis else [None] * len(shown), strict=True)
        ],
        best=[_sentence(b, shown, column, sum(id(p) in good and p.group == b.group for p in shown)) for b in best],
        same=points.alike(shown),
        metric=" / ".join(dict.fromkeys(summary.WORDS.get(p.metric, p.metric) for p in shown)),
        unit=shown[0].unit if one_metric else "",
        evaluated=dict.fromkeys(p.evaluated for p in shown),
        axis=axis,
        heads=[f"{name}#" for name in facts],
        columns=columns,
        agree=[p.agrees for p in shown],
        intervals=any(p.low is not None for p in shown),
        trades=list(_trades(shown, column, facts)) if one_metric and len(shown) > 1 else [],
        parallel=_parallel(shown, settings, facts, column, good) if one_metric and len(shown) > 1 else None,
        profile=noise.profile(shown),
        width=forest.WIDTH,
    )


def _column(found: Sequence[Point]) -> str:
    """What points are compared by: the metric, or its change where not all were measured on the same images."""
    return "value" if points.alike(found) else "change"


def _best(found: Sequence[Point], column: str) -> list[Point]:
    """Of each group the best; of equal ones the one with more signal to noise, then the cheapest."""
    by_group: dict[str, list[Point]] = {}
    for point in found:
        if point.gain(column) is not None:
            by_group.setdefault(point.group, []).append(point)

    return [max(own, key=lambda p: _order(p, column)) for own in by_group.values()]


def _order(point: Point, column: str) -> tuple[float, ...]:
    """More is better."""
    gain = point.gain(column)
    costs = (-(point.facts.get(name) or 0.0) for name in COSTS)
    return -math.inf if gain is None or math.isnan(gain) else gain, point.facts.get(points.SQNR) or 0.0, *costs


def _sentence(best: Point, found: Sequence[Point], column: str, good: int) -> dict[str, Any]:
    """What is said of the best point: itself, and how many may be as good as it."""
    others = sum(p.group == best.group and p is not best for p in found)
    known = best.low is not None and others
    return {
        "point": best,
        "value": best.shown if column == "value" else best.changed,
        "others": others,
        "as_good": good - 1 if known else None,
    }


def _varied(found: Sequence[Point]) -> list[str]:
    """The settings that have several values."""
    names = dict.fromkeys(name for p in found for name in p.settings)
    return [name for name in names if len({str(p.settings.get(name)) for p in found}) > 1]


def _written(name: str, value: float | None) -> str:
    return NOTHING if value is None else FORMATS[name].format(value)


def _link(folder: Path | None, output: Path) -> str | None:
    """The address of a run's own page, seen from the page; None where it is not there."""
    if folder is None or not (folder / "report.html").is_file():
        return None
    try:
        return quote(Path(os.path.relpath(folder / "report.html", output)).as_posix())
    except ValueError:  # on another drive
        return None


def _trades(found: Sequence[Point], column: str, facts: Sequence[str]) -> Any:
    """(cost, figure) of every cost in which the points differ."""
    from markupsafe import Markup

    from pow2quant.report import trade

    shown = _column_shown(found, column)
    for name in facts:
        own = [p for p in found if p.facts.get(name) is not None and p.is_drawn(shown)]
        if name in COSTS and len({p.facts[name] for p in own}) > 1:
            yield name, Markup(trade.draw(own, name, shown))


def _column_shown(found: Sequence[Point], column: str) -> str:
    """What figures show: changes, which have intervals, where there are any."""
    return "change" if any(p.change is not None for p in found) else column


def _parallel(
    found: Sequence[Point], settings: Sequence[str], facts: Sequence[str], column: str, good: set[int]
) -> Any:
    from markupsafe import Markup

    shown = _column_shown(found, column)
    found = [p for p in found if p.is_drawn(shown)]
    if len(found) < 2:
        return None
    last = summary.WORDS.get(found[0].metric, found[0].metric)
    title = f"change of {last}" if shown == "change" else last
    names = [n for n in facts if n in (points.SQNR, *COSTS) and len({p.facts.get(n) for p in found}) > 1]
    columns = [
        *(parallel.column(name, [p.settings.get(name) for p in found]) for name in settings),
        *(parallel.column(name, [p.facts.get(name) for p in found]) for name in names if name != last),
    ]
    unit = "points" if found[0].unit == "%" and shown == "change" else found[0].unit
    return (
        Markup(parallel.draw(columns, found, shown, f"{title}, {unit}" if unit else title, good)) if columns else None
    )
