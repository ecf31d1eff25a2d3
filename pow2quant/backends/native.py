"""A quantizer's two directions as one pass of compiled C each, for CPUs; `fake_quant` holds their definitions.

The bits are those of the plain code. Threads are PyTorch's: as many, and of the same OpenMP library where the compiler
has it.
"""

from __future__ import annotations

from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pow2quant import compiled
from pow2quant.frontends.copies import address

Scale = float | Tensor
"""A number, as such or as a tensor (), or one for each row of (rows, values), (rows, 1)."""

RULES = ("half_even",)
"""The rules of `arithmetic.ROUNDINGS` that the C knows."""

SOURCE = Path(__file__).with_name("quantizers.c")

FLAGS = ("-std=c99", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""None of them changes a bit of a result."""


BLOCK = 1 << 17
"""Values that are worked on at a time: they stay in a core's cache from the first operation to the last."""


@cache
def functions() -> tuple[Any, Any, Any]:
    """`quantize`, `differentiate` and `shifts` of the C. Raises what `compiled.library` raises."""
    text = SOURCE.read_text(encoding="utf-8")
    library = compiled.library({SOURCE.name: text}, SOURCE.name, FLAGS)
    quantize, differentiate, moved = library.quantize, library.differentiate, library.shifts
    quantize.argtypes = [*[c_void_p] * 3, c_int64, *[c_void_p] * 3, *[c_float] * 3, *[c_int64] * 2, *[c_int] * 2]
    differentiate.argtypes = [*[c_void_p] * 4, *[c_int64] * 2, c_void_p, *[c_float] * 5, *[c_int] * 2]
    moved.argtypes = [*[c_void_p] * 3, *[c_int64] * 2, *[c_float] * 2, c_double, *[c_int] * 2]
    quantize.restype = differentiate.restype = moved.restype = None
    return quantize, differentiate, moved


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
    """See `kernels.fake_quantize`; one scale may be a number."""
    scales, channels = _scales(scale)
    written = out.data_ptr()  # first: it may be x, and gets memory of its own here
    functions()[0](
        address(x),
        written,
        None if inside is None else inside.data_ptr(),
        x.numel(),
        scales,
        low.data_ptr() if isinstance(low, Tensor) else None,
        high.data_ptr() if isinstance(high, Tensor) else None,
        0.0 if isinstance(low, Tensor) else low,
        0.0 if isinstance(high, Tensor) else high,
        0.0 if top is None else top,
        channels,
        inner,
        _kind(x, top) + 2 * divides + 4 * (inside is not None),
        torch.get_num_threads(),
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
    """See `kernels.gradients`; one scale may be a number, whose gradient is the sum of what is returned."""
    scales, channels = _scales(scale)
    values, whole = x.numel() // channels, channels == 1
    rows = channels if whole or not learns else max(1, BLOCK // values)
    size = rows * (min(values, BLOCK) if whole and learns else values)
    terms = torch.empty(min(size, x.numel()) if learns else 0, dtype=x.dtype)
    found = []
    for start in range(0, x.numel(), size):
        count, offset = min(size, x.numel() - start), start * x.element_size()
        now = 1 if whole else count // values
        functions()[1](
            grad.data_ptr() + offset,
            x.data_ptr() + offset,
            passed.data_ptr() + offset,
            terms.data_ptr(),
            now,
            count // now,
            scales if whole else scales + start // values * 4,
            low,
            high,
            low - 0.5,
            high + 0.5,
            0.0 if top is None else top,
            _kind(x, top) + 2 * learns,
            torch.get_num_threads(),
        )
        if learns:
            used = terms if count == len(terms) else terms[:count]
            found.append(used.view(now, -1).sum(1, dtype=torch.float32))
    if not learns:
        return None
    return found[0] if len(found) == 1 else torch.cat(found)


def shifts(result: Tensor, target: Tensor, ends: tuple[float, float], steps: int, least: float) -> Tensor:
    """float64 (C,), see `bias_correction.shift`. result, target: float32 (C, n), contiguous, on the CPU."""
    found = torch.empty(len(result), dtype=torch.float64)
    given = result.data_ptr(), target.data_ptr(), found.data_ptr()
    functions()[2](*given, *result.shape, *ends, least, steps, torch.get_num_threads())
    return found


def _scales(scale: Scale) -> tuple[Any, int]:
    """Where the scales stand, and how many there are."""
    return (scale.data_ptr(), scale.numel()) if isinstance(scale, Tensor) else ((c_float * 1)(scale), 1)


def _kind(x: Tensor, top: float | None) -> int:
    return (top is not None) + 8 * (x.dtype is torch.bfloat16)
