"""A run's folder: written beside and renamed, and the quantized state in it."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from pow2quant.artifact import Table
from pow2quant.errors import EncodingError, FileFormatError, OutputError
from pow2quant.pow2_constraints import Encoding, IntGrid

REPORT, CONFIG, STATE, CERTIFICATE = "report.json", "config.yaml", "model.safetensors", "certificate.json"
STATISTICS = "statistics.json"
QDQ, FLOAT, ENCODINGS = "model.onnx", "model_float.onnx", "model.encodings"

_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def staged(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `target` when all went well, and vanishes otherwise.

    Raises OutputError when target exists (unless it is an empty folder, or a run and `overwrite` is set), or when the
    folder or the disk does not allow writing; an existing run is then still as it was.
    """
    target = target.resolve()
    _clear_after_killed_runs(target)
    _check_free(target, overwrite)
    staging = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex[:8]}.partial")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        yield staging
        _check_free(target, overwrite)  # another run may have come first
        _replace(staging, target)
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS:
            raise
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _clear_after_killed_runs(target: Path) -> None:
    """Removes what runs that were killed left beside the target, and puts back a run that one was about to replace."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*") if target.parent.is_dir() else ():
        pid, *_, kind = left.name.removeprefix(f".{target.name}.").split(".")
        if kind not in ("partial", "old") or not pid.isdigit() or _is_alive(int(pid)):
            continue
        if kind == "old" and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question but Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target}: is a file; the output must be a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target}: exists already; choose another --output, or replace it with --overwrite")
    if not (target / REPORT).is_file():
        raise OutputError(f"{target}: holds no {REPORT}, so it is no run of pow2quant and is not overwritten")


def _replace(staging: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def save_state(path: Path, parameters: Mapping[str, NDArray[Any]], table: Table) -> None:
    """Writes float parameters and encodings as safetensors: `<site>.scale`, `<site>.zero_point`, grids as metadata."""
    from safetensors.numpy import save

    tensors = {f"parameter:{name}": np.array(value, order="C") for name, value in parameters.items()}
    for name, encoding in table.items():
        tensors[f"scale:{name}"] = np.array(encoding.scale)
        tensors[f"zero_point:{name}"] = np.array(encoding.zero_point)
    grids = {n: [e.grid.bits, e.grid.signed, e.grid.narrow, e.axis] for n, e in table.items()}
    path.write_bytes(save(tensors, metadata={"pow2quant.grids": json.dumps(grids)}))


def load_state(path: Path) -> tuple[dict[str, NDArray[Any]], Table]:
    """The inverse of `save_state`. Raises FileFormatError when the file is missing, corrupt or foreign."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            grids = json.loads((file.metadata() or {})["pow2quant.grids"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        table = {name: _encoding(tensors, name, *grid) for name, grid in grids.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, EncodingError) as error:
        raise FileFormatError(f"{path}: not a quantized state of pow2quant: {error}") from error
    return {k.removeprefix("parameter:"): v for k, v in tensors.items() if k.startswith("parameter:")}, table


def _encoding(
    tensors: Mapping[str, NDArray[Any]], name: str, bits: Any, signed: bool, narrow: bool, axis: Any
) -> Encoding:
    grid = IntGrid(tuple(bits) if isinstance(bits, list) else bits, signed, narrow)
    return Encoding(tensors[f"scale:{name}"], tensors[f"zero_point:{name}"], grid, axis)
