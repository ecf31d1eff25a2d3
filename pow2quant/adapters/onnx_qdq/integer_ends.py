"""Graphs whose inputs, outputs or moved tensors are integers, written as the float graphs that they stand for.

Quantizers for devices leave out the first QuantizeLinear and the last DequantizeLinear: the graph takes and gives
codes. Others write a Transpose or a Reshape between a Q and its DQ. Here every integer input gets a Q, every integer
output a DQ, and what moves codes moves floats between a DQ and a Q, each in the encoding that the file states. The
codes on the way are the same.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from pow2quant.graphs import GraphIndex

INTEGERS = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16)
"""Types of codes at the ends of a graph."""

MOVERS = (
    *("DepthToSpace", "Flatten", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Squeeze", "Transpose", "Unsqueeze"),
)
"""Operations of one tensor that give some of its values."""

PASSED = ("Clip", "Identity")
"""Operations on codes that the reader of QDQ files knows."""


def float_ends(graph: GraphProto) -> None:
    """Rewrites the graph, in place. An integer input that is neither dequantized nor cast to float stays as it is."""
    _Ends(graph).rewrite()


class _Ends:
    """codes: scale, zero point (as operands) and axis of every tensor that holds codes of an activation, by name.

    ones: the scales of inputs that are cast to float.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.graph, self.index = graph, GraphIndex(graph)
        self.names = {name for node in graph.node for name in (*node.input, *node.output)}
        self.names |= {value.name for value in (*graph.input, *graph.output)} | self.index.parameters.keys()
        self.codes: dict[str, tuple[list[str], int | None]] = {}
        self.ones = set[str]()
        self.renamed: dict[str, str] = {}
        self.nodes: list[NodeProto] = []

    def rewrite(self) -> None:
        given = [v for v in self.graph.input if v.name not in self.index.parameters]
        for value in given:
            if value.type.tensor_type.elem_type in INTEGERS:
                self._input(value)
        for node in self.graph.node:
            self._node(node)
        for value in self.graph.output:
            if value.name in self.codes:
                self._output(value)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _input(self, value: onnx.ValueInfoProto) -> None:
        kind = value.type.tensor_type.elem_type
        operands = self._operands_behind(value.name, kind)
        if operands is None:
            return
        codes = self._free(f"{value.name}_codes")
        value.type.tensor_type.elem_type = TensorProto.FLOAT
        self.renamed[value.name] = codes
        self._quantize(value.name, codes, (operands, None))

    def _operands_behind(self, name: str, kind: int) -> list[str] | None:
        """Scale and zero point of the first DQ behind a tensor of codes; 1 and 0 where it is cast to float instead."""
        for node in self.index.readers.get(name, []):
            if node.op_type in (*MOVERS, *PASSED) and node.input[0] == name:
                found = self._operands_behind(node.output[0], kind)
                if found is not None:
                    return found
            if node.op_type == "DequantizeLinear" and node.input[0] == name:
                scale, *zero = node.input[1:]
                return [scale, zero[0] if zero and zero[0] else self._zero(kind)]
            if node.op_type == "Cast" and any(a.i == TensorProto.FLOAT for a in node.attribute if a.name == "to"):
                one = self._constant("one", np.float32(1))
                self.ones.add(one)
                return [one, self._zero(kind)]
        return None

    def _node(self, node: NodeProto) -> None:
        node.input[:] = [self.renamed.get(name, name) for name in node.input]
        source = node.input[0] if node.input else ""
        if node.op_type == "QuantizeLinear" and source not in self.index.parameters:
            axis = next((a.i for a in node.attribute if a.name == "axis"), None)
            self.codes[node.output[0]] = list(node.input[1:]), axis
        elif node.op_type in PASSED and source in self.codes:
            self.codes[node.output[0]] = self.codes[source]
        elif node.op_type == "Cast" and source in self.codes and self.codes[source][0][0] in self.ones:
            self._dequantize(source, node.output[0])
            return
        elif node.op_type in MOVERS and source in self.codes and self.codes[source][1] is None:
            before, after, result = self._free(f"{source}_float"), self._free(f"{node.output[0]}_float"), node.output[0]
            self._dequantize(source, before)
            node.input[0], node.output[0] = before, after
            self.nodes.append(node)
            self._quantize(after, result, self.codes[source])
            return
        self.nodes.append(node)

    def _output(self, value: onnx.ValueInfoProto) -> None:
        codes = self._free(f"{value.name}_codes")
        for node in self.nodes:
            node.input[:] = [codes if name == value.name else name for name in node.input]
            node.output[:] = [codes if name == value.name else name for name in node.output]
        self.codes[codes] = self.codes[value.name]
        self._dequantize(codes, value.name)
        value.type.tensor_type.elem_type = TensorProto.FLOAT

    def _quantize(self, source: str, result: str, how: tuple[list[str], int | None]) -> None:
        self.codes[result] = how
        self.nodes.append(self._made("QuantizeLinear", source, result, how))

    def _dequantize(self, source: str, result: str) -> None:
        self.nodes.append(self._made("DequantizeLinear", source, result, self.codes[source]))

    @staticmethod
    def _made(op_type: str, source: str, result: str, how: tuple[list[str], int | None]) -> NodeProto:
        operands, axis = how
        node = helper.make_node(op_type, [source, *operands], [result], f"{result}/{op_type}")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        return node

    def _zero(self, kind: int) -> str:
        return self._constant("zero", np.zeros((), helper.tensor_dtype_to_np_dtype(kind)))

    def _constant(self, name: str, value: np.generic | np.ndarray[tuple[()], np.dtype[np.generic]]) -> str:
        name = self._free(name)
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _free(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name
