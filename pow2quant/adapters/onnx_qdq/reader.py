"""Reading: Q and DQ nodes taken out of a graph, their encodings collected in a table."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from pow2quant.adapters.files import GRIDS, at_least_opset, exact_grids
from pow2quant.adapters.onnx_qdq import clips, double, exact, float_biases, guards
from pow2quant.adapters.onnx_qdq.batch import free_batch
from pow2quant.adapters.onnx_qdq.integer_ends import float_ends
from pow2quant.adapters.onnx_qdq.nodes import (
    ends,
    is_a,
    is_narrower,
    refusal,
    refuse_control_flow,
    refuse_integer_operators,
    replace,
    selects,
    set_metadata,
    title,
)
from pow2quant.adapters.onnx_qdq.stated import FOLDED, Stated, on_grid
from pow2quant.artifact import Artifact
from pow2quant.errors import EncodingError, FileFormatError
from pow2quant.foreign import parsed
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Table

FOREIGN_SUFFIXES = ("_DequantizeLinear_Output", "_qdq", "_quantized", "_q")
"""What onnxruntime's quantizer and AIMET append to a parameter's name."""


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
    refuse_control_flow(copy.graph)
    refuse_integer_operators(copy.graph)
    float_ends(copy.graph)
    clips.restore(copy.graph)
    metadata = {entry.key: entry.value for entry in copy.metadata_props}
    reader = _Reader(copy.graph, _parse_grids(metadata[GRIDS]) if GRIDS in metadata else None)
    reader.read()
    reader.table |= float_biases.take(copy)
    double.narrow(copy.graph)
    exact.collapse(copy.graph, reader.table)
    guards.take(copy.graph)
    set_metadata(copy, None)
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
        self.stated = Stated(graph.initializer, self.nodes)
        self.outputs = {value.name for value in graph.output}
        self.inputs = {value.name for value in graph.input} - self.stated.initializers.keys()
        self.consumers = defaultdict[str, list[NodeProto]](list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
        self.table: Table = {}
        self.alias: dict[str, str] = {}
        self.renamed: dict[str, str] = {}
        self.instead: dict[int, list[NodeProto]] = {}
        self.parameters = defaultdict[str, list[TensorProto]](list)

    def read(self) -> None:
        """Reads every Q and DQ, then rebuilds the graph without them."""
        for node in self.nodes:
            if id(node) in self.instead or not is_a(node, "QuantizeLinear", "DequantizeLinear"):
                continue
            values = self.stated.constant(node.input[0])
            if node.op_type == "QuantizeLinear":
                self._computed(node) if values is None else self._float_parameter(node, values)
            elif values is None:
                raise refusal(node, f"reads {node.input[0]}, which is neither constant nor a QuantizeLinear's result")
            else:
                self._integer_parameter(node, values)
        for name in (self.exact or {}).keys() - self.table.keys():
            raise FileFormatError(f"metadata: {GRIDS}: {name} is not quantized to the grid that is stated there")
        self._rebuild()

    def _integer_parameter(self, first: NodeProto, codes: NDArray[Any]) -> None:
        """integers [-> Clip] -> DQ; several DQs of the same integers in the same encoding are one parameter."""
        kind, place = codes.dtype.name, first.input[0]
        plain = self.stated.encoding(first, kind, codes.ndim)
        same = [
            node
            for node in self.consumers[place]
            if is_a(node, "DequantizeLinear") and self.stated.encoding(node, kind, codes.ndim) == plain
        ]
        self._drop(*same)
        results, clip = [node.output[0] for node in same], self.stated.producer.get(place)
        if clip is not None and clip.op_type == "Clip":
            plain = on_grid(self.stated.clip_grid(clip, plain.grid), plain, clip)
        self._parameter(first, self._origin(place, results), plain, codes.astype(np.int64), results)

    def _float_parameter(self, q: NodeProto, values: NDArray[Any]) -> None:
        """floats -> Q [-> Clip] -> DQ."""
        if values.dtype != np.float32:
            raise refusal(q, f"quantizes a constant of type {values.dtype}; only float32 can be read")
        plain, results, nodes = self._behind(q, values.ndim)
        self._drop(*nodes)
        if not results:
            return
        try:
            codes = plain.quantize(values)
        except EncodingError as error:
            raise refusal(q, f"cannot be computed: {error}") from error
        name = q.input[0]
        if len(self.consumers[name]) > 1 or name in self.outputs:
            name = results[0]
        elif name in self.stated.producer:
            self._drop(self.stated.producer[name])
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
            raise refusal(node, f"cannot be computed: {error}") from error
        low, high = (encoding.along(end, codes.shape) for end in (encoding.grid.qmin, encoding.grid.qmax))
        if ((codes < low) | (codes > high)).any():
            raise refusal(node, f"holds values off the grid of {encoding.grid.bits} bits that the metadata states")
        self.parameters[node.input[0]].append(numpy_helper.from_array(values, name))
        self._bind(name, encoding, results, node)

    def _computed(self, q: NodeProto) -> None:
        """[Clip ->] Q [-> Clip] -> DQ of a graph input or a node's result."""
        source = self.alias.get(q.input[0], q.input[0])
        again = is_a(self.stated.producer.get(q.input[0]), "DequantizeLinear")
        readers = [q] if again else self.consumers[q.input[0]]
        plain, results, _ = self._behind(q, None)
        self._require_kept(q)
        if plain.block is not None:
            raise refusal(
                q, "has one scale for each block of a tensor that is computed; only parameters can have blocks"
            )
        found = [self._behind(node, None) for node in readers if is_a(node, "QuantizeLinear")]
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

    def _require_kept(self, q: NodeProto) -> None:
        """Raises FileFormatError for 4-bit codes in front of which onnxruntime's optimizers do not keep a bound.

        ReluQuantRewrite takes the Relu out whatever the zero point is; with a Clip, the model is not loaded at all.
        """
        before, stored = self.stated.producer.get(q.input[0]), self.stated.encoding(q, None, None)
        if before is None or before.op_type not in ("Relu", "Clip") or stored.grid.width > 4:
            return
        if before.op_type == "Clip" or (stored.zero_point != stored.grid.qmin).any():
            raise refusal(
                q, f"stores 4 bits behind a {before.op_type}, which onnxruntime's optimizers do not keep; store 8 bits"
            )

    def _merge(self, q: NodeProto, source: str, plain: Encoding, results: list[str]) -> None:
        """A tensor that only Qs of one encoding read becomes the quantized tensor itself."""
        name, clip = self._name(source, results), self.stated.producer.get(source)
        if self.exact is not None and clip is not None and clip.op_type == "Clip":
            unclipped = self._name(clip.input[0], results)
            exact = self._exact(unclipped, plain, q)
            if is_narrower(exact.grid, plain.grid) and self._clips_to(clip, exact):
                self._drop(clip)
                source, name, plain = clip.input[0], unclipped, exact
        encoding, node = self._exact(name, plain, q), self.stated.producer.get(source)
        if is_narrower(encoding.grid, plain.grid):
            read = [self.table.get(self.alias.get(one, one)) for one in node.input] if node is not None else []
            if node is None or not selects(node, read, encoding):
                raise refusal(q, f"has no Clip to the {encoding.grid.bits} bits that the metadata states for {name}")
        if source != name:
            self.renamed[source] = name
        self._bind(name, encoding, results, q)

    def _clips_to(self, clip: NodeProto, encoding: Encoding) -> bool:
        bounds = [value for name in clip.input[1:] if (value := self.stated.constant(name)) is not None]
        alone = len(self.consumers[clip.input[0]]) == 1
        return alone and len(bounds) == 2 and np.array_equal(bounds, ends(encoding))

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
        known = (self.stated.initializers, self.stated.producer, self.inputs, self.table)
        return results[0] if any(name in names for names in known) else name

    def _exact(self, name: str, plain: Encoding, node: NodeProto) -> Encoding:
        """The encoding with the grid and axis that our metadata state for the tensor, if they do."""
        if self.exact is None or name not in self.exact:
            return plain
        grid, axis = self.exact[name]
        if grid.width > plain.grid.width or grid.signed != plain.grid.signed:
            raise refusal(node, f"stores {plain.grid.width} bits, which cannot hold the {grid} of the metadata")
        if plain.block is not None:
            return on_grid(grid, plain, node)
        shape = () if axis is None and plain.scale.size == 1 else (-1,)
        try:
            return Encoding(plain.scale.reshape(shape), plain.zero_point.reshape(shape), grid, axis)
        except EncodingError as error:
            raise refusal(node, f"does not fit the metadata of {name}: {error}") from error

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
        plain, kind = self.stated.encoding(q, None, ndim), self.stated.kind(q, None)
        results, grids, pending = list[str](), set[IntGrid](), [(q, plain.grid)]
        for node, grid in pending:
            if is_a(node, "DequantizeLinear"):
                if self.stated.encoding(node, kind, ndim) != plain:
                    raise refusal(node, f"has another scale or zero point than {title(q)}")
                results.append(node.output[0])
                grids.add(grid)
                continue
            if node.op_type == "Clip":
                grid = self.stated.clip_grid(node, grid)
            elif node is not q and node.op_type != "Identity":
                raise refusal(node, f"reads the integers of {title(q)}; only DequantizeLinear can be read there")
            if node.output[0] in self.outputs:
                raise refusal(node, "gives integers as a graph output; only float outputs can be read")
            pending += [(reader, grid) for reader in self.consumers[node.output[0]]]
        if len(grids) > 1:
            raise refusal(q, "feeds DequantizeLinear nodes behind Clips to different grids")
        return on_grid(grids.pop() if grids else plain.grid, plain, q), results, [node for node, _ in pending]

    def _drop(self, *nodes: NodeProto) -> None:
        for node in nodes:
            self.instead.setdefault(id(node), [])

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
        replace(self.graph.node, kept)
        replace(self.graph.initializer, initializers)
        replace(self.graph.input, [value for value in self.graph.input if value.name in self.inputs])
        alive = {name for node in kept for name in node.output}
        replace(self.graph.value_info, [value for value in self.graph.value_info if value.name in alive])
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


def _parse_grids(text: str) -> dict[str, tuple[IntGrid, int | None]]:
    try:
        return exact_grids(parsed(text), f"metadata: {GRIDS}")
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"metadata: {GRIDS}: not JSON: {error}") from error
