"""What runs a quantized network: the simulation, and every validator's executors of the exported files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pow2quant.artifact import Agreement, Artifact, Site
from pow2quant.backends.base import Simulation, inputs
from pow2quant.errors import MissingExtraError, NotPowerOfTwoError, UnsupportedModelError, naming
from pow2quant.integer.certificate import Certificate
from pow2quant.plugins import TABLES, names, resolve
from pow2quant.runs.job import Job
from pow2quant.runs.scores import Scores
from pow2quant.targets import DEFAULT, Target
from pow2quant.validation.agreement import Executor, compare

Arrays = Sequence[NDArray[np.float32]]


SIMULATION = "simulation"


def executors(
    file: Path,
    pair: tuple[Path, Path] | None,
    left_out: dict[str, str],
    target: Target = DEFAULT,
    chosen: Sequence[str] = (),
) -> list[Executor]:
    """A target's executors of a QDQ file and of a pair; into `left_out` go the reasons of those that cannot run.

    chosen: validators by name in place of the target's; then one that cannot run is an error.
    """
    found: list[Executor] = []
    of_packages = [name for name in names("validators") if name not in TABLES["validators"]]
    for name in chosen or (*target.executors, *of_packages):
        with naming(file):
            try:
                found += resolve("validators", name)(file, pair)
            except (MissingExtraError, NotPowerOfTwoError, UnsupportedModelError) as error:
                if chosen:
                    raise
                left_out[name] = str(error)
    if not found:
        raise UnsupportedModelError(f"nothing can run {file}: {next(iter(left_out.values()), 'no executor is named')}")
    return found


def compared(
    job: Job,
    sim: Simulation,
    artifact: Artifact,
    proof: Certificate,
    others: list[Executor],
    limit: int | None,
    scores: Scores | None = None,
) -> list[Agreement]:
    """The simulation against other executors, on the test data.

    scores: judges on the way, where that is wanted.
    """
    simulation = simulation_executor(sim, job.config.backend, job.device)
    batches: Iterable[Arrays] = ([x.numpy() for x in inputs(batch)] for batch, _ in job.test(limit))
    if scores is not None:
        others = [scores.watch(e) for e in others]
        simulation = scores.watch(simulation, noise=True)
        batches = scores.stream(job.test(limit), runner(job.model, job.device))
    # The proof is about sums of products; on a GPU, libraries may choose kernels that compute other sums.
    return compare(simulation, others, batches, artifact, proof=job.device.type == "cpu" and proof)


def runner(model: nn.Module, device: torch.device) -> Callable[[Arrays], list[NDArray[np.float32]]]:
    """The network as a function of one batch of arrays, (N, …) each, giving its outputs in float32."""

    def run(batch: Arrays) -> list[NDArray[np.float32]]:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            result = model(*(torch.from_numpy(np.asarray(x)).to(device) for x in batch))
        return [(r.float() if r.is_floating_point() else r).cpu().numpy() for r in inputs(result)]

    return run


def simulation_executor(sim: Simulation, backend: str, device: torch.device) -> Executor:
    """The simulation as an executor: numpy in, numpy out."""
    run = runner(sim.model, device)

    def tensors(batch: Arrays) -> dict[str, NDArray[np.float32]]:
        seen: dict[str, NDArray[np.float32]] = {}

        def record(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
            if site.role in ("input", "output"):
                seen[site.name] = quantized.detach().cpu().numpy().copy()
            return quantized

        with sim.intercept(record):
            run(batch)
        return seen

    return Executor(f"{backend} {SIMULATION}", run, tensors, integers=backend == "custom")
