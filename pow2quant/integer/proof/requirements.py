"""What must hold at every node, whatever its operation: bounds, zero points, and what optimizers may exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pow2quant.integer.lattice import FLOAT32_EXACT, Lattice, NotProvedError
from pow2quant.integer.proof.tensors import Tensors
from pow2quant.pow2_constraints.arithmetic import EXPONENTS
from pow2quant.rewrites import may_be_rounded_in_front

if TYPE_CHECKING:
    import onnx

INT32_MAX = 2**31 - 1

ROUNDS_AFTER_ZERO_POINT = ("Add", "AveragePool", "Mul")
"""Operations whose fused kernel in onnxruntime adds the zero point before it rounds."""

WIDE_LAYERS = ("Conv", "ConvTranspose", "Gemm")
"""Layers that the simulation computes in float64 where float32 does not hold their sums."""

WIDE_ON_MANY_BITS = ("Add", "AveragePool", "GlobalAveragePool", "MatMul", "Mul", "ReduceMean", "ReduceSum", "Sub")
"""Operations that it computes in float64 where all operands are quantized, and one of them to more than 8 bits."""

TWO_OPERANDS = ("Add", "MatMul", "Mul", "Sub")


def require_simulated(tensors: Tensors, node: onnx.NodeProto, accumulator: Lattice) -> None:
    """Raises NotProvedError where sums need more than float32 and the simulation has no more."""
    if tensors.limit == FLOAT32_EXACT:
        return
    operands = [tensors.encodings.get(name) for name in node.input[: 2 if node.op_type in TWO_OPERANDS else 1]]
    wide = node.op_type in WIDE_LAYERS or (
        node.op_type in WIDE_ON_MANY_BITS
        and None not in operands
        and any(encoding.grid.width > 8 for encoding in operands if encoding is not None)
    )
    if not wide or not _is_rounded_next(tensors, node.output[0]):
        accumulator.require_exact()


def _is_rounded_next(tensors: Tensors, name: str) -> bool:
    """Whether nothing but a ReLU, a clip or a Reshape stands between a result and its only rounding."""
    while name not in tensors.encodings:
        readers = tensors.readers.get(name, [])
        if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip", "Reshape") or name in tensors.outputs:
            return False
        name = readers[0].output[0]
    return True


def require_bounded_requantization(
    tensors: Tensors, node: onnx.NodeProto, accumulator: Lattice | None, result: Lattice | None
) -> None:
    """Raises NotProvedError where what is rounded does not fit int32 or a ratio of scales is no normal float32."""
    target = tensors.target(node.output[0])
    rounded = accumulator if result is None else result
    if rounded is None or target is None:
        return
    ratio = rounded.exponent.min() - target.exponent.max(), rounded.exponent.max() - target.exponent.min()
    if ratio[0] < EXPONENTS.start or ratio[1] >= EXPONENTS.stop:
        reason = f"a ratio of scales of 2^{ratio[0]} to 2^{ratio[1]} is no normal float32: executors multiply by it"
        raise NotProvedError(reason, accumulator)
    # in float64: 2^24 * 2^127 and a zero point fit
    largest = float(np.ldexp(rounded.magnitude.max(), int(ratio[1]))) + float(np.abs(target.zero_point).max())
    if largest > (INT32_MAX if tensors.limit == FLOAT32_EXACT else tensors.limit):
        reason = f"{node.output[0]} is rounded to values up to {largest:.3g} before it saturates; int32 holds 2^31 - 1"
        raise NotProvedError(reason, accumulator)


def require_powers_of_two(tensors: Tensors, node: onnx.NodeProto) -> None:
    """Raises NotProvedError where a scale at the node is free."""
    for name in (*node.input, *node.output, *filter(None, map(tensors.rounded_to, node.output))):
        encoding = tensors.encodings.get(name)
        if encoding is not None and not encoding.is_power_of_two:
            free = np.atleast_1d(encoding.scale)[np.atleast_1d(np.frexp(encoding.scale)[0]) != 0.5][0]
            raise NotProvedError(f"{name}: scale {float(free):.9g} is not a power of two")


def require_even_zero_point(tensors: Tensors, node: onnx.NodeProto, accumulator: Lattice | None) -> None:
    """Raises NotProvedError where a zero point is added before ties are rounded to even."""
    target = tensors.target(node.output[0])
    if target is not None and (target.zero_point % 2).any():
        odd = int(target.zero_point[target.zero_point % 2 == 1].flat[0])
        kernel = f"onnxruntime's fused {node.op_type}"
        raise NotProvedError(f"odd zero point {odd}: {kernel} adds it before rounding ties to even", accumulator)


def require_rounded_in_place(tensors: Tensors, node: onnx.NodeProto, accumulator: Lattice | None) -> None:
    """Raises NotProvedError where a float result is moved before it is rounded: an executor may exchange the two."""
    name = node.output[0]
    readers = tensors.index.readers.get(name, [])
    moved = next((reader for reader in readers if may_be_rounded_in_front(tensors.index, reader)), None)
    if name not in tensors.encodings and tensors.rounded_to(name) is None and moved is not None:
        kernel = f"onnxruntime may round first, in its fused {node.op_type}, which adds the zero point before"
        raise NotProvedError(f"{name} is passed on by {moved.op_type} before it is rounded: {kernel}", accumulator)
