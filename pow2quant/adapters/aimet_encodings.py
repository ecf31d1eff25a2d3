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
import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import onnx

from pow2quant import foreign
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
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.saving import write

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from numpy.typing import NDArray

    from pow2quant.artifact import Table

    Exact = tuple[IntGrid, int | None]

VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
"""Versions that can be written and read; the last two differ only for block-wise scales that are integers."""

SHAPES = "pow2quant.block_scales"
"""The key, at the top of a 1.0.0 file, of the shapes of the scales of weights with blocks."""


PACKAGE = "pow2quant"


def _producer() -> dict[str, str]:
    try:
        return {"package": PACKAGE, "version": installed(PACKAGE)}
    except PackageNotFoundError:  # run from a checkout that is not installed
        return {"package": PACKAGE}


PRODUCER = _producer()

FLOAT32_MAX = float(np.finfo(np.float32).max)


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
    one scale per channel, or of 32 bits, or called `weight` or `bias`. Raises FileFormatError and OutputError.
    """
    text = _text(source)
    table = loads(text, source=str(source))
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


def _container(grid: IntGrid) -> IntGrid:
    """The grid that AIMET sees: one width, not narrow."""
    return IntGrid(grid.width, grid.signed)


def _offsets(encoding: Encoding) -> list[int]:
    offsets: list[int] = np.ravel(_container(encoding.grid).qmin - encoding.zero_point).tolist()
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
    producer = document.get("producer")
    if isinstance(producer, dict) and producer.get("package") == PACKAGE:  # which states every axis but 0
        axes = {}
    shapes, table = document.get(SHAPES), dict[str, Encoding | None]()
    for name, read, content in _entries(document, source):
        entry = _Entry(f"{source}: {name}", content, shapes.get(name) if isinstance(shapes, dict) else None)
        if name in table:
            entry.refuse("name", "occurs twice")
        try:
            encoding = read(entry, exact.get(name), axes.get(name, 0))
        except EncodingError as error:
            raise FileFormatError(f"{entry.where}: {error}") from error
        table[name] = encoding
    return table


def _entries(document: dict[str, Any], source: str) -> Iterator[tuple[str, _Reader, Any]]:
    """(tensor, reader, content) of every entry: a list under `encodings` is 2.x, other lists 1.0.0, objects 0.6.1."""
    keys = ("encodings",) if "encodings" in document else ("activation_encodings", "param_encodings")
    for key in keys:
        if key not in document:
            raise FileFormatError(f"{source}: no key {key!r} (nor encodings)")
        part = document[key]
        if isinstance(part, list):
            read = _from_2_0_0 if key == "encodings" else _from_1_0_0
            for number, content in enumerate(part):
                yield _Entry(f"{source}: {key}[{number}]", content).one("name", str), read, content
        elif isinstance(part, dict) and key != "encodings":
            for name, content in part.items():
                yield from _tensors(name, content, source)
        else:
            raise FileFormatError(f"{source}: {key}: expected a list or an object, got {type(part).__name__}")


def _tensors(name: str, content: Any, source: str) -> Iterator[tuple[str, _Reader, Any]]:
    """One tensor of an ONNX-named 0.6.1 file; every input and output of a module in a torch-named one."""
    if isinstance(content, list) or not isinstance(content, dict) or "bitwidth" in content:
        yield name, _from_0_6_1, content
        return
    for direction, by_index in content.items():
        if direction not in ("input", "output") or not isinstance(by_index, dict):
            raise FileFormatError(f"{source}: {name}: {direction}: expected input or output with objects by index")
        for index, one in by_index.items():
            yield f"{name}.{direction}" + (f".{index}" if index != "0" else ""), _from_0_6_1, one


@dataclass(frozen=True)
class _Entry:
    """The fields of one encoding, whose errors name the file, the tensor and the key.

    shape: of the scales of blocks, where the file states it.
    """

    where: str
    fields: Any
    shape: Any = None

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise FileFormatError(f"{self.where}: {key} {problem}")

    def __getitem__(self, key: str) -> Any:
        if not isinstance(self.fields, dict):
            raise FileFormatError(f"{self.where}: expected an object, got {type(self.fields).__name__}")
        if key not in self.fields:
            self.refuse(key, "is missing")
        return self.fields[key]

    def one(self, key: str, kind: type) -> Any:
        if type(self[key]) is not kind:
            self.refuse(key, f"must be of type {kind.__name__}, got {self[key]!r}")
        return self[key]

    def flag(self, key: str) -> bool:
        return self.flags(key, [self[key]]) == {True}

    def flags(self, key: str, values: list[Any]) -> set[bool]:
        texts = set(map(str, values))  # 1.0.0 has true, 0.6.1 "True"
        if not texts <= {"True", "False"}:
            self.refuse(key, f"must be True or False, got {min(texts - {'True', 'False'})!r:.80}")
        return {text == "True" for text in texts}

    def numbers(self, key: str, nested: bool = False) -> NDArray[np.float64]:
        value = self[key]
        for number in _flat(value) if nested else value if isinstance(value, list) else [value]:
            if type(number) not in (int, float) or not abs(number) <= FLOAT32_MAX:
                self.refuse(key, f"must be finite numbers, got {number!r:.80}")
        if value == []:
            self.refuse(key, "is empty")
        try:
            return np.asarray(value, np.float64)
        except ValueError:
            self.refuse(key, "must be lists of equal lengths")

    def integers(self, key: str, nested: bool = False) -> NDArray[np.int64]:
        numbers = self.numbers(key, nested)
        if (numbers != np.rint(numbers)).any() or (np.abs(numbers) > 1 << 32).any():
            self.refuse(key, f"must be whole numbers of at most 32 bits, got {self[key]!r:.80}")
        return numbers.astype(np.int64)

    def integer(self, key: str) -> int:
        value = self.integers(key)
        if value.ndim:
            self.refuse(key, f"must be one number, got {self[key]!r:.80}")
        return int(value)


def _flat(value: Any) -> Iterator[Any]:
    """What nested lists hold."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


if TYPE_CHECKING:
    _Reader = Callable[[_Entry, Exact | None, int], Encoding | None]


def _from_0_6_1(entry: _Entry, exact: Exact | None, axis: int) -> Encoding | None:
    content = entry.fields if isinstance(entry.fields, list) else [entry.fields]
    if not content:
        entry.refuse("list of encodings", "is empty")
    if _is_float(_Entry(entry.where, content[0]), "bitwidth"):
        return None
    channels = _by_key(entry.where, content, ("bitwidth", "scale", "offset", "is_symmetric"))
    unknown = "zero_point_shift", "rows_per_block"
    for fields in (f for f in content if not f.keys().isdisjoint(unknown)):
        _refuse_keys(_Entry(entry.where, fields), unknown)
    bits = channels.integers("bitwidth").tolist()
    scale, offset = channels.numbers("scale"), channels.integers("offset")
    return _encoding(
        scale if len(content) > 1 else scale[0],
        offset,
        tuple(bits) if len(set(bits)) > 1 else bits[0],
        channels.flags("is_symmetric", channels["is_symmetric"]) == {True},
        exact,
        axis,
    )


def _by_key(where: str, channels: list[Any], keys: tuple[str, ...]) -> _Entry:
    """The fields of several channels as one entry of lists, which are checked at once."""
    try:
        return _Entry(where, {key: [fields[key] for fields in channels] for key in keys})
    except (KeyError, TypeError):
        for fields in channels:
            for key in keys:
                _Entry(where, fields)[key]  # the error that names what is missing
        raise


def _from_1_0_0(entry: _Entry, exact: Exact | None, axis: int) -> Encoding | None:
    kind = entry.one("enc_type", str)
    if _is_float(entry, "bw"):
        return None
    _refuse_keys(entry, ("zero_point_shift", "per_block_int_scale"))
    if kind == "PER_BLOCK":
        return _blocks_from_1_0_0(entry, exact, axis)
    _refuse_keys(entry, ("block_size",))
    if kind not in ("PER_TENSOR", "PER_CHANNEL"):
        entry.refuse("enc_type", f"must be PER_TENSOR, PER_CHANNEL or PER_BLOCK, got {kind!r}")
    scale, offset = np.atleast_1d(entry.numbers("scale")), np.atleast_1d(entry.integers("offset"))
    if scale.shape != offset.shape or (kind == "PER_TENSOR" and scale.size != 1):
        entry.refuse("scale", f"has {scale.size} values for {offset.size} offsets and enc_type {kind}")
    bits = entry.integer("bw")
    return _encoding(scale if kind == "PER_CHANNEL" else scale[0], offset, bits, entry.flag("is_sym"), exact, axis)


def _blocks_from_1_0_0(entry: _Entry, exact: Exact | None, axis: int) -> Encoding:
    scale, offset, bits = entry.numbers("scale"), entry.integers("offset"), entry.integer("bw")
    shape = entry.shape
    if not (isinstance(shape, list) and all(type(n) is int for n in shape) and math.prod(shape) == scale.size):
        entry.refuse("block_size", f"needs the shape of {scale.size} scales under {SHAPES!r}; version 2.0.0 states it")
    narrow = bool((offset == 1 - (1 << (bits - 1))).all())
    grid, own = exact or (IntGrid(bits, True, narrow), axis)
    if not entry.flag("is_sym") or (offset != _container(grid).qmin).any():
        entry.refuse("offset", f"must be {_container(grid).qmin} with is_sym True where there are blocks")
    zero = np.zeros((), np.int64)
    return Encoding(scale.astype(np.float32).reshape(shape), zero, grid, own, entry.integer("block_size"))


def _from_2_0_0(entry: _Entry, exact: Exact | None, _: int) -> Encoding | None:
    _refuse_keys(entry, ("per_block_int_scale",))
    unsigned, is_integer, bits = entry.one("output_dtype", str).partition("int")
    if not is_integer or unsigned not in ("", "u") or not bits.isdecimal() or len(bits) > 3:
        entry.refuse("output_dtype", f"must be an integer type such as uint8, got {entry['output_dtype']!r}")
    grid, axis = exact or (IntGrid(int(bits), not unsigned), None)
    blocks = bool(entry.fields.get("block_size"))
    scale = entry.numbers("y_scale", nested=blocks)
    if "axis" in entry.fields:
        axis = entry.one("axis", int)
        if axis < 0:
            entry.refuse("axis", f"must not be negative, got {axis}")
    elif scale.size == 1:
        scale = scale.reshape(())
    if blocks:
        stated = "y_zero_point" in entry.fields
        zero_point = entry.integers("y_zero_point", nested=True) if stated else np.zeros((), np.int64)
        channels = None if axis is None else 1 - axis
        return Encoding(scale.astype(np.float32), zero_point, grid, channels, entry.integer("block_size"))
    zero_point = entry.integers("y_zero_point") if "y_zero_point" in entry.fields else np.zeros_like(scale, np.int64)
    if zero_point.size not in (1, scale.size):
        entry.refuse("y_zero_point", f"has {zero_point.size} values for {scale.size} scales")
    return Encoding(scale.astype(np.float32), zero_point.reshape(-1 if scale.ndim else ()), grid, axis)


def _is_float(entry: _Entry, width: str) -> bool:
    """Whether the entry says that its tensor stays float16 or float32."""
    kind = entry.one("dtype", str).lower()
    if kind == "float" and entry.integer(width) not in (16, 32):
        entry.refuse(width, f"must be 16 or 32 for dtype float, got {entry[width]!r}")
    if kind not in ("int", "float"):
        entry.refuse("dtype", f"must be int or float, got {entry['dtype']!r}")
    return bool(kind == "float")


def _refuse_keys(entry: _Entry, keys: tuple[str, ...]) -> None:
    """Block-wise, vector and half-shifted grids have no counterpart here."""
    for key in keys:
        if isinstance(entry.fields, dict) and entry.fields.get(key):
            entry.refuse(key, "is not supported: only per-tensor and per-channel integer encodings are")


def _encoding(
    scale: NDArray[np.float64],
    offset: NDArray[np.int64],
    bits: int | tuple[int, ...],
    symmetric: bool,
    exact: Exact | None,
    axis: int,
) -> Encoding:
    """scale: () or (C,); offset: (C,) = qmin - zero point. Without `exact`, AIMET's own rules tell the grid.

    A symmetric grid from -2^(bits-1) on is signed, from one above it signed and narrow, from 0 on unsigned; everything
    else that is flagged symmetric is signed with a zero point, and what is not is unsigned.
    """
    half = np.int64(1) << (np.asarray(bits, np.int64) - 1)
    narrow = symmetric and bool((offset == 1 - half).all())
    grid = exact[0] if exact else IntGrid(bits, signed=symmetric and bool(offset.any()), narrow=narrow)
    lowest = grid.qmin if exact is None else _container(grid).qmin
    channel_axis = exact[1] if exact else axis if scale.ndim else None
    shape = scale.shape if channel_axis is None else (-1,)
    return Encoding(scale.astype(np.float32).reshape(shape), (lowest - offset).reshape(shape), grid, channel_axis)
