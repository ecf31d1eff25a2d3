"""Functions whose float32 kernels leave the last bit open, computed in double between two Casts: a reversible pair.

Two libraries' float32 LayerNormalization differ in the last bits, and once in 10^5 elements that moves a rounding to
the grid; in double it does so once in 10^13. The float model of an artifact keeps the plain operators, which tools for
targets understand; in a QDQ file they are widened, together with what stands between or beside them and is not rounded
to a grid. `operators.OPERATIONS` says which are. (Measured with onnxruntime 1.31 over every code of 8 and 16 bits:
plain 8-bit Sigmoid, Tanh and Gelu agree with float64 rounded once; the inner Sigmoid of SiLU does not, nor does
LayerNormalization, nor anything on 16 bits. Of Softmax every row of codes is another input: float32 misses results just
beside a tie, and QLinearSoftmax, into which 8-bit Softmax is fused, misses others. onnxruntime has no Gelu, Elu or Erf
in double.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto, TensorProto, helper

from pow2quant.adapters.onnx_qdq.exact import is_exact
from pow2quant.graphs import GraphIndex
from pow2quant.operators import OPERATIONS, Double, Kind, Operation, Values

if TYPE_CHECKING:
    import onnx

    from pow2quant.artifact import Table

WIDE = "/double"
"""What ends the names of the tensors and nodes that `widen` adds."""

AGAIN = "/again"
"""Stands in front of `WIDE` where a widened result, rounded, is widened again."""

NOT_FLOAT = ("Shape", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Not", "And", "Or")
"""Operations whose results are no floats."""

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)

_UNKNOWN = Operation(Kind.COMPUTE, Values.FLOAT)


def widen(graph: onnx.GraphProto, table: Table) -> None:
    """Puts Casts around the functions that need it, in place. table: encodings by tensor name."""
    exact = _without_fraction(graph)
    wide = _chosen(graph, table, exact)
    if not wide:
        return
    index = GraphIndex(graph)
    results = {name for node in graph.node if node.output[0] in wide for name in node.output} - exact
    inner = {n for n in results if n not in table and _stays_inside(index, n, wide)}
    cast: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.output[0] not in wide:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if not name or name in exact:
                continue
            if name not in cast and name not in inner:
                cast[name] = name + (AGAIN if name in results else "") + WIDE
                nodes.append(_cast(name, cast[name], TensorProto.DOUBLE))
            node.input[i] = cast.get(name, name + WIDE)
        nodes.append(node)
        (result,) = node.output
        if result in exact:
            continue
        node.output[0] = result + WIDE
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


def _chosen(graph: onnx.GraphProto, table: Table, exact: set[str]) -> set[str]:
    """The nodes to widen, by their first result: those that need it, and what an unrounded tensor joins to them."""
    index = GraphIndex(graph)
    real = {node.output[0] for node in graph.node if not is_exact(node) and not exact.issuperset(node.input)}
    pending = [node for node in graph.node if node.output[0] in real and _needs_double(node, table, index)]
    wide = {node.output[0] for node in pending}
    while pending:
        node = pending.pop()
        beside = [index.producers[n] for n in node.input if n in index.producers and n not in table]
        beside += [reader for n in node.output if n not in table for reader in index.readers.get(n, [])]
        for other in beside:
            if (
                other.output[0] in wide
                or other.output[0] not in real
                or OPERATIONS.get(other.op_type, _UNKNOWN).double is Double.NEVER
            ):
                continue
            wide.add(other.output[0])
            pending.append(other)
    return wide


def _needs_double(node: NodeProto, table: Table, index: GraphIndex) -> bool:
    double = OPERATIONS.get(node.op_type, _UNKNOWN).double
    if node.op_type == "MatMul":
        return any(name in index.parameters and name not in table for name in node.input)
    return double is Double.ALWAYS or (double is Double.ABOVE_8_BITS and not _on_8_bits(node, table))


def _on_8_bits(node: NodeProto, table: Table) -> bool:
    return all(name in table and table[name].grid.width <= 8 for name in (node.input[0], node.output[0]))


def _without_fraction(graph: onnx.GraphProto) -> set[str]:
    """The tensors that hold integers or truth values."""
    found = {t.name for t in graph.initializer if t.data_type != TensorProto.FLOAT}
    found |= {v.name for v in graph.input if v.type.tensor_type.elem_type != TensorProto.FLOAT}
    moves = {name for name, row in OPERATIONS.items() if row.kind in (Kind.PASS, Kind.CONCAT)}
    for node in graph.node:
        counts = OPERATIONS.get(node.op_type, _UNKNOWN).kind is Kind.INDEX or node.op_type in NOT_FLOAT
        if node.op_type == "Cast":
            counts = helper.get_node_attr_value(node, "to") not in FLOATS
        elif node.op_type == "TopK":
            found.add(node.output[1])
        elif node.input:
            counts = counts or found.issuperset(node.input)
        if counts or (node.op_type in moves and node.input and node.input[0] in found):
            found.update(node.output)
    return found


def _stays_inside(index: GraphIndex, name: str, wide: set[str]) -> bool:
    readers = index.readers.get(name, [])
    return bool(readers) and name not in index.outputs and all(n.output[0] in wide for n in readers)


def _cast(source: str, target: str, to: int) -> NodeProto:
    name = (target if to == TensorProto.DOUBLE else source + "/back").removesuffix(WIDE)
    return helper.make_node("Cast", [source], [target], name=name + WIDE, to=to)
