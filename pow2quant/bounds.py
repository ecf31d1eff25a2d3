"""What an ONNX file may ask for: checked before anything is allocated, inlined or walked."""

from __future__ import annotations

import math
from collections.abc import Iterable

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from pow2quant.errors import FileFormatError

MOST_NODES = 1_000_000
"""Of a graph, when every call of a function is replaced by its nodes."""

MOST_DEPTH = 16
"""Graphs inside graphs, and functions that call functions."""

MOST_ELEMENTS = 1 << 28
"""Of a tensor whose shape is declared but whose values are not in the file: a gigabyte of float32."""

MOST_DIMENSIONS = 32

BITS: dict[int, int] = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4, TensorProto.STRING: 0}
"""Of one element as it is stored, where numpy does not say so."""

Function = tuple[str, str, str]
"""Domain, name and overload."""


def check(model: ModelProto) -> None:
    """Raises FileFormatError, naming the tensor or function, for what is beyond the bounds above or impossible."""
    _Calls(model).count(model.graph.node, 0)
    for graph in graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.HasField("tensor_type"):
                _check_declared(value.name, [d.dim_value for d in value.type.tensor_type.shape.dim])
        for tensor in graph.initializer:
            _check_stored(tensor)
        for node in graph.node:
            for attribute in node.attribute:
                for tensor in (attribute.t, *attribute.tensors):
                    if tensor.data_type:
                        _check_stored(tensor)


def graphs(graph: GraphProto, depth: int = 0) -> Iterable[GraphProto]:
    """The graph and those in its nodes. Raises FileFormatError where they are too deep inside each other."""
    if depth > MOST_DEPTH:
        raise FileFormatError(f"graphs are more than {MOST_DEPTH} deep inside each other")
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from graphs(inner, depth + 1)


def inner_graphs(node: NodeProto) -> list[GraphProto]:
    """The graphs in a node: branches, bodies of loops."""
    return [g for a in node.attribute for g in ([a.g] if a.HasField("g") else []) + list(a.graphs)]


class _Calls:
    """Counts nodes with those of the functions that are called."""

    def __init__(self, model: ModelProto) -> None:
        self._functions = {(f.domain, f.name, f.overload): f for f in model.functions}
        self._sizes: dict[Function, int | None] = {}

    def count(self, nodes: Iterable[NodeProto], depth: int) -> int:
        total = 0
        for node in nodes:
            total += 1 + self._called((node.domain, node.op_type, node.overload), depth)
            total += sum(self.count(graph.node, depth + 1) for graph in inner_graphs(node))
            if total > MOST_NODES:
                raise FileFormatError(f"there are more than {MOST_NODES:,} nodes, those of functions counted")
        return total

    def _called(self, name: Function, depth: int) -> int:
        if name not in self._functions:
            return 0
        if depth > MOST_DEPTH:
            raise FileFormatError(f"function {name[1]}: functions are more than {MOST_DEPTH} deep inside each other")
        if name in self._sizes:
            size = self._sizes[name]
            if size is None:
                raise FileFormatError(f"function {name[1]}: calls itself")
            return size
        self._sizes[name] = None
        size = self._sizes[name] = self.count(self._functions[name].node, depth + 1)
        return size


def _check_declared(name: str, shape: list[int]) -> None:
    if len(shape) > MOST_DIMENSIONS:
        raise FileFormatError(f"{name}: has {len(shape)} dimensions, more than {MOST_DIMENSIONS}")
    if any(size < -1 for size in shape):  # -1 is how some exporters say that a dimension is open
        raise FileFormatError(f"{name}: impossible shape {tuple(shape)}")
    if math.prod(size for size in shape if size) > MOST_ELEMENTS:
        raise FileFormatError(f"{name}: the shape {tuple(shape)} has more than {MOST_ELEMENTS:,} elements")


def _check_stored(tensor: TensorProto) -> None:
    """A tensor's values must be there: as many bytes as its shape and type ask for."""
    shape = tuple(tensor.dims)
    if len(shape) > MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise FileFormatError(f"{tensor.name}: impossible shape {shape[:40]}")
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise FileFormatError(f"{tensor.name}: unknown type {tensor.data_type}")
    bits = BITS.get(tensor.data_type)
    if bits is None:
        bits = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    count = math.prod(shape)
    if tensor.HasField("raw_data") and 8 * len(tensor.raw_data) < count * bits:
        raise FileFormatError(f"{tensor.name}: {len(tensor.raw_data)} bytes are too few for the shape {shape}")
    fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
    stored = max(len(getattr(tensor, field)) for field in fields)
    if not tensor.HasField("raw_data") and 2 * stored < count:  # complex numbers take two, two of 4 bits take one
        raise FileFormatError(f"{tensor.name}: {stored} values are too few for the shape {shape}")
