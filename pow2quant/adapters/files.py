"""What every format needs: checked pairing of a model with its table, and a place for lost grids.

A format cannot hold every grid: AIMET's JSON knows no narrow grid, ONNX no 5-bit integers. Such a format writes what it
can, and beside it, under the key `GRIDS`, the exact grid and axis of those tensors that a plain reader would get wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pow2quant.errors import EncodingError, FileFormatError
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pow2quant.artifact import Table

GRIDS = "pow2quant.grids"
"""The key of the lost grids, in an ONNX file's metadata and at the top of a JSON file."""

OPSET = 21
"""The oldest opset whose QuantizeLinear and DequantizeLinear know 4 and 16 bits."""

IR_VERSION = 10
"""The file format's version that belongs to it."""


def lost_grids(table: Table, plain: Mapping[str, Encoding]) -> dict[str, Any]:
    """What to write under `GRIDS`: the grid and axis of every tensor whose plain reading is not its encoding."""
    return {
        name: {"bits": e.grid.bits, "signed": e.grid.signed, "narrow": e.grid.narrow, "axis": e.axis}
        for name, e in table.items()
        if plain[name] != e
    }


def exact_grids(lost: Any, where: str) -> dict[str, tuple[IntGrid, int | None]]:
    """The inverse of `lost_grids`: grid and axis by tensor. Raises FileFormatError with `where` and the tensor."""
    if not isinstance(lost, dict):
        raise FileFormatError(f"{where}: expected an object, got {type(lost).__name__}")
    return {name: _exact_grid(entry, f"{where}: {name}") for name, entry in lost.items()}


def _exact_grid(entry: Any, where: str) -> tuple[IntGrid, int | None]:
    try:
        bits, signed, narrow, axis = (entry[key] for key in ("bits", "signed", "narrow", "axis"))
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{where}: expected the keys bits, signed, narrow and axis, got {entry!r}") from error
    widths = bits if isinstance(bits, list) else [bits]
    integers = all(type(width) is int for width in widths) and (axis is None or (type(axis) is int and axis >= 0))
    if not (integers and type(signed) is bool and type(narrow) is bool):
        raise FileFormatError(f"{where}: impossible grid {entry!r}")
    try:
        return IntGrid.of(bits, signed, narrow), axis
    except EncodingError as error:
        raise FileFormatError(f"{where}: {error}") from error


def check_names_and_shapes(model: onnx.ModelProto, table: Table) -> None:
    """Raises EncodingError when `model` lacks a tensor of `table`, or a per-channel encoding does not fit its shape."""
    shapes = _shapes(model.graph)
    unknown = sorted(table.keys() - shapes.keys())
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise EncodingError(f"the model has no tensor {', '.join(unknown[:5])}{more}, which the encodings name")
    for name, encoding in table.items():
        shape, axis = shapes[name], encoding.axis
        if shape is None or axis is None:
            continue
        if encoding.block is not None:
            _check_blocks(name, encoding, shape)
        elif axis >= len(shape) or shape[axis] not in (encoding.scale.size, 0):
            raise EncodingError(f"{name}: {encoding.scale.size} scales on axis {axis} do not fit the shape {shape}")


def _check_blocks(name: str, encoding: Encoding, shape: tuple[int, ...]) -> None:
    try:
        encoding.check_fits(shape)
    except EncodingError as error:
        raise EncodingError(f"{name}: {error}") from error


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...] | None]:
    """The shape of every tensor as far as the file states it; 0 stands for a free dimension."""
    shapes: dict[str, tuple[int, ...] | None] = {name: None for node in graph.node for name in node.output if name}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim) if tensor.HasField("shape") else None
    shapes.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    return shapes


def parameter_codes(tensor: onnx.TensorProto, encoding: Encoding) -> NDArray[np.int64]:
    """The integers of a weight or bias, the shape of the tensor.

    Raises EncodingError, naming the tensor, when a value does not lie on the grid.
    """
    values = onnx.numpy_helper.to_array(tensor)
    if values.dtype != np.float32:
        raise EncodingError(f"{tensor.name}: a quantized parameter must be float32, got {values.dtype}")
    try:
        codes = encoding.quantize(values)
    except EncodingError as error:
        raise EncodingError(f"{tensor.name}: {error}") from error
    distance = np.abs(encoding.dequantize(codes) - values)
    # Beyond 24 bits float32 rounds the code itself, so that a free scale returns to it within one unit only.
    slack = np.where(np.abs(codes) > 1 << 24, np.spacing(np.abs(values)), 0)
    off = int((distance > slack).sum())
    if off:
        raise EncodingError(f"{tensor.name}: {off} of {values.size} values are not on the grid of their encoding")
    return codes


def at_least_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or a copy converted to `OPSET` when its own is older.

    Raises FileFormatError when onnx cannot convert it.
    """
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), OPSET)
    if version >= OPSET and model.ir_version >= IR_VERSION:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, max(version, OPSET))
    except Exception as error:  # the converter raises whatever its C++ raises
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(f"the model cannot be converted from opset {version} to {OPSET}: {reason}") from error
    noted = {node.output[0]: node.metadata_props for node in model.graph.node if node.output}
    for node in converted.graph.node:  # the converter drops them
        if node.output and not node.metadata_props:
            node.metadata_props.extend(noted.get(node.output[0], ()))
    converted.ir_version = max(converted.ir_version, IR_VERSION)
    return converted
