"""hls4ml's C simulation as an executor: the QDQ file in integers, written as a project and compiled with its script."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.integer.hls4ml import BUILD, PROJECT, Layers
from pow2quant.saving import scratch
from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import opened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.integer.program import Program
    from pow2quant.validation.agreement import Arrays

NAME = "hls4ml (C simulation)"


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file as an hls4ml project, compiled when the first batch runs.

    Raises MissingExtraError without hls4ml or g++; UnsupportedModelError or NotPowerOfTwoError, naming the node, where
    the network cannot be written.
    """
    try:
        import_module("hls4ml")
    except ImportError as error:
        raise MissingExtraError(f"hls4ml is not installed: pip install 'pow2quant[hls4ml]' ({error})") from error
    if shutil.which("g++") is None:
        raise MissingExtraError("hls4ml's simulation needs g++, and there is none")
    file = opened(model)
    return [replace(executor(file.program), network=lambda: file.network)]


def executor(program: Program) -> Executor:
    """A program as an executor."""
    made = _Compiled(program)
    return Executor(NAME, made.run, made.tensors, measured=True)


class _Compiled:
    """A program's libraries: as it is exported, and with every computed tensor as an output."""

    def __init__(self, program: Program) -> None:
        self.program, self.layers = program, Layers(program)

    def run(self, batch: Arrays) -> list[NDArray[np.float32]]:
        """Graph inputs -> graph outputs."""
        return list(self._plain.run(batch).values())

    def tensors(self, batch: Arrays) -> Mapping[str, NDArray[np.float32]]:
        """Graph inputs -> every computed tensor."""
        return self._traced.run(batch)

    @cached_property
    def _plain(self) -> _Library:
        return _Library(self.layers)

    @cached_property
    def _traced(self) -> _Library:
        named = self.layers.names
        last = {named[step.output]: step.output for step in self.program.steps}
        return _Library(Layers(self.program, list(last.values())))


class _Library:
    """A project, compiled and loaded."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        with scratch() as folder:
            layers.write(folder)
            made = subprocess.run(["bash", BUILD], cwd=folder, capture_output=True, text=True, check=False)
            if made.returncode:
                reason = next((line for line in made.stderr.splitlines() if "error" in line), made.stderr[-200:])
                raise UnsupportedModelError(f"hls4ml: the project does not compile: {reason}")
            (library,) = Path(folder, "firmware").glob("*.so")
            self.function = ctypes.CDLL(str(library))[f"{PROJECT}_float"]

    def run(self, batch: Sequence[NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Graph inputs (N, …) -> the outputs by name."""
        program, orders = self.layers.program, self.layers.orders
        given = [x.reshape(len(x), -1)[:, orders[n]] for n, x in zip(program.inputs, batch, strict=True)]
        given = [np.ascontiguousarray(x, np.float32) for x in given]
        found = {n: np.empty((len(given[0]), program.tensors[n].size), np.float32) for n in self.layers.outputs}
        for rows in zip(*given, *found.values(), strict=True):
            self.function(*(ctypes.c_void_p(row.ctypes.data) for row in rows))
        for name, values in found.items():
            values[:, orders[name]] = values.copy()
        return {name: x.reshape(len(x), *program.tensors[name].shape) for name, x in found.items()}
