"""How each ONNX operation is followed: from where its inputs lie to where its accumulator and its result lie.

The arguments behind the rules stand at the head of `certificate.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pow2quant import targets
from pow2quant.functions import FINE, Definition, Lookup, Norm, Softmax, accepts, definition, region
from pow2quant.graphs import GraphIndex
from pow2quant.integer.lattice import FLOAT32_EXACT, Lattice, NotProvedError
from pow2quant.integer.nodes import attribute
from pow2quant.operators import MOVES, OPERATIONS, Values, operations
from pow2quant.pow2_constraints.arithmetic import EXPONENTS, HALF_EVEN
from pow2quant.rewrites import changed_value, may_be_rounded_in_front

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.integer.lattice import Floats, Ints
    from pow2quant.pow2_constraints import Encoding

WEIGHTED = operations(Values.SUMS_OF_PRODUCTS)
"""Operations with a weight."""

ROUNDS_AFTER_ZERO_POINT = ("Add", "AveragePool", "Mul")
"""Operations whose fused kernel in onnxruntime adds the zero point before it rounds."""

INT32_MAX = 2**31 - 1

ZERO = Lattice.of_constants(np.zeros(()))


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
        rule = self.runtime.rounding.of(node.op_type)
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
            np.broadcast_to(encoding.along(v, values.ndim), values.shape)
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


def judge(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Follows the values through a node. Raises NotProvedError when executors may disagree about its result."""
    _require_powers_of_two(tensors, node)
    rule = _defined if definition(node) is not None else RULES.get(node.op_type, _unknown)
    accumulator, result = rule(tensors, node)
    if accumulator is not None:
        accumulator.require_exact(limit=tensors.limit)
        _require_simulated(tensors, node, accumulator)
    if node.op_type in ROUNDS_AFTER_ZERO_POINT:
        _require_even_zero_point(tensors, node, accumulator)
        _require_rounded_in_place(tensors, node, accumulator)
    _require_bounded_requantization(tensors, node, accumulator, result)
    if reason := changed_value(tensors.index, tensors.encodings, node):
        raise NotProvedError(reason, accumulator)
    return accumulator, result


WIDE_LAYERS = ("Conv", "ConvTranspose", "Gemm")
"""Layers that the simulation computes in float64 where float32 does not hold their sums."""

WIDE_ON_MANY_BITS = ("Add", "AveragePool", "GlobalAveragePool", "MatMul", "Mul", "ReduceMean", "ReduceSum", "Sub")
"""Operations that it computes in float64 where all operands are quantized, and one of them to more than 8 bits."""

TWO_OPERANDS = ("Add", "MatMul", "Mul", "Sub")


def _require_simulated(tensors: Tensors, node: onnx.NodeProto, accumulator: Lattice) -> None:
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


def _require_bounded_requantization(
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


def _require_powers_of_two(tensors: Tensors, node: onnx.NodeProto) -> None:
    for name in (*node.input, *node.output, *filter(None, map(tensors.rounded_to, node.output))):
        encoding = tensors.encodings.get(name)
        if encoding is not None and not encoding.is_power_of_two:
            free = np.atleast_1d(encoding.scale)[np.atleast_1d(np.frexp(encoding.scale)[0]) != 0.5][0]
            raise NotProvedError(f"{name}: scale {float(free):.9g} is not a power of two")


def _require_even_zero_point(tensors: Tensors, node: onnx.NodeProto, accumulator: Lattice | None) -> None:
    target = tensors.target(node.output[0])
    if target is not None and (target.zero_point % 2).any():
        odd = int(target.zero_point[target.zero_point % 2 == 1].flat[0])
        kernel = f"onnxruntime's fused {node.op_type}"
        raise NotProvedError(f"odd zero point {odd}: {kernel} adds it before rounding ties to even", accumulator)


def _require_rounded_in_place(tensors: Tensors, node: onnx.NodeProto, accumulator: Lattice | None) -> None:
    """Raises NotProvedError where a float result is moved before it is rounded: an executor may exchange the two."""
    name = node.output[0]
    readers = tensors.index.readers.get(name, [])
    moved = next((reader for reader in readers if may_be_rounded_in_front(tensors.index, reader)), None)
    if name not in tensors.encodings and tensors.rounded_to(name) is None and moved is not None:
        kernel = f"onnxruntime may round first, in its fused {node.op_type}, which adds the zero point before"
        raise NotProvedError(f"{name} is passed on by {moved.op_type} before it is rounded: {kernel}", accumulator)


# Sums of products


def _weighted(tensors: Tensors, node: onnx.NodeProto) -> Judged:
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
    exponents, integers = (_rows(node, values, weight) for values in tensors.on_grid(weight))
    k_w = np.min([k.min(1) for k in exponents], axis=0).astype(np.int64)
    sums = [_ends(n, k - k_w[:, None], x) for n, k in zip(integers, exponents, strict=True)]
    lows, highs = zip(*sums, strict=True)
    accumulator = Lattice(x.exponent + k_w, np.min(lows, axis=0), np.max(highs, axis=0))
    if len(node.input) > 2 and node.input[2]:
        rows = _bias(tensors, node.input[2], accumulator)
        ends = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        accumulator = accumulator + Lattice(accumulator.exponent, *ends)
    shape = _channel_shape(node, tensors.constants[weight].ndim, weight)
    accumulator = accumulator.collapsed() if shape is None else accumulator.reshaped(shape)
    return accumulator, accumulator


def _ends(rows: NDArray[np.float32], shifts: Ints, x: Lattice) -> tuple[Floats, Floats]:
    """How low and how high any partial sum of w * x gets, for each row of integer weights w = n * 2^shift (C, K)."""
    w = np.ldexp(rows.astype(np.float64), shifts) if shifts.any() else rows
    up, down = (part.sum(1, dtype=np.float64) for part in (np.maximum(w, 0), np.minimum(w, 0)))
    return up * x.low + down * x.high, up * x.high + down * x.low


def _rows(node: onnx.NodeProto, values: NDArray[Any], weight: str) -> list[NDArray[Any]]:
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


def _bias(tensors: Tensors, name: str, accumulator: Lattice) -> Floats:
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
    return accumulator, accumulator


# Element by element


def _sum(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """a + b or a - b, also as onnxruntime's QLinearAdd computes it: from raw codes, with the output's zero point."""
    a, b = (tensors.lattice(name) for name in node.input)
    total = a + (-b if node.op_type == "Sub" else b)
    raw = total + _zero_point(tensors.target(node.output[0]))
    for name in node.input:
        encoding = None if name in tensors.constants else tensors.encodings.get(name)
        raw = raw + _zero_point(encoding).times(2)  # q = (q - z) + z, and - z
    raw.require_exact("the sum, with operands and zero points in one unit,", total, tensors.limit)
    return total, total


def _product(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """a * b, also with the output's zero point added before the rounding."""
    product = tensors.lattice(node.input[0]) * tensors.lattice(node.input[1])
    shifted = product + _zero_point(tensors.target(node.output[0]))
    shifted.require_exact("the product, with the zero point in its unit,", product, tensors.limit)
    return product, product


def _zero_point(encoding: Encoding | None) -> Lattice:
    """An encoding's zero point as a summand of either sign."""
    if encoding is None:
        return ZERO
    z = np.asarray(np.abs(encoding.zero_point).max(), np.float64)
    return Lattice(np.asarray(encoding.exponent.min()), -z, z)


# Averages


def _average(tensors: Tensors, node: onnx.NodeProto) -> Judged:
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
        (quotient + _zero_point(target)).require_exact(
            "the average, with the zero point in its unit,", total, tensors.limit
        )
        return total, quotient
    if target is None:
        raise NotProvedError(f"a quotient by {max(counts)} stays float", total)
    for n in counts:
        _require_sharp_quotient(n, x.times(n), target, total, _averages_wide(tensors, node))
    return total, None


def _averages_wide(tensors: Tensors, node: onnx.NodeProto) -> bool:
    """Whether an average that is not proved in float32 is computed in float64."""
    return tensors.limit > FLOAT32_EXACT and tensors.encodings[node.input[0]].grid.width > 8


def _require_sharp_quotient(n: int, total: Lattice, target: Encoding, accumulator: Lattice, wide: bool) -> None:
    """Raises NotProvedError unless S / n rounds alike by division and by reciprocal: see `certificate.py`.

    wide: both in float64.
    """
    drop = int(target.exponent.max()) - int(total.exponent)
    z, grid = target.zero_point, target.grid
    codes = int(np.maximum(grid.qmax - z, z - grid.qmin).max()) + 1
    reach = math.ldexp(float(total.magnitude.max()), -drop) / n
    if n * 2.0 ** max(0, drop) * (min(codes, reach) + int(np.abs(z).max())) > (2**50 if wide else 2**21):
        raise NotProvedError(f"quotients by {n} on {grid.width} bits are too fine for float32", accumulator)
    sums = np.ldexp((np.arange(-codes, codes + 1) + 0.5) * n, drop)  # S * 2^-drop / n = m + 1/2
    ties = sums[(sums == np.rint(sums)) & (total.low <= sums) & (sums <= total.high)]
    real = np.float64 if wide else np.float32
    quotients = ties / n, ties.astype(real) * (real(1) / real(n))
    exact, product = (np.rint(np.ldexp(quotient, -drop)) for quotient in quotients)
    if missed := int((exact != product).sum()):
        raise NotProvedError(
            f"{missed} exact ties round differently where 1/{n} is multiplied instead of divided by {n}", accumulator
        )


def _total(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Sums over some axes."""
    total = tensors.encoded(node.input[0]).times(max(_counts(tensors, node)))
    return total, total


def _choice(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """Values of the second or of the third input."""
    a, b = (tensors.lattice(name).collapsed() for name in node.input[1:])
    return None, a | b


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
    lengths = [shape[axis] for axis in _averaged_axes(tensors, node, len(shape))]
    if None in lengths:
        raise NotProvedError(f"how many values of {node.input[0]} are averaged is not known")
    return [math.prod(filter(None, lengths))]


def _averaged_axes(tensors: Tensors, node: onnx.NodeProto, rank: int) -> list[int]:
    if node.op_type == "GlobalAveragePool":
        return list(range(2, rank))
    axes = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1 and node.input[1]:
        axes = tensors.constants.get(node.input[1])
        if axes is None:
            raise NotProvedError(f"{node.input[1]} is computed, not constant")
    return list(range(rank)) if axes is None else [int(axis) for axis in axes]


# Values that only move, and functions


def _moves(tensors: Tensors, node: onnx.NodeProto) -> Judged:
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


def _nothing(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    return None, None


def _resize(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    if attribute(node, "mode", b"nearest") != b"nearest":
        raise NotProvedError("Resize interpolates in float32, each executor in its own way")
    return _moves(tensors, node)


def _function(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    raise NotProvedError(f"function table: executors compute {node.op_type} in float32, each in its own way")


def _float_sums(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    raise NotProvedError(f"executors compute the sums and quotients of {node.op_type} in float32, each in its own way")


def _defined(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    """A function with an integer definition, whose conditions are checked: see `certificate.py`."""
    defined = definition(node)
    _, source = region(tensors.index, tensors.encodings, node)
    if not source or not accepts(tensors.encodings[source]):
        raise NotProvedError("its integer definition is of one input with a single scale of 2^k and at most 16 bits")
    if node.output[0] not in tensors.encodings:
        raise NotProvedError("its result is not rounded to a grid")
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
    kept = defined.kept()
    if kept is not None and not _keeps_some(kept, defined.axis, len(shape)):
        raise NotProvedError("the mask takes all values of a row out")
    return Lattice(np.asarray(-FINE), np.asarray(0.0), np.asarray(2.0**FINE))


def _keeps_some(kept: NDArray[np.bool_], axis: int, rank: int) -> bool:
    return kept.ndim <= rank and bool(kept.reshape((1,) * (rank - kept.ndim) + kept.shape).any(axis).all())


def _norm(defined: Norm, shape: tuple[int | None, ...], encoding: Encoding) -> Lattice:
    rows = shape[1:] if defined.groups else shape[1:][-len(defined.shape) :]
    if rows != defined.shape or math.prod(defined.shape) % max(1, defined.groups):
        raise NotProvedError(f"its integers are those of rows of shape {defined.shape}")
    counts = {len(defined.gamma), len(defined.beta)}
    if len(counts) > 1 or 0 in counts or math.prod(defined.shape) % len(defined.gamma):
        raise NotProvedError("it has not one factor and one offset for each channel")
    if not 0 <= defined.gamma_bits <= 20 or not 0 <= defined.eps < 2**20 or not defined.is_exact(encoding):
        raise NotProvedError("its sums may leave what float64 holds exactly, 2^53")
    largest = float((defined.magnitude >> defined.drop) + 1)
    return Lattice(np.asarray(-defined.fine), np.asarray(-largest), np.asarray(largest))


CONDITIONS: dict[type[Definition], Callable[[Any, tuple[int | None, ...], Encoding], Lattice]] = {
    Softmax: _softmax,
    Norm: _norm,
}
"""What must hold for a definition's operations to be exact, and where its result lies."""


def _unknown(tensors: Tensors, node: onnx.NodeProto) -> Judged:
    raise NotProvedError(f"nothing is known about {node.op_type}")


_BY_VALUES: dict[Values, Rule] = {
    Values.SUMS_OF_PRODUCTS: _weighted,
    Values.SUM: _sum,
    Values.PRODUCT: _product,
    Values.AVERAGE: _average,
    Values.FUNCTION: _function,
    Values.FLOAT: _float_sums,
    Values.NONE: _nothing,
    **dict.fromkeys((*MOVES, Values.CLIPPED, Values.JOINED), _moves),
}

RULES: dict[str, Rule] = {
    **{op: _BY_VALUES[row.values] for op, row in OPERATIONS.items()},
    "ReduceSum": _total,
    "Resize": _resize,
    "Where": _choice,
}
"""How each operation is judged; any other is not proved."""
