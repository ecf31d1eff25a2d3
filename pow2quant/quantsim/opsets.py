"""A model in an older or newer opset: what has moved is moved, everything else has to mean the same, or is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper, numpy_helper

from pow2quant.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Constants = Mapping[str, NDArray[np.generic]]

OPSET = 17
"""What AIMET writes unless it is told."""

OPSETS = range(9, 24)

REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin")

MOVED: dict[str, tuple[int, tuple[str, ...]]] = {
    **dict.fromkeys(REDUCTIONS, (18, ("axes",))),
    "ReduceSum": (13, ("axes",)),
    "Split": (13, ("split",)),
    "Squeeze": (13, ("axes",)),
    "Unsqueeze": (13, ("axes",)),
    "Clip": (11, ("min", "max")),
    "Pad": (11, ("pads", "value")),
    "Slice": (10, ("starts", "ends", "axes")),
}
"""Since which opset an operation's attributes, in this order, are inputs behind the first."""

CHANGED = {"GroupNormalization": 21, "Resize": 11}
"""Before which opset an operation of this name meant something else."""


def with_opset(model: onnx.ModelProto, opset: int | None) -> onnx.ModelProto:
    """The same model in another opset. None: in 17, or the least above in which it can be said.

    Raises ConfigError where it cannot be said in the opset.
    """
    if opset is not None:
        return _in(model, opset)
    newest = model.opset_import[0].version
    for each in range(OPSET, newest):
        try:
            return _in(model, each)
        except ConfigError:
            continue
    return model


def _in(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    if opset not in OPSETS:
        raise ConfigError(f"opset_version: {opset!r} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
    written = onnx.ModelProto()
    written.CopyFrom(model)
    try:
        for node in written.graph.node:
            onnx.defs.get_schema(node.op_type, opset)
        if opset < model.opset_import[0].version:
            _lower(written, opset)
        written.opset_import[0].version = opset
        onnx.checker.check_model(written, full_check=True)
    except ConfigError:
        raise
    except Exception as error:  # the checker raises whatever its C++ raises
        reason = re.sub(r"\s+", " ", str(error)).strip()[:200]
        raise ConfigError(f"opset_version: the network cannot be written with opset {opset}: {reason}") from error
    return written


def _lower(model: onnx.ModelProto, opset: int) -> None:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    ranks |= {name: value.ndim for name, value in constants.items()}
    now = model.opset_import[0].version
    for node in model.graph.node:
        since, attributes = MOVED.get(node.op_type, (0, ()))
        if opset < since:
            _move(node, attributes, constants, opset)
        if opset < CHANGED.get(node.op_type, 0):
            raise ConfigError(f"opset_version: {node.op_type} needs opset {CHANGED[node.op_type]}")
        _drop_defaults(node, opset, now)
        if opset < 13 and node.op_type in ("Softmax", "LogSoftmax"):
            rank = ranks[node.input[0]]
            if _axis(node, -1) % rank != rank - 1:
                raise ConfigError(f"opset_version: {node.op_type} over an axis that is not the last needs opset 13")
        if opset < 13:
            _count_from_the_front(node, ranks)
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _count_from_the_front(node: onnx.NodeProto, ranks: Mapping[str, int]) -> None:
    """Negative axes are newer than opset 10, and the default of Softmax was another."""
    rank = ranks[node.output[0] if node.op_type == "Unsqueeze" else node.input[0]]
    for attribute in node.attribute:
        if attribute.name == "axis" and attribute.i < 0:
            attribute.i += rank
        if attribute.name == "axes":
            attribute.ints[:] = [axis % rank for axis in attribute.ints]
    if node.op_type in ("Softmax", "LogSoftmax") and not any(a.name == "axis" for a in node.attribute):
        node.attribute.append(helper.make_attribute("axis", rank - 1))


def _move(node: onnx.NodeProto, attributes: tuple[str, ...], constants: Constants, opset: int) -> None:
    """Makes the constant inputs behind the first attributes."""
    for name, source in zip(attributes, node.input[1:], strict=False):
        if source and source not in constants:
            raise ConfigError(
                f"opset_version: {node.name or node.op_type}: a computed {name} needs a later opset than {opset}"
            )
        if source:
            value: Any = constants[source].tolist()
            node.attribute.append(helper.make_attribute(name, value))
    for rest in filter(None, node.input[1 + len(attributes) :]):
        if rest not in constants or (constants[rest] != 1).any():  # steps of a Slice
            raise ConfigError(f"opset_version: {node.name or node.op_type}: its steps need a later opset than {opset}")
    del node.input[1:]


def _drop_defaults(node: onnx.NodeProto, opset: int, now: int) -> None:
    """Leaves out attributes that the opset does not know yet, where they have their defaults."""
    known = onnx.defs.get_schema(node.op_type, opset).attributes
    newer = onnx.defs.get_schema(node.op_type, now).attributes
    for attribute in [a for a in node.attribute if a.name not in known and a.name in newer]:
        default, value = newer[attribute.name].default_value, helper.get_attribute_value(attribute)
        plain = attribute.name == "dilations" and set(value) == {1}
        if plain or (default.type and helper.get_attribute_value(default) == value):
            node.attribute.remove(attribute)


def _axis(node: onnx.NodeProto, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), default)
