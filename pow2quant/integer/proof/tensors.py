"""A graph's tensors, and what is known of where their values lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx

from pow2quant import targets
from pow2quant.graphs import GraphIndex
from pow2quant.integer.lattice import FLOAT32_EXACT, Lattice, NotProvedError
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.pow2_constraints import Encoding


TWO_OPERANDS = ("Add", "Mul", "Sub", "Where")
"""Operations that are functions of one tensor where the other operand is a constant without an encoding."""


class Tensors:
    """A graph's tensors, and what is known of where their values lie.

    limit: of accumulators, 2^24 for what every executor gives, 2^53 for the simulation, the engine and C.
    runtime: whose arithmetic the file is for.
    """

    def __init__(self, artifact: Artifact, limit: int = FLOAT32_EXACT) -> None:
        self.limit = limit
        self.encodings = artifact.encodings
        self.index = GraphIndex(onnx.shape_inference.infer_shapes(artifact.model).graph)
        self.constants, self.readers, self.shapes = self.index.constants, self.index.readers, self.index.shapes
        self.outputs = self.index.outputs
        self.float_results: dict[str, Lattice | None] = {}
        self.runtime = targets.of(artifact.model)

    def rounds_otherwise(self, node: onnx.NodeProto) -> str:
        """Why executors of ONNX files round a node's result in another way than its target; "" where they do not."""
        rounding = self.runtime.rounding
        function = any(name in self.constants and name not in self.encodings for name in node.input)
        rule = rounding.functions if function and node.op_type in TWO_OPERANDS else rounding.of(node.op_type)
        if rule == HALF_EVEN or self.limit != FLOAT32_EXACT:
            return ""
        return f"target {self.runtime.name} rounds it {rule}, ONNX {HALF_EVEN}"

    def lattice(self, name: str) -> Lattice:
        """Where a tensor's values lie. Raises NotProvedError for a tensor that stays float on no known lattice."""
        if name in self.constants:
            if name not in self.encodings:
                return Lattice.of_constants(self.constants[name])
            k, n = self.on_grid(name)
            return Lattice.of_integers(k.astype(np.int64), n.astype(np.float64))
        if name in self.encodings:
            shape = self.shapes.get(name)
            return Lattice.of_encoding(self.encodings[name], None if shape is None else len(shape))
        if (known := self.float_results.get(name)) is None:
            raise NotProvedError(f"{name} has no encoding and stays float")
        return known

    def encoded(self, name: str) -> Lattice:
        """Where an encoded activation lies, as a whole. Raises NotProvedError when it has no encoding."""
        if name not in self.encodings:
            raise NotProvedError(f"input {name} has no encoding and stays float")
        return self.lattice(name).collapsed()

    def on_grid(self, name: str) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """An encoded constant's exponents and integers, both of its shape. Raises NotProvedError when off its grid."""
        encoding, values = self.encodings[name], self.constants[name]
        zero, grid = encoding.zero_point, encoding.grid
        k, low, high = (
            np.broadcast_to(encoding.along(v, values.shape), values.shape)
            for v in (encoding.exponent.astype(np.int16), grid.qmin - zero, grid.qmax - zero)
        )
        n = np.ldexp(values, -k)
        if not ((n == np.rint(n)) & (low <= n) & (n <= high)).all():
            raise NotProvedError(f"{name} does not lie on its grid")
        return k, n

    def rounded_to(self, tensor: str) -> str | None:
        """The encoded tensor that a result becomes: itself, or what the activation fused with it makes of it."""
        while tensor not in self.encodings:
            readers = self.readers.get(tensor, [])
            if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip") or tensor in self.outputs:
                return None
            tensor = readers[0].output[0]
        return tensor

    def target(self, tensor: str) -> Encoding | None:
        """The encoding that a result is rounded to."""
        name = self.rounded_to(tensor)
        return None if name is None else self.encodings[name]


Judged = tuple[Lattice | None, Lattice | None]
"""Where a node's accumulator lies (None: it only moves values), and its result (None: on no known lattice)."""

Rule = Callable[[Tensors, onnx.NodeProto], Judged]
