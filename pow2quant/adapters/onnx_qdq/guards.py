"""Nodes that keep onnxruntime's optimizers from changing a value: a reversible pair.

Three of its optimizers do (`rewrites.py`): they need two Q/DQ pairs, a Pad and a MaxPool, or a float graph output and a
Transpose next to each other. A fourth one (QDQPropagationTransformer) repeats int8 encodings behind a node that moves
values, and where the result is then rounded to another grid, a later one makes uint8 of all but that copy: the file
does not load. A Max of a single tensor between them does nothing, and no optimizer drops it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import helper

from pow2quant.graphs import GraphIndex
from pow2quant.rewrites import PROPAGATED, merged, moved, padded_pool, rounds_output

if TYPE_CHECKING:
    import onnx

    from pow2quant.artifact import Table

MARK = "/kept"
"""What ends the names of the nodes that `put` adds, and of what they read."""


def put(graph: onnx.GraphProto, table: Table) -> None:
    """Adds the nodes, in place. table: encodings by tensor name."""
    index = GraphIndex(graph)
    ahead = [_repeats_int8(node, table) or rounds_output(index, table, node) for node in graph.node]
    behind = {name for node in graph.node if (name := merged(index, table, node)) is not None}
    behind |= {pad.output[0] for node in graph.node if (pad := padded_pool(index, table, node)) is not None}
    nodes = []
    for node, kept in zip(graph.node, ahead, strict=True):
        if kept:
            source = moved(index, node) or node.input[0]
            name = f"{source}/for/{node.output[0]}{MARK}"
            node.input[:] = [name if read == source else read for read in node.input]
            nodes.append(helper.make_node("Max", [source], [name], name))
        nodes.append(node)
        result = node.output[0] if node.output else ""
        if result in behind:
            node.output[0] = result + MARK
            nodes.append(helper.make_node("Max", [result + MARK], [result], result + MARK))
    del graph.node[:]
    graph.node.extend(nodes)


def take(graph: onnx.GraphProto) -> None:
    """Takes away what `put` added, in place."""
    guards = [n for n in graph.node if n.op_type == "Max" and n.name.endswith(MARK)]
    behind = {n.input[0]: n.output[0] for n in guards if n.input[0].endswith(MARK)}
    ahead = {n.output[0]: n.input[0] for n in guards if not n.input[0].endswith(MARK)}
    kept = [n for n in graph.node if n not in guards]
    for node in kept:
        node.input[:] = [ahead.get(name, name) for name in node.input]
        node.output[:] = [behind.get(name, name) for name in node.output]
    del graph.node[:]
    graph.node.extend(kept)


def _repeats_int8(node: onnx.NodeProto, table: Table) -> bool:
    """Whether a node moves the values of an int8 tensor, and its result has another encoding or stays float."""
    encoding = table.get(node.input[0]) if node.input and node.op_type in PROPAGATED else None
    if encoding is None or not encoding.grid.signed or encoding.grid.width > 8:
        return False
    return any(table.get(name) != encoding for name in node.output)
