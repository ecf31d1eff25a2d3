"""Sites that take another's encoding: steps of recurrent layers, layers with one weight, what a Concat joins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from pow2quant.artifact import Site
from pow2quant.config import TensorSpec
from pow2quant.frontends.operators import called, kind_of
from pow2quant.frontends.unrolled import same_in_every_step
from pow2quant.operators import Kind


@dataclass(frozen=True)
class Layer:
    """A weighted module, by its name in the prepared network.

    weight, bias: their sites, None where they stay float (or there is no bias). input: the site whose encoding the
    data have that come in, None for float data. axis: the weight's channel axis, None for one scale per tensor.
    block: inputs that share a scale, None for all of a channel.
    """

    module: str
    weight: Site | None
    bias: Site | None
    input: Site | None
    axis: int | None
    block: int | None


def in_every_step(
    network: fx.GraphModule, quantized: Mapping[str, Site], specs: Mapping[str, TensorSpec]
) -> dict[str, str]:
    """Every step of a recurrent layer takes the last one's encodings: then one program computes them all."""
    leaders: dict[str, str] = {}
    for nodes in same_in_every_step(network):
        weights = [name for node in nodes if (name := f"{node.target}.weight") in specs]
        results = [quantized[node.name].name for node in nodes if node.name in quantized]
        for names in (weights, results):
            leaders |= {name: names[-1] for name in names[:-1] if specs[name] == specs[names[-1]]}
    return leaders


def of_one_weight(network: fx.GraphModule, layers: Sequence[Layer], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """One weight has one encoding: layers that share it take that of the last one."""
    last: dict[tuple[Any, ...], str] = {}
    leaders: dict[str, str] = {}
    for layer in reversed(layers):
        if layer.weight is not None:
            parameter: Any = network.get_submodule(layer.module).weight
            key = id(parameter), layer.axis, layer.block, specs[layer.weight.name]
            if last.setdefault(key, layer.weight.name) != layer.weight.name:
                leaders[layer.weight.name] = last[key]
    return leaders


def joined(
    network: fx.GraphModule, quantized: dict[str, Site], specs: dict[str, TensorSpec], steps: Mapping[str, str]
) -> dict[str, str]:
    """By site the one whose encoding it takes: `steps`, and what a Concat joins.

    The inputs of a Concat take its encoding, if nothing else reads them: then it is the union of their ranges. Where
    all are the same in every step, it takes theirs.
    """
    leaders, led = dict(steps), {*steps, *steps.values()}
    for node in network.graph.nodes:
        if kind_of(called(network, node)) is not Kind.CONCAT:
            continue
        target = quantized.get(node.name)
        sources = []
        for source in node.args:
            while len(source.users) == 1 and source.name not in quantized:
                if kind_of(called(network, source)) is not Kind.PASS:
                    break
                source = source.args[0]
            own = quantized.get(source.name)
            sources.append(None if own is None else leaders.get(own.name, own.name))
            free = len(source.users) == 1 and own is not None and own.role == "output" and own.name not in led
            if free and own is not None and target is not None and specs[own.name] == specs[target.name]:
                leaders[own.name] = target.name
        first = sources[0]
        alike = first is not None and first in led and set(sources) == {first}
        if first is not None and alike and target is not None and specs[first] == specs[target.name]:
            leaders.setdefault(target.name, first)
    return leaders
