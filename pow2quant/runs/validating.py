"""Every executor of a finished run, or of an ONNX file, against each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from onnx import ModelProto

from pow2quant import config as configuration
from pow2quant import datasets, run_folder, targets
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.adapters.onnx_qdq.batch import fixed_batch
from pow2quant.adapters.onnx_qdq.nodes import refuse_integer_operators
from pow2quant.artifact import Agreement, Artifact
from pow2quant.backends.base import SILENT, Progress, inputs
from pow2quant.config import RunConfig
from pow2quant.datasets.sources import data_of
from pow2quant.errors import ConfigError, FileFormatError, MissingExtraError, naming
from pow2quant.integer.certificate import Certificate, certify
from pow2quant.plugins import names
from pow2quant.reading import Signature
from pow2quant.runs.chosen import config_of, from_zero, shown
from pow2quant.runs.computing import device_of
from pow2quant.runs.executors import SIMULATION, compared, executors, simulation_executor
from pow2quant.runs.job import Job, network_of, simulation_of
from pow2quant.runs.reopening import load_parameters
from pow2quant.runs.result import Result
from pow2quant.runs.simulating import Simulated
from pow2quant.saving import scratch
from pow2quant.validation import ort
from pow2quant.validation.agreement import Executor, compare
from pow2quant.validation.files import QdqFile, opened

RANDOM_SAMPLES = 64
"""How many random inputs a bare ONNX file is validated on."""


@dataclass(frozen=True)
class Validation:
    """What validating a run's folder or a file found.

    free_scales: (tensor, scale) of the tensors whose scales are no powers of two. certificate: what is proved.
    left_out: why an executor could not take part, by its name.
    """

    agreements: tuple[Agreement, ...]
    free_scales: list[tuple[str, float]]
    certificate: Certificate
    left_out: dict[str, str]

    @property
    def agrees(self) -> bool:
        """Whether not a single element differs."""
        return all(a.agrees for a in self.agreements)

    @property
    def certificate_sentence(self) -> str:
        """The certificate in one line."""
        return self.certificate.sentence


def validate(
    source: str | Path | Artifact | Simulated | Result,
    *,
    data: Any = None,
    encodings: str | os.PathLike[str] | None = None,
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | Progress = SILENT,
    chosen: str | Sequence[str] = (),
) -> Validation:
    """Runs every executor of a quantized network on the same inputs, and counts the elements in which they differ.

    source: a run's folder, on its test data or on `data`; a QDQ ONNX file (or a float one, with `encodings`), a run's
    result, or what `simulate` and its `export` return, on `data` or on random inputs. data: in any form that
    `quantize` takes. config: in place of the run's own, where its data or its device are elsewhere now. chosen:
    validators by name, in place of those of the run's target; a file is then compared with the integer engine, and the
    engine alone with onnxruntime.
    """
    progress, seed = shown(progress), from_zero("seed", seed)
    max_batches = None if max_batches is None else from_zero("max_batches", max_batches)
    chosen = [chosen] if isinstance(chosen, str) else list(chosen or ())
    if isinstance(source, Result):
        source = source.simulation
    if isinstance(source, (Artifact, Simulated)):
        return _validate_object(source, data, max_batches, seed, progress, chosen)
    source = run_folder.path_of(source, "source")
    encodings = None if encodings is None else run_folder.path_of(encodings, "encodings")
    if source.is_dir():
        config = config_of(config or source / run_folder.CONFIG)
        return _validate_run(source, config, encodings, max_batches, progress, chosen, data)
    if config is not None:
        raise ConfigError(f"{source}: a configuration (or a device) is for the folder of a run, not for a file")
    if not source.is_file():
        raise FileFormatError(f"{source}: no such file or folder")
    with naming(source):
        return _validate_source(source, encodings, max_batches, seed, progress, chosen, data)


def _validate_object(
    source: Artifact | Simulated,
    data: Any,
    limit: int | None,
    seed: int,
    progress: Progress,
    chosen: Sequence[str],
) -> Validation:
    """What was made in Python; a simulation takes part itself."""
    artifact = source if isinstance(source, Artifact) else source.export()
    with scratch() as folder:
        file = artifact.save(folder)
        first = () if isinstance(source, Artifact) else (simulation_executor(source, "custom", torch.device("cpu")),)
        return _validate_file(opened(file), limit, seed, progress, chosen, data, first)


def _validate_source(
    source: Path,
    encodings: Path | None,
    max_batches: int | None,
    seed: int,
    progress: Progress,
    chosen: Sequence[str] = (),
    data: Any = None,
) -> Validation:
    """An ONNX file, or a float one with its encodings."""
    given = opened(source)
    refuse_integer_operators(given.model.graph)
    quantized = any(node.op_type == "QuantizeLinear" for node in given.model.graph.node)
    if quantized == (encodings is not None):
        raise FileFormatError(
            f"{source}: has QuantizeLinear nodes already; give a float model with --encodings"
            if quantized
            else f"{source}: has no QuantizeLinear; give its --encodings, or the folder of a run"
        )
    if encodings is None:
        return _validate_file(given, max_batches, seed, progress, chosen, data)
    table = aimet_encodings.load(encodings, aimet_encodings.channel_axes(given.model))
    with scratch() as folder:
        file = folder / run_folder.QDQ
        onnx_qdq.save(onnx_qdq.to_qdq(aimet_encodings.apply(given.model, table)), file)
        return _validate_file(opened(file), max_batches, seed, progress, chosen, data)


def _validate_file(
    file: QdqFile,
    max_batches: int | None,
    seed: int,
    progress: Progress,
    chosen: Sequence[str] = (),
    data: Any = None,
    first: Sequence[Executor] = (),
) -> Validation:
    """first: what is compared with beside the file's own executors, in front of them."""
    assert file.path is not None
    certificate = certify(file.network)
    batches, count = _batches(file, max_batches, seed) if data is None else _own_batches(data, file.model, max_batches)
    left_out: dict[str, str] = {}
    named = ("engine", *(name for name in chosen if name != "engine")) if chosen else ()
    taking_part = [*first, *executors(file.path, None, left_out, targets.of(file.model), named)]
    if len(taking_part) == 1:
        taking_part[:0] = executors(file.path, None, left_out, chosen=("onnxruntime",))
    found = compare(
        taking_part[0],
        taking_part[1:],
        progress.track(batches, "comparing", count),
        file.network,
        proof=certificate,
    )
    return Validation(tuple(found), ort.inspect(file), certificate, left_out)


def _batches(file: QdqFile, limit: int | None, seed: int) -> tuple[Iterable[list[NDArray[Any]]], int]:
    """Random inputs and how many batches they are; made one by one, as a limit may be larger than memory."""
    samples = limit * ort.BATCH if limit else RANDOM_SAMPLES
    return ort.random_batches(file, samples, seed), -(-samples // (fixed_batch(file.model) or ort.BATCH))


def _own_batches(data: Any, model: ModelProto, limit: int | None) -> tuple[Iterable[list[NDArray[Any]]], int]:
    """Inputs of the user's data, and how many batches; the evaluation part of a pair. Raises DataError for others."""
    names = tuple(value.name for value in model.graph.input)
    test = (
        data_of(data, "data", ort.BATCH, ort.BATCH)
        .with_parts(lambda part: replace(part, signature=Signature(names, len(names))))
        .test
    )
    found = [[x.numpy() for x in inputs(batch)] for batch, _ in islice(test, limit)]
    return found, len(found)


def _validate_run(
    folder: Path,
    config: RunConfig,
    encodings: Path | None,
    limit: int | None,
    progress: Progress,
    chosen: Sequence[str] = (),
    given: Any = None,
) -> Validation:
    """Rebuilds the simulation from a configuration and model.safetensors and compares it with the files beside them."""
    parameters, table = run_folder.load_state(folder / run_folder.STATE)
    plain = replace(config, model=replace(config.model, weights=None), data=datasets.resolved(config.data))
    device = device_of(plain.device)
    job = Job.of(plain, datasets.load(plain.data, given=given), network_of(plain), progress, device=device, batches=1)
    sim = job.simulate()  # its weights are overwritten
    with naming(folder / run_folder.STATE):
        load_parameters(job.parameters(sim), parameters, folder / run_folder.STATE)
        sim.load(table)
        artifact = sim.export(job.example)
    certificate = certify(artifact)
    pair = (folder / run_folder.FLOAT, encodings or folder / run_folder.ENCODINGS)
    left_out: dict[str, str] = {}
    others = executors(folder / run_folder.QDQ, pair, left_out, targets.load(plain.target), chosen)
    for backend in names("backends"):
        if backend != config.backend and not chosen:
            try:
                other = simulation_of(job.network, job.example, configuration.plan_of(plain), backend)
            except (MissingExtraError, ConfigError) as error:
                left_out[f"{backend} {SIMULATION}"] = str(error)
                continue
            other.model.to(job.device)
            load_parameters(job.parameters(other), parameters, folder / run_folder.STATE)
            other.load(table)
            others.append(simulation_executor(other, backend, job.device))
    agreements = compared(job, sim, artifact, certificate, others, limit or config.ptq.max_eval_batches)
    with naming(folder / run_folder.QDQ):
        free_scales = ort.inspect(folder / run_folder.QDQ)
    return Validation(tuple(agreements), free_scales, certificate, left_out)
