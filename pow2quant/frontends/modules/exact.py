"""Modules with an integer definition (`pow2quant.functions`), which a simulation computes once it knows their input."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pow2quant.functions import Definition, accepts
from pow2quant.pow2_constraints import Encoding


class Quantizer(Protocol):
    """What quantizes a tensor."""

    @property
    def encoding(self) -> Encoding | None: ...


class Exact(nn.Module):
    """A module that computes integers where its input lies on a grid that it knows, and its function in float64 else.

    ends: the quantizers of the input and of the result; None: nothing is quantized. The gradient is that of the float
    function.
    """

    ends: tuple[Quantizer, Quantizer] | None = None

    def connect(self, source: Quantizer, result: Quantizer) -> None:
        """Says what quantizes the input and the result."""
        object.__setattr__(self, "ends", (source, result))

    def forward(self, x: Tensor) -> Tensor:
        encoding, target = (None, None) if self.ends is None else (end.encoding for end in self.ends)
        if encoding is None or target is None or not accepts(encoding):
            return self.plain(x)
        defined = self.definition(tuple(x.shape), encoding, target.grid.width)
        if defined is None:
            return self.plain(x)
        with torch.no_grad():
            codes = x.double() * 2.0 ** -int(encoding.exponent)
            if not torch.equal(codes, codes.round()):
                defined = None
            else:
                result = self.integers(codes, defined, encoding).to(x.dtype)
        if defined is None or torch.is_grad_enabled():
            plain = self.plain(x)
            result = plain if defined is None else _Replaced.apply(plain, result)
        return result

    def definition(self, shape: tuple[int, ...], encoding: Encoding, bits: int) -> Definition | None:
        """The definition for an input of this shape and encoding and a result of so many bits; None: there is none."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> Tensor:
        """The function, rounded once from float64."""
        raise NotImplementedError

    def integers(self, codes: Tensor, defined: Any, encoding: Encoding) -> Tensor:
        """The definition's result as real values; codes: integers in units of the encoding's scale, in float64."""
        raise NotImplementedError


class _Replaced(torch.autograd.Function):
    """The second tensor, with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, result: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
