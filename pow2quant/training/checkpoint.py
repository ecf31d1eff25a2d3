"""Checkpoints: one safetensors file with its structure as JSON in the header, so that it is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pow2quant.errors import FileFormatError
from pow2quant.saving import write

STRUCTURE = "pow2quant.structure"


def dump(path: Path, state: Any) -> None:
    """Writes tensors inside dictionaries, lists and tuples of numbers, texts, booleans and None.

    Raises OutputError when the disk does not allow it, TypeError for anything else in it.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[f"{len(tensors):06d}"] = value.detach().cpu().clone().contiguous()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"dict": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [plain(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{type(value).__name__} cannot be saved in a checkpoint")

    structure = json.dumps(plain(state))
    write(path, save(tensors, metadata={STRUCTURE: structure}))


def load(path: Path) -> Any:
    """The inverse of `dump`. Raises FileFormatError when the file is missing, damaged or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})[STRUCTURE])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileFormatError(f"{path}: not a checkpoint of pow2quant: {error}") from error

    def rich(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return tensors[f"{inner:06d}"]
        if kind == "dict":
            return {key: rich(item) for key, item in inner}
        return (list if kind == "list" else tuple)(rich(item) for item in inner)

    return rich(structure)
