"""Reading a float ONNX file: checked before anything is allocated, functions inlined, constants in one place."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, external_data_helper, helper, numpy_helper

from pow2quant import bounds
from pow2quant.errors import FileFormatError, UnsupportedModelError
from pow2quant.foreign import check_is_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

OLDEST = 7
"""The first opset whose broadcasting is today's."""

MOST_NODES = 200_000
"""Nodes of a network once its functions are inlined."""

QUANTIZED = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
DOMAINS = ("", "ai.onnx")


@dataclass
class OnnxFile:
    """One float network. nodes: in order of computation. constants: initializers and Constant nodes, by tensor name.

    inputs: (name, dimensions; None where the file leaves one open). model: the whole file, with its external data.
    """

    name: str
    model: ModelProto
    opset: int
    nodes: list[NodeProto]
    constants: dict[str, NDArray[Any]]
    inputs: list[tuple[str, tuple[int | None, ...]]]
    outputs: list[str]
    types: dict[str, int] = field(default_factory=dict)

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        """The nodes that read a tensor, once for each time they do."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for tensor in node.input:
                found.setdefault(tensor, []).append(node)
        return found

    @cached_property
    def producers(self) -> dict[str, NodeProto]:
        """The node that computes a tensor."""
        return {tensor: node for node in self.nodes for tensor in node.output if tensor}

    @property
    def batch(self) -> int | None:
        """The batch size that the file fixes; None where it is open."""
        sizes = {dims[0] for _, dims in self.inputs if dims}
        return sizes.pop() if len(sizes) == 1 else None

    def forget(self) -> None:
        """After nodes were replaced."""
        self.__dict__.pop("readers", None)
        self.__dict__.pop("producers", None)
        self.nodes = _needed(self.nodes, self.outputs)

    def error(self, node: NodeProto, why: str) -> UnsupportedModelError:
        """One line that names file, node and operation."""
        return UnsupportedModelError(f"{self.name}: {title(node)}: {why}")


def title(node: NodeProto) -> str:
    """How an error names a node."""
    name = node.name or next((o for o in node.output if o), "without a name")
    return f"node {name!r} ({node.op_type})"


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """A node's attribute as Python has it (text decoded), or the default."""
    for each in node.attribute:
        if each.name == name:
            value = helper.get_attribute_value(each)
            return [_text(v) for v in value] if isinstance(value, list) else _text(value)
    return default


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def load(source: str | Path | ModelProto) -> OnnxFile:
    """A float ONNX file, or a model in memory.

    Raises FileFormatError for a file that is missing, damaged or quantized already, UnsupportedModelError naming the
    node for control flow and for functions that call themselves.
    """
    name, model = ("the ONNX model", source) if isinstance(source, ModelProto) else _read(Path(source))
    opsets = [o.version for o in model.opset_import if o.domain in DOMAINS]
    opset = max(opsets, default=1)
    if opset < OLDEST:
        raise FileFormatError(f"{name}: is written in opset {opset}; the oldest that is read is {OLDEST}")
    _check_functions(model, name)
    try:
        bounds.check(model)
    except FileFormatError as error:
        raise FileFormatError(f"{name}: {error}") from None
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    for tensor in _tensors(model, name):
        _check_size(tensor, name)
    if graph.sparse_initializer:
        raise UnsupportedModelError(f"{name}: holds sparse initializers; write them as plain ones")
    constants = {tensor.name: array_of(tensor, name) for tensor in graph.initializer}
    inputs = [(v.name, _dimensions(v, name)) for v in graph.input if v.name not in constants]
    _check_batch(inputs, name)
    outputs = [v.name for v in graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in graph.input}
    file = OnnxFile(name, model, opset, [], constants, inputs, outputs, types)
    file.nodes = ordered(file, copy.deepcopy(list(graph.node)))
    return file


def _read(path: Path) -> tuple[str, ModelProto]:
    name = str(path)
    check_is_file(path)
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's errors share no base
        raise FileFormatError(f"{name}: not an ONNX file ({type(error).__name__})") from error
    if not model.graph.node:
        raise FileFormatError(f"{name}: not an ONNX file, or one without nodes")
    for tensor in _tensors(model, name):
        if external_data_helper.uses_external_data(tensor):
            _load_external(tensor, path)
    return name, model


def _tensors(model: ModelProto, name: str) -> list[TensorProto]:
    """Initializers and constants, those of branches too."""
    try:
        graphs = list(bounds.graphs(model.graph))
    except FileFormatError as error:
        raise FileFormatError(f"{name}: {error}") from None
    nodes = [n for graph in graphs for n in graph.node]
    inside = [a.t for n in nodes for a in n.attribute if a.type == a.TENSOR]
    return [*(t for graph in graphs for t in graph.initializer), *inside]


def _load_external(tensor: TensorProto, path: Path) -> None:
    """Reads a tensor's bytes from a file beside the model's, and from nowhere else."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    where = f"{path}: tensor {tensor.name!r}"
    folder = path.resolve().parent
    file = (folder / info.get("location", "")).resolve()
    if not file.is_relative_to(folder) or not file.is_file():
        raise FileFormatError(f"{where}: its external data {info.get('location')!r} are not a file in {folder}")
    wanted = _bytes(tensor, where)
    try:
        offset, length = int(info.get("offset", 0)), int(info.get("length", wanted))
    except ValueError as error:
        raise FileFormatError(f"{where}: offset and length of its external data must be numbers") from error
    if offset < 0 or length != wanted or offset + length > file.stat().st_size:
        raise FileFormatError(f"{where}: its external data do not hold the {wanted} bytes of its shape")
    with file.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(wanted)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _bytes(tensor: TensorProto, where: str) -> int:
    """How many bytes a tensor's shape and type mean."""
    if any(d < 0 for d in tensor.dims):
        raise FileFormatError(f"{where}: has a negative dimension")
    try:
        size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError) as error:
        raise FileFormatError(f"{where}: has the unknown data type {tensor.data_type}") from error
    count = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return int(count + 1) // 2
    return int(count * size)


def _check_size(tensor: TensorProto, name: str) -> None:
    """A tensor's shape must be the one of its data, before an array of that shape is made."""
    where = f"{name}: tensor {tensor.name!r}"
    wanted = _bytes(tensor, where)
    if external_data_helper.uses_external_data(tensor):
        raise FileFormatError(f"{where}: its external data were not loaded")
    stored = tensor.float_data or tensor.int32_data or tensor.int64_data or tensor.double_data or tensor.uint64_data
    given = len(stored) if stored else len(tensor.string_data)
    fits = len(tensor.raw_data) == wanted if tensor.raw_data else given == math.prod(tensor.dims)
    if not fits and tensor.data_type not in (TensorProto.INT4, TensorProto.UINT4):
        raise FileFormatError(f"{where}: its shape {tuple(tensor.dims)} does not fit the data that it holds")


def array_of(tensor: TensorProto, name: str) -> NDArray[Any]:
    """A tensor as an array; floats of any width become float32."""
    try:
        array = numpy_helper.to_array(tensor)
    except Exception as error:
        raise FileFormatError(f"{name}: tensor {tensor.name!r} cannot be read: {error}") from error
    return plain_floats(array)


def plain_floats(array: NDArray[Any]) -> NDArray[Any]:
    """float16, bfloat16 and float64 as float32; anything else as it is."""
    is_float = array.dtype.kind == "f" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    return array.astype(np.float32) if is_float and array.dtype != np.float32 else array


def _dimensions(value: onnx.ValueInfoProto, name: str) -> tuple[int | None, ...]:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise UnsupportedModelError(f"{name}: input {value.name!r} is a {kind or 'thing without a type'}, not a tensor")
    if not value.type.tensor_type.HasField("shape"):
        raise UnsupportedModelError(f"{name}: input {value.name!r} has no shape; add one (its dimensions may be open)")
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.WhichOneof("value") == "dim_value" and d.dim_value > 0 else None for d in dims)


def _check_batch(inputs: list[tuple[str, tuple[int | None, ...]]], name: str) -> None:
    """The first dimension of every input is the batch: one size, or open."""
    sizes = {tensor: dims[0] for tensor, dims in inputs if dims}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{tensor!r}: {'open' if size is None else size}" for tensor, size in sizes.items())
        raise UnsupportedModelError(
            f"{name}: inputs differ in their first dimension ({found}); it must be the batch, the same in every input"
        )


def _check_functions(model: ModelProto, name: str) -> None:
    """No function calls itself, by whatever way, and all of them inlined have a bounded number of nodes."""
    bodies = {(f.domain, f.name): list(f.node) for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    pending: set[tuple[str, str]] = set()

    def size(nodes: list[NodeProto]) -> int:
        return sum(of(n) for n in nodes)

    def of(node: NodeProto) -> int:
        key = (node.domain, node.op_type)
        if key not in bodies:
            return 1
        if key in pending or len(pending) > 100:
            raise UnsupportedModelError(f"{name}: {title(node)}: the function calls itself, or is nested too deeply")
        if key not in sizes:
            pending.add(key)
            sizes[key] = size(bodies[key])
            pending.discard(key)
        return sizes[key]

    if size(list(model.graph.node)) > MOST_NODES:
        raise UnsupportedModelError(f"{name}: has more than {MOST_NODES:,} nodes")


def ordered(file: OnnxFile, nodes: list[NodeProto]) -> list[NodeProto]:
    """The nodes that the outputs need, in order of computation, without the Constant nodes (they become constants).

    An If reads its condition and, as further operands here, what its branches read around them.
    """
    kept = []
    for node in nodes:
        _check_node(file, node)
        if node.op_type == "If":
            node.input[1:] = sorted({t for graph in bounds.inner_graphs(node) for t in _around(graph)})
        if node.op_type == "Constant" and node.domain in DOMAINS:
            file.constants[node.output[0]] = _constant(file, node)
        else:
            kept.append(node)
    known = {*file.constants, *(name for name, _ in file.inputs), ""}
    twice = [t for t, n in Counter(o for node in kept for o in node.output if o).items() if n > 1]
    if twice:
        raise FileFormatError(f"{file.name}: tensor {twice[0]!r} is computed by two nodes")
    ordered: list[NodeProto] = []
    while kept:
        ready = [n for n in kept if all(t in known for t in n.input)]
        if not ready:
            missing = next(t for t in kept[0].input if t not in known)
            raise file.error(
                kept[0], f"reads {missing!r}, which nothing computes before (a cycle, or a missing tensor)"
            )
        if len(ready) == len(kept):
            ordered += ready
            break
        done: list[NodeProto] = []
        for node in kept:  # a sorted file takes one pass
            if all(t in known for t in node.input):
                known.update(node.output)
                done.append(node)
        taken = {id(n) for n in done}
        ordered, kept = ordered + done, [n for n in kept if id(n) not in taken]
    return _needed(ordered, file.outputs)


def _around(graph: onnx.GraphProto) -> set[str]:
    """What a branch reads and does not make."""
    read = {t for node in graph.node for t in node.input if t} | {v.name for v in graph.output}
    read |= {t for node in graph.node for inner in bounds.inner_graphs(node) for t in _around(inner)}
    return read - {t.name for t in graph.initializer} - {t for node in graph.node for t in node.output}


def _needed(nodes: list[NodeProto], outputs: list[str]) -> list[NodeProto]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(o for o in node.output if o):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _check_node(file: OnnxFile, node: NodeProto) -> None:
    is_if = node.op_type == "If" and node.domain in DOMAINS
    if not is_if and any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
        raise file.error(node, "control flow cannot be quantized; export the network without it")
    if node.op_type in QUANTIZED:
        raise FileFormatError(
            f"{file.name}: {title(node)}: is quantized already; give the float file (or see validate and export)"
        )


def _constant(file: OnnxFile, node: NodeProto) -> NDArray[Any]:
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for name, kind in kinds.items():
        value = attribute(node, name)
        if value is not None:
            return np.array(value, kind)
    tensor = attribute(node, "value")
    if not isinstance(tensor, TensorProto):
        raise file.error(node, "a constant of text or of sparse values")
    return array_of(tensor, file.name)
