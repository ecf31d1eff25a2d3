"""Fake quantization in torch: lean, in place where the input is free, bit-identical to `Encoding.fake_quantize`.

In one pass, `kernels` computes the same on a GPU where Triton can, `native` on a CPU where a C compiler can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.artifact import Site
from pow2quant.backends import native
from pow2quant.backends.base import Tap
from pow2quant.backends.native import BLOCK, Scale
from pow2quant.backends.target_rounding import TargetRounding
from pow2quant.errors import Pow2QuantError
from pow2quant.frontends.copies import is_shared, share
from pow2quant.pow2_constraints import Encoding

Bound = float | Tensor


def fused(x: Tensor) -> ModuleType | None:
    """The module that computes for x in one pass, `kernels` or `native`; None: the plain code does."""
    if x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling() or not x.numel():
        return None
    if type(x) not in (Tensor, nn.Parameter):  # whose memory may be another's, or none
        return None
    if x.device.type == "cpu":
        return _native()
    return _kernels(x.device) if x.device.type == "cuda" else None


@cache
def _native() -> ModuleType | None:
    try:
        native.functions()
    except (Pow2QuantError, OSError):  # no compiler, one without OpenMP, or no place for what it writes
        return None
    return native


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

    @cached_property
    def _flat(self) -> list[Any]:
        return [t.flatten() if isinstance(t, Tensor) else t for t in (self.scale, self.low, self.high)]

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
        scale, *ends = self._flat
        inner = _inner(x, scale, self.encoding.axis)
        if inner is None:
            return None

        def run(out: Tensor, inside: Tensor | None = None) -> Tensor:
            divides = self.inverse is None
            kernels.fake_quantize(x, out, scale, *ends, inner, divides=divides, rule=rule, inside=inside)
            return out

        return run


def _inner(x: Tensor, scale: Tensor, axis: int | None) -> int | None:
    """How many values in a row of memory share a scale; None where memory does not say so.

    scale: one, one per place along `axis`, or one for every value of x.
    """
    if not (x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        return None
    if axis is None or scale.numel() == 1:
        return 1
    if scale.numel() == x.shape[axis]:
        return x.stride(axis)
    return 1 if x.is_contiguous() and scale.numel() == prod(x.shape) else None


@contextmanager
def _untraced() -> Iterator[None]:
    """Within it, `torch.jit.trace` records nothing."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


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
        if encoding is not self._encoding:
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
            with _untraced():  # a traced graph holds them, as it holds weights
                constants = self._constants = _Constants(encoding, [int(n) for n in x.shape], x.device, self.rounding)
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
                seen = share(x.detach()) if is_shared(x) else x.detach().clone()
                self._kept = (seen, constants.quantize(x))
        return self._kept[1]

    def extra_repr(self) -> str:
        return f"{self.site.name}: {self._encoding}"


# -- scales that are learned -------------------------------------------------------------------------------------------


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


def scale_gradient(grad: Tensor, x: Tensor, quantized: Tensor, scale: Scale, low: float, high: float) -> Tensor:
    """scale * dL/dscale of every row of (rows, values), (rows,).

    Where nothing saturates, the derivative of the quantized value is round(x/s) - x/s, elsewhere the saturated code
    (LSQ, eq. 3). Times s, that is quantized - x, and quantized.
    """
    inside = input_gradient(x, x, scale, low, high, torch.empty_like(x))
    terms = torch.sub(quantized, inside, out=inside).mul_(grad)
    return terms.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))


def gradients(
    grad: Tensor,
    x: Tensor,
    quantized: Tensor,
    scale: Scale,
    low: float,
    high: float,
    passed: Tensor,
    *,
    learns: bool,
    top: float | None,
) -> Tensor | None:
    """Writes dL/dx into `passed`; returns the scale's gradients if `learns`, to be added up where there is one scale.

    Tensors are laid out alike. top: as in `learned`.
    """
    found = []
    for part, g, x_part, q, out in _blocks(scale, grad, x, quantized, passed):
        y = x_part if top is None else x_part.clamp(0, top)
        input_gradient(g, y, part, low, high, out)
        if learns:
            found.append(scale_gradient(g, y, q, part, low, high))
        if top is not None:
            torch.ops.aten.hardtanh_backward.grad_input(out, y, 0.0, top, grad_input=out)
    return torch.cat(found) if learns else None


def _blocks(scale: Scale, *tensors: Tensor) -> Iterable[tuple[Any, ...]]:
    """The scale, and views of tensors laid out alike, in blocks of (rows, values), one scale a row; off CPUs in one."""
    if tensors[0].ndim == 4 and not tensors[0].is_contiguous():
        tensors = tuple(t.permute(0, 2, 3, 1) for t in tensors)
    scales = scale if isinstance(scale, float) or scale.numel() == 1 else scale.view(-1, 1)
    whole = scales is scale
    rows = [t.view(1 if whole else len(t), -1) for t in tensors]
    if rows[0].numel() <= BLOCK or rows[0].device.type != "cpu":
        return ((scales, *rows),)
    if whole or isinstance(scales, float):
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
            scale = scale.float().contiguous() if isinstance(scale, Tensor) else scale
            rows = scale.numel() if isinstance(scale, Tensor) else 1
            kernels.fake_quantize(x, quantized, scale, *ends, x.numel() // rows, top=top)
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
        learns, kernels = ctx.needs_input_grad[1], fused(x)
        if kernels is not None:
            own = kernels.gradients(grad, x, scale, low, high, passed, learns=learns, top=top)
        else:
            own = gradients(grad, x, quantized, scale, low, high, passed, learns=learns, top=top)
        if own is None:
            return passed, None, None, None, None, None
        own = own if shape.numel() > 1 else own.sum().view(shape)
        return passed, slope * own, None, None, None, None


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
