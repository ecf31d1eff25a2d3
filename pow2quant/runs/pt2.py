"""A plain torch program (.pt2) that computes the network's bits with float operations: exporter and executor."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from pow2quant.adapters.float_ops import to_float_ops
from pow2quant.adapters.onnx_qdq.batch import fix_batch
from pow2quant.artifact import Artifact
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.onnx.network import read_network
from pow2quant.saving import write
from pow2quant.targets import of as target_of
from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import opened

Arrays = Sequence[NDArray[np.float32]]
Start = Callable[[torch.export.ExportedProgram], Callable[..., Any]]
"""A program -> a function of its inputs that returns its output, or the sequence of them."""

FILE = "model.pt2"
NAME = "torch program"


def export_pt2(artifact: Artifact, folder: Path, *, batch: int = 1) -> Path:
    """A program for `torch.export.load`, plain torch operations in float32, in `folder`. Returns the file.

    batch: the size that it takes. Raises UnsupportedModelError for what cannot be written so.
    """
    require_half_even(artifact)
    path = Path(folder) / FILE
    write(path, content(program(artifact, batch)))
    return path


def require_half_even(artifact: Artifact) -> None:
    """Raises UnsupportedModelError for a target that rounds otherwise than torch.round."""
    target = target_of(artifact.model)
    if target.rounding_matters:
        raise UnsupportedModelError(f"target {target.name} does not round half to even, as torch's round does")


def program(artifact: Artifact, batch: int, outputs: list[str] | None = None) -> torch.export.ExportedProgram:
    """The network captured by torch.export. outputs: tensors that are given in place of the network's outputs.

    Raises ConfigError for a batch size below 1; UnsupportedModelError naming the operation that it cannot capture.
    """
    model = to_float_ops(artifact, outputs)
    fix_batch(model, batch)
    types = [value.type.tensor_type for value in model.graph.input]
    network = read_network(model).requires_grad_(False)
    zeros = [
        np.zeros([d.dim_value for d in t.shape.dim], onnx.helper.tensor_dtype_to_np_dtype(t.elem_type)) for t in types
    ]
    return torch.export.export(network, tuple(map(torch.from_numpy, zeros)))


def content(exported: torch.export.ExportedProgram) -> bytes:
    """The file of a program."""
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file as a torch program, written, loaded again, and run one sample at a time."""
    return [executor(model, NAME, _loaded)]


def executor(model: Path, name: str, start: Start) -> Executor:
    """A QDQ file as a torch program in a runtime. start: a program for one sample -> what runs it."""
    file = _File(opened(model).network, start)
    return Executor(name, file.run, file.tensors, network=lambda: file.network, measured=True)


class _File:
    """A network's programs: as it is exported, and with every quantized activation as an output."""

    def __init__(self, network: Artifact, start: Start) -> None:
        self.network, self.start = network, start
        self.activations = sorted(network.encodings.keys() - {t.name for t in network.model.graph.initializer})

    def run(self, batch: Arrays) -> list[NDArray[np.float32]]:
        """Graph inputs -> graph outputs."""
        return _each(self._plain, batch)

    def tensors(self, batch: Arrays) -> Mapping[str, NDArray[np.float32]]:
        """Graph inputs -> every quantized activation."""
        return dict(zip(self.activations, _each(self._traced, batch), strict=True))

    @cached_property
    def _plain(self) -> Callable[..., Any]:
        return self.start(program(self.network, 1))

    @cached_property
    def _traced(self) -> Callable[..., Any]:
        return self.start(program(self.network, 1, self.activations))


def _loaded(exported: torch.export.ExportedProgram) -> Callable[..., Any]:
    loaded: Callable[..., Any] = torch.export.load(io.BytesIO(content(exported))).module()
    return loaded


def _each(run: Callable[..., Any], batch: Arrays) -> list[NDArray[np.float32]]:
    """Every sample alone; the results together."""
    rows: list[Sequence[torch.Tensor]] = []
    with torch.no_grad():
        for i in range(len(batch[0])):
            found = run(*(torch.from_numpy(np.ascontiguousarray(x[i : i + 1])) for x in batch))
            rows.append(found if isinstance(found, (tuple, list)) else [found])
    return [torch.cat(list(column)).numpy() for column in zip(*rows, strict=True)]
