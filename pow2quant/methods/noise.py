"""What quantization adds to a network's results: the expected squared error, tensor by tensor, to first order.

An error of variance v at every position of a channel moves the results by g v, in expectation: g, the channel's gain,
is the sum over positions and results of their squared derivatives. Errors count as independent of each other, and from
position to position. So weights and activations of every layer have one currency, in which what one tensor wins can be
weighed against what another loses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pow2quant.artifact import Site
from pow2quant.backends.base import Batch, inputs
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.backends.placement import Placement
from pow2quant.config import TensorSpec
from pow2quant.errors import DataError
from pow2quant.frontends import modules as m
from pow2quant.frontends.copies import copied
from pow2quant.frontends.operators import called
from pow2quant.methods.equalization import columns
from pow2quant.methods.patches import some_patches
from pow2quant.pow2_constraints import Encoding, Format, Observed, choose

IMAGES = 16
"""So many are differentiated at once."""

SAMPLE = 1 << 10
"""Values per channel that are kept of a tensor."""

PATCHES = 1 << 6
"""Positions per image at which the input of a layer is looked at."""

EXPONENTS = 3
"""A row's scale is sought among so many, from the smallest at which nothing saturates downwards."""

FRACTIONS = tuple(1 - i / 20 for i in range(13))
"""The same of a free scale: fractions of the one at which nothing saturates."""


@dataclass
class LayerNoise:
    """A layer's weight, (groups, C_out / groups, C_in / groups, K) as `matrix` has it.

    spec: how it is quantized; per_channel: with a scale for every row. gain: of the layer's result, (C_out,).
    covariance: of what a row sees, (groups, D, D), D = K C_in / groups.
    """

    spec: TensorSpec
    per_channel: bool
    gain: Tensor
    covariance: Tensor

    def errors(self, weight: Tensor, scale: Tensor) -> Tensor:
        """g d^T H d of every row, d its error of rounding: (groups, C_out / groups). scale: the same shape."""
        d = self._rounding(weight, scale).flatten(2)
        return ((d @ self.covariance) * d).sum(2) * self.gain.view(scale.shape)

    def errors_by_column(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The same of every kernel by itself, as if input channels were uncorrelated: (…, C_in / groups)."""
        d = self._rounding(weight, scale)
        blocks = self.covariance.view(len(d), *d.shape[2:], *d.shape[2:]).diagonal(dim1=1, dim2=3)  # (groups, K, K, I)
        if d.shape[3] == 1:
            products = d.squeeze(3).square() * blocks[:, 0]
        else:
            products = torch.einsum("goik,gkli,goil->goi", d, blocks, d)
        return products * self.gain.view(*scale.shape, 1)

    def _rounding(self, weight: Tensor, scale: Tensor) -> Tensor:
        grid, s = Format(self.spec.bits, self.spec.symmetric).grid, scale[..., None, None]
        return (weight / s).round_().clamp_(float(grid.qmin), float(grid.qmax)).mul_(s).sub_(weight)

    def least(self, weight: Tensor, expected: bool = False) -> tuple[Tensor, Tensor]:
        """The scales of least error, and the error of every row; each (groups, C_out / groups).

        expected: as if input channels were uncorrelated.
        """
        scales = torch.stack(self._candidates(weight))
        found = [self.errors_by_column(weight, s).sum(2) if expected else self.errors(weight, s) for s in scales]
        errors = torch.stack(found)
        if not self.per_channel:
            at = int(errors.sum((1, 2)).argmin())
            return scales[at], errors[at]
        error, chosen = errors.min(0)
        return scales.gather(0, chosen[None])[0], error

    def divide_input(self, divisor: Tensor) -> None:
        """Divides the input channels by (C_in,)."""
        by_row = divisor.view(len(self.covariance), -1, 1)
        by_row = by_row.expand(-1, -1, self.covariance.shape[1] // by_row.shape[1]).flatten(1)
        self.covariance /= by_row[:, :, None] * by_row[:, None, :]

    def _candidates(self, weight: Tensor) -> list[Tensor]:
        extent = weight.abs().amax((2, 3))
        extent = extent if self.per_channel else extent.max().expand(extent.shape)
        grid = Format(self.spec.bits, self.spec.symmetric).grid
        fitting = extent.clamp_min(torch.finfo(torch.float32).tiny) / float(grid.qmax)
        if not self.spec.power_of_2:
            return [fitting * f for f in FRACTIONS]
        return [torch.exp2(fitting.log2().ceil() - i) for i in range(EXPONENTS)]


@dataclass
class TensorNoise:
    """A tensor of activations.

    gain: (C,). sample: (C, n), of what enters if the tensor comes from a ReLU6. ceiling: (C,), where the float network
    clips then, whatever is clipped at 6 by now.
    """

    spec: TensorSpec
    gain: Tensor
    sample: Tensor
    ceiling: Tensor | None = None
    headroom: float = 1.0

    def errors(self, divisor: Tensor, encoding: Encoding | None = None) -> Tensor:
        """g E[d^2] per channel, (C,), d the error after division by `divisor`, () or (C,), in units of before.

        encoding: None for the one that calibration would choose after the division.
        """
        x = self.sample / divisor.view(-1, 1)
        quantize = FakeQuantize(Site("", "output"))
        quantize.encoding = encoding or self._chosen(self._entering(x))
        x = x * self.headroom
        entering = self._entering(x)
        exact = x if self.ceiling is None else x.clamp_min(0).minimum((self.ceiling / divisor)[:, None])
        error: Tensor = quantize(entering) - exact
        return error.square().mean(1) * divisor**2 * self.gain

    def encoding(self) -> Encoding:
        """The encoding that calibration would choose."""
        return self._chosen(self._entering(self.sample))

    def divide(self, divisor: Tensor) -> None:
        """Divides the channels by (C,); the results do not notice, so the gains rise."""
        self.sample /= divisor[:, None]
        self.gain *= divisor**2
        if self.ceiling is not None:
            self.ceiling /= divisor

    def _entering(self, x: Tensor) -> Tensor:
        return x if self.ceiling is None else x.clamp(0, 6)

    def _chosen(self, values: Tensor) -> Encoding:
        form = Format(self.spec.bits, self.spec.symmetric, self.spec.power_of_2)
        return choose(self.spec.range, Observed.of(values.numpy()), form)


def matrix(network: fx.GraphModule, node: fx.Node) -> Tensor:
    """A layer's weight as (groups, C_out / groups, C_in / groups, K)."""
    by_column = columns(network, node)
    return by_column.reshape(*by_column.shape[:3], -1).transpose(1, 2)


def measure(
    network: fx.GraphModule, placement: Placement, tensors: Collection[fx.Node], batches: Iterable[Batch]
) -> tuple[dict[fx.Node, LayerNoise], dict[fx.Node, TensorNoise]]:
    """The quantized ones of a network's weights, and of `tensors`, by their nodes. Raises DataError for no data.

    The gains come from one random direction of the results per image: its squared derivative has that of all as mean.
    """
    nodes = {str(n.target): n for n in network.graph.nodes if n.op == "call_module"}
    weighted = {nodes[y.module]: y for y in placement.layers if y.weight is not None}
    sampled = [n for n in tensors if n.name in placement.quantized]
    seen = _Seen(network, [n.name for n in weighted], [n.name for n in sampled])
    for batch in batches:
        for images in zip(*(x.split(IMAGES) for x in inputs(batch)), strict=True):
            seen.look(images)
    if not seen.count:
        raise DataError("the calibration data are empty")

    def layer_noise(node: fx.Node) -> LayerNoise:
        site, weight = weighted[node].weight, matrix(network, node)
        assert site is not None
        covariance = seen.covariance(node.name, weight.shape[2] * weight.shape[3])
        spec, per_channel = placement.specs[site.name], weighted[node].axis is not None
        return LayerNoise(spec, per_channel, seen.gain[node.name].clone(), covariance)

    def tensor_noise(node: fx.Node) -> TensorNoise:
        sample = torch.cat(seen.samples[node.name], 1)
        spec, gain = placement.specs[placement.quantized[node.name].name], seen.gain[node.name].clone()
        ceiling = torch.full_like(gain, 6.0) if _is_clip(network, node) else None
        return TensorNoise(spec, gain, sample[:, :: -(-sample.shape[1] // SAMPLE) | 1].clone(), ceiling)

    return {n: layer_noise(n) for n in weighted}, {n: tensor_noise(n) for n in sampled}


class _Seen(fx.Interpreter):
    """Runs the network, forwards and backwards, and keeps what is asked for, by the names of nodes."""

    def __init__(self, network: fx.GraphModule, layers: Collection[str], tensors: Collection[str]) -> None:
        super().__init__(copied(network).requires_grad_(False))
        self.layers, self.tensors = frozenset(layers), frozenset(tensors)
        self.count = 0
        self.gain: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {n: [] for n in tensors}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._live: dict[str, Tensor] = {}
        self._ends: list[Tensor] = []
        self._random = torch.Generator().manual_seed(0)

    def look(self, images: tuple[Tensor, ...]) -> None:
        """Takes a few images into account; the means go over calls, alike whatever the number of images."""
        self._live, self._ends = {}, []
        with torch.enable_grad():
            found = self.run(*images)
            # of a network that gives indices alone, what they are the indices of
            results = [y for y in (found if isinstance(found, tuple) else (found,)) if y.requires_grad] or self._ends
            signs = [torch.randint(0, 2, y.shape, generator=self._random) * 2 - 1 for y in results]
            total = torch.stack([(y * s).sum() for y, s in zip(results, signs, strict=True)]).sum()
            slopes = torch.autograd.grad(total, list(self._live.values()), allow_unused=True)
        for (name, y), slope in zip(self._live.items(), slopes, strict=True):
            squares = torch.zeros(y.shape[1]) if slope is None else slope.square().transpose(0, 1).flatten(1).sum(1)
            self.gain[name] = self._mean(self.gain.get(name), squares / len(images[0]))
        self.count += 1

    def covariance(self, name: str, values: int) -> Tensor:
        """(groups, values, values); where single values stand for all taps, these count as uncorrelated."""
        mean, square = self._moments[name]
        found = square - mean[:, :, None] * mean[:, None, :]
        return torch.kron(found, torch.eye(values // found.shape[1]))

    def _mean(self, before: Tensor | None, now: Tensor) -> Tensor:
        return now if before is None else before + (now - before) / (self.count + 1)

    def run_node(self, n: fx.Node) -> Any:
        """As fx says, and kept."""
        entering = self.fetch_args_kwargs_from_env(n)[0]
        if n.name in self.layers:
            seen = _entering(self.fetch_attr(str(n.target)), entering[0].detach())
            mean, square = self._moments.get(n.name, (None, None))
            product = seen @ seen.transpose(1, 2) / seen.shape[2]
            self._moments[n.name] = self._mean(mean, seen.mean(2)), self._mean(square, product)
        y = super().run_node(n)
        if isinstance(y, Tensor) and not y.requires_grad:
            self._ends += [x for x in entering if isinstance(x, Tensor) and x.requires_grad]
        if n.name in self.layers | self.tensors:
            y = y if y.requires_grad else y.requires_grad_()
            self._live[n.name] = y
        if n.name in self.tensors:
            x = entering[0] if _is_clip(self.module, n) else y
            channels = x.detach().transpose(0, 1).flatten(1)
            self.samples[n.name].append(channels[:, :: -(-channels.shape[1] // SAMPLE) | 1].clone())
        return y


def _is_clip(network: nn.Module, node: fx.Node) -> bool:
    return isinstance(called(network, node), nn.ReLU6)


def _entering(layer: Any, x: Tensor) -> Tensor:
    """What the rows of a layer see at some positions, (groups, D, n); of a transposed convolution, single values."""
    if isinstance(layer, m.CONVOLUTIONS):
        return some_patches(layer, x, PATCHES)
    values = x.transpose(0, 1).flatten(1)
    return values.view(getattr(layer, "groups", 1), -1, values.shape[1])
