"""QDrop: blocks learn to round their weights while activation quantizers come and go at random."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import SILENT, UNMARKED, Batch, Marks, Progress, Simulation
from pow2quant.backends.calibration import observe
from pow2quant.backends.fake_quant import learned, power
from pow2quant.config import FROM_ZERO, SHARE
from pow2quant.errors import ConfigError
from pow2quant.frontends.copies import array
from pow2quant.methods.reconstruction import (
    Quantize,
    Step,
    blocks,
    encode_activations,
    encode_weight,
    error_moments,
    is_rounded,
    output_sqnr,
    quantizing,
    walk,
)
from pow2quant.methods.rounding import (
    LearnedRounding,
    SoftWeight,
    mixed,
    rectified_sigmoid,
    soft_weights,
    write_weights,
)
from pow2quant.pow2_constraints import Encoding, Format, Observed, choose, power_of_two
from pow2quant.pow2_constraints.arithmetic import EXPONENTS

HEAD_STEM_BITS = 8


class LearnedScale:
    """The scale of an activation as 2^theta, theta a parameter; under the constraint 2^round(theta).

    Straight through both roundings: dL/dtheta = ln 2 * s * dL/ds (TQT, Jain et al. 2020, eq. 7), where dx_q/ds is
    round(x/s) - x/s, or the end of the grid where x saturates (LSQ, Esser et al. 2020, eq. 3).
    """

    def __init__(self, encoding: Encoding, device: torch.device) -> None:
        self._before = encoding
        self.theta = nn.Parameter(torch.tensor(math.log2(encoding.scale), device=device))
        self._low, self._high = (float(q - encoding.zero_point) for q in (encoding.grid.qmin, encoding.grid.qmax))

    def quantize(self, x: Tensor) -> Tensor:
        """x on the grid, differentiable in x and theta."""
        return learned(x, self.theta, self._scale(), (self._low, self._high), None, math.log(2))

    def _scale(self) -> float | Tensor:
        """As `learned` takes it: only a CPU's is read. Elsewhere `encoding` says whether theta has gone astray."""
        if self.theta.device.type == "cpu":
            return float(2.0 ** self._exponent())
        theta = self.theta.detach().clamp(EXPONENTS[0], EXPONENTS[-1])
        return power(theta.round()) if self._before.is_power_of_two else theta.exp2()

    def encoding(self) -> Encoding:
        """The encoding as it is now. Raises ConfigError where theta is not within what scales can be."""
        k = self._exponent()
        scale = power_of_two(k) if isinstance(k, int) else np.array(2.0**k, np.float32)
        return Encoding(scale, self._before.zero_point, self._before.grid)

    @torch.no_grad()
    def reset(self) -> None:
        """Takes the scale back to where it was."""
        self.theta.fill_(math.log2(self._before.scale))

    def _exponent(self) -> float:
        theta = float(self.theta.detach())
        if not EXPONENTS[0] <= theta <= EXPONENTS[-1]:  # NaN is not, either
            raise ConfigError(f"qdrop: learning has taken an activation's scale to 2^{theta:g}; lower lr_activation")
        return round(theta) if self._before.is_power_of_two else theta


@dataclass(frozen=True)
class QDrop(LearnedRounding):
    """QDrop: blocks reconstructed while their activation quantizers are dropped at random (Wei et al. 2022).

    AdaRound's equations, block by block. drop_prob: the share of values that every activation quantizer in the block
    lets pass as they are, drawn anew in every step. lr_activation: Adam's, of log2 of the activations' scales, which
    learn during the first half, after which those that make the block no better return to calibration's; 0: all stay
    there. disable_8bit_head_stem: otherwise the weights of the first and the last layer, and what enters the last one,
    get 8 bits, whatever the plan says, as in the authors' code. Biases stay as they are.
    """

    input_prob: Annotated[float, SHARE] = 0.5
    drop_prob: Annotated[float, SHARE] = 0.5
    lr_activation: Annotated[float, FROM_ZERO] = 0.003
    disable_8bit_head_stem: bool = True

    def apply(
        self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT, marks: Marks = UNMARKED
    ) -> None:
        """Writes weights on their grids, and loads the activations' encodings and what follows from them."""
        if not self.disable_8bit_head_stem:
            widen_head_and_stem(sim, batches)
        parts = blocks(sim)
        for step in progress.track(walk(sim, batches, parts, marks), "qdrop", len(parts)):
            weights, scales = soft_weights(sim, step), learned_scales(sim, step) if self.lr_activation else {}
            if not (weights or scales):
                continue
            before = output_sqnr(sim, step)
            thetas = [scale.theta for scale in scales.values()]
            settle = partial(keep_better, sim, step, weights, scales)
            self.learn(step, weights, self._dropping(sim, scales), thetas, self.lr_activation, settle)
            encode_activations(sim, {name: scale.encoding() for name, scale in scales.items()})
            write_weights(sim, step, weights)
            names = ", ".join(layer.module for layer in step.layers)
            progress.note(f"{names}: output {before} -> {output_sqnr(sim, step)}")

    def _dropping(self, sim: Simulation, scales: dict[str, LearnedScale]) -> Quantize:
        fixed = quantizing(sim.encodings())

        def quantize(site: Site, x: Tensor) -> Tensor:
            if site.role in ("weight", "bias"):
                return fixed(site, x)
            leader = sim.placement.leader(site.name)
            quantized = scales[leader].quantize(x) if leader in scales else fixed(site, x)
            return mixed(quantized, x, 1 - self.drop_prob)

        return quantize


def learned_scales(sim: Simulation, step: Step) -> dict[str, LearnedScale]:
    """For the part's activations, by site name (of those that share an encoding, the one that leads).

    Those that share an encoding with one outside of the part are left out.
    """
    leader, table = sim.placement.leader, sim.encodings()
    own = {site.name for node in step.nodes if (site := sim.placement.quantized.get(node.name))}
    outside = {leader(site.name) for site in sim.sites if site.name not in own}
    device = step.targets[0].device
    return {n: LearnedScale(table[n], device) for n in dict.fromkeys(map(leader, sorted(own))) if n not in outside}


@torch.no_grad()
def keep_better(
    sim: Simulation, step: Step, weights: Mapping[str, SoftWeight], scales: Mapping[str, LearnedScale]
) -> None:
    """Resets, one after the other, the learned scales without which the part's error is not larger.

    A learned exponent moves to and fro between two whole numbers; here the loss decides, with nothing dropped.
    """
    soft = {name: weight.at(rectified_sigmoid(weight.v)) for name, weight in weights.items()}
    leader, before = sim.placement.leader, sim.encodings()

    def error(table: Table) -> float:
        fixed = quantizing(before | {s.name: table[leader(s.name)] for s in sim.sites if leader(s.name) in table})
        results = (step.run(x, lambda site, y: soft.get(site.name, fixed(site, y))) for x in step.inputs)
        return float(error_moments(results, step.targets)[1].sum())

    now = {name: scale.encoding() for name, scale in scales.items()}
    least = error(now)
    for name in [n for n, encoding in now.items() if encoding != before[n]]:
        without = now | {name: before[name]}
        if (found := error(without)) <= least:
            now, least = without, found
            scales[name].reset()


def widen_head_and_stem(sim: Simulation, batches: Iterable[Batch]) -> None:
    """Gives 8 bits to the first and the last layer's weights and to what enters the last one, where they have fewer.

    Float tensors and weights that are rounded already stay as they are.
    """
    layers, specs = sim.placement.layers, sim.placement.specs

    def widened(name: str, seen: Observed, axis: int | None) -> Encoding:
        spec = specs[name]
        return choose(spec.range, seen, Format(HEAD_STEM_BITS, spec.symmetric, spec.power_of_2, axis))

    def is_narrow(name: str) -> bool:
        return sim.encodings()[name].grid.width < HEAD_STEM_BITS

    source = layers[-1].input
    if source is not None and is_narrow(source.name):
        leader = sim.placement.leader(source.name)
        (seen,) = observe(sim, batches, [leader]).values()
        encode_activations(sim, {leader: widened(leader, seen, None)})
    for layer in dict.fromkeys((layers[0], layers[-1])):
        if layer.weight is not None and is_narrow(layer.weight.name) and not is_rounded(sim, layer):
            weight = array(sim.parameter(layer.weight.name))
            encode_weight(sim, layer, widened(layer.weight.name, Observed.of(weight, layer.axis), layer.axis))
