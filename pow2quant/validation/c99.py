"""The generated C as an executor: written, compiled and run sample by sample; a recurrent network step by step too."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pow2quant import compiled
from pow2quant.errors import DataError, MissingExtraError, UnsupportedModelError
from pow2quant.integer.emit_c import code
from pow2quant.integer.run import dequantize, quantize
from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pow2quant.integer.program import Codes, Program, Tensor
    from pow2quant.validation.agreement import Arrays

NAME, STEPS = "generated C", "generated C, step by step"
FLAGS = ("-std=c99", "-O3", "-march=native")
"""How the C is compiled; flags that the compiler does not know are left out."""

LARGEST = 2**25
"""Networks with more weights are not compiled: a compiler takes about 70 bytes and a microsecond for each."""

TRACED = """\
#include <stdint.h>
static void (*watch)(int32_t, const void *);
void model_watch(void (*hook)(int32_t, const void *)) { watch = hook; }
#define MODEL_TRACE(layer, codes, count) watch(layer, codes)
#include "model.c"
"""


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file lowered to integers, written as C, compiled when the first batch runs.

    Raises MissingExtraError where there is no C compiler; UnsupportedModelError or NotPowerOfTwoError, naming the
    tensor or node, where the network has no integers.
    """
    if reason := compiled.unavailable():
        raise MissingExtraError(reason)
    file = opened(model)
    program = file.program
    weights = sum(getattr(step, "weight", np.empty(0)).size for step in program.steps)
    if weights > LARGEST:
        raise UnsupportedModelError(f"{weights:,} weights: as C, more than {LARGEST:,} take a compiler gigabytes")
    found = [executor(program), *([] if file.step is None else [of_code(program, STEPS, Steps(program, file.step))])]
    return [replace(each, network=lambda: file.network) for each in found]


def executor(program: Program) -> Executor:
    """A program as an executor: real values in and out, C between."""
    return of_code(program, NAME, Library(program))


def of_code(program: Program, name: str, library: Code) -> Executor:
    """A program's C as an executor, wherever it runs."""

    def run(batch: Arrays) -> list[NDArray[np.float32]]:
        codes = library.run(quantize(program, batch))
        return list(dequantize(program, dict(zip(program.outputs, codes, strict=True))).values())

    def tensors(batch: Arrays) -> dict[str, NDArray[np.float32]]:
        return dequantize(program, library.trace(quantize(program, batch)))

    return Executor(name, run, tensors, integers=True)


class Code(Protocol):
    """A program's C, compiled."""

    def run(self, inputs: Sequence[Codes]) -> list[Codes]:
        """Codes (N, *shape) of the network's inputs -> codes of its outputs."""

    def trace(self, inputs: Sequence[Codes]) -> dict[str, Codes]:
        """The codes of the inputs and of every step's output, by name."""


class Library:
    """A program's C as shared libraries, compiled when they are first needed, or taken from an earlier run."""

    def __init__(self, program: Program, flags: Sequence[str] = FLAGS) -> None:
        self.program, self.flags = program, flags

    def run(self, inputs: Sequence[Codes]) -> list[Codes]:
        """Codes (N, *shape) of the network's inputs -> codes of its outputs."""
        return self._call(self._plain, inputs)

    def trace(self, inputs: Sequence[Codes]) -> dict[str, Codes]:
        """The codes of the inputs and of every step's output, by name."""
        program = self.program
        found: dict[str, list[Codes]] = {step.output: [] for step in program.steps}

        def watch(layer: int, codes: int) -> None:
            tensor = program.tensors[program.steps[layer].output]
            data = ctypes.string_at(codes, tensor.size * tensor.dtype.itemsize)
            found[tensor.name].append(np.frombuffer(data, tensor.dtype).reshape(tensor.shape))

        callback = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_void_p)(watch)
        self._traced.model_watch(callback)
        self._call(self._traced, inputs)
        traced = {name: np.stack(samples) for name, samples in found.items()}
        return dict(zip(program.inputs, inputs, strict=True)) | traced

    def _call(self, library: ctypes.CDLL, inputs: Sequence[Codes]) -> list[Codes]:
        tensors = [self.program.tensors[name] for name in self.program.inputs]
        for tensor, x in zip(tensors, inputs, strict=True):
            if x.shape[1:] != tensor.shape:
                raise DataError(f"{tensor.name}: codes of shape {x.shape[1:]} per sample, not {tensor.shape}")
        read = [np.ascontiguousarray(x, t.dtype) for x, t in zip(inputs, tensors, strict=True)]
        results = [self.program.tensors[name] for name in self.program.outputs]
        written = [np.empty((len(inputs[0]), *t.shape), t.dtype) for t in results]
        arrays = [*read, *written]
        run: Any = library.model_run
        run.argtypes, run.restype = [ctypes.c_void_p] * len(arrays), None
        for i in range(len(inputs[0])):
            run(*(array.ctypes.data + i * array.strides[0] for array in arrays))
        return list(written)

    @cached_property
    def _plain(self) -> ctypes.CDLL:
        return self._compiled("model.c", {})

    @cached_property
    def _traced(self) -> ctypes.CDLL:
        return self._compiled("traced.c", {"traced.c": TRACED})

    def _compiled(self, source: str, more: dict[str, str]) -> ctypes.CDLL:
        return compiled.library(code(self.program) | more, source, self.flags)


class Steps(Library):
    """The C of one step of a recurrent network, called for every step of whole sequences.

    program: of these. It says where time lies: in the dimension in which it and the step differ.
    """

    def __init__(self, program: Program, step: Program, flags: Sequence[str] = FLAGS) -> None:
        super().__init__(step, flags)
        self.whole = program

    def trace(self, inputs: Sequence[Codes]) -> dict[str, Codes]:
        """The codes of inputs and outputs; there is no tensor of all steps between."""
        ends = [*inputs, *self.run(inputs)]
        return dict(zip((*self.whole.inputs, *self.whole.outputs), ends, strict=True))

    def _call(self, library: ctypes.CDLL, inputs: Sequence[Codes]) -> list[Codes]:
        given = dict(zip(self.whole.inputs, inputs, strict=True))
        states = [self.program.tensors[name] for name, _ in self.program.states]
        names = self.program.inputs[: -len(states)]
        parts = [self._steps(name, given[name]) for name in names]
        state = ctypes.create_string_buffer(sum(t.size * t.dtype.itemsize + 8 for t in states))  # padded
        results = [self.program.tensors[name] for name in self.whole.outputs]
        made = []
        for sample in range(len(inputs[0])):
            library.model_reset(state)
            rows = []
            for step in zip(*(part[sample] for part in parts), strict=True):
                written = [np.empty(t.shape, t.dtype) for t in results]
                library.model(state, *(ctypes.c_void_p(x.ctypes.data) for x in (*step, *written)))
                rows.append(written)
            made.append([self._joined(t, column) for t, column in zip(results, zip(*rows, strict=True), strict=True)])
        return [np.stack(column) for column in zip(*made, strict=True)]

    def _steps(self, name: str, codes: Codes) -> NDArray[Any]:
        """(N, *shape) of whole sequences -> (N, steps, *shape) of a step, contiguous."""
        step = self.program.tensors[name]
        axis = self._time(step)
        parts = [codes] if axis is None else np.split(codes, codes.shape[axis + 1], axis + 1)
        return np.ascontiguousarray(np.stack(parts, 1), step.dtype)

    def _joined(self, step: Tensor, results: Sequence[Codes]) -> Codes:
        """The results of all steps, or the last one where the network has no more."""
        axis = self._time(step)
        return results[-1] if axis is None else np.concatenate(results, axis)

    def _time(self, step: Tensor) -> int | None:
        whole = self.whole.tensors[step.name].shape
        return next((d for d, (m, n) in enumerate(zip(whole, step.shape, strict=True)) if m != n), None)
