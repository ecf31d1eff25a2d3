"""Cross-layer equalization: factors between layers, which ReLU networks do not notice, even out the weights' ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from pow2quant.backends import modules as m
from pow2quant.backends.base import Batch, inputs
from pow2quant.errors import DataError

ROUNDS = 40
"""Over all groups, at most: neighbouring groups share a layer, so that one moves what the other has evened out."""

CONVERGED = 1e-3
"""A round in which no factor is further from one ends the search."""

MARGIN = 0.25
"""Peaks count as so much further from the mean than the calibration data showed them."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear, *TRANSPOSED)
PASSES = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, m.NearestUpsample)
"""f(s x) = s f(x) for every s > 0 per channel."""


def factors(writers: list[Tensor], readers: list[Tensor]) -> Tensor:
    """s = sqrt(r1 r2) / r2 per channel (Nagel et al. 2019, eq. 11), (C,); one for channels with a range of zero.

    writers, readers: the ranges r1 and r2, largest absolute weights per channel, of each layer that writes the tensor
    or reads it; where there are several, the geometric mean stands in. Rows of writers and their biases are divided by
    s, columns of readers multiplied.
    """
    logs = [torch.stack(r).double().log().mean(0) for r in (writers, readers)]
    s = ((logs[0] - logs[1]) / 2).exp()
    return torch.where(torch.isfinite(s) & (s > 0), s, 1.0)


@dataclass
class Group:
    """Tensors that can only be scaled together, by one factor per channel: a chain's, or a whole residual stream.

    writers, readers: the nodes of weighted layers whose rows, or columns, make up for it. clips: the ReLU6 inside.
    fixed: whether something that is not homogeneous takes part: then it cannot be scaled.
    """

    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    clips: list[fx.Node] = field(default_factory=list)
    fixed: bool = False

    @property
    def free(self) -> bool:
        """Whether its factors can be chosen."""
        return bool(self.writers and self.readers) and not self.fixed


def groups(network: fx.GraphModule) -> list[Group]:
    """The groups of a prepared network that can be scaled, as they follow from the graph alone."""
    of: dict[fx.Node, Group] = {}

    def join(*nodes: fx.Node) -> Group:
        first, *others = {id(g): g for g in (of[n] for n in nodes)}.values()
        for other in others:
            first.writers += other.writers
            first.readers += other.readers
            first.clips += other.clips
            first.fixed |= other.fixed
            of.update({n: first for n, g in of.items() if g is other})
        return first

    uses = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    for node in network.graph.nodes:
        sources = list(node.all_input_nodes)
        of[node] = Group()
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, WEIGHTED) and not (isinstance(module, TRANSPOSED) and module.groups > 1):
            of[node].writers.append(node)
            of[sources[0]].readers.append(node)
            if any(uses[id(p)] > 1 for p in module.parameters()):
                of[node].fixed = of[sources[0]].fixed = True
        elif module is not None and _homogeneous(module, node):
            group = join(node, *sources)
            if isinstance(module, nn.ReLU6):
                group.clips.append(node)
        else:
            join(node, *sources).fixed = True
            of[node] = Group(fixed=True)
    return [g for g in {id(g): g for g in of.values()}.values() if g.free]


def _homogeneous(module: nn.Module, node: fx.Node) -> bool:
    """Whether an operation passes a factor per channel (dimension 1) on."""
    shapes = [tuple(a.meta["shape"]) for a in node.all_input_nodes]
    if isinstance(module, (m.Add, m.Sub)):
        return len({s[1:] for s in shapes}) == 1
    if isinstance(module, m.ZeroPad):
        return len(module.pads) <= 2 * (len(shapes[0]) - 2)
    if isinstance(module, m.Mean):
        return all(int(d) % len(shapes[0]) > 1 for d in module.dims)
    if isinstance(module, m.Slice):
        return all(int(cut[0]) % len(shapes[0]) > 1 for cut in module.slices)
    if isinstance(module, nn.Flatten):
        return bool(prod(shapes[0][2:]) == 1)
    return isinstance(module, (*PASSES, nn.ReLU6))


def rows(network: fx.GraphModule, node: fx.Node) -> Tensor:
    """A view of a layer's weight with its output channels first: (C_out, …)."""
    weight = network.get_parameter(f"{node.target}.weight").detach()
    return weight.transpose(0, 1) if isinstance(network.get_submodule(str(node.target)), TRANSPOSED) else weight


def columns(network: fx.GraphModule, node: fx.Node) -> Tensor:
    """A view of a layer's weight with its input channels first, as (groups, C_in / groups, C_out / groups, …)."""
    module: Any = network.get_submodule(str(node.target))
    weight = network.get_parameter(f"{node.target}.weight").detach()
    if isinstance(module, TRANSPOSED):
        return weight[None]
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)


@torch.no_grad()
def scale(network: fx.GraphModule, group: Group, s: Tensor) -> None:
    """Divides a group's tensors by s (C,), in place; what follows does not notice."""
    for node in group.writers:
        weight = rows(network, node)
        weight.div_(s.view(-1, *[1] * (weight.ndim - 1)).to(weight))
        bias = network.get_submodule(str(node.target)).bias
        if isinstance(bias, Tensor):
            bias.div_(s.to(bias))
        if "normal" in node.meta:
            node.meta["normal"] = tuple(v / s.to(v) for v in node.meta["normal"])
    for node in group.readers:
        weight = columns(network, node)
        weight.mul_(s.view(*weight.shape[:2], *[1] * (weight.ndim - 2)).to(weight))


def peaks(network: fx.GraphModule, found: list[Group], batches: Iterable[Batch]) -> list[Tensor]:
    """For every group the largest magnitude per channel, (C,): of what clips read, else of what readers read.

    A clip's input counts with its sign: a channel that never rises above zero has a peak of zero. The distance from the
    mean is widened by `MARGIN`, for the sake of data that were not seen.
    """
    moments: dict[str, list[Tensor]] = {}

    def look(name: str, signed: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, entering: tuple[Tensor, ...]) -> None:
            x = entering[0].transpose(0, 1).flatten(1)
            high, mean = (x if signed else x.abs()).amax(1), x.mean(1) if signed else torch.zeros(())
            before = moments.get(name, [high, mean * 0, torch.zeros(())])
            moments[name] = [torch.maximum(before[0], high), before[1] + mean, before[2] + 1]

        return hook

    watched = [[str(n.target) for n in group.clips or group.readers] for group in found]
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(look(name, bool(group.clips)))
        for group, names in zip(found, watched, strict=True)
        for name in names
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                network(*inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()
    if found and not moments:
        raise DataError("the calibration data are empty")

    def widened(high: Tensor, mean: Tensor, count: Tensor) -> Tensor:
        return (high + MARGIN * (high - mean / count)).clamp_min(0)

    return [torch.stack([widened(*moments[name]) for name in names]).amax(0) for names in watched]


def bounds(peak: Tensor, biases: list[Tensor], clipped: bool) -> tuple[Tensor, Tensor]:
    """The least and the largest s, each (C,), by which a channel may be divided.

    peak: of the activations, (C,). biases: magnitudes, (C,), of every layer that writes them. A channel may grow to the
    tensor's largest peak, and its bias to the layer's largest. clipped: behind a ReLU6 the peak may come up to 6; a
    channel whose peak lies above keeps its factor of one, because the function would change.
    """
    ceiling = torch.tensor(6.0) if clipped else peak.max()
    low = torch.stack([part / most for part, most in [(peak, ceiling), *((b, b.max()) for b in biases)] if most > 0])
    stuck = torch.tensor(clipped) & (peak >= ceiling)
    return torch.where(stuck, 1.0, low.amax(0)), torch.where(stuck, 1.0, torch.inf)


def _biases(network: fx.GraphModule, group: Group) -> list[Tensor]:
    found = [network.get_submodule(str(node.target)).bias for node in group.writers]
    return [b.detach().abs() for b in found if isinstance(b, Tensor)]


def _ranges(weight: Tensor, channel_dims: int) -> Tensor:
    return weight.abs().flatten(0, channel_dims - 1).flatten(1).amax(1)


@dataclass(frozen=True)
class Equalize:
    """Cross-layer equalization, which evens out the weights' ranges between layers (Nagel et al. 2019, eq. 9 to 11).

    Over chains and residual streams of Conv, Linear, ReLU, ReLU6, pooling and addition. Beyond the paper, whose factors
    blow up the activations of nearly dead channels and which has to give ReLU6 up: the calibration data say how far a
    channel may grow, up to the largest channel of its tensor, or up to the ReLU6 that it must not reach.
    """

    def rewrite(self, network: fx.GraphModule, batches: Iterable[Batch]) -> fx.GraphModule:
        """Rewrites in place, and returns the network. Raises DataError for no batches."""
        found = groups(network)
        peak = peaks(network, found, batches)
        for _ in range(ROUNDS):
            largest = 0.0
            for i, group in enumerate(found):
                s = factors(
                    [_ranges(rows(network, n), 1) for n in group.writers],
                    [_ranges(columns(network, n), 2) for n in group.readers],
                ).to(peak[i])
                s = torch.clamp(s, *bounds(peak[i], _biases(network, group), bool(group.clips)))
                scale(network, group, s)
                peak[i] = peak[i] / s
                largest = max(largest, float(s.log().abs().max()))
            if largest < CONVERGED:
                break
        return network
