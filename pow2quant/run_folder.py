"""A run's folder: its files, and the quantized state in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pow2quant import saving
from pow2quant.artifact import Table
from pow2quant.errors import ConfigError, EncodingError, FileFormatError
from pow2quant.foreign import check_is_file, parsed
from pow2quant.pow2_constraints import Encoding, IntGrid

REPORT, CONFIG, STATE, CERTIFICATE = "report.json", "config.yaml", "model.safetensors", "certificate.json"
STATISTICS = "statistics.json"
ORIGIN = "origin"
"""The tensor of a state that holds the digest of the float network's weights. (Of several metadata, safetensors
writes any first.)"""

SEARCH, STUDY, COMPARISON = "search.json", "study.json", "comparison.json"
QDQ, FLOAT, ENCODINGS = "model.onnx", "model_float.onnx", "model.encodings"


def path_of(given: Any, name: str = "output") -> Path:
    """A path as the argument `name` gives it in Python; `~` is the home folder. Raises ConfigError for what is none."""
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(f"{name}: expected a path, got a {type(given).__name__}")
    return Path(given).expanduser()


def staged(target: Path, overwrite: bool = False) -> AbstractContextManager[Path]:
    """A folder to write into that becomes the run `target`; see `saving.staged`."""
    return saving.staged(target, REPORT, overwrite=overwrite)


def save_state(path: Path, parameters: Mapping[str, NDArray[Any]], table: Table, origin: str) -> None:
    """Writes float parameters and encodings as safetensors: `<site>.scale`, `<site>.zero_point`, grids as metadata.

    origin: a digest of the float network's weights, in hexadecimal.
    """
    from safetensors.numpy import save

    tensors = {f"parameter:{name}": np.array(value, order="C") for name, value in parameters.items()}
    for name, encoding in table.items():
        tensors[f"scale:{name}"] = np.array(encoding.scale)
        tensors[f"zero_point:{name}"] = np.array(encoding.zero_point)
    grids = {n: [e.grid.bits, e.grid.signed, e.grid.narrow, e.axis, e.block] for n, e in table.items()}
    tensors[ORIGIN] = np.frombuffer(bytes.fromhex(origin), np.uint8)
    path.write_bytes(save(tensors, metadata={"pow2quant.grids": json.dumps(grids)}))


def origin_of(path: Path) -> str | None:
    """The digest of the float network's weights of which a state was made; None where it says nothing."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(ORIGIN).tobytes().hex() if ORIGIN in file.keys() else None  # noqa: SIM118 (no mapping)


def load_state(path: Path) -> tuple[dict[str, NDArray[Any]], Table]:
    """The inverse of `save_state`. Raises FileFormatError when the file is missing, corrupt or foreign."""
    from safetensors import SafetensorError, safe_open

    check_is_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            grids = parsed((file.metadata() or {})["pow2quant.grids"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        table = {name: _encoding(tensors, name, *grid) for name, grid in grids.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, EncodingError) as error:
        raise FileFormatError(f"{path}: not a quantized state of pow2quant: {error}") from error
    for key, values in tensors.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise FileFormatError(f"{path}: {key} holds NaN or infinity")
    return {k.removeprefix("parameter:"): v for k, v in tensors.items() if k.startswith("parameter:")}, table


def _encoding(
    tensors: Mapping[str, NDArray[Any]],
    name: str,
    bits: Any,
    signed: bool,
    narrow: bool,
    axis: Any,
    block: Any = None,
) -> Encoding:
    grid = IntGrid.of(bits, signed, narrow)
    return Encoding(tensors[f"scale:{name}"], tensors[f"zero_point:{name}"], grid, axis, block)
