"""AdaRound, layer by layer, or block by block as in BRECQ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from pow2quant.artifact import Site
from pow2quant.backends.base import SILENT, UNMARKED, Batch, Marks, Progress, Simulation
from pow2quant.config import one_of
from pow2quant.methods.reconstruction import Part, Quantize, blocks, layers, output_sqnr, quantizing, walk
from pow2quant.methods.rounding import LearnedRounding, soft_weights, write_weights


def activated_layers(sim: Simulation) -> list[Part]:
    """Every weighted layer, with the activation function that alone reads it: the f_a of eq. 25."""
    return [(node, *node.users) if node.name in sim.placement.fused else (node,) for (node,) in layers(sim)]


PARTS = {"layer": activated_layers, "block": blocks}
GRANULARITY = one_of(lambda: PARTS)


@dataclass(frozen=True)
class AdaRound(LearnedRounding):
    """AdaRound: weights learn to be rounded up or down (Nagel et al. 2020); by blocks it is BRECQ (Li et al. 2021).

    Inputs from the part that is quantized already, targets from the float network, behind the activation function
    (eq. 25). granularity: `layer`, or `block`: the shortest parts that one tensor enters and one leaves, within which
    activations are quantized. The loss is the squared error, not weighted by Fisher information. Scales and biases stay
    as they are; weights that lie on their grid already keep it.
    """

    granularity: Annotated[str, GRANULARITY] = "layer"

    def apply(
        self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT, marks: Marks = UNMARKED
    ) -> None:
        """Writes the weights, on their grids."""
        parts = PARTS[self.granularity](sim)
        for step in progress.track(walk(sim, batches, parts, marks), "adaround", len(parts)):
            weights = soft_weights(sim, step)
            if not weights:
                continue
            inside, result = quantizing(sim.encodings()), sim.placement.quantized.get(step.nodes[-1].name)

            def quantize(site: Site, x: Tensor, inside: Quantize = inside, result: Site | None = result) -> Tensor:
                return x if site == result else inside(site, x)

            before = output_sqnr(sim, step, quantize)
            self.learn(step, weights, quantize)
            write_weights(sim, step, weights)
            names = ", ".join(layer.module for layer in step.layers)
            progress.note(f"{names}: output {before} -> {output_sqnr(sim, step, quantize)}")
