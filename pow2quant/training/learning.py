"""What a simulation computes with while it is trained: float weights, live batch norm, and learned exponents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, fx, nn

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import Simulation, sent
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.config import TrainingConfig
from pow2quant.errors import ConfigError
from pow2quant.training import schedule
from pow2quant.training.batch_norm import BatchNorms
from pow2quant.training.ternary import exponents_of

TOPS: dict[type[nn.Module], float] = {nn.ReLU: math.inf, nn.ReLU6: 6.0}
"""Clips that a learned quantizer computes along with itself: the upper end, the lower one is 0."""

MEASURED = 8
"""Calibration batches that give the first running statistics of batch norm."""


class Learning:
    """A calibrated simulation that learns.

    parameters: the float ones by name. Those with `requires_grad` are trained, or all where none has it. config: says
    what is quantized and how exponents and batch norm are treated. active: the names of the sites that are quantized
    now; whole: of all that can be. watched: what sites have computed last, for those whose names are its keys.
    Raises ConfigError where nothing can be trained.
    """

    def __init__(self, sim: Simulation, parameters: Mapping[str, Tensor], config: TrainingConfig) -> None:
        self.sim = sim
        self.table = sim.encodings()
        self.sites = schedule.quantized_sites(sim.sites, config)
        self.whole = self.active = frozenset(s.name for s in self.sites)
        self.watched: dict[str, Tensor] = {}
        self._clips: dict[str, nn.Module] = {}
        if not self.sites:
            raise ConfigError(f"training.mode: {config.mode!r} trains nothing, as the plan quantizes no weight")
        found = {s.name: self.table[s.name] for s in self.sites if s.role != "input"}
        constrained = [name for name, e in found.items() if e.is_power_of_two and e.block is None]
        self.exponents = exponents_of(sim, constrained, config)
        if config.exponents == "fixed":
            self.exponents.freeze()
        trained = [p for p in parameters.values() if isinstance(p, nn.Parameter) and p.is_floating_point()]
        everything = not any(p.requires_grad for p in trained)  # as in a network that was loaded to be used only
        for p in trained if everything else ():
            p.requires_grad_()
        self.norms = BatchNorms(sim, constrained if config.batch_norm == "live" else ())
        self.lattices = {
            y.bias.name: (y.input.name, y.weight.name)
            for y in sim.placement.layers
            if y.bias is not None and y.input is not None and y.weight is not None
        }
        replaced = self.norms.replaced()
        own = {id(p): p for p in trained if p.requires_grad and id(p) not in replaced}
        self.tensors = [*own.values(), *self.norms.parameters(everything)]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within it the simulation computes with what is learned; sites that learn have no encoding of their own."""
        fixed = self.whole - set(self.exponents)
        self.sim.load({name: encoding for name, encoding in self.table.items() if name in fixed})
        with self.sim.intercept(self.tap), self.norms.attached(), self._clipping():
            yield

    @contextmanager
    def _clipping(self) -> Iterator[None]:
        """Within it, quantizers that learn compute the ReLU in front of them, where they alone read it."""
        model = self.sim.model
        nodes = list(model.graph.nodes) if isinstance(model, fx.GraphModule) else []
        calls = Counter(str(node.target) for node in nodes)
        places: dict[str, nn.Module] = {}
        for node in nodes:
            name = str(node.target)
            if node.op != "call_module" or len(node.users) != 1 or calls[name] > 1:
                continue
            module, reader = model.get_submodule(name), next(iter(node.users))
            quantizer = model.get_submodule(str(reader.target)) if reader.op == "call_module" else None
            if type(module) in TOPS and isinstance(quantizer, FakeQuantize) and quantizer.site.name in self.exponents:
                places[name] = self._clips[quantizer.site.name] = module
        for name in places:
            model.set_submodule(name, nn.Identity())
        try:
            yield
        finally:
            self._clips.clear()
            for name, module in places.items():
                model.set_submodule(name, module)

    @torch.no_grad()
    def measure(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Running statistics become those of what is computed on a few batches; to be called within `computing`."""
        with self.norms.measuring():
            for arguments in islice(batches, MEASURED):
                self.sim.model(*arguments)

    @torch.no_grad()
    def settle(self) -> None:
        """Puts what was learned into the simulation; to be called behind `computing`."""
        self.exponents.refresh()
        self.norms.fold()
        self.exponents.settle(self.sim.parameter)
        learned: Table = self.exponents.table()
        self.sim.load({**self.table, **learned})

    def tap(self, site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        """What a site computes with at the moment; see `backends.base.Tap`."""
        value = self._computed(site, x, quantized)
        if site.name in self.watched:
            self.watched[site.name] = value
        return value

    def _computed(self, site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        norm = self.norms.get(site.module)
        if norm is not None and site.role == "output":
            x = self.norms.output(norm, x)
        elif norm is not None:
            if self.norms.live:
                return self.norms.live_parameter(norm, site, self.exponents if site.name in self.active else None)
            x = norm.folded_weight() if site.role == "weight" else norm.folded_bias()
        if site.role == "bias":
            return self._on_lattice(site.name, x)
        clip = self._clips.get(site.name)
        if site.name not in self.active:
            return x if clip is None else clip(x)
        if site.name not in self.exponents:
            return quantized
        top = None if clip is None else TOPS[type(clip)]
        return self.exponents.quantize(site.name, x, site.role != "weight", top)

    def _on_lattice(self, name: str, bias: Tensor) -> Tensor:
        """A bias in units of s_in * s_w as they are now, where both are quantized; the gradient passes unchanged."""
        sources = self.lattices.get(name, ())
        if not sources or not self.active.issuperset(sources):
            return bias
        unit = torch.ones((), device=bias.device)
        for source in sources:
            learned = source in self.exponents
            scale = (
                self.exponents.scale(source)
                if learned
                else torch.from_numpy(self.table[source].per_channel.scale.copy())
            )
            unit = unit * sent(scale, bias.device)
        with torch.no_grad():
            rounding = (bias / unit).round_().mul_(unit).sub_(bias)
        return bias + rounding
