"""Sums of products: layers with a constant weight, and products of two activations."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.functions import Softmax, definition
from pow2quant.integer.lattice import Lattice, NotProvedError
from pow2quant.integer.nodes import attribute
from pow2quant.integer.proof.tensors import Judged, Tensors
from pow2quant.operators import Values, operations

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.integer.lattice import Floats, Ints

WEIGHTED = operations(Values.SUMS_OF_PRODUCTS)
"""Operations with a weight."""


def weighted(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Sums of products with a constant weight, and a bias."""
    data, weight = node.input[:2]
    if node.op_type == "MatMul" and data in tensors.constants:
        data, weight = weight, data
    x = tensors.encoded(data)
    if weight not in tensors.constants:
        if node.op_type == "MatMul":
            return _product_of_activations(tensors, node)
        raise NotProvedError(f"weight {weight} is computed, not constant")
    if weight not in tensors.encodings:
        raise NotProvedError(f"weight {weight} has no encoding and stays float")
    if node.op_type == "Gemm":
        _require_plain_gemm(node)
    exponents, integers = (rows_of(node, values, weight) for values in tensors.on_grid(weight))
    k_w = np.min([k.min(1) for k in exponents], axis=0).astype(np.int64)
    sums = [partial_sums(n, k - k_w[:, None], x) for n, k in zip(integers, exponents, strict=True)]
    lows, highs = zip(*sums, strict=True)
    accumulator = Lattice(x.exponent + k_w, np.min(lows, axis=0), np.max(highs, axis=0))
    if len(node.input) > 2 and node.input[2]:
        rows = bias_rows(tensors, node.input[2], accumulator)
        ends = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        accumulator = accumulator + Lattice(accumulator.exponent, *ends)
    shape = _channel_shape(node, tensors.constants[weight].ndim, weight)
    accumulator = accumulator.collapsed() if shape is None else accumulator.reshaped(shape)
    return accumulator, accumulator


def partial_sums(rows: NDArray[np.float32], shifts: Ints, x: Lattice) -> tuple[Floats, Floats]:
    """How low and how high any partial sum of w * x gets, for each row of integer weights w = n * 2^shift (C, K)."""
    w = np.ldexp(rows.astype(np.float64), shifts) if shifts.any() else rows
    up, down = (part.sum(1, dtype=np.float64) for part in (np.maximum(w, 0), np.minimum(w, 0)))
    return up * x.low + down * x.high, up * x.high + down * x.low


def rows_of(node: onnx.NodeProto, values: NDArray[Any], weight: str) -> list[NDArray[Any]]:
    """A weight as matrices (C, K): the K values that one result of channel c sums up.

    Several matrices where results of one channel see different weights: a transposed convolution with stride 2 has
    four kinds of results in two dimensions.
    """
    if node.op_type == "Conv":
        return [values.reshape(len(values), -1)]
    if node.op_type == "Gemm":
        return [values if attribute(node, "transB", 0) else values.T]
    if node.op_type == "MatMul":
        columns = weight == node.input[1] and values.ndim > 1
        rows = np.swapaxes(values, -1, -2) if columns else values
        return [rows.reshape(-1, rows.shape[-1])]
    groups, spatial = attribute(node, "group", 1), values.shape[2:]
    strides = attribute(node, "strides", [1] * len(spatial))
    dilations = attribute(node, "dilations", [1] * len(spatial))
    phases = [np.arange(k) * d % s for k, d, s in zip(spatial, dilations, strides, strict=True)]
    grouped = values.reshape(groups, -1, *values.shape[1:])
    whole = [np.arange(n) for n in grouped.shape[:3]]
    kinds = []
    for phase in itertools.product(*(np.unique(p) for p in phases)):
        taps = grouped[np.ix_(*whole, *(p == at for p, at in zip(phases, phase, strict=True)))]
        kinds.append(np.moveaxis(taps, 2, 1).reshape(groups * values.shape[1], -1))
    return kinds


def _channel_shape(node: onnx.NodeProto, ndim: int, weight: str) -> tuple[int, ...] | None:
    """The shape in which an array (C,) broadcasts against the result; None: it does not."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return (1, -1, *[1] * (ndim - 2))
    if ndim != 2:
        return None
    return (-1, 1) if weight == node.input[0] else (-1,)


def bias_rows(tensors: Tensors, name: str, accumulator: Lattice) -> Floats:
    """A bias's integers in units of s_in * s_w, (rows, C): one row, or one for each row of a Gemm's result."""
    if name not in tensors.constants or name not in tensors.encodings:
        reason = f"bias {name} has no encoding: it stays float, or onnxruntime quantizes it by itself"
        raise NotProvedError(reason, accumulator)
    k, n = tensors.on_grid(name)
    if (k != accumulator.exponent).any():
        raise NotProvedError(f"bias {name} does not count in units of s_in * s_w", accumulator)
    return np.broadcast_to(n, (len(n) if n.ndim > 1 else 1, accumulator.exponent.size)).astype(np.float64)


def _require_plain_gemm(node: onnx.NodeProto) -> None:
    for name, plain in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
        if (value := attribute(node, name, plain)) != plain:
            raise NotProvedError(f"{name} = {value:g} is outside the proof")


def _product_of_activations(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    a, b = (tensors.encoded(name) for name in node.input)
    length = (tensors.shapes.get(node.input[0]) or (None,))[-1]
    if length is None:
        raise NotProvedError(f"the length of {node.input[0]}'s last dimension is not known")
    accumulator = (a * b).times(length)
    if (total := _probabilities(tensors, node.input[0], a, length)) is not None:
        weighed, every = b.times(total), accumulator
        ends = np.maximum(every.low, weighed.low), np.minimum(every.high, weighed.high)
        accumulator = Lattice(every.exponent, *ends)
    return accumulator, accumulator


def _probabilities(tensors: Tensors, name: str, lattice: Lattice, length: int) -> int | None:
    """What the integers of a row add up to at most, where they are a softmax's along the last axis.

    Its p add up to 1 at most, before each is rounded to a code; and to 3/2 where they are powers of two.
    """
    node = tensors.index.producers.get(name)
    defined = None if node is None else definition(node)
    if not isinstance(defined, Softmax) or defined.axis != -1:
        return None
    whole = np.ldexp(1.5 if defined.levels else 1.0, -int(lattice.exponent))
    return int(np.ceil(whole + length / 2))
