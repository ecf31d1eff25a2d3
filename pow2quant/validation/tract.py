"""tract (Sonos; Rust) as an executor: the QDQ file, one sample at a time."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.saving import scratch
from pow2quant.validation import onnx_runtimes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pow2quant.validation.agreement import Executor

NAME = "tract"


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file in tract, with its own optimizations.

    Raises MissingExtraError where it is not installed; what it cannot load is an UnsupportedModelError when it is run.
    """
    try:
        tract = import_module("tract")
    except ImportError as error:
        raise MissingExtraError(f"tract is not installed: pip install 'pow2quant[tract]' ({error})") from error
    return [onnx_runtimes.executor(model, NAME, lambda file: loaded(tract, file), batch=1)]


def loaded(tract: Any, model: onnx.ModelProto) -> onnx_runtimes.Run:
    """A model in tract."""
    with scratch() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model.SerializeToString())
        try:
            read = tract.onnx().load(str(path))
            for i, value in enumerate(model.graph.input):
                dims = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
                read.set_input_fact(i, ",".join(map(str, [*dims, "f32"])))
            for i in range(len(model.graph.output)):
                read.set_output_fact(i, None)
            runnable = read.into_model().into_runnable()
        except Exception as error:
            raise UnsupportedModelError(f"tract cannot load the model: {str(error).strip().splitlines()[0]}") from error

    def run(inputs: Sequence[NDArray[np.float32]]) -> list[NDArray[Any]]:
        return [result.to_numpy() for result in runnable.run(list(inputs))]

    return run
