"""Choosing the methods of a run by trying: a method such as `auto` says what to try, this runs and judges it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pow2quant import config as configuration
from pow2quant.backends.base import SILENT, Batch
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError, DataError
from pow2quant.frontends.copies import copied
from pow2quant.methods.auto import Auto, Chain, Facts, Trial, best, named
from pow2quant.plugins import resolve
from pow2quant.runs.chains import fixed
from pow2quant.runs.job import Job, rewritten
from pow2quant.runs.unfinished import NOTHING


def chooser_of(config: RunConfig) -> Auto | None:
    """The method that chooses the others, if the configuration names one. Raises ConfigError unless it stands alone."""
    for choice in config.ptq.applied:
        cls = resolve("methods", choice.name)
        if hasattr(cls, "choose"):
            if len(config.ptq.applied) > 1:
                raise ConfigError(f"ptq.methods: {choice.name} chooses the methods itself; name it alone")
            found: Auto = configuration.parameters(cls, choice.parameters, f"ptq.methods.{choice.name}")
            return found
    return None


def decided(job: Job) -> Job:
    """The job with the methods that trials chose, where its configuration leaves that open; otherwise as it is."""
    chooser = chooser_of(job.config) if job.given.methods is None else None
    if chooser is None:
        return job
    batches = some(list(job.calibration()), chooser.images)
    numbers, silent = job.unfinished.numbers(job.fingerprint), replace(job, progress=SILENT, unfinished=NOTHING)

    def measured(chain: Chain, part: int) -> list[float]:
        torch.manual_seed(job.config.seed)
        seen, held_back = split(batches, chooser.held_back, part)
        started = time.monotonic()
        sim = with_methods(silent, chain, seen).quantized()
        seconds = time.monotonic() - started
        return [seconds, *noise(sim.model, job.model, held_back, job.device)]

    def attempt(chain: Chain, part: int) -> Trial:
        seconds, *found = numbers.several(f"auto: {named(chain)}, part {part}", lambda: measured(chain, part))
        return Trial(chain, np.array(found), seconds)

    trials = chooser.choose(facts(job.network, job.config), attempt, job.progress.note)
    choice = best(trials)
    job.progress.note(
        f"auto: chosen: {named(choice.chain)}, {choice.sqnr_db:.2f} dB on {len(choice.noise)} images held back"
    )
    torch.manual_seed(job.config.seed)
    return replace(with_methods(job, choice.chain), trials=tuple(trials))


def with_methods(job: Job, chain: Chain, batches: Sequence[Batch] | None = None) -> Job:
    """The job with these methods, on these calibration batches; None: on its own. Its network had no rewrite yet."""
    config = fixed(job.config, chain)
    seen = job.calibration() if batches is None else batches
    network = rewritten(copied(job.network), config, seen, job.progress)
    return replace(job, config=config, network=network, seen=batches)


def some(batches: Sequence[Batch], images: int) -> list[Batch]:
    """The fewest batches, evenly spread, with that many images where batches are alike; all where there are fewer."""
    count = sum(len(pytree.tree_leaves(batch)[0]) for batch in batches)
    kept = min(len(batches), -(-len(batches) * images // count)) if count else 0
    return [batches[i * len(batches) // kept] for i in range(kept)]


def split(batches: Sequence[Batch], share: float, part: int = 0) -> tuple[list[Batch], list[Batch]]:
    """(seen, held back): a share of the images is held back, evenly spread over the batches.

    part: which images; those of parts 0 to `int(1 / share)` - 1 are disjoint, and of part 0 there are as many as the
    share, rounded down. Raises DataError where one of the two would be empty.
    """
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    ratio = Fraction(share).limit_denominator(10**6)
    before = part
    for batch in batches:
        count = len(pytree.tree_leaves(batch)[0])
        places = np.arange(before, before + count + 1) * ratio.numerator // ratio.denominator
        back = np.diff(places) > 0
        before += count
        for half, rows in zip(parts, (~back, back), strict=True):
            if rows.any():
                index = torch.from_numpy(np.flatnonzero(rows))
                half.append(pytree.tree_map(lambda x, index=index: x[index] if isinstance(x, Tensor) else x, batch))
    if not parts[0] or not parts[1]:
        raise DataError(f"auto: {before - part} calibration images are too few; some judge and some calibrate")
    return parts


def facts(network: nn.Module, config: RunConfig) -> Facts:
    """What decides which chains are worth a trial for a network and its widths."""
    weight, output = config.quantization.weight, config.quantization.output
    return Facts(
        None if weight is None else weight.bits,
        None if output is None else output.bits,
        any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in network.modules()),
        configuration.default_methods(config),
    )


@torch.no_grad()
def noise(model: nn.Module, exact: nn.Module, batches: Sequence[Batch], device: torch.device) -> NDArray[np.float64]:
    """Per image, the mean over the outputs of the error's energy by the output's mean energy over all images."""
    errors, signals = [], []
    for batch in batches:
        arguments = [x.to(device) for x in pytree.tree_leaves(batch)]
        pairs = list(zip(_rows(model(*arguments)), _rows(exact(*arguments)), strict=True))
        errors.append(torch.stack([(x - y).square().sum(1) for x, y in pairs], 1))
        signals.append(torch.stack([y.square().sum(1) for _, y in pairs], 1))
    energy = torch.cat(signals).mean(0).clamp_min(1e-30)
    found: NDArray[np.float64] = (torch.cat(errors) / energy).mean(1).cpu().numpy()
    return found


def _rows(results: Any) -> Iterator[Tensor]:
    """Every float output, (N, values)."""
    return (
        x.double().flatten(1) if x.ndim > 1 else x.double()[:, None]
        for x in pytree.tree_leaves(results)
        if isinstance(x, Tensor) and x.is_floating_point()
    )
