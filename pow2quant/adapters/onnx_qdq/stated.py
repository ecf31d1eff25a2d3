"""Constants and encodings as the nodes of a QDQ file state them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pow2quant.adapters.onnx_qdq.nodes import is_a, plain_encoding, refusal
from pow2quant.errors import EncodingError
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

FOLDED = ("Cast", "Clip", "Constant", "Identity", "Reshape", "Transpose")
"""Operators that are computed while reading when they stand between a constant and a Q or DQ."""


class Stated:
    """The constants of a graph, and what its Q, DQ and Clip nodes say with them."""

    def __init__(self, initializers: Iterable[TensorProto], nodes: Iterable[NodeProto]) -> None:
        self.initializers = {tensor.name: tensor for tensor in initializers}
        self.producer = {name: node for node in nodes for name in node.output}
        self._values: dict[str, NDArray[Any] | None] = {}

    def encoding(self, node: NodeProto, kind: str | None, ndim: int | None) -> Encoding:
        """The encoding that a Q or DQ states. kind: the integers' type where the node does not state it."""
        kind = self.kind(node, kind)
        scale, zero_point = self.constant(node.input[1]), self._zero_point(node)
        unsigned, integer, bits = kind.partition("int")
        attributes = {a.name: a.i for a in node.attribute}
        axis, block = attributes.get("axis", 1), attributes.get("block_size", 0) or None
        if block is not None and ndim is not None and -ndim <= axis < 0:
            axis += ndim
        if not integer or unsigned not in ("", "u"):
            raise refusal(node, f"is of type {kind}; only integers can be read")
        if (problem := _scale_problem(scale, block, axis)) is not None:
            raise refusal(node, problem)
        assert scale is not None
        if scale.size > 1 and ndim is not None:
            if not -ndim <= axis < ndim:
                raise refusal(node, f"has axis {axis}, which a tensor of {ndim} dimensions does not have")
            axis %= ndim
        if axis < 0 and scale.size > 1:
            raise refusal(node, f"counts axis {axis} from the end, of a tensor of unknown rank")
        try:
            channels = axis if block is None else 1 - axis
            return plain_encoding(scale, zero_point, IntGrid(int(bits), not unsigned), channels, block)
        except (EncodingError, ValueError) as error:
            raise refusal(node, f"has an impossible encoding: {error}") from error

    def _zero_point(self, node: NodeProto) -> NDArray[Any]:
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros((), np.int64)
        zero_point = self.constant(node.input[2])
        if zero_point is None:
            raise refusal(node, "has a zero point that is not constant")
        return zero_point

    def kind(self, node: NodeProto, otherwise: str | None) -> str:
        """The name of the integers' type: by the zero point, the attribute, or `otherwise`; uint8 in the end."""
        if len(node.input) > 2 and node.input[2]:
            return self._zero_point(node).dtype.name
        stated = next((a.i for a in node.attribute if a.name == "output_dtype" and is_a(node, "QuantizeLinear")), 0)
        return np.dtype(helper.tensor_dtype_to_np_dtype(stated)).name if stated else otherwise or "uint8"

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of a tensor that does not depend on the graph's inputs, as far as `FOLDED` reaches."""
        if name not in self._values:
            node = self.producer.get(name)
            if name in self.initializers:
                self._values[name] = numpy_helper.to_array(self.initializers[name])
            elif node is None or node.op_type not in FOLDED:
                self._values[name] = None
            else:
                feeds = {read: self.constant(read) for read in node.input}
                known = all(value is not None for value in feeds.values())
                computed: Any = ReferenceEvaluator(node).run(None, feeds) if known else [None]
                self._values[name] = None if computed[0] is None else np.asarray(computed[0])
        return self._values[name]

    def clip_grid(self, clip: NodeProto, storage: IntGrid) -> IntGrid:
        """The grid that a Clip of integers leaves."""
        stated = [self.constant(name) if name else None for name in (*clip.input[1:], "", "")]
        bounds = [
            int(end if one is None else one) for one, end in zip(stated, (storage.qmin, storage.qmax), strict=False)
        ]
        for bits in range(2, storage.width + 1):
            for narrow in (False, True)[: 1 + storage.signed]:
                grid = IntGrid(bits, storage.signed, narrow)
                if bounds == [grid.qmin, grid.qmax]:
                    return grid
        raise refusal(clip, f"clips integers to {bounds}, which are not the ends of a grid within {storage.width} bits")


def on_grid(grid: IntGrid, plain: Encoding, node: NodeProto) -> Encoding:
    """The encoding on another grid. Raises FileFormatError, naming the node, where it cannot be."""
    try:
        return Encoding(plain.scale, plain.zero_point, grid, plain.axis, plain.block)
    except EncodingError as error:
        raise refusal(node, f"has an impossible encoding: {error}") from error


def _scale_problem(scale: NDArray[Any] | None, block: int | None, axis: int) -> str | None:
    """Why a scale cannot be read; None where it can."""
    readable = (
        "only constant float32 scales can be read: one for the tensor, one per channel, or one for each block of a "
        "weight's inputs, axis 0 or 1"
    )
    if scale is None:
        return f"has a scale that is computed, not constant; {readable}"
    if (scale.ndim > 1) != (block is not None) or (block is not None and axis not in (0, 1)):
        size = "of unknown size" if block is None else f"of {block} values"
        return f"has one scale for each block {size} along axis {axis} (block-wise, {scale.shape} scales); {readable}"
    if scale.dtype != np.float32:
        return f"has a scale of type {scale.dtype}; {readable}"
    return None
