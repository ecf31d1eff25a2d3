"""The quantized network as plain float ONNX: every quantizer written as Div, Round, Clip and Mul.

What comes out of a quantizer is one of at most 2^24 multiples of its scale, and with scales of 2^k neither the division
nor the product rounds, so any runtime that computes float32 by IEEE 754 gives the bits of the QDQ file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from pow2quant.adapters.files import at_least_opset, check_names_and_shapes, parameter_codes
from pow2quant.adapters.onnx_qdq import double, exact
from pow2quant.adapters.onnx_qdq.nodes import refuse_control_flow, replace
from pow2quant.graphs import GraphIndex

if TYPE_CHECKING:
    import onnx

    from pow2quant.artifact import Artifact
    from pow2quant.pow2_constraints import Encoding

BEFORE, BEHIND = "/unrounded", "/rounded"


def to_float_ops(artifact: Artifact, outputs: list[str] | None = None) -> ModelProto:
    """The artifact without Q and DQ. outputs: tensors that are given in place of the network's outputs.

    Raises EncodingError, naming the tensor, where a weight is off its grid.
    """
    table = artifact.per_channel().encodings
    check_names_and_shapes(artifact.model, table)
    model = ModelProto()
    model.CopyFrom(at_least_opset(artifact.model))
    graph = model.graph
    refuse_control_flow(graph)
    ranks = {name: len(shape) for name, shape in GraphIndex(graph).shapes.items()}
    exact.expand(graph, table)
    double.widen(graph, table)
    parameters = {tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        if tensor.name in table:
            parameter_codes(tensor, table[tensor.name])
    renamed = {v.name: v.name + BEHIND for v in graph.input if v.name in table and v.name not in parameters}
    nodes = [n for name, behind in renamed.items() for n in _rounded(graph, name, table[name], name, behind, ranks)]
    for node in graph.node:
        nodes.append(node)
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for index, name in enumerate(node.output):
            if name in table:
                node.output[index] = name + BEFORE
                nodes += _rounded(graph, name, table[name], name + BEFORE, name, ranks)
    replace(graph.node, nodes)
    if outputs is not None:
        replace(graph.output, [helper.make_empty_tensor_value_info(renamed.get(name, name)) for name in outputs])
    return model


def _rounded(
    graph: onnx.GraphProto, name: str, e: Encoding, source: str, result: str, ranks: dict[str, int]
) -> list[NodeProto]:
    """The nodes from `source` to `result`, rounded to the encoding of `name`."""

    def constant(key: str, values: Any) -> str:
        shaped = e.along(np.asarray(values, np.float32), [1] * ranks.get(name, 0))
        graph.initializer.append(numpy_helper.from_array(np.asarray(shaped), f"{name}/{key}"))
        return f"{name}/{key}"

    low, high = (int(np.max(end - e.zero_point)) for end in (e.grid.qmin, e.grid.qmax))
    scale = constant("scale", e.scale)
    bounds = [constant(key, np.float32(end)) for key, end in (("low", low), ("high", high))]
    steps = [("Div", [source, scale]), ("Round", [f"{name}/Div"]), ("Clip", [f"{name}/Round", *bounds])]
    nodes = [helper.make_node(op, inputs, [f"{name}/{op}"], f"{name}/{op}") for op, inputs in steps]
    return [*nodes, helper.make_node("Mul", [f"{name}/Clip", scale], [result], f"{name}/Mul")]
