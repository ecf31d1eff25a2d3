"""Weight exponents by the error of the layer's output, instead of the weight's own error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.backends.calibration import with_room_for_bias
from pow2quant.config import integer
from pow2quant.methods.reconstruction import (
    Step,
    encode_weight,
    error_moments,
    is_rounded,
    quantizing,
    sqnr_db,
    walk,
)
from pow2quant.pow2_constraints import Encoding

FREE_STEP = 2.0**0.125
"""Free scales that are candidates lie so far apart."""


def least_error(encodings: Sequence[Encoding], errors: NDArray[np.float64]) -> Encoding:
    """Per channel the candidate of least error, of equal ones the first; for one scale per tensor that of least sum.

    encodings: alike but for their scales. errors: (candidates, C).
    """
    first = encodings[0]
    if first.axis is None:
        return encodings[int(errors.sum(1).argmin())]
    scales = np.stack([e.scale for e in encodings])
    return Encoding(np.take_along_axis(scales, errors.argmin(0)[None], 0)[0], first.zero_point, first.grid, first.axis)


@dataclass(frozen=True)
class OutputMse:
    """Weight exponents of least output error, layer by layer (the loss of AdaRound, Nagel et al. 2020, eq. 25).

    Every channel takes, of the `candidates` exponents around its current one, that of least E[(W_q x_q - W x)^2]: x_q
    from the part that is quantized already, x from the float network, before the activation function. centered: of
    least variance instead; the mean is left to `bias_correction`. Free scales: candidates lie 2^(1/8) apart. Layers
    whose weights lie on their grid already keep it.
    """

    candidates: Annotated[int, integer(2, 33)] = 5
    centered: bool = True

    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Loads the chosen encodings, and the lattices of the biases that follow from them."""
        for step in progress.track(walk(sim, batches), "output_mse", len(sim.placement.layers)):
            if step.layer.weight is None or is_rounded(sim, step.layer):
                continue
            encodings = list(self._around(sim, step))
            moments = [_moments(step, e) for e in encodings]
            errors = torch.stack([square - mean**2 if self.centered else square for mean, square in moments])
            chosen = least_error(encodings, errors.numpy())
            encode_weight(sim, step.layer, chosen)
            before, after = (sqnr_db(step.targets, square) for _, square in (moments[0], _moments(step, chosen)))
            progress.note(f"{step.layer.module}: output {before} -> {after}")

    def _around(self, sim: Simulation, step: Step) -> Iterator[Encoding]:
        """The current encoding, then its neighbours, the nearest first, as their biases have room."""
        layer, table = step.layer, sim.encodings()
        assert layer.weight is not None
        now = table[layer.weight.name]
        ratio = 2.0 if now.is_power_of_two else FREE_STEP
        for i in range(self.candidates):
            factor = np.float32(ratio ** ((i + 1) // 2 * (-1) ** i))
            table[layer.weight.name] = Encoding(now.scale * factor, now.zero_point, now.grid, now.axis)
            yield with_room_for_bias(sim, layer, table)


@torch.no_grad()
def _moments(step: Step, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Per output channel the error's mean and mean square, when nothing of the layer but its weight is quantized."""
    assert step.layer.weight is not None
    quantize = quantizing({step.layer.weight.name: encoding})
    return error_moments((step.run(x, quantize) for x in step.inputs), step.targets)
