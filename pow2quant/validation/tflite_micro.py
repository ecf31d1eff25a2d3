"""TensorFlow Lite for Microcontrollers as an executor: its reference kernels, on this machine."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pow2quant.errors import MissingExtraError
from pow2quant.validation.litert import of_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pow2quant.validation.agreement import Executor
    from pow2quant.validation.litert import Run

NAME = "TensorFlow Lite Micro"
ARENA = 1 << 26
"""Bytes for a network's tensors."""


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The file as TFLite in TensorFlow Lite Micro's reference kernels.

    Raises MissingExtraError where it is not installed; UnsupportedModelError or NotPowerOfTwoError, naming the node,
    where the network cannot be written as TFLite.
    """
    try:
        runtime = import_module("tflite_micro.python.tflite_micro.runtime")
    except ImportError as error:
        raise MissingExtraError(
            f"TensorFlow Lite Micro is not installed: pip install 'pow2quant[tflite-micro]' ({error})"
        ) from error
    return [of_file(model, NAME, lambda content: interpreted(runtime, content))]


def interpreted(runtime: Any, content: bytes) -> Run:
    """A file in the interpreter."""
    made = runtime.Interpreter.from_bytes(content, arena_size=ARENA)
    count = len(_outputs(content))

    def run(samples: Sequence[NDArray[np.int8]]) -> list[NDArray[np.int8]]:
        for index, x in enumerate(samples):
            made.set_input(x, index)
        made.invoke()
        return [made.get_output(index) for index in range(count)]

    return run


def _outputs(content: bytes) -> Sequence[int]:
    schema: Any = import_module("ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs(content, 0)
    return range(model.Subgraphs(0).OutputsLength())
