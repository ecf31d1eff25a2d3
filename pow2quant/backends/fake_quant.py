"""Fake quantization in torch: lean, in place where nobody looks, bit-identical to `Encoding.fake_quantize`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.artifact import Site
from pow2quant.backends.base import Tap
from pow2quant.pow2_constraints import Encoding

Bound = float | Tensor

Scale = float | Tensor
"""A number, or one per channel, shaped for broadcasting."""


class _StraightThrough(torch.autograd.Function):
    """Rounds and saturates; the gradient passes where nothing was saturated (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constants: _Constants) -> Tensor:
        codes = constants.codes(x)
        inside = (codes >= constants.low) & (codes <= constants.high)
        ctx.save_for_backward(inside)
        return constants.finish(codes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


class _Constants:
    """An encoding's numbers as tensors on one device, shaped for broadcasting.

    scale, inverse: () or (C, 1, …); low, high: the grid's ends less the zero point.
    """

    def __init__(self, encoding: Encoding, ndim: int, device: torch.device) -> None:
        def tensor(values: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(np.array(encoding.along(values, ndim), np.float32)).to(device)

        def bound(values: np.ndarray[Any, Any]) -> Bound:
            return float(values) if values.ndim == 0 else tensor(values)

        self.device, self.ndim = device, ndim
        self.scale = tensor(encoding.scale)
        self.inverse = tensor(1 / encoding.scale) if encoding.is_power_of_two else None
        self.low = bound(encoding.grid.qmin - encoding.zero_point)
        self.high = bound(encoding.grid.qmax - encoding.zero_point)

    def codes(self, x: Tensor) -> Tensor:
        """Rounded x / scale, a new tensor (times 2^-k where the scale is 2^k: the same bits, faster)."""
        return (x * self.inverse if self.inverse is not None else x / self.scale).round_()

    def finish(self, codes: Tensor) -> Tensor:
        """Saturates and rescales in place."""
        return codes.clamp_(self.low, self.high).mul_(self.scale)  # type: ignore[arg-type]

    def overwrite(self, x: Tensor) -> Tensor:
        """The same, written over x."""
        (x.mul_(self.inverse) if self.inverse is not None else x.div_(self.scale)).round_()
        return self.finish(x)


class FakeQuantize(nn.Module):
    """The quantizer of one site. Without an encoding, or with `encoding = None`, values pass unchanged.

    site: what it quantizes. overwrites: the incoming tensor is a fresh result that nobody else reads, so that inference
    may quantize it in place. caches: it is a parameter, whose quantized value is kept for inference until the parameter
    is written (PyTorch counts the writes; those through `.data` it does not see) or the encoding changes.
    """

    def __init__(self, site: Site, *, overwrites: bool = False, caches: bool = False) -> None:
        super().__init__()
        self.site, self.overwrites, self.caches = site, overwrites, caches
        self._kept: tuple[Any, Tensor] | None = None
        self.tap: Tap | None = None
        self._encoding: Encoding | None = None
        self._constants: _Constants | None = None

    @property
    def encoding(self) -> Encoding | None:
        """The current encoding."""
        return self._encoding

    @encoding.setter
    def encoding(self, encoding: Encoding | None) -> None:
        self._encoding, self._constants, self._kept = encoding, None, None

    def forward(self, x: Tensor) -> Tensor:
        if self._encoding is None:
            return x if self.tap is None else self.tap(self.site, x, x)
        constants = self._constants
        if constants is None or constants.device != x.device or constants.ndim != x.ndim:
            constants = self._constants = _Constants(self._encoding, x.ndim, x.device)
        if torch.is_grad_enabled() and x.requires_grad:
            quantized: Tensor = _StraightThrough.apply(x, constants)
        elif self.caches and self.tap is None and not (x.is_inference() or torch.is_inference_mode_enabled()):
            quantized = self._cached(x, constants)
        elif self.overwrites and self.tap is None and not x.requires_grad:
            return constants.overwrite(x)
        else:
            quantized = constants.finish(constants.codes(x))
        return quantized if self.tap is None else self.tap(self.site, x, quantized)

    def _cached(self, x: Tensor, constants: _Constants) -> Tensor:
        key = (x.data_ptr(), x._version, x.shape)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, constants.finish(constants.codes(x)))
        return self._kept[1]

    def extra_repr(self) -> str:
        return f"{self.site.name}: {self._encoding}"


# -- scales that are learned -------------------------------------------------------------------------------------------


def fake_quantize(x: Tensor, scale: Scale, low: float, high: float) -> Tensor:
    """scale * clip(round(x / scale), low, high), half to even. x: any shape; low, high: grid less zero point."""
    return (x * (1 / scale)).round_().clamp_(low, high).mul_(scale)


def input_gradient(grad: Tensor, x: Tensor, scale: Scale, low: float, high: float) -> Tensor:
    """dL/dx: the incoming gradient where nothing saturates, elsewhere 0 (LSQ, Esser et al. 2020, eq. 5)."""
    ends: tuple[Any, Any] = ((low - 0.5) * scale, (high + 0.5) * scale)
    if isinstance(scale, float):
        passed: Tensor = torch.ops.aten.hardtanh_backward(grad, x, *ends)
        return passed
    passed = grad * ((x > ends[0]) & (x < ends[1]))
    return passed


def scale_gradient(grad: Tensor, x: Tensor, quantized: Tensor, passed: Tensor, axis: int | None) -> Tensor:
    """scale * dL/dscale, summed over what shares the scale: () or, along a channel axis, (C,).

    Where nothing saturates, the derivative of the quantized value is round(x/s) - x/s, elsewhere the saturated code
    (LSQ, eq. 3). Times s and the incoming gradient that is grad * quantized - passed * x, where `passed` is
    `input_gradient`: two sums of products, without a further tensor.
    """
    if axis is None:
        return _dot(grad, quantized) - _dot(passed, x)
    return (grad * quantized - passed * x).sum([d for d in range(x.ndim) if d != axis])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products, without a copy where both are contiguous or both hold channels last."""
    if a.dtype is torch.bfloat16:
        return (a * b).sum(dtype=torch.float32)
    if a.ndim == 4 and not a.is_contiguous():
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.flatten(), b.flatten())


class _Learned(torch.autograd.Function):
    """`learned`, as PyTorch wants it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameter: Tensor, scale: Scale, ends: tuple[float, float], axis: int | None, slope: Any
    ) -> Tensor:
        quantized = fake_quantize(x, scale, *ends)
        ctx.save_for_backward(x, quantized)
        ctx.options = scale, ends, axis, slope
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, quantized = ctx.saved_tensors
        scale, ends, axis, slope = ctx.options
        passed = input_gradient(grads[0], x, scale, *ends)
        own = slope * scale_gradient(grads[0], x, quantized, passed, axis) if ctx.needs_input_grad[1] else None
        return passed, own, None, None, None, None


def learned(
    x: Tensor, parameter: Tensor, scale: Scale, ends: tuple[float, float], axis: int | None, slope: Any
) -> Tensor:
    """`fake_quantize` with these gradients; the parameter's is slope * scale * dL/dscale.

    parameter: what the scale follows from, () or along a channel axis (C,). slope: a number, or (C,).
    """
    quantized: Tensor = _Learned.apply(x, parameter, scale, ends, axis, slope)
    return quantized
