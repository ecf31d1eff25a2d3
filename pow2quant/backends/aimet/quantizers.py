"""AIMET's quantizer with scales of 2^k, and what it computes them by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pow2quant.artifact import Site
from pow2quant.backends.aimet.modules import load_aimet
from pow2quant.config import TensorSpec
from pow2quant.errors import DataError, EncodingError
from pow2quant.pow2_constraints import Encoding, Format, IntGrid, Observed, choose, exact_exponent

WIDEST = 16
"""Bits of weights and activations; biases have up to 32."""


def __getattr__(name: str) -> Any:
    """Classes that derive from AIMET's exist once AIMET is imported; `pickle` finds them here."""
    if name in ("SiteQuantizer", "PowerOfTwoQuantizer"):
        return next(cls for cls in site_quantizers() if cls.__name__ == name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def site_quantizers() -> tuple[type, type]:
    """`SiteQuantizer` and `PowerOfTwoQuantizer`, AIMET's quantizer with one and with two changes."""
    load_aimet()
    from aimet_torch.quantization.affine import QuantizeDequantize
    from aimet_torch.quantization.affine.backends.torch_builtins import QuantDequantFunc
    from aimet_torch.utils import ste_round

    class SiteQuantizer(QuantizeDequantize):  # type: ignore[misc]
        """The quantizer of one site, with a scale of its own. Without an encoding, values pass unchanged.

        Parametrized with scale and offset: a free scale cannot be had back from a range to the last bit.
        """

        def __init__(
            self, site: Site, spec: TensorSpec, shape: Sequence[int], axis: int | None, block: int | None = None
        ) -> None:
            grid = IntGrid(spec.bits, spec.symmetric)
            super().__init__(tuple(shape), int(grid.qmin), int(grid.qmax), symmetric=spec.symmetric)
            self.site, self.axis, self.block, self.tap = site, axis, block, None
            self.bits, self.known_symmetric = spec.bits, spec.symmetric
            self._parametrize()
            self._forget()
            if site.role == "bias":  # its scale follows from two others'
                self.requires_grad_(False)
                self.allow_overwrite(False)

        def _parametrize(self) -> None:
            self._reparametrize_to_scale_offset()

        def _forget(self) -> None:
            for name, parameter in list(self._parameters.items()):
                self.register_quantization_parameter(name, parameter)

        def forward(self, input: Tensor) -> Tensor:
            if torch._C._get_tracing_state() or torch.onnx.is_in_onnx_export():
                return super().forward(input) if self.encoded else input
            enabled = vars(self).get("enabled", True)  # mixed precision switches it off meanwhile
            encoding = self.get_encodings() if enabled else None
            quantized = input
            if encoding is not None:
                # AIMET's arithmetic, without its shortcut to torch's fake_quantize, which multiplies by 1/scale
                scale, offset = (self._along(values, input.shape) for values in (encoding.scale, encoding.offset))
                quantized = QuantDequantFunc.apply(input, scale, offset, self.qmin, self.qmax, self.zero_point_shift)
            return quantized if self.tap is None else self.tap(self.site, input, quantized)

        def _along(self, values: Tensor, shape: Sequence[int]) -> Tensor:
            """What every block has, for each of its values."""
            if self.block is None or self.axis is None:
                return values
            inputs = 1 - self.axis
            return values.repeat_interleave(self.block, inputs).narrow(inputs, 0, shape[inputs])

        @property
        def encoded(self) -> bool:
            """Whether there is an encoding."""
            return bool(super().is_initialized())

        def is_initialized(self) -> bool:
            """Always: AIMET would choose an encoding for a parameter that has none, by itself and without a word."""
            return True

        def get_encodings(self) -> Any:
            return super().get_encodings() if self.encoded else None

        def get_scale(self, dtype: torch.dtype | None = None) -> Tensor | None:
            """AIMET's, without its lower bound of 2^-23."""
            return self.scale.abs().to(dtype or torch.float32) if self.encoded else None

        def get_min(self, dtype: torch.dtype | None = None) -> Tensor | None:
            return super().get_min(dtype) if self.encoded else None

        def get_max(self, dtype: torch.dtype | None = None) -> Tensor | None:
            return super().get_max(dtype) if self.encoded else None

        def _get_offset(self, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor | None:
            return super()._get_offset(scale, dtype) if self.encoded else None

        _allow_overwrite = property(lambda self: self.is_overwrite_allowed())  # AIMET's warns at every call

        @property
        def encoding(self) -> Encoding | None:
            """What AIMET computes with, to the last bit."""
            if not self.encoded:
                return None
            with torch.no_grad():
                now = self.get_encodings()
            shape = () if self.axis is None else (-1,) if self.block is None else self.shape
            scale, offset = (t.expand(self.shape).cpu().numpy().reshape(shape) for t in (now.scale, now.offset))
            bits = (self.qmax - self.qmin).bit_length()
            grid = IntGrid(bits, signed=self.qmin < 0, narrow=self.qmin == -self.qmax)
            return Encoding(scale, -offset.astype(np.int64), grid, self.axis, self.block)

        @encoding.setter
        def encoding(self, encoding: Encoding | None) -> None:
            if encoding is None:
                self._forget()
                return
            name, bits = self.site.name, encoding.grid.bits
            if isinstance(bits, tuple) or (bits > WIDEST and self.site.role != "bias"):
                raise EncodingError(f"{name}: the aimet backend simulates one width of 2 to {WIDEST} bits, not {bits}")
            fits = (encoding.axis is None) == (self.axis is None) and encoding.block == self.block
            if not fits or encoding.scale.size != np.prod(self.shape):
                has = f"{encoding.scale.size} scales (axis {encoding.axis}, block {encoding.block})"
                raise EncodingError(f"{name}: {has} for a quantizer of shape {self.shape}")
            self.axis, self.qmin, self.qmax = encoding.axis, int(encoding.grid.qmin), int(encoding.grid.qmax)
            self.symmetric = self.known_symmetric = encoding.symmetric
            self.bits = bits
            self._take(encoding)
            if self.encoding != encoding:
                raise EncodingError(f"{name}: AIMET would not compute with exactly this encoding: {encoding!r}")

        def _take(self, encoding: Encoding) -> None:
            with torch.no_grad():
                self.scale.copy_(torch.from_numpy(encoding.scale.copy()).view(self.shape))
                if self.offset is not None:
                    self.offset.copy_(-torch.from_numpy(encoding.zero_point.copy()).view(self.shape))

        def extra_repr(self) -> str:
            return f"{self.site.name}, {super().extra_repr()}"

    class PowerOfTwoQuantizer(SiteQuantizer):
        """Its scale is the power of two nearest to what the range [min, max] asks for, wherever the range comes from.

        The gradient is that of the unrounded scale. even: zero points are even, unless an odd one was loaded.
        """

        even = True

        def _parametrize(self) -> None:
            self._reparametrize_to_min_max()

        def get_scale(self, dtype: torch.dtype | None = None) -> Tensor | None:
            if not self.encoded:
                return None
            return constrained_scale(self).to(dtype or torch.float32)

        def _get_offset(self, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor | None:
            offset = super()._get_offset(scale, dtype)
            if offset is None or self.symmetric or not self.even:
                return offset
            return torch.clamp(2 * ste_round(offset / 2), min=1 - self.qmax)

        def set_range(self, min: Any, max: Any) -> None:
            """Takes the smallest scale that covers the range: this is where AIMET's own calibration and loading end."""
            if min is None or max is None:
                super().set_range(min, max)
                return
            self._take(covering(self, min, max, self.site.name, self.axis))

        def _take(self, encoding: Encoding) -> None:
            exact_exponent(encoding.scale, self.site.name)
            self.even = not (encoding.zero_point % 2).any()
            ends = (encoding.minimum, encoding.maximum)
            super().set_range(*(torch.from_numpy(np.asarray(v, np.float32)).view(self.shape) for v in ends))

        def get_extra_state(self) -> Any:
            return with_parity(self, super().get_extra_state())

        def set_extra_state(self, state: Any) -> None:
            super().set_extra_state(take_parity(self, state))

    for cls in (SiteQuantizer, PowerOfTwoQuantizer):
        cls.__qualname__ = cls.__name__  # found here again by `pickle`, through __getattr__
    return SiteQuantizer, PowerOfTwoQuantizer


EVEN = "pow2quant_even"
"""Whether zero points are even, in a quantizer's extra state."""


def with_parity(quantizer: Any, state: Any) -> Any:
    """A quantizer's extra state, and in it whether its zero points are even."""
    return state | {EVEN: torch.tensor(quantizer.even)} if isinstance(state, dict) else state


def take_parity(quantizer: Any, state: Any) -> Any:
    """The inverse of `with_parity`: a copy of the state as AIMET takes it, which removes keys itself.

    Zero points of a state of AIMET's are even.
    """
    if not isinstance(state, dict):
        return state
    quantizer.even = bool(state.get(EVEN, True))
    return {key: value for key, value in state.items() if key != EVEN}


def constrained_scale(quantizer: Any) -> Tensor:
    """The power of two nearest to what a quantizer's `min` and `max` ask for; its gradient is the unrounded scale's."""
    raw: Tensor = ((quantizer.max - quantizer.min) / (quantizer.qmax - quantizer.qmin)).abs().float()
    return nearest_power_of_two(raw.detach()) + (raw - raw.detach())


def covering(quantizer: Any, low: Any, high: Any, name: str, axis: int | None) -> Encoding:
    """The encoding of smallest scale 2^k that covers [low, high], on the grid of a quantizer of AIMET's.

    axis: None for one scale, else there is one for each element of `quantizer.shape`. Raises DataError for NaN.
    """
    ends = (torch.as_tensor(v, dtype=torch.float32).detach().cpu().expand(quantizer.shape) for v in (low, high))
    least, most = (v.flatten().numpy() for v in ends)
    if not (np.isfinite(least).all() and np.isfinite(most).all()):
        raise DataError(f"{name}: NaN or infinity in the calibration data")
    form = Format((quantizer.qmax - quantizer.qmin).bit_length(), quantizer.symmetric, True, axis)
    return choose("minmax", Observed(least, most, np.stack([least, most], 1)), form)


def nearest_power_of_two(x: Tensor) -> Tensor:
    """The 2^k nearest to positive float32 values on the logarithmic scale, exactly (and at least 2^-100).

    The bits of a float32 are its exponent over its fraction: adding 1 less 0x3504F4, the fraction of the first float32
    above sqrt(2), carries into the exponent from there on.
    """
    if torch._C._get_tracing_state():  # which cannot see a tensor's bits: a constant
        values = np.atleast_1d(x.clamp_min(2.0**-100).cpu().numpy()).view(np.int32)
        powers = ((values + (0x800000 - 0x3504F4)) & -0x800000).view(np.float32)
        return torch.from_numpy(powers).view(x.shape).to(x.device)
    bits = x.clamp_min(2.0**-100).view(torch.int32)
    return ((bits + (0x800000 - 0x3504F4)) & -0x800000).view(torch.float32)
