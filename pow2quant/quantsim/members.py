"""The members of the drop-in that look at quantizers, or change which there are and how they quantize."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import Simulation
from pow2quant.config import QuantPlan, TensorSpec
from pow2quant.errors import ConfigError
from pow2quant.pow2_constraints import Encoding, Format, Observed, choose, is_chooser
from pow2quant.quantsim import attributes
from pow2quant.quantsim.ranges import Ranges

if TYPE_CHECKING:
    from torch import nn


class Members:
    """A simulation, the plan that it was made with, and what has been changed since, by site."""

    simulation: Simulation
    frozen: frozenset[str]
    ranges: Ranges | None
    _plan: QuantPlan
    _changes: dict[Site, TensorSpec | None]
    _ranges_kept: dict[str, tuple[Encoding, Encoding]]
    """By site: the range that it had before its width was changed, and what that has become."""

    @property
    def model(self) -> nn.Module:
        """The network that computes with fake-quantized values."""
        raise NotImplementedError

    @property
    def sites(self) -> Sequence[Site]:
        """What is quantized now."""
        return self.simulation.sites

    def encodings(self) -> Table:
        """The encodings by site name, those of ranges that are trained as they are now."""
        if self.ranges is not None:
            self.ranges.follow()
        return self.simulation.encodings()

    def quantizers(self) -> Iterator[Any]:
        """All quantizers but those of biases, which follow from others."""
        return (quantizer for _, quantizer in self.named_quantizers())

    def named_quantizers(self) -> Iterator[tuple[str, Any]]:
        """The same, by AIMET's names, such as `conv1.param_quantizers.weight`."""
        for name, module in attributes.quantized_modules(self.model):
            for kind in attributes.SLOTS:
                for key, quantizer in getattr(module, kind).items():
                    if quantizer is not None:
                        yield f"{name}.{kind}.{key}", quantizer

    def exclude_layers_from_quantization(self, layers_to_exclude: Iterable[nn.Module]) -> None:
        """Takes all quantizers of these modules of `sim.model` away, and of those inside of them."""
        quantized = {id(module) for _, module in attributes.quantized_modules(self.model)}
        own = {id(module) for module in self.model.modules()}
        for layer in layers_to_exclude:
            if id(layer) not in own | quantized:
                raise ConfigError(f"exclude_layers_from_quantization: {type(layer).__name__} is no module of sim.model")
            for module in (part for part in layer.modules() if id(part) in quantized):
                for slots in (getattr(module, kind) for kind in attributes.SLOTS):
                    for key in list(slots.keys()):
                        slots[key] = None

    def exclude_param_from_quantization(self, param_name_to_exclude: str) -> None:
        """Keeps all parameters of this name float."""
        for _, module in attributes.quantized_modules(self.model):
            if param_name_to_exclude in module.param_quantizers:  # type: ignore[operator]
                module.param_quantizers[param_name_to_exclude] = None  # type: ignore[index, operator, assignment]

    def fold_param_quantizers(self) -> None:
        """Puts all weights that have an encoding on their grids, for good."""
        table = self.encodings()
        with torch.no_grad():
            for site in (s for s in self.sites if s.role == "weight" and s.name in table):
                weight = self.simulation.parameter(site.name)
                weight.copy_(torch.from_numpy(table[site.name].fake_quantize(weight.cpu().numpy())))

    def spec(self, site: Site) -> TensorSpec:
        """How a site is quantized now."""
        return self.simulation.placement.specs[site.name]

    def planned(self, site: Site) -> TensorSpec | None:
        """How it was to be quantized when the simulation was made."""
        return self._plan.spec(site)

    def is_quantized(self, site: Site) -> bool:
        """Whether a site has a quantizer now."""
        return site.name in self.simulation.placement.specs

    def axis(self, site: Site) -> int | None:
        """The channel axis of a weight with one scale per channel."""
        return next((y.axis for y in self.simulation.placement.layers if y.weight == site), None)

    def take_range(self, site: Site, low: Any, high: Any) -> None:
        """Gives a site the smallest scale that covers a range: numbers, or one per channel."""
        encoding = covering(self.spec(site), low, high, self.axis(site))
        self.simulation.load(self.encodings() | {site.name: encoding})
        self.derive_biases()

    def freeze(self, names: Collection[str], fixed: bool) -> None:
        """Whether encodings of these sites may change."""
        self.frozen = self.frozen | set(names) if fixed else self.frozen - set(names)

    def change(self, site: Site, spec: TensorSpec | None) -> None:
        """Quantizes a site in another way, or not at all. A range that it has is kept, with the smallest 2^k."""
        had = self.encodings().get(site.name)
        kept = self._ranges_kept.get(site.name)
        self._changes[site] = spec
        try:
            self._replan()
        except ConfigError:
            del self._changes[site]
            raise
        if had is not None and spec is not None:  # the first range, so that widths in turn do not widen it
            first = had if kept is None or kept[1] != had else kept[0]
            self.take_range(site, first.minimum, first.maximum)
            self._ranges_kept[site.name] = first, self.encodings()[site.name]

    def derive_biases(self) -> None:
        """Biases take the lattice s_in * s_w of the encodings as they are now, if none is missing."""
        table = self.encodings()
        if all(s.name in table for s in self.sites if s.role != "bias"):
            self.simulation.calibrate((), {"bias"})

    def _replan(self) -> None:
        changes = [(site.module, {site.role: spec}) for site, spec in self._changes.items()]
        simulation: Any = self.simulation  # on `custom`
        simulation.adopt(replace(self._plan, overrides=(*self._plan.overrides, *changes)))
        self.model.recompile()  # type: ignore[operator]

    def set_percentile_value(self, percentile_value: float) -> None:
        """What the scheme `percentile` keeps, in per cent, over 0; it holds from the next `compute_encodings` on."""
        chooser = f"percentile:{percentile_value}"
        if not is_chooser(chooser):
            raise ConfigError(f"set_percentile_value: {percentile_value!r} is not over 0 and at most 100")
        specs = self.simulation.placement.specs
        for site in self.sites:
            if specs[site.name].range.startswith("percentile"):
                self._changes[site] = specs[site.name] = replace(specs[site.name], range=chooser)


def covering(spec: TensorSpec, low: Any, high: Any, axis: int | None) -> Encoding:
    """The encoding of smallest scale that covers [low, high]: numbers, or one per channel along `axis`."""
    least, most = (np.asarray(v, np.float32).reshape(-1) for v in (low, high))
    form = Format(spec.bits, spec.symmetric, spec.power_of_2, axis)
    return choose("minmax", Observed(least, most, np.stack([least, most], 1)), form)


def summary(encoding: Encoding | None) -> str:
    """An encoding in a few words."""
    if encoding is None:
        return "no encoding yet"
    if not encoding.is_power_of_two:
        return "free scale"
    low, high = (int(f(encoding.exponent)) for f in (np.min, np.max))
    scale = f"2^{low}" if low == high else f"2^{low} to 2^{high}"
    return f"scale {scale}" + (f", zero point {encoding.zero_point}" if encoding.zero_point.any() else "")
