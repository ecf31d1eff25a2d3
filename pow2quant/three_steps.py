"""Quantization-aware training in three steps: PTQ, training, and PTQ of the activations behind the trained weights.

Batch norm is folded before the first step. Training takes it out of the weights again and keeps it live until it is
frozen (see `training.batch_norm`); what is measured and exported is always the folded network.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pow2quant import run_folder
from pow2quant.backends.base import SILENT, Progress, Simulation, inputs
from pow2quant.backends.calibration import settled
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError, OutputError, TrainingError
from pow2quant.runs import Job, Result, Simulated, finish, quantized, start, unfinished, write_report
from pow2quant.runs.chains import to_train
from pow2quant.runs.chosen import shown
from pow2quant.runs.quantizing import Temporary, requested
from pow2quant.training import curves
from pow2quant.training.learning import Learning
from pow2quant.training.mixing import Mixing
from pow2quant.training.module import QatModel
from pow2quant.training.processes import joined
from pow2quant.training.trainer import Trainer

LINES = {"float": "float", "after PTQ": "ptq", "final": "quantized"}
"""What the curves of training are compared with: keys of a metric in report.json, by label."""


def checkpoints_of(output: Path) -> Path:
    """Where the checkpoints of a run are kept: `<output>.training`."""
    return unfinished.folder_of(output, ".training")


def qat(
    config: RunConfig,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | Progress = SILENT,
) -> Result | None:
    """The three steps from a configuration to a run's folder; checkpoints stand in `<output>.training` meanwhile.

    resume: continues a run that was interrupted, to the bits of one that was not; without a checkpoint it starts. With
    overwrite it also starts where the checkpoint is of another configuration.
    Started by `torchrun` it trains in all processes, and returns None in those that do not lead.
    Raises Pow2QuantError for everything that a user can correct, TrainingError when training diverges; then `output` is
    as it was before, and the checkpoints are kept.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError("qat takes a RunConfig and a folder; for a network in Python: qat_model(model, data)")
    target, bars = run_folder.path_of(output), shown(progress)
    started, checkpoints = time.monotonic(), checkpoints_of(target)
    with joined(config.device) as processes:
        if processes.leads:
            _check_checkpoints(checkpoints, resume, overwrite)
        staged = run_folder.staged(target, overwrite) if processes.leads else nullcontext()
        with staged as folder:
            kept = unfinished.Unfinished(checkpoints if processes.leads else None)
            job = start(config, bars, default=to_train(config), kept=kept)
            teacher = job.teacher()
            Mixing(job.config.training).check(inputs(job.example))
            job, sim, steps = quantized(job)
            ptq_accuracy = job.score(sim.model)
            trainer = Trainer(
                sim=sim,
                parameters=job.parameters(sim),
                data=replace(job.data, test=job.sample(job.config.ptq.max_eval_batches).batches),
                network=job.model,
                teacher=teacher,
                task=job.task,
                config=job.config.training,
                seed=job.config.seed,
                device=job.device,
                processes=processes,
                folder=checkpoints,
                identity=job.identity(),
                progress=bars,
            )
            with _nothing_left_before(trainer):
                trainer.run(resume, overwrite)
            if folder is None:
                return None
            steps += [f"qat ({job.config.training.mode})", *_settle(job, sim), "export"]
            report, agreements = finish(job, sim, folder, steps)
            report |= _trained(trainer)
            if "accuracy" in {metric.key for metric in job.task.metrics[:1]}:
                report |= {"ptq_accuracy": ptq_accuracy, "qat_best_accuracy": trainer.best["accuracy"]}
            for measured in list(report["metrics"].values())[:1]:
                measured |= {"ptq": ptq_accuracy, "qat_best": trainer.best["accuracy"]}
            facts = report["training"] | {"metric": trainer.metric.name, "unit": trainer.metric.unit}
            report["duration_seconds"] = round(time.monotonic() - started, 2)
            values: dict[str, Any] = next(iter(report["metrics"].values()), {})
            lines = {label: values.get(key) for label, key in LINES.items()}
            curves.save(folder, trainer.history, facts, {k: v for k, v in lines.items() if v is not None})
            if (checkpoints / curves.BOARD).is_dir():
                shutil.copytree(checkpoints / curves.BOARD, folder / curves.BOARD)
            write_report(folder, report)
    _remove(checkpoints)
    return Result(target, report, tuple(agreements), Simulated(sim, job.example))


def qat_model(
    model: nn.Module | str | os.PathLike[str] | None = None,
    data: Any = None,
    bits: str | None = None,
    methods: Any = None,
    metric: Any = None,
    task: str | None = None,
    backend: str | None = None,
    target: str | None = None,
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    progress: bool | Progress = True,
) -> QatModel[Result]:
    """The quantized network as a module for one's own training loop; its `finish()` exports, checks and reports.

    The arguments are those of `pow2quant.quantize`, which is done first. `training` of the configuration says how:
    `mode` (`weights`, or `full` for activations too), `exponents` (`tqt`, `lsq`, `fixed`), `batch_norm` (`live`,
    `folded`), `final_ptq`. Raises Pow2QuantError, one line, for everything that can be fixed.
    """
    base, given, bars = requested(model, data, bits, methods, metric, task, backend, target, config, progress)
    job, sim, steps = quantized(start(base, bars, given, to_train(base)))
    parameters = job.parameters(sim)
    batches = ([x.to(job.device) for x in inputs(batch)] for batch in job.calibration())
    made: QatModel[Result] = QatModel(
        Learning(sim, parameters, job.config.training),
        {id(parameter): name for name, parameter in parameters.items()},
        batches,
        partial(_finished, job, sim, steps),
    )
    return made


def _finished(job: Job, sim: Simulation, steps: list[str], output: Any = None, *, overwrite: bool = False) -> Result:
    """A run's folder of a simulation whose weights were trained elsewhere."""
    started, keeps = time.monotonic(), None if output is not None else Temporary()
    target = run_folder.path_of(output) if keeps is None else keeps.path / "run"
    with run_folder.staged(target, overwrite) as folder:
        done = [*steps, f"qat ({job.config.training.mode})", *_settle(job, sim), "export"]
        report, agreements = finish(job, sim, folder, done)
        report["duration_seconds"] = round(time.monotonic() - started, 2)
        write_report(folder, report)
    return Result(target, report, tuple(agreements), Simulated(sim, job.example), keeps)


def _check_checkpoints(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises OutputError for an unfinished run that is neither to be resumed nor to be replaced."""
    if resume or not folder.exists():
        return
    if not overwrite:
        raise OutputError(f"{folder}: holds an unfinished run; continue with --resume, or start anew with --overwrite")
    _remove(folder)


def _remove(checkpoints: Path) -> None:
    if not checkpoints.is_symlink():
        shutil.rmtree(checkpoints / curves.BOARD, ignore_errors=True)
    unfinished.remove(checkpoints)


@contextmanager
def _nothing_left_before(trainer: Trainer) -> Iterator[None]:
    """An error before the first batch is done leaves no checkpoint; one of a training that diverges is kept."""
    try:
        yield
    except TrainingError:
        raise
    except (Exception, SystemExit):
        if len(trainer.history) == 1 and not trainer.batch and trainer.path is not None:
            trainer.path.unlink(missing_ok=True)
            with suppress(OSError):  # what the methods have computed is there
                trainer.path.parent.rmdir()
        raise


def _settle(job: Job, sim: Simulation) -> list[str]:
    """The third step: encodings for what follows from the trained weights. Returns the names of what was done.

    Weights keep theirs, but for near-dead channels whose trained bias would not fit.
    """
    training = job.config.training
    again = training.mode == "weights" and training.final_ptq
    if again:
        sim.calibrate(job.calibration(), roles={"input", "output"})
    sim.load(settled(sim, sim.encodings()))
    return ["final ptq"] if again else []


def _trained(trainer: Trainer) -> dict[str, Any]:
    """What training adds to report.json."""
    config, history = trainer.config, trainer.history
    return {
        "training": {
            "mode": config.mode,
            "batch_norm": "live" if len(trainer.norms) else "folded",
            "kept": config.keep,
            "epochs_trained": len(history) - 1,
            "best_epoch": trainer.best["epoch"],
            "last_accuracy": history[-1].accuracy,
            "processes": trainer.processes.size,
            "seed": trainer.seed,
            "seconds": round(sum(epoch.seconds for epoch in history), 2),
            "exponents": history[-1].exponents,
            "exponents_moved": history[-1].moved,
            "exponents_frozen": history[-1].frozen,
        },
    }
