"""Weight exponents by the noise that a weight's rounding adds to the layer's output, biases corrected on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pow2quant.artifact import Site
from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.backends.calibration import coarse_enough
from pow2quant.config import integer
from pow2quant.methods.bias_correction import correct_bias
from pow2quant.methods.reconstruction import Quantize, Step, encode_weight, error_moments, is_rounded, quantizing, walk
from pow2quant.pow2_constraints import Encoding

FREE_STEP = 2.0**0.125
"""Free scales that are candidates lie so far apart."""


def rounding_noise(results: Iterable[Tensor], centered: bool = True) -> Tensor:
    """Per channel Var[(W_q - W) x_q], float64 (C,); not centered: E[((W_q - W) x_q)^2].

    results: batches of (W_q - W) x_q, (N, C, …): what the layer computes with its weight's rounding error for a weight.
    The error of the output, W_q x_q - W x, is that plus W (x_q - x). The second part was there before this layer's
    exponents are chosen. Counting it (AdaRound's loss, Nagel et al. 2020, eq. 25) lets exponents follow the chance
    correlation of both on the calibration images; without it they are those of least noise for what really enters. The
    mean is a constant that the bias takes up (Nagel et al. 2019, eq. 1), hence the variance.
    """
    mean, square = error_moments(results, None)
    return square - mean**2 if centered else square


def least_error(encodings: Sequence[Encoding], errors: NDArray[np.float64]) -> Encoding:
    """Per channel the candidate of least error, of equal ones the first; for one scale per tensor that of least sum.

    encodings: alike but for a factor in each channel's scales. errors: (candidates, C).
    """
    first = encodings[0]
    if first.axis is None:
        return encodings[int(errors.sum(1).argmin())]
    scales = np.stack([e.scale for e in encodings])
    best = np.broadcast_to(first.beside_scale(errors.argmin(0)), first.scale.shape)
    return replace(first, scale=np.take_along_axis(scales, best[None], 0)[0])


@dataclass(frozen=True)
class OutputMse:
    """Weight exponents of least output noise, and biases that follow, in one walk (ours; after Nagel et al. 2020).

    Every channel takes, of the `candidates` exponents around its current one, that of least Var[(W_q - W) x_q]: x_q
    from the part that is quantized already, weights and biases. not centered: of least mean square. Free scales:
    candidates lie 2^(1/8) apart. Layers whose weights lie on their grid already keep it. bias: then the layer's bias is
    corrected as `bias_correction` does, before the next layer is looked at; otherwise biases stay as they are.
    """

    deterministic: ClassVar[bool] = True
    takes_blocks: ClassVar[bool] = True

    candidates: Annotated[int, integer(2, 33)] = 5
    centered: bool = True
    bias: bool = True

    @torch.no_grad()
    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Loads the chosen encodings, writes the biases, and loads their lattices."""
        for step in progress.track(walk(sim, batches), "output_mse", len(sim.placement.layers)):
            if step.layer.weight is not None and not is_rounded(sim, step.layer):
                self.choose_encoding(sim, step)
            if self.bias:
                correct_bias(sim, step, progress)

    @torch.no_grad()
    def choose_encoding(self, sim: Simulation, step: Step) -> None:
        """Loads the chosen encoding of one layer's weight, and its bias's lattice."""
        encodings = list(self._around(sim, step))
        noise = torch.stack([self._noise(step, e) for e in encodings])
        encode_weight(sim, step.layer, least_error(encodings, noise.numpy()))

    def _around(self, sim: Simulation, step: Step) -> Iterator[Encoding]:
        """The current encoding, then its neighbours, the nearest first, as their biases fit."""
        layer, table = step.layer, sim.encodings()
        assert layer.weight is not None
        now = table[layer.weight.name]
        ratio = 2.0 if now.is_power_of_two else FREE_STEP
        for i in range(self.candidates):
            factor = np.float32(ratio ** ((i + 1) // 2 * (-1) ** i))
            table[layer.weight.name] = replace(now, scale=now.scale * factor)
            yield coarse_enough(sim, layer, table)

    def _noise(self, step: Step, encoding: Encoding) -> Tensor:
        assert step.layer.weight is not None
        difference = _difference(step.layer.weight.name, encoding)
        return rounding_noise((step.run(x, difference) for x in step.inputs), self.centered)


def _difference(name: str, encoding: Encoding) -> Quantize:
    """At the named weight its rounding error, 0 for the layer's bias."""
    rounded = quantizing({name: encoding})

    def difference(site: Site, x: Tensor) -> Tensor:
        return rounded(site, x) - x if site.name == name else torch.zeros_like(x) if site.role == "bias" else x

    return difference
