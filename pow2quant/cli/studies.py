"""Commands that try many configurations, or look at what one does to the logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pow2quant.cli.options import (
    ActivationBits,
    AsJson,
    Backend,
    CalibrationBatches,
    Classes,
    ConfigFile,
    DataPath,
    DataSet,
    Device,
    EvalBatches,
    Methods,
    Model,
    Option,
    PerTensor,
    Quiet,
    Seed,
    Verbose,
    WeightBits,
    Weights,
    app,
    configured,
    console_of,
    quantization,
)

if TYPE_CHECKING:
    from pow2quant.cli.console import Console

Grids = Annotated[
    list[str] | None,
    Option(
        "--grid",
        help="KEY=VALUES, repeatable: 2..8, 1.0:2.0:0.05 or a,b,c. KEY is that of a configuration, or "
        "ptq.methods.NAME.PARAMETER.",
    ),
]
Jobs = Annotated[int, Option(min=1, help="Trials at a time, each in a process of its own.")]
Storage = Annotated[
    str | None,
    Option(help="Database of the trials, postgresql://USER@HOST/DB for several machines; default: a file."),
]
StudyName = Annotated[str | None, Option("--study", help="Its name in the database; default: from what it is.")]
StudyOutput = Annotated[Path | None, Option("--output", help="Folder to write, or to continue; default: runs/<study>.")]
Runs = Annotated[
    str | None,
    Option(help="ptq or qat: a whole run of every trial, exported and validated, in runs/ of the folder."),
]
SHOWN = 10
"""So many of the best trials are shown."""


@app.command(
    epilog="Example: pow2quant sweep --method gpfq --grid quantization.weight.bitwidth=2..8 --jobs 2 --output runs/bits"
)
def sweep(
    file: Annotated[Path | None, typer.Argument(help="A study's YAML: base, grids, trials.", metavar="STUDY")] = None,
    grid: Grids = None,
    trials: Annotated[
        int | None, Option(min=1, help="So many trials, drawn by a sampler, in place of the whole grid.")
    ] = None,
    sampler: Annotated[str | None, Option(help="tpe (Optuna's) or random.")] = None,
    jobs: Jobs = 1,
    storage: Storage = None,
    study: StudyName = None,
    runs: Runs = None,
    backend: Backend = None,
    model: Model = None,
    weights: Weights = None,
    num_classes: Classes = None,
    data: DataSet = None,
    data_path: DataPath = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    per_tensor: PerTensor = False,
    max_calibration_batches: CalibrationBatches = None,
    max_eval_batches: EvalBatches = None,
    method: Methods = None,
    config: ConfigFile = None,
    output: StudyOutput = None,
    seed: Seed = None,
    device: Device = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Tries configuration keys over a grid, or draws them by a sampler: a table, figures, and the best trial.

    Trials quantize and evaluate the simulation; --runs makes whole runs. The same command again continues where it was
    interrupted, and several machines can work on one study through --storage.
    """
    base = configured(
        config,
        {
            **quantization(
                backend, model, weights, num_classes, data, data_path, weight_bits, activation_bits, per_tensor
            ),
            "ptq.calibration_batches": max_calibration_batches,
            "ptq.max_eval_batches": max_eval_batches,
            "ptq.methods": [] if method == ["none"] else method or None,
            "seed": seed,
            "device": device,
        },
    )
    console = console_of(verbose, quiet, as_json)
    from pow2quant.study import sweep as studies

    chosen = studies.chosen(file, base, grid or (), trials, sampler, runs, study)
    folder = output or Path("runs") / chosen.called
    try:
        found = studies.sweep(chosen, folder, storage=storage, jobs=jobs, progress=console)
    except KeyboardInterrupt:
        console.note("the same command continues with what is left")
        raise
    _show_trials(console, found)
    return 0 if found.finished else 1


def _show_trials(console: Console, found: Any) -> None:
    def cells(row: Mapping[str, Any]) -> list[str]:
        labels = [str(row.get(axis, "")) for axis in found.axes]
        sqnr = "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
        return [str(row["trial"]), *labels, percent(row["original_top1"]), percent(row["quantized_top1"]), sqnr]

    short = [axis.rpartition(".")[2] for axis in found.axes]
    console.table(["trial", *short, "float", "top-1", "SQNR dB"], [cells(row) for row in found.finished[:SHOWN]])
    lines = [""] if found.finished else []
    reasons: dict[str, list[str]] = {}
    for row in found.failed:
        reasons.setdefault(row["error"], []).append(str(row["trial"]))
    lines += [f"failed: trial {', '.join(trials)}: {reason}" for reason, trials in reasons.items()]
    if found.finished:
        best = found.finished[0]
        what = ", ".join(f"{a.rpartition('.')[2]} {best[a]}" for a in found.axes if a in best)
        lines.append(f"best: {what}: {percent(best['quantized_top1'])} (float {percent(best['original_top1'])})")
    lines.append(f"trials: {len(found.finished)} finished, {len(found.failed)} failed; files: {found.folder}")
    console.result({"folder": str(found.folder), "best": (found.finished or [None])[0], "trials": found.rows}, lines)


def percent(value: float | None) -> str:
    """`92.62 %`."""
    return "-" if value is None else f"{value:.2f} %"
