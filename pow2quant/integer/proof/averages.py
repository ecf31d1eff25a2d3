"""Averages and sums over axes."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.functions import farthest, quotient, resampling, rounds_alike
from pow2quant.integer.lattice import FLOAT32_EXACT, Lattice, NotProvedError
from pow2quant.integer.nodes import attribute, reduced_axes
from pow2quant.integer.proof.elements import zero_point_of
from pow2quant.integer.proof.moves import float_sums
from pow2quant.integer.proof.tensors import Judged, Tensors

if TYPE_CHECKING:
    import onnx

    from pow2quant.pow2_constraints import Encoding


def average(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Means: an exact sum, and a quotient that is rounded half to even however it is computed."""
    x = tensors.encoded(node.input[0])
    if attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0):
        raise NotProvedError("executors disagree by what a window beyond the padding is divided")
    counts = _counts(tensors, node)
    total = x.times(max(counts))
    total.require_exact("the sum", limit=tensors.limit)
    target = tensors.target(node.output[0])
    if all(n & (n - 1) == 0 for n in counts):
        quotient = Lattice(total.exponent - (max(counts).bit_length() - 1), total.low, total.high)
        (quotient + zero_point_of(target)).require_exact(
            "the average, with the zero point in its unit,", total, tensors.limit
        )
        return total, quotient
    if target is None:
        raise NotProvedError(f"a quotient by {max(counts)} stays float", total)
    for n in counts:
        _require_sharp_quotient(n, x.times(n), target, total, _averages_wide(tensors, node))
    return total, None


def divided(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Resampling: an exact sum, and a quotient that is rounded; of two encoded tensors; others are not proved."""
    found = resampling(tensors.index, tensors.encodings, node)
    if found is None:
        return _of_tensors(tensors, node)
    total = tensors.encoded(found.source).times(found.gain)
    total = total | -total  # weights may be negative
    total.require_exact("the sum", limit=tensors.limit)
    target = tensors.target(node.output[0])
    if target is None:
        raise NotProvedError(f"a quotient by {found.divisor} stays float", total)
    if found.divisor & (found.divisor - 1):
        _require_far_from_ties(found.divisor, total, target, total, wide=False)
    return total, None


def _of_tensors(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    found, target = quotient(tensors.index, tensors.encodings, node), tensors.target(node.output[0])
    if found is None or target is None:
        return float_sums(tensors, node)
    x, divisor = (tensors.encoded(name) for name in (found.numerator, found.denominator))
    drop = int(target.exponent.max()) - (int(x.exponent) - int(divisor.exponent))
    reach = math.ldexp(float(x.magnitude.max()), -drop)
    _require_rounded_alike(int(divisor.magnitude.max()), drop, reach, target, x, wide=False)
    return x, None


def _averages_wide(tensors: Tensors, node: onnx.NodeProto) -> bool:
    """Whether an average that is not proved in float32 is computed in float64."""
    return tensors.limit > FLOAT32_EXACT and tensors.encodings[node.input[0]].grid.width > 8


def _require_sharp_quotient(n: int, total: Lattice, target: Encoding, accumulator: Lattice, wide: bool) -> None:
    """Raises NotProvedError unless S / n rounds alike by division and by reciprocal: see `certificate.py`.

    wide: both in float64.
    """
    _require_far_from_ties(n, total, target, accumulator, wide)
    drop, codes = int(target.exponent.max()) - int(total.exponent), farthest(target)
    sums = np.ldexp((np.arange(-codes, codes + 1) + 0.5) * n, drop)  # S * 2^-drop / n = m + 1/2
    ties = sums[(sums == np.rint(sums)) & (total.low <= sums) & (sums <= total.high)]
    real = np.float64 if wide else np.float32
    quotients = ties / n, ties.astype(real) * (real(1) / real(n))
    exact, product = (np.rint(np.ldexp(quotient, -drop)) for quotient in quotients)
    if missed := int((exact != product).sum()):
        raise NotProvedError(
            f"{missed} exact ties round differently where 1/{n} is multiplied instead of divided by {n}", accumulator
        )


def _require_far_from_ties(n: int, total: Lattice, target: Encoding, accumulator: Lattice, wide: bool) -> None:
    """Raises NotProvedError unless a quotient S / n, rounded to float32, is on the same side of every tie as S / n.

    wide: rounded to float64.
    """
    drop = int(target.exponent.max()) - int(total.exponent)
    reach = math.ldexp(float(total.magnitude.max()), -drop) / n
    _require_rounded_alike(n, drop, reach, target, accumulator, wide)


def _require_rounded_alike(n: int, drop: int, reach: float, target: Encoding, accumulator: Lattice, wide: bool) -> None:
    """The same for quotients by up to n that are shifted right by `drop`, and then no larger than `reach`."""
    largest = min(farthest(target), reach) + int(np.abs(target.zero_point).max())
    if not rounds_alike(n, drop, largest, wide):
        raise NotProvedError(f"quotients by {n} on {target.grid.width} bits are too fine for float32", accumulator)


def total_of(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Sums over some axes."""
    total = tensors.encoded(node.input[0]).times(max(_counts(tensors, node)))
    return total, total


def _counts(tensors: Tensors, node: onnx.NodeProto) -> list[int]:
    """By which numbers of values an average divides."""
    if node.op_type == "AveragePool":
        kernel = attribute(node, "kernel_shape", [])
        pads = any(attribute(node, "pads", [0])) or attribute(node, "auto_pad", b"").startswith(b"SAME")
        if attribute(node, "ceil_mode", 0) or (pads and not attribute(node, "count_include_pad", 0)):
            return sorted({math.prod(window) for window in itertools.product(*(range(1, k + 1) for k in kernel))})
        return [math.prod(kernel)]
    shape = tensors.shapes.get(node.input[0])
    if shape is None:
        raise NotProvedError(f"the shape of {node.input[0]} is not known")
    axes = reduced_axes(node, tensors.constants, len(shape))
    if axes is None:
        raise NotProvedError(f"{node.input[1]} is computed, not constant")
    lengths = [shape[axis] for axis in axes]
    if None in lengths:
        raise NotProvedError(f"how many values of {node.input[0]} are averaged is not known")
    return [math.prod(filter(None, lengths))]
