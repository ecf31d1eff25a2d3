"""Integer grids and encodings: real = scale * (q - zero_point)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import EncodingError
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN, exact_exponent, power_of_two, round_real

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

BITS = range(2, 33)
"""Legal widths of a grid."""


@dataclass(frozen=True)
class IntGrid:
    """The integers that a quantized tensor may hold.

    bits: the width, 2 to 32; or a tuple with one width per channel (bit allocation).
    signed: two's complement instead of 0 … 2^bits - 1.
    narrow: leaves out the most negative value, so that a signed grid is symmetric (-127 … 127).
    Raises EncodingError for an impossible width.
    """

    bits: int | tuple[int, ...]
    signed: bool
    narrow: bool = False

    def __post_init__(self) -> None:
        for width in self.bits if isinstance(self.bits, tuple) else (self.bits,):
            if width not in BITS:
                raise EncodingError(f"bits: {width} is not a width from {BITS[0]} to {BITS[-1]}")
        if self.narrow and not self.signed:
            raise EncodingError("narrow: only a signed grid can be narrow")

    @classmethod
    def of(cls, bits: int | Sequence[int], signed: bool, narrow: bool) -> IntGrid:
        """A grid from what files say; JSON has lists where `bits` is a tuple. Raises EncodingError."""
        return cls(bits if isinstance(bits, int) else tuple(bits), signed, narrow)

    @property
    def qmin(self) -> NDArray[np.int64]:
        """The smallest code: () or, with one width per channel, (C,)."""
        bits = np.asarray(self.bits, np.int64)
        return (-(np.int64(1) << (bits - 1)) + self.narrow) * np.int64(self.signed)

    @property
    def qmax(self) -> NDArray[np.int64]:
        """The largest code: () or (C,)."""
        bits = np.asarray(self.bits, np.int64)
        return (np.int64(1) << (bits - np.int64(self.signed))) - 1

    @property
    def width(self) -> int:
        """The largest width of all channels, in bits."""
        return int(np.max(self.bits))


@dataclass(frozen=True, eq=False)
class Encoding:
    """How a tensor is quantized: real = scale * (q - zero_point), q on `grid`.

    scale: float32, () or (C,), positive. It is a power of two unless the constraint was switched off.
    zero_point: int64, the shape of scale, on the grid.
    axis: the channel axis, or None for one scale per tensor. A weight (64, 3, 7, 7) with axis 0 has scale (64,).
    block: one scale for so many values along the input axis, which is 1 - axis, in place of one for a channel. Scale
    then has the tensor's rank, as ONNX has it: a weight (64, 48, 3, 3) with axis 0 and block 32 has (64, 2, 3, 3).
    Raises EncodingError when shapes, signs or the zero point are impossible.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]
    grid: IntGrid
    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        scale, zero_point = np.array(self.scale, np.float32, order="C"), np.asarray(self.zero_point)
        if self.block is not None:
            self._check_block(scale, zero_point)
        elif scale.ndim != (self.axis is not None):
            raise EncodingError(f"scale has shape {scale.shape}: expected {'(C,)' if self.axis is not None else '()'}")
        if isinstance(self.grid.bits, tuple) and scale.shape != (len(self.grid.bits),):
            raise EncodingError(f"{len(self.grid.bits)} widths for a scale of shape {scale.shape}")
        if zero_point.shape not in {(), scale.shape}:
            raise EncodingError(f"zero point has shape {zero_point.shape}: expected {scale.shape}")
        wrong = ~(np.isfinite(scale) & (scale > 0))
        if wrong.any():
            raise EncodingError(f"scale must be positive and finite, got {scale[wrong][0]}")
        low, high = self.grid.qmin, self.grid.qmax
        wrong = ~((zero_point >= low) & (zero_point <= high) & (zero_point == np.rint(zero_point)))
        if wrong.any():
            value, low, high = (np.broadcast_to(v, wrong.shape)[wrong][0] for v in (zero_point, low, high))
            raise EncodingError(f"zero point {value} is not an integer of the grid [{low}, {high}]")
        zero_point = np.full(scale.shape, zero_point, np.int64)
        scale.flags.writeable = zero_point.flags.writeable = False
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)

    def _check_block(self, scale: NDArray[np.float32], zero_point: NDArray[Any]) -> None:
        assert self.block is not None
        if self.block < 1 or self.axis not in (0, 1) or scale.ndim < 2:
            raise EncodingError(
                f"blocks of {self.block} with channels along axis {self.axis} and scales {scale.shape}: expected at "
                "least one value in a block, channels along axis 0 or 1, and scales of the tensor's rank"
            )
        if not self.grid.signed or zero_point.any():
            raise EncodingError("blocks: only a signed grid with zero point 0 can have one scale for each")

    def __eq__(self, other: object) -> bool:
        """Equal to the last bit."""
        if not isinstance(other, Encoding):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return (self.scale.shape, self.scale.tobytes(), self.zero_point.tobytes(), self.grid, self.axis, self.block)

    @property
    def exponent(self) -> NDArray[np.int64]:
        """The k of scale = 2^k, the shape of scale. Raises NotPowerOfTwoError when a scale is not exactly 2^k."""
        return exact_exponent(self.scale)

    @property
    def is_power_of_two(self) -> bool:
        """Whether every scale is exactly 2^k."""
        return bool((np.frexp(self.scale)[0] == 0.5).all())

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is zero on a signed grid."""
        return self.grid.signed and not self.zero_point.any()

    @property
    def minimum(self) -> NDArray[np.float64]:
        """The smallest representable real value, the shape of scale."""
        return self.scale.astype(np.float64) * (self.grid.qmin - self.zero_point)

    @property
    def maximum(self) -> NDArray[np.float64]:
        """The largest representable real value, the shape of scale."""
        return self.scale.astype(np.float64) * (self.grid.qmax - self.zero_point)

    @property
    def per_channel(self) -> Encoding:
        """An encoding without blocks that holds the same values: in units of each channel's smallest scale.

        A code of a block becomes code << (k of the block - k of the channel), so the grid is wider by the largest such
        shift. Raises NotPowerOfTwoError for free scales in blocks.
        """
        if self.block is None:
            return self
        exponent = self.exponent
        blocks = tuple(d for d in range(exponent.ndim) if d != self.axis)
        least = exponent.min(blocks)
        grid = IntGrid(self.grid.width + int((exponent.max(blocks) - least).max()), signed=True)
        return Encoding(power_of_two(least), np.zeros((), np.int64), grid, self.axis)

    def beside_scale(self, values: NDArray[Any]) -> NDArray[Any]:
        """Shapes a per-channel array (C,) for broadcasting with `scale`. A scalar stays a scalar."""
        return values if self.block is None else _along(values, self.axis, self.scale.ndim)

    def along(self, values: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """Shapes an array of scale's shape for broadcasting with a tensor of this shape: (C, 1, 1, …).

        A scalar stays a scalar; with blocks every value stands as often as its block has values.
        """
        if self.axis is None or values.ndim == 0:
            return values
        if self.block is None:
            return _along(values, self.axis, len(shape))
        repeated = np.repeat(values, self.block, 1 - self.axis)
        return np.take(repeated, range(shape[1 - self.axis]), 1 - self.axis)

    def quantize(self, x: ArrayLike, name: str = "", rounding: str = HALF_EVEN) -> NDArray[np.int64]:
        """x -> codes, rounded and saturated, as ONNX's QuantizeLinear does by default. Returns int64, the shape of x.

        name: of the tensor, for the error. Raises EncodingError for NaN, infinity, and a tensor without the channels of
        this encoding.
        """
        real = np.asarray(x, np.float32)
        if not np.isfinite(real).all():
            raise EncodingError(f"{name}{': ' if name else ''}NaN and infinity cannot be quantized")
        scale, zero_point, low, high = self._beside(real)
        with np.errstate(over="ignore"):  # the quotient is rounded in float32, as QuantizeLinear does; inf saturates
            quotient = real / scale
        codes = round_real(quotient.astype(np.float64), rounding) + zero_point  # float64 holds every 32-bit code
        return np.asarray(np.clip(codes, low, high), np.int64)

    def dequantize(self, q: ArrayLike) -> NDArray[np.float32]:
        """codes -> scale * (q - zero_point) in float32 (ONNX DequantizeLinear), the shape of q.

        Raises EncodingError for a tensor without the channels of this encoding.
        """
        codes = np.asarray(q, np.int64)
        scale, zero_point, _, _ = self._beside(codes)
        return np.asarray((codes - zero_point).astype(np.float32) * scale)

    def fake_quantize(self, x: ArrayLike) -> NDArray[np.float32]:
        """The nearest representable value: `dequantize(quantize(x))`."""
        return self.dequantize(self.quantize(x))

    def _beside(self, tensor: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Scale, zero point and the grid's ends, shaped for broadcasting with `tensor`."""
        self.check_fits(tensor.shape)
        values = (self.scale, self.zero_point, self.grid.qmin, self.grid.qmax)
        return tuple(self.along(v, tensor.shape) for v in values)

    def check_fits(self, shape: Sequence[int]) -> None:
        """Raises EncodingError where a tensor of this shape does not have the channels and blocks of this encoding."""
        if self.block is not None:
            assert self.axis is not None
            expected = block_shape(shape, self.axis, self.block)
            if self.scale.shape != expected:
                raise EncodingError(
                    f"shape {tuple(shape)} in blocks of {self.block} has scales {expected}, not {self.scale.shape}"
                )
        elif self.axis is not None and tuple(shape[self.axis :][:1]) != self.scale.shape:
            raise EncodingError(f"shape {tuple(shape)} has no {self.scale.size} channels along axis {self.axis}")


def block_shape(shape: Sequence[int], axis: int, block: int) -> tuple[int, ...]:
    """The shape of the scales of a tensor in blocks along 1 - axis, of which the last may be shorter."""
    return tuple(-(-n // block) if d == 1 - axis else n for d, n in enumerate(shape))


def _along(values: NDArray[Any], axis: int | None, ndim: int) -> NDArray[Any]:
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
