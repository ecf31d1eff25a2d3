"""A correction as nodes of the network's ONNX file: MatMul, Add, ArgMin, two Gathers, Mul, Add behind its output.

They compute in float32: the network before them stays as exact as it was, the correction is no integer arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from pow2quant.adapters.files import IR_VERSION, OPSET
from pow2quant.errors import FileFormatError
from pow2quant.logits.cat import Correction

PREFIX = "correction"


def folded(model: onnx.ModelProto, correction: Correction) -> onnx.ModelProto:
    """A copy of the model whose output, under the same name, is corrected.

    Raises FileFormatError where there is not one output of (N, classes), or a correction is there already.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    if len(graph.output) != 1:
        raise FileFormatError(f"the model has {len(graph.output)} outputs; a correction is for one of (N, classes)")
    if any(node.name.startswith(f"{PREFIX}.") for node in graph.node):
        raise FileFormatError("the model has a correction already")
    name, classes = graph.output[0].name, correction.mean.size
    shape = [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim]
    if len(shape) not in (0, 2) or (shape and shape[1] not in (0, classes)):
        raise FileFormatError(f"{name}: has the shape {shape}; the correction is for (N, {classes})")
    raw = f"{PREFIX}.input"
    for node in graph.node:
        node.input[:] = [raw if i == name else i for i in node.input]
        node.output[:] = [raw if o == name else o for o in node.output]
    for info in graph.value_info:
        info.name = raw if info.name == name else info.name
    _append(graph, correction, raw, name)
    onnx.checker.check_model(made)
    return made


def alone(correction: Correction) -> onnx.ModelProto:
    """The correction as a model of its own: `logits` (N, classes) in, `corrected` out."""
    shape: list[str | int | None] = ["N", correction.mean.size]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("logits", "corrected")]
    graph = helper.make_graph([], PREFIX, ends[:1], ends[1:])
    _append(graph, correction, "logits", "corrected")
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(made)
    return made


def _append(graph: onnx.GraphProto, correction: Correction, source: str, target: str) -> None:
    """The nodes from the tensor `source` to the tensor `target`."""
    (towards, bias), (gain, offset) = correction.nearness, correction.blended
    arrays = {"towards": towards, "bias": bias, "gain": gain, "offset": offset}
    for key, array in arrays.items():
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), f"{PREFIX}.{key}"))
    own = {**{key: f"{PREFIX}.{key}" for key in arrays}, "in": source, "out": target}
    nodes: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("MatMul", ["in", "towards"], "projected", {}),
        ("Add", ["projected", "bias"], "distance", {}),
        ("ArgMin", ["distance"], "cluster", {"axis": 1, "keepdims": 0}),
        ("Gather", ["gain", "cluster"], "gains", {"axis": 0}),
        ("Gather", ["offset", "cluster"], "offsets", {"axis": 0}),
        ("Mul", ["in", "gains"], "scaled", {}),
        ("Add", ["scaled", "offsets"], "out", {}),
    )
    for kind, inputs, output, attributes in nodes:
        names = [own.get(i, f"{PREFIX}.{i}") for i in inputs]
        result = own.get(output, f"{PREFIX}.{output}")
        graph.node.append(helper.make_node(kind, names, [result], f"{PREFIX}.{output}", **attributes))
