"""A batch size that is written into an ONNX file, made free: what holds for one size then holds for all.

Exporters write the size of their example into the inputs' shapes and into constants: into the shape that a Reshape
asks for, or into a bias with one equal row per sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from pow2quant.errors import ConfigError, UnsupportedModelError
from pow2quant.graphs import GraphIndex

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Table

Shapes = dict[str, tuple[int | None, ...]]

BATCH = "batch"
"""The name of the free dimension."""

BROADCAST = ("Add", "Div", "Gemm", "Max", "Min", "Mul", "Sub", "Where")
"""Operations that read a constant beside a tensor of samples, and repeat a constant of one row for all of them."""

ELSEWHERE = 3
"""Another batch size, at which the shapes of the freed model are compared with those of the given one."""


def fixed_batch(model: ModelProto) -> int | None:
    """The size of the first dimension of the inputs where it is fixed, and the same in all that fix it."""
    sizes = {dims[0].dim_value for dims in _input_dims(model.graph) if dims[0].HasField("dim_value")}
    return sizes.pop() if len(sizes) == 1 else None


def fix_batch(model: ModelProto, size: int) -> None:
    """Writes a batch size into the inputs and outputs, in place.

    Raises ConfigError for a size below 1; UnsupportedModelError, naming the input, where the file has another one.
    """
    if size < 1:
        raise ConfigError(f"batch: {size} is not legal; legal: 1 and more")
    parameters = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in parameters or not dims:
            continue
        if dims[0].dim_value not in (0, size):
            raise UnsupportedModelError(f"{value.name}: the file is for batches of {dims[0].dim_value}, not of {size}")
        dims[0].dim_value = size
    del model.graph.value_info[:]
    shapes = _inferred(model, None)
    for value in model.graph.output:
        dims = value.type.tensor_type.shape.dim
        for dim, length in zip(dims, shapes[value.name] if dims else (), strict=True):
            if length is not None:
                dim.dim_value = length


def free_batch(model: ModelProto, table: Table) -> None:
    """Makes a fixed batch size free, in place; the model stays as it is where a result depends on the size.

    That is so where samples read different rows of a constant, or where the batch is not the first dimension.
    table: the encodings of a float model.
    """
    size = fixed_batch(model)
    if not size:
        return
    freed = _Freed(model, size, table)
    if freed.rewrite() and freed.is_same_elsewhere():
        model.CopyFrom(freed.model)


class _Freed:
    """A copy of a model whose batch size becomes free, and the shapes of the original."""

    def __init__(self, model: ModelProto, size: int, table: Table) -> None:
        self.size, self.table = size, table
        self.shapes = _inferred(model, None)
        self.model = ModelProto()
        self.model.CopyFrom(model)
        self.index = GraphIndex(self.model.graph)
        self.samples = {value.name for value in model.graph.input} - self.index.parameters.keys()
        for node in model.graph.node:
            if node.op_type != "Shape" and self.samples.intersection(node.input):
                self.samples.update(node.output)

    def rewrite(self) -> bool:
        """Whether every place that holds the batch size could be rewritten."""
        graph = self.model.graph
        if not all(self._node(node) for node in list(graph.node) if self.samples.intersection(node.input)):
            return False
        for dims in (*_input_dims(graph), *(v.type.tensor_type.shape.dim for v in graph.output)):
            if dims and dims[0].dim_value and dims[0].dim_value % self.size == 0:
                dims[0].Clear()
                dims[0].dim_param = BATCH
        del graph.value_info[:]
        return True

    def is_same_elsewhere(self) -> bool:
        """Whether at another batch size the first dimensions follow it, and no other one does."""
        try:
            found = _inferred(self.model, ELSEWHERE)
        except onnx.shape_inference.InferenceError:
            return False
        for name in self.samples:
            before, after = self.shapes.get(name), found.get(name)
            if before is None or after is None or None in before or None in after:
                continue
            if [n * ELSEWHERE for n in before[:1] if n] != [n * self.size for n in after[:1] if n]:
                return False
            if before[1:] != after[1:]:
                return False
        return True

    def _node(self, node: NodeProto) -> bool:
        if node.op_type == "Reshape":
            return self._reshape(node)
        if node.op_type == "Expand":
            return self._expand(node)
        if node.op_type in BROADCAST:
            rank = len(self.shapes.get(node.output[0], ()))
            return all(self._constant(node, i, rank) for i, name in enumerate(node.input) if name)
        return True

    def _reshape(self, node: NodeProto) -> bool:
        asked, shape = self.index.constants.get(node.input[1]), self.shapes.get(node.output[0])
        if asked is None or asked.ndim != 1 or not asked.size or asked[0] in (0, -1):
            return True
        if not shape or None in shape or (shape[0] or 0) % self.size:
            return False
        node.input[1] = self._add(f"{node.output[0]}/shape", np.array([-1, *shape[1:]], np.int64))
        return True

    def _expand(self, node: NodeProto) -> bool:
        asked, shape = self.index.constants.get(node.input[1]), self.shapes.get(node.input[0])
        if asked is None or shape is None or len(asked) < len(shape) or asked[0] != self.size:
            return True
        if len(asked) > len(shape) or (shape[0] == 1 and self.size > 1):
            return False
        node.input[1] = self._add(f"{node.output[0]}/shape", np.array([1, *asked[1:]], np.int64))
        return True

    def _constant(self, node: NodeProto, place: int, rank: int) -> bool:
        """One row of a constant with equal rows for all samples."""
        name = node.input[place]
        values = self.index.constants.get(name)
        if values is None or not rank or values.ndim != rank or values.shape[0] == 1:
            return True
        if node.op_type == "Gemm" and place < 2:
            return True
        if values.shape[0] != self.size or (values != values[:1]).any() or name not in self.index.parameters:
            return False
        if len(self.index.readers[name]) > 1 or (name in self.table and self.table[name].axis == 0):
            return False
        self.index.parameters[name].CopyFrom(numpy_helper.from_array(values[:1].copy(), name))
        return True

    def _add(self, name: str, values: NDArray[np.int64]) -> str:
        taken = {t.name for t in self.model.graph.initializer} | self.index.producers.keys()
        while name in taken:
            name += "_"
        self.model.graph.initializer.append(numpy_helper.from_array(values, name))
        return name


def _inferred(model: ModelProto, batch: int | None) -> Shapes:
    """Every shape, at another batch size than the model's where one is given. Raises InferenceError."""
    copy = ModelProto()
    copy.CopyFrom(model)
    if batch is not None:
        for dims in _input_dims(copy.graph):
            dims[0].Clear()
            dims[0].dim_value = batch
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    del copy.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(copy, strict_mode=batch is not None, data_prop=True)
    return GraphIndex(inferred.graph).shapes


def _input_dims(graph: onnx.GraphProto) -> list[Any]:
    """The dimensions of every input, a batch in front."""
    parameters = {tensor.name for tensor in graph.initializer}
    shapes = [v.type.tensor_type.shape.dim for v in graph.input if v.name not in parameters]
    return [dims for dims in shapes if dims]
