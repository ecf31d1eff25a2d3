"""Drops what does nothing from a prepared network: `x * 1.0`, `x + 0`, cancelling transposes, a reshape back.

So does a cut that takes one operand out of a Concat.

An executor's optimizer would drop them too, and let two quantizers meet that it then merges into a third; so networks
that hold them could not be proved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.dropouts import DROPOUT, bypass
from pow2quant.frontends.least import fill_with_least, pad_pools
from pow2quant.frontends.scores import gather_scores
from pow2quant.frontends.writing import many

Shape = tuple[int, ...]


def _scale(module: m.Scale, shape: Shape) -> bool:
    return module.written and float(module.factor) == 1 and float(module.offset) == 0


def _slice(module: m.Slice, shape: Shape) -> bool:
    cuts = ((range(*slice(start, stop, step).indices(shape[d])), shape[d]) for d, start, stop, step in module.slices)
    return all(places == range(size) for places, size in cuts)


def _take(module: m.Take, shape: Shape) -> bool:
    return module.indices.tolist() == list(range(shape[module.dim]))


def _pad(module: m.ZeroPad | m.ConstantPad, shape: Shape) -> bool:
    return not any(module.pads)


def _pool(module: Any, shape: Shape) -> bool:
    sizes = [size for value in (module.kernel_size, module.stride) for size in many(value, 1)]
    divided = getattr(module, "divisor_override", None) not in (None, 1)
    return set(sizes) == {1} and not any(many(module.padding, 1)) and not divided


def _reduction(module: Any, shape: Shape) -> bool:
    return bool(module.keepdim) and all(shape[d] == 1 for d in module.dims)


def _resample(module: m.Resample, shape: Shape) -> bool:
    total = 1.0
    for dim in module.dims:
        weight = module.weight(dim)
        if weight.shape[0] != weight.shape[1] or not torch.equal(weight, weight[0, 0] * torch.eye(len(weight))):
            return False
        total *= float(weight[0, 0])
    return total == float(module.divisor)


IDLE: dict[type[nn.Module], Callable[[Any, Shape], bool]] = {
    m.Scale: _scale,
    m.Slice: _slice,
    m.Take: _take,
    **dict.fromkeys((m.ZeroPad, m.ConstantPad), _pad),
    m.NearestUpsample: lambda module, shape: all(f == 1 for f in module.factors),
    m.Resample: _resample,
    m.Pow: lambda module, shape: module.exponent == 1,
    m.CumSum: lambda module, shape: shape[module.dim] == 1,
    m.Masked: lambda module, shape: not bool(module.mask.any()),
    **dict.fromkeys((m.Mean, m.Sum, m.Largest, m.Least, m.Product), _reduction),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _pool),
}
"""When a module gives its operand as it is: (module, the operand's shape) -> bool."""

DROPPED = "pow2quant_dropped"
"""Where a network's `meta` keeps the names of the modules that were dropped."""

RESHAPES = (m.Reshape, nn.Flatten)
"""Modules whose result follows from its shape alone."""


def drop_idle(network: fx.GraphModule) -> None:
    """Drops them, in place, and what stands in front of a softmax; every node has its `shape` and `free` in `meta`.

    One between an input and an output stays, and so does one that makes a second output of another. The names of those
    that go are in `network.meta[DROPPED]`.
    """
    dropped = gather_scores(network)
    fill_with_least(network)
    pad_pools(network)
    for node in list(network.graph.nodes):
        source = _same_value(network, node) if node.op == "call_module" else None
        if source is None:
            continue
        returned = next(n for n in network.graph.nodes if n.op == "output").all_input_nodes
        if node in returned and (source.op == "placeholder" or source in returned):
            continue
        bypass(network.graph, node, source)
        dropped.append(str(node.target))
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    network.meta[DROPPED] = tuple(dropped)


def _same_value(network: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node in front that has the same value; None where there is none."""
    module = network.get_submodule(str(node.target))
    if not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if isinstance(module, RESHAPES):
        return next((one for _, one in _behind(network, node, RESHAPES) if _shape(one) == _shape(node)), None)
    if isinstance(module, m.Permute):
        order = list(range(len(module.dims)))
        for permute, one in _behind(network, node, (m.Permute,)):
            order = [permute.dims[d] for d in order]
            if order == sorted(order):
                return one
        return None
    if isinstance(module, m.Slice) and (operand := _cut_out(network, module, source)) is not None:
        return operand
    rule = IDLE.get(type(module))
    return source if rule is not None and rule(module, source.meta["shape"]) else None


def _cut_out(network: fx.GraphModule, module: m.Slice, source: fx.Node) -> fx.Node | None:
    """The operand of a Concat, `source`, that a cut takes whole and alone."""
    concat = network.get_submodule(str(source.target)) if source.op == "call_module" else None
    if not isinstance(concat, m.Concat) or DROPOUT in source.meta or len(module.slices) != 1:
        return None
    dim, start, stop, step = module.slices[0]
    shape, end = source.meta["shape"], 0
    taken = range(*slice(start, stop, step).indices(shape[dim]))
    for operand in source.args:
        assert isinstance(operand, fx.Node)
        begin, end = end, end + operand.meta["shape"][concat.dim]
        if dim % len(shape) == concat.dim % len(shape) and taken == range(begin, end):
            return operand
    return None


def _behind(
    network: fx.GraphModule, node: fx.Node, kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[Any, fx.Node]]:
    """A node's module and its operand, those of the operand, and so on, as far as modules are of the given kinds."""
    while node.op == "call_module" and isinstance(module := network.get_submodule(str(node.target)), kinds):
        node = node.all_input_nodes[0]
        yield module, node


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape, and which dimensions grow with the batch."""
    return node.meta["shape"], node.meta["free"]
