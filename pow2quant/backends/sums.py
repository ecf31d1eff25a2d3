"""Sums with a width of their own: the residual stream of a network keeps bits that its multiplications do not need.

The error of a residual block's sum reaches every block behind it, whereas that of a convolution's input ends in its own
block. Published figures at four bits and fewer quantize what convolutions read, and leave sums in float (LSQ, Esser et
al. 2020; APoT, Li et al. 2020; BRECQ, Li et al. 2021). Here sums are integers, too, but of more bits.
"""

from __future__ import annotations

import copy

from torch import fx

from pow2quant.frontends import modules as m
from pow2quant.frontends.operators import called, kind_of
from pow2quant.operators import Kind

NARROW = "_narrow"
"""What ends the names of the clips that layers read a sum through."""


def stream(network: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a prepared network that give the operands and the results of sums of tensors.

    Where a clip alone reads a result, it is the clip's; behind operations that move values, it is what they move.
    """
    found: list[fx.Node] = []
    for node in network.graph.nodes:
        if isinstance(called(network, node), (m.Add, m.Sub)) and len(node.all_input_nodes) > 1:
            only = next(iter(node.users))
            clipped = len(node.users) == 1 and kind_of(called(network, only)) is Kind.CLIP
            found += [*(_moved(network, source) for source in node.all_input_nodes), only if clipped else node]
    return list(dict.fromkeys(found))


def separate(network: fx.GraphModule) -> None:
    """Lets layers read the stream through a second clip of the same kind, in place: a tensor that may have fewer bits.

    A clip of what is clipped changes nothing, and a network that is separate already stays as it is. What has no clip
    behind it, such as the sums of MobileNetV2, is read by layers as it is.
    """
    for node in stream(network):
        readers = [user for user in node.users if kind_of(called(network, user)) is Kind.WEIGHTED]
        if readers and kind_of(called(network, node)) is Kind.CLIP:
            name = f"{node.target}{NARROW}"
            network.add_submodule(name, copy.deepcopy(network.get_submodule(str(node.target))))
            with network.graph.inserting_after(node):
                narrow = network.graph.call_module(name, (node,))
            narrow.meta = dict(node.meta)
            for reader in readers:
                reader.replace_input_with(node, narrow)
    network.graph.lint()
    network.recompile()


def _moved(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    while kind_of(called(network, node)) is Kind.PASS:
        node = node.all_input_nodes[0]
    return node
