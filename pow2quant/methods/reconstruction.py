"""Part by part through a network: what enters each part of the quantized one, and what the float one computes there.

For every method that goes "in order of computation, inputs from the part that is quantized already, targets from the
float network" (AdaRound, eq. 25; BRECQ; QDrop; GPFQ; bias correction). Each node is computed once per batch and
network, so a walk costs two forward passes, however many parts there are.

The prepared network itself is run, with the simulation's parameters and encodings: the bits of every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import UNMARKED, Batch, Marks, Simulation, device_of, inputs
from pow2quant.backends.calibration import bias_encoding, coarsen, settled
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.backends.placement import Layer
from pow2quant.errors import DataError, EncodingError
from pow2quant.frontends.copies import copied
from pow2quant.pow2_constraints import Encoding

Quantize = Callable[[Site, Tensor], Tensor]
"""(site, x) -> what flows on."""

Part = tuple[fx.Node, ...]
"""Consecutive nodes of the prepared network."""


@dataclass(frozen=True)
class Step:
    """A part whose turn it is. What lies in front of it is quantized as the simulation says now.

    nodes: the part. layers: the weighted ones in it. inputs: for every batch the quantized values that enter, one for
    each of `sources` (a layer has one); exact: what enters the float network's part. targets: for every batch what the
    float network computes in the last node.
    """

    nodes: Part
    layers: tuple[Layer, ...]
    sources: tuple[fx.Node, ...]
    inputs: Sequence[tuple[Tensor, ...]]
    exact: Sequence[tuple[Tensor, ...]]
    targets: Sequence[Tensor]
    _twin: _Twin
    _live: Mapping[fx.Node, Sequence[Tensor]]

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the part's parameters, such as `conv1.bias`."""
        own = {str(node.target) for node in self.nodes}
        return frozenset(n for n in self._twin.parameters if n.rpartition(".")[0] in own)

    @property
    def layer(self) -> Layer:
        """The part's only layer."""
        (layer,) = self.layers
        return layer

    def run(self, entering: tuple[Tensor, ...], quantize: Quantize) -> Tensor:
        """The last node's result, with the simulation's parameters. Differentiable; `quantize` is called at every site.

        entering: as in `inputs`. A layer whose result only a ReLU reads has no site there: the quantizer is the ReLU's.
        """
        values = dict(zip(self.sources, entering, strict=True))
        for node in self.nodes:
            values[node] = self._twin.compute(node, values, quantize)
        return values[self.nodes[-1]]

    def finish(self, quantize: Quantize) -> Iterator[tuple[Tensor, ...]]:
        """For every batch the network's results, computed from this part on. Only as long as it is the part's turn.

        quantize: as for `run`, here for all sites that follow.
        """
        order = list(self.nodes[0].graph.nodes)
        rest, end = order[order.index(self.nodes[0]) : -1], order[-1]
        for i in range(len(self.targets)):
            values, computed = {node: found[i] for node, found in self._live.items()}, set()
            for node in rest:
                values[node] = self._twin.compute(node, values, quantize)
                computed.add(node)
                for read in _arguments(node):
                    if computed.issuperset(read.users):
                        values.pop(read, None)
            yield tuple(values[node] for node in end.all_input_nodes)


def walk(
    sim: Simulation, batches: Iterable[Batch], parts: Sequence[Part] | None = None, marks: Marks = UNMARKED
) -> Iterator[Step]:
    """Yields the parts (default: `layers`), in order of computation, each ready to be changed in the simulation.

    When the next one is asked for, the part is computed as the simulation then says. marks: parts that are done already
    are left out. Raises DataError for no batches.
    """
    twin = _Twin(sim)
    data = [tuple(x.to(twin.device) for x in inputs(batch)) for batch in batches]
    if not data:
        raise DataError("the calibration data are empty")
    exact: dict[fx.Node, list[Tensor]] = {}
    quantized: dict[fx.Node, list[Tensor]] = {}
    computed: set[fx.Node] = set()
    done = marks.parts
    for i, node in enumerate(n for n in sim.network.graph.nodes if n.op == "placeholder"):
        site = sim.placement.quantized.get(node.name)
        quantize = quantizing(sim.encodings())
        exact[node] = [x[i] for x in data]
        quantized[node] = [x if site is None else quantize(site, x) for x in exact[node]]
    for number, part in enumerate(_complete(sim.network, layers(sim) if parts is None else parts), 1):
        _advance(part, len(data), exact, twin.compute_float)
        part_layers = tuple(twin.layers[str(n.target)] for n in part if calls(n, twin.layers))
        if part_layers and number > done:
            sources = tuple(dict.fromkeys(a for n in part for a in _arguments(n) if a not in part))
            entering, beside = (list(zip(*(v[s] for s in sources), strict=True)) for v in (quantized, exact))
            yield Step(part, part_layers, sources, entering, beside, exact[part[-1]], twin, quantized)
            marks.mark(sim, number)
        _advance(part, len(data), quantized, partial(twin.compute, quantize=quantizing(sim.encodings())))
        computed.update(part)
        for dead in [n for n in exact if computed.issuperset(n.users)]:
            del exact[dead], quantized[dead]


def calls(node: fx.Node, modules: Container[str]) -> bool:
    """Whether a node calls one of these modules. Inputs and the output are nodes with a target of the same kind."""
    return node.op == "call_module" and node.target in modules


def layers(sim: Simulation) -> list[Part]:
    """Every weighted layer as a part of its own; its target is what comes before the activation function.

    A layer that recurs is one at its last step.
    """
    weighted = {y.module for y in sim.placement.layers if y.weight is None or y.weight.name not in sim.placement.steps}
    return [(node,) for node in sim.network.graph.nodes if calls(node, weighted)]


def blocks(sim: Simulation) -> list[Part]:
    """The shortest parts that one tensor enters and one leaves, activation function included: residual blocks.

    (BRECQ, Li et al. 2021, section 3.2.) Parts without a layer, such as a pooling between blocks, are left out.
    """
    weighted = {layer.module for layer in sim.placement.layers}
    order = {node: i for i, node in enumerate(sim.network.graph.nodes)}
    found: list[Part] = []
    part: list[fx.Node] = []
    reach = 0  # the last reader of anything computed so far, the newest node aside
    for node, i in order.items():
        if node.op == "output":
            break
        if node.op == "call_module":
            part.append(node)
            if reach <= i and node.name not in sim.placement.fused:
                found.append(tuple(part))
                part = []
        reach = max(reach, *(order[user] for user in node.users))
    return [p for p in found if any(calls(n, weighted) for n in p)]


def activation(sim: Simulation, node: fx.Node) -> nn.Module | None:
    """The clip (ReLU, ReLU6, Hardtanh) that alone reads a node and holds the quantizer of both, or None."""
    if node.name not in sim.placement.fused:
        return None
    (reader,) = node.users
    return sim.network.get_submodule(str(reader.target))


def quantizing(table: Mapping[str, Encoding]) -> Quantize:
    """Fake quantization by a table; sites that it lacks stay float."""
    made: dict[str, FakeQuantize] = {}

    def quantize(site: Site, x: Tensor) -> Tensor:
        if site.name not in made:
            made[site.name] = FakeQuantize(site)
            made[site.name].encoding = table.get(site.name)
        quantized: Tensor = made[site.name](x)
        return quantized

    return quantize


def encode_weight(sim: Simulation, layer: Layer, encoding: Encoding) -> None:
    """Loads another encoding of a layer's weight; its bias gets the lattice that follows, wide enough for it."""
    assert layer.weight is not None
    table: Table = sim.encodings() | sim.placement.of_weight(layer, encoding)
    coarsen(sim, sim.placement.sharing(layer), table)
    _encode_bias(sim, layer, table)


def encode_activations(sim: Simulation, encodings: Table) -> None:
    """Loads other encodings of activations, for each and for those that share it, by the name of the one that leads.

    The biases of the layers that they enter get the lattice that follows, wide enough for them.
    """
    table: Table = sim.encodings()
    changed = {s.name for s in sim.sites if sim.placement.leader(s.name) in encodings}
    table |= {name: encodings[sim.placement.leader(name)] for name in changed}
    entered = [layer for layer in sim.placement.layers if layer.input is not None and layer.input.name in changed]
    coarsen(sim, entered, table)
    for layer in [y for own in entered for y in sim.placement.sharing(own)]:
        if layer.bias is not None:
            table[layer.bias.name] = bias_encoding(sim, layer, table)
    sim.load(table)


def write_bias(sim: Simulation, layer: Layer, bias: Tensor) -> None:
    """Writes a layer's float bias (C,). Where it leaves its lattice's grid, the weight's scale is raised.

    Raises EncodingError where that does not help.
    """
    with torch.no_grad():
        sim.parameter(f"{layer.module}.bias").copy_(bias)
    try:
        _encode_bias(sim, layer, sim.encodings())
    except EncodingError:
        sim.load(settled(sim, sim.encodings()))


def is_rounded(sim: Simulation, layer: Layer) -> bool:
    """Whether a layer's weights lie on their grid already, as those that a method has rounded do."""
    assert layer.weight is not None
    weight = sim.parameter(layer.weight.name).detach()
    return torch.equal(quantizing(sim.encodings())(layer.weight, weight), weight)


def error_moments(results: Iterable[Tensor], targets: Iterable[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Per channel E[y~ - y] and E[(y~ - y)^2] over all batches, float64 (C,) on the CPU.

    results, targets: y~ and y, each (N, C, …); None: y is 0.
    """
    sums, squares, count = torch.zeros(()), torch.zeros(()), 0
    pairs = zip(results, repeat(None)) if targets is None else zip(results, targets, strict=True)
    for result, target in pairs:
        error = (result if target is None else result - target).transpose(0, 1).flatten(1)
        sums = sums + error.sum(1, dtype=torch.float64)
        squares = squares + error.square().sum(1, dtype=torch.float64)
        count += error.shape[1]
    return sums.cpu() / count, squares.cpu() / count


def power(targets: Sequence[Tensor]) -> float:
    """The mean square of all values."""
    return sum(float(t.square().sum(dtype=torch.float64)) for t in targets) / sum(t.numel() for t in targets)


def sqnr_db(signal: float, mean_squares: Tensor) -> str:
    """How far results are from targets of this power, for people: `12.3 dB`. mean_squares: of the error, (C,)."""
    noise = float(mean_squares.mean())
    return f"{10 * math.log10(signal / noise):.1f} dB" if signal > 0 and noise > 0 else "exact"


@torch.no_grad()
def output_sqnr(sim: Simulation, step: Step, quantize: Quantize | None = None) -> str:
    """`sqnr_db` of what the part computes from its quantized inputs. quantize: None: as the simulation says now."""
    quantize = quantize or quantizing(sim.encodings())
    _, square = error_moments((step.run(x, quantize) for x in step.inputs), step.targets)
    return sqnr_db(power(step.targets), square)


def _encode_bias(sim: Simulation, layer: Layer, table: Table) -> None:
    for y in sim.placement.sharing(layer):
        if y.bias is not None:
            table[y.bias.name] = bias_encoding(sim, y, table)
    sim.load(table)


Values = Mapping[fx.Node, Tensor]


class _Twin:
    """Computes single nodes of the prepared network: with its own parameters, or with those of the simulation."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.device = device_of(sim.model)
        self.network: nn.Module = copied(sim.network).to(self.device)
        self.parameters = [name for name, _ in self.network.named_parameters()]
        self.layers = {layer.module: layer for layer in sim.placement.layers}
        self.sites = {s.name: s for s in sim.sites}

    def compute_float(self, node: fx.Node, values: Values) -> Tensor:
        """The float network's result."""
        result: Tensor = self.network.get_submodule(str(node.target))(*(values[a] for a in _arguments(node)))
        return result

    def compute(self, node: fx.Node, values: Values, quantize: Quantize) -> Tensor:
        """The simulation's result; weight, bias and result pass through `quantize` where they have a site."""
        module = self.network.get_submodule(str(node.target))
        parameters = {}
        for name, _ in module.named_parameters():
            full = f"{node.target}.{name}"
            value, site = self.sim.parameter(full), self.sites.get(full)
            parameters[name] = value if site is None else quantize(site, value)
        result: Tensor = functional_call(module, parameters, tuple(values[a] for a in _arguments(node)))
        site = self.sim.placement.quantized.get(node.name)
        return result if site is None else quantize(site, result)


def _complete(network: fx.GraphModule, parts: Sequence[Part]) -> Iterator[Part]:
    """The parts and, one by one, the nodes between them."""
    by_start = {part[0]: part for part in parts}
    inside = {node for part in parts for node in part}
    for node in network.graph.nodes:
        if node in by_start:
            yield by_start[node]
        elif node.op == "call_module" and node not in inside:
            yield (node,)


def _arguments(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.args if isinstance(a, fx.Node)]


@torch.no_grad()
def _advance(
    part: Part, count: int, values: dict[fx.Node, list[Tensor]], compute: Callable[[fx.Node, Values], Tensor]
) -> None:
    """Computes the nodes of a part, for each of `count` batches."""
    for node in part:
        arguments = {a: values[a] for a in _arguments(node)}
        values[node] = [compute(node, {a: v[i] for a, v in arguments.items()}) for i in range(count)]
