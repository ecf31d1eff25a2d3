"""Layers whose sums of products may pass 2^24, where float32 rounds: exact sums all the same.

Convolutions have no fast kernels in float64 (4 to 11 times the cost of float32), so they are split: x = sum_i x_i and
w = sum_j w_j, where every part has few bits, times a power of two. The sums of x_i * w_j stay within 2^24, so that
float32 holds them in any order of summation; their total is taken in float64. A 16-bit x and an 8-bit w take two such
convolutions, 16 bits on both sides four. Matrix products take twice as long in float64, and are computed there. So is
everything on a GPU, where convolutions in float32 may be Winograd's, which round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant.frontends.modules import CONVOLUTIONS, TRANSPOSED
from pow2quant.pow2_constraints import Encoding

FLOAT32_EXACT = 2**24
"""float32 holds every integer up to here."""

COUNTS = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2))
"""Into how many parts inputs and weights are taken, the cheapest first. Where none suffices, float64 is no slower."""

EXPONENTS = -126, 127 - 53
"""Units of which float32 holds multiples up to 2^53, rounded to 24 bits."""

LOOKED_AT, MULTIPLIED = 1 << 18, 1 << 22
"""So many weights are widened to float64 at a time: of a large layer, all would take twice its memory."""

Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of input, weight and bias."""


@dataclass(frozen=True)
class WideSums:
    """How a layer's sums become exact.

    inputs, weights: the steps whose multiples the parts are, all but the last part's, the largest first. split: False
    for a layer that is computed in float64 as it is.
    """

    split: bool
    inputs: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()

    def of(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's result, in float64. bias: (C,)."""
        if not self.split:
            return _in_float64(layer, x.double(), weight, None if bias is None else bias.double())
        parts = list(_parts(x, self.inputs))
        products = (layer(part, w, None) for w in _parts(weight, self.weights) for part in parts)
        total = next(products).double()
        for product in products:
            total += product
        return total if bias is None else total.add_(bias.view(-1, *[1] * (weight.ndim - 2)))


def _in_float64(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's result; all but the weight are float64."""
    if weight.ndim > 2:
        return layer(x, weight.double(), bias)
    result = x.new_empty(*x.shape[:-1], len(weight))
    size = _block(weight, 0, MULTIPLIED)
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        result[..., rows] = layer(x, weight[rows].double(), None if bias is None else bias[rows])
    return result


def _block(weight: Tensor, axis: int, values: int) -> int:
    """How many places along an axis of a weight hold so many values."""
    return max(1, values * weight.shape[axis] // max(1, weight.numel()))


@torch.inference_mode(False)  # the steps serve training, too
@torch.no_grad()
def wide_sums(
    layer: nn.Module, weight: Tensor, bias: Tensor | None, source: Encoding, own: Encoding
) -> WideSums | None:
    """How the sums of a layer become exact; None where float32 holds them.

    weight, bias: quantized. source, own: the encodings of the input and of the weight.
    """
    if largest_sum(layer, weight, bias, source, own) <= FLOAT32_EXACT:
        return None
    slow = isinstance(layer, CONVOLUTIONS) and weight[0, 0].numel() > 1 and weight.device.type == "cpu"
    if not (slow and _exact(source, own)):
        return WideSums(False)
    scale = _scale(weight, own)
    farthest, heaviest = _farthest(source), max(float(codes.max()) for codes in _codes(layer, weight, scale))
    for of_inputs, of_weights in COUNTS:
        inputs, weights = _steps(farthest, of_inputs), _steps(heaviest, of_weights)
        heaviest_row = max(_heaviest_row(layer, codes, weights) for codes in _codes(layer, weight, scale))
        if _largest_part(farthest, inputs) * heaviest_row <= FLOAT32_EXACT:
            unit = torch.from_numpy(source.scale.copy()).to(weight.device)
            return WideSums(True, tuple(unit * step for step in inputs), tuple(scale * step for step in weights))
    return WideSums(False)


@torch.no_grad()
def largest_sum(layer: nn.Module, weight: Tensor, bias: Tensor | None, source: Encoding, own: Encoding) -> float:
    """No sum of a layer is beyond it, in units of s_in * s_w."""
    scale = _scale(weight, own)
    largest = max(float(_rows(layer, codes).max()) for codes in _codes(layer, weight, scale)) * _farthest(source)
    if bias is not None:
        unit = float(scale.double().min()) * float(np.min(source.scale))
        largest += float((bias.double().abs() / unit).max())
    return largest


def _scale(weight: Tensor, own: Encoding) -> Tensor:
    """A weight's scale, broadcasting against it."""
    units = own.per_channel
    return torch.from_numpy(np.array(units.along(units.scale, weight.shape), np.float32)).to(weight.device)


def _codes(layer: nn.Module, weight: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """The magnitudes of a weight's codes, in float64, some output channels at a time."""
    axis = int(isinstance(layer, TRANSPOSED))
    parts = (x.split(_block(weight, axis, LOOKED_AT), axis) for x in (weight, scale.expand_as(weight)))
    for part, own in zip(*parts, strict=True):
        yield part.double().abs() / own


def _farthest(source: Encoding) -> float:
    """The largest magnitude of a code less its zero point."""
    grid, zero = source.grid, source.zero_point
    return float(np.maximum(grid.qmax - zero, zero - grid.qmin).max())


def _rows(layer: nn.Module, codes: Tensor) -> Tensor:
    """Sums over what goes into a result, (C,); more than that in transposed layers of several groups."""
    return (codes.transpose(0, 1) if isinstance(layer, TRANSPOSED) else codes).flatten(1).sum(1)


def _exact(source: Encoding, own: Encoding) -> bool:
    """Whether float32 holds inputs, weights and their products: powers of two in its range."""
    if not (source.is_power_of_two and own.is_power_of_two):
        return False
    low, high = EXPONENTS
    ends = source.exponent, own.exponent, source.exponent + own.exponent
    return all(low <= int(e.min()) and int(e.max()) <= high for e in ends)


def _bits(largest: float, count: int) -> int:
    """Of a part, where `count` of them make up an integer of this magnitude."""
    return math.ceil(math.log2(largest + 1) / count)


def _steps(largest: float, count: int) -> tuple[float, ...]:
    return tuple(2.0 ** (_bits(largest, count) * place) for place in range(count - 1, 0, -1))


def _largest_part(largest: float, steps: tuple[float, ...]) -> float:
    """The magnitude of the parts of an integer of this magnitude, each in units of its step."""
    return max(math.ceil(largest / steps[0]), steps[-1] / 2) if steps else largest


def _heaviest_row(layer: nn.Module, codes: Tensor, steps: tuple[float, ...]) -> float:
    """The largest sum of magnitudes of one part, in units of its step."""
    parts = zip(_parts(codes, steps), (*steps, 1.0), strict=True)
    return max(float(_rows(layer, part.abs()).max()) / step for part, step in parts)


def _parts(x: Tensor, steps: Iterable[Tensor | float]) -> Iterator[Tensor]:
    """What adds up to x: multiples of each step, and what remains."""
    for step in steps:
        part = (x / step).round_().mul_(step)
        x = x - part
        yield part
    yield x
