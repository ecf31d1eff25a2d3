"""AIMET's SeqMSE on `custom`: the scales of weights by what their rounding does to each layer's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from pow2quant.errors import ConfigError
from pow2quant.methods.output_mse import OutputMse
from pow2quant.methods.reconstruction import walk
from pow2quant.quantsim.calling import call, entering
from pow2quant.quantsim.prepared import PreparedSim

if TYPE_CHECKING:
    from torch import nn


def apply_seq_mse(
    sim: PreparedSim,
    data_loader: Iterable[Any],
    num_candidates: int = 20,
    forward_fn: Callable[[Any, Any], Any] = call,
    modules_to_exclude: Collection[nn.Module] | None = None,
    checkpoints_config: str | None = None,
    cache_dir: str | None = None,
) -> None:
    """Chooses and freezes the encodings of weights, layer by layer; then `compute_encodings` chooses the others.

    Each output channel takes the exponent whose rounding adds the least mean squared error to the layer's output, of as
    many as there are powers of two from 1 to `num_candidates` (20: five), for inputs of the part that is quantized
    already, activations included. All weighted layers take part; encodings that are frozen stay.
    forward_fn: (model, element of the loader) -> anything. modules_to_exclude: their encodings stay free.
    Raises ConfigError for `checkpoints_config` and `cache_dir`, DataError for no data.
    """
    for key, value in {"checkpoints_config": checkpoints_config, "cache_dir": cache_dir}.items():
        if value is not None:
            raise ConfigError(f'apply_seq_mse: {key} is not supported; leave it out, or use backend="aimet"')
    if num_candidates < 2:
        raise ConfigError(f"apply_seq_mse: num_candidates: {num_candidates} is not 2 or more")
    excluded = _names(sim, modules_to_exclude or ())
    weights = {s.name for s in sim.sites if s.role == "weight" and s.module not in excluded} - sim.frozen
    batches, before = entering(sim.model, data_loader, forward_fn), sim.encodings()
    held = {name: e for name, e in before.items() if name in sim.frozen}
    search = OutputMse(num_candidates.bit_length(), centered=False)
    with sim.resting():
        try:
            sim.simulation.load(sim.simulation.calibrate(batches) | held)
            for step in walk(sim.simulation, batches):
                if step.layer.weight is not None and step.layer.weight.name in weights:
                    search.choose_encoding(sim.simulation, step)
            chosen = {name: e for name, e in sim.simulation.encodings().items() if name in weights}
        except BaseException:
            sim.simulation.load(before)
            raise
        sim.simulation.load(before | chosen)
    sim.derive_biases()
    sim.freeze(weights, True)


def _names(sim: PreparedSim, modules: Collection[nn.Module]) -> set[str]:
    """Where these modules, and those inside them, are in `sim.model`. Raises ConfigError for strangers."""
    known = {id(module): name for name, module in sim.model.named_modules()}
    for module in modules:
        if id(module) not in known:
            raise ConfigError(f"modules_to_exclude: {type(module).__name__} is no module of sim.model")
    return {known[id(part)] for module in modules for part in module.modules()}
