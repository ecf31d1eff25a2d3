"""Ternary weights in training: -2^a, 0 or 2^b at every step, from float weights that go on learning.

The rules of `RULES` act where a weight has 2 bits. Their equations are pure functions; thresholds and first exponents
are those of `methods.ternary`, and exponents move, settle and freeze as all others do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pow2quant.artifact import Table
from pow2quant.backends.base import Simulation
from pow2quant.config import TrainingConfig
from pow2quant.errors import ConfigError
from pow2quant.methods.ternary import (
    APART,
    Levels,
    encoding_of,
    mean_beyond,
    nearest_exponent,
    restored,
    rows_of,
    ttq,
    ttq_threshold,
    twn,
    twn_threshold,
)
from pow2quant.training.exponents import REACH, Exponents

RULES = ("twn", "ttq", "learned")
"""How a weight w becomes ternary, by name.

twn: TWN (Li, Liu 2016): beyond 0.7 E|w|, which is computed anew at every step as is the power of two; the gradient of
the ternary weight is the weight's own.
ttq: TTQ (Zhu et al. 2017): beyond 0.05 max|w|; both powers of two are learned.
learned: TWN, with a factor on its threshold that is learned for every scale: see `threshold_gradient`.
"""

SLOWER = 10.0
"""A threshold's parameter is log2 of its factor, times this: it moves so much more slowly than exponents do.

A threshold that moves takes all weights near it to the other side at once.
"""


def ttq_gradients(grad: Tensor, rows: Tensor, codes: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dw (C, n), and scale * dL/dscale (C,) of 2^a and of 2^b (TTQ, eq. 7 and 8).

    grad: of the ternary weights (C, n). codes: -1, 0 or 1. A scale's gradient is the sum over its side, with the sign
    of what it multiplies. A weight's is the scale's times that of its ternary value, that of a zero is passed on as it
    is; the paper's weights lie in [-1, 1], so the scales are taken relative to the largest magnitude of the row.
    """
    low, high = a.exp2()[:, None], b.exp2()[:, None]
    positive, negative = (codes > 0).to(grad.dtype), (codes < 0).to(grad.dtype)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    factor = torch.where(codes > 0, high / largest, torch.where(codes < 0, low / largest, 1.0))
    return grad * factor, -(grad * negative * low).sum(1), (grad * positive * high).sum(1)


def threshold_gradient(grad: Tensor, rows: Tensor, threshold: Tensor, k: Tensor) -> Tensor:
    """threshold * dL/dthreshold (C,) of 2^k * sign(w) where |w| > threshold, and 0 elsewhere.

    grad: of the ternary weights (C, n). A weight that the threshold passes loses 2^k: the derivative is -2^k sign(w)
    times the density of weights at the threshold; for it, every |w| below 2 thresholds counts 1 / (2 thresholds).
    """
    near = (rows.abs() < 2 * threshold[:, None]).to(rows.dtype)
    return -(grad * rows.sign() * near).sum(1) * k.exp2() / 2


class _Ttq(torch.autograd.Function):
    """Rows (C, n) -> ternary; the parameters of a and b get `slopes` times their scales' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, a: Tensor, b: Tensor, levels: Levels, slopes: Sequence[Any]) -> Tensor:
        codes = levels.codes(rows)
        ctx.save_for_backward(rows, codes, levels.a, levels.b)
        ctx.slopes = slopes
        return levels.values(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        passed, a, b = ttq_gradients(grads[0], *ctx.saved_tensors)
        return passed, ctx.slopes[0] * a, ctx.slopes[1] * b, None, None


class _LearnedThreshold(torch.autograd.Function):
    """Rows (C, n) -> ternary, whose gradient is the rows' own; factor: its parameter (C,), of the threshold."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factor: Tensor, levels: Levels) -> Tensor:
        ctx.save_for_backward(rows, levels.threshold, levels.a)
        return levels.values(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        learns = ctx.needs_input_grad[1]
        factor = math.log(2) / SLOWER * threshold_gradient(grads[0], *ctx.saved_tensors) if learns else None
        return grads[0], factor, None


class _Weight(NamedTuple):
    """One ternary weight: where its exponents stand (the same place where it has one scale), and what is learned."""

    axis: int | None
    a: slice
    b: slice
    exponents: tuple[nn.Parameter, ...]
    factor: nn.Parameter


class TernaryExponents(Exponents):
    """The exponents of a simulation whose weights `ternary` are -2^a, 0 or 2^b, and their thresholds.

    factors: log2 of what their thresholds are in units of TWN's, times `SLOWER`, in one vector.
    """

    def __init__(
        self, sim: Simulation, names: Collection[str], rule: str, ternary: Collection[str], ternary_rule: str
    ) -> None:
        """names: of the other sites. ternary: of the weights. ternary_rule: of `RULES`."""
        self.ternary_rule = ternary_rule
        axes = {layer.weight.name: layer.axis for layer in sim.placement.layers if layer.weight is not None}
        first: dict[str, Levels] = {}
        for name in ternary:
            rows = rows_of(sim.parameter(name).detach(), axes[name])
            first[name] = (ttq if ternary_rule == "ttq" else twn)(rows)
        sides = 2 if ternary_rule == "ttq" else 1
        self._weights: dict[str, _Weight] = {}
        self._seen: dict[str, Tensor] = {}
        further = [side for levels in first.values() for side in (levels.a, levels.b)[:sides]]
        super().__init__(sim, names, rule, further)
        self.factors = torch.zeros(sum(len(levels.a) for levels in first.values()), device=self.values.device)
        start, at = len(self.values) - sum(map(len, further)), 0
        for name, levels in first.items():
            count = len(levels.a)
            a = slice(start, start + count)
            b = slice(start + count, start + 2 * count) if sides == 2 else a
            own = tuple(nn.Parameter(self.values[place]) for place in (a, b)[:sides])
            factor = nn.Parameter(self.factors[at : at + count], requires_grad=ternary_rule == "learned")
            self._weights[name] = _Weight(axes[name], a, b, own, factor)
            start, at = start + sides * count, at + count
        self.refresh()

    def __contains__(self, name: str) -> bool:
        return name in self._weights or super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        yield from self._weights

    def parameters(self) -> list[nn.Parameter]:
        """See `Exponents.parameters`; and the thresholds, where they are learned."""
        learned = [*super().parameters()]
        for weight in self._weights.values():
            if self.ternary_rule == "ttq":
                learned += weight.exponents
            if self.ternary_rule == "learned":
                learned.append(weight.factor)
        return learned

    def refresh(self) -> None:
        """See `Exponents.refresh`; a and b stay at most `APART`."""
        for weight in self._weights.values():
            if weight.a != weight.b:
                a, b = (self.calibrated[p] + self.rule.offset(self.values[p]) for p in (weight.a, weight.b))
                near = torch.minimum(torch.maximum(b, a - APART), a + APART)
                middle = self.rule.middle(near - self.calibrated[weight.b])
                self.values[weight.b] = torch.where(near == b, self.values[weight.b], middle)
        super().refresh()

    def levels(self, name: str, rows: Tensor) -> Levels:
        """The levels of a weight, given as rows (C, n), as they are now."""
        weight = self._weights[name]
        if self.ternary_rule == "ttq":
            threshold = ttq_threshold(rows)
        else:
            threshold = twn_threshold(rows) * (weight.factor.detach() / SLOWER).exp2()
        return Levels(threshold, self.k[weight.a], self.k[weight.b])

    def quantize_scaled(self, name: str, weight: Tensor, factor: Tensor, axis: int) -> Tensor:
        """See `Exponents.quantize_scaled`."""
        if name not in self._weights:
            return super().quantize_scaled(name, weight, factor, axis)
        factor = factor.view([-1 if d == axis else 1 for d in range(weight.ndim)])
        return self.quantize(name, weight * factor, False) / factor

    def quantize(self, name: str, x: Tensor, shares_batch: bool, top: float | None = None) -> Tensor:
        """See `Exponents.quantize`."""
        weight = self._weights.get(name)
        if weight is None:
            return super().quantize(name, x, shares_batch, top)
        rows = rows_of(x, weight.axis)
        levels = self.levels(name, rows.detach())
        if self.ternary_rule == "ttq":
            ratios = (self.k - self.calibrated).exp2()
            slopes = [self.rule.slope(ratios[place], rows.shape[1], 1.0) for place in (weight.a, weight.b)]
            return restored(_Ttq.apply(rows, *weight.exponents, levels, slopes), x, weight.axis)
        if torch.is_grad_enabled():
            self._seen[name] = nearest_exponent(mean_beyond(rows.detach(), levels.threshold))
        return restored(_LearnedThreshold.apply(rows, weight.factor, levels), x, weight.axis)

    def scale(self, name: str) -> Tensor:
        """See `Exponents.scale`: that of the common grid."""
        if name not in self._weights:
            return super().scale(name)
        weight = self._weights[name]
        scale = torch.minimum(self.k[weight.a], self.k[weight.b]).exp2()
        return scale if weight.axis is not None else scale[0]

    @torch.no_grad()
    def advance(self) -> Tensor:
        """See `Exponents.advance`. Exponents of TWN and of learned thresholds follow the weights of the step."""
        for name, k in self._seen.items():
            place = self._weights[name].a
            self.values[place] = self.rule.middle(k - self.calibrated[place])
        self.factors.clamp_(-REACH * SLOWER, REACH * SLOWER)
        return super().advance()

    def table(self, k: Tensor | None = None) -> Table:
        """See `Exponents.table`."""
        found = super().table(k)
        exponents = self.k if k is None else k
        for name, weight in self._weights.items():
            found[name] = encoding_of(exponents[weight.a], exponents[weight.b], weight.axis)
        return found

    @property
    def learned(self) -> list[Tensor]:
        """See `Exponents.learned`."""
        return [*super().learned, self.factors]

    @torch.no_grad()
    def settle(self, parameter: Callable[[str], Tensor]) -> None:
        """See `Exponents.settle`: the ternary weights, on their grids."""
        for name in self._weights:
            parameter(name).copy_(self.quantize(name, parameter(name), False))

    def state(self) -> dict[str, Tensor]:
        """See `Exponents.state`."""
        return {**super().state(), "factors": self.factors}


def exponents_of(sim: Simulation, names: Sequence[str], config: TrainingConfig) -> Exponents:
    """The exponents of the named sites; weights of 2 bits are ternary where the configuration says so.

    Raises ConfigError where it says so and there is none, or they cannot be learned.
    """
    rule = "tqt" if config.exponents == "fixed" else config.exponents
    if config.ternary is None:
        return Exponents(sim, names, rule)
    ternary = [n for n in names if n.endswith(".weight") and sim.placement.specs[n].bits == 2]
    if not ternary:
        raise ConfigError(f"training.ternary: {config.ternary!r} needs weights of 2 bits and power_of_2")
    if config.exponents == "fixed" and config.ternary != "twn":
        raise ConfigError(f"training.ternary: {config.ternary!r} learns; legal training.exponents: tqt, lsq")
    return TernaryExponents(sim, [n for n in names if n not in ternary], rule, ternary, config.ternary)
