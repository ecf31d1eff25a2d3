"""AIMET's batch norm re-estimation on `custom`, where batch norm is folded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from pow2quant.errors import ConfigError
from pow2quant.methods.bn_reestimation import BnReestimation
from pow2quant.quantsim.calling import call, entering

if TYPE_CHECKING:
    from pow2quant.quantsim.prepared import PreparedSim


class Handle:
    """Undoes what was done, once: by `remove`, or at the end of a `with` block."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Undoes it."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def reestimate_bn_stats(
    sim: PreparedSim,
    dataloader: Iterable[Any],
    num_batches: int = 100,
    forward_fn: Callable[[Any, Any], Any] | None = None,
) -> Handle:
    """Gives every channel of a layer with a bias, as all have that had a batch norm, its mean and deviation in float.

    The weights take the deviations, the biases the means (`methods.bn_reestimation`), as if the folded norms took their
    statistics from the quantized network. Encodings of weights and activations stay. Returns what undoes it.
    forward_fn: (model, element of the loader) -> anything. Raises ConfigError without encodings, DataError for no data.
    """
    if not all(s.name in sim.encodings() for s in sim.sites):
        raise ConfigError("reestimate_bn_stats: call sim.compute_encodings before")
    batches = entering(sim.model, dataloader, forward_fn or call, num_batches)
    before, parameter = sim.encodings(), sim.simulation.parameter
    kept = {name: parameter(name).detach().clone() for name, _ in sim.simulation.network.named_parameters()}

    @torch.no_grad()
    def undo() -> None:
        for name, value in kept.items():
            parameter(name).copy_(value)
        sim.simulation.load(before)

    try:
        with sim.resting():
            BnReestimation().apply(sim.simulation, batches)
    except BaseException:
        undo()
        raise
    return Handle(undo)
