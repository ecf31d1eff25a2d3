"""Dropouts, which a prepared network does not have: the nodes behind them keep them for those who train."""

from __future__ import annotations

from torch import fx

DROPOUT = "pow2quant_dropout"
"""Where a node's `meta` keeps through which dropouts its operands pass in training: (name, module), by operand."""


def bypass(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    """Lets the readers of a node read its operand, through the same dropouts, and erases it."""
    for user in node.users:
        for dropouts in node.meta.get(DROPOUT, {}).values():
            index = user.all_input_nodes.index(node)
            user.meta.setdefault(DROPOUT, {}).setdefault(index, [])[:0] = dropouts
    node.replace_all_uses_with(source)
    graph.erase_node(node)
