"""The engine: runs a program on batches of codes in numpy. The living definition of the arithmetic.

Inside there are integers only; sums of products, and how they are rounded, go through float32 or float64 where the
program's bounds prove that these hold every partial sum exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.integer.program import Codes, Program

    Watch = Callable[[str, Codes], None]

CHUNK = 8
"""Samples that one thread runs at a time."""


def run(program: Program, inputs: Sequence[Codes]) -> list[Codes]:
    """Codes (N, *shape) of the network's inputs -> codes of its outputs. Raises DataError for other shapes."""
    for name, x in zip(program.inputs, inputs, strict=True):
        if x.shape[1:] != program.tensors[name].shape:
            raise DataError(f"{name}: codes of shape {x.shape}, not (N, *{program.tensors[name].shape})")
    starts = range(0, len(inputs[0]), CHUNK)
    with ThreadPoolExecutor(_cores()) as pool:
        parts = list(pool.map(lambda i: _outputs(program, [x[i : i + CHUNK] for x in inputs]), starts))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def trace(program: Program, inputs: Sequence[Codes]) -> dict[str, Codes]:
    """The codes of every tensor that the program computes, and of its inputs, by name."""
    values: dict[str, Codes] = {}
    _execute(program, inputs, lambda name, codes: values.__setitem__(name, codes))
    return values


def quantize(program: Program, inputs: Sequence[NDArray[np.float32]]) -> list[Codes]:
    """Real inputs -> codes."""
    tensors = [program.tensors[name] for name in program.inputs]
    return [t.encoding.quantize(x, t.name).astype(t.dtype) for t, x in zip(tensors, inputs, strict=True)]


def dequantize(program: Program, codes: Mapping[str, Codes]) -> dict[str, NDArray[np.float32]]:
    """Codes -> real values, by tensor name."""
    return {name: program.tensors[name].encoding.dequantize(q) for name, q in codes.items()}


def _outputs(program: Program, inputs: Sequence[Codes]) -> list[Codes]:
    values = _execute(program, inputs, None)
    return [values[name] for name in program.outputs]


def _execute(program: Program, inputs: Sequence[Codes], watch: Watch | None) -> dict[str, Codes]:
    """Runs every step; without `watch`, what is no longer read is forgotten on the way."""
    values: dict[str, Codes] = dict(zip(program.inputs, inputs, strict=True))
    values |= {t.name: t.constant.astype(t.dtype) for t in program.tensors.values() if t.constant is not None}
    last = {name: i for i, step in enumerate(program.steps) for name in step.inputs}
    if watch:
        for name in program.inputs:
            watch(name, values[name])
    for i, step in enumerate(program.steps):
        result, codes = program.tensors[step.output], step.run(program, *(values[name] for name in step.inputs))
        values[step.output] = codes.astype(result.dtype, copy=False).reshape(-1, *result.shape)
        if watch:
            watch(step.output, values[step.output])
        for name in set(step.inputs):
            if last[name] == i and name not in program.outputs and not watch:
                del values[name]
    return values


def _cores() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(asked) if asked.isdigit() and int(asked) else usable
