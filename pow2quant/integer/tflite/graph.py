"""A TFLite graph under construction: tensors, operators, constants, and the bytes of the file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import MissingExtraError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pow2quant.integer.program import Program, Tensor

VERSIONS = {
    "ADD": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 5,
    "GATHER": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "MUL": 2,
    "PAD": 2,
    "PADV2": 2,
    "QUANTIZE": 2,
    "SUB": 3,
    "TRANSPOSE": 2,
}
"""The least version of an operator that has int8; 1 for those that are not named."""

IDENTIFIER = b"TFL3"


def schema() -> Any:
    """The schema's classes. Raises MissingExtraError where no package has them."""
    try:
        return import_module("ai_edge_litert.schema_py_generated")
    except ImportError as error:
        raise MissingExtraError(
            f"TFLite files need ai-edge-litert: pip install 'pow2quant[litert]' ({error})"
        ) from error


class Graph:
    """A graph under construction; tensors are indices into `tensors`.

    A program's tensor (C, H, W) stands as (1, H, W, C), any other with a batch of one in front; codes of an unsigned
    grid stand 128 lower. known: indices by the names of the program's tensors.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.s = schema()
        self.buffers: list[Any] = [self._buffer(None)]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: dict[str, int] = {}
        self.known: dict[str, int] = {}

    def activation(self, name: str) -> int:
        """The tensor of a program's tensor, of its constant where it is one."""
        if name not in self.known:
            tensor = self.program.tensors[name]
            self.known[name] = self.encoded(tensor, physical(tensor.shape), name)
            if tensor.constant is not None:
                self.tensors[self.known[name]].buffer = self._store(int8_constant(tensor))
                shape = () if tensor.constant.size == 1 else physical(tensor.shape)
                self.tensors[self.known[name]].shape = list(shape)
        return self.known[name]

    def encoded(self, like: Tensor, shape: Sequence[int], name: str) -> int:
        """A computed int8 tensor with the encoding of a program's tensor. Raises UnsupportedModelError."""
        grid = like.encoding.grid
        if grid.width != 8 or grid.narrow:
            raise UnsupportedModelError(f"{like.name}: a grid of {grid.width} bits; TFLite files have all of int8")
        return self._tensor(name, "INT8", shape, [2.0**like.exponent], [like.zero - offset(like)])

    def constant(self, name: str, values: NDArray[Any], scales: Sequence[float] | None = None, axis: int = 0) -> int:
        """A constant tensor of int8 or int32. scales: symmetric, one per channel along `axis`, or one."""
        kind = {"int8": "INT8", "int32": "INT32"}[values.dtype.name]
        zeros = None if scales is None else [0] * len(scales)
        index = self._tensor(name, kind, values.shape, scales, zeros, axis)
        self.tensors[index].buffer = self._store(values)
        return index

    def integers(self, name: str, shape: Sequence[int]) -> int:
        """A computed int32 tensor."""
        return self._tensor(name, "INT32", shape)

    def operator(self, op: str, inputs: Sequence[int], output: int, options: Any = None) -> int:
        """Adds an operator with one result and returns that. options: an instance of the schema's class."""
        made = self.s.OperatorT()
        made.opcodeIndex = self.codes.setdefault(op, len(self.codes))
        made.inputs, made.outputs = list(inputs), [output]
        if options is not None:
            made.builtinOptionsType = getattr(self.s.BuiltinOptions, type(options).__name__.removesuffix("T"))
            made.builtinOptions = options
        self.operators.append(made)
        return output

    def options(self, kind: str, **values: Any) -> Any:
        """An instance of `<kind>OptionsT` with these fields."""
        made = getattr(self.s, f"{kind}OptionsT")()
        for key, value in values.items():
            assert hasattr(made, key), key
            setattr(made, key, value)
        return made

    def shape(self, index: int) -> list[int]:
        """A tensor's shape."""
        return list(self.tensors[index].shape)

    def reshaped(self, index: int, shape: Sequence[int], like: Tensor) -> int:
        """The same codes in another shape; `like` has their encoding."""
        if self.shape(index) == list(shape):
            return index
        name = f"{self.tensors[index].name}.reshaped{len(self.tensors)}"
        dims = self.constant(f"{name}.shape", np.array(shape, np.int32))
        return self.operator("RESHAPE", [index, dims], self.encoded(like, shape, name))

    def transposed(self, index: int, order: Sequence[int], like: Tensor) -> int:
        """The dimensions in another order, a reshape where those that move are 1."""
        shape = [self.shape(index)[d] for d in order]
        moving = [d for d in order if self.shape(index)[d] > 1]
        if moving == sorted(moving):
            return self.reshaped(index, shape, like)
        name = f"{self.tensors[index].name}.transposed{len(self.tensors)}"
        permutation = self.constant(f"{name}.order", np.array(order, np.int32))
        made = self.encoded(like, shape, name)
        return self.operator("TRANSPOSE", [index, permutation], made, self.options("Transpose"))

    def channels_first(self, name: str) -> int:
        """A program's tensor in the program's own order of dimensions, (1, *shape)."""
        tensor = self.program.tensors[name]
        index = self.activation(name)
        return self.transposed(index, (0, 3, 1, 2), tensor) if len(tensor.shape) == 3 else index

    def put(self, index: int, name: str) -> None:
        """Makes what stands in the program's own order, (1, *shape), a program's tensor."""
        tensor = self.program.tensors[name]
        if len(tensor.shape) == 3:
            index = self.transposed(index, (0, 2, 3, 1), tensor)
        self.known[name] = index
        self.tensors[index].name = name

    def file(self, outputs: Sequence[str]) -> bytes:
        """The file, with these of the program's tensors as outputs."""
        flatbuffers = import_module("flatbuffers")
        s = self.s
        graph = s.SubGraphT()
        graph.name, graph.tensors, graph.operators = "pow2quant", self.tensors, self.operators
        graph.inputs = [self.known[name] for name in self.program.inputs]
        graph.outputs = [self.known[name] for name in outputs]
        model = s.ModelT()
        model.version, model.description = 3, "pow2quant"
        model.operatorCodes = [self._code(op) for op in self.codes]
        model.subgraphs, model.buffers = [graph], self.buffers
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _code(self, op: str) -> Any:
        code = self.s.OperatorCodeT()
        code.builtinCode = getattr(self.s.BuiltinOperator, op)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), VERSIONS.get(op, 1)
        return code

    def _tensor(
        self,
        name: str,
        kind: str,
        shape: Sequence[int],
        scales: Sequence[float] | None = None,
        zeros: Sequence[int] | None = None,
        axis: int = 0,
    ) -> int:
        made = self.s.TensorT()
        made.name, made.shape, made.type = name, list(map(int, shape)), getattr(self.s.TensorType, kind)
        made.buffer, made.hasRank = 0, True
        if scales is not None:
            made.quantization = self.s.QuantizationParametersT()
            made.quantization.scale, made.quantization.zeroPoint = list(scales), list(zeros or [])
            made.quantization.quantizedDimension = axis
        self.tensors.append(made)
        return len(self.tensors) - 1

    def _store(self, values: NDArray[Any]) -> int:
        self.buffers.append(self._buffer(values))
        return len(self.buffers) - 1

    def _buffer(self, values: NDArray[Any] | None) -> Any:
        made = self.s.BufferT()
        if values is not None:
            made.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        return made


def physical(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in the file of a program's tensor."""
    return (1, *shape[1:], shape[0]) if len(shape) == 3 else (1, *shape)


def offset(tensor: Tensor) -> int:
    """How much higher a tensor's codes are than those in the file."""
    return 0 if tensor.encoding.grid.signed else 128


def to_int8(tensor: Tensor, codes: NDArray[Any]) -> NDArray[np.int8]:
    """A program's codes (N, *shape) as the file has them."""
    moved = np.moveaxis(codes, 1, -1) if len(tensor.shape) == 3 else codes
    found: NDArray[np.int8] = np.ascontiguousarray(moved.astype(np.int64) - offset(tensor)).astype(np.int8)
    return found


def from_int8(tensor: Tensor, codes: NDArray[np.int8]) -> NDArray[Any]:
    """A file's codes as the program has them, (N, *shape)."""
    moved = np.moveaxis(codes, -1, 1) if len(tensor.shape) == 3 else codes
    found: NDArray[Any] = (moved.astype(np.int64) + offset(tensor)).astype(tensor.dtype)
    return found


def int8_constant(tensor: Tensor) -> NDArray[np.int8]:
    """The codes of a constant as the file has them."""
    assert tensor.constant is not None
    codes = tensor.constant if tensor.constant.ndim < len(tensor.shape) + 1 else tensor.constant[0]
    found: NDArray[np.int8] = to_int8(tensor, codes[None])[0]
    return found
