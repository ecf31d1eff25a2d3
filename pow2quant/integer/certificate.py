"""What can be proved about a quantized network without running it: how large every accumulator gets.

With power-of-two scales every value of a layer's sum is an integer in units of s_in * s_w, and float32 holds integers
up to 2^24 exactly. `certify` follows these integers through the graph. A layer is *proved* when no partial sum, in
any order of summation and with the bias first or last, can leave [-2^24, 2^24]: then float32 (with or without fused
multiply-add) and int32 give the same sum, scaling it to the output's units is exact, and what is left is one
rounding, half to even. Where all computing nodes are proved, all executors that compute sums of products give equal
bits. Outside the proof: Winograd and FFT convolutions, which compute other sums, TF32 and bfloat16.

Averages. A mean of n codes is S / n with an exact sum S. Executors divide by n or multiply by float32(1 / n), and may
add the zero point before they round. With t = S * 2^(k_in - k_out) / n, the quotient in units of the output's scale:

- a t that is no tie lies at least 1 / (2 n 2^D) from one, D = max(0, k_out - k_in), because 2 n 2^D t is an integer.
  Three float32 roundings move it by less than |t| * 2^-22, so it stays on its side while n 2^D |t| <= 2^21, and |t|
  need only be followed up to where the grid saturates;
- a t that is a tie is a half-integer, exact in float32, so a division hits it. The product with the rounded reciprocal
  may miss it (7 values on 8 bits with k_out = k_in + 1: onnxruntime's QLinearGlobalAveragePool misses 39 ties). A
  grid has few ties, so each is tried; scaling by powers of two commutes with rounding, so one trial serves everyone.

Resampling is an exact sum of products with whole numbers and a Div node, so the first of these two arguments is enough;
by a power of two nothing is rounded. So it is for the quotient of two codes, with n the largest divisor: one that is a
tie is exact in float32.

Functions with an integer definition (`pow2quant.functions`). Softmax sums N table entries of m bits: N 2^m <= 2^24.
One of them is 2^m, so the reciprocal r = floor(2^R / S) is at most 2^(R - m), and E r <= 2^R. The Floor behind the
rounded division gives r: a quotient below an integer M is so by at least 1 / S >= M / (2^R + 1), and half an ulp there
is at most (M - 1) 2^-p, p = 24 in float32 (R = 24) and 53 in float64 (R <= 40); with M <= 2^(R - m) that is less.

LogSoftmax compares the same sum with integers, which is exact, and adds integers of at most 2^24.

Rounding after the zero point was added breaks ties the other way when the zero point is odd. The fused Add, Mul and
AveragePool of onnxruntime 1.31 do so (measured; its convolution, concatenation, global average and matrix product do
not), hence an odd zero point behind these operations is not proved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import NotPowerOfTwoError
from pow2quant.functions import inside_definitions
from pow2quant.integer.lattice import FLOAT64_EXACT, Lattice, NotProvedError
from pow2quant.integer.proof import INT32_MAX, WEIGHTED, Tensors, bias_rows, judge, partial_sums, rows_of

if TYPE_CHECKING:
    import onnx

    from pow2quant.artifact import Artifact


@dataclass(frozen=True)
class LayerBound:
    """What is known of one computing node.

    accumulator_max: the largest magnitude that any partial sum can reach, in units of s_in * s_w, over all channels;
        at most sum(|w_q|) * max|x_q - z| + |b_q|, and less where the input's grid is not symmetric. None: unknown.
        Hardware that sums q_x instead of q_x - z, with z folded into the bias, has other partial sums.
    raw_per_channel: the largest magnitude of those, for every output channel; () where the node has no constant weight
        or something about it is unknown.
    bits: the width of a signed accumulator that holds it. per_channel: accumulator_max of every output channel.
    proved: every executor's result is the same. int32_safe: no partial sum leaves int32.
    shift: k_out - (k_in + k_w), the right shift to the output's codes: an int, or a tuple with one per channel where
        they differ; None without an output encoding. reason: why it is not proved, or "".
    proved_integers: the `custom` simulation, the integer engine and C give the same result: where float32 does not hold
        the sums, the simulation computes them in float64, and C with the accumulator that `bits` asks for.
    """

    node: str
    op: str
    tensor: str
    accumulator_max: int | None
    bits: int | None
    proved: bool
    proved_integers: bool
    int32_safe: bool
    shift: int | tuple[int, ...] | None
    reason: str
    per_channel: tuple[int, ...]
    raw_per_channel: tuple[int, ...]

    def channels(self) -> dict[str, list[int] | list[bool] | None]:
        """What holds for every output channel, in JSON's types; None where it is unknown.

        raw_accumulator_max, raw_bits: for hardware that sums raw codes q_x and folds the zero point into the bias.
        """
        sums, raw, shift = list(self.per_channel), list(self.raw_per_channel), self.shift
        return {
            "accumulator_max": sums or None,
            "bits": [m.bit_length() + 1 for m in sums] or None,
            "int32_safe": [m <= INT32_MAX for m in sums] or None,
            "shift": None if shift is None else list(shift) if isinstance(shift, tuple) else [shift] * len(sums),
            "raw_accumulator_max": raw or None,
            "raw_bits": [m.bit_length() + 1 for m in raw] or None,
            "raw_int32_safe": [m <= INT32_MAX for m in raw] or None,
        }


@dataclass(frozen=True)
class Certificate:
    """What is proved of a network: one `LayerBound` per computing node, in the order of computation.

    Nodes that only move or compare values (MaxPool, Flatten, Concat, Relu, Pad, …) are exact by nature and not listed.
    """

    layers: tuple[LayerBound, ...]

    @property
    def proved(self) -> bool:
        """Whether every computing node is proved: all executors must agree to the last bit."""
        return all(layer.proved for layer in self.layers)

    @property
    def proved_integers(self) -> bool:
        """Whether the simulation, the integer engine and C must agree to the last bit."""
        return all(layer.proved_integers for layer in self.layers)

    @property
    def unproved(self) -> tuple[str, ...]:
        """The names of the nodes that are not proved."""
        return tuple(layer.node for layer in self.layers if not layer.proved)

    @property
    def sentence(self) -> str:
        """The certificate in one line; layers are the nodes with a weight."""
        layers = [layer for layer in self.layers if layer.op in WEIGHTED]
        others = [layer for layer in self.layers if layer.op not in WEIGHTED]
        parts = [f"{sum(b.proved for b in layers)} of {len(layers)} layers proved exact in float32"]
        if others:
            parts[0] += f", {sum(b.proved for b in others)} of {len(others)} other operations"
        if wider := sum(b.proved_integers and not b.proved for b in self.layers):
            parts.append(f"{wider} more between the simulation in float64, the integer engine and C")
        if known := [layer for layer in layers if layer.accumulator_max is not None]:
            largest = max(known, key=lambda b: b.accumulator_max or 0)
            parts.append(f"largest accumulator {largest.bits} bits ({largest.node})")
        if layers:
            rest = [layer.node for layer in layers if layer.accumulator_max is None]
            unsafe = [layer.node for layer in known if not layer.int32_safe]
            if unsafe:
                parts.append(f"int32 may overflow in {_enumerate(unsafe)}")
            elif known:
                parts.append("int32 cannot overflow" + (" in the others" if rest else ""))
            if rest:
                parts.append(f"no integers on the 2^k grid in {_enumerate(rest)}")
        return "; ".join(parts)

    def to_json(self, per_channel: bool = False) -> dict[str, Any]:
        """The certificate in JSON's types: `proved`, `sentence`, and an entry per node.

        per_channel: with `channels` in every entry, see `LayerBound.channels` (certificate.json).
        """
        layers = [{k: v for k, v in vars(layer).items() if not k.endswith("per_channel")} for layer in self.layers]
        if per_channel:
            layers = [entry | {"channels": layer.channels()} for entry, layer in zip(layers, self.layers, strict=True)]
        return {
            "proved": self.proved,
            "proved_integers": self.proved_integers,
            "sentence": self.sentence,
            "layers": layers,
        }


def certify(artifact: Artifact) -> Certificate:
    """Bounds every accumulator of a network and says which nodes are proved."""
    tensors = Tensors(artifact)
    inner = inside_definitions(tensors.index, tensors.encodings)
    nodes = [node for node in artifact.model.graph.node if node.output[0] not in inner]
    bounds = [_follow(tensors, node) for node in nodes]
    wider: list[LayerBound | None] = bounds
    if not all(bound is None or bound.proved for bound in bounds):
        wide = Tensors(artifact, FLOAT64_EXACT)
        wider = [_follow(wide, node) for node in nodes]
    pairs = zip(bounds, wider, strict=True)
    return Certificate(tuple(replace(b, proved_integers=w is None or w.proved) for b, w in pairs if b is not None))


def _follow(tensors: Tensors, node: onnx.NodeProto) -> LayerBound | None:
    """Judges a node and notes where its results lie. None for nodes that only move values."""
    accumulator: Lattice | None
    result: Lattice | None
    try:
        accumulator, result = judge(tensors, node)
        reason = "" if accumulator is None else tensors.rounds_otherwise(node)
    except NotProvedError as error:
        accumulator, result, reason = error.accumulator, None, str(error)
    tensors.float_results.update(dict.fromkeys(node.output, result))
    if accumulator is None and not reason:
        return None
    magnitudes = () if accumulator is None else tuple(int(m) for m in accumulator.magnitude.ravel())
    largest = max(magnitudes, default=None)
    return LayerBound(
        node=node.name or node.output[0],
        op=node.op_type,
        tensor=node.output[0],
        accumulator_max=largest,
        bits=None if largest is None else largest.bit_length() + 1,
        proved=not reason,
        proved_integers=False,
        int32_safe=largest is not None and largest <= INT32_MAX,
        shift=_shift(tensors, node, accumulator),
        reason=reason,
        per_channel=magnitudes,
        raw_per_channel=_raw(tensors, node),
    )


def _raw(tensors: Tensors, node: onnx.NodeProto) -> tuple[int, ...]:
    """The largest magnitude of sums of w * q_x with the bias b - z * sum(w), for every output channel."""
    if node.op_type not in WEIGHTED:
        return ()
    data, weight = node.input[:2]
    if data in tensors.constants:
        data, weight = weight, data
    encoding = tensors.encodings.get(data)
    if encoding is None or encoding.axis is not None or weight not in tensors.constants.keys() & tensors.encodings:
        return ()
    low, high, zero = (int(v) for v in (encoding.grid.qmin, encoding.grid.qmax, encoding.zero_point))
    try:
        codes = Lattice(encoding.exponent, *(np.asarray(end, np.float64) for end in (min(low, 0), max(high, 0))))
        exponents, integers = (rows_of(node, values, weight) for values in tensors.on_grid(weight))
        unit = np.min([k.min(1) for k in exponents], axis=0).astype(np.int64)
        sums = []
        for n, k in zip(integers, exponents, strict=True):
            products = Lattice(encoding.exponent + unit, *partial_sums(n, k - unit[:, None], codes))
            folded = -zero * np.ldexp(n.astype(np.float64), k - unit[:, None]).sum(1)
            if len(node.input) > 2 and node.input[2]:
                folded = folded + bias_rows(tensors, node.input[2], products)
            sums.append(np.atleast_2d((products + Lattice.of_integers(products.exponent, folded)).magnitude).max(0))
    except (NotProvedError, NotPowerOfTwoError):
        return ()
    return tuple(int(m) for m in np.max(sums, axis=0))


def _shift(tensors: Tensors, node: onnx.NodeProto, accumulator: Lattice | None) -> int | tuple[int, ...] | None:
    target = tensors.target(node.output[0])
    if accumulator is None or target is None or target.scale.ndim or not target.is_power_of_two:
        return None
    shifts = tuple(int(k) for k in (target.exponent - accumulator.exponent).ravel())
    return shifts[0] if len(set(shifts)) == 1 else shifts


def _enumerate(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
