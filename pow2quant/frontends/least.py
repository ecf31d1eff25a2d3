"""Values that do not count in front of a maximum: minus infinity has no code, the least value has one.

max(where(mask, x, -inf)) becomes max(where(mask, x, min(x))): the same wherever the mask keeps something. So it is for
a number in place of minus infinity that is far below every x of the example. Padding with such a number in front of a
pool becomes the pool's own, which never counts.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, cast

from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.kept import ENDS, MOVES, ends
from pow2quant.frontends.operators import called
from pow2quant.frontends.writing import many

POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

LARGEST = (m.Largest, m.ArgMax, m.PaddedMaxPool, *POOLS)
"""Modules that give the largest of several values, or its place."""

FAR = -1e3
"""A number that stands for minus infinity is this or less."""


def fill_with_least(network: fx.GraphModule) -> None:
    """Changes the network in place; every node has its `shape`, `free` and `kept.ENDS` in `meta`."""
    for node in list(network.graph.nodes):
        if isinstance(called(network, node), m.Select):
            for at, other in ((1, 2), (2, 1)):
                fill = called(network, node.args[at])
                if isinstance(fill, m.Constant) and _is_least(network, node, float(fill.value.detach().max()), other):
                    node.args = tuple(
                        _least(network, node, node.args[other]) if i == at else operand
                        for i, operand in enumerate(node.args)
                    )


def pad_pools(network: fx.GraphModule) -> None:
    """Changes the network in place, as `fill_with_least`."""
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    for node in list(network.graph.nodes):
        pad = called(network, node)
        if not isinstance(pad, m.ConstantPad) or not _is_far(network, node.args[0], pad.value):
            continue
        if ENDS not in node.args[0].meta and pad.value != -math.inf:
            continue
        pools = {user: _padded(called(network, user), pad, user) for user in node.users if calls[user.target] == 1}
        if len(pools) == len(node.users) and None not in pools.values():
            for user, pool in pools.items():
                network.set_submodule(str(user.target), cast(nn.Module, pool))
                user.args = (node.args[0],)


def _padded(pool: nn.Module | None, pad: m.ConstantPad, node: fx.Node) -> m.PaddedMaxPool | None:
    """A pool that pads its map itself; None where it cannot."""
    if not isinstance(pool, POOLS) or pool.ceil_mode or pool.return_indices:
        return None
    rank = len(node.meta["shape"]) - 2
    inside: Any = node.all_input_nodes[0].all_input_nodes[0]
    sizes = inside.meta["shape"][2:]
    outer = any(pad.pads[2 * rank :])
    pads = [*pad.pads, *[0] * (2 * rank)][: 2 * rank]
    kernel, padding, dilation = (many(v, rank) for v in (pool.kernel_size, pool.padding, pool.dilation))
    before = [p + own for p, own in zip(pads[-2::-2], padding, strict=True)]
    behind = [p + own for p, own in zip(pads[::-2], padding, strict=True)]
    if outer or min(pads) < 0 or any(max(a, b) >= k for a, b, k in zip(before, behind, kernel, strict=True)):
        return None
    if any(d > size for d, size in zip(dilation, sizes, strict=True)):  # a window may lie in the padding alone
        return None
    stride = many(pool.stride if pool.stride is not None else kernel, rank)
    return m.PaddedMaxPool(kernel, stride, dilation, before, behind)


def _is_least(network: fx.GraphModule, node: fx.Node, fill: float, other: int) -> bool:
    """Whether a number stands for minus infinity beside an operand, and only the largest values are read behind."""
    return _is_far(network, node.args[other], fill) and _is_ranked(network, node, fill == -math.inf)


def _is_far(network: fx.GraphModule, x: Any, fill: float) -> bool:
    """Whether a number is far below every value of the example."""
    low, high = ends(network, x)
    return fill <= min(FAR, low - (high - low))


def _is_ranked(network: fx.GraphModule, node: fx.Node, infinite: bool) -> bool:
    """Whether only the largest of its values are read, through moves. infinite: which may be several."""

    def ranks(user: fx.Node) -> bool:
        module = called(network, user)
        if isinstance(module, MOVES):
            return _is_ranked(network, user, infinite)
        return isinstance(module, LARGEST) or (isinstance(module, m.TopK) and module.largest and infinite)

    return bool(node.users) and all(map(ranks, node.users))


def _least(network: fx.GraphModule, node: fx.Node, x: fx.Node) -> fx.Node:
    """The least value of every sample."""
    target = f"{node.target}_least"
    rank = len(x.meta["shape"])
    network.add_submodule(target, m.Least(list(range(1, rank)), keepdim=True))
    with network.graph.inserting_before(node):
        made = network.graph.call_module(target, (x,))
    made.meta = {key: value for key, value in x.meta.items() if key in ("dtype", "free")}
    made.meta["shape"] = (x.meta["shape"][0], *(1,) * (rank - 1))
    return made
