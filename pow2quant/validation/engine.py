"""The integer engine as an executor: the QDQ file lowered to integers and run in numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pow2quant.integer import run as engine
from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import opened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pow2quant.integer.program import Program
    from pow2quant.validation.agreement import Arrays

NAME = "integer engine"


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """Every operation of the file on integers, in numpy.

    Raises UnsupportedModelError or NotPowerOfTwoError, naming the tensor or node, where the network has no integers.
    """
    file = opened(model)
    return [replace(executor(file.program), network=lambda: file.network)]


def executor(program: Program, name: str = NAME) -> Executor:
    """A program as an executor: real values in and out, integers between."""

    def run(batch: Arrays) -> list[NDArray[np.float32]]:
        codes = engine.run(program, engine.quantize(program, batch))
        return list(engine.dequantize(program, dict(zip(program.outputs, codes, strict=True))).values())

    def tensors(batch: Arrays) -> dict[str, NDArray[np.float32]]:
        return engine.dequantize(program, engine.trace(program, engine.quantize(program, batch)))

    return Executor(name, run, tensors, work=program.work, integers=True)
