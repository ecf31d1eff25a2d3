"""Exponents that are learned by gradient: TQT's thresholds and LSQ's steps, every scale 2^k at every moment.

The equations are pure functions. `Exponents` holds the parameters of all sites and acts where a tap calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.artifact import Table
from pow2quant.backends.base import Simulation
from pow2quant.backends.fake_quant import learned, power
from pow2quant.backends.native import Scale
from pow2quant.pow2_constraints import Encoding, exact_exponent, power_of_two

REACH = 4
"""A learned exponent stays within so many of where calibration put it: a guard against runaway."""

RATE = 0.02
"""Of the running means of exponents and of their changes, which look back about 50 steps."""

OSCILLATES = 0.1
"""An exponent that changed in more than this share of the recent steps is frozen at its mean."""


class Rule(NamedTuple):
    """How exponents follow from parameters that are trained, elementwise.

    offset: parameter -> k less calibration's, whole numbers. middle: offset -> the parameter amid those that give it.
    slope: (scale over calibration's, values that share the scale, largest code) -> the factor from
    scale * dL/dscale to the parameter's gradient.
    """

    offset: Callable[[Tensor], Tensor]
    middle: Callable[[Tensor], Tensor]
    slope: Callable[[Any, float, float], Any]


RULES = {
    "tqt": Rule(torch.ceil, lambda offset: offset - 0.5, lambda ratio, values, top: math.log(2)),
    "lsq": Rule(
        lambda step: step.log2().round(), torch.exp2, lambda ratio, values, top: 1 / (ratio * math.sqrt(values * top))
    ),
}
"""How exponents are learned, by name.

tqt: trained quantization thresholds (Jain et al., 2020, section 3). The parameter is log2 of the threshold, relative to
calibration's; the scale is the power of two above it. Its gradient is ln 2 times the scale's, times the scale.
lsq: learned step size (Esser et al., 2020, section 2). The parameter is the step in units of calibration's, the scale
the power of two nearest to it, with the gradient of the step itself, divided by sqrt(values * top) (section 2.2).
"""


class _Part(NamedTuple):
    """One site's share: its place among all exponents, and what training does not change."""

    place: slice
    encoding: Encoding
    low: float
    high: float
    parameter: nn.Parameter


def _part(place: slice, encoding: Encoding, parameter: nn.Parameter) -> _Part:
    low, high = (float(q - encoding.zero_point.flat[0]) for q in (encoding.grid.qmin, encoding.grid.qmax))
    return _Part(place, encoding, low, high, parameter)


class Exponents:
    """The exponents of a simulation's sites as parameters; zero points stay those of calibration.

    Sites that share an encoding share its exponents. Elementwise over all exponents, in one vector: `values` (the
    parameters), `k`, `frozen`, and the running means of k and of its changes, from which oscillation is seen.

    Nothing that a training step calls reads from another device than the CPU, where reading would wait for the device.
    """

    def __init__(self, sim: Simulation, names: Collection[str], rule: str, further: Sequence[Tensor] = ()) -> None:
        """names: of the sites; each must have an encoding with power-of-two scales.

        further: where exponents of a subclass's own start; they stand behind those of the sites.
        """
        self.rule = RULES[rule]
        table = sim.encodings()
        leaders = {name: sim.placement.leader(name) for name in names}
        device = next((p.device for p in sim.model.parameters()), None)
        sizes = {name: table[name].scale.size for name in dict.fromkeys(leaders.values())}
        own = np.concatenate([*(table[name].exponent.ravel() for name in sizes), np.zeros(0)]).astype(np.float32)
        self.calibrated = torch.cat([torch.from_numpy(own).to(device), *further])
        self._on_host = self.calibrated.device.type == "cpu"
        self.moving = True
        self.values = self.rule.middle(torch.zeros_like(self.calibrated))
        self._ends = [float(self.rule.middle(torch.tensor(float(end)))) for end in (-REACH, REACH)]
        self.frozen = torch.zeros_like(self.values, dtype=torch.bool)
        self.average, self.frequency = self.calibrated.clone(), torch.zeros_like(self.values)
        self._parts: dict[str, _Part] = {}
        start = 0
        for name, size in sizes.items():
            place = slice(start, start + size)
            start += size
            parameter = nn.Parameter(self.values[place].view(table[name].scale.shape))
            self._parts[name] = _part(place, table[name], parameter)
        self._leaders = leaders
        self.refresh()

    def __contains__(self, name: str) -> bool:
        return name in self._leaders

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaders)

    def parameters(self) -> list[nn.Parameter]:
        """One parameter, () or (C,), for each encoding: views of `values`."""
        return [part.parameter for part in self._parts.values()]

    @torch.no_grad()
    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Takes these as its parameters, by the leading site's name, so that an optimizer that holds them goes on."""
        for name, part in self._parts.items():
            own = parameters[name]
            own.data = part.parameter.data
            own.requires_grad_(part.parameter.requires_grad)
            self._parts[name] = part._replace(parameter=own)

    def refresh(self) -> None:
        """Computes exponents and scales from `values`. On a CPU raises AssertionError as `check` does."""
        self.k = self.calibrated + self.rule.offset(self.values)
        self._scales = power(self.k)
        self._ratios = (self.k - self.calibrated).exp2()
        self._numbers: Any = self._scales
        if self._on_host:
            self._numbers = self._scales.tolist()
            self.check()

    def check(self) -> None:
        """Raises AssertionError unless every scale is exactly 2^k."""
        if not np.array_equal(exact_exponent(self._scales.cpu().numpy()), self.k.cpu().numpy()):
            raise AssertionError("a learned scale is not the power of two that it should be")

    def quantize(self, name: str, x: Tensor, shares_batch: bool, top: float | None = None) -> Tensor:
        """x on the site's grid as it is now. shares_batch: the first dimension of x counts samples.

        top: as `learned` takes it.
        """
        part = self._parts[self._leaders[name]]
        values = x.numel() // max(1, len(x)) if shares_batch else x.numel()
        if x.dtype is torch.float16 or part.encoding.grid.width > 8:  # bfloat16 holds codes of up to 8 bits
            x = x.float()
        scale, slope = self._now(part, values)
        return learned(x, part.parameter, scale, (part.low, part.high), part.encoding.axis, slope, top)

    def quantize_scaled(self, name: str, weight: Tensor, factor: Tensor, axis: int) -> Tensor:
        """The weight times a factor for each channel along `axis`, (C,), on the site's grid, divided by the factor."""
        part = self._parts[self._leaders[name]]
        scale, slope = self._now(part, weight.numel())
        return learned(weight, part.parameter, scale / factor, (part.low, part.high), axis, slope)

    def _now(self, part: _Part, values: int) -> tuple[Scale, Any]:
        """Scale and slope of a site, as `learned` takes them. values: how many share them altogether."""
        if part.encoding.axis is None:
            scale = self._numbers[part.place.start]
            return scale, self.rule.slope(scale / float(part.encoding.scale), values, part.high)
        scales = self._scales[part.place]
        return scales, self.rule.slope(self._ratios[part.place], values // max(1, len(scales)), part.high)

    def scale(self, name: str) -> Tensor:
        """The site's scales as they are now, () or (C,)."""
        part = self._parts[self._leaders[name]]
        return self._scales[part.place].view(part.encoding.scale.shape)

    @property
    def learned(self) -> list[Tensor]:
        """The vectors of parameters."""
        return [self.values]

    def settle(self, parameter: Callable[[str], Tensor]) -> None:
        """To be called behind training: writes what a rule rounds otherwise than the encodings do. Here nothing.

        parameter: a site's name -> its weight.
        """

    @torch.no_grad()
    def advance(self) -> Tensor:
        """To be called when an optimizer has changed the parameters: how many exponents changed, ().

        What oscillates is frozen at its mean.
        """
        before = self.k
        self.values.clamp_(*self._ends)
        moved = self.calibrated + self.rule.offset(self.values)
        flips = (moved != before) & ~self.frozen
        self.frequency.lerp_(flips.float(), RATE)
        self.average.lerp_(torch.where(self.frozen, before, moved), RATE)
        self.freeze(self.frequency > OSCILLATES)
        return flips.sum()

    @torch.no_grad()
    def freeze(self, chosen: Tensor | None = None) -> None:
        """Fixes exponents at the nearest whole number to their running mean. chosen: which (a mask), or None: all."""
        newly = ~self.frozen if chosen is None else chosen & ~self.frozen
        self.average.copy_(torch.where(newly, self.average.round(), self.average))
        self.frozen |= newly
        held = self.rule.middle(self.average - self.calibrated)
        self.values.copy_(torch.where(self.frozen, held, self.values))
        if chosen is None or (self._on_host and bool(self.frozen.all())):
            self._rest()
        self.refresh()

    def _rest(self) -> None:
        self.moving = False
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def restart(self, table: Table) -> None:
        """Starts anew from other encodings of the same sites and shapes; the parameters stay the same objects."""
        for name, part in self._parts.items():
            exponents = torch.from_numpy(table[name].exponent.ravel().astype(np.float32))
            self.calibrated[part.place] = exponents.to(self.calibrated)
            self._parts[name] = _part(part.place, table[name], part.parameter)
        self.values.copy_(self.rule.middle(torch.zeros_like(self.calibrated)))
        self.frozen.zero_()
        self.average.copy_(self.calibrated)
        self.frequency.zero_()
        self.refresh()

    def table(self, k: Tensor | None = None) -> Table:
        """The encodings of all sites, with the exponents of now or `k`. Raises AssertionError as `check` does."""
        self.check()
        exponents = (self.k if k is None else k).cpu().numpy().astype(np.int64)
        made = {
            name: Encoding(
                power_of_two(exponents[part.place]).reshape(part.encoding.scale.shape),
                part.encoding.zero_point,
                part.encoding.grid,
                part.encoding.axis,
            )
            for name, part in self._parts.items()
        }
        return {name: made[leader] for name, leader in self._leaders.items()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return {key: getattr(self, key) for key in ("values", "frozen", "average", "frequency")}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for key, value in state.items():
            getattr(self, key).copy_(value)
        self.freeze(torch.zeros_like(self.frozen))
        if bool(self.frozen.all()):
            self._rest()
