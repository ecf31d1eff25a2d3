"""ONNX with QuantizeLinear and DequantizeLinear (QDQ): `to_qdq` and `from_qdq` are inverse to each other.

What is written (opset 21): weights and biases are integer initializers with a DequantizeLinear, every other quantized
tensor has one QuantizeLinear and one DequantizeLinear. A DequantizeLinear's result bears the tensor's own name, so that
the float network's nodes, its graph outputs and every tensor's name stay as they are; only behind graph inputs, whose
names are taken, the consumers are led to `<input>_dequantized`.

Weights are stored in 4, 8 or 16 bits, biases in 32, other tensors in 8 or 16. Of any other width, they take the next
wider type, and a tensor that is computed is clipped to its grid before it is quantized, unless it was only selected
from tensors of the same encoding. (onnxruntime runs that with and without optimizations; 4-bit activations it loads
only without.) The exact grids stand in the file's metadata (`files.GRIDS`); a file of another tool has none, and there
the width of the storage counts.

https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pow2quant import bounds
from pow2quant.adapters import clips, double, exact, guards
from pow2quant.adapters.batch import free_batch
from pow2quant.adapters.files import (
    GRIDS,
    IR_VERSION,
    OPSET,
    at_least_opset,
    check_names_and_shapes,
    exact_grids,
    lost_grids,
    parameter_codes,
)
from pow2quant.adapters.integer_ends import float_ends
from pow2quant.artifact import Artifact
from pow2quant.errors import EncodingError, FileFormatError, OutputError, UnsupportedModelError
from pow2quant.foreign import check_is_file, parsed
from pow2quant.operators import OPERATIONS, Kind, Values, operations
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.saving import write

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from pow2quant.artifact import Table

BIASED = tuple(op for op, row in OPERATIONS.items() if row.kind is Kind.WEIGHTED)
"""Operators whose third input is a bias."""

SELECTING = (*operations(Values.MOVED, Values.SELECTED), "Concat")
"""Operators whose results are values of their first input (of all, for Concat), so that they stay on its grid.

A Clip behind them would be idle, and onnxruntime 1.31 fails to optimize it for signed tensors: it inserts another Q in
front of the Clip, and then turns int8 into uint8 everywhere but in that Q.
"""

INTEGER_OPERATORS = {
    *("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("QGemm", "QAttention", "QEmbedLayerNormalization"),
}
"""Operators on integers, besides those whose name begins with QLinear: the other format of quantized ONNX files."""

FOLDED = ("Cast", "Clip", "Constant", "Identity", "Reshape", "Transpose")
"""Operators that are computed while reading when they stand between a constant and a Q or DQ."""

FOREIGN_SUFFIXES = ("_DequantizeLinear_Output", "_qdq", "_quantized", "_q")
"""What onnxruntime's quantizer and AIMET append to a parameter's name."""


def load(path: Path) -> ModelProto:
    """Reads and checks an ONNX file, external data included.

    Raises FileFormatError, naming the file, when it is missing, corrupt, or not ONNX.
    """
    check_is_file(path)
    try:
        model = onnx.load(path, format="protobuf")
        bounds.check(model)
        onnx.checker.check_model(str(path))
    except MemoryError:
        raise
    except Exception as error:  # protobuf's, the checker's and the operating system's errors have no common base
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(f"{path}: not a valid ONNX file: {reason or type(error).__name__}") from error
    return model


def save(model: ModelProto, path: Path) -> None:
    """Writes an ONNX file under a temporary name in its folder and renames it. Raises OutputError."""
    try:
        content = model.SerializeToString()
    except Exception as error:  # protobuf's EncodeError, or ValueError, by its version
        raise OutputError(f"{path}: cannot be written: {error}") from error
    write(path, content)


def export_qdq(artifact: Artifact, folder: str | Path) -> Path:
    """QDQ ONNX with integer weights, as `model.onnx`. Raises EncodingError and OutputError."""
    path = Path(folder) / "model.onnx"
    save(to_qdq(artifact), path)
    return path


# Writing


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
    _refuse_control_flow(graph)
    guards.put(graph, table)
    exact.expand(graph, table)
    double.widen(graph, table)
    writer = _Writer(graph, table)
    nodes = [*writer.parameters(), *writer.inputs()]
    for node in graph.node:
        nodes += writer.results(node)
    _replace(graph.node, nodes)
    _replace(graph.input, [value for value in graph.input if value.name not in writer.parameter_names])
    _replace(graph.initializer, writer.initializers)
    clips.postpone(graph)
    _set_metadata(model, json.dumps(lost_grids(table, writer.stored)))
    if _opset(model) == OPSET:
        model.ir_version = IR_VERSION
    return model


class _Writer:
    """Turns the parts of one graph into their quantized form; `initializers` and `stored` grow as it goes.

    stored: the encodings as a reader without the exact grids sees them.
    """

    def __init__(self, graph: onnx.GraphProto, table: Table) -> None:
        self.graph, self.table, self.stored = graph, table, dict[str, Encoding]()
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
            storage = _storage(name, encoding, (32, 4, 8, 16) if name in biases else (4, 8, 16, 32))
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
                nodes += self._quantized(name, node.output[index], name, _selects(node, read, self.table[name]))
        return nodes

    def _quantized(self, name: str, source: str, result: str, on_grid: bool = False) -> list[NodeProto]:
        """[Clip,] QuantizeLinear and DequantizeLinear from `source` to `result`, both in the encoding of `name`."""
        encoding = self.table[name]
        storage = _storage(name, encoding, (8, 16))
        nodes = []
        if _is_narrower(encoding.grid, storage) and not on_grid:
            if encoding.axis is not None:
                raise EncodingError(f"{name}: {encoding.grid.bits} bits per channel can be stored for parameters only")
            clipped = self._free(f"{name}_clipped")
            low, high = _bounds(encoding)
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
        axis = self.table[name].axis
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        return node

    def _scale(self, name: str, storage: IntGrid) -> list[str]:
        """Adds scale and zero point, and notes what they tell by themselves."""
        e = self.table[name]
        self.stored[name] = _plain(e.scale, e.zero_point, storage, e.axis)
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


def _plain(scale: NDArray[Any], zero_point: NDArray[Any], grid: IntGrid, axis: int | None) -> Encoding:
    """The encoding that scale and zero point tell by themselves: a single scale is taken for the whole tensor."""
    if scale.size == 1:
        return Encoding(scale.reshape(()), zero_point.reshape(()), grid)
    return Encoding(scale, zero_point, grid, axis)


def _dtype(grid: IntGrid) -> np.dtype[Any]:
    kind = getattr(TensorProto, f"{'' if grid.signed else 'U'}INT{grid.width}")
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def _is_narrower(grid: IntGrid, storage: IntGrid) -> bool:
    return bool((grid.qmin != storage.qmin).any() or (grid.qmax != storage.qmax).any())


def _selects(node: NodeProto, read: list[Encoding | None], encoding: Encoding) -> bool:
    """Whether the results of a node that reads these encodings are on the grid of `encoding` by themselves."""
    selected = read if node.op_type == "Concat" else read[:1]
    return node.op_type in SELECTING and all(one == encoding for one in selected)


def _bounds(encoding: Encoding) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return encoding.minimum.astype(np.float32), encoding.maximum.astype(np.float32)


# Reading


def from_qdq(model: ModelProto) -> Artifact:
    """The float network and the table in a QDQ model, ours or another tool's.

    Weights, stored as integers or as floats behind Q and DQ, become float initializers on their grid. In a file of ours
    every tensor gets its name back; in others it is called what the Q reads, or, for graph outputs, what the DQ writes.
    Where something besides the Q reads the float tensor, or where a quantized tensor is quantized again, an Identity
    takes the place of Q and DQ and bears the encoding: the result computes what the model computes. Integer inputs and
    outputs become the floats that they stand for (`integer_ends.py`), and a batch size that the file fixes becomes free
    where no result depends on it (`batch.py`).

    Raises FileFormatError naming the node that cannot be read so; UnsupportedModelError for control flow.
    """
    copy = ModelProto()
    copy.CopyFrom(onnx.inliner.inline_local_functions(model) if model.functions else model)
    _refuse_control_flow(copy.graph)
    _refuse_integer_operators(copy.graph)
    float_ends(copy.graph)
    clips.restore(copy.graph)
    metadata = {entry.key: entry.value for entry in copy.metadata_props}
    reader = _Reader(copy.graph, _parse_grids(metadata[GRIDS]) if GRIDS in metadata else None)
    reader.read()
    double.narrow(copy.graph)
    exact.collapse(copy.graph, reader.table)
    guards.take(copy.graph)
    _set_metadata(copy, None)
    free_batch(copy, reader.table)
    return Artifact(at_least_opset(copy), reader.table)


class _Reader:
    """Takes Q and DQ out of a graph, in the order of its nodes, and collects the table.

    exact: the grids of our own metadata, or None for a file of another tool.
    alias: what to read instead of a DQ's result. renamed: the name for a node's result that only Qs read. instead: the
    nodes that take a removed node's place, by its id. parameters: the float initializers that take the place of one.
    """

    def __init__(self, graph: onnx.GraphProto, exact: dict[str, tuple[IntGrid, int | None]] | None) -> None:
        self.graph, self.exact, self.nodes = graph, exact, list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.inputs = {value.name for value in graph.input} - self.initializers.keys()
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers = defaultdict[str, list[NodeProto]](list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
        self.constants: dict[str, NDArray[Any] | None] = {}
        self.table: Table = {}
        self.alias: dict[str, str] = {}
        self.renamed: dict[str, str] = {}
        self.instead: dict[int, list[NodeProto]] = {}
        self.parameters = defaultdict[str, list[TensorProto]](list)

    def read(self) -> None:
        """Reads every Q and DQ, then rebuilds the graph without them."""
        for node in self.nodes:
            if id(node) in self.instead or not _is(node, "QuantizeLinear", "DequantizeLinear"):
                continue
            values = self._constant(node.input[0])
            if node.op_type == "QuantizeLinear":
                self._computed(node) if values is None else self._float_parameter(node, values)
            elif values is None:
                raise _refusal(node, f"reads {node.input[0]}, which is neither constant nor a QuantizeLinear's result")
            else:
                self._integer_parameter(node, values)
        for name in (self.exact or {}).keys() - self.table.keys():
            raise FileFormatError(f"metadata: {GRIDS}: {name} is not quantized to the grid that is stated there")
        self._rebuild()

    def _integer_parameter(self, first: NodeProto, codes: NDArray[Any]) -> None:
        """integers [-> Clip] -> DQ; several DQs of the same integers in the same encoding are one parameter."""
        kind, place = codes.dtype.name, first.input[0]
        plain = self._encoding(first, kind, codes.ndim)
        same = [
            node
            for node in self.consumers[place]
            if _is(node, "DequantizeLinear") and self._encoding(node, kind, codes.ndim) == plain
        ]
        self._drop(*same)
        results, clip = [node.output[0] for node in same], self.producer.get(place)
        if clip is not None and clip.op_type == "Clip":
            plain = self._on(self._clip_grid(clip, plain.grid), plain, clip)
        self._parameter(first, self._origin(place, results), plain, codes.astype(np.int64), results)

    def _float_parameter(self, q: NodeProto, values: NDArray[Any]) -> None:
        """floats -> Q [-> Clip] -> DQ."""
        if values.dtype != np.float32:
            raise _refusal(q, f"quantizes a constant of type {values.dtype}; only float32 can be read")
        plain, results, nodes = self._behind(q, values.ndim)
        self._drop(*nodes)
        if not results:
            return
        try:
            codes = plain.quantize(values)
        except EncodingError as error:
            raise _refusal(q, f"cannot be computed: {error}") from error
        name = q.input[0]
        if len(self.consumers[name]) > 1 or name in self.outputs:
            name = results[0]
        elif name in self.producer:
            self._drop(self.producer[name])
        self._parameter(q, name, plain, codes, results)

    def _parameter(
        self, node: NodeProto, name: str, plain: Encoding, codes: NDArray[np.int64], results: list[str]
    ) -> None:
        """Puts a float initializer, the dequantized codes, in the place of the node's constant."""
        name = next((result for result in results if result in self.outputs), name)
        encoding = self._exact(name, plain, node)
        try:
            values = encoding.dequantize(codes)
        except EncodingError as error:
            raise _refusal(node, f"cannot be computed: {error}") from error
        low, high = (encoding.along(end, codes.ndim) for end in (encoding.grid.qmin, encoding.grid.qmax))
        if ((codes < low) | (codes > high)).any():
            raise _refusal(node, f"holds values off the grid of {encoding.grid.bits} bits that the metadata states")
        self.parameters[node.input[0]].append(numpy_helper.from_array(values, name))
        self._bind(name, encoding, results, node)

    def _computed(self, q: NodeProto) -> None:
        """[Clip ->] Q [-> Clip] -> DQ of a graph input or a node's result."""
        source = self.alias.get(q.input[0], q.input[0])
        again = _is(self.producer.get(q.input[0]), "DequantizeLinear")
        readers = [q] if again else self.consumers[q.input[0]]
        plain, results, _ = self._behind(q, None)
        found = [self._behind(node, None) for node in readers if _is(node, "QuantizeLinear")]
        alike = [(one, nodes) for encoding, one, nodes in found if encoding == plain and one]
        self._drop(q, *(node for _, nodes in alike for node in nodes))
        if not results:
            return
        results = [result for one, _ in alike for result in one]
        if again and self.table.get(source) == plain:
            self._bind(source, plain, results, q)
        elif again or len(alike) < len(readers) or source in self.outputs:
            name = next((result for result in results if result in self.outputs), results[0])
            self.instead[id(q)].append(helper.make_node("Identity", [source], [name], q.name))
            self._bind(name, plain, results, q)
        else:
            self._merge(q, source, plain, results)

    def _merge(self, q: NodeProto, source: str, plain: Encoding, results: list[str]) -> None:
        """A tensor that only Qs of one encoding read becomes the quantized tensor itself."""
        name, clip = self._name(source, results), self.producer.get(source)
        if self.exact is not None and clip is not None and clip.op_type == "Clip":
            unclipped = self._name(clip.input[0], results)
            exact = self._exact(unclipped, plain, q)
            if _is_narrower(exact.grid, plain.grid) and self._clips_to(clip, exact):
                self._drop(clip)
                source, name, plain = clip.input[0], unclipped, exact
        encoding, node = self._exact(name, plain, q), self.producer.get(source)
        if _is_narrower(encoding.grid, plain.grid):
            read = [self.table.get(self.alias.get(one, one)) for one in node.input] if node is not None else []
            if node is None or not _selects(node, read, encoding):
                raise _refusal(q, f"has no Clip to the {encoding.grid.bits} bits that the metadata states for {name}")
        if source != name:
            self.renamed[source] = name
        self._bind(name, encoding, results, q)

    def _clips_to(self, clip: NodeProto, encoding: Encoding) -> bool:
        bounds = [value for name in clip.input[1:] if (value := self._constant(name)) is not None]
        alone = len(self.consumers[clip.input[0]]) == 1
        return alone and len(bounds) == 2 and np.array_equal(bounds, _bounds(encoding))

    def _name(self, source: str, results: list[str]) -> str:
        """What to call a computed tensor."""
        if source in self.inputs:
            return source
        return results[0] if self.exact is not None else next((r for r in results if r in self.outputs), source)

    def _origin(self, integers: str, results: list[str]) -> str:
        """What to call a parameter that is stored as integers: what it was quantized from, if that name is free."""
        if self.exact is not None:
            return results[0]
        name = next((integers.removesuffix(s) for s in FOREIGN_SUFFIXES if integers.endswith(s)), results[0])
        taken = any(name in names for names in (self.initializers, self.producer, self.inputs, self.table))
        return results[0] if taken else name

    def _exact(self, name: str, plain: Encoding, node: NodeProto) -> Encoding:
        """The encoding with the grid and axis that our metadata state for the tensor, if they do."""
        if self.exact is None or name not in self.exact:
            return plain
        grid, axis = self.exact[name]
        if grid.width > plain.grid.width or grid.signed != plain.grid.signed:
            raise _refusal(node, f"stores {plain.grid.width} bits, which cannot hold the {grid} of the metadata")
        shape = () if axis is None and plain.scale.size == 1 else (-1,)
        try:
            return Encoding(plain.scale.reshape(shape), plain.zero_point.reshape(shape), grid, axis)
        except EncodingError as error:
            raise _refusal(node, f"does not fit the metadata of {name}: {error}") from error

    def _bind(self, name: str, encoding: Encoding, results: list[str], node: NodeProto) -> None:
        """Enters the tensor into the table and leads whatever read a DQ's result to it."""
        self.table[name] = encoding
        for result in dict.fromkeys(results):
            if result in self.outputs and result != name:
                self.table[result] = encoding
                self.instead[id(node)].append(helper.make_node("Identity", [name], [result], f"{result}/Identity"))
            elif result != name:
                self.alias[result] = name

    def _behind(self, q: NodeProto, ndim: int | None) -> tuple[Encoding, list[str], list[NodeProto]]:
        """What a Q quantizes to: the encoding, the results of the DQs behind it, and all nodes from the Q to them.

        Between them may be Identity, and a Clip of the integers to a narrower grid (Brevitas's QCDQ, PyTorch).
        """
        plain, kind = self._encoding(q, None, ndim), self._kind(q, None)
        results, grids, pending = list[str](), set[IntGrid](), [(q, plain.grid)]
        for node, grid in pending:
            if _is(node, "DequantizeLinear"):
                if self._encoding(node, kind, ndim) != plain:
                    raise _refusal(node, f"has another scale or zero point than {_title(q)}")
                results.append(node.output[0])
                grids.add(grid)
                continue
            if node.op_type == "Clip":
                grid = self._clip_grid(node, grid)
            elif node is not q and node.op_type != "Identity":
                raise _refusal(node, f"reads the integers of {_title(q)}; only DequantizeLinear can be read there")
            if node.output[0] in self.outputs:
                raise _refusal(node, "gives integers as a graph output; only float outputs can be read")
            pending += [(reader, grid) for reader in self.consumers[node.output[0]]]
        if len(grids) > 1:
            raise _refusal(q, "feeds DequantizeLinear nodes behind Clips to different grids")
        return self._on(grids.pop() if grids else plain.grid, plain, q), results, [node for node, _ in pending]

    def _clip_grid(self, clip: NodeProto, storage: IntGrid) -> IntGrid:
        """The grid that a Clip of integers leaves."""
        stated = [self._constant(name) if name else None for name in (*clip.input[1:], "", "")]
        bounds = [
            int(end if one is None else one) for one, end in zip(stated, (storage.qmin, storage.qmax), strict=False)
        ]
        for bits in range(2, storage.width + 1):
            for narrow in (False, True)[: 1 + storage.signed]:
                grid = IntGrid(bits, storage.signed, narrow)
                if bounds == [grid.qmin, grid.qmax]:
                    return grid
        raise _refusal(
            clip, f"clips integers to {bounds}, which are not the ends of a grid within {storage.width} bits"
        )

    def _on(self, grid: IntGrid, plain: Encoding, node: NodeProto) -> Encoding:
        try:
            return Encoding(plain.scale, plain.zero_point, grid, plain.axis)
        except EncodingError as error:
            raise _refusal(node, f"has an impossible encoding: {error}") from error

    def _drop(self, *nodes: NodeProto) -> None:
        for node in nodes:
            self.instead.setdefault(id(node), [])

    def _encoding(self, node: NodeProto, kind: str | None, ndim: int | None) -> Encoding:
        """The encoding that a Q or DQ states. kind: the integers' type where the node does not state it."""
        kind = self._kind(node, kind)
        scale, zero_point = self._constant(node.input[1]), self._zero_point(node)
        unsigned, integer, bits = kind.partition("int")
        attributes = {a.name: a.i for a in node.attribute}
        if not integer or unsigned not in ("", "u"):
            raise _refusal(node, f"is of type {kind}; only integers can be read")
        if (problem := _scale_problem(scale, attributes.get("block_size", 0), attributes.get("axis", 1))) is not None:
            raise _refusal(node, problem)
        assert scale is not None
        axis = attributes.get("axis", 1)
        if scale.size > 1 and ndim is not None:
            if not -ndim <= axis < ndim:
                raise _refusal(node, f"has axis {axis}, which a tensor of {ndim} dimensions does not have")
            axis %= ndim
        if axis < 0 and scale.size > 1:
            raise _refusal(node, f"counts axis {axis} from the end, of a tensor of unknown rank")
        try:
            return _plain(scale, zero_point, IntGrid(int(bits), not unsigned), axis)
        except (EncodingError, ValueError) as error:
            raise _refusal(node, f"has an impossible encoding: {error}") from error

    def _zero_point(self, node: NodeProto) -> NDArray[Any]:
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros((), np.int64)
        zero_point = self._constant(node.input[2])
        if zero_point is None:
            raise _refusal(node, "has a zero point that is not constant")
        return zero_point

    def _kind(self, node: NodeProto, otherwise: str | None) -> str:
        """The name of the integers' type: by the zero point, the attribute, or `otherwise`; uint8 in the end."""
        if len(node.input) > 2 and node.input[2]:
            return self._zero_point(node).dtype.name
        stated = next((a.i for a in node.attribute if a.name == "output_dtype" and _is(node, "QuantizeLinear")), 0)
        return np.dtype(helper.tensor_dtype_to_np_dtype(stated)).name if stated else otherwise or "uint8"

    def _constant(self, name: str) -> NDArray[Any] | None:
        """The value of a tensor that does not depend on the graph's inputs, as far as `FOLDED` reaches."""
        if name not in self.constants:
            node = self.producer.get(name)
            if name in self.initializers:
                self.constants[name] = numpy_helper.to_array(self.initializers[name])
            elif node is None or node.op_type not in FOLDED:
                self.constants[name] = None
            else:
                feeds = {read: self._constant(read) for read in node.input}
                known = all(value is not None for value in feeds.values())
                computed: Any = ReferenceEvaluator(node).run(None, feeds) if known else [None]
                self.constants[name] = None if computed[0] is None else np.asarray(computed[0])
        return self.constants[name]

    def _rebuild(self) -> None:
        """The graph without the dropped nodes, and without constants that only they read."""
        kept = [n for node in self.nodes for n in self.instead.get(id(node), [node])]
        for node in kept:
            node.input[:] = [self.alias.get(name, name) for name in node.input]
            node.output[:] = [self.renamed.get(name, name) for name in node.output]
        orphans = {name for node in self.nodes if id(node) in self.instead for name in node.input}
        kept = _without_orphans(kept, orphans, self.outputs)
        read = {name for node in kept for name in node.input} | self.outputs
        folded = {tensor.name for tensors in self.parameters.values() for tensor in tensors}
        initializers = []
        for tensor in self.graph.initializer:
            initializers += self.parameters.pop(tensor.name, [])
            if tensor.name not in folded and (tensor.name in read or tensor.name not in orphans):
                initializers.append(tensor)
        initializers += [tensor for tensors in self.parameters.values() for tensor in tensors]
        _replace(self.graph.node, kept)
        _replace(self.graph.initializer, initializers)
        _replace(self.graph.input, [value for value in self.graph.input if value.name in self.inputs])
        alive = {name for node in kept for name in node.output}
        _replace(self.graph.value_info, [value for value in self.graph.value_info if value.name in alive])
        del self.graph.quantization_annotation[:]


def _without_orphans(nodes: list[NodeProto], orphans: set[str], outputs: set[str]) -> list[NodeProto]:
    """Without nodes whose results are no longer read; `orphans`, names that lost a reader, grows by theirs."""
    while True:
        read = {name for node in nodes for name in node.input} | outputs
        dead = [n for n in nodes if n.op_type in FOLDED and set(n.output) <= orphans - read]
        if not dead:
            return nodes
        orphans |= {name for node in dead for name in node.input}
        gone = {id(node) for node in dead}
        nodes = [node for node in nodes if id(node) not in gone]


def _scale_problem(scale: NDArray[Any] | None, block: int, axis: int) -> str | None:
    """Why a scale cannot be read; None where it can."""
    readable = "only constant float32 scales, one for the tensor or one per channel, can be read"
    if scale is None:
        return f"has a scale that is computed, not constant; {readable}"
    if block or scale.ndim > 1:
        size = f"of {block} values " if block else ""
        return f"has one scale for each block {size}along axis {axis} (block-wise, {scale.shape} scales); {readable}"
    if scale.dtype != np.float32:
        return f"has a scale of type {scale.dtype}; {readable}"
    return None


def _is(node: NodeProto | None, *op_types: str) -> bool:
    """Whether the node is of one of these types, in ONNX's own domain or in onnxruntime's."""
    return node is not None and node.op_type in op_types and node.domain in ("", "ai.onnx", "com.microsoft")


def _title(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def _refusal(node: NodeProto, problem: str) -> FileFormatError:
    return FileFormatError(f"node {_title(node)} {problem}")


def _refuse_integer_operators(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type.startswith(("QLinear", "QOrdered")) or node.op_type in INTEGER_OPERATORS:
            raise _refusal(
                node,
                "computes on integers: the file is in the QOperator format or dynamically quantized; write it in the "
                "QDQ format instead (onnxruntime: quantize_static with quant_format=QuantFormat.QDQ)",
            )


def _refuse_control_flow(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise UnsupportedModelError(f"node {_title(node)} contains a graph; control flow cannot be quantized")


def _parse_grids(text: str) -> dict[str, tuple[IntGrid, int | None]]:
    try:
        return exact_grids(parsed(text), "metadata")
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"metadata: {GRIDS}: not JSON: {error}") from error


def _set_metadata(model: ModelProto, text: str | None) -> None:
    _replace(model.metadata_props, [entry for entry in model.metadata_props if entry.key != GRIDS])
    if text is not None:
        model.metadata_props.add(key=GRIDS, value=text)


def _replace(repeated: Any, items: Iterable[Any]) -> None:
    """Replaces the items of a protobuf list."""
    items = list(items)
    del repeated[:]
    repeated.extend(items)


def _opset(model: ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
