"""Divisions that an ONNX graph says with its own nodes: weighted sums by a whole number, and one tensor by another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.graphs import GraphIndex
    from pow2quant.pow2_constraints import Encoding

    Ints = NDArray[np.int64]

TINY = 2.0**-100
"""What stands for zero where it divides."""


@dataclass(frozen=True, eq=False)
class Resampling:
    """Weighted sums of an encoded tensor along its dimensions, one after the other, and a division of them.

    maps: each with its integers (results, values), and how many values lie behind one another along the dimension, 0
    where that is not known. inner: what is computed in between.
    """

    source: str
    maps: tuple[tuple[Ints, int], ...]
    divisor: int
    inner: frozenset[str]

    @property
    def gain(self) -> int:
        """No sum of products is further from zero than so many values."""
        return math.prod(int(np.abs(matrix).sum(1).max()) for matrix, _ in self.maps)


def resampling(index: GraphIndex, table: dict[str, Encoding], node: onnx.NodeProto) -> Resampling | None:
    """What ends at a Div by a whole number behind products with constant matrices of whole numbers; None for others."""
    divisor = _whole(index, table, node.input[1]) if node.op_type == "Div" else None
    if divisor is None or divisor.size != 1 or not 1 <= divisor.min() <= 2**50:
        return None
    maps: list[tuple[Ints, int]] = []
    inner, name = set[str](), node.input[0]
    while name not in table:
        before = index.producers.get(name)
        if before is None or len(index.readers[name]) > 1 or name in index.outputs:
            return None
        inner.add(name)
        name = before.input[0]
        if before.op_type == "MatMul":
            left, right = (_whole(index, table, operand) for operand in before.input)
            matrix = left if right is None else right.T
            if (left is None) == (right is None) or matrix is None or matrix.ndim != 2:
                return None
            name = before.input[0 if left is None else 1]
            maps.append((matrix, 1 if left is None else index.shapes.get(name, (0,))[-1] or 0))
        elif before.op_type != "Reshape" and not (before.op_type == "Max" and len(before.input) == 1):
            return None
    return Resampling(name, tuple(reversed(maps)), int(divisor.reshape(())), frozenset(inner)) if maps else None


@dataclass(frozen=True)
class Quotient:
    """One encoded tensor divided by another. inner: what keeps the divisor from being 0."""

    numerator: str
    denominator: str
    inner: frozenset[str]


def rounds_alike(divisor: int, drop: int, largest: float, wide: bool = False) -> bool:
    """Whether quotients rounded to float32 (wide: float64) round to the same codes as the exact ones: `certificate.py`.

    divisor: the largest. drop: by how many bits quotients are shifted right. largest: of the codes.
    """
    return divisor * 2.0 ** max(0, drop) * largest <= (2**50 if wide else 2**21)


def farthest(target: Encoding) -> int:
    """One more than the farthest code from that of zero."""
    zero, grid = target.zero_point, target.grid
    return int(np.maximum(grid.qmax - zero, zero - grid.qmin).max()) + 1


def quotient(index: GraphIndex, table: dict[str, Encoding], node: onnx.NodeProto) -> Quotient | None:
    """What a Div of encoded tensors divides, by what is a tiny number where it would be 0; None for others."""
    if node.op_type != "Div" or node.input[0] not in table:
        return None
    guard = index.producers.get(node.input[1])
    if guard is None or guard.op_type != "Where" or node.input[1] in table or len(index.readers[node.input[1]]) > 1:
        return None
    condition, number, divisor = guard.input
    equal, tiny = index.producers.get(condition), index.constants.get(number)
    if equal is None or equal.op_type != "Equal" or divisor not in table or len(index.readers[condition]) > 1:
        return None
    zero = index.constants.get(equal.input[1])
    if zero is None or zero.any() or equal.input[0] != divisor or tiny is None or tiny.size != 1 or tiny != TINY:
        return None
    return Quotient(node.input[0], divisor, frozenset({node.input[1], condition}))


def _whole(index: GraphIndex, table: dict[str, Encoding], name: str) -> Ints | None:
    """A constant without an encoding, of whole numbers; None for another."""
    values = index.constants.get(name)
    if values is None or name in table or not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        return None
    return values.astype(np.int64)
