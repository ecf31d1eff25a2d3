"""Functions whose float32 kernels leave the last bit open, computed in double between two Casts: a reversible pair.

Two libraries' float32 LayerNormalization differ in the last bits, and once in 10^5 elements that moves a rounding to
the grid; in double it does so once in 10^13. The float model of an artifact keeps the plain operators, which tools for
targets understand; in a QDQ file they are widened. (Measured with onnxruntime 1.31 over every code of 8 and 16 bits:
plain 8-bit Sigmoid, Tanh and Gelu agree with float64 rounded once; the inner Sigmoid of SiLU does not, nor does
LayerNormalization, nor anything on 16 bits. Of Softmax every row of codes is another input: float32 misses results just
beside a tie, and QLinearSoftmax, into which 8-bit Softmax is fused, misses others. onnxruntime has no Gelu in double.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto, TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

    from pow2quant.artifact import Table

WIDE = "/double"
"""What ends the names of the tensors and nodes that `widen` adds."""

AGAIN = "/again"
"""Stands in front of `WIDE` where a widened result, rounded, is widened again."""

ALWAYS = ("LayerNormalization", "Softmax")
UNLESS_8_BITS = ("Elu", "Sigmoid", "Tanh")


def widen(graph: onnx.GraphProto, table: Table) -> None:
    """Puts Casts around the functions that need it, in place. table: encodings by tensor name."""
    wide = _chosen(graph, table)
    nodes: list[NodeProto] = []
    inner = {n for node in wide for n in node.output if n not in table and _stays_inside(graph, n, wide)}
    results = {name for node in wide for name in node.output} - inner
    cast: dict[str, str] = {}
    for node in graph.node:
        if node not in wide:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if name and name not in cast and name not in inner:
                cast[name] = name + (AGAIN if name in results else "") + WIDE
                nodes.append(_cast(name, cast[name], TensorProto.DOUBLE))
            node.input[i] = cast.get(name, name + WIDE) if name else name
        (result,) = node.output
        node.output[0] = result + WIDE
        nodes.append(node)
        if result not in inner:
            nodes.append(_cast(result + WIDE, result, TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)


def narrow(graph: onnx.GraphProto) -> None:
    """Takes away what `widen` added, in place."""
    kept = [n for n in graph.node if not (n.op_type == "Cast" and n.name.endswith(WIDE))]
    for node in kept:
        for names in (node.input, node.output):
            names[:] = [name.removesuffix(WIDE).removesuffix(AGAIN) if name.endswith(WIDE) else name for name in names]
    del graph.node[:]
    graph.node.extend(kept)


def _chosen(graph: onnx.GraphProto, table: Table) -> list[NodeProto]:
    """The nodes to widen: functions by the rule above, and the Mul behind the inner Sigmoid of a SiLU."""
    wide = [n for n in graph.node if n.op_type in ALWAYS or (n.op_type in UNLESS_8_BITS and not _on_8_bits(n, table))]
    inner = {n.output[0]: n.input[0] for n in wide if n.op_type == "Sigmoid" and n.output[0] not in table}
    silus = [n for n in graph.node if n.op_type == "Mul" and any(inner.get(a) == b for a, b in _orders(n.input))]
    return wide + silus


def _orders(names: Sequence[str]) -> tuple[tuple[str, str], tuple[str, str]]:
    a, b = names
    return (a, b), (b, a)


def _on_8_bits(node: NodeProto, table: Table) -> bool:
    return all(name in table and table[name].grid.width <= 8 for name in (node.input[0], node.output[0]))


def _stays_inside(graph: onnx.GraphProto, name: str, wide: list[NodeProto]) -> bool:
    readers = [n for n in graph.node if name in n.input]
    outputs = {value.name for value in graph.output}
    return bool(readers) and name not in outputs and all(n in wide for n in readers)


def _cast(source: str, target: str, to: int) -> NodeProto:
    name = (target if to == TensorProto.DOUBLE else source + "/back").removesuffix(WIDE)
    return helper.make_node("Cast", [source], [target], name=name + WIDE, to=to)
