"""ACIQ: clipping by the analytic error of a fitted distribution, bits per channel, and weights that keep their moments.

Banner, Nahshan, Soudry 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import erfc

from pow2quant.artifact import Table
from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.backends.calibration import observe
from pow2quant.backends.placement import Layer
from pow2quant.config import WIDTHS, finite, one_of
from pow2quant.methods.reconstruction import encode_weight, is_rounded, output_sqnr, walk
from pow2quant.pow2_constraints import Encoding, Format, Observed, choose

Floats = NDArray[np.float64]

FAR = 40.0
"""Beyond so many spreads nothing is left of any tail, in float64."""

RADII = 2.0 ** (-np.arange(48) / 4)
"""Shares of the data's largest distance from their center that are tried as clipping values for powers of two."""

CORRECTIONS = 8
"""How often the moments of the rounded weights are looked at; nothing is left to gain after."""


@dataclass(frozen=True)
class Family:
    """A symmetric density f of spread 1 about 0.

    tail: t -> integral of (x - t)^2 f(x) from t to infinity, what clipping at t costs. slope: its derivative. spread:
    the most likely spread of centered data (C, n) -> (C,). likelihood: the mean log-likelihood at that spread.
    """

    tail: Callable[[Floats], Floats]
    slope: Callable[[float], float]
    spread: Callable[[Floats], Floats]
    likelihood: Callable[[Floats], Floats]


def _laplace_tail(t: Floats) -> Floats:
    rest = np.exp(-np.abs(t))
    return np.where(t >= 0, rest, 2 + t * t - rest)


def _density(t: ArrayLike) -> Floats:
    return np.asarray(np.exp(-np.square(t) / 2) / np.sqrt(2 * np.pi), np.float64)


def _beyond(t: ArrayLike) -> Floats:
    return np.asarray(erfc(np.asarray(t) / np.sqrt(2)) / 2, np.float64)


FAMILIES = {
    "laplace": Family(
        tail=_laplace_tail,
        slope=lambda t: -float(np.exp(-t)),
        spread=lambda x: np.asarray(np.abs(x).mean(1)),
        likelihood=lambda b: -np.log(2 * b) - 1,
    ),
    "gauss": Family(
        tail=lambda t: (1 + t * t) * _beyond(t) - t * _density(t),
        slope=lambda t: -2 * float(_density(t) - t * _beyond(t)),
        spread=lambda x: np.sqrt(np.square(x).mean(1)),
        likelihood=lambda s: -np.log(2 * np.pi * s * s) / 2 - 0.5,
    ),
}
METHODS = (*FAMILIES, "auto")
METHOD = one_of(lambda: METHODS)
RATIO = finite("a number from 0 to 1.5", lambda v: 0 <= v <= 1.5)


def expected_mse(scale: ArrayLike, low: ArrayLike, high: ArrayLike, spread: ArrayLike, family: Family) -> Floats:
    """E[(x - Q(x))^2]: rounding costs scale^2 / 12, and each tail what lies beyond its end of the grid (eq. 5).

    low, high: the ends of the grid, less the center of the density. Eq. 5 has high = -low = alpha and 2^M steps in
    between. A ReLU leaves one half of a density, and half of the error of low = -high. All arguments broadcast.
    """
    s, width = np.asarray(scale, np.float64), np.asarray(spread, np.float64)
    above, below = (np.minimum(np.asarray(end, np.float64) / width, FAR) for end in (high, np.negative(low)))
    return s * s / 12 + width * width * (family.tail(above) + family.tail(below))


def clipping(bits: int, family: Family) -> float:
    """alpha* of spread 1 at which `expected_mse` of 2^bits steps in [-alpha, alpha] is least: the root of eq. 6.

    Behind a ReLU the 2^bits steps lie in [0, alpha], as do half of 2^(bits + 1): `clipping(bits + 1, family)`.
    """
    return float(brentq(lambda t: t / (3 * 4.0**bits) + family.slope(t), 0, FAR))


def allocate(alpha: ArrayLike, bits: int, ratio: float = 1.0) -> tuple[int, ...]:
    """Widths per channel with 2^width as nearly proportional to alpha^(2/3) as integers allow (eq. 10 and 11).

    The average is exactly `bits`: one by one they go to the channel where alpha^(2/3) / 2^width is largest, of equal
    ones the first. alpha: (C,). ratio (ours): the exponent is 2/3 of it; 0 gives all channels the same, 3/2 the least
    sum of alpha^2 / 4^width, which is what a rounding error is. Eq. 10 holds the sum of all 2^width instead.
    """
    legal = WIDTHS["weight"]
    wanted = np.log2(np.maximum(alpha, np.finfo(np.float32).tiny)) * ratio * 2 / 3
    widths = [legal.start] * len(wanted)
    heap = [(legal.start - float(w), i) for i, w in enumerate(wanted)]
    heapify(heap)
    for _ in range((bits - legal.start) * len(wanted)):
        need, i = heap[0]
        widths[i] += 1
        heapreplace(heap, (need + 1 if widths[i] < legal[-1] else np.inf, i))
    return tuple(widths)


def moments_correction(weight: Floats, rounded: Floats) -> tuple[Floats, Floats]:
    """mu = E[w] - E[w_q] and xi = |w - E[w]| / |w_q - E[w_q]| per channel (eq. 12); w_q becomes xi (w_q + mu).

    weight, rounded: (C, n). mu, xi: (C, 1); xi is 1 where all rounded weights are equal.
    """
    means = [x.mean(1, keepdims=True) for x in (weight, rounded)]
    norm, norm_q = (np.linalg.norm(x - m, axis=1, keepdims=True) for x, m in zip((weight, rounded), means, strict=True))
    return means[0] - means[1], np.divide(norm, norm_q, out=np.ones_like(norm), where=norm_q > 0)


def fold_correction(weight: Floats, quantize: Callable[[Floats], Floats]) -> Floats:
    """Weights (C, n) whose *rounded* values have the moments of `weight` as nearly as the grid allows.

    xi (w_q + mu) lies on no grid, so the correction goes to the weights before they are rounded (eq. 13), again and
    again; of all rounds, every channel keeps that of least n mu^2 + (1 - 1 / xi)^2 |w - E[w]|^2, the squared errors
    of mean and norm. The first is that without correction.
    """
    best, least, now = weight, np.full((len(weight), 1), np.inf), weight
    norm = np.square(weight - weight.mean(1, keepdims=True)).sum(1, keepdims=True)
    for _ in range(CORRECTIONS + 1):
        mu, xi = moments_correction(weight, quantize(now))
        error = weight.shape[1] * mu**2 + (1 - 1 / np.where(xi > 0, xi, 1)) ** 2 * norm
        best, least = np.where(error < least, now, best), np.minimum(error, least)
        now = xi * (now + mu)
    return best


def with_moments(values: NDArray[np.float32], encoding: Encoding) -> NDArray[np.float32]:
    """`fold_correction` of a weight of any shape, per channel of its encoding (per tensor: of all of it)."""
    axis = encoding.axis or 0
    moved = np.moveaxis(values, axis, 0)
    rows = moved.reshape(1 if encoding.axis is None else len(moved), -1).astype(np.float64)
    by_row = replace(encoding, axis=None if encoding.axis is None else 0)
    found = fold_correction(rows, lambda x: by_row.fake_quantize(x).astype(np.float64))
    return np.moveaxis(found.reshape(moved.shape), 0, axis).astype(np.float32)


@dataclass(frozen=True)
class Fit:
    """A density fitted to data, per channel (C,).

    laplace: whether it is one, otherwise a Gaussian. reach: the largest distance of a value from the center. alpha: the
    clipping value, at most that. half: data behind a ReLU, of which the density has the positive half only.
    """

    center: Floats
    spread: Floats
    laplace: NDArray[np.bool_]
    alpha: Floats
    reach: Floats
    half: bool

    @classmethod
    def of(cls, observed: Observed, method: str, bits: int, symmetric: bool) -> Fit:
        """Fits what was observed; `method` is one of `METHODS`.

        About 0 on a symmetric grid; about the mean on another; non-negative data about 0, their positive values only
        (a ReLU's zeros cost nothing; what it passed of a Laplace density has the same tail wherever its center was).
        """
        x = observed.sample.astype(np.float64)
        half = not symmetric and bool((observed.low >= 0).all())
        x = x[x > 0][None] if half and (x > 0).any() else x
        center = np.zeros(len(x)) if half or symmetric else x.mean(1)
        least = np.finfo(np.float32).tiny
        spreads = {n: np.maximum(f.spread(x - center[:, None]), least) for n, f in FAMILIES.items()}
        likely = FAMILIES["laplace"].likelihood(spreads["laplace"]) > FAMILIES["gauss"].likelihood(spreads["gauss"])
        laplace = likely if method == "auto" else np.full(len(x), method == "laplace")
        clips = {n: clipping(bits + half, f) for n, f in FAMILIES.items()}
        spread = np.where(laplace, spreads["laplace"], spreads["gauss"])
        reach = np.maximum(center - observed.low, observed.high - center)
        alpha = np.minimum(np.where(laplace, clips["laplace"], clips["gauss"]) * spread, reach)
        return cls(center, spread, laplace, alpha, reach, half)

    def expected_mse(self, encoding: Encoding) -> Floats:
        """(C,): `expected_mse` on the grid of an encoding."""
        high = encoding.maximum - self.center
        low = -high if self.half else encoding.minimum - self.center
        errors = (expected_mse(encoding.scale, low, high, self.spread, FAMILIES[n]) for n in ("laplace", "gauss"))
        return np.where(self.laplace, *errors)


def analytic(observed: Observed, form: Format, fit: Fit) -> Encoding:
    """The encoding of least expected error over powers of two; a free scale is that of alpha*, on the grid.

    Of the clipping values `RADII`, each with the power of two (and even zero point) that covers it. One encoding per
    row of `observed`; with a channel axis on a symmetric grid.
    """

    def covering(radius: Floats) -> Encoding:
        low, high = (np.asarray(fit.center + sign * radius, np.float32) for sign in (-1, 1))
        if not form.symmetric:
            low, high = np.maximum(low, observed.low), np.minimum(high, observed.high)
        return choose("minmax", Observed(low, high, observed.sample), form)

    if not form.power_of_2:
        return covering(fit.alpha)
    encodings = [covering(share * fit.reach) for share in RADII]
    chosen = np.stack([fit.expected_mse(e) for e in encodings]).argmin(0)
    if form.axis is None:
        return encodings[int(chosen[0])]
    scales = np.stack([e.scale for e in encodings])
    return form.encoding(scales[chosen, np.arange(len(chosen))])


@dataclass(frozen=True)
class Aciq:
    """ACIQ: analytic clipping, bits per channel, moments of weights (Banner et al. 2019, eq. 5, 6, 10 to 13).

    Activations and weights are clipped where a fitted density says that the squared error is least. aciq_method: the
    density; `auto` takes, per tensor and channel, the likelier of the two. mix_ratio: 0 leaves every channel of a
    weight the configured width; 1 mixes widths as eq. 10 says, at exactly that average; 3/2 for the least rounding
    error. Activations have one width per tensor, as ONNX has one encoding for them. bias_correction: rounded weights
    get the mean and the variance of the float ones. The network's inputs keep their encodings, and so do the layers
    whose weights lie on their grid already.
    """

    deterministic: ClassVar[bool] = True

    aciq_method: Annotated[str, METHOD] = "auto"
    mix_ratio: Annotated[float, RATIO] = 0.0
    bias_correction: bool = True

    @torch.no_grad()
    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Loads the encodings, and writes the corrected weights, float."""
        self._clip_activations(sim, batches)
        for step in progress.track(walk(sim, batches), "aciq", len(sim.placement.layers)):
            if step.layer.weight is None or is_rounded(sim, step.layer):
                continue
            before = output_sqnr(sim, step)
            self._clip_weight(sim, step.layer)
            progress.note(f"{step.layer.module}: output {before} -> {output_sqnr(sim, step)}")

    def _clip_activations(self, sim: Simulation, batches: Iterable[Batch]) -> None:
        """Observed in the float network, as calibration does."""
        placement, table = sim.placement, sim.encodings()
        wanted = [s.name for s in placement.sites if s.role == "output"]
        if not wanted:
            return
        sim.load({})
        chosen: Table = {}
        for name, seen in observe(sim, batches, dict.fromkeys(placement.leader(n) for n in wanted)).items():
            spec = placement.specs[name]
            form = Format(spec.bits, spec.symmetric, spec.power_of_2)
            chosen[name] = analytic(seen, form, Fit.of(seen, self.aciq_method, spec.bits, spec.symmetric))
        sim.load(table | {name: chosen[placement.leader(name)] for name in wanted})
        for layer in placement.layers:
            if layer.weight is not None:
                encode_weight(sim, layer, sim.encodings()[layer.weight.name])

    def _clip_weight(self, sim: Simulation, layer: Layer) -> None:
        assert layer.weight is not None
        weight, spec = sim.parameter(layer.weight.name), sim.placement.specs[layer.weight.name]
        values = weight.cpu().numpy()
        observed = Observed.of(values, layer.axis)
        fit = Fit.of(observed, self.aciq_method, spec.bits, spec.symmetric)
        form = Format(spec.bits, spec.symmetric, spec.power_of_2, layer.axis)
        if layer.axis is not None and self.mix_ratio > 0:
            widths = allocate(fit.alpha, spec.bits, self.mix_ratio)
            form = replace(form, bits=widths if len(set(widths)) > 1 else spec.bits)
        encode_weight(sim, layer, analytic(observed, form, fit))
        if self.bias_correction:
            weight.copy_(torch.from_numpy(with_moments(values, sim.encodings()[layer.weight.name])))
