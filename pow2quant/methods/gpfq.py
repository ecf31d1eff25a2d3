"""GPFQ: every neuron's weights are rounded one after the other, each so that it makes up for the errors before it.

Lybrand & Saab 2021, "A greedy algorithm for quantizing neural networks"; Zhang, Zhou & Saab 2023, "Post-training
quantization for neural networks with provable guarantees" (stochastic and sparse variants).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.backends.base import SILENT, Batch, Progress, Simulation, inputs
from pow2quant.config import ABOVE_ZERO, FROM_ZERO, finite, integer, one_of
from pow2quant.methods.patches import patches
from pow2quant.methods.reconstruction import Step, encode_weight, is_rounded, output_sqnr, walk
from pow2quant.pow2_constraints import Encoding, power_of_two

Codes = Callable[[Tensor], Tensor]
"""Reals in units of the step -> integers; the grid's ends come afterwards."""


def follow_path(weight: Tensor, exact: Tensor, quantized: Tensor, codes: Codes, grid: Grid) -> Tensor:
    """The algorithm as it is written (Zhang, Zhou & Saab 2023; with X~ = X: Lybrand & Saab 2021), all neurons at once.

    q_t = Q(<X~_t, u_(t-1) + w_t X_t> / |X~_t|^2), u_t = u_(t-1) + w_t X_t - q_t X~_t: every weight takes what the
    neuron's output still lacks. weight: (…, n, K) of n neurons; exact, quantized: X and X~, (…, m, K), what enters the
    float layer and the quantized one in m samples. Returns codes (…, n, K). Where X~_t is 0, w_t is rounded.
    """
    q = torch.empty_like(weight)
    u = weight.new_zeros(*weight.shape[:-1], exact.shape[-2])
    for t in range(weight.shape[-1]):
        x, x_q = exact[..., t].unsqueeze(-2), quantized[..., t].unsqueeze(-2)
        u = u + weight[..., t, None] * x
        norm = x_q.square().sum(-1)
        wanted = torch.where(norm > 0, (u * x_q).sum(-1) / norm, weight[..., t])
        q[..., t] = grid.codes(wanted, codes)
        u = u - (grid.scale * q[..., t])[..., None] * x_q
    return q


def follow_gram(weight: Tensor, gram: Tensor, cross: Tensor, codes: Codes, grid: Grid) -> Tensor:
    """`follow_path` from X~^T X~ and X~^T X alone, (…, K, K): K steps of K products, however many samples there were.

    <X~_t, u_(t-1) + w_t X_t> is the sum of w_j <X~_t, X_j> up to j = t less that of q_j <X~_t, X~_j> up to t - 1.
    """
    q = torch.zeros_like(weight)
    pulled = weight @ cross.tril().transpose(-1, -2)
    for t in range(weight.shape[-1]):
        made = (q[..., :t] @ gram[..., t, :t, None]).squeeze(-1) * grid.scale
        norm = gram[..., t, t, None]
        wanted = torch.where(norm > 0, (pulled[..., t] - made) / norm, weight[..., t])
        q[..., t] = grid.codes(wanted, codes)
    return q


@dataclass(frozen=True)
class Grid:
    """The alphabet of every neuron: scale times the integers from low to high; each (…, n) or ().

    Where every weight has a scale of its own, as with blocks, scale is (…, n, K).
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def of_each(self, weight: Tensor) -> Tensor:
        """The scale of each weight (…, n, K)."""
        return (self.scale if self.scale.ndim == weight.ndim else self.scale[..., None]).expand_as(weight)

    def codes(self, wanted: Tensor, codes: Codes) -> Tensor:
        """Reals (…, n) -> integers of the alphabet."""
        return codes(wanted / self.scale).clamp(self.low, self.high)


def nearest(z: Tensor) -> Tensor:
    """Half to even."""
    return z.round()


def stochastic(z: Tensor) -> Tensor:
    """Up with a probability of what is above the integer below, so that the mean is z (SGPFQ)."""
    below = z.floor()
    return below + (torch.rand_like(z) < z - below)


def soft_threshold(z: Tensor, threshold: float) -> Tensor:
    """sign(z) max(|z| - threshold, 0): what the regularizer lambda |q| makes of it (L1)."""
    return z.sign() * (z.abs() - threshold).clamp_min(0)


def hard_threshold(z: Tensor, threshold: float) -> Tensor:
    """z where |z| > threshold, otherwise 0: what a price on every weight that is not 0 makes of it (L0)."""
    return torch.where(z.abs() > threshold, z, 0)


REGULARIZERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda z, threshold: z,
    "L0": hard_threshold,
    "L1": soft_threshold,
}
REGULARIZER = one_of(lambda: REGULARIZERS)
RATE = finite("a number above 0, at most 1", lambda v: 0 < v <= 1)


@dataclass(frozen=True)
class Gpfq:
    """GPFQ: greedy path following, layer by layer (Lybrand & Saab 2021; Zhang, Zhou & Saab 2023).

    What is followed is the float network's, weights and inputs, whatever methods before have made of the weights.
    conv_scalar, linear_scalar: C of the alphabet's radius, per channel C max |w|, per tensor C times its median over
    the channels; steps are the power of two nearest to radius / 2^(bits - 1). Without them, the encodings stay.
    narrow: without the lowest code, so that the alphabet is symmetric and its ends are the radius; with 2-bit weights
    {-1, 0, 1} times the step, which the paper counts as 1 bit.
    stochastic: the code above or below by chance, with the real value as the mean. regularizer: sparse weights; `L0`
    and `L1` set to 0 what is within `lambda_` steps of it, L1 also draws the others so much nearer. (The paper's own L0
    alphabet begins at lambda, which is no grid of integers.) batch_size: images that are used, None for all.
    retain_rate: share of a convolution's patches that are looked at, drawn anew for every layer. Fully connected
    layers and convolutions with groups; transposed ones, and layers whose weights lie on their grid, stay as they are.
    """

    builds_on_exponents: ClassVar[bool] = True
    rounds_weights: ClassVar[bool] = True

    conv_scalar: Annotated[float | None, ABOVE_ZERO] = None
    linear_scalar: Annotated[float | None, ABOVE_ZERO] = None
    narrow: bool = False
    stochastic: bool = False
    regularizer: Annotated[str, REGULARIZER] = "none"
    lambda_: Annotated[float, FROM_ZERO] = 0.75
    batch_size: Annotated[int | None, integer(1)] = None
    retain_rate: Annotated[float, RATE] = 0.25

    @torch.no_grad()
    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Writes weights that lie on their grids, and loads the encodings where a scalar chooses them."""
        for step in progress.track(walk(sim, _first(batches, self.batch_size)), "gpfq", len(sim.placement.layers)):
            layer, module = step.layer, sim.network.get_submodule(step.layer.module)
            if layer.weight is None or not isinstance(module, KINDS) or is_rounded(sim, layer):
                continue
            weight = sim.parameter(layer.weight.name)
            aim = module.weight.to(weight.device)
            scalar = self.linear_scalar if isinstance(module, nn.Linear) else self.conv_scalar
            encoding = sim.encodings()[layer.weight.name]
            if self.narrow:
                encoding = replace(encoding, grid=replace(encoding.grid, narrow=True))
            if scalar is not None:
                encoding = alphabet(aim, scalar, encoding)
            if encoding != sim.encodings()[layer.weight.name]:
                encode_weight(sim, layer, encoding)
            before = output_sqnr(sim, step)
            weight.copy_(self._rounded(step, module, aim, sim.encodings()[layer.weight.name]))
            zeros = float((weight == 0).float().mean())
            progress.note(f"{layer.module}: output {before} -> {output_sqnr(sim, step)}, {zeros:.0%} zeros")

    def _codes(self, z: Tensor) -> Tensor:
        return (stochastic if self.stochastic else nearest)(REGULARIZERS[self.regularizer](z, self.lambda_))

    def _rounded(self, step: Step, module: nn.Module, weight: Tensor, encoding: Encoding) -> Tensor:
        groups = int(getattr(module, "groups", 1))
        rows = weight.double().view(groups, len(weight) // groups, -1)
        grid = grid_of(encoding, rows)
        q = self._follow(rows, samples_of(step, module, self.retain_rate), grid, few=isinstance(module, nn.Linear))
        return (q * grid.scale[..., None]).view(weight.shape).float()

    def _follow(self, rows: Tensor, samples: Iterable[tuple[Tensor, Tensor]], grid: Grid, few: bool) -> Tensor:
        """By whichever is smaller, X or X^T X, where there may be `few` samples."""
        size = rows.shape[-1]
        if few:
            samples = list(samples)
            if sum(exact.shape[1] for exact, _ in samples) < size:
                exact, quantized = (torch.cat(x, 1).double() for x in zip(*samples, strict=True))
                return follow_path(rows, exact, quantized, self._codes, grid)
        gram, cross = (rows.new_zeros(len(rows), size, size) for _ in range(2))
        for exact, quantized in samples:
            gram += quantized.mT @ quantized
            cross += quantized.mT @ exact
        return follow_gram(rows, gram, cross, self._codes, grid)


def _first(batches: Iterable[Batch], images: int | None) -> Iterator[Batch]:
    """So many images, or all."""
    left = math.inf if images is None else images
    for batch in batches:
        if left <= 0:
            return
        taken = tuple(x[: int(min(left, len(x)))] for x in inputs(batch))
        left -= len(taken[0])
        yield taken


def grid_of(encoding: Encoding, rows: Tensor) -> Grid:
    """The alphabet of an encoding of weights for every row of (groups, n, K)."""

    def per_row(values: object) -> Tensor:
        made = torch.as_tensor(np.array(values), dtype=rows.dtype, device=rows.device)
        return made.expand(rows.shape[0] * rows.shape[1]).view(rows.shape[:2])

    if encoding.block is None:
        scale = per_row(encoding.scale)
    else:
        kernel = encoding.scale.shape[2:]
        shape = rows.shape[0] * rows.shape[1], rows.shape[2] // math.prod(kernel), *kernel
        scale = torch.from_numpy(encoding.along(encoding.scale, shape)).to(rows).reshape(rows.shape)
    return Grid(scale, per_row(encoding.grid.qmin), per_row(encoding.grid.qmax))


def samples_of(step: Step, module: nn.Module, retain_rate: float) -> Iterator[tuple[Tensor, Tensor]]:
    """X and X~ batch by batch, (groups, m, K); of a convolution a share of the patches, drawn at random."""
    for (exact,), (quantized,) in zip(step.exact, step.inputs, strict=True):
        both = patches(module, exact), patches(module, quantized)
        count = both[0].shape[1]
        if isinstance(module, nn.Linear) or retain_rate == 1:
            yield both
        else:
            kept = torch.randperm(count)[: max(1, round(retain_rate * count))].to(exact.device)
            yield both[0][:, kept], both[1][:, kept]


KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def alphabet(weight: Tensor, scalar: float, now: Encoding) -> Encoding:
    """An encoding like `now`, its radius from a scalar; a channel of zeros keeps its scale.

    The radius is the lower end of the grid, of a narrow one both ends.
    """
    largest = weight.flatten(1).abs().amax(1).double().cpu().numpy()
    radius = scalar * (largest if now.axis is not None else np.median(largest))
    step = np.where(radius > 0, radius / -now.grid.qmin, now.scale)
    scale = power_of_two(np.rint(np.log2(step)).astype(np.int64)) if now.is_power_of_two else step
    return Encoding(scale, now.zero_point, now.grid, now.axis)
