"""A quantized network as integers: tensors of codes, and steps that compute codes from codes.

Both consumers, the engine (`run.py`) and the C writer (`emit_c.py`), read the same program. It is made from an artifact
by `lower.py`, and so from any QDQ file whose scales are powers of two. Shapes are those of one sample: the batch, the
first dimension of every tensor of the network, is left to the executor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN, power_of_two, requantize, round_real

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding

    Ints = NDArray[np.int64]
    Codes = NDArray[np.integer]

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of codes: real = 2^exponent * (q - zero), low <= q <= high.

    name: the ONNX tensor's, or one with a suffix for what lowering adds. shape: of one sample.
    constant: the codes where the network does not compute them; `shape` is then theirs.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    constant: Ints | None = None

    @property
    def exponent(self) -> int:
        return int(self.encoding.exponent)

    @property
    def zero(self) -> int:
        """The code of real zero."""
        return int(self.encoding.zero_point)

    @property
    def low(self) -> int:
        return int(self.encoding.grid.qmin)

    @property
    def high(self) -> int:
        return int(self.encoding.grid.qmax)

    @property
    def size(self) -> int:
        """The number of codes of one sample."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """The narrowest type of 8, 16 or 32 bits that holds the grid."""
        return storage(self.low, self.high)

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest q - zero."""
        return self.low - self.zero, self.high - self.zero

    @property
    def magnitude(self) -> int:
        """The largest |q - zero|."""
        low, high = self.ends
        return max(high, -low)


def storage(low: int, high: int) -> np.dtype[np.integer]:
    """The narrowest integer type of 8, 16, 32 or 64 bits that holds [low, high]; unsigned where nothing is negative."""
    for bits in (8, 16, 32, 64):
        kind = np.dtype(f"{'u' if low >= 0 else ''}int{bits}")
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return kind
    raise ValueError(f"no integer type holds [{low}, {high}]")


@dataclass(frozen=True, eq=False)
class Requantization:
    """How a step's accumulator becomes codes: round(accumulator / 2^shift) + zero, clipped to [low, high].

    shift: () or one per output channel (C,), k_out - k_accumulator; negative multiplies. low, high: the output's grid,
    narrowed by the ReLU or clip that is fused. rounding: a rule of `arithmetic.ROUNDINGS`.
    """

    shift: Ints
    zero: int
    low: int
    high: int
    rounding: str = HALF_EVEN

    def __call__(self, accumulator: NDArray[Any], channel_axis: int | None = None) -> Codes:
        """Codes of an accumulator of any shape; `channel_axis`: along which `shift` counts, from the end.

        accumulator: integers, of int64 or of the type that `exact_kind` gives for them.
        """
        shift = self.shift
        if shift.ndim:
            assert channel_axis is not None
            assert channel_axis < 0
            shift = shift.reshape(-1, *[1] * (-1 - channel_axis))
        if accumulator.dtype.kind == "f":
            if np.abs(shift).max() < 64 and max(-self.low, self.high, abs(self.zero)) < 2**23:  # all below is exact
                real = round_real(accumulator * power_of_two(-shift), self.rounding, shift)
                return np.asarray(np.clip(real + self.zero, self.low, self.high), storage(self.low, self.high))
            accumulator = accumulator.astype(np.int64)
        return requantize(accumulator, shift, self.zero, self.low, self.high, self.rounding)


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of a program: codes in, codes out.

    node: the ONNX node it comes from. inputs, output: names of tensors.
    """

    node: str
    inputs: tuple[str, ...]
    output: str

    @property
    def rule(self) -> Requantization | None:
        """How its accumulator becomes codes; None where codes are looked up, or moved part by part."""
        found: Requantization | None = getattr(self, "requantization", None)
        return found

    def refused(self, why: str) -> UnsupportedModelError:
        """The error of a format that has no such step."""
        return UnsupportedModelError(f"{self.node}: {why}")

    def run(self, program: Program, *inputs: Codes) -> Codes:
        """The output's codes from the inputs' codes (N, *shape), constants without N.

        In any integer type, and any shape of N samples: the engine gives them those of the output.
        """
        raise NotImplementedError

    def bound(self, program: Program) -> int:
        """The largest magnitude that any intermediate integer of the reference arithmetic can have."""
        return max(program.tensors[name].magnitude for name in self.inputs)

    def work(self, program: Program) -> int:
        """Multiply-accumulates of one sample, or what else is done to every code."""
        return program.tensors[self.output].size

    def emit_c(self, layer: Any) -> str:
        """The body of the step's function in C; empty where the output shares the input's memory.

        layer: a `c_layer.Layer`, which writes what steps have in common.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Program:
    """A network in integers.

    tensors: every tensor by name, the constants among them. inputs, outputs: names, in the network's order.
    steps: in an order in which every tensor is computed before it is read. pixels: whether the input's codes are an
    image's bytes as a camera gives them. states: of a program that is one step of a sequence, the last inputs, each
    with the output that is its next value; these are the last outputs.
    """

    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    pixels: bool = False
    states: tuple[tuple[str, str], ...] = ()

    @cached_property
    def kinds(self) -> Mapping[Step, np.dtype[np.generic]]:
        """The fastest type in which each step's sums of products are exact."""
        return {step: exact_kind(step.bound(self)) for step in self.steps}

    @property
    def work(self) -> int:
        """Multiply-accumulates of one sample."""
        return sum(step.work(self) for step in self.steps)


def largest_sum(weight: Ints, bias: Ints, x: Tensor) -> int:
    """The largest magnitude of any partial sum of w * (q - zero), in any order, with the bias.

    weight: (C, …), a row for each result; bias: (C,). It is the certificate's `accumulator_max`.
    """
    rows = weight.reshape(len(weight), -1)
    up, down = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
    low, high = x.ends
    most = up * high + down * low + np.maximum(bias, 0)
    least = up * low + down * high + np.minimum(bias, 0)
    return int(max(most.max(), -least.min()))


def exact_kind(bound: int) -> np.dtype[np.generic]:
    """The fastest type in which sums of products of integers, none beyond `bound`, are exact in any order."""
    return np.dtype(np.float32 if bound <= 2**24 else np.float64 if bound <= 2**53 else np.int64)


def broadcast(program: Program, names: tuple[str, ...], inputs: tuple[Codes, ...]) -> list[Codes]:
    """Operands (N, *shape) and constants, the latter with a batch of one where they have as many dimensions.

    Operands of fewer dimensions broadcast from the right, as in ONNX.
    """
    computed = [program.tensors[name].constant is None for name in names]
    rank = max(x.ndim for x, is_computed in zip(inputs, computed, strict=True) if is_computed)
    lead = [x.shape[:1] if is_computed else () for x, is_computed in zip(inputs, computed, strict=True)]
    return [
        x if x.ndim >= rank else x.reshape(*n, *[1] * (rank - x.ndim), *x.shape[len(n) :])
        for x, n in zip(inputs, lead, strict=True)
    ]


def on_one_scale(program: Program, step: Step, inputs: tuple[Codes, ...], shifts: tuple[int, ...]) -> list[Any]:
    """Operands less their zero points, each shifted to the left, so that all have one scale; broadcast.

    In the type in which integers up to the step's bound are exact.
    """
    kind = program.kinds[step]
    operands = zip(broadcast(program, step.inputs, inputs), step.inputs, shifts, strict=True)
    return [
        (x.astype(kind) - kind.type(program.tensors[name].zero)) * kind.type(1 << shift) for x, name, shift in operands
    ]
