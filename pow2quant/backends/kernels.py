"""A quantizer's two directions as one Triton kernel each, for GPUs; `fake_quant` holds their definitions.

Triton comes with PyTorch for CUDA. The forward direction has the bits of the plain code: ties, -0 and NaN go where
PyTorch's operations on a CPU take them. Sums over a scale's values are taken in two stages, in an order that the shape
alone gives.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pow2quant.backends.native import Scale

BLOCK = 1024
"""Values of a program."""

RULES = ("half_even", "half_up", "half_away", "truncate", "floor")
"""The rules of `arithmetic.ROUNDINGS` that look at nothing but the quotient."""


@triton.jit
def _rounded(quotient: Any, RULE: tl.constexpr) -> Any:
    """The quotient as a whole number, in float32, by one of `RULES`."""
    if RULE == "half_even":
        size = tl.abs(quotient)
        whole = (size + 8388608.0) - 8388608.0  # float32 has no fractions from 2^23 on, and a sum rounds half to even
        found = tl.where(whole == 0, quotient * 0, tl.where(quotient < 0, -whole, whole))
        return tl.where(size < 8388608.0, found, quotient)
    floor = tl.floor(quotient)
    rest = quotient - floor
    if RULE == "half_up":
        up = rest >= 0.5
    elif RULE == "half_away":
        up = (rest > 0.5) | ((rest == 0.5) & (quotient >= 0))
    elif RULE == "truncate":
        up = (quotient < 0) & (rest > 0)
    else:
        up = rest < 0  # never
    return floor + tl.where(up, 1.0, 0.0)


@triton.jit
def _saturated(codes: Any, low: Any, high: Any) -> Any:
    return tl.where(codes < low, low, tl.where(codes > high, high, codes))  # NaN and -0 stay what they are


@triton.jit
def _forward(
    x: Any,
    out: Any,
    inside: Any,
    scale: Any,
    low: Any,
    high: Any,
    top: Any,
    count: Any,
    channels: Any,
    inner: Any,
    CLIPS: tl.constexpr,
    ENDS: tl.constexpr,
    DIVIDES: tl.constexpr,
    MARKS: tl.constexpr,
    RULE: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = place < count
    channel = (place // inner) % channels
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if CLIPS:
        value = _saturated(value, 0.0, top)
    step = tl.load(scale + channel, mask=there, other=1.0)
    if ENDS:
        low = tl.load(low + channel, mask=there, other=0.0)
        high = tl.load(high + channel, mask=there, other=0.0)
    quotient = tl.div_rn(value, step) if DIVIDES else value * tl.div_rn(tl.full([SIZE], 1.0, tl.float32), step)
    codes = _rounded(quotient, RULE)
    if MARKS:
        tl.store(inside + place, (codes >= low) & (codes <= high), mask=there)
    tl.store(out + place, _saturated(codes, low, high) * step, mask=there)


@triton.jit
def _backward(
    grad: Any,
    x: Any,
    scale: Any,
    passed: Any,
    sums: Any,
    low: Any,
    high: Any,
    top: Any,
    values: Any,
    blocks: Any,
    CLIPS: tl.constexpr,
    LEARNS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = program // blocks
    column = (program % blocks) * SIZE + tl.arange(0, SIZE)
    there = column < values
    place = row.to(tl.int64) * values + column
    step = tl.load(scale + row)
    incoming = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if CLIPS:
        value = _saturated(value, 0.0, top)
    quotient = value * tl.div_rn(tl.full([SIZE], 1.0, tl.float32), step)
    outside = (quotient <= low - 0.5) | (quotient >= high + 0.5)
    through = tl.where(outside, 0.0, incoming)
    if CLIPS:
        tl.store(passed + place, tl.where((value <= 0) | (value >= top), 0.0, through), mask=there)
    else:
        tl.store(passed + place, through, mask=there)
    if LEARNS:
        quantized = _saturated(_rounded(quotient, "half_even"), low, high) * step
        tl.store(sums + program, tl.sum(incoming * (quantized - tl.where(outside, 0.0, value)), 0))


def fake_quantize(
    x: Tensor,
    out: Tensor,
    scale: Scale,
    low: float | Tensor,
    high: float | Tensor,
    inner: int,
    *,
    top: float | None = None,
    divides: bool = False,
    rule: str = "half_even",
    inside: Tensor | None = None,
) -> None:
    """out = scale * clip(round(x / scale), low, high), at every place of memory.

    x, out: without gaps, laid out alike; they may be the same. scale: float32, one, or one for every `inner` values in
    a row, again and again. low, high: numbers, or tensors like it. top: as in `learned`. divides: otherwise x is
    multiplied by 1 / scale. inside: if given, bool, laid out as x: gets where nothing saturates.
    """
    ends = isinstance(low, Tensor)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    marks = inside is not None
    _forward[(triton.cdiv(x.numel(), BLOCK),)](
        x,
        out,
        inside if marks else out,
        scale,
        low,
        high,
        0.0 if top is None else top,
        x.numel(),
        scale.numel(),
        inner,
        CLIPS=top is not None,
        ENDS=ends,
        DIVIDES=divides,
        MARKS=marks,
        RULE=rule,
        SIZE=BLOCK,
    )


def gradients(
    grad: Tensor,
    x: Tensor,
    scale: Scale,
    low: float,
    high: float,
    passed: Tensor,
    *,
    learns: bool,
    top: float | None = None,
) -> Tensor | None:
    """Writes `fake_quant.input_gradient` into `passed`, and returns `fake_quant.scale_gradient` if `learns`: (rows,).

    grad, x, passed: without gaps, laid out alike. scale: float32, one for each row, into which their memory is cut.
    top: as in `learned`.
    """
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    rows = scale.numel()
    values = x.numel() // rows
    size = min(BLOCK, max(16, triton.next_power_of_2(values)))
    blocks = triton.cdiv(values, size)
    sums = torch.empty(rows, blocks if learns else 0, device=x.device)
    _backward[(rows * blocks,)](
        grad,
        x,
        scale,
        passed,
        sums,
        low,
        high,
        0.0 if top is None else top,
        values,
        blocks,
        CLIPS=top is not None,
        LEARNS=learns,
        SIZE=size,
    )
    return sums.sum(1) if learns else None


def check(device: torch.device) -> None:
    """Raises what Triton raises where it cannot compile for this device, for example without a C compiler."""
    x = torch.zeros(1, device=device)
    fake_quantize(x, x, torch.ones(1, device=device), -1.0, 1.0, 1)
