"""What a study looks at before its trials: that networks and data load, and whether a seed changes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import torch

from pow2quant import config as configuration
from pow2quant.backends.base import SILENT, inputs
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError
from pow2quant.plugins import resolve
from pow2quant.runs.chains import with_chain
from pow2quant.runs.job import loaded
from pow2quant.study.ledger import Plan
from pow2quant.study.space import Axis, applied, combinations, settings

LOADED = ("model.name", "model.weights", "data.dataset", "data.path")
"""The keys of a configuration that say what is loaded."""


def fingerprint(config: RunConfig) -> str:
    """Of a float network's weights and its first batches. Raises Pow2QuantError for what cannot be loaded."""
    _, data, model = loaded(config, SILENT)
    digest = blake2b()
    for part in (data.calibration, data.test):
        for batch, _ in islice(part, 1):
            for tensor in inputs(batch):
                digest.update(tensor.contiguous().numpy().tobytes())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def ignores_seeds(config: RunConfig) -> bool:
    """Whether two seeds load the same network and the same data."""
    return fingerprint(config) == fingerprint(replace(config, seed=config.seed + 1))


def is_deterministic(config: RunConfig) -> bool:
    """Whether all methods of a configuration say of themselves that they draw no random numbers."""
    methods = with_chain(config, configuration.default_methods(config)).ptq.applied
    made = [configuration.parameters(resolve("methods", n), values, f"ptq.methods.{n}") for n, values in methods]
    return all(getattr(method, "deterministic", False) for method in made)


def contents(base: RunConfig, plan: Plan) -> str:
    """The `fingerprint` of all networks and data that a plan names.

    Raises Pow2QuantError where one cannot be loaded, before thirty trials say so.
    """
    found: list[tuple[Any, str]] = []
    for config in configurations(base, plan):
        what = config.model, config.data.dataset, config.data.path
        if all(what != known for known, _ in found):
            found.append((what, fingerprint(config)))
    return blake2b("".join(text for _, text in found).encode(), digest_size=8).hexdigest()


def configurations(base: RunConfig, plan: Plan) -> Iterator[RunConfig]:
    """The base with every combination of what a plan varies of networks and data."""
    for grid in plan.grids:
        varied = tuple(axis for axis in grid if _is_loaded(axis))
        for combination in combinations(varied):
            try:
                yield applied(base, settings(varied, combination))
            except ConfigError:
                continue  # the trial says so


def _is_loaded(axis: Axis) -> bool:
    keys = (axis.name,) if axis.settings is None else tuple(key for values in axis.settings for key in values)
    return any(key in LOADED for key in keys)
