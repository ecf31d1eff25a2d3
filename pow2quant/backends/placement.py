"""Where quantizers stand: one per tensor, the same in every backend (DESIGN rule 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from pow2quant.artifact import Site
from pow2quant.backends.leaders import Layer as Layer
from pow2quant.backends.leaders import in_every_step, joined, of_one_weight
from pow2quant.backends.sums import stream
from pow2quant.config import BLOCK_BITS, QuantPlan, TensorSpec
from pow2quant.errors import ConfigError
from pow2quant.frontends import modules as m
from pow2quant.frontends.idle import DROPPED
from pow2quant.frontends.kept import TRUTH
from pow2quant.frontends.operators import called, kind_of, operator, weight_axis
from pow2quant.operators import Kind
from pow2quant.pow2_constraints import Encoding
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN
from pow2quant.targets import Target
from pow2quant.targets.rules import require_operation, require_tensor

ALIGNED = (m.Add, m.Sub, m.Concat, m.Maximum, m.Minimum)
"""Operations that bring their operands to one scale."""

TWO_OPERANDS = ("Add", "Mul", "Sub", "Where")
"""Operations, by their ONNX type, that are functions where they read a single tensor."""


@dataclass(frozen=True)
class Placement:
    """Which tensor of a prepared network is quantized by which site.

    sites: all of them, in order of computation. specs: how, by site name. quantized: the node (by name) behind
    which a site's quantizer stands. carried: for every node the site whose encoding its value has, None for float.
    leaders: for a site that shares another's encoding (the inputs of a Concat; every step of a recurrent layer, weights
    too; layers with one weight), that other site's name. steps: such sites of steps, whose values the other site does
    not see. fused: the nodes whose only reader, a ReLU or the like, holds the quantizer of both. rounded: the nodes
    whose result is rounded before anything computes with it: by their own quantizer, or behind clips and moves that
    alone read it.
    exact: for a node (by name) that has an integer definition, the sites of its input and of its result. roundings:
    by site name the rule by which the operation in front rounds, where it is not half to even. tied: groups of site
    names that have one exponent, each with its own zero point. results: by a layer's module the site at which its
    result is rounded. sums: of each, and of what else brings operands to one scale, the site of its result and
    those of its operands. units: the sites, by name, whose values reach from 0 to 1, whatever was seen.
    target: whose arithmetic it is.
    """

    sites: tuple[Site, ...]
    specs: dict[str, TensorSpec]
    quantized: dict[str, Site]
    carried: dict[str, Site | None]
    leaders: dict[str, str]
    steps: frozenset[str]
    layers: tuple[Layer, ...]
    fused: frozenset[str]
    rounded: frozenset[str]
    exact: dict[str, tuple[Site, Site]]
    roundings: dict[str, str]
    tied: tuple[tuple[str, ...], ...]
    results: dict[str, Site]
    sums: tuple[tuple[str, tuple[str, ...]], ...]
    units: frozenset[str]
    target: Target

    def leader(self, name: str) -> str:
        """The site whose encoding the site `name` has: itself, unless it is tied to another."""
        while name in self.leaders:
            name = self.leaders[name]
        return name

    def sharing(self, layer: Layer) -> list[Layer]:
        """The layers that have a layer's weight, as every step of one that recurs: itself among them."""
        if layer.weight is None:
            return [layer]
        leader = self.leader(layer.weight.name)
        return [y for y in self.layers if y.weight is not None and self.leader(y.weight.name) == leader]

    def of_weight(self, layer: Layer, encoding: Encoding) -> dict[str, Encoding]:
        """An encoding for a layer's weight, wherever it stands."""
        return {y.weight.name: encoding for y in self.sharing(layer) if y.weight is not None}


def tensor_name(node: fx.Node) -> str:
    """A node's tensor in every export: the argument's name, or `<module>.output`."""
    return str(node.target) if node.op == "placeholder" else f"{node.target}.output"


def value_type(node: fx.Node) -> torch.dtype:
    """The type of a node's values, float32 unless the preparation says otherwise."""
    return node.meta.get("dtype", torch.float32)  # type: ignore[no-any-return]


def place(network: fx.GraphModule, plan: QuantPlan) -> Placement:
    """Places the quantizers of a prepared network (without batch norm). Raises ConfigError for an impossible plan."""
    for role, spec in (("input", plan.input), ("output", plan.output), ("bias", plan.bias)):
        if spec is not None and spec.per_channel:
            raise ConfigError(f"quantization.{role}.per_channel: only weights can have one scale per channel")
    _check_overrides(network, plan)
    sites: list[Site] = []
    specs: dict[str, TensorSpec] = {}
    quantized: dict[str, Site] = {}
    carried: dict[str, Site | None] = {}
    layers: list[Layer] = []
    fused: set[str] = set()
    exact: dict[str, tuple[Site, Site]] = {}
    units: set[str] = set()
    in_stream = set() if plan.sums is None else set(stream(network))

    def site(name: str, role: str, summed: bool = False) -> Site | None:
        made = Site(name, role)
        spec = plan.spec(made, summed)
        if spec is None:
            return None
        require_tensor(plan.target, name, role, spec)
        sites.append(made)
        specs[name] = spec
        return made

    for node in network.graph.nodes:
        if node.op == "output":
            continue
        module = called(network, node)
        kind = kind_of(module)
        if (row := operator(module)) is not None:
            require_operation(plan.target, str(node.target), row.onnx)
        if kind is Kind.INDEX or not value_type(node).is_floating_point:
            carried[node.name] = None
            continue
        if kind is Kind.PASS:
            carried[node.name] = carried[node.args[0].name]
            continue
        if kind is Kind.WEIGHTED:
            layers.append(_layer(node, module, carried[node.args[0].name], site, specs))
        if _fused_into_reader(network, node, kind):
            fused.add(node.name)
            own = None
        elif plan.target.open_sums and kind is Kind.WEIGHTED and _is_summand(network, node):
            own = None
        else:
            own = site(tensor_name(node), "input" if module is None else "output", node in in_stream)
        carried[node.name] = own
        if own is not None:
            quantized[node.name] = own
            levels = getattr(module, "levels", 0)
            if TRUTH in node.meta or levels:
                units.add(own.name)
                specs[own.name] = replace(specs[own.name], range="minmax")
            if levels:
                specs[own.name] = replace(specs[own.name], bits=levels, symmetric=False)
                require_tensor(plan.target, own.name, own.role, specs[own.name])
            sources = [source for operand in node.args if (source := carried[operand.name]) is not None]
            if isinstance(module, m.Exact) and plan.functions == "exact" and len(sources) == len(node.args):
                exact[node.name] = sources[0], own
        if getattr(module, "levels", 0) and node.name not in exact:
            raise ConfigError(
                f"{node.target}: probabilities are powers of two (log2_attention), but it is no integer softmax: that "
                "needs quantization.functions: exact, and a quantized input and result"
            )
    _require_blocks(layers, specs)
    steps = in_every_step(network, quantized, specs)
    ties = of_one_weight(network, layers, specs) | joined(network, quantized, specs, steps)
    roundings = _roundings(network, quantized, carried, plan.target)
    results, sums = _rounded(network, quantized, carried)
    tied = _tied(sums, ties) if plan.target.tied_sums else ()
    return Placement(
        tuple(sites),
        specs,
        quantized,
        carried,
        ties,
        frozenset(steps),
        tuple(layers),
        frozenset(fused),
        _rounded_next(network, quantized),
        exact,
        roundings,
        tied,
        results,
        sums,
        frozenset(units),
        plan.target,
    )


def connect(model: nn.Module, network: fx.GraphModule, placement: Placement, quantizers: Mapping[str, Any]) -> None:
    """Tells the modules of a simulation that compute integers what quantizes their inputs and results.

    network: the prepared network that `model` was made of. quantizers: by site name.
    """
    for node in network.graph.nodes:
        if node.name in placement.exact:
            source, own = placement.exact[node.name]
            module: Any = model.get_submodule(str(node.target))
            module.rounding = placement.roundings.get(own.name, HALF_EVEN)
            module.connect(quantizers[source.name], quantizers[own.name])


def _check_overrides(network: fx.GraphModule, plan: QuantPlan) -> None:
    """Raises ConfigError for an override of nothing; what preparation dropped, since it does nothing, may be named."""
    names = [str(n.target) for n in network.graph.nodes if n.op in ("placeholder", "call_module")]
    for pattern, _ in plan.overrides:
        if not any(fnmatchcase(name, pattern) for name in (*names, *network.meta.get(DROPPED, ()))):
            near = get_close_matches(pattern, names, 3, 0.0)
            raise ConfigError(
                f"quantization.overrides.{pattern}: the prepared network has no such module; near are {', '.join(near)}"
            )


def _layer(
    node: fx.Node, module: nn.Module | None, source: Site | None, site: object, specs: dict[str, TensorSpec]
) -> Layer:
    assert module is not None
    assert callable(site)
    name = str(node.target)
    weight = site(f"{name}.weight", "weight")
    has_bias = module.bias is not None and weight is not None and source is not None
    bias = site(f"{name}.bias", "bias") if has_bias else None
    axis = weight_axis(module) if weight is not None and specs[weight.name].per_channel else None
    return Layer(name, weight, bias, source, axis, None if axis is None else _block(module, specs[weight.name], axis))


def _block(module: nn.Module, spec: TensorSpec, axis: int) -> int | None:
    """The block of a layer's weight: None where the weight has too many bits, or one input for each output."""
    weight: Any = module.weight
    fits = spec.bits <= BLOCK_BITS and weight.ndim > 1 and weight.shape[1 - axis] > 1
    return spec.block if fits else None


def _require_blocks(layers: Sequence[Layer], specs: Mapping[str, TensorSpec]) -> None:
    """Raises ConfigError where blocks are asked for and no layer takes them."""
    asked = [layer.weight.name for layer in layers if layer.weight is not None and specs[layer.weight.name].block]
    if asked and not any(layer.block for layer in layers):
        spec = specs[asked[0]]
        raise ConfigError(
            f"{asked[0]}: block: {spec.block} has no effect with {spec.bits} bits, here or in any other layer; blocks "
            f"are for weights of 2 to {BLOCK_BITS} bits (onnxruntime does not run wider ones), but "
            "for depthwise layers, with one scale per channel"
        )


def _fused_into_reader(network: fx.GraphModule, node: fx.Node, kind: Kind) -> bool:
    """Whether the node's only reader is a ReLU-like operation, which then holds the quantizer of both."""
    if node.op != "call_module" or len(node.users) != 1:
        return False
    row, (reader,) = operator(called(network, node)), node.users
    fusable = kind is Kind.WEIGHTED or (row is not None and row.clipped)
    return fusable and kind_of(called(network, reader)) is Kind.CLIP


def _rounded_next(network: fx.GraphModule, quantized: Mapping[str, Site]) -> frozenset[str]:
    """See `Placement.rounded`."""
    found = set(quantized)
    for node in reversed(network.graph.nodes):
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is not None and reader.name in found and kind_of(called(network, reader)) in (Kind.CLIP, Kind.PASS):
            found.add(node.name)
    return frozenset(found)


def _is_summand(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a sum is the node's only reader."""
    return len(node.users) == 1 and isinstance(called(network, next(iter(node.users))), (m.Add, m.Sub))


def _roundings(
    network: fx.GraphModule, quantized: dict[str, Site], carried: dict[str, Site | None], target: Target
) -> dict[str, str]:
    """How a target rounds what stands at each site: as the operation does whose result it is.

    A sum or a product that reads one tensor is a function.
    """
    found = {}
    for node in network.graph.nodes:
        site = quantized.get(node.name)
        if site is None or node.op != "call_module":
            continue
        core = behind_clips(network, node, carried)
        row = operator(called(network, core))
        function = row is not None and row.onnx in TWO_OPERANDS and sum(isinstance(a, fx.Node) for a in core.args) < 2
        rule = HALF_EVEN if row is None else target.rounding.functions if function else target.rounding.of(row.onnx)
        if rule != HALF_EVEN:
            found[site.name] = rule
    return found


def behind_clips(network: fx.GraphModule, node: fx.Node, carried: Mapping[str, Site | None]) -> fx.Node:
    """The node whose result is rounded at a site: that behind ReLUs and clips between which nothing is rounded."""
    while kind_of(called(network, node)) is Kind.CLIP:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if carried[source.name] is not None:
            break
        node = source
    return node


Sums = tuple[tuple[str, tuple[str, ...]], ...]


def _rounded(
    network: fx.GraphModule, quantized: dict[str, Site], carried: dict[str, Site | None]
) -> tuple[dict[str, Site], Sums]:
    """Where the results of layers, and of sums and the like, are rounded; of these with the sites of their operands."""
    results: dict[str, Site] = {}
    sums: list[tuple[str, tuple[str, ...]]] = []
    for node in network.graph.nodes:
        site = quantized.get(node.name)
        if site is None or node.op != "call_module":
            continue
        core = behind_clips(network, node, carried)
        module = called(network, core)
        if kind_of(module) is Kind.WEIGHTED:
            results[str(core.target)] = site
        if isinstance(module, ALIGNED):
            operands = (carried[n.name] for n in core.args if isinstance(n, fx.Node))
            sums.append((site.name, tuple(operand.name for operand in operands if operand is not None)))
    return results, tuple(sums)


def _tied(sums: Sums, leaders: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    """The sites of every sum's operands and result, those of sums that share one joined; sorted."""
    groups: list[set[str]] = []
    for result, operands in sums:
        group = {result, *operands}
        group |= {leaders[name] for name in group if name in leaders}
        for other in [g for g in groups if g & group]:
            groups.remove(other)
            group |= other
        groups.append(group)
    return tuple(sorted(tuple(sorted(group)) for group in groups))
