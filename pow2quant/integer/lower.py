"""From the waist to integers: `lower` turns an artifact into a program.

A node's result that has no encoding is not rounded, so it belongs to the next result that has one: convolution, ReLU
and clip become one step, and so does every function of a single tensor, however many nodes it takes, as a table.
Whatever else stays float has no integers, and is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from pow2quant.errors import EncodingError, NotPowerOfTwoError, UnsupportedModelError
from pow2quant.functions import accepts, definition, inside_definitions, region
from pow2quant.graphs import GraphIndex
from pow2quant.integer.nodes import attribute, title
from pow2quant.integer.ops import LOWER, LOWER_DEFINED
from pow2quant.integer.ops.average import Average
from pow2quant.integer.ops.copy import Copy
from pow2quant.integer.ops.table import SHAPED_LIKE_INPUT, lower_function
from pow2quant.integer.program import Program, Requantization, Step, Tensor
from pow2quant.operators import MOVES, values
from pow2quant.pow2_constraints import Encoding
from pow2quant.pow2_constraints.arithmetic import saturate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.integer.program import Ints

INT64_HALF = 2**62
"""Sums stay within this, so that rounding and a zero point fit int64 too."""


def lower(artifact: Artifact) -> Program:
    """The artifact in integers.

    Raises UnsupportedModelError for a tensor that stays float or an operation without integers, NotPowerOfTwoError for
    a free scale, EncodingError for a parameter off its grid; each names the tensor or node.
    """
    graph = Lowering.of(artifact)
    inner = inside_definitions(graph.index, graph.encodings)
    for node in artifact.model.graph.node:
        if node.output[0] not in inner:
            graph.add(node)
    return graph.program()


@dataclass
class Lowering:
    """A program under construction, and what is known of the graph it comes from.

    shapes: of every ONNX tensor, with a batch of one. doubled: the same with a batch of two. rows: the tensors whose
    first dimension is not the batch but several rows of each sample, as (N, T, C) is seen by a Gemm. producers: the
    node that computes a tensor, by the tensor's name.
    """

    encodings: dict[str, Encoding]
    floats: dict[str, NDArray[Any]]
    shapes: dict[str, tuple[int, ...]]
    producers: dict[str, onnx.NodeProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    doubled: Callable[[], dict[str, tuple[int, ...]]]
    index: GraphIndex
    rows: set[str] = field(default_factory=set)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def of(cls, artifact: Artifact) -> Lowering:
        """Reads an artifact's graph; its inputs become tensors."""
        model = _with_batch(artifact.model, 1)
        floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                floats[node.output[0]] = numpy_helper.to_array(attribute(node, "value", None))
        shapes = {name: value.shape for name, value in floats.items()} | _shapes(model)
        inputs = tuple(v.name for v in model.graph.input if v.name not in floats)
        graph = cls(
            encodings=dict(artifact.encodings),
            floats=floats,
            shapes=shapes,
            producers={name: node for node in model.graph.node for name in node.output},
            inputs=inputs,
            outputs=tuple(v.name for v in model.graph.output),
            doubled=cache(lambda: _shapes(_with_batch(artifact.model, 2))),
            index=GraphIndex(model.graph),
        )
        for name in inputs:
            graph.declare(name)
        return graph

    def program(self) -> Program:
        """What has been built. Raises UnsupportedModelError for an output that stays float, or sums beyond 64 bits."""
        for name in self.outputs:
            if name not in self.tensors:
                raise UnsupportedModelError(f"{name}: the network's output stays float and has no integers")
            self.read(name)
        read = {*self.inputs, *self.outputs, *(name for step in self.steps for name in (*step.inputs, step.output))}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in read}
        program = Program(tensors, self.inputs, self.outputs, tuple(self.steps))
        for step in self.steps:
            _require_64_bits(program, step)
        return program

    # Tensors

    def declare(self, name: str, shape: tuple[int, ...] | None = None, encoding: Encoding | None = None) -> Tensor:
        """Adds a tensor that is computed, or given as input. shape: of one sample, by default the ONNX tensor's.

        Raises UnsupportedModelError where it has no integers or where the batch is not its first dimension.
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
            full = self.shape(name)
            if full and full[0] != 1 and self.doubled().get(name) == (2 * full[0], *full[1:]):
                self.rows.add(name)
            elif not full or full[0] != 1:
                raise UnsupportedModelError(f"{name}: its first dimension is not the batch (shape {full})")
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
            raise UnsupportedModelError(f"{name}: its first dimension is the batch times something else")
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

        Raises UnsupportedModelError for one without encoding, or that is computed; EncodingError for one off its grid.
        """
        if name not in self.floats:
            raise UnsupportedModelError(f"{name}: is computed; only constant weights can be lowered")
        if name not in self.encodings:
            raise UnsupportedModelError(f"{name}: stays float and has no integers; give it an encoding")
        values, encoding = self.floats[name], self.encodings[name]
        require_power_of_two(name, encoding)
        zero = encoding.along(encoding.zero_point, values.ndim)
        return codes(name, values, encoding) - zero, encoding

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
        exponents = np.broadcast_to(encoding.along(encoding.exponent, values.ndim), table.shape)
        if (table != table[0]).any() or (exponents != exponents[0]).any():
            raise UnsupportedModelError(f"{name}: a bias that differs from row to row (shape {values.shape})")
        if (exponents[0] != units).any():
            channel = int(np.flatnonzero(exponents[0] != units)[0])
            found = int(exponents[0][channel])
            raise UnsupportedModelError(
                f"{name}: channel {channel} counts in units of 2^{found}, not of s_in * s_w = 2^{units[channel]}"
            )
        return np.array(table[0])

    # Steps

    def add(self, node: onnx.NodeProto) -> None:
        """Lowers what ends at a node; a node whose result is not rounded waits for the next one."""
        if node.op_type == "Constant":
            return
        for name in node.output:
            source = node.input[0] if node.input else ""
            if name not in self.encodings and source in self.tensors and values(node.op_type) in MOVES:
                self.encodings[name] = self.encodings[source]
        if not any(name in self.encodings for name in node.output):
            return
        defined = definition(node)
        if defined is not None:
            LOWER_DEFINED[type(defined)](self, node, defined)
            return
        core, low, high = self._peeled(node)
        output = node.output[0]
        if core is None:
            source = self.read(self._behind_clips(node), rows=True)
            target = self.declare(output)
            requantization = self.requantization(np.array(source.exponent), target, low, high)
            self.steps.append(Copy.whole(node.name or output, source, target, requantization))
        elif self._is_function(core):
            lower_function(self, node, core, low, high)
        elif self._reads_float(core):
            raise UnsupportedModelError(f"{core.name}: is computed in float, in several steps, and has no integers")
        elif core.op_type in LOWER:
            LOWER[core.op_type](self, core, output, low, high)
        else:
            raise UnsupportedModelError(f"{title(core)}: has no integers; `pow2quant list --operators` says which have")

    def defined_input(self, node: onnx.NodeProto) -> Tensor:
        """What a function with an integer definition reads. Raises UnsupportedModelError where it has no integers."""
        _, source = region(self.index, self.encodings, node)
        if not source or not accepts(self.encodings[source]):
            raise UnsupportedModelError(f"{title(node)}: its definition is of one input with a single scale of 2^k")
        return self.read(source, rows=True)

    def _reads_float(self, node: onnx.NodeProto) -> bool:
        """Whether a node reads what another node of the same module computes and does not round."""
        data = node.input[:1] if node.op_type in ("Expand", "Reshape") else node.input
        return any(n.startswith(f"{node.name}.") and n not in self.floats and n not in self.tensors for n in data)

    def _peeled(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto | None, float, float]:
        """The node behind fused ReLUs and clips (None: there is an encoded tensor), and the real ends of these."""
        low, high = -math.inf, math.inf
        current: onnx.NodeProto | None = node
        while current is not None and current.op_type in ("Relu", "Clip"):
            ends = self._ends(current)
            # the inner clip comes first, so the outer one's ends hold where they are narrower or beyond it
            low, high = min(max(ends[0], low), high), max(min(ends[1], high), low)
            source = current.input[0]
            current = None if source in self.encodings else self.producers.get(source)
        return current, low, high

    def _behind_clips(self, node: onnx.NodeProto) -> str:
        while node.input[0] not in self.encodings:
            node = self.producers[node.input[0]]
        return str(node.input[0])

    def _ends(self, node: onnx.NodeProto) -> tuple[float, float]:
        if node.op_type == "Relu":
            return 0.0, math.inf
        names = (*node.input[1:], "", "")[:2]
        if any(name and name not in self.floats for name in names):
            raise UnsupportedModelError(f"{title(node)}: its ends are computed, not constant")
        return (
            float(self.floats[names[0]]) if names[0] else -math.inf,
            float(self.floats[names[1]]) if names[1] else math.inf,
        )

    def _is_function(self, core: onnx.NodeProto) -> bool:
        """Whether a node is a function of a single encoded tensor, element by element.

        Where both operands of a sum or product have encodings, it is computed instead.
        """
        if core.op_type in LOWER and all(name in self.encodings for name in core.input):
            return False
        return core.op_type in SHAPED_LIKE_INPUT and len(self.sources(core)) == 1

    def sources(self, node: onnx.NodeProto) -> set[str]:
        """The encoded tensors that a function reads, through nodes whose results are not rounded.

        Empty where something between is no function, element by element.
        """
        found: set[str] = set()
        for name in filter(None, node.input):
            if name in self.tensors and self.tensors[name].constant is None:
                found.add(name)
            elif name not in self.floats:
                inner = self.producers.get(name)
                behind = self.sources(inner) if inner is not None and inner.op_type in SHAPED_LIKE_INPUT else set()
                if not behind:
                    return set()
                found |= behind
        return found

    def requantization(
        self, exponent: Ints, target: Tensor, low: float = -math.inf, high: float = math.inf
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
        return Requantization(shift, target.zero, ends[0], ends[1])


def codes(name: str, values: NDArray[Any], encoding: Encoding) -> Ints:
    """The codes of a parameter. Raises EncodingError, naming it, where a value does not lie on the grid."""
    found = encoding.quantize(values)
    if not np.array_equal(encoding.dequantize(found), values):
        raise EncodingError(f"{name}: {int((encoding.dequantize(found) != values).sum())} values are off its grid")
    return found


def require_power_of_two(name: str, encoding: Encoding) -> None:
    """Raises NotPowerOfTwoError, naming the tensor."""
    if not encoding.is_power_of_two:
        free = np.atleast_1d(encoding.scale)[np.atleast_1d(np.frexp(encoding.scale)[0]) != 0.5][0]
        raise NotPowerOfTwoError(f"{name}: scale {float(free):.9g} is not a power of two, so it is no shift")


def _require_64_bits(program: Program, step: Step) -> None:
    """Raises UnsupportedModelError, naming the node, where a sum, or its shift to the left, may leave int64."""
    rule = getattr(step, "requantization", None)
    # an average shifts its sum before it divides, so that its bound has the shift
    up = 0 if rule is None or isinstance(step, Average) else max(0, -int(np.min(rule.shift)))
    if (largest := step.bound(program) << up) > INT64_HALF:
        raise UnsupportedModelError(f"{step.node}: its sums may reach {largest}; integers have room up to 2^62")


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def _with_batch(model: onnx.ModelProto, size: int) -> onnx.ModelProto:
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
    return onnx.shape_inference.infer_shapes(copy, data_prop=True)
