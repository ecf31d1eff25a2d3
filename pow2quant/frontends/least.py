"""Values that a computed mask takes out in front of a maximum: minus infinity has no code, the least value has one.

max(where(mask, x, -inf)) becomes max(where(mask, x, min(x))): the same wherever the mask keeps something.
"""

from __future__ import annotations

from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.kept import HIDES, MOVES
from pow2quant.frontends.operators import called

LARGEST = (m.Largest, m.ArgMax, m.TopK, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
"""Modules that give the largest of several values, or its place."""


def fill_with_least(network: fx.GraphModule) -> None:
    """Changes the network in place; every node has its `shape` and `free` in `meta`."""
    for node in list(network.graph.nodes):
        if isinstance(called(network, node), m.Select) and _is_ranked(network, node):
            for at, other in ((1, 2), (2, 1)):
                fill = called(network, node.args[at])
                if isinstance(fill, m.Constant) and float(fill.value.detach().max()) <= HIDES:
                    node.args = tuple(
                        _least(network, node, node.args[other]) if i == at else operand
                        for i, operand in enumerate(node.args)
                    )


def _is_ranked(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether only the largest of its values are read, through moves."""

    def ranks(user: fx.Node) -> bool:
        module = called(network, user)
        return isinstance(module, LARGEST) or (isinstance(module, MOVES) and _is_ranked(network, user))

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
