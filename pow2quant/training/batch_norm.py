"""Batch norm that stays live while the network it is folded into is trained (Jacob et al. 2018, section 3.2).

The quantized network has no batch norm: it computes with Q(w * s) and with the bias b = shift - mean * s, where
s = gain / sqrt(variance + eps), from running statistics. So it is evaluated, and so it is trained once batch norm is
frozen. Until then a layer computes with Q(w * s) / s, which is what rounding leaves of w, and its output is normalized
with the batch's own statistics (Krishnamoorthi 2018, section 3.2.2): large steps are renormalized, and nothing of the
size of an activation is computed that the float network would not compute.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant.artifact import Site
from pow2quant.backends.base import Simulation
from pow2quant.backends.placement import Layer
from pow2quant.frontends.operators import weight_axis
from pow2quant.training.exponents import Exponents

MOMENTUM = 0.01
"""Share of a batch's statistics in the running ones."""

LEAST = 2.0**-10
"""A gain stays above this share of what it was at first: its sign is the weights'."""


@dataclass(frozen=True)
class Normalized:
    """A layer with its batch norm.

    weight: not folded, (C_out, …) or, transposed, (C_in, C_out, …); axis: its dimension C_out. gain, shift, mean,
    variance: (C_out,), the latter two running; views of what `BatchNorms` holds, the shift excepted.
    """

    layer: Layer
    weight: nn.Parameter
    gain: nn.Parameter
    shift: nn.Parameter
    mean: Tensor
    variance: Tensor
    eps: float
    axis: int

    def factor(self) -> Tensor:
        """s = gain / sqrt(variance + eps), (C_out,)."""
        return self.gain / torch.sqrt(self.variance + self.eps)

    def folded_weight(self) -> Tensor:
        """w * s."""
        return self.weight * self.factor().view([-1 if d == self.axis else 1 for d in range(self.weight.ndim)])

    def folded_bias(self) -> Tensor:
        """shift - mean * s, (C_out,)."""
        return self.shift - self.mean * self.factor()

    def normalize(self, x: Tensor) -> Tensor:
        """gain * (x - mean) / sqrt(variance + eps) + shift, with mean and variance of the batch. x: (N, C_out, …).

        They enter the running ones, which stand in where a channel has a single value.
        """
        many = x.numel() > x.shape[1]
        return F.batch_norm(x, self.mean, self.variance, self.gain, self.shift, many, MOMENTUM, self.eps)

    @torch.no_grad()
    def center(self, mean: Tensor, variance: Tensor) -> None:
        """Takes over running statistics of what the layer computes, in place; the folded layer stays as it is."""
        factor, bias = self.factor(), self.folded_bias()
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.gain.copy_(factor * torch.sqrt(self.variance + self.eps))
        self.shift.copy_(bias + self.mean * factor)


class BatchNorms:
    """The layers of a simulation whose batch norm is trained, by module.

    live: whether they compute with the batch's statistics. statistics: all running means and variances, (2, channels).
    gains: all of them, (channels,); the parameters of the layers are views of it.
    """

    def __init__(self, sim: Simulation, weights: Collection[str]) -> None:
        """weights: the weight sites of layers that take part, where a batch norm was folded into them."""
        self.live = False
        self._sim = sim
        self._seen: dict[str, list[Tensor]] | None = None
        nodes = {str(n.target): n for n in sim.network.graph.nodes if "batch_norm" in n.meta}
        layers = [
            y
            for y in sim.placement.layers
            if y.module in nodes and y.bias is not None and y.weight is not None and y.weight.name in weights
        ]
        sizes = [len(sim.parameter(f"{y.module}.bias")) for y in layers]
        device = next(sim.model.parameters()).device
        self.statistics = torch.zeros(2, sum(sizes), device=device)
        self.statistics[1] = 1
        self.gains = torch.ones(sum(sizes), device=device)
        parts = zip(layers, self.gains.split(sizes), self.statistics.split(sizes, 1), strict=True)
        self._layers = {y.module: _unfolded(sim, y, nodes[y.module], gain, *part) for y, gain, part in parts}
        self._learns = {name: nodes[name].meta.get("learns", (True, True)) for name in self._layers}
        self._eps = torch.cat([torch.full_like(y.mean, y.eps) for y in self] or [self.gains])
        self._sizes = sizes
        self._least = LEAST * self.gains
        self._factors: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Normalized]:
        return iter(self._layers.values())

    def get(self, module: str) -> Normalized | None:
        """The layer of this name, if it is among them."""
        return self._layers.get(module)

    def parameters(self, everything: bool = True) -> list[nn.Parameter]:
        """What is trained in place of the simulation's own weights and biases: weight, gain and shift of each.

        Not what the user's layer, or batch norm, has frozen, unless `everything` is to be trained.
        """
        found = []
        for name, y in self._layers.items():
            frees = self._sim.parameter(f"{name}.weight").requires_grad, *self._learns[name]
            found += [p for p, free in zip((y.weight, y.gain, y.shift), frees, strict=True) if free or everything]
        return found

    def replaced(self) -> set[int]:
        """The ids of the simulation's own parameters that are not trained."""
        names = [f"{module}.{role}" for module in self._layers for role in ("weight", "bias")]
        return {id(self._sim.parameter(name)) for name in names}

    def arrange(self, layout: torch.memory_format) -> None:
        """Lays out the weights of convolutions in memory."""
        for layer in self:
            if layer.weight.ndim == 4:
                layer.weight.data = layer.weight.data.contiguous(memory_format=layout)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, the outputs of layers that have no output site of their own pass through `output`, too."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                if not self._has_site(name):
                    hook = self._sim.model.get_submodule(name).register_forward_hook(self._hook(layer))
                    stack.callback(hook.remove)
            yield

    def _has_site(self, module: str) -> bool:
        return any(s.module == module and s.role == "output" for s in self._sim.sites)

    def _hook(self, layer: Normalized) -> Callable[[Any, Any, Tensor], Tensor]:
        return lambda module, entering, result: self.output(layer, result)

    def output(self, layer: Normalized, x: Tensor) -> Tensor:
        """What flows on from a layer that computed x, (N, C_out, …)."""
        if self._seen is not None:
            values = x.detach().double().transpose(0, 1).flatten(1)
            count = torch.full_like(values[:, 0], values.shape[1])
            moments = torch.stack([count, values.sum(1), values.square().sum(1)])
            self._seen.setdefault(layer.layer.module, []).append(moments)
        return layer.normalize(x) if self.live else x

    @contextmanager
    def on_batches(self, live: bool) -> Iterator[None]:
        """Within it, outputs are normalized with their own statistics, if `live`."""
        self.live = live
        if live:
            factors = self.gains / torch.sqrt(self.statistics[1] + self._eps)
            self._factors = dict(zip(self._layers, factors.split(self._sizes), strict=True))
        try:
            yield
        finally:
            self.live = False

    def live_parameter(self, layer: Normalized, site: Site, exponents: Exponents | None) -> Tensor:
        """What a live layer computes with: Q(w * s) / s (w, without exponents), and no bias."""
        if site.role == "bias":
            return torch.zeros_like(layer.mean)
        if exponents is None:
            return layer.weight
        return exponents.quantize_scaled(site.name, layer.weight, self._factors[layer.layer.module], layer.axis)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The running statistics become those of what is computed within, which must be attached and not live."""
        self._seen = {}
        try:
            yield
            for module, moments in self._seen.items():
                layer = self._layers[module]
                count, total, squares = torch.stack(moments).sum(0)
                factor, bias = layer.factor().double(), layer.folded_bias().double()
                mean = total / count
                variance = (squares / count - mean**2).clamp_min(0)
                layer.center((mean - bias) / factor, variance / factor**2)
        finally:
            self._seen = None
        self._least = LEAST * self.gains

    @torch.no_grad()
    def advance(self) -> None:
        """To be called when an optimizer has changed the parameters."""
        torch.maximum(self.gains, self._least, out=self.gains)

    @torch.no_grad()
    def fold(self) -> None:
        """Writes the folded weights and biases into the simulation."""
        for module, layer in self._layers.items():
            self._sim.parameter(f"{module}.weight").copy_(layer.folded_weight())
            self._sim.parameter(f"{module}.bias").copy_(layer.folded_bias())


@torch.no_grad()
def _unfolded(
    sim: Simulation, layer: Layer, node: fx.Node, gains: Tensor, means: Tensor, variances: Tensor
) -> Normalized:
    """A layer with a batch norm of mean 0 and variance 1 that folds to its weight and bias, to the bit.

    node: of the prepared network, which knows by what folding multiplied the channels. Of that, only the nearest power
    of two is taken out of the weight, because that loses no bit. gains, means, variances: (C_out,), written into.
    """
    weight, bias = (sim.parameter(f"{layer.module}.{role}") for role in ("weight", "bias"))
    axis = weight_axis(sim.network.get_submodule(layer.module)) or 0
    deviation, eps = node.meta["batch_norm"]
    factor = node.meta["normal"][1] / deviation
    power = torch.where(factor > 0, factor, 1.0).log2().round().clamp(-60, 60).exp2().to(bias)
    gains.copy_(power * torch.sqrt(variances + eps))
    raw = weight / power.view([-1 if d == axis else 1 for d in range(weight.ndim)])
    shift = nn.Parameter(bias.detach().clone())
    return Normalized(layer, nn.Parameter(raw), nn.Parameter(gains), shift, means, variances, eps, axis)
