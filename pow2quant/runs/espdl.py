"""Files for ESP-DL: esp-ppq writes the network with the scales of the QDQ file; the file is read back, not run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from pow2quant.artifact import Artifact
from pow2quant.errors import OutputError, UnsupportedModelError
from pow2quant.pow2_constraints import Encoding
from pow2quant.runs import esp_ppq
from pow2quant.saving import scratch, write

FILE = "model.espdl"
HEADER = 16
"""Bytes in front of the flatbuffer."""
SHIFTED = ("Conv", "Gemm", "MatMul", "Mul")
"""ESP-DL shifts their results to the right only."""


def export_espdl(artifact: Artifact, folder: Path, *, batch: int = 1) -> Path:
    """A file for ESP-DL in `folder`, with one input of noise and what the chip has to give for it. Returns the file.

    batch: the size that it takes. Raises MissingExtraError without esp-ppq; UnsupportedModelError, naming the tensor or
    the node, for what ESP-DL does not have; OutputError where the file, read back, does not hold the encodings and the
    codes of the network.
    """
    esp_ppq.require()
    file = esp_ppq.File(artifact, batch)
    graph, inputs = file.graph, _noise(file)
    outputs = dict(zip(graph.outputs, file.run([x.numpy() for x in inputs.values()]), strict=True))
    tested = {"inputs": inputs, "outputs": {name: torch.from_numpy(y) for name, y in outputs.items()}}
    exporter: Any = import_module("esp_ppq.parser.espdl_exporter").EspdlExporter()
    with scratch() as place, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            exporter.export(str(place / FILE), graph, values_for_test=tested, export_config=False)
        except Exception as error:  # whatever its patterns raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(f"esp-ppq: the network cannot be written: {reason}") from error
        content = (place / FILE).read_bytes()
    _check(file.network, Content(content))
    write(Path(folder) / FILE, content)
    return Path(folder) / FILE


def _noise(file: esp_ppq.File) -> dict[str, torch.Tensor]:
    """Values on the grids of the network's inputs, each equally likely."""
    random, found = np.random.default_rng(0), {}
    for value in file.network.model.graph.input:
        shape = [d.dim_value or file.batch for d in value.type.tensor_type.shape.dim]
        encoding = file.network.encodings[value.name]
        codes = random.integers(encoding.grid.qmin, encoding.grid.qmax + 1, shape)
        found[value.name] = torch.from_numpy(encoding.dequantize(codes))
    return found


class Content:
    """A file, read. exponents: of every tensor. constants: their codes, as they are laid out there."""

    def __init__(self, content: bytes) -> None:
        schema = import_module("esp_ppq.parser.espdl.FlatBuffers.Dl.Model")
        self.graph = schema.Model.GetRootAs(content[HEADER:], 0).Graph()
        kinds = ("Initializer", "Input", "Output", "ValueInfo", "TestInputsValue", "TestOutputsValue")
        found = {kind: list(self._listed(kind)) for kind in kinds}
        self.constants, self.tested = (
            {tensor.Name().decode(): _codes(tensor) for kind in each for tensor in found[kind]}
            for each in (("Initializer",), ("TestInputsValue", "TestOutputsValue"))
        )
        self.exponents: dict[str, list[int]] = {
            tensor.Name().decode(): [tensor.Exponents(i) for i in range(tensor.ExponentsLength())]
            for kind in kinds[:4]
            for tensor in found[kind]
        }

    def _listed(self, kind: str) -> Iterator[Any]:
        return (getattr(self.graph, kind)(i) for i in range(getattr(self.graph, f"{kind}Length")()))

    def shifts(self) -> Iterator[tuple[str, int]]:
        """Nodes by the name of their result, and by how many bits it is shifted to the right, at least."""
        for node in self._listed("Node"):
            if node.OpType().decode() in SHIFTED:
                names = (node.Input(0), node.Input(1), node.Output(0))
                first, second, result = (self.exponents[name.decode()] for name in names)
                yield node.Output(0).decode(), min(result) - max(first) - max(second)


def _codes(tensor: Any) -> NDArray[np.int64]:
    """The codes of a constant, zeros that fill its last block left out."""
    raw = b"".join(tensor.RawData(i).BytesAsNumpy().tobytes() for i in range(tensor.RawDataLength()))
    size = int(np.prod(tensor.DimsAsNumpy()))
    types = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 1: np.float32}
    return np.frombuffer(raw, types[tensor.DataType()])[:size].astype(np.int64)


def _check(network: Artifact, found: Content) -> None:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.model.graph.initializer}
    for name, encoding in network.encodings.items():
        if not _same_exponents(encoding, found.exponents.get(name)):
            raise OutputError(f"{name}: the file, read back, has the exponents {found.exponents.get(name)}")
        if name in constants:
            codes, own = found.constants[name], encoding.quantize(constants[name]).ravel()
            if sorted(codes[codes != 0]) != sorted(own[own != 0]):  # layouts differ
                raise OutputError(f"{name}: the file, read back, has other codes")
    for name, shift in found.shifts():
        if shift < 0:
            raise UnsupportedModelError(f"{name}: ESP-DL shifts to the right only, and this shift is {shift}")


def _same_exponents(encoding: Encoding, exponents: list[int] | None) -> bool:
    wanted = np.ravel(encoding.exponent)
    return exponents is not None and (wanted == (exponents if len(exponents) == len(wanted) else exponents[:1])).all()
