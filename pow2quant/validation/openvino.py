"""OpenVINO on the CPU as an executor: the QDQ file, computed in float32."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.validation import onnx_runtimes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from pow2quant.validation.agreement import Executor

NAME = "OpenVINO"
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
"""Without the first, processors that can compute in 16 bits."""


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file in OpenVINO's CPU plugin, its inputs rounded to their grids before.

    Raises MissingExtraError where it is not installed; what it cannot load is an UnsupportedModelError when it is run.
    """
    try:
        openvino = import_module("openvino")
    except ImportError as error:
        raise MissingExtraError(f"OpenVINO is not installed: pip install 'pow2quant[openvino]' ({error})") from error
    return [onnx_runtimes.executor(model, NAME, lambda file: loaded(openvino, file), on_grid=True)]


def loaded(openvino: Any, model: onnx.ModelProto) -> onnx_runtimes.Run:
    """A model in OpenVINO, compiled for the shapes of its inputs: it computes other values where a shape is read."""
    core, content = openvino.Core(), model.SerializeToString()

    @lru_cache(maxsize=2)
    def compiled(*shapes: tuple[int, ...]) -> Any:
        try:
            read = core.read_model(content)
            read.reshape(dict(enumerate(shapes)))
            return core.compile_model(read, "CPU", OPTIONS)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(f"OpenVINO cannot load the model: {reason}") from error

    def run(inputs: Sequence[NDArray[np.float32]]) -> list[NDArray[Any]]:
        network = compiled(*(x.shape for x in inputs))
        results = network(list(inputs))
        return [results[i].copy() for i in range(len(network.outputs))]

    return run
