"""Fake quantization in torch: lean, in place where the input is free, bit-identical to `Encoding.fake_quantize`.

On a GPU `kernels` computes the same in one pass, where Triton can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.artifact import Site
from pow2quant.backends.base import Tap
from pow2quant.backends.target_rounding import TargetRounding
from pow2quant.pow2_constraints import Encoding

Bound = float | Tensor

Scale = float | Tensor
"""A number, as such or as a tensor (), or one for each row of (rows, values), (rows, 1)."""


def fused(x: Tensor) -> ModuleType | None:
    """The module `kernels` where it computes for x; None: the plain code does."""
    if x.device.type != "cuda" or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return None
    return _kernels(x.device) if x.numel() else None


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    try:
        from pow2quant.backends import kernels

        kernels.check(device)
    except Exception as error:  # of Triton, of the compiler that it calls, or of the driver
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"{device}: quantizers are slower, as Triton fails: {type(error).__name__}: {reason}", stacklevel=2
        )
        return None
    return kernels


class _StraightThrough(torch.autograd.Function):
    """Rounds and saturates; the gradient passes where nothing was saturated (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constants: _Constants) -> Tensor:
        quantized, inside = constants.marked(x)
        ctx.save_for_backward(inside)
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


class _Constants:
    """An encoding's numbers as tensors on one device, shaped for broadcasting.

    shape: of what is quantized. scale, inverse: () or (C, 1, …), or this shape where there are blocks.
    low, high: the grid's ends less the zero point. rounding: None for half to even.
    """

    def __init__(
        self, encoding: Encoding, shape: Sequence[int], device: torch.device, rounding: TargetRounding | None = None
    ) -> None:
        def tensor(values: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(np.array(encoding.along(values, shape), np.float32)).to(device)

        def bound(values: np.ndarray[Any, Any]) -> Bound:
            return float(values) if values.ndim == 0 else tensor(values)

        self.device, self.ndim, self.encoding, self.rounding = device, len(shape), encoding, rounding
        self.scale = tensor(encoding.scale)
        self.inverse = tensor(1 / encoding.scale) if encoding.is_power_of_two else None
        self.low = bound(encoding.grid.qmin - encoding.zero_point)
        self.high = bound(encoding.grid.qmax - encoding.zero_point)

    def codes(self, x: Tensor) -> Tensor:
        """Rounded x / scale, a new tensor (times 2^-k where the scale is 2^k: the same bits, faster)."""
        quotient = x * self.inverse if self.inverse is not None else x / self.scale
        return quotient.round_() if self.rounding is None else self.rounding(quotient, self.encoding)

    def finish(self, codes: Tensor) -> Tensor:
        """Saturates and rescales in place."""
        return codes.clamp_(self.low, self.high).mul_(self.scale)  # type: ignore[arg-type]

    def quantize(self, x: Tensor) -> Tensor:
        """x on the grid, a new tensor."""
        run = self._fused(x)
        return self.finish(self.codes(x)) if run is None else run(torch.empty_like(x))

    def marked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`quantize`, and where nothing saturates."""
        run = self._fused(x)
        if run is not None:
            inside = torch.empty_like(x, dtype=torch.bool)
            return run(torch.empty_like(x), inside), inside
        codes = self.codes(x)
        inside = (codes >= self.low) & (codes <= self.high)
        return self.finish(codes), inside

    def overwrite(self, x: Tensor) -> Tensor:
        """The same, written over x where it can be."""
        run = self._fused(x)
        if run is not None:
            return run(x)
        if self.rounding is not None:
            return self.finish(self.codes(x))
        (x.mul_(self.inverse) if self.inverse is not None else x.div_(self.scale)).round_()
        return self.finish(x)

    def _fused(self, x: Tensor) -> Callable[..., Tensor] | None:
        """(out, inside) -> out, written by one kernel; None where the plain code has to compute."""
        kernels = fused(x) if x.dtype is torch.float32 else None
        rule = "half_even" if self.rounding is None else self.rounding.rule
        if (
            kernels is None
            or rule not in kernels.RULES
            or (self.rounding is not None and self.rounding.unit is not None)
        ):
            return None
        inner = kernels.inner_of(x, self.scale, self.encoding.axis)
        if inner is None:
            return None
        scale, *ends = (t.flatten() if isinstance(t, Tensor) else t for t in (self.scale, self.low, self.high))

        def run(out: Tensor, inside: Tensor | None = None) -> Tensor:
            divides = self.inverse is None
            kernels.fake_quantize(x, out, scale, *ends, inner, divides=divides, rule=rule, inside=inside)
            return out

        return run


def _straight_through(x: Tensor, constants: _Constants) -> Tensor:
    if torch._C._get_tracing_state():  # which knows no functions of Python's
        return constants.finish(constants.codes(x))
    quantized: Tensor = _StraightThrough.apply(x, constants)
    return quantized


class FakeQuantize(nn.Module):
    """The quantizer of one site. Without an encoding, or with `encoding = None`, values pass unchanged.

    site: what it quantizes. overwrites: the incoming tensor is a fresh result without other readers, so that inference
    may quantize it in place. caches: it is a parameter, whose quantized value is kept for inference on the CPU while
    the parameter holds the same values, however it is written, and the encoding stays. rounding: that of the target
    where it is not half to even; training with learned scales rounds half to even all the same.
    """

    def __init__(
        self, site: Site, *, overwrites: bool = False, caches: bool = False, rounding: TargetRounding | None = None
    ) -> None:
        super().__init__()
        self.site, self.overwrites, self.caches, self.rounding = site, overwrites, caches, rounding
        self._kept: tuple[Tensor, Tensor] | None = None
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f'{error}; AIMET\'s functions need backend="aimet"') from None

    def forward(self, x: Tensor) -> Tensor:
        quantized = x if self._encoding is None else self._quantized(x, self._encoding)
        if x.dtype is torch.float64:  # sums that float32 may not hold
            quantized = quantized.float()
        if self.tap is None:
            return quantized
        return self.tap(self.site, x.float() if x.dtype is torch.float64 else x, quantized)

    def _quantized(self, x: Tensor, encoding: Encoding) -> Tensor:
        constants = self._constants
        if constants is None or constants.device != x.device or constants.ndim != x.ndim:
            constants = self._constants = _Constants(encoding, x.shape, x.device, self.rounding)
        if (torch.is_grad_enabled() and x.requires_grad) or torch._C._get_tracing_state():
            return _straight_through(x, constants)
        if self.caches and self.tap is None and x.device.type == "cpu" and not x.is_inference():
            return self._cached(x, constants)
        if self.overwrites and self.tap is None and not x.requires_grad:
            return constants.overwrite(x)
        return constants.quantize(x)

    def _cached(self, x: Tensor, constants: _Constants) -> Tensor:
        # Comparing values costs a third of quantizing them; PyTorch's count of writes misses those through `.data`.
        if self._kept is None or not torch.equal(self._kept[0], x):
            with torch.inference_mode(False), torch.no_grad():  # kept for training, too
                self._kept = (x.detach().clone(), constants.quantize(x))
        return self._kept[1]

    def extra_repr(self) -> str:
        return f"{self.site.name}: {self._encoding}"


# -- scales that are learned -------------------------------------------------------------------------------------------

BLOCK = 1 << 17
"""Values that are worked on at a time: they stay in a core's cache from the first operation to the last."""


def power(k: Tensor) -> Tensor:
    """2^k exactly, float32, for whole k in [-126, 127]."""
    return ((k.int() + 127) << 23).view(torch.float32)


def fake_quantize(x: Tensor, scale: Scale, low: float, high: float, out: Tensor | None = None) -> Tensor:
    """scale * clip(round(x / scale), low, high), half to even. x: any shape; low, high: grid less zero point."""
    return torch.mul(x, 1 / scale, out=out).round_().clamp_(low, high).mul_(scale)


def input_gradient(grad: Tensor, x: Tensor, scale: Scale, low: float, high: float, out: Tensor) -> Tensor:
    """dL/dx: the incoming gradient where nothing saturates, elsewhere 0 (LSQ, Esser et al. 2020, eq. 5)."""
    ends = low - 0.5, high + 0.5
    if isinstance(scale, float):
        ends = ends[0] * scale, ends[1] * scale
    else:
        x = x * (1 / scale)
    return torch.ops.aten.hardtanh_backward.grad_input(grad, x, *ends, grad_input=out)  # type: ignore[no-any-return]


def scale_gradient(grad: Tensor, x: Tensor, quantized: Tensor, passed: Tensor) -> Tensor:
    """scale * dL/dscale of every row of (rows, values), (rows,).

    Where nothing saturates, the derivative of the quantized value is round(x/s) - x/s, elsewhere the saturated code
    (LSQ, eq. 3). Times s and the incoming gradient that is grad * quantized - passed * x, with `input_gradient`.
    """
    if len(x) == 1 and x.dtype is not torch.bfloat16:
        return torch.dot(grad[0], quantized[0]).sub_(torch.dot(passed[0], x[0])).view(1)
    return (grad * quantized).addcmul_(passed, x, value=-1).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))


def _blocks(scale: Scale, *tensors: Tensor) -> Iterable[tuple[Any, ...]]:
    """The scale, and views of tensors laid out alike, in blocks of (rows, values), one scale a row; off CPUs in one."""
    if tensors[0].ndim == 4 and not tensors[0].is_contiguous():
        tensors = tuple(t.permute(0, 2, 3, 1) for t in tensors)
    whole = isinstance(scale, float) or not scale.ndim
    rows = [t.view(1 if whole else len(t), -1) for t in tensors]
    scales = scale if isinstance(scale, float) else scale.view(-1, 1)
    if rows[0].numel() <= BLOCK or rows[0].device.type != "cpu":
        return ((scales, *rows),)
    if isinstance(scales, float):
        return ((scales, *views) for views in zip(*(t.split(BLOCK, 1) for t in rows), strict=True))
    size = max(1, BLOCK // rows[0].shape[1])
    return zip(*(t.split(size) for t in (scales, *rows)), strict=True)


def _dense(x: Tensor) -> Tensor:
    """x without gaps, in one of the two layouts that convolutions know."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


class _Learned(torch.autograd.Function):
    """`learned`, as PyTorch wants it; scales are numbers, or stand along the first axis."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parameter: Tensor,
        scale: Scale,
        ends: tuple[float, float],
        slope: Any,
        top: float | None,
    ) -> Tensor:
        quantized = torch.empty_like(x)
        kernels = fused(x)
        if kernels is not None:
            scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device).contiguous()
            kernels.fake_quantize(x, quantized, scale, *ends, x.numel() // scale.numel(), top=top)
        else:
            for part, x_part, out in _blocks(scale, x, quantized):
                y = x_part if top is None else torch.clamp(x_part, 0, top, out=out)
                fake_quantize(y, part, *ends, out=out)
        ctx.save_for_backward(x, quantized)
        ctx.options = scale, ends, slope, parameter.shape, top
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, quantized = ctx.saved_tensors
        scale, (low, high), slope, shape, top = ctx.options
        passed = torch.empty_like(x)
        grad = grads[0].contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
        learns, found, kernels = ctx.needs_input_grad[1], [], fused(x)
        if kernels is not None:
            found.append(kernels.gradients(grad, x, scale, low, high, passed, learns=learns, top=top))
        else:
            for part, g, x_part, q, out in _blocks(scale, grad, x, quantized, passed):
                y = x_part if top is None else x_part.clamp(0, top)
                input_gradient(g, y, part, low, high, out)
                if learns:
                    found.append(scale_gradient(g, y, q, out))
                if top is not None:
                    torch.ops.aten.hardtanh_backward.grad_input(out, y, 0.0, top, grad_input=out)
        if not learns:
            return passed, None, None, None, None, None
        own = torch.cat(found)
        return passed, slope * (own if shape else own.sum()), None, None, None, None


def learned(
    x: Tensor,
    parameter: Tensor,
    scale: Scale,
    ends: tuple[float, float],
    axis: int | None,
    slope: Any,
    top: float | None = None,
) -> Tensor:
    """`fake_quantize` with these gradients; the parameter's is slope * scale * dL/dscale.

    x: any shape. parameter: what the scale follows from, () or (C,). scale: a number (off CPUs a tensor (), so that the
    host does not wait for it), or one per channel along `axis`, (C,). ends: grid less zero point. slope: likewise.
    top: x is clipped to [0, top] first, as by a ReLU in front, whose pass over memory this saves.
    """
    if axis:
        return learned(x.transpose(0, axis), parameter, scale, ends, 0, slope, top).transpose(0, axis)
    quantized: Tensor = _Learned.apply(_dense(x), parameter, scale, ends, slope, top)
    return quantized
