"""Executors of QDQ files other than onnxruntime: what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import opened
from pow2quant.validation.ort import codes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.validation.agreement import Arrays

    Run = Callable[[Sequence[NDArray[np.float32]]], Sequence[NDArray[Any]]]
    """Graph inputs, each with the batch in front -> graph outputs."""


def executor(
    model: Path,
    name: str,
    start: Callable[[onnx.ModelProto], Run],
    batch: int | None = None,
    on_grid: bool = False,
) -> Executor:
    """A QDQ file in a runtime.

    start: a model -> what runs it. batch: the only size it takes; None: any. on_grid: its inputs are rounded to their
    grids before it gets them, as one has to do where its own rounding of inputs is not exact.
    """
    file = File(model, start, batch, on_grid)
    return Executor(name, file.run, file.tensors, network=lambda: file.network, measured=True)


class File:
    """A QDQ file in a runtime: as it is, and with the codes of every tensor as outputs. Fields: see `executor`."""

    def __init__(self, model: Path, start: Callable[[onnx.ModelProto], Run], batch: int | None, on_grid: bool) -> None:
        self.file, self.start, self.batch, self.on_grid = opened(model), start, batch, on_grid

    def run(self, batch: Arrays) -> list[NDArray[np.float32]]:
        """Graph inputs -> graph outputs."""
        return [np.asarray(x, np.float32) for x in self._in_batches(self._plain, batch)]

    def tensors(self, batch: Arrays) -> Mapping[str, NDArray[np.float32]]:
        """Graph inputs -> every quantized activation, dequantized from its codes."""
        table = self.network.encodings
        codes = self._in_batches(self._exposed, batch)[len(self._model.graph.output) :]
        return {name: table[name].dequantize(q) for name, q in zip(self._names.values(), codes, strict=True)}

    def _in_batches(self, run: Run, batch: Arrays) -> list[NDArray[Any]]:
        size = self.batch or len(batch[0])
        if self.on_grid:
            table, names = self.network.encodings, [value.name for value in self.network.model.graph.input]
            batch = [table[n].fake_quantize(x) if n in table else x for n, x in zip(names, batch, strict=False)]
        starts = range(0, len(batch[0]), size)
        parts = [run([np.ascontiguousarray(x[i : i + size], np.float32) for x in batch]) for i in starts]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    @property
    def network(self) -> Artifact:
        """What the file holds."""
        return self.file.network

    @property
    def _model(self) -> onnx.ModelProto:
        return self.file.model

    @cached_property
    def _plain(self) -> Run:
        return self.start(self._model)

    @cached_property
    def _names(self) -> dict[str, str]:
        return codes_of(self._model.graph, self.network.encodings)

    @cached_property
    def _exposed(self) -> Run:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in self._names)
        return self.start(model)
