"""Nodes that keep onnxruntime's optimizers from changing a value: a reversible pair.

Two of its optimizers do (`rewrites.py`): they need two Q/DQ pairs, or a Pad and a MaxPool, next to each other.
A Max of a single tensor between them does nothing, and no optimizer drops it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import helper

from pow2quant.graphs import GraphIndex
from pow2quant.rewrites import changed_value, padded_pool

if TYPE_CHECKING:
    import onnx

    from pow2quant.artifact import Table

MARK = "/kept"
"""What ends the names of the nodes that `put` adds, and of what they read."""


def put(graph: onnx.GraphProto, table: Table) -> None:
    """Adds the nodes, in place. table: encodings by tensor name."""
    index = GraphIndex(graph)
    guarded = set[str]()
    for node in graph.node:
        if changed_value(index, table, node):
            pad = padded_pool(index, table, node)
            guarded.add((node if pad is None else pad).output[0])
    nodes = []
    for node in graph.node:
        nodes.append(node)
        result = node.output[0] if node.output else ""
        if result in guarded:
            node.output[0] = result + MARK
            nodes.append(helper.make_node("Max", [result + MARK], [result], result + MARK))
    del graph.node[:]
    graph.node.extend(nodes)


def take(graph: onnx.GraphProto) -> None:
    """Takes away what `put` added, in place."""
    guards = {n.input[0]: n for n in graph.node if n.op_type == "Max" and n.name.endswith(MARK)}
    kept = [n for n in graph.node if not (n.op_type == "Max" and n.name.endswith(MARK))]
    for node in kept:
        node.output[:] = [guards[name].output[0] if name in guards else name for name in node.output]
    del graph.node[:]
    graph.node.extend(kept)
