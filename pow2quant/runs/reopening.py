"""A finished run, back from its folder as it was when it was quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pow2quant import config as configuration
from pow2quant import run_folder
from pow2quant.backends.base import SILENT, Batch, Progress, Simulation, inputs
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError, FileFormatError
from pow2quant.runs.executors import runner
from pow2quant.runs.job import Job


def reopened(folder: Path, config: RunConfig | None = None, progress: Progress = SILENT) -> tuple[Job, Simulation]:
    """A finished run as it was when it was quantized: its data, its float network, its simulation.

    config: in place of the run's own. Raises FileFormatError where the folder holds no run that fits it.
    """
    if not (folder / run_folder.STATE).is_file():
        raise FileFormatError(f"{folder}: holds no {run_folder.STATE}; give the folder of a finished run")
    parameters, table = run_folder.load_state(folder / run_folder.STATE)
    job = Job.start(config or configuration.load(folder / run_folder.CONFIG), progress)
    origin = run_folder.origin_of(folder / run_folder.STATE)
    if origin not in (None, job.origin()):
        raise FileFormatError(
            f"{folder}: was made of a float network with other weights than {job.config.model.name} has now; "
            "restore them, or quantize the network anew"
        )
    sim = job.simulate()
    load_parameters(job.parameters(sim), parameters, folder / run_folder.STATE)
    sim.load(table)
    return job, sim


def responses(
    job: Job, sim: Simulation, batches: Iterable[tuple[Batch, Any]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]]:
    """Labels (N,), and the logits of the float network and of the simulation, (N, classes), batch by batch.

    Raises ConfigError where the task is not classification, and for one logit of two classes.
    """
    if job.task.name != "classification":
        raise ConfigError(f"task: {job.task.name} has no logits of classes; this is for classification")
    exact, quantized = runner(job.model, job.device), runner(sim.model, job.device)
    for batch, labels in batches:
        arrays = [x.numpy() for x in inputs(batch)]
        indices = labels.argmax(1) if labels.ndim == 2 else labels
        logits = exact(arrays)[0], quantized(arrays)[0]
        if logits[0].shape[1:] == (1,):
            raise ConfigError("the network has one logit for two classes; this compares logits of classes")
        yield indices.numpy(), *logits


def load_parameters(own: dict[str, Tensor], parameters: dict[str, NDArray[Any]], path: Path) -> None:
    """Copies saved parameters into the network's own, in place. Raises FileFormatError where names or shapes differ."""
    shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (own, parameters)]
    wrong = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    if wrong:
        raise FileFormatError(f"{path}: does not fit the network of config.yaml: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(parameters[name]))
