"""What a target asks of exponents, met during calibration: tied sums, shifts in its range, sums in its accumulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pow2quant.artifact import Table
from pow2quant.backends.base import Simulation
from pow2quant.backends.placement import Layer, Placement
from pow2quant.errors import ConfigError
from pow2quant.frontends.copies import array
from pow2quant.frontends.operators import weight_axis
from pow2quant.pow2_constraints import Encoding, Format, Observed, power_of_two
from pow2quant.pow2_constraints.joint import at_exponent, choose_jointly

ROUNDS = 64
"""Raising one exponent may ask for another; so often at most."""


def tie(placement: Placement, observed: Mapping[str, Observed], chosen: Table) -> Table:
    """The encodings of activations, by leader, with one exponent in each tied group.

    Raises ConfigError, naming the tensor, for a free scale.
    """
    tied = dict(chosen)
    for group in placement.tied:
        names = list(dict.fromkeys(placement.leader(name) for name in group))
        specs = [placement.specs[name] for name in names]
        free = [name for name, spec in zip(names, specs, strict=True) if not spec.power_of_2]
        if free:
            raise ConfigError(f"{free[0]}: a free scale; target {placement.target.name} ties exponents of sums")
        if any(name not in observed for name in names):
            continue
        forms = [Format(spec.bits, spec.symmetric) for spec in specs]
        rules = {spec.range for spec in specs}
        rule = "minmax" if rules == {"minmax"} else "mse"
        tied |= dict(zip(names, choose_jointly(rule, [observed[n] for n in names], forms), strict=True))
    return tied


def fit_accumulator(sim: Simulation, layer: Layer, table: Mapping[str, Encoding]) -> Encoding:
    """The encoding of a layer's weight, its exponents raised until all partial sums fit the target's accumulator.

    Raises ConfigError, naming the layer, where no weight would be left that is not zero.
    """
    assert layer.weight is not None
    weight, bits = table[layer.weight.name], sim.placement.target.limits.accumulator_bits
    if bits is None or layer.input is None or layer.input.name not in table:
        return weight
    for _ in range(ROUNDS):
        rows, sums = _sums(sim, layer, {**table, layer.weight.name: weight})
        over = sums >= 2 ** (bits - 1)
        if not rows.any() and sim.parameter(layer.weight.name).any():
            raise ConfigError(
                f"{layer.module}: its sums do not fit {bits} bits, as target {sim.placement.target.name} asks "
                "(limits.accumulator_bits), however coarse its weights are"
            )
        if not over.any():
            break
        steps = weight.beside_scale(over) if weight.scale.ndim else over.any()
        weight = replace(weight, scale=power_of_two(weight.exponent + steps))
    return weight


def _sums(
    sim: Simulation, layer: Layer, table: Mapping[str, Encoding]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The weight's integers, a row per output channel, and the largest magnitude of its partial sums, (C,).

    That is of w * (q - zero), with the bias.
    """
    assert layer.weight is not None
    assert layer.input is not None
    weight, source = table[layer.weight.name], table[layer.input.name]
    units = weight.per_channel
    values = array(sim.parameter(layer.weight.name))
    module = sim.network.get_submodule(layer.module)
    axis = weight_axis(module)
    codes = np.moveaxis(units.quantize(weight.fake_quantize(values)), 0 if axis is None else axis, 0)
    rows = codes.reshape(len(codes), -1).astype(np.float64)
    low, high = (int(q - source.zero_point) for q in (source.grid.qmin, source.grid.qmax))
    up, down = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
    bias = np.zeros(len(rows))
    if layer.bias is not None and len(rows) == len(parameter := sim.parameter(layer.bias.name)):
        bias = np.rint(parameter.detach().cpu().double().numpy() / (source.scale * units.scale))
    largest = up * high + down * low + np.maximum(bias, 0), -(up * low + down * high + np.minimum(bias, 0))
    return rows, np.maximum(*largest)


def require(placement: Placement, table: Table) -> None:
    """Raises ConfigError, naming tensor and rule, where encodings are none that the target takes.

    Methods and training may have chosen others than calibration did.
    """
    name = placement.target.name
    for group in placement.tied:
        exponents = {n: int(table[n].exponent) for n in group if n in table}
        if len(set(exponents.values())) > 1:
            found = ", ".join(f"2^{k} ({n})" for n, k in exponents.items())
            raise ConfigError(
                f"{group[0]}: the tensors of a sum have other exponents: {found}; target {name} ties them"
            )
    raised = dict(table)
    if layer := _raise_products(placement, {}, raised):
        raise ConfigError(f"{layer}: its shift is outside of limits.product_shift of target {name}")
    if result := _raise_sums(placement, {}, raised):
        raise ConfigError(f"{result}: a shift of its operands is outside of limits.sum_shift of target {name}")


def fit_shifts(placement: Placement, observed: Mapping[str, Observed], table: Table) -> Table:
    """The table with every requantization's shift within the target's range.

    Exponents are only raised: a weight's where the shift is too large, a result's where it is too small; a coarser
    scale saturates nothing. Raises ConfigError, naming the layer, where that does not end.
    """
    limits = placement.target.limits
    if limits.product_shift is None and limits.sum_shift is None:
        return table
    fitted = dict(table)
    for _ in range(ROUNDS):
        name = _raise_products(placement, observed, fitted) or _raise_sums(placement, observed, fitted)
        if not name:
            return fitted
    raise ConfigError(
        f"{name}: no exponents have shifts that target {placement.target.name} can do "
        f"(limits.product_shift: {limits.product_shift}, limits.sum_shift: {limits.sum_shift})"
    )


def _raise_products(placement: Placement, observed: Mapping[str, Observed], table: Table) -> str:
    """Raises what the first layer out of range needs, and returns its name; "" where there is none."""
    ends = placement.target.limits.product_shift
    if ends is None:
        return ""
    for layer in placement.layers:
        result = placement.results.get(layer.module)
        if layer.weight is None or layer.input is None or result is None:
            continue
        weight, source, target = (table.get(s.name) for s in (layer.weight, layer.input, result))
        if weight is None or source is None or target is None:
            continue
        shift = target.exponent - (source.exponent + weight.per_channel.exponent)
        if (shift < ends[0]).any():
            _raise(placement, observed, table, result.name, int(ends[0] - shift.min()))
            return layer.module
        if (shift > ends[1]).any():
            raised = power_of_two(weight.exponent + weight.beside_scale(np.maximum(shift - ends[1], 0)))
            table |= placement.of_weight(layer, replace(weight, scale=raised))
            return layer.module
    return ""


def _raise_sums(placement: Placement, observed: Mapping[str, Observed], table: Table) -> str:
    """The same for the inputs of the first sum out of range."""
    ends = placement.target.limits.sum_shift
    for result, operands in placement.sums if ends is not None else ():
        assert ends is not None
        for operand in operands:
            if result not in table or operand not in table:
                continue
            shift = int(table[result].exponent - table[operand].exponent)
            if not ends[0] <= shift <= ends[1]:
                name, steps = (result, ends[0] - shift) if shift < ends[0] else (operand, shift - ends[1])
                _raise(placement, observed, table, name, steps)
                return result
    return ""


def _raise(placement: Placement, observed: Mapping[str, Observed], table: Table, name: str, steps: int) -> None:
    """Raises the exponent of an activation, and of all that are tied to it."""
    leader = placement.leader(name)
    group = next((g for g in placement.tied if any(placement.leader(n) == leader for n in g)), (name,))
    leaders = {placement.leader(n) for n in group} | {leader}
    for each in {n for n in placement.specs if placement.leader(n) in leaders} & table.keys():
        encoding, form = table[each], Format(placement.specs[each].bits, placement.specs[each].symmetric)
        k = int(encoding.exponent) + steps
        if placement.leader(each) in observed:
            table[each] = at_exponent(observed[placement.leader(each)], form, k)
        else:  # calibrated before: the middle of the range stays where it is
            zero = 0 if form.symmetric else 2 * round(int(encoding.zero_point) / 2 ** (steps + 1))
            table[each] = replace(encoding, scale=power_of_two(k), zero_point=np.array(zero))
