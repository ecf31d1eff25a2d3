"""`pow2quant compare`: methods by bit widths by networks, several seeds of each; mean, spread, and the best by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pow2quant import config as configuration
from pow2quant import run_folder
from pow2quant.backends.base import SILENT, Progress
from pow2quant.config import Choice, RunConfig
from pow2quant.errors import ConfigError
from pow2quant.plugins import names
from pow2quant.report import pages
from pow2quant.saving import write
from pow2quant.study.cells import Comparison, cells, csv_of, document, figures, file_name, key_of, markdown
from pow2quant.study.ledger import Plan
from pow2quant.study.loading import configurations, ignores_seeds, is_deterministic
from pow2quant.study.space import Axis, applied, axis, combinations, settings
from pow2quant.study.sweep import BEST, RESULTS, Study, table, tried, write_best
from pow2quant.study.trials import Row

METHODS = ("none", "output_mse+bias_correction", "gpfq")
WIDTHS = ("8:8", "4:8", "4:4")
AXES = ("network", "widths", "method", "seed")
TABLE, MARKDOWN = "comparison.csv", "comparison.md"


def study(
    base: RunConfig,
    networks: Sequence[tuple[str, str | None]],
    widths: Sequence[str],
    methods: Sequence[str],
    seeds: str,
    runs: str | None = None,
    name: str | None = None,
) -> Study:
    """Every method (`a+b`, `none`) with every width (`W:A`), network (name, weights) and seed.

    A method has the parameters that the base gives it. Raises ConfigError for what is not legal.
    """
    chains = {text: chain_of(text, base) for text in methods}
    models = networks or [(base.model.name, base.model.weights)]
    short = [re.split(r"[:/\\]", model)[-1] for model, _ in models]
    if len(set(short)) < len(short):
        short = [model for model, _ in models]
    if len(set(short)) < len(short):
        raise ConfigError("--model: the same network twice; their functions need names of their own")
    named = {
        label: {"model.name": model, "model.weights": weights}
        for label, (model, weights) in zip(short, models, strict=True)
    }
    first = axis("network", named), axis("widths", {_width(text)[0]: _width(text)[1] for text in widths})
    every = axis("seed", seeds)
    plan = Plan(((*first, _axis(chains), every),), seed=base.seed)
    fixed = {text: chain for text, chain in chains.items() if _is_fixed(base, first[1], {text: chain})}
    if runs == "qat" or not fixed or len(every.points) == 1 or not all(map(ignores_seeds, configurations(base, plan))):
        return Study(base, plan, runs, name)
    once = *first, _axis(fixed), axis("seed", list(every.points[:1]))
    others = {text: chain for text, chain in chains.items() if text not in fixed}
    grids = (once, (*first, _axis(others), every)) if others else (once,)
    return Study(base, replace(plan, grids=grids), runs, name)


def chain_of(text: str, base: RunConfig) -> tuple[Choice, ...]:
    """`a+b`, `a:key=value+b` or `none`; what is not given has the parameters that the base gives it.

    Raises ConfigError for a method that there is not, and a parameter that one does not have.
    """
    known, parameters = ("none", *names("methods")), dict(base.ptq.applied)
    chain = []
    for part in text.split("+"):
        try:
            name, own = configuration.method_named(part)
        except ValueError:
            raise ConfigError(f"--method {text}: {part} is not legal; legal: NAME or NAME:parameter=value") from None
        if name not in known:
            raise ConfigError(f"--method {text}: {name} is unknown; known: {', '.join(known)}")
        chain.append(Choice(name, {**parameters.get(name, {}), **own}))
    return tuple(chain)


def _is_fixed(base: RunConfig, widths: Axis, chain: Mapping[str, Sequence[Choice]]) -> bool:
    """Whether nothing in a chain is random, at any width; the default methods stand in front of some."""
    grid = widths, _axis(chain)
    return all(is_deterministic(applied(base, settings(grid, c))) for c in combinations(grid))


def _axis(chains: Mapping[str, Sequence[Choice]]) -> Axis:
    written = {text: [{name: dict(values)} for name, values in chain] for text, chain in chains.items()}
    return axis("method", {text: {"ptq.methods": methods} for text, methods in written.items()})


def _width(text: str) -> tuple[str, Mapping[str, int]]:
    """`4:8` is W4A8: 4-bit weights, 8-bit activations; an input keeps 8 bits, as an image has."""
    found = re.fullmatch(r"[wW]?(\d+)[:aA](\d+)", text)
    if found is None:
        raise ConfigError(f"--widths {text}: expected WEIGHTS:ACTIVATIONS, as in 4:8")
    weight, activation = int(found[1]), int(found[2])
    keys = {"weight": weight, "output": activation, "input": max(8, activation)}
    return f"W{weight}A{activation}", {f"quantization.{role}.bitwidth": bits for role, bits in keys.items()}


def compare(
    study: Study,
    output: Path,
    *,
    storage: str | None = None,
    jobs: int = 1,
    progress: Progress = SILENT,
) -> Comparison:
    """Runs what is left of a comparison and writes it into `output`: markdown, CSV, JSON and a figure per network.

    The best configuration of each network as a file that `ptq --config` takes. report.html shows all of them.
    """
    for rows in tried(study, output, storage=storage, jobs=jobs, progress=progress):
        write(output / RESULTS, table(rows, study.axes).encode())
    rows = sorted(rows, key=partial(_place, study))
    found = Comparison(output, cells(rows), [str(r["error"]) for r in rows if r["state"] == "failed"])
    write(output / TABLE, csv_of(found.cells).encode())
    write(output / MARKDOWN, markdown(found).encode())
    write(output / run_folder.COMPARISON, json.dumps(document(found), indent=1).encode())
    for name, picture in figures(found.cells):
        write(output / name, picture)
    first = {key_of(r): r for r in reversed(rows) if r["state"] == "complete"}
    for cell in found.best:
        name = BEST if len(found.best) == 1 else f"best_{file_name(cell.network)}.yaml"
        write_best(study, first[cell.network, cell.widths, cell.method], output / name)
    pages.rebuild(output)
    return found


def _place(study: Study, row: Row) -> list[int]:
    """Where a trial stands in the table: by network, widths, method, seed, in the order in which they were given."""
    labels = {name: [p for grid in study.plan.grids for a in grid if a.name == name for p in a.points] for name in AXES}
    return [labels[name].index(row[name]) for name in AXES]
