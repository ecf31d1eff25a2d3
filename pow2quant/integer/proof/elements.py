"""Sums and products element by element, and choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pow2quant.integer.lattice import Lattice
from pow2quant.integer.proof.tensors import Judged, Tensors

if TYPE_CHECKING:
    import onnx

    from pow2quant.pow2_constraints import Encoding

ZERO = Lattice.of_constants(np.zeros(()))


def sum_of(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """a + b or a - b, also as onnxruntime's QLinearAdd computes it: from raw codes, with the output's zero point."""
    a, b = (tensors.lattice(name) for name in node.input)
    total = a + (-b if node.op_type == "Sub" else b)
    raw = total + zero_point_of(tensors.target(node.output[0]))
    for name in node.input:
        encoding = None if name in tensors.constants else tensors.encodings.get(name)
        raw = raw + zero_point_of(encoding).times(2)  # q = (q - z) + z, and - z
    raw.require_exact("the sum, with operands and zero points in one unit,", total, tensors.limit)
    return total, total


def product_of(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """a * b, also with the output's zero point added before the rounding."""
    product = tensors.lattice(node.input[0]) * tensors.lattice(node.input[1])
    shifted = product + zero_point_of(tensors.target(node.output[0]))
    shifted.require_exact("the product, with the zero point in its unit,", product, tensors.limit)
    return product, product


def zero_point_of(encoding: Encoding | None) -> Lattice:
    """An encoding's zero point as a summand of either sign."""
    if encoding is None:
        return ZERO
    z = np.asarray(np.abs(encoding.zero_point).max(), np.float64)
    return Lattice(np.asarray(encoding.exponent.min()), -z, z)


def choice(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Values of the second or of the third input."""
    a, b = (tensors.lattice(name).collapsed() for name in node.input[1:])
    return None, a | b
