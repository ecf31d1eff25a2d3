"""Checkpoints: one safetensors file with its structure as JSON in the header, so that it is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pow2quant.errors import FileFormatError
from pow2quant.foreign import check_is_file, parsed
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
    check_is_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            structure = parsed((file.metadata() or {})[STRUCTURE])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        return _rich(structure, tensors)
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path}: not a checkpoint of pow2quant: {error}") from error


def difference(before: str, now: str) -> str:
    """The first line in which two configurations, with their digests, differ."""
    pairs = zip(before.splitlines(), now.splitlines(), strict=False)
    was, has = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", ""))
    what = was.partition(":")[0]
    if what in ("network", "data") and has.startswith(f"{what}:"):  # digests
        other = {"network": "another network", "data": "other data"}[what]
        return f"was made with {other}; start anew with --overwrite"
    return f"was made with another configuration ({was!r}, now {has!r}); start anew with --overwrite"


def _rich(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[f"{inner:06d}"]
    if kind == "dict":
        return {key: _rich(item, tensors) for key, item in inner}
    return {"list": list, "tuple": tuple}[kind](_rich(item, tensors) for item in inner)
