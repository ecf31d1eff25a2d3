"""Modules with an integer definition (`pow2quant.functions`), which a simulation computes once it knows their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.frontends.modules.rounded import Described
from pow2quant.functions import Definition, Lookup, accepts
from pow2quant.pow2_constraints import Encoding
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN

PIECE = 1 << 16
"""So many values are worked on at a time: what lies between input and result takes many times their memory."""


class Quantizer(Protocol):
    """What quantizes a tensor."""

    @property
    def encoding(self) -> Encoding | None: ...


class Exact(nn.Module):
    """A module that computes integers where its input lies on a grid that it knows, and its function in float64 else.

    Operands behind the first, if there are any, say which values count.

    ends: the quantizers of the input and of the result; None: nothing is quantized. rounding: of the target's tables.
    The gradient is that of the float function.
    """

    ends: tuple[Quantizer, Quantizer] | None = None
    rounding: str = HALF_EVEN

    plain: Callable[..., Tensor]
    """(input, *operands behind it) -> the function, rounded once from float64."""

    integers: Callable[..., Tensor]
    """(codes, definition, encoding, *operands) -> the result as real values; codes: in units of the scale."""

    def connect(self, source: Quantizer, result: Quantizer) -> None:
        """Says what quantizes the input and the result."""
        object.__setattr__(self, "ends", (source, result))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        encoding, target = (None, None) if self.ends is None else (end.encoding for end in self.ends)
        if encoding is None or target is None or not accepts(encoding):
            return self.plain(x, *more)
        defined = self.definition(tuple(x.shape), encoding, target)
        if defined is None:
            return self.plain(x, *more)
        with torch.no_grad():
            result = self._in_pieces(x, more, defined, encoding)
        if result is None or torch.is_grad_enabled():
            plain = self.plain(x, *more)
            result = plain if result is None else _Replaced.apply(plain, result)
        return result

    def _in_pieces(
        self, x: Tensor, operands: tuple[Tensor, ...], defined: Definition, encoding: Encoding
    ) -> Tensor | None:
        """`integers`, some samples at a time; None where x is not on its grid."""
        size, result = self._piece(x), torch.empty_like(x)
        for start in range(0, len(x), size):
            codes = x[start : start + size].double() * 2.0 ** -int(encoding.exponent)
            if not torch.equal(codes, codes.round()):
                return None
            own = (y[start : start + size] if y.ndim == x.ndim and len(y) == len(x) else y for y in operands)
            result[start : start + size] = self.integers(codes, defined, encoding, *own)
        return result

    def _piece(self, x: Tensor) -> int:
        """How many samples are worked on at a time."""
        return max(1, PIECE * len(x) // max(1, x.numel()) if x.device.type == "cpu" else len(x))

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> Definition | None:
        """The definition for an input of this shape and encoding and a result with `target`; None: there is none."""
        raise NotImplementedError


class Function(Described, Exact):
    """A function of one tensor, element by element: rounded once from float64, or a table (`pow2quant.functions`)."""

    _known: tuple[Encoding, Encoding, str, Lookup] | None = None

    def plain(self, x: Tensor) -> Tensor:
        return self.compute(x.double()).to(x.dtype)

    def compute(self, x: Tensor) -> Tensor:
        """The function of a float64 tensor; by default that of PyTorch's module which it derives from."""
        result: Tensor = super(Exact, self).forward(x)
        return result

    def definition(self, shape: tuple[int, ...], encoding: Encoding, target: Encoding) -> Lookup | None:
        if not accepts(target):
            return None
        known = self._known
        if known is None or known[0] is not encoding or known[1] is not target or known[2] != self.rounding:
            grid = encoding.grid
            real = encoding.dequantize(np.arange(int(grid.qmin), int(grid.qmax) + 1))
            device = next((buffer.device for buffer in self.buffers()), torch.device("cpu"))
            with torch.no_grad():
                values = self.plain(torch.from_numpy(real).to(device)).cpu().numpy()
            known = encoding, target, self.rounding, Lookup.of(encoding, target, values, self.rounding)
            self._known = known
        return known[3]

    def _in_pieces(
        self, x: Tensor, operands: tuple[Tensor, ...], defined: Definition, encoding: Encoding
    ) -> Tensor | None:
        result = super()._in_pieces(x.reshape(-1), operands, defined, encoding)
        return None if result is None else result.view(x.shape)

    def integers(self, codes: Tensor, defined: Lookup, encoding: Encoding) -> Tensor:
        table = torch.from_numpy(defined.values()).to(codes.device)
        least = int(encoding.grid.qmin) - int(encoding.zero_point)
        return table[(codes.long() - least).clamp_(0, len(table) - 1)]


class _Replaced(torch.autograd.Function):
    """The second tensor, with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, result: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
