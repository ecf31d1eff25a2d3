"""Values that a computed mask takes out in front of a maximum: minus infinity has no code, the least value has one.

max(where(mask, x, -inf)) becomes max(where(mask, x, min(x))): the same wherever the mask keeps something. So it is for
a number in place of minus infinity that is far below every x of the example.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.kept import MOVES, ends
from pow2quant.frontends.operators import called

LARGEST = (m.Largest, m.ArgMax, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
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


def _is_least(network: fx.GraphModule, node: fx.Node, fill: float, other: int) -> bool:
    """Whether a number stands for minus infinity beside an operand, and only the largest values are read behind."""
    x: Any = node.args[other]
    low, high = ends(network, x)
    return fill <= min(FAR, low - (high - low)) and _is_ranked(network, node, fill == -math.inf)


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
