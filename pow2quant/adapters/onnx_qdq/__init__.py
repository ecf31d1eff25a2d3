"""ONNX with QuantizeLinear and DequantizeLinear (QDQ): `to_qdq` and `from_qdq` are inverse to each other.

What is written (opset 21): weights and biases are integer initializers with a DequantizeLinear, every other quantized
tensor has one QuantizeLinear and one DequantizeLinear. A DequantizeLinear's result bears the tensor's own name, so that
the float network's nodes, its graph outputs and every tensor's name stay as they are; only behind graph inputs, whose
names are taken, the consumers are led to `<input>_dequantized`.

Weights are stored in 4, 8 or 16 bits (8 or 16, where the network's metadata say so), biases in 32, other tensors in 8
or 16. Of any other width, they take the next
wider type, and a tensor that is computed is clipped to its grid before it is quantized, unless it was only selected
from tensors of the same encoding. (onnxruntime runs that with and without optimizations; 4-bit activations it loads
only without.) The exact grids stand in the file's metadata (`files.GRIDS`); a file of another tool has none, and there
the width of the storage counts.

https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from pow2quant import bounds
from pow2quant.adapters.onnx_qdq.batch import fix_batch
from pow2quant.adapters.onnx_qdq.opsets import lower_opset
from pow2quant.adapters.onnx_qdq.reader import from_qdq
from pow2quant.adapters.onnx_qdq.writer import to_qdq
from pow2quant.errors import FileFormatError, OutputError
from pow2quant.foreign import check_is_file
from pow2quant.saving import write

if TYPE_CHECKING:
    from onnx import ModelProto

    from pow2quant.artifact import Artifact

__all__ = ["asked", "export_qdq", "from_qdq", "load", "save", "to_qdq"]


def load(path: Path) -> ModelProto:
    """Reads and checks an ONNX file, external data included.

    Raises FileFormatError, naming the file, when it is missing, corrupt, or not ONNX.
    """
    check_is_file(path)
    try:
        model = onnx.load(path, format="protobuf")
        bounds.check(model)
        onnx.checker.check_model(str(path))
    except MemoryError:
        raise
    except Exception as error:  # protobuf's, the checker's and the operating system's errors have no common base
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(f"{path}: not a valid ONNX file: {reason or type(error).__name__}") from error
    return model


def save(model: ModelProto, path: Path) -> None:
    """Writes an ONNX file under a temporary name in its folder and renames it. Raises OutputError."""
    try:
        content = model.SerializeToString()
    except Exception as error:  # protobuf's EncodeError, or ValueError, by its version
        raise OutputError(f"{path}: cannot be written: {error}") from error
    write(path, content)


def export_qdq(
    artifact: Artifact,
    folder: str | Path,
    *,
    opset: int | None = None,
    batch: int | None = None,
    storage: str | None = None,
) -> Path:
    """QDQ ONNX with integer weights, as `model.onnx`.

    opset: an older one, from 13. batch: the only size that the file takes; by default it is free. storage: `int4` or
    `int8`, the type of weights of up to 4 bits; by default as in the run.
    Raises EncodingError and OutputError; ConfigError and UnsupportedModelError where the file cannot be what is asked.
    """
    path = Path(folder) / "model.onnx"
    stored = artifact if storage is None else artifact.stored_in(storage)
    save(asked(to_qdq(stored), opset, batch), path)
    return path


def asked(model: ModelProto, opset: int | None, batch: int | None) -> ModelProto:
    """The model, changed in place to an opset and to one batch size where these are given."""
    if batch is not None:
        fix_batch(model, batch)
    if opset is not None:
        lower_opset(model, opset)
    return model
