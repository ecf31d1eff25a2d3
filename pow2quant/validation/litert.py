"""LiteRT (TensorFlow Lite) with XNNPACK as an executor: the QDQ file as integers, written to TFLite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import MissingExtraError
from pow2quant.integer.run import dequantize, quantize
from pow2quant.integer.tflite.file import to_tflite
from pow2quant.integer.tflite.graph import from_int8, to_int8
from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import opened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pow2quant.integer.program import Codes, Program
    from pow2quant.validation.agreement import Arrays

    Run = Callable[[Sequence[NDArray[np.int8]]], list[NDArray[np.int8]]]
    """One sample's int8 codes -> those of its outputs."""

NAME = "LiteRT (XNNPACK)"


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The file as TFLite in LiteRT, with its default delegate, on one thread.

    Raises MissingExtraError where LiteRT is not installed; UnsupportedModelError or NotPowerOfTwoError, naming the
    node, where the network cannot be written as TFLite.
    """
    try:
        interpreter = import_module("ai_edge_litert.interpreter").Interpreter
    except ImportError as error:
        raise MissingExtraError(f"LiteRT is not installed: pip install 'pow2quant[litert]' ({error})") from error
    return [of_file(model, NAME, lambda content: interpreted(interpreter, content))]


def of_file(model: Path, name: str, start: Callable[[bytes], Run]) -> Executor:
    """A QDQ file as TFLite in a runtime. start: a TFLite file -> what runs it, one sample at a time."""
    file = opened(model)
    return replace(executor(file.program, name, start), network=lambda: file.network)


def executor(program: Program, name: str, start: Callable[[bytes], Run]) -> Executor:
    """A program as an executor: real values in and out, TFLite between."""
    files = Files(program, start)

    def run(batch: Arrays) -> list[NDArray[np.float32]]:
        codes = files.run(quantize(program, batch), traced=False)
        return list(dequantize(program, codes).values())

    def tensors(batch: Arrays) -> Mapping[str, NDArray[np.float32]]:
        codes = quantize(program, batch)
        return dequantize(program, dict(zip(program.inputs, codes, strict=True)) | files.run(codes, traced=True))

    return Executor(name, run, tensors, measured=True)


class Files:
    """A program's TFLite files in a runtime: as it is exported, and with every tensor as an output."""

    def __init__(self, program: Program, start: Callable[[bytes], Run]) -> None:
        self.program, self.start, self.content = program, start, to_tflite(program)

    def run(self, inputs: Sequence[Codes], *, traced: bool) -> dict[str, Codes]:
        """Codes (N, *shape) of the inputs -> codes by name: of the outputs, or of every computed tensor."""
        program, run = self.program, self._traced if traced else self._plain
        names = self._computed if traced else program.outputs
        given = [to_int8(program.tensors[name], x) for name, x in zip(program.inputs, inputs, strict=True)]
        results = [run([x[i : i + 1] for x in given]) for i in range(len(given[0]))]
        columns = (np.concatenate(column) for column in zip(*results, strict=True))
        return {name: from_int8(program.tensors[name], x) for name, x in zip(names, columns, strict=True)}

    @property
    def _computed(self) -> list[str]:
        return list(dict.fromkeys(step.output for step in self.program.steps))

    @cached_property
    def _plain(self) -> Run:
        return self.start(self.content)

    @cached_property
    def _traced(self) -> Run:
        return self.start(to_tflite(self.program, self._computed))


def interpreted(interpreter: Any, content: bytes) -> Run:
    """A file in LiteRT's interpreter."""
    made = interpreter(model_content=content, num_threads=1)
    made.allocate_tensors()
    inputs = [entry["index"] for entry in made.get_input_details()]
    outputs = [entry["index"] for entry in made.get_output_details()]

    def run(samples: Sequence[NDArray[np.int8]]) -> list[NDArray[np.int8]]:
        for index, x in zip(inputs, samples, strict=True):
            made.set_tensor(index, x)
        made.invoke()
        return [made.get_tensor(index) for index in outputs]

    return run
