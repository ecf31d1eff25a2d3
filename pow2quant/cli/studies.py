"""Commands that try many configurations: sweep and compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pow2quant.cli.given import Given, taking
from pow2quant.cli.options import Option, app, continued

if TYPE_CHECKING:
    from pow2quant.cli.console import Console

Grids = Annotated[
    list[str] | None,
    Option(
        "--grid",
        help="KEY=VALUES, repeatable; VALUES: 2..8, 1.0:2.0:0.05 or a,b,c. KEY is a key of the configuration, or "
        "ptq.methods.NAME.PARAMETER.",
    ),
]
Jobs = Annotated[int, Option(min=1, help="Number of trials to run at a time, each in its own process.")]
Storage = Annotated[
    str | None,
    Option(help="Database for the trials, postgresql://USER@HOST/DB for several machines; default: a file."),
]
StudyName = Annotated[
    str | None, Option("--study", help="Name of the study in the database; by default it follows from the study.")
]
StudyOutput = Annotated[
    Path | None, Option("--output", help="Folder for the results, or of a study to continue; default: runs/<study>.")
]
Runs = Annotated[
    str | None,
    Option(help="ptq or qat: make a complete run of each trial, exported and validated, in runs/ of the folder."),
]
SHOWN = 10
"""So many of the best trials are shown."""


@app.command(
    epilog="Example: pow2quant sweep --method gpfq --grid quantization.weight.bitwidth=2..8 --jobs 2 --output runs/bits"
)
@taking("model", "weights", "weight_bits", "activation_bits", "method")
def sweep(
    given: Given,
    file: Annotated[
        Path | None, typer.Argument(help="YAML file of a study: base, grids, trials.", metavar="STUDY")
    ] = None,
    grid: Grids = None,
    trials: Annotated[
        int | None, Option(min=1, help="Draw this many trials with a sampler instead of trying the whole grid.")
    ] = None,
    sampler: Annotated[str | None, Option(help="Sampler: tpe (Optuna's) or random.")] = None,
    jobs: Jobs = 1,
    storage: Storage = None,
    study: StudyName = None,
    runs: Runs = None,
    output: StudyOutput = None,
) -> int:
    """Tries values of configuration keys, in a grid or drawn by a sampler: a table, figures, and the best trial.

    A trial quantizes the network and evaluates its simulation; --runs makes complete runs. The same command continues
    an interrupted study, and several machines can work on one study through --storage.
    """
    base = given.configured({})
    console = given.console()
    from pow2quant.study import sweep as studies

    chosen = studies.checked(studies.chosen(file, base, grid or (), trials, sampler, runs, study), storage)
    folder = output or Path("runs") / chosen.called
    with continued(folder, folder):
        found = studies.sweep(chosen, folder, storage=storage, jobs=jobs, progress=console)
    _show_trials(console, found)
    return 0 if found.finished else 1


def _show_trials(console: Console, found: Any) -> None:
    from pow2quant.report.summary import WORDS, change, number

    def cells(row: Mapping[str, Any]) -> list[str]:
        labels = [str(row.get(axis, "")) for axis in found.axes]
        sqnr = "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        values = (number(row[column], row["unit"]) for column in ("original", "quantized"))
        changed = change(row["change"], row["change_low"], row["change_high"], row["unit"])
        return [str(row["trial"]), *labels, *values, changed, sqnr]

    short = [axis.rpartition(".")[2] for axis in found.axes]
    metrics = " / ".join(dict.fromkeys(WORDS.get(row["metric"], row["metric"]) for row in found.finished))
    console.table(
        ["trial", *short, "float", metrics, "change (95 %)", "SQNR dB"], [cells(row) for row in found.finished[:SHOWN]]
    )
    lines = [""] if found.finished else []
    reasons: dict[str, list[str]] = {}
    for row in found.failed:
        reasons.setdefault(row["error"], []).append(str(row["trial"]))
    lines += [f"failed: trial {', '.join(trials)}: {reason}" for reason, trials in reasons.items()]
    if found.finished:
        best = found.finished[0]
        what = ", ".join(f"{a.rpartition('.')[2]} {best[a]}" for a in found.axes if a in best)
        float_value = "" if best["original"] is None else f" (float {number(best['original'], best['unit'])})"
        lines.append(f"best: {what}: {number(best['quantized'], best['unit'])}{float_value}")
        lines.append(f"evaluated: {found.evaluated}")
    lines.append(f"trials: {len(found.finished)} finished, {len(found.failed)} failed; files: {found.folder}")
    console.result({"folder": str(found.folder), "best": (found.finished or [None])[0], "trials": found.rows}, lines)


@app.command(epilog="Example: pow2quant compare --method none --method gpfq --widths 8:8,4:8 --seeds 0..2 --jobs 2")
@taking()
def compare(
    given: Given,
    method: Annotated[
        list[str] | None, Option(help="A chain of methods, a+b, or none; repeatable. --config sets their parameters.")
    ] = None,
    widths: Annotated[str | None, Option(help="List of bit widths, WEIGHTS:ACTIVATIONS: 8:8,4:8.")] = None,
    model: Annotated[list[str] | None, Option(help="A network, as for ptq; repeatable.")] = None,
    weights: Annotated[
        list[str] | None, Option(help="Its state dict; repeatable, in the order of the networks.")
    ] = None,
    seeds: Annotated[str, Option(help="Seeds: 0..2, or a list.")] = "0..2",
    jobs: Jobs = 1,
    storage: Storage = None,
    study: StudyName = None,
    runs: Runs = None,
    output: StudyOutput = None,
) -> int:
    """Compares methods at several bit widths on several networks: mean and spread over seeds, and the best method.

    Prints one table and writes a page, Markdown, CSV and figures. The same command continues an interrupted comparison.
    """
    if weights and len(weights) != len(model or [""]):
        raise typer.BadParameter("give one for each --model, in the same order", param_hint="'--weights'")
    base = given.configured({})
    console = given.console()
    from pow2quant.study import cells
    from pow2quant.study import compare as comparison
    from pow2quant.study.sweep import checked

    names = model or ([base.model.name] if weights else [])
    networks = [(name, weights[i] if weights else None) for i, name in enumerate(names)]
    methods = method or comparison.METHODS
    bits = widths.split(",") if widths else comparison.WIDTHS
    chosen = checked(comparison.study(base, networks, bits, methods, seeds, runs, study), storage)
    folder = output or Path("runs") / chosen.called
    with continued(folder, folder):
        found = comparison.compare(chosen, folder, storage=storage, jobs=jobs, progress=console)
    console.table(cells.header(found.cells), [cells.cells_of(cell) for cell in found.cells])
    lines = ["", *(cells.sentence(cell) for cell in found.best)]
    lines += [cells.evaluated(found.cells)] if found.cells else []
    lines += [f"failed: {error}" for error in dict.fromkeys(found.errors)]
    console.result(cells.document(found), [*lines, f"files: {folder}"])
    return 0 if found.cells else 1
