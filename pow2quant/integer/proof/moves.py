"""Values that only move, and functions that executors compute in float."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from pow2quant.integer.lattice import Lattice, NotProvedError
from pow2quant.integer.nodes import COMPARISONS, attribute
from pow2quant.integer.proof.tensors import Judged, Tensors
from pow2quant.operators import OPERATIONS, Values, operations

MOVED = operations(Values.MOVED)


def moves(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Operations that move or compare values: the result lies where the inputs lie, exactly."""
    joined = OPERATIONS[node.op_type].values in (Values.JOINED, Values.CLIPPED)
    moved: Sequence[str] = node.input if joined else node.input[:1]
    if node.op_type == "Pad":
        moved = [node.input[0], *node.input[2:3]]
    try:
        lattices = [tensors.lattice(name) for name in moved if name]
    except NotProvedError:
        return None, None  # a float tensor moves on as a float tensor
    if not OPERATIONS[node.op_type].keeps_axes:
        lattices = [lattice.collapsed() for lattice in lattices]
    result = lattices[0]
    for other in lattices[1:]:
        result = result | other
    return None, result


def nothing(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Operations whose result has no values to follow."""
    return None, None


def resize(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Nearest neighbours, which move values."""
    if attribute(node, "mode", b"nearest") != b"nearest":
        raise NotProvedError("Resize interpolates in float32, each executor in its own way")
    return moves(tensors, node)


INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)

TRUTHS = Lattice.of_constants(np.array([0.0, 1.0]))


def comparison(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Comparisons of what is the same everywhere, and casts of what they give."""
    if node.op_type != "Cast":
        return (None, None) if all(_is_same(tensors, name) for name in node.input) else function(tensors, node)
    if attribute(node, "to", 0) in INTEGERS:
        return (None, None) if _counts(tensors, node.input[0]) else function(tensors, node)
    return (None, TRUTHS) if _is_truth(tensors, node.input[0]) else function(tensors, node)


def _is_same(tensors: Tensors, name: str) -> bool:
    """Whether a tensor's values are the same everywhere: constants, integers, truth values, and what is encoded."""
    if name in tensors.constants or _counts(tensors, name) or _is_truth(tensors, name):
        return True
    try:
        tensors.lattice(name)
    except NotProvedError:
        return False
    return True


def _is_truth(tensors: Tensors, name: str) -> bool:
    """Whether a tensor holds truth values that are the same everywhere."""
    node = tensors.index.producers.get(name)
    if node is None:
        return tensors.index.inputs.get(name) == onnx.TensorProto.BOOL
    return node.op_type in COMPARISONS and all(_is_same(tensors, read) for read in node.input)


def _counts(tensors: Tensors, name: str) -> bool:
    """Whether a tensor holds integers without a scale, or truth values that follow from such."""
    if name in tensors.constants:
        return tensors.constants[name].dtype.kind == "i"
    node = tensors.index.producers.get(name)
    if node is None:
        return tensors.index.inputs.get(name) in INTEGERS
    if node.op_type == "Cast" and attribute(node, "to", 0) not in INTEGERS:
        return False
    return node.op_type in (*COMPARISONS, "Cast", *MOVED) and all(_counts(tensors, n) for n in node.input)


def function(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """A function without an integer definition."""
    raise NotProvedError(f"function table: executors compute {node.op_type} in float32, each in its own way")


def float_sums(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Sums and quotients without an integer definition."""
    raise NotProvedError(f"executors compute the sums and quotients of {node.op_type} in float32, each in its own way")


def unknown(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Any other operation."""
    raise NotProvedError(f"nothing is known about {node.op_type}")
