"""Batch norm re-estimation where batch norm is folded: every channel gets back its mean and its deviation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.config import integer
from pow2quant.frontends.operators import weight_axis
from pow2quant.methods.reconstruction import (
    Step,
    error_moments,
    is_rounded,
    power,
    quantizing,
    sqnr_db,
    walk,
    write_bias,
)

NOTHING = torch.zeros(())


def norm_statistics(results: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel of `count` batches (N, C, …), float64 (C,): what batch norm keeps."""
    mean, square = error_moments(results, [NOTHING] * count)
    return mean, (square - mean**2).clamp_min(0).sqrt()


def gain(deviation: Tensor, found: Tensor) -> Tensor:
    """sigma / sigma~ (C,): what the weights of a folded batch norm are multiplied by; 1 for a channel that is dead.

    gamma (y~ - mu~) / sigma~ + beta is the norm with its statistics taken anew from the quantized network (Sun et al.
    2019, "Hybrid 8-bit floating point"; Nagel et al. 2022, "Overcoming oscillations"), where gamma and beta are the
    deviation and the mean of the float network's result: (sigma / sigma~) y~ + (mu - (sigma / sigma~) mu~).
    """
    return torch.where((found > 0) & (deviation > 0), deviation / found, 1.0)


@dataclass(frozen=True)
class BnReestimation:
    """Batch norm re-estimation: deviations by the weights, means by the biases (Sun et al. 2019; Nagel et al. 2022).

    Layer by layer on the calibration data, as if the folded norm took its statistics from the quantized network. The
    gain sigma / sigma~ fits into no scale 2^k, so it goes to the float weights, which are rounded anew, `rounds` times;
    every channel keeps the round whose deviation is nearest, the first being that without a gain. Weights that lie on
    their grid already, and layers without a bias, stay as they are; 0 rounds: means only.
    """

    builds_on_exponents: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    takes_blocks: ClassVar[bool] = True

    rounds: Annotated[int, integer(0)] = 3

    @torch.no_grad()
    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Writes weights and biases, float, and the encodings of the biases that follow."""
        for step in progress.track(walk(sim, batches), "bn_reestimation", len(sim.placement.layers)):
            name = f"{step.layer.module}.bias"
            if name not in step.parameters:
                continue
            before = _error(sim, step)
            mean, deviation = norm_statistics(step.targets, len(step.targets))
            if step.layer.weight is not None and not is_rounded(sim, step.layer):
                self._scale(sim, step, deviation)
            found, _ = _found(sim, step)
            bias = sim.parameter(name)
            write_bias(sim, step.layer, bias + (mean - found).to(bias))
            progress.note(f"{step.layer.module}: output {before} -> {_error(sim, step)}")

    def _scale(self, sim: Simulation, step: Step, deviation: Tensor) -> None:
        assert step.layer.weight is not None
        weight = sim.parameter(step.layer.weight.name)
        axis = weight_axis(sim.network.get_submodule(step.layer.module))
        if axis is None:
            return  # a transposed convolution in groups: a row of its weight is in several channels
        start, factor = weight.clone(), torch.ones_like(deviation)
        best, least = factor, torch.full_like(deviation, torch.inf)
        for _ in range(self.rounds + 1):
            weight.copy_(_along(factor, start, axis))
            ratio = gain(deviation, _found(sim, step)[1])
            off = ratio.log().abs()
            best, least = torch.where(off < least, factor, best), torch.minimum(off, least)
            factor = factor * ratio
        weight.copy_(_along(best, start, axis))


def _along(factor: Tensor, weight: Tensor, axis: int) -> Tensor:
    return weight * factor.to(weight).view(-1, *[1] * (weight.ndim - axis - 1))


def _results(sim: Simulation, step: Step) -> Iterable[Tensor]:
    """What the layer computes with its weight and its inputs quantized, its bias and its result float."""
    table, weight = sim.encodings(), step.layer.weight
    quantize = quantizing({weight.name: table[weight.name]} if weight is not None else {})
    return (step.run(x, quantize) for x in step.inputs)


def _found(sim: Simulation, step: Step) -> tuple[Tensor, Tensor]:
    return norm_statistics(_results(sim, step), len(step.inputs))


def _error(sim: Simulation, step: Step) -> str:
    _, square = error_moments(_results(sim, step), step.targets)
    return sqnr_db(power(step.targets), square)
