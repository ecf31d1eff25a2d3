"""Ternary weights, every scale 2^k: -2^a, 0 or 2^b, for each output channel or for the whole tensor.

TWN: Li, Liu 2016, "Ternary weight networks". TTQ: Zhu, Han, Mao, Dally 2017, "Trained ternary quantization". Binary:
Rastegari et al. 2016, "XNOR-Net". The equations work on rows (C, n), one for each scale; with several, a row whose
scale is far below the others' is noise, and is lifted as the choosers of k do it (`CHANNEL_SPREAD`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.backends.placement import Layer
from pow2quant.config import one_of
from pow2quant.errors import ConfigError
from pow2quant.methods.reconstruction import encode_weight, is_rounded, quantizing
from pow2quant.pow2_constraints import Encoding, IntGrid, power_of_two
from pow2quant.pow2_constraints.snap import CANDIDATES, CHANNEL_SPREAD, HIGHEST, LOWEST

DELTA = 0.7
"""TWN's threshold in units of the mean magnitude (eq. 6)."""

SHARE = 0.05
"""TTQ's threshold in units of the largest magnitude: t of eq. 9."""

APART = 2
"""So far apart are a and b at most, so that codes on the common grid of 2^min(a, b) have 4 bits, which ONNX stores."""


class Levels(NamedTuple):
    """Levels of rows (C, n): -2^a below -threshold, 2^b above threshold, otherwise 0.

    threshold: (C,). a, b: (C,), whole numbers as floats.
    """

    threshold: Tensor
    a: Tensor
    b: Tensor

    def codes(self, rows: Tensor) -> Tensor:
        """-1, 0 or 1 for every weight (C, n)."""
        t = self.threshold[:, None]
        return (rows > t).to(rows.dtype) - (rows < -t).to(rows.dtype)

    def values(self, rows: Tensor) -> Tensor:
        """-2^a, 0 or 2^b for every weight (C, n)."""
        codes = self.codes(rows)
        return codes * torch.where(codes > 0, self.b[:, None], self.a[:, None]).exp2()


def nearest_exponent(magnitude: Tensor) -> Tensor:
    """The k whose 2^k is nearest to a magnitude above 0, the larger of two: where the squared error is least.

    TWN's error over the n weights that are not zeroed, of mean magnitude m, is sum (|w| - s)^2 = sum (|w| - m)^2 +
    n (s - m)^2 (from eq. 3): least at s = m (eq. 5), and over powers of two at the one nearest to m. With m = f * 2^e,
    1/2 <= f < 1, that is 2^e from f = 3/4 on, and 2^(e - 1) below. A magnitude of 0 gives the smallest exponent.
    """
    fraction, exponent = torch.frexp(magnitude)
    k = exponent - (fraction < 0.75).to(exponent.dtype)
    return torch.where(magnitude > 0, k, LOWEST).clamp(LOWEST, HIGHEST).to(magnitude.dtype)


def twn_threshold(rows: Tensor) -> Tensor:
    """Delta = 0.7 E|w| (TWN, eq. 6). rows: (C, n) -> (C,)."""
    return DELTA * rows.abs().mean(1)


def ttq_threshold(rows: Tensor) -> Tensor:
    """Delta = t max|w| (TTQ, eq. 9). rows: (C, n) -> (C,)."""
    return SHARE * rows.abs().amax(1)


def mean_beyond(rows: Tensor, threshold: Tensor, sign: int | None = None) -> Tensor:
    """The mean magnitude of the weights beyond the threshold (TWN, eq. 5); sign: of one side's only. (C, n) -> (C,).

    Where there are none it is 0.
    """
    magnitudes = rows.abs() if sign is None else sign * rows
    beyond = (magnitudes > threshold[:, None]).to(rows.dtype)
    return (magnitudes * beyond).sum(1) / beyond.sum(1).clamp_min(1)


def twn(rows: Tensor) -> Levels:
    """TWN: the threshold of eq. 6, and the power of two that is best for it."""
    threshold = twn_threshold(rows)
    k = nearest_exponent(mean_beyond(rows, threshold))
    return _lifted(threshold, k, k)


def ttq(rows: Tensor) -> Levels:
    """TTQ's start: the threshold of eq. 9, and for each side the power of two that is best for it.

    Both at most `APART`: of such pairs that of least squared error. A side without weights takes the other's.
    """
    threshold = ttq_threshold(rows)
    means = [mean_beyond(rows, threshold, sign) for sign in (-1, 1)]
    counts = [(sign * rows > threshold[:, None]).sum(1).to(rows.dtype) for sign in (-1, 1)]
    free = [nearest_exponent(m) for m in means]
    free = [torch.where(n > 0, own, other) for n, own, other in zip(counts, free, free[::-1], strict=True)]
    low, high = torch.minimum(*free), torch.maximum(*free)
    a, b = free
    least = torch.full_like(a, torch.inf)
    for below in range(CANDIDATES):  # the lower end of APART + 1 neighbouring exponents
        start = torch.minimum(low + below, torch.maximum(low, high - APART))
        pair = [torch.minimum(torch.maximum(k, start), start + APART) for k in free]
        error = sum(n * (k.exp2() - m).square() for n, k, m in zip(counts, pair, means, strict=True))
        a, b = (torch.where(error < least, new, old) for new, old in zip(pair, (a, b), strict=True))
        least = torch.minimum(least, torch.as_tensor(error))
    return _lifted(threshold, a, b)


def optimal(rows: Tensor) -> Levels:
    """The threshold and the power of two of least squared error together.

    For a given 2^k it is rounding, so that the threshold is 2^k / 2: k is searched.
    """
    magnitudes = rows.abs()
    top = nearest_exponent(magnitudes.amax(1))
    k, least = top, torch.full_like(top, torch.inf)
    for down in range(CANDIDATES):
        scale = (top - down).exp2()[:, None]
        error = torch.minimum(magnitudes, (magnitudes - scale).abs()).square().sum(1)
        k, least = torch.where(error < least, top - down, k), torch.minimum(least, error)
    k = k.clamp(LOWEST, HIGHEST)
    return _lifted((k - 1).exp2(), k, k)


def binary(rows: Tensor) -> Levels:
    """XNOR-Net's sign(w) E|w| (eq. 6 and 7 there), with the power of two that is best: nothing is zeroed but zeros."""
    k = nearest_exponent(rows.abs().mean(1))
    return _lifted(torch.zeros_like(k), k, k)


RULES: dict[str, Callable[[Tensor], Levels]] = {"twn": twn, "ttq": ttq, "optimal": optimal, "binary": binary}


def _lifted(threshold: Tensor, a: Tensor, b: Tensor) -> Levels:
    """Exponents at most `CHANNEL_SPREAD` below the largest; where that lifts one, weights below half of it become 0."""
    floor = torch.maximum(a, b).max() - CHANNEL_SPREAD
    lifted = torch.minimum(a, b) < floor
    half = (torch.maximum(a, b).clamp_min(floor) - 1).exp2()
    return Levels(
        torch.where(lifted, torch.maximum(threshold, half), threshold), a.clamp_min(floor), b.clamp_min(floor)
    )


def rows_of(weight: Tensor, axis: int | None) -> Tensor:
    """A weight as rows (C, n), one for each scale: (64, 3, 7, 7) with axis 0 gives (64, 147), with None (1, 9408)."""
    return weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)


def restored(rows: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """The inverse of `rows_of`, in the shape of `weight`."""
    return rows.view(weight.shape) if axis is None else rows.view(weight.movedim(axis, 0).shape).movedim(0, axis)


def encoding_of(a: Tensor, b: Tensor, axis: int | None) -> Encoding:
    """The common grid of -2^a and 2^b: scale 2^min(a, b), and as many bits as the codes need, 2 to 4.

    a, b: (C,), one number each without channel axis.
    """
    negative, positive, lowest = (np.asarray(k.cpu(), np.int64) for k in (a, b, torch.minimum(a, b)))
    bits = int(max(2, (negative - lowest).max() + 1, (positive - lowest).max() + 2))
    scale = power_of_two(lowest)
    grid = IntGrid(bits, signed=True)
    zeros = np.zeros_like(lowest)
    return Encoding(scale[0], zeros[0], grid) if axis is None else Encoding(scale, zeros, grid, axis)


_RULE = one_of(lambda: RULES)


@dataclass(frozen=True)
class Ternary:
    """Weights of -2^a, 0 and 2^b (TWN, Li, Liu 2016; TTQ, Zhu et al. 2017), where the plan gives weights 2 bits.

    rule: how threshold and powers of two are chosen. `twn`: 0.7 E|w|, and one power of two that is best for it. `ttq`:
    0.05 max|w|, and one power of two for each side. `optimal`: those of least squared error. `binary`: no weight
    becomes zero. For every channel, or for the tensor, as the plan says. It is where training starts; alone it costs
    most of the accuracy. Layers whose weights lie on their grid already keep it.
    """

    rounds_weights: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    rule: Annotated[str, _RULE] = "optimal"

    @torch.no_grad()
    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Writes the weights, on their grids, and loads these. Raises ConfigError for a free scale."""
        for layer in sim.placement.layers:
            if layer.weight is None or sim.placement.specs[layer.weight.name].bits != 2 or is_rounded(sim, layer):
                continue
            if not sim.placement.specs[layer.weight.name].power_of_2:
                raise ConfigError(f"{layer.weight.name}: ternary weights are powers of two; legal: power_of_2: true")
            zeros = self._write(sim, layer)
            progress.note(f"{layer.module}: {zeros:.0%} of the weights are zero")

    def _write(self, sim: Simulation, layer: Layer) -> float:
        """Returns the share of zeros."""
        assert layer.weight is not None
        weight = sim.parameter(layer.weight.name)
        rows = rows_of(weight, layer.axis)
        levels = RULES[self.rule](rows)
        values = restored(levels.values(rows), weight, layer.axis)
        encode_weight(sim, layer, encoding_of(levels.a, levels.b, layer.axis))
        weight.copy_(quantizing(sim.encodings())(layer.weight, values))  # a bias may have lifted a scale
        return float((weight == 0).float().mean())
