"""Functions with an integer definition, whose conditions are checked: see `certificate.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.functions import FINE, WIDEST, Definition, LogSoftmax, Lookup, Norm, Softmax, accepts, definition, region
from pow2quant.integer.lattice import FLOAT32_EXACT, Lattice, NotProvedError
from pow2quant.integer.proof.tensors import Judged, Tensors

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding


def defined_by(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """A function with an integer definition, whose conditions are checked: see `certificate.py`."""
    defined = definition(node)
    _, sources = region(tensors.index, tensors.encodings, node)
    if not sources or not all(accepts(tensors.encodings[name]) for name in sources):
        raise NotProvedError("its integer definition is of inputs with a single scale of 2^k and at most 16 bits")
    if node.output[0] not in tensors.encodings:
        raise NotProvedError("its result is not rounded to a grid")
    source = sources[0]
    shape = tensors.shapes.get(source)
    if shape is None:
        raise NotProvedError(f"the shape of {source} is not known")
    assert defined is not None
    if isinstance(defined, Lookup):
        if not defined.fits(tensors.encodings[source], tensors.encodings[node.output[0]]):
            raise NotProvedError("its table is one between other encodings")
        result = Lattice.of_encoding(tensors.encodings[node.output[0]], None)
        return result, result
    accumulator = CONDITIONS[type(defined)](defined, shape, tensors.encodings[source])
    return accumulator, accumulator


def _softmax(defined: Softmax, shape: tuple[int | None, ...], encoding: Encoding) -> Lattice:
    length = shape[defined.axis] if -len(shape) < defined.axis < 0 else None
    m, r = defined.table_bits, defined.reciprocal_bits
    if length is None:
        raise NotProvedError("how many values a row has is not known, or the axis is the batch")
    if not (0 < m <= 16 and FINE <= r <= 40 and m + r <= 56 and r - m >= 12) or defined.factor <= 0:
        raise NotProvedError(f"a table of {m} bits and a reciprocal of {r} are outside the proof")
    if length << m > FLOAT32_EXACT:
        raise NotProvedError(f"a row of {length} entries of {m} bits may add up beyond 2^24")
    if not 0 <= defined.levels <= WIDEST:
        raise NotProvedError(f"{defined.levels} powers of two are outside the proof")
    kept = defined.kept()
    if kept is not None and not _keeps_some(kept, defined.axis, len(shape)):
        raise NotProvedError("the mask takes all values of a row out")
    return Lattice(np.asarray(-FINE), np.asarray(0.0), np.asarray(2.0**FINE))


def _log_softmax(defined: LogSoftmax, shape: tuple[int | None, ...], encoding: Encoding) -> Lattice:
    length = shape[defined.axis] if -len(shape) < defined.axis < 0 else None
    if length != defined.length:
        raise NotProvedError(f"its integers are those of rows of {defined.length} values")
    if not defined.is_exact(encoding):
        raise NotProvedError("its integers may leave what float32 holds exactly, 2^24")
    return Lattice(np.asarray(-defined.fine), np.asarray(-(2.0**24)), np.asarray(0.0))


def _keeps_some(kept: NDArray[np.bool_], axis: int, rank: int) -> bool:
    return kept.ndim <= rank and bool(kept.reshape((1,) * (rank - kept.ndim) + kept.shape).any(axis).all())


def _norm(defined: Norm, shape: tuple[int | None, ...], encoding: Encoding) -> Lattice:
    rows = shape[1:] if defined.groups else shape[1:][-len(defined.shape) :]
    if rows != defined.shape or math.prod(defined.shape) % max(1, defined.groups):
        raise NotProvedError(f"its integers are those of rows of shape {defined.shape}")
    if defined.shifts and (len(defined.shifts) != defined.length or not set(defined.shifts) <= set(range(WIDEST))):
        raise NotProvedError("its shifts are not from 0 to 15, one for every value of a row")
    counts = {len(defined.gamma), len(defined.beta)}
    if len(counts) > 1 or 0 in counts or math.prod(defined.shape) % len(defined.gamma):
        raise NotProvedError("it has not one factor and one offset for each channel")
    if not 0 <= defined.gamma_bits <= 20 or not 0 <= defined.eps < 2**20 or not defined.is_exact(encoding):
        raise NotProvedError("its sums may leave what float64 holds exactly, 2^53")
    largest = float((defined.magnitude >> defined.drop) + 1)
    return Lattice(np.asarray(-defined.fine), np.asarray(-largest), np.asarray(largest))


CONDITIONS: dict[type[Definition], Callable[[Any, tuple[int | None, ...], Encoding], Lattice]] = {
    Softmax: _softmax,
    LogSoftmax: _log_softmax,
    Norm: _norm,
}
"""What must hold for a definition's operations to be exact, and where its result lies."""
