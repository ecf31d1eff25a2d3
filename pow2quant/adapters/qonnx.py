"""QONNX: the float network with Quant nodes, for FINN and hls4ml. `to_qonnx` and `from_qonnx` are inverse.

Every quantized tensor, weights and biases included, is the result of one Quant and bears the tensor's own name; what
the Quant reads is called `<tensor>_unquantized`, and behind graph inputs the consumers are led to `<input>_quantized`.
Quant rounds x / scale + zero point, QuantizeLinear x / scale: they agree for a zero point of 0, which FINN wants too.

https://github.com/fastmachinelearning/qonnx/blob/main/docs/qonnx-custom-ops/quant_op.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from pow2quant import targets
from pow2quant.adapters import onnx_qdq
from pow2quant.adapters.files import (
    GRIDS,
    at_least_opset,
    check_names_and_shapes,
    exact_grids,
    lost_grids,
    parameter_codes,
)
from pow2quant.adapters.onnx_qdq import double, exact
from pow2quant.adapters.onnx_qdq.batch import fix_batch
from pow2quant.adapters.onnx_qdq.nodes import refuse_control_flow, replace, set_metadata
from pow2quant.artifact import Artifact
from pow2quant.errors import EncodingError, FileFormatError, UnsupportedModelError
from pow2quant.foreign import parsed
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from pow2quant.artifact import Table

DOMAIN = "qonnx.custom_op.general"
BEFORE, BEHIND = "_unquantized", "_quantized"


def export_qonnx(artifact: Artifact, folder: str | Path, *, batch: int | None = None) -> Path:
    """QONNX as `model.onnx`. batch: the only size that the file takes (FINN and hls4ml want 1); by default it is free.

    Raises UnsupportedModelError, naming the tensor, for a zero point, and for targets that do not round half to even.
    """
    target = targets.of(artifact.model)
    if target.rounding_matters:
        raise UnsupportedModelError(f"target {target.name} does not round half to even, as QONNX files here do")
    path = Path(folder) / "model.onnx"
    onnx_qdq.save(to_qonnx(artifact, batch), path)
    return path


def to_qonnx(artifact: Artifact, batch: int | None = None) -> ModelProto:
    """The artifact as a model with Quant nodes."""
    table = artifact.per_channel().encodings
    check_names_and_shapes(artifact.model, table)
    _check_zero_points(table)
    model = ModelProto()
    model.CopyFrom(at_least_opset(artifact.model))
    if batch is not None:
        fix_batch(model, batch)
    refuse_control_flow(model.graph)
    exact.expand(model.graph, table)
    double.widen(model.graph, table)
    _put(model.graph, table)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    set_metadata(model, json.dumps(lost_grids(table, _Stated(model.graph).encodings())))
    return model


def from_qonnx(model: ModelProto) -> Artifact:
    """The float network and the table in a file that `to_qonnx` wrote. Raises FileFormatError, naming the tensor."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    table = _Stated(graph).encodings()
    metadata = {entry.key: entry.value for entry in copy.metadata_props}
    try:
        lost = exact_grids(parsed(metadata.get(GRIDS, "{}")), f"metadata: {GRIDS}")
        for name, (grid, axis) in lost.items():
            scale = table[name].scale.reshape(() if axis is None else -1)
            table[name] = Encoding(scale, np.zeros((), np.int64), grid, axis)
    except (ValueError, KeyError, RecursionError, EncodingError) as error:
        raise FileFormatError(f"metadata: {GRIDS}: {error}") from error
    _take(graph)
    double.narrow(graph)
    exact.collapse(graph, table)
    set_metadata(copy, None)
    replace(copy.opset_import, [entry for entry in copy.opset_import if entry.domain != DOMAIN])
    return Artifact(copy, table)


def _check_zero_points(table: Table) -> None:
    for name, encoding in table.items():
        if encoding.zero_point.any():
            raise UnsupportedModelError(
                f"{name}: a zero point; QONNX adds it before it rounds, so that halves differ (--target qonnx has none)"
            )


def _put(graph: onnx.GraphProto, table: Table) -> None:
    """Puts a Quant behind every tensor of the table, in place."""
    nodes, parameters = list[NodeProto](), {tensor.name: tensor for tensor in graph.initializer}
    renamed = {v.name: v.name + BEHIND for v in graph.input if v.name in table and v.name not in parameters}
    for name, tensor in parameters.items():
        if name in table:
            parameter_codes(tensor, table[name])
            nodes.append(_quant(graph, name, table[name], name + BEFORE, name, len(tensor.dims)))
            tensor.name = name + BEFORE
    nodes += [_quant(graph, name, table[name], name, behind, 0) for name, behind in renamed.items()]
    for node in graph.node:
        nodes.append(node)
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for index, name in enumerate(node.output):
            if name in table:
                node.output[index] = name + BEFORE
                nodes.append(_quant(graph, name, table[name], name + BEFORE, name, 0))
    replace(graph.node, nodes)
    replace(graph.input, [value for value in graph.input if value.name not in parameters])


def _quant(graph: onnx.GraphProto, name: str, e: Encoding, source: str, result: str, ndim: int) -> NodeProto:
    """A Quant and its constants. ndim: of a tensor with channels."""
    if e.axis is not None and not ndim:
        raise UnsupportedModelError(f"{name}: a scale for each channel of a result; QONNX files here have one")
    scale, bits = (e.along(np.asarray(v, np.float32), [1] * ndim) for v in (e.scale, e.grid.bits))
    constants = {"scale": scale, "zero_point": np.zeros((), np.float32), "bits": bits}
    for key, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}/Quant/{key}"))
    return helper.make_node(
        "Quant",
        [source, *(f"{name}/Quant/{key}" for key in constants)],
        [result],
        f"{name}/Quant",
        domain=DOMAIN,
        signed=int(e.grid.signed),
        narrow=int(e.grid.narrow),
        rounding_mode="ROUND",
    )


class _Stated:
    """What the Quant nodes of a graph say."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.quants = [node for node in graph.node if (node.op_type, node.domain) == ("Quant", DOMAIN)]
        self.constants = {tensor.name: tensor for tensor in graph.initializer}

    def encodings(self) -> Table:
        """By tensor, as the nodes alone tell it. Raises FileFormatError, naming the tensor."""
        return {node.name.removesuffix("/Quant"): self._encoding(node) for node in self.quants}

    def _encoding(self, node: NodeProto) -> Encoding:
        try:
            scale, zero_point, bits = (numpy_helper.to_array(self.constants[name]) for name in node.input[1:])
            said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if said["rounding_mode"] != b"ROUND" or zero_point.any():
                raise FileFormatError(f"node {node.name}: only rounding_mode ROUND and a zero point of 0 can be read")
            grid = IntGrid(int(bits.max()), bool(said["signed"]), bool(said["narrow"]))
            axis = int(np.argmax(scale.shape)) if scale.size > 1 else None
            return Encoding(scale.reshape(() if axis is None else -1), np.zeros((), np.int64), grid, axis)
        except (KeyError, ValueError, EncodingError) as error:
            raise FileFormatError(f"node {node.name}: no Quant that can be read: {error}") from error


def _take(graph: onnx.GraphProto) -> None:
    """Takes the Quant nodes out, in place: every tensor has its own name again."""
    quants = _Stated(graph).quants
    inputs = {value.name for value in graph.input}
    back = {n.output[0]: n.input[0] for n in quants if n.input[0] in inputs}
    ahead = {n.input[0]: n.output[0] for n in quants if n.input[0] not in inputs}
    own = {name for node in quants for name in node.input[1:]}
    kept = [node for node in graph.node if node not in quants]
    for node in kept:
        node.input[:] = [back.get(name, name) for name in node.input]
        node.output[:] = [ahead.get(name, name) for name in node.output]
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in own])
    for tensor in graph.initializer:
        tensor.name = ahead.get(tensor.name, tensor.name)
    replace(graph.node, kept)
