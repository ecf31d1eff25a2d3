"""`pow2quant sweep`: configuration keys over grids, or drawn by a sampler; a table of results, and figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from pow2quant import config as configuration
from pow2quant import run_folder
from pow2quant.backends.base import SILENT, Progress
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError
from pow2quant.report import pages, summary
from pow2quant.runs.job import absolute
from pow2quant.saving import write
from pow2quant.study.figures import figures
from pow2quant.study.ledger import SAMPLERS, Entry, Ledger, Plan
from pow2quant.study.loading import contents
from pow2quant.study.space import MOST, Axis, Range, applied, axis, combinations, given, settings
from pow2quant.study.trials import RUNS, Row, Trials, described, quality
from pow2quant.study.workers import work, work_in_processes

RESULTS, STUDY, DATABASE, BEST = "results.csv", "study.yaml", "study.db", "best.yaml"

ENDING = (
    *("metric", "unit", "higher_is_better", "original", "quantized"),
    *("original_top1", "original_top5", "quantized_top1", "quantized_top5", "sqnr_db"),
    *("change", "change_low", "change_high", "images", "of_images", "classes", "sample", "preprocessing"),
    *("agrees", "run", "file_bytes"),
)
"""Columns that come behind those that say what was tried."""


@dataclass(frozen=True)
class Study:
    """What is tried: settings laid over a base, and how.

    plan: the grids, or the one from which a sampler draws. runs: see `Trials`. name: in the database; None: from what
    the study is. contents: of its networks and data, see `checked`; None: they were not read yet.
    """

    base: RunConfig
    plan: Plan
    runs: str | None = None
    name: str | None = None
    contents: str | None = None

    @property
    def fingerprint(self) -> str:
        """What the study is, whatever the folders are called in which its files lie."""
        base = self.base
        model = replace(
            base.model, name=Path(base.model.name).name, weights=base.model.weights and Path(base.model.weights).name
        )
        data = replace(base.data, path=None, workers=0, dataset=Path(base.data.dataset).name)
        what = configuration.dump(replace(base, model=model, data=data, device="cpu"))
        return sha256(f"{what}{self.plan!r}{self.runs}{self.contents or ''}".encode()).hexdigest()[:12]

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of what is varied."""
        return tuple(dict.fromkeys(a.name for grid in self.plan.grids for a in grid))

    @property
    def called(self) -> str:
        """Its name in the database."""
        return self.name or f"sweep-{self.fingerprint[:8]}"


@dataclass(frozen=True)
class Found:
    """What came of a study: its folder, and all its trials."""

    folder: Path
    rows: list[Row]
    axes: tuple[str, ...]

    @property
    def finished(self) -> list[Row]:
        """The trials that came to a result, best first; of equal ones, those with more SQNR.

        Best by the leading metric, or by its change where not all were measured on the same images.
        """
        column = "quantized" if self.alike else "change"
        return sorted(self._complete, key=lambda r: (-(quality(r, column) or 0.0), -(r["sqnr_db"] or 0.0)))

    @property
    def _complete(self) -> list[Row]:
        return [r for r in self.rows if r["state"] == "complete"]

    @property
    def alike(self) -> bool:
        """Whether all trials were measured on the same images."""
        return summary.measured_alike([r.get("sample") for r in self._complete])

    @property
    def evaluated(self) -> str:
        """On what, in words."""
        texts = dict.fromkeys(measured_on(r) for r in self._complete)
        if self.alike:
            return f"all on the same images: {next(iter(texts))}"
        return f"not all on the same images ({'; '.join(texts)}), so by the change against float, each on its own"

    @property
    def failed(self) -> list[Row]:
        """The trials that came to none, each with its `error`."""
        return [r for r in self.rows if r["state"] == "failed"]


def read(path: Path, base: RunConfig) -> Study:
    """A study from its file; `base` is under what the file's own `base` says.

    Raises ConfigError, naming the file and the key, for what is not legal.
    """
    mapping = configuration.read(path)
    known = {"name", "base", "grids", "trials", "sampler", "runs"}
    if not isinstance(mapping, Mapping) or not mapping.get("grids"):
        raise ConfigError(f"{path}: a study needs grids: a list of {{KEY: VALUES}}")
    for key in mapping.keys() - known:
        raise ConfigError(f"{path}: {key}: unknown key; known: {', '.join(sorted(known))}")
    for key, legal in (("sampler", SAMPLERS), ("runs", (*RUNS, None))):
        if key in mapping and (isinstance(mapping[key], list | dict | set) or mapping[key] not in legal):
            raise ConfigError(f"{path}: {key}: {mapping[key]!r} is not legal; legal: {', '.join(map(str, legal))}")
    trials = mapping.get("trials")
    if trials is not None and (type(trials) is not int or trials < 1):
        raise ConfigError(f"{path}: trials: {trials!r} is not legal; legal: an integer from 1 up")
    laid, name = mapping.get("base"), mapping.get("name")
    if not isinstance(laid, Mapping | None):
        raise ConfigError(f"{path}: base: expected {{KEY: VALUE}}")
    if not isinstance(name, str | None) or name == "":
        raise ConfigError(f"{path}: name: expected text")
    grids = mapping["grids"]
    if not isinstance(grids, list) or not all(isinstance(grid, Mapping) and grid for grid in grids):
        raise ConfigError(f"{path}: grids: expected a list of {{KEY: VALUES}}")
    try:
        made = tuple(tuple(axis(str(name), values) for name, values in grid.items()) for grid in grids)
        base = configuration.with_values(base, {str(key): value for key, value in (laid or {}).items()})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    plan = Plan(made, trials, mapping.get("sampler", "tpe"), base.seed)
    return Study(base, plan, mapping.get("runs"), name)


def chosen(
    file: Path | None,
    base: RunConfig,
    grid: Sequence[str],
    trials: int | None,
    sampler: str | None,
    runs: str | None,
    name: str | None,
) -> Study:
    """The study that a file and flags ask for; axes of flags vary in addition, within every grid of the file.

    Raises ConfigError for what is not legal.
    """
    study = Study(base, Plan((), seed=base.seed)) if file is None else read(file, base)
    for option, value, legal in (("--sampler", sampler, SAMPLERS), ("--runs", runs, RUNS)):
        if value is not None and value not in legal:
            raise ConfigError(f"{option} {value}: legal: {', '.join(legal)}")
    axes = tuple(given(text) for text in grid)
    plan = study.plan
    grids = tuple((*own, *axes) for own in plan.grids or ((),)) if axes else plan.grids
    for made in grids:
        names = [a.name for a in made]
        if len(set(names)) < len(names):
            raise ConfigError(f"--grid: {next(n for n in names if names.count(n) > 1)} is varied twice")
    plan = replace(plan, grids=grids, trials=trials or plan.trials, sampler=sampler or plan.sampler)
    return replace(study, plan=plan, runs=runs or study.runs, name=name or study.name)


def checked(study: Study, storage: str | None = None) -> Study:
    """The study with what its networks and data hold, so that it is another one where that changes.

    In a database that machines share it is the same: they may decode images differently.
    Raises Pow2QuantError where it cannot begin: no legal combination, a sampler with several grids, a network or data
    that cannot be loaded.
    """
    if study.contents is not None:
        return study
    _check_plan(study)
    found = contents(study.base, study.plan)
    return replace(study, contents="" if storage else found)


def _check_plan(study: Study) -> None:
    plan = study.plan
    if plan.trials is not None:
        if plan.trials > MOST:
            raise ConfigError(f"trials: {plan.trials:,} are more than {MOST:,}")
        if len(plan.grids) != 1:
            raise ConfigError("a sampler draws from one grid; give one, or leave trials out")
        return
    if not plan.grids or not len(plan):
        raise ConfigError("there is nothing to try: give --grid KEY=VALUES, or a study's file")
    trials = Trials(study.base, plan, Path())
    first: ConfigError | None = None
    for index, grid in enumerate(plan.grids):
        for combination in combinations(grid):
            try:
                described(trials.config(index, combination))
            except ConfigError as error:
                first = first or error
            else:
                return
    assert first is not None
    raise first


def sweep(
    study: Study,
    output: Path,
    *,
    storage: str | None = None,
    jobs: int = 1,
    progress: Progress = SILENT,
) -> Found:
    """Runs what is left of a study and writes its results into `output`: a table, figures, and how to repeat it.

    storage: the URL of a database; None: a file in `output`. Any number of calls may work on one study at a time.
    """
    for rows in tried(study, output, storage=storage, jobs=jobs, progress=progress):
        write(output / RESULTS, table(rows, study.axes).encode())
    return save(study, rows, output)


def tried(
    study: Study,
    output: Path,
    *,
    storage: str | None = None,
    jobs: int = 1,
    progress: Progress = SILENT,
) -> Iterator[list[Row]]:
    """Runs what is left of a study; yields all rows whenever a trial is finished, and at the end."""
    study = checked(study, storage)
    output.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{(output / DATABASE).resolve()}"
    make = partial(Ledger, url, study.called, study.plan, study.fingerprint)
    ledger = make()
    trials = Trials(study.base, study.plan, output / "runs" if study.runs else output, study.runs)
    write(output / STUDY, written(study).encode())
    done = sum(entry.state != "running" for entry in ledger.entries())
    total = len(study.plan)
    if done:
        progress.note(f"{done} of {total} trials are finished already")
    running = work(ledger, trials, progress) if jobs == 1 else work_in_processes(make, trials, jobs)
    told: set[Any] = {None}
    for entry in progress.track(running, "trials", total - done):
        if (line := entry.result.get("preprocessing")) not in told:
            told.add(line)
            progress.note(str(line))
        progress.note(_line(entry, total))
        yield [row_of(e) for e in ledger.entries()]
    trials.clear()
    yield [row_of(e) for e in ledger.entries()]


def _line(entry: Entry, total: int) -> str:
    what = ", ".join(f"{name} {label}" for name, label in entry.combination.items())
    found = entry.error or summary.number(entry.result["quantized"], entry.result["unit"])
    return f"trial {entry.number + 1} of {total}: {what}: {found}"


def save(study: Study, rows: list[Row], output: Path) -> Found:
    """Writes study.json and draws the figures."""
    found = Found(output, rows, study.axes)
    best = found.finished[:1]
    told = {
        "study": study.called,
        "trials": len(study.plan),
        "axes": study.axes,
        "best": best[0] if best else None,
        "rows": rows,
    }
    write(output / run_folder.STUDY, json.dumps(told, indent=1).encode())
    if best:
        write_best(study, best[0], output / BEST)
    for name, picture in figures(study.plan.grids, rows):
        write(output / name, picture)
    pages.rebuild(output)
    return found


def write_best(study: Study, row: Row, file: Path) -> None:
    """Writes the configuration of a trial, which `ptq --config` takes from any folder."""
    grid = study.plan.grids[row["grid"]]
    config = absolute(applied(study.base, settings(grid, {axis.name: row[axis.name] for axis in grid})))
    write(file, best_text(config, file.name).encode())


def best_text(config: RunConfig, name: str) -> str:
    """A configuration as a file that says what to do with it."""
    return f"# pow2quant ptq --config {name}    pow2quant qat --config {name}\n{configuration.dump(config)}"


def measured_on(row: Row) -> str:
    """On how many images a trial was measured, in words."""
    return summary.evaluated({"images": row["images"], "of": row.get("of_images", 0), "classes": row.get("classes")})


def row_of(entry: Entry) -> Row:
    """A trial as a row: what was tried, what came of it."""
    start = {"trial": entry.number, "state": entry.state, "grid": entry.grid, **entry.combination}
    return entry.result | start | {"attempts": entry.attempts, "error": entry.error}


def table(rows: Iterable[Row], axes: Iterable[str]) -> str:
    """CSV, a column for everything that any row has: what was tried first, then what came of it."""
    rows = list(rows)
    last = (*ENDING, "duration_seconds", "attempts", "error")
    every = dict.fromkeys(chain(("trial", "state"), axes, *rows))
    columns = [c for c in every if c not in last] + [c for c in last if c in every]
    text = io.StringIO()
    writer = csv.DictWriter(text, [c for c in columns if c != "grid"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def written(study: Study) -> str:
    """The study's file, with which the same is done again."""

    def values(each: Axis) -> Any:
        if isinstance(each.labels, Range):
            r = each.labels
            return (
                f"{r.low:g}..{r.high:g}"
                if r.integer
                else ":".join(
                    [f"{r.low!r}", f"{r.high!r}", *(["log"] if r.log else [] if r.step is None else [f"{r.step!r}"])]
                )
            )
        if each.settings is None or all(list(s) == [each.name] for s in each.settings):
            return [each.at(label)[each.name] for label in each.labels]
        return {label: dict(each.at(label)) for label in each.labels}

    grids = [{a.name: values(a) for a in grid} for grid in study.plan.grids]
    document: dict[str, Any] = {
        "name": study.called,
        "base": yaml.safe_load(configuration.dump(study.base)),
        "grids": grids,
    }
    if study.plan.trials:
        document |= {"trials": study.plan.trials, "sampler": study.plan.sampler}
    if study.runs:
        document["runs"] = study.runs
    return str(yaml.safe_dump(document, sort_keys=False, width=120))
