"""Cross-layer equalization: factors between layers, which ReLU networks do not notice, even out the weights' ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from pow2quant.backends.base import Batch, inputs
from pow2quant.errors import DataError
from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.pooling import AVERAGE_POOLS, MAX_POOLS
from pow2quant.frontends.operators import called

ROUNDS = 40
"""Over all groups, at most: neighbouring groups share a layer, so that one moves what the other has evened out."""

CONVERGED = 1e-3
"""A round in which no factor is further from one ends the search."""

DEVIATIONS = 3
"""What lies further below the mean counts as never seen."""

FULL = 6.001
"""A channel that was scaled up to its ReLU6, but for rounding, does not reach it: `MARGIN` is left."""

MARGIN = 0.25
"""Peaks count as so much further from the mean than the calibration data showed them."""

WEIGHTED = (*m.CONVOLUTIONS, *m.TRANSPOSED, nn.Linear)
PASSES = (nn.ReLU, m.LeakyReLU, nn.PReLU, m.PaddedMaxPool, *MAX_POOLS, *AVERAGE_POOLS, m.NearestUpsample)
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

    tensors: the nodes that compute them. writers, readers: the nodes of weighted layers whose rows, or columns, make up
    for it. clips: the ReLU6 inside. fixed: whether something that is not homogeneous takes part: then it cannot be
    scaled.
    """

    tensors: list[fx.Node] = field(default_factory=list)
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
            first.tensors += other.tensors
            first.writers += other.writers
            first.readers += other.readers
            first.clips += other.clips
            first.fixed |= other.fixed
            of.update({n: first for n, g in of.items() if g is other})
        return first

    uses = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    for node in network.graph.nodes:
        sources = list(node.all_input_nodes)
        of[node] = Group([node])
        module = called(network, node)
        if isinstance(module, WEIGHTED) and not (isinstance(module, m.TRANSPOSED) and module.groups > 1):
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
            of[node] = Group([node], fixed=True)
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
    return weight.transpose(0, 1) if isinstance(network.get_submodule(str(node.target)), m.TRANSPOSED) else weight


def columns(network: fx.GraphModule, node: fx.Node) -> Tensor:
    """A view of a layer's weight with its input channels first, as (groups, C_in / groups, C_out / groups, …)."""
    module: Any = network.get_submodule(str(node.target))
    weight = network.get_parameter(f"{node.target}.weight").detach()
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    grouped = weight.view(groups, -1, *weight.shape[1:])
    return grouped if isinstance(module, m.TRANSPOSED) else grouped.transpose(1, 2)


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
    run_hooked(network, batches, hooks)
    if found and not moments:
        raise DataError("the calibration data are empty")

    def widened(high: Tensor, mean: Tensor, count: Tensor) -> Tensor:
        return (high + MARGIN * (high - mean / count)).clamp_min(0)

    return [torch.stack([widened(*moments[name]) for name in names]).amax(0) for names in watched]


def run_hooked(network: fx.GraphModule, batches: Iterable[Batch], hooks: list[RemovableHandle]) -> None:
    """Runs the network, if there is a hook to be called, and removes the hooks."""
    try:
        with torch.no_grad():
            for batch in batches if hooks else ():
                network(*inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()


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


def absorbed(mean: Tensor, deviation: Tensor) -> Tensor:
    """c = max(0, mean - 3 deviation), (C,): of normal values 99.865 % are above (Nagel et al. 2019, section 4.1.3)."""
    return (mean - DEVIATIONS * deviation).clamp_min(0)


def pairs(network: fx.GraphModule) -> list[Group]:
    """Where a constant can go from a bias, through a ReLU or ReLU6, into the next layers' biases: their only reader.

    Those must have one, and see the constant everywhere: without zero padding, and no transposed convolutions. Means
    over the image and a flattening may lie between. Layers that are called twice keep theirs.
    """
    found = []
    uses = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    for node in network.graph.nodes:
        module = called(network, node)
        if not isinstance(module, (nn.ReLU, nn.ReLU6)):
            continue
        (writer,) = node.all_input_nodes
        readers = _constant_readers(network, node)
        layer = called(network, writer)
        layers = [layer, *(called(network, reader) for reader in readers)]
        if any(uses[id(p)] > 1 for each in layers if each is not None for p in each.parameters()):
            continue
        if readers and isinstance(layer, WEIGHTED) and layer.bias is not None and len(writer.users) == 1:
            found.append(Group([node], [writer], readers, [node] if isinstance(module, nn.ReLU6) else []))
    return found


def _constant_readers(network: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """All layers that read a tensor; none where one would not read a constant per channel as such."""
    found = []
    for user in node.users:
        module: Any = called(network, user)
        if isinstance(module, nn.Linear) or (isinstance(module, m.CONVOLUTIONS) and not _padding(module)):
            readers = [user] if module.bias is not None else []
        elif isinstance(module, (m.Mean, nn.Flatten)) and _homogeneous(module, user):
            readers = _constant_readers(network, user)
        else:
            readers = []
        if not readers:
            return []
        found += readers
    return found


def _padding(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    padding = convolution.padding
    return padding == "same" if isinstance(padding, str) else any(padding)


@torch.no_grad()
def absorb(network: fx.GraphModule, group: Group, c: Tensor) -> None:
    """b_1 -= c, b_2 += W_2 c (Nagel et al. 2019, eq. 15 and 16), in place; c: (C,) of one of the `pairs`."""
    (writer,) = group.writers
    network.get_parameter(f"{writer.target}.bias").sub_(c.to(torch.float32))
    if "normal" in writer.meta:
        mean, deviation = writer.meta["normal"]
        writer.meta["normal"] = (mean - c.to(mean), deviation)
    for node in group.readers:
        kernels = columns(network, node).double()
        moved = torch.einsum(
            "gio,gi->go", kernels.flatten(3).sum(3) if kernels.ndim > 3 else kernels, c.double().view(kernels.shape[:2])
        )
        bias = network.get_parameter(f"{node.target}.bias")
        bias.add_(moved.flatten().to(bias))


def normals(network: fx.GraphModule, nodes: list[fx.Node], batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Mean and deviation of each node's channels, (C,): as its batch norm knew them, otherwise of the data."""
    moments: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, entering: tuple[Tensor, ...], y: Tensor) -> None:
            channels = y.double().transpose(0, 1).flatten(1)
            sums = torch.stack(
                [torch.ones(len(channels)) * channels.shape[1], channels.sum(1), channels.square().sum(1)]
            )
            moments[name] = moments.get(name, torch.zeros(())) + sums

        return hook

    unknown = [str(n.target) for n in nodes if "normal" not in n.meta]
    run_hooked(network, batches, [network.get_submodule(n).register_forward_hook(look(n)) for n in unknown])

    def of(node: fx.Node) -> tuple[Tensor, Tensor]:
        if "normal" in node.meta:
            mean, deviation = node.meta["normal"]
            return mean, deviation
        count, first, second = moments[str(node.target)]
        return first / count, (second / count - (first / count).square()).clamp_min(0).sqrt()

    return [of(node) for node in nodes]


def bias_magnitudes(network: fx.GraphModule, group: Group) -> list[Tensor]:
    """Of every writer with a bias, (C,) each."""
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

    absorb_biases: afterwards, what is hardly ever undercut of a channel goes into the biases behind (section 4.1.3):
    mean less three deviations, as batch norm or else the data say, of ReLUs, and of channels that do not reach their
    ReLU6, where only layers without zero padding read.
    """

    deterministic: ClassVar[bool] = True

    absorb_biases: bool = False

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
                s = torch.clamp(s, *bounds(peak[i], bias_magnitudes(network, group), bool(group.clips)))
                scale(network, group, s)
                peak[i] = peak[i] / s
                largest = max(largest, float(s.log().abs().max()))
            if largest < CONVERGED:
                break
        if self.absorb_biases:
            _absorb_all(network, batches)
        return network


def _absorb_all(network: fx.GraphModule, batches: Iterable[Batch]) -> None:
    found = pairs(network)
    peak = peaks(network, found, batches)
    for group, highest, normal in zip(
        found, peak, normals(network, [g.writers[0] for g in found], batches), strict=True
    ):
        c = absorbed(*normal)
        absorb(network, group, c.where(highest <= FULL, 0) if group.clips else c)
