"""Biases as floats on the lattice of the sums that they join, in place of integers with a DQ: a reversible pair.

A float bias b = q * s_in * s_w with |q| < 2^24 is the same number, so the file computes the same. Where nothing says
what was quantized, a reader takes it for a bias that stays float; the encodings therefore stand in the metadata.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, numpy_helper

from pow2quant.adapters.files import exact_grids, parameter_codes
from pow2quant.adapters.onnx_qdq.nodes import BIASED, replace
from pow2quant.adapters.onnx_qdq.stated import Stated
from pow2quant.errors import EncodingError, FileFormatError
from pow2quant.foreign import parsed
from pow2quant.pow2_constraints import Encoding

if TYPE_CHECKING:
    from pow2quant.artifact import Table

BIASES = "pow2quant.biases"
"""The key in a file's metadata under which the encodings of float biases stand, with their scales."""


def put(model: ModelProto, table: Table) -> None:
    """Writes the biases of layers as floats, in place. table: the encodings of the model."""
    graph = model.graph
    biases = {node.input[2] for node in graph.node if node.op_type in BIASED and len(node.input) > 2}
    stated = Stated(graph.initializer, graph.node)
    gone, floats = list[Any](), []
    for name in sorted(biases & table.keys()):
        node = stated.producer[name]
        codes = numpy_helper.to_array(stated.initializers[node.input[0]]).astype(np.int64)
        floats.append(numpy_helper.from_array(table[name].dequantize(codes), name))
        gone.append(node)
    dropped = {name for node in gone for name in node.input}
    kept = [node for node in graph.node if node not in gone]
    read = {name for node in kept for name in node.input}
    replace(graph.node, kept)
    replace(graph.initializer, [*(t for t in graph.initializer if t.name in read or t.name not in dropped), *floats])
    entries = {tensor.name: _entry(table[tensor.name]) for tensor in floats}
    model.metadata_props.add(key=BIASES, value=json.dumps(entries))


def take(model: ModelProto) -> Table:
    """The encodings of float biases that the metadata state; the entry is taken out.

    Raises FileFormatError, naming the bias, where the metadata are damaged or a value is not on the grid.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == BIASES), None)
    if text is None:
        return {}
    replace(model.metadata_props, [entry for entry in model.metadata_props if entry.key != BIASES])
    try:
        entries = parsed(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"metadata: {BIASES}: not JSON: {error}") from error
    grids = exact_grids(entries, f"metadata: {BIASES}")
    tensors, found = {tensor.name: tensor for tensor in model.graph.initializer}, dict[str, Encoding]()
    for name, (grid, axis) in grids.items():
        if name not in tensors:
            raise FileFormatError(f"metadata: {BIASES}: {name} is no constant of the file")
        try:
            scale = np.asarray(entries[name]["scale"], np.float32)
            found[name] = Encoding(scale, np.zeros((), np.int64), grid, axis)
            parameter_codes(tensors[name], found[name])
        except (EncodingError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"metadata: {BIASES}: {name}: {error}") from error
    return found


def _entry(encoding: Encoding) -> dict[str, Any]:
    grid = encoding.grid
    return {
        "bits": grid.bits,
        "signed": grid.signed,
        "narrow": grid.narrow,
        "axis": encoding.axis,
        "scale": encoding.scale.tolist(),
    }
