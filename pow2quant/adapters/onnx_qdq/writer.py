"""Writing: the artifact's float network with Q and DQ nodes put in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from pow2quant.adapters.files import (
    IR_VERSION,
    OPSET,
    at_least_opset,
    check_names_and_shapes,
    lost_grids,
    parameter_codes,
)
from pow2quant.adapters.onnx_qdq import clips, double, exact, guards
from pow2quant.adapters.onnx_qdq.nodes import (
    BIASED,
    ends,
    is_narrower,
    plain_encoding,
    refuse_control_flow,
    replace,
    selects,
    set_metadata,
)
from pow2quant.artifact import stored_in
from pow2quant.errors import EncodingError
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact, Table


WIDEST_BLOCK = 4
"""Bits of a weight with one scale for each block: of int8, onnxruntime 1.31 refuses it from level extended on."""


def to_qdq(artifact: Artifact) -> ModelProto:
    """The artifact as one QDQ model.

    Raises EncodingError naming the tensor when an encoding does not fit the model, cannot be stored, or its weights are
    off the grid; UnsupportedModelError naming a node with control flow.
    """
    table = artifact.encodings
    check_names_and_shapes(artifact.model, table)
    model = ModelProto()
    model.CopyFrom(at_least_opset(artifact.model))
    graph = model.graph
    refuse_control_flow(graph)
    guards.put(graph, table)
    exact.expand(graph, table)
    double.widen(graph, table)
    writer = _Writer(graph, table, stored_in(model))
    nodes = [*writer.parameters(), *writer.inputs()]
    for node in graph.node:
        nodes += writer.results(node)
    replace(graph.node, nodes)
    replace(graph.input, [value for value in graph.input if value.name not in writer.parameter_names])
    replace(graph.initializer, writer.initializers)
    clips.postpone(graph)
    set_metadata(model, json.dumps(lost_grids(table, writer.stored)))
    if _opset(model) == OPSET:
        model.ir_version = IR_VERSION
    return model


class _Writer:
    """Turns the parts of one graph into their quantized form; `initializers` and `stored` grow as it goes.

    stored: the encodings as a reader without the exact grids sees them. narrow: the type of weights of up to 4 bits.
    """

    def __init__(self, graph: onnx.GraphProto, table: Table, narrow: str) -> None:
        self.graph, self.table, self.stored, self.narrow = graph, table, dict[str, Encoding](), narrow
        self.initializers: list[TensorProto] = []
        self.parameter_names = {tensor.name for tensor in graph.initializer}
        self.taken = self.parameter_names | {value.name for value in graph.input}
        self.taken |= {name for node in graph.node for name in (node.name, *node.output)}
        self.renamed: dict[str, str] = {}

    def parameters(self) -> list[NodeProto]:
        """Weights and biases: integer initializers in their places, and their DequantizeLinear nodes."""
        biases = {n.input[2] for n in self.graph.node if n.op_type in BIASED and len(n.input) > 2}
        nodes = []
        for tensor in self.graph.initializer:
            name, encoding = tensor.name, self.table.get(tensor.name)
            if encoding is None:
                self.initializers.append(tensor)
                continue
            if encoding.block is not None and encoding.grid.width > WIDEST_BLOCK:
                raise EncodingError(
                    f"{name}: {encoding.grid.width} bits in blocks of {encoding.block}; onnxruntime runs blocks of "
                    f"at most {WIDEST_BLOCK} bits at every level of optimization"
                )
            widths = (8, 16, 32) if self.narrow == "int8" and encoding.block is None else (4, 8, 16, 32)
            storage = _storage(name, encoding, (32, *widths) if name in biases else widths)
            stored = self._add(f"{name}_quantized", parameter_codes(tensor, encoding), storage)
            nodes.append(self._node("DequantizeLinear", name, [stored, *self._scale(name, storage)], name))
        return nodes

    def inputs(self) -> list[NodeProto]:
        """Q and DQ behind every quantized graph input, whose consumers are renamed."""
        nodes: list[NodeProto] = []
        for value in self.graph.input:
            if value.name in self.table and value.name not in self.parameter_names:
                self.renamed[value.name] = self._free(f"{value.name}_dequantized")
                nodes += self._quantized(value.name, value.name, self.renamed[value.name])
        return nodes

    def results(self, node: NodeProto) -> list[NodeProto]:
        """The node and, behind it, Q and DQ for its quantized results."""
        nodes = [node]
        read = [self.table.get(name) for name in node.input]
        node.input[:] = [self.renamed.get(name, name) for name in node.input]
        for index, name in enumerate(node.output):
            if name in self.table:
                node.output[index] = self._free(f"{name}_float")
                nodes += self._quantized(name, node.output[index], name, selects(node, read, self.table[name]))
        return nodes

    def _quantized(self, name: str, source: str, result: str, on_grid: bool = False) -> list[NodeProto]:
        """[Clip,] QuantizeLinear and DequantizeLinear from `source` to `result`, both in the encoding of `name`."""
        encoding = self.table[name]
        storage = _storage(name, encoding, (8, 16))
        nodes = []
        if is_narrower(encoding.grid, storage) and not on_grid:
            if encoding.axis is not None:
                raise EncodingError(f"{name}: {encoding.grid.bits} bits per channel can be stored for parameters only")
            clipped = self._free(f"{name}_clipped")
            low, high = ends(encoding)
            bounds = [self._add(f"{name}_min", low), self._add(f"{name}_max", high)]
            nodes.append(helper.make_node("Clip", [source, *bounds], [clipped], self._free(f"{name}/Clip")))
            source = clipped
        quantized, scale = self._free(f"{name}_quantized"), self._scale(name, storage)
        return [
            *nodes,
            self._node("QuantizeLinear", name, [source, *scale], quantized),
            self._node("DequantizeLinear", name, [quantized, *scale], result),
        ]

    def _node(self, op_type: str, name: str, inputs: list[str], output: str) -> NodeProto:
        node = helper.make_node(op_type, inputs, [output], self._free(f"{name}/{op_type}"))
        axis, block = self.table[name].axis, self.table[name].block
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis if block is None else 1 - axis))
        if block is not None:
            node.attribute.append(helper.make_attribute("block_size", block))
        return node

    def _scale(self, name: str, storage: IntGrid) -> list[str]:
        """Adds scale and zero point, and notes what they tell by themselves."""
        e = self.table[name]
        self.stored[name] = plain_encoding(e.scale, e.zero_point, storage, e.axis, e.block)
        return [self._add(f"{name}_scale", e.scale), self._add(f"{name}_zero_point", e.zero_point, storage)]

    def _add(self, name: str, values: NDArray[Any], storage: IntGrid | None = None) -> str:
        stored = values if storage is None else values.astype(_dtype(storage))
        self.initializers.append(numpy_helper.from_array(np.asarray(stored), self._free(name)))
        return self.initializers[-1].name

    def _free(self, name: str) -> str:
        """The name, or with underscores appended until nothing else bears it."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _storage(name: str, encoding: Encoding, widths: Iterable[int]) -> IntGrid:
    """The narrowest ONNX type, of the given widths, that holds the grid. Raises EncodingError naming the tensor."""
    grid = encoding.grid
    for width in widths:
        # 32 bits exist signed and without zero point only.
        if grid.width <= width and (width < 32 or (grid.signed and not encoding.zero_point.any())):
            return IntGrid(width, grid.signed)
    raise EncodingError(
        f"{name}: ONNX has no type for {grid.width} bits, {'signed' if grid.signed else 'unsigned'}"
        f"{' with a zero point' if encoding.zero_point.any() else ''}: here only {', '.join(map(str, widths))} bits are"
        f"{', 32 bits signed and without zero point' if 32 in widths else ''}"
    )


def _dtype(grid: IntGrid) -> np.dtype[Any]:
    kind = getattr(TensorProto, f"{'' if grid.signed else 'U'}INT{grid.width}")
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def _opset(model: ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
