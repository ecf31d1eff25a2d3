"""A program under construction: what is known of an artifact's graph, and what has integers so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from pow2quant import targets
from pow2quant.artifact import takes_pixels
from pow2quant.errors import EncodingError, NotPowerOfTwoError, UnsupportedModelError
from pow2quant.functions import accepts, region
from pow2quant.graphs import GraphIndex
from pow2quant.integer.batch import Found, Place, places
from pow2quant.integer.nodes import COMPARISONS, title
from pow2quant.integer.program import Requantization, Step, Tensor
from pow2quant.operators import Values, values
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN, saturate
from pow2quant.targets import DEFAULT, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.integer.program import Ints


INDICES = (onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
"""The types of inputs whose codes are their values: integers, such as rows of a constant, and truth values."""

LARGEST_INDEX = 31
"""Bits of inputs of integers that may have any value."""


@dataclass
class Lowering:
    """A program under construction, and what is known of the graph it comes from.

    shapes: of every ONNX tensor, with a batch of one. places: where the batch lies. rows: the tensors whose first
    dimension is not just the batch; of these a program holds what the graph has for a batch of one. producers: the node
    that computes a tensor, by the tensor's name. pixels: see `Program`. lower: adds the steps of a node whose encoded
    result has this name. target: whose arithmetic it is. rounding: how the operation rounds that is being lowered.
    """

    encodings: dict[str, Encoding]
    floats: dict[str, NDArray[Any]]
    shapes: dict[str, tuple[int, ...]]
    producers: dict[str, onnx.NodeProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    places: dict[str, Found]
    index: GraphIndex
    pixels: bool = False
    lower: Callable[[onnx.NodeProto, str], None] = field(default=lambda node, output: None)
    target: Target = DEFAULT
    rounding: str = HALF_EVEN
    rows: set[str] = field(default_factory=set)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def of(cls, artifact: Artifact) -> Lowering:
        """Reads an artifact's graph; its inputs become tensors."""
        model = with_batch(artifact.model, 1)
        index = GraphIndex(model.graph)
        floats = index.constants
        shapes = {name: value.shape for name, value in floats.items()} | shapes_of(model)
        inputs = tuple(v.name for v in model.graph.input if v.name not in floats)
        graph = cls(
            encodings=dict(artifact.encodings),
            floats=floats,
            shapes=shapes,
            producers=index.producers,
            inputs=inputs,
            outputs=tuple(v.name for v in model.graph.output),
            places=places(
                dict.fromkeys(inputs, Place(0)),
                model.graph.node,
                floats,
                shapes,
                shapes_of(with_batch(artifact.model, 2)),
            ),
            index=index,
            pixels=takes_pixels(artifact.model),
            target=targets.of(artifact.model),
        )
        indices = [v for v in model.graph.input if v.type.tensor_type.elem_type in INDICES and v.name not in floats]
        graph.encodings |= {v.name: _of_indices(index, graph.encodings, v.name) for v in indices}
        for name in inputs:
            graph.declare(name)
        return graph

    # Tensors

    def declare(self, name: str, shape: tuple[int, ...] | None = None, encoding: Encoding | None = None) -> Tensor:
        """Adds a tensor that is computed, or given as input. shape: of one sample, by default the ONNX tensor's.

        Raises UnsupportedModelError where it has no integers or where samples are mixed.
        """
        encoding = encoding or self.encodings.get(name)
        if encoding is None:
            raise UnsupportedModelError(f"{name}: stays float and has no integers; give it an encoding")
        if encoding.axis is not None and encoding.scale.size > 1:
            raise UnsupportedModelError(f"{name}: has one scale per channel; integers need one for the tensor")
        if encoding.axis is not None:
            scale, zero = encoding.scale.reshape(()), encoding.zero_point.reshape(())
            encoding = Encoding(scale, zero, encoding.grid)
        require_power_of_two(name, encoding)
        if shape is None:
            full, place = self.shape(name), self.places.get(name)
            if not isinstance(place, Place):
                raise UnsupportedModelError(place or f"{name}: does not depend on the inputs (shape {full})")
            if place != Place(0) or full[0] != 1:
                self.rows.add(name)
            shape = full if name in self.rows else full[1:]
        self.tensors[name] = Tensor(name, shape, encoding)
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """An ONNX tensor's shape with a batch of one. Raises UnsupportedModelError where it is not known."""
        if name not in self.shapes or not all(self.shapes[name]):
            raise UnsupportedModelError(f"{name}: its shape depends on more than the batch size")
        return self.shapes[name]

    def read(self, name: str, rows: bool = False) -> Tensor:
        """An activation that a step reads; rows: of rows as well. Raises UnsupportedModelError where it stays float."""
        if name not in self.tensors:
            raise UnsupportedModelError(f"{name}: stays float and has no integers; give it an encoding")
        if name in self.rows and not rows:
            raise UnsupportedModelError(f"{name}: its first dimension is not the batch, or not the batch alone")
        return self.tensors[name]

    def operand(self, name: str, rows: bool = False) -> Tensor:
        """An activation, or an encoded constant whose first dimension, where it has as many as a batch, is dropped."""
        if name not in self.floats:
            return self.read(name, rows)
        if name not in self.tensors:
            encoding = self.encodings.get(name)
            if encoding is None:
                raise UnsupportedModelError(f"{name}: a constant without encoding has no integers")
            tensor = self.declare(name, self.floats[name].shape, encoding)
            self.tensors[name] = replace(tensor, constant=codes(name, self.floats[name], tensor.encoding))
        return self.tensors[name]

    def parameter(self, name: str) -> tuple[Ints, Encoding]:
        """A weight's or bias's integers, their zero point taken off, and its encoding.

        Those of a weight with blocks are in units of each channel's smallest scale: partial sums of the blocks, shifted
        to these units and added, are the same sum.

        Raises UnsupportedModelError for one without encoding, or that is computed; EncodingError for one off its grid.
        """
        if name not in self.floats:
            raise UnsupportedModelError(f"{name}: is computed; only constant weights can be lowered")
        if name not in self.encodings:
            raise UnsupportedModelError(f"{name}: stays float and has no integers; give it an encoding")
        values, encoding = self.floats[name], self.encodings[name]
        require_power_of_two(name, encoding)
        found = codes(name, values, encoding)
        if encoding.block is not None:
            encoding = encoding.per_channel
            found = codes(name, values, encoding)
        return found - encoding.along(encoding.zero_point, values.shape), encoding

    def bias(self, node: onnx.NodeProto, exponent: Ints, channels: int) -> Ints:
        """A node's third input (C,) in units of 2^exponent; zeros where it has none.

        Raises UnsupportedModelError for a float bias and for one in other units, for which hardware has no shift, and
        for one that differs from row to row (Gemm): what a sample gives then depends on its place in the batch.
        """
        name = node.input[2] if len(node.input) > 2 else ""
        if not name:
            return np.zeros(channels, np.int64)
        values, encoding = self.parameter(name)
        units = np.broadcast_to(exponent, channels)
        table = np.broadcast_to(values, (len(values) if values.ndim > 1 else 1, channels))
        exponents = np.broadcast_to(encoding.along(encoding.exponent, values.shape), table.shape)
        if (table != table[0]).any() or (exponents != exponents[0]).any():
            raise UnsupportedModelError(f"{name}: a bias that differs from row to row (shape {values.shape})")
        if (exponents[0] != units).any():
            channel = int(np.flatnonzero(exponents[0] != units)[0])
            found = int(exponents[0][channel])
            raise UnsupportedModelError(
                f"{name}: channel {channel} counts in units of 2^{found}, not of s_in * s_w = 2^{units[channel]}"
            )
        return np.array(table[0])

    def defined_inputs(self, node: onnx.NodeProto) -> list[Tensor]:
        """What a function with an integer definition reads. Raises UnsupportedModelError where it has no integers."""
        _, sources = region(self.index, self.encodings, node)
        if not sources or not all(accepts(self.encodings[name]) for name in sources):
            raise UnsupportedModelError(f"{title(node)}: its definition is of inputs with a single scale of 2^k")
        return [self.read(name, rows=True) for name in sources]

    def requantization(
        self, exponent: int | Ints, target: Tensor, low: float = -math.inf, high: float = math.inf
    ) -> Requantization:
        """From an accumulator in units of 2^exponent, () or (C,), to a tensor's codes, real values clipped first.

        Rounding is monotonic: clipping before it is clipping to the rounded ends after it.
        """
        ends = []
        for real, code in ((low, target.low), (high, target.high)):
            if math.isfinite(real):
                scaled = math.ldexp(real, -target.exponent)
                code = int(saturate(round(scaled) + target.zero, target.low, target.high))
            ends.append(code)
        shift = np.asarray(target.exponent - exponent, np.int64)
        if shift.ndim and (shift == shift[0]).all():
            shift = shift[0]
        return Requantization(shift, target.zero, ends[0], ends[1], self.rounding)


def codes(name: str, values: NDArray[Any], encoding: Encoding) -> Ints:
    """The codes of a parameter. Raises EncodingError, naming it, where a value does not lie on the grid."""
    found = encoding.quantize(values, name)
    if not np.array_equal(encoding.dequantize(found), values):
        raise EncodingError(f"{name}: {int((encoding.dequantize(found) != values).sum())} values are off its grid")
    return found


def require_power_of_two(name: str, encoding: Encoding) -> None:
    """Raises NotPowerOfTwoError, naming the tensor."""
    if not encoding.is_power_of_two:
        free = np.atleast_1d(encoding.scale)[np.atleast_1d(np.frexp(encoding.scale)[0]) != 0.5][0]
        raise NotPowerOfTwoError(f"{name}: scale {float(free):.9g} is not a power of two, so it is no shift")


def _of_indices(index: GraphIndex, encodings: dict[str, Encoding], name: str) -> Encoding:
    """The encoding of an input of integers: its values are codes, in the narrowest type that is enough.

    That is a type for every row that they choose; or else one that holds what they are compared with, or become as
    real numbers, and one more at either end: what lies beyond gives the same result. Of what is computed with
    otherwise, every value counts.
    """
    rows, ends, pending = [], [0], [name]
    while pending:
        for reader in index.readers.get(pending.pop(), []):
            constants = [index.constants[n] for n in reader.input if n in index.constants]
            if reader.op_type == "Gather" and reader.input[0] in index.constants:
                rows.append(len(constants[0]))
            elif (encoding := encodings.get(reader.output[0])) is not None:
                grid = encoding.dequantize(np.array([encoding.grid.qmin, encoding.grid.qmax]))
                ends += [math.floor(grid.min()), math.ceil(grid.max())]
            elif reader.op_type == "Cast" or values(reader.op_type) is Values.MOVED:
                pending += reader.output
            elif reader.op_type in COMPARISONS:
                ends += [int(end) for constant in constants for end in (constant.min(), constant.max())]
            else:
                ends.append(1 << LARGEST_INDEX - 1)
    needed = (max(rows) - 1).bit_length() if rows else max((abs(end) + 1).bit_length() for end in ends) + 1
    bits = next((b for b in (8, 16) if needed <= b), LARGEST_INDEX)
    return Encoding(np.ones((), np.float32), np.zeros((), np.int64), IntGrid(bits, signed=not rows))


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shapes that a model states, 0 for a free dimension."""
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def with_batch(model: onnx.ModelProto, size: int) -> onnx.ModelProto:
    """A copy with every shape known. The batch of the inputs, their first dimension, becomes `size`.

    Raises UnsupportedModelError where the batch size is fixed.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    parameters = {tensor.name for tensor in copy.graph.initializer}
    for value in copy.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in parameters and dims:
            if (fixed := dims[0].dim_value) > 1:
                raise UnsupportedModelError(
                    f"{value.name}: only batches of {fixed}, in which a result depends on a sample's place or the size"
                )
            dims[0].dim_value = size
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    del copy.graph.value_info[:]
    found = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    return onnx.shape_inference.infer_shapes(copy, data_prop=True) if _joined(copy, found, size) else found


def _joined(model: onnx.ModelProto, found: onnx.ModelProto, size: int) -> bool:
    """Repeats constants of one sample, for every sample of a batch, where a Concat joins them with what is computed.

    Such a file runs with a batch of one only. found: the model with the shapes that are known. Returns whether there
    were any.
    """
    known = shapes_of(found)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    lone = [n for n in model.graph.node if n.op_type == "Concat" and not all(known.get(n.output[0], (0,)))]
    single = {name for node in lone for name in node.input if name in constants and constants[name].dims[:1] == [1]}
    for name in single if size > 1 else ():
        repeated = np.repeat(numpy_helper.to_array(constants[name]), size, 0)
        constants[name].CopyFrom(numpy_helper.from_array(repeated, name))
    return bool(single) and size > 1
