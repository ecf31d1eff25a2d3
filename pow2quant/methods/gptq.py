"""GPTQ: weights are rounded one after the other, and those still to come make up for each error at once.

Frantar, Ashkboos, Hoefler & Alistarh 2023, "OPTQ: accurate quantization for generative pre-trained transformers". The
aim makes up, in part, for the errors of the layers in front, as in Zhang et al. 2025, "Qronos: correcting the past by
shaping the future". Under 2^k the scale is chosen by the error that the rounded row leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from pow2quant.backends.base import SILENT, Batch, Progress, Simulation, inputs
from pow2quant.config import ABOVE_ZERO, SHARE, integer
from pow2quant.methods.gpfq import KINDS, RATE, Grid, grid_of, samples_of
from pow2quant.methods.output_mse import least_error
from pow2quant.methods.reconstruction import encode_weight, is_rounded, output_sqnr, walk, write_bias
from pow2quant.pow2_constraints import Encoding

BLOCK = 128
"""So many columns are finished before what they leave goes to all columns behind them (section 3.3, step 2)."""

LARGEST = 1 << 13
"""Layers with more inputs stay as they are: the matrices take the square of it."""

PRECISION = 1e-5
"""Sums of products in float32 are off by less than this share: at least so much of the mean's square is added."""


@dataclass(frozen=True)
class Moments:
    """Of what meets the weights of one neuron, about the mean, for every group.

    gram: E[x~ x~^T], cross: E[x x~^T], (groups, K, K); x enters the float layer, x~ the quantized one. mean: of x,
    quantized_mean: of x~, (groups, K). All float64.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    quantized_mean: Tensor

    @classmethod
    def of(cls, samples: Iterable[tuple[Tensor, Tensor]]) -> Moments:
        """Of pairs (x, x~), each (groups, m, K)."""
        count, sums = 0, [torch.zeros((), dtype=torch.float64)] * 4
        for exact, quantized in samples:
            count += exact.shape[1]
            new = (quantized.mT @ quantized, exact.mT @ quantized, exact.sum(1), quantized.sum(1))
            sums = [s + x.double() for s, x in zip(sums, new, strict=True)]
        gram, cross, mean, quantized_mean = (s / count for s in sums)
        gram = gram - quantized_mean[..., :, None] * quantized_mean[..., None, :]
        return cls(gram, cross - mean[..., :, None] * quantized_mean[..., None, :], mean, quantized_mean)


@dataclass(frozen=True)
class Rows:
    """The problem of a layer: rows that stand for the float layer on the quantized input, and how errors spread.

    target: (groups, n, K), columns in the order in which they are rounded. spread: U with U^T U = (gram + damping)^-1,
    upper triangular, (groups, K, K). order: of the columns, (groups, K).
    """

    target: Tensor
    spread: Tensor
    order: Tensor

    @classmethod
    def of(cls, weight: Tensor, moments: Moments, damping: float, correction: float) -> Rows:
        """weight: (groups, n, K). damping: share of the gram's mean diagonal that is added to it.

        correction: how far the target goes from what the float row makes of x~ to what it makes of x.
        """
        gram = moments.gram
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        unsure = PRECISION * moments.quantized_mean.square().mean(-1) + torch.finfo(torch.float32).tiny
        ridge = torch.maximum(damping * diagonal.mean(-1), unsure)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        damped = gram + ridge[..., None, None] * eye
        aim = weight @ (torch.lerp(gram, moments.cross, correction) + ridge[..., None, None] * eye)
        target = torch.linalg.solve(damped, aim.mT).mT
        order = torch.sort(diagonal, dim=-1, descending=True, stable=True).indices
        ordered = damped.gather(-2, order[..., None].expand_as(damped))
        ordered = ordered.gather(-1, order[..., None, :].expand_as(damped))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        spread = torch.linalg.cholesky(inverse, upper=True)
        return cls(target.gather(-1, order[..., None, :].expand_as(target)), spread, order)

    def rounded(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Codes (groups, n, K), columns as the weight has them, and the squared error of every row, (groups, n)."""
        left, codes = self.target.clone(), torch.empty_like(self.target)
        scale = grid.of_each(self.target).gather(-1, self.order[..., None, :].expand_as(left))
        error = self.target.new_zeros(self.target.shape[:-1])
        width = left.shape[-1]
        for start in range(0, width, BLOCK):
            end = min(start + BLOCK, width)
            off = left.new_zeros(*left.shape[:-1], end - start)
            for t in range(start, end):
                codes[..., t] = (left[..., t] / scale[..., t]).round().clamp(grid.low, grid.high)
                e = (left[..., t] - codes[..., t] * scale[..., t]) / self.spread[..., t, t, None]
                left[..., t + 1 : end] -= e[..., None] * self.spread[..., None, t, t + 1 : end]
                off[..., t - start] = e
            left[..., end:] -= off @ self.spread[..., start:end, end:]
            error += off.square().sum(-1)
        return torch.empty_like(codes).scatter(-1, self.order[..., None, :].expand_as(codes), codes), error


@dataclass(frozen=True)
class Gptq:
    """GPTQ on quantized inputs, layer by layer, and the exponent that leaves the least error (Frantar et al. 2023).

    Weights are rounded in order of their input's variance; what each leaves is made up for by those still to come.
    Means are kept by the bias. Fully connected layers and convolutions, with groups too; transposed ones, those of more
    than 8,192 inputs, and those whose weights lie on their grid are left as they are.

    damping: added to the inputs' covariance, as a share of its mean diagonal. correction: 0 aims at what the float row
    makes of the quantized input, 1 at what it makes of the float network's, which shrinks weights where the input is
    noisy. exponents: so many scales below and above the calibrated one are tried; 0: it stays. retain_rate: share of a
    convolution's patches that are looked at, drawn anew for every layer.
    """

    rounds_weights: ClassVar[bool] = True
    takes_blocks: ClassVar[bool] = True

    damping: Annotated[float, ABOVE_ZERO] = 0.01
    correction: Annotated[float, SHARE] = 0.5
    exponents: Annotated[int, integer(0, 8)] = 1
    retain_rate: Annotated[float, RATE] = 0.25

    @torch.no_grad()
    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Writes weights that lie on their grids, biases, and the encodings that were chosen."""
        data = [inputs(batch) for batch in batches]
        for step in progress.track(walk(sim, data), "gptq", len(sim.placement.layers)):
            layer, module = step.layer, sim.network.get_submodule(step.layer.module)
            if layer.weight is None or not isinstance(module, KINDS) or is_rounded(sim, layer):
                continue
            if module.weight[0].numel() > LARGEST:
                progress.note(
                    f"{layer.module}: {module.weight[0].numel():,} inputs are too many for gptq; left as it is"
                )
                continue
            before = output_sqnr(sim, step)
            weight = sim.parameter(layer.weight.name)
            wide = module.weight.to(weight.device, torch.float64)
            groups = int(getattr(module, "groups", 1))
            moments = Moments.of(samples_of(step, module, self.retain_rate))
            floats = wide.view(groups, len(wide) // groups, -1)
            rows = Rows.of(floats, moments, self.damping, self.correction)
            chosen = self._encoding(rows, sim.encodings()[layer.weight.name])
            if chosen != sim.encodings()[layer.weight.name]:
                encode_weight(sim, layer, chosen)
            grid = grid_of(sim.encodings()[layer.weight.name], floats)
            codes, _ = rows.rounded(grid)
            made = codes * grid.of_each(codes)
            weight.copy_(made.view(weight.shape).float())
            if module.bias is not None:
                shift = floats @ moments.mean[..., None] - made @ moments.quantized_mean[..., None]
                write_bias(sim, layer, (module.bias.to(wide) + shift.flatten()).float())
            progress.note(f"{layer.module}: output {before} -> {output_sqnr(sim, step)}")

    def _encoding(self, rows: Rows, now: Encoding) -> Encoding:
        """Of the scales beside the calibrated one, for each channel that with the least error; blocks move together."""
        candidates = [
            replace(now, scale=now.scale * np.float32(2.0**i)) for i in range(-self.exponents, self.exponents + 1)
        ]
        errors = torch.stack([rows.rounded(grid_of(c, rows.target))[1].flatten() for c in candidates])
        return least_error(candidates, errors.cpu().numpy())
