"""AIMET's encodings files (JSON), versions 0.6.1, 1.0.0 and 2.0.0: `dumps` and `loads` are inverse to each other.

0.6.1 and 1.0.0 state `offset` = qmin - zero point, so that the smallest real value is scale * offset. Their only hint
at signedness is the symmetry flag, and they have no channel axis. 2.0.0 states zero point, signedness and axis, but
does not separate parameters from activations. None of them knows narrow grids or one width per channel. What a version
cannot say goes under a top-level key of our own (`files.GRIDS`), which AIMET's readers ignore: they see the next wider
grid with the same scales. Of scales for blocks, 1.0.0 states the values but not the shape (it stands under `SHAPES`),
2.0.0 both, 0.6.1 neither.

Checked against what aimet-torch 2.42 writes and what aimet-torch and aimet-onnx 2.42 read.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pow2quant import foreign
from pow2quant.adapters.aimet_entries import SHAPES, Entry, Reader, container, from_0_6_1, from_1_0_0, from_2_0_0
from pow2quant.adapters.files import (
    GRIDS,
    at_least_opset,
    check_names_and_shapes,
    exact_grids,
    lost_grids,
    parameter_codes,
)
from pow2quant.artifact import Artifact
from pow2quant.errors import ConfigError, EncodingError, FileFormatError
from pow2quant.foreign import parsed
from pow2quant.pow2_constraints import Encoding
from pow2quant.saving import write

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from pow2quant.artifact import Table

VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
"""Versions that can be written and read; the last two differ only for block-wise scales that are integers."""

PACKAGE = "pow2quant"


def _producer() -> dict[str, str]:
    try:
        return {"package": PACKAGE, "version": installed(PACKAGE)}
    except PackageNotFoundError:  # run from a checkout that is not installed
        return {"package": PACKAGE}


PRODUCER = _producer()


def dumps(table: Table, parameter_names: Collection[str], version: str) -> str:
    """The table as the text of an encodings file.

    parameter_names: the tensors that are weights or biases. Raises ConfigError for a version not in `VERSIONS`.
    """
    if version not in VERSIONS:
        raise ConfigError(f"encodings version: {version!r} is not one of {', '.join(VERSIONS)}")
    blocks = {name: list(e.scale.shape) for name, e in table.items() if e.block is not None}
    if blocks and version == "0.6.1":
        raise ConfigError(
            f"encodings version: 0.6.1 has no scales for blocks, as {min(blocks)} has; legal: 1.0.0, 2.0.0"
        )
    document: dict[str, Any] = {"version": version, "producer": PRODUCER}
    if version >= "2":
        document["encodings"] = [{"name": name, **_to_2_0_0(e)} for name, e in table.items()]
    else:
        parameters = {name: e for name, e in table.items() if name in parameter_names}
        activations = {name: e for name, e in table.items() if name not in parameter_names}
        for key, part in (("activation_encodings", activations), ("param_encodings", parameters)):
            document[key] = (
                {name: _to_0_6_1(e) for name, e in part.items()}
                if version == "0.6.1"
                else [{"name": name, **_to_1_0_0(e)} for name, e in part.items()]
            )
        document |= {"excluded_layers": [], "quantizer_args": _summary(parameters, activations)}
        document |= {SHAPES: blocks} if blocks else {}
    lost = lost_grids(table, read(document, "", {}))
    return json.dumps(document | ({GRIDS: lost} if lost else {}), indent=2, allow_nan=False) + "\n"


def loads(text: str, *, source: str = "<encodings>", axes: Mapping[str, int] | None = None) -> Table:
    """The table in the text of an encodings file; its version is recognized by its structure.

    Entries of dtype float are left out: their tensors stay float. In files named after torch modules, the encodings of
    `conv1` are called `conv1.input` and `conv1.output`, from the second on `conv1.input.1`.

    source: the file's name, for messages. axes: the channel axis by tensor (see `channel_axes`), for versions that
    state none; 0 for tensors not in it. Raises FileFormatError naming the file, the tensor and the key.
    """
    try:
        document = parsed(text, nan=False)
    except ValueError as error:
        raise FileFormatError(f"{source}: not JSON: {error}") from error
    return read(document, source, axes or {})


def load(path: Path, axes: Mapping[str, int] | None = None) -> Table:
    """`loads` of a file. Raises FileFormatError, naming it, also when it cannot be read."""
    return loads(_text(path), source=str(path), axes=axes)


def _text(path: Path) -> str:
    return foreign.text(path, foreign.MOST_JSON)


def apply(model: onnx.ModelProto, table: Table) -> Artifact:
    """Pairs a float ONNX, whose weights lie on their grids, with its table.

    Raises EncodingError naming tensors that the model does not have, per-channel encodings that do not fit their
    tensor's shape, and weights that are off their grid.
    """
    check_names_and_shapes(model, table)
    for tensor in model.graph.initializer:
        if tensor.name in table:
            parameter_codes(tensor, table[tensor.name])
    return Artifact(at_least_opset(model), dict(table))


def channel_axes(model: onnx.ModelProto) -> dict[str, int]:
    """The output-channel axis of every weight whose axis is not 0: of ConvTranspose, Gemm without transB, MatMul."""
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    axes = {}
    for node in model.graph.node:
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        if len(node.input) < 2 or ranks.get(node.input[1], 0) < 2:
            continue
        if node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not transposed):
            axes[node.input[1]] = 1
        elif node.op_type == "MatMul":
            axes[node.input[1]] = ranks[node.input[1]] - 1
    return axes


def _export(artifact: Artifact, folder: str | Path, version: str) -> Path:
    """Writes `model.encodings` into the folder and returns its path. Raises OutputError when that is not possible."""
    path = Path(folder) / "model.encodings"
    parameters = {tensor.name for tensor in artifact.model.graph.initializer}
    write(path, dumps(artifact.encodings, parameters, version).encode())
    return path


def export_0_6_1(artifact: Artifact, folder: str | Path) -> Path:
    """AIMET encodings 0.6.1 as `model.encodings`: objects by tensor name."""
    return _export(artifact, folder, "0.6.1")


def export_1_0_0(artifact: Artifact, folder: str | Path) -> Path:
    """AIMET encodings 1.0.0 as `model.encodings`: lists of activations and parameters."""
    return _export(artifact, folder, "1.0.0")


def export_2_0_0(artifact: Artifact, folder: str | Path) -> Path:
    """AIMET encodings 2.0.0 as `model.encodings`: one list, named after ONNX's own attributes."""
    return _export(artifact, folder, "2.0.0")


def convert(source: Path, version: str, target: Path) -> Path:
    """Writes an encodings file in another version, for a converter that does not take the one it is in.

    Versions before 2 keep weights and biases apart, 2.x does not say which they are: those are then the tensors with
    one scale per channel, or of 32 bits, or called `weight` or `bias`. Along which axis channels lie, 2.x states and
    others do not: `<name>.onnx` beside the file says it. Raises FileFormatError, also where that is missing, and
    OutputError.
    """
    text, model = _text(source), source.with_suffix(".onnx")
    axes = channel_axes(onnx.load(model, load_external_data=False)) if model.is_file() else {}
    table = loads(text, source=str(source), axes=axes)
    if version >= "2" and not model.is_file() and not _states_axes(parsed(text)):
        unknown = next((name for name, e in table.items() if e.axis is not None and e.scale.size > 1), None)
        if unknown is not None:
            raise FileFormatError(
                f"{source}: {unknown} has scales per channel, and this version does not say along which axis; "
                f"put the network's ONNX file beside it, as {model.name}"
            )
    listed = _parameter_names(parsed(text))
    names = listed if listed is not None else {name for name, e in table.items() if _looks_like_parameter(name, e)}
    write(target, dumps(table, names, version).encode())
    return target


def _parameter_names(document: dict[str, Any]) -> set[str] | None:
    """The tensors that a file lists as parameters; None for versions that do not."""
    part = document.get("param_encodings")
    if isinstance(part, dict):
        return set(part)
    return {entry["name"] for entry in part} if isinstance(part, list) else None


def _looks_like_parameter(name: str, encoding: Encoding) -> bool:
    return encoding.axis is not None or encoding.grid.width == 32 or name.rpartition(".")[2] in ("weight", "bias")


def _offsets(encoding: Encoding) -> list[int]:
    offsets: list[int] = np.ravel(container(encoding.grid).qmin - encoding.zero_point).tolist()
    return offsets


def _scales(encoding: Encoding) -> list[float]:
    scales: list[float] = encoding.scale.ravel().tolist()
    return scales


def _to_0_6_1(encoding: Encoding) -> list[dict[str, Any]]:
    steps = 2**encoding.grid.width - 1
    return [
        {
            "min": scale * offset,
            "max": scale * (offset + steps),
            "scale": scale,
            "offset": offset,
            "bitwidth": encoding.grid.width,
            "dtype": "int",
            "is_symmetric": str(encoding.symmetric),
        }
        for scale, offset in zip(_scales(encoding), _offsets(encoding), strict=True)
    ]


def _to_1_0_0(encoding: Encoding) -> dict[str, Any]:
    blocks = {} if encoding.block is None else {"block_size": encoding.block}
    return {
        "dtype": "INT",
        "bw": encoding.grid.width,
        "is_sym": encoding.symmetric,
        "scale": _scales(encoding),
        "offset": _offsets(encoding),
        "enc_type": "PER_BLOCK" if blocks else "PER_TENSOR" if encoding.axis is None else "PER_CHANNEL",
        **blocks,
    }


def _to_2_0_0(encoding: Encoding) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "output_dtype": f"{'' if encoding.grid.signed else 'u'}int{encoding.grid.width}",
        "y_scale": encoding.scale.tolist(),
    }
    if encoding.zero_point.any():
        entry["y_zero_point"] = encoding.zero_point.tolist()
    if encoding.axis is not None and encoding.block is not None:
        return entry | {"axis": 1 - encoding.axis, "block_size": encoding.block}
    return entry if encoding.axis is None else entry | {"axis": encoding.axis}


def _summary(parameters: Table, activations: Table) -> dict[str, Any]:
    """`quantizer_args`: for people, who see at a glance what the file holds."""
    weights = [e for e in parameters.values() if e.grid.width < 32]
    return {
        "param_bitwidth": max((e.grid.width for e in weights), default=32),
        "activation_bitwidth": max((e.grid.width for e in activations.values()), default=32),
        "dtype": "int",
        "is_symmetric": all(e.symmetric for e in weights),
        "per_channel_quantization": any(e.axis is not None for e in weights),
    }


def read(document: Any, source: str, axes: Mapping[str, int]) -> Table:
    """`loads`, of what a file's text says."""
    return {name: e for name, e in read_all(document, source, axes).items() if e is not None}


def read_all(document: Any, source: str, axes: Mapping[str, int]) -> dict[str, Encoding | None]:
    """`read`, with None for the tensors that the file says to be float."""
    if not isinstance(document, dict):
        raise FileFormatError(f"{source}: expected an object at the top, got {type(document).__name__}")
    version = document.get("version", VERSIONS[0])  # what `save_encodings_to_json` writes names no version
    if version not in VERSIONS:
        raise FileFormatError(f"{source}: version: {version!r} is not one of {', '.join(VERSIONS)}")
    exact = exact_grids(document.get(GRIDS, {}), f"{source}: {GRIDS}")
    if _states_axes(document):
        axes = {}
    shapes, table = document.get(SHAPES), dict[str, Encoding | None]()
    for name, read, content in _entries(document, source):
        entry = Entry(f"{source}: {name}", content, shapes.get(name) if isinstance(shapes, dict) else None)
        if name in table:
            entry.refuse("name", "occurs twice")
        try:
            encoding = read(entry, exact.get(name), axes.get(name, 0))
        except EncodingError as error:
            raise FileFormatError(f"{entry.where}: {error}") from error
        table[name] = encoding
    return table


def _states_axes(document: Mapping[str, Any]) -> bool:
    """Whether a file says along which axis channels lie, where it is not the first: as 2.x does, and as we do."""
    producer = document.get("producer")
    return "encodings" in document or (isinstance(producer, dict) and producer.get("package") == PACKAGE)


def _entries(document: dict[str, Any], source: str) -> Iterator[tuple[str, Reader, Any]]:
    """(tensor, reader, content) of every entry: a list under `encodings` is 2.x, other lists 1.0.0, objects 0.6.1."""
    keys = ("encodings",) if "encodings" in document else ("activation_encodings", "param_encodings")
    for key in keys:
        if key not in document:
            raise FileFormatError(f"{source}: no key {key!r} (nor encodings)")
        part = document[key]
        if isinstance(part, list):
            read = from_2_0_0 if key == "encodings" else from_1_0_0
            for number, content in enumerate(part):
                yield Entry(f"{source}: {key}[{number}]", content).one("name", str), read, content
        elif isinstance(part, dict) and key != "encodings":
            for name, content in part.items():
                yield from _tensors(name, content, source)
        else:
            raise FileFormatError(f"{source}: {key}: expected a list or an object, got {type(part).__name__}")


def _tensors(name: str, content: Any, source: str) -> Iterator[tuple[str, Reader, Any]]:
    """One tensor of an ONNX-named 0.6.1 file; every input and output of a module in a torch-named one."""
    if isinstance(content, list) or not isinstance(content, dict) or "bitwidth" in content:
        yield name, from_0_6_1, content
        return
    for direction, by_index in content.items():
        if direction not in ("input", "output") or not isinstance(by_index, dict):
            raise FileFormatError(f"{source}: {name}: {direction}: expected input or output with objects by index")
        for index, one in by_index.items():
            yield f"{name}.{direction}" + (f".{index}" if index != "0" else ""), from_0_6_1, one
