"""QDQ files for tools that read an older opset: the same nodes, as that opset has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper

from pow2quant.adapters.onnx_qdq.nodes import replace, title
from pow2quant.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

OPSETS = range(13, 22)
"""The first has Q and DQ with a scale per channel, the last is the one that files are written in."""

OTHER_MEANING = {"GroupNormalization": 21}
"""Operations whose operands meant something else before an opset."""


def lower_opset(model: ModelProto, opset: int) -> None:
    """Writes a model in an older opset, in place.

    Raises ConfigError for an opset that is not legal; UnsupportedModelError, naming the node, for what it lacks: codes
    of 4 and 16 bits before 21, or an operation.
    """
    if opset not in OPSETS:
        raise ConfigError(f"opset: {opset} is not legal; legal: {OPSETS[0]} to {OPSETS[-1]}")
    stated = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx"):
            _lower(node, stated.version, opset, constants)
    stated.version = opset
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    replace(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in read])


def _lower(node: NodeProto, given: int, opset: int, constants: dict[str, TensorProto]) -> None:
    """One node. given: the opset that it is written in."""
    kind = constants[node.input[2]].data_type if node.op_type in ("QuantizeLinear", "DequantizeLinear") else 0
    if kind and opset < 21 and kind not in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32):
        raise _lacking(node, opset, f"codes of type {TensorProto.DataType.Name(kind).lower()}")
    try:
        newer, older = (defs.get_schema(node.op_type, version, "") for version in (given, opset))
    except defs.SchemaError as error:
        raise _lacking(node, opset, f"the operation {node.op_type}") from error
    if newer.since_version == older.since_version:
        return
    if opset < OTHER_MEANING.get(node.op_type, 0):
        raise _lacking(node, opset, f"the operation {node.op_type} with these operands")
    if "axes" in older.attributes and "axes" not in newer.attributes:
        _axes_as_attribute(node, opset, constants)
    for attribute in list(node.attribute):
        if attribute.name in older.attributes:
            continue
        if not _is_default(attribute, newer):
            raise _lacking(node, opset, f"the attribute {attribute.name}")
        node.attribute.remove(attribute)
    while node.input and not node.input[-1]:
        del node.input[-1]
    if len(node.input) > older.max_input:
        raise _lacking(node, opset, f"operand {older.max_input + 1}")


def _axes_as_attribute(node: NodeProto, opset: int, constants: dict[str, TensorProto]) -> None:
    if len(node.input) < 2 or not node.input[1]:
        return
    if node.input[1] not in constants:
        raise _lacking(node, opset, "axes that are computed")
    axes: NDArray[Any] = numpy_helper.to_array(constants[node.input[1]])
    del node.input[1]
    node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in np.atleast_1d(axes)]))


def _is_default(attribute: onnx.AttributeProto, schema: defs.OpSchema) -> bool:
    default = schema.attributes[attribute.name].default_value
    return bool(default.name) and helper.get_attribute_value(attribute) == helper.get_attribute_value(default)


def _lacking(node: NodeProto, opset: int, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"node {title(node)}: opset {opset} does not have {what}")
