"""One exponent for each output channel and block of inputs, chosen by the choosers of `snap.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pow2quant.pow2_constraints.arithmetic import power_of_two
from pow2quant.pow2_constraints.encoding import Encoding
from pow2quant.pow2_constraints.snap import Format, Observed, choose

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDEST = 8
"""In units of its channel's smallest exponent a code has at most so many bits: what a byte holds."""


def choose_blocks(rule: str, weight: NDArray[np.float32], form: Format, block: int) -> Encoding:
    """The encoding of a weight with one exponent for each channel and `block` values along its inputs, axis 1 - axis.

    Every block gets what `rule` chooses for it, but for two bounds: at most `WIDEST` bits less the grid's below the
    largest of its channel, so that integers of all blocks add up as bytes; and a block of zeros has the largest.
    form: of one block, with the weight's channel axis. A weight (64, 48, 3, 3) in blocks of 32 has (64, 2, 3, 3)
    scales. Raises EncodingError as `choose` does.
    """
    assert form.axis is not None
    inputs = 1 - form.axis
    last = np.moveaxis(weight, inputs, -1)
    pad = [(0, 0)] * (last.ndim - 1) + [(0, -last.shape[-1] % block)]
    blocks = np.pad(last, pad).reshape(*last.shape[:-1], -1, block)
    chosen = choose(rule, Observed.of(blocks.reshape(-1, block), 0), Format(form.bits, form.symmetric, axis=0))
    k = np.moveaxis(chosen.exponent.reshape(blocks.shape[:-1]), -1, inputs)
    empty = np.moveaxis((blocks == 0).all(-1), -1, inputs)
    others = tuple(d for d in range(k.ndim) if d != form.axis)
    largest = np.where(empty, k.min(), k).max(others, keepdims=True)
    k = np.where(empty, largest, np.maximum(k, largest - (WIDEST - chosen.grid.width)))
    return Encoding(power_of_two(k), np.zeros((), np.int64), form.grid, form.axis, block)
