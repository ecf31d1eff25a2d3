"""Calibration: what is observed, and which encodings follow. The same for every backend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import ALL, Batch, Simulation, device_of, inputs, sent
from pow2quant.backends.fitting import fit_accumulator, fit_shifts, tie
from pow2quant.backends.placement import Layer, Placement
from pow2quant.errors import ConfigError, DataError, EncodingError, WeightsError
from pow2quant.frontends.copies import array
from pow2quant.pow2_constraints import Encoding, Format, IntGrid, Observed, ceil_exponent, choose, power_of_two
from pow2quant.pow2_constraints.blocks import choose_blocks
from pow2quant.reading import Signature, read

SAMPLE = 1 << 14
"""Values of every tensor and batch that a chooser sees, besides the extremes of all."""

BIAS_BITS = range(22, 31)
"""A bias has at most this many bits in units of s_in * s_w, whatever the widths."""


def calibrate(sim: Simulation, batches: Iterable[Batch], roles: Collection[str]) -> Table:
    """Chooses the encodings of the sites with these roles and loads them; see `Simulation.calibrate`.

    Weights take theirs from themselves. Activations are observed unquantized: in the float network when weights are
    chosen too (what rounding does to them is no property of the ranges behind), otherwise behind the weights as they
    are quantized now. Then the scales of near-dead channels rise until their biases fit, and the biases take the
    lattice s_in * s_w.

    Whatever runs the model while `batches` is being iterated is observed as well, so that an iterable may run a user's
    callback and yield nothing.
    """
    unknown = set(roles) - ALL
    if unknown:
        raise ConfigError(f"roles: {', '.join(sorted(unknown))} is unknown; known are {', '.join(sorted(ALL))}")
    before = sim.encodings()
    try:
        sim.load(_chosen(sim, batches, roles))
    except BaseException:
        sim.load(before)
        raise
    return sim.encodings()


def _chosen(sim: Simulation, batches: Iterable[Batch], roles: Collection[str]) -> Table:
    """The table after calibration."""
    placement = sim.placement
    table = {k: v for k, v in sim.encodings().items() if _role(placement, k) not in roles}
    sim.load(table)
    observed: dict[str, Observed] = {}
    wanted = [s for s in placement.sites if s.role in ("input", "output") and s.role in roles]
    if wanted:
        leaders = dict.fromkeys(placement.leader(s.name) for s in wanted)
        joint = {placement.leader(name) for group in placement.tied for name in group}
        extremes_only = {name for name in leaders if placement.specs[name].range == "minmax" and name not in joint}
        observed = observe(sim, batches, leaders, extremes_only)
        chosen = {name: _activation_encoding(name, seen, placement) for name, seen in observed.items()}
        chosen = tie(placement, observed, chosen)
        table |= {s.name: chosen[placement.leader(s.name)] for s in wanted}
    if "weight" in roles:
        table |= {y.weight.name: _weight_encoding(sim, y) for y in placement.layers if y.weight is not None}
    if "weight" in roles:
        coarsen(sim, placement.layers, table)
        table = fit_shifts(placement, observed, table)
    for layer in placement.layers:
        if "bias" in roles and layer.bias is not None:
            table[layer.bias.name] = bias_encoding(sim, layer, table)
    return table


def observe(
    sim: Simulation, batches: Iterable[Batch], names: Collection[str], extremes_only: Collection[str] = ()
) -> dict[str, Observed]:
    """Runs the network with weights as they are encoded now and float activations; what was seen at the named sites.

    The extremes are those of all data. The sample holds at most `SAMPLE` values per site and batch, evenly spaced by an
    odd step, so that it does not follow the rows of an image; it is empty for `extremes_only`. A site of the last step
    of a recurrent layer stands for those of all.
    Raises DataError for no batches or values that are not finite.
    """
    lows: dict[str, list[float]] = {n: [] for n in names}
    highs: dict[str, list[float]] = {n: [] for n in names}
    samples: dict[str, list[Tensor]] = {n: [] for n in names}
    seen_at = {name: sim.placement.leader(name) for name in sim.placement.steps}
    sizes = Counter(seen_at.values())

    def record(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        if site.role == "weight":
            return quantized
        if (name := seen_at.get(site.name, site.name)) in samples:
            low, high = (v.item() for v in torch.aminmax(x))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise _not_finite(site, len(lows[name]) // (1 + sizes[name]))
            lows[name].append(low)
            highs[name].append(high)
            if name not in extremes_only:
                most = -(-SAMPLE // (1 + sizes[name]))
                samples[name].append(x.flatten()[:: -(-x.numel() // most) | 1].clone())
        return x

    device = device_of(sim.model)
    with sim.intercept(record), torch.no_grad():
        for index, batch in enumerate(batches):
            sim.model(*(sent(x, device) for x in _arguments(sim, batch, index)))
    silent = [n for n in names if not lows[n]]
    if silent:
        raise DataError(f"{silent[0]}: nothing was observed; the calibration data are empty, or were not run through")
    for name in sim.placement.units.intersection(names):  # both ends come, whatever these data hold
        lows[name].append(0.0)
        highs[name].append(1.0)
    return {
        n: Observed(
            np.array([min(lows[n])], np.float32),
            np.array([max(highs[n])], np.float32),
            torch.cat(samples[n] or [torch.empty(0)]).cpu().numpy()[None],
        )
        for n in names
    }


def _arguments(sim: Simulation, batch: Any, index: int) -> tuple[Tensor, ...]:
    """The network's inputs in a batch; labels beside them, as a DataLoader gives them, are left out."""
    names = [node.name for node in sim.network.graph.nodes if node.op == "placeholder"]
    found = inputs(batch)
    if len(found) == len(names):
        return found
    return inputs(read(batch, Signature(tuple(names), len(names)), f"calibration data, batch {index}")[0])


def bias_encoding(sim: Simulation, layer: Layer, table: Mapping[str, Encoding]) -> Encoding:
    """The lattice s_in * s_w (exponents add) on a signed grid. Raises EncodingError when the bias does not fit it."""
    assert layer.bias is not None
    assert layer.input is not None
    assert layer.weight is not None
    missing = [s.name for s in (layer.input, layer.weight) if s.name not in table]
    if missing:
        raise EncodingError(f"{layer.bias.name}: needs the encoding of {missing[0]}, which has none yet")
    source, weight, bias = table[layer.input.name], table[layer.weight.name], sim.parameter(layer.bias.name)
    scale = np.broadcast_to(source.scale * weight.per_channel.scale, bias.shape)
    grid = IntGrid(sim.placement.specs[layer.bias.name].bits, signed=True)
    codes = np.rint(bias.detach().cpu().double().numpy() / scale)
    if (codes < grid.qmin).any() or (codes > grid.qmax).any():
        channel = int(np.abs(codes).argmax())
        raise EncodingError(
            f"{layer.bias.name}: channel {channel} needs the integer {codes[channel]:.0f} in units of s_in * s_w, "
            f"which does not fit {grid.bits} bits; calibrate the role weight again, or give more bits"
        )
    return Encoding(scale, np.zeros(scale.shape, np.int64), grid, 0)


def _role(placement: Placement, name: str) -> str:
    return next(s.role for s in placement.sites if s.name == name)


def _not_finite(site: Site, batch: int) -> DataError:
    """The error for NaN or infinity at a site. batch: of the calibration data."""
    if site.role == "input":
        return DataError(f"{site.name}: NaN or infinity in the calibration data, batch {batch}; leave such samples out")
    return DataError(
        f"{site.name}: the network gives NaN or infinity here, calibration batch {batch}; change its code so that "
        "values stay finite (for a mask of attention, a number such as -1e4 instead of -inf)"
    )


def _weight_encoding(sim: Simulation, layer: Layer) -> Encoding:
    assert layer.weight is not None
    name = layer.weight.name
    spec = sim.placement.specs[name]
    weight = array(sim.parameter(name))
    form = Format(spec.bits, spec.symmetric, spec.power_of_2, layer.axis)
    try:
        if layer.block is not None:
            return choose_blocks(spec.range, weight, form, layer.block)
        return choose(spec.range, Observed.of(weight, layer.axis), form)
    except EncodingError as error:
        raise WeightsError(f"{name}: {error}") from error


def _activation_encoding(name: str, seen: Observed, placement: Placement) -> Encoding:
    spec = placement.specs[name]
    return choose(spec.range, seen, Format(spec.bits, spec.symmetric, spec.power_of_2))


def settled(sim: Simulation, table: Mapping[str, Encoding]) -> Table:
    """A table that a method has changed: with exponents that biases and target take, and the lattices of biases."""
    found: Table = dict(table)
    coarsen(sim, sim.placement.layers, found)
    found = fit_shifts(sim.placement, {}, found)
    for layer in sim.placement.layers:
        if layer.bias is not None:
            found[layer.bias.name] = bias_encoding(sim, layer, found)
    return found


def coarsen(sim: Simulation, layers: Iterable[Layer], table: Table) -> None:
    """Puts the weights' encodings, `coarse_enough`, into the table; layers that share a weight have the leader's."""
    for layer in layers:
        if layer.weight is not None:
            table[layer.weight.name] = table[sim.placement.leader(layer.weight.name)]
            table |= sim.placement.of_weight(layer, coarse_enough(sim, layer, table))


def coarse_enough(sim: Simulation, layer: Layer, table: Mapping[str, Encoding]) -> Encoding:
    """The weight's encoding, its scale raised where the bias or the target's accumulator would otherwise not hold.

    Raises ConfigError, naming the layer, where no weight is coarse enough for the accumulator.
    """
    assert layer.weight is not None
    return fit_accumulator(sim, layer, {**table, layer.weight.name: _coarse_enough_for_bias(sim, layer, table)})


def _coarse_enough_for_bias(sim: Simulation, layer: Layer, table: Mapping[str, Encoding]) -> Encoding:
    """The weight's encoding, its scale raised where the bias would otherwise dwarf every product.

    That happens in near-dead channels: weights of 1e-8 beside a bias of 0.5. There a coarser weight loses nothing that
    the output's grid could show, while the accumulator stays within what float32 and int32 hold.
    """
    assert layer.weight is not None
    encoding = table[layer.weight.name]
    source = table.get(layer.input.name) if layer.bias is not None and layer.input is not None else None
    if source is None or layer.bias is None:
        return encoding
    bits = encoding.grid.width + source.grid.width + 7
    own = sim.placement.specs[layer.bias.name].bits - 1
    limit = min(max(bits, BIAS_BITS.start), BIAS_BITS.stop - 1, own)
    bias = np.abs(sim.parameter(layer.bias.name).detach().cpu().double().numpy())
    if limit == own:  # what is rounded up to 2^limit does not fit
        bias = bias / (1 - 2.0 ** -(limit + 1))
    if encoding.axis is None:
        bias = bias.max()
    if encoding.is_power_of_two and source.is_power_of_two:
        needed = np.where(bias > 0, ceil_exponent(np.where(bias > 0, bias, 1)) - limit - source.exponent, -(1 << 20))
        scale = power_of_two(np.maximum(encoding.exponent, encoding.beside_scale(needed)))
    else:
        scale = np.maximum(encoding.scale, (bias / (2.0**limit - 1) / source.scale).astype(np.float32))
    return replace(encoding, scale=scale)
