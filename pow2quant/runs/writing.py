"""From a configuration to a run's folder: calibrate, snap, export, validate from the files, report."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pow2quant import config as configuration
from pow2quant import run_folder, targets
from pow2quant.adapters import onnx_qdq
from pow2quant.artifact import Agreement, Artifact, Table, note_pixels
from pow2quant.backends import fitting
from pow2quant.backends.base import SILENT, Progress, Simulation
from pow2quant.backends.base import inputs as arguments
from pow2quant.backends.samples import sample
from pow2quant.config import Choice, RunConfig
from pow2quant.errors import ConfigError
from pow2quant.frontends.copies import array
from pow2quant.frontends.prepare import unrolled
from pow2quant.integer.certificate import Certificate, certify
from pow2quant.integer.resources import resources
from pow2quant.plugins import resolve
from pow2quant.report import document, statistics
from pow2quant.report.network import describe
from pow2quant.report.pages import rebuild
from pow2quant.runs import unfinished
from pow2quant.runs.chains import with_chain
from pow2quant.runs.choosing import decided
from pow2quant.runs.chosen import shown
from pow2quant.runs.evaluating import evaluation_of
from pow2quant.runs.executors import SIMULATION, compared, executors, runner, simulation_executor
from pow2quant.runs.job import NOTHING, Given, Job, methods_of
from pow2quant.runs.judging import change_of, judge
from pow2quant.runs.pixels import take_bytes
from pow2quant.runs.result import Result
from pow2quant.runs.scores import FLOAT, Scores
from pow2quant.runs.simulating import Simulated
from pow2quant.runs.worst import Worst, by_class
from pow2quant.validation import latency, ort

PATIENCE = 200_000_000_000
"""Multiply-accumulates that `ptq` gives to each of the slow executors, about a minute; `validate` gives them all."""


def ptq(
    config: RunConfig,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool | Progress = SILENT,
    given: Given = NOTHING,
) -> Result:
    """Post-training quantization from a configuration to a run's folder.

    given: objects in place of what the configuration names.
    Killed, the same call continues it, to the bits of a run that was not interrupted.
    Raises Pow2QuantError for everything that a user can fix; then `output` is as it was before.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError("ptq takes a RunConfig and a folder; for a network in Python: quantize(model, data)")
    started, target = time.monotonic(), run_folder.path_of(output)
    with run_folder.staged(target, overwrite) as folder, unfinished.beside(target) as kept:
        job, sim, steps = quantized(start(config, shown(progress), given, kept=kept))
        report, agreements = finish(job, sim, folder, [*steps, "export"])
        report["ptq_accuracy"] = report["final_accuracy"]
        report["duration_seconds"] = round(time.monotonic() - started, 2)
        write_report(folder, report)
    return Result(target, report, tuple(agreements), Simulated(sim, job.example))


def start(
    config: RunConfig,
    progress: Progress,
    given: Given = NOTHING,
    default: tuple[Choice, ...] | None = None,
    kept: unfinished.Unfinished = unfinished.NOTHING,
) -> Job:
    """What a configuration stands for, before anything is quantized.

    default: the methods where none is named; None: those of `ptq`. kept: where simulations on their way are kept.
    """
    if given.methods is None:
        config = with_chain(config, configuration.default_methods(config) if default is None else default, progress)
    methods_of(config, given)
    return replace(Job.start(config, progress, given), unfinished=kept)


def quantized(job: Job) -> tuple[Job, Simulation, list[str]]:
    """The first part of every run: the job with methods that are chosen, its calibrated simulation, the steps taken."""
    job = decided(job)
    return job, job.quantized(), job.steps


def score(
    config: RunConfig, progress: Progress = SILENT, kept: unfinished.Unfinished = unfinished.NOTHING
) -> dict[str, Any]:
    """Quantizes as `ptq` does and evaluates the simulation on the test data; nothing is exported or validated.

    kept: where the simulation on its way is kept.
    Returns keys of report.json: `backend`, `pipeline_steps`, `task`, `metrics`, `evaluation`, the accuracies of the
    float network (`initial_…`) and of the simulation (`final_…`), `final_sqnr_db` and `evaluated_samples`.
    """
    job, sim, steps = quantized(start(config, progress, kept=kept))
    limit = config.ptq.max_eval_batches
    scores = Scores(job.task, limit=limit, total=job.sample(limit).total)
    simulation = scores.watch(simulation_executor(sim, config.backend, job.device), noise=True)
    for batch in scores.stream(job.test(limit), runner(job.model, job.device)):
        simulation.run(batch)
    change = change_of(scores, simulation.name)
    return (
        {"backend": config.backend, "pipeline_steps": steps, "task": job.task.name}
        | scores.keyed(initial=FLOAT, final=simulation.name)
        | {
            "metrics": scores.metrics(float=FLOAT, quantized=simulation.name),
            "evaluation": evaluation_of(job, scores, change, quantized=simulation.name),
            "final_sqnr_db": scores.noise.value(),
            "evaluated_samples": scores.samples,
        }
    )


def finish(job: Job, sim: Simulation, folder: Path, steps: list[str]) -> tuple[dict[str, Any], list[Agreement]]:
    """Checks the constraint, writes the files, reads them back and runs every executor on the test data."""
    if job.config.data.input == "pixels":
        take_bytes(sim, job.network)
    table = sim.encodings()
    _check_constraint(job.config, sim, table)
    fitting.require(sim.placement, table)
    artifact = sim.export(job.example).stored_in(job.config.quantization.storage)
    if job.config.data.input == "pixels":
        note_pixels(artifact.model)
    parameters = {name: array(p) for name, p in job.parameters(sim).items()}
    run_folder.save_state(folder / run_folder.STATE, parameters, table, job.origin())
    _write_models(artifact, folder, job.config.encodings_version)
    (folder / run_folder.CONFIG).write_text(configuration.dump(job.config), encoding="utf-8")
    certificate = certify(artifact)
    _check_accumulators(job, certificate)
    proofs = json.dumps(certificate.to_json(per_channel=True), indent=1) + "\n"
    (folder / run_folder.CERTIFICATE).write_text(proofs, encoding="utf-8")
    pair = (folder / run_folder.FLOAT, folder / run_folder.ENCODINGS)
    limit = job.config.ptq.max_eval_batches
    judged = (FLOAT, f"{job.config.backend} {SIMULATION}", ort.OPTIMIZED)
    worst = Worst(job.task) if job.config.report.statistics else None
    scores, left_out = Scores(job.task, judged, limit, job.sample(limit).total, worst), dict[str, str]()
    others = [
        replace(e, most=max(1, PATIENCE // e.work)) if e.work else e
        for e in executors(folder / run_folder.QDQ, pair, left_out, targets.load(job.config.target))
    ]
    agreements = compared(job, sim, artifact, certificate, others, limit, scores)
    report = _report(job, artifact, certificate, scores, agreements, folder, steps)
    if worst is not None:
        _write_statistics(job, sim, artifact, worst, folder)
    timing = _latency(job, folder) if job.config.report.latency else None
    return report | {"validation_left_out": left_out, "latency": timing}, agreements


def _write_statistics(job: Job, sim: Simulation, artifact: Artifact, worst: Worst, folder: Path) -> None:
    """What the report shows of every tensor, measured on a few calibration images, and how they hang together."""
    job.progress.note("measuring every tensor for the report")
    table = sim.encodings()
    samples, count = sample(sim, job.calibration(), job.config.seed)
    tensors = {
        name: statistics.of_tensor(table[name], seen)
        for name, seen in samples.items()
        if np.isfinite(seen.entering).all() and np.isfinite(seen.exact).all()
    }
    document = {"samples": count, "network": describe(artifact), "tensors": tensors, "worst": worst.to_json()}
    (folder / run_folder.STATISTICS).write_text(json.dumps(document) + "\n", encoding="utf-8")


def _latency(job: Job, folder: Path) -> dict[str, Any]:
    files = {"float": folder / run_folder.FLOAT, "quantized": folder / run_folder.QDQ}
    return latency.measure(files, [x.numpy() for x in arguments(job.example)])


def _check_constraint(config: RunConfig, sim: Simulation, table: Table) -> None:
    """The claims at the seam: the table survives loading, and every scale is exactly 2^k where that was asked for."""
    sim.load(table)
    if sim.encodings() != table:
        raise AssertionError("the backend does not give back the encodings that it was given")
    plan = configuration.plan_of(config)
    for site in sim.sites:
        spec = plan.spec(site)
        if spec is not None and spec.power_of_2 and site.role != "bias":
            table[site.name].exponent  # noqa: B018 (raises NotPowerOfTwoError)


def _check_accumulators(job: Job, certificate: Certificate) -> None:
    """Raises ConfigError, naming the layer, where sums do not fit the target's accumulator."""
    target = targets.load(job.config.target)
    bits = target.limits.accumulator_bits
    for layer in certificate.layers if bits is not None else ():
        assert bits is not None
        if layer.bits is not None and layer.bits > bits:
            raise ConfigError(
                f"{layer.node}: its sums need {layer.bits} bits; target {target.name} has accumulators of {bits} "
                "(limits.accumulator_bits)"
            )


def _write_models(artifact: Artifact, folder: Path, version: str) -> None:
    onnx_qdq.export_qdq(artifact, folder)
    onnx_qdq.save(artifact.model, folder / run_folder.FLOAT)
    resolve("exporters", f"aimet-{version}")(artifact, folder)


def _report(
    job: Job,
    artifact: Artifact,
    certificate: Certificate,
    scores: Scores,
    agreements: list[Agreement],
    folder: Path,
    steps: list[str],
) -> dict[str, Any]:
    quantization, target = job.config.quantization, targets.load(job.config.target)
    simulated, measured = f"{job.config.backend} {SIMULATION}", ort.OPTIMIZED
    sizes = {
        "float": (folder / run_folder.FLOAT).stat().st_size,
        "quantized": (folder / run_folder.QDQ).stat().st_size,
    }
    change, needed = change_of(scores, simulated), resources(artifact, certificate)
    report: dict[str, Any] = {
        "verdict": judge(job, agreements, change, sizes, steps, artifact.encodings),
        "quantization_type": "power_of_2" if document.is_power_of_two(artifact.encodings.values()) else "free_scale",
        "backend": job.config.backend,
        "target": target.name,
        "rounding": asdict(target.rounding),
        "model": job.config.model.name,
        "dataset": job.config.data.dataset,
        "input": job.config.data.input,
        "pipeline_steps": steps,
        "auto": [trial.to_json() for trial in job.trials] or None,
        "config": {
            role: spec and {"bitwidth": spec.bits, "symmetric": spec.symmetric, "power_of_2": spec.power_of_2}
            for role, spec in ((r, getattr(quantization, r)) for r in configuration.ROLES)
        },
        "unrolled": unrolled(job.network) or None,
        "task": job.task.name,
        "metric": job.task.metrics[0].name if job.task.metrics else None,
        "metrics": scores.metrics(float=FLOAT, quantized=simulated, onnxruntime=measured),
        "initial_accuracy": None,
        "ptq_accuracy": None,
        "final_accuracy": None,
        "onnxruntime_accuracy": None,
        **scores.keyed(initial=FLOAT, final=simulated, onnxruntime=measured),
    }
    initial, final = report["initial_accuracy"], report["final_accuracy"]
    return report | {
        "final_sqnr_db": scores.noise.value(),
        "tied_logits": scores.diagnostic(simulated, "tied_logits"),
        "total_improvement": None if initial is None or final is None else round(final - initial, 4),
        "evaluated_samples": scores.samples,
        "evaluation": evaluation_of(job, scores, change, quantized=simulated, onnxruntime=measured),
        "by_class": by_class(scores.counters, FLOAT, simulated, report["metric"]),
        "model_size_bytes": sizes,
        "validation": [a.to_json() for a in agreements],
        "certificate": certificate.to_json(),
        "resources": None if needed is None else needed.to_json(),
        "final_quantization_details": document.details(artifact),
        "environment": document.environment(torch.get_num_threads()),
        "duration_seconds": None,
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes report.json, and the pages of it and the files beside it."""
    (folder / run_folder.REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rebuild(folder)
