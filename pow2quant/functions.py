"""The integer definitions of functions that are not sums of products, and how an ONNX node says which one it has.

A node of an artifact that bears a definition (`mark`, `definition`) means these integers, in every executor: the
simulation, the nodes of a QDQ file that `adapters/onnx_qdq/exact.py` writes in its place, the engine and C. Results of
Softmax and the norms are integers of at most 2^24, so that float32 holds them, and an ordinary requantization follows;
a table holds the codes themselves.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.graphs import GraphIndex
    from pow2quant.pow2_constraints import Encoding

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

KEY = "pow2quant.function"
"""The key in a node's metadata under which its definition stands."""

FINE = 24
"""Probabilities are integers in units of 2^-24."""

WIDEST = 16
"""Inputs have at most so many bits."""

TINY = 2.0**-100
"""What stands for zero where it divides."""

HIDDEN = 1 << 18
"""So much lower than its code, beyond what any code or table reaches, lies what a softmax does not keep."""


@dataclass(frozen=True)
class Softmax:
    """Softmax along an axis, with one division per row.

    Of codes q in units of 2^k: d = max q - q, E = round(2^m exp(-d factor 2^k)), S = sum E, r = floor(2^R / S), and
    p = floor(E r 2^(24 - R)) in units of 2^-24. What is not kept lies 2^18 lower: it has E = 0, and does not count in
    the maximum, unless nothing of its row is kept.

    axis: from the end. table_bits, reciprocal_bits: m and R. keep: the shape of a mask and its truth values, packed,
    in hexadecimal; it broadcasts against the tensor, and keeps something of every row. masked: a second operand says
    what is kept, by values of more than 0.5, and broadcasts likewise.

    levels: 0; or p is one of so many powers of two, from 1 down, or 0, and nothing is divided. It is 2^-a, where so
    many a >= 0 have 3 E 2^a <= 2 S, and 0 from a = levels on. That is log2(S / E), rounded as in FQ-ViT's
    Log-Int-Softmax (Lin et al. 2022).
    """

    axis: int
    table_bits: int
    reciprocal_bits: int
    factor: float = 1.0
    keep: tuple[tuple[int, ...], str] | None = None
    masked: bool = False
    levels: int = 0

    @classmethod
    def of(
        cls,
        axis: int,
        length: int,
        bits: int,
        factor: float = 1.0,
        keep: NDArray[np.bool_] | None = None,
        masked: bool = False,
        levels: int = 0,
    ) -> Softmax | None:
        """The definition for rows of so many values and a result of so many bits; None for rows that are too long.

        Up to 8 bits and rows of 4,096, m = 12 and R = 24 keep every integer within 24 bits; the reciprocal then costs
        at most 1/16 of the result's step.
        """
        packed = None if keep is None else (keep.shape, np.packbits(keep).tobytes().hex())
        if bits <= 8 and length <= 4096 and not levels:
            return cls(axis, 12, FINE, factor, packed, masked)
        table_bits = min(16, 24 - max(1, length - 1).bit_length())
        return cls(axis, table_bits, 40, factor, packed, masked, levels) if table_bits >= 8 else None

    @property
    def is_single(self) -> bool:
        """Whether every integer is at most 2^24: float32 and int32 hold it."""
        return self.reciprocal_bits == FINE

    def table(self, encoding: Encoding) -> Ints:
        """E for d = 0, 1, …; the last entry, 0, is that of every larger d."""
        span = int(encoding.grid.qmax) - int(encoding.grid.qmin)
        return _exponentials(int(encoding.exponent), span, self.table_bits, self.factor)

    def powers(self) -> Ints:
        """p, where there are levels, for floor(2 S / (3 E)) = 0, 1, …; the last, 0, is that of all larger ones."""
        quotients = np.arange(1 << (self.levels - 1))
        return np.append(1 << (FINE - np.frexp(quotients)[1].astype(np.int64)), 0)

    def kept(self) -> NDArray[np.bool_] | None:
        """The mask, or None."""
        if self.keep is None:
            return None
        shape, text = self.keep
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=math.prod(shape))
        return bits.reshape(shape).astype(bool)


@lru_cache(maxsize=256)
def _exponentials(exponent: int, span: int, bits: int, factor: float) -> Ints:
    step = math.ldexp(factor, exponent)
    count = min(span, int((bits + 1) * math.log(2) / step) + 1) + 1
    entries = np.rint(np.ldexp(np.exp(-step * np.arange(count, dtype=np.float64)), bits)).astype(np.int64)
    entries = np.append(entries[entries > 0], 0)
    entries.setflags(write=False)
    return entries


MOST_BOUNDS = 1 << 16
"""A logarithm of a sum is one of at most so many."""


@dataclass(frozen=True)
class LogSoftmax:
    """The logarithm of Softmax along an axis, without a division.

    Of codes q in units of 2^k: d = max q - q, E = round(2^m exp(-d 2^k)), S = sum E, L = how many of the integers
    B_i = ceil(2^m exp((i - 1/2) 2^-f)), i = 1, 2, …, are not above S, which is log(S / 2^m) in units of 2^-f, rounded;
    y = -(d 2^(k + f) + L) in units of 2^-f.

    axis: from the end. table_bits, fine: m and f. length: of a row.
    """

    axis: int
    table_bits: int
    fine: int
    length: int

    @classmethod
    def of(cls, axis: int, length: int, source: Encoding, target: Encoding) -> LogSoftmax | None:
        """The definition for rows of so many values; None where its integers leave 24 bits, or L may be too many.

        f is so that y is exact but for L, and L is rounded to an eighth of the result's step, or finer, if that is
        possible.
        """
        least, bits = max(0, -int(source.exponent)), min(16, 24 - max(1, length - 1).bit_length())
        fines = range(max(least, 3 - int(target.exponent)), least - 1, -1)
        found = (made for fine in fines if (made := cls(axis, bits, fine, length)).is_exact(source))
        return next(found, None)

    def is_exact(self, source: Encoding) -> bool:
        """Whether every integer is at most 2^24: float32 and int32 hold it."""
        shift = int(source.exponent) + self.fine
        if not (8 <= self.table_bits <= 16 and self.length << self.table_bits <= 1 << 24 and 0 <= shift <= 24):
            return False
        most = self.fine <= 40 and math.log(self.length) * 2**self.fine < MOST_BOUNDS
        span = int(source.grid.qmax) - int(source.grid.qmin)
        return most and (span << shift) + MOST_BOUNDS <= 1 << 24

    def table(self, source: Encoding) -> Ints:
        """E for d = 0, 1, …; the last entry, 0, is that of every larger d."""
        span = int(source.grid.qmax) - int(source.grid.qmin)
        return _exponentials(int(source.exponent), span, self.table_bits, 1.0)

    def bounds(self) -> Ints:
        """B_1, B_2, … up to the largest S."""
        count = int(math.log(self.length) * 2**self.fine + 0.5)
        found: Ints = np.ceil(
            np.ldexp(np.exp((np.arange(1, count + 1) - 0.5) * 2.0**-self.fine), self.table_bits)
        ).astype(np.int64)
        return found


DEPTH = 16
"""Normalized values are integers in units of 2^-16."""

RECIPROCAL = 40
"""The reciprocal of a deviation counts in units of 2^-40."""


@dataclass(frozen=True)
class Norm:
    """Layer, group, instance and RMS norm, with one square root and one division per row of n values.

    Of integers q in units of 2^k, less their zero point: S = sum q, Q = sum q^2 (RMS: S = 0), e = round(eps n^2 4^-k),
    V = max(1, n Q - S^2 + e), s = floor(sqrt(V 4^f)), r = floor(2^40 / s), z = round((n q - S) r 2^(f - 40)) in units
    of 2^-16, and y = round(z gamma + beta) in units of 2^-`fine`; halves are rounded up. f: `precision`.

    shape: of a row, the last dimensions; groups: 0, or into how many rows the sample (C, …) of this shape is divided.
    gamma: integers in units of 2^-gamma_bits, one per value of a row, or per channel; beta: in 2^-(16 + gamma_bits).
    shifts: empty, or for every value of a row by how many bits it is shifted left in front of all this: the
    power-of-two factors of FQ-ViT (Lin et al. 2022).
    """

    shape: tuple[int, ...]
    groups: int
    centered: bool
    eps: float
    gamma: tuple[int, ...]
    beta: tuple[int, ...]
    gamma_bits: int
    shifts: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        groups: int,
        centered: bool,
        eps: float,
        gamma: Floats,
        beta: Floats,
        shifts: tuple[int, ...] = (),
    ) -> Norm | None:
        """The definition for these real factors and offsets; None where they do not fit.

        groups: 0, or with the sample's shape (C, …).
        """
        largest = float(np.abs(gamma).max(initial=0))
        if not (np.isfinite(gamma).all() and np.isfinite(beta).all()) or largest > 2**15 or eps < 0:
            return None
        bits = min(20, 15 - math.frexp(largest)[1]) if largest else 0
        units = [np.rint(np.ldexp(v.astype(np.float64), b)) for v, b in ((gamma, bits), (beta, bits + DEPTH))]
        if np.abs(units[1]).max(initial=0) > 2**45:
            return None
        factors, offsets = (tuple(int(v) for v in values.reshape(-1)) for values in units)
        made = cls(shape, groups, centered, eps, factors, offsets, bits, shifts)
        return made if made.fine >= 0 else None

    @property
    def length(self) -> int:
        """n."""
        return math.prod(self.shape) // max(1, self.groups)

    @property
    def inner(self) -> int:
        """So many values that follow each other have one gamma."""
        return math.prod(self.shape) // len(self.gamma)

    @property
    def largest(self) -> int:
        """No |z| is beyond it: |n q - S| <= sqrt(n V), and s >= 2^f sqrt(V) / 2."""
        return ((math.isqrt(4 * self.length) + 1) << DEPTH) + 1

    @property
    def magnitude(self) -> int:
        """No |z gamma + beta| is beyond it."""
        return self.largest * max(map(abs, self.gamma)) + max(map(abs, self.beta))

    @property
    def fine(self) -> int:
        """The result is in units of 2^-fine, so that none is beyond 2^24."""
        return min(DEPTH + self.gamma_bits, 23 - (self.magnitude >> (DEPTH + self.gamma_bits)).bit_length())

    @property
    def drop(self) -> int:
        """By how many bits z gamma + beta is finer than the result."""
        return DEPTH + self.gamma_bits - self.fine

    def epsilon(self, encoding: Encoding) -> int:
        """e."""
        return round(math.ldexp(float(np.float32(self.eps)) * self.length**2, -2 * int(encoding.exponent)))

    def precision(self, encoding: Encoding) -> int:
        """f, at most 8, so that V 4^f stays below 2^52; negative where nothing does."""
        apart = (int(encoding.grid.qmax) - int(encoding.grid.qmin)) << max(self.shifts, default=0)
        far = (apart + 1) // 2 if self.centered else self._farthest(encoding)
        return min(8, (52 - (self.length**2 * far**2 + self.epsilon(encoding)).bit_length()) // 2)

    def is_exact(self, encoding: Encoding) -> bool:
        """Whether every integer is within 2^53, for inputs with this encoding."""
        sums = self.length**2 * self._farthest(encoding) ** 2 + self.epsilon(encoding)
        return sums <= 2**53 and self.precision(encoding) >= 0 and self.magnitude <= 2**51 and self.fine >= 0

    def _farthest(self, encoding: Encoding) -> int:
        zero = int(encoding.zero_point)
        far = max(int(encoding.grid.qmax) - zero, zero - int(encoding.grid.qmin))
        return far << max(self.shifts, default=0)

    def multipliers(self) -> Ints:
        """2^shift of every value of a row; 1 where there are no shifts."""
        return np.array(1 << np.array(self.shifts or 0, np.int64))

    def factors(self) -> tuple[Ints, Ints]:
        """gamma and beta of every value of a row, in its shape; of a sample, where it is divided into groups."""
        found = (np.repeat(np.array(v, np.int64), self.inner).reshape(self.shape) for v in (self.gamma, self.beta))
        gamma, beta = found
        return gamma, beta


Ends = tuple[int, int, int, int]
"""What a table knows of an encoding: exponent, zero point, least and largest code."""


@dataclass(frozen=True)
class Lookup:
    """A function of one tensor, element by element: for every code of the input the result's.

    source, result: the encodings between which it holds. codes: how far each result is above the least code, 16 bits
    each, least significant byte first, in base64. They are stored and never computed again: libraries differ in the
    last bits of exp or erf, and a rounding beside a tie would move.
    """

    source: Ends
    result: Ends
    codes: str

    @classmethod
    def of(cls, source: Encoding, result: Encoding, values: Floats, rounding: str) -> Lookup:
        """values: the function of `source`'s real values, from the least code on; infinite ones saturate (exp).

        rounding: of the target.
        """
        above = result.quantize(np.nan_to_num(values, nan=np.nan), rounding=rounding) - int(result.grid.qmin)
        return cls(_ends(source), _ends(result), base64.b64encode(above.astype("<u2").tobytes()).decode())

    def fits(self, source: Encoding, result: Encoding) -> bool:
        """Whether it is a table between these encodings."""
        ends = accepts(source) and accepts(result) and (_ends(source), _ends(result)) == (self.source, self.result)
        above = self._above()
        codes = self.source[3] - self.source[2] + 1
        return ends and len(above) == codes and int(above.max(initial=0)) <= self.result[3] - self.result[2]

    def results(self) -> Ints:
        """The result's codes, from the input's least code on."""
        return self._above() + self.result[2]

    def values(self) -> Floats:
        """The results as real values."""
        return np.ldexp((self.results() - self.result[1]).astype(np.float32), self.result[0])

    def _above(self) -> Ints:
        try:
            return np.frombuffer(base64.b64decode(self.codes, validate=True), "<u2").astype(np.int64)
        except ValueError:
            return np.zeros(0, np.int64)


def _ends(encoding: Encoding) -> Ends:
    grid = encoding.grid
    return int(encoding.exponent), int(encoding.zero_point), int(grid.qmin), int(grid.qmax)


Definition = Softmax | LogSoftmax | Norm | Lookup

KINDS: dict[str, type[Softmax] | type[LogSoftmax] | type[Norm] | type[Lookup]] = {
    "softmax": Softmax,
    "log_softmax": LogSoftmax,
    "norm": Norm,
    "lookup": Lookup,
}
"""The definitions by the name that they have in a file."""


def mark(node: onnx.NodeProto, definition: Definition) -> None:
    """Writes a definition into a node's metadata."""
    kind = next(name for name, cls in KINDS.items() if cls is type(definition))
    node.metadata_props.add(key=KEY, value=json.dumps({"function": kind} | asdict(definition)))


def definition(node: onnx.NodeProto) -> Definition | None:
    """A node's definition; None where it has none, or one that is not known."""
    text = next((entry.value for entry in node.metadata_props if entry.key == KEY), None)
    if text is None:
        return None
    try:
        values = json.loads(text)
        return KINDS[values.pop("function")](**{key: _tuples(value) for key, value in values.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def accepts(encoding: Encoding | None) -> bool:
    """Whether the definitions speak of an input with this encoding: one scale of 2^k, and not too many codes."""
    return (
        encoding is not None
        and encoding.scale.ndim == 0
        and encoding.is_power_of_two
        and encoding.grid.width <= WIDEST
        and -64 <= int(encoding.exponent) <= 64
    )


def region(
    index: GraphIndex, table: dict[str, Encoding], node: onnx.NodeProto
) -> tuple[list[onnx.NodeProto], tuple[str, ...]]:
    """The nodes that a node's definition stands for, in order, and the encoded tensors that they read, in theirs.

    No tensors where these are not as many as the definition has operands.
    """
    found = {node.output[0]: node}
    sources: dict[str, None] = {}
    pending = list(reversed(node.input))
    while pending:
        name = pending.pop()
        if not name or name in index.constants or name in found:
            continue
        if name in table:
            sources[name] = None
        elif name in index.producers:
            found[name] = index.producers[name]
            pending += reversed(found[name].input)
        else:
            return [], ()
    ordered = [index.graph.node[i] for i in sorted({index.order[name] for name in found})]
    operands = 1 + getattr(definition(node), "masked", False)
    return (ordered, tuple(sources)) if len(sources) == operands else ([], ())


def inside_definitions(index: GraphIndex, table: dict[str, Encoding]) -> set[str]:
    """What is computed inside of definitions, resamplings and quotients: all but their results."""
    found = set[str]()
    for node in index.graph.node:
        for known in (resampling(index, table, node), quotient(index, table, node)):
            found |= set() if known is None else known.inner
        if definition(node) is not None:
            found |= {n.output[0] for n in region(index, table, node)[0]} - set(node.output)
    return found


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


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
