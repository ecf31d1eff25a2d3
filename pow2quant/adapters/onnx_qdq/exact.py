"""Nodes with an integer definition, written as operations that are exact by IEEE 754: a reversible pair.

The float model of an artifact keeps the standard's node, such as Softmax, which tools for targets understand; in a QDQ
file operations on integers in float32, or in double, take its place. None of their results is rounded: sums, products
and quotients stay within what the type holds exactly (`integer/proof/` checks it), and what follows a division is a
Floor that no rounding moves. The node that they replace stands in the last one's metadata.
"""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from pow2quant.functions import (
    DEPTH,
    FINE,
    HIDDEN,
    RECIPROCAL,
    Definition,
    LogSoftmax,
    Lookup,
    Norm,
    Softmax,
    definition,
    region,
)
from pow2quant.graphs import GraphIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from pow2quant.artifact import Table
    from pow2quant.pow2_constraints import Encoding

MARK = "/exact/"
"""Stands in the names of the nodes and tensors that `expand` adds, behind the result's name."""

REPLACED = "pow2quant.replaced"
"""The key in the last node's metadata under which the nodes that were replaced stand, serialized."""


def is_exact(node: NodeProto) -> bool:
    """Whether `expand` wrote a node."""
    return MARK in node.name


def expand(graph: GraphProto, table: Table) -> None:
    """Writes every definition as operations, in place. table: encodings by tensor name."""
    index = GraphIndex(graph)
    gone, written, private = set[str](), dict[str, list[NodeProto]](), set[str]()
    for node in list(graph.node):
        found = _Expansion.of(index, table, node)
        if found is None:
            continue
        gone |= {n.output[0] for n in found.replaced.node}
        private |= {t.name for t in found.replaced.initializer}
        written[node.output[0]] = found.nodes
        graph.initializer.extend(found.initializers)
    nodes = []
    for node in graph.node:
        result = node.output[0] if node.output else ""
        nodes += written.get(result, [] if result in gone else [node])
    _set(graph, nodes, [t for t in graph.initializer if t.name not in private])


def collapse(graph: GraphProto, table: Table) -> None:
    """Puts back what `expand` replaced, in place, where the operations are just those that it writes."""
    lasts = [n for n in graph.node if is_exact(n) and list(n.output) == [_result(n)]]
    replaced = {last.output[0]: part for last in lasts if (part := _replaced(last)) is not None and part.node}
    while replaced:
        nodes, initializers = _put_back(graph, replaced)
        candidate = GraphProto(node=nodes, initializer=initializers)
        index = GraphIndex(candidate)
        written = _by_result(graph.node), _by_result(graph.initializer)
        wrong = [
            result
            for result, part in replaced.items()
            if not _equal(_Expansion.of(index, table, part.node[-1]), *(parts.get(result, []) for parts in written))
        ]
        if not wrong:
            _set(graph, nodes, initializers)
            return
        for result in wrong:
            del replaced[result]


def _put_back(graph: GraphProto, replaced: dict[str, GraphProto]) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes and initializers with what stood there before. replaced: by result, see `_replaced`."""
    nodes: list[NodeProto] = []
    pending = dict(replaced)
    for node in graph.node:
        result = _result(node)
        if result not in replaced:
            nodes.append(node)
        elif result in pending:
            nodes += pending.pop(result).node
    initializers = [t for t in graph.initializer if _result(t) not in replaced]
    return nodes, initializers + [t for part in replaced.values() for t in part.initializer]


def _result(part: NodeProto | TensorProto) -> str:
    """The result for which `expand` wrote a node or constant; "" for others."""
    return part.name.rpartition(MARK)[0]


def _by_result(parts: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for part in parts:
        found.setdefault(_result(part), []).append(part)
    return found


def _set(graph: GraphProto, nodes: list[NodeProto], initializers: list[TensorProto]) -> None:
    kept = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    constants = [TensorProto.FromString(t.SerializeToString()) for t in initializers]
    del graph.node[:]
    del graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)


def _replaced(last: NodeProto) -> GraphProto | None:
    text = next((entry.value for entry in last.metadata_props if entry.key == REPLACED), None)
    if text is None:
        return None
    graph = GraphProto()
    try:
        graph.ParseFromString(base64.b64decode(text))
    except Exception:  # protobuf's DecodeError has no public base
        return None
    return graph


def _equal(again: _Expansion | None, nodes: list[NodeProto], constants: list[TensorProto]) -> bool:
    """Whether nodes and constants are those that are written for the definition, whatever the metadata say."""
    if again is None:
        return False
    first, second = ([_plain(n) for n in side] for side in (again.nodes, nodes))
    values = [
        {t.name: (t.data_type, numpy_helper.to_array(t)) for t in side} for side in (again.initializers, constants)
    ]
    same = values[0].keys() == values[1].keys() and all(
        kind == values[1][name][0] and np.array_equal(array, values[1][name][1])
        for name, (kind, array) in values[0].items()
    )
    return first == second and same


def _plain(node: NodeProto) -> tuple[Any, ...]:
    attributes = sorted((a.name, a.SerializeToString()) for a in node.attribute)
    return node.op_type, node.domain, tuple(node.input), tuple(node.output), tuple(attributes)


class _Expansion:
    """The nodes and constants that take the place of one definition, and those that are replaced."""

    def __init__(self, result: str, replaced: GraphProto) -> None:
        self.result, self.replaced = result, replaced
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    @classmethod
    def of(cls, index: GraphIndex, table: Table, node: NodeProto) -> _Expansion | None:
        """What is written for a node; None where it has no definition that can be written."""
        defined = definition(node)
        if defined is None or node.output[0] not in table:
            return None
        nodes, sources = region(index, table, node)
        if not sources:
            return None
        source = sources[0]
        if isinstance(defined, Lookup) and not defined.fits(table[source], table[node.output[0]]):
            return None
        read = {name for n in nodes for name in n.input if name in index.parameters}
        private = [name for name in sorted(read, key=index.order.__getitem__) if _is_private(index, name, nodes)]
        constants = [index.parameters[name] for name in private]
        made = cls(node.output[0], GraphProto(node=nodes, initializer=constants))
        WRITERS[type(defined)](made, defined, table[source], *sources)
        made.nodes[-1].output[0] = node.output[0]
        text = base64.b64encode(made.replaced.SerializeToString(deterministic=True)).decode()
        made.nodes[-1].metadata_props.add(key=REPLACED, value=text)
        return made

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node and returns its result's name."""
        name = f"{self.result}{MARK}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """Adds a constant and returns its name."""
        name = f"{self.result}{MARK}constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _is_private(index: GraphIndex, name: str, nodes: list[NodeProto]) -> bool:
    """Whether only these nodes read a constant."""
    results = {n.output[0] for n in nodes}
    readers = index.readers.get(name, [])
    return bool(readers) and all(r.output and r.output[0] in results for r in readers)


def _softmax(f: _Expansion, defined: Softmax, encoding: Encoding, x: str, keep: str = "") -> None:
    single, exponent, table = defined.is_single, int(encoding.exponent), defined.table(encoding)
    real = np.float32 if single else np.float64
    axes = f.constant(np.array([defined.axis], np.int64))
    kept, hidden = defined.kept(), np.float32(-math.ldexp(HIDDEN, exponent))
    if kept is not None:
        x = f("Add", x, f.constant(np.where(kept, np.float32(0), hidden)))
    if keep:
        truth = f("Greater", keep, f.constant(np.float32(0.5)))
        x = f("Add", x, f("Where", truth, f.constant(np.float32(0)), f.constant(hidden)))
    apart = f("Sub", f("ReduceMax", x, axes, keepdims=1), x)
    apart = f("Mul", apart, f.constant(np.float32(math.ldexp(1, -exponent))))
    index = f("Cast", f("Min", apart, f.constant(np.float32(len(table) - 1))), to=TensorProto.INT32)
    entries = f("Gather", f.constant(table.astype(real)), index, axis=0)
    total = f("ReduceSum", entries, axes, keepdims=1)
    if defined.levels:
        powers = defined.powers()
        twice, thrice = (f("Mul", y, f.constant(real(n))) for y, n in ((total, 2), (entries, 3)))
        quotient = f("Min", f("Floor", f("Div", twice, thrice)), f.constant(real(len(powers) - 1)))
        f("Gather", f.constant(np.ldexp(powers.astype(np.float32), -FINE)), f("Cast", quotient, to=TensorProto.INT32))
        return
    reciprocal = f("Floor", f("Div", f.constant(real(2.0**defined.reciprocal_bits)), total))
    result = f("Mul", entries, reciprocal)
    if single:
        f("Mul", result, f.constant(np.float32(2.0**-FINE)))
        return
    result = f("Floor", f("Mul", result, f.constant(np.float64(2.0 ** (FINE - defined.reciprocal_bits)))))
    f("Cast", f("Mul", result, f.constant(np.float64(2.0**-FINE))), to=TensorProto.FLOAT)


def _log_softmax(f: _Expansion, defined: LogSoftmax, encoding: Encoding, x: str) -> None:
    exponent, table, bounds = int(encoding.exponent), defined.table(encoding), defined.bounds()
    axes = f.constant(np.array([defined.axis], np.int64))
    apart = f("Sub", f("ReduceMax", x, axes, keepdims=1), x)
    codes = f("Mul", apart, f.constant(np.float32(math.ldexp(1, -exponent))))
    index = f("Cast", f("Min", codes, f.constant(np.float32(len(table) - 1))), to=TensorProto.INT32)
    total = f("ReduceSum", f("Gather", f.constant(table.astype(np.float32)), index, axis=0), axes, keepdims=1)
    steps = range(len(bounds).bit_length())
    padded = np.full(1 << len(steps), np.float32(2.0**25))  # above every sum
    padded[: len(bounds)] = bounds
    known = f.constant(padded)
    found = f("Mul", total, f.constant(np.float32(0)))
    for step in reversed(steps):  # how many bounds are not above the sum, bit by bit
        place = f("Cast", f("Add", found, f.constant(np.float32((1 << step) - 1))), to=TensorProto.INT32)
        reached = f("Cast", f("GreaterOrEqual", total, f("Gather", known, place, axis=0)), to=TensorProto.FLOAT)
        found = f("Add", found, f("Mul", reached, f.constant(np.float32(1 << step))))
    logarithm = f("Mul", found, f.constant(np.float32(2.0**-defined.fine)))
    f("Neg", f("Add", apart, logarithm))


def _norm(f: _Expansion, defined: Norm, encoding: Encoding, x: str) -> None:
    def number(value: float) -> str:
        return f.constant(np.float64(value))

    def rounded(value: str, shift: int) -> str:
        return f("Floor", f("Add", f("Mul", value, number(2.0**-shift)), number(0.5)))

    n, precision = defined.length, defined.precision(encoding)
    q = f("Cast", x, to=TensorProto.DOUBLE)
    units = np.ldexp(defined.multipliers().astype(np.float64), -int(encoding.exponent))
    q = f("Mul", q, f.constant(units))
    dims = 1 if defined.groups else len(defined.shape)
    if defined.groups:
        q = f("Reshape", q, f.constant(np.array([0, defined.groups, -1])))
    axes = f.constant(np.arange(-dims, 0))
    spread = f("Mul", f("ReduceSum", f("Mul", q, q), axes, keepdims=1), number(n))
    centred = f("Mul", q, number(n))
    if defined.centered:
        total = f("ReduceSum", q, axes, keepdims=1)
        spread, centred = f("Sub", spread, f("Mul", total, total)), f("Sub", centred, total)
    spread = f("Max", f("Add", spread, number(defined.epsilon(encoding))), number(1))
    root = f("Floor", f("Sqrt", f("Mul", spread, number(4.0**precision))))
    reciprocal = f("Floor", f("Div", number(2.0**RECIPROCAL), root))
    z = rounded(f("Mul", centred, reciprocal), RECIPROCAL - precision - DEPTH)
    if defined.groups:
        z = f("Reshape", z, f.constant(np.array([0, *defined.shape])))
    gamma, beta = (f.constant(v.astype(np.float64)) for v in defined.factors())
    y = rounded(f("Add", f("Mul", z, gamma), beta), defined.drop)
    f("Cast", f("Mul", y, number(2.0**-defined.fine)), to=TensorProto.FLOAT)


def _lookup(f: _Expansion, defined: Lookup, encoding: Encoding, x: str) -> None:
    index = f("Mul", x, f.constant(np.float32(math.ldexp(1, -int(encoding.exponent)))))
    if least := int(encoding.zero_point) - int(encoding.grid.qmin):
        index = f("Add", index, f.constant(np.float32(least)))
    f("Gather", f.constant(defined.values()), f("Cast", index, to=TensorProto.INT32), axis=0)


WRITERS: dict[type[Definition], Callable[..., None]] = {
    Softmax: _softmax,
    LogSoftmax: _log_softmax,
    Norm: _norm,
    Lookup: _lookup,
}
"""What writes each definition: (expansion, definition, encoding of the first operand, operands); see `expand`."""
